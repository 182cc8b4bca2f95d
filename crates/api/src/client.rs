//! Asking: one typed call for every route.

use std::sync::Arc;

use berth_model::{Problem, ProblemCode};
use bytes::{Bytes, BytesMut};
use futures_util::Stream;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::BodyExt;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Serialize;

use crate::endpoint::Endpoint;
use crate::transport::{self, Body, Transport, TransportError};

/// Largest JSON answer that is read, in bytes. A full page of VMs is a tenth of it.
const ANSWER_BYTES_MAX: usize = 64 * 1024 * 1024;

const PATH_SAFE: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// A call that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The other side refused or failed, and said why.
    #[error("{0}")]
    Problem(Box<Problem>),
    /// No answer.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// An answer that is not of the contract.
    #[error("{address} answered {status} with something that is not of the API: {detail}")]
    Nonsense {
        /// Who.
        address: String,
        /// The status.
        status: StatusCode,
        /// What was wrong with it.
        detail: String,
    },
}

impl ClientError {
    /// The same as a problem, to be passed on or shown.
    pub fn into_problem(self) -> Problem {
        match self {
            Self::Problem(problem) => *problem,
            Self::Transport(error) => {
                let cause =
                    std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
                Problem::new(ProblemCode::Unreachable, format!("{error}{cause}"))
            }
            Self::Nonsense { .. } => Problem::new(ProblemCode::Internal, self.to_string()),
        }
    }

    /// Whether nothing is known of what the other side did.
    pub const fn is_unreachable(&self) -> bool {
        matches!(self, Self::Transport(_))
    }
}

/// A reply with the revision that it was read at.
#[derive(Debug, Clone)]
pub struct Tagged<T> {
    /// The reply.
    pub value: T,
    /// Its ETag, for If-Match.
    pub etag: Option<String>,
}

/// A client of one manager or one agent.
#[derive(Clone)]
pub struct Client {
    transport: Arc<dyn Transport>,
    bearer: Option<Arc<str>>,
}

impl Client {
    /// A client that proves itself by its certificate, or not at all.
    pub fn new(transport: Arc<dyn Transport>) -> Self {
        Self { transport, bearer: None }
    }

    /// The same with a bearer token.
    #[must_use]
    pub fn with_token(mut self, secret: &str) -> Self {
        self.bearer = Some(secret.into());
        self
    }

    /// Whom it reaches, for messages.
    pub fn address(&self) -> &str {
        self.transport.address()
    }

    /// Calls a route with JSON or no body.
    ///
    /// # Errors
    /// What the other side said, or that it could not be reached.
    pub async fn call<E: Endpoint>(
        &self,
        path: &E::Path,
        query: &E::Query,
        body: &E::Body,
    ) -> Result<E::Reply, ClientError> {
        Ok(self.call_tagged::<E>(path, query, body, None).await?.value)
    }

    /// The same, with the ETag of the reply, and with an If-Match when one is given.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub async fn call_tagged<E: Endpoint>(
        &self,
        path: &E::Path,
        query: &E::Query,
        body: &E::Body,
        if_match: Option<&str>,
    ) -> Result<Tagged<E::Reply>, ClientError> {
        let json = serde_json::to_vec(body).expect("bodies of the contract are plain data");
        let has_body = json != b"null";
        let mut request =
            self.request::<E>(path, query, if has_body { transport::full(json) } else { transport::empty() });
        if has_body {
            request
                .headers_mut()
                .insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
        }
        if let Some(value) = if_match.and_then(|text| header::HeaderValue::from_str(text).ok()) {
            request.headers_mut().insert(header::IF_MATCH, value);
        }
        self.finish(self.transport.send(request).await?).await
    }

    /// Sends a streamed body of `length_bytes`.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub async fn upload<E: Endpoint>(
        &self,
        path: &E::Path,
        query: &E::Query,
        body: Body,
        length_bytes: u64,
    ) -> Result<E::Reply, ClientError> {
        let mut request = self.request::<E>(path, query, body);
        request
            .headers_mut()
            .insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/octet-stream"));
        request.headers_mut().insert(header::CONTENT_LENGTH, header::HeaderValue::from(length_bytes));
        Ok(self.finish(self.transport.send(request).await?).await?.value)
    }

    /// Calls a route whose reply is streamed (downloads, text), and gives the body.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub async fn download<E: Endpoint>(
        &self,
        path: &E::Path,
        query: &E::Query,
    ) -> Result<Response<Body>, ClientError> {
        let response = self.transport.send(self.request::<E>(path, query, transport::empty())).await?;
        if response.status().is_success() { Ok(response) } else { Err(self.problem(response).await) }
    }

    /// Calls a route of server-sent events, and gives the replies as they come.
    ///
    /// # Errors
    /// As [`Self::call`]; the stream ends when the connection does.
    pub async fn events<E: Endpoint>(
        &self,
        path: &E::Path,
        query: &E::Query,
    ) -> Result<impl Stream<Item = Result<E::Reply, ClientError>> + Send + use<E>, ClientError> {
        let response = self.download::<E>(path, query).await?;
        let address = self.address().to_owned();
        let start = (response.into_body(), Vec::<u8>::new(), address);
        Ok(futures_util::stream::unfold(start, |(mut body, mut buffer, address)| async move {
            loop {
                if let Some(item) = take_event::<E>(&mut buffer, &address) {
                    return Some((item, (body, buffer, address)));
                }
                let frame = body.frame().await?.ok()?;
                if let Ok(data) = frame.into_data() {
                    buffer.extend_from_slice(&data);
                }
            }
        }))
    }

    /// Turns the connection into a protocol of its own: a websocket (`websocket`) or one of Berth's.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub async fn upgrade<E: Endpoint>(
        &self,
        path: &E::Path,
        protocol: &'static str,
        headers: &[(&'static str, String)],
    ) -> Result<TokioIo<Upgraded>, ClientError>
    where
        E::Query: Default,
    {
        let mut request = self.request::<E>(path, &E::Query::default(), transport::empty());
        let fields = request.headers_mut();
        fields.insert(header::CONNECTION, header::HeaderValue::from_static("upgrade"));
        fields.insert(header::UPGRADE, header::HeaderValue::from_static(protocol));
        for (name, value) in headers {
            let value =
                header::HeaderValue::from_str(value).expect("header values of the contract are plain");
            fields.insert(*name, value);
        }
        let response = self.transport.send(request).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(self.problem(response).await);
        }
        let upgraded = hyper::upgrade::on(response).await.map_err(|source| TransportError::Broken {
            address: self.address().to_owned(),
            source: source.into(),
        })?;
        Ok(TokioIo::new(upgraded))
    }

    fn request<E: Endpoint>(&self, path: &E::Path, query: &E::Query, body: Body) -> Request<Body> {
        let mut target = fill_path(E::PATH, path);
        let query = query_text(query);
        if !query.is_empty() {
            target.push('?');
            target.push_str(&query);
        }
        let method = Method::from_bytes(E::METHOD.as_bytes()).expect("methods of the contract are valid");
        let mut request = Request::new(body);
        *request.method_mut() = method;
        *request.uri_mut() = target.parse().expect("paths of the contract are valid");
        if let Some(secret) = &self.bearer
            && let Ok(mut value) = header::HeaderValue::from_str(&format!("Bearer {secret}"))
        {
            value.set_sensitive(true);
            request.headers_mut().insert(header::AUTHORIZATION, value);
        }
        request
    }

    async fn finish<T: serde::de::DeserializeOwned>(
        &self,
        response: Response<Body>,
    ) -> Result<Tagged<T>, ClientError> {
        let status = response.status();
        if !status.is_success() {
            return Err(self.problem(response).await);
        }
        let etag = response.headers().get(header::ETAG).and_then(|tag| tag.to_str().ok()).map(str::to_owned);
        let bytes = self.read(response).await?;
        let json: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
        let value = serde_json::from_slice(json).map_err(|error| ClientError::Nonsense {
            address: self.address().to_owned(),
            status,
            detail: error.to_string(),
        })?;
        Ok(Tagged { value, etag })
    }

    async fn problem(&self, response: Response<Body>) -> ClientError {
        let status = response.status();
        match self.read(response).await {
            Ok(bytes) => match serde_json::from_slice::<Problem>(&bytes) {
                Ok(problem) => ClientError::Problem(Box::new(problem)),
                Err(error) => ClientError::Nonsense {
                    address: self.address().to_owned(),
                    status,
                    detail: error.to_string(),
                },
            },
            Err(error) => error,
        }
    }

    async fn read(&self, response: Response<Body>) -> Result<Bytes, ClientError> {
        let broken = |source| TransportError::Broken { address: self.address().to_owned(), source };
        let mut body = response.into_body();
        let mut bytes = BytesMut::new();
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame.map_err(broken)?.into_data() else { continue };
            if bytes.len() + data.len() > ANSWER_BYTES_MAX {
                return Err(
                    broken(format!("the answer is larger than {ANSWER_BYTES_MAX} bytes").into()).into()
                );
            }
            bytes.extend_from_slice(&data);
        }
        Ok(bytes.freeze())
    }
}

/// Puts the fields of `path` into the places of `template`.
pub fn fill_path<P: Serialize>(template: &str, path: &P) -> String {
    let fields = serde_json::to_value(path).expect("paths of the contract are plain data");
    let mut filled = String::with_capacity(template.len() + 32);
    let mut rest = template;
    while let Some((before, after)) = rest.split_once('{') {
        let (name, after) = after.split_once('}').expect("paths of the contract close their braces");
        filled.push_str(before);
        let value = fields
            .get(name)
            .and_then(serde_json::Value::as_str)
            .expect("paths of the contract have their fields");
        filled.extend(utf8_percent_encode(value, PATH_SAFE));
        rest = after;
    }
    filled.push_str(rest);
    filled
}

fn query_text<Q: Serialize>(query: &Q) -> String {
    serde_urlencoded::to_string(query).expect("queries of the contract are flat")
}

fn take_event<E: Endpoint>(buffer: &mut Vec<u8>, address: &str) -> Option<Result<E::Reply, ClientError>> {
    loop {
        let end = buffer.windows(2).position(|pair| pair == b"\n\n")?;
        let event: Vec<u8> = buffer.drain(..end + 2).collect();
        let data: Vec<u8> = event
            .split(|&byte| byte == b'\n')
            .filter_map(|line| line.strip_prefix(b"data:"))
            .flat_map(|line| line.iter().copied().chain(*b"\n"))
            .collect();
        // Comments only keep the connection alive.
        if !data.is_empty() {
            return Some(serde_json::from_slice(&data).map_err(|error| ClientError::Nonsense {
                address: address.to_owned(),
                status: StatusCode::OK,
                detail: error.to_string(),
            }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manager::{VmListQuery, VmPath};

    #[test]
    fn a_name_with_a_slash_stays_one_part_of_the_path() {
        let path = fill_path("/v1/vms/{vm}/start", &VmPath { vm: "default/books".into() });
        assert_eq!(path, "/v1/vms/default%2Fbooks/start");
        let path = fill_path("/v1/vms/{vm}", &VmPath { vm: "../../etc?x=1#".into() });
        assert_eq!(path, "/v1/vms/..%2F..%2Fetc%3Fx%3D1%23");
    }

    #[test]
    fn a_query_leaves_out_what_is_not_set() {
        let query = VmListQuery { segment: Some("a b".into()), limit: Some(3), ..VmListQuery::default() };
        assert_eq!(query_text(&query), "segment=a+b&limit=3");
    }
}
