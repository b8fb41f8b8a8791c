//! Wire types of the fleet HTTP API v1, and its client.
//!
//! - [`types`]: bodies, with the original's key order and optional fields
//! - [`events`]: the event stream
//! - [`client`]: the client that fleetctl and the tests use
//! - [`discovery`]: the discovery document
//! - [`duration`]: durations in bodies, configuration and flags

pub mod client;
pub mod discovery;
pub mod duration;
pub mod events;
pub mod types;
