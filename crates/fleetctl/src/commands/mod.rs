//! The commands, one file for each family.
pub(crate) mod bring;
mod drain;
pub(crate) mod explain;
pub(crate) mod forward;
pub(crate) mod join_token;
pub(crate) mod journal;
pub(crate) mod list;
pub(crate) mod machine;
pub(crate) mod registry;
mod report;
pub(crate) mod servers;
pub(crate) mod show;
pub(crate) mod status;
pub(crate) mod take;
pub(crate) mod user;
