//! Ansible: the tasks of the playbook, one after the other, on the machines of the inventory; with as much of its templates and
//! conditions as they use.

use super::{ADDRESSES, JOINED, Yaml, example, filled, hosts, is_there, list, mode, only, put, text, yaml};
use crate::moving;
use anyhow::{Context, Result, bail, ensure};
use fleet_e2e::Fleet;
use fleet_testbed::Host;
use std::collections::BTreeMap;
use std::time::Duration;

type Variables = BTreeMap<String, String>;

/// Who is in which group, and what is said of each machine.
#[derive(Default)]
struct Inventory {
    groups: BTreeMap<String, Vec<String>>,
    machines: BTreeMap<String, Variables>,
}

impl Inventory {
    fn read(text: &str) -> Result<Inventory> {
        let mut inventory = Inventory::default();
        let (mut section, mut common) = (String::new(), Variables::new());
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                section = name.to_owned();
            } else if section == "all:vars" {
                let (key, value) = line.split_once('=').context("KEY=VALUE")?;
                common.insert(key.to_owned(), value.to_owned());
            } else {
                let (name, rest) = line.split_once(' ').context("a machine with variables")?;
                let mut variables = Variables::from([("inventory_hostname".to_owned(), name.to_owned())]);
                for pair in rest.split_whitespace() {
                    let (key, value) = pair.split_once('=').context("KEY=VALUE")?;
                    variables.insert(key.to_owned(), value.trim_matches('"').to_owned());
                }
                inventory.groups.entry(section.clone()).or_default().push(name.to_owned());
                inventory.machines.insert(name.to_owned(), variables);
            }
        }
        for variables in inventory.machines.values_mut() {
            common.iter().for_each(|(key, value)| drop(variables.insert(key.clone(), value.clone())));
        }
        Ok(inventory)
    }

    fn first_server(&self) -> Result<&str> {
        Ok(&self.groups.get("server").context("a group `server`")?[0])
    }

    /// What an expression says, for a machine with these variables.
    fn value(&self, variables: &Variables, expression: &str) -> Result<String> {
        match expression.trim() {
            "groups['server'][0]" => self.first_server().map(str::to_owned),
            "hostvars[groups['server'][0]].ansible_host" => {
                Ok(self.machines[self.first_server()?]["ansible_host"].clone())
            }
            name => variables.get(name).cloned().with_context(|| format!("{name} is not known here")),
        }
    }

    fn holds(&self, variables: &Variables, condition: &str) -> Result<bool> {
        for part in condition.split(" and ").map(str::trim) {
            let holds = if let Some(name) = part.strip_suffix(" is defined") {
                variables.contains_key(name)
            } else if let Some(name) = part.strip_suffix(" is not defined") {
                !variables.contains_key(name)
            } else if part == "inventory_hostname in groups['server']" {
                self.groups["server"].contains(&variables["inventory_hostname"])
            } else if let Some(name) = part.strip_prefix("not ") {
                self.value(variables, name)? != "true"
            } else {
                bail!("the condition {part} is not known here");
            };
            if !holds {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// A text with its expressions replaced, and of its `{% if %}` what holds.
    fn rendered(&self, variables: &Variables, template: &str) -> Result<String> {
        let mut out = String::new();
        // Whether a branch was taken already, and whether this one is.
        let mut branch = None;
        for line in template.split_inclusive('\n') {
            if let Some(words) = line.trim().strip_prefix("{% ").and_then(|rest| rest.strip_suffix(" %}")) {
                branch = match (words.split_once(' '), branch) {
                    (Some(("if", condition)), None) => {
                        let holds = self.holds(variables, condition)?;
                        Some((holds, holds))
                    }
                    (Some(("elif", condition)), Some((taken, _))) => {
                        let holds = !taken && self.holds(variables, condition)?;
                        Some((taken || holds, holds))
                    }
                    (None, Some((taken, _))) if words == "else" => Some((true, !taken)),
                    (None, Some(_)) if words == "endif" => None,
                    _ => bail!("{words} is not understood here"),
                };
                continue;
            }
            if !branch.is_none_or(|(_, here)| here) {
                continue;
            }
            let mut rest = line;
            while let Some((before, after)) = rest.split_once("{{") {
                let (expression, after) = after.split_once("}}").context("an expression that ends")?;
                out += before;
                out += &self.value(variables, expression)?;
                rest = after;
            }
            out += rest;
        }
        Ok(out)
    }
}

/// Carries out one task for one machine; `host` is where, `variables` are those of the machine.
fn carry_out(inventory: &Inventory, host: &Host, variables: &mut Variables, task: &Yaml) -> Result<()> {
    let name = text(task, "name")?;
    let (module, arguments) = task
        .as_hash()
        .context("a task")?
        .iter()
        .find_map(|(key, value)| Some((key.as_str()?.strip_prefix("ansible.builtin.")?, value)))
        .with_context(|| format!("{name}: no module"))?;
    only(task, &["name", "register", "when", "loop", "delegate_to", &format!("ansible.builtin.{module}")])?;
    let argument = |key: &str| inventory.rendered(variables, text(arguments, key)?);
    let type_in = |script: &str| -> Result<String> {
        let output = host.command(["/bin/sh", "-c", script]).deadline(Duration::from_secs(180)).run()?;
        Ok(output.ok().with_context(|| format!("{name}: {script}"))?.stdout)
    };
    let mut said = Vec::new();
    match module {
        "file" => {
            only(arguments, &["path", "state", "mode"])?;
            ensure!(text(arguments, "state")? == "directory");
            type_in(&format!("mkdir -p {0}; chmod {1:o} {0}", argument("path")?, mode(&arguments["mode"])?))?;
        }
        "template" => {
            only(arguments, &["src", "dest", "mode"])?;
            let rendered =
                inventory.rendered(variables, &example(&format!("ansible/{}", text(arguments, "src")?))?)?;
            put(host, &argument("dest")?, rendered.as_bytes(), mode(&arguments["mode"])?)?;
        }
        "copy" => {
            only(arguments, &["content", "dest", "mode"])?;
            put(host, &argument("dest")?, argument("content")?.as_bytes(), mode(&arguments["mode"])?)?;
        }
        "shell" | "command" => {
            only(arguments, &["cmd", "creates"])?;
            let done = arguments["creates"].as_str().is_some_and(|path| host.exists(path));
            if !done {
                let out = type_in(&argument("cmd")?)?;
                said.push(("stdout_lines[0]", out.lines().next().unwrap_or_default().to_owned()));
            }
        }
        "stat" => {
            only(arguments, &["path"])?;
            said.push(("stat.exists", host.exists(argument("path")?).to_string()));
        }
        "systemd_service" => {
            only(arguments, &["name", "state", "enabled", "daemon_reload"])?;
            let wanted = (text(arguments, "state")?, &arguments["enabled"], &arguments["daemon_reload"]);
            ensure!(wanted == ("started", &Yaml::Boolean(true), &Yaml::Boolean(true)), "{wanted:?}");
            type_in(&format!("systemctl daemon-reload; systemctl enable --now {}", argument("name")?))?;
        }
        other => bail!("{name}: the module {other} is not known here"),
    }
    if let Some(register) = task["register"].as_str() {
        said.into_iter().for_each(|(key, value)| drop(variables.insert(format!("{register}.{key}"), value)));
    }
    Ok(())
}

fn play(fleet: &Fleet, inventory: &str) -> Result<()> {
    let mut inventory = Inventory::read(inventory)?;
    let names: Vec<String> = inventory.machines.keys().cloned().collect();
    let host = |name: &str| -> Result<&Host> {
        let index =
            names.iter().position(|known| known == name).with_context(|| format!("no machine {name}"))?;
        Ok(fleet.cluster.host(index))
    };
    let plays = yaml(&example("ansible/site.yml")?)?;
    for play in plays.as_vec().context("a list of plays")? {
        only(play, &["name", "hosts", "tasks"])?;
        let machines = match text(play, "hosts")? {
            "all" => names.clone(),
            group => inventory.groups.get(group).with_context(|| format!("no group {group}"))?.clone(),
        };
        for task in list(play, "tasks")? {
            for machine in &machines {
                let mut variables = inventory.machines[machine].clone();
                if let Some(condition) = task["when"].as_str()
                    && !inventory.holds(&variables, condition)?
                {
                    continue;
                }
                let place = match task["delegate_to"].as_str() {
                    Some(delegate) => inventory.rendered(&variables, delegate)?,
                    None => machine.clone(),
                };
                let items = list(task, "loop")?;
                for item in if items.is_empty() { &[Yaml::Null] } else { items } {
                    item.as_str().map(|item| variables.insert("item".to_owned(), item.to_owned()));
                    carry_out(&inventory, host(&place)?, &mut variables, task)?;
                }
                inventory.machines.insert(machine.clone(), variables);
            }
        }
    }
    Ok(())
}

#[test]
fn ansible_makes_machines_that_join() -> Result<()> {
    let fleet = hosts("ansible")?;
    let inventory = filled(&fleet, 0, "", &example("ansible/inventory.ini")?)?;
    play(&fleet, &inventory)?;
    // Once more: nothing is to be done, and nothing breaks.
    play(&fleet, &inventory)?;
    is_there(&fleet, JOINED)
}

#[test]
fn ansible_makes_machines_on_etcd() -> Result<()> {
    let fleet = hosts("ansetcd")?;
    let _etcd = moving::etcd(&fleet.cluster, &[])?;
    let inventory = filled(&fleet, 0, "", &example("ansible/inventory.ini")?)?;
    let (before, servers) = inventory.split_once("# fleet_etcd_servers=").context("the line for etcd")?;
    ensure!(
        servers.starts_with("http://10.0.0.21:2379,") && !ADDRESSES.iter().any(|it| inventory.contains(it))
    );
    play(&fleet, &format!("{before}fleet_etcd_servers=http://{}:2379\n", fleet.cluster.gateway()))?;
    is_there(&fleet, JOINED)
}
