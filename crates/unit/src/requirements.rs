//! The `[X-Fleet]` section: what a unit asks of its place.
//!
//! The options are those of the original (its unit-files-and-scheduling document), the deprecated
//! spellings included; so are the checks of what cannot go together (golden/04-submit.txt,
//! golden/19-api.txt). What is read differs in three points, where the original made a requirement
//! that nothing could meet: a continued value is joined before it is split, an option without value
//! asks for nothing, and blanks separate the names of `MachineOf=` and the patterns of `Replaces=`
//! as they do for `Conflicts=`.
//!
//! One option is new: `OnIsolation=keep|stop` says what becomes of the unit on a machine that is cut off from the
//! cluster. With `keep`, the default, it runs on there, and is started elsewhere when the machine counts as lost: for a
//! while there may be two of it. With `stop` the machine stops it by itself before it counts as lost, and only
//! then it is started elsewhere. The value is exactly one of the two words; an empty one says nothing, and both
//! together contradict each other. `stop` is refused with `Global=`: a Global unit is not started elsewhere instead, so that
//! stopping it would gain nothing. Fleets before this option took any value for it (and warned), so for what is
//! already in a cluster see [`Requirements::of_accepted`].
use crate::{Glob, UnitFile, UnitName, file::unfolded, quote::quoted};
use std::collections::{BTreeMap, BTreeSet};

/// The section's name.
pub const SECTION: &str = "X-Fleet";

/// The most all values of the section may have together, bytes, with specifiers expanded. It bounds
/// the time to check and to match them.
pub const MAX_VALUES_SIZE: usize = 16 << 10;

const MACHINE_ID: [&str; 3] = ["MachineID", "X-ConditionMachineID", "X-ConditionMachineBootID"];
const MACHINE_OF: [&str; 2] = ["X-ConditionMachineOf", "MachineOf"];
const METADATA: [&str; 2] = ["X-ConditionMachineMetadata", "MachineMetadata"];
const CONFLICTS: [&str; 2] = ["X-Conflicts", "Conflicts"];
const REPLACES: [&str; 1] = ["Replaces"];
const GLOBAL: [&str; 1] = ["Global"];
const ON_ISOLATION: [&str; 1] = ["OnIsolation"];

/// What a unit asks of its place, read from `[X-Fleet]` with specifiers expanded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Requirements {
    /// `MachineID=`: the machine ID it must be on.
    pub machine_id: Option<String>,
    /// `MachineOf=`: units whose machine it must be on.
    pub machine_of: Vec<String>,
    /// `MachineMetadata=`: for every key, the values of which one must be there.
    pub metadata: BTreeMap<String, BTreeSet<String>>,
    /// `Conflicts=`: patterns of units it must not share a machine with.
    pub conflicts: Vec<Glob>,
    /// `Replaces=`: patterns of units that are to move away for it.
    pub replaces: Vec<Glob>,
    /// `Global=`: on every machine that fits.
    pub global: bool,
    /// `OnIsolation=`: what becomes of it on a machine that is cut off from the cluster.
    pub on_isolation: OnIsolation,
}

/// What becomes of a unit on a machine that is cut off from the cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnIsolation {
    /// It runs on.
    #[default]
    Keep,
    /// The machine stops it before another one may start it.
    Stop,
}

/// Options that contradict each other; texts as the original's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequirementError {
    /// It must be with a unit it must not be with.
    #[error("unresolvable requirements: peer {} matches conflict {}", quoted(.peer), quoted(.pattern))]
    PeerConflicts {
        /// The name in `MachineOf=`.
        peer: String,
        /// The pattern in `Conflicts=`.
        pattern: String,
    },
    /// It must be with a unit that has to move away.
    #[error("unresolvable requirements: peer {} matches replace {}", quoted(.peer), quoted(.pattern))]
    PeerReplaced {
        /// The name in `MachineOf=`.
        peer: String,
        /// The pattern in `Replaces=`.
        pattern: String,
    },
    /// Two options of which a unit may have only one. (`MachineOf=` is called Peers here.)
    #[error("{0} cannot be used with {1}")]
    Together(&'static str, &'static str),
    /// A value of `OnIsolation=` that is none.
    #[error("OnIsolation has to be keep or stop, not {}", quoted(.0))]
    UnknownOnIsolation(String),
    /// `OnIsolation=` says both.
    #[error("OnIsolation is both keep and stop")]
    KeepAndStop,
    /// The values are larger than [`MAX_VALUES_SIZE`].
    #[error("values of [X-Fleet] too large (max {MAX_VALUES_SIZE} bytes)")]
    TooLarge,
}

impl Requirements {
    /// Reads and checks the section.
    ///
    /// For a template the check is made with specifiers as they stand, as nobody knows yet what they
    /// will be in its instances.
    pub fn of(name: &UnitName, file: &UnitFile) -> Result<Self, RequirementError> {
        let mut requirements = Self::of_accepted(name, file)?;
        let unexpanded = name.is_template();
        requirements.on_isolation = Section { file, name: Some(name) }.on_isolation(unexpanded)?;
        if requirements.global && requirements.on_isolation == OnIsolation::Stop {
            return Err(RequirementError::Together("Global", "OnIsolation=stop"));
        }
        Ok(requirements)
    }

    /// Reads the section of a unit that was accepted before, maybe by a fleet that did not know all of today's
    /// options: where [`of`](Self::of) would refuse what is said of such an option, that counts as not said. Refusing it
    /// would take the unit away from a cluster in which it may run.
    pub fn of_accepted(name: &UnitName, file: &UnitFile) -> Result<Self, RequirementError> {
        let section = Section { file, name: Some(name) };
        section.check_size()?;
        let mut requirements = section.requirements();
        if name.is_template() {
            Section { file, name: None }.requirements().check()?;
        } else {
            requirements.check()?;
        }
        let on_isolation = section.on_isolation(name.is_template());
        requirements.on_isolation = on_isolation.ok().filter(|_| !requirements.global).unwrap_or_default();
        Ok(requirements)
    }

    /// Whether there is no requirement at all.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    fn check(&self) -> Result<(), RequirementError> {
        for peer in &self.machine_of {
            let matching = |patterns: &[Glob]| {
                let glob = patterns.iter().find(|glob| glob.matches(peer))?;
                Some((peer.clone(), glob.as_str().to_owned()))
            };
            if let Some((peer, pattern)) = matching(&self.conflicts) {
                return Err(RequirementError::PeerConflicts { peer, pattern });
            }
            if let Some((peer, pattern)) = matching(&self.replaces) {
                return Err(RequirementError::PeerReplaced { peer, pattern });
            }
        }
        let id = ("MachineID", self.machine_id.is_some());
        let peers = ("Peers", !self.machine_of.is_empty());
        let conflicts = ("Conflicts", !self.conflicts.is_empty());
        let replaces = ("Replaces", !self.replaces.is_empty());
        let global = ("Global", self.global);
        let exclusive = [
            (id, peers),
            (id, conflicts),
            (id, global),
            (id, replaces),
            (global, peers),
            (global, replaces),
            (conflicts, replaces),
        ];
        match exclusive.into_iter().find(|((_, one), (_, other))| *one && *other) {
            Some(((one, _), (other, _))) => Err(RequirementError::Together(one, other)),
            None => Ok(()),
        }
    }
}

/// Names of options in `[X-Fleet]` that fleet does not know, in order, each once.
pub fn unknown_options(file: &UnitFile) -> Vec<String> {
    let known: BTreeSet<&str> =
        [&MACHINE_ID[..], &MACHINE_OF, &METADATA, &CONFLICTS, &REPLACES, &GLOBAL, &ON_ISOLATION]
            .concat()
            .into_iter()
            .collect();
    let mut seen = BTreeSet::new();
    section_options(file)
        .map(|(name, _)| name)
        .filter(|name| !known.contains(name) && seen.insert(*name))
        .map(str::to_owned)
        .collect()
}

/// Values of `MachineMetadata=` that are not `key=value` and hence, as in the original, ask for
/// nothing; worth a warning.
pub fn ignored_metadata(name: &UnitName, file: &UnitFile) -> Vec<String> {
    let mut values = Section { file, name: Some(name) }.values(&METADATA);
    values.retain(|value| key_and_value(value).is_none());
    values
}

fn section_options(file: &UnitFile) -> impl Iterator<Item = (&str, &str)> {
    let of_section = file.options().iter().filter(|o| o.section == SECTION);
    of_section.map(|o| (o.name.as_str(), o.value.as_str()))
}

/// The section with the name whose specifiers it uses; without a name they stay as they are.
struct Section<'a> {
    file: &'a UnitFile,
    name: Option<&'a UnitName>,
}

impl Section<'_> {
    /// No expanded value is made before it is known that all fit.
    fn check_size(&self) -> Result<(), RequirementError> {
        let longest = self.name.map_or(0, |name| name.as_str().len());
        let size: usize = section_options(self.file)
            .map(|(_, value)| value.len() + value.matches('%').count() * longest)
            .sum();
        if size > MAX_VALUES_SIZE { Err(RequirementError::TooLarge) } else { Ok(()) }
    }

    fn requirements(&self) -> Requirements {
        let mut metadata: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for value in self.values(&METADATA) {
            if let Some((key, value)) = key_and_value(&value) {
                metadata.entry(key.to_owned()).or_default().insert(value.to_owned());
            }
        }
        // The last one counts, an empty one too.
        let global = self.file.values(SECTION, GLOBAL[0]).last();
        let global = global.and_then(|last| split_quoted(&unfolded(last)).pop());
        Requirements {
            // The first value of the first spelling that is used.
            machine_id: MACHINE_ID.iter().find_map(|spelling| self.values(&[spelling]).into_iter().next()),
            machine_of: self.words(&MACHINE_OF),
            metadata,
            conflicts: self.patterns(&CONFLICTS),
            replaces: self.patterns(&REPLACES),
            global: global.is_some_and(|value| is_true(&self.expand(&value))),
            on_isolation: OnIsolation::default(),
        }
    }

    /// With `unexpanded`, for a template, values with specifiers are left to its instances.
    fn on_isolation(&self, unexpanded: bool) -> Result<OnIsolation, RequirementError> {
        let as_written = Section { file: self.file, name: None };
        let section = if unexpanded { &as_written } else { self };
        let mut said = None;
        for value in section.values(&ON_ISOLATION) {
            let one = match value.as_str() {
                "keep" => OnIsolation::Keep,
                "stop" => OnIsolation::Stop,
                text if unexpanded && text.contains('%') => continue,
                _ => return Err(RequirementError::UnknownOnIsolation(value)),
            };
            if said.is_some_and(|before| before != one) {
                return Err(RequirementError::KeepAndStop);
            }
            said = Some(one);
        }
        Ok(said.unwrap_or_default())
    }

    /// All values that are not empty, specifiers expanded, spelling by spelling.
    fn values(&self, spellings: &[&str]) -> Vec<String> {
        spellings
            .iter()
            .flat_map(|spelling| self.file.values(SECTION, spelling))
            .flat_map(|value| split_quoted(&unfolded(value)))
            .filter(|value| !value.is_empty())
            .map(|value| self.expand(&value))
            .collect()
    }

    /// All words of the values, each once. A value of which nothing is left once its specifiers are
    /// expanded stays as an empty word: it asked for something, which is not there.
    fn words(&self, spellings: &[&str]) -> Vec<String> {
        let mut seen = BTreeSet::new();
        let mut words = Vec::new();
        for value in self.values(spellings) {
            let mut of_value: Vec<&str> = value.split_whitespace().collect();
            if of_value.is_empty() {
                of_value.push("");
            }
            words.extend(of_value.into_iter().filter(|w| seen.insert(w.to_string())).map(str::to_owned));
        }
        words
    }

    /// As [`words`](Self::words), but an empty pattern matches no unit and is left out.
    fn patterns(&self, spellings: &[&str]) -> Vec<Glob> {
        self.words(spellings).into_iter().filter(|word| !word.is_empty()).map(Glob::new).collect()
    }

    /// Puts the parts of the name in: `%n`, `%N`, `%p` and `%i`. Any other `%`, a doubled one too,
    /// stands for itself.
    fn expand(&self, value: &str) -> String {
        let Some(name) = self.name else { return value.to_owned() };
        let mut expanded = String::with_capacity(value.len());
        let mut rest = value;
        while let Some(at) = rest.find('%') {
            expanded.push_str(&rest[..at]);
            let part = match rest.as_bytes().get(at + 1) {
                Some(b'n') => Some(name.as_str()),
                Some(b'N') => Some(name.stem()),
                Some(b'p') => Some(name.prefix()),
                Some(b'i') => Some(name.instance().unwrap_or_default()),
                _ => None,
            };
            expanded.push_str(part.unwrap_or("%"));
            rest = &rest[at + if part.is_some() { 2 } else { 1 }..];
        }
        expanded.push_str(rest);
        expanded
    }
}

/// Splits `"foo=bar" "baz=qux"`. A value that does not both begin and end in a quote is one value as
/// it stands; within one that does, quotes only switch whether a blank separates.
fn split_quoted(value: &str) -> Vec<String> {
    if !(value.starts_with('"') && value.ends_with('"')) {
        return vec![value.to_owned()];
    }
    let mut values = Vec::new();
    let mut current = String::new();
    let mut quoted = false;
    for c in value.chars() {
        match c {
            '"' => quoted = !quoted,
            c if c.is_whitespace() && !quoted => values.push(std::mem::take(&mut current)),
            c => current.push(c),
        }
    }
    values.push(current);
    values
}

/// Exactly one `=`, with something on both sides.
fn key_and_value(text: &str) -> Option<(&str, &str)> {
    let (key, value) = text.split_once('=')?;
    (!key.is_empty() && !value.is_empty() && !value.contains('=')).then_some((key, value))
}

fn is_true(value: &str) -> bool {
    ["true", "yes", "1", "on", "t"].iter().any(|word| value.eq_ignore_ascii_case(word))
}

#[cfg(test)]
#[path = "requirements_tests.rs"]
mod tests;
