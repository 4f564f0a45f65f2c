//! A manifest is never published over a rival's: the second writer gets an error, and changes
//! nothing.
//!
//! Always holds: the rival publishes in the last moment, after this engine looked and before its
//! rename: the only moment in which looking does not help.

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use dtr_engine::EngineError;
use dtr_engine::format::names::{MANIFEST_FILE, step_dir_name};
use dtr_engine::io::sim::OpKind;
use dtr_engine::io::{EntryOp, Io};

use super::budget::scratch;
use super::check::{Tools, view};
use super::history::View;
use super::state::{self, State};
use super::tap::{Operation, Tap, Watcher};

/// Puts a rival's directory in place just before a manifest is published.
#[derive(Debug)]
struct Rival {
    files: Mutex<Vec<(PathBuf, Vec<u8>)>>,
}

impl Watcher for Rival {
    fn before(&self, operation: &Operation) {
        let is_publication = match &operation.kind {
            OpKind::Entry(EntryOp::RenameNew { to, .. } | EntryOp::RenameReplace { to, .. }) => {
                to.ends_with(MANIFEST_FILE)
            }
            _ => false,
        };
        if is_publication {
            for (path, bytes) in self.files.lock().unwrap().drain(..) {
                fs::write(path, bytes).unwrap();
            }
        }
    }

    fn after(&self, _operation: &Operation, _error: Option<&std::io::Error>) {}
}

#[test]
fn a_manifest_is_never_published_over_a_rivals() {
    let directory = scratch();
    let tools = Tools::new();
    let states = [7, 8].map(|seed| Arc::new(State::new(seed, &[30_000])));
    let [ours, theirs] = ["ours", "theirs"].map(|name| directory.path().join(name));
    let elsewhere = state::open(state::config(&theirs), &tools.io, &tools.ids).unwrap();
    state::finish(&elsewhere.save(states[1].request(5, 1)).unwrap()).unwrap();
    let files = fs::read_dir(theirs.join(step_dir_name(5))).unwrap().map(|entry| {
        let path = entry.unwrap().path();
        let target = ours.join(step_dir_name(5)).join(path.file_name().unwrap());
        (target, fs::read(path).unwrap())
    });
    let rival = Arc::new(Rival { files: Mutex::new(files.collect()) });
    let io: Arc<dyn Io> = Tap::new(state::backend(), &rival);
    let engine = state::open(state::config(&ours), &io, &tools.ids).unwrap();
    let saved = engine.save(states[0].request(5, 0)).and_then(|handle| state::finish(&handle));
    let error = saved.expect_err("a save that came second was acknowledged");
    assert!(matches!(error, EngineError::StepConflict { .. }), "{error}");
    assert!(rival.files.lock().unwrap().is_empty(), "the rival was there");
    assert_eq!(view(&engine, &states).unwrap(), View::from([(5, 1)]), "the rival's stands");
}
