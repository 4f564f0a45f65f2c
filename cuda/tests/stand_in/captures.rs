//! While a CUDA graph is being captured: nothing of ours gets into it, and nothing of ours stops.

use dtr_cuda::{CudaError, Device, Direction};

use crate::scene::{CallerStream, HostMemory, Log, Memory, Scene, copy_down, follow, precede};

#[test]
fn a_stream_that_is_captured_is_refused() {
    let scene = Scene::new();
    let device = Device::open(0).unwrap();
    let (log, memory) = (Log::default(), Memory::holding(0, &[5; 10]));
    let (captured, legacy) = (CallerStream::new(0), CallerStream::legacy(0));
    scene.hold_copies(true);
    copy_down(&device, &memory, log.landing(10));
    captured.capture(true);
    for direction in [Direction::Down, Direction::Up] {
        // The legacy stream would wait for the captured one, and cannot even be asked.
        for stream in [&captured, &legacy] {
            assert_eq!(follow(&device, direction, stream), Err(CudaError::StreamCaptured));
            assert_eq!(precede(&device, direction, stream), Err(CudaError::StreamCaptured));
        }
    }
    assert_eq!(scene.calls(c"cuStreamWaitEvent"), 0);
    captured.capture(false);
    follow(&device, Direction::Down, &captured).unwrap();
    scene.hold_copies(false);
    device.finish(Direction::Down).unwrap();
}

#[test]
fn copies_land_while_another_stream_is_captured() {
    let scene = Scene::new();
    let device = Device::open(0).unwrap();
    let (log, memory) = (Log::default(), Memory::holding(0, &[5; 10]));
    let (captured, own) = (CallerStream::new(0), CallerStream::new(0));
    captured.capture(true);
    follow(&device, Direction::Down, &own).unwrap();
    let pinned = HostMemory::pinned(&device, vec![0; 10]).unwrap();
    copy_down(&device, &memory, log.traveller(pinned));
    device.finish(Direction::Down).unwrap();
    let landed = log.all().pop().unwrap();
    assert_eq!((landed.outcome, landed.memory), (Ok(()), vec![5; 10]));
    assert_eq!(scene.capture_mode(), 0, "the thread's mode is as it was");
}
