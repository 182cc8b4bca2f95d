//! Who this host is, by its certificate: joined once, renewed by itself.
//!
//! Three files in the state directory: `key.pem`, `cert.pem`, `ca.pem`. A renewal makes a new key. It is written
//! beside the old one first, then the certificate for it, and last it takes the old one's place; whenever that is
//! cut short, one of the two keys fits the certificate, and that one is used.

use std::path::PathBuf;
use std::sync::Arc;

use berth_api::endpoint::Nothing;
use berth_api::join::{Fingerprint, JoinSecret};
use berth_api::manager::{CertificateRenew, EnrolReply, EnrolRequest, HostEnrol, RenewRequest};
use berth_api::pki::{self, Identity, MANAGER_NAME, Peer, PkiError, RENEW_DAYS_LEFT};
use berth_api::tls::{self, ClientCertificates, TlsError};
use berth_api::transport::TlsTransport;
use berth_api::{Client, ClientError};
use berth_model::HostId;
use berth_model::name::Name;
use tokio::sync::watch;

use crate::clock::Clock;
use crate::durable::{self, FileError};
use crate::services::PeerConnector;

/// How often the certificate's age is looked at, in milliseconds.
const LOOK_EVERY_MS: u64 = 3600 * 1000;
/// After a renewal that failed, in milliseconds. There are weeks to try in.
const RETRY_AFTER_MS: u64 = 600 * 1000;
const DAY_SECONDS: i64 = 86_400;
const SECRET_MODE: u32 = 0o600;

/// An identity that can't be had.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// This machine is no host of a cluster.
    #[error("this machine has not joined a cluster: {} is missing", missing.display())]
    NotJoined {
        /// The file that is not there.
        missing: PathBuf,
    },
    /// A file can't be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// Key, certificate and CA don't go together.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The certificate is not of this cluster's form.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// It is somebody else's.
    #[error("the certificate is not a host's")]
    NotAHost,
    /// The join token is not one.
    #[error("the join token can't be used")]
    Token(#[source] berth_api::join::JoinSecretError),
    /// The manager gave a CA that is not the token's.
    #[error("the manager's answer has another CA than the join token")]
    OtherCa,
    /// The manager refused, or could not be asked.
    #[error("the manager did not give a certificate")]
    Manager(#[source] Box<ClientError>),
}

/// Key, certificate and CA of this host.
#[derive(Clone)]
pub struct HostIdentity {
    /// Who this host is.
    pub host: HostId,
    /// Key and certificate.
    pub identity: Identity,
    /// The cluster's CA.
    pub ca_pem: String,
}

/// Where the three files are.
#[derive(Debug, Clone)]
pub struct IdentityFiles {
    directory: PathBuf,
}

impl IdentityFiles {
    /// In this directory.
    pub const fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    fn key(&self) -> PathBuf {
        self.directory.join("key.pem")
    }

    fn next_key(&self) -> PathBuf {
        self.directory.join("key.next.pem")
    }

    fn certificate(&self) -> PathBuf {
        self.directory.join("cert.pem")
    }

    fn ca(&self) -> PathBuf {
        self.directory.join("ca.pem")
    }

    /// Reads them.
    ///
    /// # Errors
    /// When they are not there, or don't go together.
    pub fn load(&self) -> Result<HostIdentity, IdentityError> {
        let certificate_pem = read(self.certificate())?;
        let ca_pem = read(self.ca())?;
        let mut outcome = Err(IdentityError::NotJoined { missing: self.key() });
        for path in [self.key(), self.next_key()] {
            let Ok(key_pem) = read(path) else { continue };
            let identity = Identity { certificate_pem: certificate_pem.clone(), key_pem };
            match tls::server_config(&ca_pem, &identity, ClientCertificates::Required) {
                Ok(_) => {
                    outcome = Ok(identity);
                    break;
                }
                Err(error) => outcome = Err(error.into()),
            }
        }
        let identity = outcome?;
        Ok(HostIdentity { host: holder(&identity)?, identity, ca_pem })
    }

    /// Writes a new key with its certificate.
    ///
    /// # Errors
    /// When the system refuses; the old ones or the new ones are then in use, whole.
    pub fn store(&self, new: &HostIdentity) -> Result<(), FileError> {
        use std::os::unix::fs::PermissionsExt;
        std::fs::create_dir_all(&self.directory).map_err(FileError::io(&self.directory, "made"))?;
        let mode = std::fs::Permissions::from_mode(0o700);
        std::fs::set_permissions(&self.directory, mode).map_err(FileError::io(&self.directory, "closed"))?;
        durable::write(&self.ca(), new.ca_pem.as_bytes(), 0o644)?;
        durable::write(&self.next_key(), new.identity.key_pem.as_bytes(), SECRET_MODE)?;
        durable::write(&self.certificate(), new.identity.certificate_pem.as_bytes(), 0o644)?;
        std::fs::rename(self.next_key(), self.key()).map_err(FileError::io(&self.key(), "replaced"))?;
        durable::sync_parent(&self.key())
    }
}

fn read(path: PathBuf) -> Result<String, IdentityError> {
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(IdentityError::NotJoined { missing: path })
        }
        Err(error) => Err(FileError::io(&path, "read")(error).into()),
    }
}

fn holder(identity: &Identity) -> Result<HostId, IdentityError> {
    use rustls::pki_types::CertificateDer;
    use rustls::pki_types::pem::PemObject;
    let certificate = CertificateDer::from_pem_slice(identity.certificate_pem.as_bytes())
        .map_err(|source| TlsError::Pem { what: "the certificate", source })?;
    match pki::peer_of(&certificate)? {
        Peer::Host(host) => Ok(host),
        Peer::Manager | Peer::Anonymous => Err(IdentityError::NotAHost),
    }
}

/// What a machine needs to join a cluster.
#[derive(Debug, Clone)]
pub struct Enrolment {
    /// The manager, `host:port`.
    pub manager: String,
    /// The join token.
    pub token: String,
    /// The host's name to be.
    pub name: Name,
    /// Where its agent will listen, as others reach it.
    pub address: String,
    /// Where the agent keeps its state.
    pub state_dir: PathBuf,
}

/// Joins a cluster: asks the manager for a certificate and writes it down. The key never leaves this machine, and the
/// token's secret goes to nobody but the manager whose CA the token names.
///
/// # Errors
/// When the manager refuses or can't be asked, or the files can't be written.
pub async fn enrol(enrolment: &Enrolment) -> Result<HostId, IdentityError> {
    let secret: JoinSecret = enrolment.token.parse().map_err(IdentityError::Token)?;
    let config = tls::pinned_client_config(secret.ca)?;
    let transport = TlsTransport::new(enrolment.manager.clone(), tls::server_name(MANAGER_NAME)?, config);
    let (key_pem, csr_pem) = pki::signing_request()?;
    let request = EnrolRequest {
        token: enrolment.token.trim().to_owned(),
        name: enrolment.name.clone(),
        address: enrolment.address.clone(),
        csr_pem,
    };
    let reply = Client::new(Arc::new(transport)).call::<HostEnrol>(&Nothing {}, &Nothing {}, &request).await;
    let new = received(key_pem, reply.map_err(|error| IdentityError::Manager(Box::new(error)))?)?;
    if Fingerprint::of_pem(&new.ca_pem)? != secret.ca {
        return Err(IdentityError::OtherCa);
    }
    IdentityFiles::new(enrolment.state_dir.join("identity")).store(&new)?;
    Ok(new.host)
}

/// What the manager gave, if it goes together with the key.
fn received(key_pem: String, reply: EnrolReply) -> Result<HostIdentity, IdentityError> {
    let identity = Identity { certificate_pem: reply.certificate_pem, key_pem };
    tls::server_config(&reply.ca_pem, &identity, ClientCertificates::Required)?;
    if holder(&identity)? != reply.host {
        return Err(IdentityError::NotAHost);
    }
    Ok(HostIdentity { host: reply.host, identity, ca_pem: reply.ca_pem })
}

/// Both sides' TLS set-up from the certificate of the day.
#[derive(Clone)]
pub struct Credentials {
    /// For answering.
    pub server: watch::Receiver<Arc<rustls::ServerConfig>>,
    /// For asking.
    pub client: watch::Receiver<Arc<rustls::ClientConfig>>,
}

/// Keeps the certificate young.
pub struct Renewal {
    files: IdentityFiles,
    manager: String,
    clock: Arc<dyn Clock>,
    present: HostIdentity,
    server: watch::Sender<Arc<rustls::ServerConfig>>,
    client: watch::Sender<Arc<rustls::ClientConfig>>,
}

impl Renewal {
    /// Sets TLS up with the present certificate.
    ///
    /// # Errors
    /// When it can't be.
    pub fn new(
        files: IdentityFiles,
        manager: String,
        clock: Arc<dyn Clock>,
        present: HostIdentity,
    ) -> Result<(Self, Credentials), IdentityError> {
        let (server, client) = configs(&present)?;
        let (server, client) = (watch::Sender::new(server), watch::Sender::new(client));
        let credentials = Credentials { server: server.subscribe(), client: client.subscribe() };
        Ok((Self { files, manager, clock, present, server, client }, credentials))
    }

    /// Renews when it is time, until it is dropped.
    pub async fn run(mut self) {
        loop {
            let wait_ms = match self.renew_if_due().await {
                Ok(()) => LOOK_EVERY_MS,
                Err(error) => {
                    let error = durable::with_causes(&error);
                    tracing::warn!(error, "the certificate could not be renewed; it is tried again");
                    RETRY_AFTER_MS
                }
            };
            self.clock.sleep_until(self.clock.now().plus_millis(wait_ms)).await;
        }
    }

    async fn renew_if_due(&mut self) -> Result<(), IdentityError> {
        let now_s = i64::try_from(self.clock.now().as_millis() / 1000).unwrap_or(i64::MAX);
        let ends_s = pki::expires_unix_s(&self.present.identity.certificate_pem)?;
        if ends_s - now_s > RENEW_DAYS_LEFT * DAY_SECONDS {
            return Ok(());
        }
        let config = Arc::clone(&self.client.borrow());
        let transport = TlsTransport::new(self.manager.clone(), tls::server_name(MANAGER_NAME)?, config);
        let (key_pem, csr_pem) = pki::signing_request()?;
        let client = Client::new(Arc::new(transport));
        let reply =
            client.call::<CertificateRenew>(&Nothing {}, &Nothing {}, &RenewRequest { csr_pem }).await;
        let new = received(key_pem, reply.map_err(|error| IdentityError::Manager(Box::new(error)))?)?;
        if new.host != self.present.host {
            return Err(IdentityError::NotAHost);
        }
        let (server, client) = configs(&new)?;
        self.files.store(&new)?;
        self.server.send_replace(server);
        self.client.send_replace(client);
        self.present = new;
        tracing::info!("the certificate was renewed");
        Ok(())
    }
}

type Configs = (Arc<rustls::ServerConfig>, Arc<rustls::ClientConfig>);

fn configs(host: &HostIdentity) -> Result<Configs, IdentityError> {
    let server = tls::server_config(&host.ca_pem, &host.identity, ClientCertificates::Required)?;
    Ok((server, tls::client_config(&host.ca_pem, Some(&host.identity))?))
}

/// Reaches other hosts with the certificate of the day.
pub struct TlsPeers {
    client: watch::Receiver<Arc<rustls::ClientConfig>>,
}

impl TlsPeers {
    /// With these credentials.
    pub fn new(credentials: &Credentials) -> Self {
        Self { client: credentials.client.clone() }
    }
}

impl PeerConnector for TlsPeers {
    fn connect(&self, host: &HostId, address: &str) -> Client {
        let name = tls::server_name(&pki::host_name(host)).expect("host ids can be in names");
        let config = Arc::clone(&self.client.borrow());
        Client::new(Arc::new(TlsTransport::new(address.to_owned(), name, config)))
    }
}

#[cfg(test)]
mod tests;
