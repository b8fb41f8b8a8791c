//! servers: the servers of the cluster, and the registry they share.
use super::list::print_table;
use crate::cli::Servers;
use crate::context::{Context, print_json, print_line};
use crate::dates;
use anyhow::Result;
use fleet_api::client::Error;
use fleet_api::types::{RegistryMember, Server};

const SERVERS: [&str; 7] = ["machine", "address", "role", "lag", "heard", "version", "started"];
const REGISTRY: [&str; 3] = ["registry", "health", "detail"];

/// Lists the servers, and the members of their registry. Not zero when one of these is not well, or does not answer.
pub(crate) async fn run(context: &Context, args: &Servers) -> Result<i32> {
    let list = match context.client.servers().await {
        Ok(list) => list,
        Err(error) => return Ok(fail(context, "Error retrieving list of servers: ", &error)),
    };
    let silent = list.servers.iter().any(|server| !server.problem.is_empty());
    let code = i32::from(silent || list.registry.iter().any(|member| !member.healthy));
    if context.json() {
        print_json(&list)?;
        return Ok(code);
    }
    print_table(&SERVERS, list.servers.iter().map(|server| row(server, args.full)), args.no_legend)?;
    for server in list.servers.iter().filter(|server| !server.problem.is_empty()) {
        eprintln!("Server {:.8}... does not say how it is: {}", server.machine_id, server.problem);
    }
    if !list.registry.is_empty() {
        print_line("")?;
        print_table(&REGISTRY, list.registry.iter().map(member), args.no_legend)?;
    }
    Ok(code)
}

fn row(server: &Server, full: bool) -> Vec<String> {
    let id = if full { server.machine_id.clone() } else { format!("{:.8}...", server.machine_id) };
    let address = if server.address.is_empty() { "-" } else { &server.address };
    let role = if server.leader { "leader" } else { "follower" };
    let lag = match server.lag {
        None => "?".to_owned(),
        Some(0) => "-".to_owned(),
        Some(1) => "1 revision".to_owned(),
        Some(lag) => format!("{lag} revisions"),
    };
    let heard = server.heard.map_or("?".to_owned(), |ago| format!("{ago}s ago"));
    let (version, started) = (server.version.clone(), dates::date(server.started));
    vec![id, address.to_owned(), role.to_owned(), lag, heard, version, started]
}

fn member(member: &RegistryMember) -> Vec<String> {
    let health = match (member.healthy, member.in_use) {
        (true, true) => "ok,used",
        (true, false) => "ok",
        (false, _) => "failing",
    };
    vec![member.endpoint.clone(), health.to_owned(), member.detail.clone()]
}

pub(super) fn fail(context: &Context, before: &str, error: &Error) -> i32 {
    context.fail_at(before, error, "other servers")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows() {
        let server = Server {
            address: "10.0.0.1:4919".into(),
            heard: Some(2),
            lag: Some(0),
            leader: true,
            machine_id: "4a1e0c2fb7d94e6c8f3a51d2c07e9b11".into(),
            problem: String::new(),
            revision: Some(7),
            started: 1_795_200_000,
            version: "2.0.0".into(),
        };
        let date = dates::date(1_795_200_000);
        assert_eq!(
            row(&server, false).join("|"),
            format!("4a1e0c2f...|10.0.0.1:4919|leader|-|2s ago|2.0.0|{date}")
        );
        let other = Server { address: String::new(), leader: false, lag: Some(12), heard: None, ..server };
        assert_eq!(
            row(&other, true).join("|"),
            format!("4a1e0c2fb7d94e6c8f3a51d2c07e9b11|-|follower|12 revisions|?|2.0.0|{date}")
        );
        let etcd = RegistryMember {
            detail: "etcd 3.4.23, leader".into(),
            endpoint: "http://10.0.0.1:2379".into(),
            healthy: true,
            in_use: true,
        };
        assert_eq!(member(&etcd).join("|"), "http://10.0.0.1:2379|ok,used|etcd 3.4.23, leader");
        let failing = RegistryMember { healthy: false, ..etcd };
        assert_eq!(member(&failing)[1], "failing");
    }
}
