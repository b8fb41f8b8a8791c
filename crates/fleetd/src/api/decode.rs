//! Request bodies, read as the original's JSON decoder read them: keys in any case, unknown keys and text after the value
//! ignored, `null` for nothing; and with its words for what is wrong (golden/19-api.txt).

use fleet_api::types::{Unit, UnitOption};
use fleet_cluster::model::MachineId;
use serde_json::{Map, Value};

use crate::server::MetadataEdit;

/// Reads one JSON value.
fn value(bytes: &[u8]) -> Result<Value, String> {
    let mut values = serde_json::Deserializer::from_slice(bytes).into_iter::<Value>();
    match values.next() {
        None => Err("EOF".to_owned()),
        Some(Ok(value)) => Ok(value),
        Some(Err(error)) => {
            let text = String::from_utf8_lossy(bytes);
            match text.trim_start().chars().next() {
                Some(c) if !"{[\"-0123456789tfn".contains(c) => {
                    Err(format!("invalid character {c:?} looking for beginning of value"))
                }
                _ if error.is_eof() => Err("unexpected EOF".to_owned()),
                _ => Err(error.to_string()),
            }
        }
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn field<'a>(object: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    let exact = object.get(name);
    exact.or_else(|| object.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value))
}

fn string(object: &Map<String, Value>, of: &str, name: &str) -> Result<String, String> {
    match field(object, name) {
        None | Some(Value::Null) => Ok(String::new()),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => Err(format!(
            "json: cannot unmarshal {} into Go struct field {of}.{name} of type string",
            kind(other)
        )),
    }
}

/// The body of `PUT units/NAME`.
pub(crate) fn unit(bytes: &[u8]) -> Result<Unit, String> {
    read_unit(bytes).map_err(|reason| format!("unable to decode body: {reason}"))
}

fn read_unit(bytes: &[u8]) -> Result<Unit, String> {
    let object = match value(bytes)? {
        Value::Null => return Ok(Unit::default()),
        Value::Object(object) => object,
        other => {
            return Err(format!("json: cannot unmarshal {} into Go value of type schema.Unit", kind(&other)));
        }
    };
    let mut options = Vec::new();
    match field(&object, "options") {
        None | Some(Value::Null) => {}
        Some(Value::Array(list)) => {
            for item in list {
                let Value::Object(item) = item else {
                    return Err(format!(
                        "json: cannot unmarshal {} into Go struct field Unit.options of type schema.UnitOption",
                        kind(item)
                    ));
                };
                options.push(UnitOption {
                    name: string(item, "UnitOption", "name")?,
                    section: string(item, "UnitOption", "section")?,
                    value: string(item, "UnitOption", "value")?,
                });
            }
        }
        Some(other) => {
            return Err(format!(
                "json: cannot unmarshal {} into Go struct field Unit.options of type []*schema.UnitOption",
                kind(other)
            ));
        }
    }
    Ok(Unit {
        current_state: String::new(),
        desired_state: string(&object, "Unit", "desiredState")?,
        file: string(&object, "Unit", "file")?,
        machine_id: String::new(),
        name: string(&object, "Unit", "name")?,
        options,
    })
}

/// The body of `PATCH machines`: edits of metadata, in order. The value may be a string, as the original documented, or an object
/// with a `value`, as it wanted it.
pub(crate) fn metadata_edits(bytes: &[u8]) -> Result<Vec<MetadataEdit>, String> {
    let list = match value(bytes)? {
        Value::Null => return Ok(Vec::new()),
        Value::Array(list) => list,
        other => {
            return Err(format!(
                "json: cannot unmarshal {} into Go value of type []api.machineMetadataOp",
                kind(&other)
            ));
        }
    };
    list.iter().map(metadata_edit).collect()
}

fn metadata_edit(item: &Value) -> Result<MetadataEdit, String> {
    let Value::Object(item) = item else {
        return Err(format!(
            "json: cannot unmarshal {} into Go value of type api.machineMetadataOp",
            kind(item)
        ));
    };
    let op = string(item, "machineMetadataOp", "op")?;
    let path = string(item, "machineMetadataOp", "path")?;
    let new = match field(item, "value") {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Object(object)) => string(object, ".Value", "value")?,
        Some(other) => {
            return Err(format!(
                "json: cannot unmarshal {} into Go struct field machineMetadataOp.Value of type string",
                kind(other)
            ));
        }
    };
    if !matches!(op.as_str(), "add" | "remove" | "replace") {
        return Err("invalid op: expect add, remove, or replace".to_owned());
    }
    let wrong_path = || "machine metadata path invalid".to_owned();
    let parts: Vec<&str> = path.strip_prefix('/').ok_or_else(wrong_path)?.split('/').collect();
    let [id, "metadata", key] = parts[..] else { return Err(wrong_path()) };
    let good_key = !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
    let id = MachineId::parse(id).map_err(|_| wrong_path())?;
    if !good_key || key.len() > 256 {
        return Err(wrong_path());
    }
    if op == "remove" {
        return Ok((id, key.to_owned(), None));
    }
    if new.is_empty() {
        return Err("invalid value: add and replace require a value".to_owned());
    }
    if new.len() > 4096 {
        return Err("invalid value: more than 4096 bytes".to_owned());
    }
    Ok((id, key.to_owned(), Some(new)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unit_bodies_are_refused_in_the_originals_words() {
        for (body, message) in [
            ("", "unable to decode body: EOF"),
            ("garbage", "unable to decode body: invalid character 'g' looking for beginning of value"),
            ("[]", "unable to decode body: json: cannot unmarshal array into Go value of type schema.Unit"),
            (
                r#"{"desiredState": 5}"#,
                "unable to decode body: json: cannot unmarshal number into Go struct field Unit.desiredState of type string",
            ),
            (r#"{"desired"#, "unable to decode body: unexpected EOF"),
        ] {
            assert_eq!(unit(body.as_bytes()).unwrap_err(), message, "{body}");
        }
    }

    #[test]
    fn unit_bodies_are_read_as_by_the_original() {
        assert_eq!(unit(b"null").unwrap(), Unit::default());
        let body = br#" {"DesiredState":"launched","unknown":1,"options":[{"section":"Service"}]}trailing"#;
        let read = unit(body).unwrap();
        assert_eq!(read.desired_state, "launched");
        assert_eq!(read.options, [UnitOption { section: "Service".to_owned(), ..Default::default() }]);
    }

    #[test]
    fn metadata_edits_as_recorded() {
        const ID: &str = "c93b5f08e1ad47d2b6740e9f8a2d3c33";
        let edit = |op: &str, path: &str, value: &str| {
            let body = format!(r#"[{{"op":"{op}","path":"{path}"{value}}}]"#).replace("ID", ID);
            metadata_edits(body.as_bytes())
        };
        let id = MachineId::parse(ID).unwrap();
        let set = Ok(vec![(id.clone(), "disk".to_owned(), Some("ssd".to_owned()))]);
        assert_eq!(edit("add", "/ID/metadata/disk", r#","value":{"value":"ssd"}"#), set);
        assert_eq!(edit("replace", "/ID/metadata/disk", r#","Value":"ssd""#), set);
        assert_eq!(edit("remove", "/ID/metadata/k.e-y_1", ""), Ok(vec![(id, "k.e-y_1".to_owned(), None)]));
        let wrong_path = Err("machine metadata path invalid".to_owned());
        for path in ["/ID/a", "/ID/metadata/", "/ID/metadata/a b", "/ID/metadata/a/b", "x", "/zzz/metadata/a"]
        {
            assert_eq!(edit("add", path, r#","value":"b""#), wrong_path, "{path}");
        }
        let no_value = Err("invalid value: add and replace require a value".to_owned());
        assert_eq!(edit("add", "/ID/metadata/a", ""), no_value);
        assert_eq!(edit("replace", "/ID/metadata/a", r#","value":{"value":""}"#), no_value);
        assert_eq!(
            edit("add", "/ID/metadata/a", r#","value":{"value":5}"#),
            Err("json: cannot unmarshal number into Go struct field .Value.value of type string".to_owned())
        );
        assert_eq!(edit("test", "x", ""), Err("invalid op: expect add, remove, or replace".to_owned()));
        assert_eq!(metadata_edits(b""), Err("EOF".to_owned()));
        assert_eq!(
            metadata_edits(b"{}"),
            Err("json: cannot unmarshal object into Go value of type []api.machineMetadataOp".to_owned())
        );
        assert_eq!(metadata_edits(b"null"), Ok(Vec::new()));
    }
}
