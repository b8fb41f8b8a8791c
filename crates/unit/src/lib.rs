//! Unit names, unit files and their `[X-Fleet]` options: everything fleet knows about a unit
//! from its name and its text alone. No I/O.
//!
//! - [`name`]: names, types, templates and instances
//! - [`mod@file`]: the text, kept byte for byte, its options and its hash
//! - [`requirements`]: the `[X-Fleet]` section
//! - [`glob`]: patterns as Go's `path.Match` reads them
//! - [`lint`]: what systemd would certainly refuse
//! - [`quote`]: quoting as Go's `%q` prints it

pub mod file;
pub mod glob;
mod lexer;
pub mod lint;
pub mod name;
pub mod quote;
pub mod requirements;

pub use file::{Hash, ParseError, UnitFile, UnitOption};
pub use glob::Glob;
pub use name::{NameError, UnitName, UnitType};
pub use requirements::{OnIsolation, RequirementError, Requirements};
