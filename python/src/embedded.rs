//! A coordinator that this process hosts for its run.

use coordinator::embedded::Embedded;
use dtr_proto::client::{ClientError, ErrorKind};
use pyo3::prelude::*;

use crate::coordinator::{Home, to_python};

/// A coordinator with its threads; it ends with this object, or with the process.
#[pyclass(frozen, module = "dtruntime._native")]
#[derive(Debug)]
pub(crate) struct EmbeddedCoordinator {
    inner: Home<Embedded>,
}

#[pymethods]
impl EmbeddedCoordinator {
    /// Starts one on a free port of this address.
    #[new]
    fn new(py: Python<'_>, ip: &str) -> PyResult<Self> {
        crate::log::start();
        let started = py.detach(|| Embedded::start(ip));
        let embedded = started.map_err(|error| {
            let (why, hint) = error.parts();
            to_python(
                py,
                &ClientError {
                    kind: ErrorKind::Unavailable,
                    what: "hosting a coordinator in this process".into(),
                    why,
                    hint: format!("{hint}; or name one that runs: `coordinator_url=`"),
                },
            )
        })?;
        Ok(Self { inner: Home::new(embedded) })
    }

    /// The port that it listens on.
    #[getter]
    fn port(&self, py: Python<'_>) -> PyResult<u16> {
        Ok(self.inner.get(py, "the hosted coordinator")?.address().port())
    }

    /// What callers have to present.
    #[getter]
    fn token(&self, py: Python<'_>) -> PyResult<String> {
        Ok(self.inner.get(py, "the hosted coordinator")?.token().to_owned())
    }
}
