//! Every single operation of a save fails, once and for ever, in several ways, on every backend:
//! the previous checkpoint stays, the error is typed, nothing half-made is visible, and the next
//! save on a healthy device succeeds.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use dtr_engine::clock::System;
use dtr_engine::config::{Config, DirectIo, IoBackend};
use dtr_engine::engine::Components;
use dtr_engine::io::open_backend;
use dtr_engine::io::sim::{Fault, Plan, Sim};
use dtr_engine::{Engine, EngineError, Result};

use super::support::{State, config, scratch};
