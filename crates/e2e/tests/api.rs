//! The HTTP API v1 as the original answered (golden/19-api.txt), and what is added to it.

use anyhow::Result;
use fleet_e2e::{Fleet, until};

const SLEEPER: &str =
    r#""options": [{"section": "Service", "name": "ExecStart", "value": "/bin/sleep infinity"}]"#;

fn error(code: u16, message: &str) -> String {
    format!(r#"{{"error":{{"code":{code},"message":{}}}}}"#, serde_json::Value::from(message))
}

#[test]
fn as_the_original_answered() -> Result<()> {
    let fleet = Fleet::up("api")?;
    let http = fleet.http()?;
    let id = fleet.host().machine_id().to_owned();
    let check = |method: &str, path: &str, body: Option<&str>, status: u16, expected: &str| -> Result<()> {
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/fleet/v1/{path}") };
        let answer = match body {
            Some(body) => http.json(method, &path, body)?,
            None => http.send(method, &path, &[], "")?,
        };
        let what = format!("{method} {path} {}", body.unwrap_or_default());
        assert_eq!((answer.status, answer.body.as_str()), (status, expected), "{what}");
        assert!(answer.header("server").is_some_and(|server| server.starts_with("fleetd/")), "{what}");
        if !expected.is_empty() {
            assert_eq!(answer.header("content-type"), Some("application/json"), "{what}");
        }
        Ok(())
    };

    for (method, path, status, message) in [
        ("GET", "/", 405, ""),
        ("GET", "/fleet", 404, ""),
        ("GET", "/fleet/v1", 405, ""),
        ("GET", "/fleet/v1/", 404, ""),
        ("GET", "/metrics/", 404, ""),
        ("GET", "machines/abc", 404, ""),
        ("GET", "units/", 404, ""),
        ("GET", "units/nonsuch.service", 404, "unit does not exist"),
        ("GET", "units/bad%20name", 404, "unit does not exist"),
        ("DELETE", "units/nonsuch", 404, "unit does not exist"),
        ("POST", "discovery", 400, "only HTTP GET supported against this resource"),
        ("POST", "units", 405, "only GET supported against this resource"),
        ("POST", "units/a.service", 405, "only GET, PUT and DELETE supported against this resource"),
        ("PUT", "machines", 405, "only GET and PATCH supported against this resource"),
        ("DELETE", "state/a.service", 405, "only GET supported against this resource"),
    ] {
        check(method, path, None, status, &error(status, message))?;
    }
    for path in ["units", "state", "/v1-alpha/units"] {
        check("GET", path, None, 200, "{}")?;
    }
    let ip = fleet.host().ip();
    let machines = format!(r#"{{"machines":[{{"id":"{id}","primaryIP":"{ip}"}}]}}"#);
    check("GET", "machines", None, 200, &machines)?;

    // Create, with every field.
    check("PUT", "units/a.service", Some(&format!(r#"{{"desiredState": "launched", {SLEEPER}}}"#)), 201, "")?;
    let a = |current: &str, desired: &str, machine: &str| {
        format!(
            r#"{{"currentState":"{current}","desiredState":"{desired}",{machine}"name":"a.service","options":[{{"name":"ExecStart","section":"Service","value":"/bin/sleep infinity"}}]}}"#
        )
    };
    let placed = format!(r#""machineID":"{id}","#);
    until("a.service is launched", || {
        Ok(http.get("/fleet/v1/units/a.service")?.body == a("launched", "launched", &placed))
    })?;
    check("GET", "units", None, 200, &format!(r#"{{"units":[{}]}}"#, a("launched", "launched", &placed)))?;
    let state = format!(
        r#"{{"hash":"8385c9176f09a5ee3bbb88d45c6fc3f0b69d1f52","machineID":"{id}","name":"a.service","systemdActiveState":"active","systemdLoadState":"loaded","systemdSubState":"running"}}"#
    );
    check("GET", "state/a.service", None, 200, &state)?;
    for (filter, body) in [
        ("state?unitName=a.service", format!(r#"{{"states":[{state}]}}"#)),
        ("state?unitName=nonsuch.service", "{}".to_owned()),
        ("state?machineID=c93b5f08", "{}".to_owned()),
        ("state?bogus=1&unitName=", format!(r#"{{"states":[{state}]}}"#)),
    ] {
        check("GET", filter, None, 200, &body)?;
    }
    check("PUT", "units/b.service", Some(&format!("{{{SLEEPER}}}")), 201, "")?;
    check(
        "PUT",
        "units/c.service",
        Some(&format!(r#"{{"name": "c.service", "machineID": "zzz", "unknown": 1, {SLEEPER}}}trailing"#)),
        201,
        "",
    )?;

    let bad = [
        (r#"{"desiredState": "launched"}"#, 409, "unit does not exist and options field empty"),
        ("{}", 409, "unit does not exist and options field empty"),
        ("null", 409, "unit does not exist and options field empty"),
        ("", 400, "unable to decode body: EOF"),
        ("garbage", 400, "unable to decode body: invalid character 'g' looking for beginning of value"),
        ("[]", 400, "unable to decode body: json: cannot unmarshal array into Go value of type schema.Unit"),
    ];
    for (body, status, message) in bad {
        check("PUT", "units/e.service", Some(body), status, &error(status, message))?;
    }
    let name = format!(r#"{{"name": "other.service", {SLEEPER}}}"#);
    let differs = r#"name in URL "e.service" differs from unit name in request body "other.service""#;
    check("PUT", "units/e.service", Some(&name), 400, &error(400, differs))?;
    let sleeper = format!("{{{SLEEPER}}}");
    for (name, message) in [
        ("noext", "unit name must contain \".\""),
        ("x.bogus", "invalid unit type: \"bogus\""),
        ("a%20b.service", "invalid character ' ' in unit name"),
        ("%C3%A4.service", "invalid character 'ä' in unit name"),
        ("@x.service", "unit name cannot start in \"@\""),
        ("x@1.mount", "invalid unit type for template: \"mount\""),
        ("x.", "unit name cannot end in \".\""),
        ("x.SERVICE", "invalid unit type: \"SERVICE\""),
    ] {
        check("PUT", &format!("units/{name}"), Some(&sleeper), 400, &error(400, message))?;
    }
    check("PUT", "units/a%2Fb.service", Some(&sleeper), 404, &error(404, ""))?;
    check(
        "PUT",
        &format!("units/{}.service", "x".repeat(260)),
        Some(&sleeper),
        400,
        &error(400, "unit name exceeds maximum length (255)"),
    )?;
    for (options, message) in [
        (
            r#"{"section":"X-Fleet","name":"MachineID","value":"abc"},{"section":"X-Fleet","name":"Conflicts","value":"x*"}"#,
            "MachineID cannot be used with Conflicts",
        ),
        (
            r#"{"section":"X-Fleet","name":"MachineOf","value":"x.service"},{"section":"X-Fleet","name":"Replaces","value":"x*"}"#,
            r#"unresolvable requirements: peer "x.service" matches replace "x*""#,
        ),
    ] {
        check(
            "PUT",
            "units/combo.service",
            Some(&format!(r#"{{"options":[{options}]}}"#)),
            400,
            &error(400, message),
        )?;
    }
    for (header, message) in [
        ("Content-Type: text/plain", "only acceptable Content-Type is application/json"),
        ("Content-Type: APPLICATION/JSON", "only acceptable Content-Type is application/json"),
        ("X-None: 1", "expected 1 Content-Type, got 0"),
    ] {
        let answer = http.send("PUT", "/fleet/v1/units/e.service", &[header], &sleeper)?;
        assert_eq!((answer.status, answer.body), (415, error(415, message)), "{header}");
    }
    let charset = http.send(
        "PUT",
        "/fleet/v1/units/d.service",
        &["Content-Type: application/json; charset=utf-8"],
        &sleeper,
    )?;
    assert_eq!(charset.status, 201);

    // Modify.
    check("PUT", "units/a.service", Some(r#"{"desiredState": "loaded"}"#), 204, "")?;
    check("PUT", "units/a.service", Some(r#"{"desiredState": "loaded"}"#), 204, "")?;
    check(
        "PUT",
        "units/a.service",
        Some("{}"),
        409,
        &error(409, "must provide DesiredState to update existing unit"),
    )?;
    check("PUT", "units/a.service", Some(&format!(r#"{{"desiredState": "inactive", {SLEEPER}}}"#)), 204, "")?;
    until("a.service is inactive", || {
        Ok(http.get("/fleet/v1/units/a.service")?.body == a("inactive", "inactive", ""))
    })?;
    let bogus = http.json("PUT", "/fleet/v1/units/a.service", r#"{"desiredState": "bogus"}"#)?;
    assert_eq!(bogus.status, 400, "the original kept it, and could then never repair the unit");
    let other = r#"{"options": [{"section": "Service", "name": "ExecStart", "value": "/bin/sleep 9998"}]}"#;
    check("PUT", "units/a.service", Some(other), 201, "")?;
    let template = format!(r#"{{"desiredState": "launched", {SLEEPER}}}"#);
    check(
        "PUT",
        "units/t@.service",
        Some(&template),
        400,
        &error(400, "cannot activate template \"t@.service\""),
    )?;
    check("DELETE", "units/b.service", None, 204, "")?;
    check("DELETE", "units/b.service", None, 404, &error(404, "unit does not exist"))?;

    // A newline in a value is a further option.
    let newline =
        r#"{"options": [{"section": "Service", "name": "ExecStart", "value": "/bin/true\nUser=root"}]}"#;
    check("PUT", "units/nl.service", Some(newline), 201, "")?;
    let nl = r#"{"currentState":"inactive","desiredState":"inactive","name":"nl.service","options":[{"name":"ExecStart","section":"Service","value":"/bin/true"},{"name":"User","section":"Service","value":"root"}]}"#;
    check("GET", "units/nl.service", None, 200, nl)?;

    // Metadata.
    let patch =
        |key: &str, value: &str| format!(r#"[{{"op":"add","path":"/{id}/metadata/{key}","value":{value}}}]"#);
    check("PATCH", "machines", Some(&patch("disk", r#"{"value":"ssd"}"#)), 204, "")?;
    check("PATCH", "machines", Some(&patch("region", r#""eu""#)), 204, "")?;
    let machines = format!(
        r#"{{"machines":[{{"id":"{id}","metadata":{{"disk":"ssd","region":"eu"}},"primaryIP":"{ip}"}}]}}"#
    );
    check("GET", "machines", None, 200, &machines)?;
    check(
        "PATCH",
        "machines",
        Some("{}"),
        400,
        &error(400, "json: cannot unmarshal object into Go value of type []api.machineMetadataOp"),
    )?;
    check(
        "PATCH",
        "machines",
        Some(&patch("a b", r#"{"value":"x"}"#)),
        400,
        &error(400, "machine metadata path invalid"),
    )?;
    // It survives a restart.
    fleet.disturb("systemctl restart fleetd.service")?;
    check("GET", "machines", None, 200, &machines)?;

    let discovery = http.get("/fleet/v1/discovery")?;
    let document: serde_json::Value = serde_json::from_str(&discovery.body)?;
    assert_eq!(document["id"], "fleet:v1");
    assert_eq!(document["servicePath"], "fleet/v1/");
    Ok(())
}

#[test]
fn pages() -> Result<()> {
    let fleet = Fleet::up("pages")?;
    let http = fleet.http()?;
    for number in 0..250 {
        let answer =
            http.json("PUT", &format!("/fleet/v1/units/p{number:03}.service"), &format!("{{{SLEEPER}}}"))?;
        assert_eq!(answer.status, 201);
    }
    let mut names = Vec::new();
    let mut token = String::new();
    let mut pages = 0;
    loop {
        let query = if token.is_empty() { String::new() } else { format!("?nextPageToken={token}") };
        let page: serde_json::Value =
            serde_json::from_str(&http.get(&format!("/fleet/v1/units{query}"))?.body)?;
        names.extend(page["units"].as_array().into_iter().flatten().map(|unit| unit["name"].to_string()));
        pages += 1;
        match page["nextPageToken"].as_str() {
            Some(next) => token = next.to_owned(),
            None => break,
        }
    }
    assert_eq!((names.len(), pages), (250, 3));
    assert!(names.is_sorted());
    assert_eq!(http.get("/fleet/v1/units?nextPageToken=rubbish")?.status, 400);
    assert_eq!(fleet.ok("list-unit-files --no-legend")?.lines().count(), 250);
    Ok(())
}

#[test]
fn events_are_resumable() -> Result<()> {
    let fleet = Fleet::up("events")?;
    let http = fleet.http()?;
    let before: u64 = http.get("/fleet/v1/units")?.header("fleet-revision").unwrap_or_default().parse()?;
    let put = |name: &str| http.json("PUT", &format!("/fleet/v1/units/{name}"), &format!("{{{SLEEPER}}}"));
    put("one.service")?;
    put("two.service")?;
    http.send("DELETE", "/fleet/v1/units/one.service", &[], "")?;
    // What happened while nobody listened.
    let collect = |query: &str, until: &str| -> Result<Vec<String>> {
        let mut seen = Vec::new();
        for line in http.events(query)? {
            let line = line?;
            let done = line.contains(until);
            seen.push(line);
            if done {
                return Ok(seen);
            }
        }
        anyhow::bail!("the stream ended before {until:?}: {seen:?}")
    };
    let missed = collect(&format!("?since={before}"), "two.service")?;
    assert!(missed.iter().any(|line| line.contains("unitGone")), "{missed:?}");
    // Only the unit asked for.
    let one = collect("?snapshot=1&unitName=two.service", "\"kind\":\"ready\"")?;
    assert_eq!(one.iter().filter(|line| line.starts_with("data:")).count(), 2, "{one:?}");
    // A place in the past that is no longer known.
    fleet.disturb("systemctl restart fleetd.service")?;
    let reset = collect(&format!("?since={before}"), "reset")?;
    assert!(!reset.is_empty());
    // Explanations and files.
    let file = http.get("/fleet/v1/units/two.service/file")?;
    assert_eq!(file.body, "[Service]\nExecStart=/bin/sleep infinity\n");
    let explained = http.get("/fleet/v1/units/two.service/explain")?.body;
    assert_eq!(explained, r#"{"currentState":"inactive","desiredState":"inactive","name":"two.service"}"#);
    assert_eq!(http.get("/fleet/v1/units/two.service/status")?.status, 409, "it is on no machine");
    assert_eq!(http.get("/fleet/v1/units/nonsuch.service/journal")?.status, 404);
    Ok(())
}
