//! Status and journal of any unit on any machine, without ssh: copies chosen, journals of several merged by time, and what
//! is said when a machine cannot be asked. And what a reader that does not read costs: nothing.

use super::SLEEP;
use anyhow::{Context, Result};
use fleet_e2e::{Fleet, PATIENCE, until};
use fleet_testbed::Host;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

/// A Global service that says on each machine who it is, and then nothing.
const TALKER: &str = "[Service]\nExecStart=/bin/sh -c 'for i in 1 2 3; do echo line $i of %m; done; exec sleep infinity'\n\
                      [X-Fleet]\nGlobal=true\n";

fn short(host: &Host) -> &str {
    &host.machine_id()[..8]
}

/// What the talker said, without what systemd says of it, which may come before or after.
fn said(log: &str) -> Vec<&str> {
    log.lines().filter(|line| line.contains("line ")).collect()
}

/// Waits until each copy of a unit has logged this.
fn logged(fleet: &Fleet, unit: &str, text: &str) -> Result<()> {
    for host in fleet.cluster.hosts() {
        until(text, || Ok(host.journal(Some(unit))?.contains(text)))?;
    }
    Ok(())
}

#[test]
fn every_copy_of_a_unit_from_anywhere() -> Result<()> {
    let fleet = Fleet::join_all("copies", 3, "")?;
    let hosts = fleet.cluster.hosts();
    fleet.start("talk@1.service", TALKER)?;
    until("it runs everywhere", || Ok(fleet.copies("talk@1.service")? == [0, 1, 2]))?;
    logged(&fleet, "talk@1.service", "line 3 of")?;

    // Status: all copies, each with its machine, or the one that is chosen.
    let status = fleet.ok("status talk@1")?;
    for host in hosts {
        let on = format!("On {}.../{}:\n● talk@1.service", short(host), host.ip());
        assert!(status.contains(&on), "{on} in {status}");
    }
    let second = &hosts[1];
    let id = second.machine_id();
    for words in [format!("talk@1.service@{id}"), format!("--machine={} talk@1", short(second))] {
        let status = fleet.ok(&format!("status {words}"))?;
        assert!(status.starts_with("● talk@1.service"), "{status}");
        assert_eq!(status.matches("active (running)").count(), 1, "{status}");
        // What it said first may be missing: a busy systemd notes later than that when it began.
        assert!(status.contains(&format!(" {} ", second.name())), "{status}");
    }
    let json: serde_json::Value = serde_json::from_str(&fleet.ok("--format=json status talk@1")?)?;
    assert_eq!(json.as_array().map(Vec::len), Some(3), "{json}");

    // Journal of one copy: as journalctl has it there.
    let one = fleet.ok(&format!("journal --output=cat talk@1.service@{}", short(second)))?;
    assert_eq!(said(&one), [1, 2, 3].map(|n| format!("line {n} of {id}")));
    let same = fleet.ok(&format!("journal --machine={id} --lines=2 --sudo talk@1"))?;
    assert!(same.lines().all(|line| line.contains(&format!(" {} s", second.name()))), "{same}");
    assert_eq!(same.lines().count(), 2);

    // Of all copies: complete, each in its order, by time, with machine and unit in front.
    let mut last = 0;
    for line in fleet.ok("journal -o json talk@1")?.lines() {
        let entry: serde_json::Value = serde_json::from_str(line)?;
        assert_eq!(
            (&entry["machineID"], &entry["unitName"]),
            (&entry["_MACHINE_ID"], &"talk@1.service".into())
        );
        // When journald got it: what `short` shows may be when it was sent, which is not in order in any one journal.
        let stamp: u64 = entry["__REALTIME_TIMESTAMP"].as_str().context("no time")?.parse()?;
        assert!(stamp >= last, "not by time: {line}");
        last = stamp;
    }
    let all = fleet.ok("journal talk@1")?;
    for host in hosts {
        let front = format!("{} talk@1.service ", short(host));
        let lines: Vec<&str> = said(&all).into_iter().filter(|line| line.starts_with(&front)).collect();
        let numbers = lines.iter().filter_map(|line| line.split("line ").nth(1));
        let expected = [1, 2, 3].map(|n| format!("{n} of {}", host.machine_id()));
        assert_eq!(numbers.collect::<Vec<_>>(), expected, "{all}");
        assert!(lines.iter().all(|line| line.contains(&format!(" {} ", host.name()))), "{all}");
    }
    let cat = fleet.ok("journal --output=cat --lines=4 talk@1")?;
    let expected = |host: &Host| format!("{} talk@1.service line 3 of {}", short(host), host.machine_id());
    assert!(hosts.iter().all(|host| said(&cat).contains(&expected(host).as_str())), "{cat}");
    assert_eq!(cat.lines().count(), 12, "{cat}");
    assert_eq!(fleet.ok("journal --lines=0 talk@1")?, "-- No entries --\n");

    // Several units; one that is not there spoils nothing but the exit code.
    fleet.start(
        "tell.service",
        "[Service]\nExecStart=/bin/sh -c 'printf \"one\\\\n<7>two\\\\n\"; exec sleep infinity'\n",
    )?;
    until("it has spoken", || Ok(fleet.ok("journal --output=cat tell")?.contains("two")))?;
    let several = fleet.ctl(&format!("journal --output=cat tell talk@1.service@{id} nonsuch"))?;
    assert_eq!((several.code(), several.stderr.as_str()), (1, "Unit nonsuch.service does not exist.\n"));
    for line in [" tell.service   two", &format!("{} talk@1.service line 3", short(second))] {
        assert!(several.stdout.contains(line), "{line:?} in {}", several.stdout);
    }

    // What makes no sense is said.
    for (words, text) in [
        (
            "status talk@1.service@zzz",
            "No machine's ID begins with \"zzz\". Unit talk@1.service is on: ".to_owned(),
        ),
        ("journal --machine=ab talk@1.service@cd", "Both --machine=ab and talk@1.service@cd name".to_owned()),
        ("journal --output=verbose talk@1", "--output=verbose is for one unit on one machine".to_owned()),
        ("journal --output=bogus tell", "Unknown output format 'bogus'.".to_owned()),
    ] {
        let out = fleet.ctl(words)?;
        assert!(!out.success() && out.stderr.starts_with(&text), "{words}: {}", out.stderr);
        assert_eq!(out.stdout, "", "{words}");
    }
    Ok(())
}

#[test]
fn followed_journals_are_live() -> Result<()> {
    let fleet = Fleet::join_all("follow", 2, "")?;
    let hosts = fleet.cluster.hosts();
    let unit = "[Service]\nExecStart=/bin/sh -c 'echo begun; mkfifo /run/talk; exec 3<>/run/talk; while read line <&3; do echo $line; done'\n\
                [X-Fleet]\nGlobal=true\n";
    fleet.start("talk.service", unit)?;
    logged(&fleet, "talk.service", "begun")?;
    let mut journal = fleet.host().start_process(["fleetctl", "journal", "-f", "--output=cat", "talk"])?;
    let mut next = || loop {
        let line = journal.read_line(PATIENCE)?.context("the journal has ended")?;
        // systemd's own word may come late.
        if !line.contains("Started") {
            return Ok::<_, anyhow::Error>(line);
        }
    };
    let mut begun = 0;
    while begun < 2 {
        begun += usize::from(next()?.ends_with(" talk.service begun"));
    }
    // One machine speaks, the other is silent: nothing is held back.
    for (number, host) in [(1, &hosts[1]), (2, &hosts[0]), (3, &hosts[1])] {
        host.sh(&format!("echo word {number} > /run/talk"))?.ok()?;
        assert_eq!(next()?, format!("{} talk.service word {number}", short(host)));
    }
    journal.signal(fleet_testbed::Signal::INT)?;
    assert_eq!(journal.finish(PATIENCE)?.code(), 130);
    for host in hosts {
        no_readers(host)?;
    }
    Ok(())
}

/// Nobody reads a journal on this host any more.
fn no_readers(host: &Host) -> Result<()> {
    until("nobody reads the journal", || Ok(!host.run(["pgrep", "-x", "journalctl"])?.success()))
}

#[test]
fn a_machine_that_cannot_be_asked() -> Result<()> {
    let fleet = Fleet::join_one_server("unasked", 3, "agent_ttl=\"1h\"")?;
    let hosts = fleet.cluster.hosts();
    fleet.start("talk.service", TALKER)?;
    let third = format!("{SLEEP}[X-Fleet]\nMachineID={}\n", hosts[2].machine_id());
    fleet.start("pinned.service", &third)?;
    logged(&fleet, "talk.service", "line 3 of")?;
    let mut follow =
        fleet.host().start_process(["fleetctl", "journal", "--follow", "--output=cat", "talk"])?;
    follow.wait_for(&format!("line 3 of {}", hosts[2].machine_id()), PATIENCE)?;

    // Only its fleetd stops. The others are shown, and who is missing is said.
    hosts[2].run(["systemctl", "stop", "fleetd.service", "fleetd.socket"])?.ok()?;
    let id = hosts[2].machine_id();
    let machine = format!("{}.../{}", short(&hosts[2]), hosts[2].ip());
    let reason = format!("machine {id} is not connected");
    until("its session is over", || Ok(fleet.ctl("status pinned")?.stderr.contains(&reason)))?;
    for (words, unit) in [
        ("status talk", "talk"),
        ("journal --output=cat talk", "talk"),
        ("journal --output=cat pinned", "pinned"),
        ("status pinned", "pinned"),
        ("journal pinned talk", "pinned"),
    ] {
        let out = fleet.ctl(words)?;
        assert_eq!(out.code(), 1, "{words}");
        let told = out.stderr.lines().find(|line| line.contains(&format!("unit {unit}.service")));
        assert!(told.is_some_and(|line| line.contains(&reason)), "{words}: {}", out.stderr);
        if words.contains("talk") {
            assert!(out.stderr.contains(&machine), "{words}: {}", out.stderr);
            for host in &hosts[..2] {
                let shown = match words {
                    "status talk" => format!(" {} ", host.name()),
                    _ => format!("line 3 of {}", host.machine_id()),
                };
                assert!(out.stdout.contains(&shown), "{words}: {}", out.stdout);
            }
        }
    }
    // Who followed was told, too, and follows the others on.
    fleet.host().sh("systemctl restart talk.service")?.ok()?;
    follow.wait_for(&format!("{} talk.service Started talk.service", short(&hosts[0])), PATIENCE)?;
    follow.signal(fleet_testbed::Signal::INT)?;
    let out = follow.finish(PATIENCE)?;
    assert!(out.stderr.contains(&format!("the connection to machine {id} was lost")), "{}", out.stderr);

    // An agent has no answers, and says who has; no fleetd at all: what to look at.
    let agent = hosts[1].run(["fleetctl", "list-units"])?;
    assert_eq!(agent.code(), 1);
    for text in ["is an agent only", fleet.host().ip(), "fleetctl --tunnel="] {
        assert!(agent.stderr.contains(text), "{text:?} in {}", agent.stderr);
    }
    let none = hosts[2].run(["fleetctl", "list-units"])?;
    assert_eq!(none.code(), 1);
    assert!(none.stderr.contains("Is fleetd running here (systemctl status fleetd)?"), "{}", none.stderr);
    Ok(())
}

const LINES: usize = 60_000;

#[test]
fn a_reader_that_does_not_read_costs_nobody_anything() -> Result<()> {
    let fleet = Fleet::join_all("slow", 2, "")?;
    let hosts = fleet.cluster.hosts();
    // 30 MB of log on the second machine, with room for that.
    let flood = format!(
        "[Service]\nExecStart=/bin/sh -c 'yes {} | head -n {LINES} | cat -n; echo done; exec sleep infinity'\n\
         [X-Fleet]\nMachineID={}\n",
        "x".repeat(500),
        hosts[1].machine_id()
    );
    hosts[1].sh("mkdir -p /etc/systemd/journald.conf.d; printf '[Journal]\\nSystemMaxUse=200M\\nRuntimeMaxUse=200M\\n' > /etc/systemd/journald.conf.d/big.conf; systemctl restart systemd-journald")?.ok()?;
    fleet.start("flood.service", &flood)?;
    until("it has said everything", || Ok(fleet.ok("journal --output=cat --lines=1 flood")? == "done\n"))?;
    let memory = |host: &Host| -> Result<u64> {
        let script =
            "grep VmRSS /proc/$(systemctl show --value -p MainPID fleetd.service)/status | tr -dc 0-9";
        Ok(host.sh(script)?.ok()?.stdout.trim().parse()?)
    };
    let before = [memory(&hosts[0])?, memory(&hosts[1])?];

    // Readers that do not read, until nothing moves any more.
    let http = fleet.http()?;
    let ask = |mut stream: UnixStream| -> Result<UnixStream> {
        let query = format!("lines={}&follow=1&output=cat", 2 * LINES);
        write!(stream, "GET /fleet/v1/units/flood.service/journal?{query} HTTP/1.0\r\nHost: fleet\r\n\r\n")?;
        Ok(stream)
    };
    let mut readers = (0..8).map(|_| ask(http.connect()?)).collect::<Result<Vec<_>>>()?;
    let written = || -> Result<String> {
        let script = "for p in $(pgrep -x journalctl); do grep wchar /proc/$p/io; done";
        Ok(hosts[1].sh(script)?.ok()?.stdout)
    };
    let mut last = String::new();
    until("all of them are held up", || {
        std::thread::sleep(std::time::Duration::from_millis(500));
        let now = written()?;
        let still = now == last && now.lines().count() == readers.len();
        last = now;
        Ok(still)
    })?;

    // Work goes on, there as well, and other readers get their answers.
    let pin = format!("{SLEEP}[X-Fleet]\nMachineID={}\n", hosts[1].machine_id());
    for number in 0..5 {
        fleet.start(&format!("other{number}.service"), &pin)?;
    }
    assert_eq!(fleet.ok("journal --output=cat --lines=1 flood")?, "done\n");
    assert!(fleet.ok("status other0")?.contains("active (running)"));
    for (host, before) in hosts.iter().zip(before) {
        let more = memory(host)?.saturating_sub(before);
        assert!(
            more < 16 << 10,
            "{} KiB more in {} for {} readers of 30 MB",
            more,
            host.name(),
            readers.len()
        );
    }

    // Who begins to read gets everything.
    let reader = readers.pop().context("a reader")?;
    let mut numbers = BufReader::new(reader)
        .lines()
        .map_while(|line| line.ok())
        .take_while(|line| line != "done")
        .filter_map(|line| {
            line.split_once("\txxx").and_then(|(number, _)| number.trim().parse::<usize>().ok())
        });
    assert!(numbers.by_ref().eq(1..=LINES), "lines are missing, or in another order");
    drop(numbers);
    // And who goes away leaves nothing behind.
    drop(readers);
    no_readers(&hosts[1])
}
