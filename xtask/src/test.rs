//! `cargo xtask test`: every check there is, ending at the first that fails. What CI runs.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

use crate::steps::{cargo, run as run_command, show, step, target_dir};
use crate::{licences, packages, sim};

/// Numbers of tests, from the lines in which test programs sum up.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl Counts {
    fn add(&mut self, line: &str) {
        let Some((_, counts)) = line.strip_prefix("test result: ").and_then(|rest| rest.split_once(". "))
        else {
            return;
        };
        for part in counts.split("; ") {
            let mut words = part.split_ascii_whitespace();
            let Some(number) = words.next().and_then(|n| n.parse::<u64>().ok()) else { continue };
            match words.next() {
                Some("passed") => self.passed += number,
                Some("failed") => self.failed += number,
                Some("ignored") => self.ignored += number,
                _ => {}
            }
        }
    }
}

/// End-to-end tests that are run once more with every machine a server on etcd: those that say most of it for their time. Commands of one
/// machine are in the transcripts, which are compared there, too. The others are about one server or its file, or find nothing that
/// these do not; CONTRIBUTING.md says how all are run.
const ON_ETCD: &[&str] = &[
    "api::events",
    "cluster::",
    "disturbance::units_outlive",
    "isolation::a_machine_without_a_network",
    "leaving::",
    "placement::",
    "users::users_reach",
    // Always with the registry of one server.
    "--skip=leaving::a_machine_removed_while_out_of_reach",
];

pub(crate) fn run() -> Result<()> {
    let start = Instant::now();
    step("packages", packages::ensure)?;
    step("root", fleet_testbed::check_prerequisites)?;
    step("format", || run_command(cargo(&["fmt", "--all", "--check"])))?;
    step("licences", licences::check)?;
    let clippy = ["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"];
    step("lints", || run_command(cargo(&clippy)))?;
    step("build", || run_command(cargo(&["build", "-p", "fleetd", "-p", "fleetctl"])))?;
    let bin_dir = target_dir()?.join("debug");
    // The simulator's are run with optimisation, below. One run tells of all that fails.
    let mut all = cargo(&["test", "--no-fail-fast", "--workspace", "--exclude", "fleet-sim"]);
    all.env("FLEET_BIN_DIR", &bin_dir);
    let mut counts = step("tests", || tests(all))?;
    let on_etcd = |test: &str, which: &[&str]| {
        let mut command = cargo(&["test", "-p", "fleet-e2e", "--test", test, "--"]);
        command.args(which).env("FLEET_BIN_DIR", &bin_dir).env("FLEET_E2E_LAYOUT", "classic");
        tests(command)
    };
    let again = step("tests on etcd", || on_etcd("e2e", ON_ETCD))?;
    let transcripts = step("transcripts on etcd", || on_etcd("golden", &[]))?;
    let simulated = step("simulation", || {
        let counts = tests(cargo(&["test", "--profile", "sim", "-p", "fleet-sim"]))?;
        sim::fresh().map(|()| counts)
    })?;
    for more in [again, transcripts, simulated] {
        counts.passed += more.passed;
        counts.ignored += more.ignored;
    }
    step("documentation", || {
        let mut doc = cargo(&["doc", "--workspace", "--no-deps"]);
        doc.env("RUSTDOCFLAGS", "-D warnings");
        run_command(doc)
    })?;
    println!(
        "All checks passed in {:.0} s: {} tests, {} ignored (`cargo deny check` would add advisories)",
        start.elapsed().as_secs_f64(),
        counts.passed,
        counts.ignored
    );
    Ok(())
}

/// Runs tests with their output shown, and counts them.
fn tests(mut command: Command) -> Result<Counts> {
    command.stdout(Stdio::piped());
    let shown = show(&command);
    println!("$ {shown}");
    let mut child = command.spawn().with_context(|| format!("cannot run `{shown}`"))?;
    let mut counts = Counts::default();
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).split(b'\n') {
            let line = line.context("cannot read the output of the tests")?;
            let line = String::from_utf8_lossy(&line);
            println!("{line}");
            counts.add(&line);
        }
    }
    let status = child.wait().context("cannot wait for the tests")?;
    if !status.success() {
        bail!("`{shown}` ended with {status}: {} passed, {} failed", counts.passed, counts.failed);
    }
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use super::Counts;

    #[test]
    fn summary_lines_are_counted() {
        let mut counts = Counts::default();
        counts.add(
            "test result: ok. 6 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 1s",
        );
        counts.add("test result: FAILED. 2 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out");
        counts.add("test a ... ok");
        assert_eq!(counts, Counts { passed: 8, failed: 3, ignored: 1 });
    }
}
