//! The network between daemons: real HTTP, over memory instead of sockets, on links that can be cut.
//!
//! A link is between two places, by name: `manager`, `user` and the hosts. Cut hard, connections break at once and new
//! ones are refused, as when a machine is there and its program is not; cut silently, nothing arrives and nobody is
//! told, as when a cable is pulled, and connections of that time are dead when the link is healed.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use axum::Router;
use berth_api::pki::Peer;
use berth_api::serve::Caller;
use berth_api::transport::{Body, BoxError, BoxFuture, Transport, TransportError};
use http::{Request, Response};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::sync::{mpsc, watch};
use tower::ServiceExt;

mod wire;

use wire::{State, Wire, WireEnd};

/// How long a connection over a silent link is waited for.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// How a link is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Connections break, and new ones are refused.
    Hard,
    /// Nothing arrives, and nobody is told.
    Silent,
}

/// Everything that is connected, and everything that is cut.
#[derive(Default)]
pub struct Network {
    inner: Mutex<Inner>,
    healed: watch::Sender<()>,
}

#[derive(Default)]
struct Inner {
    listeners: HashMap<String, Listening>,
    cuts: HashMap<Link, Cut>,
    wires: Vec<Weak<Wire>>,
}

struct Listening {
    place: String,
    arrivals: mpsc::UnboundedSender<Arrival>,
}

/// Two places, in order.
type Link = (String, String);

fn link(one: &str, other: &str) -> Link {
    let (low, high) = if one <= other { (one, other) } else { (other, one) };
    (low.to_owned(), high.to_owned())
}

struct Arrival {
    end: WireEnd,
    peer: Peer,
}

/// Where connections arrive; nobody answers at its address when it is dropped.
pub struct Listener {
    arrivals: mpsc::UnboundedReceiver<Arrival>,
}

impl Network {
    /// A network on which nobody listens.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Listens at an address, in a place. Whoever listened there before does so no longer.
    pub fn listen(&self, place: &str, address: &str) -> Listener {
        let (arrivals, arrived) = mpsc::unbounded_channel();
        let listening = Listening { place: place.to_owned(), arrivals };
        self.lock().listeners.insert(address.to_owned(), listening);
        Listener { arrivals: arrived }
    }

    /// A way from a place to an address, for one who is known as `peer` there.
    pub fn transport(self: &Arc<Self>, place: &str, peer: Peer, address: &str) -> Arc<dyn Transport> {
        let network = Arc::clone(self);
        Arc::new(SimTransport { network, place: place.to_owned(), peer, address: address.to_owned() })
    }

    /// Cuts the link between two places.
    pub fn cut(&self, one: &str, other: &str, how: Cut) {
        let mut inner = self.lock();
        inner.cuts.insert(link(one, other), how);
        let state = match how {
            Cut::Hard => State::Broken,
            Cut::Silent => State::Silent,
        };
        inner.tell(&link(one, other), state);
    }

    /// Heals it: new connections can be made, and those that were silent are broken.
    pub fn heal(&self, one: &str, other: &str) {
        let mut inner = self.lock();
        if inner.cuts.remove(&link(one, other)).is_some() {
            inner.tell(&link(one, other), State::Broken);
        }
        drop(inner);
        self.healed.send_replace(());
    }

    /// Heals everything.
    pub fn heal_all(&self) {
        let cut: Vec<Link> = self.lock().cuts.keys().cloned().collect();
        cut.iter().for_each(|(one, other)| self.heal(one, other));
    }

    async fn connect(&self, place: &str, peer: Peer, address: &str) -> io::Result<WireEnd> {
        let mut healed = self.healed.subscribe();
        let deadline = tokio::time::Instant::now() + CONNECT_TIMEOUT;
        loop {
            if let Some(end) = self.try_connect(place, &peer, address)? {
                return Ok(end);
            }
            match tokio::time::timeout_at(deadline, healed.changed()).await {
                Ok(_) => {}
                Err(_) => return Err(io::ErrorKind::TimedOut.into()),
            }
        }
    }

    /// A connection; none as long as the link is silent.
    fn try_connect(&self, place: &str, peer: &Peer, address: &str) -> io::Result<Option<WireEnd>> {
        let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
        let mut inner = self.lock();
        let listening = inner.listeners.get(address).ok_or_else(refused)?;
        let (link, arrivals) = (link(place, &listening.place), listening.arrivals.clone());
        match inner.cuts.get(&link) {
            Some(Cut::Hard) => return Err(io::ErrorKind::HostUnreachable.into()),
            Some(Cut::Silent) => return Ok(None),
            None => {}
        }
        let (wire, ours, theirs) = wire::pair(link);
        inner.wires.retain(|wire| wire.strong_count() > 0);
        inner.wires.push(Arc::downgrade(&wire));
        arrivals.send(Arrival { end: theirs, peer: peer.clone() }).map_err(|_| refused())?;
        Ok(Some(ours))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn tell(&self, link: &Link, state: State) {
        let wires = self.wires.iter().filter_map(Weak::upgrade);
        wires.filter(|wire| wire.link == *link).for_each(|wire| wire.set(state));
    }
}

impl Listener {
    /// Answers with a router until it is dropped.
    pub async fn serve(mut self, router: Router) {
        while let Some(Arrival { end, peer }) = self.arrivals.recv().await {
            let caller = Caller { remote: ([127, 0, 0, 1], 1).into(), peer };
            let service = router.clone().map_request(move |mut request: Request<Incoming>| {
                request.extensions_mut().insert(caller.clone());
                request
            });
            tokio::spawn(async move {
                let served = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(end), TowerToHyperService::new(service))
                    .with_upgrades()
                    .await;
                if let Err(error) = served {
                    tracing::trace!(%error, "a connection ended");
                }
            });
        }
    }
}

struct SimTransport {
    network: Arc<Network>,
    place: String,
    peer: Peer,
    address: String,
}

impl SimTransport {
    async fn exchange(&self, mut request: Request<Body>) -> Result<Response<Body>, TransportError> {
        let address = || self.address.clone();
        let connect = |source: BoxError| TransportError::Connect { address: address(), source };
        let broken =
            |source: hyper::Error| TransportError::Broken { address: address(), source: source.into() };
        let host = http::HeaderValue::from_static("sim");
        request.headers_mut().insert(http::header::HOST, host);
        let end = self.network.connect(&self.place, self.peer.clone(), &self.address).await;
        let end = end.map_err(|error| connect(error.into()))?;
        let made = hyper::client::conn::http1::handshake(TokioIo::new(end)).await;
        let (mut sender, connection) = made.map_err(|error| connect(error.into()))?;
        tokio::spawn(connection.with_upgrades());
        let response = sender.send_request(request).await.map_err(broken)?;
        Ok(response.map(|body| body.map_err(Into::into).boxed_unsync()))
    }
}

impl Transport for SimTransport {
    fn send(&self, request: Request<Body>) -> BoxFuture<'_, Result<Response<Body>, TransportError>> {
        Box::pin(self.exchange(request))
    }

    fn address(&self) -> &str {
        &self.address
    }
}

#[cfg(test)]
mod tests;
