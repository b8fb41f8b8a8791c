//! How fast units are placed: prints figures for a large cluster, for people and (`--json`) for programs.
//!
//! Whole passes are given in CPU time, single decisions as the median of the time they took, so that
//! other work of the machine does not show.
//!
//! `cargo run --release -p fleet-cluster --example placement`
use fleet_cluster::{
    engine::Engine,
    model::*,
    placement::{Unplaced, explain},
    view::View,
};
use fleet_unit::{Requirements, UnitFile, UnitName};
use std::{
    collections::BTreeMap,
    error::Error,
    hint::black_box,
    sync::Arc,
    time::{Duration, Instant},
};

const UNITS: usize = 100_000;
const MACHINES: usize = 10_000;
/// How many further units are placed one by one for the figure of one more.
const FURTHER: usize = 1_000;

struct Case {
    name: &'static str,
    /// [X-Fleet] of the unit with this number.
    fleet: fn(usize) -> String,
}

const CASES: [Case; 4] = [
    Case { name: "plain", fleet: |_| String::new() },
    // One machine in a hundred has it.
    Case { name: "metadata", fleet: |index| format!("MachineMetadata=rack={}\n", index % 100) },
    // At most one of each kind on a machine, each checked against the others there.
    Case { name: "conflicts", fleet: |index| format!("Conflicts=unit-{:03}-*\n", index % 1000) },
    // Every second follows the one before it.
    Case {
        name: "followers",
        fleet: |index| {
            let before = index.wrapping_sub(1);
            if index % 2 == 1 { format!("MachineOf={}\n", unit_name(before)) } else { String::new() }
        },
    },
];

fn unit_name(index: usize) -> String {
    format!("unit-{:03}-{index:06}.service", index % 1000)
}

fn machine_id(index: usize) -> Result<MachineId, Box<dyn Error>> {
    // Spread, as real IDs are.
    let spread = (index as u128 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835);
    Ok(MachineId::parse(&format!("{spread:032x}"))?)
}

fn unit(index: usize, fleet: &str, revision: Revision) -> Result<(UnitName, Unit), Box<dyn Error>> {
    let name = UnitName::parse(&unit_name(index))?;
    let file = UnitFile::parse(&format!(
        "[Unit]\nDescription=Unit {index}\n\n[Service]\nExecStart=/usr/bin/sleep infinity\n\n[X-Fleet]\n{fleet}"
    ))?;
    let requirements = Arc::new(Requirements::of(&name, &file)?);
    Ok((name, Unit { file, requirements, desired: DesiredState::Launched, revision }))
}

/// The CPU time this thread has used (see proc(5): schedstat).
fn cpu_time() -> Result<Duration, Box<dyn Error>> {
    let schedstat = std::fs::read_to_string("/proc/thread-self/schedstat")?;
    let nanoseconds = schedstat.split(' ').next().ok_or("no figure in schedstat")?.parse()?;
    Ok(Duration::from_nanos(nanoseconds))
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

struct Figures {
    decide: Duration,
    apply: Duration,
    one_more: Duration,
    one_more_applied: Duration,
    machine_lost: Duration,
}

fn measure(case: &Case) -> Result<Figures, Box<dyn Error>> {
    let mut view = View::default();
    let now = Duration::from_secs(60);
    let mut engine = Engine::new(Duration::ZERO, Duration::from_secs(30));
    for index in 0..MACHINES {
        let machine = Machine {
            metadata: BTreeMap::from([
                ("rack".to_owned(), (index % 100).to_string()),
                ("zone".to_owned(), (index % 3).to_string()),
            ]),
            ..Machine::default()
        };
        engine.note(&view.apply(Change::Machine(machine_id(index)?, Some(machine))));
    }
    for index in 0..UNITS {
        let (name, unit) = unit(index, &(case.fleet)(index), 1)?;
        engine.note(&view.apply(Change::Unit(name, Some(unit))));
    }

    let mut revision = 1;
    let mut commit = |view: &mut View, engine: &mut Engine, decisions: Vec<_>| {
        revision += 1;
        for fleet_cluster::engine::Decision { unit, machine, .. } in decisions {
            engine.note(&view.apply(Change::Schedule(unit, machine.map(|machine| (machine, revision)))));
        }
    };

    let start = cpu_time()?;
    let decisions = engine.decide(&view, now, usize::MAX);
    let decide = cpu_time()?.saturating_sub(start);
    let placed = decisions.iter().filter(|decision| decision.machine.is_some()).count();
    if placed != UNITS {
        return Err(format!("{}: {placed} of {UNITS} units placed", case.name).into());
    }
    let start = cpu_time()?;
    commit(&mut view, &mut engine, decisions);
    let apply = cpu_time()?.saturating_sub(start);
    if !engine.decide(&view, now, usize::MAX).is_empty() {
        return Err(format!("{}: the engine is not at rest", case.name).into());
    }

    let (mut one_more, mut one_more_applied) = (Vec::new(), Vec::new());
    for index in UNITS..UNITS + FURTHER {
        let (name, unit) = unit(index, &(case.fleet)(index), 2)?;
        let whole = Instant::now();
        engine.note(&view.apply(Change::Unit(name, Some(unit))));
        let start = Instant::now();
        let decisions = engine.decide(&view, now, usize::MAX);
        one_more.push(start.elapsed());
        if decisions.len() != 1 {
            return Err(format!("{}: {} decisions for one unit", case.name, decisions.len()).into());
        }
        commit(&mut view, &mut engine, decisions);
        black_box(engine.decide(&view, now, usize::MAX));
        one_more_applied.push(whole.elapsed());
    }

    let lost = machine_id(7)?;
    let count = view.scheduled_on(&lost).count();
    let start = Instant::now();
    engine.note(&view.apply(Change::Machine(lost, None)));
    let decisions = engine.decide(&view, now, usize::MAX);
    let machine_lost = start.elapsed();
    if decisions.len() < count {
        return Err(
            format!("{}: {} of {count} units of a lost machine moved", case.name, decisions.len()).into()
        );
    }
    let (one_more, one_more_applied) = (median(one_more), median(one_more_applied));
    Ok(Figures { decide, apply, one_more, one_more_applied, machine_lost })
}

/// Asks why a unit is not placed, where no machine fits.
fn measure_explain() -> Result<Duration, Box<dyn Error>> {
    let mut view = View::default();
    for index in 0..MACHINES {
        let machine = Machine::default();
        view.apply(Change::Machine(machine_id(index)?, Some(machine)));
    }
    let (name, unit) = unit(0, "MachineMetadata=planet=mars\n", 1)?;
    view.apply(Change::Unit(name.clone(), Some(unit)));
    let start = Instant::now();
    match explain(&view, &name) {
        Some(Unplaced::NoFit(misfits)) if misfits.len() == MACHINES => Ok(start.elapsed()),
        other => Err(format!("unexpected explanation {other:?}").into()),
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let json = arguments.iter().any(|argument| argument == "--json");
    // Further arguments choose cases.
    let chosen: Vec<_> = arguments.iter().filter(|argument| !argument.starts_with("--")).collect();
    if !json {
        println!("{UNITS} units on {MACHINES} machines, one core");
        println!(
            "case        decide all   apply all   one more   ... committed and looked at   a machine lost"
        );
    }
    for case in CASES.iter().filter(|case| chosen.is_empty() || chosen.iter().any(|name| *name == case.name))
    {
        let Figures { decide, apply, one_more, one_more_applied, machine_lost } = measure(case)?;
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let us = |time: Duration| time.as_secs_f64() * 1e6;
        if json {
            println!(
                "{{\"case\":\"{}\",\"decide_all_ms\":{:.1},\"apply_all_ms\":{:.1},\"one_more_us\":{:.2},\"one_more_committed_us\":{:.2},\"machine_lost_us\":{:.1}}}",
                case.name,
                ms(decide),
                ms(apply),
                us(one_more),
                us(one_more_applied),
                us(machine_lost)
            );
        } else {
            println!(
                "{:10} {:8.1} ms {:8.1} ms {:7.2} us {:24.2} us {:15.1} us",
                case.name,
                ms(decide),
                ms(apply),
                us(one_more),
                us(one_more_applied),
                us(machine_lost)
            );
        }
    }
    let explained = measure_explain()?.as_secs_f64() * 1e3;
    if json {
        println!("{{\"case\":\"explain\",\"explain_ms\":{explained:.2}}}");
    } else {
        println!("why a unit fits on none of {MACHINES} machines: {explained:.2} ms");
    }
    Ok(())
}
