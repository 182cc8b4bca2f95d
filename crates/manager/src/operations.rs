//! Operations: every change that takes time, written down before it begins and after each of its steps.
//!
//! An operation is one transaction to begin with: its row, the slot of the VM that it changes (`status.operation`),
//! and what else must be true from then on. So of two changes to one VM the second finds the slot taken and is told
//! by which. Then a task of its own does the steps of its workflow ([`step::Workflow`]); the row says which are done.
//! It ends in one transaction as well: the row, and the slot free again.
//!
//! A manager that dies leaves rows that are not over. The next one goes on with each: `running` ones at the step that
//! is next (which may be half done or done and not noted: every step bears that), `undoing` ones at the undo that is
//! next.

mod begin;
mod engine;
mod handle;
pub mod interfere;
pub mod request;
mod row;
pub mod step;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use berth_api::manager::OperationRef;
use berth_model::operation::{Operation, OperationKind};
use berth_model::{HostId, OperationId, Problem, ProblemCode, VmId};
use berth_store::Revision;
use tokio::sync::watch;

use crate::cluster::Cluster;
use handle::Handle;

pub use engine::steps_of;
pub use request::OperationRequest;
pub use row::OperationRow;

/// A wish for an operation.
#[derive(Debug, Clone)]
pub struct Begin {
    /// Who asks.
    pub actor: String,
    /// For what.
    pub request: OperationRequest,
    /// Only if the VM has not changed since this revision (If-Match).
    pub if_match: Option<Revision>,
    /// Whether a second person has approved it: then what is held against deletion may be deleted.
    pub approved: bool,
}

impl Begin {
    /// A plain one.
    pub fn new(actor: impl Into<String>, request: OperationRequest) -> Self {
        Self { actor: actor.into(), request, if_match: None, approved: false }
    }
}

/// Which operations.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Only those about this VM.
    pub vm: Option<VmId>,
    /// Only those of this kind.
    pub kind: Option<OperationKind>,
    /// Only those that are not over.
    pub active: bool,
}

/// All operations of a cluster.
pub struct Operations {
    cluster: Weak<Cluster>,
    active: Mutex<HashMap<OperationId, Arc<Handle>>>,
}

impl Operations {
    pub(crate) fn new(cluster: Weak<Cluster>) -> Self {
        Self { cluster, active: Mutex::new(HashMap::new()) }
    }

    /// Checks everything that can be checked, takes the VM's slot, writes the operation down and begins it.
    ///
    /// # Errors
    /// [`ProblemCode::Busy`] naming the operation that has the slot; [`ProblemCode::Changed`] when `if_match` does
    /// not match; what the workflow's own checks refuse. Then nothing has happened.
    pub async fn begin(&self, begin: Begin) -> Result<OperationRef, Problem> {
        let cluster = self.cluster()?;
        let owned = Arc::clone(&cluster);
        // Whoever asks may hang up: an operation that is written down must be begun all the same.
        cluster.whole(async move { begin::begin(&owned, begin, false).await }).await?
    }

    /// The same checks, and nothing else; the answer has no operation.
    ///
    /// # Errors
    /// As [`Self::begin`].
    pub async fn dry_run(&self, begin: Begin) -> Result<OperationRef, Problem> {
        begin::begin(&self.cluster()?, begin, true).await
    }

    /// How an operation stands.
    ///
    /// # Errors
    /// That there is none.
    pub fn get(&self, id: &OperationId) -> Result<Operation, Problem> {
        if let Some(handle) = self.handle(id) {
            return Ok(handle.show());
        }
        Ok(self.cluster()?.records.require::<OperationRow>(id.as_str())?.operation.clone())
    }

    /// Operations, the newest first.
    pub fn list(&self, filter: &Filter) -> Vec<Operation> {
        let Ok(cluster) = self.cluster() else { return Vec::new() };
        let mut found: Vec<Operation> = cluster
            .records
            .list::<OperationRow>()
            .iter()
            .filter(|row| filter.takes(&row.operation))
            .map(|row| {
                self.handle(&row.operation.id).map_or_else(|| row.operation.clone(), |handle| handle.show())
            })
            .collect();
        found.sort_by(|a, b| (b.created_at, &b.id).cmp(&(a.created_at, &a.id)));
        found
    }

    /// Follows an operation: the receiver shows each change, and is closed when the operation is over.
    ///
    /// # Errors
    /// That there is none.
    pub fn subscribe(&self, id: &OperationId) -> Result<watch::Receiver<Operation>, Problem> {
        match self.handle(id) {
            Some(handle) => Ok(handle.subscribe()),
            None => Ok(watch::channel(self.get(id)?).1),
        }
    }

    /// Waits until an operation is over, or the time is; answers how it stands then.
    ///
    /// # Errors
    /// That there is none.
    pub async fn wait(&self, id: &OperationId, at_most: Duration) -> Result<Operation, Problem> {
        let mut shown = self.subscribe(id)?;
        let over = async {
            loop {
                if shown.borrow().state.is_over() || shown.changed().await.is_err() {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(at_most, over).await;
        self.get(id)
    }

    /// Asks an operation to stop and to undo what it did; answers how it stands.
    ///
    /// # Errors
    /// [`ProblemCode::WrongState`] when it is over, or past the point from which there is no way back.
    pub async fn cancel(&self, id: &OperationId, actor: &str) -> Result<Operation, Problem> {
        let Some(handle) = self.handle(id) else {
            let operation = self.get(id)?;
            let message = format!("the {} is over: it has {}", operation.kind, operation.state.as_str());
            return Err(Problem::new(ProblemCode::WrongState, message));
        };
        let cluster = self.cluster()?;
        let (owned, heard, actor) = (Arc::clone(&cluster), Arc::clone(&handle), actor.to_owned());
        cluster.whole(async move { heard.cancel(&owned, &actor).await }).await??;
        Ok(handle.show())
    }

    /// Whether one that is not over is about this VM.
    pub(crate) fn is_changing(&self, vm: &VmId) -> bool {
        self.handles().iter().any(|handle| handle.show().vm.as_ref() == Some(vm))
    }

    /// To which hosts VMs are on their way.
    pub(crate) fn targets(&self) -> HashMap<VmId, HostId> {
        self.handles().iter().filter_map(|handle| handle.target()).collect()
    }

    /// The cluster is shut down: those who follow an operation learn that nothing more comes.
    pub(crate) fn let_go(&self) {
        self.active.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Goes on with every operation that is not over.
    pub(crate) fn resume(&self) -> Result<(), Problem> {
        let cluster = self.cluster()?;
        for row in cluster.records.list_where::<OperationRow>(|row| !row.operation.state.is_over()) {
            // One that can't be understood holds its VM, and nothing else.
            if let Err(problem) = engine::resume(&cluster, &row) {
                tracing::error!(operation = row.id, %problem, "an operation is left as it is");
            }
        }
        Ok(())
    }

    fn cluster(&self) -> Result<Arc<Cluster>, Problem> {
        self.cluster
            .upgrade()
            .ok_or_else(|| Problem::new(ProblemCode::Unreachable, "the manager is being stopped"))
    }

    fn handle(&self, id: &OperationId) -> Option<Arc<Handle>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    fn handles(&self) -> Vec<Arc<Handle>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    fn add(&self, id: OperationId, handle: Arc<Handle>) {
        self.active.lock().unwrap_or_else(PoisonError::into_inner).insert(id, handle);
    }

    fn remove(&self, id: &OperationId) {
        self.active.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
    }
}

impl Filter {
    fn takes(&self, operation: &Operation) -> bool {
        self.vm.as_ref().is_none_or(|vm| operation.vm.as_ref() == Some(vm))
            && self.kind.is_none_or(|kind| operation.kind == kind)
            && !(self.active && operation.state.is_over())
    }
}
