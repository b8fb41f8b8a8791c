//! The golden suite: every command of the transcripts of fleet 1.0.0 in `golden/`, typed again on a cluster of the same
//! shape with our fleetd and fleetctl, must answer the same. What differs on purpose is in `golden/deviations.txt` and, in
//! words, in docs/COMPATIBILITY.md; nothing is left out. `FLEET_E2E_LAYOUT=classic` makes the cluster as that of the recordings was: all
//! machines are servers on etcd.
//!
//! `FLEET_GOLDEN_WRITE=DIRECTORY` writes what differs into files there, in the form of the table.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod compare;
mod deviations;
mod stage;
mod transcript;

use anyhow::{Context, Result, bail};
use compare::{normalised, same};
use deviations::Deviation;
use stage::Stage;
use std::path::Path;
use std::time::{Duration, Instant};
use transcript::{Answer, Case, Exit};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/golden");

fn read(file: &str) -> Result<String> {
    let path = Path::new(GOLDEN).join(file);
    std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
}

/// Whether a command only looks: then it is repeated until it sees what is recorded, for states follow a command.
fn looks(command: &str) -> bool {
    const LOOKERS: [&str; 14] = [
        "fleetctl list-",
        "fleetctl status",
        "fleetctl journal",
        "fleetctl cat",
        "curl -i -X GET",
        "systemctl is-active",
        "systemctl show",
        "systemctl status",
        "systemctl list-units",
        "ls ",
        "cat ",
        "journalctl ",
        "find ",
        "stat ",
    ];
    command.split(';').all(|part| LOOKERS.iter().any(|looker| part.trim().starts_with(looker)))
}

/// Whether a unit that is expected to fail was running yet when fleetctl was told of its start. For `Type=simple` systemd's job is done before
/// the program is executed, and so it depends on how busy the machine is what comes first: then it is started anew.
fn ended_late(case: &Case, expected: &Answer, answer: &Answer) -> bool {
    case.command.starts_with("fleetctl start ")
        && expected.stderr.contains("it has failed")
        && answer.exit == Exit::Code(0)
        && answer.stdout.contains("launched on")
}

/// What a case answered, when that is not what was expected.
fn differs(
    stage: &Stage,
    case: &Case,
    deviation: Option<&Deviation>,
    patience: Duration,
) -> Result<Option<Answer>> {
    stage.prepare(case).with_context(|| format!("before case {}, $ {}", case.number, case.command))?;
    let expected = normalised(deviation.map_or(&case.recorded, |deviation| &deviation.answer));
    let end = Instant::now() + patience;
    loop {
        let answer = normalised(&stage.run(case, expected.exit)?);
        if same(&expected, &answer) {
            return Ok(None);
        }
        let again = looks(&case.command) || ended_late(case, &expected, &answer);
        if !again || Instant::now() > end {
            return Ok(Some(answer));
        }
        if !looks(&case.command) {
            stage.destroy(case)?;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn replay(transcript: &str, stage: Stage) -> Result<()> {
    let cases = transcript::parse(&read(&format!("{transcript}.txt"))?)?;
    let table = deviations::read(&read("deviations.txt")?)?;
    let write = std::env::var_os("FLEET_GOLDEN_WRITE");
    let patience = if write.is_some() { Duration::from_secs(3) } else { fleet_e2e::PATIENCE };
    let mut report = String::new();
    let mut entries = String::new();
    let layout = stage.layout();
    for case in &cases {
        let deviations = table.get(&(transcript.to_owned(), case.number));
        let deviation = deviations.into_iter().flatten().find(|deviation| deviation.holds(layout));
        if let Some(deviation) = deviation {
            deviation.check(case)?;
            if normalised(&deviation.answer) == normalised(&case.recorded) {
                bail!("{transcript} {}: no deviation any more, take it off the table", case.number);
            }
        }
        let answer = match differs(&stage, case, deviation, patience) {
            Ok(None) => continue,
            Ok(Some(answer)) => answer,
            // The others are worth knowing, too.
            Err(error) => {
                report += &format!("\n{transcript} {}: {error:#}\n", case.number);
                continue;
            }
        };
        if answer == normalised(&case.recorded) {
            report += &format!(
                "\n{transcript} {}: answers as the original does in the layout {layout}; take it off the table\n",
                case.number
            );
            continue;
        }
        entries += &deviations::entry(transcript, case, deviation, layout, &answer);
        let expected = normalised(deviation.map_or(&case.recorded, |deviation| &deviation.answer));
        report += &format!(
            "\n=== {transcript} {} ({}; {})\n$ {}\nexpected:\n{}answered:\n{}",
            case.number,
            case.heading,
            if deviation.is_some() { "a deviation" } else { "as the original" },
            case.command,
            expected.show(),
            answer.show()
        );
    }
    if let Some(directory) = write {
        let directory = Path::new(&directory);
        std::fs::write(directory.join(format!("{transcript}.txt")), entries)?;
        std::fs::write(directory.join(format!("{transcript}.report")), &report)?;
    }
    if !report.is_empty() {
        bail!("{report}");
    }
    Ok(())
}

macro_rules! transcripts {
    ($($name:ident $file:literal $stage:expr;)*) => {
        $(#[test]
        fn $name() -> Result<()> {
            replay($file, $stage?)
        })*

        const TRANSCRIPTS: &[&str] = &[$($file),*];
    };
}

transcripts! {
    globals "02-globals" Stage::up(false);
    list_machines "03-list-machines" Stage::up(false);
    submit "04-submit" Stage::up(false);
    unit_text "05-unit-text" Stage::up(false);
    load "06-load" Stage::up(false);
    start "07-start" Stage::up(false);
    list_units "08-list-units" Stage::up(false);
    stop_restart "09-stop-restart" Stage::up(false);
    destroy "10-destroy" Stage::up(false);
    status_journal "11-status-journal" Stage::up(false)?.with_ssh();
    ssh "12-ssh" Stage::up(true)?.with_ssh();
    node "16-node" Stage::up(false);
    api "19-api" Stage::up(false);
    metrics "21-metrics" Stage::up(false);
    config "23-config" Stage::up(false);
}

#[test]
fn no_transcript_is_left_out() -> Result<()> {
    let mut there: Vec<String> = Vec::new();
    for file in std::fs::read_dir(GOLDEN)? {
        let name = file?.file_name().to_string_lossy().into_owned();
        if let Some(name) = name.strip_suffix(".txt").filter(|name| *name != "deviations") {
            there.push(name.to_owned());
        }
    }
    there.sort();
    assert_eq!(there, TRANSCRIPTS);
    Ok(())
}

#[test]
fn deviations_are_of_recorded_cases_and_documented() -> Result<()> {
    let document = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/COMPATIBILITY.md");
    let document = std::fs::read_to_string(document).context("docs/COMPATIBILITY.md")?;
    let rows: Vec<&str> =
        document.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").next()).collect();
    let mut wrong = String::new();
    for ((transcript, number), deviations) in deviations::read(&read("deviations.txt")?)? {
        let cases = transcript::parse(&read(&format!("{transcript}.txt"))?)?;
        for deviation in deviations {
            match cases.get(number.wrapping_sub(1)) {
                None => wrong += &format!("{transcript} has no case {number}\n"),
                Some(case) => deviation.check(case)?,
            }
            if !rows.contains(&deviation.reason.as_str()) {
                let reason = &deviation.reason;
                wrong += &format!("{transcript} {number}: docs/COMPATIBILITY.md has no row {reason:?}\n");
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    Ok(())
}
