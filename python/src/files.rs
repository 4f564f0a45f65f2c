//! What the kernel does with files and Python's `os` does not offer.

use std::io::ErrorKind;
use std::path::PathBuf;

use pyo3::prelude::*;
use rustix::fs::{CWD, RenameFlags, renameat_with};

/// Has two names change places, at once: of files, links and directories. False, and nothing
/// has changed, where the filesystem cannot.
#[pyfunction]
pub(crate) fn swap(py: Python<'_>, first: PathBuf, second: PathBuf) -> PyResult<bool> {
    let swapped = py.detach(move || renameat_with(CWD, first, CWD, second, RenameFlags::EXCHANGE));
    match swapped.map_err(std::io::Error::from) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => {
            Ok(false)
        }
        Err(error) => Err(error.into()),
    }
}
