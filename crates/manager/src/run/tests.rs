//! A real manager: its own files, a real socket, real TLS.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use berth_api::endpoint::Nothing;
use berth_api::join::JoinSecret;
use berth_api::manager::{
    AuditExport, AuditExportQuery, AuditKeyShow, CertificateRenew, CreateJoinToken, EnrolRequest, HealthShow,
    HostEnrol, HostList, JoinTokenCreate, PageQuery, RenewRequest, WhoAmIShow,
};
use berth_api::pki::{self, Authority, Identity, MANAGER_NAME};
use berth_api::transport::TlsTransport;
use berth_api::{Client, ClientError, tls};
use berth_model::ProblemCode;
use berth_tlog::export::Question;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::*;

mod console;
mod schemathesis;

struct Running {
    address: String,
    ca_pem: String,
    secret: Option<String>,
    stop: watch::Sender<bool>,
    serving: JoinHandle<Result<(), RunError>>,
}

fn config(dir: &Path) -> ManagerConfig {
    ManagerConfig {
        listen: ([127, 0, 0, 1], 0).into(),
        state_dir: dir.join("state"),
        first_token_file: Some(dir.join("first-token")),
        ..ManagerConfig::default()
    }
}

async fn start(dir: &Path) -> Running {
    serve(bind(config(dir)).await.expect("a manager"), dir)
}

fn serve(bound: Bound, dir: &Path) -> Running {
    let (stop, stopped) = watch::channel(false);
    let (address, ca_pem) = (bound.address().to_string(), bound.ca_pem().to_owned());
    let secret = std::fs::read_to_string(dir.join("first-token")).ok().map(|text| text.trim().to_owned());
    Running { address, ca_pem, secret, stop, serving: tokio::spawn(bound.serve(stopped)) }
}

impl Running {
    fn client(&self, config: Arc<rustls::ClientConfig>) -> Client {
        let name = tls::server_name(MANAGER_NAME).expect("a name");
        Client::new(Arc::new(TlsTransport::new(self.address.clone(), name, config)))
    }

    fn user(&self) -> Client {
        let config = tls::client_config(&self.ca_pem, None).expect("TLS");
        self.client(config).with_token(self.secret.as_deref().expect("a first start"))
    }

    async fn end(self) {
        self.stop.send_replace(true);
        tokio::time::timeout(Duration::from_secs(20), self.serving)
            .await
            .expect("it ends")
            .expect("no panic")
            .expect("a clean end");
    }
}

fn code(error: ClientError) -> ProblemCode {
    error.into_problem().code
}

#[tokio::test]
async fn a_manager_over_tls_from_its_first_start_to_its_second() {
    let dir = tempfile::tempdir().expect("a directory");
    let first = start(dir.path()).await;
    let me = first.user().call::<WhoAmIShow>(&Nothing {}, &Nothing {}, &()).await.expect("who");
    assert_eq!(me.user.as_str(), "admin");
    let stranger = first.client(tls::client_config(&first.ca_pem, None).expect("TLS"));
    assert!(stranger.call::<HealthShow>(&Nothing {}, &Nothing {}, &()).await.is_ok());
    let refused = stranger.call::<HostList>(&Nothing {}, &PageQuery::default(), &()).await;
    assert_eq!(code(refused.expect_err("no token")), ProblemCode::Unauthenticated);
    for (file, mode) in
        [("state", 0o700), ("state/pki", 0o700), ("state/pki/ca.key", 0o600), ("first-token", 0o600)]
    {
        let found = std::fs::metadata(dir.path().join(file)).expect("there").permissions().mode() & 0o777;
        assert_eq!(found, mode, "{file}");
    }
    let (secret, ca_pem) = (first.secret.clone(), first.ca_pem.clone());
    first.end().await;

    std::fs::remove_file(dir.path().join("first-token")).expect("read and removed");
    let mut second = start(dir.path()).await;
    assert_eq!(second.secret, None, "it is shown once");
    assert_eq!(second.ca_pem, ca_pem, "the same cluster");
    second.secret = secret;
    assert!(second.user().call::<WhoAmIShow>(&Nothing {}, &Nothing {}, &()).await.is_ok());
    second.end().await;
}

#[tokio::test]
async fn a_machine_joins_by_the_tokens_fingerprint_and_renews_by_its_certificate() {
    let dir = tempfile::tempdir().expect("a directory");
    let running = start(dir.path()).await;
    let wish = CreateJoinToken { expires_s: None };
    let token =
        running.user().call::<JoinTokenCreate>(&Nothing {}, &Nothing {}, &wish).await.expect("a token");
    let secret: JoinSecret = token.token.parse().expect("a join token");

    let impostor = Authority::load(&Authority::create(1_795_352_752).expect("a CA")).expect("a CA");
    let wrong = Fingerprint::of_pem(impostor.certificate_pem()).expect("a fingerprint");
    let misled = running.client(tls::pinned_client_config(wrong).expect("TLS"));
    assert!(
        misled.call::<HealthShow>(&Nothing {}, &Nothing {}, &()).await.is_err(),
        "not the CA of the token"
    );

    let joining = running.client(tls::pinned_client_config(secret.ca).expect("TLS"));
    let (key_pem, csr_pem) = pki::signing_request().expect("a request");
    let wish = EnrolRequest {
        token: token.token,
        name: "box".parse().expect("a name"),
        address: "127.0.0.1:8444".to_owned(),
        csr_pem: csr_pem.clone(),
    };
    let reply = joining.call::<HostEnrol>(&Nothing {}, &Nothing {}, &wish).await.expect("joined");
    let identity = Identity { certificate_pem: reply.certificate_pem, key_pem };
    let host = running.client(tls::client_config(&reply.ca_pem, Some(&identity)).expect("TLS"));
    let wish = RenewRequest { csr_pem };
    let renewed = host.call::<CertificateRenew>(&Nothing {}, &Nothing {}, &wish).await;
    assert_eq!(renewed.expect("renewed").host, reply.host);
    let refused = host.call::<HostList>(&Nothing {}, &PageQuery::default(), &()).await;
    assert_eq!(code(refused.expect_err("a host is no user")), ProblemCode::NotAllowed);
    let refused = running.user().call::<CertificateRenew>(&Nothing {}, &Nothing {}, &wish).await;
    assert_eq!(code(refused.expect_err("a user is no host")), ProblemCode::NotAllowed);
    running.end().await;
}

#[tokio::test]
async fn half_an_authority_stops_the_start_and_is_left_as_it_is() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = config(dir.path());
    bind(config.clone()).await.expect("a first start").store.close().await;
    std::fs::remove_file(config.ca_key_path()).expect("lost");
    let error = bind(config.clone()).await.err().expect("refused");
    assert!(matches!(error, RunError::HalfAuthority { .. }), "{error}");
    assert!(config.ca_path().exists());
}

#[tokio::test]
async fn a_start_that_died_before_its_ca_was_whole_is_made_anew() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = config(dir.path());
    certificates::make_private_dir(&config.pki_dir()).expect("a directory");
    std::fs::write(config.ca_key_path(), "half a key").expect("written");
    std::fs::write(config.pki_dir().join("ca.key.new"), "left behind").expect("written");
    let bound = bind(config).await.expect("a manager");
    assert!(bound.ca_pem().contains("BEGIN CERTIFICATE"));
}

#[tokio::test]
async fn the_audits_key_is_for_its_owner_alone_and_its_log_goes_on_after_a_restart() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = config(dir.path());
    let mut known = None;
    for _ in 0..3 {
        let running = start(dir.path()).await;
        let mode = std::fs::metadata(config.audit_key_path()).expect("a key").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let key = std::fs::read_to_string(config.audit_public_key_path()).expect("its public half");
        let shown = running.user().call::<AuditKeyShow>(&Nothing {}, &Nothing {}, &()).await.expect("shown");
        assert_eq!(shown.key, key.trim());
        let query = AuditExportQuery::default();
        let export = running.user().download::<AuditExport>(&Nothing {}, &query).await.expect("an export");
        let bytes = http_body_util::BodyExt::collect(export.into_body()).await.expect("whole").to_bytes();
        let question = Question { keys: vec![key.parse().expect("a key")], known: known.take() };
        let found = berth_tlog::export::verify(&bytes[..], &question).expect("as it was logged");
        assert!(found.is_whole() && found.contains_known != Some(false));
        known = Some(found.checkpoint);
        running.end().await;
    }
    assert!(known.expect("some").size > 2, "what was logged before is there");
}

#[tokio::test]
async fn an_address_that_is_taken_is_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let listen = taken.local_addr().expect("an address");
    let error = bind(ManagerConfig { listen, ..config(dir.path()) }).await.err().expect("refused");
    assert_eq!(error.to_string(), format!("can't listen on {listen}"));
}

#[tokio::test(start_paused = true)]
async fn the_managers_certificate_is_renewed_by_itself_before_it_ends() {
    let clock = Arc::new(SystemClock);
    let authority = Arc::new(Authority::load(&Authority::create(0).expect("a CA")).expect("a CA"));
    let certificates = Certificates::issue(authority, Vec::new(), clock).expect("a certificate");
    let (mut server, mut client) = (certificates.server(), certificates.client());
    let (first, start) = (Arc::clone(&server.borrow()), tokio::time::Instant::now());
    let renewed = async {
        server.changed().await.expect("a new one");
        client.changed().await.expect("a new one");
    };
    tokio::select! {
        () = certificates.keep_fresh(|_| ()) => unreachable!("it goes on for ever"),
        () = renewed => {}
    }
    assert!(!Arc::ptr_eq(&first, &server.borrow()));
    let days = start.elapsed().as_secs() / (24 * 3600);
    assert!(days < u64::try_from(pki::CERTIFICATE_DAYS).expect("a length") / 2, "{days} days");
}
