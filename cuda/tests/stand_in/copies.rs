//! Copies whose bytes are compared, batches, and who is notified.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;

use dtr_cuda::{BATCH_BYTES, CudaError, Device, Direction};

use crate::scene::{
    HostMemory, Log, Memory, Scene, clone_part, copy_down, copy_down_clone, copy_down_from,
    copy_up, noise,
};

#[test]
fn every_length_arrives_in_both_directions() {
    let _scene = Scene::new();
    let device = Device::open(0).unwrap();
    for bytes in [0, 1, 2, 3, 63, 64, 65, 4095, 4096, 4097, (1 << 20) + 7] {
        let content = noise(7, bytes);
        let (down, up) = (Log::default(), Log::default());
        let memory = Memory::holding(0, &vec![0x11; bytes]);
        copy_up(&device, up.takeoff(&content), &memory, 0);
        device.finish(Direction::Up).unwrap();
        assert!(memory.content() == content, "{bytes}");
        copy_down(&device, &memory, down.landing(bytes));
        device.finish(Direction::Down).unwrap();
        let landed = down.all().pop().unwrap();
        assert!(landed.outcome == Ok(()) && landed.memory == content, "{bytes}");
        assert_eq!(up.all().pop().unwrap().outcome, Ok(()));
    }
}

#[test]
fn landings_are_told_in_the_order_of_their_copies() {
    let _scene = Scene::new();
    let device = Device::open(1).unwrap();
    let log = Log::default();
    let memory = Memory::holding(1, &noise(1, 1000));
    for index in 0..1000 {
        copy_down_from(&device, &memory, index, log.landing(1));
        if index % 7 == 0 {
            device.flush(Direction::Down).unwrap();
        }
    }
    device.finish(Direction::Down).unwrap();
    assert_eq!(device.pending(Direction::Down), 0);
    let content = memory.content();
    for (index, told) in log.all().into_iter().enumerate() {
        assert_eq!((told.index, told.outcome), (index, Ok(())));
        assert_eq!(told.memory, [content[index]]);
    }
}

#[test]
fn many_small_copies_share_one_event() {
    let scene = Scene::new();
    let device = Device::open(0).unwrap();
    let log = Log::default();
    let memory = Memory::holding(0, &noise(2, 64));
    for _ in 0..10_000 {
        copy_down(&device, &memory, log.landing(64));
    }
    device.finish(Direction::Down).unwrap();
    assert_eq!((scene.calls(c"cuMemcpyDtoHAsync_v2"), scene.calls(c"cuEventRecord")), (10_000, 1));
    assert_eq!(log.all().len(), 10_000);
}

#[test]
fn a_full_batch_lands_without_being_asked() {
    let scene = Scene::new();
    let device = Device::open(0).unwrap();
    let (log, (landed, has_landed)) = (Log::default(), channel());
    let quarter = BATCH_BYTES / 4;
    let memory = Memory::holding(0, &noise(3, quarter));
    for _ in 0..5 {
        let landed = landed.clone();
        let host = HostMemory::pageable(vec![0; quarter]);
        let say = move || landed.send(()).unwrap();
        copy_down(&device, &memory, log.with_last_words(host, say));
    }
    // Nobody flushes: four of them fill a batch.
    for _ in 0..4 {
        has_landed.recv().unwrap();
    }
    scene.settle();
    assert_eq!((scene.calls(c"cuEventRecord"), log.len()), (1, 4));
    device.finish(Direction::Down).unwrap();
    assert_eq!(log.all().len(), 5);
}

#[test]
fn a_clone_keeps_what_was_there_and_is_freed_behind_its_copies() {
    let scene = Scene::new();
    let device = Device::open(0).unwrap();
    let (log, content) = (Log::default(), noise(4, 5000));
    let memory = Memory::holding(0, &content);
    scene.hold_copies(true);
    let clone = clone_part(&device, &memory, 1000, 3001).unwrap();
    assert_eq!(clone.bytes(), 3001);
    copy_down_clone(&device, &clone, log.landing(3001));
    drop(clone);
    scene.settle();
    assert_eq!(scene.count().bytes_allocated, 8001);
    scene.hold_copies(false);
    device.finish(Direction::Down).unwrap();
    scene.settle();
    assert_eq!(scene.count().bytes_allocated, 5000);
    let landed = log.all().pop().unwrap();
    assert!(landed.outcome == Ok(()) && landed.memory == content[1000..4001]);
    assert_eq!(clone_part(&device, &memory, 0, 0).unwrap().bytes(), 0);
}

#[test]
fn a_clone_that_does_not_fit_is_refused() {
    let _scene = Scene::new();
    let device = Device::open(0).unwrap();
    let memory = Memory::holding(0, &[0; 100]);
    let error = clone_part(&device, &memory, 0, 1 << 40).expect_err("the device is smaller");
    assert!(matches!(error, CudaError::OutOfMemory { .. }), "{error}");
    device.check().unwrap();
}

#[test]
fn a_device_that_is_dropped_lands_what_is_pending() {
    let scene = Scene::new();
    let (log, content) = (Log::default(), noise(5, 100));
    let memory = Memory::holding(0, &content);
    let device = Device::open(0).unwrap();
    scene.hold_copies(true);
    for _ in 0..10 {
        copy_down(&device, &memory, log.landing(100));
    }
    let dropper = thread::spawn(move || drop(device));
    scene.settle();
    assert_eq!(log.len(), 0, "nothing has been copied yet");
    assert!(!dropper.is_finished(), "a drop waits for what is pending");
    scene.hold_copies(false);
    dropper.join().unwrap();
    assert!(log.all().into_iter().all(|told| told.outcome == Ok(()) && told.memory == content));
}

#[test]
fn a_landing_may_drop_the_device() {
    let scene = Scene::new();
    let log = Log::default();
    let memory = Memory::holding(0, &noise(6, 100));
    let device = Device::open(0).unwrap();
    let last = Arc::clone(&device);
    let ((go, may_go), (dropped, was_dropped)) = (channel(), channel());
    let host = HostMemory::pageable(vec![0; 100]);
    let landing = log.with_last_words(host, move || {
        may_go.recv().unwrap();
        drop(last);
        // Not reached if the drop panicked, which would go no further than the landing.
        dropped.send(()).unwrap();
    });
    copy_down(&device, &memory, landing);
    device.flush(Direction::Down).unwrap();
    copy_down(&device, &memory, log.landing(100));
    drop(device);
    go.send(()).unwrap();
    was_dropped.recv().unwrap();
    // The thread goes on alone, and takes streams and context with it when it ends.
    while scene.count().live_streams + scene.count().contexts_retained > 0 {
        thread::yield_now();
    }
    let content = memory.content();
    assert!(log.all().into_iter().all(|told| told.outcome == Ok(()) && told.memory == content));
}

#[test]
fn a_landing_that_waits_for_itself_is_refused() {
    let _scene = Scene::new();
    let device = Device::open(0).unwrap();
    let (log, (answer, answered)) = (Log::default(), channel());
    let memory = Memory::holding(0, &[1, 2, 3]);
    let again = Arc::clone(&device);
    let landing = log.with_last_words(HostMemory::pageable(vec![0; 3]), move || {
        let other = again.finish(Direction::Up);
        answer.send((again.finish(Direction::Down), other)).unwrap();
    });
    copy_down(&device, &memory, landing);
    device.finish(Direction::Down).unwrap();
    let (own, other) = answered.recv().unwrap();
    assert!(matches!(own, Err(CudaError::InvalidArgument { .. })), "{own:?}");
    assert_eq!(other, Ok(()));
}

#[test]
fn a_landing_that_panics_takes_nobody_with_it() {
    let _scene = Scene::new();
    let device = Device::open(0).unwrap();
    let log = Log::default();
    let memory = Memory::holding(0, &[1, 2, 3]);
    let host = HostMemory::pageable(vec![0; 3]);
    // Without the message that a panic leaves in the output.
    let panics = || std::panic::resume_unwind(Box::new("a landing that panics"));
    copy_down(&device, &memory, log.with_last_words(host, panics));
    copy_down(&device, &memory, log.landing(3));
    device.finish(Direction::Down).unwrap();
    copy_down(&device, &memory, log.landing(3));
    device.finish(Direction::Down).unwrap();
    assert!(log.all().into_iter().all(|told| told.memory == [1, 2, 3]));
}
