//! The first snapshot of each VM, taken by itself as soon as its guest is ready.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use berth_model::snapshot::{SnapshotExtent, SnapshotKind};
use berth_model::vm::{GuestState, Vm, VmState};
use berth_model::{OperationId, Problem, ProblemCode, Timestamp, VmId};

use crate::audit::OK;
use crate::cluster::Cluster;
use crate::operations::{Begin, OperationRequest};
use crate::records::{RecordsError, Row};

/// Who asks for what nobody asked for.
pub(super) const ACTOR: &str = "berth";
/// How long until VMs are looked at when nothing has changed.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// Pause after a baseline could not be taken.
const AGAIN_AFTER_MS: u64 = 60_000;

/// Looks at all VMs whenever one changes, and now and then.
pub(super) async fn keep(cluster: Arc<Cluster>) {
    let mut changes = cluster.records.changes::<Vm>();
    let mut watch = Watch::default();
    loop {
        changes.mark_unchanged();
        for vm in cluster.records.list_where::<Vm>(lacks_baseline) {
            if let Err(problem) = watch.look(&cluster, &vm).await {
                tracing::error!(vm = vm.id, %problem, "the baseline could not be seen to");
            }
        }
        watch.forget_those_gone(&cluster);
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = cluster.clock.sleep(LOOK_EVERY) => {}
        }
    }
}

fn lacks_baseline(vm: &Vm) -> bool {
    vm.status.baseline.is_none()
}

/// What is only worth remembering while the manager runs.
#[derive(Default)]
struct Watch {
    /// Since when a guest has been booting, as far as this manager saw.
    booting_since: HashMap<VmId, Timestamp>,
    /// Not to be tried before.
    again_at: HashMap<VmId, Timestamp>,
    tries: HashMap<VmId, OperationId>,
}

impl Watch {
    async fn look(&mut self, cluster: &Arc<Cluster>, vm: &Row<Vm>) -> Result<(), Problem> {
        let id = &vm.value.id;
        if vm.status.baseline.is_some()
            || vm.status.state != VmState::Running
            || vm.status.operation.is_some()
        {
            self.booting_since.remove(id);
            return Ok(());
        }
        let now = cluster.clock.now();
        match vm.status.guest {
            GuestState::Ready => self.begin(cluster, vm, now).await,
            GuestState::Booting => {
                let since = *self.booting_since.entry(id.clone()).or_insert(now);
                let limit_s = vm.spec.ready_timeout_s;
                if now.millis_since(since) < u64::from(limit_s) * 1000 {
                    return Ok(());
                }
                let waited = "neither its guest agent nor its probe has answered";
                note(cluster, id, &format!("the guest was not ready within {limit_s} s: {waited}")).await
            }
            GuestState::Panicked => {
                note(cluster, id, "the guest's kernel panicked before it was ready").await
            }
            GuestState::Off => Ok(()),
        }
    }

    async fn begin(&mut self, cluster: &Arc<Cluster>, vm: &Row<Vm>, now: Timestamp) -> Result<(), Problem> {
        let id = &vm.value.id;
        if let Some(last) = self.tries.remove(id) {
            // It was tried, is over, and there is still none.
            let why = cluster.operations.get(&last).ok().and_then(|operation| operation.problem);
            let why = why.map_or_else(String::new, |problem| format!(": {problem}"));
            self.again_at.insert(id.clone(), now.plus_millis(AGAIN_AFTER_MS));
            return note(cluster, id, &format!("taking it failed{why}")).await;
        }
        if self.again_at.get(id).is_some_and(|at| now < *at) {
            return Ok(());
        }
        let request = OperationRequest::SnapshotCreate {
            vm: id.clone(),
            kind: SnapshotKind::Baseline,
            occasion: None,
            name: None,
            note: "taken when the guest was first ready".to_owned(),
            extent: SnapshotExtent::Machine,
        };
        let begun = cluster.operations.begin(Begin::new(ACTOR, request)).await;
        let label = format!("vm:{}", vm.full_name());
        match begun {
            Ok(begun) => {
                cluster.did_by_itself("baseline", "snapshot.create", &label, OK);
                if let Some(operation) = begun.operation {
                    self.tries.insert(id.clone(), operation.id);
                }
                Ok(())
            }
            // Somebody was quicker, or it is gone: the next change will tell.
            Err(problem)
                if matches!(
                    problem.code,
                    ProblemCode::Busy | ProblemCode::WrongState | ProblemCode::NotFound
                ) =>
            {
                Ok(())
            }
            Err(problem) => {
                cluster.did_by_itself("baseline", "snapshot.create", &label, problem.code.as_str());
                self.again_at.insert(id.clone(), now.plus_millis(AGAIN_AFTER_MS));
                note(cluster, id, &format!("taking it was refused: {problem}")).await
            }
        }
    }

    fn forget_those_gone(&mut self, cluster: &Cluster) {
        if self.booting_since.is_empty() && self.again_at.is_empty() && self.tries.is_empty() {
            return;
        }
        let vms = cluster.records.list_where::<Vm>(lacks_baseline);
        let known: HashSet<VmId> = vms.iter().map(|vm| vm.value.id.clone()).collect();
        self.booting_since.retain(|id, _| known.contains(id));
        self.again_at.retain(|id, _| known.contains(id));
        self.tries.retain(|id, _| known.contains(id));
    }
}

async fn note(cluster: &Cluster, vm: &VmId, text: &str) -> Result<(), Problem> {
    let changed = cluster.records.update::<Vm, RecordsError>(vm.as_str(), |vm| {
        if vm.status.baseline.is_none() {
            vm.status.baseline_note = Some(text.to_owned());
        }
        Ok(())
    });
    match changed.await {
        Ok(_) | Err(RecordsError::Missing { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
