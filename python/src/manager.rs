//! One store as Python holds it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use dtr_cuda::Direction;
use dtr_engine::PendingUpload;
use dtr_engine::config::{BestMode, Config};
use dtr_engine::engine::Engine;
use dtr_engine::load::VerifyObserver;
use dtr_engine::ranks::{Agreed, Coordinated, Hindrance};
use dtr_engine::recovery::StepState;
use dtr_engine::save::{SaveRequest, share_of};
use dtr_engine::{EngineError, Result, unpoisoned};
use numpy::PyArray1;
use pyo3::prelude::*;
use pyo3::types::PyList;

use crate::checkpoint::Checkpoint;
use crate::coordinator::Worker;
use crate::device::{self, Prepared, Source, Sources, Streams};
use crate::errors::{json_to_python, to_python};
use crate::guard::{Guard, timeout_of};
use crate::handle::SaveHandle;
use crate::tensor::array_of_slab;
use crate::tree;

/// A step, what is wrong with it, and its attempt.
type Candidate = (u64, Option<String>, Option<String>);

/// A step, or `(rank, why, gave_up)` of one that is kept from loading, or how many ranks offered.
type Agreement = (Option<u64>, Option<(u32, String, bool)>, u32);

/// The engine, opened on one store.
#[pyclass(frozen, module = "dtruntime._native")]
#[derive(Debug)]
pub(crate) struct Manager {
    engine: Arc<Engine>,
    guard: Guard,
}

#[pymethods]
impl Manager {
    /// Opens the store at `path` with `settings`, a JSON object of the engine's settings; to save
    /// together with the other ranks of `worker`'s job, if it is given.
    #[new]
    #[pyo3(signature = (path, settings, worker=None))]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        settings: &str,
        worker: Option<&Worker>,
    ) -> PyResult<Self> {
        crate::log::start();
        let guard = Guard::new();
        let worker = worker.map(|worker| worker.share(py)).transpose()?;
        let engine = guard.call(py, "opening the store", || {
            let config: Config =
                serde_json::from_str(settings).map_err(|error| not_json("the settings", &error))?;
            let config = Config { path, ..config };
            match worker {
                None => Engine::open(config),
                Some(worker) => {
                    let ranks = Coordinated::new(worker, config.world_size);
                    Engine::open_among(config, Arc::new(ranks))
                }
            }
        })?;
        Ok(Self { engine: Arc::new(engine), guard })
    }

    /// `uring`, `threads` or `s3`.
    #[getter]
    fn io_backend(&self) -> &'static str {
        self.engine.io_backend()
    }

    /// Makes `storages` ready to be saved. Of devices, `streams` are the current streams, whose
    /// work so far comes first, and `behind` says whether copies from devices go on when the save
    /// has returned. Whoever catches an error of this has begun nothing.
    fn prepare(
        &self,
        py: Python<'_>,
        storages: &Bound<'_, PyList>,
        streams: Streams,
        behind: bool,
    ) -> PyResult<Sources> {
        let sources =
            storages.iter().map(|item| Source::extract(&item)).collect::<PyResult<Vec<_>>>()?;
        self.guard.call(py, "preparing a save", || {
            device::pin_for(&self.engine, &streams)?;
            let cloned = device::bytes_to_clone(&sources);
            device::check_room_for_clones(&cloned)?;
            device::follow(Direction::Down, &streams)?;
            let sources = sources.into_iter().map(Source::prepare).collect::<Result<_>>()?;
            if behind {
                // What was cloned may change as soon as the streams go on. Streams of devices
                // without clones do not wait: other saves may have copies under way there.
                let streams =
                    streams.into_iter().filter(|(ordinal, _)| cloned.contains_key(ordinal));
                device::precede(&streams.collect())?;
            }
            Ok(Sources::new(sources, behind))
        })
    }

    /// Takes a snapshot of `state`, which is `(nodes, tensors, replicated)`, and of its storages
    /// `sources`, and returns. The memory that those name must stay valid and unchanged until then;
    /// that of devices which is not cloned, if it is copied behind, until `wait_captured` of the
    /// handle. `replicated` are the topmost nodes of what all ranks save alike. `annotations` are
    /// the user's metadata and the datasets' positions, each a JSON object. `call` is the step,
    /// whether the training went back, and the seconds that the caller waited for the save before
    /// and made `state`.
    fn save(
        &self,
        py: Python<'_>,
        call: (u64, bool, (f64, f64)),
        state: (Bound<'_, PyList>, Bound<'_, PyList>, Vec<u32>),
        sources: &Sources,
        annotations: (&str, &str),
    ) -> PyResult<Py<SaveHandle>> {
        let (step, rewind, (wait_seconds, prepare_seconds)) = call;
        let seconds = |seconds| timeout_of(Some(seconds)).unwrap_or_default();
        let (nodes, tensors, replicated) = state;
        let nodes = tree::nodes_from_python(&nodes)?;
        let tensors = tree::tensors_from_python(&tensors)?;
        let handle = self.guard.call(py, &format!("saving step {step}"), || {
            let request = SaveRequest {
                step,
                rewind,
                nodes,
                tensors,
                storages: sources.storages.iter().map(Prepared::input).collect(),
                replicated,
                waited: seconds(wait_seconds),
                prepared: seconds(prepare_seconds),
                metadata: json_object("`metadata`", annotations.0)?,
                dataset_positions: json_object("`dataset_positions`", annotations.1)?,
            };
            if sources.behind {
                self.engine.save_behind(request)
            } else {
                self.engine.save(request)
            }
        })?;
        sources.begun_by(py, SaveHandle::new(handle, self.guard.clone()))
    }

    /// The part that this rank writes of each storage that all ranks save alike, as `(start, end)`;
    /// `sizes` are the storages' bytes, by first appearance.
    #[expect(clippy::needless_pass_by_value, reason = "made from a Python list")]
    fn share(&self, sizes: Vec<u64>) -> Vec<(u64, u64)> {
        let config = self.engine.config();
        let share = share_of(&sizes, config.rank, config.world_size);
        share.into_iter().map(|part| (part.start, part.end)).collect()
    }

    /// Populates the staging arena for a state of `raw_bytes`, pinned for the devices of `streams`.
    #[pyo3(signature = (raw_bytes, streams=Vec::new()))]
    #[expect(clippy::needless_pass_by_value, reason = "made from a Python list")]
    fn prewarm(&self, py: Python<'_>, raw_bytes: u64, streams: Streams) -> PyResult<()> {
        self.guard.call(py, "prewarming the staging arena", || {
            device::pin_for(&self.engine, &streams)?;
            self.engine.prewarm(raw_bytes)
        })
    }

    /// Takes over the staging arena of a manager that is about to be closed, if it would do here.
    fn take_staging_of(&self, py: Python<'_>, other: &Self) -> PyResult<()> {
        self.guard
            .call(py, "taking over a staging arena", || self.engine.take_staging_of(&other.engine))
    }

    /// The staging arena as an array, where that has room for so many bytes, as it is or, with
    /// `grows_to`, as it will be for a state of so many raw bytes; else None. Lent until nothing
    /// views the array any more.
    #[pyo3(signature = (needed_bytes, grows_to=None))]
    fn lend_staging<'py>(
        &self,
        py: Python<'py>,
        needed_bytes: u64,
        grows_to: Option<u64>,
    ) -> PyResult<Option<Bound<'py, PyArray1<u8>>>> {
        let slab = self.guard.call(py, "lending the staging arena", || {
            self.engine.lend_staging(needed_bytes, grows_to)
        })?;
        slab.map(|slab| array_of_slab(py, slab)).transpose()
    }

    /// The committed steps, ascending.
    fn steps(&self, py: Python<'_>) -> PyResult<Vec<u64>> {
        self.guard.call(py, "listing checkpoints", || self.engine.steps())
    }

    /// `(step, why, attempt)` of every step that was committed and stands, ascending: `why` is None
    /// for one that looks sound, else what is wrong with it; `attempt` is None where the manifest
    /// does not say it.
    fn candidates(&self, py: Python<'_>) -> PyResult<Vec<Candidate>> {
        let survey = self.guard.call(py, "listing checkpoints", || self.engine.survey())?;
        let candidates = survey.steps.into_iter().filter_map(|step| {
            let attempt = step.attempt.map(|attempt| attempt.to_string());
            match step.state {
                StepState::Committed => Some((step.step, None, attempt)),
                StepState::Damaged { why } | StepState::Newer { why } => {
                    Some((step.step, Some(why), attempt))
                }
                StepState::Retired { .. } | StepState::Incomplete => None,
            }
        });
        Ok(candidates.collect())
    }

    /// The committed steps that have this number in their metadata, the best first.
    fn best_steps(&self, py: Python<'_>, metric: &str, is_max: bool) -> PyResult<Vec<u64>> {
        let mode = if is_max { BestMode::Max } else { BestMode::Min };
        self.guard.call(py, "comparing checkpoints", || self.engine.best_steps(metric, mode))
    }

    /// What was attached to a committed step, as a dict.
    fn metadata<'py>(&self, py: Python<'py>, step: u64) -> PyResult<Bound<'py, PyAny>> {
        let what = format!("reading the metadata of step {step}");
        let metadata = self.guard.call(py, &what, || self.engine.metadata(step))?;
        json_to_python(py, &metadata)
    }

    /// Opens this rank's shard of a step, or that of the rank that is named: manifest and index are
    /// read and checked.
    #[pyo3(signature = (step, rank=None))]
    fn checkpoint(&self, py: Python<'_>, step: u64, rank: Option<u32>) -> PyResult<Checkpoint> {
        let checkpoint = self.guard.call(py, &format!("opening step {step}"), || match rank {
            None => self.engine.checkpoint(step),
            Some(rank) => self.engine.checkpoint_of_rank(step, rank),
        })?;
        Ok(Checkpoint::new(checkpoint, self.guard.clone()))
    }

    /// Opens the shard of a rank of the same checkpoint as `own`: what other shards hold a part of
    /// cannot be read from it.
    fn shard_beside(&self, py: Python<'_>, own: &Checkpoint, rank: u32) -> PyResult<Checkpoint> {
        let what = format!("opening what rank {rank} saved");
        let open = || self.engine.shard_beside(own.inner(), rank);
        Ok(Checkpoint::new(self.guard.call(py, &what, open)?, self.guard.clone()))
    }

    /// Reads and checks every chunk of every shard; the report is a dict.
    fn verify<'py>(&self, py: Python<'py>, step: u64) -> PyResult<Bound<'py, PyAny>> {
        let engine = Arc::clone(&self.engine);
        let observer = Arc::new(Cancellation::default());
        let cancelled = Arc::clone(&observer);
        let report = self.guard.call_interruptibly(
            py,
            "verifying a checkpoint",
            move || engine.verify(step, observer.as_ref()),
            || cancelled.0.store(true, Ordering::Relaxed),
        )?;
        json_to_python(py, &report)
    }

    /// Deletes a checkpoint; the bytes freed.
    fn delete(&self, py: Python<'_>, step: u64) -> PyResult<u64> {
        self.wait_until_finished(py, None)?;
        self.guard.call(py, &format!("deleting step {step}"), || self.engine.delete(step))
    }

    /// Keeps a step from retention.
    fn protect(&self, py: Python<'_>, step: u64) -> PyResult<()> {
        self.guard.call(py, "protecting a step", || self.engine.protect(step))
    }

    /// Tells the other ranks that this one does not save a step, and why.
    fn decline(&self, py: Python<'_>, step: u64, reason: &str) -> PyResult<()> {
        let what = format!("giving up the save of step {step}");
        self.guard.call(py, &what, || self.engine.decline(step, reason))
    }

    /// Waits, at most so many seconds, until every rank has said which steps it can load: `(step,
    /// hindrance, offering)`. `step` is the newest that all can; without one, `hindrance` is
    /// `(rank, why, gave_up)` of a rank that is kept from loading, or None, and so many ranks
    /// offered any.
    #[pyo3(signature = (steps, timeout_seconds, damage="", gives_up=""))]
    fn agree(
        &self,
        py: Python<'_>,
        steps: Vec<u64>,
        timeout_seconds: f64,
        damage: &str,
        gives_up: &str,
    ) -> PyResult<Agreement> {
        let engine = Arc::clone(&self.engine);
        let timeout = timeout_of(Some(timeout_seconds)).unwrap_or_default();
        let (damage, gives_up) = (damage.to_owned(), gives_up.to_owned());
        let agreed = self.guard.call_interruptibly(
            py,
            "agreeing with all ranks on the step to load",
            move || {
                let hindrance = match (gives_up.as_str(), damage.as_str()) {
                    ("", "") => Hindrance::None,
                    ("", damage) => Hindrance::Damage(damage),
                    (gives_up, _) => Hindrance::GivesUp(gives_up),
                };
                engine.agree(&steps, hindrance, timeout)
            },
            || (),
        )?;
        Ok(match agreed {
            Agreed::Step(step) => (Some(step), None, 0),
            Agreed::Nothing { offering } => (None, None, offering),
            Agreed::Hindered { rank, why, gave_up } => (None, Some((rank, why, gave_up)), 0),
        })
    }

    /// Waits for the save in flight, at most `timeout` seconds; true if none is left. Raises the
    /// error of a save that nobody looked at.
    #[pyo3(signature = (timeout=None))]
    fn wait_until_finished(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<bool> {
        let wait = |slice| self.engine.wait_until_finished(Some(slice));
        self.guard.wait(py, "waiting for the save in flight", timeout_of(timeout), wait)
    }

    /// What came of bringing a step to the remote store, as a dict; None if it has not ended within
    /// `timeout` seconds. Raises the upload's error. For managers with a remote store.
    #[pyo3(signature = (step, timeout=None))]
    fn uploaded<'py>(
        &self,
        py: Python<'py>,
        step: u64,
        timeout: Option<f64>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let what = format!("waiting for the upload of step {step}");
        let found = Mutex::new(None);
        self.guard.wait(py, &what, timeout_of(timeout), |slice| {
            let outcome = self.engine.uploaded(step, Some(slice))?;
            let has_ended = outcome.is_some();
            *unpoisoned(found.lock()) = outcome;
            Ok(has_ended)
        })?;
        match unpoisoned(found.into_inner()) {
            None => Ok(None),
            Some(Ok(transferred)) => json_to_python(py, &transferred).map(Some),
            Some(Err(error)) => Err(to_python(py, &error)),
        }
    }

    /// `(step, uploaded bytes, total bytes)` of what is not in the remote store yet, ascending.
    fn pending_uploads(&self, py: Python<'_>) -> PyResult<Vec<(u64, u64, u64)>> {
        let pending =
            self.guard.call(py, "listing pending uploads", || self.engine.pending_uploads())?;
        let told = |upload: PendingUpload| (upload.step, upload.uploaded_bytes, upload.total_bytes);
        Ok(pending.into_iter().map(told).collect())
    }

    /// Leaves what is not in the remote store yet to the next process that writes.
    fn leave_uploads(&self, py: Python<'_>) -> PyResult<()> {
        self.guard.call(py, "leaving uploads", || self.engine.leave_uploads())
    }

    /// Waits, at most `timeout` seconds, until everything was brought to the remote store, or has
    /// failed once more; true if so.
    #[pyo3(signature = (timeout=None))]
    fn drain(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<bool> {
        let wait = |slice| self.engine.drain(Some(slice));
        self.guard.wait(py, "waiting for uploads", timeout_of(timeout), wait)
    }

    /// Finishes the save in flight and the uploads, and gives everything back. Raises the error of
    /// a save that nobody looked at, else that of an upload that has failed.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.guard.call(py, "closing the store", || {
            let closed = self.engine.close();
            ::coordinator::telemetry::flush();
            closed
        })
    }

    /// In a forked child: closes inherited descriptors raw, so that the parent's locks end with it.
    fn close_after_fork(&self) {
        self.engine.close_after_fork();
    }
}

/// Lets Ctrl-C end a verification.
#[derive(Debug, Default)]
struct Cancellation(AtomicBool);

impl VerifyObserver for Cancellation {
    fn advanced(&self, _stored_bytes: u64) {}

    fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

fn json_object(what: &str, text: &str) -> Result<BTreeMap<String, serde_json::Value>> {
    serde_json::from_str(text).map_err(|error| not_json(what, &error))
}

fn not_json(what: &str, error: &serde_json::Error) -> EngineError {
    EngineError::invalid(what, error.to_string(), "give a JSON object of the documented shape")
}

/// An argument that this package's own Python half got wrong.
pub(crate) fn misuse(py: Python<'_>, what: &str, why: impl Into<String>) -> PyErr {
    to_python(py, &EngineError::internal(what, why))
}
