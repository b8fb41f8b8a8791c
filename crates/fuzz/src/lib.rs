//! Everything of fleet that reads outside bytes, as functions that take any bytes and panic when something is wrong.
//!
//! Each target has a corpus of good and odd inputs in `fuzz/corpus/NAME`, and in `fuzz/crashes/NAME` inputs that once broke it. Two things
//! drive them: the runner here ([`Run`]), which works with any compiler and is part of the tests, and libFuzzer, led by coverage,
//! through the small programs in `fuzz/` (see its README).
//!
//! A target returns what it [saw](Seen): which way the input went. The runner goes on from inputs that went a new way, which
//! is what coverage does for libFuzzer, only coarser.

mod mutate;
mod run;
mod targets;

pub use run::{Failure, Run, corpus, replay};
pub use targets::{Seen, TARGETS, Target, target};
