//! How long and how large anything that a caller sends may be.
//!
//! Always holds: a name that reaches the state machine is printable, has no NUL and no line break,
//! and is bounded; so is every text.

use dtr_proto::{ANNOTATIONS_BYTES_MAX, v1};
use tonic::Status;

/// Bytes of a job's, worker's, barrier's or dataset's name.
const NAME_BYTES_MAX: usize = 256;
/// Bytes of any other text.
const TEXT_BYTES_MAX: usize = 4_096;
/// Bytes of a shard: more than any filesystem takes.
const SHARD_BYTES_MAX: u64 = 1 << 62;
/// Replicated entries that a shard names.
const REPLICATED_MAX: usize = 8;
/// Bytes of a message, but for registering a dataset's files.
pub(crate) const MESSAGE_BYTES_MAX: usize = 4 << 20;
/// Shards in one part of the list that a publisher gets.
pub(crate) const PART_SHARDS: usize = 1_000;

/// A name that is neither empty nor too long, and can be printed.
pub(crate) fn name(what: &str, value: &str) -> Result<(), Status> {
    if value.is_empty() {
        return Err(refuse(&format!("`{what}` is empty"), "give it a name"));
    }
    if value.len() > NAME_BYTES_MAX {
        let given = value.len();
        return Err(refuse(
            &format!("`{what}` has {given} bytes, at most {NAME_BYTES_MAX} are allowed"),
            "use a shorter name",
        ));
    }
    if value.chars().any(char::is_control) {
        return Err(refuse(&format!("`{what}` has control characters"), "use a printable name"));
    }
    Ok(())
}

/// A name, or the empty path of a state as a whole.
fn name_or_none(what: &str, value: &str) -> Result<(), Status> {
    if value.is_empty() { Ok(()) } else { name(what, value) }
}

/// A text that is not too long.
pub(crate) fn text(what: &str, value: &str) -> Result<(), Status> {
    if value.len() > TEXT_BYTES_MAX || value.contains('\0') {
        let given = value.len();
        return Err(refuse(
            &format!(
                "`{what}` has {given} bytes, at most {TEXT_BYTES_MAX} without NUL are allowed"
            ),
            "shorten it",
        ));
    }
    Ok(())
}

/// An identity that names a worker; gives its job.
pub(crate) fn identity(identity: Option<&v1::Identity>) -> Result<(), Status> {
    let identity =
        identity.ok_or_else(|| refuse("`identity` is missing", "say which worker calls"))?;
    name("job", &identity.job)?;
    name("worker_id", &identity.worker_id)
}

/// A shard: its file's name within a step is one component.
pub(crate) fn shard(shard: Option<&v1::Shard>) -> Result<(), Status> {
    let Some(shard) = shard else { return Ok(()) };
    name("file", &shard.file)?;
    if shard.file.contains('/') || shard.file.starts_with('.') {
        return Err(refuse(
            &format!("`{}` is not a file name within a step", shard.file),
            "report the shard's name without a directory",
        ));
    }
    let bytes = shard.bytes.max(shard.raw_bytes);
    if bytes > SHARD_BYTES_MAX {
        return Err(refuse(
            &format!("a shard of {bytes} bytes is reported, at most {SHARD_BYTES_MAX} are taken"),
            "report what was written",
        ));
    }
    if shard.replicated.len() > REPLICATED_MAX {
        let given = shard.replicated.len();
        return Err(refuse(
            &format!("{given} entries are named as replicated, at most {REPLICATED_MAX} are"),
            "name the first ones",
        ));
    }
    if shard.annotations.len() > ANNOTATIONS_BYTES_MAX {
        let given = shard.annotations.len();
        return Err(refuse(
            &format!("`annotations` has {given} bytes, at most {ANNOTATIONS_BYTES_MAX} are taken"),
            "attach less to the checkpoint",
        ));
    }
    shard.replicated.iter().try_for_each(|entry| name_or_none("replicated", entry))
}

/// Attempts that a rank offers to load.
pub(crate) fn attempts(attempts: &[String]) -> Result<(), Status> {
    attempts.iter().try_for_each(|attempt| name_or_none("attempts", attempt))
}

fn refuse(why: &str, hint: &str) -> Status {
    Status::invalid_argument(format!("{why}\nhint: {hint}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_bounded_and_printable() {
        assert!(name("job", "gpt/run-1 ü").is_ok());
        for bad in ["", "a\0b", "a\nb", "a\u{7f}", &"x".repeat(NAME_BYTES_MAX + 1)] {
            assert!(name("job", bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_shard_stays_in_its_step() {
        let of = |file: &str| v1::Shard { file: file.into(), ..v1::Shard::default() };
        assert!(shard(Some(&of("rank-00000.ab.shard"))).is_ok());
        for bad in ["../x", "/etc/passwd", "a/b", ".hidden", ""] {
            assert!(shard(Some(&of(bad))).is_err(), "{bad:?}");
        }
        let names = |count| v1::Shard {
            replicated: vec!["model".into(); count],
            ..of("rank-00000.ab.shard")
        };
        assert!(shard(Some(&names(REPLICATED_MAX))).is_ok());
        assert!(shard(Some(&names(REPLICATED_MAX + 1))).is_err());
        let sized = |bytes, raw_bytes| v1::Shard { bytes, raw_bytes, ..names(0) };
        assert!(shard(Some(&sized(SHARD_BYTES_MAX, SHARD_BYTES_MAX))).is_ok());
        assert!(shard(Some(&sized(SHARD_BYTES_MAX + 1, 0))).is_err());
        assert!(shard(Some(&sized(0, u64::MAX))).is_err());
        let annotated = |bytes| v1::Shard { annotations: vec![0; bytes], ..names(0) };
        assert!(shard(Some(&annotated(ANNOTATIONS_BYTES_MAX))).is_ok());
        assert!(shard(Some(&annotated(ANNOTATIONS_BYTES_MAX + 1))).is_err());
    }
}
