//! How answers are said.

use axum::body::Body;
use berth_api::manager::OperationRef;
use berth_api::transport::BoxFuture;
use berth_model::{OperationId, Problem, ProblemCode};
use berth_store::Revision;
use futures_util::StreamExt;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, ETAG, HeaderName, HeaderValue, WWW_AUTHENTICATE};
use http::{Request, Response, StatusCode};
use serde::Serialize;

use crate::audit::Open;

/// The header that names the request, in every answer.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const NO_SNIFFING: HeaderName = HeaderName::from_static("x-content-type-options");
const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// A reply of the contract.
pub struct Answer<T> {
    value: T,
    revision: Option<Revision>,
    operation: Option<OperationId>,
}

impl<T: Serialize> Answer<T> {
    /// With nothing more to say.
    pub const fn new(value: T) -> Self {
        Self { value, revision: None, operation: None }
    }

    /// With the revision that it was read at, as its ETag.
    #[must_use]
    pub const fn at(mut self, revision: Revision) -> Self {
        self.revision = Some(revision);
        self
    }

    pub(super) fn into_done(self) -> Done {
        let json = serde_json::to_vec(&self.value).expect("replies of the contract are plain data");
        let mut response = Response::new(Body::from(json));
        response.headers_mut().insert(CONTENT_TYPE, JSON);
        if let Some(Revision(number)) = self.revision {
            let tag = HeaderValue::from_str(&format!("\"{number}\"")).expect("digits in quotes");
            response.headers_mut().insert(ETAG, tag);
        }
        Done { response, operation: self.operation, rest: Rest::Nothing }
    }
}

impl Answer<OperationRef> {
    /// An operation that was begun (or, when only tried, would have been): the record names it.
    pub fn begun(value: OperationRef) -> Self {
        let operation = value.operation.as_ref().map(|operation| operation.id.clone());
        Self { value, revision: None, operation }
    }
}

/// What is still to happen once the head of an answer is out.
pub enum Rest {
    /// Nothing.
    Nothing,
    /// The body is made as it goes: the record is open until its end.
    Streaming,
    /// The connection is somebody else's now: the record is open until the task is done.
    Task(BoxFuture<'static, ()>),
}

/// What a handler has done.
pub struct Done {
    response: Response<Body>,
    operation: Option<OperationId>,
    rest: Rest,
}

impl Done {
    /// Plain text of this content type.
    pub fn text(content_type: &'static str, text: String) -> Self {
        let mut response = Response::new(Body::from(text));
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
        Self { response, operation: None, rest: Rest::Nothing }
    }

    /// An answer whose body comes bit by bit.
    pub const fn streaming(response: Response<Body>) -> Self {
        Self { response, operation: None, rest: Rest::Streaming }
    }

    /// An answer after which the task has the connection.
    pub fn upgrade(response: Response<Body>, task: BoxFuture<'static, ()>) -> Self {
        Self { response, operation: None, rest: Rest::Task(task) }
    }

    pub(super) fn into_parts(self) -> (Response<Body>, Option<OperationId>, Rest) {
        (self.response, self.operation, self.rest)
    }
}

/// The answer that carries a problem.
pub fn problem(mut problem: Problem, request_id: &str) -> Response<Body> {
    problem.request_id = Some(request_id.to_owned());
    let status =
        StatusCode::from_u16(problem.code.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    with_status(status, &problem)
}

fn with_status(status: StatusCode, problem: &Problem) -> Response<Body> {
    let json = serde_json::to_vec(problem).expect("problems are plain data");
    let mut response = Response::new(Body::from(json));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, JSON);
    if status == StatusCode::UNAUTHORIZED {
        response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

/// Puts on what every answer carries.
pub fn stamp(response: &mut Response<Body>, request_id: &str) {
    let headers = response.headers_mut();
    if let Ok(value) = HeaderValue::from_str(request_id) {
        headers.insert(REQUEST_ID, value);
    }
    // Answers hold secrets and states that are old in a moment.
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(NO_SNIFFING, HeaderValue::from_static("nosniff"));
}

/// Keeps the record open as long as the body is.
pub fn holding(response: Response<Body>, open: Option<Open>) -> Response<Body> {
    response.map(|body| {
        Body::from_stream(body.into_data_stream().inspect(move |_| {
            let _held = &open;
        }))
    })
}

/// There is no such path.
pub fn unknown_route<B>(request: &Request<B>, request_id: &str) -> Response<Body> {
    let path: String = request.uri().path().chars().take(200).collect();
    let mut response =
        problem(
            Problem::new(ProblemCode::NotFound, format!("there is no '{path}' here; see /v1/openapi.json"))
                .at("path", &path, "a path of the API"),
            request_id,
        );
    stamp(&mut response, request_id);
    response
}

/// The path is there, the method is not.
pub fn wrong_method<B>(request: &Request<B>, request_id: &str) -> Response<Body> {
    let path: String = request.uri().path().chars().take(200).collect();
    let mut what =
        Problem::field("method", request.method(), "a method that this path has; see /v1/openapi.json");
    what.message = format!("'{path}' does not take {}; see /v1/openapi.json", request.method());
    what.request_id = Some(request_id.to_owned());
    let mut response = with_status(StatusCode::METHOD_NOT_ALLOWED, &what);
    stamp(&mut response, request_id);
    response
}
