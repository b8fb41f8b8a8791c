//! The pure logic of fleet: values in, values out. No I/O, no async, no clock, no randomness; time
//! comes in as an argument. The daemon around it only moves data, and the simulator runs the same code.
//!
//! - [`model`]: what there is: units, machines, states
//! - [`view`]: everything a server knows, in memory, with its indexes
//! - [`placement`]: which machine a unit fits on, and why not
//! - [`engine`]: which units to place and to take away
//! - [`drain`]: moving the units of a machine away from it
//! - [`fencing`]: when an isolated machine stops a unit, and when another may start it
//! - [`agent`]: what to do on one machine to make it what it should be

pub mod agent;
pub mod drain;
pub mod engine;
pub mod fencing;
pub mod model;
pub mod placement;
mod plan;
mod site;
#[cfg(test)]
mod testing;
pub mod view;
