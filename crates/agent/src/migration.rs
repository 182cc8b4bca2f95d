//! Moving a VM to another host while its guest runs.
//!
//! The source's agent does the work: it connects to the target's, and both carry QEMU's own migration stream between
//! their QEMUs ([`wire`] has the protocol). [`source`] and [`target`] are one function each that reads as the list of
//! phases; what this file has are the tasks around them, and what an agent does that finds a migration half done
//! ([`recover`]).
//!
//! **Who may run the guest** can be told at every instant from what is on disk. The source may, until it has written the
//! marker that it gave the VM away. From then on only the target may, once it is told; and the source again only when the
//! manager, having made sure that the target has thrown away what it had, says so. The target does that only as long as
//! its own marker does not say that the guest was told to run ([`arrival`]): after that the VM is the target's, even if
//! its process has died. The rest follows from it: an agent that finds its VM without the source's marker lets it run,
//! whatever QEMU was doing; one that finds the marker does nothing; a target that is not told does nothing either.

use berth_api::agent::{MigrationSide, TaskOutput, TaskSpec};
use berth_model::{OperationId, Problem, ProblemCode};
use berth_qmp::Qmp;
use berth_qmp::commands::{MigrationStatus, QueryMigrate, QueryStatus};

use crate::durable::blocking;
use crate::image;
use crate::snapshot::layers::refused;
use crate::task::TaskContext;
use crate::vm::VmRuntime;

mod arrival;
pub mod convergence;
pub mod incoming;
mod journey;
pub mod link;
mod marker;
pub mod outgoing;
mod put_back;
mod recovery;
mod source;
pub mod storage;
mod target;
pub mod wire;

pub(crate) use recovery::recover;
pub(crate) use source::move_away;
pub(crate) use target::receive;

pub use wire::UPGRADE;

use arrival::NotRunning;
use marker::{Deed, Mark};
use target::Admission;

/// As target: expects the VM from a host. What can be found wrong before anything is sent is found here.
///
/// # Errors
/// When the VM is here already, or its image or pool is not; nothing is then left.
pub(crate) async fn admit(vm: &mut VmRuntime, task: &TaskContext) -> Result<TaskOutput, Problem> {
    let TaskSpec::AdmitMigration { migration, definition, source, shared_pool, put_back } = &task.put().spec
    else {
        return Err(Problem::new(ProblemCode::Internal, "a task that admits nothing"));
    };
    task.phase("preparing");
    let was_known = vm.is_known();
    let admission = Admission {
        migration: migration.clone(),
        source: source.clone(),
        shared_pool: *shared_pool,
        definition: (**definition).clone(),
        put_back: put_back.clone(),
    };
    match expect(vm, &admission).await {
        Ok(()) => Ok(TaskOutput::Done),
        Err(problem) => {
            if !was_known {
                vm.drop_home().await?;
            }
            Err(problem)
        }
    }
}

async fn expect(vm: &mut VmRuntime, admission: &Admission) -> Result<(), Problem> {
    let definition = &admission.definition;
    vm.make_home(&definition.spec.pool).await?;
    let ours = match &vm.host_record()?.migration {
        None => false,
        Some(MigrationSide::Target { migration, .. }) if *migration == admission.migration => true,
        Some(side) => {
            let message = format!("{} is in another migration on this host: {side:?}", vm.id());
            return Err(Problem::new(ProblemCode::WrongState, message));
        }
    };
    if vm.process().is_some() && !ours {
        return Err(vm.wrong_state("a VM that is not on this host"));
    }
    match (admission.shared_pool, vm.vm_record().is_ok()) {
        (true, false) => return Err(Problem::not_found("vm", format!("{} in the shared pool", vm.id()))),
        (false, true) if !ours => {
            let message = format!("this host has files of {} already", vm.id());
            return Err(Problem::new(ProblemCode::WrongState, message));
        }
        _ => {}
    }
    image::check_present(&vm.dirs()?.pool, &definition.image).await?;
    if ours {
        return Ok(());
    }
    // One that was left behind must not be taken for this migration's.
    arrival::forget(vm).await?;
    admission.write(vm)?;
    let side = MigrationSide::Target { migration: admission.migration.clone(), loaded: false };
    vm.set_migration(Some(side)).await
}

/// As target: forgets the migration and removes what came of it; nothing if there is nothing.
///
/// # Errors
/// When the guest runs here, or something can't be removed.
pub(crate) async fn refuse(
    vm: &mut VmRuntime,
    migration: &OperationId,
    shared_pool: bool,
) -> Result<TaskOutput, Problem> {
    if !vm.is_known() {
        return Ok(TaskOutput::Done);
    }
    match &vm.host_record()?.migration {
        Some(MigrationSide::Target { migration: of, .. }) if of == migration => {}
        // It was taken over, or was never admitted: then it is not ours to remove.
        None if vm.process().is_some() => return Err(vm.wrong_state("a VM that does not run here")),
        None | Some(_) => return Ok(TaskOutput::Done),
    }
    if arrival::mark(vm).await? == Mark::Set {
        return Err(vm.wrong_state("a guest that was not told to run here"));
    }
    if let Ok(qmp) = vm.qmp()
        && qmp.call(QueryStatus {}).await.is_ok_and(|status| status.running)
    {
        return Err(vm.wrong_state("a guest that does not run here"));
    }
    arrival::remove(vm, shared_pool).await?;
    vm.drop_home().await?;
    Ok(TaskOutput::Done)
}

/// As target: the source is known to have given the VM away; lets it run. Nothing if it runs. A VM that may have run here
/// before is taken over as it is, even if its process is gone.
///
/// # Errors
/// When it was not loaded here, or does not run.
pub(crate) async fn take_over(vm: &mut VmRuntime, migration: &OperationId) -> Result<TaskOutput, Problem> {
    match &vm.host_record()?.migration {
        Some(MigrationSide::Target { migration: of, .. }) if of == migration => {}
        None if vm.process().is_some() && vm.status().runs() => return Ok(TaskOutput::Done),
        None | Some(_) => {
            let message = format!("{} is not expected on this host in migration {migration}", vm.id());
            return Err(Problem::new(ProblemCode::WrongState, message));
        }
    }
    let mark = arrival::mark(vm).await?;
    match (loaded(vm).await, mark) {
        (Ok(qmp), Mark::Clear) => {
            let marker = arrival::prepare(vm).await?;
            match arrival::let_run(marker, incoming::run_loaded(&qmp)).await {
                Ok(_) => {}
                Err(NotRunning::Never(problem)) => return Err(problem),
                Err(NotRunning::Perhaps(problem)) => perhaps_ran(vm, &problem),
            }
        }
        (Ok(qmp), Mark::Set | Mark::Lost) => {
            if let Err(error) = incoming::run_loaded(&qmp).await {
                perhaps_ran(vm, &error.into());
            }
        }
        (Err(problem), Mark::Clear) => return Err(problem),
        (Err(problem), Mark::Set | Mark::Lost) => perhaps_ran(vm, &problem),
    }
    target::settle_in(vm).await?;
    Ok(TaskOutput::Done)
}

fn perhaps_ran(vm: &VmRuntime, problem: &Problem) {
    tracing::error!(vm = %vm.id(), %problem, "taken over as it is: its guest may have run here, and does not now");
    vm.status().process_rests();
}

/// The QEMU in which the VM was loaded.
async fn loaded(vm: &VmRuntime) -> Result<Qmp, Problem> {
    let qmp = vm.qmp()?.clone();
    let status = qmp.call(QueryMigrate {}).await.map_err(refused)?.status;
    if status != MigrationStatus::Completed {
        let message = format!("{} has not been loaded on this host (its migration is {status:?})", vm.id());
        return Err(Problem::new(ProblemCode::WrongState, message));
    }
    Ok(qmp)
}

/// As source: the target is known to have no process; takes the VM back and lets it run. Nothing if it was never given
/// away.
///
/// # Errors
/// When the record can't be written, or the guest does not run.
pub(crate) async fn take_back(vm: &mut VmRuntime, migration: &OperationId) -> Result<TaskOutput, Problem> {
    let held = match &vm.host_record()?.migration {
        Some(MigrationSide::Source { migration: of, held, .. }) if of == migration => *held,
        None => return Ok(TaskOutput::Done),
        Some(side) => {
            let message = format!("{} is in another migration on this host: {side:?}", vm.id());
            return Err(Problem::new(ProblemCode::WrongState, message));
        }
    };
    // What is on the disk first: it must never say that the VM was given away when it runs here.
    let state = vm.dirs()?.state.clone();
    blocking(move || Ok(marker::remove(&state, Deed::GivenAway)?)).await?;
    vm.set_migration(None).await?;
    if let Ok(qmp) = vm.qmp().cloned() {
        outgoing::settle(&qmp, !held).await?;
    }
    Ok(TaskOutput::Done)
}
