//! Small requests to identity providers: HTTPS only, authorities as configured, no redirects, bounded in time and size.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue};
use http::{Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;

/// Longest exchange.
const WITHIN: Duration = Duration::from_secs(10);
/// Largest answer, in bytes.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// A request that got no usable answer.
#[derive(Debug, thiserror::Error)]
pub enum HttpsError {
    /// An address that is not to be asked.
    #[error("'{url}' is not an https address")]
    Address {
        /// The address.
        url: String,
    },
    /// No answer.
    #[error("{host} can't be reached")]
    Unreachable {
        /// Who.
        host: String,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It took too long.
    #[error("{host} did not answer within {} s", WITHIN.as_secs())]
    Late {
        /// Who.
        host: String,
    },
}

/// An answer.
#[derive(Debug)]
pub struct Got {
    /// Its status.
    pub status: StatusCode,
    /// Its body.
    pub body: Bytes,
}

impl Got {
    /// The body as JSON; none: it is not.
    pub fn json(&self) -> Option<serde_json::Value> {
        serde_json::from_slice(&self.body).ok()
    }
}

/// What a request sends.
pub enum Sending<'a> {
    /// Nothing; with a bearer token, if there is one.
    Get(Option<&'a str>),
    /// A form, with an `Authorization` of its own, if there is one.
    Form(&'a [(&'a str, &'a str)], Option<&'a str>),
}

/// Sends a request and reads the answer.
///
/// # Errors
/// When there is none.
pub async fn ask(tls: &Arc<rustls::ClientConfig>, url: &str, send: Sending<'_>) -> Result<Got, HttpsError> {
    let wrong = || HttpsError::Address { url: url.chars().take(200).collect() };
    let uri: Uri = url.parse().map_err(|_| wrong())?;
    if uri.scheme_str() != Some("https") {
        return Err(wrong());
    }
    let host = uri.host().ok_or_else(wrong)?.trim_matches(['[', ']']).to_owned();
    let request = request(&uri, send).ok_or_else(wrong)?;
    let exchange = exchange(Arc::clone(tls), host.clone(), uri.port_u16().unwrap_or(443), request);
    match tokio::time::timeout(WITHIN, exchange).await {
        Ok(Ok(got)) => Ok(got),
        Ok(Err(source)) => Err(HttpsError::Unreachable { host, source }),
        Err(_) => Err(HttpsError::Late { host }),
    }
}

fn request(uri: &Uri, send: Sending<'_>) -> Option<Request<Full<Bytes>>> {
    let path = uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    let authority = uri.authority()?.as_str();
    let (method, authorization, body) = match send {
        Sending::Get(bearer) => (Method::GET, bearer.map(|token| format!("Bearer {token}")), None),
        Sending::Form(fields, authorization) => {
            (Method::POST, authorization.map(str::to_owned), Some(serde_urlencoded::to_string(fields).ok()?))
        }
    };
    let mut builder = Request::builder()
        .method(method)
        .uri(path)
        .header(HOST, authority)
        .header(ACCEPT, HeaderValue::from_static("application/json"));
    if let Some(text) = authorization {
        let mut value = HeaderValue::from_str(&text).ok()?;
        value.set_sensitive(true);
        builder = builder.header(AUTHORIZATION, value);
    }
    if body.is_some() {
        builder = builder.header(CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
    }
    builder.body(Full::new(Bytes::from(body.unwrap_or_default()))).ok()
}

async fn exchange(
    tls: Arc<rustls::ClientConfig>,
    host: String,
    port: u16,
    request: Request<Full<Bytes>>,
) -> Result<Got, Box<dyn std::error::Error + Send + Sync>> {
    let tcp = TcpStream::connect((host.as_str(), port)).await?;
    let name = ServerName::try_from(host)?;
    let stream = tokio_rustls::TlsConnector::from(tls).connect(name, tcp).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driving = tokio::spawn(connection);
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await?.to_bytes();
    driving.abort();
    Ok(Got { status, body })
}
