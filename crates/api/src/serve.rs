//! Answering: the loop that takes TLS connections and hands requests to a service, with who asks as an extension.
//!
//! The configuration is read anew for each connection from a watch, so that a renewed certificate is in use at once,
//! with no restart.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tower::Service;

use crate::pki::{self, Peer};
use crate::transport::BoxError;

mod answering;

use answering::Answering;
pub use answering::Arriving;

/// Longest TLS handshake. A peer that takes longer holds a connection for nothing.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for a request's head, which also ends idle connections.
const HEAD_TIMEOUT: Duration = Duration::from_secs(120);
/// Most connections at once. More are taken only when one ends: a flood must not eat the memory of a host.
const CONNECTIONS_MAX: usize = 1024;

/// From where a request came, and who its certificate says sent it: an extension of every request.
#[derive(Debug, Clone)]
pub struct Caller {
    /// Address and port.
    pub remote: SocketAddr,
    /// By certificate.
    pub peer: Peer,
}

/// Serves until `stop` says so or is dropped; connections under way are then let go.
pub async fn serve<S, B>(
    listener: TcpListener,
    tls: watch::Receiver<Arc<rustls::ServerConfig>>,
    service: S,
    mut stop: watch::Receiver<bool>,
) where
    S: Service<Request<Arriving>, Response = Response<B>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
    B: hyper::body::Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    let places = Arc::new(tokio::sync::Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stopped| *stopped) => return,
        };
        let Ok((stream, remote)) = accepted else {
            // Out of file descriptors, mostly: others must end before the next can be taken.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let config = Arc::clone(&tls.borrow());
        let service = service.clone();
        let mut stop = stop.clone();
        tokio::spawn(async move {
            let _place = place;
            tokio::select! {
                result = connection(stream, remote, config, service) => {
                    if let Err(error) = result {
                        tracing::debug!(%remote, %error, "connection ended");
                    }
                }
                _ = stop.wait_for(|stopped| *stopped) => {}
            }
        });
    }
}

async fn connection<S, B>(
    stream: TcpStream,
    remote: SocketAddr,
    config: Arc<rustls::ServerConfig>,
    service: S,
) -> Result<(), BoxError>
where
    S: Service<Request<Arriving>, Response = Response<B>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
    B: hyper::body::Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    stream.set_nodelay(true)?;
    let acceptor = tokio_rustls::TlsAcceptor::from(config);
    let tls = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await??;
    let peer = match tls.get_ref().1.peer_certificates().and_then(<[_]>::first) {
        Some(certificate) => pki::peer_of(certificate)?,
        None => Peer::Anonymous,
    };
    let service = Answering { service, caller: Caller { remote, peer } };
    hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(tls), service)
        .with_upgrades()
        .await
        .map_err(Into::into)
}
