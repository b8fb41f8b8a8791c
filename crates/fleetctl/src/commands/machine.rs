//! machine: who belongs to the cluster and who is there, cordon, metadata, and removal.
use super::drain;
use super::list::{machine_field, machine_state, or_dash, print_table};
use crate::cli::{ListMembers, Machine as Command};
use crate::context::{Context, legend, misused, print_json, print_line};
use crate::dates;
use anyhow::Result;
use fleet_api::client::{Error, MachineMark};
use fleet_api::types::{Machine, Member, MetadataOp};
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

const COLUMNS: [&str; 5] = ["machine", "ip", "metadata", "joined", "state"];

/// How many machines a message lists.
const NAMES: usize = 5;

pub(crate) async fn run(context: &Context, command: Command) -> Result<i32> {
    match command {
        Command::List(args) => list(context, &args).await,
        Command::Cordon(args) => cordon(context, &args.machines, true).await,
        Command::Uncordon(args) => cordon(context, &args.machines, false).await,
        Command::Drain(args) => drain::run(context, &args).await,
        Command::Remove(args) => remove(context, &args.machines).await,
        Command::Metadata(args) => match args.words.as_slice() {
            [] => misused("No machine given"),
            [_] => misused("No changes given: KEY=VALUE sets, KEY- removes"),
            [machine, changes @ ..] => metadata(context, machine, changes).await,
        },
    }
}

/// A machine that may belong to the cluster: it joined with a token, or is there, or both.
#[derive(Debug, Default)]
struct Known {
    member: Option<Member>,
    machine: Option<Machine>,
}

impl Known {
    /// In one word how it is; the help of the command explains them.
    fn state(&self) -> &'static str {
        if self.member.as_ref().is_some_and(|member| member.removed) {
            return "removed";
        }
        let connected = self.member.as_ref().map(|member| member.connected);
        match (&self.machine, connected) {
            // A server is no member: being there is all it has to do.
            (Some(machine), None | Some(true)) => machine_state(machine),
            (Some(_), Some(false)) => "lost",
            (None, Some(true)) => "joining",
            (None, None | Some(false)) => "gone",
        }
    }

    fn ip(&self) -> &str {
        self.machine.as_ref().map(|machine| machine.primary_ip.as_str()).unwrap_or_default()
    }
}

/// All of them, by ID.
type Cluster = BTreeMap<String, Known>;

fn merge(members: Vec<Member>, machines: Vec<Machine>) -> Cluster {
    let mut cluster = Cluster::new();
    for member in members {
        let known: &mut Known = cluster.entry(member.machine_id.clone()).or_default();
        known.member = Some(member);
    }
    for machine in machines {
        let known: &mut Known = cluster.entry(machine.id.clone()).or_default();
        known.machine = Some(machine);
    }
    cluster
}

/// Asks for members and machines. `Err` is an exit code.
async fn cluster(context: &Context) -> Result<Cluster, i32> {
    let members = async {
        match context.client.members().await {
            // An older server, which no machine can join.
            Err(error) if error.is_unknown_resource() => Ok(Vec::new()),
            members => members,
        }
    };
    match tokio::try_join!(members, context.client.machines()) {
        Ok((members, machines)) => Ok(merge(members, machines)),
        Err(error) => Err(context.fail("Error retrieving list of machines: ", &error, "")),
    }
}

/// What `-o json` prints of a machine: the keys of `machines` and `members`, and the state.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Line<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    connected: Option<bool>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    cordoned: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    draining: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    joined: Option<i64>,
    #[serde(rename = "machineID")]
    machine_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<&'a BTreeMap<String, String>>,
    #[serde(rename = "primaryIP", skip_serializing_if = "str::is_empty")]
    primary_ip: &'a str,
    state: &'static str,
}

async fn list(context: &Context, args: &ListMembers) -> Result<i32> {
    let cluster = match cluster(context).await {
        Ok(cluster) => cluster,
        Err(code) => return Ok(code),
    };
    if context.json() {
        let lines: Vec<Line<'_>> = cluster.iter().map(|(id, known)| line(id, known)).collect();
        print_json(&lines)?;
        return Ok(0);
    }
    let rows = cluster.iter().map(|(id, known)| row(id, known, args.table.full));
    print_table(&COLUMNS, rows, args.table.no_legend)?;
    notices(context).await;
    Ok(0)
}

/// Says what operators should know of the cluster as a whole; a server that can't tell has nothing to say.
async fn notices(context: &Context) {
    for notice in context.client.notices().await.unwrap_or_default() {
        eprintln!("NOTICE: {} (since {})", notice.text, dates::date(notice.since));
    }
}

fn line<'a>(id: &'a str, known: &'a Known) -> Line<'a> {
    let metadata = known.machine.as_ref().map(|machine| &machine.metadata);
    Line {
        connected: known.member.as_ref().map(|member| member.connected),
        cordoned: known.machine.as_ref().is_some_and(|machine| machine.cordoned),
        draining: known.machine.as_ref().is_some_and(|machine| machine.draining),
        joined: known.member.as_ref().map(|member| member.joined),
        machine_id: id,
        metadata: metadata.filter(|metadata| !metadata.is_empty()),
        primary_ip: known.ip(),
        state: known.state(),
    }
}

/// A line of the table.
fn row(id: &str, known: &Known, full: bool) -> Vec<String> {
    let metadata = known.machine.as_ref().map(|machine| machine_field(machine, "metadata", full));
    vec![
        legend(id, "", full),
        or_dash(known.ip()),
        metadata.unwrap_or_else(|| "-".to_owned()),
        known.member.as_ref().map_or_else(|| "-".to_owned(), |member| dates::date(member.joined)),
        known.state().to_owned(),
    ]
}

/// The only machine whose ID begins so. `Err` is the text to say.
fn pick<'a>(cluster: &'a Cluster, prefix: &str) -> Result<&'a str, String> {
    let fitting: Vec<&str> = cluster
        .keys()
        .map(String::as_str)
        .filter(|id| !prefix.is_empty() && id.starts_with(prefix))
        .collect();
    match fitting.as_slice() {
        [] => Err(format!("Machine {prefix} does not exist.")),
        [id] => Ok(id),
        [..] => {
            let shown = fitting.iter().take(NAMES).copied().collect::<Vec<_>>().join(", ");
            let more = if fitting.len() > NAMES { ", …" } else { "" };
            Err(format!("{prefix} is the beginning of {} machines: {shown}{more}", fitting.len()))
        }
    }
}

fn place(cluster: &Cluster, id: &str) -> String {
    legend(id, cluster.get(id).map(Known::ip).unwrap_or_default(), false)
}

/// The one machine that is meant, and how people read it. `Err` is an exit code.
pub(super) async fn choose(context: &Context, prefix: &str) -> Result<(String, String), i32> {
    let cluster = cluster(context).await?;
    match pick(&cluster, prefix) {
        Ok(id) => Ok((id.to_owned(), place(&cluster, id))),
        Err(text) => {
            eprintln!("{text}");
            Err(1)
        }
    }
}

/// The machines that are meant, each once, and how people read them; all or none. `Err` is an exit code.
async fn choose_all(
    context: &Context,
    prefixes: &[String],
    nothing_done: &str,
) -> Result<BTreeMap<String, (String, Known)>, i32> {
    if prefixes.is_empty() {
        return Err(misused("No machines given").unwrap_or(1));
    }
    let mut cluster = cluster(context).await?;
    let mut chosen = BTreeSet::new();
    let mut mistaken = false;
    for prefix in prefixes {
        match pick(&cluster, prefix) {
            Ok(id) => drop(chosen.insert(id.to_owned())),
            Err(text) => {
                eprintln!("{text}");
                mistaken = true;
            }
        }
    }
    if mistaken {
        eprintln!("{nothing_done}");
        return Err(1);
    }
    let described = chosen.into_iter().map(|id| {
        let place = place(&cluster, &id);
        let known = cluster.remove(&id).unwrap_or_default();
        (id, (place, known))
    });
    Ok(described.collect())
}

/// Says that a machine is none of the cluster (any more).
pub(super) fn no_such_machine(place: &str) -> Result<i32> {
    eprintln!("Machine {place} is not in the cluster (any more).");
    Ok(1)
}

async fn cordon(context: &Context, arguments: &[String], set: bool) -> Result<i32> {
    let done = if set { "cordoned" } else { "uncordoned" };
    let chosen = match choose_all(context, arguments, &format!("No machine was {done}.")).await {
        Ok(chosen) => chosen,
        Err(code) => return Ok(code),
    };
    let mut code = 0;
    for (id, (place, _)) in chosen {
        match context.client.mark_machine(&id, MachineMark::Cordon, set).await {
            Ok(true) if context.json() => context.remember(json!({"machineID": id, "cordoned": set})),
            Ok(true) if set => {
                print_line(&format!(
                    "Machine {place} is cordoned: it takes no new units, what is there stays"
                ))?;
            }
            Ok(true) => print_line(&format!("Machine {place} takes new units"))?,
            Ok(false) => code = no_such_machine(&place)?,
            Err(error) => code = refused(context, &format!("Error marking machine {place}: "), &error),
        }
    }
    context.finish()?;
    Ok(code)
}

async fn remove(context: &Context, arguments: &[String]) -> Result<i32> {
    let chosen = match choose_all(context, arguments, "No machine was removed.").await {
        Ok(chosen) => chosen,
        Err(code) => return Ok(code),
    };
    let mut code = 0;
    for (id, (place, known)) in chosen {
        match context.client.delete_machine(&id).await {
            Ok(true) => {
                if context.json() {
                    context.remember(json!({"machineID": id, "removed": true}));
                } else {
                    print_line(&format!("Removed machine {place}: its credentials are revoked"))?;
                }
                eprintln!("{}", what_follows(&known, &place));
            }
            Ok(false) => {
                eprintln!(
                    "Machine {place} has no credentials to revoke: it was removed before, or is a server. \
                     It is gone when fleetd on it is stopped."
                );
                code = 1;
            }
            Err(error) => code = refused(context, &format!("Error removing machine {place}: "), &error),
        }
    }
    context.finish()?;
    Ok(code)
}

/// What becomes of the units of a machine that was removed.
fn what_follows(known: &Known, place: &str) -> String {
    if known.member.as_ref().is_some_and(|member| member.connected) {
        return format!("{place} stops its units; then they are placed elsewhere.");
    }
    format!(
        "{place} is out of reach: its units are placed elsewhere, and what still runs there goes on until it \
         reaches a server, which has it stop them. If it never will, stop them there."
    )
}

pub(super) fn refused(context: &Context, before: &str, error: &Error) -> i32 {
    if error.is_unknown_resource() {
        eprintln!("{before}this server cannot do it; it is older than fleet 2.");
        return 1;
    }
    context.fail(before, error, "")
}

/// A change of metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Change {
    Set { key: String, value: String },
    Remove { key: String },
}

impl Change {
    /// Reads `KEY=VALUE` or `KEY-`. `Err` is the text to say.
    fn parse(text: &str) -> Result<Self, String> {
        let (key, value) = match (text.split_once('='), text.strip_suffix('-')) {
            (Some((key, value)), _) => (key, Some(value)),
            (None, Some(key)) => (key, None),
            (None, None) => return Err(format!("{text:?} is no change: KEY=VALUE sets, KEY- removes")),
        };
        // As the server has it.
        if key.is_empty() || !key.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b)) {
            return Err(format!("{key:?} is no key: letters, digits, _, . and - are"));
        }
        let key = key.to_owned();
        match value {
            None => Ok(Change::Remove { key }),
            Some("") => Err(format!("{key} needs a value; {key}- removes it")),
            Some(value) => Ok(Change::Set { key, value: value.to_owned() }),
        }
    }

    /// As `PATCH machines` has it. The original's server wants the value within an object.
    fn op(&self, id: &str) -> MetadataOp {
        let (op, key, value) = match self {
            Change::Set { key, value } => ("add", key, Some(json!({"value": value}))),
            Change::Remove { key } => ("remove", key, None),
        };
        MetadataOp { op: op.to_owned(), path: format!("/{id}/metadata/{key}"), value }
    }

    fn said(&self) -> String {
        match self {
            Change::Set { key, value } => format!("set {key}={value}"),
            Change::Remove { key } => format!("removed {key}"),
        }
    }
}

async fn metadata(context: &Context, machine: &str, changes: &[String]) -> Result<i32> {
    let changes: Vec<Change> = match changes.iter().map(|text| Change::parse(text)).collect() {
        Ok(changes) => changes,
        Err(text) => return misused(&text),
    };
    let cluster = match cluster(context).await {
        Ok(cluster) => cluster,
        Err(code) => return Ok(code),
    };
    let id = match pick(&cluster, machine) {
        Ok(id) => id,
        Err(text) => {
            eprintln!("{text}");
            return Ok(1);
        }
    };
    let place = place(&cluster, id);
    let ops: Vec<MetadataOp> = changes.iter().map(|change| change.op(id)).collect();
    if let Err(error) = context.client.patch_machines(&ops).await {
        return Ok(context.fail(&format!("Error editing metadata of machine {place}: "), &error, ""));
    }
    if context.json() {
        let said = changes.iter().map(|change| match change {
            Change::Set { key, value } => (key.clone(), Value::from(value.as_str())),
            Change::Remove { key } => (key.clone(), Value::Null),
        });
        context.remember(json!({"machineID": id, "changes": said.collect::<serde_json::Map<_, _>>()}));
    } else {
        let said: Vec<String> = changes.iter().map(Change::said).collect();
        print_line(&format!("Metadata of machine {place}: {}", said.join(", ")))?;
    }
    context.finish()?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::layout;

    const FIRST: &str = "4a1e0c2fb7d94e6c8f3a51d2c07e9b11";
    const SECOND: &str = "4a1e77d0a3c84b55a8e19d6f20b4c722";
    const THIRD: &str = "c93b5f08e1ad47d2b6740e9f8a2d3c33";
    const FOURTH: &str = "d00d5f08e1ad47d2b6740e9f8a2d3c44";

    fn member(id: &str, connected: bool) -> Member {
        Member { machine_id: id.into(), joined: 1_795_300_000, connected, removed: false }
    }

    fn machine(id: &str, ip: &str, metadata: &[(&str, &str)]) -> Machine {
        let metadata = metadata.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect();
        Machine { id: id.into(), metadata, primary_ip: ip.into(), ..Machine::default() }
    }

    /// A server, a machine that is there, one out of reach, one that is gone.
    fn some() -> Cluster {
        merge(
            vec![member(FOURTH, false), member(SECOND, true), member(THIRD, false)],
            vec![
                machine(FIRST, "172.30.7.11", &[]),
                machine(SECOND, "172.30.7.12", &[("disk", "ssd"), ("region", "eu")]),
                machine(THIRD, "172.30.7.13", &[]),
            ],
        )
    }

    #[test]
    fn the_table() {
        let rows: Vec<Vec<String>> = some().iter().map(|(id, known)| row(id, known, false)).collect();
        assert_eq!(
            layout(&rows),
            "4a1e0c2f...\t172.30.7.11\t-\t\t\t-\t\t\tup\n\
             4a1e77d0...\t172.30.7.12\tdisk=ssd,region=eu\t2026-11-21 22:26 UTC\tup\n\
             c93b5f08...\t172.30.7.13\t-\t\t\t2026-11-21 22:26 UTC\tlost\n\
             d00d5f08...\t-\t\t-\t\t\t2026-11-21 22:26 UTC\tgone\n"
        );
        assert_eq!(row(FOURTH, &some()[FOURTH], true)[0], FOURTH);
        let coming = merge(vec![member(FIRST, true)], Vec::new());
        assert_eq!(coming[FIRST].state(), "joining");
        let removed = Member { removed: true, ..member(FIRST, true) };
        assert_eq!(merge(vec![removed], vec![machine(FIRST, "ip", &[])])[FIRST].state(), "removed");
        let draining = Machine { draining: true, cordoned: true, ..machine(FIRST, "ip", &[]) };
        assert_eq!(merge(Vec::new(), vec![draining])[FIRST].state(), "up,draining");
    }

    #[test]
    fn json_has_the_keys_of_the_api() {
        let cluster = some();
        let text = |id: &str| serde_json::to_string(&line(id, &cluster[id])).unwrap();
        assert_eq!(
            text(SECOND),
            format!(
                r#"{{"connected":true,"joined":1795300000,"machineID":"{SECOND}","metadata":{{"disk":"ssd","region":"eu"}},"primaryIP":"172.30.7.12","state":"up"}}"#
            )
        );
        assert_eq!(
            text(FOURTH),
            format!(r#"{{"connected":false,"joined":1795300000,"machineID":"{FOURTH}","state":"gone"}}"#)
        );
    }

    #[test]
    fn machines_are_picked_by_the_beginning_of_their_ids() {
        let cluster = some();
        assert_eq!(pick(&cluster, "c9"), Ok(THIRD));
        assert_eq!(pick(&cluster, FIRST), Ok(FIRST));
        assert_eq!(
            pick(&cluster, "4a1e"),
            Err(format!("4a1e is the beginning of 2 machines: {FIRST}, {SECOND}"))
        );
        for nothing in ["", "x", "c93b5f08..."] {
            assert_eq!(pick(&cluster, nothing), Err(format!("Machine {nothing} does not exist.")));
        }
    }

    #[test]
    fn changes() {
        let op = |text: &str| serde_json::to_string(&Change::parse(text).unwrap().op("m")).unwrap();
        assert_eq!(op("disk=ssd"), r#"{"op":"add","path":"/m/metadata/disk","value":{"value":"ssd"}}"#);
        assert_eq!(op("a-=b=c-"), r#"{"op":"add","path":"/m/metadata/a-","value":{"value":"b=c-"}}"#);
        assert_eq!(op("a.b--"), r#"{"op":"remove","path":"/m/metadata/a.b-","value":null}"#);
        let refused = |text: &str| Change::parse(text).unwrap_err();
        assert_eq!(refused("disk="), "disk needs a value; disk- removes it");
        assert_eq!(refused("disk"), "\"disk\" is no change: KEY=VALUE sets, KEY- removes");
        assert_eq!(refused("-"), "\"\" is no key: letters, digits, _, . and - are");
        assert_eq!(refused("a b=c"), "\"a b\" is no key: letters, digits, _, . and - are");
        assert_eq!(refused("a/b=c"), "\"a/b\" is no key: letters, digits, _, . and - are");
    }
}
