//! How a request gets to whoever answers it: a handle, so that tests can put a whole cluster into one process and so
//! that a link can be cut on purpose. [`TlsTransport`] is the real one.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::BodyExt;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;

/// Any error, where only its text will be used.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;
/// A body of either direction.
pub type Body = UnsyncBoxBody<Bytes, BoxError>;
/// A future that a handle's method returns.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// How long the making of a connection may take. Too short: a busy host counts as lost. Too long: a dead one is
/// noticed late.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Most idle connections kept to one peer; a long wait holds one of them, so it must be more than one.
const IDLE_CONNECTIONS_MAX: usize = 4;

/// A request that got no answer.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// No connection could be made.
    #[error("{address} can't be reached")]
    Connect {
        /// Whose address.
        address: String,
        /// Why.
        #[source]
        source: BoxError,
    },
    /// The connection broke before the answer came: it is not known whether the request was carried out.
    #[error("the connection to {address} broke before it answered")]
    Broken {
        /// Whose address.
        address: String,
        /// Why.
        #[source]
        source: BoxError,
    },
}

/// Sends requests to one peer.
pub trait Transport: Send + Sync {
    /// Sends a request and waits for the head of the answer.
    fn send(&self, request: Request<Body>) -> BoxFuture<'_, Result<Response<Body>, TransportError>>;

    /// Whom it reaches, for messages.
    fn address(&self) -> &str;
}

/// An empty body.
pub fn empty() -> Body {
    full(Bytes::new())
}

/// A body of these bytes.
pub fn full(bytes: impl Into<Bytes>) -> Body {
    http_body_util::Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// A body that is streamed from chunks.
pub fn streamed<S, E>(chunks: S) -> Body
where
    S: futures_util::Stream<Item = Result<Bytes, E>> + Send + 'static,
    E: Into<BoxError> + 'static,
{
    use futures_util::TryStreamExt;
    http_body_util::StreamBody::new(chunks.map_ok(hyper::body::Frame::data).map_err(Into::into))
        .boxed_unsync()
}

/// HTTP/1.1 over TLS over TCP, with a few connections kept.
pub struct TlsTransport {
    address: String,
    server_name: ServerName<'static>,
    config: Arc<rustls::ClientConfig>,
    idle: Mutex<Vec<SendRequest<Body>>>,
}

impl TlsTransport {
    /// Reaches `address` (`host:port`), which must show a certificate for `server_name`.
    pub fn new(address: String, server_name: ServerName<'static>, config: Arc<rustls::ClientConfig>) -> Self {
        Self { address, server_name, config, idle: Mutex::new(Vec::new()) }
    }

    fn take_idle(&self) -> Option<SendRequest<Body>> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(sender) = idle.pop() {
            if sender.is_ready() {
                return Some(sender);
            }
        }
        None
    }

    fn keep(&self, sender: SendRequest<Body>) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|kept| !kept.is_closed());
        if !sender.is_closed() && idle.len() < IDLE_CONNECTIONS_MAX {
            idle.push(sender);
        }
    }

    async fn connect(&self) -> Result<SendRequest<Body>, TransportError> {
        let failed = |source: BoxError| TransportError::Connect { address: self.address.clone(), source };
        let connecting = async {
            let tcp = TcpStream::connect(&self.address).await?;
            tcp.set_nodelay(true)?;
            let connector = tokio_rustls::TlsConnector::from(Arc::clone(&self.config));
            let tls = connector.connect(self.server_name.clone(), tcp).await?;
            let (sender, connection) = handshake(TokioIo::new(tls)).await?;
            tokio::spawn(connection.with_upgrades());
            Ok::<_, BoxError>(sender)
        };
        match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(result) => result.map_err(failed),
            Err(_) => Err(failed(format!("no answer within {} s", CONNECT_TIMEOUT.as_secs()).into())),
        }
    }

    async fn exchange(&self, mut request: Request<Body>) -> Result<Response<Body>, TransportError> {
        let host = http::HeaderValue::from_str(&self.address)
            .unwrap_or_else(|_| http::HeaderValue::from_static("berth"));
        request.headers_mut().insert(http::header::HOST, host);
        let broken = |source: hyper::Error| TransportError::Broken {
            address: self.address.clone(),
            source: source.into(),
        };
        // A kept connection may have been closed meanwhile; a request that never left is sent again on the next.
        while let Some(mut sender) = self.take_idle() {
            match sender.try_send_request(request).await {
                Ok(response) => return Ok(self.answered(sender, response)),
                Err(mut error) => match error.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(broken(error.into_error())),
                },
            }
        }
        let mut sender = self.connect().await?;
        let response = sender.send_request(request).await.map_err(broken)?;
        Ok(self.answered(sender, response))
    }

    fn answered(
        &self,
        sender: SendRequest<Body>,
        response: Response<hyper::body::Incoming>,
    ) -> Response<Body> {
        // `is_ready` turns true once this answer's body has been read; until then it is passed over by `take_idle`.
        self.keep(sender);
        response.map(|body| body.map_err(Into::into).boxed_unsync())
    }
}

impl Transport for TlsTransport {
    fn send(&self, request: Request<Body>) -> BoxFuture<'_, Result<Response<Body>, TransportError>> {
        Box::pin(self.exchange(request))
    }

    fn address(&self) -> &str {
        &self.address
    }
}
