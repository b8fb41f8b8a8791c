//! Units, states and machines.

use super::{
    Answer, Api, access::Remote, decode, empty, failure, json, old_clients, page::Page, read_body, route,
};
use crate::server::{Put, WriteError, hub};
use fleet_api::types;
use fleet_cluster::{model::DesiredState, view::View};
use fleet_registry::Store;
use fleet_unit::{UnitFile, UnitName, UnitOption};
use hyper::{HeaderMap, Request, Response, StatusCode, body::Incoming, header};
use route::Route;
use std::time::{Duration, Instant};
use tokio::time::timeout;

/// How long a request waits for the registry to be read when fleetd starts.
const START_DEADLINE: Duration = Duration::from_secs(2);

const NO_UNIT: &str = "unit does not exist";

impl<S: Store> Api<S> {
    pub(super) async fn dispatch(&self, request: Request<Incoming>, remote: Option<&Remote>) -> Answer {
        let route = route::route(request.method(), request.uri().path());
        let query = route::query(request.uri().query());
        // A registry that is refused is not read before it is accepted.
        let needs_view = remote.is_some()
            || !matches!(
                route,
                Route::Discovery
                    | Route::Metrics
                    | Route::AcceptRegistry
                    | Route::Servers
                    | Route::Refused(..)
            );
        // The first request after socket activation may be here before the registry is read.
        if needs_view && timeout(START_DEADLINE, self.server.hub().reached(1)).await.is_err() {
            let why = match self.server.is_importing() {
                true => "the registry is being imported; nothing can be done before that is complete",
                false => "fleet server has not read its registry yet",
            };
            return failure(StatusCode::SERVICE_UNAVAILABLE, why);
        }
        // Who was made a user through another server may be known here only after catching up.
        let caught_up = self.caught_up(request.headers()).await;
        if let Some(remote) = remote
            && let Some(answer) = remote.refuse(self.server.users(), &route, request.headers())
        {
            return answer;
        }
        if let Err(behind) = caught_up {
            return behind;
        }
        match route {
            Route::Refused(status, message) => failure(status, message),
            Route::Discovery => discovery(if remote.is_some() { "https" } else { "http" }, request.headers()),
            Route::Machines => self.machines(&query),
            Route::PatchMachines => self.patch_machines(request).await,
            Route::Units => self.units(&query),
            Route::Unit(name) => self.unit(&name, request.headers()),
            Route::UnitFile(name) => self.with_unit(&name, |view, name| {
                let text = view.unit(name).map(|unit| unit.file.text().to_owned()).unwrap_or_default();
                let mut answer = Response::new(super::full(text));
                let plain = header::HeaderValue::from_static("text/plain; charset=utf-8");
                answer.headers_mut().insert(header::CONTENT_TYPE, plain);
                answer
            }),
            Route::UnitExplain(name) => self.with_unit(&name, |view, name| {
                json(StatusCode::OK, &self.server.hub().explanation(view, name))
            }),
            Route::PutUnit(name) => match self.put_unit(&name, request).await {
                Ok(answer) | Err(answer) => answer,
            },
            Route::DeleteUnit(name) => self.delete_unit(&name).await,
            Route::States => self.states(&query),
            Route::State(name) => self.state(&name),
            Route::UnitStatus(name) => self.status(&name, &query).await,
            Route::UnitJournal(name) => self.journal(&name, &query).await,
            Route::JoinTokens => self.join_tokens().await,
            Route::CreateJoinToken => self.create_join_token(request).await,
            Route::RevokeJoinToken(id) => self.revoke_join_token(&id).await,
            Route::Members => self.members().await,
            Route::Servers => self.servers().await,
            Route::AcceptRegistry => self.accept_registry().await,
            Route::ExportRegistry => self.export_registry().await,
            Route::ImportRegistry => {
                self.import_registry(&query, request).await.unwrap_or_else(|answer| answer)
            }
            Route::ChangeUnits => self.change_units(request).await.unwrap_or_else(|answer| answer),
            Route::Metrics => self.metrics(),
            Route::RemoveMachine(id) => self.remove_machine(&id).await,
            Route::MarkMachine(id, mark) => self.mark_machine(&id, mark).await,
            Route::Drain(id) => self.drain(&id).await,
            Route::Notices => self.notices(),
            Route::Users => self.users(),
            Route::CreateUser => self.create_user(request).await.unwrap_or_else(|answer| answer),
            Route::SetRole(user) => self.set_role(&user, request).await.unwrap_or_else(|answer| answer),
            Route::RemoveUser(user) => self.remove_user(&user).await.unwrap_or_else(|answer| answer),
            Route::Events => self.events(&query, request.headers()),
        }
    }

    fn machines(&self, query: &[(String, String)]) -> Answer {
        let page = match Page::of(query, self.page_size) {
            Ok(page) => page,
            Err(message) => return failure(StatusCode::BAD_REQUEST, &message),
        };
        let view = self.server.hub().view();
        let (machines, next_page_token) =
            page.cut(view.machines().map(|(id, machine)| hub::machine_resource(id, machine)));
        json(StatusCode::OK, &types::MachinePage { machines, next_page_token })
    }

    fn units(&self, query: &[(String, String)]) -> Answer {
        let page = match Page::of(query, self.page_size) {
            Ok(page) => page,
            Err(message) => return failure(StatusCode::BAD_REQUEST, &message),
        };
        let view = self.server.hub().view();
        let (names, next_page_token) = page.cut(view.units().map(|(name, _)| name));
        let units = names.into_iter().filter_map(|name| resource(&view, name)).collect();
        json(StatusCode::OK, &types::UnitPage { next_page_token, units })
    }

    fn states(&self, query: &[(String, String)]) -> Answer {
        let page = match Page::of(query, self.page_size) {
            Ok(page) => page,
            Err(message) => return failure(StatusCode::BAD_REQUEST, &message),
        };
        let wanted = |key| route::first(query, key).filter(|value| !value.is_empty());
        let (unit, machine) = (wanted("unitName"), wanted("machineID"));
        let view = self.server.hub().view();
        let states = view
            .reports()
            .filter(|(name, id, _)| {
                unit.is_none_or(|unit| unit == name.as_str())
                    && machine.is_none_or(|machine| machine == id.as_str())
            })
            .map(|(name, id, report)| hub::state_resource(name, id, report));
        let (states, next_page_token) = page.cut(states);
        json(StatusCode::OK, &types::UnitStatePage { next_page_token, states })
    }

    /// The last machine's, for a unit on several, as the original.
    fn state(&self, name: &str) -> Answer {
        let view = self.server.hub().view();
        let found = UnitName::parse(name).ok().and_then(|name| {
            let (machine, report) = view.reports_of(&name).last()?;
            Some(hub::state_resource(&name, machine, report))
        });
        match found {
            Some(state) => json(StatusCode::OK, &state),
            None => failure(StatusCode::NOT_FOUND, "unit state does not exist"),
        }
    }

    /// Answers about a unit that exists; 404 otherwise, also for what is no unit name.
    fn with_unit(&self, name: &str, answer: impl FnOnce(&View, &UnitName) -> Answer) -> Answer {
        let view = self.server.hub().view();
        match UnitName::parse(name) {
            Ok(name) if view.unit(&name).is_some() => answer(&view, &name),
            _ => failure(StatusCode::NOT_FOUND, NO_UNIT),
        }
    }

    /// One unit. That of a Global unit has no current state here, as in the original: it has one on every machine.
    fn unit(&self, name: &str, headers: &HeaderMap) -> Answer {
        let old = old_clients::is_old(headers);
        self.with_unit(name, |view, name| {
            let mut unit = resource(view, name);
            if let Some(unit) = &mut unit {
                if view.unit(name).is_some_and(|unit| unit.requirements.global) {
                    unit.current_state.clear();
                } else if old && self.stopped.shows_launched(name, Instant::now()) {
                    unit.current_state = DesiredState::Launched.as_str().to_owned();
                }
            }
            json(StatusCode::OK, &unit)
        })
    }

    async fn put_unit(&self, path_name: &str, request: Request<Incoming>) -> Result<Answer, Answer> {
        let bad = |message: String| failure(StatusCode::BAD_REQUEST, &message);
        check_content_type(request.headers())
            .map_err(|message| failure(StatusCode::UNSUPPORTED_MEDIA_TYPE, &message))?;
        let old = old_clients::is_old(request.headers());
        let body = decode::unit(&read_body(request.into_body()).await?).map_err(bad)?;
        if !body.name.is_empty() && body.name != path_name {
            return Err(bad(format!(
                "name in URL {path_name:?} differs from unit name in request body {:?}",
                body.name
            )));
        }
        let name = UnitName::parse(path_name).map_err(|error| bad(error.to_string()))?;
        let desired = read_desired(&body.desired_state).map_err(bad)?;
        let file = read_file(body.options, &body.file).map_err(bad)?;
        if let Some(desired) = desired.filter(|_| old) {
            let before = self.server.hub().view().unit(&name).map(|unit| unit.desired);
            self.stopped.asked(&name, before.unwrap_or_default(), desired, Instant::now());
        }
        match self.server.put_unit(&name, file, desired).await {
            Ok(Put::Created) => Ok(empty(StatusCode::CREATED)),
            Ok(Put::Updated) => Ok(empty(StatusCode::NO_CONTENT)),
            Err(error) => Err(write_failure(&error)),
        }
    }

    async fn delete_unit(&self, name: &str) -> Answer {
        let Ok(name) = UnitName::parse(name) else { return failure(StatusCode::NOT_FOUND, NO_UNIT) };
        match self.server.delete_unit(&name).await {
            Ok(()) => empty(StatusCode::NO_CONTENT),
            Err(error) => write_failure(&error),
        }
    }

    async fn patch_machines(&self, request: Request<Incoming>) -> Answer {
        let bytes = match read_body(request.into_body()).await {
            Ok(bytes) => bytes,
            Err(answer) => return answer,
        };
        let edits = match decode::metadata_edits(&bytes) {
            Ok(edits) => edits,
            Err(message) => return failure(StatusCode::BAD_REQUEST, &message),
        };
        match self.server.edit_metadata(&edits).await {
            Ok(()) => {
                let mut answer = empty(StatusCode::NO_CONTENT);
                let json = header::HeaderValue::from_static("application/json");
                answer.headers_mut().insert(header::CONTENT_TYPE, json);
                answer
            }
            Err(error) => write_failure(&error),
        }
    }
}

/// A unit, as the API shows it.
fn resource(view: &View, name: &UnitName) -> Option<types::Unit> {
    let unit = view.unit(name)?;
    let options = unit.file.options().iter().map(|option| types::UnitOption {
        name: option.name.clone(),
        section: option.section.clone(),
        value: option.value.clone(),
    });
    Some(types::Unit {
        current_state: view.current(name).as_str().to_owned(),
        desired_state: unit.desired.as_str().to_owned(),
        file: String::new(),
        machine_id: view.place(name).map(|(machine, _)| machine.to_string()).unwrap_or_default(),
        name: name.to_string(),
        options: options.collect(),
    })
}

pub(super) fn read_desired(text: &str) -> Result<Option<DesiredState>, String> {
    match text {
        "" => Ok(None),
        "inactive" => Ok(Some(DesiredState::Inactive)),
        "loaded" => Ok(Some(DesiredState::Loaded)),
        "launched" => Ok(Some(DesiredState::Launched)),
        other => Err(format!("invalid desiredState {other:?}: expect inactive, loaded, or launched")),
    }
}

pub(super) fn read_file(options: Vec<types::UnitOption>, text: &str) -> Result<Option<UnitFile>, String> {
    let from_options = if options.is_empty() {
        None
    } else {
        let options = options
            .into_iter()
            .map(|option| UnitOption { section: option.section, name: option.name, value: option.value })
            .collect();
        Some(UnitFile::from_options(options).map_err(|error| error.to_string())?)
    };
    if text.is_empty() {
        return Ok(from_options);
    }
    let from_text =
        UnitFile::from_bytes(text.as_bytes()).map_err(|error| format!("line {}: {error}", error.line()))?;
    if from_options.is_some_and(|options| options.hash() != from_text.hash()) {
        return Err("options and file differ".to_owned());
    }
    Ok(if from_text.options().is_empty() { None } else { Some(from_text) })
}

pub(super) fn check_content_type(headers: &HeaderMap) -> Result<(), String> {
    let mut values = headers.get_all(header::CONTENT_TYPE).iter();
    let Some(value) = values.next() else { return Err("expected 1 Content-Type, got 0".to_owned()) };
    let more = values.count();
    if more > 0 {
        return Err(format!("expected 1 Content-Type, got {}", more + 1));
    }
    let media_type = value.to_str().unwrap_or_default().split(';').next().unwrap_or_default().trim();
    if media_type != "application/json" {
        return Err("only acceptable Content-Type is application/json".to_owned());
    }
    Ok(())
}

pub(super) fn write_failure(error: &WriteError) -> Answer {
    failure(write_status(error), &error.to_string())
}

pub(super) fn write_status(error: &WriteError) -> StatusCode {
    match error {
        WriteError::NoFile
        | WriteError::NoDesiredState
        | WriteError::Contended(_)
        | WriteError::Unreadable(_) => StatusCode::CONFLICT,
        WriteError::Template(_) | WriteError::Requirements(_) => StatusCode::BAD_REQUEST,
        WriteError::NoUnit | WriteError::NoMachine(_) => StatusCode::NOT_FOUND,
        WriteError::Store(error) => super::store_status(error),
    }
}

fn discovery(scheme: &str, headers: &HeaderMap) -> Answer {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or("localhost");
    let document = fleet_api::discovery::document(&format!("{scheme}://{host}"));
    let mut answer = Response::new(super::full(document));
    let json = header::HeaderValue::from_static("application/json");
    answer.headers_mut().insert(header::CONTENT_TYPE, json);
    answer
}
