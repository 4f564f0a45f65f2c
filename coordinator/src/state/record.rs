//! What is kept: a flat map from keys to protobuf records.
//!
//! Always holds: a key begins with one byte for its kind and the job's name, ended by a zero byte,
//! which no name contains; numbers in keys are big-endian, so that they sort as they count.

use dtr_proto::v1;
use prost::Message;

/// One change of what is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// What changes.
    pub key: Key,
    /// Its new value; None removes it.
    pub value: Option<Vec<u8>>,
}

impl Change {
    pub(super) fn put(key: Key, record: &impl Message) -> Self {
        Self { key, value: Some(record.encode_to_vec()) }
    }

    pub(super) fn remove(key: Key) -> Self {
        Self { key, value: None }
    }
}

/// What a record is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Key {
    Job { job: String },
    Worker { job: String, worker_id: String },
    Barrier { job: String, name: String },
    Attempt { job: String, step: u64 },
    Commit { job: String, step: u64 },
    Dataset { job: String, name: String },
}

/// What was kept cannot be read.
#[derive(Clone, Debug, thiserror::Error)]
#[error("a record of the journal cannot be read: {why}")]
pub struct RecoverError {
    why: String,
}

/// The value of a key.
#[derive(Debug)]
pub(super) enum Stored {
    Job(v1::JobRecord),
    Worker(v1::WorkerRecord),
    Barrier(v1::BarrierRecord),
    Attempt(v1::AttemptRecord),
    Commit(v1::Commit),
    Dataset(v1::DatasetRecord),
}

impl Key {
    /// The job that the record belongs to.
    pub fn job(&self) -> &str {
        match self {
            Self::Job { job }
            | Self::Worker { job, .. }
            | Self::Barrier { job, .. }
            | Self::Attempt { job, .. }
            | Self::Commit { job, .. }
            | Self::Dataset { job, .. } => job,
        }
    }

    /// The key as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let step_bytes;
        let (kind, rest): (u8, &[u8]) = match self {
            Self::Job { .. } => (b'j', &[]),
            Self::Worker { worker_id, .. } => (b'w', worker_id.as_bytes()),
            Self::Barrier { name, .. } => (b'b', name.as_bytes()),
            Self::Dataset { name, .. } => (b'd', name.as_bytes()),
            Self::Attempt { step, .. } => {
                step_bytes = sortable(*step);
                (b'a', &step_bytes)
            }
            Self::Commit { step, .. } => {
                step_bytes = sortable(*step);
                (b'c', &step_bytes)
            }
        };
        let mut bytes = vec![kind];
        bytes.extend_from_slice(self.job().as_bytes());
        bytes.push(0);
        bytes.extend_from_slice(rest);
        bytes
    }

    /// The key that these bytes are.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecoverError> {
        let broken = |why: &str| RecoverError { why: format!("key {bytes:?}: {why}") };
        let (kind, rest) = bytes.split_first().ok_or_else(|| broken("it is empty"))?;
        let end = rest.iter().position(|byte| *byte == 0);
        let (job, rest) = rest.split_at(end.ok_or_else(|| broken("its job has no end"))?);
        let text = |bytes: &[u8]| {
            String::from_utf8(bytes.to_vec()).map_err(|_| broken("a name is not UTF-8"))
        };
        let job = text(job)?;
        let rest = &rest[1..];
        let step = || step_of(rest).ok_or_else(|| broken("a step has eight bytes"));
        Ok(match kind {
            b'j' => Self::Job { job },
            b'w' => Self::Worker { job, worker_id: text(rest)? },
            b'b' => Self::Barrier { job, name: text(rest)? },
            b'd' => Self::Dataset { job, name: text(rest)? },
            b'a' => Self::Attempt { job, step: step()? },
            b'c' => Self::Commit { job, step: step()? },
            _ => return Err(broken("its kind is unknown; a newer coordinator wrote it")),
        })
    }
}

impl Stored {
    pub(super) fn decode(key: &Key, value: &[u8]) -> Result<Self, RecoverError> {
        Ok(match key {
            Key::Job { .. } => Self::Job(read(key, value)?),
            Key::Worker { .. } => Self::Worker(read(key, value)?),
            Key::Barrier { .. } => Self::Barrier(read(key, value)?),
            Key::Attempt { .. } => Self::Attempt(read(key, value)?),
            Key::Commit { .. } => Self::Commit(read(key, value)?),
            Key::Dataset { .. } => Self::Dataset(read(key, value)?),
        })
    }
}

fn read<M: Message + Default>(key: &Key, value: &[u8]) -> Result<M, RecoverError> {
    M::decode(value).map_err(|error| RecoverError { why: format!("{key:?}: {error}") })
}

/// The most significant byte first, so that keys sort by number.
fn sortable(step: u64) -> [u8; 8] {
    let mut bytes = step.to_le_bytes();
    bytes.reverse();
    bytes
}

fn step_of(bytes: &[u8]) -> Option<u64> {
    let mut bytes: [u8; 8] = bytes.try_into().ok()?;
    bytes.reverse();
    Some(u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_comes_back() {
        let job = || "gpt".to_owned();
        let keys = [
            Key::Job { job: job() },
            Key::Worker { job: job(), worker_id: "worker-0".into() },
            Key::Barrier { job: job(), name: "ready".into() },
            Key::Attempt { job: job(), step: 258 },
            Key::Commit { job: job(), step: u64::MAX },
            Key::Dataset { job: String::new(), name: String::new() },
        ];
        for key in keys {
            assert_eq!(Key::decode(&key.encode()).expect("it was encoded"), key);
        }
    }

    #[test]
    fn commits_sort_by_step() {
        let key = |step| Key::Commit { job: "a".into(), step }.encode();
        assert!(key(255) < key(256));
        assert!(key(256) < key(u64::MAX));
    }

    #[test]
    fn bytes_that_are_no_key_are_refused() {
        for bytes in [&b""[..], b"j", b"c\0\x01", b"?\0", b"w\xff\0"] {
            assert!(Key::decode(bytes).is_err(), "{bytes:?}");
        }
    }
}
