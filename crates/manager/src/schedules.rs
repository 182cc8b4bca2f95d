//! What a schedule is about, who answers for it, and what its rule keeps: what its runs and its routes have in common.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use berth_api::manager::{Segment, User};
use berth_model::Timestamp;
use berth_model::access::Action;
use berth_model::host::Host;
use berth_model::name::Name;
use berth_model::operation::OperationKind;
use berth_model::schedule::reserve::{self, PoolRoom, Room};
use berth_model::schedule::retention::{self, Candidate, Verdict};
use berth_model::schedule::{Keep, Part, Schedule, Zone};
use berth_model::snapshot::Snapshot;
use berth_model::verification::Verification;
use berth_model::vm::Vm;
use berth_model::{HostId, ScheduleId, UserId, VmId};

use crate::auth::Principal;
use crate::cluster::Cluster;
use crate::door::Gate;
use crate::door::target::{segment_resource, vm_resource};
use crate::operations::OperationRow;
use crate::policy::{Resource, ResourceKind};
use crate::quota;
use crate::records::Row;

/// Over how many coming runs the pace of a schedule is taken.
const PACE_RUNS: usize = 5;

/// What people call a schedule: `segment/name`.
pub fn full_name(cluster: &Cluster, schedule: &Schedule) -> String {
    match cluster.records.get::<Segment>(schedule.segment.as_str()) {
        Some(segment) => format!("{}/{}", segment.name, schedule.name),
        None => format!("{}/{}", schedule.segment, schedule.name),
    }
}

/// What a schedule is about, to the policies.
pub fn about(cluster: &Cluster, schedule: &Schedule) -> Resource {
    match schedule.vm.as_ref().and_then(|vm| cluster.records.get::<Vm>(vm.as_str())) {
        Some(vm) => vm_resource(cluster, &vm),
        None => segment_resource(cluster, &schedule.segment),
    }
}

/// A schedule, which is in what it is about.
pub fn resource(cluster: &Cluster, schedule: &Schedule) -> Resource {
    let (around, name) = (about(cluster, schedule), full_name(cluster, schedule));
    Resource::inside(around, ResourceKind::Schedule, schedule.id.as_str(), &name)
}

/// The VMs that a schedule is about now, by their names.
pub fn vms(cluster: &Cluster, schedule: &Schedule) -> Vec<Arc<Row<Vm>>> {
    if let Some(vm) = &schedule.vm {
        return cluster.records.get::<Vm>(vm.as_str()).into_iter().collect();
    }
    let within = quota::segments_within(cluster, &schedule.segment);
    // One that a snapshot is started as for a moment, to verify it, is nobody's.
    let mut vms = cluster.records.list_where::<Vm>(|vm| within.contains(&vm.segment) && !vm.spec.isolated);
    vms.sort_by_cached_key(|vm| vm.full_name());
    vms
}

/// Whether the user who answers for a schedule may do this itself, now. A schedule has no rights of its own: what its
/// owner has lost, it has lost.
///
/// # Errors
/// Why not, in a sentence that says what to do.
pub fn owner_may(gate: &Gate, owner: &UserId, action: Action, resource: &Resource) -> Result<(), String> {
    let help = "whoever may takes it over with 'berth schedule update'";
    let Some(user) = gate.cluster.records.get::<User>(owner.as_str()) else {
        return Err(format!("the user who answers for this schedule is no more: {help}"));
    };
    if user.disabled {
        return Err(format!("{}, who answers for this schedule, is shut out: {help}", user.name));
    }
    let decision = gate.policies.look(&Principal::as_if(&user), action, resource, false);
    if decision.allowed {
        return Ok(());
    }
    let (name, action) = (&user.name, action.as_str());
    Err(format!(
        "{name}, who answers for this schedule, may not '{action}' there ({}): {help}",
        decision.reason
    ))
}

/// Which snapshots of a VM a schedule with this rule deletes now, oldest first.
pub fn doomed(
    cluster: &Cluster,
    (schedule, keep, zone): (&ScheduleId, &Keep, &Zone),
    vm: &Vm,
    now: Timestamp,
) -> Vec<Arc<Row<Snapshot>>> {
    let snapshots = cluster.records.snapshots_of(&vm.id);
    let is_own =
        |row: &Snapshot| row.occasion.as_ref().is_some_and(|occasion| occasion.schedule == *schedule);
    if !snapshots.iter().any(|row| is_own(row)) {
        return Vec::new();
    }
    let users = users_of_snapshots(cluster, &vm.id);
    let candidate = |row: &Arc<Row<Snapshot>>| Candidate {
        id: row.value.id.clone(),
        schedule: row.occasion.as_ref().map(|occasion| occasion.schedule.clone()),
        taken_at: row.created_at,
        is_held: row.pinned || vm.status.baseline.as_ref() == Some(&row.value.id),
        is_used: users.iter().any(|text| text.contains(row.value.id.as_str())),
        verdict: if row.verified.as_ref().is_some_and(Verification::is_bad) {
            Verdict::Broken
        } else {
            Verdict::Good
        },
    };
    let candidates: Vec<Candidate> = snapshots.iter().map(candidate).collect();
    let goes: HashSet<_> = retention::to_delete(schedule, keep, zone, &candidates, now).into_iter().collect();
    snapshots.into_iter().filter(|row| goes.contains(&row.value.id)).collect()
}

/// That a VM's pool has no room for schedules, in a sentence.
pub fn below_reserve(host: &Host, vm: &Vm) -> Option<String> {
    let pool = host.pool(&vm.spec.pool).filter(|pool| reserve::room(pool) == Room::Below)?;
    Some(format!(
        "pool {} of host {} is below its reserve: {} MiB are free, {} MiB have to stay free, {} MiB are missing",
        pool.name,
        host.name,
        pool.free_bytes >> 20,
        pool.reserve_bytes >> 20,
        reserve::missing_bytes(pool) >> 20
    ))
}

/// The pools that a schedule's VMs are in, each with how far it is from its reserve.
pub fn pools(cluster: &Cluster, schedule: &Schedule, vms: &[Arc<Row<Vm>>], now: Timestamp) -> Vec<PoolRoom> {
    let mut added: BTreeMap<(HostId, Name), u64> = BTreeMap::new();
    for vm in vms {
        let Some(host) = &vm.status.host else { continue };
        let part = cluster.records.get::<Part>(&format!("{}/{}", schedule.id, vm.value.id));
        let bytes = part.map_or(0, |part| part.stored_bytes.saturating_sub(part.freed_bytes));
        *added.entry((host.clone(), vm.spec.pool.clone())).or_default() += bytes;
    }
    let pace = schedule.cron.next(&schedule.timezone, now, PACE_RUNS);
    let every_ms = match (pace.first(), pace.last()) {
        (Some(first), Some(last)) => last.millis_since(*first) / (PACE_RUNS as u64 - 1),
        _ => u64::MAX,
    };
    let room = |((host, pool), added_bytes): ((HostId, Name), u64)| {
        let host = cluster.records.get::<Host>(host.as_str())?;
        let report = host.pool(&pool)?;
        let reached_at = reserve::reached_at(report, added_bytes, every_ms, now);
        Some(PoolRoom {
            host: host.name.clone(),
            pool,
            room: reserve::room(report),
            free_bytes: report.free_bytes,
            reserve_bytes: report.reserve_bytes,
            missing_bytes: reserve::missing_bytes(report),
            reached_at: reached_at.filter(|_| !schedule.paused),
        })
    };
    added.into_iter().filter_map(room).collect()
}

/// What other operations that go on are about, as texts in which a snapshot's id may stand. An operation on the VM itself
/// has the VM's slot, and one that takes or deletes a snapshot of another VM needs none of this one.
fn users_of_snapshots(cluster: &Cluster, vm: &VmId) -> Vec<String> {
    let is_user = |row: &OperationRow| {
        let kind = row.operation.kind;
        !row.operation.state.is_over()
            && row.operation.vm.as_ref() != Some(vm)
            && !matches!(kind, OperationKind::SnapshotCreate | OperationKind::SnapshotDelete)
    };
    let rows = cluster.records.list_where::<OperationRow>(is_user);
    rows.iter().map(|row| format!("{} {}", row.request.0, row.record)).collect()
}

/// What a snapshot occupies by itself, in bytes.
pub fn stored_by(snapshot: &Snapshot) -> u64 {
    snapshot.facts.memory_stored_bytes.saturating_add(snapshot.facts.disk_stored_bytes)
}
