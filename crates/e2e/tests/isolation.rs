//! Machines that are cut off: units with OnIsolation=stop never run twice, those with keep run on, and all is well again
//! afterwards.
//!
//! Each unit of these tests writes the time into a file on its host for as long as it runs. All hosts have one clock, that of the
//! machine they are on, so what ran when is compared afterwards.

use anyhow::{Context, Result, ensure};
use fleet_e2e::{Fleet, until};
use std::collections::BTreeMap;

/// Where units write, and when: "PID SECONDS" lines.
const LOG: &str = "/var/log/runs";
/// How many units of each kind a test starts: so many that each host has some.
const EACH: usize = 3;

/// A unit that writes the time as long as it runs, with these lines in [Service] and [X-Fleet].
fn ticking(service: &str, fleet: &str) -> String {
    format!(
        "[Service]\nExecStartPre=/bin/mkdir -p {LOG}\n\
         ExecStart=/bin/sh -c 'while read now rest < /proc/uptime; do echo $$$$ $now >> {LOG}/%n; sleep 0.05; done'\n\
         {service}\n[X-Fleet]\n{fleet}\n"
    )
}

const STOP: &str = "OnIsolation=stop";

/// Three hosts with units of both kinds on each.
struct Rig {
    fleet: Fleet,
    stop: Vec<String>,
    keep: Vec<String>,
}

impl Rig {
    fn up(name: &str, conf: &str) -> Result<Rig> {
        Ok(Rig { fleet: Fleet::join_all(name, 3, conf)?, stop: Vec::new(), keep: Vec::new() })
    }

    /// The same where the first host is the only server.
    fn up_with_one_server(name: &str, conf: &str) -> Result<Rig> {
        Ok(Rig { fleet: Fleet::join_one_server(name, 3, conf)?, stop: Vec::new(), keep: Vec::new() })
    }

    /// Starts fresh units; those before are destroyed.
    fn start(&mut self, round: usize, service: &str) -> Result<()> {
        self.start_both(round, service, service)
    }

    /// The same, with other lines for those with stop than for those with keep.
    fn start_both(&mut self, round: usize, stop: &str, keep: &str) -> Result<()> {
        let before: Vec<_> = self.stop.iter().chain(&self.keep).cloned().collect();
        if !before.is_empty() {
            self.fleet.ok(&format!("destroy {}", before.join(" ")))?;
        }
        let names = |kind: &str| (0..EACH).map(|n| format!("{kind}-{round}-{n}.service")).collect::<Vec<_>>();
        (self.stop, self.keep) = (names("stop"), names("keep"));
        for (units, service, fleet) in [(&self.stop, stop, STOP), (&self.keep, keep, "")] {
            for unit in units {
                self.fleet.file(unit, &ticking(service, fleet))?;
            }
            self.fleet.ok(&format!("start {}", units.join(" ")))?;
        }
        for host in 0..3 {
            let (stop, keep) = (self.on(host, &self.stop)?, self.on(host, &self.keep)?);
            ensure!(!stop.is_empty() && !keep.is_empty(), "host {host} has {stop:?} and {keep:?}");
        }
        Ok(())
    }

    /// Those of the units that run on a host.
    fn on(&self, host: usize, units: &[String]) -> Result<Vec<String>> {
        let argv = ["systemctl", "is-active"].into_iter().chain(units.iter().map(String::as_str));
        let states = self.fleet.cluster.host(host).run(argv)?.stdout;
        ensure!(states.lines().count() == units.len(), "{states}");
        let active = units.iter().zip(states.lines()).filter(|(_, state)| *state == "active");
        Ok(active.map(|(unit, _)| unit.clone()).collect())
    }

    fn pids(&self, host: usize) -> Result<Pids> {
        let [stop, keep] = ["stop-", "keep-"].map(|prefix| self.fleet.pids(host, prefix));
        Ok(Pids { stop: stop?, keep: keep? })
    }

    fn all_pids(&self) -> Result<Vec<Pids>> {
        (0..3).map(|host| self.pids(host)).collect()
    }

    /// Waits until each unit runs, on one host exactly, and all machines are there.
    fn until_well(&self) -> Result<()> {
        until("all machines are there", || {
            Ok(self.fleet.ok("list-machines --no-legend")?.lines().count() == 3)
        })?;
        until("one copy of each unit", || {
            let mut copies: BTreeMap<String, usize> = BTreeMap::new();
            for host in 0..3 {
                for unit in self.on(host, &self.stop)?.into_iter().chain(self.on(host, &self.keep)?) {
                    *copies.entry(unit).or_default() += 1;
                }
            }
            Ok(copies.len() == 2 * EACH && copies.values().all(|count| *count == 1))
        })?;
        until("and it is known where", || {
            let list = self.fleet.ok("list-units --no-legend --fields=unit,active")?;
            Ok(list.lines().count() == 2 * EACH && list.matches("\tactive").count() == 2 * EACH)
        })
    }

    /// Waits until all units that a host had run elsewhere.
    fn until_elsewhere(&self, host: usize) -> Result<()> {
        // By its ID, which tables show for a machine that is gone, too.
        let id = &self.fleet.cluster.host(host).machine_id()[..8];
        until("its units run elsewhere", || {
            let list = self.fleet.ok("list-units --no-legend --fields=unit,machine,active")?;
            let runs = |unit: &String| {
                let mut lines = list.lines().filter(|line| line.starts_with(unit.as_str()));
                lines.any(|line| line.ends_with("\tactive") && !line.contains(id))
            };
            Ok(self.stop.iter().chain(&self.keep).all(runs) && !list.contains(id))
        })
    }

    /// No unit with OnIsolation=stop ever ran on two hosts at a time.
    fn never_twice(&self) -> Result<()> {
        for unit in &self.stop {
            let mut runs: BTreeMap<(usize, String), (f64, f64)> = BTreeMap::new();
            for host in 0..3 {
                let path = format!("{LOG}/{unit}");
                if !self.fleet.cluster.host(host).exists(&path) {
                    continue;
                }
                for line in self.fleet.cluster.host(host).read(&path)?.lines() {
                    let (pid, time) = line.split_once(' ').context("a damaged line")?;
                    let time: f64 = time.parse()?;
                    let run = runs.entry((host, pid.to_owned())).or_insert((time, time));
                    *run = (run.0.min(time), run.1.max(time));
                }
            }
            let mut spans: Vec<_> =
                runs.into_iter().map(|((host, _), span)| (span.0, span.1, host)).collect();
            spans.sort_by(|a, b| a.0.total_cmp(&b.0));
            ensure!(!spans.is_empty(), "{unit} left no trace");
            for pair in spans.windows(2) {
                ensure!(pair[0].1 < pair[1].0, "{unit} ran twice at a time: {spans:?} (begin, end, host)");
            }
        }
        Ok(())
    }

    /// Cuts a host off in some way until its units run elsewhere, and heals it.
    fn isolate(&self, cut: impl FnOnce() -> Result<()>, heal: impl FnOnce() -> Result<()>) -> Result<()> {
        let host = 1;
        let before = self.all_pids()?;
        cut()?;
        self.until_elsewhere(host)?;
        let isolated = self.pids(host)?;
        ensure!(isolated.stop.is_empty(), "those with stop are stopped there, not {}", isolated.stop);
        ensure!(isolated.keep == before[host].keep, "those with keep run on there");
        // Not even where it is the guard that stopped them, and fleetd may never know.
        let marks = self.fleet.cluster.host(host).sh("ls /run/fleet/launched")?.ok()?.stdout;
        ensure!(marks.contains("keep-") && !marks.contains("stop-"), "none is marked as started: {marks}");
        let elsewhere = [self.pids(0)?, self.pids(2)?];
        heal()?;
        self.until_well()?;
        let after = [self.pids(0)?, self.pids(2)?];
        ensure!(
            after == elsewhere,
            "the copies elsewhere stay: {elsewhere:?}, now {after:?}; {:?}",
            [0, 2].map(|host| self.isolations(host))
        );
        for (now, before) in elsewhere.iter().zip([&before[0], &before[2]]) {
            ensure!(now.contains(before), "no unit that was not concerned was touched");
        }
        ensure!(self.pids(host)? == Pids::default(), "nothing is left on the machine that was cut off");
        self.never_twice()
    }

    /// What a host's fleetd says of its being cut off.
    fn isolations(&self, host: usize) -> Result<String> {
        let log = self.fleet.cluster.host(host).journal(Some("fleetd.service"))?;
        Ok(log.lines().filter(|line| line.contains("OnIsolation=stop")).collect::<Vec<_>>().join("\n"))
    }

    fn fleetd(&self, host: usize, verb: &str) -> Result<()> {
        self.fleet.cluster.host(host).sh(&format!("systemctl {verb}"))?.ok().map(drop)
    }
}

/// Units with their main processes, by kind.
#[derive(Debug, Default, PartialEq, Eq)]
struct Pids {
    stop: String,
    keep: String,
}

impl Pids {
    fn contains(&self, other: &Pids) -> bool {
        other.stop.lines().all(|line| self.stop.contains(line))
            && other.keep.lines().all(|line| self.keep.contains(line))
    }
}

/// Half of it is how long a busy machine may hold up renewals.
const SHORT: &str = "agent_ttl=\"10s\"";
/// Long enough for fleetd to be restarted within half of it on a busy machine.
const LONG: &str = "agent_ttl=\"24s\"";

#[test]
fn a_machine_without_a_network() -> Result<()> {
    let mut rig = Rig::up("isolated", SHORT)?;
    for (round, way) in ["both ways", "to it", "from it"].into_iter().enumerate() {
        rig.start(round, "TimeoutStopSec=1s")?;
        let host = rig.fleet.cluster.host(1);
        let cut = || match way {
            "both ways" => host.cut(),
            "to it" => host.cut_incoming(),
            _ => host.cut_outgoing(),
        };
        rig.isolate(cut, || host.join()).with_context(|| format!("cut {way}"))?;
    }
    let log = rig.fleet.cluster.host(1).journal(Some("fleetd.service"))?;
    assert!(log.contains("stopped because this machine could not reach a server for"), "{log}");
    Ok(())
}

#[test]
fn a_fleetd_that_hangs_or_dies() -> Result<()> {
    let mut rig = Rig::up("guarded", SHORT)?;
    // It hangs.
    rig.start(0, "TimeoutStopSec=1s")?;
    let signal =
        |signal: &str| rig.fleetd(1, &format!("kill --signal={signal} --kill-who=main fleetd.service"));
    rig.isolate(|| signal("STOP"), || signal("CONT")).context("SIGSTOP")?;
    // It was stopped.
    rig.start(1, "TimeoutStopSec=1s")?;
    rig.isolate(
        || rig.fleetd(1, "stop fleetd.socket fleetd.service"),
        || rig.fleetd(1, "start fleetd.service"),
    )
    .context("stopped")?;
    // It is killed again and again on a machine that is cut off, and comes back each time, and so does its guard.
    rig.start(2, "TimeoutStopSec=1s")?;
    let host = rig.fleet.cluster.host(1);
    let cut = || {
        host.cut()?;
        for _ in 0..4 {
            rig.fleetd(1, "kill --signal=KILL fleetd.service fleet-guard.service")?;
            std::thread::sleep(std::time::Duration::from_millis(500));
        }
        Ok(())
    };
    rig.isolate(cut, || host.join()).context("killed")
}

#[test]
fn a_unit_that_will_not_stop_is_killed_in_time() -> Result<()> {
    let mut rig = Rig::up("stubborn", SHORT)?;
    // A shell that waits for its sleep does not end by a signal that both ignore.
    rig.start_both(0, "IgnoreSIGPIPE=yes\nKillSignal=SIGPIPE\nTimeoutStopSec=infinity", "")?;
    let host = rig.fleet.cluster.host(1);
    rig.isolate(|| host.cut(), || host.join())?;
    let log = host.journal(Some("fleet-guard.service"))?;
    assert!(log.contains("killing stop-0-"), "{log}");
    Ok(())
}

#[test]
fn what_is_over_in_time_touches_nothing() -> Result<()> {
    let mut rig = Rig::up("intime", LONG)?;
    rig.start(0, "TimeoutStopSec=1s")?;
    let before = rig.all_pids()?;
    let (agent, server) = (rig.fleet.cluster.host(1), rig.fleet.host());
    let kill = "kill --signal=KILL fleetd.service";
    for what in [
        "cable",
        "one way",
        "fleetd restarted",
        "fleetd killed",
        "server killed",
        "server restarted",
        "guard killed",
    ] {
        match what {
            "cable" => {
                agent.cut()?;
                agent.join()?;
            }
            "one way" => {
                agent.cut_incoming()?;
                agent.join()?;
            }
            "fleetd restarted" => rig.fleetd(1, "restart fleetd.service")?,
            "fleetd killed" => rig.fleetd(1, kill)?,
            "server killed" => rig.fleetd(0, kill)?,
            "server restarted" => rig.fleetd(0, "restart fleetd.service")?,
            _ => rig.fleetd(1, "kill --signal=KILL fleet-guard.service")?,
        }
        until("fleetd serves", || Ok(rig.fleet.ctl("list-machines")?.success()))?;
        until("fleetd runs on the other", || {
            Ok(agent.run(["systemctl", "is-active", "fleetd.service"])?.success())
        })?;
        rig.until_well().context(what)?;
        assert_eq!(rig.all_pids()?, before, "{what}");
    }
    // The guard knows of renewals again: the one it knew of in the beginning is long past.
    until("presence is renewed", || {
        let renewed = |host: usize| -> Result<f64> {
            let told = rig.fleet.cluster.host(host).read("/run/fleet/guard")?;
            let nanos = told.lines().find_map(|line| line.strip_prefix("renewed ")).context("no time")?;
            Ok(nanos.parse::<f64>()? / 1e9)
        };
        let uptime = server.read("/proc/uptime")?;
        let now: f64 = uptime.split(' ').next().context("no uptime")?.parse()?;
        Ok((0..3)
            .map(renewed)
            .collect::<Result<Vec<_>>>()?
            .into_iter()
            .all(|renewed| now - renewed < 24.0 / 4.0))
    })?;
    assert_eq!(rig.all_pids()?, before);
    rig.never_twice()
}

#[test]
fn a_server_that_is_away_for_long() -> Result<()> {
    let mut rig = Rig::up_with_one_server("noserver", SHORT)?;
    rig.start(0, "TimeoutStopSec=1s")?;
    let before = rig.all_pids()?;
    let places = rig.fleet.ok("list-units --no-legend --fields=unit,machine")?;
    rig.fleetd(0, "stop fleetd.socket fleetd.service")?;
    until("units with stop are stopped on all machines", || {
        Ok(rig.all_pids()?.iter().all(|pids| pids.stop.is_empty()))
    })?;
    for (now, before) in rig.all_pids()?.iter().zip(&before) {
        assert_eq!(now.keep, before.keep);
    }
    rig.fleetd(0, "start fleetd.service")?;
    rig.until_well()?;
    for (now, before) in rig.all_pids()?.iter().zip(&before) {
        assert_eq!(now.keep, before.keep, "units with keep noticed nothing");
    }
    assert_eq!(
        rig.fleet.ok("list-units --no-legend --fields=unit,machine")?,
        places,
        "all are where they were"
    );
    rig.never_twice()
}

#[test]
fn a_machine_that_shuts_down_leaves_when_its_units_have_stopped() -> Result<()> {
    let mut rig = Rig::up_with_one_server("leaving", LONG)?;
    rig.start(0, "ExecStop=/bin/sleep 2")?;
    rig.fleet.cluster.host(1).shutdown()?;
    rig.until_elsewhere(1)?;
    let log = rig.fleet.host().journal(Some("fleetd.service"))?;
    let id = rig.fleet.cluster.host(1).machine_id();
    assert!(log.contains(&format!("machine {id} leaves")), "{log}");
    rig.fleet.cluster.host(1).boot()?;
    rig.until_well()?;
    rig.never_twice()
}

#[test]
fn a_machine_without_such_units_has_no_guard() -> Result<()> {
    let fleet = Fleet::join_all("guard", 1, SHORT)?;
    let guard = || fleet.property("fleet-guard.service", "ActiveState");
    fleet.start("keep.service", &ticking("", ""))?;
    assert_eq!(guard()?, "inactive");
    fleet.start("stop.service", &ticking("", STOP))?;
    assert_eq!(guard()?, "active");
    fleet.start("second.service", &ticking("TimeoutStopSec=7s", STOP))?;
    let told = fleet.host().read("/run/fleet/guard")?;
    assert!(
        told.contains("unit 90000000000 stop.service\n") && told.contains("unit 7000000000 second.service\n"),
        "{told}"
    );
    fleet.ok("destroy stop.service")?;
    assert_eq!(guard()?, "active");
    fleet.ok("unload second.service")?;
    until("nothing is left to guard", || {
        Ok(guard()? == "inactive" && !fleet.host().exists("/run/fleet/guard"))
    })?;
    // Without a guard such a unit does not run, and says why.
    fleet.host().run(["systemctl", "mask", "--runtime", "fleet-guard.service"])?.ok()?;
    fleet.ok("start --no-block second.service")?;
    until("it says why", || {
        Ok(fleet.ok("explain second.service")?.contains("can't be kept without the guard"))
    })?;
    assert_eq!(fleet.property("second.service", "ActiveState")?, "inactive");
    fleet.host().run(["systemctl", "unmask", "--runtime", "fleet-guard.service"])?.ok()?;
    until("it runs", || Ok(fleet.property("second.service", "ActiveState")? == "active"))
}
