//! `vm.delete`: afterwards nothing of the VM is left, on its host or in the records. A host that refuses leaves the
//! VM recorded, so that it can be deleted again.

use std::sync::Arc;

use berth_api::agent::TaskSpec;
use berth_model::name::Name;
use berth_model::operation::OperationKind;
use berth_model::{HostId, Problem, ProblemCode, VmId};
use serde::{Deserialize, Serialize};

use super::vm::{forget_vm, look, reachable_host};
use crate::operations::OperationRequest;
use crate::operations::step::{About, Command, Desk, Plan, Run, Step, Workflow, step, wrong_request};
use crate::records::{Transaction, UniqueName};

/// See the module's head.
pub enum DeleteVm {}

/// What is known of the deletion.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DeleteVmRecord {
    vm: VmId,
    host: HostId,
    pool: Name,
}

impl Workflow for DeleteVm {
    type Record = DeleteVmRecord;
    const KIND: OperationKind = OperationKind::VmDelete;
    const STEPS: &'static [Step<Self>] = &[
        step!("remove", remove, look_again; no_return),
        step!("forget-snapshots", forget_snapshots),
        step!("forget", forget),
    ];

    async fn check<'a>(desk: &'a Desk<'a>, request: &'a OperationRequest) -> Result<Plan<Self>, Problem> {
        let OperationRequest::VmDelete { force, .. } = request else { return Err(wrong_request()) };
        let vm = desk.vm()?;
        if vm.spec.protected && !desk.approved {
            let message = format!(
                "{0} is protected against deletion: lift that first, with 'berth vm unprotect {0}'",
                vm.full_name()
            );
            return Err(Problem::new(ProblemCode::Protected, message).at("protected", true, "false"));
        }
        if vm.status.state.may_run() && !force {
            let message = format!(
                "{} is {}: stop it first, or delete it with --force",
                vm.full_name(),
                vm.status.state
            );
            return Err(Problem::new(ProblemCode::WrongState, message).at("force", false, "true"));
        }
        let host = reachable_host(desk.cluster, vm)?;
        let snapshots = desk.cluster.records.snapshots_of(&vm.value.id);
        let stored_bytes: u64 =
            snapshots.iter().map(|row| row.facts.memory_stored_bytes + row.facts.disk_stored_bytes).sum();
        Ok(Plan {
            subject: vm.full_name(),
            summary: format!(
                "delete {} on host {} with its disk and {} snapshots ({} MiB)",
                vm.full_name(),
                host.name,
                snapshots.len(),
                stored_bytes >> 20
            ),
            record: DeleteVmRecord {
                vm: vm.value.id.clone(),
                host: host.value.id.clone(),
                pool: vm.spec.pool.clone(),
            },
            about: About::Vm(Arc::clone(vm)),
            transaction: Transaction::new(),
        })
    }
}

async fn remove(run: &mut Run<DeleteVm>) -> Result<(), Problem> {
    let DeleteVmRecord { vm, host, pool } = &run.record;
    let spec = TaskSpec::DeleteVm { pool: pool.clone(), keep_files: false };
    run.command(Command { host, vm: Some(vm), label: "remove", spec }).await?;
    Ok(())
}

async fn look_again(run: &mut Run<DeleteVm>) -> Result<(), Problem> {
    look(run, &run.record.vm, &run.record.host).await
}

async fn forget_snapshots(run: &mut Run<DeleteVm>) -> Result<(), Problem> {
    let records = &run.cluster.records;
    let mut transaction = Transaction::new();
    for snapshot in records.snapshots_of(&run.record.vm) {
        if transaction.is_full() {
            records.commit(std::mem::take(&mut transaction)).await?;
        }
        transaction.forget::<berth_model::snapshot::Snapshot>(&snapshot.id);
        transaction.release(&UniqueName::snapshot(&run.record.vm, &snapshot.name));
    }
    records.commit(transaction).await?;
    Ok(())
}

async fn forget(run: &mut Run<DeleteVm>) -> Result<(), Problem> {
    forget_vm(&run.cluster, &run.record.vm).await
}
