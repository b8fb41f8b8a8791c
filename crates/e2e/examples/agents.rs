//! Many agents on one server: what a session costs the server in memory, and how long one changed unit takes to its agent.
//!
//! The server is a real fleetd on a host of the testbed; the agents are simulated as far as their machines go: each has joined
//! with a key of its own and keeps a session over mutual TLS, and none runs anything.
//!
//! `agents BIN_DIR [COUNT]`: the directory of fleetd and fleetctl, and how many agents.

use anyhow::{Context, Result, ensure};
use fleet_cluster::model::{Machine, MachineId};
use fleet_e2e::Http;
use fleet_link::ca::MachineKey;
use fleet_link::dial::{self, Address, Dialer};
use fleet_link::token::Token;
use fleet_link::{AgentEnd, Beat, FromAgent, Hello, KeepAlive, ToAgent};
use fleet_testbed::{Cluster, Host, Options};
use fleet_unit::UnitName;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Agents that join at the same time: a server lets only a few in at once.
const AT_ONCE: usize = 4;
/// Changed units that the median is taken of.
const CHANGES: usize = 201;
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// What a session may cost, KB, and how long a change may take, ms.
const BUDGET: (f64, f64) = (64.0, 10.0);

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let bin_dir = args.next().context("which directory has fleetd and fleetctl?")?;
    let count: usize = args.next().map_or(Ok(2000), |text| text.parse()).context("how many agents?")?;
    let cluster = Cluster::up(Options::for_test("agents", 1).fleet(bin_dir))?;
    let host = cluster.host(0);
    host.write("/etc/fleet/fleet.conf", "listen=\"*\"\n")?;
    host.start_fleet()?;
    let token = host.run(["fleetctl", "join-token", "create", "--uses", &count.to_string()])?.ok()?.stdout;
    let http = Http::new(host.root_path("/run/fleet.sock")?);
    let before = memory(host)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let (per_session, median, slow) = runtime.block_on(async {
        let start = Instant::now();
        let mut agents = Agents::join(host.ip(), token.trim(), count).await?;
        println!("{count} agents joined in {:.1} s", start.elapsed().as_secs_f64());
        // Everything that was only needed to join is given back by then.
        tokio::time::sleep(Duration::from_secs(5)).await;
        let per_session = (memory(host)? - before) / count as f64;
        let mut times = agents.changes(&http).await?;
        times.sort_by(f64::total_cmp);
        let at = |part: usize| times.get(times.len() * part / 100).copied().context("nothing was measured");
        anyhow::Ok((per_session, at(50)?, at(99)?))
    })?;
    cluster.down()?;
    println!("memory of fleetd per session: {per_session:.1} KB (budget {} KB)", BUDGET.0);
    println!(
        "one changed unit at its agent: {median:.2} ms in the median (budget {} ms), {slow:.2} ms in the 99th percentile",
        BUDGET.1
    );
    ensure!(per_session <= BUDGET.0 && median <= BUDGET.1, "over budget");
    Ok(())
}

/// Resident memory of fleetd, KB.
fn memory(host: &Host) -> Result<f64> {
    let pid = host.run(["systemctl", "show", "--value", "-p", "MainPID", "fleetd.service"])?.ok()?.stdout;
    let status = host.read(format!("/proc/{}/status", pid.trim()))?;
    let line =
        status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("the kernel names no VmRSS")?;
    Ok(line.split_ascii_whitespace().next().unwrap_or_default().parse()?)
}

/// A unit that an agent was told of, and when.
type Told = (UnitName, Instant);

struct Agents {
    ids: Vec<MachineId>,
    told: mpsc::Receiver<Told>,
    tasks: JoinSet<()>,
    cancel: CancellationToken,
}

impl Drop for Agents {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

impl Agents {
    async fn join(server: &str, token: &str, count: usize) -> Result<Agents> {
        let address: Address = server.parse()?;
        let token = Arc::new(Token::parse(token)?);
        let gate = Arc::new(Semaphore::new(AT_ONCE));
        let (send, told) = mpsc::channel(1024);
        let cancel = CancellationToken::new();
        let mut joining = JoinSet::new();
        let mut agents = Agents { ids: Vec::new(), told, tasks: JoinSet::new(), cancel: cancel.clone() };
        for number in 1..=count {
            let id = MachineId::parse(&format!("{number:032x}"))?;
            agents.ids.push(id.clone());
            let (address, token, gate, send, cancel) =
                (address.clone(), token.clone(), gate.clone(), send.clone(), cancel.clone());
            joining.spawn(async move {
                let permit = gate.acquire_owned().await?;
                let key = MachineKey::generate()?;
                let identity =
                    dial::join(std::slice::from_ref(&address), &token, &id, key, KeepAlive::default())
                        .await?;
                let hello = Hello { id, machine: Machine::default() };
                let dialer =
                    Dialer::new(vec![address], identity, hello, KeepAlive::default(), number as u64)?;
                let (sessions, mut ends) = mpsc::channel(1);
                let dialing = dialer.run(sessions, cancel.clone());
                let (up, is_up) = oneshot::channel();
                let agent = async move {
                    let mut up = Some(up);
                    while let Some(end) = ends.recv().await {
                        be_agent(end, &send, &mut up).await;
                    }
                };
                let task = tokio::spawn(async move {
                    tokio::select! {
                        () = dialing => {}
                        () = agent => {}
                        () = cancel.cancelled() => {}
                    }
                });
                tokio::time::timeout(PATIENCE, is_up).await??;
                drop(permit);
                anyhow::Ok(task)
            });
        }
        while let Some(joined) = joining.join_next().await {
            let task = joined??;
            agents.tasks.spawn(async move { drop(task.await) });
        }
        Ok(agents)
    }

    /// Milliseconds from sending a change to the server until it is at the agent, one after the other.
    async fn changes(&mut self, http: &Http) -> Result<Vec<f64>> {
        let mut times = Vec::new();
        for number in 0..CHANGES {
            let id = &self.ids[number * 7919 % self.ids.len()];
            let name = UnitName::parse(&format!("change-{number}.service"))?;
            let body = serde_json::json!({
                "desiredState": "launched",
                "options": [
                    {"section": "Service", "name": "ExecStart", "value": "/bin/sleep infinity"},
                    {"section": "X-Fleet", "name": "MachineID", "value": id.as_str()},
                ],
            });
            let (http, path) = (http.clone(), format!("/fleet/v1/units/{name}"));
            let start = Instant::now();
            let put = tokio::task::spawn_blocking(move || http.json("PUT", &path, &body.to_string()));
            let told = tokio::time::timeout(PATIENCE, self.told.recv()).await?.context("no agent is left")?;
            ensure!(told.0 == name, "an agent was told of {} and not of {name}", told.0);
            times.push(told.1.duration_since(start).as_secs_f64() * 1e3);
            let answer = put.await??;
            ensure!(answer.status == 201, "the server answered {}: {}", answer.status, answer.body);
        }
        Ok(times)
    }
}

/// One session of a machine that runs nothing.
async fn be_agent(mut end: AgentEnd, told: &mpsc::Sender<Told>, up: &mut Option<oneshot::Sender<()>>) {
    if end.send.send(FromAgent::Snapshot(BTreeMap::new())).await.is_err() {
        return;
    }
    let mut pause = Box::pin(tokio::time::sleep(Duration::ZERO));
    loop {
        tokio::select! {
            message = end.receive.recv() => match message {
                None => return,
                Some(ToAgent::Snapshot(_)) => {
                    if let Some(up) = up.take() {
                        let _ = up.send(());
                    }
                }
                Some(ToAgent::Changes(changes)) => {
                    let now = Instant::now();
                    for name in changes.into_keys() {
                        if told.send((name, now)).await.is_err() {
                            return;
                        }
                    }
                }
                Some(ToAgent::Request(_) | ToAgent::Servers(_)) => {}
            },
            () = &mut pause => {
                let (held, answer) = oneshot::channel();
                if end.beats.send(Beat { leaving: false, held }).await.is_err() {
                    return;
                }
                let next = match tokio::time::timeout(Duration::from_secs(5), answer).await {
                    Ok(Ok(held)) => held.ttl / 3,
                    _ => Duration::from_secs(1),
                };
                pause.as_mut().reset(tokio::time::Instant::now() + next);
            }
        }
    }
}
