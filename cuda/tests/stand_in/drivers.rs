//! Drivers that serve, and drivers that do not, each in a process of its own.

use dtr_cuda::{CudaError, Device, Driver, MemoryInfo, probe};

use crate::library::{StandIn, WITHOUT};
use crate::scene::{Scene, in_own_process};

#[test]
fn a_driver_is_found_and_its_devices_are_counted() {
    let _scene = Scene::new();
    assert_eq!(probe(), Ok(Driver { version: 12_040, devices: 2 }));
    let expected = CudaError::NoSuchDevice { ordinal: 2, devices: 2 };
    assert_eq!(Device::open(2).expect_err("there are two"), expected);
    assert_eq!(Device::open(u32::MAX).expect_err("there are two").to_string().lines().count(), 2);
}

#[test]
fn a_device_says_how_much_memory_it_has() {
    let _scene = Scene::new();
    let device = Device::open(1).unwrap();
    assert_eq!(device.ordinal(), 1);
    let expected = MemoryInfo { free_bytes: 1 << 30, total_bytes: 1 << 30 };
    assert_eq!(device.memory_info(), Ok(expected));
}

#[test]
fn an_old_driver_is_told_apart_by_its_version() {
    in_own_process("drivers::an_old_driver_is_told_apart_by_its_version", &[], || {
        StandIn::get().set_up(11_010, 2);
        let expected = CudaError::DriverTooOld {
            found: "a driver for CUDA 11.1".to_owned(),
            needed: "one for CUDA 11.2 or newer".to_owned(),
        };
        assert_eq!(probe(), Err(expected.clone()));
        assert_eq!(Device::open(0).expect_err("too old"), expected);
    });
}

#[test]
fn the_oldest_driver_that_serves_does() {
    in_own_process("drivers::the_oldest_driver_that_serves_does", &[], || {
        StandIn::get().set_up(11_020, 1);
        assert_eq!(probe(), Ok(Driver { version: 11_020, devices: 1 }));
    });
}

#[test]
fn a_driver_without_a_call_is_too_old() {
    let name = "drivers::a_driver_without_a_call_is_too_old";
    for missing in ["cuInit", "cuMemAllocAsync", "cuMemHostUnregister", "cuGetErrorString"] {
        in_own_process(name, &[(WITHOUT, missing)], || {
            StandIn::get();
            let missing = std::env::var(WITHOUT).unwrap();
            let expected = CudaError::DriverTooOld {
                found: format!("one without `{missing}`"),
                needed: "one for CUDA 11.2 or newer".to_owned(),
            };
            assert_eq!(probe(), Err(expected));
        });
        if std::env::var_os(WITHOUT).is_some() {
            return;
        }
    }
}

#[test]
fn a_library_that_is_no_driver_is_none() {
    let name = "drivers::a_library_that_is_no_driver_is_none";
    in_own_process(name, &[(WITHOUT, "cuDriverGetVersion")], || {
        StandIn::get();
        let why = "the library `libcuda` lacks `cuDriverGetVersion`".to_owned();
        assert_eq!(probe(), Err(CudaError::NoDriver { why }));
    });
}

#[test]
fn a_driver_that_does_not_start_is_none() {
    in_own_process("drivers::a_driver_that_does_not_start_is_none", &[], || {
        StandIn::get().fail(c"cuInit", 1, 1, 802);
        let why = "`cuInit` returned a code that the driver does not explain (802): a code that \
                   the driver does not explain"
            .to_owned();
        assert_eq!(probe(), Err(CudaError::NoDriver { why }));
    });
}

#[test]
fn a_driver_without_devices_has_none_to_open() {
    in_own_process("drivers::a_driver_without_devices_has_none_to_open", &[], || {
        StandIn::get().set_up(12_040, 0);
        let expected = CudaError::NoSuchDevice { ordinal: 0, devices: 0 };
        assert_eq!(probe(), Err(expected.clone()));
        assert_eq!(Device::open(0).expect_err("there is none"), expected);
    });
}
