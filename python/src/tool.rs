//! `ckpt-tool` as a function.

use std::ffi::OsString;

use pyo3::prelude::*;

/// Runs the tool as a program with this command line, its name first; its exit status.
#[pyfunction]
pub(crate) fn ckpt_tool(py: Python<'_>, arguments: Vec<OsString>) -> u8 {
    py.detach(|| ::ckpt_tool::run(arguments))
}
