//! What the values of options look like: each reader takes a text, and an error says what it should have been.

use super::{OnStop, duration};
use fleet_link::{DEFAULT_PORT, dial::Address};
use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

/// A text of the user's as a message repeats it: quoted and not too long.
pub(super) fn shown(text: &str) -> String {
    match text.char_indices().nth(64) {
        Some((end, _)) => format!("{:?}...", &text[..end]),
        None => format!("{text:?}"),
    }
}

/// The items of a list, separated by commas, in brackets or not.
pub(super) fn items(text: &str) -> impl Iterator<Item = &str> {
    let text = text.trim();
    let inner = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).filter(|_| text.contains('"'));
    inner
        .unwrap_or(text)
        .split(',')
        .map(|item| item.trim().trim_matches('"').trim())
        .filter(|item| !item.is_empty())
}

/// Addresses to listen on: IP addresses, each with a port or for the default port; `*` for all.
pub(super) fn listen(text: &str) -> Result<Vec<SocketAddr>, String> {
    let address = |item: &str| {
        let item = match item.strip_prefix('*') {
            Some(port) => format!("0.0.0.0{port}"),
            None => item.to_owned(),
        };
        let ip = item.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, DEFAULT_PORT));
        ip.or_else(|| item.parse().ok()).ok_or_else(|| {
            format!("{} is no IP address (10.0.0.1, 10.0.0.1:{DEFAULT_PORT} or *)", shown(&item))
        })
    };
    items(text).map(address).collect()
}

/// Addresses of servers.
pub(super) fn join(text: &str) -> Result<Vec<Address>, String> {
    items(text).map(|item| item.parse::<Address>().map_err(|error| error.to_string())).collect()
}

/// The words of Go's `strconv.ParseBool`.
pub(super) fn boolean(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(format!("{} is neither true nor false", shown(text))),
    }
}

/// Seconds as a decimal number, or a duration with its unit; more than zero.
pub(super) fn seconds(text: &str) -> Result<Duration, String> {
    let duration = match f64::from_str(text) {
        Ok(number) => Duration::try_from_secs_f64(number)
            .map_err(|_| format!("{} is no number of seconds that can be waited", shown(text)))?,
        Err(_) => duration::parse(text).map_err(|e| e.to_string())?,
    };
    if duration < Duration::from_millis(10) {
        return Err(format!("{} is too short; at least 0.01 seconds are needed", shown(text)));
    }
    if duration > Duration::from_secs(86_400) {
        return Err(format!("{} is too long; at most a day is possible", shown(text)));
    }
    Ok(duration)
}

/// A time to keep something for, or `off`.
pub(super) fn compaction(text: &str) -> Result<Option<Duration>, String> {
    if text == "off" {
        return Ok(None);
    }
    let retention = duration::parse(text).map_err(|error| format!("{error}; or off"))?;
    if !(Duration::from_secs(60)..=Duration::from_secs(30 * 86_400)).contains(&retention) {
        return Err(format!("{} is not between 1m and 720h", shown(text)));
    }
    Ok(Some(retention))
}

pub(super) fn agent_ttl(text: &str) -> Result<Duration, String> {
    let ttl = duration::parse(text).map_err(|e| e.to_string())?;
    if ttl < Duration::from_secs(1) {
        return Err(format!("{} is too short; at least 1s is needed", shown(text)));
    }
    if ttl > Duration::from_secs(86_400) {
        return Err(format!("{} is too long; at most 24h is possible", shown(text)));
    }
    Ok(ttl)
}

/// A part of a whole, as `1/3` or `0.33`; more than none and at most all.
pub(super) fn fraction(text: &str) -> Result<(u32, u32), String> {
    /// What a decimal number is a multiple of: one part of so many.
    const PARTS: u32 = 1_000_000;
    let parsed = match text.split_once('/') {
        Some((part, of)) => part.trim().parse().ok().zip(of.trim().parse().ok()),
        None => {
            let number = text.trim().parse().ok().filter(|number| (0.0..=1.0).contains(number));
            number.map(|number: f64| ((number * f64::from(PARTS)).round() as u32, PARTS))
        }
    };
    match parsed {
        Some((part, of)) if 0 < part && part <= of => Ok((part, of)),
        _ => Err(format!("{} is no part of all machines (1/3 or 0.33; at most 1)", shown(text))),
    }
}

/// So many a second: as many as fit into one, or one in as many seconds as it takes.
pub(super) fn rate(text: &str) -> Result<(usize, Duration), String> {
    let number = text.trim().parse().ok().filter(|number| (0.01..=100_000.0).contains(number));
    let number: f64 =
        number.ok_or_else(|| format!("{} is no number of units a second (0.01 to 100000)", shown(text)))?;
    let units = number.ceil();
    Ok((units as usize, Duration::from_secs_f64(units / number)))
}

pub(super) fn on_stop(text: &str) -> Result<OnStop, String> {
    match text {
        "keep" => Ok(OnStop::Keep),
        "purge" => Ok(OnStop::Purge),
        _ => Err(format!("{} is neither keep nor purge", shown(text))),
    }
}

pub(super) fn page_size(text: &str) -> Result<usize, String> {
    match usize::from_str(text) {
        Ok(0) | Err(_) => Err(format!("{} is no number of entries (1 or more)", shown(text))),
        Ok(number) => Ok(number),
    }
}

pub(super) fn absolute(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    match path.is_absolute() {
        true => Ok(path),
        false => Err(format!("{} is no absolute path", shown(text))),
    }
}

/// An address as others are told it. The original took any text, so a host name will do; but it stands in tables.
pub(super) fn address(text: &str) -> Result<String, String> {
    let text = text.trim();
    let wrong =
        text.is_empty() || text.len() > 253 || text.contains(|c: char| c.is_whitespace() || c.is_control());
    if wrong { Err(format!("{} is no address", shown(text))) } else { Ok(text.to_owned()) }
}

/// A prefix of keys with a slash at both ends, as the original's joins made it.
pub(super) fn key_prefix(text: &str) -> Result<String, String> {
    let inner = text.trim().trim_matches('/');
    if inner.is_empty() { Ok("/".to_owned()) } else { Ok(format!("/{inner}/")) }
}

/// A list of URLs: `["a", "b"]`, `a,b`, or one.
pub(super) fn servers(text: &str) -> Result<Vec<String>, String> {
    let text = text.trim();
    let inner = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    let mut servers = Vec::new();
    let mut seen = HashSet::new();
    for item in inner.split(',') {
        let item = item.trim().trim_matches('"').trim().trim_end_matches('/');
        if item.is_empty() {
            continue;
        }
        check_server(item)?;
        if seen.insert(item) {
            servers.push(item.to_owned());
        }
    }
    Ok(servers)
}

fn check_server(item: &str) -> Result<(), String> {
    let host = item.strip_prefix("http://").or_else(|| item.strip_prefix("https://")).ok_or_else(|| {
        format!("{} is no http:// or https:// URL", shown(item.rsplit('@').next().unwrap_or("")))
    })?;
    if host.contains('@') {
        return Err("a URL must not hold a password; use etcd_username and etcd_password".into());
    }
    if host.is_empty()
        || host.contains(|c: char| c.is_whitespace() || c.is_control() || "/\"'[]?#".contains(c))
    {
        let ipv6 = host.strip_prefix('[').and_then(|rest| rest.split_once(']')).is_some_and(|(ip, port)| {
            std::net::Ipv6Addr::from_str(ip).is_ok() && (port.is_empty() || port.starts_with(':'))
        });
        if !ipv6 {
            return Err(format!("{} is no URL of the form http://HOST:PORT", shown(item)));
        }
    }
    Ok(())
}
