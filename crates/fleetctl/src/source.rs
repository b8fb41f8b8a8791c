//! Where the units come from that are to be submitted, loaded or started: the registry, a file, or
//! a template in either (golden/04-submit.txt, 06-load.txt, 07-start.txt).
//!
//! The order in which a unit is looked for is the original's: (1) a unit of this name in the
//! registry, (2) a file of this name, (3) for an instance, its template in the registry, (4) or
//! the template's file. Only answers are looked at here; who asks is behind [`Lookup`].
use fleet_api::client::{Error, file_of_options};
use fleet_api::types::Unit;
use fleet_unit::{ParseError, Requirements, UnitFile, UnitName, lint, quote::quoted, requirements};
use futures_util::{StreamExt, stream};
use std::future::Future;
use std::path::Path;

/// How many units are looked for at the same time.
const AT_ONCE: usize = 16;

/// The longest piece of a faulty line that an error repeats, characters.
const SHOWN: usize = 80;

/// What the command is about to do with the units; says which units `--replace` may replace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Verb {
    Submit,
    Load,
    Start,
}

impl Verb {
    /// The desired state that the command sets.
    pub(crate) fn target(self) -> &'static str {
        match self {
            Verb::Submit => "inactive",
            Verb::Load => "loaded",
            Verb::Start => "launched",
        }
    }

    /// Whether it may replace a unit of which this is desired.
    fn may_replace(self, desired: &str) -> bool {
        match desired {
            "launched" => self >= Verb::Start,
            "loaded" => self >= Verb::Load,
            _ => true,
        }
    }
}

/// A line for the user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Note {
    Out(String),
    Err(String),
}

/// What is to become of one unit.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Action {
    /// It is new, or to be replaced: send this file.
    Create {
        name: UnitName,
        file: UnitFile,
        global: bool,
        /// What is desired of the unit that is there under this name.
        replaces: Option<String>,
    },
    /// It exists and stays.
    Keep(Unit),
}

impl Action {
    /// The unit's name.
    pub(crate) fn name(&self) -> &str {
        match self {
            Action::Create { name, .. } => name.as_str(),
            Action::Keep(unit) => &unit.name,
        }
    }
}

/// Why a unit cannot be had: the original's line, and what we add to it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Refusal {
    /// What follows `Error creating units: `.
    pub(crate) text: String,
    /// Further lines: where, and which other faults.
    pub(crate) more: Vec<String>,
    /// The request that failed, if one did.
    pub(crate) error: Option<Error>,
}

/// What was found: the units before the first one that cannot be had, in order, each once.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) notes: Vec<Note>,
    pub(crate) actions: Vec<Action>,
    pub(crate) refusal: Option<Refusal>,
}

/// The places where units are looked for.
pub(crate) trait Lookup {
    /// A unit in the registry.
    fn unit(&self, name: &str) -> impl Future<Output = Result<Option<Unit>, Error>>;
    /// The text of a unit in the registry.
    fn text(&self, name: &str) -> impl Future<Output = Result<Option<String>, Error>>;
    /// The bytes of a file, at most a few more than a unit file may have; `None` where there is none.
    /// The error is worded as the original's: `read dir.service: is a directory`.
    fn file(&self, path: &str) -> Result<Option<Vec<u8>>, String>;
}

/// Looks for all units that the arguments name.
pub(crate) async fn find(lookup: &impl Lookup, verb: Verb, replace: bool, arguments: &[String]) -> Found {
    let mut found = Found::default();
    let finder = Finder { lookup, verb, replace };
    let mut answers = stream::iter(arguments.iter().map(|argument| finder.one(argument))).buffered(AT_ONCE);
    while let Some((mut notes, answer)) = answers.next().await {
        match answer {
            Ok(action) if found.actions.iter().any(|earlier| earlier.name() == action.name()) => {
                let earlier = found.actions.iter().find(|earlier| earlier.name() == action.name());
                if let (Some(Action::Create { file: first, name, .. }), Action::Create { file, .. }) =
                    (earlier, &action)
                    && first.hash() != file.hash()
                {
                    found.notes.push(Note::Err(format!(
                        "WARNING: Unit {name} is given more than once, with different files; the first is used."
                    )));
                }
            }
            Ok(action) => {
                found.notes.append(&mut notes);
                found.actions.push(action);
            }
            Err(refusal) => {
                found.notes.append(&mut notes);
                found.refusal = Some(refusal);
                break;
            }
        }
    }
    found
}

struct Finder<'a, L> {
    lookup: &'a L,
    verb: Verb,
    replace: bool,
}

impl<L: Lookup> Finder<'_, L> {
    async fn one(&self, argument: &str) -> (Vec<Note>, Result<Action, Refusal>) {
        let mut notes = Vec::new();
        let result = self.look(argument, &mut notes).await;
        (notes, result)
    }

    async fn look(&self, argument: &str, notes: &mut Vec<Note>) -> Result<Action, Refusal> {
        let path = with_type(argument);
        let name = fleet_unit::name::from_argument(&path);
        let valid = UnitName::parse(&name);
        // A name that cannot be in the registry need not be looked for there.
        let known = match &valid {
            Ok(name) => self.lookup.unit(name.as_str()).await.map_err(|error| {
                Refusal::of_request(format!("error retrieving Unit({name}) from Registry: {error}"), error)
            })?,
            Err(_) => None,
        };
        if let Some(unit) = known {
            let same = self.compare(&path, &unit, notes);
            if !self.replace {
                // What the file says was only of interest for the warning.
                return Ok(Action::Keep(unit));
            }
            if same? {
                notes.push(Note::Out(format!("Found same Unit({name}) in Registry, nothing to do")));
                return Ok(Action::Keep(unit));
            }
            if !self.verb.may_replace(&unit.desired_state) {
                notes.push(Note::Err(format!(
                    "Warning: can not replace Unit({name}) in state '{}', use the appropriate command",
                    unit.desired_state
                )));
                return Ok(Action::Keep(unit));
            }
            let (file, from) = self.file(&path, &name, notes).await?;
            return create(valid, file, &from, Some(unit.desired_state), notes);
        }
        let (file, from) = self.file(&path, &name, notes).await?;
        create(valid, file, &from, None, notes)
    }

    /// Whether the unit in the registry is what lies in the file, or for an instance in its
    /// template's file. Warns of a difference unless it is to be replaced.
    fn compare(&self, path: &str, unit: &Unit, notes: &mut Vec<Note>) -> Result<bool, Refusal> {
        let name = &unit.name;
        let of_template = UnitName::parse(&fleet_unit::name::from_argument(path))
            .ok()
            .and_then(|name| name.template())
            .map(|template| beside(path, template.as_str()));
        let local = match self.read(path) {
            Ok(Some(file)) => Some((file, path.to_owned(), "local unit file")),
            Err(refusal) => {
                if !self.replace {
                    notes.push(Note::Err(format!(
                        "WARNING: Unit {name} is in the registry; the local file is not looked at: {refusal}"
                    )));
                }
                return Err(Refusal::of_file(path, refusal));
            }
            Ok(None) => match &of_template {
                None => None,
                Some(template) => match self.read(template) {
                    Ok(file) => file.map(|file| (file, template.clone(), "local template unit file")),
                    Err(refusal) => return Err(Refusal::of_file(template, refusal)),
                },
            },
        };
        let Some((file, from, what)) = local else {
            let text = if of_template.is_none() {
                format!("error Unit {path} does not seem to be a template unit")
            } else {
                format!("unable to find Unit({name}) or its template on filesystem")
            };
            return Err(Refusal::new(text));
        };
        let registered = file_of_options(&unit.options).map(|file| file.hash());
        if registered == Ok(file.hash()) {
            return Ok(true);
        }
        if !self.replace {
            notes.push(Note::Err(format!(
                "WARNING: Unit {name} in registry differs from {what} {from}. Add --replace to override."
            )));
        }
        Ok(false)
    }

    /// The file of a unit that is not in the registry (or is to be replaced), and its path.
    async fn file(
        &self,
        path: &str,
        name: &str,
        notes: &mut Vec<Note>,
    ) -> Result<(UnitFile, String), Refusal> {
        match self.read(path) {
            Ok(Some(file)) => return Ok((file, path.to_owned())),
            Ok(None) => {}
            Err(fault) => return Err(Refusal::of_file(path, fault)),
        }
        let Some(template) = UnitName::parse(name).ok().and_then(|name| name.template()) else {
            return Err(Refusal::new(format!("unable to find Unit({name}) in Registry or on filesystem")));
        };
        let failed = |text: String| format!("failed getting Unit({path}) from template: {text}");
        let local = beside(path, template.as_str());
        let in_registry = self.lookup.text(template.as_str()).await.map_err(|error| {
            let text = format!("error retrieving template Unit({template}) from Registry: {error}");
            Refusal::of_request(failed(text), error)
        })?;
        if let Some(text) = in_registry {
            let file = UnitFile::parse(&text).map_err(|error| {
                Refusal::new(failed(format!("template Unit({template}) in Registry: {error}")))
            })?;
            if !self.replace
                && let Ok(Some(there)) = self.read(&local)
                && there.hash() != file.hash()
            {
                notes.push(Note::Err(format!(
                    "WARNING: Unit {template} in registry differs from local template unit file {local}. \
                     Add --replace to override."
                )));
            }
            return Ok((file, template.to_string()));
        }
        match self.read(&local) {
            Ok(Some(file)) => Ok((file, local)),
            Ok(None) => Err(Refusal::new(failed(format!(
                "unable to find template Unit({template}) in Registry or on filesystem"
            )))),
            Err(fault) => {
                let text = format!("unable to load template Unit({template}) from file: {fault}");
                Err(Refusal { more: fault.place(&local), ..Refusal::new(failed(text)) })
            }
        }
    }

    fn read(&self, path: &str) -> Result<Option<UnitFile>, FileFault> {
        let bytes = self.lookup.file(path).map_err(FileFault::System)?;
        let Some(bytes) = bytes else { return Ok(None) };
        UnitFile::from_bytes(&bytes).map(Some).map_err(|error| {
            let text = String::from_utf8_lossy(&bytes);
            let line = text.lines().nth(error.line().saturating_sub(1)).unwrap_or_default();
            FileFault::Syntax { line: excerpt(line), error }
        })
    }
}

/// Why a file cannot be used.
enum FileFault {
    System(String),
    Syntax { error: ParseError, line: String },
}

impl FileFault {
    /// Where the fault is, for a line of its own.
    fn place(&self, path: &str) -> Vec<String> {
        match self {
            FileFault::System(_) => Vec::new(),
            FileFault::Syntax { error, line } => vec![format!("  {path}:{}: {line}", error.line())],
        }
    }
}

impl std::fmt::Display for FileFault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            FileFault::System(text) => f.write_str(text),
            FileFault::Syntax { error, .. } => write!(f, "{error}"),
        }
    }
}

impl Refusal {
    fn new(text: String) -> Self {
        Refusal { text, more: Vec::new(), error: None }
    }

    fn of_request(text: String, error: Error) -> Self {
        Refusal { error: Some(error), ..Refusal::new(text) }
    }

    fn of_file(path: &str, fault: FileFault) -> Self {
        let text = format!("failed getting Unit({path}) from file: {fault}");
        Refusal { more: fault.place(path), ..Refusal::new(text) }
    }
}

/// Checks what can be checked before the server is asked. (The server checks the same again.)
fn create(
    name: Result<UnitName, fleet_unit::NameError>,
    file: UnitFile,
    from: &str,
    replaces: Option<String>,
    notes: &mut Vec<Note>,
) -> Result<Action, Refusal> {
    let name = name.map_err(|error| Refusal::new(error.to_string()))?;
    let needs = Requirements::of(&name, &file).map_err(|error| Refusal::new(error.to_string()))?;
    if file.options().is_empty() {
        // The words of the server's answer, said before anything is sent.
        return Err(Refusal::new(format!(
            "failed creating unit {name}: googleapi: Error 409: unit does not exist and options field empty"
        )));
    }
    let mut faults = lint::rejections(&name, &file).into_iter().map(|it| match it.line {
        // A fault of the whole file: something is missing.
        0 => format!("{from}: {}", it.reason),
        line => format!("{from}:{line}: {}", it.reason),
    });
    if let Some(first) = faults.next() {
        return Err(Refusal { more: faults.collect(), ..Refusal::new(first) });
    }
    for option in requirements::unknown_options(&file) {
        notes.push(Note::Err(format!(
            "WARNING: Unit {name}: unrecognized requirement in [X-Fleet] section: {}",
            quoted(&option)
        )));
    }
    for entry in requirements::ignored_metadata(&name, &file) {
        notes.push(Note::Err(format!(
            "WARNING: Unit {name}: MachineMetadata= without a value is ignored: {}",
            quoted(&entry)
        )));
    }
    Ok(Action::Create { name, file, global: needs.global, replaces })
}

/// The argument as a path: with `.service` at its end where no type stands there.
fn with_type(argument: &str) -> String {
    let argument = argument.trim_end_matches('/');
    let base = argument.rsplit('/').next().unwrap_or_default();
    let name = fleet_unit::name::from_argument(argument);
    format!("{argument}{}", &name[base.len().min(name.len())..])
}

/// The path of a file in the same directory.
fn beside(path: &str, name: &str) -> String {
    Path::new(path).with_file_name(name).to_string_lossy().into_owned()
}

/// A piece of a line that is safe to show.
fn excerpt(line: &str) -> String {
    let mut shown: String = line.chars().map(|c| if c.is_control() { '?' } else { c }).take(SHOWN).collect();
    if line.chars().nth(SHOWN).is_some() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests;
