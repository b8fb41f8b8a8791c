//! The fleet daemon: configuration, roles and wiring around the pure core.

pub mod agent;
pub mod api;
pub mod config;
pub mod daemon;
pub mod listen;
pub mod logging;
pub mod server;
