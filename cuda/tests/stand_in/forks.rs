//! A process that was forked off: its calls fail, its drops do nothing, and the driver, which does
//! not survive a fork, is not touched.

use std::ffi::CStr;
use std::mem;
use std::thread;

use dtr_cuda::{CudaError, Device, Direction, probe, shared_device};

use crate::library::in_forked_child;
use crate::scene::{
    CallerStream, HostMemory, Log, Memory, Scene, clone_part, copy_down, copy_up, follow,
    in_own_process, pin, precede,
};

fn is_forked<T>(result: &Result<T, CudaError>) -> bool {
    matches!(result, Err(CudaError::Forked { .. }))
}

#[test]
fn a_child_is_refused_and_the_parent_goes_on() {
    let scene = Scene::new();
    let device = Device::open(0).unwrap();
    let log = Log::default();
    let (memory, stream) = (Memory::holding(0, &[7; 10]), CallerStream::new(0));
    let mut clone = clone_part(&device, &memory, 0, 10).ok();
    let mut pinned = HostMemory::pinned(&device, vec![0; 10]).ok();
    assert!(clone.is_some() && pinned.is_some());
    // The last that is left of a device, and so of its context.
    let other = Device::open(1).unwrap();
    let mut orphan = HostMemory::pinned(&other, vec![0; 10]).ok();
    assert!(orphan.is_some());
    drop(other);
    // A copy that is pending, with an open batch, when the child is made.
    scene.hold_copies(true);
    copy_down(&device, &memory, log.landing(10));
    scene.settle();
    let (mut last_reference, child_log) = (Some(device), Log::default());
    let mut landing_memory = vec![0; 10];
    let is_good = in_forked_child(|| {
        let calls = scene.all_calls();
        let owned = last_reference.take().unwrap();
        let device = owned.as_ref();
        copy_down(device, &memory, child_log.landing(10));
        copy_up(device, child_log.takeoff(&[1; 10]), &memory, 0);
        let told = child_log.all();
        let is_refused = told.len() == 2
            && told.into_iter().all(|told| is_forked(&told.outcome))
            && [Direction::Down, Direction::Up].into_iter().all(|direction| {
                is_forked(&device.flush(direction))
                    && is_forked(&device.finish(direction))
                    && is_forked(&follow(device, direction, &stream))
                    && is_forked(&precede(device, direction, &stream))
                    && device.pending(direction) == 0
            })
            && is_forked(&clone_part(device, &memory, 0, 10))
            && is_forked(&device.memory_info())
            && is_forked(&pin(device, landing_memory.as_mut_ptr(), 10))
            && is_forked(&Device::open(0))
            && is_forked(&probe());
        // What the parent would free, the child forgets.
        drop((clone.take(), pinned.take(), orphan.take(), owned));
        is_refused && scene.all_calls() == calls
    });
    scene.hold_copies(false);
    assert!(is_good, "see what the child has printed");
    let device = last_reference.unwrap();
    device.finish(Direction::Down).unwrap();
    let landed = log.all().pop().unwrap();
    assert_eq!((landed.outcome, landed.memory), (Ok(()), vec![7; 10]));
}

#[test]
fn a_child_of_a_process_that_is_looking_for_the_driver_does_not_wait_for_it() {
    in_own_process(
        "forks::a_child_of_a_process_that_is_looking_for_the_driver_does_not_wait_for_it",
        &[],
        || is_refused_while_another_thread_is_in(c"cuInit"),
    );
}

#[test]
fn a_child_of_a_process_that_is_opening_a_device_does_not_wait_for_it() {
    in_own_process(
        "forks::a_child_of_a_process_that_is_opening_a_device_does_not_wait_for_it",
        &[],
        || is_refused_while_another_thread_is_in(c"cuDevicePrimaryCtxRetain"),
    );
}

fn is_refused_while_another_thread_is_in(call: &'static CStr) {
    let scene = Scene::new();
    let mut opening = None;
    scene.hold_until_called(call, || opening = Some(thread::spawn(|| shared_device(1).map(drop))));
    let is_refused = in_forked_child(|| {
        let error = shared_device(0).expect_err("a child has no driver").to_string();
        error.contains("opening `cuda:0`") && error.contains("does not survive a fork")
    });
    scene.let_calls_go();
    opening.unwrap().join().unwrap().unwrap();
    assert!(is_refused, "see what the child has printed, or whether it was ended for waiting");
    // What is shared stays open until the process ends.
    mem::forget(scene);
}
