//! The description of the control socket, held against what is really said.

use std::collections::BTreeSet;
use std::path::Path;

use infill::control::routes::{OPENAPI, Site, routes};
use serde_json::Value;

use super::{Place, ask, work};

/// Words of a schema that say nothing about values.
const WORDS_FOR_PEOPLE: [&str; 1] = ["description"];

/// The parts of JSON Schema that the description uses. It may use no other.
fn check(root: &Value, schema: &Value, value: &Value, at: &str) {
    for (word, rule) in schema.as_object().unwrap() {
        match word.as_str() {
            "$ref" => check(root, follow(root, rule), value, at),
            "type" => {
                let kinds: Vec<_> = rule.as_array().map_or_else(|| vec![rule], |all| all.iter().collect());
                assert!(kinds.iter().any(|kind| is_of(kind.as_str().unwrap(), value)), "{at}: {value} is not of type {rule}");
            }
            "const" => assert_eq!(value, rule, "{at}"),
            "enum" => assert!(rule.as_array().unwrap().contains(value), "{at}: {value} is none of {rule}"),
            "required" => {
                let missing: Vec<_> = rule.as_array().unwrap().iter().filter(|name| value.get(name.as_str().unwrap()).is_none()).collect();
                assert!(missing.is_empty(), "{at}: {missing:?} is missing in {value}");
            }
            "properties" => {
                for (name, inner) in value.as_object().unwrap() {
                    if let Some(schema) = rule.get(name) {
                        check(root, schema, inner, &format!("{at}.{name}"));
                    }
                }
            }
            "additionalProperties" => {
                assert_eq!(rule, &Value::Bool(false));
                for name in value.as_object().unwrap().keys() {
                    assert!(schema["properties"].get(name).is_some(), "{at}: {name} is not described");
                }
            }
            "items" => value.as_array().unwrap().iter().for_each(|item| check(root, rule, item, &format!("{at}[]"))),
            "maxLength" => {
                assert!(value.as_str().is_none_or(|text| text.len() as u64 <= rule.as_u64().unwrap()), "{at}: {value} is too long")
            }
            "maxItems" => assert!(value.as_array().unwrap().len() as u64 <= rule.as_u64().unwrap(), "{at}: {value} is too long"),
            other => assert!(WORDS_FOR_PEOPLE.contains(&other), "{at}: this test does not know {other:?}"),
        }
    }
}

fn is_of(kind: &str, value: &Value) -> bool {
    match kind {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "integer" => value.is_u64(),
        "null" => value.is_null(),
        other => panic!("this test does not know the type {other}"),
    }
}

fn follow<'a>(root: &'a Value, reference: &Value) -> &'a Value {
    root.pointer(reference.as_str().unwrap().strip_prefix('#').unwrap()).unwrap()
}

fn resolved<'a>(root: &'a Value, value: &'a Value) -> &'a Value {
    value.get("$ref").map_or(value, |reference| follow(root, reference))
}

/// Asks, and checks the answer; also what is asked, if it is said to be good. Gives the answer.
pub(crate) fn expect(socket: &Path, method: &str, template: &str, id: &str, body: &str, status: u16) -> Value {
    let root: Value = serde_json::from_str(OPENAPI).unwrap();
    let at = format!("{method} {template}");
    let operation = &root["paths"][template][method.to_ascii_lowercase()];
    assert!(operation.is_object(), "{at} is not described");
    if let (true, Some(wanted)) = (status < 300, operation.get("requestBody")) {
        check(&root, &wanted["content"]["application/json"]["schema"], &serde_json::from_str(body).unwrap(), &at);
    }
    let (got, head, text) = ask(socket, method, &template.replace("{id}", id), body);
    assert_eq!(got, status, "{at}: {head} {text}");
    let response =
        resolved(&root, operation["responses"].get(status.to_string()).unwrap_or_else(|| panic!("{at}: {status} is not described")));
    let Some(content) = response.get("content") else {
        assert_eq!(text, "", "{at}");
        return Value::Null;
    };
    assert!(head.contains("content-type: application/json"), "{at}: {head}");
    let answer: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{at}: {error}: {text}"));
    check(&root, &content["application/json"]["schema"], &answer, &at);
    assert_eq!(head.contains("retry-after: "), response.get("headers").is_some(), "{at}: {head}");
    answer
}

#[test]
fn all_that_can_be_asked_is_described_and_the_other_way_round() {
    let root: Value = serde_json::from_str(OPENAPI).unwrap();
    let described: BTreeSet<_> = root["paths"]
        .as_object()
        .unwrap()
        .iter()
        .flat_map(|(path, methods)| methods.as_object().unwrap().keys().map(move |method| (method.to_ascii_uppercase(), path.clone())))
        .collect();
    let served: BTreeSet<_> = routes(Site::Control).map(|(method, path)| (method.to_owned(), path.to_owned())).collect();
    assert_eq!(described, served);
}

#[test]
fn every_answer_is_as_described() {
    let server = work::Server::start();
    let (socket, mut asked) = (server.socket(), BTreeSet::new());
    let mut is = |method: &'static str, template: &'static str, id: &str, body: &str, status| {
        asked.insert((method, template));
        expect(&socket, method, template, id, body, status)
    };
    let wanted = r#"{"image":"a.img","domain":"d","devices":["b"]}"#;
    is("GET", "/v1/health", "", "", 200);
    is("GET", "/v1/config", "", "", 200);
    is("GET", "/v1/openapi.json", "", "", 200);
    is("GET", "/v1/log-level", "", "", 200);
    is("PUT", "/v1/log-level", "", r#"{"level":"loud"}"#, 400);
    let ready = is("POST", "/v1/attach", "", wanted, 200);
    is("POST", "/v1/attach", "", r#"{"image":"a.img","no-such-thing":1}"#, 400);
    is("POST", "/v1/attach", "", r#"{"image":"missing"}"#, 404);
    is("POST", "/v1/attach", "", r#"{"image":"nameless"}"#, 422);
    is("POST", "/v1/attach", "", r#"{"image":"busy"}"#, 503);
    is("POST", "/v1/attach", "", r#"{"image":"slow"}"#, 504);
    is("POST", "/v1/repair", "", r#"{"file":"/cache/blobs/x"}"#, 200);
    is("POST", "/v1/repair", "", r#"{"file":"/unknown"}"#, 409);
    is("GET", "/v1/images", "", "", 200);
    is("POST", "/v1/prefetch", "", wanted, 202);
    is("POST", "/v1/prefetch", "", &format!(r#"{{"image":"{}"}}"#, "x".repeat(300)), 422);
    is("POST", "/v1/release", "", "", 200);
    is("DELETE", "/v1/leases/{id}", ready["lease"].as_str().unwrap(), "", 204);
    is("DELETE", "/v1/leases/{id}", ready["lease"].as_str().unwrap(), "", 404);
    // The rest is asked of a real daemon.
    let (place, end) = Place::new();
    let daemon = place.start(end, &[]);
    place.expect_right(place.open());
    let socket = place.control();
    let mut is = |method: &'static str, template: &'static str, body: &str, status| {
        asked.insert((method, template));
        expect(&socket, method, template, "x", body, status)
    };
    assert_eq!(is("GET", "/v1/health", "", 200)["pid"], daemon.0.id());
    let stat = is("GET", "/v1/stat", "", 200);
    assert!(stat["requests"].as_u64() > Some(0) && stat["bytes_filled"].as_u64() > Some(0), "{stat}");
    for _ in 0..2 {
        is("PUT", "/v1/log-level", r#"{"level":"debug"}"#, 200);
    }
    assert_eq!(is("GET", "/v1/log-level", "", 200)["level"], "debug");
    assert_eq!(is("GET", "/v1/stat", "", 200)["log_level"], "debug");
    is("GET", "/v1/images", "", 200);
    is("GET", "/v1/config", "", 200);
    for (method, template) in
        [("POST", "/v1/attach"), ("POST", "/v1/repair"), ("POST", "/v1/prefetch"), ("POST", "/v1/release"), ("DELETE", "/v1/leases/{id}")]
    {
        let body = if template == "/v1/repair" { r#"{"file":"x"}"# } else { wanted };
        let why = is(method, template, body, 409);
        assert!(why["error"].as_str().unwrap().contains("--seed"), "{why}");
    }
    assert_eq!(asked, routes(Site::Control).collect());
    daemon.end();
}
