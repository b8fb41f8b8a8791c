//! Licences and bans: what deny.toml says, checked against every crate in the dependency tree.
//!
//! cargo-deny checks the same file and more, but takes minutes to build; this takes nothing.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context as _, Result, bail};

use crate::steps::{metadata, root};

/// Checks the whole tree; fails with every crate that may not be in it.
pub(crate) fn check() -> Result<()> {
    let path = root().join("deny.toml");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let allowed = strings(&text, "licenses", "allow").context("deny.toml: no [licenses] allow")?;
    let banned = strings(&text, "bans", "deny").context("deny.toml: no [bans] deny")?;
    let metadata = metadata(&[])?;
    let packages = metadata["packages"].as_array().context("cargo metadata lists no packages")?;
    let mut wrong = Vec::new();
    for package in packages {
        let name = package["name"].as_str().unwrap_or("?");
        let version = package["version"].as_str().unwrap_or("?");
        let licence = package["license"].as_str().unwrap_or("");
        if banned.contains(name) {
            wrong.push(format!("{name} {version} is banned in deny.toml"));
        }
        match satisfied(licence, &allowed) {
            Ok(true) => {}
            Ok(false) => {
                wrong.push(format!("{name} {version}: licence `{licence}` is not allowed in deny.toml"))
            }
            Err(error) => wrong.push(format!("{name} {version}: licence `{licence}`: {error}")),
        }
    }
    if !wrong.is_empty() {
        bail!("{}", wrong.join("\n"));
    }
    println!("{} crates, all of allowed licences, none banned", packages.len());
    Ok(())
}

/// The strings of an array of deny.toml; of an array of tables the first of each. Reads what that file
/// looks like, one entry per line, not TOML.
fn strings(text: &str, table: &str, key: &str) -> Option<BTreeSet<String>> {
    let header = format!("[{table}]");
    let mut lines = text.lines().skip_while(|line| *line != header).skip(1);
    let start = format!("{key} = [");
    lines.by_ref().take_while(|line| !line.starts_with('[')).find(|line| *line == start)?;
    let entries = lines.take_while(|line| *line != "]");
    Some(entries.filter_map(|line| line.split('"').nth(1).map(str::to_owned)).collect())
}

/// Whether an SPDX expression can be met with the allowed licences. `/` is the old way to write OR.
fn satisfied(expression: &str, allowed: &BTreeSet<String>) -> Result<bool> {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let words: Vec<&str> = spaced.split_ascii_whitespace().collect();
    let mut rest = words.as_slice();
    let value = either(&mut rest, allowed)?;
    if !rest.is_empty() {
        bail!("cannot read it from {:?} on", rest[0]);
    }
    Ok(value)
}

fn either(words: &mut &[&str], allowed: &BTreeSet<String>) -> Result<bool> {
    let mut value = both(words, allowed)?;
    while let ["OR", rest @ ..] = words {
        *words = rest;
        value |= both(words, allowed)?;
    }
    Ok(value)
}

fn both(words: &mut &[&str], allowed: &BTreeSet<String>) -> Result<bool> {
    let mut value = one(words, allowed)?;
    while let ["AND", rest @ ..] = words {
        *words = rest;
        value &= one(words, allowed)?;
    }
    Ok(value)
}

fn one(words: &mut &[&str], allowed: &BTreeSet<String>) -> Result<bool> {
    match *words {
        ["(", rest @ ..] => {
            *words = rest;
            let value = either(words, allowed)?;
            let [")", rest @ ..] = words else { bail!("a parenthesis is not closed") };
            *words = rest;
            Ok(value)
        }
        [licence, "WITH", exception, rest @ ..] => {
            *words = rest;
            Ok(allowed.contains(&format!("{licence} WITH {exception}")))
        }
        [licence, rest @ ..] if !matches!(*licence, ")" | "OR" | "AND" | "WITH") => {
            *words = rest;
            Ok(allowed.contains(*licence))
        }
        _ => bail!("a licence is missing"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_met_or_not() {
        let allowed: BTreeSet<String> =
            ["MIT", "Unicode-3.0", "Apache-2.0 WITH LLVM-exception"].map(str::to_owned).into();
        for yes in [
            "MIT",
            "MIT OR GPL-3.0",
            "GPL-3.0/MIT",
            "(GPL-3.0 OR MIT) AND Unicode-3.0",
            "Apache-2.0 WITH LLVM-exception OR Apache-2.0",
        ] {
            assert!(satisfied(yes, &allowed).unwrap(), "{yes}");
        }
        for no in ["GPL-3.0", "MIT AND GPL-3.0", "Apache-2.0", "(MIT OR GPL-3.0) AND GPL-3.0"] {
            assert!(!satisfied(no, &allowed).unwrap(), "{no}");
        }
        for broken in ["", "MIT OR", "(MIT", "MIT MIT", "OR"] {
            assert!(satisfied(broken, &allowed).is_err(), "{broken}");
        }
    }

    #[test]
    fn the_lists_of_deny_toml_are_found() {
        let text = fs::read_to_string(root().join("deny.toml")).unwrap();
        assert!(strings(&text, "licenses", "allow").unwrap().contains("Apache-2.0"));
        assert!(strings(&text, "bans", "deny").unwrap().contains("openssl-sys"));
        assert!(strings(&text, "bans", "none").is_none());
    }
}
