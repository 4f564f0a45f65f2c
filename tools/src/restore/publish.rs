//! From drafts to an export, in the place of an earlier one.
//!
//! ```text
//! all drafts durable -> (same number of files: the earlier index, then its files, are set aside)
//!   -> files get their names -> the index gets its name, or the single file gets its own
//!   -> of the earlier export, the index goes, then the rest, and what was set aside
//! ```
//!
//! Always holds: nothing has its name before everything is durable; an index exists only with
//! every file that it names, all of one export; what fails before the last name is given is undone.
//! So readers find the earlier export whole, or the new one, whether they look for the index first
//! or for the single file.
//!
//! With one exception: as many files as before have the same names, and while they change there is
//! no index, and readers find nothing. What is killed just then leaves the earlier export set
//! aside, and the next process that has the name puts it back before it does anything else. A
//! process that is killed at another time leaves one export whole, perhaps with files of the other
//! beside it that no index names.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use dtr_engine::config::{DirectIo, IoBackend};
use dtr_engine::error::IoContext;
use dtr_engine::io::{EntryOp, Io, open_backend};
use dtr_engine::{EngineError, Result};

use super::draft::{Drafts, remove_left, sync_directory};
use super::export::{Export, Found, Role};

/// What is done to names, step by step.
#[derive(Debug)]
pub(super) struct Plan {
    /// What can be undone.
    before: Vec<EntryOp>,
    /// From here on the new export is the one that exists.
    last_name: EntryOp,
    /// What removes the earlier export.
    after: Vec<EntryOp>,
    /// The new export's files, its index last.
    pub(super) files: Vec<PathBuf>,
    /// The earlier one's.
    pub(super) earlier: Vec<PathBuf>,
}

impl Plan {
    /// So many files take the place of those that were found, and of no others: what comes between
    /// keeps its name.
    pub(super) fn of(export: &Export, count: usize, found: &[Found]) -> Self {
        let index = (count > 1).then(|| export.index());
        let files: Vec<PathBuf> =
            (0..count).map(|file| export.file(file, count)).chain(index).collect();
        let earlier: Vec<PathBuf> = found.iter().map(|found| found.path.clone()).collect();
        let (last, others) = files.split_last().expect("there is a tensor, and so a file");
        let taken: Vec<&PathBuf> = others.iter().filter(|path| earlier.contains(path)).collect();

        let mut before = set_aside(export, &taken, count, earlier.contains(last));
        let aside = before.clone();
        let place = |(number, path): (usize, &PathBuf)| rename(&export.draft(number), path);
        before.extend(others.iter().enumerate().map(place));
        before.extend((!others.is_empty()).then(|| sync(export)));
        let from = export.draft(others.len());
        let last_name = if taken.is_empty() && earlier.contains(last) {
            EntryOp::RenameReplace { from, to: last.clone() }
        } else {
            rename(&from, last)
        };
        let gone = found.iter().filter(|found| !files.contains(&found.path)).collect::<Vec<_>>();
        let after = removal(export, &gone, &aside);
        Self { before, last_name, after, files, earlier }
    }

    /// That names can be what they are to be: too long a name is reported before anything is
    /// written.
    pub(super) fn check(&self) -> Result<()> {
        for step in self.before.iter().chain([&self.last_name]) {
            let (EntryOp::RenameNew { to, .. } | EntryOp::RenameReplace { to, .. }) = step else {
                continue;
            };
            is_there(to)?;
        }
        Ok(())
    }

    fn carry_out(&self, perform: &mut dyn FnMut(&EntryOp) -> Result<()>) -> Result<()> {
        for (done, step) in self.before.iter().chain([&self.last_name]).enumerate() {
            let performed = perform(step);
            if performed.is_err() {
                undo(&self.before[..done], perform);
            }
            performed?;
        }
        self.after.iter().try_for_each(perform).map_err(new_is_there)
    }
}

/// Makes way for files of these names, some of `count`. The index goes first and comes back last:
/// it would name files of both exports.
fn set_aside(export: &Export, taken: &[&PathBuf], count: usize, has_index: bool) -> Vec<EntryOp> {
    let mut steps = Vec::new();
    if has_index && !taken.is_empty() {
        let index = export.index();
        // As a draft, the next process removes it, and does not put it back: with a file of the new
        // export in the place of one that was missing, it would lead to both.
        let is_whole = taken.len() == count;
        let to = if is_whole { export.aside(&index) } else { export.draft(count + 1) };
        steps.extend([rename(&index, &to), sync(export)]);
    }
    steps.extend(taken.iter().map(|path| rename(path, &export.aside(path))));
    steps
}

/// Removes of the earlier export what has no other in its place, its index first, and what was set
/// aside.
fn removal(export: &Export, gone: &[&Found], set_aside: &[EntryOp]) -> Vec<EntryOp> {
    let mut steps = vec![sync(export)];
    for Found { role, path, .. } in gone {
        steps.push(EntryOp::RemoveFile(path.clone()));
        steps.extend((*role == Role::Index).then(|| sync(export)));
    }
    for step in set_aside {
        if let EntryOp::RenameNew { to, .. } = step {
            steps.push(EntryOp::RemoveFile(to.clone()));
        }
    }
    if steps.len() > 1 {
        steps.push(sync(export));
    }
    steps
}

fn rename(from: &Path, to: &Path) -> EntryOp {
    EntryOp::RenameNew { from: from.into(), to: to.into() }
}

fn sync(export: &Export) -> EntryOp {
    EntryOp::SyncDir(export.directory().into())
}

/// Goes back, as far as it goes: an index comes back only with all of its files. The error that is
/// returned is the one before; what stays set aside is put back by the next process.
fn undo(done: &[EntryOp], perform: &mut dyn FnMut(&EntryOp) -> Result<()>) {
    for step in done.iter().rev() {
        let back = match step {
            EntryOp::RenameNew { from, to } => rename(to, from),
            other => other.clone(),
        };
        if perform(&back).is_err() {
            break;
        }
    }
}

/// Makes the drafts durable and gives them their names.
pub(super) fn publish(mut drafts: Drafts<'_>, plan: &Plan) -> Result<()> {
    drafts.sync()?;
    let io = open_backend(IoBackend::Threads, DirectIo::Off)?;
    let done = plan.carry_out(&mut |step| perform(&*io, step));
    done.map_err(|error| drafts.explain(error))
}

fn perform(io: &dyn Io, step: &EntryOp) -> Result<()> {
    let (doing, path) = match step {
        EntryOp::RenameNew { to, .. } | EntryOp::RenameReplace { to, .. } => {
            ("renaming the finished file to", to)
        }
        EntryOp::RemoveFile(path) => ("removing, of an earlier export,", path),
        EntryOp::SyncDir(path) => ("syncing directory", path),
        other => return Err(EngineError::internal("naming files", format!("{other:?}"))),
    };
    io.entry(step).map(drop).context(doing, path)
}

/// What failed came after the last name was given.
fn new_is_there(error: EngineError) -> EngineError {
    match error {
        EngineError::Io { what, source, .. } => EngineError::Io {
            what,
            source,
            hint: "the new export is whole; of the earlier one, remove what is left, or run this \
                   again with `--force`"
                .into(),
        },
        other => other,
    }
}

/// Ends what a process did not which was killed: puts back what it had set aside, or removes that,
/// if the index has its name, be it the new one.
pub(super) fn repair(export: &Export, found: &[Found]) -> Result<()> {
    let index = export.index();
    let mut left: Vec<&Found> = found.iter().filter(|found| found.role == Role::Aside).collect();
    if left.is_empty() {
        return Ok(());
    }
    if is_there(&index)? {
        left.into_iter().try_for_each(remove_left)?;
        return sync_directory(export.directory());
    }
    left.sort_by_key(|found| export.before_aside(&found.path) == index);
    for Found { path, .. } in left {
        let name = export.before_aside(path);
        if name == index {
            sync_directory(export.directory())?;
        }
        // What it replaces is a file of the new export, which has no index.
        std::fs::rename(path, &name).context("putting back", name)?;
    }
    sync_directory(export.directory())
}

fn is_there(path: &Path) -> Result<bool> {
    match path.symlink_metadata() {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        found => found.map(|_| true).context("naming a file", path),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;

    use super::*;

    /// Names and what is in them.
    type Directory = BTreeMap<String, String>;

    /// What each file of an export holds: whose it is, and how many there are.
    fn content(whose: &str, count: usize) -> String {
        format!("{whose} {count}")
    }

    fn look(directory: &Path) -> Directory {
        let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap());
        let named = |entry: fs::DirEntry| {
            let content = fs::read_to_string(entry.path()).unwrap();
            (entry.file_name().into_string().unwrap(), content)
        };
        entries.map(named).collect()
    }

    fn fill(directory: &Path, files: &Directory) {
        for (name, content) in files {
            fs::write(directory.join(name), content).unwrap();
        }
    }

    /// An export as it is there; of none, nothing.
    fn lying(whose: &str, count: usize) -> Directory {
        let export = Export::within(Path::new(""));
        let index = (count > 1).then(|| export.index());
        let files = (0..count).map(|file| export.file(file, count)).chain(index);
        let name = |path: PathBuf| path.to_str().unwrap().to_owned();
        files.map(|path| (name(path), content(whose, count))).collect()
    }

    /// What the index leads to, all of whose files must be there.
    fn by_index(files: &Directory) -> Option<String> {
        let index = files.get("model.safetensors.index.json")?;
        let (whose, count) = index.split_once(' ').unwrap();
        for (name, content) in lying(whose, count.parse().unwrap()) {
            assert_eq!(files.get(&name), Some(&content), "{name} of {files:?}");
        }
        Some(index.clone())
    }

    /// What those find who look for the index first, and for the single file.
    fn read(files: &Directory) -> [Option<String>; 2] {
        let whole = files.get("model.safetensors").cloned();
        [by_index(files).or(whole.clone()), whole.or(by_index(files))]
    }

    fn drafts_of<'a>(export: &'a Export, start: &'a str, count: usize) -> Drafts<'a> {
        let mut drafts = Drafts::create(export, 0).unwrap();
        for _ in 0..count + usize::from(count > 1) {
            drafts.add(start.as_bytes(), start.len() as u64).unwrap();
        }
        drafts
    }

    fn plan_of(export: &Export, count: usize) -> Plan {
        let mut found = export.found().unwrap();
        found.retain(|found| !matches!(found.role, Role::Draft | Role::Aside));
        let plan = Plan::of(export, count, &found);
        plan.check().unwrap();
        plan
    }

    fn try_each(check: impl Fn(&Directory, usize, usize)) {
        for before in 0..4 {
            for count in 1..4 {
                check(&lying("old", before), before, count);
            }
        }
    }

    fn failure() -> EngineError {
        EngineError::internal("testing", "it was to fail")
    }

    #[test]
    fn readers_find_one_export_whole_at_every_moment() {
        try_each(|old, before, count| {
            let scratch = tempfile::tempdir().unwrap();
            fill(scratch.path(), old);
            let export = Export::within(scratch.path());
            let new = content("new", count);
            let mut drafts = drafts_of(&export, &new, count);
            drafts.sync().unwrap();
            let io = open_backend(IoBackend::Threads, DirectIo::Off).unwrap();
            let mut moments = Vec::new();
            let mut recorded = |step: &EntryOp| {
                moments.push(look(scratch.path()));
                perform(&*io, step)
            };
            plan_of(&export, count).carry_out(&mut recorded).unwrap();
            drop(drafts);
            moments.push(look(scratch.path()));
            assert_eq!(moments.last(), Some(&lying("new", count)));
            let old = (before > 0).then(|| content("old", before));
            for moment in &moments {
                check_moment(moment, old.as_ref(), &new, before == count && count > 1);
            }
        });
    }

    /// What a process leaves that is killed then, and the next one repairs.
    #[track_caller]
    fn check_moment(moment: &Directory, old: Option<&String>, new: &String, may_be_none: bool) {
        for found in read(moment) {
            let is_none = found.is_none() && may_be_none;
            assert!(is_none || found.as_ref() == old || found.as_ref() == Some(new), "{moment:?}");
        }
        let scratch = tempfile::tempdir().unwrap();
        fill(scratch.path(), moment);
        drop(Drafts::create(&Export::within(scratch.path()), 0).unwrap());
        let repaired = look(scratch.path());
        assert!(repaired.keys().all(|name| !name.starts_with('.')), "{repaired:?}");
        for (found, before) in read(&repaired).into_iter().zip(read(moment)) {
            assert_eq!(found, before.or(old.cloned()), "{moment:?}");
        }
    }

    #[test]
    fn what_fails_before_the_last_name_is_undone() {
        try_each(|old, _, count| {
            for failing in 0.. {
                let scratch = tempfile::tempdir().unwrap();
                fill(scratch.path(), old);
                let export = Export::within(scratch.path());
                let new = content("new", count);
                let mut drafts = drafts_of(&export, &new, count);
                drafts.sync().unwrap();
                let plan = plan_of(&export, count);
                let io = open_backend(IoBackend::Threads, DirectIo::Off).unwrap();
                let mut number = 0;
                let done = plan.carry_out(&mut |step| {
                    number += 1;
                    if number == failing + 1 { Err(failure()) } else { perform(&*io, step) }
                });
                drop(drafts);
                let left = look(scratch.path());
                if done.is_ok() {
                    assert!(failing > plan.before.len());
                    break;
                }
                if failing <= plan.before.len() {
                    assert_eq!(left, *old, "{plan:?}, failing at {failing}");
                } else {
                    assert!(read(&left).contains(&Some(new)), "{left:?}");
                }
            }
        });
    }

    #[test]
    fn what_takes_a_name_meanwhile_keeps_it_and_the_others_are_taken_back() {
        for name in ["model-00001-of-00002.safetensors", "model.safetensors.index.json"] {
            let scratch = tempfile::tempdir().unwrap();
            let export = Export::within(scratch.path());
            let drafts = drafts_of(&export, "new 2", 2);
            let plan = plan_of(&export, 2);
            let rival = Directory::from([(name.to_owned(), "theirs".to_owned())]);
            fill(scratch.path(), &rival);
            publish(drafts, &plan).unwrap_err();
            assert_eq!(look(scratch.path()), rival);
        }
    }

    #[test]
    fn what_comes_meanwhile_is_not_removed() {
        let scratch = tempfile::tempdir().unwrap();
        let export = Export::within(scratch.path());
        fill(scratch.path(), &lying("old", 3));
        let drafts = drafts_of(&export, "new 2", 2);
        let plan = plan_of(&export, 2);
        let other = "model-00009-of-00009.safetensors".to_owned();
        fill(scratch.path(), &Directory::from([(other.clone(), String::new())]));
        publish(drafts, &plan).unwrap();
        let mut expected = lying("new", 2);
        expected.insert(other, String::new());
        assert_eq!(look(scratch.path()), expected);
    }

    /// Of an export that was not whole, the index must not lead to files of another.
    #[test]
    fn an_index_whose_files_were_not_all_there_is_not_put_back() {
        let scratch = tempfile::tempdir().unwrap();
        let mut old = lying("old", 2);
        old.remove("model-00002-of-00002.safetensors");
        fill(scratch.path(), &old);
        let export = Export::within(scratch.path());
        let drafts = drafts_of(&export, "new 2", 2);
        let plan = plan_of(&export, 2);
        let mut moments = Vec::new();
        let io = open_backend(IoBackend::Threads, DirectIo::Off).unwrap();
        let done = plan.carry_out(&mut |step| {
            moments.push(look(scratch.path()));
            perform(&*io, step)
        });
        done.unwrap();
        drop(drafts);
        for moment in moments {
            let scratch = tempfile::tempdir().unwrap();
            fill(scratch.path(), &moment);
            drop(Drafts::create(&Export::within(scratch.path()), 0).unwrap());
            let repaired = look(scratch.path());
            let index = repaired.get("model.safetensors.index.json").cloned();
            let second = repaired.get("model-00002-of-00002.safetensors").cloned();
            assert!(index.is_none() || second.is_none() || index == second, "{repaired:?}");
        }
    }
}
