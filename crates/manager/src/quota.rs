//! Quotas: the most that the VMs of a segment, with those of the segments inside it, may be and take together.
//!
//! They are looked at before anything is done, under the lock that everything is decided under that depends on sums,
//! and count what is recorded, whether it runs or not. A VM that is to be must fit the quota of its segment and of
//! every segment that this one is inside of. A restore brings no sizes back: a VM's specification is today's, whatever it
//! was when the snapshot was taken; the undo snapshot that it takes first counts as any other.

use std::collections::HashSet;

use berth_api::manager::{Quota, Segment, Usage};
use berth_model::snapshot::{Snapshot, SnapshotFacts};
use berth_model::vm::{Vm, VmSpec};
use berth_model::{Problem, ProblemCode, SegmentId};

use crate::cluster::Cluster;
use crate::policy::book::DEPTH_MAX;

/// What would be added.
#[derive(Debug, Clone, Copy, Default)]
pub struct Added(Usage);

impl Added {
    /// A VM.
    pub fn vm(spec: &VmSpec) -> Self {
        Self(Usage {
            vms: 1,
            vcpus: u64::from(spec.vcpus),
            memory_mib: spec.memory_mib,
            disk_mib: spec.disks_mib(),
            ..Usage::default()
        })
    }

    /// The same with a snapshot that it begins with. It counts as if it shared nothing: what it shares today is its alone
    /// when the other VM is deleted.
    pub const fn with_snapshot(self, facts: &SnapshotFacts) -> Self {
        let stored_mib = facts.memory_stored_bytes.saturating_add(facts.disk_stored_bytes) >> 20;
        Self(Usage { snapshots: 1, snapshot_mib: stored_mib, ..self.0 })
    }

    /// A snapshot of a VM: its memory as a whole, because what is zero in it is known only afterwards.
    pub fn snapshot(vm: &Vm) -> Self {
        let memory_mib = if vm.status.state.may_run() { vm.spec.memory_mib } else { 0 };
        Self(Usage { snapshots: 1, snapshot_mib: memory_mib, ..Usage::default() })
    }
}

/// Refuses what would not fit.
///
/// # Errors
/// [`ProblemCode::OverQuota`], naming the segment, what there is too little of, and how much.
pub fn check(cluster: &Cluster, segment: &SegmentId, added: &Added) -> Result<(), Problem> {
    let mut next = cluster.records.get::<Segment>(segment.as_str());
    for _ in 0..=DEPTH_MAX {
        let Some(row) = next else { return Ok(()) };
        if row.quota != Quota::default() {
            let around = (row.value.id != *segment).then_some(segment);
            fits(&row, &usage(cluster, &row.value.id), &added.0).map_err(|problem| {
                around.map_or(problem.clone(), |inner| of_one_around(cluster, inner, problem))
            })?;
        }
        next = row.parent.as_ref().and_then(|parent| cluster.records.get::<Segment>(parent.as_str()));
    }
    Ok(())
}

/// The same of a segment around: what that one is called, has and may have is not for everybody inside it to know.
fn of_one_around(cluster: &Cluster, inner: &SegmentId, problem: Problem) -> Problem {
    let name = cluster
        .records
        .get::<Segment>(inner.as_str())
        .map_or_else(|| inner.to_string(), |row| row.name.to_string());
    let field = problem.field.unwrap_or_default();
    let message =
        format!("a segment that {name} is inside of has no room for this: its quota of {field} is used up");
    Problem::new(ProblemCode::OverQuota, message).at(field, problem.value.unwrap_or_default(), "less")
}

fn fits(segment: &Segment, used: &Usage, added: &Usage) -> Result<(), Problem> {
    let quota = &segment.quota;
    let lines = [
        ("vms", "VMs", quota.vms, used.vms, added.vms),
        ("vcpus", "virtual CPUs", quota.vcpus, used.vcpus, added.vcpus),
        ("memory_mib", "MiB of memory", quota.memory_mib, used.memory_mib, added.memory_mib),
        ("disk_mib", "MiB of disk", quota.disk_mib, used.disk_mib, added.disk_mib),
        ("snapshots", "snapshots", quota.snapshots, used.snapshots, added.snapshots),
        ("snapshot_mib", "MiB of snapshots", quota.snapshot_mib, used.snapshot_mib, added.snapshot_mib),
    ];
    for (field, what, most, used, added) in lines {
        let Some(most) = most else { continue };
        let then = used.saturating_add(added);
        if then > most && added > 0 {
            let message = format!(
                "segment {} may have {most} {what}, has {used}, and this would add {added}",
                segment.name
            );
            let expected = format!("at most {}", most.saturating_sub(used));
            return Err(Problem::new(ProblemCode::OverQuota, message).at(field, added, expected));
        }
    }
    Ok(())
}

/// What a segment has used up, those inside it counted.
pub fn usage(cluster: &Cluster, segment: &SegmentId) -> Usage {
    let within = segments_within(cluster, segment);
    let mut usage = Usage::default();
    let mut vms = HashSet::new();
    for vm in cluster.records.list_where::<Vm>(|vm| within.contains(&vm.segment)) {
        usage.vms += 1;
        usage.vcpus += u64::from(vm.spec.vcpus);
        usage.memory_mib = usage.memory_mib.saturating_add(vm.spec.memory_mib);
        usage.disk_mib = usage.disk_mib.saturating_add(vm.spec.disks_mib());
        vms.insert(vm.value.id.clone());
    }
    let mut bytes: u64 = 0;
    for snapshot in cluster.records.list_where::<Snapshot>(|snapshot| vms.contains(&snapshot.vm)) {
        usage.snapshots += 1;
        let facts = &snapshot.facts;
        bytes = bytes.saturating_add(facts.memory_stored_bytes).saturating_add(facts.disk_stored_bytes);
    }
    usage.snapshot_mib = bytes >> 20;
    usage
}

/// A segment with all that are inside it.
pub(crate) fn segments_within(cluster: &Cluster, segment: &SegmentId) -> HashSet<SegmentId> {
    let all = cluster.records.list::<Segment>();
    let mut within = HashSet::from([segment.clone()]);
    // Each round finds one level more.
    for _ in 0..=DEPTH_MAX {
        let inside =
            all.iter().filter(|row| row.parent.as_ref().is_some_and(|parent| within.contains(parent)));
        let inside: Vec<SegmentId> = inside.map(|row| row.value.id.clone()).collect();
        within.extend(inside);
    }
    within
}
