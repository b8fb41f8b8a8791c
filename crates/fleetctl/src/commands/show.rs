//! Commands that only show something: cat, version, man pages.
use crate::context::{Context, print, print_json, words};
use anyhow::Result;
use serde_json::json;
use std::path::Path;

/// What `fleetctl version` says.
pub(crate) fn version() -> String {
    format!("fleetctl version {}", env!("CARGO_PKG_VERSION"))
}

pub(crate) fn show_version(as_json: bool) -> Result<i32> {
    if as_json {
        print_json(&json!({"name": "fleetctl", "version": env!("CARGO_PKG_VERSION")}))?;
    } else {
        print(format!("{}\n", version()).as_bytes())?;
    }
    Ok(0)
}

/// `verify` does nothing since 1.0.
pub(crate) fn verify() -> i32 {
    eprintln!("Command \"verify\" is deprecated, DEPRECATED - No longer works");
    eprintln!("WARNING: The signed/verified units feature is DEPRECATED and cannot be used.");
    2
}

/// The file of a unit, byte for byte (golden/05-unit-text.txt).
pub(crate) async fn cat(context: &Context, arguments: &[String]) -> Result<i32> {
    let [argument] = arguments else {
        eprintln!("One unit file must be provided");
        return Ok(1);
    };
    let name = fleet_unit::name::from_argument(argument);
    let text = match context.client.unit(&name).await {
        Ok(None) => None,
        Ok(Some(_)) => match context.client.unit_file(&name).await {
            Ok(text) => text,
            Err(error) => return Ok(context.fail(&format!("Error retrieving Unit {name}: "), &error, "")),
        },
        Err(error) => return Ok(context.fail(&format!("Error retrieving Unit {name}: "), &error, "")),
    };
    let Some(text) = text else {
        eprintln!("Unit {name} not found");
        return Ok(1);
    };
    if context.json() {
        print_json(&json!({"name": name, "file": text}))?;
    } else {
        print(text.as_bytes())?;
    }
    Ok(0)
}

/// Writes fleetctl.1 and a page for every command.
pub(crate) fn man(directory: &Path) -> Result<i32> {
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(directory)?;
        clap_mangen::generate_to(crate::cli::definition(), directory)
    };
    if let Err(error) = write() {
        eprintln!("Cannot write man pages to {}: {}", directory.display(), words(&error));
        return Ok(1);
    }
    Ok(0)
}
