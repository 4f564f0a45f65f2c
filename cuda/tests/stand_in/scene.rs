//! What the tests play with: devices' memory, callers' streams, and landings that remember.
//!
//! Always holds: scenes do not overlap, because the stand-in is one for the process, and a scene
//! ends with a look at what was left behind.
//!
//! Why `unsafe`: the memory of the stand-in's devices is memory of the host, known by its address,
//! and the crate's calls take such addresses.
#![expect(unsafe_code, reason = "calls that take addresses of memory and of streams")]

use std::ffi::{CStr, c_int};
use std::process::Command;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{env, slice, thread};

use dtr_cuda::{
    CudaError, Device, DeviceBuffer, DeviceStorage, Direction, Landing, Piece, Pinned, Takeoff,
};
use fastrand::Rng;

use crate::library::{Counters, StandIn};

/// The stage, for one test at a time.
pub(crate) struct Scene {
    stand_in: &'static StandIn,
    may_leave_memory: bool,
    _turn: MutexGuard<'static, ()>,
}

impl Scene {
    /// Waits for the turn and puts everything back.
    pub(crate) fn new() -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let stand_in = StandIn::get();
        stand_in.reset();
        Self { stand_in, may_leave_memory: false, _turn: turn }
    }

    /// Lets the scene end with memory that is still pinned or allocated.
    pub(crate) fn may_leave_memory(&mut self) {
        self.may_leave_memory = true;
    }

    /// Waits until nothing happens any more in any stream.
    pub(crate) fn settle(&self) {
        self.stand_in.settle();
    }

    pub(crate) fn hold_copies(&self, are_held: bool) {
        self.stand_in.hold_copies(are_held);
    }

    pub(crate) fn delay_copies(&self, microseconds: c_int) {
        self.stand_in.delay_copies(microseconds);
    }

    /// Lets the `nth` call of `name` from now fail with `code`.
    pub(crate) fn fail(&self, name: &'static CStr, nth: u64, code: u32) {
        self.stand_in.fail(name, nth, 1, code);
    }

    /// Lets the next `times` calls of `name` fail with `code`.
    pub(crate) fn fail_repeatedly(&self, name: &'static CStr, times: u64, code: u32) {
        self.stand_in.fail(name, 1, times, code);
    }

    /// Lets calls of `name` wait, and waits until one does.
    pub(crate) fn hold_until_called(&self, name: &'static CStr, call: impl FnOnce()) {
        let before = self.calls(name);
        self.stand_in.hold_call(Some(name));
        call();
        while self.calls(name) == before {
            thread::yield_now();
        }
    }

    pub(crate) fn let_calls_go(&self) {
        self.stand_in.hold_call(None);
    }

    /// Loses device `ordinal` by `code`.
    pub(crate) fn lose(&self, ordinal: u32, code: u32) {
        self.stand_in.lose(index(ordinal), code);
    }

    pub(crate) fn count(&self) -> Counters {
        self.stand_in.count()
    }

    /// How often the driver's `name` was called.
    pub(crate) fn calls(&self, name: &'static CStr) -> u64 {
        self.stand_in.calls(name)
    }

    /// How often anything of the driver was called.
    pub(crate) fn all_calls(&self) -> u64 {
        self.stand_in.all_calls()
    }

    /// The mode of this thread towards captures; 0 is the default.
    pub(crate) fn capture_mode(&self) -> u32 {
        self.stand_in.capture_mode()
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if thread::panicking() {
            return;
        }
        self.settle();
        let Counters {
            live_streams,
            live_events,
            contexts_retained,
            bytes_allocated,
            bytes_registered,
            ..
        } = self.count();
        assert_eq!((live_streams, live_events, contexts_retained), (0, 0, 0), "left behind");
        assert_eq!(self.stand_in.pushed(), 0, "a context is left current on this thread");
        if !self.may_leave_memory {
            assert_eq!((bytes_allocated, bytes_registered), (0, 0), "left behind");
        }
    }
}

/// Memory of a device that a caller has allocated.
pub(crate) struct Memory {
    address: u64,
    bytes: usize,
}

impl Memory {
    /// Memory of device `ordinal` that holds `content`.
    pub(crate) fn holding(ordinal: u32, content: &[u8]) -> Self {
        let address = StandIn::get().allocate(index(ordinal), content.len().max(1));
        let start = ptr::with_exposed_provenance_mut::<u8>(usize::try_from(address).unwrap());
        // SAFETY: newly allocated memory of the host, which nobody else knows.
        unsafe { start.copy_from_nonoverlapping(content.as_ptr(), content.len()) };
        Self { address, bytes: content.len() }
    }

    /// What it holds. Nothing may be under way.
    pub(crate) fn content(&self) -> Vec<u8> {
        let start = ptr::with_exposed_provenance::<u8>(usize::try_from(self.address).unwrap());
        // SAFETY: allocated memory of the host that nobody writes to at the moment.
        unsafe { slice::from_raw_parts(start, self.bytes) }.to_vec()
    }
}

/// The memory as a storage of two pieces, cut after `cut` bytes.
pub(crate) fn storage_of(device: &Arc<Device>, memory: &Memory, cut: usize) -> DeviceStorage {
    let (cut, bytes) = (cut as u64, memory.bytes as u64);
    let pieces = [(0, cut), (cut, bytes)].map(|(at, end)| Piece {
        address: memory.address + at,
        bytes: end - at,
        at,
    });
    // SAFETY: the tests free the memory after everything of it has landed.
    unsafe { DeviceStorage::new(device, pieces.into()) }.unwrap()
}

impl Drop for Memory {
    fn drop(&mut self) {
        StandIn::get().free(self.address);
    }
}

/// A stream of the caller.
pub(crate) struct CallerStream {
    control: u64,
    handle: u64,
}

impl CallerStream {
    pub(crate) fn new(ordinal: u32) -> Self {
        let handle = StandIn::get().make_stream(index(ordinal));
        Self { control: handle, handle }
    }

    /// The stream that is called 0.
    pub(crate) fn legacy(ordinal: u32) -> Self {
        Self { control: StandIn::get().legacy_stream(index(ordinal)), handle: 0 }
    }

    /// Writes `content` when the stream's turn comes.
    pub(crate) fn write(&self, memory: &Memory, offset: usize, content: &[u8]) {
        assert!(offset + content.len() <= memory.bytes, "a write stays within the memory");
        let to = memory.address + u64::try_from(offset).unwrap();
        StandIn::get().write(self.control, to, content.as_ptr().cast(), content.len());
    }

    pub(crate) fn hold(&self, is_held: bool) {
        StandIn::get().hold(self.control, is_held);
    }

    pub(crate) fn capture(&self, is_captured: bool) {
        StandIn::get().capture(self.control, is_captured);
    }
}

impl Drop for CallerStream {
    fn drop(&mut self) {
        self.hold(false);
        self.capture(false);
        if self.handle != 0 {
            StandIn::get().end_stream(self.control);
        }
    }
}

/// Memory of the host, pinned if that was asked for.
pub(crate) struct HostMemory {
    // Dropped first.
    _pinned: Option<Pinned>,
    memory: Vec<u8>,
}

impl HostMemory {
    pub(crate) fn pageable(memory: Vec<u8>) -> Self {
        Self { _pinned: None, memory }
    }

    pub(crate) fn pinned(device: &Device, mut memory: Vec<u8>) -> Result<Self, CudaError> {
        let (start, bytes) = (memory.as_mut_ptr(), memory.len());
        let pinned = pin(device, start, bytes)?;
        Ok(Self { _pinned: Some(pinned), memory })
    }
}

/// Pins memory that outlives the result.
pub(crate) fn pin(device: &Device, start: *mut u8, bytes: usize) -> Result<Pinned, CudaError> {
    // SAFETY: the tests keep the memory for longer than what this returns.
    unsafe { Pinned::register(device, start, bytes) }
}

/// What a landing or takeoff was notified of.
pub(crate) struct Told {
    /// Which one, counted in the order in which they were made.
    pub(crate) index: usize,
    pub(crate) outcome: Result<(), CudaError>,
    pub(crate) memory: Vec<u8>,
}

/// Remembers what landings and takeoffs were notified of.
#[derive(Clone, Default)]
pub(crate) struct Log {
    made: Arc<Mutex<usize>>,
    told: Arc<Mutex<Vec<Told>>>,
}

impl Log {
    /// A landing of `bytes`, or a takeoff of those bytes, that is remembered here.
    pub(crate) fn traveller(&self, host: HostMemory) -> Traveller {
        self.with_last_words(host, || ())
    }

    /// The same, with something to do when it is notified.
    pub(crate) fn with_last_words(
        &self,
        host: HostMemory,
        last_words: impl FnOnce() + Send + 'static,
    ) -> Traveller {
        let mut made = self.made.lock().unwrap();
        *made += 1;
        let last_words = Box::new(last_words);
        Traveller { index: *made - 1, host, log: self.clone(), last_words }
    }

    pub(crate) fn landing(&self, bytes: usize) -> Traveller {
        self.traveller(HostMemory::pageable(vec![0xee; bytes]))
    }

    pub(crate) fn takeoff(&self, content: &[u8]) -> Traveller {
        self.traveller(HostMemory::pageable(content.to_vec()))
    }

    /// How many were notified.
    pub(crate) fn len(&self) -> usize {
        self.told.lock().unwrap().len()
    }

    /// All that were notified, in that order, which must be everybody, once.
    pub(crate) fn all(&self) -> Vec<Told> {
        let told = std::mem::take(&mut *self.told.lock().unwrap());
        let mut indices: Vec<_> = told.iter().map(|told| told.index).collect();
        indices.sort_unstable();
        let made = std::mem::take(&mut *self.made.lock().unwrap());
        assert_eq!(indices, (0..made).collect::<Vec<_>>(), "everybody is told once");
        told
    }
}

/// A landing and a takeoff.
pub(crate) struct Traveller {
    index: usize,
    host: HostMemory,
    log: Log,
    last_words: Box<dyn FnOnce() + Send>,
}

impl Traveller {
    fn tell(self, outcome: Result<(), CudaError>) {
        let told = Told { index: self.index, outcome, memory: self.host.memory.clone() };
        self.log.told.lock().unwrap().push(told);
        (self.last_words)();
    }
}

impl Landing for Traveller {
    fn memory(&mut self) -> &mut [u8] {
        &mut self.host.memory
    }

    fn landed(self: Box<Self>, outcome: Result<(), CudaError>) {
        self.tell(outcome);
    }
}

impl Takeoff for Traveller {
    fn memory(&self) -> &[u8] {
        &self.host.memory
    }

    fn taken_off(self: Box<Self>, outcome: Result<(), CudaError>) {
        self.tell(outcome);
    }
}

/// A part of a larger memory of the host, for copies between pieces.
pub(crate) struct PartOf {
    start: *mut u8,
    bytes: usize,
    log: Log,
    index: usize,
}

// SAFETY: the tests give each part to one landing and keep the whole until all are notified.
unsafe impl Send for PartOf {}

impl PartOf {
    pub(crate) fn new(log: &Log, part: &mut [u8]) -> Self {
        let mut made = log.made.lock().unwrap();
        *made += 1;
        let index = *made - 1;
        Self { start: part.as_mut_ptr(), bytes: part.len(), log: log.clone(), index }
    }
}

impl Landing for PartOf {
    fn memory(&mut self) -> &mut [u8] {
        // SAFETY: see the implementation of `Send`.
        unsafe { slice::from_raw_parts_mut(self.start, self.bytes) }
    }

    fn landed(mut self: Box<Self>, outcome: Result<(), CudaError>) {
        let memory = self.memory().to_vec();
        let told = Told { index: self.index, outcome, memory };
        self.log.told.lock().unwrap().push(told);
    }
}

pub(crate) fn copy_down(device: &Device, memory: &Memory, landing: impl Landing + 'static) {
    copy_down_from(device, memory, 0, landing);
}

pub(crate) fn copy_down_from(
    device: &Device,
    memory: &Memory,
    offset: usize,
    landing: impl Landing + 'static,
) {
    let source = memory.address + u64::try_from(offset).unwrap();
    // SAFETY: the tests keep the memory until the landing is notified, or want to see it fail.
    unsafe { device.copy_down(source, Box::new(landing)) }
}

pub(crate) fn copy_down_clone(
    device: &Device,
    clone: &DeviceBuffer,
    landing: impl Landing + 'static,
) {
    // SAFETY: a buffer is freed behind the copies that were begun before.
    unsafe { device.copy_down(clone.address(), Box::new(landing)) }
}

pub(crate) fn copy_up(
    device: &Device,
    takeoff: impl Takeoff + 'static,
    memory: &Memory,
    offset: usize,
) {
    let destination = memory.address + u64::try_from(offset).unwrap();
    // SAFETY: the tests keep the memory until the takeoff is notified, or want to see it fail.
    unsafe { device.copy_up(Box::new(takeoff), destination) }
}

pub(crate) fn clone_part(
    device: &Device,
    memory: &Memory,
    offset: usize,
    bytes: usize,
) -> Result<DeviceBuffer, CudaError> {
    let source = memory.address + u64::try_from(offset).unwrap();
    // SAFETY: the tests keep the memory until the copies down have finished.
    unsafe { device.clone_memory(source, bytes) }
}

pub(crate) fn follow(
    device: &Device,
    direction: Direction,
    stream: &CallerStream,
) -> Result<(), CudaError> {
    // SAFETY: a live stream of the device.
    unsafe { device.follow(direction, stream.handle) }
}

pub(crate) fn precede(
    device: &Device,
    direction: Direction,
    stream: &CallerStream,
) -> Result<(), CudaError> {
    // SAFETY: a live stream of the device.
    unsafe { device.precede(direction, stream.handle) }
}

/// Bytes without a short period, different for each `seed`.
pub(crate) fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut random = Rng::with_seed(seed);
    (0..bytes).map(|_| random.u8(..)).collect()
}

/// Runs `body`, the rest of the test `name`, in a process of its own, where no driver has been
/// looked for yet, with variables set.
pub(crate) fn in_own_process(name: &str, variables: &[(&str, &str)], body: impl FnOnce()) {
    const OWN_PROCESS: &str = "DTR_CUDA_OWN_PROCESS";
    if env::var_os(OWN_PROCESS).is_some() {
        return body();
    }
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(OWN_PROCESS, "1")
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{variables:?}\n{said}");
}

fn index(ordinal: u32) -> c_int {
    c_int::try_from(ordinal).unwrap()
}
