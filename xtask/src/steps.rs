//! Steps with names and times, and cargo as a child process.

use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// The project's directory.
pub(crate) fn root() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here)
}

/// Runs a named step, with a line before it and one with its time after it.
pub(crate) fn step<T>(name: &str, run: impl FnOnce() -> Result<T>) -> Result<T> {
    println!("==> {name}");
    let start = Instant::now();
    let result = run();
    let took = start.elapsed().as_secs_f64();
    match result {
        Ok(value) => {
            println!("==> {name}: done in {took:.1} s\n");
            Ok(value)
        }
        Err(error) => {
            println!("==> {name}: FAILED after {took:.1} s");
            Err(error.context(format!("step `{name}` failed")))
        }
    }
}

/// Runs a slow part of something that people watch: on a terminal one line that counts seconds, in a
/// pipe one line when it is done.
pub(crate) fn progress<T>(label: &str, run: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    let terminal = std::io::stdout().is_terminal();
    let (end, ended) = channel::<()>();
    let result = std::thread::scope(|scope| {
        if terminal {
            scope.spawn(move || {
                while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(Duration::from_secs(1)) {
                    print!("\r{label} … {} s", start.elapsed().as_secs());
                    // Only decoration: the line at the end does not depend on it.
                    let _ = std::io::stdout().flush();
                }
            });
            print!("{label} …");
            let _ = std::io::stdout().flush();
        }
        let result = run();
        drop(end);
        result
    });
    if terminal {
        print!("\r\x1b[K");
    }
    match result {
        Ok(value) => {
            println!("{label}: {:.1} s", start.elapsed().as_secs_f64());
            Ok(value)
        }
        Err(error) => Err(error.context(format!("{label} failed"))),
    }
}

/// cargo, in the project's directory, without input.
pub(crate) fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(root()).stdin(Stdio::null());
    command
}

/// Runs a program that must succeed, with its output shown.
pub(crate) fn run(mut command: Command) -> Result<()> {
    let shown = show(&command);
    println!("$ {shown}");
    let status = command.status().with_context(|| format!("cannot run `{shown}`"))?;
    if !status.success() {
        bail!("`{shown}` ended with {status}");
    }
    Ok(())
}

/// Runs a program that must succeed, and returns its standard output.
pub(crate) fn output(mut command: Command) -> Result<String> {
    let shown = show(&command);
    let output = command.output().with_context(|| format!("cannot run `{shown}`"))?;
    if !output.status.success() {
        bail!("`{shown}` ended with {}:\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    String::from_utf8(output.stdout).with_context(|| format!("`{shown}` wrote something that is no text"))
}

/// A command line as one would type it, the program without its directory.
pub(crate) fn show(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or(command.get_program());
    let words = std::iter::once(program).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// What cargo knows of the workspace; `--no-deps` in `args` leaves out the rest.
pub(crate) fn metadata(args: &[&str]) -> Result<serde_json::Value> {
    let mut command = cargo(&["metadata", "--format-version=1"]);
    command.args(args);
    serde_json::from_str(&output(command)?).context("cargo metadata wrote no JSON")
}

/// The directory that cargo builds into.
pub(crate) fn target_dir() -> Result<PathBuf> {
    let metadata = metadata(&["--no-deps"])?;
    let dir = metadata["target_directory"].as_str().context("cargo metadata names no target directory")?;
    Ok(dir.into())
}
