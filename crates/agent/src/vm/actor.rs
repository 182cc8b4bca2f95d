//! The owner of one VM: a task that holds its [`VmRuntime`] and does what is in its queue, one thing after another.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use berth_api::agent::{MigrationSide, TaskOutput, TaskSpec};
use berth_model::{HostId, OperationId, Problem, ProblemCode, VmId};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::process::{self, Notice};
use super::status::Status;
use super::{Home, VmRuntime, lifecycle};
use crate::console::Console;
use crate::durable::{self, blocking};
use crate::layout::{HostRecord, VmRecord};
use crate::services::Services;
use crate::snapshot::hashes;
use crate::snapshot::merge::worker::{Outcome, Worker};
use crate::snapshot::verify;
use crate::task::TaskContext;
use crate::{migration, snapshot};

/// What an owner is asked to do.
pub enum Job {
    /// A task of the manager's.
    Task {
        /// The task.
        context: TaskContext,
        /// Where its end is told.
        reply: oneshot::Sender<Result<TaskOutput, Problem>>,
    },
    /// Another host's agent has connected to send this VM.
    Receive(Receive),
}

/// A VM that is being sent here.
pub struct Receive {
    /// The migration.
    pub migration: OperationId,
    /// Who sends.
    pub peer: HostId,
    /// The connection.
    pub connection: TokioIo<Upgraded>,
    /// Set when the manager has decided the migration, one way or the other, while this was under way: come to an
    /// end, so that the decision can be carried out.
    pub decided: CancellationToken,
}

/// The way to a VM's owner, and past it to what may be read at any time.
#[derive(Clone)]
pub struct VmHandle {
    /// How the VM is.
    pub status: Arc<Status>,
    /// Its console.
    pub console: Arc<Console>,
    queue: mpsc::UnboundedSender<Job>,
    receiving: Arc<Mutex<Option<CancellationToken>>>,
}

/// All VMs' owners.
pub struct Vms {
    services: Arc<Services>,
    handles: Mutex<BTreeMap<VmId, VmHandle>>,
}

impl Vms {
    /// No owners yet.
    pub fn new(services: Arc<Services>) -> Arc<Self> {
        Arc::new(Self { services, handles: Mutex::default() })
    }

    /// Puts work into a VM's queue; a VM of which this host has nothing gets an owner for it.
    pub fn submit(self: &Arc<Self>, vm: &VmId, job: Job) {
        let mut handles = self.lock();
        let handle = match handles.get(vm) {
            Some(handle) if !handle.queue.is_closed() => handle.clone(),
            _ => {
                let (handle, _) = self.spawn(vm.clone());
                handles.insert(vm.clone(), handle.clone());
                handle
            }
        };
        handle.make_way_for(&job);
        // A closed queue drops the job, and with it the reply that somebody waits for.
        let _ = handle.queue.send(job);
    }

    /// Makes an owner for a VM that is on record, and waits until it has found what there is.
    pub async fn take_up(self: &Arc<Self>, vm: VmId) {
        let ready = {
            let mut handles = self.lock();
            let (handle, ready) = self.spawn(vm.clone());
            handles.insert(vm, handle);
            ready
        };
        // An owner that broke while it looked has said so in the log.
        let _ = ready.await;
    }

    /// The way to a VM's owner, if it has one.
    pub fn get(&self, vm: &VmId) -> Option<VmHandle> {
        self.lock().get(vm).cloned()
    }

    fn spawn(self: &Arc<Self>, vm: VmId) -> (VmHandle, oneshot::Receiver<()>) {
        let (queue, jobs) = mpsc::unbounded_channel();
        let (found, ready) = oneshot::channel();
        let handle = VmHandle {
            status: Arc::new(Status::new(vm.clone(), Arc::clone(&self.services.board))),
            console: Arc::new(Console::default()),
            queue,
            receiving: Arc::default(),
        };
        let (notices, noticed) = mpsc::unbounded_channel();
        let runtime = VmRuntime {
            services: Arc::clone(&self.services),
            id: vm,
            home: None,
            running: None,
            stray: None,
            next_serial: 1,
            commanded: 0,
            status: Arc::clone(&handle.status),
            console: Arc::clone(&handle.console),
            notices,
            ready: None,
        };
        let receiving = Arc::clone(&handle.receiving);
        let (merging, merged) = Worker::new();
        let hashing = hashes::worker::Worker::start();
        let vms = Arc::downgrade(self);
        let owner = Owner { vms, runtime, jobs, noticed, receiving, merging, merged, hashing };
        tokio::spawn(owner.run(found));
        (handle, ready)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<VmId, VmHandle>> {
        self.handles.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VmHandle {
    /// Work that decides a migration ends the receiving of it.
    fn make_way_for(&self, job: &Job) {
        let Job::Task { context, .. } = job else { return };
        let decides = matches!(
            context.put().spec,
            TaskSpec::RefuseMigration { .. }
                | TaskSpec::TakeOver { .. }
                | TaskSpec::StopVm
                | TaskSpec::DeleteVm { .. }
        );
        if decides && let Some(token) = &*self.receiving.lock().unwrap_or_else(PoisonError::into_inner) {
            token.cancel();
        }
    }
}

struct Owner {
    vms: std::sync::Weak<Vms>,
    runtime: VmRuntime,
    jobs: mpsc::UnboundedReceiver<Job>,
    noticed: mpsc::UnboundedReceiver<Notice>,
    receiving: Arc<Mutex<Option<CancellationToken>>>,
    merging: Worker,
    merged: mpsc::UnboundedReceiver<Outcome>,
    hashing: hashes::worker::Worker,
}

impl Owner {
    async fn run(mut self, found: oneshot::Sender<()>) {
        if let Err(problem) = find(&mut self.runtime).await {
            tracing::error!(vm = %self.runtime.id(), %problem, "what this host has of the VM can't be taken up");
            process::let_go(&mut self.runtime);
        }
        // Nobody may be waiting for it.
        let _ = found.send(());
        let stopping = self.runtime.services().stopping.clone();
        self.merging.look(&self.runtime);
        self.hashing.go_on(&self.runtime);
        loop {
            tokio::select! {
                biased;
                () = stopping.cancelled() => return,
                Some(notice) = self.noticed.recv() => process::take_notice(&mut self.runtime, notice).await,
                job = self.jobs.recv() => match job {
                    Some(job) => self.work(job).await,
                    None => return,
                },
                Some(outcome) = self.merged.recv() => {
                    self.merging.take(&mut self.runtime, outcome).await;
                    self.hashing.go_on(&self.runtime);
                }
            }
            self.end_broken_journey().await;
            if !self.runtime.is_known() && self.resign() {
                return;
            }
        }
    }

    /// A VM whose process ended while it was being sent, and that was not given away, is on its way nowhere any more.
    async fn end_broken_journey(&mut self) {
        let vm = &mut self.runtime;
        let side = vm.host_record().ok().and_then(|record| record.migration.as_ref());
        let is_sent = matches!(side, Some(MigrationSide::Source { handed_over: false, .. }));
        if is_sent
            && vm.rests()
            && let Err(problem) = recover(vm).await
        {
            tracing::error!(vm = %vm.id(), %problem, "a migration whose VM has ended can't be forgotten");
        }
    }

    async fn work(&mut self, job: Job) {
        match &job {
            Job::Task { context, .. } if stays(&context.put().spec) => self.merging.make_way(),
            Job::Task { .. } | Job::Receive(_) => self.merging.break_off(),
        }
        self.hashing.make_way();
        self.carry_out(job).await;
        self.merging.go_on(&self.runtime);
        self.hashing.go_on(&self.runtime);
    }

    async fn carry_out(&mut self, job: Job) {
        match job {
            Job::Task { context, reply } => {
                if let TaskSpec::VerifySnapshot { snapshot } = &context.put().spec {
                    // Only begun here: it reads for long, and changes nothing.
                    let (snapshot, pace) = (snapshot.clone(), self.hashing.pace());
                    let ground = verify::Ground::of(&self.runtime, pace);
                    return verify::begin(ground, context, snapshot, reply);
                }
                let result = match context.check_cancelled() {
                    Ok(()) => dispatch(&mut self.runtime, &context).await,
                    Err(problem) => Err(problem),
                };
                if let Err(problem) = &result {
                    tracing::warn!(vm = %self.runtime.id(), task = context.id(), %problem, "a task failed");
                }
                // Whoever waited may have given up.
                let _ = reply.send(result);
            }
            Job::Receive(receive) => {
                self.set_receiving(Some(receive.decided.clone()));
                let migration = receive.migration.clone();
                if let Err(problem) = migration::receive(&mut self.runtime, receive).await {
                    tracing::warn!(vm = %self.runtime.id(), %migration, %problem, "receiving it failed");
                }
                self.set_receiving(None);
            }
        }
    }

    fn set_receiving(&self, token: Option<CancellationToken>) {
        *self.receiving.lock().unwrap_or_else(PoisonError::into_inner) = token;
    }

    /// Nothing of the VM is here: the owner goes, unless there is work again.
    fn resign(&mut self) -> bool {
        let Some(vms) = self.vms.upgrade() else { return true };
        // Under this lock nobody can put work into the queue.
        let mut handles = vms.lock();
        if !self.jobs.is_empty() {
            return false;
        }
        handles.remove(self.runtime.id());
        true
    }
}

/// Whether the VM is still here after a task, whatever becomes of it: what is being prepared for it stays of use.
const fn stays(spec: &TaskSpec) -> bool {
    !matches!(
        spec,
        TaskSpec::DeleteVm { .. }
            | TaskSpec::AdmitMigration { .. }
            | TaskSpec::RefuseMigration { .. }
            | TaskSpec::TakeOver { .. }
            | TaskSpec::MoveVm { .. }
            | TaskSpec::TakeBack { .. }
    )
}

/// Reads what is on record and finds the process that goes with it.
async fn find(vm: &mut VmRuntime) -> Result<(), Problem> {
    let path = vm.services.layout.host_record(&vm.id);
    let Some(host) = blocking(move || Ok(durable::read_json::<HostRecord>(&path)?)).await? else {
        return Ok(());
    };
    let dirs = vm.services.layout.vm(&vm.id, &host.pool)?;
    let path = dirs.vm_record();
    // A pool that can't be read must not hide a process that is there.
    let record = match blocking(move || Ok(durable::read_json::<VmRecord>(&path)?)).await {
        Ok(record) => record,
        Err(problem) => {
            tracing::error!(vm = %vm.id, %problem, "what the VM is to be can't be read");
            None
        }
    };
    vm.home = Some(Home { dirs, host, vm: record });
    vm.publish();
    process::find_again(vm).await?;
    recover(vm).await
}

/// Brings what was half done when an agent died, or lost its QEMU, to one of its two ends.
pub(super) async fn recover(vm: &mut VmRuntime) -> Result<(), Problem> {
    snapshot::recover(vm).await?;
    snapshot::merge::recover(vm).await?;
    migration::recover(vm).await?;
    vm.status().process_rests();
    Ok(())
}

async fn dispatch(vm: &mut VmRuntime, task: &TaskContext) -> Result<TaskOutput, Problem> {
    lifecycle::admit_generation(vm, task.put().generation).await?;
    snapshot::drop_unwanted(vm, &task.put().spec).await;
    match &task.put().spec {
        TaskSpec::PrepareVm { definition } => lifecycle::prepare(vm, task, definition).await,
        TaskSpec::StartVm { definition } => lifecycle::start(vm, task, definition).await,
        TaskSpec::ShutdownVm { timeout_ms } => lifecycle::shutdown(vm, task, *timeout_ms).await,
        TaskSpec::StopVm => lifecycle::stop(vm).await,
        TaskSpec::RestartVm => lifecycle::restart(vm).await,
        TaskSpec::PauseVm => lifecycle::pause(vm).await,
        TaskSpec::ResumeVm => lifecycle::resume(vm).await,
        TaskSpec::DeleteVm { pool, keep_files } => lifecycle::delete(vm, pool, *keep_files).await,
        TaskSpec::TakeSnapshot { snapshot, new_top, next } => {
            if let Some(next) = next {
                snapshot::make_ready(vm, next);
            }
            let taken = snapshot::take(vm, task, snapshot, new_top).await;
            if taken.is_err() {
                snapshot::drop_ready(vm).await;
            }
            taken
        }
        TaskSpec::TakeDiskSnapshot { snapshot, new_top, quiesce } => {
            snapshot::take_disk(vm, task, snapshot, new_top, *quiesce).await
        }
        TaskSpec::RestoreSnapshot { definition, snapshot, new_top, paused } => {
            let target = snapshot::Target { definition, snapshot, new_top, paused: *paused };
            snapshot::restore(vm, task, target).await
        }
        TaskSpec::CloneVm { .. } => snapshot::clone::clone_vm(vm, task).await,
        TaskSpec::ImportVm { .. } => snapshot::make_vm(vm, task).await,
        TaskSpec::DeleteSnapshot { snapshot } => snapshot::deletion::delete(vm, task, snapshot).await,
        TaskSpec::AdmitMigration { .. } => migration::admit(vm, task).await,
        TaskSpec::RefuseMigration { migration, shared_pool } => {
            migration::refuse(vm, migration, *shared_pool).await
        }
        TaskSpec::TakeOver { migration } => migration::take_over(vm, migration).await,
        TaskSpec::MoveVm { .. } => migration::move_away(vm, task).await,
        TaskSpec::TakeBack { migration } => migration::take_back(vm, migration).await,
        TaskSpec::FetchImage { .. }
        | TaskSpec::DeleteImage { .. }
        | TaskSpec::ExportSnapshot { .. }
        | TaskSpec::FetchBackup { .. }
        | TaskSpec::DropFetched { .. }
        | TaskSpec::WaitReady { .. }
        | TaskSpec::VerifySnapshot { .. } => {
            Err(Problem::new(ProblemCode::Internal, "this task is not done in a VM's queue"))
        }
    }
}
