//! One VM on this host: what is known of it, its process, and what may be done with the two.
//!
//! Each VM has one owner, a task that holds the [`VmRuntime`] and does one thing after another ([`actor`]); everybody
//! else puts work into its queue, and reads the [`status`] and the console past it. So no two pieces of work about
//! one VM ever meet.
//!
//! What must survive is written down before it matters: that a process is the VM's before its guest runs, that
//! the chain has a new top before the guest writes to it, that a VM was given away before the other side lets it run.

use std::path::PathBuf;
use std::sync::Arc;

use berth_api::agent::{MigrationSide, VmDefinition};
use berth_model::name::Name;
use berth_model::vm::{GuestState, VmState};
use berth_model::{LayerId, Problem, ProblemCode, VmId};
use berth_qmp::Qmp;

use crate::console::Console;
use crate::disks::Disks;
use crate::durable::{self, Staged, blocking};
use crate::fittings::Fittings;
use crate::launcher::{Exit, Launched, Process};
use crate::layout::{HostRecord, VmDirs, VmRecord};
use crate::qemu;
use crate::services::Services;
use crate::vm::process::Running;

pub mod actor;
pub mod files;
pub mod lifecycle;
pub mod process;
pub mod sensor;
pub mod status;

use status::Status;

/// Where a new process takes the guest's memory from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Memory {
    /// Nowhere: it is empty.
    Anonymous,
    /// A snapshot's memory image, mapped privately. It must never be written while the process lives.
    Image(PathBuf),
}

/// How a process is to be started. It never lets the guest run by itself: that takes a `cont`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaunchPlan {
    /// The disks' layers, up to the writable tops.
    pub disks: Disks,
    /// Where the guest's memory comes from.
    pub memory: Memory,
    /// What the machine is fitted with.
    pub fittings: Fittings,
    /// It is to wait for `migrate-incoming`.
    pub incoming: bool,
}

impl LaunchPlan {
    /// A cold start on these disks.
    pub const fn cold(disks: Disks, fittings: Fittings) -> Self {
        Self { disks, memory: Memory::Anonymous, fittings, incoming: false }
    }
}

/// What this host has of a VM.
#[derive(Debug, Clone)]
struct Home {
    dirs: VmDirs,
    host: HostRecord,
    vm: Option<VmRecord>,
}

/// Records that are on the disk and not yet under their names: see [`VmRuntime::stage`].
#[derive(Debug)]
pub struct StagedHome {
    home: Home,
    vm: Staged,
    host: Staged,
}

/// One VM, in the hands of its owner.
pub struct VmRuntime {
    services: Arc<Services>,
    id: VmId,
    home: Option<Home>,
    running: Option<Running>,
    stray: Option<process::Stray>,
    next_serial: u64,
    /// The newest generation that was commanded since the agent's start.
    commanded: u64,
    status: Arc<Status>,
    console: Arc<Console>,
    notices: tokio::sync::mpsc::UnboundedSender<process::Notice>,
    /// A process that is being made ready for a restore that is about to be asked for.
    ready: Option<crate::snapshot::Warm>,
}

impl VmRuntime {
    /// Which VM.
    pub const fn id(&self) -> &VmId {
        &self.id
    }

    /// What the whole agent shares.
    pub const fn services(&self) -> &Arc<Services> {
        &self.services
    }

    /// How the VM is.
    pub const fn status(&self) -> &Arc<Status> {
        &self.status
    }

    /// Whether this host has anything of the VM.
    pub const fn is_known(&self) -> bool {
        self.home.is_some()
    }

    fn home(&self) -> Result<&Home, Problem> {
        self.home.as_ref().ok_or_else(|| Problem::not_found("vm", &self.id))
    }

    fn home_mut(&mut self) -> Result<&mut Home, Problem> {
        match &mut self.home {
            Some(home) => Ok(home),
            None => Err(Problem::not_found("vm", &self.id)),
        }
    }

    /// The VM's directories.
    ///
    /// # Errors
    /// When this host has nothing of the VM.
    pub fn dirs(&self) -> Result<&VmDirs, Problem> {
        Ok(&self.home()?.dirs)
    }

    /// The host's record.
    ///
    /// # Errors
    /// When this host has nothing of the VM.
    pub fn host_record(&self) -> Result<&HostRecord, Problem> {
        Ok(&self.home()?.host)
    }

    /// The pool's record.
    ///
    /// # Errors
    /// When the VM was not prepared here.
    pub fn vm_record(&self) -> Result<&VmRecord, Problem> {
        let missing = || {
            Problem::new(ProblemCode::WrongState, format!("{} has not been prepared on this host", self.id))
        };
        self.home()?.vm.as_ref().ok_or_else(missing)
    }

    /// What the VM is to be.
    ///
    /// # Errors
    /// When the VM was not prepared here.
    pub fn definition(&self) -> Result<&VmDefinition, Problem> {
        Ok(&self.vm_record()?.definition)
    }

    /// The root disk's layers from the one above the image to the writable top.
    ///
    /// # Errors
    /// When the VM was not prepared here.
    pub fn chain(&self) -> Result<&[LayerId], Problem> {
        Ok(&self.vm_record()?.chain)
    }

    /// The layers of all disks.
    ///
    /// # Errors
    /// When the VM was not prepared here.
    pub fn disks(&self) -> Result<Disks, Problem> {
        Ok(self.vm_record()?.disks())
    }

    /// The guest's memory in bytes, as its QEMU is told.
    ///
    /// # Errors
    /// When the VM was not prepared here, or it is not known yet what runs guests on this host.
    pub fn memory_bytes(&self) -> Result<u64, Problem> {
        let spec = &self.definition()?.spec;
        let hypervisor = self.services().hypervisor.borrow();
        let accelerator = hypervisor.as_ref().map(|hypervisor| hypervisor.accelerator);
        let accelerator = accelerator.ok_or_else(|| {
            Problem::new(ProblemCode::Hypervisor, "QEMU has not been asked yet what it can do")
        })?;
        Ok(qemu::memory_bytes(spec.memory_mib, accelerator, &spec.machine_type))
    }

    /// The user and group of the VM's process; none when it is the agent's own.
    ///
    /// # Errors
    /// When the VM was not prepared here.
    pub fn user_id(&self) -> Result<Option<u32>, Problem> {
        Ok(self.services.user_id(self.definition()?.number))
    }

    /// What a process of the VM is started from.
    ///
    /// # Errors
    /// When the VM was not prepared here.
    pub fn ground(&self) -> Result<process::Ground, Problem> {
        Ok(process::Ground {
            services: Arc::clone(&self.services),
            definition: self.definition()?.clone(),
            dirs: self.dirs()?.clone(),
        })
    }

    /// Where the present process's sockets and log are.
    pub fn run_dir(&self) -> PathBuf {
        match &self.home {
            Some(home) => home.dirs.sockets(home.host.sockets.as_deref()),
            None => self.services.run_dir(&self.id),
        }
    }

    /// The present process's monitor.
    ///
    /// # Errors
    /// When there is no process.
    pub fn qmp(&self) -> Result<&Qmp, Problem> {
        self.running.as_ref().map(|running| &running.qmp).ok_or_else(|| self.wrong_state("a running VM"))
    }

    /// The present process.
    pub fn process(&self) -> Option<&Process> {
        self.running.as_ref().map(|running| &running.process)
    }

    /// Whether the VM has a process that can't be spoken to.
    pub const fn has_stray(&self) -> bool {
        self.stray.is_some()
    }

    /// Where a process is kept that was made ready for a restore.
    pub const fn ready_mut(&mut self) -> &mut Option<crate::snapshot::Warm> {
        &mut self.ready
    }

    /// A problem that says in which state the VM is, and which was expected.
    pub fn wrong_state(&self, expected: &str) -> Problem {
        let state = self.status.state();
        Problem::new(ProblemCode::WrongState, format!("{} is {state}: expected {expected}", self.id))
            .at("state", state, expected)
    }

    /// Whether the VM has no process, so that its disk rests.
    pub fn rests(&self) -> bool {
        self.running.is_none() && self.stray.is_none() && self.status.state() == VmState::Stopped
    }

    /// Makes this host know of a VM in a pool; nothing if it does.
    ///
    /// # Errors
    /// When there is no such pool, or the record can't be written.
    pub async fn make_home(&mut self, pool: &Name) -> Result<(), Problem> {
        if let Some(home) = &self.home {
            if home.host.pool == *pool {
                return Ok(());
            }
            let message = format!("{} is in pool '{}' on this host", self.id, home.host.pool);
            return Err(Problem::new(ProblemCode::WrongState, message).at(
                "pool",
                pool,
                home.host.pool.as_str(),
            ));
        }
        let dirs = self.services.layout.vm(&self.id, pool)?;
        let path = dirs.vm_record();
        let vm = blocking(move || Ok(durable::read_json::<VmRecord>(&path)?)).await?;
        let host = HostRecord { generation: self.commanded, ..HostRecord::new(pool.clone()) };
        let home = Home { dirs, host, vm };
        self.save_host(&home).await?;
        self.home = Some(home);
        self.publish();
        Ok(())
    }

    /// Changes the host's record, durably.
    ///
    /// # Errors
    /// When it can't be written; the record is then as it was.
    pub async fn change_host_record(&mut self, change: impl FnOnce(&mut HostRecord)) -> Result<(), Problem> {
        let mut home = self.home()?.clone();
        change(&mut home.host);
        if home.host != self.home()?.host {
            self.save_host(&home).await?;
            self.home = Some(home);
            self.publish();
        }
        Ok(())
    }

    /// Writes down this host's part in a migration; none when it is resolved.
    ///
    /// # Errors
    /// When it can't be written; the record is then as it was.
    pub async fn set_migration(&mut self, side: Option<MigrationSide>) -> Result<(), Problem> {
        self.change_host_record(|record| record.migration = side).await
    }

    /// Writes down what the VM is to be and which layers it has.
    ///
    /// # Errors
    /// When it can't be written; the record is then as it was.
    pub async fn set_vm_record(&mut self, record: VmRecord) -> Result<(), Problem> {
        let path = self.dirs()?.vm_record();
        if self.home()?.vm.as_ref() != Some(&record) {
            let written = record.clone();
            blocking(move || Ok(durable::write_json(&path, &written)?)).await?;
            self.home_mut()?.vm = Some(record);
            self.publish();
        }
        Ok(())
    }

    /// Writes down new chains of layers.
    ///
    /// # Errors
    /// When they can't be written; the chains are then as they were.
    pub async fn set_disks(&mut self, disks: Disks) -> Result<(), Problem> {
        let VmRecord { definition, fittings, .. } = self.vm_record()?.clone();
        self.set_vm_record(VmRecord::new(definition, disks, fittings)).await
    }

    /// Forgets the pool's record after the VM's files have been removed or given away.
    ///
    /// # Errors
    /// When this host has nothing of the VM.
    pub fn drop_vm_record(&mut self) -> Result<(), Problem> {
        self.home_mut()?.vm = None;
        self.publish();
        Ok(())
    }

    /// Forgets the VM altogether: this host has nothing of it any more. There must be no process.
    ///
    /// # Errors
    /// When the record can't be removed.
    pub async fn drop_home(&mut self) -> Result<(), Problem> {
        let Some(home) = self.home.clone() else { return Ok(()) };
        blocking(move || {
            durable::remove_tree(&home.dirs.run)?;
            Ok(durable::remove_tree(&home.dirs.state)?)
        })
        .await?;
        self.home = None;
        self.status.forget();
        self.console.hang_up();
        Ok(())
    }

    /// Starts a process for this VM. One that it has already must have been killed, though it need not be gone: its
    /// sockets and its ports go to the new one. The new one is not the VM's until [`Self::install`], and its guest does
    /// not run.
    ///
    /// # Errors
    /// When the process does not come up; there is then none.
    pub async fn launch(&mut self, plan: &LaunchPlan) -> Result<Launched, Problem> {
        process::launch(self, plan).await
    }

    /// Makes a process the VM's present one, durably; one that it had before is ended first.
    ///
    /// # Errors
    /// When it can't be written down; the new process is then ended too.
    pub async fn install(&mut self, launched: Launched) -> Result<(), Problem> {
        process::install(self, launched).await
    }

    /// The records as they are to be once a loaded process is the VM's, on the disk but not yet under their names, so
    /// that taking them into use waits for nothing. Nothing of the VM may be written down before [`Self::take_over`].
    ///
    /// # Errors
    /// When they can't be written, or this host has nothing of the VM.
    pub async fn stage(&self, vm: VmRecord, host: HostRecord) -> Result<StagedHome, Problem> {
        let mut home = self.home()?.clone();
        let paths = (home.dirs.vm_record(), home.dirs.host_record());
        home.vm = Some(vm.clone());
        home.host = host.clone();
        let (vm, host) =
            blocking(move || Ok((Staged::json(&paths.0, &vm)?, Staged::json(&paths.1, &host)?))).await?;
        Ok(StagedHome { home, vm, host })
    }

    /// Makes a loaded process the VM's present one, in the place of one that has been killed, which need not be gone. It
    /// is on record afterwards, whatever becomes of the agent; [`Self::sync_records`] makes the records outlast the
    /// machine's power, too.
    ///
    /// # Errors
    /// When the system refuses: what was staged is on record, or the half of it that is about the disk, or nothing.
    pub async fn take_over(&mut self, staged: StagedHome, launched: Launched) -> Result<(), Problem> {
        let StagedHome { home, vm, host } = staged;
        // The disk first: the guest does not run before both are there, and a disk on record with an old process is a
        // VM whose process has ended.
        blocking(move || Ok(vm.name().and_then(|_| host.name())?)).await?;
        self.home = Some(home);
        process::replace(self, launched);
        self.publish();
        Ok(())
    }

    /// Brings it to the disk that the records have their names.
    ///
    /// # Errors
    /// When the system refuses.
    pub async fn sync_records(&self) -> Result<(), Problem> {
        let paths = [self.dirs()?.vm_record(), self.dirs()?.host_record()];
        blocking(move || Ok(paths.iter().try_for_each(|path| durable::sync_parent(path))?)).await
    }

    /// Ends the VM's process without asking the guest, waits until it is gone, and writes that down.
    ///
    /// # Errors
    /// When it can't be written down, or the process does not end.
    pub async fn end_process(&mut self) -> Result<Option<Exit>, Problem> {
        process::end(self).await
    }

    async fn save_host(&self, home: &Home) -> Result<(), Problem> {
        let (directory, path, record) = (home.dirs.state.clone(), home.dirs.host_record(), home.host.clone());
        blocking(move || {
            std::fs::create_dir_all(&directory).map_err(durable::FileError::io(&directory, "made"))?;
            durable::sync_parent(&directory)?;
            Ok(durable::write_json(&path, &record)?)
        })
        .await
    }

    /// Takes the present process's word, for once not by an event, for whether its guest runs.
    pub fn guest_runs(&self, runs: bool) {
        if let Some(running) = &self.running {
            self.status.process_runs(running.serial, runs);
        }
    }

    /// Says how the present process's guest is.
    pub fn guest_is(&self, guest: GuestState) {
        if let Some(running) = &self.running {
            self.status.guest_is(running.serial, guest, None);
        }
    }

    fn publish(&self) {
        if let Some(home) = &self.home {
            self.status.set_record(&home.host, home.vm.as_ref());
        }
    }
}
