//! A storage in a device's memory, as the engine saves it and reads into it.
//!
//! ```text
//! engine: gap of a chunk ──begin──► copies down, one a piece ──landed──► gap filled
//! engine: departure      ──begin──► copies up, one a piece   ──over────► departure arrived
//! ```
//!
//! Always holds: a gap, or a departure, is notified once, when all copies of it are over; no copy
//! goes beyond the pieces that the storage was made of.
//!
//! Why `unsafe`: a storage is known by addresses in the device's memory, which only the caller can
//! vouch for.
#![expect(unsafe_code, reason = "copies from and to addresses in a device's memory")]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use dtr_engine::io::pin::{Pin, Pinned as EnginePinned};
use dtr_engine::load::{Departure, DeviceDestination};
use dtr_engine::save::{DeviceSource, Gap, StorageSource};
use dtr_engine::{EngineError, Result, unpoisoned};

use crate::{CudaError, Device, DeviceBuffer, Direction, Landing, Pinned, Takeoff, probe};

/// Memory is pinned in pieces of at most this size: what takes long can be seen to go on.
const PINNED_PIECE_BYTES: usize = 256 << 20;

/// Contiguous memory of a device that stands at byte `at` of a storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where it begins.
    pub address: u64,
    /// How many bytes it has.
    pub bytes: u64,
    /// Where in the storage it stands.
    pub at: u64,
}

impl Piece {
    fn end(&self) -> u64 {
        self.at + self.bytes
    }
}

/// A storage: pieces of a device's memory, laid end to end.
#[derive(Clone, Debug)]
pub struct DeviceStorage {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    device: Arc<Device>,
    pin: ArenaPin,
    pieces: Vec<Piece>,
    /// Clones that the pieces are of; freed when nobody needs the storage any more.
    _clones: Vec<DeviceBuffer>,
}

impl DeviceStorage {
    /// The storage that `pieces` make up.
    ///
    /// # Errors
    ///
    /// Where they are not laid end to end.
    ///
    /// # Safety
    ///
    /// The pieces are memory of `device` until no save that it was given to, and no read, has a
    /// copy under way: [`SaveHandle::wait_captured`](dtr_engine::save::SaveHandle::wait_captured),
    /// or the end of the read.
    pub unsafe fn new(device: &Arc<Device>, pieces: Vec<Piece>) -> Result<Self> {
        let end = pieces.iter().try_fold(0, |end, piece| (piece.at == end).then(|| piece.end()));
        if end.is_none() {
            let why = "its pieces are not laid end to end";
            return Err(EngineError::internal("reading a storage of a device", why));
        }
        Ok(Self::of(device, pieces, Vec::new()))
    }

    fn of(device: &Arc<Device>, pieces: Vec<Piece>, clones: Vec<DeviceBuffer>) -> Self {
        let pin = ArenaPin(Arc::clone(device));
        let inner = Inner { device: Arc::clone(device), pin, pieces, _clones: clones };
        Self { inner: Arc::new(inner) }
    }

    /// A copy of it within the device, made in the order of the copies down: later copies from it
    /// see what it holds now, whatever becomes of the storage itself.
    ///
    /// # Errors
    ///
    /// [`EngineError::Accelerator`] where the device has no memory for it.
    pub fn clone_on_device(&self) -> Result<Self> {
        let device = &self.inner.device;
        let mut clones = Vec::with_capacity(self.inner.pieces.len());
        let mut pieces = Vec::with_capacity(self.inner.pieces.len());
        for piece in &self.inner.pieces {
            let bytes = usize::try_from(piece.bytes).unwrap_or(usize::MAX);
            if bytes == 0 {
                pieces.push(*piece);
                continue;
            }
            // SAFETY: the piece is the device's memory, as `new` was promised; the caller lets its
            // stream wait for the copies down before it changes or frees it.
            let clone = unsafe { device.clone_memory(piece.address, bytes) }
                .map_err(|error| engine_error("cloning a tensor on the GPU", &error))?;
            pieces.push(Piece { address: clone.address(), ..*piece });
            clones.push(clone);
        }
        Ok(Self::of(device, pieces, clones))
    }

    /// How many bytes it has.
    pub fn bytes(&self) -> u64 {
        self.inner.pieces.last().map_or(0, Piece::end)
    }

    /// Whose memory it is.
    pub fn device(&self) -> &Arc<Device> {
        &self.inner.device
    }

    /// Where byte `offset` is, and how many bytes of its piece follow.
    fn locate(&self, offset: u64) -> Option<(u64, usize)> {
        let pieces = &self.inner.pieces;
        let piece = pieces.get(pieces.partition_point(|piece| piece.end() <= offset))?;
        let skip = offset - piece.at;
        Some((piece.address + skip, usize::try_from(piece.bytes - skip).unwrap_or(usize::MAX)))
    }

    fn outside(&self, offset: u64) -> EngineError {
        EngineError::internal(
            format!("copying a storage of a device at offset {offset}"),
            format!("it has {} bytes", self.bytes()),
        )
    }

    fn flush(&self, direction: Direction) {
        if let Err(error) = self.inner.device.flush(direction) {
            // Whatever was begun is notified of it.
            tracing::debug!(%error, "a batch of copies was not ended");
        }
    }
}

impl StorageSource for DeviceStorage {
    fn read(&self, offset: u64, _: &mut [u8]) -> Result<()> {
        Err(EngineError::internal(
            format!("capturing a storage of a device at offset {offset}"),
            "the processor cannot read it",
        ))
    }

    fn device(&self) -> Option<Arc<dyn DeviceSource>> {
        Some(Arc::new(self.clone()))
    }
}

impl DeviceSource for DeviceStorage {
    fn begin(&self, mut offset: u64, mut gap: Gap) {
        while !gap.is_empty() {
            let Some((address, room)) = self.locate(offset) else {
                return gap.filled(Err(self.outside(offset)));
            };
            let count = room.min(gap.len());
            let (first, rest) = gap.split_at(count);
            gap = rest;
            offset += count as u64;
            // SAFETY: within a piece of the device's memory, which `new` was promised to stay so.
            unsafe { self.inner.device.copy_down(address, Box::new(Filled(first))) };
        }
        gap.filled(Ok(()));
    }

    fn flush(&self) {
        Self::flush(self, Direction::Down);
    }

    fn ordinal(&self) -> u32 {
        self.inner.device.ordinal()
    }
}

impl DeviceDestination for DeviceStorage {
    fn begin(&self, mut at: u64, mut departure: Departure) {
        while !departure.memory().is_empty() {
            let Some((address, room)) = self.locate(at) else {
                return departure.arrived(Err(self.outside(at)));
            };
            let count = room.min(departure.memory().len());
            let (first, rest) = departure.split_at(count);
            departure = rest;
            at += count as u64;
            // SAFETY: within a piece of the device's memory, which `new` was promised to stay so;
            // what it holds is to be replaced.
            unsafe { self.inner.device.copy_up(Box::new(Gone(first)), address) };
        }
        departure.arrived(Ok(()));
    }

    fn flush(&self) {
        Self::flush(self, Direction::Up);
    }

    fn ordinal(&self) -> u32 {
        self.inner.device.ordinal()
    }

    fn pin(&self) -> &dyn Pin {
        &self.inner.pin
    }
}

/// A gap, to be notified when its copy is over.
struct Filled(Gap);

impl Landing for Filled {
    fn memory(&mut self) -> &mut [u8] {
        self.0.memory()
    }

    fn landed(self: Box<Self>, outcome: std::result::Result<(), CudaError>) {
        self.0
            .filled(outcome.map_err(|error| engine_error("copying a tensor from the GPU", &error)));
    }
}

/// A departure, to be notified when its copy is over.
struct Gone(Departure);

impl Takeoff for Gone {
    fn memory(&self) -> &[u8] {
        self.0.memory()
    }

    fn taken_off(self: Box<Self>, outcome: std::result::Result<(), CudaError>) {
        self.0
            .arrived(outcome.map_err(|error| engine_error("copying a tensor to the GPU", &error)));
    }
}

/// Pins the engine's memory, for every device.
#[derive(Clone, Debug)]
pub struct ArenaPin(Arc<Device>);

impl ArenaPin {
    /// By way of `device`.
    pub fn new(device: &Arc<Device>) -> Self {
        Self(Arc::clone(device))
    }
}

impl Pin for ArenaPin {
    fn pin(
        &self,
        start: *mut u8,
        buffer_bytes: usize,
        buffers: usize,
    ) -> Result<Box<dyn EnginePinned>> {
        let piece_buffers = (PINNED_PIECE_BYTES / buffer_bytes.max(1)).max(1);
        let mut pieces = Vec::with_capacity(buffers.div_ceil(piece_buffers));
        for first in (0..buffers).step_by(piece_buffers) {
            let bytes = piece_buffers.min(buffers - first) * buffer_bytes;
            let start = start.wrapping_add(first * buffer_bytes);
            // SAFETY: mapped until what is returned is dropped, when no copy is under way any more:
            // the contract of `Pin`.
            match unsafe { Pinned::register(&self.0, start, bytes) } {
                Ok(piece) => pieces.push(piece),
                Err(error) if pieces.is_empty() => {
                    return Err(engine_error("pinning memory", &error));
                }
                // No copy crosses a buffer: those in what is pinned are fast all the same.
                Err(error) => {
                    let pinned_bytes = first * buffer_bytes;
                    tracing::warn!(pinned_bytes, bytes = buffers * buffer_bytes, %error, "only a \
                        part of the memory is pinned: copies to and from the rest are slow");
                    break;
                }
            }
        }
        Ok(Box::new(PinnedMemory { _pieces: pieces }))
    }
}

#[derive(Debug)]
struct PinnedMemory {
    _pieces: Vec<Pinned>,
}

impl EnginePinned for PinnedMemory {}

/// Devices that this process has opened, by their numbers.
static DEVICES: Mutex<BTreeMap<u32, Arc<Device>>> = Mutex::new(BTreeMap::new());

/// The device `ordinal`, opened once in a process and kept until its end.
///
/// # Errors
///
/// As for [`Device::open`], as [`EngineError::Accelerator`].
pub fn shared_device(ordinal: u32) -> Result<Arc<Device>> {
    let what = || format!("opening `cuda:{ordinal}`");
    // First, which says whose process this is: in a forked child the lock may be a thread's that
    // is not there.
    probe().map_err(|error| engine_error(&what(), &error))?;
    let mut devices = unpoisoned(DEVICES.lock());
    if let Some(device) = devices.get(&ordinal) {
        return Ok(Arc::clone(device));
    }
    let device = Device::open(ordinal).map_err(|error| engine_error(&what(), &error))?;
    devices.insert(ordinal, Arc::clone(&device));
    Ok(device)
}

/// An error of a device, as the engine reports it.
pub fn engine_error(what: &str, error: &CudaError) -> EngineError {
    let (doing, why, hint) = error.parts();
    EngineError::Accelerator {
        what: what.into(),
        why: format!("{doing}: {why}"),
        hint: hint.into(),
    }
}
