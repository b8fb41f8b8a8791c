//! What systemd would certainly refuse, whatever the machine.
use crate::{UnitFile, UnitName};

/// One reason for which systemd would not load a unit.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Rejection {
    pub line: usize,
    pub reason: String,
}

/// All reasons for which systemd (252 and newer) would refuse this file.
pub fn rejections(_name: &UnitName, _file: &UnitFile) -> Vec<Rejection> {
    todo!()
}
