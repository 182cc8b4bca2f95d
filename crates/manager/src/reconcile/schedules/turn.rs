//! A VM's part in a run: one snapshot, and then what its schedule keeps no longer.

use std::sync::Arc;
use std::time::Duration;

use berth_model::access::Action;
use berth_model::operation::{Operation, OperationKind, OperationResult, OperationState};
use berth_model::schedule::{Occasion, Outcome, Part, Schedule, ScheduleRun, snapshot_name};
use berth_model::snapshot::SnapshotKind;
use berth_model::vm::{Vm, VmState};
use berth_model::{OperationId, Problem, ProblemCode, ScheduleId, SnapshotId, VmId};

use super::{Keeper, last_part};
use crate::door::target::vm_resource;
use crate::operations::{Begin, OperationRequest};
use crate::records::{Row, UniqueName};
use crate::schedules::{self, stored_by};
use crate::workflow::vm::reachable_host;

/// How often a VM that is being changed is looked at again, and how many times (ten minutes in all). Shorter: a long
/// migration costs the VM its snapshot. Longer: the run, and with it the next one, waits for one VM.
const BUSY_LOOK_EVERY: Duration = Duration::from_secs(2);
const BUSY_LOOKS_MAX: u32 = 300;
/// How long an operation is waited for at a time.
const WAIT: Duration = Duration::from_secs(60);

/// See the module's head.
pub(super) struct Turn {
    keeper: Arc<Keeper>,
    schedule: ScheduleId,
    run: ScheduleRun,
    vm: VmId,
}

/// What came of one try.
enum Tried {
    Taken(SnapshotId, Option<OperationId>),
    Skipped(String),
    Failed(String, Option<OperationId>),
    /// Somebody else is changing the VM: worth another try.
    Busy(String),
    /// The VM or the schedule is no more.
    Gone,
}

/// The records that a turn is about, as they are now.
type Rows = (Arc<Row<Schedule>>, Arc<Row<Vm>>);

/// What came of pruning.
#[derive(Default)]
struct Pruned {
    deleted: u64,
    freed_bytes: u64,
    /// Why something was left that should have gone.
    left: Option<String>,
}

impl Turn {
    pub(super) fn new(keeper: &Arc<Keeper>, schedule: &ScheduleId, run: &ScheduleRun, vm: &VmId) -> Self {
        Self { keeper: Arc::clone(keeper), schedule: schedule.clone(), run: run.clone(), vm: vm.clone() }
    }

    /// The whole of it; none when there is nothing any more that it could be about.
    pub(super) async fn whole(self) -> Result<Option<Part>, Problem> {
        let (outcome, snapshot, why, operation) = match self.take().await? {
            Tried::Taken(snapshot, operation) => (Outcome::Taken, Some(snapshot), None, operation),
            Tried::Skipped(why) | Tried::Busy(why) => (Outcome::Skipped, None, Some(why), None),
            Tried::Failed(why, operation) => (Outcome::Failed, None, Some(why), operation),
            Tried::Gone => return Ok(None),
        };
        let Pruned { deleted, freed_bytes, left } = self.prune().await?;
        let cluster = self.keeper.cluster();
        let Some((_, vm)) = self.rows() else { return Ok(None) };
        let taken =
            snapshot.as_ref().and_then(|id| cluster.records.find_snapshot(&self.vm, id.as_str()).ok());
        let stored_bytes = taken.map_or(0, |snapshot| stored_by(&snapshot));
        let before = last_part(cluster, &self.schedule, &vm).map_or(0, |part| part.in_a_row);
        Ok(Some(Part {
            schedule: self.schedule,
            vm: self.vm,
            due_at: self.run.due_at,
            at: cluster.clock.now(),
            outcome,
            why: why.or(left),
            snapshot,
            operation,
            deleted,
            stored_bytes,
            freed_bytes,
            in_a_row: if outcome == Outcome::Taken { 0 } else { before + 1 },
        }))
    }

    fn rows(&self) -> Option<Rows> {
        let records = &self.keeper.cluster().records;
        Some((records.get(self.schedule.as_str())?, records.get(self.vm.as_str())?))
    }

    /// Takes the snapshot, waiting for whoever else is changing the VM.
    async fn take(&self) -> Result<Tried, Problem> {
        let mut looks = 0;
        loop {
            let tried = self.try_once().await?;
            looks += 1;
            match tried {
                Tried::Busy(_) if looks < BUSY_LOOKS_MAX => {
                    self.keeper.cluster().clock.sleep(BUSY_LOOK_EVERY).await;
                }
                tried => return Ok(tried),
            }
        }
    }

    async fn try_once(&self) -> Result<Tried, Problem> {
        let cluster = self.keeper.cluster();
        let Some((schedule, vm)) = self.rows() else { return Ok(Tried::Gone) };
        // An earlier manager may have taken it.
        if let Some(snapshot) = self.taken() {
            return Ok(Tried::Taken(snapshot, None));
        }
        if schedule.paused {
            return Ok(Tried::Skipped("the schedule was paused".to_owned()));
        }
        match vm.status.state {
            VmState::Running | VmState::Paused => {}
            VmState::Stopped => return Ok(Tried::Skipped("the VM is stopped".to_owned())),
            VmState::Unknown => return Ok(Tried::Skipped("the VM's host can't be asked".to_owned())),
            state @ (VmState::Starting | VmState::Migrating) => {
                return Ok(Tried::Busy(format!("the VM is {state}")));
            }
        }
        let host = match reachable_host(cluster, &vm) {
            Ok(host) => host,
            Err(problem) => return Ok(Tried::Skipped(problem.message)),
        };
        if let Err(why) = self.owner_may(&schedule, &vm, Action::SnapshotCreate) {
            return Ok(Tried::Failed(why, None));
        }
        if let Some(why) = schedules::below_reserve(&host, &vm) {
            return Ok(Tried::Failed(why, None));
        }
        let _place = self.keeper.place_on(&host.value.id).await?;
        let request = self.request(&schedule);
        let actor = format!("schedule:{}", schedules::full_name(cluster, &schedule));
        let begun = match cluster.operations.begin(Begin::new(actor, request)).await {
            Ok(begun) => begun.operation,
            Err(problem) => return Ok(refused(problem)),
        };
        let Some(begun) = begun else { return Ok(Tried::Busy("nothing was begun".to_owned())) };
        let over = self.over(&begun.id).await?;
        Ok(match (&over.result, &over.problem) {
            (Some(OperationResult::Snapshot { snapshot, .. }), _) => {
                Tried::Taken(snapshot.clone(), Some(over.id))
            }
            (_, Some(problem)) => Tried::Failed(problem.to_string(), Some(over.id)),
            (_, None) => Tried::Failed(format!("it has {}", over.state.as_str()), Some(over.id)),
        })
    }

    /// The snapshot that was taken in this run.
    fn taken(&self) -> Option<SnapshotId> {
        let occasion = Occasion { schedule: self.schedule.clone(), due_at: self.run.due_at };
        let snapshots = self.keeper.cluster().records.snapshots_of(&self.vm);
        let found = snapshots.iter().find(|row| row.occasion.as_ref() == Some(&occasion));
        found.map(|row| row.value.id.clone())
    }

    fn owner_may(&self, schedule: &Schedule, vm: &Vm, action: Action) -> Result<(), String> {
        let resource = vm_resource(self.keeper.cluster(), vm);
        schedules::owner_may(&self.keeper.gate, &schedule.owner, action, &resource)
    }

    fn request(&self, schedule: &Schedule) -> OperationRequest {
        let records = &self.keeper.cluster().records;
        let name = snapshot_name(&schedule.name, &schedule.timezone, self.run.due_at)
            .filter(|name| records.id_of(&UniqueName::snapshot(&self.vm, name)).is_none());
        OperationRequest::SnapshotCreate {
            vm: self.vm.clone(),
            kind: SnapshotKind::Scheduled,
            occasion: Some(Occasion { schedule: self.schedule.clone(), due_at: self.run.due_at }),
            name,
            note: String::new(),
            extent: schedule.extent,
        }
    }

    async fn over(&self, id: &OperationId) -> Result<Operation, Problem> {
        loop {
            let operation = self.keeper.cluster().operations.wait(id, WAIT).await?;
            if operation.state.is_over() {
                return Ok(operation);
            }
        }
    }

    /// Deletes what the rule keeps no longer: how many, and why others are left.
    async fn prune(&self) -> Result<Pruned, Problem> {
        let cluster = self.keeper.cluster();
        let mut pruned = Pruned::default();
        self.let_deletion_end().await?;
        let Some((schedule, vm)) = self.rows() else { return Ok(pruned) };
        let rule = (&self.schedule, &schedule.keep, &schedule.timezone);
        let doomed = schedules::doomed(cluster, rule, &vm, cluster.clock.now());
        if doomed.is_empty() || schedule.paused {
            return Ok(pruned);
        }
        if let Err(why) = self.owner_may(&schedule, &vm, Action::SnapshotDelete) {
            pruned.left = Some(why);
            return Ok(pruned);
        }
        let Ok(host) = reachable_host(cluster, &vm) else { return Ok(pruned) };
        let _place = self.keeper.place_on(&host.value.id).await?;
        let actor = format!("schedule:{}", schedules::full_name(cluster, &schedule));
        for snapshot in doomed {
            match self.delete(&actor, &snapshot.value.id).await? {
                Ok(()) => {
                    pruned.deleted += 1;
                    pruned.freed_bytes += stored_by(&snapshot);
                }
                // In the next run again.
                Err(problem) => {
                    pruned.left = Some(format!("{} could not be deleted: {problem}", snapshot.name))
                }
            }
        }
        Ok(pruned)
    }

    /// A manager that died while it pruned has left a deletion that goes on now, and that would be in the way of the others.
    async fn let_deletion_end(&self) -> Result<(), Problem> {
        let cluster = self.keeper.cluster();
        let vm = cluster.records.get::<Vm>(self.vm.as_str());
        let Some(id) = vm.and_then(|vm| vm.status.operation.clone()) else { return Ok(()) };
        match cluster.operations.get(&id) {
            Ok(going) if going.kind == OperationKind::SnapshotDelete => self.over(&id).await.map(drop),
            Ok(_) | Err(_) => Ok(()),
        }
    }

    async fn delete(&self, actor: &str, snapshot: &SnapshotId) -> Result<Result<(), Problem>, Problem> {
        let request = OperationRequest::SnapshotDelete { vm: self.vm.clone(), snapshot: snapshot.clone() };
        let begun = match self.keeper.cluster().operations.begin(Begin::new(actor, request)).await {
            Ok(begun) => begun.operation,
            Err(problem) => return Ok(Err(problem)),
        };
        let Some(begun) = begun else { return Ok(Ok(())) };
        let over = self.over(&begun.id).await?;
        Ok(match (over.state, over.problem) {
            (OperationState::Succeeded, _) => Ok(()),
            (_, Some(problem)) => Err(problem),
            (state, None) => Err(Problem::new(ProblemCode::Internal, format!("it has {}", state.as_str()))),
        })
    }
}

/// What it means that an operation could not be begun.
fn refused(problem: Problem) -> Tried {
    match problem.code {
        ProblemCode::Busy | ProblemCode::Changed | ProblemCode::WrongState => Tried::Busy(problem.message),
        ProblemCode::Unreachable => Tried::Skipped(problem.message),
        ProblemCode::NotFound => Tried::Gone,
        _ => Tried::Failed(problem.message, None),
    }
}
