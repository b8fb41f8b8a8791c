//! No single point of failure: three servers on three members of etcd and two machines that joined, under a steady stream of fleetctl
//! commands through different servers, while every part fails in every way. Afterwards etcd's own history says whether an acknowledged
//! command was lost, a unit was on two machines, or a process was started that no decision had asked for.
//!
//! FLEET_E2E_OUTAGE sets how long, in seconds, outages of etcd and cuts last that outlast the TTL of machines; 60 for a long look.

use anyhow::{Context, Result, bail, ensure};
use fleet_e2e::{Command, Fleet, Ledger, RECORDED, Running, base64, unit_says, until};
use fleet_testbed::Cluster;
use serde_json::json;
use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

const SERVERS: usize = 3;
const AGENTS: usize = 2;
/// Longer than a busy machine holds anybody up, and longer than what is not to lose a machine.
const CONF: &str = "agent_ttl=\"15s\"";
const TTL: Duration = Duration::from_secs(15);
/// How long a fault lasts that is not to lose a machine.
const SHORT: Duration = Duration::from_secs(5);
/// More than fleetctl ever waits.
const DEADLINE: Duration = Duration::from_secs(60);
/// How long, in seconds, the lease of a leader lasts.
const LEASE: u64 = 2;
/// How soon after the death of a leader another has to decide, as a multiple of the time in which etcd notices that such a lease has run
/// out: 3 s where nothing else is to be done.
const TAKEOVER: f64 = 1.5;
/// How many units the stream of commands is about, for each of those who give them.
const CHURN: usize = 3;
/// How many give commands at a time.
const OPERATORS: usize = 2;

/// How long a fault lasts that machines would not survive.
fn outage() -> Duration {
    let seconds = std::env::var("FLEET_E2E_OUTAGE").ok().and_then(|text| text.parse().ok());
    seconds.map_or(TTL + SHORT, Duration::from_secs)
}

/// One who gives commands, through one server after the other, about units and a machine of its own, until told to stop; each after the one
/// before was answered, whatever that was.
fn operator(
    number: usize,
    cluster: &Cluster,
    stop: &AtomicBool,
    commands: &Mutex<Vec<Command>>,
) -> Result<Duration> {
    let machine = cluster.host(number).machine_id();
    let mut longest = Duration::ZERO;
    for turn in 0.. {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        let server = turn % SERVERS;
        let unit = format!("churn{number}-{}.service", turn % CHURN);
        let (words, key, says) = match turn / CHURN % 6 {
            0 => (format!("start {unit}"), format!("unit/{unit}"), unit_says("launched", RECORDED)),
            1 => (format!("stop --no-block {unit}"), format!("unit/{unit}"), unit_says("loaded", RECORDED)),
            2 => {
                (format!("start --no-block {unit}"), format!("unit/{unit}"), unit_says("launched", RECORDED))
            }
            3 => (
                format!("machine metadata {machine} turn={turn}"),
                format!("machine/{machine}"),
                format!(r#"{{"turn":"{turn}"}}"#),
            ),
            4 => {
                (format!("unload --no-block {unit}"), format!("unit/{unit}"), unit_says("inactive", RECORDED))
            }
            _ => (format!("destroy --no-block {unit}"), format!("unit/{unit}"), "gone".to_owned()),
        };
        let argv = std::iter::once("fleetctl").chain(words.split_whitespace());
        let began = Instant::now();
        let said = cluster.host(server).command(argv).deadline(DEADLINE).run()?;
        longest = longest.max(began.elapsed());
        let acknowledged = said.success() && said.stderr.is_empty();
        let what = format!("`fleetctl {words}` on host {server}");
        commands.lock().unwrap().push(Command { what, key, says, acknowledged });
        if !acknowledged {
            // Who was refused would try again a little later.
            sleep(Duration::from_millis(200));
        }
    }
    Ok(longest)
}

/// The cluster, and what is known of it.
struct Scene<'a> {
    fleet: &'a Fleet,
    /// Units about which nobody gives commands.
    steady: Vec<String>,
    before: Running,
    ledger: Ledger,
    commands: &'a Mutex<Vec<Command>>,
    began: Instant,
}

impl Scene<'_> {
    /// Breaks something, has a look meanwhile, and mends it; then all has to be well again. Machines that may have been lost are given by
    /// their hosts: what they ran may have moved, and nothing else.
    fn fault(
        &mut self,
        what: &str,
        lost: &[usize],
        break_it: impl FnOnce(&Fleet) -> Result<()>,
        look: impl FnOnce(&Fleet) -> Result<()>,
        mend: impl FnOnce(&Fleet) -> Result<()>,
    ) -> Result<()> {
        let before = self.commands.lock().unwrap().len();
        println!("{:>4} s: {what}", self.began.elapsed().as_secs());
        break_it(self.fleet).and_then(|()| look(self.fleet)).with_context(|| what.to_owned())?;
        mend(self.fleet).and_then(|()| self.settle(lost)).with_context(|| format!("after: {what}"))?;
        // The stream of commands goes on.
        let (after, commands) = (self.commands.lock().unwrap().len(), self.commands);
        println!("        {} commands were answered meanwhile", after - before);
        until("commands are carried out again", || {
            Ok(commands.lock().unwrap()[after..].iter().filter(|command| command.acknowledged).count()
                > SERVERS)
        })
        .with_context(|| format!("after: {what}"))
    }

    /// All is well: each server knows all machines and reaches etcd, and each steady unit runs as it did.
    fn settle(&mut self, lost: &[usize]) -> Result<()> {
        for server in self.fleet.servers() {
            until(&format!("server {server} is well"), || {
                let answer = self.fleet.http_on(server)?.get("/fleet/v1/machines")?;
                let machines = answer.body.matches("\"id\":").count();
                Ok(answer.status == 200
                    && answer.header("fleet-stale").is_none()
                    && machines == SERVERS + AGENTS)
            })?;
        }
        let may: BTreeSet<String> = lost.iter().flat_map(|host| self.before.on(*host)).collect();
        let now = self.fleet.one_each(&self.steady)?;
        now.only_changed(&self.before, &may)?;
        self.before = now;
        self.ledger.read_on(&self.fleet.members())
    }

    /// The term, and a member of etcd to ask for it that is not on the leader's machine.
    fn term(&self, leader: usize) -> Result<(usize, Option<String>)> {
        let member = other(leader);
        Ok((member, self.fleet.members().get(member, "leader")?.map(|(_, term)| term)))
    }

    /// How long it takes from now until etcd notices that a lease like a leader's has run out, and somebody hears of it.
    fn lapse(&self, member: usize) -> Result<Duration> {
        let members = self.fleet.members();
        let began = Instant::now();
        let lease = members.call(member, "lease/grant", &json!({"TTL": LEASE}))?["ID"].clone();
        let key = base64(b"/lapse");
        members.call(member, "kv/put", &json!({"key": key, "value": "", "lease": lease}))?;
        while members.call(member, "kv/range", &json!({"key": key}))?["kvs"].is_array() {
            ensure!(began.elapsed() < DEADLINE, "etcd keeps a lease that nobody renews");
            sleep(Duration::from_millis(10));
        }
        Ok(began.elapsed())
    }

    /// How long it takes from now until somebody leads in another term.
    fn taken_over(&self, (member, term): &(usize, Option<String>)) -> Result<Duration> {
        let began = Instant::now();
        loop {
            match self.fleet.members().get(*member, "leader") {
                Ok(Some((_, now))) if Some(&now) != term.as_ref() => return Ok(began.elapsed()),
                _ if began.elapsed() > DEADLINE => bail!("nobody leads after term {term:?}"),
                _ => sleep(Duration::from_millis(10)),
            }
        }
    }
}

fn fleetd(fleet: &Fleet, host: usize, signal: &str) -> Result<()> {
    let argv = ["systemctl", "kill", "--kill-who=main", "-s", signal, "fleetd.service"];
    fleet.cluster.host(host).run(argv)?.ok().map(drop)
}

/// Another host with a server.
fn other(host: usize) -> usize {
    (host + 1) % SERVERS
}

fn pause(duration: Duration) -> impl FnOnce(&Fleet) -> Result<()> {
    move |_| {
        sleep(duration);
        Ok(())
    }
}

/// What is asked of servers while etcd has no quorum: reads are answered, and say that they may be old; writes are refused, at once and with a
/// reason.
fn without_etcd(fleet: &Fleet) -> Result<()> {
    let began = Instant::now();
    for server in fleet.servers() {
        let http = fleet.http_on(server)?;
        let asked = Instant::now();
        let body = r#"{"desiredState":"launched","options":[{"section":"Service","name":"ExecStart","value":"/bin/true"}]}"#;
        let refused = http.json("PUT", "/fleet/v1/units/outage.service", body)?;
        ensure!(refused.status == 503 && refused.body.contains("http://"), "server {server}: {refused:?}");
        ensure!(asked.elapsed() < DEADLINE / 4, "server {server} refused only after {:?}", asked.elapsed());
        let said = fleet.ctl_on(server, "stop --no-block steady0.service")?;
        ensure!(!said.success() && said.stderr.contains("503"), "{said:?}");
    }
    let mut marked = 0;
    for server in fleet.servers() {
        until("reads say that they may be old", || {
            let answer = fleet.http_on(server)?.get("/fleet/v1/state")?;
            ensure!(answer.status == 200, "{answer:?}");
            Ok(answer.header("fleet-stale").is_some())
        })?;
        let list = fleet.ctl_on(server, "list-units --no-legend")?.ok()?.stdout;
        marked += usize::from(list.contains("steady0.service"));
    }
    ensure!(marked == SERVERS, "units are shown by {marked} servers");
    sleep(outage().saturating_sub(began.elapsed()));
    Ok(())
}

#[test]
fn whatever_fails_nothing_is_lost() -> Result<()> {
    let fleet = Fleet::on_etcd("faults", SERVERS, AGENTS, CONF)?;
    for server in fleet.servers() {
        for operator in 0..OPERATORS {
            for number in 0..CHURN {
                let unit = format!("/root/churn{operator}-{number}.service");
                fleet.cluster.host(server).write(unit, RECORDED)?;
            }
        }
    }
    let steady: Vec<String> =
        (0..2 * (SERVERS + AGENTS)).map(|number| format!("steady{number}.service")).collect();
    let before = fleet.start_all(&steady, RECORDED)?;
    let (stop, commands) = (AtomicBool::new(false), Mutex::new(Vec::new()));
    let scene = Scene {
        fleet: &fleet,
        steady,
        before,
        ledger: Ledger::default(),
        commands: &commands,
        began: Instant::now(),
    };
    let scene = std::thread::scope(|scope| -> Result<Scene<'_>> {
        let operators: Vec<_> = (0..OPERATORS)
            .map(|number| {
                let (cluster, stop, commands) = (&fleet.cluster, &stop, &commands);
                scope.spawn(move || operator(number, cluster, stop, commands))
            })
            .collect();
        let scene = inject(scene);
        stop.store(true, Ordering::SeqCst);
        for operator in operators {
            let longest = operator.join().map_err(|_| anyhow::anyhow!("an operator panicked"))??;
            println!("the longest command took {longest:?}");
        }
        scene
    })?;
    check(scene)
}

/// One fault after the other.
fn inject(mut scene: Scene<'_>) -> Result<Scene<'_>> {
    let members = scene.fleet.members();
    scene.settle(&[])?;

    // Servers. The shortest of several counts: the others tell how busy this machine is.
    let mut takeovers = Vec::new();
    for round in 1..=3 {
        let leader = scene.fleet.leader()?;
        let lapse = scene.lapse(other(leader))?;
        let term = scene.term(leader)?;
        fleetd(scene.fleet, leader, "KILL")?;
        takeovers.push((scene.taken_over(&term)?, lapse));
        scene.fault(
            &format!("leader killed, {round} of 3"),
            &[],
            |_| Ok(()),
            pause(SHORT / 5),
            |_| Ok(()),
        )?;
    }
    println!("a leader killed: another leads after so long, and etcd needs to notice: {takeovers:?}");
    let soon = |(takeover, lapse): &(Duration, Duration)| *takeover < lapse.mul_f64(TAKEOVER);
    ensure!(takeovers.iter().any(soon), "{takeovers:?}");

    let leader = scene.fleet.leader()?;
    let (id, term) = (scene.fleet.cluster.host(leader).machine_id(), scene.term(leader)?);
    let stopping = Instant::now();
    scene.fleet.cluster.host(leader).run(["systemctl", "stop", "fleetd.socket", "fleetd.service"])?.ok()?;
    // It has given up before it ended, and nobody waited for its lease.
    let now = members.get(other(leader), "leader")?;
    ensure!(now.as_ref().is_none_or(|(leader, _)| leader["server"] != id), "{now:?}");
    scene.taken_over(&term)?;
    println!(
        "a leader stopped: another leads after {:?}, of which stopping takes a part",
        stopping.elapsed()
    );
    scene.fault(
        "leader stopped",
        &[],
        |_| Ok(()),
        pause(SHORT / 5),
        |fleet| fleet.cluster.host(leader).start_fleet(),
    )?;

    let server = other(scene.fleet.leader()?);
    scene.fault(
        "another server killed",
        &[],
        |fleet| fleetd(fleet, server, "KILL"),
        pause(SHORT / 5),
        |_| Ok(()),
    )?;
    let leader = scene.fleet.leader()?;
    let look = |fleet: &Fleet| {
        until("another server leads", || {
            Ok(fleet.leader_by(other(leader))?.is_some_and(|now| now != leader))
        })?;
        pause(SHORT)(fleet)
    };
    scene.fault(
        "leader paused",
        &[],
        |fleet| fleetd(fleet, leader, "STOP"),
        look,
        |fleet| fleetd(fleet, leader, "CONT"),
    )?;
    let server = other(scene.fleet.leader()?);
    scene.fault(
        "another server paused",
        &[],
        |fleet| fleetd(fleet, server, "STOP"),
        pause(SHORT),
        |fleet| fleetd(fleet, server, "CONT"),
    )?;

    // Members of etcd: first always that one which leads the others.
    let member = members.leader()?;
    scene.fault(
        "member killed",
        &[],
        |_| members.kill(&[member]),
        pause(SHORT),
        |_| members.boot(&[member]),
    )?;
    let member = members.leader()?;
    scene.fault(
        "member paused",
        &[],
        |_| members.signal(member, "STOP"),
        pause(SHORT),
        |_| members.signal(member, "CONT"),
    )?;
    let member = members.leader()?;
    scene.fault("member cut off", &[], |_| members.cut(member), pause(SHORT), |_| members.join(member))?;
    scene.fault(
        "etcd in fits and starts",
        &[],
        |_| Ok(()),
        |_| {
            for turn in 0..12 {
                let member = turn % SERVERS;
                members.signal(member, "STOP")?;
                sleep(Duration::from_millis(400));
                members.signal(member, "CONT")?;
                sleep(Duration::from_millis(100));
            }
            Ok(())
        },
        |_| Ok(()),
    )?;
    let member = members.leader()?;
    scene.fault(
        "a slow network at a member",
        &[],
        |fleet| fleet.cluster.host(member).slow_down("400kbit"),
        pause(SHORT),
        |fleet| fleet.cluster.host(member).join(),
    )?;
    let member = other(members.leader()?);
    scene.fault("member wiped", &[], |_| members.replace(member), pause(SHORT / 5), |_| Ok(()))?;

    // Machines: a server and a member at once.
    let host = scene.fleet.leader()?;
    scene.fault(
        "leader's machine cut off for a moment",
        &[],
        |fleet| fleet.cluster.host(host).cut(),
        pause(SHORT),
        |fleet| fleet.cluster.host(host).join(),
    )?;
    let host = other(scene.fleet.leader()?);
    scene.fault(
        "nothing reaches a server",
        &[],
        |fleet| fleet.cluster.host(host).cut_incoming(),
        pause(SHORT),
        |fleet| fleet.cluster.host(host).join(),
    )?;
    let host = scene.fleet.leader()?;
    scene.fault(
        "nothing comes from the leader",
        &[],
        |fleet| fleet.cluster.host(host).cut_outgoing(),
        pause(SHORT),
        |fleet| fleet.cluster.host(host).join(),
    )?;

    // All of etcd, for longer than machines survive.
    let moved = scene.ledger.changes("schedule/steady").count();
    scene.fault("quorum lost", &[], |_| members.kill(&[0, 1]), without_etcd, |_| members.boot(&[0, 1]))?;
    scene.fault(
        "etcd stopped",
        &[],
        |_| members.kill(&members.all()),
        without_etcd,
        |_| members.boot_all(),
    )?;
    // Until machines had their time to show that they are there, and longer.
    sleep(TTL + SHORT);
    scene.settle(&[])?;
    ensure!(scene.ledger.changes("schedule/steady").count() == moved, "units moved after an outage of etcd");

    let host = scene.fleet.leader()?;
    let gone = |fleet: &Fleet| {
        let id = fleet.cluster.host(host).machine_id();
        until("the machine is lost", || {
            Ok(!fleet.ctl_on(other(host), "list-machines --no-legend --full")?.ok()?.stdout.contains(id))
        })?;
        let units = scene_units(fleet, &id[..8], other(host))?;
        ensure!(units.is_empty(), "{units}");
        sleep(outage().saturating_sub(TTL));
        Ok(())
    };
    scene.fault(
        "leader's machine cut off for long",
        &[host],
        |fleet| fleet.cluster.host(host).cut(),
        gone,
        |fleet| fleet.cluster.host(host).join(),
    )?;
    Ok(scene)
}

/// Waits until no steady unit is shown on a machine, by the beginning of its ID; what is still there.
fn scene_units(fleet: &Fleet, machine: &str, server: usize) -> Result<String> {
    let mut left = String::new();
    until("its units run elsewhere", || {
        let list = fleet.ctl_on(server, "list-units --no-legend --fields=unit,machine,active")?.ok()?.stdout;
        let steady = || list.lines().filter(|line| line.starts_with("steady"));
        left = steady().filter(|line| line.contains(machine)).collect();
        Ok(left.is_empty() && steady().all(|line| line.ends_with("\tactive")))
    })?;
    Ok(left)
}

/// Whether a unit is to be launched, as the ledger has it.
fn is_launched(ledger: &Ledger, unit: &str) -> bool {
    let key = format!("unit/{unit}");
    let last = ledger.changes(&key).filter(|change| change.key == key).last();
    let record = last.and_then(|change| change.value.as_deref()).unwrap_or_default();
    record.contains(r#""desired":"launched""#)
}

/// What the history says in the end.
fn check(mut scene: Scene<'_>) -> Result<()> {
    let fleet = scene.fleet;
    let commands = scene.commands.lock().unwrap();
    let mut units: BTreeSet<String> = scene.steady.iter().cloned().collect();
    units.extend(commands.iter().filter_map(|command| command.key.strip_prefix("unit/")).map(str::to_owned));
    let units: Vec<String> = units.into_iter().collect();
    // What was commanded last may still be under way; in the end everything is at rest.
    until("what runs is what the registry says", || {
        scene.ledger.read_on(&fleet.members())?;
        let running = fleet.running(&units)?;
        Ok(units.iter().all(|unit| {
            let hosts: Vec<&str> =
                running.0[unit].iter().map(|run| fleet.cluster.host(run.host).machine_id()).collect();
            let place = scene.ledger.places(unit).pop().flatten();
            match place.filter(|_| is_launched(&scene.ledger, unit)) {
                Some(machine) => hosts == [machine],
                None => hosts.is_empty(),
            }
        }))
    })?;
    let mut lists = Vec::new();
    until("all servers say the same", || {
        lists = fleet
            .servers()
            .map(|server| Ok(fleet.ctl_on(server, "list-unit-files --no-legend --full")?.ok()?.stdout))
            .collect::<Result<Vec<_>>>()?;
        Ok(lists.iter().all(|list| list == &lists[0]))
    })
    .with_context(|| format!("{lists:#?}"))?;
    scene.ledger.read_on(&fleet.members())?;

    let mut wrong = scene.ledger.lost(&commands);
    wrong.extend(scene.ledger.wrong_moves());
    // Each run was decided.
    let starts = scene.ledger.starts();
    let (mut runs, mut decided) = (0, 0);
    for host in fleet.cluster.hosts() {
        for unit in &units {
            let path = host.disk_path(format!("/var/log/runs/{unit}"));
            let log = std::fs::read_to_string(path).unwrap_or_default();
            let had = log.lines().filter(|line| line.starts_with("start ")).count();
            let may = starts.get(&(unit.clone(), host.machine_id().to_owned())).copied().unwrap_or_default();
            if had > may {
                wrong.push(format!(
                    "{unit} was started {had} times on {}, and {may} starts were decided",
                    host.name()
                ));
            }
            (runs, decided) = (runs + had, decided + may);
        }
    }
    let acknowledged = commands.iter().filter(|command| command.acknowledged).count();
    println!(
        "{acknowledged} commands acknowledged of {}; {runs} runs of {decided} starts decided; {} changes of the registry, {} terms",
        commands.len(),
        scene.ledger.changes("").count(),
        scene.ledger.changes("leader").filter(|change| change.value.is_some()).count()
    );
    ensure!(acknowledged > 100 && runs > scene.steady.len(), "there was hardly a stream of commands");
    ensure!(wrong.is_empty(), "{wrong:#?}");
    Ok(())
}
