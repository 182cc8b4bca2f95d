//! Two hosts with real TLS between them, and a link that can be cut.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use berth_agent::http::router;
use berth_agent::services::PeerConnector;
use berth_api::pki::{Authority, Identity, host_name, signing_request};
use berth_api::tls::{ClientCertificates, client_config, server_config, server_name};
use berth_api::transport::TlsTransport;
use berth_api::{Client, serve};
use berth_model::HostId;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::host::{TestHost, entropy};

struct Peers(Arc<rustls::ClientConfig>);

impl PeerConnector for Peers {
    fn connect(&self, host: &HostId, address: &str) -> Client {
        let name = server_name(&host_name(host)).expect("name");
        Client::new(Arc::new(TlsTransport::new(address.to_owned(), name, Arc::clone(&self.0))))
    }
}

pub struct Pair {
    pub source: TestHost,
    pub target: TestHost,
    pub target_address: SocketAddr,
    _stop: watch::Sender<bool>,
    _shared: Option<tempfile::TempDir>,
}

impl Pair {
    /// Two hosts that see one pool.
    pub async fn with_shared_pool() -> Self {
        Self::start(Some(crate::host::directory())).await
    }

    /// Two hosts with a pool each.
    pub async fn with_own_pools() -> Self {
        Self::start(None).await
    }

    async fn start(shared: Option<tempfile::TempDir>) -> Self {
        let pool = shared.as_ref().map(|directory| directory.path().to_owned());
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("time").as_secs().cast_signed();
        let ca = Authority::create(now).expect("CA");
        let authority = Authority::load(&ca).expect("CA");
        let (stop, stopped) = watch::channel(false);
        let (source, _) = host(&authority, now, pool.clone(), stopped.clone()).await;
        let (target, target_address) = host(&authority, now, pool, stopped).await;
        Self { source, target, target_address, _stop: stop, _shared: shared }
    }
}

async fn host(
    authority: &Authority,
    now: i64,
    pool: Option<PathBuf>,
    stopped: watch::Receiver<bool>,
) -> (TestHost, SocketAddr) {
    let id = HostId::from_entropy(entropy());
    let (key_pem, request) = signing_request().expect("request");
    let certificate_pem = authority.sign_host(&request, &id, now).expect("certificate");
    let identity = Identity { certificate_pem, key_pem };
    let ca = authority.certificate_pem();
    let client = client_config(ca, Some(&identity)).expect("client");
    let server = server_config(ca, &identity, ClientCertificates::Required).expect("server");
    let host = TestHost::start_with(pool, Arc::new(Peers(client)), id).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("listener");
    let address = listener.local_addr().expect("address");
    let (_, tls) = watch::channel(server);
    host.spawn(serve::serve(listener, tls, router(&host.agent), stopped));
    (host, address)
}

/// A link that counts what goes over it, and breaks when it is told to or has carried so much.
pub struct Link {
    pub address: SocketAddr,
    pub carried: Arc<AtomicU64>,
    pub cut: CancellationToken,
}

impl Link {
    /// A link that breaks after it has carried so many bytes forth.
    pub async fn to(target: SocketAddr, bytes_max: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listener");
        let address = listener.local_addr().expect("address");
        let (carried, cut) = (Arc::new(AtomicU64::new(0)), CancellationToken::new());
        let (counter, token) = (Arc::clone(&carried), cut.clone());
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let far = TcpStream::connect(target).await.expect("target");
                near.set_nodelay(true).and_then(|()| far.set_nodelay(true)).expect("option");
                let (counter, token) = (Arc::clone(&counter), token.clone());
                tokio::spawn(async move {
                    tokio::select! {
                        () = carry(near, far, &counter, bytes_max) => {}
                        () = token.cancelled() => {}
                    }
                });
            }
        });
        Self { address, carried, cut }
    }
}

async fn carry(near: TcpStream, far: TcpStream, counter: &AtomicU64, bytes_max: u64) {
    let (mut near_read, mut near_write) = near.into_split();
    let (mut far_read, mut far_write) = far.into_split();
    let forth = async {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(read) = near_read.read(&mut buffer).await {
            let before = counter.fetch_add(read as u64, Ordering::Relaxed);
            if read == 0
                || before + read as u64 > bytes_max
                || far_write.write_all(&buffer[..read]).await.is_err()
            {
                return;
            }
        }
    };
    let back = async {
        let _ = tokio::io::copy(&mut far_read, &mut near_write).await;
    };
    tokio::select! {
        () = forth => {}
        () = back => {}
    }
}
