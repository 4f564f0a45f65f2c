//! torch's tensors on GPUs, as the engine saves and fills them: addresses and streams.
//!
//! Always holds: copies from a device follow what the caller's streams had been given when the save
//! was called; what is cloned was cloned before those streams go on. Devices are opened without the
//! GIL, once in a process.
//!
//! Why `unsafe`: torch hands out addresses and handles of streams, not what they stand for.
#![expect(unsafe_code, reason = "torch's streams and memory are reached by address")]

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use dtr_cuda::{
    ArenaPin, CudaError, DeviceStorage, Direction, MemoryInfo, Piece, engine_error, probe,
    shared_device,
};
use dtr_engine::engine::Engine;
use dtr_engine::format::layout::ElementType;
use dtr_engine::io::pin::Pin;
use dtr_engine::load::DeviceTarget;
use dtr_engine::save::{StorageInput, StorageSource};
use dtr_engine::{EngineError, Result};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::errors::to_python;
use crate::handle::SaveHandle;
use crate::tensor::{FreshMemory, HostSource, element_of};

/// The part of a device's memory, one of so many, that clones leave to training.
const RESERVED_SHARE: u64 = 32;
/// Clones up to this part of what is left to training, one of so many, may take from it: refusing
/// them would save nothing.
const SMALL_SHARE: u64 = 16;

/// The caller's current streams: number of the device, and handle.
pub(crate) type Streams = Vec<(u32, u64)>;

/// How many CUDA devices there are. Raises `AcceleratorError` where there is no driver that serves.
#[pyfunction]
pub(crate) fn cuda_devices(py: Python<'_>) -> PyResult<u32> {
    let driver = py.detach(probe);
    driver
        .map(|driver| driver.devices)
        .map_err(|error| to_python(py, &engine_error("looking for GPUs", &error)))
}

/// Lets copies of `direction` wait for what the streams have been given so far.
pub(crate) fn follow(direction: Direction, streams: &Streams) -> Result<()> {
    for &(ordinal, stream) in streams {
        let device = shared_device(ordinal)?;
        // SAFETY: torch's current stream of this device; torch keeps its streams forever.
        let followed = unsafe { device.follow(direction, stream) };
        followed.map_err(|error| engine_error("waiting for the current stream", &error))?;
    }
    Ok(())
}

/// Lets what the streams are given from now on wait for the copies from their devices so far.
pub(crate) fn precede(streams: &Streams) -> Result<()> {
    for &(ordinal, stream) in streams {
        let device = shared_device(ordinal)?;
        // SAFETY: torch's current stream of this device; torch keeps its streams forever.
        let preceded = unsafe { device.precede(Direction::Down, stream) };
        preceded.map_err(|error| engine_error("holding the current stream back", &error))?;
    }
    Ok(())
}

/// A storage to save, wherever it lies.
#[derive(Debug)]
pub(crate) enum Source {
    Host(HostSource),
    Device(Described),
}

/// Memory of a device, as Python describes it.
#[derive(Debug)]
pub(crate) struct Described {
    element: ElementType,
    bytes: u64,
    ordinal: u32,
    pieces: Vec<Piece>,
    /// Whether it is cloned on the device, and the clone saved.
    is_cloned: bool,
}

impl Source {
    /// From `(element, bytes, memory)`: `(device, pieces, whether it is cloned)`, or as
    /// [`HostSource::extract`] takes it.
    pub(crate) fn extract(item: &Bound<'_, PyAny>) -> PyResult<Self> {
        let (element, bytes, memory): (u8, u64, Bound<'_, PyAny>) = item.extract()?;
        let Ok(place) = memory.cast::<PyTuple>() else {
            return HostSource::extract(item).map(Self::Host);
        };
        let (ordinal, pieces, is_cloned): (u32, Vec<(u64, u64, u64)>, bool) = place.extract()?;
        let element = element_of(item.py(), element)?;
        let piece = |(address, bytes, at)| Piece { address, bytes, at };
        let pieces = pieces.into_iter().map(piece).collect();
        Ok(Self::Device(Described { element, bytes, ordinal, pieces, is_cloned }))
    }

    /// Ready to be captured, with its device opened.
    pub(crate) fn prepare(self) -> Result<Prepared> {
        match self {
            Self::Host(source) => Ok(Prepared::Host(source)),
            Self::Device(described) => described.storage().map(|storage| {
                let element = described.element;
                Prepared::Device { storage, element }
            }),
        }
    }
}

impl Described {
    fn storage(&self) -> Result<DeviceStorage> {
        let device = shared_device(self.ordinal)?;
        // SAFETY: the caller keeps torch's tensors until the copies are over, as `save` demands.
        let storage = unsafe { DeviceStorage::new(&device, self.pieces.clone()) }?;
        if storage.bytes() != self.bytes {
            let why = format!("its pieces have {} bytes, not {}", storage.bytes(), self.bytes);
            return Err(EngineError::internal("reading a storage of a device", why));
        }
        if self.is_cloned { storage.clone_on_device() } else { Ok(storage) }
    }
}

/// By device, how many bytes are cloned there.
pub(crate) fn bytes_to_clone(sources: &[Source]) -> BTreeMap<u32, u64> {
    let mut cloned = BTreeMap::new();
    for source in sources {
        if let Source::Device(Described { ordinal, bytes: bytes @ 1.., is_cloned: true, .. }) =
            source
        {
            *cloned.entry(*ordinal).or_default() += bytes;
        }
    }
    cloned
}

/// Refuses clones that would leave training less memory than a small part of the device: what it
/// allocates next would fail, although it fits without the clones.
pub(crate) fn check_room_for_clones(cloned: &BTreeMap<u32, u64>) -> Result<()> {
    for (&ordinal, &bytes) in cloned {
        let what = format!("cloning tensors on `cuda:{ordinal}`");
        let device = shared_device(ordinal)?;
        let has_room = |memory: std::result::Result<MemoryInfo, CudaError>| -> Result<bool> {
            let memory = memory.map_err(|error| engine_error(&what, &error))?;
            let reserved = memory.total_bytes as u64 / RESERVED_SHARE;
            let is_small = bytes <= reserved / SMALL_SHARE;
            let wanted = if is_small { bytes } else { bytes.saturating_add(reserved) };
            Ok(wanted <= memory.free_bytes as u64)
        };
        if !has_room(device.memory_info())? && !has_room(device.settled_memory_info())? {
            return Err(EngineError::Accelerator {
                what,
                // Without what changes from save to save: it is logged once.
                why: format!(
                    "they would leave training less than a {RESERVED_SHARE}nd of its memory"
                ),
                hint: "use `strict`, or free memory on the GPU".into(),
            });
        }
    }
    Ok(())
}

/// The storages of a state, ready to be captured.
#[pyclass(frozen, module = "dtruntime._native")]
#[derive(Debug)]
pub(crate) struct Sources {
    pub(crate) storages: Vec<Prepared>,
    /// Whether copies from devices go on when the save has returned.
    pub(crate) behind: bool,
    /// The save that copies them.
    begun: OnceLock<Py<SaveHandle>>,
}

impl Sources {
    pub(crate) fn new(storages: Vec<Prepared>, behind: bool) -> Self {
        Self { storages, behind, begun: OnceLock::new() }
    }

    /// Notes the save that was begun, and gives it again.
    pub(crate) fn begun_by(&self, py: Python<'_>, save: SaveHandle) -> PyResult<Py<SaveHandle>> {
        let save = Py::new(py, save)?;
        let _once = self.begun.set(save.clone_ref(py));
        Ok(save)
    }
}

#[pymethods]
impl Sources {
    /// The save that copies them, once it was begun: also if an exception of a signal took the
    /// place of what `save` returned.
    #[getter]
    fn begun(&self, py: Python<'_>) -> Option<Py<SaveHandle>> {
        self.begun.get().map(|save| save.clone_ref(py))
    }
}

/// A storage that can be captured.
#[derive(Debug)]
pub(crate) enum Prepared {
    Host(HostSource),
    Device { storage: DeviceStorage, element: ElementType },
}

impl Prepared {
    pub(crate) fn input(&self) -> StorageInput<'_> {
        match self {
            Self::Host(source) => {
                StorageInput { bytes: source.bytes(), element: source.element(), source }
            }
            Self::Device { storage, element } => {
                let source: &dyn StorageSource = storage;
                StorageInput { bytes: storage.bytes(), element: *element, source }
            }
        }
    }
}

/// Has the engine's staging arena pinned by the first device that is saved from.
pub(crate) fn pin_for(engine: &Engine, streams: &Streams) -> Result<()> {
    let Some(&(ordinal, _)) = streams.first() else { return Ok(()) };
    let pin: Arc<dyn Pin> = Arc::new(ArenaPin::new(&shared_device(ordinal)?));
    engine.pin_staging(&pin)
}

/// Memory to fill with a part of a storage, wherever it lies.
#[derive(Debug)]
pub(crate) enum Target {
    Host(FreshMemory),
    Device { storage: u32, offset: u64, ordinal: u32, address: u64, bytes: usize },
}

impl Target {
    /// From `(storage, offset, memory)`: `(device, address, bytes)`, or as [`FreshMemory::extract`]
    /// takes it.
    pub(crate) fn extract(item: &Bound<'_, PyAny>) -> PyResult<Self> {
        let (storage, offset, memory): (u32, u64, Bound<'_, PyAny>) = item.extract()?;
        match memory.extract::<(u32, u64, usize)>() {
            Ok((ordinal, address, bytes)) => {
                Ok(Self::Device { storage, offset, ordinal, address, bytes })
            }
            Err(_) => FreshMemory::extract(item).map(Self::Host),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Host(memory) => memory.bytes(),
            Self::Device { bytes, .. } => *bytes,
        }
    }
}

/// The device's memory behind a target; none for one in the host's memory.
pub(crate) fn destination_of(target: &Target) -> Result<Option<DeviceStorage>> {
    let Target::Device { ordinal, address, bytes, .. } = *target else { return Ok(None) };
    let piece = Piece { address, bytes: bytes as u64, at: 0 };
    // SAFETY: memory of torch's that the caller keeps, and keeps to itself, until the read returns.
    unsafe { DeviceStorage::new(&shared_device(ordinal)?, vec![piece]) }.map(Some)
}

/// A target in `memory`, which [`destination_of`] made of it.
pub(crate) fn device_target<'a>(
    target: &Target,
    memory: &'a DeviceStorage,
) -> Option<DeviceTarget<'a>> {
    let Target::Device { storage, offset, bytes, .. } = *target else { return None };
    Some(DeviceTarget { storage, offset, bytes, memory, at: 0 })
}
