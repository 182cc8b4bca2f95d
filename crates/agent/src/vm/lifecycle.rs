//! The plain tasks of a VM: prepare, start, stop and what lies between. Each may be run twice, and after any half of it.

use std::sync::Arc;
use std::time::Duration;

use berth_api::agent::{MigrationSide, TaskOutput, VmDefinition};
use berth_model::name::Name;
use berth_model::vm::{GuestState, VmState};
use berth_model::{Problem, ProblemCode};
use berth_qmp::commands::{Cont, QueryStatus, Stop, SystemPowerdown, SystemReset};
use berth_qmp::guest_agent::{GuestAgent, ShutdownMode};

use super::process::{self, hypervisor_problem};
use super::{LaunchPlan, VmRuntime, files, sensor};
use crate::disks::Disks;
use crate::durable::{blocking, remove_tree};
use crate::fittings::Fittings;
use crate::launcher::{Process, Socket};
use crate::layout::VmRecord;
use crate::nvram::{self, Place};
use crate::services::Services;
use crate::task::TaskContext;

/// How long a guest agent may take to take in that it is to power its guest down.
const GUEST_AGENT_TIMEOUT: Duration = Duration::from_secs(5);

/// After how long a guest is asked to power down again. Shorter: one that is at it is bothered. Longer: one that did not
/// hear keeps whoever waits for it waiting.
const PRESS_AGAIN: Duration = Duration::from_secs(5);

/// Refuses a command that is older than one that was heard, and writes down one that is newer.
///
/// # Errors
/// When it is older, or the record can't be written.
pub(super) async fn admit_generation(vm: &mut VmRuntime, generation: u64) -> Result<(), Problem> {
    vm.commanded = vm.commanded.max(generation);
    if !vm.is_known() {
        return Ok(());
    }
    let seen = vm.host_record()?.generation;
    if generation < seen {
        let message = format!("{} has had a newer command: generation {seen}, not {generation}", vm.id());
        let expected = format!("at least {seen}");
        return Err(Problem::new(ProblemCode::WrongState, message).at("generation", generation, expected));
    }
    vm.change_host_record(|record| record.generation = generation).await
}

/// Makes the VM's directory, first writable layer and seed. On failure nothing of it is left.
pub(super) async fn prepare(
    vm: &mut VmRuntime,
    task: &TaskContext,
    definition: &VmDefinition,
) -> Result<TaskOutput, Problem> {
    check_identity(vm, definition)?;
    task.phase("preparing");
    let was_known = vm.is_known();
    vm.make_home(&definition.spec.pool).await?;
    if vm.vm_record().is_ok() {
        refresh(vm, definition).await?;
        return Ok(TaskOutput::Done);
    }
    let made = match files::make(vm.services(), vm.dirs()?, definition).await {
        Ok(()) => fit_out(vm, definition).await,
        Err(problem) => Err(problem),
    };
    if let Err(problem) = made {
        let directory = vm.dirs()?.disk.clone();
        blocking(move || Ok(remove_tree(&directory)?)).await?;
        if !was_known {
            vm.drop_home().await?;
        }
        return Err(problem);
    }
    Ok(TaskOutput::Done)
}

/// Writes down what the VM is: its first layers, and what its machine is fitted with.
async fn fit_out(vm: &mut VmRuntime, definition: &VmDefinition) -> Result<(), Problem> {
    let hypervisor = vm.services().hypervisor().await.ok_or_else(process::stopping)?;
    let mut fittings = Fittings::new(&hypervisor)?;
    if let Some(contents) = nvram::of_new(&vm.services().config.machine, definition)? {
        let owner = vm.services().user_id(definition.number);
        let (dirs, id) = (vm.dirs()?.clone(), definition.first_layer.clone());
        fittings.nvram = Some(id.clone());
        blocking(move || {
            Place { dirs: dirs.clone(), owner }.make(&id, &contents)?;
            Ok(nvram::sync(&dirs, &id)?)
        })
        .await?;
    }
    vm.set_vm_record(VmRecord::new(definition.clone(), Disks::first(definition), fittings)).await
}

/// Starts a process for a VM that has none, and lets the guest run.
pub(crate) async fn start(
    vm: &mut VmRuntime,
    task: &TaskContext,
    definition: &VmDefinition,
) -> Result<TaskOutput, Problem> {
    check_identity(vm, definition)?;
    check_owner(vm)?;
    vm.make_home(&definition.spec.pool).await?;
    if vm.process().is_none() {
        process::find_again(vm).await?;
        if vm.process().is_some() {
            super::actor::recover(vm).await?;
        }
    }
    if vm.process().is_none() {
        refresh(vm, definition).await?;
        task.phase("starting");
        start_cold(vm).await?;
    }
    if let Err(problem) = run_guest(vm).await {
        vm.end_process().await?;
        return Err(problem);
    }
    Ok(TaskOutput::Done)
}

/// Starts a process whose guest begins anew, and learns from the seed who it is.
async fn start_cold(vm: &mut VmRuntime) -> Result<(), Problem> {
    vm.change_host_record(|record| record.borrowed_nics = None).await?;
    let plan = LaunchPlan::cold(vm.disks()?, vm.vm_record()?.fittings.clone());
    let launched = vm.launch(&plan).await?;
    vm.install(launched).await
}

/// Asks the guest to power down and waits until its process has gone.
pub(super) async fn shutdown(
    vm: &mut VmRuntime,
    task: &TaskContext,
    timeout_ms: u64,
) -> Result<TaskOutput, Problem> {
    let Some(running) = vm.process().cloned() else { return not_running(vm) };
    if vm.status().state() == VmState::Paused {
        return Err(vm.wrong_state("a running VM: one that is held can't power itself down"));
    }
    task.phase("waiting for the guest to power down");
    let timeout = Duration::from_millis(timeout_ms);
    let waiting = tokio::time::timeout(timeout, press_until_off(vm, &running));
    match task.unless_cancelled(waiting).await? {
        Ok(pressed) => pressed?,
        Err(_) => {
            let message = format!("{} did not power down within {timeout_ms} ms of being asked to", vm.id());
            return Err(Problem::new(ProblemCode::Guest, message));
        }
    }
    vm.end_process().await?;
    Ok(TaskOutput::Done)
}

/// Takes the power away.
pub(super) async fn stop(vm: &mut VmRuntime) -> Result<TaskOutput, Problem> {
    process::quit(vm).await?;
    Ok(TaskOutput::Done)
}

/// Resets the machine.
pub(super) async fn restart(vm: &mut VmRuntime) -> Result<TaskOutput, Problem> {
    if vm.host_record()?.borrowed_nics.is_some() {
        // Its process was made for the addresses that its guest is to forget.
        vm.qmp()?;
        vm.end_process().await?;
        start_cold(vm).await?;
        run_guest(vm).await?;
        return Ok(TaskOutput::Done);
    }
    vm.qmp()?.call(SystemReset {}).await.map_err(hypervisor_problem)?;
    vm.guest_is(GuestState::Booting);
    run_guest(vm).await?;
    Ok(TaskOutput::Done)
}

/// Holds the guest.
pub(super) async fn pause(vm: &mut VmRuntime) -> Result<TaskOutput, Problem> {
    vm.qmp()?.call(Stop {}).await.map_err(hypervisor_problem)?;
    vm.guest_runs(false);
    vm.status().process_rests();
    Ok(TaskOutput::Done)
}

/// Lets a held guest go on.
pub(super) async fn resume(vm: &mut VmRuntime) -> Result<TaskOutput, Problem> {
    run_guest(vm).await?;
    Ok(TaskOutput::Done)
}

/// Removes what this host has of the VM, and what its pool has unless that is kept.
pub(crate) async fn delete(vm: &mut VmRuntime, pool: &Name, keep_files: bool) -> Result<TaskOutput, Problem> {
    vm.end_process().await?;
    if !keep_files {
        let directory = vm.services().layout.pool(pool)?.vm(vm.id());
        blocking(move || {
            remove_tree(&directory)?;
            Ok(crate::durable::sync_parent(&directory)?)
        })
        .await?;
    }
    vm.drop_home().await?;
    Ok(TaskOutput::Done)
}

/// Waits until a guest says that it is ready; done past the VM's queue, since it only looks.
///
/// # Errors
/// When it is not ready in time, panics, or its process ends: with what was waited for.
pub async fn wait_ready(
    services: &Services,
    status: &super::status::Status,
    task: &TaskContext,
    timeout_ms: u64,
) -> Result<TaskOutput, Problem> {
    let began = services.clock.now();
    task.phase("waiting for the guest");
    let mut view = status.view();
    let settled = view.wait_for(|view| {
        matches!(view.guest, GuestState::Ready | GuestState::Panicked) || view.state == VmState::Stopped
    });
    let seen = task
        .unless_cancelled(tokio::time::timeout(Duration::from_millis(timeout_ms), settled))
        .await?
        .ok()
        .and_then(Result::ok)
        .map(|view| *view);
    let guest = |message: String| Err(Problem::new(ProblemCode::Guest, message));
    match seen {
        Some(view) if view.guest == GuestState::Ready => Ok(TaskOutput::Ready {
            signal: view.signal.unwrap_or_default().to_owned(),
            after_ms: services.clock.now().millis_since(began),
        }),
        Some(view) if view.guest == GuestState::Panicked => {
            guest("the guest's kernel panicked before it was ready".to_owned())
        }
        Some(_) => {
            let trouble = status.report().trouble.map(|text| format!(": {text}")).unwrap_or_default();
            guest(format!("the VM is not running, so its guest does not get ready{trouble}"))
        }
        None => guest(format!(
            "the guest did not say within {timeout_ms} ms that it is ready: waited for its guest agent \
             (port org.qemu.guest_agent.0) to answer, or for a line on port dev.berth.probe"
        )),
    }
}

/// Lets the guest of the present process run, if it does not.
///
/// # Errors
/// When there is no process, or QEMU refuses.
async fn run_guest(vm: &mut VmRuntime) -> Result<(), Problem> {
    let qmp = vm.qmp()?;
    qmp.call(Cont {}).await.map_err(hypervisor_problem)?;
    let status = qmp.call(QueryStatus {}).await.map_err(hypervisor_problem)?;
    if !status.running {
        let message = format!("the guest of {} does not run: QEMU says '{}'", vm.id(), status.status);
        return Err(Problem::new(ProblemCode::Hypervisor, message));
    }
    vm.guest_runs(true);
    Ok(())
}

/// Asks until the process has gone: a guest that is still booting does not hear the first time.
async fn press_until_off(vm: &VmRuntime, running: &Process) -> Result<(), Problem> {
    loop {
        match ask_to_power_down(vm).await {
            // It may have ended between the last look and this.
            Err(problem) if !running.has_exited() => return Err(problem),
            _ => {}
        }
        if tokio::time::timeout(PRESS_AGAIN, running.exited()).await.is_ok() {
            return Ok(());
        }
    }
}

async fn ask_to_power_down(vm: &VmRuntime) -> Result<(), Problem> {
    let view = *vm.status().view().borrow();
    if view.signal == Some(sensor::GUEST_AGENT) {
        let services = Arc::clone(vm.services());
        let run_dir = vm.run_dir();
        let connected = services.launcher.connect(&run_dir, Socket::GuestAgent).await;
        if let Ok(stream) = connected {
            let agent = GuestAgent::over(stream);
            if agent.shutdown(ShutdownMode::Powerdown, GUEST_AGENT_TIMEOUT).await.is_ok() {
                return Ok(());
            }
        }
    }
    // The power button: for guests without an agent, and for agents that do not answer any more.
    vm.qmp()?.call(SystemPowerdown {}).await.map_err(hypervisor_problem)?;
    Ok(())
}

/// A VM that rests is where it was to be brought; one that this host does not have is not.
fn not_running(vm: &VmRuntime) -> Result<TaskOutput, Problem> {
    if vm.is_known() { Ok(TaskOutput::Done) } else { Err(Problem::not_found("vm", vm.id())) }
}

/// Takes over what the manager now says that the VM is to be.
async fn refresh(vm: &mut VmRuntime, definition: &VmDefinition) -> Result<(), Problem> {
    let record = vm.vm_record()?.clone();
    if record.definition != *definition {
        files::write_seed(vm.services(), vm.dirs()?, definition).await?;
        let definition = definition.clone();
        vm.set_vm_record(VmRecord { definition, ..record }).await?;
    }
    Ok(())
}

pub(crate) fn check_identity(vm: &VmRuntime, definition: &VmDefinition) -> Result<(), Problem> {
    if definition.id == *vm.id() {
        return Ok(());
    }
    Err(Problem::field("definition.id", &definition.id, format!("{}, which the task is about", vm.id())))
}

/// A VM that was given away is not started here, whatever this host still has of it.
fn check_owner(vm: &VmRuntime) -> Result<(), Problem> {
    let side = vm.host_record().ok().and_then(|record| record.migration.as_ref());
    match side {
        Some(MigrationSide::Source { migration, handed_over: true, .. }) => Err(Problem::new(
            ProblemCode::WrongState,
            format!("{} was handed over to another host by {migration}", vm.id()),
        )),
        Some(MigrationSide::Target { migration, .. }) => Err(Problem::new(
            ProblemCode::WrongState,
            format!("{} is being received by {migration}", vm.id()),
        )),
        Some(MigrationSide::Source { .. }) | None => Ok(()),
    }
}
