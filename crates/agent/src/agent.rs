//! The agent as a whole: what it starts with, what it finds, and where tasks go.

use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use berth_api::agent::{PutTask, Task, TaskOutput, TaskSpec};
use berth_model::host::NetworkMode;
use berth_model::name::Name;
use berth_model::{HostId, Problem, ProblemCode, VmId};
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::backup;
use crate::config::AgentConfig;
use crate::durable::{self, FileError};
use crate::image::{self, Holder, Images};
use crate::launcher::{Hypervisor, LaunchError, ProcessRecord};
use crate::layout::{HostRecord, Layout};
use crate::pool::{self, PoolError};
use crate::report::ReportBoard;
use crate::sandbox;
use crate::services::{Handles, Services};
use crate::snapshot;
use crate::task::{Accepted, TaskContext, TaskRegistry};
use crate::vm::actor::{Job, Vms};
use crate::vm::lifecycle;

/// An agent that can't start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A pool can't be used.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// A file or directory can't be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// QEMU can't be asked what it can do.
    #[error("QEMU can't be used")]
    Qemu(#[from] LaunchError),
    /// A VM of this host is in a pool that the configuration does not have. Without it the VM would be in no report, as
    /// if this host had nothing of it.
    #[error("{vm} is in pool '{pool}' of this host: expected a pool of that name in the configuration")]
    PoolMissing {
        /// Which VM.
        vm: VmId,
        /// Its pool.
        pool: Name,
    },
    /// Taps and bridges are for root.
    #[error("network.mode is 'bridge', which needs root: expected 'user'")]
    BridgeWithoutRoot,
    /// No random numbers.
    #[error("no random numbers can be had: {detail}")]
    Entropy {
        /// The system's words.
        detail: String,
    },
}

/// An agent.
pub struct Agent {
    services: Arc<Services>,
    vms: Arc<Vms>,
    tasks: Arc<TaskRegistry>,
    images: Arc<Images>,
}

impl Agent {
    /// Starts: looks at the pools, asks QEMU what it can do, takes up the VMs that are on record, and ends QEMUs that
    /// are on none.
    ///
    /// # Errors
    /// When something that it can't do without is not usable.
    pub async fn start(host: HostId, config: AgentConfig, handles: Handles) -> Result<Arc<Self>, StartError> {
        if config.network.mode == NetworkMode::Bridge && !rustix::process::geteuid().is_root() {
            return Err(StartError::BridgeWithoutRoot);
        }
        let isolated_users = sandbox::can_become_users_from(config.user_id_base);
        let layout = Layout::new(&config);
        let mut pools = Vec::new();
        for dirs in layout.pools() {
            leftovers(&dirs, &host);
            pools.push(pool::open(dirs, isolated_users, config.pool_reserve_percent)?);
        }
        make_private(&layout.vm_states())?;
        make_private(layout.run())?;
        let hypervisor = handles.launcher.inspect().await?;
        report_hypervisor(&hypervisor);
        let services = Arc::new(Services {
            host,
            layout,
            launcher: handles.launcher,
            images: handles.images,
            clock: handles.clock,
            peers: handles.peers,
            board: ReportBoard::new(incarnation()?),
            pools,
            isolated_users,
            hypervisor: watch::Sender::new(Some(hypervisor)).subscribe(),
            merges: Arc::default(),
            reading: Arc::default(),
            stopping: CancellationToken::new(),
            config,
        });
        let vms = Vms::new(Arc::clone(&services));
        let agent = Self { services, vms, tasks: Arc::default(), images: Arc::default() };
        agent.take_up_vms().await?;
        Ok(Arc::new(agent))
    }

    /// What everything shares.
    pub const fn services(&self) -> &Arc<Services> {
        &self.services
    }

    /// The VMs' owners.
    pub const fn vms(&self) -> &Arc<Vms> {
        &self.vms
    }

    /// The tasks.
    pub const fn tasks(&self) -> &Arc<TaskRegistry> {
        &self.tasks
    }

    /// The images.
    pub const fn images(&self) -> &Arc<Images> {
        &self.images
    }

    /// Stops working; QEMUs stay as they are.
    pub fn stop(&self) {
        self.services.stopping.cancel();
    }

    /// Takes a task in, and has it done.
    ///
    /// # Errors
    /// When the task can't be taken in; that it fails later stands in the task.
    pub fn put_task(&self, id: &str, put: PutTask) -> Result<Task, Problem> {
        check_vm(&put)?;
        let context = match self.tasks.put(id, put)? {
            Accepted::Known(task) => return Ok(task),
            Accepted::New(context) => context,
        };
        let task = context.task();
        self.begin(context);
        Ok(task)
    }

    fn begin(&self, context: TaskContext) {
        let (reply, answer) = oneshot::channel();
        let done = self.perform(context.clone(), reply);
        let tasks = Arc::clone(&self.tasks);
        tokio::spawn(async move {
            done.await;
            let result = answer.await.unwrap_or_else(|_| {
                Err(Problem::new(ProblemCode::Internal, "the work broke off; the agent's log says why"))
            });
            tasks.finish(&context, result);
        });
    }

    /// The work that is done outside the VMs' queues; what belongs into one is put there at once, so that tasks are
    /// done in the order in which they came.
    fn perform(
        &self,
        context: TaskContext,
        reply: oneshot::Sender<Result<TaskOutput, Problem>>,
    ) -> berth_api::transport::BoxFuture<'static, ()> {
        let (services, images) = (Arc::clone(&self.services), Arc::clone(&self.images));
        let vm = context.put().vm.clone();
        match context.put().spec.clone() {
            TaskSpec::FetchImage { image, pool, from, from_pool, from_address } => Box::pin(async move {
                let from = Holder { host: &from, pool: &from_pool, address: &from_address };
                let fetched = images.fetch(&services, &context, &image, &pool, from).await;
                // Whoever put the task may have gone with the runtime.
                let _ = reply.send(fetched.map(|()| TaskOutput::Done));
            }),
            TaskSpec::DeleteImage { image, pool } => Box::pin(async move {
                let deleted = match services.layout.pool(&pool) {
                    Ok(pool) => images.delete(pool, image).await,
                    Err(problem) => Err(problem),
                };
                let _ = reply.send(deleted.map(|()| TaskOutput::Done));
            }),
            TaskSpec::ExportSnapshot { .. } => Box::pin(async move {
                let _ = reply.send(snapshot::export(&services, &context).await);
            }),
            TaskSpec::FetchBackup { .. } => Box::pin(async move {
                let _ = reply.send(snapshot::fetch(&services, &images, &context).await);
            }),
            TaskSpec::DropFetched { vm, pool } => Box::pin(async move {
                let dropped = snapshot::drop_fetched(&services, &vm, &pool).await;
                let _ = reply.send(dropped.map(|()| TaskOutput::Done));
            }),
            TaskSpec::WaitReady { timeout_ms } => {
                let handle = vm.as_ref().and_then(|vm| self.vms.get(vm));
                Box::pin(async move {
                    let ready = match (handle, vm) {
                        (Some(handle), _) => {
                            lifecycle::wait_ready(&services, &handle.status, &context, timeout_ms).await
                        }
                        (None, vm) => {
                            Err(Problem::not_found("vm", vm.map(|vm| vm.to_string()).unwrap_or_default()))
                        }
                    };
                    let _ = reply.send(ready);
                })
            }
            _ => {
                if let Some(vm) = vm {
                    self.vms.submit(&vm, Job::Task { context, reply });
                }
                Box::pin(async {})
            }
        }
    }

    async fn take_up_vms(&self) -> Result<(), StartError> {
        let found = vms_on_record(&self.services.layout)?;
        for (vm, record) in &found {
            if self.services.layout.pool(&record.pool).is_err() {
                return Err(StartError::PoolMissing { vm: vm.clone(), pool: record.pool.clone() });
            }
        }
        let known: Vec<ProcessRecord> =
            found.iter().filter_map(|(_, record)| record.process.clone()).collect();
        self.services.launcher.end_unknown(&known).await;
        // All at once: one whose monitor hangs must not keep the others waiting.
        futures_util::future::join_all(found.into_iter().map(|(vm, _)| self.vms.take_up(vm))).await;
        Ok(())
    }
}

fn check_vm(put: &PutTask) -> Result<(), Problem> {
    // Exports and fetches name a VM, and leave it alone.
    let about_none = matches!(
        put.spec,
        TaskSpec::FetchImage { .. }
            | TaskSpec::DeleteImage { .. }
            | TaskSpec::ExportSnapshot { .. }
            | TaskSpec::FetchBackup { .. }
            | TaskSpec::DropFetched { .. }
    );
    match (&put.vm, about_none) {
        (None, false) => Err(Problem::field("vm", "", "the id of the VM that the task is about")),
        _ => Ok(()),
    }
}

fn leftovers(dirs: &crate::layout::PoolDirs, host: &HostId) {
    if let Err(error) = backup::clean(dirs, host).and_then(|()| image::clean(dirs, host)) {
        tracing::debug!(pool = %dirs.name, error = durable::with_causes(&error), "nothing to clean");
    }
}

fn vms_on_record(layout: &Layout) -> Result<Vec<(VmId, HostRecord)>, FileError> {
    let directory = layout.vm_states();
    let mut found = Vec::new();
    for entry in std::fs::read_dir(&directory).map_err(FileError::io(&directory, "listed"))? {
        let entry = entry.map_err(FileError::io(&directory, "listed"))?;
        let Some(vm) = entry.file_name().to_str().and_then(|name| VmId::from_str(name).ok()) else {
            continue;
        };
        if let Some(record) = durable::read_json(&layout.host_record(&vm))? {
            found.push((vm, record));
        }
    }
    Ok(found)
}

fn make_private(directory: &Path) -> Result<(), FileError> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::create_dir_all(directory).map_err(FileError::io(directory, "made"))?;
    let mode = std::fs::Permissions::from_mode(0o700);
    std::fs::set_permissions(directory, mode).map_err(FileError::io(directory, "closed"))
}

fn incarnation() -> Result<String, StartError> {
    let mut bytes = [0u8; 8];
    getrandom::fill(&mut bytes).map_err(|error| StartError::Entropy { detail: error.to_string() })?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn report_hypervisor(hypervisor: &Hypervisor) {
    let note = hypervisor.accelerator_note.as_deref().unwrap_or_default();
    let version = &hypervisor.abilities.version;
    tracing::info!(accelerator = ?hypervisor.accelerator, note, version, "QEMU was asked what it can do");
}
