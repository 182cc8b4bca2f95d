//! One cluster: what the manager's parts share.
//!
//! Nothing here is a singleton and nothing reaches for the system by itself: the store, the way to the agents, the
//! clock and chance come in as [`Parts`], so that a test can run several managers over one store, or a hundred agents
//! in one process. A cluster that is shut down (or killed) leaves nothing that the next one on the same store would
//! need: whatever was under way is in the records.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, OnceLock, PoisonError};

use berth_api::pki::Authority;
use berth_model::vm::Vm;
use berth_model::{HostId, LayerId, OperationId, Problem, ProblemCode, SnapshotId, VmId};
use berth_store::Store;
use tokio::sync::{Mutex, MutexGuard};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::agents::{AgentConnector, Agents};
use crate::audit::Audit;
use crate::clock::{Clock, Entropy};
use crate::operations::Operations;
use crate::operations::interfere::Interference;
use crate::reconcile::Watchers;
use crate::records::{Records, RecordsError};
use crate::workflow::addresses::AddressRange;

/// What a cluster is made of.
pub struct Parts {
    /// Where its records are.
    pub store: Arc<dyn Store>,
    /// How its agents are reached.
    pub connector: Arc<dyn AgentConnector>,
    /// Its time.
    pub clock: Arc<dyn Clock>,
    /// Its chance.
    pub entropy: Arc<dyn Entropy>,
    /// Its certificates.
    pub authority: Arc<Authority>,
    /// What is set by the person who runs it.
    pub settings: Settings,
}

/// What is set by the person who runs a cluster.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// The addresses that VMs are given; none: they ask by DHCP.
    pub addresses: Option<AddressRange>,
    /// What the audit's checkpoints are signed with; none: a key that is forgotten with this manager, for tests.
    pub audit_key: Option<Arc<berth_tlog::SigningKey>>,
    /// Whether to go on with a log that was signed with another key.
    pub audit_new_key: bool,
}

/// One cluster.
pub struct Cluster {
    /// Everything that is written down.
    pub records: Records,
    /// Every change that takes time.
    pub operations: Operations,
    /// The way to the hosts.
    pub agents: Agents,
    /// What is watched without being asked.
    pub watchers: Watchers,
    /// Its time.
    pub clock: Arc<dyn Clock>,
    /// Its chance.
    pub entropy: Arc<dyn Entropy>,
    /// Its certificates.
    pub authority: Arc<Authority>,
    /// What was set.
    pub settings: Settings,
    /// Where what the system does by itself is written down; empty until the audit has been opened.
    audit: OnceLock<Audit>,
    pub(crate) interference: Option<Arc<dyn Interference>>,
    deciding: Mutex<()>,
    fetching: std::sync::Mutex<HashMap<String, Arc<Mutex<()>>>>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Cluster {
    /// Reads the records. Nothing is begun before [`Self::start`].
    ///
    /// # Errors
    /// When the store can't be read.
    pub async fn open(parts: Parts) -> Result<Arc<Self>, RecordsError> {
        Self::open_with(parts, None).await
    }

    /// The same with somebody who makes steps fail on purpose: for tests.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub async fn open_with(
        parts: Parts,
        interference: Option<Arc<dyn Interference>>,
    ) -> Result<Arc<Self>, RecordsError> {
        let records = Records::open(Arc::clone(&parts.store)).await?;
        Ok(Arc::new_cyclic(|this| Self {
            records,
            operations: Operations::new(this.clone()),
            agents: Agents::new(Arc::clone(&parts.connector)),
            watchers: Watchers::new(),
            clock: parts.clock,
            entropy: parts.entropy,
            authority: parts.authority,
            settings: parts.settings,
            audit: OnceLock::new(),
            interference,
            deciding: Mutex::new(()),
            fetching: std::sync::Mutex::default(),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        }))
    }

    /// Says where what the system does by itself is written down; only the first time counts.
    pub(crate) fn write_down_in(&self, audit: Audit) {
        let _ = self.audit.set(audit);
    }

    /// Writes down what a loop did by itself: see [`Audit::record_system`].
    pub fn did_by_itself(&self, actor: &str, action: &str, resource: &str, result: &str) {
        if let Some(audit) = self.audit.get() {
            audit.record_system(actor, action, resource, result);
        }
    }

    /// Goes on with every operation that is not over, and begins to watch hosts and VMs.
    ///
    /// # Errors
    /// When it is being shut down already.
    pub fn start(self: &Arc<Self>) -> Result<(), Problem> {
        self.operations.resume()?;
        crate::reconcile::start(self);
        Ok(())
    }

    /// Drops everything that is under way, at once, and waits until it is dropped. The next cluster on the same
    /// store goes on with it.
    pub async fn shutdown(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        self.operations.let_go();
        self.records.close();
    }

    /// Whether [`Self::shutdown`] was called.
    pub fn is_stopping(&self) -> bool {
        self.stop.is_cancelled()
    }

    /// Runs a task until it is done or the cluster is shut down.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                biased;
                () = stop.cancelled() => {}
                () = task => {}
            }
        });
    }

    /// Runs work that must not stop half-way because whoever waits for it has gone.
    ///
    /// # Errors
    /// That the cluster is being shut down, or the work broke off.
    pub(crate) async fn whole<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, Problem> {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        self.spawn(async move {
            let _ = sender.send(work.await);
        });
        receiver.await.map_err(|_| match self.is_stopping() {
            true => Problem::new(ProblemCode::Unreachable, "the manager is being stopped"),
            false => Problem::new(ProblemCode::Internal, "the work broke off; the manager's log says where"),
        })
    }

    /// To be held while something is decided that depends on what is *not* there or on a sum (is the segment empty,
    /// is there room on this host, is the address free) and until the decision is committed: compare-and-set guards
    /// only what a transaction names.
    pub async fn deciding(&self) -> MutexGuard<'_, ()> {
        self.deciding.lock().await
    }

    /// To be held while an image is fetched into a pool.
    pub(crate) fn fetching(&self, place: &str) -> Arc<Mutex<()>> {
        let mut fetching = self.fetching.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that nobody holds are of no use any more.
        fetching.retain(|_, turn| Arc::strong_count(turn) > 1);
        Arc::clone(fetching.entry(place.to_owned()).or_default())
    }

    /// A new id for an operation.
    pub fn new_operation_id(&self) -> OperationId {
        OperationId::from_entropy(self.entropy.id())
    }

    /// A new id for a layer.
    pub fn new_layer_id(&self) -> LayerId {
        LayerId::from_entropy(self.entropy.id())
    }

    /// A new id for a snapshot.
    pub fn new_snapshot_id(&self) -> SnapshotId {
        SnapshotId::from_entropy(self.entropy.id())
    }

    /// A new id for a VM.
    pub fn new_vm_id(&self) -> VmId {
        VmId::from_entropy(self.entropy.id())
    }

    /// What a host is called, for messages; its id when it is not known.
    pub fn host_name(&self, host: &HostId) -> String {
        self.records
            .get::<berth_model::host::Host>(host.as_str())
            .map_or_else(|| host.to_string(), |row| row.name.to_string())
    }

    /// Memory in MiB that is promised on each host: that of VMs that run there or may, and of those on their way to it.
    pub fn promised_mib(&self) -> HashMap<HostId, u64> {
        let coming = self.operations.targets();
        let mut promised = HashMap::new();
        for vm in self.records.list::<Vm>() {
            let wanted = vm.spec.memory_mib.saturating_add(berth_model::placement::VM_OVERHEAD_MIB);
            // A VM that is being changed may be about to run.
            let counts = vm.status.state.may_run() || vm.status.operation.is_some();
            let here = vm.status.host.as_ref().filter(|_| counts);
            let there = coming.get(&vm.value.id).filter(|target| here != Some(*target));
            for host in here.into_iter().chain(there) {
                let sum: &mut u64 = promised.entry(host.clone()).or_default();
                *sum = sum.saturating_add(wanted);
            }
        }
        promised
    }
}
