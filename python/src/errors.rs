//! Engine errors as Python exceptions: one class per variant, defined in `dtruntime/errors.py`.

use std::fmt;

use dtr_engine::EngineError;
use dtr_engine::error::CoordinationKind;
use pyo3::exceptions::{PyException, PyRuntimeError};
use pyo3::prelude::*;
use pyo3::types::{PyAnyMethods, PyString, PyType};

/// The exception for an engine error.
pub(crate) fn to_python(py: Python<'_>, error: &EngineError) -> PyErr {
    exception(py, error).unwrap_or_else(|failure| instead(py, failure, error))
}

/// What is raised if an exception cannot be made, because of `failure`. A signal may have come in
/// between, as a `KeyboardInterrupt`, or a handler's exit: that goes on. Where not even the class
/// can be had, for the interpreter is being torn down, it is a `RuntimeError` that says the same.
pub(crate) fn instead(py: Python<'_>, failure: PyErr, error: &dyn fmt::Display) -> PyErr {
    if failure.is_instance_of::<PyException>(py) {
        PyRuntimeError::new_err(error.to_string())
    } else {
        failure
    }
}

fn exception(py: Python<'_>, error: &EngineError) -> PyResult<PyErr> {
    let module = py.import("dtruntime.errors")?;
    let class = module.getattr(class_name(error))?.cast_into::<PyType>()?;
    let (what, why, hint) = error.parts();
    let errno = match error {
        EngineError::Io { source, .. } => source.raw_os_error(),
        _ => None,
    };
    let instance = match errno {
        Some(errno) => class.call1((what, why, hint, errno))?,
        None => class.call1((what, why, hint))?,
    };
    Ok(PyErr::from_value(instance))
}

fn class_name(error: &EngineError) -> &'static str {
    match error {
        EngineError::InvalidArgument { .. } => "InvalidArgument",
        EngineError::NotFound { .. } => "CheckpointNotFound",
        EngineError::StepConflict { .. } => "StepConflict",
        EngineError::StoreBusy { .. } => "StoreBusy",
        EngineError::Corrupt { .. } => "Corrupt",
        EngineError::UnsupportedFormat { .. } => "UnsupportedFormat",
        EngineError::NoSpace { .. } => "NoSpace",
        EngineError::Io { .. } => "StorageError",
        EngineError::Unavailable { .. } => "Unavailable",
        EngineError::Accelerator { .. } => "AcceleratorError",
        EngineError::Closed { .. } => "Closed",
        EngineError::Coordination { kind, .. } => coordination_class(*kind),
        // `Internal`, and whatever a later engine adds: this file then lacks an arm, which is a
        // bug.
        _ => "Internal",
    }
}

fn coordination_class(kind: CoordinationKind) -> &'static str {
    match kind {
        CoordinationKind::SaveAborted => "SaveAborted",
        CoordinationKind::Unavailable => "CoordinatorUnavailable",
        CoordinationKind::Unauthenticated => "Unauthenticated",
        CoordinationKind::Conflict => "Conflict",
        CoordinationKind::Fenced => "WorkerFenced",
        CoordinationKind::MembershipChanged => "MembershipChanged",
        CoordinationKind::TimedOut => "BarrierTimeout",
        CoordinationKind::JobAborted => "JobAborted",
        _ => "Internal",
    }
}

/// A serialisable value as Python's dicts, lists and scalars.
pub(crate) fn json_to_python<'py>(
    py: Python<'py>,
    value: &impl serde::Serialize,
) -> PyResult<Bound<'py, PyAny>> {
    let text = serde_json::to_string(value).map_err(|error| {
        to_python(py, &EngineError::internal("handing a value to Python", error.to_string()))
    })?;
    py.import("json")?.call_method1("loads", (PyString::new(py, &text),))
}
