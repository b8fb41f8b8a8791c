//! The units of a torture run: well-behaved ones and others.

use crate::history::{File, recorded};

/// How many different files each unit can have.
pub(super) const VERSIONS: usize = 3;

/// A unit, whatever its file's version is.
pub(super) struct Role {
    pub(super) name: &'static str,
    exec: &'static str,
    service: &'static str,
    fleet: &'static str,
    /// It ends by itself.
    ends: bool,
}

const fn role(name: &'static str, fleet: &'static str) -> Role {
    Role { name, exec: SLEEP, service: "", fleet, ends: false }
}

const SLEEP: &str = "/bin/sleep infinity";
const STOP: &str = "OnIsolation=stop";
/// It does not end by SIGTERM.
const STUBBORN: &str = "/bin/sh -c 'trap \"\" TERM; while :; do sleep 1000; done'";
/// It forks and forks again, up to what TasksMax= or, where that does nothing, itself allows.
const FORKS: &str = "/usr/bin/perl -e 'while (1) { my $$p = $$n < 60 ? fork : undef; \
    if (!defined $$p) { waitpid -1, 0; $$n-- } elsif ($$p) { $$n++ } else { exec \"sleep\", \"3\" } }'";

/// All units.
pub(super) const CAST: &[Role] = &[
    role("plain0.service", ""),
    role("plain1.service", ""),
    role("plain2.service", ""),
    role("plain3.service", ""),
    role("plain4.service", ""),
    role("plain5.service", ""),
    role("plain6.service", ""),
    role("once0.service", STOP),
    role("once1.service", STOP),
    role("once2.service", STOP),
    role("once3.service", STOP),
    role("alone0.service", "Conflicts=alone*.service"),
    role("alone1.service", "Conflicts=alone*.service"),
    role("zoned.service", "MachineMetadata=zone=a"),
    role("with.service", "MachineOf=alone0.service"),
    role("everywhere.service", "Global=true"),
    Role { exec: STUBBORN, service: "TimeoutStopSec=3s\n", ..role("stubborn.service", "") },
    Role { exec: STUBBORN, service: "TimeoutStopSec=2s\n", ..role("stubborn-once.service", STOP) },
    Role { exec: FORKS, service: "TasksMax=40\nTimeoutStopSec=5s\n", ..role("forks.service", "") },
    Role { service: "ExecStartPre=/bin/sleep 2\n", ..role("slow.service", "") },
    Role { exec: "/bin/sleep 5", ends: true, ..role("ends.service", "") },
    Role { exec: "/bin/sh -c 'sleep 3; exit 1'", ends: true, ..role("fails.service", "") },
];

impl Role {
    /// The text of its file in some version, and what is to be known of that.
    pub(super) fn file(&self, version: usize) -> (String, File) {
        let marker = format!("{}-{version}", self.name);
        let file = File {
            marker: marker.clone(),
            stops: self.fleet == STOP,
            global: self.fleet == "Global=true",
            ends: self.ends,
            choosy: !matches!(self.fleet, "" | STOP | "Global=true"),
        };
        (recorded(&marker, self.exec, self.service, self.fleet), file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_unit::{Requirements, UnitFile, UnitName, lint};
    use std::collections::BTreeSet;

    #[test]
    fn all_files_are_good_and_different() {
        let mut hashes = BTreeSet::new();
        for role in CAST {
            for version in 0..VERSIONS {
                let name = UnitName::parse(role.name).unwrap();
                let file = UnitFile::parse(&role.file(version).0).unwrap();
                assert!(Requirements::of(&name, &file).is_ok());
                assert!(lint::rejections(&name, &file).is_empty());
                assert!(hashes.insert(file.hash().to_string()));
            }
        }
    }
}
