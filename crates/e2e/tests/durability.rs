//! Acknowledged writes survive kill -9 of fleetd, 200 times over.

use anyhow::{Context, Result};
use fleet_e2e::{Fleet, until};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

const ROUNDS: usize = 200;
const WRITERS: usize = 4;

#[test]
fn no_acknowledged_write_is_lost() -> Result<()> {
    let fleet = Fleet::installed("durable")?;
    // Killed as often as this, systemd's limit on restarts would get in the way.
    fleet.host().write(
        "/etc/systemd/system/fleetd.service.d/test.conf",
        "[Unit]\nStartLimitIntervalSec=0\n[Service]\nRestart=always\nRestartSec=0\n",
    )?;
    fleet.host().run(["systemctl", "daemon-reload"])?.ok()?;
    fleet.host().start_fleet()?;
    let http = fleet.http()?;
    // What was acknowledged: the value in each unit's file.
    let acknowledged: Arc<Mutex<BTreeMap<String, usize>>> = Arc::default();
    let count = Arc::new(AtomicUsize::new(0));
    for round in 0..ROUNDS {
        let target = count.load(Ordering::SeqCst) + 3 + round % 7;
        let killed = Arc::new(AtomicBool::new(false));
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let (http, acknowledged, count) = (http.clone(), acknowledged.clone(), count.clone());
                let killed = killed.clone();
                std::thread::spawn(move || {
                    // systemd keeps the socket, so that not every writer sees its connection break.
                    for number in (0..).take_while(|_| !killed.load(Ordering::SeqCst)) {
                        let name = format!("w{writer}-{}.service", number % 10);
                        let value = round * 1_000_000 + number;
                        let body = format!(
                            r#"{{"options":[{{"section":"Service","name":"ExecStart","value":"/bin/echo {value}"}}]}}"#
                        );
                        match http.json("PUT", &format!("/fleet/v1/units/{name}"), &body) {
                            Ok(answer) if answer.status == 201 => {
                                acknowledged.lock().unwrap().insert(name, value);
                                count.fetch_add(1, Ordering::SeqCst);
                            }
                            // It is being killed, or a slow disk holds it up: the next one may be taken.
                            _ => std::thread::sleep(std::time::Duration::from_millis(10)),
                        }
                    }
                })
            })
            .collect();
        until("some writes were acknowledged", || Ok(count.load(Ordering::SeqCst) >= target))?;
        fleet.host().run(["systemctl", "kill", "-s", "KILL", "fleetd.service"])?.ok()?;
        killed.store(true, Ordering::SeqCst);
        for writer in writers {
            writer.join().map_err(|_| anyhow::anyhow!("a writer panicked"))?;
        }
        until("fleetd serves again", || Ok(http.get("/fleet/v1/machines").is_ok_and(|a| a.status == 200)))?;
        let list = http.get("/fleet/v1/units?limit=10000")?;
        let list: serde_json::Value = serde_json::from_str(&list.body).with_context(|| list.body.clone())?;
        let mut found = BTreeMap::new();
        for unit in list["units"].as_array().into_iter().flatten() {
            let value = unit["options"][0]["value"].as_str().unwrap_or_default();
            let value: usize = value.trim_start_matches("/bin/echo ").parse()?;
            found.insert(unit["name"].as_str().unwrap_or_default().to_owned(), value);
        }
        for (name, value) in acknowledged.lock().unwrap().iter_mut() {
            // A write that was under way may have been carried out without its acknowledgement: then it is newer.
            let now = found.get(name).copied();
            assert!(now >= Some(*value), "round {round}: {name} was acknowledged as {value}, is {now:?}");
            *value = now.unwrap_or(*value);
        }
    }
    println!("{} acknowledged writes, {ROUNDS} kills, none lost", count.load(Ordering::SeqCst));
    Ok(())
}
