//! What a writer knows of the remote store: its listing as of the opening, and every change since.
//!
//! Always holds: nobody else changes the remote store, or only as this writer would, where several
//! ranks keep to one policy; so asking it again is not needed; a save and the retention behind it
//! never wait for a network.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

use crate::Result;
use crate::format::names::MANIFEST_FILE;
use crate::store::{FileListing, StepListing, Store};
use crate::sync::unpoisoned;

/// The remote store's files by step, and by name.
#[derive(Debug)]
pub(super) struct RemoteView(Mutex<BTreeMap<u64, Vec<FileListing>>>);

impl RemoteView {
    /// Asks the remote store, once.
    pub(super) fn open(remote: &dyn Store) -> Result<Self> {
        let steps = remote.list()?.into_iter().map(|step| (step.step, step.files));
        Ok(Self(Mutex::new(steps.collect())))
    }

    pub(super) fn list(&self) -> Vec<StepListing> {
        let listing = |(step, files): (&u64, &Vec<FileListing>)| StepListing {
            step: *step,
            files: files.clone(),
            unlisted: None,
        };
        self.lock().iter().map(listing).collect()
    }

    /// Steps that have a manifest, ascending.
    pub(super) fn committed(&self) -> Vec<u64> {
        let steps = self.lock();
        let has_manifest =
            |files: &Vec<FileListing>| files.iter().any(|file| file.name == MANIFEST_FILE);
        steps.iter().filter(|(_, files)| has_manifest(files)).map(|(step, _)| *step).collect()
    }

    pub(super) fn has(&self, step: u64, name: &str) -> bool {
        let steps = self.lock();
        steps.get(&step).is_some_and(|files| files.iter().any(|file| file.name == name))
    }

    /// What waits to be removed counts as gone.
    pub(super) fn forget(&self, step: u64) {
        self.lock().remove(&step);
    }

    pub(super) fn forget_file(&self, step: u64, name: &str) {
        if let Some(files) = self.lock().get_mut(&step) {
            files.retain(|file| file.name != *name);
        }
    }

    /// `step` is from now on what `store` has of it.
    pub(super) fn note(&self, store: &dyn Store, step: u64) {
        match store.list_step(step) {
            Ok(Some(listing)) => drop(self.lock().insert(step, listing.files)),
            Ok(None) => self.forget(step),
            // What is known may be old, which the next opening repairs.
            Err(_) => {}
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Vec<FileListing>>> {
        // Every critical section leaves a whole map.
        unpoisoned(self.0.lock())
    }
}
