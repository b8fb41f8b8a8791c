//! The targets. What each of them asserts stands in its own file, or beside the code where that is private.

mod export;
mod registry;
mod token;
mod unit;

use std::hash::{DefaultHasher, Hash, Hasher};

/// Which way an input went, as far as a target tells: the kind of result, roughly how large it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Seen(u64);

impl Seen {
    /// From anything that says it.
    pub fn of(what: impl Hash) -> Seen {
        let mut hasher = DefaultHasher::new();
        what.hash(&mut hasher);
        Seen(hasher.finish())
    }

    /// From a message, of which numbers do not count, nor what is quoted.
    pub(crate) fn message(text: &str) -> Seen {
        let mut words = String::new();
        for (index, part) in text.split(['"', '\'']).enumerate() {
            if index % 2 == 0 {
                words.extend(part.chars().filter(|c| c.is_ascii_alphabetic() || *c == ' ').take(120));
            }
        }
        Seen::of(words)
    }
}

/// A number, roughly.
pub(crate) fn about(number: usize) -> u32 {
    usize::BITS - number.leading_zeros()
}

/// Something that reads outside bytes.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, and that of its corpus.
    pub name: &'static str,
    /// Panics when something is wrong.
    pub run: fn(&[u8]) -> Seen,
    /// Words of its language.
    pub words: &'static [&'static str],
    /// The longest input that makes sense, bytes.
    pub longest: usize,
}

/// All targets.
pub const TARGETS: &[Target] = &[
    Target { name: "unit_file", run: unit::file, words: unit::WORDS, longest: 4096 },
    Target { name: "requirements", run: unit::requirements, words: unit::FLEET_WORDS, longest: 2048 },
    Target { name: "glob", run: unit::glob, words: &["*", "?", "[a-z]", "[^", "]", "\\"], longest: 256 },
    Target {
        name: "name",
        run: unit::name,
        words: &["@", ".service", ".timer", ".socket", "\\x2d"],
        longest: 300,
    },
    Target { name: "api", run: api, words: API_WORDS, longest: 8192 },
    Target { name: "session", run: session, words: &["launched", ".service", "[Service]\n"], longest: 8192 },
    Target { name: "fleet_conf", run: fleet_conf, words: CONF_WORDS, longest: 4096 },
    Target { name: "records", run: registry::records, words: registry::WORDS, longest: 8192 },
    Target { name: "export", run: export::export, words: export::WORDS, longest: 8192 },
    Target { name: "token", run: token::token, words: &["fleet1-", "fleet2-", "-", "_"], longest: 256 },
];

/// The target of a name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

/// A request of the API: `METHOD PATH?QUERY`, a newline, and the body.
fn api(input: &[u8]) -> Seen {
    Seen::message(&fleetd::api::fuzz::request(input))
}

/// A message of a session: one from an agent after a first byte that is even, one from a server after one that is odd.
fn session(input: &[u8]) -> Seen {
    Seen::message(&fleet_link::fuzz::message(input))
}

/// fleet.conf.
fn fleet_conf(input: &[u8]) -> Seen {
    match std::str::from_utf8(input) {
        Ok(text) => Seen::message(&fleetd::config::fuzz::file(text)),
        Err(_) => Seen::of("no text"),
    }
}

const API_WORDS: &[&str] = &[
    "GET /fleet/v1/",
    "PUT /fleet/v1/units/",
    "PATCH /fleet/v1/machines\n",
    "POST /fleet/v1/",
    "DELETE ",
    "users",
    "join-tokens",
    "?nextPageToken=",
    "?limit=",
    "&unitName=",
    "\"options\":[",
    "\"section\":\"Service\"",
    "\"name\":",
    "\"value\":",
    "\"desiredState\":\"launched\"",
    "\"file\":",
    "\"op\":\"add\"",
    "\"path\":\"/",
    "/metadata/",
    "\"role\":\"admin\"",
    "\"ttl\":\"1h\"",
    "\"uses\":",
    "%2F",
    "%ff",
    "-----BEGIN CERTIFICATE REQUEST-----",
];
const CONF_WORDS: &[&str] = &[
    "etcd_servers=",
    "metadata=",
    "agent_ttl=",
    "listen=",
    "join=",
    "join_token=",
    "state_directory=",
    "token_limit=",
    "mass_loss",
    "[\"http://",
    "\"]",
    "[::1]:4919",
    "*",
    "5s",
    "1h2m3.5s",
    "region=eu,",
    "#",
    ";",
    "\\\n",
    "on_stop=\"purge\"",
];
