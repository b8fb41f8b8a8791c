//! The fleet daemon: configuration, roles and wiring around the pure core.

pub mod address;
pub mod agent;
pub mod api;
pub mod config;
pub mod daemon;
pub mod guard;
pub mod identity;
pub mod listen;
mod lock;
pub mod logging;
pub mod metrics;
pub mod notify;
pub mod server;
