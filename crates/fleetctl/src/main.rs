//! fleetctl, the command line of fleet.
//!
//! [`argv`] brings the command line into one form, [`cli`] defines it, [`commands`] carry it out
//! with the client of `fleet_api`. Results go to stdout, all else to stderr; the exit code is 0 when
//! what was asked for came about, 2 when it made no sense, 130 after Ctrl-C, the exit code of what
//! ran elsewhere for status, journal and ssh, and otherwise 1.
mod argv;
mod cli;
mod commands;
mod completion;
mod context;
mod copies;
mod dates;
mod logs;
mod source;
mod ssh;
mod table;
mod values;
mod wait;

use argv::Invocation;
use clap::Parser;
use cli::{Cli, Command, Format};
use commands::bring::{self, Bring};
use commands::{
    explain, forward, join_token, journal, list, machine, registry, servers, show, status, take, user,
};
use context::{Context, MISUSE};
use source::Verb;
use std::process::ExitCode;

fn main() -> ExitCode {
    completion::answer();
    let code = run().unwrap_or_else(|error| {
        // Whoever read our output has gone: nothing more is wanted.
        let pipe = error.downcast_ref::<std::io::Error>();
        if pipe.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe) {
            return 0;
        }
        eprintln!("fleetctl: {error:#}");
        1
    });
    ExitCode::from(u8::try_from(code & 0xff).unwrap_or(1))
}

fn run() -> anyhow::Result<i32> {
    let mut arguments = Vec::new();
    for argument in std::env::args_os().skip(1) {
        match argument.into_string() {
            Ok(argument) => arguments.push(argument),
            Err(argument) => {
                eprintln!("Error: the argument {argument:?} is not UTF-8");
                return Ok(MISUSE);
            }
        }
    }
    let variable = |name: &str| std::env::var(name).ok();
    let definition = cli::definition();
    match argv::normalise(&definition, &arguments, variable, |line| eprintln!("{line}")) {
        Err(misuse) => Ok(refuse(misuse)),
        Ok(Invocation::Version) => show::show_version(false),
        Ok(Invocation::Help { command, long }) => help(command.as_deref(), long),
        Ok(Invocation::Run(line)) => match Cli::try_parse_from(&line) {
            Ok(cli) => execute(cli),
            Err(error) => {
                if let Some(misuse) = argv::bad_value(&error, &definition, &line) {
                    return Ok(refuse(misuse));
                }
                error.print()?;
                Ok(MISUSE)
            }
        },
    }
}

/// Says what is wrong with the command line, and where to find help.
fn refuse(misuse: argv::Misuse) -> i32 {
    let help = misuse.command.map(|command| format!(" {command}")).unwrap_or_default();
    eprintln!("Error: {}", misuse.text);
    eprintln!("Run 'fleetctl{help} --help' for usage.");
    MISUSE
}

/// Prints the help of a command (`machine list`), or of all.
fn help(command: Option<&str>, long: bool) -> anyhow::Result<i32> {
    let mut definition = cli::definition();
    let mut words = command.unwrap_or_default().split_whitespace();
    let topic = words.try_fold(&mut definition, |command, word| command.find_subcommand_mut(word));
    if let Some(topic) = topic {
        let text = if long { topic.render_long_help() } else { topic.render_help() };
        use std::io::Write;
        write!(anstream::stdout(), "{}", text.ansi())?;
    }
    Ok(0)
}

fn execute(cli: Cli) -> anyhow::Result<i32> {
    // What needs no cluster.
    match &cli.command {
        Command::Completion { shell } => return completion::script(*shell),
        Command::Man { directory } => return show::man(directory),
        Command::Help { command } => return help(command.as_deref(), true),
        _ => {}
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let code = runtime.block_on(with_cluster(cli));
    // A read of stdin that is under way (fd-forward) cannot be stopped; nobody waits for it.
    runtime.shutdown_background();
    code
}

async fn with_cluster(cli: Cli) -> anyhow::Result<i32> {
    if let Command::FdForward { socket } = &cli.command {
        return forward::run(socket).await;
    }
    let json = cli.globals.format == Format::Json;
    let context = match Context::new(cli.globals) {
        Ok(context) => context,
        Err(text) => {
            eprintln!("Unable to initialize client: {text}");
            return Ok(1);
        }
    };
    let context = &context;
    match cli.command {
        Command::ListMachines(args) => list::machines(context, &args).await,
        Command::ListUnits(args) => list::units(context, &args).await,
        Command::ListUnitFiles(args) => list::unit_files(context, &args).await,
        Command::Cat(args) => show::cat(context, &args.unit).await,
        Command::Submit(args) => {
            let bring = Bring {
                verb: Verb::Submit,
                replace: args.replace.replace,
                no_block: true,
                patience: cli::Patience { block_attempts: 0, timeout: None },
                units: args.units,
            };
            bring::run(context, bring).await
        }
        Command::Load(args) => bring::run(context, Bring::of(Verb::Load, args)).await,
        Command::Start(args) => bring::run(context, Bring::of(Verb::Start, args)).await,
        Command::Restart(args) => take::restart(context, args.patience, args.units).await,
        Command::Status(args) => status::run(context, &args).await,
        Command::Journal(args) => journal::run(context, &args).await,
        Command::Ssh(args) => ssh::run(context, args).await,
        Command::Stop(args) => take::stop(context, args).await,
        Command::Unload(args) => take::unload(context, args).await,
        Command::Destroy(args) => take::destroy(context, args).await,
        Command::Explain(args) => explain::run(context, &args.units).await,
        Command::JoinToken(command) => join_token::run(context, command).await,
        Command::Servers(args) => servers::run(context, &args).await,
        Command::Registry(command) => registry::run(context, command).await,
        Command::Machine(command) => machine::run(context, command).await,
        Command::User(command) => user::run(context, command).await,
        Command::Verify(_) => Ok(show::verify()),
        Command::Version(_) => show::show_version(json),
        Command::Help { .. }
        | Command::FdForward { .. }
        | Command::Completion { .. }
        | Command::Man { .. } => Ok(0),
    }
}
