//! What an agent does that finds a migration half done: it has just started, and the one before it died.
//!
//! The relay died with it, so QEMU's own migration has failed or will. What remains is to bring each side to rest:
//!
//! | side | what is found | what is done |
//! |---|---|---|
//! | source, not given away | sending, stopped for the last part, failed, or all sent | cancelled, and the guest runs |
//! | source, given away | the guest stopped, or no process | nothing: the manager asks the target |
//! | target | the guest runs | the migration is over: it was told to |
//! | target | the guest was told to run, and does not | it is told again, and the migration is over, whatever it answers |
//! | target | all loaded | nothing: the manager decides |
//! | target | no process, a shared pool, and nobody can say whether it was told to run | nothing: the manager decides |
//! | target | waiting for the stream, or gone | ended, and what came is removed |

use berth_api::agent::MigrationSide;
use berth_model::{OperationId, Problem};
use berth_qmp::commands::{MigrationStatus, QueryMigrate, QueryStatus};

use super::marker::{self, Mark};
use super::outgoing::settle;
use super::target::{Admission, settle_in};
use super::{arrival, incoming};
use crate::durable::blocking;
use crate::snapshot::layers::refused;
use crate::vm::VmRuntime;

/// Brings this host's side to rest.
///
/// # Errors
/// When QEMU refuses or a record can't be written.
pub(crate) async fn recover(vm: &mut VmRuntime) -> Result<(), Problem> {
    if let Some(MigrationSide::Source { migration, handed_over: false, held }) =
        vm.host_record()?.migration.clone()
    {
        let state = vm.dirs()?.state.clone();
        if blocking(move || Ok(marker::was_given_away(&state)?)).await? {
            vm.set_migration(Some(MigrationSide::Source { migration, handed_over: true, held })).await?;
        }
    }
    match vm.host_record()?.migration.clone() {
        None | Some(MigrationSide::Source { handed_over: true, .. }) => Ok(()),
        Some(MigrationSide::Source { handed_over: false, held, .. }) => {
            if let Ok(qmp) = vm.qmp().cloned() {
                settle(&qmp, !held).await?;
            }
            vm.set_migration(None).await
        }
        Some(MigrationSide::Target { migration, .. }) => recover_target(vm, migration).await,
    }
}

async fn recover_target(vm: &mut VmRuntime, migration: OperationId) -> Result<(), Problem> {
    let mark = arrival::mark(vm).await?;
    let Ok(qmp) = vm.qmp().cloned() else {
        return match mark {
            Mark::Clear => remove(vm).await,
            Mark::Set => settle_in(vm).await,
            Mark::Lost => Ok(()),
        };
    };
    if qmp.call(QueryStatus {}).await.map_err(refused)?.running {
        return settle_in(vm).await;
    }
    if mark == Mark::Set {
        // One that was put back here to stand still was told no more than that.
        let stands =
            Admission::read(vm)?.and_then(|admission| admission.put_back).is_some_and(|it| it.paused);
        if !stands && let Err(error) = incoming::run_loaded(&qmp).await {
            tracing::warn!(vm = %vm.id(), %error, "the guest was told to run, and does not");
        }
        return settle_in(vm).await;
    }
    let status = qmp.call(QueryMigrate {}).await.map_err(refused)?.status;
    if status == MigrationStatus::Completed {
        return vm.set_migration(Some(MigrationSide::Target { migration, loaded: true })).await;
    }
    remove(vm).await
}

async fn remove(vm: &mut VmRuntime) -> Result<(), Problem> {
    // Without it nothing was admitted, and so nothing came.
    let Some(admission) = Admission::read(vm)? else { return Ok(()) };
    arrival::remove(vm, admission.shared_pool).await
}
