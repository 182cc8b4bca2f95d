//! The way to the hosts: one typed client for each agent, bounded waits, and tasks driven to their end.

mod task;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use berth_api::agent::{AgentReport, ReportQuery, ReportShow, VmReport};
use berth_api::endpoint::Nothing;
use berth_api::tls::{self, TlsError};
use berth_api::transport::TlsTransport;
use berth_api::{Client, ClientError, Endpoint, Transport, TransportError};
use berth_model::host::Host;
use berth_model::{HostId, VmId};
use tokio::sync::watch;

pub use task::{Drive, DriveError, Listener, Patience};

/// How long an agent may take for an answer that needs no waiting. Too short: a busy host counts as lost. Too long: a
/// host that hangs is noticed late.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Makes clients of agents: a handle, so that tests can put a cluster into one process.
pub trait AgentConnector: Send + Sync + 'static {
    /// A client of this host's agent. Called often: keeps connections by itself.
    fn connect(&self, host: &Host) -> Client;
}

/// Reaches agents over mutual TLS, expecting each host's own name in its certificate.
pub struct TlsConnector {
    config: watch::Receiver<Arc<rustls::ClientConfig>>,
    kept: Mutex<HashMap<HostId, Kept>>,
}

struct Kept {
    address: String,
    config: Arc<rustls::ClientConfig>,
    transport: Arc<dyn Transport>,
}

impl TlsConnector {
    /// Uses whatever configuration is the latest, so that a renewed certificate is shown from the next call on.
    pub fn new(config: watch::Receiver<Arc<rustls::ClientConfig>>) -> Self {
        Self { config, kept: Mutex::new(HashMap::new()) }
    }

    fn transport(&self, host: &Host) -> Result<Arc<dyn Transport>, TlsError> {
        let config = Arc::clone(&self.config.borrow());
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = kept.get(&host.id)
            && found.address == host.address
            && Arc::ptr_eq(&found.config, &config)
        {
            return Ok(Arc::clone(&found.transport));
        }
        let name = tls::server_name(&berth_api::pki::host_name(&host.id))?;
        let transport: Arc<dyn Transport> =
            Arc::new(TlsTransport::new(host.address.clone(), name, Arc::clone(&config)));
        let address = host.address.clone();
        kept.insert(host.id.clone(), Kept { address, config, transport: Arc::clone(&transport) });
        Ok(transport)
    }
}

impl AgentConnector for TlsConnector {
    fn connect(&self, host: &Host) -> Client {
        Client::new(self.transport(host).expect("an id makes a good server name"))
    }
}

/// The agents of the cluster.
pub struct Agents {
    connector: Arc<dyn AgentConnector>,
}

impl Agents {
    pub(crate) fn new(connector: Arc<dyn AgentConnector>) -> Self {
        Self { connector }
    }

    /// A client without a time limit, for uploads and consoles.
    pub fn client(&self, host: &Host) -> Client {
        self.connector.connect(host)
    }

    /// Calls an agent and waits [`ANSWER_TIMEOUT`], beyond `wait` that the agent was asked to take, for its answer.
    ///
    /// # Errors
    /// What the agent said, or that it could not be reached in time.
    pub async fn call<E: Endpoint>(
        &self,
        host: &Host,
        path: &E::Path,
        query: &E::Query,
        body: &E::Body,
        wait: Duration,
    ) -> Result<E::Reply, ClientError> {
        let client = self.client(host);
        let limit = wait + ANSWER_TIMEOUT;
        match tokio::time::timeout(limit, client.call::<E>(path, query, body)).await {
            Ok(result) => result,
            Err(_) => Err(ClientError::Transport(TransportError::Broken {
                address: host.address.clone(),
                source: format!("no answer within {} s", limit.as_secs()).into(),
            })),
        }
    }

    /// What a host says of its VMs now.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub async fn report(&self, host: &Host) -> Result<AgentReport, ClientError> {
        self.call::<ReportShow>(host, &Nothing {}, &ReportQuery::default(), &(), Duration::ZERO).await
    }

    /// What a host says of one VM now; none: it has nothing of it.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub async fn report_of(&self, host: &Host, vm: &VmId) -> Result<Option<VmReport>, ClientError> {
        Ok(self.report(host).await?.vms.into_iter().find(|report| report.vm == *vm))
    }
}
