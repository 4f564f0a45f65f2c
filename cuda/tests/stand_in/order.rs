//! Order between the caller's stream and copies: what a copy sees, and what it must not see.
//!
//! Always holds: each promise is checked by a function that is also run without the call that makes
//! it, and must then see it broken. So the checks can fail.

use dtr_cuda::{Device, Direction};

use crate::scene::{
    CallerStream, Log, Memory, Scene, clone_part, copy_down, copy_down_clone, copy_up, follow,
    precede,
};

const OLD: [u8; 100] = [1; 100];
const NEW: [u8; 100] = [2; 100];

/// What a save sees of a write that the caller's stream was given before, and has not begun yet.
fn seen_of_a_write_before(scene: &Scene, stream: &CallerStream, follows: bool) -> Vec<u8> {
    let device = Device::open(0).unwrap();
    let (log, memory) = (Log::default(), Memory::holding(0, &OLD));
    stream.hold(true);
    stream.write(&memory, 0, &NEW);
    if follows {
        follow(&device, Direction::Down, stream).unwrap();
    }
    copy_down(&device, &memory, log.landing(100));
    device.flush(Direction::Down).unwrap();
    scene.settle();
    stream.hold(false);
    device.finish(Direction::Down).unwrap();
    scene.settle();
    log.all().pop().unwrap().memory
}

/// What a save sees of a write that the caller's stream is given afterwards, while the copy has not
/// begun yet; and the result in the end.
fn seen_of_a_write_after(
    scene: &Scene,
    stream: &CallerStream,
    precedes: bool,
) -> (Vec<u8>, Vec<u8>) {
    let device = Device::open(0).unwrap();
    let (log, memory) = (Log::default(), Memory::holding(0, &OLD));
    scene.hold_copies(true);
    copy_down(&device, &memory, log.landing(100));
    if precedes {
        precede(&device, Direction::Down, stream).unwrap();
    }
    stream.write(&memory, 0, &NEW);
    scene.settle();
    scene.hold_copies(false);
    device.finish(Direction::Down).unwrap();
    scene.settle();
    (log.all().pop().unwrap().memory, memory.content())
}

/// What the caller's stream overwrites of a restore's copy up that has not begun yet.
fn left_of_a_write_behind_a_restore(
    scene: &Scene,
    stream: &CallerStream,
    precedes: bool,
) -> Vec<u8> {
    let device = Device::open(0).unwrap();
    let (log, memory) = (Log::default(), Memory::holding(0, &OLD));
    scene.hold_copies(true);
    copy_up(&device, log.takeoff(&OLD), &memory, 0);
    if precedes {
        precede(&device, Direction::Up, stream).unwrap();
    }
    stream.write(&memory, 0, &NEW);
    scene.settle();
    scene.hold_copies(false);
    device.finish(Direction::Up).unwrap();
    scene.settle();
    assert_eq!(log.all().len(), 1);
    memory.content()
}

/// What a clone keeps of a write that the caller's stream is given after it.
fn kept_by_a_clone(scene: &Scene, stream: &CallerStream, precedes: bool) -> Vec<u8> {
    let device = Device::open(0).unwrap();
    let (log, memory) = (Log::default(), Memory::holding(0, &OLD));
    scene.hold_copies(true);
    let clone = clone_part(&device, &memory, 0, 100).unwrap();
    if precedes {
        precede(&device, Direction::Down, stream).unwrap();
    }
    stream.write(&memory, 0, &NEW);
    copy_down_clone(&device, &clone, log.landing(100));
    scene.settle();
    scene.hold_copies(false);
    device.finish(Direction::Down).unwrap();
    scene.settle();
    log.all().pop().unwrap().memory
}

/// Both a stream of the caller's own and the legacy default stream.
fn for_both_streams(check: impl Fn(&Scene, &CallerStream)) {
    let scene = Scene::new();
    check(&scene, &CallerStream::new(0));
    check(&scene, &CallerStream::legacy(0));
}

#[test]
fn a_copy_that_follows_sees_what_was_written_before() {
    for_both_streams(|scene, stream| {
        assert_eq!(seen_of_a_write_before(scene, stream, true), NEW);
        assert_eq!(seen_of_a_write_before(scene, stream, false), OLD, "the check cannot fail");
    });
}

#[test]
fn a_copy_that_precedes_does_not_see_what_is_written_after() {
    for_both_streams(|scene, stream| {
        assert_eq!(seen_of_a_write_after(scene, stream, true), (OLD.to_vec(), NEW.to_vec()));
        let (seen, _) = seen_of_a_write_after(scene, stream, false);
        assert_eq!(seen, NEW, "the check cannot fail");
    });
}

#[test]
fn a_restore_that_precedes_is_overwritten_by_what_comes_after() {
    for_both_streams(|scene, stream| {
        assert_eq!(left_of_a_write_behind_a_restore(scene, stream, true), NEW);
        assert_eq!(
            left_of_a_write_behind_a_restore(scene, stream, false),
            OLD,
            "the check cannot fail"
        );
    });
}

#[test]
fn a_clone_that_precedes_keeps_what_was_there() {
    for_both_streams(|scene, stream| {
        assert_eq!(kept_by_a_clone(scene, stream, true), OLD);
        assert_eq!(kept_by_a_clone(scene, stream, false), NEW, "the check cannot fail");
    });
}

#[test]
fn nothing_waits_for_copies_that_are_over() {
    let scene = Scene::new();
    let device = Device::open(0).unwrap();
    let (log, memory, stream) = (Log::default(), Memory::holding(0, &OLD), CallerStream::new(0));
    precede(&device, Direction::Down, &stream).unwrap();
    copy_down(&device, &memory, log.landing(100));
    device.finish(Direction::Down).unwrap();
    precede(&device, Direction::Down, &stream).unwrap();
    assert_eq!(scene.calls(c"cuStreamWaitEvent"), 0);
}
