//! From drafts to an export.
//!
//! ```text
//! all drafts durable -> earlier exports of the name go, their index first -> files get their names
//!                    -> the index gets its name
//! ```
//!
//! Always holds: nothing has its name before everything is durable; an index is there only with
//! every file that it names, and no file of an earlier export beside one of this; a single file is
//! replaced in one step. What ends in between leaves files without an index, or nothing.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use dtr_engine::Result;
use dtr_engine::config::{DirectIo, IoBackend};
use dtr_engine::error::IoContext;
use dtr_engine::io::{EntryOp, Io, open_backend};

use super::draft::{Drafts, sync_directory};
use super::export::{Found, Role};

/// Makes the drafts durable and gives them their names; where they are. `replace` says that
/// earlier exports of the name may go.
pub(super) fn publish(
    mut drafts: Drafts<'_>,
    index: Option<&[u8]>,
    replace: bool,
) -> Result<Vec<PathBuf>> {
    drafts.sync()?;
    if let Some(index) = index {
        drafts.lead.fill(index)?;
    }
    let mut publishing = Publishing {
        io: open_backend(IoBackend::Threads, DirectIo::Off)?,
        replace,
        published: Vec::new(),
    };
    if replace {
        remove_earlier(&drafts)?;
    }
    let named = publishing.name_all(&mut drafts, index.is_some());
    if named.is_err() {
        publishing.take_back();
    }
    named?;
    sync_directory(drafts.export.directory())?;
    Ok(publishing.published)
}

struct Publishing {
    io: Arc<dyn Io>,
    replace: bool,
    /// What has its name.
    published: Vec<PathBuf>,
}

impl Publishing {
    fn name_all(&mut self, drafts: &mut Drafts<'_>, has_index: bool) -> Result<()> {
        let (export, count) = (drafts.export, drafts.count);
        for number in 0..count {
            self.name(&export.draft(number), export.file(number, count))?;
        }
        if has_index {
            sync_directory(export.directory())?;
            // Once the lead is not held, what is called like a draft is another process's.
            drafts.count = 0;
            self.name(drafts.lead.path(), export.index())?;
            drafts.lead.set_published();
        }
        Ok(())
    }

    fn name(&mut self, draft: &Path, name: PathBuf) -> Result<()> {
        let (from, to) = (draft.to_owned(), name.clone());
        let rename = if self.replace {
            EntryOp::RenameReplace { from, to }
        } else {
            EntryOp::RenameNew { from, to }
        };
        self.io.entry(&rename).context("renaming the finished file to", &name)?;
        self.published.push(name);
        Ok(())
    }

    /// Some files without the others are no use to anybody.
    fn take_back(&self) {
        for path in self.published.iter().rev() {
            // The error that is told is the one before.
            let _left = std::fs::remove_file(path);
        }
    }
}

/// Removes all that is there of earlier exports, but for a single file that another replaces.
fn remove_earlier(drafts: &Drafts<'_>) -> Result<()> {
    let is_single = drafts.count == 1;
    let goes = |found: &Found| match found.role {
        Role::Index | Role::Shard => true,
        Role::Whole => !is_single,
        Role::Draft => false,
    };
    let earlier: Vec<Found> = drafts.export.found()?.into_iter().filter(goes).collect();
    let (indices, files): (Vec<_>, Vec<_>) =
        earlier.into_iter().partition(|found| found.role == Role::Index);
    for group in [indices, files].iter().filter(|group| !group.is_empty()) {
        for Found { path, .. } in group {
            std::fs::remove_file(path).context("removing, of an earlier export,", path)?;
        }
        sync_directory(drafts.export.directory())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;

    use super::super::export::Export;
    use super::*;

    fn names_in(directory: &Path) -> BTreeSet<String> {
        let entries = fs::read_dir(directory).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// Drafts of two files.
    fn two(export: &Export) -> Drafts<'_> {
        let mut drafts = Drafts::create(export).unwrap();
        for (number, bytes) in [b"one", b"two"].into_iter().enumerate() {
            drafts.add(3, 6).unwrap();
            drafts.write(number, 0, bytes).unwrap();
        }
        drafts
    }

    #[test]
    fn what_takes_a_name_meanwhile_keeps_it_and_the_others_are_taken_back() {
        let scratch = tempfile::tempdir().unwrap();
        let export = Export::within(scratch.path());
        for rival in [export.file(0, 2), export.file(1, 2), export.index()] {
            let drafts = two(&export);
            fs::write(&rival, "theirs").unwrap();
            publish(drafts, Some(b"{}"), false).unwrap_err();
            assert_eq!(fs::read_to_string(&rival).unwrap(), "theirs");
            let name = rival.file_name().unwrap().to_str().unwrap().to_owned();
            assert_eq!(names_in(scratch.path()), BTreeSet::from([name]));
            fs::remove_file(&rival).unwrap();
        }
    }

    #[test]
    fn an_earlier_export_goes_only_once_all_of_the_new_one_is_there() {
        let scratch = tempfile::tempdir().unwrap();
        let export = Export::within(scratch.path());
        let first = publish(two(&export), Some(b"{}"), false).unwrap();
        assert_eq!(first, [export.file(0, 2), export.file(1, 2), export.index()]);
        let names = names_in(scratch.path());
        drop(two(&export));
        assert_eq!(names_in(scratch.path()), names);

        // Without its index, an export that could not be removed is none.
        let mut drafts = Drafts::create(&export).unwrap();
        drafts.add(3, 3).unwrap();
        let stuck = export.file(0, 9);
        fs::create_dir(&stuck).unwrap();
        publish(drafts, None, true).unwrap_err();
        assert!(!export.index().exists() && !export.whole().exists() && !export.lead().exists());
        fs::remove_dir(&stuck).unwrap();

        let mut drafts = Drafts::create(&export).unwrap();
        drafts.add(3, 3).unwrap();
        assert_eq!(publish(drafts, None, true).unwrap(), [export.whole()]);
        assert_eq!(names_in(scratch.path()), BTreeSet::from(["model.safetensors".into()]));
    }
}
