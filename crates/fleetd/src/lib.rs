//! The fleet daemon: configuration, roles and wiring around the pure core.

pub mod config;
pub mod listen;
pub mod logging;
