//! A manager with a login configuration, and a client without a browser.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use berth_api::transport::{self, TlsTransport};
use berth_api::{Transport, pki, tls};
use berth_manager::ManagerConfig;
use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::watch;

/// Longest wait for a server to come up.
pub const UP_WITHIN: Duration = Duration::from_secs(30);

/// Certificates for servers on the loopback.
pub struct Authority {
    pub dir: TempDir,
    pub ca_pem: String,
}

impl Authority {
    /// A CA and one certificate for `localhost` of it, in files.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let ca_key = rcgen::KeyPair::generate().expect("a key");
        let mut ca = rcgen::CertificateParams::new(Vec::new()).expect("parameters");
        ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        ca.distinguished_name.push(rcgen::DnType::CommonName, "the test's own");
        let certificate = ca.self_signed(&ca_key).expect("a CA");
        let issuer = rcgen::Issuer::new(ca, ca_key);
        let key = rcgen::KeyPair::generate().expect("a key");
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let leaf = rcgen::CertificateParams::new(names).expect("parameters");
        let leaf = leaf.signed_by(&key, &issuer).expect("a certificate");
        let this = Self { dir, ca_pem: certificate.pem() };
        this.write("ca.pem", &this.ca_pem);
        this.write("server.pem", &leaf.pem());
        this.write("server.key", &key.serialize_pem());
        this
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a file that only its owner can read.
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        write_private(&self.path(name), text)
    }
}

pub fn write_private(path: &Path, text: &str) -> PathBuf {
    fs::write(path, text).expect("written");
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).expect("set");
    path.to_owned()
}

/// A manager with a socket.
pub struct World {
    _dir: TempDir,
    _stop: watch::Sender<bool>,
    transport: Arc<TlsTransport>,
    admin: String,
}

/// What was answered.
pub struct Got {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Got {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }
}

/// A free port of the loopback. Somebody else may take it before its user does: who starts a server tries again.
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    listener.local_addr().expect("an address").port()
}

impl World {
    /// A manager on this port with this `login.toml`.
    pub async fn new(port: u16, login_toml: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let path = write_private(&dir.path().join("login.toml"), login_toml);
        let token_file = dir.path().join("token");
        let config = ManagerConfig {
            listen: ([127, 0, 0, 1], port).into(),
            state_dir: dir.path().join("state"),
            first_token_file: Some(token_file.clone()),
            login: Some(path),
            ..ManagerConfig::default()
        };
        let bound = berth_manager::run::bind(config).await.expect("a manager");
        let address = bound.address().to_string();
        let name = tls::server_name(pki::MANAGER_NAME).expect("a name");
        let client = tls::client_config(bound.ca_pem(), None).expect("TLS");
        let transport = Arc::new(TlsTransport::new(address, name, client));
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(bound.serve(stopped));
        let admin = fs::read_to_string(token_file).expect("the first token").trim().to_owned();
        Self { _dir: dir, _stop: stop, transport, admin }
    }

    pub async fn ask(&self, method: &str, path: &str, token: Option<&str>, body: Value) -> Got {
        let mut request = Request::builder().method(method).uri(path);
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let body = if body.is_null() { String::new() } else { body.to_string() };
        self.send(request.body(transport::full(body)).expect("a request")).await
    }

    pub async fn send(&self, request: Request<transport::Body>) -> Got {
        got(&*self.transport, request).await
    }

    pub async fn admin(&self, method: &str, path: &str, body: Value) -> Value {
        let got = self.ask(method, path, Some(&self.admin), body).await;
        assert!(got.status.is_success(), "{method} {path}: {}", got.json());
        got.json()
    }

    pub async fn login(&self, body: Value) -> Got {
        self.ask("POST", "/v1/login", None, body).await
    }

    /// Who a session says one is.
    pub async fn whoami(&self, reply: &Value) -> Value {
        let secret = reply["session"]["secret"].as_str().unwrap_or_else(|| panic!("no session: {reply}"));
        self.ask("GET", "/v1/whoami", Some(secret), json!(null)).await.json()
    }

    pub async fn user(&self, name: &str) -> Value {
        self.admin("GET", &format!("/v1/users/{name}"), json!(null)).await
    }
}

pub async fn got(transport: &dyn Transport, request: Request<transport::Body>) -> Got {
    let response = transport.send(request).await.expect("an answer");
    let (parts, body) = response.into_parts();
    let body = body.collect().await.expect("a whole answer").to_bytes();
    Got { status: parts.status, headers: parts.headers, body }
}
