//! Which path and method is what. Odd as some of the answers are, clients know them (golden/19-api.txt).

use crate::server::MachineMark;
use hyper::{Method, StatusCode};
use percent_encoding::percent_decode_str;

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    Discovery,
    Machines,
    PatchMachines,
    Units,
    Unit(String),
    PutUnit(String),
    DeleteUnit(String),
    UnitFile(String),
    UnitStatus(String),
    UnitJournal(String),
    UnitExplain(String),
    States,
    State(String),
    Events,
    JoinTokens,
    CreateJoinToken,
    RevokeJoinToken(String),
    Members,
    RemoveMachine(String),
    Servers,
    MarkMachine(String, MachineMark),
    Drain(String),
    Notices,
    AcceptRegistry,
    ExportRegistry,
    ImportRegistry,
    ChangeUnits,
    Users,
    CreateUser,
    SetRole(String),
    RemoveUser(String),
    Metrics,
    /// An error, with its message.
    Refused(StatusCode, &'static str),
}

/// The prefixes of the API; the first is the original's old one.
const PREFIXES: [&str; 2] = ["/v1-alpha", "/fleet/v1"];

const ONLY_GET: &str = "only GET supported against this resource";

/// Finds the route of a request; `path` as it came, percent-encoded.
pub(crate) fn route(method: &Method, path: &str) -> Route {
    let Ok(path) = percent_decode_str(path).decode_utf8() else {
        return Route::Refused(StatusCode::BAD_REQUEST, "path is not UTF-8");
    };
    if path == "/" {
        return Route::Refused(StatusCode::METHOD_NOT_ALLOWED, "");
    }
    if path == "/metrics" {
        return Route::Metrics;
    }
    for prefix in PREFIXES {
        if let Some(rest) = path.strip_prefix(prefix) {
            if rest.is_empty() {
                return Route::Refused(StatusCode::METHOD_NOT_ALLOWED, "");
            }
            if let Some(rest) = rest.strip_prefix('/') {
                return resource(method, rest);
            }
        }
    }
    Route::Refused(StatusCode::NOT_FOUND, "")
}

fn resource(method: &Method, path: &str) -> Route {
    let segments: Vec<&str> = path.split('/').collect();
    let get = |route: Route| {
        if *method == Method::GET { route } else { Route::Refused(StatusCode::METHOD_NOT_ALLOWED, ONLY_GET) }
    };
    match segments[..] {
        ["discovery"] if *method == Method::GET => Route::Discovery,
        ["discovery"] => {
            Route::Refused(StatusCode::BAD_REQUEST, "only HTTP GET supported against this resource")
        }
        ["machines"] => match *method {
            Method::GET => Route::Machines,
            Method::PATCH => Route::PatchMachines,
            _ => Route::Refused(
                StatusCode::METHOD_NOT_ALLOWED,
                "only GET and PATCH supported against this resource",
            ),
        },
        ["units"] => get(Route::Units),
        ["unit-changes"] if *method == Method::POST => Route::ChangeUnits,
        ["units", name] if !name.is_empty() => match *method {
            Method::GET => Route::Unit(name.to_owned()),
            Method::PUT => Route::PutUnit(name.to_owned()),
            Method::DELETE => Route::DeleteUnit(name.to_owned()),
            _ => Route::Refused(
                StatusCode::METHOD_NOT_ALLOWED,
                "only GET, PUT and DELETE supported against this resource",
            ),
        },
        ["units", name, "file"] => get(Route::UnitFile(name.to_owned())),
        ["units", name, "status"] => get(Route::UnitStatus(name.to_owned())),
        ["units", name, "journal"] => get(Route::UnitJournal(name.to_owned())),
        ["units", name, "explain"] => get(Route::UnitExplain(name.to_owned())),
        ["state"] => get(Route::States),
        ["state", name] if !name.is_empty() => get(Route::State(name.to_owned())),
        ["events"] => get(Route::Events),
        ["join-tokens"] => match *method {
            Method::GET => Route::JoinTokens,
            Method::POST => Route::CreateJoinToken,
            _ => Route::Refused(
                StatusCode::METHOD_NOT_ALLOWED,
                "only GET and POST supported against this resource",
            ),
        },
        ["join-tokens", id] if !id.is_empty() && *method == Method::DELETE => {
            Route::RevokeJoinToken(id.to_owned())
        }
        ["members"] => get(Route::Members),
        ["servers"] => get(Route::Servers),
        ["registry", "accept"] if *method == Method::POST => Route::AcceptRegistry,
        ["registry", "export"] => get(Route::ExportRegistry),
        ["registry", "import"] if *method == Method::POST => Route::ImportRegistry,
        ["users"] => match *method {
            Method::GET => Route::Users,
            Method::POST => Route::CreateUser,
            _ => Route::Refused(
                StatusCode::METHOD_NOT_ALLOWED,
                "only GET and POST supported against this resource",
            ),
        },
        ["users", name] if !name.is_empty() => match *method {
            Method::PATCH => Route::SetRole(name.to_owned()),
            Method::DELETE => Route::RemoveUser(name.to_owned()),
            _ => Route::Refused(
                StatusCode::METHOD_NOT_ALLOWED,
                "only PATCH and DELETE supported against this resource",
            ),
        },
        ["machines", id] if !id.is_empty() && *method == Method::DELETE => {
            Route::RemoveMachine(id.to_owned())
        }
        ["machines", id, "cordon"] if !id.is_empty() => match *method {
            Method::PUT => Route::MarkMachine(id.to_owned(), MachineMark::Cordon),
            Method::DELETE => Route::MarkMachine(id.to_owned(), MachineMark::Uncordon),
            _ => Route::Refused(
                StatusCode::METHOD_NOT_ALLOWED,
                "only PUT and DELETE supported against this resource",
            ),
        },
        ["machines", id, "drain"] if !id.is_empty() => match *method {
            Method::GET => Route::Drain(id.to_owned()),
            Method::PUT => Route::MarkMachine(id.to_owned(), MachineMark::Drain),
            Method::DELETE => Route::MarkMachine(id.to_owned(), MachineMark::EndDrain),
            _ => Route::Refused(
                StatusCode::METHOD_NOT_ALLOWED,
                "only GET, PUT and DELETE supported against this resource",
            ),
        },
        ["notices"] => get(Route::Notices),
        _ => Route::Refused(StatusCode::NOT_FOUND, ""),
    }
}

/// The query's pairs, decoded, in order.
pub(crate) fn query(query: Option<&str>) -> Vec<(String, String)> {
    let decode = |text: &str| {
        let text = text.replace('+', " ");
        percent_decode_str(&text).decode_utf8_lossy().into_owned()
    };
    query
        .unwrap_or_default()
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| match pair.split_once('=') {
            Some((key, value)) => (decode(key), decode(value)),
            None => (decode(pair), String::new()),
        })
        .collect()
}

/// The first value of a key.
pub(crate) fn first<'a>(query: &'a [(String, String)], key: &str) -> Option<&'a str> {
    query.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_answer_as_the_original() {
        let refused = |code: u16, message| Route::Refused(StatusCode::from_u16(code).unwrap(), message);
        for (method, path, expected) in [
            ("GET", "/", refused(405, "")),
            ("GET", "/metrics", Route::Metrics),
            ("GET", "/metrics/", refused(404, "")),
            ("GET", "/fleet", refused(404, "")),
            ("GET", "/fleet/v1", refused(405, "")),
            ("POST", "/fleet/v1", refused(405, "")),
            ("GET", "/fleet/v1/", refused(404, "")),
            ("GET", "/fleet/v1/nonsuch", refused(404, "")),
            ("GET", "/fleet/v2/units", refused(404, "")),
            ("GET", "/v1-alpha", refused(405, "")),
            ("GET", "/v1-alpha/units", Route::Units),
            ("HEAD", "/fleet/v1/units", refused(405, ONLY_GET)),
            ("POST", "/fleet/v1/units", refused(405, ONLY_GET)),
            ("POST", "/fleet/v1/unit-changes", Route::ChangeUnits),
            ("GET", "/fleet/v1/unit-changes", refused(404, "")),
            ("GET", "/fleet/v1/registry/export", Route::ExportRegistry),
            ("POST", "/fleet/v1/registry/import", Route::ImportRegistry),
            ("GET", "/fleet/v1/registry/import", refused(404, "")),
            ("GET", "/fleet/v1/units/", refused(404, "")),
            ("GET", "/fleet/v1/units/a/b", refused(404, "")),
            ("PUT", "/fleet/v1/units/a%2Fb.service", refused(404, "")),
            ("PUT", "/fleet/v1/units/x%5Cx2dy.service", Route::PutUnit(r"x\x2dy.service".to_owned())),
            ("GET", "/fleet/v1/machines/abc", refused(404, "")),
            (
                "PUT",
                "/fleet/v1/machines/abc/cordon",
                Route::MarkMachine("abc".to_owned(), MachineMark::Cordon),
            ),
            (
                "DELETE",
                "/fleet/v1/machines/abc/drain",
                Route::MarkMachine("abc".to_owned(), MachineMark::EndDrain),
            ),
            ("GET", "/fleet/v1/machines/abc/drain", Route::Drain("abc".to_owned())),
            ("GET", "/fleet/v1/machines//drain", refused(404, "")),
            (
                "GET",
                "/fleet/v1/machines/abc/cordon",
                refused(405, "only PUT and DELETE supported against this resource"),
            ),
            ("GET", "/fleet/v1/units/a.service/journal", Route::UnitJournal("a.service".to_owned())),
            ("GET", "/fleet/v1/units/%ff", refused(400, "path is not UTF-8")),
        ] {
            let method = Method::from_bytes(method.as_bytes()).unwrap();
            assert_eq!(route(&method, path), expected, "{method} {path}");
        }
    }

    #[test]
    fn queries_are_decoded() {
        let pairs = query(Some("unitName=a%40b.service&x=1+2&&flag"));
        assert_eq!(first(&pairs, "unitName"), Some("a@b.service"));
        assert_eq!(first(&pairs, "x"), Some("1 2"));
        assert_eq!(first(&pairs, "flag"), Some(""));
        assert_eq!(first(&pairs, "none"), None);
    }
}
