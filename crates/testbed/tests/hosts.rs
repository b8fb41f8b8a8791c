//! Hosts are real, apart from each other, and leave nothing behind. Needs root and systemd-container.
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests, which the configuration cannot tell")]

use std::io::{BufRead as _, BufReader};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use fleet_testbed::{BASE, Cluster, Host, Options, Signal};

/// Nothing takes so long.
const LONG: Duration = Duration::from_secs(60);

/// Whether a packet from `from` comes back from `to` within so many seconds: nothing listens on the port, so a living host
/// refuses, and a dead or cut one says nothing.
fn answers(from: &Host, to: &str, seconds: u32) -> bool {
    let script = format!("timeout {seconds} bash -c 'echo > /dev/tcp/{to}/9'");
    from.sh(&script).unwrap().stderr.contains("Connection refused")
}

/// Whether `to` answers; on a busy machine it is some time until a cable that was plugged in carries packets.
fn reaches(from: &Host, to: &str) -> bool {
    answers(from, to, 30)
}

fn is_silent(from: &Host, to: &str) -> bool {
    !answers(from, to, 3)
}

/// How many packets a host has received.
fn received(host: &Host) -> u64 {
    host.read("/sys/class/net/host0/statistics/rx_packets").unwrap().trim().parse().unwrap()
}

/// Everything on this machine that bears the cluster's name.
fn remains(name: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    found.extend(mounts.lines().filter(|line| line.contains(name)).map(str::to_owned));
    let mut walk = vec![Path::new("/sys/fs/cgroup").to_owned()];
    while let Some(dir) = walk.pop() {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                walk.push(entry.path());
                if entry.file_name().to_string_lossy().contains(name) {
                    found.push(entry.path().display().to_string());
                }
            }
        }
    }
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let cmdline = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let cmdline = String::from_utf8_lossy(&cmdline).replace('\0', " ");
        if cmdline.contains(&format!("machine={name}-")) {
            found.push(cmdline);
        }
    }
    if Path::new(BASE).join(name).exists() {
        found.push(format!("{BASE}/{name}"));
    }
    found
}

fn link_exists(name: &str) -> bool {
    Path::new("/sys/class/net").join(name).exists()
}

/// The bridge that a host's cable is plugged into.
fn bridge_of(veth: &str) -> String {
    let master = std::fs::read_link(format!("/sys/class/net/{veth}/master")).unwrap();
    master.file_name().unwrap().to_string_lossy().into_owned()
}

#[test]
fn hosts_are_real_and_leave_nothing_behind() {
    let cluster = Cluster::up(Options::for_test("real", 2)).unwrap();
    let (name, a, b) = (cluster.name().to_owned(), cluster.host(0), cluster.host(1));
    assert!(!remains(&name).is_empty());
    let (veth, bridge) = (a.veth().unwrap(), bridge_of(&a.veth().unwrap()));
    assert!(link_exists(&veth) && link_exists(&bridge));

    // Its own systemd, name, machine ID, address, and a boot without failed units.
    assert_eq!(a.run(["ps", "-o", "comm=", "-p", "1"]).unwrap().ok().unwrap().stdout.trim(), "systemd");
    assert_eq!(a.run(["hostname"]).unwrap().stdout.trim(), a.name());
    assert_eq!(a.read("/etc/machine-id").unwrap().trim(), a.machine_id());
    assert_ne!(a.machine_id(), b.machine_id());
    let state = a.run(["systemctl", "is-system-running"]).unwrap();
    let failed = a.run(["systemctl", "--failed", "--no-legend"]).unwrap();
    assert_eq!((state.stdout.trim(), failed.stdout.trim()), ("running", ""));
    assert!(
        a.run(["ip", "-4", "addr", "show", "host0"]).unwrap().stdout.contains(&format!(" {}/24", a.ip()))
    );

    // Units of the same name on two hosts are two units.
    for host in [a, b] {
        host.write("/etc/systemd/system/same.service", "[Service]\nExecStart=/bin/sleep 1000\n").unwrap();
        host.run(["systemctl", "start", "same.service"]).unwrap().ok().unwrap();
    }
    a.run(["systemctl", "stop", "same.service"]).unwrap().ok().unwrap();
    assert_eq!(b.run(["systemctl", "is-active", "same.service"]).unwrap().stdout.trim(), "active");

    // The cable.
    assert!(reaches(a, b.name()));
    b.cut().unwrap();
    assert!(is_silent(a, b.ip()));
    b.join().unwrap();
    assert!(reaches(a, b.ip()));
    // One way only: no answer comes either way, but what is sent in the other direction arrives.
    b.cut_incoming().unwrap();
    let before = [a, b].map(received);
    assert!(is_silent(a, b.ip()));
    assert_eq!(received(b), before[1]);
    assert!(is_silent(b, a.ip()));
    assert!(received(a) > before[0]);
    b.join().unwrap();
    assert!(reaches(a, b.ip()));
    b.cut_outgoing().unwrap();
    let before = received(b);
    assert!(is_silent(b, a.ip()));
    assert!(is_silent(a, b.ip()));
    assert!(received(b) > before);
    b.join().unwrap();
    assert!(reaches(a, b.ip()));

    // The power.
    b.write("/root/kept", "on disk").unwrap();
    b.write("/run/lost", "in memory").unwrap();
    b.kill().unwrap();
    assert!(!b.is_up());
    assert!(b.run(["true"]).unwrap_err().to_string().contains("is down"));
    assert_eq!(std::fs::read_to_string(b.disk_path("/root/kept")).unwrap(), "on disk");
    b.boot().unwrap();
    assert_eq!(b.read("/root/kept").unwrap(), "on disk");
    assert!(!b.exists("/run/lost"));
    assert!(reaches(a, b.ip()));

    // A clean reboot stops units, whoever asks for it.
    let unit = "[Service]\nExecStart=/bin/sleep 1000\nExecStop=/bin/touch /root/stopped\n";
    b.write("/etc/systemd/system/told.service", unit).unwrap();
    b.run(["systemctl", "start", "told.service"]).unwrap().ok().unwrap();
    assert!(!b.exists("/root/stopped"));
    b.reboot().unwrap();
    assert!(b.exists("/root/stopped"));

    // Another process sees the same cluster; dropping its view changes nothing.
    let other = Cluster::open(&name).unwrap();
    assert!(other.has_living_owner());
    assert_eq!(other.host(1).run(["cat", "/root/kept"]).unwrap().stdout, "on disk");
    drop(other);
    assert!(a.is_up());

    drop(cluster);
    assert_eq!(remains(&name), Vec::<String>::new());
    assert!(!link_exists(&veth) && !link_exists(&bridge));
}

#[test]
fn a_panic_takes_the_cluster_down() {
    let options = Options::for_test("panic", 1);
    let name = options.name.clone();
    let panicked = std::panic::catch_unwind(|| {
        let _cluster = Cluster::up(options).unwrap();
        panic!("on purpose");
    });
    assert!(panicked.is_err());
    assert_eq!(remains(&name), Vec::<String>::new());
}

#[test]
fn a_signal_takes_the_cluster_down_and_a_kill_is_swept() {
    let hold = || {
        let name = Options::for_test("held", 1).name;
        let mut child = Command::new(env!("CARGO_BIN_EXE_fleet-testbed"))
            .args(["up", &name, "1", "--hold"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let host = lines.next().expect("it says when the host is up").unwrap();
        assert!(host.starts_with(&name) && host.ends_with("up"), "{host}");
        (child, name)
    };
    let pid = |child: &std::process::Child| rustix::process::Pid::from_child(child);

    let (mut child, name) = hold();
    assert!(!remains(&name).is_empty());
    rustix::process::kill_process(pid(&child), Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(Signal::TERM.as_raw()));
    assert_eq!(remains(&name), Vec::<String>::new());

    let (mut child, name) = hold();
    rustix::process::kill_process(pid(&child), Signal::KILL).unwrap();
    child.wait().unwrap();
    assert!(!remains(&name).is_empty());
    let _next = Cluster::up(Options::for_test("sweeper", 1)).unwrap();
    assert_eq!(remains(&name), Vec::<String>::new());
}

#[test]
fn clusters_do_not_disturb_each_other() {
    let [a, b] = std::thread::scope(|scope| {
        let up = || Cluster::up(Options::for_test("beside", 1)).unwrap();
        [scope.spawn(up), scope.spawn(up)].map(|thread| thread.join().unwrap())
    });
    assert_ne!(a.gateway(), b.gateway());
    assert!(is_silent(a.host(0), b.host(0).ip()));
    drop(a);
    assert_eq!(b.host(0).run(["systemctl", "is-system-running"]).unwrap().stdout.trim(), "running");
    // One that is kept outlives its maker.
    let name = b.name().to_owned();
    b.keep().unwrap();
    let b = Cluster::open(&name).unwrap();
    assert!(b.host(0).is_up() && !b.has_living_owner());
    b.down().unwrap();
    assert_eq!(remains(&name), Vec::<String>::new());
    assert!(Cluster::open(&name).unwrap_err().to_string().contains("no cluster"));
}

#[test]
fn commands_have_deadlines_streams_and_signals() {
    let cluster = Cluster::up(Options::for_test("commands", 1)).unwrap();
    let host = cluster.host(0);

    let out = host.sh("echo out; echo err >&2; exit 7").unwrap();
    assert_eq!((out.code(), &*out.stdout, &*out.stderr), (7, "out\n", "err\n"));
    assert!(out.ok().unwrap_err().to_string().contains("ended with code 7"));
    let echoed = host.command(["cat"]).stdin("x".repeat(1 << 20)).run().unwrap();
    assert_eq!(echoed.stdout.len(), 1 << 20);
    let env = host.command_in("/etc", ["sh", "-c", "echo $PWD $A $HOME"]).env("A", "b").run().unwrap();
    assert_eq!(env.stdout, "/etc b /root\n");
    assert!(!host.run(["no-such-program"]).unwrap().success());

    // What passes its deadline is gone, with what it started.
    let late = host.command(["sh", "-c", "echo begun; sleep 54321; true"]).deadline(Duration::from_secs(3));
    let error = late.run().unwrap_err().to_string();
    assert!(error.contains("has not ended within 3s") && error.contains("begun"), "{error}");
    let end = Instant::now() + LONG;
    while host.run(["pgrep", "-f", "sleep 54321"]).unwrap().code() != 1 {
        assert!(Instant::now() < end, "it runs on");
    }

    // What leaves something behind that holds its output does not hang.
    let left = host.sh("sleep 12345 & echo started").unwrap();
    assert_eq!(left.stdout, "started\n");

    let script =
        "trap 'echo caught; exit 3' INT; echo ready; while read l; do echo got $l; done; sleep 1000 & wait";
    let mut running = host.start_process(["sh", "-c", script]).unwrap();
    assert_eq!(running.wait_for("ready", LONG).unwrap(), "ready");
    running.write(b"one\n").unwrap();
    assert_eq!(running.read_line(LONG).unwrap().as_deref(), Some("got one"));
    assert!(running.read_line(Duration::from_millis(50)).unwrap_err().to_string().contains("no line"));
    running.close_stdin();
    running.signal(Signal::INT).unwrap();
    let end = running.finish(LONG).unwrap();
    assert_eq!((end.code(), end.stdout.trim()), (3, "caught"));
}

#[test]
fn servers_for_tests_work() {
    let cluster = Cluster::up(Options::for_test("servers", 2)).unwrap();
    let (a, b) = (cluster.host(0), cluster.host(1));

    let key = a.start_sshd().unwrap();
    for (host, user) in [(a, "core"), (b, "root")] {
        assert_eq!(host.start_sshd().unwrap(), key);
        let ssh = Command::new("ssh")
            .args([
                "-o",
                "BatchMode=yes",
                "-o",
                "UserKnownHostsFile=/dev/null",
                "-o",
                "StrictHostKeyChecking=no",
            ])
            .args(["-o", "ConnectTimeout=10", "-F", "/dev/null", "-i"])
            .arg(&key)
            .args([format!("{user}@{}", host.ip()), "id -un; hostname; exit 5".into()])
            .output()
            .expect("ssh: install openssh-client");
        let out = String::from_utf8_lossy(&ssh.stdout).into_owned();
        assert_eq!(out, format!("{user}\n{}\n", host.name()), "{}", String::from_utf8_lossy(&ssh.stderr));
        assert_eq!(ssh.status.code(), Some(5));
    }
    assert_ne!(
        a.read("/etc/ssh/ssh_host_ed25519_key.pub").unwrap(),
        b.read("/etc/ssh/ssh_host_ed25519_key.pub").unwrap()
    );

    let mirror = cluster.start_mirror().unwrap();
    assert_eq!(cluster.start_mirror().unwrap().url(), mirror.url());
    b.start_docker(&mirror).unwrap();
    b.run(["/usr/bin/docker", "pull", "busybox"]).unwrap().ok().unwrap();
    let run = ["/usr/bin/docker", "run", "--rm", "busybox", "/bin/sh", "-c", "echo Hello World"];
    assert_eq!(b.run(run).unwrap().ok().unwrap().stdout, "Hello World\n");

    // polkit answers on demand, so that what it guards is decided and not merely broken.
    let start = ["systemctl", "start", "--no-ask-password", "none.service"];
    let asked = b.run(["setpriv", "--reuid=nobody", "--clear-groups"].into_iter().chain(start)).unwrap();
    assert!(asked.stderr.contains("authentication"), "{}", asked.stderr);
    assert_eq!(b.run(["systemctl", "is-active", "polkit.service"]).unwrap().stdout.trim(), "active");
}
