//! A manager from its start to its end.
//!
//! [`Manager`] is one without a socket: a store, handles to the world, and a router that answers requests; tests and
//! simulations use it directly. [`bind`] makes a real one: the store's file, the cluster's certificate authority, a
//! certificate of its own that is made anew at each start and whenever it gets old, and a listener. Its key never
//! touches the disk.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use berth_api::join::Fingerprint;
use berth_api::manager::Approval;
use berth_api::pki::PkiError;
use berth_api::tls::TlsError;
use berth_model::Problem;
use berth_store::{Revision, SqliteStore, Store};
use berth_tlog::SigningKey;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::agents::TlsConnector;
use crate::audit::forward::{self, ForwardError, Forwarder};
use crate::audit::{Audit, AuditError, OtherKey};
use crate::auth::accounts::JoinTokenRow;
use crate::auth::session;
use crate::auth::settings::{LoginSettings, SettingsError};
use crate::clock::{SystemClock, SystemEntropy};
use crate::cluster::{Cluster, Settings};
use crate::config::ManagerConfig;
use crate::door::{Door, Gate};
use crate::http;
use crate::metrics::Metrics;
use crate::operations::OperationRow;
use crate::policy::{Policies, PolicyError};
use crate::reconcile::schedules;
use crate::records::{RecordsError, Transaction};

mod certificates;
mod first_start;

pub use crate::cluster::Parts;
pub use first_start::FirstStart;

use certificates::Certificates;

/// How often what is out of date is removed, and how long the store's history is kept for those who follow it.
const TIDY_EVERY: Duration = Duration::from_secs(3600);
/// How often it is checked that the store still works.
const STORE_CHECK_EVERY: Duration = Duration::from_secs(5);

/// Why a manager could not start, or could not go on.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A file or directory.
    #[error("can't {doing} {}", path.display())]
    File {
        /// What was tried, as in "can't read …".
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The CA is only half there.
    #[error("{} is there, and {} is not: put it back from a backup", there.display(), missing.display())]
    HalfAuthority {
        /// What is there.
        there: PathBuf,
        /// What is not.
        missing: PathBuf,
    },
    /// The address can't be listened on.
    #[error("can't listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The store can't be opened, or has failed.
    #[error("the store can't be used")]
    Store(#[from] berth_store::Error),
    /// The records can't be read.
    #[error("the cluster's records can't be read")]
    Records(#[from] RecordsError),
    /// The audit can't be read or written.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The policies are faulty.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// Where the audit is to be sent on to.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// The audit's key.
    #[error("the audit's key can't be used")]
    AuditKey(#[from] berth_tlog::note::KeyError),
    /// Keys or certificates.
    #[error("the cluster's certificates can't be used")]
    Pki(#[from] PkiError),
    /// How people log in.
    #[error(transparent)]
    Login(#[from] SettingsError),
    /// TLS.
    #[error("TLS can't be set up")]
    Tls(#[from] TlsError),
    /// An operation that was under way can't be understood.
    #[error("what was under way can't be gone on with: {0}")]
    Resume(Problem),
}

/// A manager without a socket.
pub struct Manager {
    gate: Arc<Gate>,
    router: Router,
}

impl Manager {
    /// Reads the records and sets up the door. Nothing is begun before [`Self::start`].
    ///
    /// # Errors
    /// When the records can't be read, or the policies are faulty.
    pub async fn new(parts: Parts) -> Result<Self, RunError> {
        let (store, clock) = (Arc::clone(&parts.store), Arc::clone(&parts.clock));
        let ca = Fingerprint::of_pem(parts.authority.certificate_pem())?;
        let (key, other_key) = match (&parts.settings.audit_key, parts.settings.audit_new_key) {
            (Some(key), false) => (Arc::clone(key), OtherKey::Refused),
            (Some(key), true) => (Arc::clone(key), OtherKey::Accepted),
            (None, _) => (Arc::new(SigningKey::generate(&audit_origin(ca))?), OtherKey::Accepted),
        };
        let cluster = Cluster::open(parts).await?;
        let audit = Audit::open(store, clock, key, other_key).await?;
        cluster.write_down_in(audit.clone());
        let metrics = Arc::new(Metrics::new().with_all_kinds());
        let policies = Policies::open(Arc::clone(&cluster))?;
        let gate = Arc::new(Gate::new(cluster, policies, audit, metrics, ca));
        let router = http::mount(Door::new(Arc::clone(&gate))).into_router();
        Ok(Self { gate, router })
    }

    /// Goes on with what was under way, and begins to look after hosts and VMs.
    ///
    /// # Errors
    /// When an operation's record can't be understood.
    pub async fn start(&self) -> Result<(), RunError> {
        let cluster = &self.gate.cluster;
        let from = cluster.records.store().revision().await?.next();
        cluster.spawn(count_operations(Arc::clone(cluster), Arc::clone(&self.gate.metrics), from));
        cluster.spawn(tidy(Arc::clone(cluster)));
        cluster.start().map_err(RunError::Resume)?;
        cluster.spawn(schedules::keep(Arc::clone(&self.gate)));
        Ok(())
    }

    /// What has to be made at the very first start; none: it has been.
    pub fn first_start(&self) -> Option<FirstStart> {
        first_start::prepare(&self.gate.cluster)
    }

    /// What answers requests. Each must carry a [`berth_api::serve::Caller`] as an extension.
    pub fn router(&self) -> Router {
        self.router.clone()
    }

    /// Begins to send audit records on.
    pub fn forward(&self, forwarders: Vec<Forwarder>) {
        for forwarder in forwarders {
            let running = forwarder.run(self.gate.audit.clone(), Arc::clone(&self.gate.metrics));
            self.gate.cluster.spawn(running);
        }
    }

    /// The cluster.
    pub fn cluster(&self) -> &Arc<Cluster> {
        &self.gate.cluster
    }

    /// What the door needs to judge requests.
    pub const fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// The audit.
    pub fn audit(&self) -> &Audit {
        &self.gate.audit
    }

    /// Drops everything that is under way, and writes down what has ended.
    pub async fn shutdown(&self) {
        self.gate.cluster.shutdown().await;
        self.gate.audit.flush().await;
    }
}

/// A manager that listens and does not answer yet.
pub struct Bound {
    manager: Manager,
    store: Arc<SqliteStore>,
    listener: TcpListener,
    address: SocketAddr,
    certificates: Certificates,
    forwarders: Vec<Forwarder>,
}

/// Opens the store, makes or loads the certificates, makes the first administrator if there is none, and listens.
///
/// # Errors
/// When any of that fails; nothing is left half made that the next start could not go on with.
pub async fn bind(config: ManagerConfig) -> Result<Bound, RunError> {
    let login = config.login.as_deref().map(LoginSettings::load).transpose()?.unwrap_or_default();
    let forwarders = forward::prepare(&config.audit)?;
    certificates::make_private_dir(&config.state_dir)?;
    let steady = Arc::new(berth_store::SystemClock::new());
    let store = Arc::new(SqliteStore::open(config.store_path(), steady).await?);
    let listener = TcpListener::bind(config.listen)
        .await
        .map_err(|source| RunError::Listen { address: config.listen, source })?;
    let address =
        listener.local_addr().map_err(|source| RunError::Listen { address: config.listen, source })?;
    let clock = Arc::new(SystemClock);
    let authority = Arc::new(certificates::authority(&config, &*clock)?);
    let origin = audit_origin(Fingerprint::of_pem(authority.certificate_pem())?);
    let audit_key = certificates::audit_key(&config, &origin)?;
    let names = certificates::names(&config, address);
    let certificates = Certificates::issue(Arc::clone(&authority), names, clock.clone())?;
    let manager = Manager::new(Parts {
        store: Arc::<SqliteStore>::clone(&store),
        connector: Arc::new(TlsConnector::new(certificates.client())),
        clock,
        entropy: Arc::new(SystemEntropy),
        authority,
        settings: Settings {
            addresses: config.addresses,
            login,
            audit_key: Some(Arc::new(audit_key)),
            audit_new_key: config.audit.accept_new_key,
        },
    })
    .await?;
    if let Some(first) = manager.first_start() {
        first_start::announce(&first, config.first_token_file.as_deref())?;
        first.commit(manager.cluster()).await?;
    }
    Ok(Bound { manager, store, listener, address, certificates, forwarders })
}

impl Bound {
    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// The CA's certificate in PEM: what clients have to trust.
    pub fn ca_pem(&self) -> &str {
        self.manager.cluster().authority.certificate_pem()
    }

    /// The manager itself.
    pub const fn manager(&self) -> &Manager {
        &self.manager
    }

    /// Serves until `stop` says so or is dropped. VMs and what is under way on hosts are not touched by the end.
    ///
    /// # Errors
    /// When what was under way can't be gone on with, or the store fails for good: a manager that can't write
    /// anything down is better started anew.
    pub async fn serve(self, mut stop: watch::Receiver<bool>) -> Result<(), RunError> {
        self.manager.start().await?;
        self.manager.forward(self.forwarders);
        tracing::info!(address = %self.address, "the manager listens");
        let cluster = Arc::clone(self.manager.cluster());
        let (stopping, stopped) = watch::channel(false);
        let serving = berth_api::serve::serve(
            self.listener,
            self.certificates.server(),
            self.manager.router(),
            stopped,
        );
        let ended = tokio::select! {
            () = serving => Ok(()),
            () = self.certificates.keep_fresh(|result| renewed(&cluster, result)) => Ok(()),
            error = store_failed(&*self.store) => Err(RunError::Store(error)),
            _ = stop.wait_for(|stopped| *stopped) => Ok(()),
        };
        drop(stopping);
        self.manager.shutdown().await;
        self.store.close().await;
        ended
    }
}

/// Runs a manager until `stop` says so or is dropped.
///
/// # Errors
/// As [`bind`] and [`Bound::serve`].
pub async fn run(config: ManagerConfig, stop: watch::Receiver<bool>) -> Result<(), RunError> {
    bind(config).await?.serve(stop).await
}

/// The name of this cluster's audit: no other cluster has the same CA.
fn audit_origin(ca: Fingerprint) -> String {
    let ca = ca.to_string();
    format!("berth-audit/{}", ca.get(..16).unwrap_or(&ca))
}

/// Writes down that the manager's certificate was renewed, or was not.
fn renewed(cluster: &Cluster, result: &str) {
    cluster.did_by_itself("certificates", "certificate.renew", "manager", result);
}

/// Returns when the store does not work any more.
async fn store_failed(store: &dyn Store) -> berth_store::Error {
    loop {
        if let Err(error @ berth_store::Error::Closed) = store.revision().await {
            return error;
        }
        tokio::time::sleep(STORE_CHECK_EVERY).await;
    }
}

/// Counts each operation when it is over, as the store's own history tells it.
async fn count_operations(cluster: Arc<Cluster>, metrics: Arc<Metrics>, from: Revision) {
    let mut commits = cluster.records.store().watch("/operations/", from);
    while let Some(Ok(commit)) = commits.next().await {
        for change in commit.changes {
            let berth_store::Change::Put(entry) = change else { continue };
            let Ok(row) = serde_json::from_slice::<OperationRow>(&entry.value) else { continue };
            if row.operation.state.is_over() {
                metrics.operation_over(&row.operation);
            }
        }
    }
}

/// How long approvals are shown after they have expired, in milliseconds: a week. What was approved is in the audit
/// for good.
const APPROVALS_SHOWN_MS: u64 = 7 * 24 * 3600 * 1000;

/// Removes join tokens and approvals that are out of date, and history that nobody follows any more.
async fn tidy(cluster: Arc<Cluster>) {
    let mut keep_from = None;
    loop {
        let store = cluster.records.store();
        let now = store.revision().await.ok();
        if let Some(revision) = keep_from
            && let Err(error) = store.compact(revision).await
        {
            tracing::warn!(%error, "the store's history can't be shortened");
        }
        keep_from = now;
        let mut transaction = Transaction::new();
        for row in cluster.records.list::<JoinTokenRow>() {
            if row.expires_at < cluster.clock.now() && !transaction.is_full() {
                transaction.forget::<JoinTokenRow>(&row.id);
            }
        }
        for row in cluster.records.list::<Approval>() {
            let over = row.expires_at.plus_millis(APPROVALS_SHOWN_MS) < cluster.clock.now();
            if over && !transaction.is_full() {
                transaction.forget::<Approval>(&row.id);
            }
        }
        if let Err(error) = cluster.records.commit(transaction).await {
            tracing::warn!(%error, "join tokens and approvals that are out of date can't be removed");
        }
        end_sessions(&cluster).await;
        cluster.clock.sleep(TIDY_EVERY).await;
    }
}

/// Removes sessions that are over.
async fn end_sessions(cluster: &Cluster) {
    let mut transaction = Transaction::new();
    for token in cluster.logins.sessions.over(&cluster.records, cluster.clock.now()) {
        if !transaction.is_full() {
            session::forget(&mut transaction, &token);
        }
    }
    if let Err(error) = cluster.records.commit(transaction).await {
        tracing::warn!(%error, "sessions that are over can't be removed");
    }
}

#[cfg(test)]
mod tests;
