//! Reading a request: path, query and body as the contract's types, and what is wrong with them in the caller's words.
//!
//! Fields that the contract does not have are refused: a misspelt `protected` that is quietly ignored is a VM that is
//! not protected.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequestParts, RawPathParams};
use berth_api::endpoint::{Endpoint, EndpointKind};
use berth_model::{Problem, ProblemCode};
use bytes::Bytes;
use http::request::Parts;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Largest JSON body, in bytes. The largest that makes sense is a VM with user data, a fiftieth of it.
pub const JSON_BYTES_MAX: usize = 1 << 20;
/// How long a JSON body may take to arrive. A caller that sends a byte a minute holds a connection for nothing.
const JSON_TIMEOUT: Duration = Duration::from_secs(30);
/// What a serde message has between what is wrong and what would be right.
const EXPECTED: &str = "expected ";
/// How a serde message begins that says which field is not there.
const MISSING: &str = "missing field `";

/// Path, query and body of a request.
pub struct Input<E: Endpoint> {
    /// The parts of the path.
    pub path: E::Path,
    /// The query.
    pub query: E::Query,
    /// The body; `()` for uploads, whose body is not read here.
    pub body: E::Body,
}

/// What came of reading a request.
pub struct Read<E: Endpoint> {
    /// Its parts, or what is wrong with them.
    pub input: Result<Input<E>, Problem>,
    /// What its path names, as it stands there; empty if nothing.
    pub named: String,
    /// The body, if it was left for the handler.
    pub body: Body,
}

/// Reads a request's path, query and, unless it is an upload, body.
pub async fn read<E: Endpoint>(parts: &mut Parts, body: Body) -> Read<E> {
    let (path, named) = match path_fields(parts).await {
        Ok(fields) => {
            let named = fields.first().map(|(_, value)| value.clone()).unwrap_or_default();
            (typed_path::<E::Path>(fields), named)
        }
        Err(problem) => (Err(problem), String::new()),
    };
    let query = typed_query::<E::Query>(parts.uri.query().unwrap_or_default());
    let (json, body) = if E::KIND == EndpointKind::Upload {
        (Ok(Bytes::new()), body)
    } else {
        (collect(body).await, Body::empty())
    };
    let body_read = json.and_then(|bytes| typed_body::<E::Body>(&bytes));
    let input = path.and_then(|path| Ok(Input { path, query: query?, body: body_read? }));
    Read { input, named, body }
}

async fn path_fields(parts: &mut Parts) -> Result<Vec<(String, String)>, Problem> {
    let params = RawPathParams::from_request_parts(parts, &()).await;
    let params = params.map_err(|error| Problem::field("path", error, "percent-encoded UTF-8"))?;
    Ok(params.iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
}

fn typed_path<P: DeserializeOwned>(fields: Vec<(String, String)>) -> Result<P, Problem> {
    let fields = fields.into_iter().map(|(name, value)| (name, Value::String(value))).collect();
    typed_value(Value::Object(fields))
}

/// Whatever a query field is, it can be left out; so each pair can be tried by itself to find the one at fault.
fn typed_query<Q: DeserializeOwned + serde::Serialize>(text: &str) -> Result<Q, Problem> {
    let wrong = |error: serde_urlencoded::de::Error| Problem::field("query", text, error.to_string());
    let pairs: Vec<(String, String)> = serde_urlencoded::from_str(text).map_err(wrong)?;
    let known = serde_urlencoded::from_str::<Q>("").map_err(wrong)?;
    let known = serde_json::to_value(known).unwrap_or_default();
    for pair in &pairs {
        if known.get(&pair.0).is_none() {
            return Err(unknown_field(&pair.0, &pair.1));
        }
        let alone = serde_urlencoded::to_string([pair]).unwrap_or_default();
        if let Err(error) = serde_urlencoded::from_str::<Q>(&alone) {
            return Err(Problem::field(&pair.0, &pair.1, expectation(&error.to_string())));
        }
    }
    serde_urlencoded::from_str(text).map_err(wrong)
}

async fn collect(body: Body) -> Result<Bytes, Problem> {
    let reading = Limited::new(body, JSON_BYTES_MAX).collect();
    match tokio::time::timeout(JSON_TIMEOUT, reading).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            let message = format!("the body is larger than {JSON_BYTES_MAX} bytes");
            Err(Problem::new(ProblemCode::TooLarge, message))
        }
        Ok(Err(error)) => {
            Err(Problem::new(ProblemCode::InvalidInput, format!("the body did not arrive whole: {error}")))
        }
        Err(_) => Err(Problem::new(
            ProblemCode::InvalidInput,
            format!("the body did not arrive within {} s", JSON_TIMEOUT.as_secs()),
        )),
    }
}

fn typed_body<B: DeserializeOwned + 'static>(bytes: &[u8]) -> Result<B, Problem> {
    let nothing = std::any::TypeId::of::<B>() == std::any::TypeId::of::<()>();
    let value = if bytes.is_empty() {
        // No body is the same as one that says nothing.
        if nothing { Value::Null } else { Value::Object(serde_json::Map::new()) }
    } else {
        serde_json::from_slice(bytes)
            .map_err(|error| Problem::field("body", shorten(bytes), format!("JSON ({error})")))?
    };
    match value {
        Value::Object(fields) if nothing && fields.is_empty() => typed_value(Value::Null),
        Value::Null if !nothing => Err(Problem::field("body", "null", "a JSON object")),
        value => typed_value(value),
    }
}

fn typed_value<T: DeserializeOwned>(value: Value) -> Result<T, Problem> {
    let mut track = serde_path_to_error::Track::new();
    let mut unknown = None;
    let tracked = serde_path_to_error::Deserializer::new(&value, &mut track);
    let result = serde_ignored::deserialize(tracked, |path| {
        // Optional parents show as question marks.
        unknown.get_or_insert_with(|| path.to_string().replace("?.", ""));
    });
    // A misspelt field is missing under its right name as well: the slip says more than the gap.
    if let Some(field) = unknown.filter(|_| result.as_ref().err().is_none_or(is_about_a_gap)) {
        let given = at(&value, &field).map(plain).unwrap_or_default();
        return Err(unknown_field(&field, &given));
    }
    result.map_err(|error| field_problem(&track.path().to_string(), &value, &error.to_string()))
}

fn is_about_a_gap(error: &serde_json::Error) -> bool {
    error.to_string().starts_with(MISSING)
}

fn field_problem(path: &str, value: &Value, message: &str) -> Problem {
    let parent = if path == "." { String::new() } else { format!("{path}.") };
    if let Some(name) = message.strip_prefix(MISSING).and_then(|rest| rest.split('`').next()) {
        let field = format!("{parent}{name}");
        let problem = Problem::new(ProblemCode::InvalidInput, format!("{field} is missing"));
        return problem.at(field, "", "a value");
    }
    let field = if path == "." { "body" } else { path };
    let given = at(value, path).map(plain).unwrap_or_default();
    Problem::field(field, given, expectation(message))
}

fn unknown_field(field: &str, given: &str) -> Problem {
    let problem = Problem::new(ProblemCode::InvalidInput, format!("there is no field '{field}' here"));
    problem.at(field, given, "a field of the API; see /v1/openapi.json")
}

/// The part of a serde message that says what would have been right, without the words of the language that this is
/// written in; all of it if there is no such part.
fn expectation(message: &str) -> String {
    let part = message.rfind(EXPECTED).map_or(message, |start| &message[start + EXPECTED.len()..]);
    match part {
        "u16" | "u32" | "u64" | "usize" | "invalid digit found in string" => {
            "a whole number from 0 on".to_owned()
        }
        "provided string was not `true` or `false`" => "true or false".to_owned(),
        "a boolean" => "true or false".to_owned(),
        "a sequence" => "a list".to_owned(),
        other => other.to_owned(),
    }
}

/// What stands at `nics.0.address`, whether written so or as `nics[0].address`.
fn at<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    let parts = path.split(['.', '[', ']']).filter(|part| !part.is_empty());
    parts.into_iter().try_fold(value, |value, part| match value {
        Value::Array(items) => items.get(part.parse::<usize>().ok()?),
        other => other.get(part),
    })
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn shorten(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().take(80).collect()
}

#[cfg(test)]
mod tests;
