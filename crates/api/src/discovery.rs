//! The discovery document of the API v1, `GET /fleet/v1/discovery`: a description that generated
//! clients read. Keys, order and structure are those of the original (golden/19-api.txt), and it
//! describes what the original had; what we added is not in it.

/// The document as stored, with `$ENDPOINT` where the address of the server belongs.
const DOCUMENT: &str = include_str!("discovery.json");

/// The document for a server that is reached at `root_url` (such as `http://host:49153`; a slash
/// at its end is left out).
pub fn document(root_url: &str) -> String {
    DOCUMENT.replace("$ENDPOINT", root_url.trim_end_matches('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_endpoint_is_filled_in() {
        let text = document("http://10.0.0.1:49153/");
        let json: serde_json::Value = serde_json::from_str(&text).expect("the document is JSON");
        assert_eq!(json["baseUrl"], "http://10.0.0.1:49153/fleet/v1/");
        assert_eq!(json["rootUrl"], "http://10.0.0.1:49153/");
        assert!(!text.contains('$') || text.matches('$').count() == text.matches("\"$ref\"").count());
    }

    /// Every schema and method of the document, in order: what generated clients are made of.
    #[test]
    fn the_outline_is_the_originals() {
        let json: serde_json::Value = serde_json::from_str(&document("x")).expect("the document is JSON");
        let mut outline = Vec::new();
        for (resource, methods) in json["resources"].as_object().expect("resources") {
            for (method, it) in methods["methods"].as_object().expect("methods") {
                let parameters: Vec<_> =
                    it["parameters"].as_object().into_iter().flatten().map(|(k, _)| k.as_str()).collect();
                outline.push(format!(
                    "{resource}.{method}: {} {} ({}) {}",
                    it["httpMethod"].as_str().unwrap_or_default(),
                    it["path"].as_str().unwrap_or_default(),
                    parameters.join(","),
                    it["id"].as_str().unwrap_or_default(),
                ));
            }
        }
        insta::assert_snapshot!(outline.join("\n"), @r"
        Machines.List: GET machines (nextPageToken) fleet.Machine.List
        UnitState.Get: GET state/{unitName} (unitName) fleet.UnitState.Get
        UnitState.List: GET state (machineID,nextPageToken,unitName) fleet.UnitState.List
        Units.Delete: DELETE units/{unitName} (unitName) fleet.Unit.Delete
        Units.Get: GET units/{unitName} (unitName) fleet.Unit.Get
        Units.List: GET units (nextPageToken) fleet.Unit.List
        Units.Set: PUT units/{unitName} (unitName) fleet.Unit.Set
        ");
    }

    #[test]
    fn the_whole_document_stays_as_it_is() {
        insta::assert_snapshot!(document("http://10.0.0.1:49153"));
    }
}
