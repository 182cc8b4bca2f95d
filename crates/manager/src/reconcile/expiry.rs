//! What is kept for a time only: undo snapshots, and operations that are long over.

use std::sync::Arc;
use std::time::Duration;

use berth_model::Timestamp;
use berth_model::snapshot::Snapshot;
use berth_model::vm::Vm;

use super::baseline::ACTOR;
use crate::audit::OK;
use crate::cluster::Cluster;
use crate::http::segment::call_vms_after_their_segments;
use crate::operations::{Begin, OperationRequest, OperationRow};
use crate::records::{Records, RecordsError, Transaction};

/// How often it is looked for.
const LOOK_EVERY: Duration = Duration::from_secs(60);
/// How many operations that are over are kept. They are all in memory: ten times as many would take some 100 MiB.
/// Fewer, and a busy day's are gone the next morning; what was done is in the audit for good.
const OPERATIONS_KEPT: usize = 10_000;

/// Looks every minute.
pub(super) async fn keep(cluster: Arc<Cluster>) {
    loop {
        expire_snapshots(&cluster).await;
        if let Err(error) = call_vms_after_their_segments(&cluster).await {
            tracing::error!(%error, "VMs can't be called after their renamed segments");
        }
        cluster.watchers.forget_fences(|vm| cluster.records.get::<Vm>(vm.as_str()).is_some());
        if let Err(error) = forget_operations(&cluster.records).await {
            tracing::error!(%error, "old operations can't be removed");
        }
        cluster.clock.sleep(LOOK_EVERY).await;
    }
}

async fn expire_snapshots(cluster: &Arc<Cluster>) {
    let now = cluster.clock.now();
    for snapshot in cluster.records.list::<Snapshot>() {
        let over = snapshot.expires_at.is_some_and(|at| at <= now);
        if !over || snapshot.pinned {
            continue;
        }
        let request =
            OperationRequest::SnapshotDelete { vm: snapshot.vm.clone(), snapshot: snapshot.value.id.clone() };
        let begin = Begin::new(ACTOR, request);
        match cluster.operations.begin(begin).await {
            Ok(_) => {
                let label = format!("snapshot:{}", snapshot.id);
                cluster.did_by_itself("expiry", "snapshot.delete", &label, OK);
            }
            // Its VM is being changed or its host is away: in a minute again.
            Err(problem) => {
                tracing::debug!(snapshot = snapshot.id, %problem, "an expired snapshot stays for now");
            }
        }
    }
}

async fn forget_operations(records: &Records) -> Result<(), RecordsError> {
    let rows = records.list::<OperationRow>();
    let mut over: Vec<(Timestamp, &str)> = rows
        .iter()
        .filter(|row| row.operation.state.is_over())
        .map(|row| (row.operation.created_at, row.id.as_str()))
        .collect();
    let surplus = over.len().saturating_sub(OPERATIONS_KEPT);
    over.sort_unstable();
    let mut transaction = Transaction::new();
    for (_, id) in over.into_iter().take(surplus) {
        if transaction.is_full() {
            records.commit(std::mem::take(&mut transaction)).await?;
        }
        transaction.forget::<OperationRow>(id);
    }
    if surplus > 0 {
        records.commit(transaction).await?;
    }
    Ok(())
}
