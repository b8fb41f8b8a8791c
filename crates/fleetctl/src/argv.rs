//! Command lines as people have written them for ten years, brought into the one form that
//! [`crate::cli`] defines.
//!
//! Flags stand before or after the command, with one dash or two (`-full`, `--l`), booleans with a
//! value (`--full=false`), global ones in FLEETCTL_* variables; commands are cut short. A pure
//! function; what it needs to know of the flags it takes from the definition itself.
use clap::{Arg, Command};

/// What a command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Invocation {
    /// Run this, in the form that clap reads.
    Run(Vec<String>),
    /// Print help of a command or of all; the short or the long one.
    Help {
        /// The command, with the one it belongs to: `machine list`.
        command: Option<String>,
        /// Whether all options are to be explained.
        long: bool,
    },
    /// Print the version.
    Version,
}

/// A command line that makes no sense. The texts are the original's where it had one
/// (golden/02-globals.txt).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Misuse {
    /// What is wrong.
    pub(crate) text: String,
    /// The command it was said to, for which help exists.
    pub(crate) command: Option<String>,
}

/// A flag found on the command line or in the environment.
struct Flag {
    /// Its long name.
    name: String,
    value: Option<String>,
}

/// Reads a command line without the program's name. `variable` gives the environment; complaints
/// about unusable variables go to `warn`.
pub(crate) fn normalise(
    definition: &Command,
    arguments: &[String],
    variable: impl Fn(&str) -> Option<String>,
    mut warn: impl FnMut(String),
) -> Result<Invocation, Misuse> {
    let mut command: Option<&Command> = None;
    let mut before = Vec::new();
    let mut flags = Vec::new();
    let mut words: Vec<String> = Vec::new();
    let mut version_first = false;
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        if let Some(found) = command
            && found.get_name() == "ssh"
            && !takes_target(&flags)
            && !argument.starts_with('-')
        {
            // What follows the machine is the command to run there, untouched.
            words.push(argument.clone());
            words.extend(rest.by_ref().cloned());
            break;
        }
        if argument == "--" {
            while is_open(command)
                && let Some(name) = rest.next()
            {
                command = Some(resolve(command.unwrap_or(definition), name)?);
            }
            words.extend(rest.by_ref().cloned());
            break;
        }
        if !argument.starts_with('-') || argument.len() == 1 {
            match command {
                _ if is_open(command) => {
                    command = Some(resolve(command.unwrap_or(definition), argument)?);
                }
                Some(found) if found.get_name() == "ssh" => {
                    words.push(argument.clone());
                    words.extend(rest.by_ref().cloned());
                    break;
                }
                _ => words.push(argument.clone()),
            }
            continue;
        }
        let flag = read_flag(definition, command, argument, &mut rest)?;
        version_first |=
            command.is_none() && flag.name == "version" && flag.value.as_deref() != Some("false");
        flags.push(flag);
        if is_open(command) {
            before.push(flags.len() - 1);
        }
    }
    if version_first {
        return Ok(Invocation::Version);
    }
    // Flags that stood before the command could not be checked when they were read.
    for flag in before.iter().map(|&at| &flags[at]) {
        if find(definition, command, |arg| arg.get_long() == Some(&flag.name)).is_none() {
            return Err(misuse(command, format!("unknown flag: --{}", flag.name)));
        }
    }
    let mut all = from_environment(definition, variable, &mut warn);
    all.extend(flags);
    let all = settle(definition, command, all)?;
    if let Some(help) = all.iter().find(|flag| flag.name == "help") {
        let long = help.value.is_none();
        return Ok(Invocation::Help { command: command.map(full_name), long });
    }
    let Some(command) = command else {
        return Ok(Invocation::Help { command: None, long: false });
    };
    if command.get_name() == "help" {
        let mut topic = None;
        for name in &words {
            if !is_open(topic) {
                break;
            }
            topic = Some(resolve(topic.unwrap_or(definition), name)?);
        }
        return Ok(Invocation::Help { command: topic.map(full_name), long: true });
    }
    if is_open(Some(command)) {
        let known: Vec<&str> = command.get_subcommands().map(Command::get_name).collect();
        let text = format!("{} needs a command: {}", command.get_name(), known.join(", "));
        return Err(misuse(Some(command), text));
    }
    let mut line = vec!["fleetctl".to_owned()];
    line.extend(full_name(command).split(' ').map(str::to_owned));
    line.extend(all.into_iter().map(|flag| match flag.value {
        Some(value) => format!("--{}={value}", flag.name),
        None => format!("--{}", flag.name),
    }));
    if !words.is_empty() {
        line.push("--".to_owned());
        line.extend(words);
    }
    Ok(Invocation::Run(line))
}

/// Whether ssh was told its target by a flag, so that the first word is the command to run.
fn takes_target(flags: &[Flag]) -> bool {
    flags.iter().any(|flag| matches!(flag.name.as_str(), "machine" | "unit"))
}

/// Whether a command is yet to come: none is there, or one that only holds others.
fn is_open(command: Option<&Command>) -> bool {
    command.is_none_or(Command::has_subcommands)
}

/// The name of a command with the one it belongs to: `machine list`.
fn full_name(command: &Command) -> String {
    let name = command.get_bin_name().and_then(|name| name.strip_prefix("fleetctl "));
    name.unwrap_or(command.get_name()).to_owned()
}

/// The command of this name, or whose name is the only one to begin so. The original's commands
/// come before those added since, so that no new one takes a short form from an old script.
fn resolve<'a>(parent: &'a Command, name: &str) -> Result<&'a Command, Misuse> {
    let commands = || parent.get_subcommands();
    if let Some(command) = commands().find(|command| command.get_name() == name) {
        return Ok(command);
    }
    let of_prefix = |command: &&Command| !name.is_empty() && command.get_name().starts_with(name);
    let added = |command: &&Command| crate::cli::ADDED.contains(&command.get_name());
    let only = |mut fitting: Box<dyn Iterator<Item = &'a Command> + '_>| {
        let first = fitting.next();
        first.filter(|_| fitting.next().is_none())
    };
    let old = only(Box::new(commands().filter(of_prefix).filter(|command| !added(command))));
    let any = only(Box::new(commands().filter(of_prefix).filter(|command| !command.is_hide_set())));
    if let Some(command) = old.or(any) {
        return Ok(command);
    }
    let mut text = format!("unknown command {name:?} for {:?}", parent.get_bin_name().unwrap_or("fleetctl"));
    let mut close: Vec<&str> = commands()
        .filter(|command| !command.is_hide_set())
        .map(Command::get_name)
        .filter(|it| it.starts_with(name) || distance(it, name) <= 2)
        .collect();
    close.sort_unstable();
    if !close.is_empty() {
        text.push_str("\n\nDid you mean this?");
        close.iter().for_each(|it| text.push_str(&format!("\n\t{it}")));
        text.push('\n');
    }
    Err(misuse(None, text))
}

/// Reads the flag that begins with this argument, and its value from the next one if it has to.
fn read_flag<'a>(
    definition: &Command,
    command: Option<&Command>,
    argument: &str,
    rest: &mut impl Iterator<Item = &'a String>,
) -> Result<Flag, Misuse> {
    let dashes = if argument.starts_with("--") { 2 } else { 1 };
    let (written, mut value) = match argument[dashes..].split_once('=') {
        Some((name, value)) => (name, Some(value.to_owned())),
        None => (&argument[dashes..], None),
    };
    let mut written = written.to_owned();
    let named = |arg: &Arg, name: &str| {
        arg.get_long() == Some(name) || arg.get_all_aliases().unwrap_or_default().contains(&name)
    };
    // Old habits of the journal: there, -o is the form of the lines, as for journalctl.
    if written == "o" && command.is_some_and(|command| command.get_name() == "journal") {
        written = "output".to_owned();
    }
    let mut arg = find(definition, command, |arg| {
        named(arg, &written) || arg.get_short().is_some_and(|short| written == short.to_string())
    });
    if arg.is_none() && dashes == 1 {
        // -n5
        let mut chars = written.chars();
        let short = chars.next();
        let clustered = find(definition, command, |arg| short.is_some() && arg.get_short() == short);
        if let Some(it) = clustered.filter(|it| it.get_action().takes_values() && value.is_none()) {
            arg = Some(it);
            value = Some(chars.as_str().to_owned());
        }
    }
    let Some(arg) = arg else {
        let text = match (dashes, written.chars().next()) {
            (1, Some(first)) => format!("unknown shorthand flag: {first:?} in {argument}"),
            _ => format!("unknown flag: --{written}"),
        };
        return Err(misuse(command, text));
    };
    let name = arg.get_long().unwrap_or(&written).to_owned();
    // -h asks for the short help, --help for the long one.
    if name == "help" && written == "h" && value.is_none() {
        return Ok(Flag { name, value: Some("short".to_owned()) });
    }
    let optional = arg.get_num_args().is_some_and(|range| range.min_values() == 0);
    if value.is_none() && arg.get_action().takes_values() && !optional {
        match rest.next() {
            Some(next) => value = Some(next.clone()),
            None => return Err(misuse(command, format!("flag needs an argument: {argument}"))),
        }
    }
    Ok(Flag { name, value })
}

/// The flag of a command that is wanted; while the command is not known, of any that it may be.
fn find<'a>(
    definition: &'a Command,
    command: Option<&'a Command>,
    wanted: impl Fn(&Arg) -> bool,
) -> Option<&'a Arg> {
    fn all(command: &Command) -> Box<dyn Iterator<Item = &Arg> + '_> {
        Box::new(command.get_arguments().chain(command.get_subcommands().flat_map(all)))
    }
    all(command.unwrap_or(definition)).find(|arg| !arg.is_positional() && wanted(arg))
}

/// The global flags that are set by FLEETCTL_* variables; an empty variable sets nothing.
fn from_environment(
    definition: &Command,
    variable: impl Fn(&str) -> Option<String>,
    warn: &mut impl FnMut(String),
) -> Vec<Flag> {
    let mut flags = Vec::new();
    for arg in definition.get_arguments().filter(|arg| arg.is_global_set()) {
        let Some(name) = arg.get_long().filter(|name| *name != "version") else { continue };
        let aliases = arg.get_all_aliases().unwrap_or_default();
        let set = std::iter::once(name).chain(aliases).find_map(|name| {
            let key = format!("FLEETCTL_{}", name.to_uppercase().replace('-', "_"));
            variable(&key).filter(|value| !value.is_empty()).map(|value| (key, value))
        });
        let Some((key, value)) = set else { continue };
        let usable = if arg.get_action().takes_values() {
            arg.get_value_parser().type_id() == clap::builder::ValueParser::string().type_id()
                || accepted(definition, name, &value)
        } else {
            crate::values::boolean(&value).is_some()
        };
        if usable {
            flags.push(Flag { name: name.to_owned(), value: Some(value) });
        } else {
            warn(format!("WARNING: {key}={value} is ignored: no value for --{name}"));
        }
    }
    flags
}

/// Whether clap takes this value for this flag.
fn accepted(definition: &Command, name: &str, value: &str) -> bool {
    let line = ["fleetctl".to_owned(), "version".to_owned(), format!("--{name}={value}")];
    definition.clone().try_get_matches_from(line).is_ok()
}

/// Takes the values of switches into account: `--full=false` takes back an earlier `--full`.
fn settle(definition: &Command, command: Option<&Command>, flags: Vec<Flag>) -> Result<Vec<Flag>, Misuse> {
    let mut settled: Vec<Flag> = Vec::new();
    for flag in flags {
        let switch = find(definition, command, |arg| arg.get_long() == Some(&flag.name))
            .is_some_and(|arg| !arg.get_action().takes_values());
        let short_help = flag.name == "help" && flag.value.as_deref() == Some("short");
        match &flag.value {
            Some(value) if switch && !short_help => {
                settled.retain(|earlier| earlier.name != flag.name);
                match crate::values::boolean(value) {
                    Some(true) => settled.push(Flag { name: flag.name, value: None }),
                    Some(false) => {}
                    None => {
                        let name = &flag.name;
                        let reason = crate::values::no_boolean(value);
                        return Err(misuse(command, invalid(name, value, &reason)));
                    }
                }
            }
            _ => {
                if switch {
                    settled.retain(|earlier| earlier.name != flag.name);
                }
                settled.push(flag);
            }
        }
    }
    Ok(settled)
}

/// What is wrong with a command line that clap refused for the value of a flag, in the original's words; `None` when that is
/// not why. `line` is what clap was given.
pub(crate) fn bad_value(error: &clap::Error, definition: &Command, line: &[String]) -> Option<Misuse> {
    use clap::error::{ContextKind, ContextValue, ErrorKind};
    use std::error::Error;
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    if !matches!(error.kind(), ErrorKind::ValueValidation | ErrorKind::InvalidValue) {
        return None;
    }
    // `--lines <N>`
    let flag = text(ContextKind::InvalidArg)?.strip_prefix("--")?.split([' ', '=', '[']).next()?;
    let value = text(ContextKind::InvalidValue)?;
    let reason = match (error.source(), error.get(ContextKind::ValidValue)) {
        (Some(source), _) => match source.downcast_ref::<std::num::ParseIntError>() {
            Some(error) => crate::values::no_integer(value, error),
            None => source.to_string(),
        },
        (None, Some(ContextValue::Strings(known))) => format!("it is one of {}", known.join(", ")),
        _ => return None,
    };
    let mut command = None;
    for word in line.iter().skip(1) {
        match command.unwrap_or(definition).find_subcommand(word) {
            Some(found) => command = Some(found),
            None => break,
        }
    }
    Some(misuse(command, invalid(flag, value, &reason)))
}

fn invalid(flag: &str, value: &str, reason: &str) -> String {
    format!("invalid argument {value:?} for --{flag}={value}: {reason}")
}

fn misuse(command: Option<&Command>, text: String) -> Misuse {
    Misuse { text, command: command.map(full_name) }
}

/// How many characters have to be changed, added or left out (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let changed = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_environment(line: &str, environment: &[(&str, &str)]) -> Result<Invocation, Misuse> {
        let arguments: Vec<String> = line.split(' ').filter(|w| !w.is_empty()).map(str::to_owned).collect();
        let variable = |key: &str| {
            environment.iter().find(|(name, _)| *name == key).map(|(_, value)| (*value).to_owned())
        };
        normalise(&crate::cli::definition(), &arguments, variable, |_| {})
    }

    #[track_caller]
    fn run(line: &str, expected: &str) {
        match with_environment(line, &[]) {
            Ok(Invocation::Run(words)) => assert_eq!(words[1..].join(" "), expected, "{line}"),
            other => panic!("{line}: {other:?}"),
        }
    }

    #[track_caller]
    fn refused(line: &str) -> String {
        with_environment(line, &[]).expect_err(line).text
    }

    #[test]
    fn old_forms_of_flags() {
        run("list-units -l", "list-units --full");
        run("list-units --l", "list-units --full");
        run("list-units -full", "list-units --full");
        run("list-machines --full=false", "list-machines");
        run("list-machines --full --full=f", "list-machines");
        run("list-machines --full=T", "list-machines --full");
        run("-endpoint=http://a:1 list-units", "list-units --endpoint=http://a:1");
        run("--endpoint http://a:1 list-units", "list-units --endpoint=http://a:1");
        run("list-units -endpoint http://a:1", "list-units --endpoint=http://a:1");
        run("journal -f -lines=3 a", "journal --follow --lines=3 -- a");
        run("journal --f --lines -1 a", "journal --follow --lines=-1 -- a");
        run("journal -n5 a", "journal --lines=5 -- a");
        run("journal -o cat a", "journal --output=cat -- a");
        run("list-units -o json", "list-units --format=json");
        run("start --block-attempts 3 a b", "start --block-attempts=3 -- a b");
        run("stop a -no-block b", "stop --no-block -- a b");
        run("--no-block stop a", "stop --no-block -- a");
        run("submit -- -dash.service", "submit -- -dash.service");
        run("--etcd-keyfile=/x list-units", "list-units --key-file=/x");
        run("list-units --strict-host-key-checking=false", "list-units --strict-host-key-checking=false");
        run("list-units --strict-host-key-checking", "list-units --strict-host-key-checking");
        run("list-machines --fields=", "list-machines --fields=");
        run("submit -", "submit -- -");
    }

    #[test]
    fn commands_cut_short() {
        run("list-m", "list-machines");
        run("list-machine", "list-machines");
        run("list-unit-f", "list-unit-files");
        run("d a", "destroy -- a");
        assert_eq!(
            refused("list-u"),
            "unknown command \"list-u\" for \"fleetctl\"\n\nDid you mean this?\n\tlist-unit-files\n\tlist-units\n"
        );
        assert_eq!(
            refused("st"),
            "unknown command \"st\" for \"fleetctl\"\n\nDid you mean this?\n\tcat\n\tssh\n\tstart\n\tstatus\n\tstop\n"
        );
        assert_eq!(refused("bogus"), "unknown command \"bogus\" for \"fleetctl\"");
    }

    #[test]
    fn added_commands_take_no_short_form_away() {
        let definition = crate::cli::definition();
        for name in crate::cli::ADDED {
            assert!(definition.find_subcommand(name).is_some(), "{name}");
        }
        run("j a", "journal -- a");
        run("jo a", "journal -- a");
        run("c a", "cat -- a");
        run("joi l", "join-token list");
        run("m l", "machine list");
        run("ma list", "machine list");
    }

    #[test]
    fn commands_within_commands() {
        run("join-token create --ttl 24h --uses=1", "join-token create --ttl=24h --uses=1");
        run("join-token -ttl 24h create", "join-token create --ttl=24h");
        run("--ttl 24h join-token create", "join-token create --ttl=24h");
        run("--full machine list -o json", "machine list --full --format=json");
        run("machine metadata 4a1 disk=ssd region-", "machine metadata -- 4a1 disk=ssd region-");
        run("-- machine remove -x", "machine remove -- -x");
        assert_eq!(
            refused("machine"),
            "machine needs a command: list, remove, cordon, uncordon, drain, metadata"
        );
        assert_eq!(
            refused("machine --full"),
            "machine needs a command: list, remove, cordon, uncordon, drain, metadata"
        );
        assert_eq!(
            refused("machine lst"),
            "unknown command \"lst\" for \"fleetctl machine\"\n\nDid you mean this?\n\tlist\n"
        );
        assert_eq!(refused("machine --ttl=1h list"), "unknown flag: --ttl");
        assert_eq!(refused("--ttl=1h machine list"), "unknown flag: --ttl");
        let misuse = with_environment("machine list --bogus", &[]).unwrap_err();
        assert_eq!(misuse.command.as_deref(), Some("machine list"));
    }

    #[test]
    fn what_follows_the_machine_is_untouched() {
        run("ssh c93b ls -la --full /x", "ssh -- c93b ls -la --full /x");
        run("ssh -A c93b -- ls", "ssh --forward-agent -- c93b -- ls");
        run("ssh --machine=c93 ls -la", "ssh --machine=c93 -- ls -la");
        run("ssh --unit a --ssh-port=2222 id -un", "ssh --unit=a --ssh-port=2222 -- id -un");
        run("ssh -m c93 -- ls -d -- /", "ssh --machine=c93 -- ls -d -- /");
    }

    #[test]
    fn misuse_is_told_in_the_originals_words() {
        assert_eq!(refused("--bogus"), "unknown flag: --bogus");
        assert_eq!(refused("--bogus list-machines"), "unknown flag: --bogus");
        assert_eq!(refused("list-machines --bogus"), "unknown flag: --bogus");
        assert_eq!(refused("list-machines -x"), "unknown shorthand flag: 'x' in -x");
        assert_eq!(refused("restart --no-block a"), "unknown flag: --no-block");
        assert_eq!(refused("--no-block restart a"), "unknown flag: --no-block");
        assert_eq!(refused("list-machines --fields"), "flag needs an argument: --fields");
        assert_eq!(refused("--endpoint"), "flag needs an argument: --endpoint");
        assert_eq!(
            refused("list-machines --full=maybe"),
            "invalid argument \"maybe\" for --full=maybe: strconv.ParseBool: parsing \"maybe\": invalid syntax"
        );
    }

    #[test]
    fn bad_values_are_told_in_the_originals_words() {
        use clap::Parser;
        let refused = |line: &str| {
            let Ok(Invocation::Run(words)) = with_environment(line, &[]) else { panic!("{line}") };
            let error = crate::cli::Cli::try_parse_from(&words).unwrap_err();
            let misuse = bad_value(&error, &crate::cli::definition(), &words).unwrap();
            (misuse.text, misuse.command.unwrap())
        };
        for (line, text, command) in [
            (
                "journal --lines=all a",
                "invalid argument \"all\" for --lines=all: strconv.ParseInt: parsing \"all\": invalid syntax",
                "journal",
            ),
            (
                "start --block-attempts 99999999999999999999 a",
                "invalid argument \"99999999999999999999\" for --block-attempts=99999999999999999999: \
                 strconv.ParseInt: parsing \"99999999999999999999\": value out of range",
                "start",
            ),
            (
                "status --ssh-port=x a",
                "invalid argument \"x\" for --ssh-port=x: strconv.ParseInt: parsing \"x\": invalid syntax",
                "status",
            ),
            (
                "--request-timeout=x list-units",
                "invalid argument \"x\" for --request-timeout=x: strconv.ParseFloat: parsing \"x\": invalid syntax",
                "list-units",
            ),
            (
                "--strict-host-key-checking=maybe list-units",
                "invalid argument \"maybe\" for --strict-host-key-checking=maybe: strconv.ParseBool: parsing \"maybe\": invalid syntax",
                "list-units",
            ),
            (
                "start --timeout=soon a",
                "invalid argument \"soon\" for --timeout=soon: a duration is expected, such as 90s, 1m30s or 0",
                "start",
            ),
            (
                "list-units --format=xml",
                "invalid argument \"xml\" for --format=xml: it is one of text, json",
                "list-units",
            ),
            (
                "user create ann --role=king",
                "invalid argument \"king\" for --role=king: it is one of viewer, operator, admin",
                "user create",
            ),
        ] {
            assert_eq!(refused(line), (text.to_owned(), command.to_owned()), "{line}");
        }
    }

    /// What `fleetctl help` of 1.0.0 lists: global flags, then those of each command; `=`: with a value.
    #[test]
    fn every_flag_of_the_original_is_taken() {
        use clap::Parser;
        const GLOBAL: &str = "ca-file= cert-file= debug driver=API endpoint=http://x:1 etcd-cafile= etcd-certfile= \
            etcd-key-prefix= etcd-keyfile= experimental-api key-file= known-hosts-file= request-timeout=1.5 ssh-timeout=1.5 \
            ssh-username= strict-host-key-checking tunnel=";
        const OF_COMMANDS: [(&str, &str); 14] = [
            ("cat", ""),
            ("destroy", "block-attempts=1 no-block"),
            ("journal", "f follow lines=1 output=cat ssh-port=1 sudo"),
            ("list-machines", "fields=ip full l no-legend"),
            ("list-unit-files", "fields=unit full no-legend"),
            ("list-units", "fields=unit full l no-legend"),
            ("load", "block-attempts=1 no-block replace sign"),
            ("restart", "block-attempts=1"),
            ("ssh", "forward-agent A machine=1 ssh-port=1 unit=a"),
            ("start", "block-attempts=1 no-block replace sign"),
            ("status", "ssh-port=1"),
            ("stop", "block-attempts=1 no-block"),
            ("submit", "replace sign"),
            ("unload", "block-attempts=1 no-block"),
        ];
        let taken = |line: &str, environment: &[(&str, &str)]| match with_environment(line, environment) {
            Ok(Invocation::Run(words)) => drop(crate::cli::Cli::try_parse_from(words).expect(line)),
            other => panic!("{line}: {other:?}"),
        };
        let globals = [("list-units", GLOBAL)];
        for (command, flags) in OF_COMMANDS.into_iter().chain(globals) {
            for flag in flags.split_whitespace() {
                let flag = if flag.ends_with('=') { format!("{flag}x") } else { flag.to_owned() };
                taken(&format!("-{flag} {command} a"), &[]);
                taken(&format!("{command} --{} a", flag.replacen('=', " ", 1)), &[]);
            }
        }
        for flag in GLOBAL.split_whitespace() {
            let (name, value) = flag.split_once('=').unwrap_or((flag, "true"));
            let value = if value.is_empty() { "x" } else { value };
            let variable = format!("FLEETCTL_{}", name.to_uppercase().replace('-', "_"));
            let expected = format!("--{}", argument_of(name));
            let Ok(Invocation::Run(words)) = with_environment("list-units", &[(&variable, value)]) else {
                panic!("{variable}");
            };
            assert!(words.iter().any(|word| word.starts_with(&expected)), "{variable}: {words:?}");
        }
    }

    /// The long name of the argument that a flag stands for.
    fn argument_of(name: &str) -> String {
        let definition = crate::cli::definition();
        let named = |arg: &&Arg| {
            arg.get_long() == Some(name) || arg.get_all_aliases().unwrap_or_default().contains(&name)
        };
        definition.get_arguments().find(named).and_then(Arg::get_long).expect(name).to_owned()
    }

    #[test]
    fn help_and_version() {
        let help = |line: &str| match with_environment(line, &[]) {
            Ok(Invocation::Help { command, long }) => (command, long),
            other => panic!("{line}: {other:?}"),
        };
        assert_eq!(help(""), (None, false));
        assert_eq!(help("-h"), (None, false));
        assert_eq!(help("--help"), (None, true));
        assert_eq!(help("start --h"), (Some("start".into()), false));
        assert_eq!(help("-help start"), (Some("start".into()), true));
        assert_eq!(help("help"), (None, true));
        assert_eq!(help("help list-m"), (Some("list-machines".into()), true));
        assert_eq!(help("machine --help"), (Some("machine".into()), true));
        assert_eq!(help("machine list -h"), (Some("machine list".into()), false));
        assert_eq!(help("help join-token create more"), (Some("join-token create".into()), true));
        assert_eq!(help("help start stop"), (Some("start".into()), true));
        for line in ["--version", "-v", "-version", "--version list-machines"] {
            assert_eq!(with_environment(line, &[]), Ok(Invocation::Version), "{line}");
        }
        run("list-machines --version", "list-machines --version");
    }

    #[test]
    fn the_environment_comes_before_flags() {
        let run = |line: &str, environment: &[(&str, &str)]| match with_environment(line, environment) {
            Ok(Invocation::Run(words)) => words[1..].join(" "),
            other => format!("{other:?}"),
        };
        let endpoint = [("FLEETCTL_ENDPOINT", "http://a:1")];
        assert_eq!(run("list-units", &endpoint), "list-units --endpoint=http://a:1");
        assert_eq!(
            run("list-units --endpoint=http://b:1", &endpoint),
            "list-units --endpoint=http://a:1 --endpoint=http://b:1"
        );
        assert_eq!(run("list-units", &[("FLEETCTL_ENDPOINT", "")]), "list-units");
        assert_eq!(run("list-units", &[("FLEETCTL_DEBUG", "true")]), "list-units --debug");
        assert_eq!(run("list-units --debug=false", &[("FLEETCTL_DEBUG", "true")]), "list-units");
        for ignored in ["FLEETCTL_FULL", "FLEETCTL_NO_LEGEND", "FLEETCTL_VERSION"] {
            assert_eq!(run("list-units", &[(ignored, "true")]), "list-units");
        }
        let unusable = [("FLEETCTL_DEBUG", "notabool"), ("FLEETCTL_REQUEST_TIMEOUT", "x")];
        assert_eq!(run("list-units", &unusable), "list-units");
        assert_eq!(
            run("list-units", &[("FLEETCTL_STRICT_HOST_KEY_CHECKING", "false")]),
            "list-units --strict-host-key-checking=false"
        );
        assert_eq!(
            with_environment("list-units", &[("FLEETCTL_HELP", "true")]),
            Ok(Invocation::Help { command: Some("list-units".into()), long: true })
        );
    }

    /// A flag before the command is read before the command is known: so all flags of one name
    /// must either take a value, or not.
    #[test]
    fn flags_of_one_name_are_of_one_kind() {
        let definition = crate::cli::definition();
        let mut kinds = std::collections::BTreeMap::new();
        let nested = definition.get_subcommands().flat_map(Command::get_subcommands);
        for arg in definition.get_subcommands().chain(nested).flat_map(Command::get_arguments) {
            if let Some(name) = arg.get_long() {
                let kind = arg.get_action().takes_values();
                assert_eq!(*kinds.entry(name.to_owned()).or_insert(kind), kind, "--{name}");
            }
        }
    }

    #[test]
    fn the_definition_is_sound() {
        crate::cli::definition().debug_assert();
    }
}
