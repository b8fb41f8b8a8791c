//! The help of every command, as a snapshot: a change to it is a decision.
use super::*;

#[test]
fn help_of_every_command() {
    let mut definition = definition().term_width(100);
    insta::assert_snapshot!("help", definition.render_help().to_string());
    let names: Vec<String> = definition.get_subcommands().map(|it| it.get_name().to_owned()).collect();
    for name in names {
        let command = definition.find_subcommand_mut(&name).expect("it is listed");
        let mut command = std::mem::take(command).term_width(100);
        let both = format!("{}\n=== long ===\n{}", command.render_help(), command.render_long_help());
        insta::assert_snapshot!(format!("help-{name}"), both);
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
    ] {
        assert!(parse(line).is_err(), "{line}");
    }
    assert!(parse("fleetctl start --block-attempts=-1 -- a").is_ok());
}
