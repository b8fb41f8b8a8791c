//! fleetd, the daemon of fleet.

use fleetd::{config::Flags, daemon};
use std::process::ExitCode;

fn main() -> ExitCode {
    let flags = match Flags::from_args(std::env::args_os()) {
        Ok(flags) => flags,
        Err(error) => error.exit(),
    };
    match daemon::run(&flags) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fleetd: {error:#}");
            ExitCode::FAILURE
        }
    }
}
