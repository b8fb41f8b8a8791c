//! Carries out what a plan says.

use super::plan::{Command, Fault, Mark, Setting, Step, Way, What};
use super::units::{CAST, VERSIONS};
use crate::history::{Effect, FaultId, FaultKind, Outcome, Recorder};
use crate::{Fleet, Members, until};
use anyhow::{Context, Result, ensure};
use fleet_testbed::{Cluster, Host};
use rustix::mount::MountFlags;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Where fleetd keeps what must last: a small file system of its own here, to be filled up.
const STATE: &str = "/var/lib/fleet";
const STATE_SIZE: &std::ffi::CStr = c"size=48m,mode=0700";
/// Commands at the same time.
const COMMANDS: usize = 12;
/// How long a client waits.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a repaired fleetd may take to run.
const REPAIR: Duration = Duration::from_secs(180);

/// A cluster to be tortured.
pub(super) struct Rig<'a> {
    cluster: &'a Cluster,
    members: Option<Members<'a>>,
    recorder: &'a Recorder,
    setting: Setting,
    begun: Instant,
    /// One fault at a time on each host.
    busy: Vec<Mutex<()>>,
    commands: AtomicUsize,
    /// What went wrong besides.
    errors: Mutex<Vec<anyhow::Error>>,
}

impl<'a> Rig<'a> {
    pub(super) fn new(
        fleet: &'a Fleet,
        recorder: &'a Recorder,
        setting: Setting,
        begun: Instant,
    ) -> Result<Rig<'a>> {
        let cluster = &fleet.cluster;
        let members = (setting.members > 0).then(|| fleet.members());
        for role in CAST {
            for version in 0..VERSIONS {
                let (text, file) = role.file(version);
                recorder.file(&text, file)?;
            }
        }
        for (index, host) in cluster.hosts().iter().enumerate() {
            if index < setting.members {
                host.run(["systemctl", "enable", "etcd.service"])?.ok()?;
            }
            give_state_disk(host)
                .with_context(|| format!("a disk of its own for {STATE} on {}", host.name()))?;
        }
        let busy = (0..setting.hosts).map(|_| Mutex::default()).collect();
        let rig = Rig {
            cluster,
            members,
            recorder,
            setting,
            begun,
            busy,
            commands: AtomicUsize::new(0),
            errors: Mutex::default(),
        };
        (0..setting.hosts).try_for_each(|host| rig.until_fleetd_runs(host))?;
        Ok(rig)
    }

    pub(super) fn say(&self, text: String) {
        println!("{:8.2} s  {text}", self.begun.elapsed().as_secs_f64());
    }

    /// Does everything at its time, and returns when all is done and repaired.
    pub(super) fn round(&self, steps: &[Step]) -> Result<()> {
        let begun = Instant::now();
        std::thread::scope(|scope| {
            for step in steps {
                std::thread::sleep(step.at.saturating_sub(begun.elapsed()));
                scope.spawn(move || {
                    let done = match &step.what {
                        What::Command { server, command } => self.command(*server, command),
                        What::Break { fault, takes } => self.break_for(fault, *takes),
                    };
                    if let Err(error) = done {
                        self.errors().push(error.context(format!("{:?}", step.what)));
                    }
                });
            }
        });
        if let Some(error) = self.errors().pop() {
            return Err(error);
        }
        self.repair()
    }

    fn errors(&self) -> MutexGuard<'_, Vec<anyhow::Error>> {
        self.errors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Repairs what commands did to machines.
    fn repair(&self) -> Result<()> {
        for host in 0..self.setting.hosts {
            self.until_fleetd_runs(host)?;
        }
        for host in 0..self.setting.hosts {
            let path = format!("/fleet/v1/machines/{}/cordon", self.cluster.host(host).machine_id());
            until_within("machines take units again", REPAIR, || {
                let outcome = self.recorder.api(0, Effect::Machines, "DELETE", &path, "")?;
                Ok(matches!(outcome, Outcome::Acknowledged { .. }))
            })?;
        }
        Ok(())
    }

    // ---- commands

    fn command(&self, server: usize, command: &Command) -> Result<()> {
        if self.commands.fetch_add(1, Ordering::SeqCst) < COMMANDS {
            let outcome = self.give(server, command)?;
            self.say(format!("{command:?} at server {server}: {}", short(&outcome)));
        }
        self.commands.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }

    fn give(&self, server: usize, command: &Command) -> Result<Outcome> {
        let machine = |host: usize| self.cluster.host(host).machine_id();
        match command {
            Command::Put { unit, version, desired } => {
                let role = &CAST[*unit];
                let text = version.map(|version| role.file(version).0);
                self.recorder.put(server, role.name, text.as_deref(), desired)
            }
            Command::Destroy { unit } => self.recorder.destroy(server, CAST[*unit].name),
            Command::Fleetctl { unit, verb } => self.fleetctl(server, CAST[*unit].name, verb),
            Command::Zone { host, value } => {
                let op = if value.is_some() { "add" } else { "remove" };
                let path = format!("/{}/metadata/zone", machine(*host));
                let body = serde_json::json!([{"op": op, "path": path, "value": value}]).to_string();
                self.recorder.api(server, Effect::Machines, "PATCH", "/fleet/v1/machines", &body)
            }
            Command::Mark { host, mark } => {
                let (method, what) = match mark {
                    Mark::Cordon => ("PUT", "cordon"),
                    Mark::Uncordon => ("DELETE", "cordon"),
                    Mark::Drain => ("PUT", "drain"),
                    Mark::EndDrain => ("DELETE", "drain"),
                };
                let path = format!("/fleet/v1/machines/{}/{what}", machine(*host));
                self.recorder.api(server, Effect::Machines, method, &path, "")
            }
        }
    }

    fn fleetctl(&self, server: usize, unit: &str, verb: &str) -> Result<Outcome> {
        let effect = match verb {
            "destroy" => Effect::Destroy { unit: unit.into() },
            _ => {
                let desired = match verb {
                    "start" => "launched",
                    "unload" => "inactive",
                    _ => "loaded",
                };
                Effect::Put { unit: unit.into(), file: None, only_if_new: false, desired: desired.into() }
            }
        };
        let argv: &[&str] = match verb {
            "destroy" => &["fleetctl", verb, unit],
            _ => &["fleetctl", verb, "--no-block", unit],
        };
        self.recorder.command(&argv.join(" "), effect, || {
            match self.cluster.host(server).command(argv.iter().copied()).deadline(PATIENCE).run() {
                // As fleet 1.0 did, it succeeds where there is nothing to do.
                Ok(output) if format!("{}{}", output.stdout, output.stderr).contains("not found") => {
                    Outcome::Refused("no such unit".into())
                }
                Ok(output) if output.success() => Outcome::Acknowledged { revision: None },
                Ok(output) => Outcome::Unknown(output.stderr),
                Err(error) => Outcome::Unknown(format!("{error:#}")),
            }
        })
    }

    // ---- faults

    fn break_for(&self, fault: &Fault, takes: Duration) -> Result<()> {
        // The hosts that nothing else may happen to meanwhile.
        let mut hosts: Vec<usize> = fault.host().into_iter().collect();
        match fault {
            Fault::KillMembers(members) => hosts.extend(members),
            Fault::PauseMember(member) => hosts.push(*member),
            _ => {}
        }
        let locks: Vec<_> = hosts.iter().map_while(|host| self.busy[*host].try_lock().ok()).collect();
        if locks.len() < hosts.len() {
            return Ok(());
        }
        let long = takes >= self.setting.ttl / 4;
        self.say(format!("{fault:?} for {:.1} s", takes.as_secs_f64()));
        let silent = if long { FaultKind::Silent } else { FaultKind::Short };
        let kind = match fault {
            Fault::PauseFleetd(_) | Fault::Cut(..) => silent,
            Fault::PowerCut(_) | Fault::Reboot(_) => FaultKind::Silent,
            Fault::KillUnit(..) => FaultKind::Kills,
            _ => FaultKind::Short,
        };
        let mut records = vec![self.recorder.fault(format!("{fault:?}"), kind, fault.host())?];
        let server = fault.host().is_some_and(|host| host < self.setting.servers);
        if server && kind != FaultKind::Kills {
            records.push(self.recorder.fault(format!("{fault:?}"), FaultKind::Short, None)?);
        }
        self.carry_out(fault, takes)?;
        records.into_iter().try_for_each(|record: FaultId| self.recorder.healed(record))?;
        self.say(format!("{fault:?} is over"));
        Ok(())
    }

    fn carry_out(&self, fault: &Fault, takes: Duration) -> Result<()> {
        let host = |index: &usize| self.cluster.host(*index);
        let wait = || std::thread::sleep(takes);
        let sh = |index: &usize, script: &str| host(index).sh(script)?.ok().map(drop);
        match fault {
            Fault::KillFleetd(on) => {
                sh(on, "systemctl kill -s KILL fleetd.service")?;
                self.until_fleetd_runs(*on)
            }
            Fault::RestartFleetd(on) => {
                // Not waited for: without its registry a server starts only when that is back.
                sh(on, "systemctl restart --no-block fleetd.service")?;
                self.until_fleetd_runs(*on)
            }
            Fault::PauseFleetd(on) => {
                sh(on, "systemctl kill --kill-who=main -s STOP fleetd.service")?;
                wait();
                // The watchdog may have killed it.
                host(on).sh("systemctl kill --kill-who=main -s CONT fleetd.service")?;
                self.until_fleetd_runs(*on)
            }
            Fault::Cut(on, way) => {
                match way {
                    Way::Both => host(on).cut()?,
                    Way::In => host(on).cut_incoming()?,
                    Way::Out => host(on).cut_outgoing()?,
                }
                wait();
                host(on).join()
            }
            Fault::PowerCut(on) => {
                self.down(*on, || host(on).kill())?;
                wait();
                host(on).boot()?;
                self.until_fleetd_runs(*on)
            }
            Fault::Reboot(on) => {
                self.down(*on, || host(on).shutdown())?;
                host(on).boot()?;
                self.until_fleetd_runs(*on)
            }
            Fault::FullVar(on) => {
                sh(on, &format!("cat /dev/zero > {STATE}/.filler 2> /dev/null; true"))?;
                wait();
                sh(on, &format!("rm -f {STATE}/.filler"))
            }
            Fault::FullRun(on) => {
                sh(
                    on,
                    "set -e; size=$(df --output=size -k /run | tail -n 1); echo $size > /tmp/run.size\n\
                     mount -o remount,size=$(($(df --output=used -k /run | tail -n 1) + 64))k /run\n\
                     cat /dev/zero > /run/.filler 2> /dev/null || true",
                )?;
                wait();
                sh(on, "rm -f /run/.filler; mount -o remount,size=$(cat /tmp/run.size)k /run")
            }
            Fault::Reexec(on) => sh(on, "systemctl daemon-reexec"),
            Fault::Reload(on) => sh(on, "systemctl daemon-reload"),
            Fault::KillUnit(on, unit) => {
                // It need not be there.
                host(on).run(["systemctl", "kill", "-s", "KILL", CAST[*unit].name]).map(drop)
            }
            Fault::KillMembers(members) => {
                let etcd = self.members.context("no etcd")?;
                members.iter().try_for_each(|member| etcd.signal(*member, "KILL"))?;
                wait();
                etcd.launch(members)
            }
            Fault::PauseMember(member) => {
                let etcd = self.members.context("no etcd")?;
                etcd.signal(*member, "STOP")?;
                wait();
                etcd.signal(*member, "CONT")
            }
        }
    }

    /// Takes a host down, and records that nothing runs there then.
    fn down(&self, host: usize, act: impl FnOnce() -> Result<()>) -> Result<()> {
        let record = self.recorder.fault("down", FaultKind::Down, Some(host))?;
        act()?;
        self.recorder.healed(record)
    }

    fn until_fleetd_runs(&self, host: usize) -> Result<()> {
        let host = self.cluster.host(host);
        until_within(&format!("fleetd runs on {}", host.name()), REPAIR, || {
            Ok(host.run(["systemctl", "is-active", "fleetd.service"])?.success())
        })
    }
}

/// Puts fleetd's directory on a small file system of its own. That outlives power cuts of the host, as its disk does: it is
/// mounted on this machine.
fn give_state_disk(host: &Host) -> Result<()> {
    host.shutdown()?;
    let state = host.disk_path(STATE);
    let kept = state.with_extension("kept");
    copy(&state, &kept)?;
    rustix::mount::mount("tmpfs", &state, "tmpfs", MountFlags::empty(), STATE_SIZE)?;
    copy(&kept.join("."), &state)?;
    host.boot()
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let status = std::process::Command::new("cp").arg("-a").args([from, to]).status()?;
    ensure!(status.success(), "cp -a {} {}: {status}", from.display(), to.display());
    Ok(())
}

/// [`until`], for what may take longer.
fn until_within(what: &str, patience: Duration, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + patience;
    loop {
        match until(what, &mut holds) {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() > end => return Err(error),
            Err(_) => {}
        }
    }
}

/// For people.
fn short(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Acknowledged { revision: Some(revision) } => format!("revision {revision}"),
        Outcome::Acknowledged { revision: None } => "done".into(),
        Outcome::Refused(why) => format!("refused: {}", why.trim()),
        Outcome::Unknown(why) => format!("unknown: {}", why.trim()),
    }
}
