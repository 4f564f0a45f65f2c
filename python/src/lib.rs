//! `dtruntime._native`: thin classes over the verbs of the engine and of the coordinator's client.
//! Registers them and nothing else.
//!
//! Always holds: the GIL is released around everything that can block, and waits look for signals
//! at least ten times a second; the engine's threads never take the GIL; an error becomes the
//! exception of the same name in `dtruntime.errors`; a panic becomes `Internal`, and the store
//! refuses further work.

use pyo3::prelude::*;

mod checkpoint;
mod coordinator;
mod device;
mod embedded;
mod errors;
mod files;
mod guard;
mod handle;
mod log;
mod manager;
mod tensor;
mod tool;
mod tree;

/// The native half of `dtruntime`.
#[pymodule(gil_used = false, name = "_native")]
mod native {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::checkpoint::Checkpoint;
    #[pymodule_export]
    use crate::coordinator::{BarrierCall, Coordinator, Worker};
    #[pymodule_export]
    use crate::device::{Sources, cuda_devices};
    #[pymodule_export]
    use crate::embedded::EmbeddedCoordinator;
    #[pymodule_export]
    use crate::files::swap;
    #[pymodule_export]
    use crate::handle::SaveHandle;
    #[pymodule_export]
    use crate::manager::Manager;
    #[pymodule_export]
    use crate::tensor::{LentMemory, MappedMemory};
    #[pymodule_export]
    use crate::tool::ckpt_tool;
    #[pymodule_export]
    use crate::tree::paths_of;

    /// Runs once, when the module is imported.
    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        // Now, because numpy's interface is a panic if Ctrl-C comes while it is fetched.
        module.py().import("numpy")?;
        numpy::dtype::<u8>(module.py());
        module.add("OPENING_BARRIER", dtr_proto::OPENING_BARRIER)?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        Ok(())
    }
}
