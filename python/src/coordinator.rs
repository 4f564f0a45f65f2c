//! The coordinator as Python sees it: a connection, a registered worker, a wait at a barrier.
//!
//! Always holds: the GIL is released around every wait, and waits look for signals at least ten
//! times a second; heartbeats come from a native thread that never takes the GIL; in a forked child
//! every method raises `Closed`, and nothing of the parent's thread is touched, not even dropped.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dtr_engine::unpoisoned;
use dtr_proto::FILES_BYTES_MAX;
use dtr_proto::client::{
    BarrierWait, ClientError, Connection, ErrorKind, Notice, Options, Pending, Registration,
    Worker as NativeWorker,
};
use dtr_proto::v1;
use dtr_proto::v1::datasets_client::DatasetsClient;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyType};

use crate::errors;
use crate::guard::WAIT_SLICE;

/// A value of the process that made it: a forked child neither uses nor drops it.
#[derive(Debug)]
pub(crate) struct Home<T> {
    value: Option<T>,
    pid: u32,
}

impl<T> Home<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { value: Some(value), pid: std::process::id() }
    }

    pub(crate) fn get(&self, py: Python<'_>, what: &str) -> PyResult<&T> {
        match &self.value {
            Some(value) if std::process::id() == self.pid => Ok(value),
            _ => Err(to_python(
                py,
                &ClientError {
                    kind: ErrorKind::Closed,
                    what: what.into(),
                    why: "this process was forked from the one that connected".into(),
                    hint: "connect and register in this process, as a worker of its own".into(),
                },
            )),
        }
    }
}

impl<T> Drop for Home<T> {
    fn drop(&mut self) {
        if std::process::id() != self.pid {
            // Its locks may be held by threads that exist in the parent only.
            std::mem::forget(self.value.take());
        }
    }
}

/// A connection to the coordinator, with its native thread.
#[pyclass(frozen, module = "dtruntime._native")]
#[derive(Debug)]
pub(crate) struct Coordinator {
    connection: Home<Arc<Connection>>,
}

#[pymethods]
impl Coordinator {
    /// Makes the thread; the coordinator is not asked anything yet. `certificates` are the paths of
    /// the authority's, this worker's own and its key.
    #[new]
    fn new(
        py: Python<'_>,
        url: String,
        token: Option<String>,
        certificates: (Option<PathBuf>, Option<PathBuf>, Option<PathBuf>),
        patience_seconds: f64,
    ) -> PyResult<Self> {
        crate::log::start();
        let (ca_file, cert_file, key_file) = certificates;
        let options = Options {
            url,
            token,
            ca_file,
            identity_files: cert_file.zip(key_file),
            patience: seconds(patience_seconds),
        };
        let opened = py.detach(|| Connection::open(&options));
        let connection = opened.map_err(|error| to_python(py, &error))?;
        Ok(Self { connection: Home::new(Arc::new(connection)) })
    }

    /// The coordinator's address, with its port.
    #[getter]
    fn url(&self, py: Python<'_>) -> PyResult<String> {
        Ok(self.connection.get(py, "the connection")?.url().to_owned())
    }

    /// Registers a worker and starts its heartbeats. `place` is `(rank, world_size)`, `address` is
    /// `(ip, port, advertise_address)`.
    fn register_worker(
        &self,
        py: Python<'_>,
        job: String,
        worker_id: String,
        place: (u32, u32),
        address: (String, u32, String),
    ) -> PyResult<Worker> {
        let connection = self.connection.get(py, &format!("registering worker `{worker_id}`"))?;
        let (rank, world_size) = place;
        let (ip, port, advertise_address) = address;
        let registration =
            Registration { job, worker_id, rank, world_size, ip, port, advertise_address };
        let pending = NativeWorker::register(connection, registration);
        Ok(Worker { inner: Home::new(Arc::new(wait(py, pending)?)) })
    }

    /// Makes a dataset known; gives how many files and shards it has. `key` is `(job, name)`,
    /// `settings` are `(path, format, total_samples, shard_size, seed, shuffle)`.
    fn register_dataset(
        &self,
        py: Python<'_>,
        key: (String, String),
        settings: (String, String, u64, u64, u64, bool),
        files: Vec<String>,
        worker: Option<&Worker>,
    ) -> PyResult<(u64, u64)> {
        let (job, name) = key;
        let what = format!("registering dataset `{name}`");
        let connection = self.connection.get(py, &what)?;
        let identity = worker.map(|worker| worker.inner.get(py, &what)).transpose()?;
        let (path, format, total_samples, shard_size, seed, shuffle) = settings;
        let request = v1::RegisterDatasetRequest {
            job,
            identity: identity.map(|worker| worker.identity()),
            spec: Some(v1::DatasetSpec {
                name,
                path,
                format,
                total_samples,
                shard_size,
                seed,
                shuffle,
            }),
            files,
        };
        let reply = wait(
            py,
            connection.ask(&what, request, |channel, request| async move {
                let client = DatasetsClient::new(channel);
                client.max_encoding_message_size(FILES_BYTES_MAX).register_dataset(request).await
            }),
        )?;
        Ok((reply.file_count, reply.shard_count))
    }

    /// One rank's files in one epoch of the data: the dataset's path, the files below it, how many
    /// all ranks have, and what the dataset is registered as. `place` is `(rank, world_size)`; a
    /// world size of 0 is the job's.
    fn get_shard(
        &self,
        py: Python<'_>,
        job: String,
        name: String,
        place: (u32, u32),
        epoch: u64,
    ) -> PyResult<(String, Vec<String>, u64, DatasetParts)> {
        let what = format!("asking for the shard of dataset `{name}`");
        let connection = self.connection.get(py, &what)?;
        let (rank, world_size) = place;
        let request = v1::GetShardRequest { job, name, rank, world_size, epoch };
        let reply = wait(
            py,
            connection.ask(&what, request, |channel, request| async move {
                let client = DatasetsClient::new(channel);
                client.max_decoding_message_size(FILES_BYTES_MAX).get_shard(request).await
            }),
        )?;
        let v1::DatasetSpec { path, format, total_samples, shard_size, seed, shuffle, .. } =
            reply.spec.unwrap_or_default();
        let parts = (format, total_samples, shard_size, seed, shuffle);
        Ok((path, reply.files, reply.file_count, parts))
    }
}

/// A registered dataset's format, samples, samples in a shard, seed, and whether it is shuffled.
type DatasetParts = (String, u64, u64, u64, bool);

/// A registered worker.
#[pyclass(frozen, module = "dtruntime._native")]
#[derive(Debug)]
pub(crate) struct Worker {
    inner: Home<Arc<NativeWorker>>,
}

impl Worker {
    fn get(&self, py: Python<'_>) -> PyResult<&Arc<NativeWorker>> {
        self.inner.get(py, "the registered worker")
    }

    /// For a store that is written by all ranks.
    pub(crate) fn share(&self, py: Python<'_>) -> PyResult<Arc<NativeWorker>> {
        self.get(py).map(Arc::clone)
    }
}

#[pymethods]
impl Worker {
    /// The membership number that the last heartbeat brought.
    #[getter]
    fn epoch(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(self.get(py)?.epoch())
    }

    /// Why the job is aborted, if it is.
    #[getter]
    fn abort_reason(&self, py: Python<'_>) -> PyResult<Option<String>> {
        Ok(self.get(py)?.abort_reason())
    }

    /// Whether this worker is no member any more.
    #[getter]
    fn is_ended(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(self.get(py)?.is_ended())
    }

    /// What the coordinator tells workers: TOML values by `section.key`.
    #[getter]
    fn settings(&self, py: Python<'_>) -> PyResult<std::collections::HashMap<String, String>> {
        Ok(self.get(py)?.welcome().settings.clone())
    }

    /// Says that the training loop moved.
    fn set_progress(&self, py: Python<'_>, progress: u64) -> PyResult<()> {
        self.get(py)?.set_progress(progress);
        Ok(())
    }

    /// Arrives at a barrier; the call is waited for by its `join`. Where ranks differ in `alike`,
    /// all of them are refused.
    #[pyo3(signature = (name, timeout_seconds, alike=""))]
    fn arrive(
        &self,
        py: Python<'_>,
        name: &str,
        timeout_seconds: f64,
        alike: &str,
    ) -> PyResult<BarrierCall> {
        let worker = self.get(py)?;
        let mut arrival = worker.arrival(name, seconds(timeout_seconds));
        alike.clone_into(&mut arrival.alike);
        let pending = Mutex::new(worker.wait_barrier(&arrival));
        Ok(BarrierCall { inner: Home::new((pending, arrival)), withdrawn: AtomicBool::new(false) })
    }

    /// Takes an arrival back, for a caller that no longer waits; the coordinator hears of it if it
    /// can be reached.
    fn withdraw(&self, py: Python<'_>, call: &BarrierCall) -> PyResult<()> {
        let worker = self.get(py)?;
        call.withdrawn.store(true, Ordering::Release);
        let (_, arrival) = call.inner.get(py, "the wait at a barrier")?;
        wait(py, worker.withdraw(arrival)).map(drop)
    }

    /// Everybody in the job, a dict each.
    fn workers<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        let reply = wait(py, self.get(py)?.list())?;
        reply.workers.iter().map(|worker| worker_to_python(py, worker)).collect()
    }

    /// The next notice within so many seconds: a dict whose `kind` is `joined`, `left`, `failed`,
    /// `died`, `replaced`, `missed`, `rejoined`, `aborted` or `fenced`.
    fn next_notice<'py>(
        &self,
        py: Python<'py>,
        timeout_seconds: f64,
    ) -> PyResult<Option<Bound<'py, PyDict>>> {
        let worker = self.get(py)?;
        let notice = py.detach(|| worker.next_notice(seconds(timeout_seconds)));
        notice.map(|notice| notice_to_python(py, &notice)).transpose()
    }

    /// Leaves the job; with a failure's text, as a worker that failed.
    fn leave(&self, py: Python<'_>, failure: &str) -> PyResult<()> {
        let worker = self.get(py)?;
        py.detach(|| worker.leave(failure)).map_err(|error| to_python(py, &error))
    }
}

/// A wait at a barrier.
#[pyclass(frozen, module = "dtruntime._native")]
#[derive(Debug)]
pub(crate) struct BarrierCall {
    inner: Home<(Mutex<Pending<u64>>, BarrierWait)>,
    withdrawn: AtomicBool,
}

#[pymethods]
impl BarrierCall {
    /// Waits for the outcome: how many times the barrier was released before.
    fn join(&self, py: Python<'_>) -> PyResult<u64> {
        let (pending, arrival) = self.inner.get(py, "the wait at a barrier")?;
        loop {
            let outcome = py.detach(|| unpoisoned(pending.lock()).wait(WAIT_SLICE));
            if let Some(outcome) = outcome {
                return outcome.map_err(|error| to_python(py, &error));
            }
            if self.withdrawn.load(Ordering::Acquire) {
                let what = format!("waiting at barrier `{}`", arrival.name);
                let why = "the wait was taken back".into();
                let hint = "wait again".into();
                let error = ClientError { kind: ErrorKind::Closed, what, why, hint };
                return Err(to_python(py, &error));
            }
            py.check_signals()?;
        }
    }
}

/// Waits for a call's outcome; a signal that raises gives the call up.
fn wait<T: Send>(py: Python<'_>, pending: Pending<T>) -> PyResult<T> {
    let pending = Mutex::new(pending);
    loop {
        let outcome = py.detach(|| unpoisoned(pending.lock()).wait(WAIT_SLICE));
        if let Some(outcome) = outcome {
            return outcome.map_err(|error| to_python(py, &error));
        }
        py.check_signals()?;
    }
}

/// Not a number of seconds, negative or centuries: that is for the coordinator to refuse.
fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(if seconds > 0.0 {
        Duration::from_secs(u64::from(u32::MAX))
    } else {
        Duration::ZERO
    })
}

fn worker_to_python<'py>(py: Python<'py>, worker: &v1::Worker) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("worker_id", &worker.worker_id)?;
    dict.set_item("rank", worker.rank)?;
    dict.set_item("ip", &worker.ip)?;
    dict.set_item("port", worker.port)?;
    dict.set_item("advertise_address", &worker.advertise_address)?;
    let state = worker.state().as_str_name().trim_start_matches("WORKER_STATE_");
    dict.set_item("state", state.to_lowercase())?;
    dict.set_item("silent_seconds", Duration::from_millis(worker.silent_ms).as_secs_f64())?;
    dict.set_item("progress", worker.progress)?;
    Ok(dict)
}

fn notice_to_python<'py>(py: Python<'py>, notice: &Notice) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    match notice {
        Notice::Changed(change) => {
            let kind = change.kind().as_str_name().trim_start_matches("CHANGE_KIND_");
            dict.set_item("kind", kind.to_lowercase())?;
            dict.set_item("epoch", change.epoch)?;
            dict.set_item("worker_id", &change.worker_id)?;
            dict.set_item("rank", change.rank)?;
            dict.set_item("reason", &change.reason)?;
        }
        Notice::Missed(epoch) => {
            dict.set_item("kind", "missed")?;
            dict.set_item("epoch", epoch)?;
            dict.set_item("reason", "there were changes that the coordinator does not remember")?;
        }
        Notice::Aborted(reason) => {
            dict.set_item("kind", "aborted")?;
            dict.set_item("reason", reason)?;
        }
        Notice::Rejoined(epoch) => {
            dict.set_item("kind", "rejoined")?;
            dict.set_item("epoch", epoch)?;
            dict.set_item("reason", "it was taken for dead, and is a member again")?;
        }
        Notice::Fenced(error) => {
            dict.set_item("kind", "fenced")?;
            dict.set_item("reason", &error.why)?;
        }
    }
    Ok(dict)
}

/// The exception for a failed call.
pub(crate) fn to_python(py: Python<'_>, error: &ClientError) -> PyErr {
    let class = match error.kind {
        ErrorKind::Unavailable => "CoordinatorUnavailable",
        ErrorKind::Unauthenticated => "Unauthenticated",
        ErrorKind::Invalid => "InvalidArgument",
        ErrorKind::NotFound => "DatasetNotFound",
        ErrorKind::Conflict => "Conflict",
        ErrorKind::Fenced => "WorkerFenced",
        ErrorKind::MembershipChanged => "MembershipChanged",
        ErrorKind::JobAborted => "JobAborted",
        ErrorKind::TimedOut => "BarrierTimeout",
        ErrorKind::AlreadyCommitted => "StepConflict",
        ErrorKind::AttemptAborted => "SaveAborted",
        ErrorKind::Closed => "Closed",
        ErrorKind::Incomplete | ErrorKind::Internal => "Internal",
    };
    let made = || -> PyResult<PyErr> {
        let class = py.import("dtruntime.errors")?.getattr(class)?.cast_into::<PyType>()?;
        Ok(PyErr::from_value(class.call1((&error.what, &error.why, &error.hint))?))
    };
    made().unwrap_or_else(|failure| errors::instead(py, failure, error))
}
