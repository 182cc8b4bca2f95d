//! The cluster's authority on disk, and the manager's own certificate in memory.

use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use berth_api::pki::{Authority, CERTIFICATE_DAYS, Identity, RENEW_DAYS_LEFT};
use berth_api::tls::{self, ClientCertificates};
use berth_tlog::SigningKey;
use tokio::sync::watch;

use super::RunError;
use crate::clock::Clock;
use crate::config::ManagerConfig;

/// How old the manager's certificate becomes before it is made anew.
const FRESH_FOR: Duration = Duration::from_secs((CERTIFICATE_DAYS - RENEW_DAYS_LEFT) as u64 * 24 * 3600);
/// How soon it is tried again when that failed.
const RETRY_AFTER: Duration = Duration::from_secs(600);

/// Loads the authority, or makes it at the first start.
pub(super) fn authority(config: &ManagerConfig, clock: &dyn Clock) -> Result<Authority, RunError> {
    make_private_dir(&config.pki_dir())?;
    let (certificate, key) = (config.ca_path(), config.ca_key_path());
    // The certificate is written last: without it nothing has been signed, and the key means nothing.
    if !certificate.exists() {
        let made = Authority::create(unix_seconds(clock))?;
        write_private(&key, made.key_pem.as_bytes())?;
        write_private(&certificate, made.certificate_pem.as_bytes())?;
    } else if !key.exists() {
        return Err(RunError::HalfAuthority { there: certificate, missing: key });
    }
    let identity = Identity { certificate_pem: read(&certificate)?, key_pem: read(&key)? };
    Ok(Authority::load(&identity)?)
}

/// Loads the key that the audit's checkpoints are signed with, or makes it at the first start. The public half is
/// written beside it.
pub(super) fn audit_key(config: &ManagerConfig, origin: &str) -> Result<SigningKey, RunError> {
    let path = config.audit_key_path();
    let key = if path.exists() {
        SigningKey::from_pem(origin, &read(&path)?)?
    } else {
        let made = SigningKey::generate(origin)?;
        write_private(&path, made.to_pem().as_bytes())?;
        made
    };
    write_private(&config.audit_public_key_path(), format!("{}\n", key.public()).as_bytes())?;
    Ok(key)
}

/// The names that the manager's certificate is to be good for.
pub(super) fn names(config: &ManagerConfig, address: SocketAddr) -> Vec<String> {
    let mut names = config.certificate_names.clone();
    if !address.ip().is_unspecified() {
        names.push(address.ip().to_string());
    }
    names.extend(["127.0.0.1".to_owned(), "::1".to_owned()]);
    names.sort();
    names.dedup();
    names
}

/// The manager's certificate, as both ends of TLS need it.
pub(super) struct Certificates {
    authority: Arc<Authority>,
    names: Vec<String>,
    clock: Arc<dyn Clock>,
    server: watch::Sender<Arc<rustls::ServerConfig>>,
    client: watch::Sender<Arc<rustls::ClientConfig>>,
}

impl Certificates {
    /// Makes the first one.
    pub(super) fn issue(
        authority: Arc<Authority>,
        names: Vec<String>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, RunError> {
        let (server, client) = make(&authority, &names, &*clock)?;
        let (server, client) = (watch::Sender::new(server), watch::Sender::new(client));
        Ok(Self { authority, names, clock, server, client })
    }

    /// For connections that come in.
    pub(super) fn server(&self) -> watch::Receiver<Arc<rustls::ServerConfig>> {
        self.server.subscribe()
    }

    /// For connections to agents.
    pub(super) fn client(&self) -> watch::Receiver<Arc<rustls::ClientConfig>> {
        self.client.subscribe()
    }

    /// Makes new ones in time, for ever; connections that stand are not touched.
    pub(super) async fn keep_fresh(&self, tell: impl Fn(&str)) {
        let mut wait = FRESH_FOR;
        loop {
            self.clock.sleep(wait).await;
            match make(&self.authority, &self.names, &*self.clock) {
                Ok((server, client)) => {
                    self.server.send_replace(server);
                    self.client.send_replace(client);
                    tracing::info!("the manager's certificate was renewed");
                    tell(crate::audit::OK);
                    wait = FRESH_FOR;
                }
                Err(error) => {
                    tracing::error!(%error, "the manager's certificate can't be renewed");
                    tell("failed");
                    wait = RETRY_AFTER;
                }
            }
        }
    }
}

type BothEnds = (Arc<rustls::ServerConfig>, Arc<rustls::ClientConfig>);

fn make(authority: &Authority, names: &[String], clock: &dyn Clock) -> Result<BothEnds, RunError> {
    let ca = authority.certificate_pem();
    let identity = authority.issue_manager(names, unix_seconds(clock))?;
    let client = tls::client_config(ca, Some(&identity))?;
    // Machines that join know only the CA's fingerprint: they must be shown the CA itself.
    let chain = Identity { certificate_pem: format!("{}{ca}", identity.certificate_pem), ..identity };
    Ok((tls::server_config(ca, &chain, ClientCertificates::Optional)?, client))
}

fn unix_seconds(clock: &dyn Clock) -> i64 {
    i64::try_from(clock.now().as_millis() / 1000).unwrap_or(i64::MAX)
}

/// Makes a directory that only its owner can enter, if it is not there.
pub(super) fn make_private_dir(path: &Path) -> Result<(), RunError> {
    let failed = |source| RunError::File { doing: "make", path: path.to_owned(), source };
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)
}

/// Writes a file that only its owner can read, whole or not at all.
pub(super) fn write_private(path: &Path, bytes: &[u8]) -> Result<(), RunError> {
    let failed = |source| RunError::File { doing: "write", path: path.to_owned(), source };
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let new = path.with_file_name(name);
    let write = || -> std::io::Result<()> {
        // One that a killed manager left may be there, with whatever mode.
        match std::fs::remove_file(&new) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&new, path)?;
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::File::open(dir)?.sync_all()
    };
    write().map_err(failed)
}

fn read(path: &Path) -> Result<String, RunError> {
    let failed = |source| RunError::File { doing: "read", path: path.to_owned(), source };
    std::fs::read_to_string(path).map_err(failed)
}
