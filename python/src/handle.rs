//! A save in flight, as Python holds it.

use std::time::Duration;

use dtr_engine::save;
use pyo3::prelude::*;

use crate::device::{self, Streams};
use crate::errors::json_to_python;
use crate::guard::{Guard, timeout_of};

/// The engine's handle of one save. Every method but `step` raises `Closed` in a forked child.
#[pyclass(frozen, module = "dtruntime._native")]
#[derive(Debug)]
pub(crate) struct SaveHandle {
    inner: save::SaveHandle,
    guard: Guard,
}

impl SaveHandle {
    pub(crate) fn new(inner: save::SaveHandle, guard: Guard) -> Self {
        Self { inner, guard }
    }

    fn what(&self) -> String {
        format!("waiting for the save of step {}", self.inner.step())
    }
}

#[pymethods]
impl SaveHandle {
    /// The step being saved.
    #[getter]
    fn step(&self) -> u64 {
        self.inner.step()
    }

    /// Whether the save has ended, well or not.
    fn done(&self, py: Python<'_>) -> PyResult<bool> {
        self.guard.call(py, &self.what(), || Ok(self.inner.is_done()))
    }

    /// Whether the save has ended, and not well. The error does not count as seen by that.
    fn failed(&self, py: Python<'_>) -> PyResult<bool> {
        self.guard.call(py, &self.what(), || Ok(self.inner.has_failed()))
    }

    /// Waits for the end, at most `timeout` seconds; true if it has come.
    #[pyo3(signature = (timeout=None))]
    fn wait(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<bool> {
        let wait = |slice: Duration| Ok(self.inner.wait(Some(slice)));
        self.guard.wait(py, &self.what(), timeout_of(timeout), wait)
    }

    /// Waits, at most `timeout` seconds, until nothing of the state is read any more; true if so.
    #[pyo3(signature = (timeout=None))]
    fn wait_captured(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<bool> {
        let wait = |slice: Duration| Ok(self.inner.wait_captured(Some(slice)));
        self.guard.wait(py, &self.what(), timeout_of(timeout), wait)
    }

    /// Lets what these streams are given from now on wait, on their devices, until the state was
    /// copied. Blocks until every copy was begun, which takes long only where the state is larger
    /// than the staging memory.
    #[expect(clippy::needless_pass_by_value, reason = "made from a Python list")]
    fn precede(&self, py: Python<'_>, streams: Streams) -> PyResult<()> {
        let wait = |slice: Duration| Ok(self.inner.wait_begun(Some(slice)));
        self.guard.wait(py, &self.what(), None, wait)?;
        self.guard.call(py, &self.what(), || device::precede(&streams))
    }

    /// The outcome as a dict, once it has come; None before. Raises the save's error, which then
    /// counts as seen.
    fn outcome<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let outcome = self
            .guard
            .call(py, &self.what(), || self.inner.result(Some(Duration::ZERO)).transpose())?;
        outcome.map(|info| json_to_python(py, &info)).transpose()
    }

    /// Bytes captured, encoded and written so far, as a dict.
    fn progress<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let reading = self.guard.call(py, &self.what(), || Ok(self.inner.progress()))?;
        json_to_python(py, &reading)
    }

    /// Seconds and bytes per phase, as a dict.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let stats = self.guard.call(py, &self.what(), || Ok(self.inner.stats()))?;
        json_to_python(py, &stats)
    }

    /// Gives the save up unless its manifest is being published; it then ends with `Closed`.
    fn cancel(&self, py: Python<'_>, why: &str) -> PyResult<()> {
        self.guard.call(py, &self.what(), || {
            self.inner.cancel(why);
            Ok(())
        })
    }

    /// The same, where nobody will ask for the outcome: an error counts as seen.
    fn abandon(&self, py: Python<'_>, why: &str) -> PyResult<()> {
        self.guard.call(py, &self.what(), || {
            self.inner.abandon(why);
            Ok(())
        })
    }
}
