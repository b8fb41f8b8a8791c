//! [`SystemdHost`] against a real systemd.
//!
//! Each test boots a host of its own, copies this very program in, and runs itself there; what runs inside is told
//! by a variable in the environment. Needs root and what the testbed needs, and says so where that is missing.
#![allow(clippy::unwrap_used, reason = "clippy knows only functions with #[test] as tests")]
use fleet_systemd::{
    Error, JobResult, Mark, Notice, Output, State, Systemd,
    dbus::{Directories, SystemdHost},
};
use fleet_testbed::{Cluster, Options};
use fleet_unit::{Hash, UnitFile, UnitName};
use std::{
    collections::BTreeMap,
    fs,
    future::Future,
    path::Path,
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

const INSIDE: &str = "FLEET_INSIDE_HOST";
/// A test that takes longer hangs.
const DEADLINE: Duration = Duration::from_secs(120);
const SLEEP: &str = "[Service]\nExecStart=/bin/sleep infinity\n";

/// Runs the test of this name on a host: boots one, or is inside one already.
fn on_a_host<F: Future<Output = ()>>(name: &str, test: impl FnOnce() -> F) {
    if std::env::var_os(INSIDE).is_some() {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            tokio::time::timeout(DEADLINE, test()).await.expect("the test hangs");
        });
        return;
    }
    fleet_testbed::check_prerequisites().expect("this test boots a host, for which something is missing");
    let cluster = Cluster::up(Options::for_test("systemd", 1)).unwrap();
    let host = cluster.host(0);
    host.copy_in(std::env::current_exe().unwrap(), "/root/host-tests").unwrap();
    let command = host.command(["/root/host-tests", "--exact", name, "--nocapture", "--test-threads=1"]);
    let output = command.env(INSIDE, "root").deadline(DEADLINE + Duration::from_secs(10)).run().unwrap();
    println!("{}{}", output.stdout, output.stderr);
    assert!(output.success(), "{name} failed inside the host, see above");
    assert!(output.stdout.contains("1 passed"), "{name} was not found inside the host");
}

macro_rules! host_tests {
    ($($(#[$doc:meta])* async fn $name:ident() $body:block)*) => {
        $($(#[$doc])* #[test] fn $name() { on_a_host(stringify!($name), || async $body) })*
    };
}

fn name(text: &str) -> UnitName {
    UnitName::parse(text).unwrap()
}

fn unit(unit: &str, text: &str) -> (UnitName, UnitFile) {
    (name(unit), UnitFile::parse(text).unwrap())
}

async fn connect() -> SystemdHost {
    SystemdHost::connect(Directories::default()).await.unwrap()
}

/// Runs a script and gives its standard output, trimmed.
fn sh(script: &str) -> String {
    let output = std::process::Command::new("bash").args(["-c", script]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn show(unit: &str, property: &str) -> String {
    sh(&format!("systemctl show --value -p {property} {unit}"))
}

fn link(path: &str) -> Option<String> {
    Some(fs::read_link(path).ok()?.to_str().unwrap().to_owned())
}

fn state(load: &str, active: &str, sub: &str) -> State {
    State { load: load.into(), active: active.into(), sub: sub.into() }
}

async fn one_state(host: &SystemdHost, unit: &str) -> State {
    host.states(&[name(unit)]).await.unwrap().remove(unit).unwrap()
}

/// Asks, at every notice, until the unit is in this state.
async fn await_state(host: &SystemdHost, notices: &mut mpsc::Receiver<Notice>, unit: &str, wanted: State) {
    while one_state(host, unit).await != wanted {
        notices.recv().await.unwrap();
    }
}

async fn install(host: &SystemdHost, units: &[(UnitName, UnitFile)]) {
    for result in host.install(units).await {
        result.unwrap();
    }
}

async fn collect(mut output: mpsc::Receiver<Output>) -> (String, String, i32) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    while let Some(piece) = output.recv().await {
        match piece {
            Output::Out(bytes) => out.extend_from_slice(&bytes),
            Output::Err(bytes) => err.extend_from_slice(&bytes),
            Output::Exit(code) => {
                return (String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap(), code);
            }
        }
    }
    panic!("no exit code");
}

fn reloads() -> usize {
    sh("journalctl --sync; journalctl --no-pager -o cat _PID=1 | grep -c '^Reloading'").parse().unwrap()
}

/// The whole life of a unit; takes its name so that it can be led as root and as another user.
async fn live(unit_name: &str) {
    let host = connect().await;
    let (path, link_path) =
        (format!("/run/fleet/units/{unit_name}"), format!("/run/systemd/system/{unit_name}"));
    let one = name(unit_name);
    assert_eq!(one_state(&host, unit_name).await, state("not-found", "inactive", "dead"));
    install(&host, &[unit(unit_name, SLEEP)]).await;
    assert_eq!(fs::read_to_string(&path).unwrap(), SLEEP);
    assert_eq!(link(&link_path).as_deref(), Some(path.as_str()));
    assert_eq!(sh(&format!("systemctl is-enabled -- '{unit_name}'")), "linked-runtime", "{unit_name}");
    assert_eq!(one_state(&host, unit_name).await, state("loaded", "inactive", "dead"));
    assert_eq!(host.reload_if_needed(std::slice::from_ref(&one)).await, Ok(false));
    assert_eq!(host.start(&one).await, Ok(JobResult::Done));
    assert_eq!(one_state(&host, unit_name).await, state("loaded", "active", "running"));
    assert_eq!(host.start(&one).await, Ok(JobResult::Done), "again");
    assert_eq!(host.stop(&one).await, Ok(JobResult::Done));
    assert_eq!(one_state(&host, unit_name).await, state("loaded", "inactive", "dead"));
    assert_eq!(host.stop(&one).await, Ok(JobResult::Done), "again");
    assert_eq!(host.remove(std::slice::from_ref(&one)).await, [Ok(())]);
    assert!(!Path::new(&path).exists());
    assert_eq!(link(&link_path), None);
    assert_eq!(host.remove(std::slice::from_ref(&one)).await, [Ok(())], "again");
    assert_eq!(one_state(&host, unit_name).await, state("not-found", "inactive", "dead"));
    assert_eq!(host.stop(&one).await, Ok(JobResult::Done), "systemd does not know it any more");
    let error = host.start(&one).await.unwrap_err();
    assert_eq!(error, Error::Refused(format!("Unit {unit_name} not found.")));
}

host_tests! {
    async fn life_cycle() {
        live("hello.service").await;
        live("hello@1.service").await;
        live(r"dash\x2d-under_score:1.2.service").await;
        live("-.looks-like-an-option.service").await;
        assert_eq!(reloads(), 0);
        assert_eq!(sh("stat -c '%A %U:%G' /run/fleet/units"), "drwxr-xr-x root:root");
    }

    /// golden/16-node.txt: [Install]
    async fn install_section() {
        let host = connect().await;
        let text = |alias: &str| format!("{SLEEP}[Install]\nWantedBy=multi-user.target\nAlias={alias}\n");
        let file = "/run/fleet/units/inst.service";
        let links = [
            "/run/systemd/system/inst.service",
            "/run/systemd/system/multi-user.target.wants/inst.service",
            "/run/systemd/system/other.service",
        ];
        install(&host, &[unit("inst.service", &text("other.service"))]).await;
        for path in links {
            assert_eq!(link(path).as_deref(), Some(file), "{path}");
        }
        assert_eq!(sh("systemctl is-enabled inst.service"), "enabled-runtime");
        assert_eq!(host.start(&name("inst.service")).await, Ok(JobResult::Done));

        // Another alias takes the place of the first.
        install(&host, &[unit("inst.service", &text("third.service"))]).await;
        assert_eq!(link("/run/systemd/system/third.service").as_deref(), Some(file));
        assert_eq!(link(links[2]), None);
        assert_eq!(link(links[0]).as_deref(), Some(file));
        // And no [Install] leaves the plain link.
        install(&host, &[unit("inst.service", SLEEP)]).await;
        let found = "find /run/systemd/system -lname '*/fleet/units/*'";
        assert_eq!(sh(found), links[0]);

        install(&host, &[unit("inst.service", &text("other.service"))]).await;
        assert_eq!(host.stop(&name("inst.service")).await, Ok(JobResult::Done));
        assert_eq!(host.remove(&[name("inst.service")]).await, [Ok(())]);
        assert_eq!(sh(found), "");
    }

    /// systemd takes the links of what a unit names in `Also=` away with its own.
    async fn a_unit_takes_no_other_along() {
        let host = connect().await;
        let first = |text: &str| unit("a.service", &format!("{SLEEP}[Install]\nAlso=b.service\n{text}"));
        let second = unit("b.service", &format!("{SLEEP}[Install]\nWantedBy=multi-user.target\n"));
        let links =
            ["/run/systemd/system/b.service", "/run/systemd/system/multi-user.target.wants/b.service"];
        let linked = || links.map(|path| link(path).as_deref() == Some("/run/fleet/units/b.service"));
        install(&host, &[first("WantedBy=multi-user.target\n"), second]).await;
        assert_eq!(linked(), [true, true]);
        install(&host, &[first("")]).await;
        assert_eq!(linked(), [true, true], "another text");
        assert_eq!(host.remove(&[name("a.service")]).await, [Ok(())]);
        assert_eq!(linked(), [true, true], "removed");
        sh("systemctl daemon-reload");
        assert_eq!(one_state(&host, "b.service").await.load, "loaded");
        assert_eq!(host.remove(&[name("b.service")]).await, [Ok(())]);
        assert_eq!(linked(), [false, false]);
    }

    /// golden/16-node.txt: while that unit is there, nothing else gets loaded; here it does.
    async fn a_bad_install_section_spoils_nothing_else() {
        let host = connect().await;
        let wanted = |by: &str| format!("{SLEEP}[Install]\nWantedBy={by}\n");
        let units = [
            unit("first.service", &wanted("multi-user.target")),
            unit("badinst.service", &wanted("bad name")),
            unit("plain.service", SLEEP),
            unit("last.service", &wanted("multi-user.target")),
        ];
        let results = host.install(&units).await;
        assert!(matches!(&results[1], Err(Error::Refused(text)) if text.contains("bad")), "{results:?}");
        assert_eq!((&results[0], &results[2], &results[3]), (&Ok(()), &Ok(()), &Ok(())));
        assert_eq!(sh("ls -A /run/fleet/units"), "first.service\nlast.service\nplain.service");
        assert_eq!(sh("find /run/systemd/system -name 'badinst*'"), "");
        for unit in ["first.service", "plain.service", "last.service"] {
            assert_eq!(host.start(&name(unit)).await, Ok(JobResult::Done));
        }

        // A running unit whose new file is bad stays as it was.
        let pid = show("first.service", "MainPID");
        assert!(host.install(&[unit("first.service", &wanted("bad name"))]).await[0].is_err());
        assert_eq!(fs::read_to_string("/run/fleet/units/first.service").unwrap(), wanted("multi-user.target"));
        assert_eq!(sh("systemctl is-enabled first.service"), "enabled-runtime");
        assert_eq!(show("first.service", "MainPID"), pid);
    }

    async fn names_that_others_have() {
        let host = connect().await;
        fs::write("/etc/systemd/system/mine.service", "[Service]\nExecStart=/bin/sleep 54321\n").unwrap();
        sh("systemctl daemon-reload; systemctl start mine.service; systemctl mask --runtime masked.service");
        fs::write("/etc/systemd/system/family@.service", SLEEP).unwrap();
        let pid = show("mine.service", "MainPID");
        let units = [
            unit("mine.service", SLEEP),
            unit("masked.service", SLEEP),
            unit("systemd-journald.service", SLEEP),
            unit("alias.service", &format!("{SLEEP}[Install]\nAlias=mine.service\n")),
            unit("family@1.service", SLEEP),
            unit(".hidden.service", SLEEP),
        ];
        let results = host.install(&units).await;
        assert!(matches!(&results[5], Err(Error::Refused(text)) if text.contains("begins with a dot")));
        let path = |result: &Result<(), Error>| match result {
            Err(Error::Taken { path, .. }) => path.clone(),
            other => panic!("{other:?}"),
        };
        assert_eq!(path(&results[0]), "/etc/systemd/system/mine.service");
        assert_eq!(path(&results[1]), "/run/systemd/system/masked.service");
        assert!(path(&results[2]).ends_with("lib/systemd/system/systemd-journald.service"));
        assert_eq!(path(&results[3]), "/etc/systemd/system/mine.service");
        assert_eq!(results[4], Ok(()));
        assert_eq!(sh("ls -A /run/fleet/units"), "family@1.service");
        assert_eq!(host.start(&name("family@1.service")).await, Ok(JobResult::Done));
        assert_eq!(show("mine.service", "MainPID"), pid);
        assert_eq!(link("/run/systemd/system/masked.service").as_deref(), Some("/dev/null"));
    }

    /// Compares with what systemctl takes for the same; only printed, since time proves nothing on a busy machine.
    async fn three_hundred_new_units() {
        let host = connect().await;
        let text = "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n";
        let units: Vec<_> = (0..300).map(|i| unit(&format!("many-{i}.service"), text)).collect();
        let names: Vec<UnitName> = units.iter().map(|(name, _)| name.clone()).collect();
        let begin = Instant::now();
        install(&host, &units).await;
        let installed = begin.elapsed();
        assert_eq!(host.reload_if_needed(&names).await, Ok(false));
        let checked = begin.elapsed();
        for result in futures_util::future::join_all(names.iter().map(|unit| host.start(unit))).await {
            assert_eq!(result, Ok(JobResult::Done));
        }
        let started = begin.elapsed();
        let states = host.states(&names).await.unwrap();
        assert!(states.values().all(|now| *now == state("loaded", "active", "exited")));
        let asked = begin.elapsed();
        assert_eq!(reloads(), 0);

        for result in futures_util::future::join_all(names.iter().map(|unit| host.stop(unit))).await {
            assert_eq!(result, Ok(JobResult::Done));
        }
        let begin = Instant::now();
        assert!(host.remove(&names).await.iter().all(Result::is_ok));
        println!("removed in {:?}", begin.elapsed());
        assert_eq!(sh("ls -A /run/fleet/units; find /run/systemd/system -name 'many-*'"), "");
        assert_eq!(sh("systemctl list-units --all --no-legend 'many-*'"), "");

        // The same by systemctl, which would reload on its own account.
        sh("mkdir /run/floor");
        for i in 0..300 {
            fs::write(format!("/run/floor/floor-{i}.service"), text).unwrap();
        }
        let begin = Instant::now();
        sh("systemctl --runtime --no-reload link /run/floor/*.service");
        sh("cd /run/floor; systemctl start *.service");
        let floor = begin.elapsed();
        assert_eq!(sh("systemctl is-active floor-0.service floor-299.service"), "active\nactive");
        println!(
            "300 new units: installed {installed:?}, checked for reload {:?}, started {:?}, states {:?}; \
             all but states {started:?}, systemctl link and start {floor:?}, ratio {:.2}",
            checked - installed,
            started - checked,
            asked - started,
            started.as_secs_f64() / floor.as_secs_f64(),
        );
    }

    async fn a_reload_only_for_changed_files_of_loaded_units() {
        let host = connect().await;
        let old: Vec<_> = (0..20).map(|i| unit(&format!("unit-{i}.service"), SLEEP)).collect();
        let names: Vec<UnitName> = old.iter().map(|(name, _)| name.clone()).collect();
        install(&host, &old).await;
        for unit in &names {
            assert_eq!(host.start(unit).await, Ok(JobResult::Done));
        }
        install(&host, &old).await;
        assert_eq!(host.reload_if_needed(&names).await, Ok(false), "nothing changed");
        let pid = show("unit-7.service", "MainPID");
        let changed = format!("[Unit]\nDescription=Changed\n{SLEEP}");
        let new: Vec<_> = names.iter().map(|name| unit(name.as_str(), &changed)).collect();
        install(&host, &new).await;
        assert_eq!(reloads(), 0);
        let begin = Instant::now();
        assert_eq!(host.reload_if_needed(&names).await, Ok(true));
        let reloaded = begin.elapsed();
        assert_eq!(host.reload_if_needed(&names).await, Ok(false));
        println!("reloaded in {reloaded:?}, asked again in {:?}", begin.elapsed() - reloaded);
        assert_eq!(reloads(), 1, "one for all");
        assert_eq!(show("unit-7.service", "Description"), "Changed");
        assert_eq!(show("unit-7.service", "MainPID"), pid, "not restarted");

        // A stopped unit is dropped from memory, so that its next file is read afresh.
        assert_eq!(host.stop(&names[0]).await, Ok(JobResult::Done));
        install(&host, &old[..1]).await;
        assert_eq!(host.reload_if_needed(&names[..1]).await, Ok(false));
        assert_eq!(show("unit-0.service", "Description"), "unit-0.service");
    }

    /// Another unit keeps it in memory: without its file it is not found, and then it comes.
    async fn a_new_unit_that_systemd_remembers() {
        let host = connect().await;
        let keeper = format!("[Unit]\nWants=late.service\nAfter=late.service\n{SLEEP}");
        install(&host, &[unit("keeper.service", &keeper)]).await;
        let (keeper, late) = (name("keeper.service"), name("late.service"));
        assert_eq!(host.start(&keeper).await, Ok(JobResult::Done));
        assert_eq!(one_state(&host, "late.service").await.load, "not-found");
        for description in ["One", "Two"] {
            install(&host, &[unit("late.service", &format!("[Unit]\nDescription={description}\n{SLEEP}"))]).await;
            host.reload_if_needed(std::slice::from_ref(&late)).await.unwrap();
            assert_eq!(host.start(&late).await, Ok(JobResult::Done));
            assert_eq!(show("late.service", "Description"), description);
            assert_eq!(host.stop(&late).await, Ok(JobResult::Done));
            assert_eq!(host.remove(std::slice::from_ref(&late)).await, [Ok(())]);
        }
    }

    /// A timer refers to its service, which stays in memory: it must not start what was removed.
    async fn a_removed_unit_is_not_started_by_others() {
        let host = connect().await;
        let noted = |what: &str| format!("[Service]\nType=oneshot\nExecStart=/bin/bash -c 'echo {what} >> /run/ticks'\n");
        let tick = name("tick.service");
        let timer = "[Timer]\nOnActiveSec=50ms\nOnUnitInactiveSec=50ms\nAccuracySec=1ms\n";
        install(&host, &[unit("tick.service", &noted("one")), unit("tick.timer", timer)]).await;
        assert_eq!(host.start(&name("tick.timer")).await, Ok(JobResult::Done));
        while sh("wc -l < /run/ticks").parse::<u32>().is_ok_and(|ticks| ticks < 3) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // One that nobody refers to, and one that failed, take no reload.
        install(&host, &[unit("plain.service", SLEEP), unit("bad.service", "[Service]\nExecStart=/bin/false\n")]).await;
        let others = [name("plain.service"), name("bad.service")];
        for other in &others {
            host.start(other).await.unwrap();
        }
        assert_eq!(host.stop(&others[0]).await, Ok(JobResult::Done));
        assert_eq!(host.remove(&others).await, [Ok(()), Ok(())]);
        assert_eq!(reloads(), 0);

        assert_eq!(host.stop(&tick).await, Ok(JobResult::Done));
        assert_eq!(host.remove(std::slice::from_ref(&tick)).await, [Ok(())]);
        assert_eq!(reloads(), 1);
        let refused = sh("systemctl start tick.service 2>&1 || true");
        assert!(refused.contains("not found"), "{refused}");
        // One that was started again meanwhile is still there.
        let keeper = format!("[Unit]\nAfter=late.service\n{SLEEP}");
        let late = name("late.service");
        install(&host, &[unit("keeper.service", &keeper), unit("late.service", SLEEP)]).await;
        for unit in ["keeper.service", "late.service"] {
            assert_eq!(host.start(&name(unit)).await, Ok(JobResult::Done));
        }
        let both = [late.clone(), others[0].clone()];
        let results = host.remove(&both).await;
        assert!(matches!(&results[..], [Err(Error::Refused(_)), Ok(())]), "{results:?}");
        assert!(Path::new("/run/fleet/units/late.service").exists());
        assert_eq!(one_state(&host, "late.service").await, state("not-found", "active", "running"));
        assert_eq!(host.stop(&late).await, Ok(JobResult::Done));
        assert_eq!(host.remove(std::slice::from_ref(&late)).await, [Ok(())]);
        assert!(!Path::new("/run/fleet/units/late.service").exists());

        // Given back with another text it runs with that.
        sh("rm /run/ticks");
        install(&host, &[unit("tick.service", &noted("two"))]).await;
        host.reload_if_needed(std::slice::from_ref(&tick)).await.unwrap();
        assert_eq!(host.start(&tick).await, Ok(JobResult::Done));
        assert_eq!(sh("sort -u /run/ticks"), "two");
    }

    /// It looks at a directory's time, and two changes may have the same.
    async fn a_link_that_systemd_missed_is_made_again() {
        let host = connect().await;
        install(&host, &[unit("one.service", SLEEP)]).await;
        assert_eq!(host.start(&name("one.service")).await, Ok(JobResult::Done));
        let time = sh("stat --format=%y /run/systemd/system");
        let installed = format!("{SLEEP}[Install]\nWantedBy=multi-user.target\n");
        let late = [unit("two.service", SLEEP), unit("three.service", &installed)];
        install(&host, &late).await;
        sh(&format!("touch --date='{time}' /run/systemd/system"));
        for (unit, _) in &late {
            assert_eq!(one_state(&host, unit.as_str()).await.load, "not-found");
        }
        install(&host, &late).await;
        for (unit, _) in &late {
            assert_eq!(one_state(&host, unit.as_str()).await.load, "loaded");
            assert_eq!(host.start(unit).await, Ok(JobResult::Done));
        }
        // Where that fails the file stays, and is linked as soon as that is possible.
        sh("mount --bind /run/systemd/system /run/systemd/system; \
            mount -o remount,bind,ro /run/systemd/system");
        let results = host.install(&late[..1]).await;
        sh("umount /run/systemd/system");
        assert!(results[0].is_err(), "{results:?}");
        assert!(Path::new("/run/fleet/units/two.service").exists());
        install(&host, &late[..1]).await;
        assert_eq!(one_state(&host, "two.service").await.load, "loaded");
    }

    async fn starts_that_fail() {
        let host = connect().await;
        let failing = "[Service]\nType=oneshot\nExecStart=/bin/bash -c 'echo try >> /run/tries; false'\n";
        let needy = format!("[Unit]\nRequires=failing.service\nAfter=failing.service\n{SLEEP}");
        let broken = "[Service]\nType=nonsense\n";
        install(
            &host,
            &[unit("failing.service", failing), unit("needy.service", &needy), unit("broken.service", broken)],
        )
        .await;
        let failed = JobResult::Failed("failed".into());
        // More often than StartLimitBurst= allows: a start that was asked for is always tried.
        for _ in 0..8 {
            assert_eq!(host.start(&name("failing.service")).await, Ok(failed.clone()));
        }
        assert_eq!(sh("wc -l < /run/tries"), "8");
        assert_eq!(one_state(&host, "failing.service").await, state("loaded", "failed", "failed"));
        assert_eq!(host.start(&name("needy.service")).await, Ok(JobResult::Failed("dependency".into())));
        assert_eq!(one_state(&host, "broken.service").await.load, "bad-setting");
        assert!(matches!(host.start(&name("broken.service")).await, Err(Error::Refused(_))));
        assert_eq!(host.remove(&[name("failing.service")]).await, [Ok(())]);
        assert_eq!(one_state(&host, "failing.service").await.active, "inactive", "the failure is forgotten");
    }

    /// Many starts at once are one transaction of systemd; each has its own outcome all the same.
    async fn starts_of_all_kinds_together() {
        let host = connect().await;
        let once = |n: usize| format!("[Service]\nType=oneshot\nExecStart=/bin/bash -c 'echo {n} >> /run/ran'\n");
        let mut units: Vec<_> = (0..60).map(|n| unit(&format!("once-{n}.service"), &once(n))).collect();
        let needy = format!("[Unit]\nRequires=failing.service\nAfter=failing.service\n{SLEEP}");
        let waiting = format!("[Unit]\nAfter=once-3.service hanging.service\n{SLEEP}");
        let hanging = "[Service]\nType=notify\nTimeoutStartSec=infinity\nExecStart=/bin/sleep infinity\n";
        units.extend([
            unit("failing.service", "[Service]\nType=oneshot\nExecStart=/bin/false\n"),
            unit("needy.service", &needy),
            unit("broken.service", "[Service]\nType=nonsense\n"),
            unit("skipped.service", &format!("[Unit]\nConditionPathExists=/nowhere\n{SLEEP}")),
            unit("runs\\x2dalready.service", SLEEP),
            unit("one.service", &format!("[Unit]\nConflicts=other.service\n{SLEEP}")),
            unit("other.service", SLEEP),
            unit("hanging.service", hanging),
            unit("waiting.service", &waiting),
            unit("template@.service", SLEEP),
            unit("template@1.service", SLEEP),
        ]);
        install(&host, &units).await;
        assert_eq!(host.start(&name("runs\\x2dalready.service")).await, Ok(JobResult::Done));
        let pid = show("runs\\\\x2dalready.service", "MainPID");
        let names: Vec<UnitName> = units.into_iter().map(|(name, _)| name).collect();
        let started = futures_util::future::join_all(names.iter().map(|unit| host.start(unit)));
        // In the order in which they are asked for: the start is asked for first.
        let stopped = async {
            tokio::task::yield_now().await;
            host.stop(&name("hanging.service")).await
        };
        let (started, stopped) = tokio::join!(started, stopped);
        assert_eq!(stopped, Ok(JobResult::Done));
        let results: BTreeMap<&str, _> = names.iter().map(UnitName::as_str).zip(started).collect();
        for n in 0..60 {
            assert_eq!(results[&*format!("once-{n}.service")], Ok(JobResult::Done), "{n}");
        }
        assert_eq!(sh("wc -l < /run/ran; sort -u /run/ran | wc -l"), "60\n60", "each ran once");
        assert_eq!(results["failing.service"], Ok(JobResult::Failed("failed".into())));
        assert_eq!(results["needy.service"], Ok(JobResult::Failed("dependency".into())));
        assert!(matches!(results["broken.service"], Err(Error::Refused(_))), "{:?}", results["broken.service"]);
        assert!(matches!(results["template@.service"], Err(Error::Refused(_))));
        assert_eq!(results["hanging.service"], Ok(JobResult::Canceled));
        for good in ["skipped.service", "runs\\x2dalready.service", "waiting.service", "template@1.service"] {
            assert_eq!(results[good], Ok(JobResult::Done), "{good}");
        }
        assert_eq!(one_state(&host, "waiting.service").await, state("loaded", "active", "running"));
        assert_eq!(one_state(&host, "skipped.service").await, state("loaded", "inactive", "dead"));
        assert_eq!(show("runs\\\\x2dalready.service", "MainPID"), pid);
        // Not both, and the one that could not be started with the others was tried alone.
        let running = [one_state(&host, "one.service").await, one_state(&host, "other.service").await];
        assert_eq!(running.iter().filter(|state| state.active == "active").count(), 1, "{running:?}");
        assert_eq!(sh("ls -A /run/fleet/starts; find /run/systemd/system -name 'fleet-start*'"), "");
        assert_eq!(sh("systemctl list-units --all --no-legend 'fleet-start*'"), "");
        let targets = "journalctl --sync; journalctl --no-pager -o cat _PID=1 | grep -c '^fleet-start-.*target was skipped'";
        assert_ne!(sh(targets), "0", "they were started together");
        assert_eq!(reloads(), 0);
    }

    /// What a killed fleetd left of a start of many is taken away by the next.
    async fn leftovers_of_starts() {
        sh("mkdir -p /run/fleet/starts; cd /run/fleet/starts; printf '[Unit]\nWants=nothing.service\n' > fleet-start-1-1.target; \
            systemctl --runtime link /run/fleet/starts/fleet-start-1-1.target");
        let host = connect().await;
        install(&host, &[unit("hello.service", SLEEP)]).await;
        // Behind the cleaning up.
        assert_eq!(host.start(&name("hello.service")).await, Ok(JobResult::Done));
        assert_eq!(sh("ls -A /run/fleet/starts; find /run/systemd/system -name 'fleet-start*'"), "");
    }

    async fn many_restarts_of_a_sound_unit() {
        let host = connect().await;
        // The other unit keeps it in memory, and with it the count of its starts.
        let keeper = format!("[Unit]\nAfter=hello.service\n{SLEEP}");
        install(&host, &[unit("hello.service", SLEEP), unit("keeper.service", &keeper)]).await;
        assert_eq!(host.start(&name("keeper.service")).await, Ok(JobResult::Done));
        for _ in 0..8 {
            assert_eq!(host.start(&name("hello.service")).await, Ok(JobResult::Done));
            assert_eq!(host.stop(&name("hello.service")).await, Ok(JobResult::Done));
        }
    }

    async fn a_hanging_start_can_be_stopped() {
        let host = connect().await;
        let mut notices = host.notices();
        let hanging = "[Service]\nType=notify\nTimeoutStartSec=infinity\nExecStart=/bin/sleep infinity\n";
        install(&host, &[unit("hanging.service", hanging)]).await;
        let hanging = name("hanging.service");
        let stop = async {
            await_state(&host, &mut notices, "hanging.service", state("loaded", "activating", "start")).await;
            host.stop(&hanging).await
        };
        let (started, stopped) = tokio::join!(host.start(&hanging), stop);
        assert_eq!((started, stopped), (Ok(JobResult::Canceled), Ok(JobResult::Done)));
    }

    /// What has to be done before its start can begin must not let the stop come first.
    async fn a_stop_does_not_overtake_the_start_of_a_failed_unit() {
        let host = connect().await;
        let mut notices = host.notices();
        install(&host, &[unit("a.service", SLEEP)]).await;
        let a = name("a.service");
        assert_eq!(host.start(&a).await, Ok(JobResult::Done));
        sh("systemctl kill --signal=SEGV a.service");
        await_state(&host, &mut notices, "a.service", state("loaded", "failed", "failed")).await;
        let (_, stopped) = tokio::join!(host.start(&a), host.stop(&a));
        assert_eq!(stopped, Ok(JobResult::Done));
        assert_eq!(one_state(&host, "a.service").await.active, "inactive");
        assert_eq!(show("a.service", "Job"), "");
    }

    async fn a_start_that_waits_for_another_unit_can_be_taken_back() {
        let host = connect().await;
        let app = "[Service]\nType=oneshot\nExecStart=/bin/sleep infinity\n";
        let side = format!("[Unit]\nAfter=app.service\n{SLEEP}");
        install(&host, &[unit("app.service", app), unit("side.service", &side)]).await;
        sh("systemctl start --no-block app.service");
        let side = name("side.service");
        let stop = async {
            while !sh("systemctl list-jobs --no-legend").contains("side.service") {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            assert_eq!(one_state(&host, "side.service").await.active, "inactive", "it does not show");
            host.stop(&side).await
        };
        let (started, stopped) = tokio::join!(host.start(&side), stop);
        assert_eq!((started, stopped), (Ok(JobResult::Canceled), Ok(JobResult::Done)));
        sh("systemctl stop app.service");
        assert_eq!(sh("systemctl list-jobs --no-legend"), "");
        assert_eq!(one_state(&host, "side.service").await.active, "inactive");
    }

    async fn notices_of_our_units_only() {
        let host = connect().await;
        let mut notices = host.notices();
        install(&host, &[unit("hello.service", SLEEP)]).await;
        let hello = name("hello.service");
        assert_eq!(host.start(&hello).await, Ok(JobResult::Done));
        await_state(&host, &mut notices, "hello.service", state("loaded", "active", "running")).await;
        sh("systemctl kill --signal=KILL --kill-whom=main hello.service");
        await_state(&host, &mut notices, "hello.service", state("loaded", "failed", "failed")).await;
        assert_eq!(host.remove(std::slice::from_ref(&hello)).await, [Ok(())]);
        install(&host, &[unit("idle.service", SLEEP), unit("end.service", SLEEP)]).await;

        // Questions about a unit that is not in memory, and whatever another unit does, are no news. What has come
        // before the notice of end.service is all there was, since signals come in order.
        for _ in 0..10 {
            assert_eq!(one_state(&host, "idle.service").await, state("loaded", "inactive", "dead"));
        }
        sh("systemd-run --wait --unit=foreign.service /bin/true");
        assert_eq!(host.start(&name("end.service")).await, Ok(JobResult::Done));
        let mut seen = Vec::new();
        while !seen.contains(&name("end.service")) {
            match notices.recv().await.unwrap() {
                Notice::Units(units) => seen.extend(units),
                Notice::All => panic!("no connection was lost"),
            }
        }
        assert!(!seen.contains(&name("idle.service")), "{seen:?}");
        assert!(!seen.iter().any(|unit| unit.as_str() == "foreign.service"), "{seen:?}");
    }

    async fn what_is_found_at_the_start() {
        let hash = Hash([7; 20]);
        {
            let host = connect().await;
            let found = host.find().await.unwrap();
            assert_eq!(found, Default::default());
            install(&host, &[unit("running.service", SLEEP), unit("unlinked.service", SLEEP)]).await;
            assert_eq!(host.start(&name("running.service")).await, Ok(JobResult::Done));
            let marks = [
                (name("running.service"), Some(Mark::Launched(hash))),
                (name("unlinked.service"), Some(Mark::Starting(hash))),
                (name("unlinked.service"), None),
            ];
            assert!(host.mark(&marks).await.iter().all(Result::is_ok));
        }
        let pid = show("running.service", "MainPID");
        sh("rm /run/systemd/system/unlinked.service; echo x > /run/fleet/units/README; mkdir /run/fleet/units/sub");
        fs::write("/run/fleet/units/bad.service", format!("{SLEEP}[Install]\nWantedBy=bad name\n")).unwrap();
        fs::write("/run/fleet/launched/old.service", format!("{hash} 1.0\n")).unwrap();

        let host = connect().await;
        let mut notices = host.notices();
        let found = host.find().await.unwrap();
        assert_eq!(found.files.keys().map(UnitName::as_str).collect::<Vec<_>>(), [
            "running.service",
            "unlinked.service"
        ]);
        assert_eq!(&*found.files["running.service"], SLEEP);
        assert_eq!(found.marks, BTreeMap::from([(name("running.service"), Mark::Launched(hash))]));
        assert_eq!(show("running.service", "MainPID"), pid, "nothing was restarted");
        assert_eq!(link("/run/systemd/system/unlinked.service").as_deref(), Some("/run/fleet/units/unlinked.service"));
        assert_eq!(sh("ls -A /run/fleet/units"), "README\nrunning.service\nsub\nunlinked.service");
        assert_eq!(sh("ls -A /run/fleet/launched"), "running.service");
        // Changes of what was found are passed on without being asked for.
        sh("systemctl kill --signal=KILL running.service");
        loop {
            match notices.recv().await.unwrap() {
                Notice::Units(units) if units.contains("running.service") => break,
                Notice::Units(_) => {}
                Notice::All => panic!("no connection was lost"),
            }
        }
    }

    async fn systemd_executes_itself_anew() {
        let host = connect().await;
        let mut notices = host.notices();
        wait_through(&host, &mut notices, || drop(sh("systemctl daemon-reexec")), "true").await;
        live("after.service").await;
    }

    /// The bus stays, and so do our connections to it; but the systemd that comes back does not know that we listen.
    async fn systemd_leaves_the_bus_and_comes_back() {
        let host = connect().await;
        let mut notices = host.notices();
        let has_owner = "busctl call org.freedesktop.DBus /org/freedesktop/DBus org.freedesktop.DBus NameHasOwner s \
             org.freedesktop.systemd1";
        // SIGUSR1 makes systemd connect to the bus again (systemd(1)).
        let back = format!("until {has_owner} | grep true; do kill -USR1 1; sleep 0.1; done");
        wait_through(&host, &mut notices, cut_systemd_off_the_bus, &back).await;
        live("after.service").await;
    }

    async fn the_bus_is_restarted() {
        let host = connect().await;
        let mut notices = host.notices();
        let kill = || drop(sh("systemctl kill --signal=KILL dbus.service"));
        wait_through(&host, &mut notices, kill, "systemctl start dbus.service").await;
        live("after.service").await;
    }

    async fn the_bus_is_away_while_a_job_ends() {
        let host = connect().await;
        let mut notices = host.notices();
        let texts = [("good.service", "true"), ("bad.service", "false")].map(|(name, end)| {
            let wait = "until test -e /run/go; do sleep 0.1; done";
            unit(name, &format!("[Service]\nType=oneshot\nExecStart=/bin/bash -c '{wait}; {end}'\n"))
        });
        install(&host, &texts).await;
        let (good, bad) = (name("good.service"), name("bad.service"));
        let outage = async {
            for unit in ["good.service", "bad.service"] {
                await_state(&host, &mut notices, unit, state("loaded", "activating", "start")).await;
            }
            sh("systemctl stop dbus.socket dbus.service; touch /run/go");
            sh("while systemctl is-active good.service bad.service | grep -q activating; do sleep 0.1; done");
            assert!(matches!(host.states(std::slice::from_ref(&good)).await, Err(Error::Unreachable(_))));
            sh("systemctl start dbus.socket dbus.service");
        };
        let (good, bad, ()) = tokio::join!(host.start(&good), host.start(&bad), outage);
        assert_eq!(good, Ok(JobResult::Done));
        assert_eq!(bad, Ok(JobResult::Failed("failed".into())));
    }

    async fn no_bus_at_all() {
        sh("systemctl stop dbus.socket dbus.service");
        let error = SystemdHost::connect(Directories::default()).await.err().unwrap();
        assert!(matches!(&error, Error::Unreachable(text) if text.contains("is dbus running?")), "{error}");
    }

    async fn status_and_journal() {
        let host = connect().await;
        let talking = "[Unit]\nDescription=On node one\n[Service]\n\
             ExecStart=/bin/bash -c 'for i in 1 2 3 4 5; do echo line $i; done; sleep infinity'\n";
        install(&host, &[unit("talking.service", talking), unit("idle.service", SLEEP)]).await;
        let (talking, idle) = (name("talking.service"), name("idle.service"));
        assert_eq!(host.start(&talking).await, Ok(JobResult::Done));
        sh("until journalctl -u talking.service | grep -q 'line 5'; do journalctl --sync; done");

        let (out, err, code) = collect(host.status(&talking)).await;
        assert_eq!((err.as_str(), code), ("", 0));
        assert!(out.starts_with("● talking.service - On node one\n     Loaded: loaded ("), "{out}");
        assert!(out.contains("linked-runtime") && out.contains("line 5\n"), "{out}");
        assert!(!out.contains('\x1b'), "{out}");
        let (out, _, code) = collect(host.status(&idle)).await;
        assert_eq!(code, 3, "{out}");
        assert!(out.starts_with("○ idle.service"), "{out}");
        let (_, err, code) = collect(host.status(&name("-.gone.service"))).await;
        assert_eq!((err.as_str(), code), ("Unit -.gone.service could not be found.\n", 4));

        // golden/11-status-journal.txt
        let journal = async |lines, output: &str| collect(host.journal(&talking, lines, false, output)).await;
        assert_eq!(journal(2, "cat").await, ("line 4\nline 5\n".into(), String::new(), 0));
        assert_eq!(journal(0, "short").await, ("-- No entries --\n".into(), String::new(), 0));
        assert_eq!(journal(1, "bogus").await, (String::new(), "Unknown output format 'bogus'.\n".into(), 1));
        assert_eq!(journal(1, "cat --help").await.2, 1, "one argument, whatever is in it");

        let mut followed = host.journal(&talking, 1, true, "cat");
        assert_eq!(followed.recv().await, Some(Output::Out("line 5\n".into())));
        sh("logger --journald <<< $'MESSAGE=more\\nUNIT=talking.service'");
        sh("echo 'line 6' > /proc/$(systemctl show -P MainPID talking.service)/fd/1 || true");
        let followers = "pgrep -c journalctl";
        assert_eq!(sh(followers), "1");
        drop(followed);
        sh(&format!("while {followers}; do sleep 0.05; done"));
        assert_eq!(host.stop(&talking).await, Ok(JobResult::Done));
    }

    async fn no_room_and_read_only() {
        let host = connect().await;
        install(&host, &[unit("small.service", SLEEP)]).await;
        assert_eq!(host.remove(&[name("small.service")]).await, [Ok(())]);
        sh("mount -t tmpfs -o size=8k tmpfs /run/fleet; mkdir /run/fleet/units");
        let large = format!("{SLEEP}{}", "# a comment\n".repeat(10_000));
        let results = host.install(&[unit("large.service", &large), unit("small.service", SLEEP)]).await;
        let error = results[0].clone().unwrap_err();
        assert_eq!(error.to_string(), "/run/fleet/units/large.service: no space left on its file system");
        assert_eq!(results[1], Ok(()));
        assert_eq!(sh("ls -A /run/fleet/units"), "small.service");
        sh("mount -o remount,ro /run/fleet");
        let error = host.install(&[unit("other.service", SLEEP)]).await.remove(0).unwrap_err();
        assert_eq!(error.to_string(), "/run/fleet/units/other.service: its file system is read-only");
        let error = host.remove(&[name("small.service")]).await.remove(0).unwrap_err();
        assert_eq!(error.to_string(), "/run/fleet/units/small.service: its file system is read-only");
    }

    /// As user fleet, with the package's files; the test runs itself once more, as that user.
    async fn unprivileged() {
        let role = std::env::var(INSIDE).unwrap();
        if role != "root" {
            if role == "allowed" {
                live("hello.service").await;
                let host = connect().await;
                let text = |text: &str| unit("changed.service", &format!("[Unit]\nDescription={text}\n{SLEEP}"));
                install(&host, &[text("One")]).await;
                let changed = [name("changed.service")];
                assert_eq!(host.start(&changed[0]).await, Ok(JobResult::Done));
                install(&host, &[text("Two")]).await;
                assert_eq!(host.reload_if_needed(&changed).await, Ok(true));
                let (out, _, code) = collect(host.journal(&changed[0], 1, false, "cat")).await;
                assert_eq!((out.as_str(), code), ("Started changed.service - One.\n", 0));
                sh("systemctl kill --signal=KILL changed.service");
                host.mark(&[(changed[0].clone(), Some(Mark::Launched(Hash([7; 20]))))]).await.pop().unwrap().unwrap();
                assert_eq!(host.find().await.unwrap().marks.len(), 1);
                assert_eq!(host.stop(&changed[0]).await, Ok(JobResult::Done));
                assert_eq!(host.remove(&changed).await, [Ok(())]);
            } else {
                let host = connect().await;
                let error = host.install(&[unit("hello.service", SLEEP)]).await.remove(0).unwrap_err();
                assert!(error.to_string().contains("50-fleet.rules"), "{error}");
                assert_eq!(sh("ls -A /run/fleet/units"), "");
            }
            return;
        }
        fs::create_dir_all("/etc/sysusers.d").unwrap();
        fs::write("/etc/sysusers.d/fleet.conf", include_str!("../../../packaging/sysusers.d/fleet.conf")).unwrap();
        sh("systemd-sysusers fleet.conf; chmod a+rx /root /root/host-tests; install -d -o fleet -g fleet /run/fleet");
        assert_eq!(sh("id -nG fleet | tr ' ' '\\n' | sort"), "fleet\nsystemd-journal");
        let again = |role| {
            let output = std::process::Command::new("runuser")
                .args(["-u", "fleet", "--", "/root/host-tests", "--exact", "unprivileged", "--nocapture"])
                .env(INSIDE, role)
                .output()
                .unwrap();
            println!("{}", String::from_utf8_lossy(&output.stdout));
            eprintln!("{}", String::from_utf8_lossy(&output.stderr));
            assert!(output.status.success(), "failed as user fleet, see above");
        };
        sh("rm -f /etc/polkit-1/rules.d/50-fleet.rules");
        again("denied");
        let rule = "/etc/polkit-1/rules.d/50-fleet.rules";
        fs::write(rule, include_str!("../../../packaging/polkit/50-fleet.rules")).unwrap();
        sh("systemctl restart polkit.service");
        again("allowed");
    }
}

/// Breaks systemd's own connection to the system bus, and no other.
fn cut_systemd_off_the_bus() {
    use rustix::{net, process};
    let systemd = process::pidfd_open(process::Pid::INIT, process::PidfdFlags::empty()).unwrap();
    let mut cut = 0;
    for entry in fs::read_dir("/proc/1/fd").unwrap() {
        let number = entry.unwrap().file_name().to_str().unwrap().parse().unwrap();
        let flags = process::PidfdGetfdFlags::empty();
        // One that was closed meanwhile is of no interest.
        let Ok(fd) = process::pidfd_getfd(&systemd, number, flags) else { continue };
        let peer =
            net::getpeername(&fd).ok().flatten().and_then(|peer| net::SocketAddrUnix::try_from(peer).ok());
        if peer
            .is_some_and(|peer| peer.path_bytes().is_some_and(|path| path.ends_with(b"/system_bus_socket")))
        {
            net::shutdown(&fd, net::Shutdown::Both).unwrap();
            cut += 1;
        }
    }
    assert_ne!(cut, 0, "systemd has no connection to the bus");
}

/// A start that waits while the connection is lost and comes back ends as it would have, and a notice says that
/// signals were missed.
async fn wait_through(
    host: &SystemdHost,
    notices: &mut mpsc::Receiver<Notice>,
    loss: impl FnOnce(),
    repair: &str,
) {
    let text = "[Service]\nType=oneshot\nRemainAfterExit=yes\n\
         ExecStart=/bin/bash -c 'until test -e /run/go; do sleep 0.1; done'\n";
    install(host, &[unit("waiting.service", text)]).await;
    let waiting = name("waiting.service");
    let outage = async {
        await_state(host, notices, "waiting.service", state("loaded", "activating", "start")).await;
        loss();
        sh(repair);
        while notices.recv().await.unwrap() != Notice::All {}
        assert_eq!(one_state(host, "waiting.service").await.active, "activating");
        sh("touch /run/go");
    };
    let (started, ()) = tokio::join!(host.start(&waiting), outage);
    assert_eq!(started, Ok(JobResult::Done));
    await_state(host, notices, "waiting.service", state("loaded", "active", "exited")).await;
    sh("systemctl stop --no-block waiting.service");
    await_state(host, notices, "waiting.service", state("loaded", "inactive", "dead")).await;
}
