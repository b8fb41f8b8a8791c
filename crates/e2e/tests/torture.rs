//! A short torture run with a fixed seed, on each kind of registry. `cargo xtask torture` is the long one.

use anyhow::{Result, ensure};
use fleet_e2e::torture::{Options, Registry, run};
use std::time::Duration;

fn torture(registry: Registry, seed: u64) -> Result<()> {
    let keep = std::env::temp_dir().join("fleet-torture");
    let round = Some(Duration::from_secs(20));
    let report = run(&Options { seed, takes: Duration::ZERO, round, registry, keep })?;
    ensure!(report.violations.is_empty(), "{report}");
    Ok(())
}

#[test]
fn a_cluster_under_torture() -> Result<()> {
    torture(Registry::Embedded, 4)
}

#[test]
fn a_cluster_on_etcd_under_torture() -> Result<()> {
    torture(Registry::Etcd, 4)
}
