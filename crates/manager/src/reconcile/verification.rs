//! Verifies snapshots without being asked: each once, some time after it was taken, and again when the last look is a week
//! old. One at a time on a host, those first that nobody has looked at, and never of a VM that is being changed: an operation
//! that a person waits for does not wait for this, and what is being changed will be something else in a moment.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use berth_model::operation::OperationKind;
use berth_model::snapshot::Snapshot;
use berth_model::verification::is_due;
use berth_model::vm::{Vm, VmState};
use berth_model::{HostId, OperationId, Problem, ProblemCode, SnapshotId, Timestamp};

use super::baseline::ACTOR;
use crate::audit::OK;
use crate::cluster::Cluster;
use crate::operations::{Begin, OperationRequest, OperationRow};
use crate::records::Row;
use crate::workflow::vm::reachable_host;

/// How often it is looked what is due. Longer: a host with many snapshots does nothing in between.
const LOOK_EVERY: Duration = Duration::from_secs(20);
/// Pause before a snapshot is tried again that could not be looked at.
const AGAIN_AFTER_MS: u64 = 3600 * 1000;

/// Looks now and then.
pub(super) async fn keep(cluster: Arc<Cluster>) {
    let mut keeper = Keeper::default();
    loop {
        cluster.clock.sleep(LOOK_EVERY).await;
        keeper.look(&cluster).await;
    }
}

/// What is only worth remembering while the manager runs.
#[derive(Default)]
struct Keeper {
    tries: HashMap<SnapshotId, OperationId>,
    /// Not to be tried before.
    again_at: HashMap<SnapshotId, Timestamp>,
}

impl Keeper {
    async fn look(&mut self, cluster: &Arc<Cluster>) {
        let now = cluster.clock.now();
        self.forget(cluster, now);
        let busy = busy_hosts(cluster);
        let mut next: BTreeMap<HostId, Arc<Row<Snapshot>>> = BTreeMap::new();
        for snapshot in
            cluster.records.list_where::<Snapshot>(|row| is_due(row.created_at, row.verified.as_ref(), now))
        {
            if self.again_at.contains_key(&snapshot.value.id) {
                continue;
            }
            let Some(host) = free_host(cluster, &snapshot).filter(|host| !busy.contains(host)) else {
                continue;
            };
            match next.get(&host) {
                Some(other) if urgency(other) <= urgency(&snapshot) => {}
                _ => {
                    next.insert(host, snapshot);
                }
            }
        }
        for snapshot in next.into_values() {
            self.begin(cluster, &snapshot, now).await;
        }
    }

    /// What was tried, is over, and is due still has failed.
    fn forget(&mut self, cluster: &Cluster, now: Timestamp) {
        let is_over = |id: &OperationId| cluster.operations.get(id).map_or(true, |one| one.state.is_over());
        let over: Vec<SnapshotId> =
            self.tries.iter().filter(|(_, operation)| is_over(operation)).map(|(id, _)| id.clone()).collect();
        for id in over {
            self.tries.remove(&id);
            self.again_at.insert(id, now.plus_millis(AGAIN_AFTER_MS));
        }
        // One that went well is not due for longer than that.
        self.again_at.retain(|_, at| *at > now);
    }

    async fn begin(&mut self, cluster: &Arc<Cluster>, snapshot: &Row<Snapshot>, now: Timestamp) {
        let (vm, id) = (snapshot.vm.clone(), snapshot.value.id.clone());
        let request = OperationRequest::SnapshotVerify { vm, snapshot: id.clone(), boot: false };
        match cluster.operations.begin(Begin::new(ACTOR, request)).await {
            Ok(begun) => {
                cluster.did_by_itself("verification", "snapshot.verify", &format!("snapshot:{id}"), OK);
                if let Some(operation) = begun.operation {
                    self.tries.insert(id, operation.id);
                }
            }
            Err(problem) if is_passing(&problem) => {}
            Err(problem) => {
                tracing::warn!(snapshot = %id, %problem, "a snapshot can't be verified");
                self.again_at.insert(id, now.plus_millis(AGAIN_AFTER_MS));
            }
        }
    }
}

/// Somebody was quicker, or it is gone: it is looked at again in a moment.
fn is_passing(problem: &Problem) -> bool {
    use ProblemCode::{Busy, NotFound, Unreachable, WrongState};
    matches!(problem.code, Busy | WrongState | NotFound | Unreachable)
}

/// Hosts that verify something already, whoever asked for it.
fn busy_hosts(cluster: &Cluster) -> HashSet<HostId> {
    let is_one = |row: &OperationRow| {
        row.operation.kind == OperationKind::SnapshotVerify && !row.operation.state.is_over()
    };
    let going = cluster.records.list_where::<OperationRow>(is_one);
    let vms = going.iter().filter_map(|row| cluster.records.get::<Vm>(row.operation.vm.as_ref()?.as_str()));
    vms.filter_map(|vm| vm.status.host.clone()).collect()
}

/// The host that can verify a snapshot now, if its VM is left alone.
fn free_host(cluster: &Cluster, snapshot: &Snapshot) -> Option<HostId> {
    let vm = cluster.records.get::<Vm>(snapshot.vm.as_str())?;
    let rests = matches!(vm.status.state, VmState::Running | VmState::Paused | VmState::Stopped);
    if !rests || vm.status.operation.is_some() {
        return None;
    }
    reachable_host(cluster, &vm).ok().map(|host| host.value.id.clone())
}

/// Least first: those that nobody has looked at, the oldest of them first, and then the one that was looked at longest ago.
fn urgency(snapshot: &Snapshot) -> (bool, Timestamp) {
    match &snapshot.verified {
        None => (false, snapshot.created_at),
        Some(found) => (true, found.at),
    }
}
