//! Names of directories and files in a store, made and parsed here and nowhere else.
//!
//! ```text
//! step-000000001000/                                      a checkpoint, by step
//!     rank-00000.0123456789abcdef0123456789abcdef.shard   what one rank wrote in one attempt
//!     manifest.json                                       its existence commits the checkpoint
//!     manifest.json.0123456789abcdef0123456789abcdef.tmp  a manifest that is being written
//! ```
//!
//! Always holds: a name is accepted only if our own writer would have written exactly it, so no
//! name read from a medium leaves the store.

use std::fmt;

/// Name of the manifest within a step directory.
pub const MANIFEST_FILE: &str = "manifest.json";

/// Identity of one try at writing a step: 16 random bytes, shown as 32 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AttemptId(pub [u8; 16]);

impl AttemptId {
    /// An id from 16 bytes of the caller's entropy source.
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Reads what `Display` writes, and nothing else.
    pub fn parse(text: &str) -> Option<Self> {
        // A sign or a capital would parse as hex too; writing it back distinguishes them.
        let id = Self(u128::from_str_radix(text, 16).ok()?.swap_bytes().to_le_bytes());
        (id.to_string() == text).then_some(id)
    }
}

impl fmt::Display for AttemptId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

impl fmt::Debug for AttemptId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

/// Name of the directory that holds the checkpoint of `step`: sorted by name is sorted by step, up
/// to twelve digits.
pub fn step_dir_name(step: u64) -> String {
    format!("step-{step:012}")
}

/// The step of a directory that [`step_dir_name`] named.
pub fn parse_step_dir(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (step_dir_name(step) == name).then_some(step)
}

/// Name of the file that `rank` writes in `attempt`.
pub fn shard_file_name(rank: u32, attempt: AttemptId) -> String {
    format!("rank-{rank:05}.{attempt}.shard")
}

/// The rank and attempt of a file that [`shard_file_name`] named.
pub fn parse_shard_file(name: &str) -> Option<(u32, AttemptId)> {
    let (rank, attempt) = name.strip_prefix("rank-")?.strip_suffix(".shard")?.split_once('.')?;
    let (rank, attempt) = (rank.parse().ok()?, AttemptId::parse(attempt)?);
    (shard_file_name(rank, attempt) == name).then_some((rank, attempt))
}

/// Name under which the manifest of `attempt` is written before it is published.
pub fn manifest_temporary_name(attempt: AttemptId) -> String {
    format!("{MANIFEST_FILE}.{attempt}.tmp")
}

/// The attempt of a file that [`manifest_temporary_name`] named.
pub fn parse_manifest_temporary(name: &str) -> Option<AttemptId> {
    let attempt = name.strip_prefix(MANIFEST_FILE)?.strip_prefix('.')?.strip_suffix(".tmp")?;
    AttemptId::parse(attempt)
}

/// The same for a rank: each that is asked to publish an attempt writes a file of its own, or one
/// could rename what another is still writing.
pub(crate) fn manifest_temporary_name_of(attempt: AttemptId, rank: u32) -> String {
    match rank {
        0 => manifest_temporary_name(attempt),
        rank => format!("{MANIFEST_FILE}.{attempt}.{rank:05}.tmp"),
    }
}

/// Whether [`manifest_temporary_name_of`] gives this name to a file.
pub(crate) fn is_manifest_temporary(name: &str) -> bool {
    let of_rank = || {
        let (base, rank) = name.strip_suffix(".tmp")?.rsplit_once('.')?;
        let attempt = parse_manifest_temporary(&format!("{base}.tmp"))?;
        let rank = rank.parse().ok().filter(|rank| *rank > 0)?;
        (manifest_temporary_name_of(attempt, rank) == name).then_some(())
    };
    parse_manifest_temporary(name).is_some() || of_rank().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEX: &str = "00112233445566778899aabbccddeeff";

    #[test]
    fn names_look_as_documented() {
        let attempt = AttemptId::parse(HEX).unwrap();
        assert_eq!(attempt.0[..3], [0x00, 0x11, 0x22]);
        assert_eq!(step_dir_name(1000), "step-000000001000");
        assert_eq!(step_dir_name(u64::MAX), "step-18446744073709551615");
        assert_eq!(shard_file_name(7, attempt), format!("rank-00007.{HEX}.shard"));
        assert_eq!(shard_file_name(u32::MAX, attempt), format!("rank-4294967295.{HEX}.shard"));
        assert_eq!(manifest_temporary_name(attempt), format!("manifest.json.{HEX}.tmp"));
        let names = [0, 7, u32::MAX].map(|rank| manifest_temporary_name_of(attempt, rank));
        assert_eq!(names[1], format!("manifest.json.{HEX}.00007.tmp"));
        assert!(names.iter().all(|name| is_manifest_temporary(name)), "{names:?}");
        for wrong in ["7", "00000", "000007", "+0007", "x"] {
            assert!(!is_manifest_temporary(&format!("manifest.json.{HEX}.{wrong}.tmp")), "{wrong}");
        }
    }

    #[test]
    fn steps_that_no_writer_wrote_are_refused() {
        for name in [
            "",
            "step-",
            "step-1",
            "step-0000000000001",
            "step-+00000000001",
            "step--00000000001",
            "step-18446744073709551616",
            "Step-000000000001",
            "step-000000000001 ",
            "step-00000000000a",
            "step-000000000001/",
            "../step-000000000001",
        ] {
            assert_eq!(parse_step_dir(name), None, "{name}");
        }
    }

    #[test]
    fn shards_that_no_writer_wrote_are_refused() {
        for name in [
            format!("rank-0.{HEX}.shard"),
            format!("rank-000000.{HEX}.shard"),
            format!("rank-+0000.{HEX}.shard"),
            format!("rank-4294967296.{HEX}.shard"),
            format!("rank-00000.{}.shard", HEX.to_uppercase()),
            format!("rank-00000.+{}.shard", &HEX[1..]),
            format!("rank-00000.{}.shard", &HEX[1..]),
            format!("rank-00000.0{HEX}.shard"),
            format!("rank-00000.{HEX}"),
            format!("rank-00000.{HEX}.shard.shard"),
            format!("../rank-00000.{HEX}.shard"),
        ] {
            assert_eq!(parse_shard_file(&name), None, "{name}");
        }
    }

    #[test]
    fn temporaries_that_no_writer_wrote_are_refused() {
        for name in
            ["manifest.json", "manifest.json.tmp", "manifest.json..tmp", "manifest.json.0.tmp"]
        {
            assert_eq!(parse_manifest_temporary(name), None, "{name}");
        }
    }

    proptest! {
        #[test]
        fn names_round_trip(step: u64, rank: u32, bytes: [u8; 16]) {
            let attempt = AttemptId::from_bytes(bytes);
            prop_assert_eq!(AttemptId::parse(&attempt.to_string()), Some(attempt));
            prop_assert_eq!(parse_step_dir(&step_dir_name(step)), Some(step));
            let name = shard_file_name(rank, attempt);
            prop_assert_eq!(parse_shard_file(&name), Some((rank, attempt)));
            let temporary = manifest_temporary_name(attempt);
            prop_assert_eq!(parse_manifest_temporary(&temporary), Some(attempt));
        }

        #[test]
        fn what_is_accepted_is_what_would_be_written(
            name in concat!(
                "(step-|rank-|manifest.json.)[-+0-9a-fA-F]{0,34}",
                "(\\.[0-9a-fA-F]{30,34})?(.shard|.tmp)?",
            ),
        ) {
            if let Some(step) = parse_step_dir(&name) {
                prop_assert_eq!(step_dir_name(step), name.clone());
            }
            if let Some((rank, attempt)) = parse_shard_file(&name) {
                prop_assert_eq!(shard_file_name(rank, attempt), name.clone());
            }
            if let Some(attempt) = parse_manifest_temporary(&name) {
                prop_assert_eq!(manifest_temporary_name(attempt), name);
            }
        }
    }
}
