//! What a machine without a driver is told. In a process of its own, where nothing stands in for
//! the driver.

use dtr_cuda::{CudaError, Device, probe};

#[test]
fn a_machine_without_a_driver_is_told_so_every_time() {
    if let Ok(driver) = probe() {
        println!("skipped: this machine has a driver, {driver:?}");
        return;
    }
    let first = probe().expect_err("there was no driver a moment ago");
    let CudaError::NoDriver { why } = &first else {
        println!("skipped: this machine has a driver that does not work: {first}");
        return;
    };
    assert_eq!(why, "the system has no library `libcuda.so.1`");
    assert_eq!(probe(), Err(first.clone()));
    assert_eq!(Device::open(0).expect_err("there is no driver"), first);
    assert_eq!(
        first.to_string(),
        "starting the CUDA driver: the system has no library `libcuda.so.1`\nhint: keep the \
         tensors on the CPU, or install NVIDIA's driver; `nvidia-smi` shows whether it works"
    );
}
