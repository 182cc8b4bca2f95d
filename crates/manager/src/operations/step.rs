//! What a workflow is: a visible list of steps, each with what undoes it, and a typed record that they fill.
//!
//! Promises that every step keeps, and that `tests/workflow_faults.rs` tries on all of them:
//!
//! - it may run twice, the second time without what the first one learnt: ids are therefore drawn in `check`, before
//!   the operation is written down, never in a step;
//! - its undo may run after it was done, half done, or not begun, and twice;
//! - a step after the one marked `no_return` can only go forward, and is begun anew until it is done.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use berth_api::agent::{PutTask, TaskOutput, TaskSpec};
use berth_api::transport::BoxFuture;
use berth_model::image::Image;
use berth_model::operation::{OperationKind, OperationResult};
use berth_model::vm::{Vm, VmStatus};
use berth_model::{HostId, OperationId, Problem, ProblemCode, VmId};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::handle::{Ear, Handle};
use super::request::OperationRequest;
use crate::agents::{Drive, DriveError, Patience};
use crate::cluster::Cluster;
use crate::records::{Debt, Row, Transaction};

/// How long a step goes on with a host that does not answer. Shorter: an agent's update makes operations fail.
/// Longer: whoever waits learns late that the host is gone.
pub const STEP_PATIENCE: Duration = Duration::from_secs(300);
/// How long an undo does, before it is left to be done when the host is back.
pub const UNDO_PATIENCE: Duration = Duration::from_secs(30);

/// What a step or an undo returns.
pub type StepFuture<'a> = BoxFuture<'a, Result<(), Problem>>;
/// A step's work.
pub type StepFn<W> = for<'a> fn(&'a mut Run<W>) -> StepFuture<'a>;

/// One step.
pub struct Step<W: Workflow> {
    /// Its name: part of its tasks' ids, and what is shown while it is done.
    pub name: &'static str,
    /// What it does.
    pub run: StepFn<W>,
    /// What takes it back; none: there is nothing to take back.
    pub undo: Option<StepFn<W>>,
    /// Once it is done, there is no way back. So it must not fail after the deed: it does that last, and notes in its
    /// record only what needs no other.
    pub no_return: bool,
}

/// What is known of a step without its types: for tests that try all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepInfo {
    /// Its name.
    pub name: &'static str,
    /// Whether something takes it back.
    pub has_undo: bool,
    /// Whether there is no way back once it is done.
    pub no_return: bool,
}

/// Writes a step down: `step!("name", run)`, `step!("name", run, undo)`, either with `; no_return`.
macro_rules! step {
    ($name:literal, $run:path $(; $mark:ident)?) => {
        $crate::operations::step::Step {
            name: $name,
            run: |run| Box::pin($run(run)),
            undo: None,
            no_return: $crate::operations::step::step!(@mark $($mark)?),
        }
    };
    ($name:literal, $run:path, $undo:path $(; $mark:ident)?) => {
        $crate::operations::step::Step {
            name: $name,
            run: |run| Box::pin($run(run)),
            undo: Some(|run| Box::pin($undo(run))),
            no_return: $crate::operations::step::step!(@mark $($mark)?),
        }
    };
    (@mark) => { false };
    (@mark no_return) => { true };
}
pub(crate) use step;

/// A kind of operation: its checks, its steps, its record.
pub trait Workflow: Sized + Send + Sync + 'static {
    /// What its steps know and learn; written down after each of them.
    type Record: Serialize + DeserializeOwned + Clone + Send + Sync;
    /// Which kind it is.
    const KIND: OperationKind;
    /// The steps in order.
    const STEPS: &'static [Step<Self>];
    /// Its checks depend on what is not there or on sums (see [`Cluster::deciding`]).
    const DECIDES: bool = false;

    /// Checks the wish, and draws all ids that it will need. Changes nothing.
    fn check<'a>(
        desk: &'a Desk<'a>,
        request: &'a OperationRequest,
    ) -> impl Future<Output = Result<Plan<Self>, Problem>> + Send;

    /// What it has to say when it succeeded.
    fn result(_record: &Self::Record) -> OperationResult {
        OperationResult::Done
    }

    /// Whether a step has nothing to do, whatever comes; then neither it nor its undo is begun, or told of.
    fn skips(_record: &Self::Record, _step: &str) -> bool {
        false
    }

    /// The host that a VM is on its way to, so that its memory is counted there.
    fn target(_record: &Self::Record) -> Option<(VmId, HostId)> {
        None
    }
}

/// What checks have before them.
pub struct Desk<'a> {
    /// The cluster.
    pub cluster: &'a Arc<Cluster>,
    /// Nothing will come of it: counters must not be moved.
    pub dry_run: bool,
    /// A second person has approved it.
    pub approved: bool,
    pub(super) vm: Option<Arc<Row<Vm>>>,
}

impl Desk<'_> {
    /// The VM that is to be changed; its slot was seen to be free.
    pub fn vm(&self) -> Result<&Arc<Row<Vm>>, Problem> {
        self.vm.as_ref().ok_or_else(wrong_request)
    }
}

/// A request that got to the wrong workflow.
pub fn wrong_request() -> Problem {
    Problem::new(ProblemCode::Internal, "a request got to a workflow that is not its own")
}

/// What the checks made of a wish.
pub struct Plan<W: Workflow> {
    /// What it is about, in words (`default/books`).
    pub subject: String,
    /// What it does, in a sentence that reads after "would".
    pub summary: String,
    /// The record to begin with.
    pub record: W::Record,
    /// What it is about.
    pub about: About,
    /// What else must be true, or become so, when it begins.
    pub transaction: Transaction,
}

/// What an operation is about.
pub enum About {
    /// A VM that there is.
    Vm(Arc<Row<Vm>>),
    /// A VM that is made by the operation's beginning.
    NewVm(Box<Vm>),
    /// A VM that nothing happens to: its slot is not taken.
    Aside(Arc<Row<Vm>>),
    /// An image.
    Image(Arc<Row<Image>>),
}

/// A workflow under way: what its steps are given.
pub struct Run<W: Workflow> {
    /// The cluster.
    pub cluster: Arc<Cluster>,
    /// What is known.
    pub record: W::Record,
    pub(super) handle: Arc<Handle>,
    pub(super) undoing: bool,
    pub(super) attempt: u32,
}

/// A task for an agent.
pub struct Command<'a> {
    /// The host.
    pub host: &'a HostId,
    /// The VM it is about; none for images.
    pub vm: Option<&'a VmId>,
    /// What it is called within the operation; unique there.
    pub label: &'a str,
    /// What is to be done.
    pub spec: TaskSpec,
}

impl<W: Workflow> Run<W> {
    /// The operation's id.
    pub fn id(&self) -> &OperationId {
        &self.handle.id
    }

    /// Whether what was done is being undone.
    pub fn is_undoing(&self) -> bool {
        self.undoing
    }

    /// Says what is being done.
    pub fn phase(&self, phase: &str) {
        self.handle.set_phase(phase);
    }

    /// Has an agent do something and waits for its end; a host that does not answer is waited for.
    ///
    /// # Errors
    /// Why the agent did not do it, or that it was not to be reached.
    pub fn command<'a>(&'a self, command: Command<'a>) -> BoxFuture<'a, Result<TaskOutput, Problem>> {
        let patience = Patience::For(STEP_PATIENCE);
        Box::pin(async move { self.drive(command, patience).await.map_err(DriveError::into_problem) })
    }

    /// Has an agent look at something of a VM that it does not change. So the VM's slot need not be this operation's, and
    /// its generation stays.
    ///
    /// # Errors
    /// As [`Self::command`].
    pub fn ask<'a>(&'a self, command: Command<'a>) -> BoxFuture<'a, Result<TaskOutput, Problem>> {
        Box::pin(async move {
            let put = PutTask { vm: command.vm.cloned(), generation: 0, spec: command.spec };
            let (host, task) = (command.host, self.task_id(command.label));
            let answer = self.drive_put(host, task, put, Patience::For(STEP_PATIENCE)).await;
            answer.map_err(DriveError::into_problem)
        })
    }

    /// The same for a task whose outcome must be known whatever it takes.
    ///
    /// # Errors
    /// Why the agent did not do it.
    pub fn command_to_the_end<'a>(
        &'a self,
        command: Command<'a>,
    ) -> BoxFuture<'a, Result<TaskOutput, Problem>> {
        Box::pin(
            async move { self.drive(command, Patience::Endless).await.map_err(DriveError::into_problem) },
        )
    }

    /// The same, whether the operation is being cancelled or not.
    ///
    /// # Errors
    /// Why the agent did not do it.
    pub async fn insist(&self, command: Command<'_>) -> Result<TaskOutput, Problem> {
        let put = self.put(&command).await?;
        let task = self.task_id(command.label);
        let driven = self.drive_as(command.host, task, put, Patience::Endless, true).await;
        driven.map_err(DriveError::into_problem)
    }

    /// Has an agent remove something. If it can't be reached, that is written down and done as soon as it can.
    ///
    /// # Errors
    /// Why the agent did not do it.
    pub async fn command_or_owe(&self, command: Command<'_>, why: &str) -> Result<(), Problem> {
        let (host, task) = (command.host.clone(), self.task_id(command.label));
        let put = self.put(&command).await?;
        match self.drive_put(&host, task.clone(), put.clone(), self.undo_patience(&host)).await {
            Ok(_) => Ok(()),
            Err(DriveError::Failed(problem)) => Err(problem),
            Err(DriveError::Unreachable(problem)) => {
                tracing::warn!(%host, %task, %problem, "left to be done when the host is back");
                let mut transaction = Transaction::new();
                let since = self.cluster.clock.now();
                transaction.put(&Debt { host, task, put, why: why.to_owned(), since });
                self.cluster.records.commit(transaction).await?;
                Ok(())
            }
        }
    }

    /// Has an agent undo something. If it can't be reached, what became of it will show when the host is back.
    ///
    /// # Errors
    /// Why the agent did not do it.
    pub async fn command_or_pass(&self, command: Command<'_>) -> Result<Reached, Problem> {
        let patience = self.undo_patience(command.host);
        match self.drive(command, patience).await {
            Ok(_) => Ok(Reached::Yes),
            Err(DriveError::Failed(problem)) => Err(problem),
            Err(DriveError::Unreachable(_)) => Ok(Reached::No),
        }
    }

    /// Changes the status of the VM whose slot this operation has.
    ///
    /// # Errors
    /// That it has lost the slot, which would be a fault of Berth's own; that the store failed.
    pub async fn change_vm(
        &self,
        vm: &VmId,
        mut change: impl FnMut(&mut Vm),
    ) -> Result<Arc<Row<Vm>>, Problem> {
        let own = self.handle.id.clone();
        self.cluster
            .records
            .update::<Vm, Problem>(vm.as_str(), |vm| {
                if vm.status.operation.as_ref() != Some(&own) {
                    let message = format!("{} is not {own}'s to change any more", vm.full_name());
                    return Err(Problem::new(ProblemCode::Internal, message));
                }
                change(vm);
                Ok(())
            })
            .await
    }

    /// Changes the status alone.
    ///
    /// # Errors
    /// As [`Self::change_vm`].
    pub async fn change_status(
        &self,
        vm: &VmId,
        mut change: impl FnMut(&mut VmStatus),
    ) -> Result<Arc<Row<Vm>>, Problem> {
        self.change_vm(vm, |vm| change(&mut vm.status)).await
    }

    /// The id of one of this operation's tasks.
    pub fn task_id(&self, label: &str) -> String {
        format!("{}.{label}.{}", self.handle.id, self.attempt)
    }

    async fn drive(&self, command: Command<'_>, patience: Patience) -> Result<TaskOutput, DriveError> {
        let put = self.put(&command).await.map_err(DriveError::Failed)?;
        self.drive_put(command.host, self.task_id(command.label), put, patience).await
    }

    async fn drive_put(
        &self,
        host: &HostId,
        task: String,
        put: PutTask,
        patience: Patience,
    ) -> Result<TaskOutput, DriveError> {
        self.drive_as(host, task, put, patience, self.undoing).await
    }

    async fn drive_as(
        &self,
        host: &HostId,
        task: String,
        put: PutTask,
        patience: Patience,
        deaf_to_cancel: bool,
    ) -> Result<TaskOutput, DriveError> {
        let (cluster, handle) = (Arc::clone(&self.cluster), Arc::clone(&self.handle));
        let ear = Ear { cluster, handle, deaf_to_cancel };
        Drive { cluster: &self.cluster, host, task, put, patience, listener: &ear }.run().await
    }

    /// A command carries a generation above all before it, so that an agent knows an old one when it comes late.
    async fn put(&self, command: &Command<'_>) -> Result<PutTask, Problem> {
        let generation = match command.vm {
            Some(vm) => self.change_status(vm, |status| status.generation += 1).await?.status.generation,
            None => 0,
        };
        Ok(PutTask { vm: command.vm.cloned(), generation, spec: command.spec.clone() })
    }

    /// A host that is known to be gone is not waited for.
    fn undo_patience(&self, host: &HostId) -> Patience {
        let offline = self
            .cluster
            .records
            .get::<berth_model::host::Host>(host.as_str())
            .is_some_and(|row| row.state == berth_model::host::HostState::Offline);
        Patience::For(if offline { Duration::ZERO } else { UNDO_PATIENCE })
    }
}

/// Whether a host could be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reached {
    /// It did what was asked.
    Yes,
    /// It did not answer.
    No,
}
