//! The methods and properties of systemd that fleet uses; see org.freedesktop.systemd1(5).
use zbus::OwnedObjectPath;

/// One unit as the List… methods give it: name, description, load, active and sub state, the unit it follows,
/// object path, and the number, type and object path of its job.
pub(super) type Listed =
    (String, String, String, String, String, String, OwnedObjectPath, u32, String, OwnedObjectPath);
/// A link made or removed: `symlink` or `unlink`, where, and to what.
pub(super) type Change = (String, String, String);

#[zbus::proxy(
    interface = "org.freedesktop.systemd1.Manager",
    default_service = "org.freedesktop.systemd1",
    default_path = "/org/freedesktop/systemd1"
)]
pub(super) trait Manager {
    /// Signals are sent while somebody is subscribed.
    fn subscribe(&self) -> zbus::Result<()>;
    fn reload(&self) -> zbus::Result<()>;
    /// Fails with NoSuchUnit for one that is not in memory; loads nothing.
    fn get_unit(&self, name: &str) -> zbus::Result<OwnedObjectPath>;
    /// Fails with NoSuchJob once the job has ended.
    fn get_job(&self, id: u32) -> zbus::Result<OwnedObjectPath>;
    /// All units in memory; loads nothing.
    fn list_units(&self) -> zbus::Result<Vec<Listed>>;
    /// The units in memory in one of these states; loads nothing.
    fn list_units_filtered(&self, states: &[&str]) -> zbus::Result<Vec<Listed>>;
    /// One entry for each name, in order (under its main name where the name is an alias); loads those that are
    /// not in memory.
    fn list_units_by_names(&self, names: &[&str]) -> zbus::Result<Vec<Listed>>;
    fn start_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn stop_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn reset_failed_unit(&self, name: &str) -> zbus::Result<()>;
    fn link_unit_files(&self, files: &[&str], runtime: bool, force: bool) -> zbus::Result<Vec<Change>>;
    fn enable_unit_files(
        &self,
        files: &[&str],
        runtime: bool,
        force: bool,
    ) -> zbus::Result<(bool, Vec<Change>)>;
    fn disable_unit_files(&self, files: &[&str], runtime: bool) -> zbus::Result<Vec<Change>>;

    /// `running`, `degraded`, `stopping`, …
    #[zbus(property(emits_changed_signal = "false"))]
    fn system_state(&self) -> zbus::Result<String>;
    /// Where unit files are looked for, first match first.
    #[zbus(property(emits_changed_signal = "false"))]
    fn unit_path(&self) -> zbus::Result<Vec<String>>;
    /// When this systemd came up, microseconds of the clock; a re-execution keeps it.
    #[zbus(property(emits_changed_signal = "false"))]
    fn userspace_timestamp(&self) -> zbus::Result<u64>;
    /// How often the machine was soft-rebooted, which leaves /run as it is; since systemd 256.
    #[zbus(property(emits_changed_signal = "false"))]
    fn soft_reboots_count(&self) -> zbus::Result<u32>;
}

#[zbus::proxy(
    interface = "org.freedesktop.systemd1.Unit",
    default_service = "org.freedesktop.systemd1",
    assume_defaults = false
)]
pub(super) trait Unit {
    #[zbus(property(emits_changed_signal = "false"))]
    fn need_daemon_reload(&self) -> zbus::Result<bool>;
    /// `loaded`, `not-found`, `bad-setting`, …
    #[zbus(property(emits_changed_signal = "false"))]
    fn load_state(&self) -> zbus::Result<String>;
}
