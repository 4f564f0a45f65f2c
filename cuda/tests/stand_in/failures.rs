//! Every call of the driver fails once, at every place; and devices are lost.
//!
//! Always holds, and is checked each time: everybody who is to be notified is notified once; a
//! receiver that is notified of success has the right bytes; nothing hangs; nothing is left behind.

use std::ffi::CStr;

use dtr_cuda::{CudaError, Device, Direction};

use crate::scene::{
    CallerStream, HostMemory, Log, Memory, Scene, clone_part, copy_down, copy_down_clone, copy_up,
    follow, noise, pin, precede,
};

/// Every call that can fail after a driver was found.
const CALLS: &[&CStr] = &[
    c"cuDeviceGet",
    c"cuDevicePrimaryCtxRetain",
    c"cuDevicePrimaryCtxRelease_v2",
    c"cuCtxPushCurrent_v2",
    c"cuCtxPopCurrent_v2",
    c"cuThreadExchangeStreamCaptureMode",
    c"cuStreamCreate",
    c"cuStreamDestroy_v2",
    c"cuStreamWaitEvent",
    c"cuStreamIsCapturing",
    c"cuEventCreate",
    c"cuEventDestroy_v2",
    c"cuEventRecord",
    c"cuEventSynchronize",
    c"cuMemcpyDtoHAsync_v2",
    c"cuMemcpyHtoDAsync_v2",
    c"cuMemcpyDtoDAsync_v2",
    c"cuMemAllocAsync",
    c"cuMemFreeAsync",
    c"cuMemGetInfo_v2",
    c"cuMemHostRegister_v2",
    c"cuMemHostUnregister",
];

const INVALID_VALUE: u32 = 1;
const OUT_OF_MEMORY: u32 = 2;
const ILLEGAL_ADDRESS: u32 = 700;
const UNKNOWN: u32 = 999;

/// A save with a clone, then a restore: every call of the crate. What is reported is in the logs.
fn save_and_restore(
    (down, up): (&Log, &Log),
    memory: &Memory,
    stream: &CallerStream,
    content: &[u8],
) -> Result<(), CudaError> {
    let device = Device::open(0)?;
    device.memory_info()?;
    follow(&device, Direction::Down, stream)?;
    let pinned = HostMemory::pinned(&device, vec![0; content.len()])?;
    copy_down(&device, memory, down.traveller(pinned));
    device.flush(Direction::Down)?;
    copy_down(&device, memory, down.landing(content.len()));
    let clone = clone_part(&device, memory, 0, content.len())?;
    precede(&device, Direction::Down, stream)?;
    copy_down_clone(&device, &clone, down.landing(content.len()));
    drop(clone);
    device.finish(Direction::Down)?;
    follow(&device, Direction::Up, stream)?;
    copy_up(&device, up.takeoff(content), memory, 0);
    precede(&device, Direction::Up, stream)?;
    device.finish(Direction::Up)
}

/// Runs it with the `nth` call of `call` failing; returns whether there was such a call.
fn fails_once(call: &'static CStr, nth: u64, code: u32) -> bool {
    let mut scene = Scene::new();
    let content = noise(nth, 1000);
    let (down, up) = (Log::default(), Log::default());
    let (memory, stream) = (Memory::holding(0, &content), CallerStream::new(0));
    scene.fail(call, nth, code);
    let outcome = save_and_restore((&down, &up), &memory, &stream, &content);
    scene.settle();
    let has_failed = scene.count().failures == 1;
    let place = format!("{call:?}, call {nth}, code {code}: {outcome:?}");
    for told in down.all() {
        let is_right = told.outcome.is_err() || told.memory == content;
        assert!(is_right, "told that wrong bytes are good: {place}");
    }
    up.all();
    assert!(memory.content() == content, "{place}");
    assert!(has_failed || outcome == Ok(()), "{place}");
    if [c"cuCtxPushCurrent_v2", c"cuThreadExchangeStreamCaptureMode"].contains(&call) {
        // Where a context cannot be made current, nothing in it can be freed.
        scene.may_leave_memory();
    }
    has_failed
}

#[test]
fn every_call_may_fail_at_every_place() {
    for call in CALLS {
        for code in [INVALID_VALUE, OUT_OF_MEMORY, ILLEGAL_ADDRESS, UNKNOWN, 12_345] {
            let mut nth = 1;
            while fails_once(call, nth, code) {
                nth += 1;
            }
            assert!(nth > 1, "{call:?} is never called");
        }
    }
}

/// What three landings are notified of when a call fails while they are copied.
fn told_when_failing(call: &'static CStr, nth: u64) -> Vec<Result<(), CudaError>> {
    let scene = Scene::new();
    let (log, memory) = (Log::default(), Memory::holding(0, &[3; 10]));
    let device = Device::open(0).unwrap();
    scene.fail(call, nth, INVALID_VALUE);
    for _ in 0..3 {
        copy_down(&device, &memory, log.landing(10));
    }
    device.finish(Direction::Down).unwrap();
    let outcomes = log.all().into_iter().map(|told| told.outcome).collect();
    // It was one failure, and not the device's: what comes later is good.
    copy_down(&device, &memory, log.landing(10));
    device.finish(Direction::Down).unwrap();
    let later = log.all().pop().unwrap();
    assert_eq!((later.outcome, later.memory), (Ok(()), vec![3; 10]));
    outcomes
}

#[test]
fn a_copy_is_good_only_if_its_call_and_its_event_were() {
    let is_good =
        |call, nth| told_when_failing(call, nth).iter().map(Result::is_ok).collect::<Vec<_>>();
    assert_eq!(is_good(c"cuMemcpyDtoHAsync_v2", 2), [true, false, true]);
    for call in [c"cuEventCreate", c"cuEventRecord", c"cuEventSynchronize"] {
        assert_eq!(is_good(call, 1), [false; 3], "{call:?}");
    }
    assert_eq!(is_good(c"cuStreamSynchronize", 1), [true; 3], "it is not called");
}

#[test]
fn memory_comes_back_only_when_the_device_is_done_with_it() {
    let scene = Scene::new();
    let (log, memory) = (Log::default(), Memory::holding(0, &[3; 10]));
    let device = Device::open(0).unwrap();
    scene.hold_copies(true);
    copy_down(&device, &memory, log.landing(10));
    scene.fail(c"cuEventRecord", 1, INVALID_VALUE);
    device.flush(Direction::Down).unwrap();
    scene.settle();
    assert_eq!(log.len(), 0, "the copy is under way, whatever became of its event");
    scene.hold_copies(false);
    device.finish(Direction::Down).unwrap();
    assert!(matches!(log.all()[..], [ref told] if told.outcome.is_err()));
}

#[test]
fn a_stream_is_asked_again_before_memory_comes_back() {
    let scene = Scene::new();
    let (log, memory) = (Log::default(), Memory::holding(0, &[3; 10]));
    let device = Device::open(0).unwrap();
    scene.hold_copies(true);
    copy_down(&device, &memory, log.landing(10));
    scene.fail(c"cuEventSynchronize", 1, INVALID_VALUE);
    scene.fail_repeatedly(c"cuStreamSynchronize", 2, INVALID_VALUE);
    device.flush(Direction::Down).unwrap();
    scene.settle();
    assert_eq!(log.len(), 0, "the copy is under way, whatever became of its event");
    scene.hold_copies(false);
    device.finish(Direction::Down).unwrap();
    assert!(log.all().pop().unwrap().outcome.is_err());
    assert_eq!(scene.calls(c"cuStreamSynchronize"), 3);
}

#[test]
fn a_device_of_which_nothing_can_be_known_is_lost() {
    let scene = Scene::new();
    let (log, memory) = (Log::default(), Memory::holding(0, &[3; 10]));
    let device = Device::open(0).unwrap();
    copy_down(&device, &memory, log.landing(10));
    // The test may use the memory again: it knows that the copy is over.
    scene.settle();
    scene.fail(c"cuEventSynchronize", 1, INVALID_VALUE);
    scene.fail_repeatedly(c"cuStreamSynchronize", 3, INVALID_VALUE);
    let error = device.finish(Direction::Down).expect_err("neither event nor stream can tell");
    assert!(error.is_device_lost(), "{error}");
    assert!(log.all().pop().unwrap().outcome.is_err());
    assert_eq!(device.check(), Err(error));
}

#[test]
fn memory_that_is_refused_without_a_reason_is_no_loss_where_the_device_answers() {
    let scene = Scene::new();
    let (log, memory) = (Log::default(), Memory::holding(0, &[3; 10]));
    let device = Device::open(0).unwrap();
    let mut host = vec![0_u8; 10];
    scene.fail(c"cuMemHostRegister_v2", 1, UNKNOWN);
    let error = pin(&device, host.as_mut_ptr(), 10).expect_err("refused");
    let refusal = match &error {
        CudaError::OutOfPinnedMemory { bytes: 10, refusal } => refusal,
        other => panic!("{other}"),
    };
    assert_eq!((refusal.call, refusal.code), ("cuMemHostRegister_v2", UNKNOWN));
    scene.fail(c"cuMemAllocAsync", 1, UNKNOWN);
    let error = clone_part(&device, &memory, 0, 10).expect_err("refused");
    assert!(matches!(&error, CudaError::OutOfMemory { refusal } if refusal.code == UNKNOWN));
    device.check().unwrap();
    copy_down(&device, &memory, log.landing(10));
    device.finish(Direction::Down).unwrap();
    assert_eq!(log.all().pop().unwrap().memory, [3; 10]);
}

#[test]
fn memory_that_is_refused_without_a_reason_is_a_loss_where_the_device_does_not_answer() {
    let scene = Scene::new();
    let device = Device::open(0).unwrap();
    let mut host = vec![0_u8; 10];
    scene.fail(c"cuMemHostRegister_v2", 1, UNKNOWN);
    scene.fail(c"cuStreamSynchronize", 1, UNKNOWN);
    let error = pin(&device, host.as_mut_ptr(), 10).expect_err("refused");
    assert!(error.is_device_lost(), "{error}");
    assert!(device.check().expect_err("it is lost").is_device_lost());
}

#[test]
fn a_loss_in_the_middle_is_told_to_everybody() {
    let scene = Scene::new();
    let (down, up) = (Log::default(), Log::default());
    let (lost, other) = (Device::open(0).unwrap(), Device::open(1).unwrap());
    let (memory, elsewhere) = (Memory::holding(0, &[3; 10]), Memory::holding(1, &[4; 10]));
    scene.hold_copies(true);
    for index in 0..10 {
        copy_down(&lost, &memory, down.landing(10));
        copy_up(&lost, up.takeoff(&[5; 10]), &memory, 0);
        if index % 3 == 0 {
            lost.flush(Direction::Down).unwrap();
        }
    }
    let clone = clone_part(&lost, &memory, 0, 10).unwrap();
    scene.lose(0, ILLEGAL_ADDRESS);
    for direction in [Direction::Down, Direction::Up] {
        let error = lost.finish(direction).expect_err("the device is lost");
        assert!(error.is_device_lost(), "{error}");
    }
    let told: Vec<_> = down.all().into_iter().chain(up.all()).collect();
    assert_eq!(told.len(), 20);
    assert!(told.iter().all(|told| told.outcome.as_ref().is_err_and(CudaError::is_device_lost)));
    assert_eq!(scene.count().copies_run, 0);
    // Later calls are told the same, and those of another device work.
    copy_down(&lost, &memory, down.landing(10));
    assert!(lost.finish(Direction::Down).is_err());
    assert!(down.all().pop().unwrap().outcome.is_err());
    assert!(follow(&lost, Direction::Down, &CallerStream::new(0)).is_err());
    assert!(lost.memory_info().is_err());
    drop(clone);
    scene.hold_copies(false);
    copy_down(&other, &elsewhere, down.landing(10));
    other.finish(Direction::Down).unwrap();
    assert_eq!(down.all().pop().unwrap().memory, [4; 10]);
}

#[test]
fn a_loss_that_another_call_reports_spoils_what_is_pending() {
    let scene = Scene::new();
    let (log, memory) = (Log::default(), Memory::holding(0, &[3; 10]));
    let device = Device::open(0).unwrap();
    scene.hold_copies(true);
    copy_down(&device, &memory, log.landing(10));
    device.flush(Direction::Down).unwrap();
    scene.fail(c"cuMemGetInfo_v2", 1, ILLEGAL_ADDRESS);
    let loss = device.memory_info().expect_err("the device is lost");
    assert!(loss.is_device_lost(), "{loss}");
    // The event passes without an error, but nobody can rely on what was copied.
    scene.hold_copies(false);
    assert_eq!(device.finish(Direction::Down), Err(loss.clone()));
    assert_eq!(log.all().pop().unwrap().outcome, Err(loss));
}

#[test]
fn a_copy_from_memory_that_is_gone_loses_the_device() {
    let scene = Scene::new();
    let log = Log::default();
    let device = Device::open(0).unwrap();
    let memory = Memory::holding(0, &[3; 10]);
    scene.hold_copies(true);
    copy_down(&device, &memory, log.landing(10));
    device.flush(Direction::Down).unwrap();
    drop(memory);
    scene.hold_copies(false);
    let error = device.finish(Direction::Down).expect_err("the memory was freed");
    let CudaError::DeviceLost { ordinal: 0, refusal } = &error else {
        panic!("{error}");
    };
    assert_eq!((refusal.code, &*refusal.name), (700, "CUDA_ERROR_ILLEGAL_ADDRESS"));
    assert_eq!(log.all().pop().unwrap().outcome, Err(error));
}
