//! The configuration of fleetd: which options there are, where they come from, and what they mean.
//!
//! An option is a key of fleet.conf, a variable `FLEET_KEY` of the environment, and a `--set KEY=VALUE` on the
//! command line; the command line counts over the environment, the environment over the file. The keys, forms and
//! defaults are the original's (docs/CONFIGURATION.md has them all); existing files work unchanged, and what
//! looks like a mistake in one is named in a [`Warning`]. An empty value means the default, and hides what a
//! lesser source says.
//!
//! Everything is a function of text and a map of variables, but for [`Config::load`] and [`environment`].
use fleet_link::{DEFAULT_PORT, dial::Address};
use std::{
    collections::BTreeMap,
    ffi::OsString,
    fmt,
    io::{ErrorKind, Read},
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

pub mod file;
mod flags;
#[doc(hidden)]
pub mod fuzz;
mod values;

pub use flags::{Command, Flags, RegistryCommand};
pub use fleet_api::duration;
use values::*;

/// The configuration file that is read, if it is there, when none is given.
pub const DEFAULT_FILE: &str = "/etc/fleet/fleet.conf";
/// Where the API is served unless told otherwise.
pub const DEFAULT_API_SOCKET: &str = "/run/fleet.sock";
/// Larger configuration files are refused, in bytes.
pub const MAX_FILE: u64 = 1 << 20;
/// More warnings than these are only counted.
const MAX_WARNINGS: usize = 50;

/// All variables of the environment, by name; a map, so that tests need not change their own.
pub type Environment = BTreeMap<String, String>;

/// A text that must not be shown: Debug hides it, and there is no Display.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The text itself, for the one place that needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}
impl From<String> for Secret {
    fn from(text: String) -> Self {
        Secret(text)
    }
}
impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// Where the API of etcd is reached, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdConfig {
    /// `http://` and `https://` addresses of members, without a slash at the end; empty when fleetd keeps its own
    /// registry or has none.
    pub servers: Vec<String>,
    /// What every key starts with; starts and ends with a slash.
    pub key_prefix: String,
    /// How long one request may take.
    pub request_timeout: Duration,
    /// For how long etcd is to keep its history at the least; none: that is left to etcd.
    pub compaction: Option<Duration>,
    /// PEM file of the authorities whose certificates are trusted.
    pub ca_file: Option<PathBuf>,
    /// PEM file of the client's key; there if and only if `cert_file` is.
    pub key_file: Option<PathBuf>,
    /// PEM file of the client's certificate.
    pub cert_file: Option<PathBuf>,
    /// User name and password.
    pub login: Option<(String, Secret)>,
}

/// What becomes of a machine's units when fleetd is told to stop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnStop {
    /// They run on, and the machine keeps its presence until that runs out.
    #[default]
    Keep,
    /// They are stopped and unloaded, and the machine gives up its presence, as in the original.
    Purge,
}

/// The file that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfigFile {
    /// The one named by `--config`.
    Given(PathBuf),
    /// The default one.
    Default(PathBuf),
    /// None was named, and the default one is not there.
    None,
}

impl fmt::Display for ConfigFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Given(path) => write!(f, "Using provided config file {}", path.display()),
            Self::Default(path) => write!(f, "Using default config file {}", path.display()),
            Self::None => f.write_str("No provided or default config file found - proceeding without"),
        }
    }
}

/// What fleetd is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The file that was read; its Display is the line for the log.
    pub file: ConfigFile,
    /// 0: information; 1: debugging of fleet itself; 2 and more: of the libraries too.
    pub verbosity: u8,
    /// The etcd that holds the registry, if its `servers` are not empty.
    pub etcd: EtcdConfig,
    /// The address to publish for this machine; found by [`crate::address`] when none is given.
    pub public_ip: Option<String>,
    /// The machine's metadata.
    pub metadata: BTreeMap<String, String>,
    /// For how long a machine may be silent before it is taken for dead.
    pub agent_ttl: Duration,
    /// Many machines are more than this part of all: numerator and denominator.
    pub mass_loss_fraction: (u32, u32),
    /// When many machines vanish at once, so many of their units are placed elsewhere in each period of this length.
    pub mass_loss_rate: (usize, Duration),
    /// What becomes of this machine's units when fleetd is told to stop.
    pub on_stop: OnStop,
    /// How often the engine looks at everything, beside its work on changes; never when that is not set.
    pub engine_reconcile_interval: Option<Duration>,
    /// The number of entries on a page of the API.
    pub token_limit: usize,
    /// Whether this machine's engine must never lead.
    pub disable_engine: bool,
    /// Known from the original; without effect.
    pub disable_watches: bool,
    /// Known from the original; without effect.
    pub enable_grpc: bool,
    /// Where the unit files of this machine are kept.
    pub units_directory: PathBuf,
    /// Where fleetd keeps what must survive a reboot.
    pub state_directory: PathBuf,
    /// The unix socket of the API, when systemd hands over none.
    pub api_socket: PathBuf,
    /// Where a server lets agents in; nowhere when empty.
    pub listen: Vec<SocketAddr>,
    /// The servers of an agent; this fleetd is a server itself when empty.
    pub join: Vec<Address>,
    /// The text of the token to join with.
    pub join_token: Option<Secret>,
    /// The file with that text.
    pub join_token_file: Option<PathBuf>,
}

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A line of a file.
    Line(PathBuf, usize),
    /// A variable of the environment.
    Variable(String),
    /// The command line.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line(path, line) => write!(f, "{}:{line}", path.display()),
            Self::Variable(name) => f.write_str(name),
            Self::Flag(key) => write!(f, "--set {key}"),
        }
    }
}

impl Origin {
    /// The key, where the place does not name it.
    fn key_prefix(&self, key: &str) -> String {
        match self {
            Self::Line(..) => format!("{key}: "),
            Self::Variable(_) | Self::Flag(_) => String::new(),
        }
    }
}

/// Something in the configuration that is probably not meant; fleetd goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// The place; none when it is about many.
    pub origin: Option<Origin>,
    /// What is odd, and what fleetd makes of it.
    pub message: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.origin {
            Some(origin) => write!(f, "{origin}: {}", self.message),
            None => f.write_str(&self.message),
        }
    }
}

/// Why fleetd can't start with this configuration. No error repeats a password.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("unable to use config file {path}: {reason}", path = .path.display())]
    #[allow(missing_docs)]
    File { path: PathBuf, reason: String },
    /// A line of the file can't be read.
    #[error("{origin}: {reason}")]
    #[allow(missing_docs)]
    Syntax { origin: Origin, reason: String },
    /// An option has a value it can't have.
    #[error("{origin}: {prefix}{reason}", prefix = .origin.key_prefix(.key))]
    #[allow(missing_docs)]
    Value { origin: Origin, key: &'static str, reason: String },
    /// A flag or variable that is no option.
    #[error("{0}")]
    Unusable(String),
}

/// For how long etcd keeps its history unless somebody says otherwise.
const COMPACTION: Duration = Duration::from_secs(3600);

/// Every key there is, in the order of docs/CONFIGURATION.md.
pub const KEYS: [&str; 31] = [
    "verbosity",
    "etcd_servers",
    "etcd_username",
    "etcd_password",
    "etcd_keyfile",
    "etcd_certfile",
    "etcd_cafile",
    "etcd_key_prefix",
    "etcd_request_timeout",
    "etcd_compaction",
    "engine_reconcile_interval",
    "public_ip",
    "metadata",
    "agent_ttl",
    "mass_loss_fraction",
    "mass_loss_rate",
    "on_stop",
    "units_directory",
    "systemd_user",
    "token_limit",
    "enable_grpc",
    "disable_engine",
    "disable_watches",
    "verify_units",
    "authorized_keys_file",
    "state_directory",
    "api_socket",
    "listen",
    "join",
    "join_token",
    "join_token_file",
];

/// Variables `FLEET_…` that are read elsewhere.
const OTHER_VARIABLES: [&str; 1] = [crate::logging::FILTER_VARIABLE];

/// The environment of this process. A variable of fleet's that is not UTF-8 is an error, others are left out.
pub fn environment() -> Result<Environment, ConfigError> {
    let mut environment = Environment::new();
    for (name, value) in std::env::vars_os() {
        match (name.into_string(), value.into_string()) {
            (Ok(name), Ok(value)) => drop(environment.insert(name, value)),
            (Ok(name), Err(_)) if name.starts_with("FLEET_") => {
                return Err(ConfigError::Unusable(format!("{name}: is not UTF-8 text")));
            }
            _ => {}
        }
    }
    Ok(environment)
}

impl Config {
    /// Reads the file and the environment that the command line says to use.
    pub fn load(flags: &Flags) -> Result<(Config, Vec<Warning>), ConfigError> {
        let environment = environment()?;
        let (file, text) = match &flags.config {
            Some(path) => (ConfigFile::Given(path.clone()), read_file(path)?),
            None => match std::fs::symlink_metadata(DEFAULT_FILE) {
                Err(e) if e.kind() == ErrorKind::NotFound => (ConfigFile::None, String::new()),
                _ => (ConfigFile::Default(DEFAULT_FILE.into()), read_file(Path::new(DEFAULT_FILE))?),
            },
        };
        Config::from_sources(flags, &environment, file, &text)
    }

    /// The configuration that a command line, an environment and the text of a file make.
    pub fn from_sources(
        flags: &Flags,
        environment: &Environment,
        file: ConfigFile,
        text: &str,
    ) -> Result<(Config, Vec<Warning>), ConfigError> {
        let mut options = Options::default();
        if let ConfigFile::Given(path) | ConfigFile::Default(path) = &file {
            options.add_file(path, text)?;
        }
        options.add_environment(environment);
        options.add_flags(flags)?;
        let config = options.config(file)?;
        Ok((config, options.warnings.done()))
    }

    /// Whether this fleetd keeps the registry itself, in its state directory.
    pub fn embedded_registry(&self) -> bool {
        self.etcd.servers.is_empty()
    }
}

/// The text of a configuration file, which must be UTF-8 and not larger than [`MAX_FILE`].
fn read_file(path: &Path) -> Result<String, ConfigError> {
    let error = |reason: String| ConfigError::File { path: path.to_owned(), reason };
    let file = std::fs::File::open(path).map_err(|e| error(e.to_string()))?;
    if file.metadata().is_ok_and(|meta| meta.is_dir()) {
        return Err(error("it is a directory, not a file".into()));
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(|e| error(e.to_string()))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(error(format!("it is larger than {MAX_FILE} bytes")));
    }
    String::from_utf8(bytes).map_err(|e| {
        let good = &e.as_bytes()[..e.utf8_error().valid_up_to()];
        let line = 1 + good.iter().filter(|byte| **byte == b'\n').count();
        let origin = Origin::Line(path.to_owned(), line);
        ConfigError::Syntax { origin, reason: "is not UTF-8 text".into() }
    })
}

/// Warnings up to a bound.
#[derive(Default)]
struct Warnings {
    kept: Vec<Warning>,
    left_out: usize,
}

impl Warnings {
    fn add(&mut self, origin: Origin, message: String) {
        if self.kept.len() < MAX_WARNINGS {
            self.kept.push(Warning { origin: Some(origin), message });
        } else {
            self.left_out += 1;
        }
    }

    fn done(mut self) -> Vec<Warning> {
        if self.left_out > 0 {
            let message = format!("and {} more warnings about the configuration", self.left_out);
            self.kept.push(Warning { origin: None, message });
        }
        self.kept
    }
}

/// The values that count, from whatever source.
#[derive(Default)]
struct Options {
    values: BTreeMap<&'static str, (String, Origin)>,
    warnings: Warnings,
}

/// A non-empty value of a key.
#[derive(Clone, Copy)]
struct Setting<'a> {
    key: &'static str,
    value: &'a str,
    origin: &'a Origin,
}

impl Setting<'_> {
    fn error(self, reason: impl Into<String>) -> ConfigError {
        ConfigError::Value { origin: self.origin.clone(), key: self.key, reason: reason.into() }
    }
}

/// The key's one `&'static str`, if there is such a key.
fn known(key: &str) -> Option<&'static str> {
    KEYS.into_iter().find(|known| *known == key)
}

impl Options {
    fn add_file(&mut self, path: &Path, text: &str) -> Result<(), ConfigError> {
        let origin = |line| Origin::Line(path.to_owned(), line);
        let contents = file::parse(text)
            .map_err(|e| ConfigError::Syntax { origin: origin(e.line), reason: e.reason.to_owned() })?;
        for oddity in contents.oddities {
            self.warnings.add(origin(oddity.line), oddity.message);
        }
        for entry in contents.entries {
            let origin = origin(entry.line);
            let Some(key) = known(&entry.key) else {
                self.warnings.add(origin, format!("there is no option {}; it is ignored", shown(&entry.key)));
                continue;
            };
            if !entry.section.is_empty() {
                let section = shown(&entry.section);
                let message = format!(
                    "{key} is ignored because it stands in the section {section}; options belong before any section"
                );
                self.warnings.add(origin, message);
                continue;
            }
            if let Some((_, Origin::Line(_, earlier))) =
                self.values.insert(key, (entry.value, origin.clone()))
            {
                self.warnings
                    .add(origin, format!("{key} was set on line {earlier} already; this line counts"));
            }
        }
        Ok(())
    }

    fn add_environment(&mut self, environment: &Environment) {
        let variables =
            environment.range("FLEET_".to_owned()..).take_while(|(name, _)| name.starts_with("FLEET_"));
        for (name, value) in variables {
            let origin = Origin::Variable(name.clone());
            let key = name["FLEET_".len()..].to_ascii_lowercase();
            match known(&key) {
                // `FLEET_` in capitals and the rest in others is not what the original looked for.
                Some(key) if key.to_ascii_uppercase() == name["FLEET_".len()..] => {
                    self.values.insert(key, (value.clone(), origin));
                }
                _ if OTHER_VARIABLES.contains(&name.as_str()) => {}
                _ => self.warnings.add(origin, "there is no such option; the variable is ignored".into()),
            }
        }
    }

    fn add_flags(&mut self, flags: &Flags) -> Result<(), ConfigError> {
        let join = flags.join.as_ref().map(|value| ("join", value.clone()));
        let token = flags.join_token.as_ref().map(|value| ("join_token", value.expose().to_owned()));
        for (key, value) in join.into_iter().chain(token) {
            self.values.insert(key, (value, Origin::Flag(key.to_owned())));
        }
        for setting in &flags.set {
            let (key, value) = setting
                .expose()
                .split_once('=')
                .ok_or_else(|| ConfigError::Unusable("--set takes KEY=VALUE, but there is no '='".into()))?;
            let lower = key.trim().to_ascii_lowercase();
            let key = known(&lower).ok_or_else(|| {
                ConfigError::Unusable(format!("--set: there is no option {}", shown(&lower)))
            })?;
            self.values.insert(key, (value.to_owned(), Origin::Flag(key.to_owned())));
        }
        Ok(())
    }

    fn setting(&self, key: &'static str) -> Option<Setting<'_>> {
        debug_assert!(KEYS.contains(&key), "{key} is in KEYS");
        let (value, origin) = self.values.get(key)?;
        (!value.is_empty()).then_some(Setting { key, value, origin })
    }

    /// The value of a key as a reader takes it, or the default.
    fn read<T>(
        &self,
        key: &'static str,
        default: T,
        reader: impl Fn(&str) -> Result<T, String>,
    ) -> Result<T, ConfigError> {
        match self.setting(key) {
            Some(setting) => reader(setting.value).map_err(|reason| setting.error(reason)),
            None => Ok(default),
        }
    }

    fn text(&self, key: &'static str) -> Option<String> {
        self.setting(key).map(|setting| setting.value.to_owned())
    }

    fn path(&self, key: &'static str) -> Option<PathBuf> {
        self.setting(key).map(|setting| setting.value.into())
    }

    /// Warns with a text when a condition on an option holds.
    fn warn_if(&mut self, key: &'static str, condition: bool, message: &str) {
        if let (true, Some((_, origin))) = (condition, self.values.get(key)) {
            self.warnings.add(origin.clone(), message.to_owned());
        }
    }

    fn config(&mut self, file: ConfigFile) -> Result<Config, ConfigError> {
        let mut config = Config {
            file,
            verbosity: self.verbosity(),
            etcd: self.etcd()?,
            public_ip: self.read("public_ip", None, |text| address(text).map(Some))?,
            metadata: self.metadata(),
            agent_ttl: self.read("agent_ttl", Duration::from_secs(30), agent_ttl)?,
            mass_loss_fraction: self.read("mass_loss_fraction", (1, 3), fraction)?,
            mass_loss_rate: self.read("mass_loss_rate", (10, Duration::from_secs(1)), rate)?,
            on_stop: self.read("on_stop", OnStop::Keep, on_stop)?,
            engine_reconcile_interval: self
                .read("engine_reconcile_interval", None, |text| seconds(text).map(Some))?,
            token_limit: self.read("token_limit", 100, page_size)?,
            disable_engine: self.read("disable_engine", false, boolean)?,
            disable_watches: self.read("disable_watches", false, boolean)?,
            enable_grpc: self.read("enable_grpc", false, boolean)?,
            units_directory: self.read("units_directory", "/run/fleet/units/".into(), absolute)?,
            state_directory: self.read("state_directory", "/var/lib/fleet".into(), absolute)?,
            api_socket: self.read("api_socket", DEFAULT_API_SOCKET.into(), absolute)?,
            listen: self.read("listen", Vec::new(), listen)?,
            join: self.read("join", Vec::new(), join)?,
            join_token: self.text("join_token").map(Secret),
            join_token_file: self.read("join_token_file", None, |text| absolute(text).map(Some))?,
        };
        if !config.etcd.servers.is_empty() && self.setting("listen").is_none() {
            // Servers of one registry have to reach each other, and agents may come to any of them.
            config.listen = vec![SocketAddr::from((Ipv4Addr::UNSPECIFIED, DEFAULT_PORT))];
        }
        self.check_roles(&config)?;
        if self.read("systemd_user", false, boolean)?
            && let Some(setting) = self.setting("systemd_user")
        {
            // To go on would run as root what was meant for a user.
            return Err(setting.error("units run under the systemd of the machine only; remove this option"));
        }
        let verify_units = self.read("verify_units", false, boolean)?;
        let keys_file = self.setting("authorized_keys_file").is_some();
        for (key, condition) in [("verify_units", verify_units), ("authorized_keys_file", keys_file)] {
            self.warn_if(key, condition, &format!("Config option {key} is no longer supported - ignoring"));
        }
        self.warn_if(
            "disable_watches",
            config.disable_watches,
            "disable_watches has no effect: fleet learns of every change by watching",
        );
        self.warn_if(
            "enable_grpc",
            config.enable_grpc,
            "enable_grpc has no effect: agents hear of changes over a session with a server anyway",
        );
        Ok(config)
    }

    /// The original went on when this was no number, so this does.
    fn verbosity(&mut self) -> u8 {
        let Some(setting) = self.setting("verbosity") else { return 0 };
        match i64::from_str(setting.value) {
            Ok(number) => number.clamp(0, i64::from(u8::MAX)) as u8,
            Err(_) => {
                let (message, origin) = (
                    format!("verbosity: {} is no number; taken as 0", shown(setting.value)),
                    setting.origin.clone(),
                );
                self.warnings.add(origin, message);
                0
            }
        }
    }

    /// Pairs without `=` are dropped as in the original; the last value of a key counts.
    fn metadata(&mut self) -> BTreeMap<String, String> {
        let mut metadata = BTreeMap::new();
        let Some(setting) = self.setting("metadata") else { return metadata };
        let mut dropped = Vec::new();
        for pair in setting.value.split(',') {
            match pair.split_once('=') {
                Some((key, value)) => drop(metadata.insert(key.trim().to_owned(), value.trim().to_owned())),
                None if pair.trim().is_empty() => {}
                None => {
                    dropped.push(format!("metadata: {} is ignored: it is no KEY=VALUE", shown(pair.trim())))
                }
            }
        }
        let origin = setting.origin.clone();
        for message in dropped {
            self.warnings.add(origin.clone(), message);
        }
        metadata
    }

    /// A fleetd is a server, with a registry of its own or on etcd, or an agent of servers.
    fn check_roles(&mut self, config: &Config) -> Result<(), ConfigError> {
        if let Some(join) = self.setting("join").filter(|_| !config.join.is_empty()) {
            for (key, given) in
                [("etcd_servers", !config.etcd.servers.is_empty()), ("listen", !config.listen.is_empty())]
            {
                if given {
                    return Err(join.error(format!(
                        "an agent of other servers can't be one itself: remove join or {key}"
                    )));
                }
            }
        }
        let token = config.join_token.is_some() || config.join_token_file.is_some();
        for key in ["join_token", "join_token_file"] {
            self.warn_if(
                key,
                token && config.join.is_empty(),
                &format!("{key} is ignored because join is not set"),
            );
        }
        Ok(())
    }

    fn etcd(&mut self) -> Result<EtcdConfig, ConfigError> {
        let etcd = EtcdConfig {
            servers: self.read("etcd_servers", Vec::new(), servers)?,
            key_prefix: self.read("etcd_key_prefix", "/_coreos.com/fleet/".into(), key_prefix)?,
            request_timeout: self.read("etcd_request_timeout", Duration::from_secs(1), seconds)?,
            compaction: self.read("etcd_compaction", Some(COMPACTION), compaction)?,
            ca_file: self.path("etcd_cafile"),
            key_file: self.path("etcd_keyfile"),
            cert_file: self.path("etcd_certfile"),
            login: self
                .text("etcd_username")
                .map(|name| (name, Secret(self.text("etcd_password").unwrap_or_default()))),
        };
        match (self.setting("etcd_keyfile"), self.setting("etcd_certfile")) {
            (Some(key), None) => {
                return Err(key.error("etcd_certfile is missing: a key needs its certificate"));
            }
            (None, Some(cert)) => {
                return Err(cert.error("etcd_keyfile is missing: a certificate needs its key"));
            }
            _ => {}
        }
        let stray = etcd.login.is_none() && self.setting("etcd_password").is_some();
        self.warn_if("etcd_password", stray, "etcd_password is ignored because etcd_username is not set");
        Ok(etcd)
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Secret(text.to_owned())
    }
}

impl From<OsString> for Secret {
    fn from(text: OsString) -> Self {
        Secret(text.to_string_lossy().into_owned())
    }
}

#[cfg(test)]
mod tests;
