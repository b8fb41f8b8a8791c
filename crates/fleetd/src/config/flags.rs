//! The command line of fleetd.
//!
//! The original took its flags with one dash or two (`-config FILE`, `--config FILE`) and `version` as a word;
//! so does this.
use super::Secret;
use clap::{CommandFactory, Parser, Subcommand, error::ErrorKind};
use std::{ffi::OsString, path::PathBuf};

/// fleetd, the daemon of fleet: it runs on every machine of a cluster, hands units to the machine's systemd, and
/// serves the API that fleetctl talks to. It is configured by a file and by FLEET_* variables.
#[derive(Clone, Debug, Default, Parser)]
#[command(
    name = "fleetd",
    version = concat!("version ", env!("CARGO_PKG_VERSION")),
    disable_help_subcommand = true
)]
pub struct Flags {
    /// Configuration file; without this flag /etc/fleet/fleet.conf, if it is there
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Be an agent of the server(s) at these addresses (the option join)
    #[arg(long, value_name = "ADDRESS")]
    pub join: Option<String>,
    /// The token to join with, once (the option join_token)
    #[arg(long, value_name = "TOKEN")]
    pub join_token: Option<Secret>,
    /// Set an option of the configuration, over the file and the environment (may be repeated)
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<Secret>,
    /// What to do instead of running the daemon
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What fleetd does besides being a daemon.
#[derive(Clone, Debug, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// Look after the registry of this machine's server, while fleetd is stopped
    #[command(subcommand)]
    Registry(RegistryCommand),
    /// Stop units with OnIsolation=stop when fleetd can't (run by fleet-guard.service)
    Guard,
}

/// What can be done with the registry.
#[derive(Clone, Debug, PartialEq, Eq, Subcommand)]
pub enum RegistryCommand {
    /// Write all that lasts in the registry to a file: the one that the configuration names, embedded or in etcd
    #[command(
        long_about = "Write all that lasts in the registry to a file: the one that the configuration names, embedded or in \
        etcd.\n\nUnits, desired states and places, what was said of machines, members, users, join tokens, and the cluster's CA with \
        its key: whoever reads the file has the cluster. Only root can read it."
    )]
    Export {
        /// The file, or - for standard output
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Make the registry what a file says that was exported, and touch no unit that runs
    #[command(
        long_about = "Make the registry what a file says that was exported, and touch no unit that runs.\n\nThe registry that the \
        configuration names, embedded or in etcd, has to be empty, or what the file says already. An import that was cut off is \
        completed by repeating it; until then servers on that registry decide nothing."
    )]
    Import {
        /// The file, or - for standard input
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// Take away what the registry has and the file does not say
        #[arg(long)]
        replace: bool,
    },
    /// Read all of an embedded registry and say whether it is sound
    Check {
        /// The state directory; by default the one of the configuration
        #[arg(value_name = "DIR")]
        directory: Option<PathBuf>,
    },
    /// Repair a damaged embedded registry, keeping the damaged file beside it
    Repair {
        /// The state directory; by default the one of the configuration
        #[arg(value_name = "DIR")]
        directory: Option<PathBuf>,
    },
}

impl Flags {
    /// Reads a command line, program name first. The error is also how `--version` and `--help` end: it knows its
    /// stream and exit code (`exit()`).
    pub fn from_args(args: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        Self::try_parse_from(normalised(args)).map_err(|error| match error.kind() {
            ErrorKind::InvalidSubcommand | ErrorKind::UnknownArgument if names_a_word(&error) => {
                Self::command().error(
                    error.kind(),
                    "fleetd takes no such argument. Did you mean to invoke fleetctl instead?",
                )
            }
            _ => error,
        })
    }
}

/// Whether what was refused is a word, not a flag.
fn names_a_word(error: &clap::Error) -> bool {
    use clap::error::{ContextKind, ContextValue};
    let refused = error.get(ContextKind::InvalidSubcommand).or_else(|| error.get(ContextKind::InvalidArg));
    matches!(refused, Some(ContextValue::String(word)) if !word.starts_with('-'))
}

/// The same command line with two dashes before every long flag, and `--version` for the word `version`.
fn normalised(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut args = args.into_iter();
    let mut out: Vec<OsString> = args.next().into_iter().collect();
    while let Some(arg) = args.next() {
        let text = arg.to_str().unwrap_or("");
        if text == "version" {
            out.push("--version".into());
            break;
        }
        if text == "--" || !text.starts_with('-') {
            // Words follow, which have no dashes to mend.
            out.push(arg);
            break;
        }
        let name = text.trim_start_matches('-').split('=').next().unwrap_or("");
        let known = matches!(name, "config" | "set" | "version" | "help");
        if known && !text.starts_with("--") {
            out.push(format!("-{text}").into());
        } else {
            out.push(arg.clone());
        }
        if matches!(name, "config" | "set") && !text.contains('=') {
            out.extend(args.next());
        }
    }
    out.extend(args);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(args: &[&str]) -> Result<Flags, clap::Error> {
        Flags::from_args(std::iter::once("fleetd").chain(args.iter().copied()).map(OsString::from))
    }

    #[test]
    fn the_definition_is_sound() {
        Flags::command().debug_assert();
    }

    #[test]
    fn one_dash_or_two() {
        for args in [
            &["-config", "/x.conf"][..],
            &["--config", "/x.conf"],
            &["-config=/x.conf"],
            &["--config=/x.conf"],
            &["-set", "metadata=-config", "-config", "/x.conf"],
        ] {
            assert_eq!(flags(args).unwrap().config, Some("/x.conf".into()), "{args:?}");
        }
        assert_eq!(flags(&["-config", "version"]).unwrap().config, Some("version".into()));
        assert_eq!(flags(&[]).unwrap().config, None);
    }

    #[test]
    fn version_in_every_form() {
        for args in [&["--version"][..], &["-version"], &["version"], &["-config", "x", "version"]] {
            let error = flags(args).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::DisplayVersion);
            assert_eq!(error.exit_code(), 0);
            assert_eq!(error.to_string(), format!("fleetd version {}\n", env!("CARGO_PKG_VERSION")));
        }
    }

    #[test]
    fn the_registry_commands() {
        let command = |args: &[&str]| flags(args).unwrap().command.unwrap();
        assert_eq!(
            command(&["registry", "check"]),
            Command::Registry(RegistryCommand::Check { directory: None })
        );
        assert_eq!(
            command(&["-config", "x", "registry", "repair", "/d"]),
            Command::Registry(RegistryCommand::Repair { directory: Some("/d".into()) })
        );
        assert_eq!(
            command(&["registry", "import", "--replace", "-"]),
            Command::Registry(RegistryCommand::Import { file: "-".into(), replace: true })
        );
        assert!(flags(&["registry", "export"]).is_err());
        assert!(flags(&["registry"]).is_err());
        assert!(flags(&["registry", "drop"]).is_err());
    }

    #[test]
    fn a_word_for_fleetctl_is_pointed_there() {
        let error = flags(&["list-units"]).unwrap_err();
        assert_ne!(error.exit_code(), 0);
        assert!(error.to_string().contains("Did you mean to invoke fleetctl instead?"), "{error}");
        let error = flags(&["--frobnicate"]).unwrap_err();
        assert!(error.to_string().contains("--frobnicate"), "{error}");
    }

    #[test]
    fn settings_are_not_shown_by_debug() {
        let flags = flags(&["--set", "etcd_password=hunter2"]).unwrap();
        assert!(!format!("{flags:?}").contains("hunter2"));
    }
}
