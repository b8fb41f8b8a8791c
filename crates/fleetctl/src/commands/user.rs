//! user: who may use the API over https.
use super::list::print_table;
use crate::cli::{CreateUser, ListUsers, Role, User};
use crate::context::{Context, misused, print_json, print_line, words};
use crate::dates;
use anyhow::Result;
use fleet_api::client::Error;
use fleet_api::types::{self, NewUser, UserRequest};
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use serde_json::json;
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const COLUMNS: [&str; 5] = ["name", "role", "created", "expires", "certificate"];

pub(crate) async fn run(context: &Context, command: User) -> Result<i32> {
    match command {
        User::Create(args) => create(context, args).await,
        User::List(args) => list(context, &args).await,
        User::Role { name, role } => set_role(context, &name, role).await,
        User::Remove { names } => remove(context, &names).await,
    }
}

/// A directory with a user's key, the certificate to come, and the cluster's CA.
struct Files {
    directory: PathBuf,
    request: String,
}

impl Files {
    /// Makes a key and stores it, before anybody is asked for a certificate. Only the request leaves this machine.
    fn prepare(directory: &Path) -> Result<Files, String> {
        let failed = |error: &dyn std::fmt::Display| format!("unable to make a key: {error}");
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|error| failed(&error))?;
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        let request = params.serialize_request(&key).map_err(|error| failed(&error))?;
        let request = request.pem().map_err(|error| failed(&error))?;
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(|error| format!("mkdir {}: {}", directory.display(), words(&error)))?;
        let files = Files { directory: directory.to_owned(), request };
        files.write("key.pem", &key.serialize_pem())?;
        Ok(files)
    }

    /// Writes a file that only its owner reads, and that is not there yet.
    fn write(&self, name: &str, text: &str) -> Result<(), String> {
        let path = self.directory.join(name);
        let write = || -> io::Result<()> {
            let mut file =
                std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()
        };
        write().map_err(|error| format!("write {}: {}", path.display(), words(&error)))
    }

    /// Takes the key away again, which no certificate was made for.
    fn give_up(&self) {
        let _ = std::fs::remove_file(self.directory.join("key.pem"));
    }
}

async fn create(context: &Context, args: CreateUser) -> Result<i32> {
    let files = match args.cert.as_deref().map(Files::prepare).transpose() {
        Ok(files) => files,
        Err(text) => {
            eprintln!("Error creating user {}: {text}", args.name);
            return Ok(1);
        }
    };
    let request = UserRequest {
        name: args.name.clone(),
        role: args.role.to_string(),
        ttl: args.ttl,
        request: files.as_ref().map(|files| files.request.clone()),
    };
    let made = match context.client.create_user(&request).await {
        Ok(made) => made,
        Err(error) => {
            if let Some(files) = files {
                files.give_up();
            }
            return Ok(fail(context, &format!("Error creating user {}: ", args.name), &error));
        }
    };
    // The token first: it is told only now, whatever becomes of the files.
    if context.json() {
        print_json(&made)?;
    } else {
        print_line(&made.token)?;
    }
    if let Some(files) = &files {
        let written =
            files.write("cert.pem", &made.certificate).and_then(|()| files.write("ca.pem", &made.ca));
        if let Err(text) = written {
            eprintln!("{text}");
            return Ok(1);
        }
    }
    if !context.json() && io::stdout().is_terminal() && io::stderr().is_terminal() {
        explain(&made, files.as_ref());
    }
    Ok(0)
}

/// What people do with what they got; a script knows.
fn explain(made: &NewUser, files: Option<&Files>) {
    eprintln!(
        "User {}, {}, until {}. With the token in a file:",
        made.name,
        made.role,
        dates::date(made.expires)
    );
    eprintln!("  fleetctl --endpoint https://SERVER:4919 --token-file FILE list-machines");
    if let Some(Files { directory, .. }) = files {
        let at = directory.display();
        eprintln!("or with the certificate:");
        eprintln!(
            "  fleetctl --endpoint https://SERVER:4919 --ca-file {at}/ca.pem --cert-file {at}/cert.pem --key-file {at}/key.pem list-machines"
        );
    }
}

async fn list(context: &Context, args: &ListUsers) -> Result<i32> {
    let users = match context.client.users().await {
        Ok(users) => users,
        Err(error) => return Ok(fail(context, "Error retrieving list of users: ", &error)),
    };
    if context.json() {
        print_json(&users)?;
        return Ok(0);
    }
    let now = dates::now();
    print_table(&COLUMNS, users.iter().map(|user| row(user, now)), args.no_legend)?;
    Ok(0)
}

fn row(user: &types::User, now: i64) -> Vec<String> {
    let certificate = if user.certificate { "yes" } else { "no" }.to_owned();
    let (created, expires) = (dates::date(user.created), dates::expiry(user.expires, now));
    vec![user.name.clone(), user.role.clone(), created, expires, certificate]
}

async fn set_role(context: &Context, name: &str, role: Role) -> Result<i32> {
    match context.client.set_role(name, &role.to_string()).await {
        Ok(Some(user)) if context.json() => print_json(&user)?,
        Ok(Some(user)) => print_line(&format!("User {} is {} now", user.name, user.role))?,
        Ok(None) => {
            eprintln!("User {name} does not exist.");
            return Ok(1);
        }
        Err(error) => return Ok(fail(context, &format!("Error changing user {name}: "), &error)),
    }
    Ok(0)
}

async fn remove(context: &Context, names: &[String]) -> Result<i32> {
    if names.is_empty() {
        return misused("No users given");
    }
    let mut code = 0;
    for name in names {
        match context.client.delete_user(name).await {
            Ok(true) if context.json() => context.remember(json!({"name": name, "removed": true})),
            Ok(true) => print_line(&format!("Removed user {name}"))?,
            Ok(false) => {
                eprintln!("User {name} does not exist.");
                code = 1;
            }
            Err(error) => code = fail(context, &format!("Error removing user {name}: "), &error),
        }
    }
    context.finish()?;
    Ok(code)
}

fn fail(context: &Context, before: &str, error: &Error) -> i32 {
    context.fail_at(before, error, "users")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn rows() {
        let user = types::User {
            certificate: true,
            created: 1_795_200_000,
            expires: 1_795_300_000,
            name: "ann".into(),
            role: "viewer".into(),
        };
        assert_eq!(
            row(&user, 1_795_290_000).join("|"),
            "ann|viewer|2026-11-20 18:40 UTC|2026-11-21 22:26 UTC (in 2h)|yes"
        );
    }

    #[test]
    fn a_key_is_for_its_owner_and_replaces_none() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("a/ann");
        let files = Files::prepare(&place).unwrap();
        assert!(files.request.starts_with("-----BEGIN CERTIFICATE REQUEST-----"), "{}", files.request);
        let key = std::fs::read_to_string(place.join("key.pem")).unwrap();
        assert!(key.starts_with("-----BEGIN PRIVATE KEY-----"));
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&place), mode(&place.join("key.pem"))), (0o700, 0o600));
        let error = Files::prepare(&place).err().unwrap();
        assert!(error.ends_with("key.pem: file exists"), "{error}");
        assert_eq!(std::fs::read_to_string(place.join("key.pem")).unwrap(), key);
        files.give_up();
        assert!(Files::prepare(&place).is_ok());
    }
}
