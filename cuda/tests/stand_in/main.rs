//! The crate against a driver without a device; see `stand_in/cuda.c` for what that one models.
//!
//! Always holds: nobody sleeps to let something happen. [`scene::Scene::settle`] returns when
//! nothing can happen any more without the test, and streams are held and released by it.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod captures;
mod copies;
mod drivers;
mod failures;
mod forks;
mod library;
mod order;
mod pinning;
mod random;
mod saves;
mod scene;
