//! submit, load, start: units are found, sent to the registry with what is desired of them, and
//! waited for (golden/04-submit.txt, 06-load.txt, 07-start.txt).
use super::report;
use crate::cli::Patience;
use crate::context::{Context, is_global, misused};
use crate::source::{self, Action, Lookup, Note, Refusal, Verb};
use crate::wait::tracker::{Goal, Source, Verdict, Waiting, judge};
use crate::wait::{self, Limits};
use anyhow::Result;
use fleet_api::client::{Client, Error};
use fleet_api::types::{Unit, UnitChange};
use std::io::Read;

/// How the command was called.
pub(crate) struct Bring {
    pub(crate) verb: Verb,
    pub(crate) replace: bool,
    pub(crate) no_block: bool,
    pub(crate) patience: Patience,
    pub(crate) units: Vec<String>,
}

impl Bring {
    /// As `load` and `start` were called.
    pub(crate) fn of(verb: Verb, args: crate::cli::Bring) -> Self {
        let (replace, no_block) = (args.replace.replace, args.no_block);
        Bring { verb, replace, no_block, patience: args.patience, units: args.units }
    }
}

impl Verb {
    fn word(self) -> &'static str {
        match self {
            Verb::Submit => "submit",
            Verb::Load => "load",
            Verb::Start => "start",
        }
    }

    /// What the original's messages say is going on.
    fn doing(self) -> &'static str {
        match self {
            Verb::Submit => "creating",
            Verb::Load => "loading",
            Verb::Start => "starting",
        }
    }

    fn goal(self) -> Option<Goal> {
        match self {
            Verb::Submit => None,
            Verb::Load => Some(Goal::Loaded),
            Verb::Start => Some(Goal::Launched),
        }
    }
}

/// A unit whose desired state was set.
struct Triggered {
    name: String,
    global: bool,
    /// It is new, or has a new file.
    fresh: bool,
}

pub(crate) async fn run(context: &Context, bring: Bring) -> Result<i32> {
    if bring.units.is_empty() {
        return misused("No units given");
    }
    let verb = bring.verb;
    let found = source::find(&Places(&context.client), verb, bring.replace, &bring.units).await;
    for note in &found.notes {
        match note {
            Note::Out(line) => context.say(line)?,
            Note::Err(line) => eprintln!("{line}"),
        }
    }
    if let Some(refusal) = &found.refusal {
        return refuse(context, &found.actions, refusal).await;
    }
    let mut triggered = Vec::new();
    let mut kept = Vec::new();
    for (sent, action) in send(&context.client, verb, &found.actions).await.into_iter().zip(&found.actions) {
        match (sent, action) {
            (Ok(_), Action::Create { name, global, .. }) => {
                context.say_unit(name.as_str(), if *global { "" } else { "inactive" }, "").await?;
                triggered.push(Triggered { name: name.to_string(), global: *global, fresh: true });
            }
            (Ok(true), Action::Keep(unit)) => {
                triggered.push(Triggered { name: unit.name.clone(), global: is_global(unit), fresh: false });
            }
            (Ok(false), Action::Keep(unit)) => kept.push(unit),
            (Err(error), Action::Create { name, .. }) => {
                return Ok(context.fail(
                    &format!("Error creating units: failed creating unit {name}: "),
                    &error,
                    "",
                ));
            }
            (Err(error), Action::Keep(_)) => {
                return Ok(context.fail(&format!("Error {} units: ", verb.doing()), &error, ""));
            }
        }
    }
    let Some(goal) = verb.goal() else {
        context.finish()?;
        return Ok(0);
    };
    for unit in triggered.iter().filter(|unit| unit.global || bring.no_block) {
        context.say_triggered(&unit.name, unit.global, verb.word())?;
    }
    if bring.no_block {
        context.finish()?;
        return Ok(0);
    }
    let mut waited: Vec<(String, bool)> =
        triggered.into_iter().filter(|unit| !unit.global).map(|unit| (unit.name, unit.fresh)).collect();
    let (mut code, under_way) = check_kept(context, goal, &kept).await;
    let quiet = under_way.into_iter().map(|name| (name, false));
    waited.extend(quiet);
    let all: Vec<String> = waited.iter().map(|(name, _)| name.clone()).collect();
    let outcome = wait::wait(context, goal, waited, Limits::of(bring.patience), true).await?;
    let timed_out = |text: &str| format!("Error waiting for unit states, exit status: {text}");
    code = code.max(report::trouble(context, goal, &outcome, timed_out, verb.word(), &all).await);
    context.finish()?;
    Ok(code)
}

/// Sends units. For those that exist already: whether their desired state had to be set.
async fn send(client: &Client, verb: Verb, actions: &[Action]) -> Vec<Result<bool, Error>> {
    let changes: Vec<UnitChange> = actions.iter().filter_map(|action| change(verb, action)).collect();
    let mut made = client.change_units(&changes).await.into_iter();
    let outcomes = actions.iter().map(|action| match change(verb, action) {
        // One that existed was set.
        Some(_) => made.next().unwrap_or(Ok(true)).map(|_| true),
        None => Ok(false),
    });
    outcomes.collect()
}

/// What has to be changed, if anything.
fn change(verb: Verb, action: &Action) -> Option<UnitChange> {
    let change = match action {
        Action::Create { name, file, .. } => {
            UnitChange { name: name.to_string(), file: file.text().to_owned(), ..UnitChange::default() }
        }
        Action::Keep(unit) if verb == Verb::Submit || unit.desired_state == verb.target() => return None,
        Action::Keep(unit) => UnitChange { name: unit.name.clone(), ..UnitChange::default() },
    };
    Some(UnitChange { desired_state: verb.target().to_owned(), ..change })
}

/// One of the units cannot be had: those before it are submitted, as in the original, where they
/// are new; nothing that is there is changed.
async fn refuse(context: &Context, actions: &[Action], refusal: &Refusal) -> Result<i32> {
    let new = actions.iter().filter(|action| matches!(action, Action::Create { replaces: None, .. }));
    let new: Vec<Action> = new.cloned().collect();
    for (sent, action) in send(&context.client, Verb::Submit, &new).await.into_iter().zip(&new) {
        if let Err(error) = sent {
            let before = format!("Error creating units: failed creating unit {}: ", action.name());
            return Ok(context.fail(&before, &error, ""));
        }
    }
    eprintln!("Error creating units: {}", refusal.text);
    refusal.more.iter().for_each(|line| eprintln!("{line}"));
    if let Some(error) = &refusal.error {
        context.hint(error);
    }
    Ok(1)
}

/// Units of which this is desired already were not touched. Those that are where they should be
/// need no word; those on their way are to be waited for (a command that was cut off can be
/// repeated); of the others is told why they are not there, which makes the exit code 1.
async fn check_kept(context: &Context, goal: Goal, kept: &[&Unit]) -> (i32, Vec<String>) {
    let names: Vec<String> =
        kept.iter().filter(|unit| !is_global(unit)).map(|unit| unit.name.clone()).collect();
    if names.is_empty() {
        return (0, Vec::new());
    }
    let events = match wait::observe(context, names).await {
        Ok(Some(events)) => events,
        // The original's server cannot tell; the original did not look either.
        Ok(None) => return (0, Vec::new()),
        Err(error) => return (context.fail("Error waiting for units: ", &error, ""), Vec::new()),
    };
    let (mut code, mut under_way) = (0, Vec::new());
    for event in events {
        let name = &event.explanation.name;
        match judge(goal, Source::Events, &event, false) {
            Some(Verdict::Reached { .. }) => {}
            Some(failed) => {
                report::failure(context, name, &failed).await;
                if goal == Goal::Launched {
                    eprintln!("  It is not started again by itself: fleetctl restart {name}");
                }
                code = 1;
            }
            None if event.explanation.machine_id.is_empty() => {
                let waiting = Waiting::Unplaced(event.explanation.unplaced.clone());
                let why = wait::explain(context, &waiting).await;
                eprintln!("Unit {name} is to be {} already, but {why}", goal.state());
                code = 1;
            }
            None => under_way.push(name.clone()),
        }
    }
    (code, under_way)
}

/// The registry and the file system.
struct Places<'a>(&'a Client);

impl Lookup for Places<'_> {
    async fn unit(&self, name: &str) -> Result<Option<Unit>, Error> {
        self.0.unit(name).await
    }

    async fn text(&self, name: &str) -> Result<Option<String>, Error> {
        self.0.unit_file(name).await
    }

    fn file(&self, path: &str) -> Result<Option<Vec<u8>>, String> {
        let file = match std::fs::metadata(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => return Ok(None),
            Err(error) => return Err(report::open_error(path, &error)),
            Ok(it) if it.is_dir() => return Err(format!("read {path}: is a directory")),
            // Opening a pipe would wait for its other end.
            Ok(it) if !it.is_file() => return Err(format!("read {path}: is not a regular file")),
            Ok(_) => std::fs::File::open(path).map_err(|error| report::open_error(path, &error))?,
        };
        let mut bytes = Vec::new();
        let limit = u64::try_from(fleet_unit::file::MAX_SIZE).unwrap_or(u64::MAX).saturating_add(1);
        file.take(limit)
            .read_to_end(&mut bytes)
            .map_err(|error| format!("read {path}: {}", crate::context::words(&error)))?;
        Ok(Some(bytes))
    }
}
