//! Joining a cluster and staying in it, with a manager that does nothing else.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::body::Bytes;
use axum::routing::post;
use axum::{Json, Router};
use berth_agent::clock::Clock;
use berth_agent::identity::{IdentityError, IdentityFiles, Renewal};
use berth_agent::{Enrolment, enrol};
use berth_api::join::{Fingerprint, JoinSecret};
use berth_api::manager::{EnrolReply, EnrolRequest, RenewRequest};
use berth_api::pki::{self, Authority, CERTIFICATE_DAYS};
use berth_api::serve::serve;
use berth_api::tls::{self, ClientCertificates};
use berth_api::transport::BoxFuture;
use berth_model::{HostId, Timestamp};
use tokio::sync::watch;

use crate::support::DEADLINE;

const DAY_MS: u64 = 86_400_000;

fn now_s() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("time");
    i64::try_from(now.as_secs()).expect("seconds")
}

struct Manager {
    address: SocketAddr,
    authority: Arc<Authority>,
    _stop: watch::Sender<bool>,
}

impl Manager {
    async fn start() -> Self {
        let authority = Arc::new(Authority::load(&Authority::create(now_s()).expect("CA")).expect("own CA"));
        let mut identity = authority.issue_manager(&[], now_s()).expect("manager");
        identity.certificate_pem.push_str(authority.certificate_pem());
        let config = tls::server_config(authority.certificate_pem(), &identity, ClientCertificates::Optional);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("port");
        let address = listener.local_addr().expect("address");
        let host = HostId::from_entropy([7; 10]);
        let sign = {
            let authority = Arc::clone(&authority);
            move |csr: &str| EnrolReply {
                host: host.clone(),
                certificate_pem: authority.sign_host(csr, &host, now_s()).expect("signed"),
                ca_pem: authority.certificate_pem().to_owned(),
            }
        };
        let renew = sign.clone();
        let router = Router::new()
            .route(
                "/v1/enrol",
                post(move |body: Bytes| async move {
                    let request: EnrolRequest = serde_json::from_slice(&body).expect("request");
                    Json(sign(&request.csr_pem))
                }),
            )
            .route(
                "/v1/certificate",
                post(move |body: Bytes| async move {
                    let request: RenewRequest = serde_json::from_slice(&body).expect("request");
                    Json(renew(&request.csr_pem))
                }),
            );
        let (stop, stopped) = watch::channel(false);
        let (_, tls) = watch::channel(config.expect("TLS"));
        tokio::spawn(serve(listener, tls, router, stopped));
        Self { address, authority, _stop: stop }
    }

    fn token(&self) -> String {
        let ca = Fingerprint::of_pem(self.authority.certificate_pem()).expect("own CA");
        JoinSecret { ca, secret: [5; 32] }.to_string()
    }
}

fn enrolment(manager: &Manager, token: String, root: &std::path::Path) -> Enrolment {
    Enrolment {
        manager: manager.address.to_string(),
        token,
        name: "h1".parse().expect("name"),
        address: "127.0.0.1:7443".into(),
        state_dir: root.to_owned(),
    }
}

/// A clock that somebody has put forward.
struct Forward(AtomicU64);

impl Clock for Forward {
    fn now(&self) -> Timestamp {
        let now = u64::try_from(now_s()).expect("seconds") * 1000;
        Timestamp::from_millis(now + self.0.load(Ordering::Relaxed))
    }

    fn sleep_until(&self, _instant: Timestamp) -> BoxFuture<'static, ()> {
        Box::pin(std::future::pending())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_joins_and_later_renews_by_itself() {
    let manager = Manager::start().await;
    let root = tempfile::tempdir().expect("directory");
    let host = enrol(&enrolment(&manager, manager.token(), root.path())).await.expect("joined");
    let files = IdentityFiles::new(root.path().join("identity"));
    let joined = files.load().expect("identity");
    assert_eq!(joined.host, host);
    for (days, renews) in [(0, false), (u64::try_from(CERTIFICATE_DAYS).expect("days") - 15, true)] {
        let clock = Arc::new(Forward(AtomicU64::new(days * DAY_MS)));
        let present = files.load().expect("identity");
        let renewal = Renewal::new(files.clone(), manager.address.to_string(), clock, present);
        let (renewal, mut credentials) = renewal.expect("TLS");
        credentials.server.mark_unchanged();
        let running = tokio::spawn(renewal.run());
        let changed = tokio::time::timeout(
            if renews { DEADLINE } else { std::time::Duration::from_millis(300) },
            credentials.server.changed(),
        );
        assert_eq!(changed.await.is_ok(), renews);
        running.abort();
    }
    let renewed = files.load().expect("identity");
    assert_eq!(renewed.host, host);
    assert_ne!(renewed.identity.key_pem, joined.identity.key_pem, "a renewal makes a new key");
    assert!(pki::expires_unix_s(&renewed.identity.certificate_pem).is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_impostor_does_not_get_the_secret() {
    let (manager, impostor) = (Manager::start().await, Manager::start().await);
    let root = tempfile::tempdir().expect("directory");
    let refused = enrol(&enrolment(&impostor, manager.token(), root.path())).await.expect_err("an impostor");
    assert!(matches!(refused, IdentityError::Manager(_)), "{refused}");
    assert!(!root.path().join("identity").exists());
}
