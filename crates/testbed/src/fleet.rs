//! fleet on a host: the programs under test and what the package ships, where the package puts it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::cluster::Cluster;
use crate::disk::{make_dir, put_file};
use crate::host::Host;

/// Directories of packaging/ and where their files go.
const PACKAGE: &[(&str, &str)] = &[
    ("systemd", "/usr/lib/systemd/system"),
    ("sysusers.d", "/usr/lib/sysusers.d"),
    ("polkit", "/usr/share/polkit-1/rules.d"),
];
/// The package's programs.
const PROGRAMS: &[&str] = &["fleetd", "fleetctl"];

/// Where the programs under test are: `FLEET_BIN_DIR`, else the directory of this build.
pub fn bin_dir() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("FLEET_BIN_DIR") {
        return Ok(dir.into());
    }
    // A test is TARGET/PROFILE/deps/NAME, an example TARGET/PROFILE/examples/NAME.
    let exe = std::env::current_exe().context("cannot tell where this program is")?;
    let dir = exe.ancestors().skip(1).find(|dir| dir.join("fleetd").is_file());
    dir.map(Path::to_owned).with_context(|| {
        format!(
            "no fleetd near {}: `cargo build -p fleetd -p fleetctl` makes it, or set FLEET_BIN_DIR",
            exe.display()
        )
    })
}

/// The project's packaging/ directory: `FLEET_PACKAGING_DIR`, else the one this was built from.
pub fn packaging_dir() -> PathBuf {
    match std::env::var_os("FLEET_PACKAGING_DIR") {
        Some(dir) => dir.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging"),
    }
}

/// Puts programs and package files under `root`, where a package puts them: a host's root, its upper layer
/// before it is mounted, or the tree that a package is made of.
pub fn install(root: &Path, bin_dir: &Path, metadata: &str) -> Result<()> {
    for program in PROGRAMS {
        let from = bin_dir.join(program);
        if !from.is_file() {
            bail!("no {program} in {}: `cargo build -p fleetd -p fleetctl` makes it", bin_dir.display());
        }
        make_dir(root, "/usr/bin")?;
        put_file(&from, &root.join("usr/bin").join(program), 0o755)?;
    }
    let packaging = packaging_dir();
    for (from, to) in PACKAGE {
        let from = packaging.join(from);
        make_dir(root, to)?;
        let files = fs::read_dir(&from).with_context(|| format!("cannot list {}", from.display()))?;
        for file in files {
            let file = file?;
            put_file(&file.path(), &root.join(&to[1..]).join(file.file_name()), 0o644)?;
        }
    }
    // A file of its own, never a link: hosts are configured by changing it.
    let sample = packaging.join("fleet.conf");
    let mut conf =
        fs::read_to_string(&sample).with_context(|| format!("cannot read {}", sample.display()))?;
    if !metadata.is_empty() {
        conf += &format!("metadata=\"{metadata}\"\n");
    }
    make_dir(root, "/etc/fleet")?;
    fs::write(root.join("etc/fleet/fleet.conf"), conf).context("cannot write fleet.conf")?;
    Ok(())
}

/// What a package runs after its files are in place.
pub(crate) fn after_install(host: &Host) -> Result<()> {
    host.run(["systemd-sysusers"])?.ok()?;
    host.run(["systemctl", "daemon-reload"])?.ok()?;
    Ok(())
}

impl Cluster {
    /// Installs fleet from `bin_dir` (see [`bin_dir`]) on every host.
    pub fn install_fleet(&self, bin_dir: impl AsRef<Path>) -> Result<()> {
        self.hosts().iter().try_for_each(|host| host.install_fleet(bin_dir.as_ref()))
    }
}

impl Host {
    /// Installs fleet as a package would: programs, units, users, polkit rules, fleet.conf. Replaces
    /// what an earlier call installed; nothing is started.
    pub fn install_fleet(&self, bin_dir: impl AsRef<Path>) -> Result<()> {
        let root = self.root_path("/")?;
        install(&root, bin_dir.as_ref(), "").with_context(|| format!("{}: installing fleet", self.name()))?;
        after_install(self)
    }

    /// Enables and starts fleet's socket and daemon; returns when the daemon is ready.
    pub fn start_fleet(&self) -> Result<()> {
        let started = self.run(["systemctl", "enable", "--now", "fleetd.socket", "fleetd.service"])?;
        if !started.success() {
            let journal = self.run(["journalctl", "-u", "fleetd.service", "-n", "50", "--no-pager"])?;
            bail!("{}: fleetd does not start: {}\n{}", self.name(), started.stderr.trim(), journal.stdout);
        }
        Ok(())
    }
}
