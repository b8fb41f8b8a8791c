//! The help of every command, as a snapshot: a change to it is a decision.
use super::*;

#[test]
fn help_of_every_command() {
    let mut definition = definition().term_width(100);
    insta::assert_snapshot!("help", definition.render_help().to_string());
    for command in definition.get_subcommands_mut() {
        snapshot(command, "help");
    }
}

fn snapshot(command: &mut clap::Command, above: &str) {
    let name = format!("{above}-{}", command.get_name());
    let mut shown = command.clone().term_width(100);
    let both = format!("{}\n=== long ===\n{}", shown.render_help(), shown.render_long_help());
    insta::assert_snapshot!(name.clone(), both);
    for command in command.get_subcommands_mut() {
        snapshot(command, &name);
    }
}

#[test]
fn values_are_checked() {
    let parse = |line: &str| Cli::try_parse_from(line.split(' '));
    let timeout = |line: &str| match parse(line) {
        Ok(Cli { command: Command::Start(start), .. }) => start.patience.timeout,
        other => panic!("{line}: {other:?}"),
    };
    assert_eq!(timeout("fleetctl start --timeout=1m30s -- a"), Some(Duration::from_secs(90)));
    assert_eq!(timeout("fleetctl start --timeout=0 -- a"), Some(Duration::ZERO));
    assert_eq!(timeout("fleetctl start -- a"), None);
    for line in [
        "fleetctl start --timeout=soon -- a",
        "fleetctl start --block-attempts=x -- a",
        "fleetctl journal --lines=all -- a",
        "fleetctl list-units --request-timeout=0",
        "fleetctl list-units --request-timeout=inf",
        "fleetctl list-units --strict-host-key-checking=maybe",
        "fleetctl list-units --format=yaml",
        "fleetctl join-token create --ttl=0",
        "fleetctl join-token create --ttl=24",
        "fleetctl join-token create --ttl=-1h",
        "fleetctl join-token create --ttl=1d",
        "fleetctl join-token create --uses=0",
        "fleetctl join-token create --uses=-1",
    ] {
        assert!(parse(line).is_err(), "{line}");
    }
    assert!(parse("fleetctl start --block-attempts=-1 -- a").is_ok());
    match parse("fleetctl join-token create --ttl=1h30m --uses=2").map(|cli| cli.command) {
        Ok(Command::JoinToken(JoinToken::Create(CreateJoinToken { ttl, uses }))) => {
            assert_eq!((ttl.as_deref(), uses), (Some("1h30m"), Some(2)));
        }
        other => panic!("{other:?}"),
    }
}
