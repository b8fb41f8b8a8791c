//! What the configuration makes of golden/23-config.txt, and of mistakes.
use super::*;
use proptest::prelude::*;

const PATH: &str = "/etc/fleet/fleet.conf";

fn given() -> ConfigFile {
    ConfigFile::Default(PATH.into())
}

fn sources(
    text: &str,
    environment: &[(&str, &str)],
    set: &[&str],
) -> Result<(Config, Vec<Warning>), ConfigError> {
    let environment = environment.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    let flags = Flags { set: set.iter().map(|s| Secret::from(*s)).collect(), ..Flags::default() };
    Config::from_sources(&flags, &environment, given(), text)
}

/// A configuration without a warning.
fn config(text: &str) -> Config {
    let (config, warnings) = sources(text, &[], &[]).unwrap();
    assert_eq!(warnings, [], "{text}");
    config
}

fn warnings(text: &str) -> Vec<String> {
    sources(text, &[], &[]).unwrap().1.iter().map(ToString::to_string).collect()
}

fn error(text: &str) -> String {
    sources(text, &[], &[]).unwrap_err().to_string()
}

fn metadata(config: &Config) -> String {
    config.metadata.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(",")
}

#[test]
fn defaults() {
    let config = config("");
    assert_eq!(
        config,
        Config {
            file: given(),
            verbosity: 0,
            etcd: EtcdConfig {
                servers: vec![],
                key_prefix: "/_coreos.com/fleet/".into(),
                request_timeout: Duration::from_secs(1),
                compaction: Some(Duration::from_secs(3600)),
                ca_file: None,
                key_file: None,
                cert_file: None,
                login: None,
            },
            public_ip: None,
            metadata: BTreeMap::new(),
            agent_ttl: Duration::from_secs(30),
            mass_loss_fraction: (1, 3),
            mass_loss_rate: (10, Duration::from_secs(1)),
            on_stop: OnStop::Keep,
            engine_reconcile_interval: None,
            token_limit: 100,
            disable_engine: false,
            disable_watches: false,
            enable_grpc: false,
            units_directory: "/run/fleet/units/".into(),
            state_directory: "/var/lib/fleet".into(),
            api_socket: "/run/fleet.sock".into(),
            listen: Vec::new(),
            join: Vec::new(),
            join_token: None,
            join_token_file: None,
        }
    );
    assert!(config.embedded_registry());
}

#[test]
fn metadata_of_the_golden_file() {
    for (line, expected) in [
        ("metadata=\"region=us-west,az=1\"", "az=1,region=us-west"),
        ("metadata='region=us-west,az=1'", "az=1,region=us-west"),
        ("metadata=region=us-west,az=1", "az=1,region=us-west"),
        ("metadata=\" region = us-west ,\taz = 1 \"", "az=1,region=us-west"),
        ("metadata=\"a=1,a=2\"", "a=2"),
        ("metadata=\"a=b=c\"", "a=b=c"),
        ("metadata=\"a=,=b\"", "=b,a="),
        ("metadata=\"\"", ""),
        ("metadata=\"a=1,\"", "a=1"),
        ("# metadata=\"commented=out\"", ""),
        ("Metadata=\"upper=case\"", "upper=case"),
        ("metadata = \"spaces=around\"", "spaces=around"),
    ] {
        assert_eq!(metadata(&config(line)), expected, "{line}");
    }
}

#[test]
fn golden_forms_that_are_warned_about() {
    for (text, expected, warning) in [
        ("metadata=\"a\"", "", "fleet.conf:1: metadata: \"a\" is ignored: it is no KEY=VALUE"),
        (
            "metadata=\"k=v\" # comment",
            "\"k=v\"",
            "fleet.conf:1: metadata: the quotes are taken as part of the value",
        ),
        (
            "[section]\nmetadata=\"in=section\"",
            "",
            "fleet.conf:2: metadata is ignored because it stands in the section \"section\"",
        ),
        (
            "unknown_option=1\nmetadata=\"k=v\"",
            "k=v",
            "fleet.conf:1: there is no option \"unknown_option\"; it is ignored",
        ),
        ("verbosity=x\nmetadata=\"k=v\"", "k=v", "fleet.conf:1: verbosity: \"x\" is no number; taken as 0"),
        (
            "metadata=a=1\nmetadata=k=v",
            "k=v",
            "fleet.conf:2: metadata was set on line 1 already; this line counts",
        ),
        ("disable_watches=true\nmetadata=\"k=v\"", "k=v", "fleet.conf:1: disable_watches has no effect"),
        ("enable_grpc=1\nmetadata=\"k=v\"", "k=v", "fleet.conf:1: enable_grpc has no effect"),
    ] {
        let (config, warnings) = sources(text, &[], &[]).unwrap();
        assert_eq!(metadata(&config), expected, "{text}");
        assert_eq!(warnings.len(), 1, "{text}: {warnings:?}");
        assert!(warnings[0].to_string().contains(warning), "{}", warnings[0]);
    }
}

#[test]
fn options_of_the_original_that_are_gone() {
    assert_eq!(
        warnings("verify_units=true\nauthorized_keys_file=\"/x\""),
        [
            "/etc/fleet/fleet.conf:1: Config option verify_units is no longer supported - ignoring",
            "/etc/fleet/fleet.conf:2: Config option authorized_keys_file is no longer supported - ignoring",
        ]
    );
    assert_eq!(warnings("verify_units=false\nauthorized_keys_file=\"\""), [""; 0]);
}

#[test]
fn every_form_of_etcd_servers() {
    let two = ["http://127.0.0.1:9", "http://172.30.7.1:22379"];
    for value in [
        "[\"http://127.0.0.1:9\", \"http://172.30.7.1:22379\"]",
        "[\"http://127.0.0.1:9\",\"http://172.30.7.1:22379\"]",
        "\"http://127.0.0.1:9,http://172.30.7.1:22379\"",
        "http://127.0.0.1:9,http://172.30.7.1:22379",
        "http://127.0.0.1:9/, http://172.30.7.1:22379/ ,",
        "[http://127.0.0.1:9,http://172.30.7.1:22379,http://127.0.0.1:9]",
    ] {
        assert_eq!(config(&format!("etcd_servers={value}")).etcd.servers, two, "{value}");
    }
    assert_eq!(config("etcd_servers=http://x:1").etcd.servers, ["http://x:1"]);
    assert_eq!(config("etcd_servers=[\"https://[::1]:2379\"]").etcd.servers, ["https://[::1]:2379"]);
    assert_eq!(config("etcd_servers=[]").etcd.servers, [""; 0]);
    assert!(!config("etcd_servers=http://x:1").embedded_registry());
    for bad in ["127.0.0.1:2379", "ftp://x", "http://", "http://a b", "http://x/path", "http://[x]:1"] {
        let error = error(&format!("\netcd_servers={bad}"));
        assert!(error.starts_with("/etc/fleet/fleet.conf:2: etcd_servers: "), "{error}");
    }
    for bad in ["http://root:hunter2@x:1", "root:hunter2@x:1"] {
        let error = error(&format!("etcd_servers={bad}"));
        assert!(!error.contains("hunter2"), "{error}");
    }
}

#[test]
fn values_with_a_type() {
    assert_eq!(config("agent_ttl=\"3s\"").agent_ttl, Duration::from_secs(3));
    assert_eq!(config("agent_ttl=1m30s").agent_ttl, Duration::from_secs(90));
    assert_eq!(config("on_stop=keep").on_stop, OnStop::Keep);
    assert_eq!(config("on_stop=\"purge\"").on_stop, OnStop::Purge);
    assert_eq!(
        config("engine_reconcile_interval=0.5").engine_reconcile_interval,
        Some(Duration::from_millis(500))
    );
    assert_eq!(config("etcd_request_timeout=1.5").etcd.request_timeout, Duration::from_millis(1500));
    assert_eq!(config("etcd_compaction=off").etcd.compaction, None);
    assert_eq!(config("etcd_compaction=24h").etcd.compaction, Some(Duration::from_secs(86_400)));
    assert_eq!(config("etcd_request_timeout=250ms").etcd.request_timeout, Duration::from_millis(250));
    assert_eq!(config("verbosity=1").verbosity, 1);
    assert_eq!(config("verbosity=-3").verbosity, 0);
    assert_eq!(config("verbosity=100000").verbosity, 255);
    assert_eq!(config("token_limit=7").token_limit, 7);
    assert_eq!(config("public_ip=\"10.9.8.7\"").public_ip.as_deref(), Some("10.9.8.7"));
    assert_eq!(config("etcd_key_prefix=\"/other/\"").etcd.key_prefix, "/other/");
    assert_eq!(config("etcd_key_prefix=a/b").etcd.key_prefix, "/a/b/");
    assert_eq!(config("etcd_key_prefix=/").etcd.key_prefix, "/");
    assert_eq!(config("units_directory=\"/run/other/units\"").units_directory, Path::new("/run/other/units"));
    assert!(config("disable_engine=true").disable_engine);
    config("systemd_user=f");
    assert!(!config("disable_engine=False").disable_engine);
}

#[test]
fn an_empty_value_is_the_default() {
    let all: String = KEYS.iter().map(|key| format!("{key}=\n")).collect();
    assert_eq!(config(&all), config(""));
    let (with, _) =
        sources("metadata=a=1\nagent_ttl=5s", &[("FLEET_METADATA", ""), ("FLEET_AGENT_TTL", "")], &[])
            .unwrap();
    assert_eq!(with, config(""));
}

#[test]
fn care_when_many_machines_vanish() {
    assert_eq!(config("").mass_loss_fraction, (1, 3));
    assert_eq!(config("mass_loss_fraction=\"2/5\"").mass_loss_fraction, (2, 5));
    assert_eq!(config("mass_loss_fraction=0.25").mass_loss_fraction, (250_000, 1_000_000));
    assert_eq!(config("mass_loss_fraction=1").mass_loss_fraction, (1_000_000, 1_000_000));
    assert_eq!(config("").mass_loss_rate, (10, Duration::from_secs(1)));
    assert_eq!(config("mass_loss_rate=50").mass_loss_rate, (50, Duration::from_secs(1)));
    assert_eq!(config("mass_loss_rate=0.5").mass_loss_rate, (1, Duration::from_secs(2)));
    assert_eq!(config("mass_loss_rate=2.5").mass_loss_rate, (3, Duration::from_millis(1200)));
}

#[test]
fn values_that_cannot_be() {
    for (line, reason) in [
        ("agent_ttl=\"30\"", "agent_ttl: time: missing unit in duration \"30\""),
        ("on_stop=Purge", "on_stop: \"Purge\" is neither keep nor purge"),
        ("agent_ttl=1x", "agent_ttl: time: unknown unit \"x\" in duration \"1x\""),
        ("agent_ttl=10ms", "agent_ttl: \"10ms\" is too short; at least 1s is needed"),
        ("agent_ttl=-3s", "agent_ttl: negative duration \"-3s\""),
        ("agent_ttl=1000000h", "agent_ttl: \"1000000h\" is too long; at most 24h is possible"),
        ("mass_loss_fraction=0", "mass_loss_fraction: \"0\" is no part of all machines"),
        ("mass_loss_fraction=4/3", "mass_loss_fraction: \"4/3\" is no part of all machines"),
        ("mass_loss_fraction=1/0", "mass_loss_fraction: \"1/0\" is no part of all machines"),
        ("mass_loss_fraction=NaN", "mass_loss_fraction: \"NaN\" is no part of all machines"),
        ("mass_loss_rate=0", "mass_loss_rate: \"0\" is no number of units a second"),
        ("mass_loss_rate=inf", "mass_loss_rate: \"inf\" is no number of units a second"),
        ("engine_reconcile_interval=0", "engine_reconcile_interval: \"0\" is too short"),
        ("engine_reconcile_interval=NaN", "engine_reconcile_interval: \"NaN\" is no number of seconds"),
        ("engine_reconcile_interval=1e300", "engine_reconcile_interval: \"1e300\" is no number of seconds"),
        ("engine_reconcile_interval=soon", "engine_reconcile_interval: time: invalid duration \"soon\""),
        ("etcd_compaction=1s", "etcd_compaction: \"1s\" is not between 1m and 720h"),
        ("etcd_request_timeout=-1", "etcd_request_timeout: \"-1\" is no number of seconds"),
        ("token_limit=0", "token_limit: \"0\" is no number of entries"),
        ("token_limit=many", "token_limit: \"many\" is no number of entries"),
        ("disable_engine=maybe", "disable_engine: \"maybe\" is neither true nor false"),
        ("units_directory=run/units", "units_directory: \"run/units\" is no absolute path"),
        ("state_directory=.", "state_directory: \".\" is no absolute path"),
        ("public_ip=10.0.0.1 10.0.0.2", "public_ip: \"10.0.0.1 10.0.0.2\" is no address"),
        ("etcd_keyfile=/k", "etcd_keyfile: etcd_certfile is missing"),
        ("etcd_certfile=/c", "etcd_certfile: etcd_keyfile is missing"),
        ("systemd_user=T", "systemd_user: units run under the systemd of the machine only"),
        ("nonsense", "is neither KEY=VALUE nor a [section] nor a comment"),
    ] {
        let error = error(&format!("# first\n{line}"));
        assert!(error.starts_with(&format!("/etc/fleet/fleet.conf:2: {reason}")), "{error}");
    }
}

#[test]
fn the_environment_counts_over_the_file_and_the_command_line_over_both() {
    let text = "metadata=\"from=file\"\nverbosity=1\ntoken_limit=5";
    let environment =
        [("FLEET_METADATA", "from=env"), ("FLEET_VERBOSITY", "2"), ("FLEET_PUBLIC_IP", "10.1.1.1")];
    let (config, warnings) = sources(text, &environment, &["verbosity=3"]).unwrap();
    assert_eq!(warnings, []);
    assert_eq!(metadata(&config), "from=env");
    assert_eq!(config.public_ip.as_deref(), Some("10.1.1.1"));
    assert_eq!((config.verbosity, config.token_limit), (3, 5));
}

#[test]
fn every_key_is_a_variable_and_a_flag() {
    for key in KEYS {
        let name = format!("FLEET_{}", key.to_uppercase());
        let (_, warnings) = sources("", &[(&name, "")], &[&format!("{key}=")]).unwrap();
        assert_eq!(warnings, [], "{key}");
    }
}

#[test]
fn every_key_is_documented_in_order() {
    let text = include_str!("../../../../docs/CONFIGURATION.md");
    let documented: Vec<_> = text
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once("` | `FLEET_"))
        .map(|(key, rest)| (key, rest.split('`').next().unwrap().to_lowercase()))
        .collect();
    assert_eq!(documented, KEYS.map(|key| (key, key.to_owned())));
}

#[test]
fn errors_name_the_variable_or_the_flag() {
    let error =
        |environment: &[(&str, &str)], set: &[&str]| sources("", environment, set).unwrap_err().to_string();
    assert_eq!(
        error(&[("FLEET_AGENT_TTL", "30")], &[]),
        "FLEET_AGENT_TTL: time: missing unit in duration \"30\""
    );
    assert_eq!(error(&[], &["agent_ttl=30"]), "--set agent_ttl: time: missing unit in duration \"30\"");
    assert_eq!(error(&[], &["color=red"]), "--set: there is no option \"color\"");
    assert!(!error(&[], &["hunter2"]).contains("hunter2"));
}

#[test]
fn unknown_variables_are_named() {
    let environment = [
        ("FLEET_ETCD_SERVER", "http://x:1"),
        ("FLEET_LOG", "debug"),
        ("FLEETCTL_ENDPOINT", "x"),
        ("FLEET_verbosity", "1"),
    ];
    let (config, warnings) = sources("", &environment, &[]).unwrap();
    let warnings: Vec<_> = warnings.iter().map(ToString::to_string).collect();
    assert_eq!(
        warnings,
        [
            "FLEET_ETCD_SERVER: there is no such option; the variable is ignored",
            "FLEET_verbosity: there is no such option; the variable is ignored",
        ]
    );
    assert_eq!(config.verbosity, 0);
}

#[test]
fn the_password_is_shown_nowhere() {
    let (config, warnings) =
        sources("etcd_username=root\netcd_password=hunter2", &[], &["etcd_password=hunter3"]).unwrap();
    let (name, password) = config.etcd.login.clone().unwrap();
    assert_eq!((name.as_str(), password.expose()), ("root", "hunter3"));
    assert!(!format!("{config:?} {warnings:?}").contains("hunter"));
    let warnings = self::warnings("etcd_password=hunter2;x\netcd_password=\"hunter2");
    assert_eq!(warnings.len(), 4, "{warnings:?}");
    assert!(!warnings.concat().contains("hunter"), "{warnings:?}");
}

#[test]
fn warnings_are_bounded() {
    let text: String = (0..1000).map(|i| format!("x{i}=1\n")).collect();
    let got = warnings(&text);
    assert_eq!(got.len(), MAX_WARNINGS + 1);
    assert_eq!(got[MAX_WARNINGS], "and 950 more warnings about the configuration");
    assert!(warnings(&format!("{}=1", "x".repeat(10_000)))[0].len() < 200);
}

#[test]
fn files() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fleet.conf");
    let load = |path: &Path| Config::load(&Flags { config: Some(path.into()), ..Flags::default() });

    let missing = load(&path).unwrap_err().to_string();
    assert!(
        missing.starts_with("unable to use config file ") && missing.contains("No such file"),
        "{missing}"
    );
    let no_file = load(directory.path()).unwrap_err().to_string();
    assert!(no_file.contains("is a directory"), "{no_file}");

    std::fs::write(&path, "state_directory=/here\n").unwrap();
    let (config, _) = load(&path).unwrap();
    assert_eq!(config.file, ConfigFile::Given(path.clone()));
    assert_eq!(config.state_directory, Path::new("/here"));

    std::fs::write(&path, b"a=1\nmetadata=\xff").unwrap();
    assert_eq!(load(&path).unwrap_err().to_string(), format!("{}:2: is not UTF-8 text", path.display()));

    std::fs::write(&path, vec![b'#'; MAX_FILE as usize]).unwrap();
    load(&path).unwrap();
    std::fs::write(&path, vec![b'#'; MAX_FILE as usize + 1]).unwrap();
    assert!(load(&path).unwrap_err().to_string().contains("larger than 1048576 bytes"));
    assert!(load(Path::new("/dev/zero")).unwrap_err().to_string().contains("larger than"));
}

#[test]
fn the_file_is_named_as_ever() {
    assert_eq!(given().to_string(), "Using default config file /etc/fleet/fleet.conf");
    assert_eq!(ConfigFile::Given("/x".into()).to_string(), "Using provided config file /x");
    assert_eq!(ConfigFile::None.to_string(), "No provided or default config file found - proceeding without");
}

proptest! {
    /// Whatever a key is set to: it is read or refused, and nothing panics.
    #[test]
    fn any_value_is_read_or_refused(key in proptest::sample::select(&KEYS[..]), value in "[-+.0-9a-z:/@,=\"\\[\\]]{0,30}|\\PC{0,60}") {
        let name = format!("FLEET_{}", key.to_uppercase());
        let _ = sources("", &[(&name, &value)], &[]);
        let _ = sources(&format!("{key}={value}"), &[], &[]);
    }

    #[test]
    fn metadata_is_read_as_written(pairs in proptest::collection::btree_map("[a-z0-9_.-]{0,12}", "[a-z0-9_=.-]{0,12}", 1..6)) {
        let text: Vec<_> = pairs.iter().map(|(k, v)| format!(" {k} = {v} ")).collect();
        let (config, _) = sources(&format!("metadata=\"{}\"", text.join(",")), &[], &[]).unwrap();
        prop_assert_eq!(config.metadata, pairs);
    }
}
