//! registry: accepting, exporting and importing the registry itself.
use super::servers::fail;
use crate::cli::Registry;
use crate::context::{Context, print, print_json, print_line, words};
use anyhow::Result;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// The name for standard input and output.
const STANDARD: &str = "-";

/// Carries out a command about the registry itself.
pub(crate) async fn run(context: &Context, command: Registry) -> Result<i32> {
    match command {
        Registry::Accept(args) if !args.yes => {
            eprintln!(
                "The registry in etcd is not the one that was there before. What it has is taken for what is wanted: units that it does \
                 not know are stopped where they run. Look at it first; then: fleetctl registry accept --yes"
            );
            Ok(1)
        }
        Registry::Accept(_) => match context.client.accept_registry().await {
            Ok(()) => {
                print_line("Accepted the registry as it is")?;
                Ok(0)
            }
            Err(error) => Ok(fail(context, "Error accepting the registry: ", &error)),
        },
        Registry::Export(args) => export(context, &args.file).await,
        Registry::Import(args) => import(context, &args.file, args.replace).await,
    }
}

async fn export(context: &Context, file: &Path) -> Result<i32> {
    let bytes = match context.client.export_registry().await {
        Ok(bytes) => bytes,
        Err(error) => return Ok(fail(context, "Error exporting the registry: ", &error)),
    };
    if file == Path::new(STANDARD) {
        print(&bytes)?;
    } else if let Err(error) = write(file, &bytes) {
        eprintln!("Error exporting the registry: write {}: {}", file.display(), words(&error));
        return Ok(1);
    }
    eprintln!("The key of the cluster's CA is in it: whoever reads it has the cluster.");
    Ok(0)
}

/// Writes a file that only its owner can read; it is there whole or not at all.
fn write(file: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut new = file.as_os_str().to_owned();
    new.push(format!(".{}.new", std::process::id()));
    let new = Path::new(&new);
    let written =
        std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(new).and_then(|mut out| {
            out.write_all(bytes)?;
            out.sync_all()?;
            std::fs::rename(new, file)
        });
    if written.is_err() {
        // What was written so far is of no use.
        let _ = std::fs::remove_file(new);
    }
    written
}

async fn import(context: &Context, file: &Path, replace: bool) -> Result<i32> {
    let mut bytes = Vec::new();
    let read = match file == Path::new(STANDARD) {
        true => std::io::stdin().lock().read_to_end(&mut bytes),
        false => std::fs::File::open(file).and_then(|mut file| file.read_to_end(&mut bytes)),
    };
    if let Err(error) = read {
        eprintln!("Error importing the registry: read {}: {}", file.display(), words(&error));
        return Ok(1);
    }
    match context.client.import_registry(bytes, replace).await {
        Ok(done) if context.json() => print_json(&done)?,
        Ok(done) => {
            print_line(&format!(
                "The registry has the {} records of the file ({} changed)",
                done.records, done.changed
            ))?;
        }
        Err(error) => return Ok(fail(context, "Error importing the registry: ", &error)),
    }
    Ok(0)
}
