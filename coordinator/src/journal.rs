//! What survives the process: one redb file, a map from keys to records.
//!
//! Always holds: [`Journal::keep`] returns once every change it was given is on the device, all or
//! none of them; a start is counted before anything is served; after a failed write the journal
//! refuses everything, and its owner ends the process.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use redb::{Database, DatabaseError, Durability, ReadableDatabase, ReadableTable, TableDefinition};

use crate::state::Change;

const RECORDS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("records");
const COUNTERS: TableDefinition<'_, &str, u64> = TableDefinition::new("counters");

/// Version of the keys and records.
const VERSION: u64 = 1;
/// redb's page cache; the working set is a few megabytes.
const CACHE_BYTES: usize = 16 << 20;

/// The file, open and locked.
#[derive(Debug)]
pub struct Journal {
    database: Database,
    path: PathBuf,
}

/// Keys and their values.
pub type Records = Vec<(Vec<u8>, Vec<u8>)>;

/// A journal as it was found.
#[derive(Debug)]
pub struct Opened {
    /// The journal, ready to keep more.
    pub journal: Journal,
    /// Which start this is, counted from 1.
    pub incarnation: u64,
    /// Every record: key and value.
    pub records: Records,
}

/// The journal cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}\nhint: {hint}", self.parts().0)]
pub struct JournalError {
    operation: &'static str,
    path: PathBuf,
    why: String,
    hint: &'static str,
}

impl JournalError {
    /// What failed and why, and how to go on.
    pub(crate) fn parts(&self) -> (String, &str) {
        let Self { operation, path, why, hint } = self;
        (format!("{operation} the journal `{}`: {why}", path.display()), hint)
    }
}

impl Journal {
    /// Opens the journal at `path`, or makes it, and counts this start.
    pub fn open(path: &Path) -> Result<Opened, JournalError> {
        let fails = |why: String, hint: &'static str| JournalError {
            operation: "opening",
            path: path.to_owned(),
            why,
            hint,
        };
        make_parent(path).map_err(|error| fails(error.to_string(), PARENT_HINT))?;
        let database = Database::builder().set_cache_size(CACHE_BYTES).create(path);
        let database = database.map_err(|error| {
            let hint = hint_of(&error);
            fails(error.to_string(), hint)
        })?;
        let journal = Self { database, path: path.to_owned() };
        let incarnation =
            journal.count_start().map_err(|error| fails(error.to_string(), STORAGE_HINT))?;
        if incarnation == 0 {
            return Err(fails(
                format!("a newer coordinator wrote it; this one knows version {VERSION}"),
                "start the newer coordinator, or name another `state_path`",
            ));
        }
        sync_parent(path).map_err(|error| fails(error.to_string(), PARENT_HINT))?;
        let records = journal.records().map_err(|error| fails(error.to_string(), STORAGE_HINT))?;
        Ok(Opened { journal, incarnation, records })
    }

    /// Makes changes durable, in order, all or none.
    pub fn keep<'a>(
        &self,
        changes: impl IntoIterator<Item = &'a Change>,
    ) -> Result<(), JournalError> {
        self.write(changes).map_err(|error| JournalError {
            operation: "writing",
            path: self.path.clone(),
            why: error.to_string(),
            hint: STORAGE_HINT,
        })
    }

    fn write<'a>(&self, changes: impl IntoIterator<Item = &'a Change>) -> Result<(), redb::Error> {
        let transaction = self.begin()?;
        {
            let mut records = transaction.open_table(RECORDS)?;
            for change in changes {
                let key = change.key.encode();
                match &change.value {
                    Some(value) => drop(records.insert(key.as_slice(), value.as_slice())?),
                    None => drop(records.remove(key.as_slice())?),
                }
            }
        }
        transaction.commit()?;
        Ok(())
    }

    /// Which start this is; 0 if the journal is of a version that is not known.
    fn count_start(&self) -> Result<u64, redb::Error> {
        let transaction = self.begin()?;
        let incarnation = {
            let mut counters = transaction.open_table(COUNTERS)?;
            let version = counters.get("version")?.map_or(VERSION, |value| value.value());
            if version > VERSION {
                return Ok(0);
            }
            counters.insert("version", VERSION)?;
            let incarnation = counters.get("starts")?.map_or(0, |value| value.value()) + 1;
            counters.insert("starts", incarnation)?;
            incarnation
        };
        transaction.open_table(RECORDS)?;
        transaction.commit()?;
        Ok(incarnation)
    }

    fn begin(&self) -> Result<redb::WriteTransaction, redb::Error> {
        let mut transaction = self.database.begin_write()?;
        transaction.set_durability(Durability::Immediate)?;
        // Two phases a commit: a file that was cut off opens at once, without a repair.
        transaction.set_quick_repair(true);
        Ok(transaction)
    }

    fn records(&self) -> Result<Records, redb::Error> {
        let transaction = self.database.begin_read()?;
        let table = transaction.open_table(RECORDS)?;
        let mut records = Vec::new();
        for entry in table.iter()? {
            let (key, value) = entry?;
            records.push((key.value().to_vec(), value.value().to_vec()));
        }
        Ok(records)
    }
}

const PARENT_HINT: &str = "name a directory that can be written: `state_path` in coordinator.toml, \
                           or `--state-path`";
const STORAGE_HINT: &str = "check the device and its free space; what was committed is still there";

fn hint_of(error: &DatabaseError) -> &'static str {
    match error {
        DatabaseError::DatabaseAlreadyOpen => {
            "another coordinator uses it: end that one, or name another `state_path`"
        }
        DatabaseError::UpgradeRequired(_) => "another version of the coordinator wrote it",
        _ => PARENT_HINT,
    }
}

fn make_parent(path: &Path) -> std::io::Result<()> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => fs::create_dir_all(parent),
        _ => Ok(()),
    }
}

/// The file's name is durable, too.
fn sync_parent(path: &Path) -> std::io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Key;

    fn change(step: u64, value: Option<&[u8]>) -> Change {
        let key = Key::Commit { job: "j".into(), step };
        Change { key, value: value.map(<[u8]>::to_vec) }
    }

    #[test]
    fn what_is_kept_comes_back_and_starts_are_counted() {
        let folder = tempfile::tempdir().expect("a scratch directory");
        let path = folder.path().join("deep/journal.redb");
        let first = Journal::open(&path).expect("it is new");
        assert_eq!((first.incarnation, first.records.len()), (1, 0));
        let changes = [change(1, Some(b"a")), change(2, Some(b"b")), change(1, None)];
        first.journal.keep(&changes).expect("the disk works");
        drop(first);
        let second = Journal::open(&path).expect("it is there");
        assert_eq!(second.incarnation, 2);
        assert_eq!(second.records, [(changes[1].key.encode(), b"b".to_vec())]);
    }

    #[test]
    fn a_second_owner_is_told_of_the_first() {
        let folder = tempfile::tempdir().expect("a scratch directory");
        let path = folder.path().join("journal.redb");
        let _first = Journal::open(&path).expect("it is new");
        let error = Journal::open(&path).expect_err("it is locked");
        assert!(error.to_string().contains("another coordinator uses it"), "{error}");
    }
}
