//! Putting a VM back to a snapshot, whatever it is doing: running, held, panicked, hung, or without a process.
//!
//! ```text
//! a process is made ready: memory.raw mapped, device state loaded    the VM runs on and knows nothing ([`ready`])
//! records are staged        ┐
//! the old process unplugged ├─► it is killed ─► the new one is plugged in ─► the records get their names ─► cont
//! ```
//!
//! Nothing here grows with the guest's memory: the image is mapped. And between the old guest's last instruction and the
//! new one's first nothing waits for a disk: the records' content is there before, and that they have got their names is
//! brought to the disk afterwards. A power cut in between finds the old records, whole, and the old disk, for nothing of
//! that is removed before; whoever commanded the restore then finds it not done and does it again.
//!
//! The old process is killed without a word, since a guest that is to be put back has nothing to say, and without being
//! waited for: once the signal is sent, the kernel lets none of its threads run another instruction of its own, while
//! taking its memory apart takes the longer the larger it was. Nor could it harm: the new process writes to a new layer,
//! and everything below is frozen. It is waited for before the snapshot's old neighbour, the layer that it wrote to, is
//! removed.
//!
//! **A restore that fails** leaves the VM running as it was, if it is the snapshot that is at fault, or QEMU that does
//! not come up: all of that is found before the old process is killed. When something fails afterwards, the record names
//! the old chain again, the new layer is removed, and the VM is stopped: whoever commanded this takes an undo snapshot
//! first, and has the VM put back to that.
//!
//! A process that is in the way, as one may be that hangs with a file open that it should not have, is killed first, and
//! the restore goes on without it. So is one that writes to the very layer that is to be made: then the same task is
//! being run again.

use std::time::{Duration, Instant};

use berth_api::agent::{TaskOutput, VmDefinition};
use berth_model::snapshot::{ClockSetting, RestoreFacts};
use berth_model::{LayerId, Problem, ProblemCode, SnapshotId};
use berth_qmp::HostTime;

use super::ready::{self, Machine, Network, NotReady, Ready, Wanted};
use super::{afterwards, archive, identity, layers, working_set};
use crate::disks::DISKS_MAX;
use crate::durable::{self, blocking, with_causes};
use crate::launcher::Process;
use crate::layout::VmRecord;
use crate::migration::incoming::{Incoming, IncomingError};
use crate::nvram;
use crate::task::TaskContext;
use crate::vm::VmRuntime;

/// How long the old process may take to let go of its network: it is a matter of a millisecond, unless it hangs.
const UNPLUG_TIMEOUT: Duration = Duration::from_millis(100);
/// How long a killed process may take to be gone when something waits for what it holds.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// How long the command's answer waits to hear that the clock was set; the guest runs meanwhile. A guest agent that is
/// there mostly answers sooner.
const CLOCK_WAIT: Duration = Duration::from_millis(150);

/// Where a VM is to be put back to.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// The VM as it is told to be; the machine is the snapshot's.
    pub definition: &'a VmDefinition,
    /// The snapshot.
    pub snapshot: &'a SnapshotId,
    /// The layer that the VM is to write to.
    pub new_top: &'a LayerId,
    /// The guest is to be held afterwards, though it ran then.
    pub paused: bool,
}

impl From<IncomingError> for Problem {
    fn from(error: IncomingError) -> Self {
        let code = match &error {
            IncomingError::Socket(_) => ProblemCode::Internal,
            _ => ProblemCode::Hypervisor,
        };
        Problem::new(code, with_causes(&error))
    }
}

/// Puts the VM back to a snapshot.
///
/// # Errors
/// When the snapshot is not here or not whole, or can't be loaded: the VM is then as it was. When the system or QEMU
/// fails after the old process was killed: the VM is then stopped, and its disk as it was.
pub async fn restore(
    vm: &mut VmRuntime,
    context: &TaskContext,
    target: Target<'_>,
) -> Result<TaskOutput, Problem> {
    context.phase("restoring");
    let mut placed = prepare(vm, target).await?.take_place(vm).await?;
    if let Err(error) = placed.let_go_on(vm).await {
        return Err(placed.go_back(vm, error.into()).await);
    }
    let facts = placed.settle(vm).await?;
    Ok(TaskOutput::Restored { facts })
}

/// A machine that is ready to take the VM's place.
pub struct Prepared {
    ready: Ready,
    warm_process: bool,
    paused: bool,
    new_top: LayerId,
    started: Instant,
}

/// Makes ready what is to take the VM's place.
///
/// # Errors
/// As [`restore`].
pub async fn prepare(vm: &mut VmRuntime, target: Target<'_>) -> Result<Prepared, Problem> {
    let started = Instant::now();
    check(vm, target.new_top)?;
    let (ready, warm_process) = get_ready(vm, target).await?;
    Ok(Prepared { ready, warm_process, paused: target.paused, new_top: target.new_top.clone(), started })
}

impl Prepared {
    /// Ends it, and removes what was made for it.
    pub async fn abandon(self, vm: &VmRuntime) {
        let Self { ready, new_top, .. } = self;
        drop(ready);
        if let Ok(dirs) = vm.dirs() {
            ready::forget_layer(dirs, vm.chain().unwrap_or_default(), &new_top).await;
        }
    }

    /// The deed: what was the VM is killed, and this is the VM. Its guest stands still.
    ///
    /// # Errors
    /// When the system fails: the VM is then stopped, and its disk as it was.
    pub async fn take_place(self, vm: &mut VmRuntime) -> Result<Placed, Problem> {
        let Self { ready, warm_process, paused, new_top, started } = self;
        let was_running = ready.manifest.memory.as_ref().is_some_and(|memory| memory.was_running);
        let mut placed = Placed {
            incoming: None,
            runs: was_running && !paused,
            snapshot: ready.manifest.snapshot.clone(),
            old_record: vm.vm_record().ok().cloned(),
            old_process: vm.process().cloned(),
            new_top,
            facts: RestoreFacts {
                warm_process,
                working_set_bytes: ready.working_set_bytes,
                ..RestoreFacts::default()
            },
            started,
        };
        match switch(vm, ready).await {
            Ok(incoming) => {
                placed.incoming = incoming;
                Ok(placed)
            }
            Err(problem) => Err(placed.go_back(vm, problem).await),
        }
    }
}

/// A machine that is the VM.
pub struct Placed {
    /// Lets the guest run; none for a VM that was put back to a disk alone.
    incoming: Option<Incoming>,
    runs: bool,
    snapshot: SnapshotId,
    old_record: Option<VmRecord>,
    old_process: Option<Process>,
    new_top: LayerId,
    facts: RestoreFacts,
    started: Instant,
}

impl Placed {
    /// Lets the guest run if it shall; since when, if it does.
    ///
    /// # Errors
    /// When QEMU refuses, or does not say that it did.
    pub async fn let_go_on(&mut self, vm: &VmRuntime) -> Result<Option<HostTime>, IncomingError> {
        let since = match &mut self.incoming {
            Some(incoming) if self.runs => Some(incoming.run().await?),
            Some(_) => {
                vm.status().process_rests();
                None
            }
            None => None,
        };
        self.facts.running_us = u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX);
        Ok(since)
    }

    /// After a failure: no process, the disk that the VM had, and the record saying so.
    pub async fn go_back(self, vm: &mut VmRuntime, problem: Problem) -> Problem {
        go_back(vm, problem, self.old_record, &self.new_top).await
    }

    /// What has time when the guest runs: the clock is set, all is brought to the disk, and what nothing needs any more is
    /// removed.
    ///
    /// # Errors
    /// When the system refuses; the VM is put back all the same.
    pub async fn settle(self, vm: &mut VmRuntime) -> Result<RestoreFacts, Problem> {
        let Self { incoming, runs, snapshot, old_record, old_process, mut facts, .. } = self;
        facts.pages_faulted = match (&incoming, vm.process()) {
            (Some(_), Some(process)) => {
                let memory = archive::SnapshotFiles::of(vm.dirs()?, &snapshot).memory();
                working_set::pages_present(process.record().pid, memory).await
            }
            _ => 0,
        };
        let clock = if runs { Some(afterwards::begin(vm, &snapshot)?) } else { None };
        // The guest runs: now there is time for the disk.
        layers::sync(vm.dirs()?, &vm.disks()?).await?;
        let (dirs, nvram) = (vm.dirs()?.clone(), vm.vm_record()?.fittings.nvram.clone());
        blocking(move || Ok(nvram.map_or(Ok(()), |id| nvram::sync(&dirs, &id))?)).await?;
        vm.sync_records().await?;
        if let Some(process) = old_process {
            process.exited().await;
        }
        remove_abandoned(vm, old_record.as_ref()).await;
        facts.clock = match clock {
            Some(told) => {
                tokio::time::timeout(CLOCK_WAIT, told).await.ok().and_then(Result::ok).unwrap_or_default()
            }
            None => ClockSetting::Held,
        };
        tracing::info!(vm = %vm.id(), %snapshot, ?facts, "put back");
        Ok(facts)
    }
}

/// Finds out what can be found out before anything is done.
fn check(vm: &VmRuntime, new_top: &LayerId) -> Result<(), Problem> {
    let below = vm.chain().unwrap_or_default().split_last().map_or(&[][..], |(_, below)| below);
    if below.contains(new_top) {
        let message = format!("{new_top} is a frozen layer of {}", vm.id());
        return Err(Problem::new(ProblemCode::InvalidInput, message).at("new_top", new_top, "a new id"));
    }
    Ok(())
}

/// The machine that the VM is to become: the one that was made ready before, or one that is made so now. Says whether
/// it was ready before.
async fn get_ready(vm: &mut VmRuntime, target: Target<'_>) -> Result<(Ready, bool), Problem> {
    let wanted = Wanted {
        definition: target.definition.clone(),
        snapshot: target.snapshot.clone(),
        new_top: target.new_top.clone(),
    };
    if let Some(warm) = vm.ready_mut().take()
        && let Some(ready) = warm.take().await
    {
        return Ok((ready, true));
    }
    let ground = vm.ground()?;
    if let Some(network) = ready::beside(vm, target.new_top) {
        match ready::make(&ground, &wanted, network).await {
            Ok(ready) => return Ok((ready, false)),
            Err(NotReady { problem, in_the_way: false }) => {
                ready::forget_layer(&ground.dirs, vm.chain()?, target.new_top).await;
                return Err(problem);
            }
            Err(NotReady { problem, .. }) => {
                tracing::warn!(vm = %vm.id(), %problem, "the present process is killed first: it may be in the way");
            }
        }
    }
    // What is wrong with the snapshot is to be found while the VM still runs, in this case too.
    archive::read(&ground.dirs, target.snapshot)?;
    if let Some(process) = vm.process().cloned() {
        unplug(vm).await;
        process.kill();
        let gone = tokio::time::timeout(END_TIMEOUT, process.exited());
        gone.await.map_err(|_| hangs(vm))?;
    } else {
        vm.end_process().await?;
    }
    let forwards = vm.host_record()?.forwards.clone();
    match ready::make(&ground, &wanted, Network::Free(forwards)).await {
        Ok(ready) => Ok((ready, false)),
        Err(NotReady { problem, .. }) => {
            let old = vm.vm_record().ok().cloned();
            Err(go_back(vm, problem, old, target.new_top).await)
        }
    }
}

fn hangs(vm: &VmRuntime) -> Problem {
    Problem::new(ProblemCode::Hypervisor, format!("the process of {} does not end", vm.id()))
}

/// The deed. The guest stands still afterwards; none: there is none.
async fn switch(vm: &mut VmRuntime, ready: Ready) -> Result<Option<Incoming>, Problem> {
    let Ready { manifest, record, forwards, machine, .. } = ready;
    let Some(mut machine) = machine else {
        vm.end_process().await?;
        vm.set_vm_record(record).await?;
        vm.change_host_record(|host| host.borrowed_nics = manifest.borrowed_nics).await?;
        return Ok(None);
    };
    let mut host = vm.host_record()?.clone();
    host.process = Some(machine.process().record().clone());
    host.sockets = Some(machine.sockets.clone());
    host.forwards = forwards;
    host.trouble = None;
    host.borrowed_nics.clone_from(&manifest.borrowed_nics);
    let (staged, ()) = tokio::join!(vm.stage(record, host), unplug(vm));
    let staged = staged?;
    let old = vm.process().cloned();
    if let Some(process) = &old {
        process.kill();
    }
    plug(&mut machine, old.as_ref()).await?;
    let (launched, incoming) = machine.into_parts();
    let process = launched.process.clone();
    if let Err(problem) = vm.take_over(staged, launched).await {
        process.kill();
        return Err(problem);
    }
    identity::isolate(vm).await?;
    Ok(Some(incoming))
}

/// Gives the new process its network. One that the old process has not let go of is waited for.
async fn plug(machine: &mut Machine, old: Option<&Process>) -> Result<(), Problem> {
    let qmp = machine.qmp().clone();
    let (Err(problem), Some(old)) = (machine.plug.plug(&qmp).await, old) else { return Ok(()) };
    tracing::debug!(%problem, "the network is waited for");
    // It has been killed.
    let _ = tokio::time::timeout(END_TIMEOUT, old.exited()).await;
    machine.plug.plug(&qmp).await
}

/// After a failure: no process, the disk that the VM had, and the record saying so.
async fn go_back(
    vm: &mut VmRuntime,
    mut problem: Problem,
    old_record: Option<VmRecord>,
    new_top: &LayerId,
) -> Problem {
    let undone = async {
        vm.end_process().await?;
        let Some(record) = old_record else { return Ok(()) };
        // A try of the same task that was broken off may have made the new layer the VM's already.
        let was_new = record.chain.contains(new_top);
        vm.set_vm_record(record).await?;
        if was_new {
            return Ok(());
        }
        layers::close_tops(vm, DISKS_MAX, new_top).await?;
        let nvram = vm.dirs()?.nvram(new_top);
        blocking(move || Ok(durable::remove_tree(&nvram)?)).await
    };
    if let Err(error) = undone.await {
        tracing::warn!(vm = %vm.id(), %error, "a failed restore leaves something behind");
        problem.message.push_str("; and the VM could not be given its disk back: ");
        problem.message.push_str(&error.message);
    }
    problem
}

/// Takes the present process, if there is one, off the network, so that its taps and ports are free for the new one
/// before its memory has been taken apart. One that does not obey is killed all the same, and the new one waits for it.
async fn unplug(vm: &VmRuntime) {
    let (Ok(qmp), Ok(definition)) = (vm.qmp(), vm.definition()) else { return };
    let unplugged = async {
        for index in 0..definition.spec.nics.len() {
            // It may have gone already.
            let _ = qmp.call_untyped("netdev_del", serde_json::json!({"id": format!("net{index}")})).await;
        }
    };
    let _ = tokio::time::timeout(UNPLUG_TIMEOUT, unplugged).await;
}

/// Removes the layers that the VM wrote to before, and what its machine remembered beside it. The restore has succeeded:
/// that this fails is only worth a warning.
async fn remove_abandoned(vm: &VmRuntime, old_record: Option<&VmRecord>) {
    let (Ok(dirs), Ok(record)) = (vm.dirs(), vm.vm_record()) else { return };
    let (dirs, record) = (dirs.clone(), record.clone());
    if old_record.is_some_and(|old| old.disks() == record.disks()) {
        return;
    }
    let removed = blocking(move || {
        nvram::remove_others(&dirs, record.fittings.nvram.as_ref())?;
        super::remove_unneeded_layers(&dirs, &record.disks())
    })
    .await;
    if let Err(error) = removed {
        tracing::warn!(vm = %vm.id(), %error, "a layer that nothing needs stays behind");
    }
}
