//! Pinned memory: whole, in pieces, refused.

use dtr_cuda::{CudaError, Device, Direction};

use crate::scene::{HostMemory, Log, Memory, PartOf, Scene, copy_down, copy_up, noise, pin};

const PIECE_BYTES: usize = 4096;

#[test]
fn pinned_memory_is_copied_without_a_detour() {
    let scene = Scene::new();
    let device = Device::open(0).unwrap();
    let (log, content) = (Log::default(), noise(1, 1000));
    let memory = Memory::holding(0, &vec![0; 1000]);
    let takeoff = HostMemory::pinned(&device, content.clone()).unwrap();
    copy_up(&device, log.traveller(takeoff), &memory, 0);
    device.finish(Direction::Up).unwrap();
    let landing = HostMemory::pinned(&device, vec![0; 1000]).unwrap();
    copy_down(&device, &memory, log.traveller(landing));
    device.finish(Direction::Down).unwrap();
    assert_eq!(scene.count().pageable_copies, 0);
    assert!(log.all().into_iter().all(|told| told.outcome == Ok(()) && told.memory == content));
    copy_down(&device, &memory, log.landing(1000));
    device.finish(Direction::Down).unwrap();
    assert_eq!(scene.count().pageable_copies, 1, "the stand-in would have counted");
}

#[test]
fn memory_is_pinned_for_every_device() {
    let scene = Scene::new();
    let (first, second) = (Device::open(0).unwrap(), Device::open(1).unwrap());
    let (log, memory) = (Log::default(), Memory::holding(1, &noise(2, 100)));
    let pinned = HostMemory::pinned(&first, vec![0; 100]).unwrap();
    copy_down(&second, &memory, log.traveller(pinned));
    second.finish(Direction::Down).unwrap();
    assert_eq!(scene.count().pageable_copies, 0);
    assert!(log.all().pop().unwrap().memory == memory.content());
}

#[test]
fn an_arena_is_pinned_piece_by_piece_and_a_copy_stays_within_one() {
    let scene = Scene::new();
    let device = Device::open(0).unwrap();
    let mut arena = vec![0_u8; 4 * PIECE_BYTES];
    let pieces: Vec<_> = arena
        .chunks_mut(PIECE_BYTES)
        .map(|piece| pin(&device, piece.as_mut_ptr(), piece.len()).unwrap())
        .collect();
    assert_eq!(scene.count().bytes_registered, 4 * 4096);
    let (log, content) = (Log::default(), noise(3, PIECE_BYTES));
    let memory = Memory::holding(0, &content);
    for piece in arena.chunks_mut(PIECE_BYTES) {
        copy_down(&device, &memory, PartOf::new(&log, piece));
    }
    device.finish(Direction::Down).unwrap();
    assert!(log.all().into_iter().all(|told| told.outcome == Ok(()) && told.memory == content));
    let crossing = &mut arena[PIECE_BYTES / 2..][..PIECE_BYTES];
    copy_down(&device, &memory, PartOf::new(&log, crossing));
    device.finish(Direction::Down).unwrap();
    let told = log.all().pop().unwrap();
    assert!(matches!(&told.outcome, Err(CudaError::Call { refusal }) if refusal.code == 1));
    assert_eq!(scene.count().pageable_copies, 0);
    drop(pieces);
}

#[test]
fn memory_is_pinned_once() {
    let _scene = Scene::new();
    let device = Device::open(0).unwrap();
    let mut memory = vec![0_u8; 100];
    let pinned = pin(&device, memory.as_mut_ptr(), 100).unwrap();
    assert_eq!(pinned.bytes(), 100);
    let error = pin(&device, memory[50..].as_mut_ptr(), 50).expect_err("it is pinned already");
    assert!(matches!(error, CudaError::AlreadyPinned { bytes: 50, .. }), "{error}");
    drop(pinned);
    drop(pin(&device, memory[50..].as_mut_ptr(), 50).unwrap());
    let error = pin(&device, memory.as_mut_ptr(), 0).expect_err("no bytes");
    assert!(matches!(error, CudaError::InvalidArgument { .. }), "{error}");
}

#[test]
fn a_refusal_to_pin_leaves_memory_as_it_was() {
    let scene = Scene::new();
    let device = Device::open(0).unwrap();
    let mut memory = vec![0_u8; 100];
    scene.fail(c"cuMemHostRegister_v2", 1, 2);
    let error = pin(&device, memory.as_mut_ptr(), 100).expect_err("refused");
    let CudaError::OutOfPinnedMemory { bytes, refusal } = &error else {
        panic!("{error}");
    };
    assert_eq!((*bytes, refusal.call, refusal.code), (100, "cuMemHostRegister_v2", 2));
    assert_eq!(refusal.name, "CUDA_ERROR_OUT_OF_MEMORY");
    device.check().unwrap();
    drop(pin(&device, memory.as_mut_ptr(), 100).unwrap());
}
