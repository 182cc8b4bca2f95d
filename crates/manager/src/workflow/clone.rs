//! `snapshot.clone`: a new VM that goes on where a snapshot of another one stands.
//!
//! It is made like any VM (name, number, addresses, room and quota are decided under the same lock) of a wish that
//! says what the origin is; what it is made from is the snapshot, on the host that has it. The origin is only read: it
//! may work, be snapshotted, and be cloned ten times at once, so its slot is not taken. Should its snapshot be deleted
//! in the same moment, the agent finds all of it or refuses.
//!
//! The snapshot becomes the clone's own first snapshot and its baseline: there is something to go back to from the
//! first moment, and none has to be taken. A clone that starts from the disk alone gets its baseline as every VM does,
//! when it is ready.
//!
//! The clone has rights of its own segment and none of the origin's; who may make it is for the door to ask. Into
//! another segment the agent copies instead of sharing.

use std::sync::Arc;

use berth_api::agent::{TaskOutput, TaskSpec};
use berth_api::manager::{CloneSnapshot as Wish, CreateVm, NewNic};
use berth_model::image::Image;
use berth_model::operation::{OperationKind, OperationResult};
use berth_model::snapshot::{CloneFacts, Snapshot};
use berth_model::vm::{Nic, PortForward, Vm, VmState};
use berth_model::{HostId, Problem, ProblemCode, SnapshotId, VmId};
use serde::{Deserialize, Serialize};

use super::create::{NewVm, new_vm};
use super::snapshot::{Capture, keep_first, unkeep_first};
use super::verify::refuse_bad;
use super::vm::{definition, forget_vm, reachable_host, wrong_state};
use crate::cluster::Cluster;
use crate::operations::OperationRequest;
use crate::operations::step::{About, Command, Desk, Plan, Run, Step, Workflow, step, wrong_request};
use crate::quota::Added;
use crate::records::Row;
use crate::workflow::wish::DHCP;

/// What an ordinary disk copies in a second, in bytes: for saying before how long it will take.
const COPIED_BYTES_PER_SECOND: u64 = 200 << 20;

/// See the module's head.
pub enum CloneSnapshot {}

/// What is known of a clone.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CloneRecord {
    vm: VmId,
    host: HostId,
    origin: VmId,
    snapshot: SnapshotId,
    /// The snapshot as the clone's own; none: it starts from the disk alone.
    first: Option<Capture>,
    share: bool,
    paused: bool,
    state: VmState,
    facts: CloneFacts,
}

impl Workflow for CloneSnapshot {
    type Record = CloneRecord;
    const KIND: OperationKind = OperationKind::SnapshotClone;
    const DECIDES: bool = true;
    const STEPS: &'static [Step<Self>] = &[
        step!("record", recorded, forget),
        // Until the operation is over nobody else has the clone, so there is a way back from everywhere: to remove it.
        step!("clone", clone, remove),
        step!("keep-snapshot", keep_snapshot, unkeep_snapshot),
    ];

    async fn check<'a>(desk: &'a Desk<'a>, request: &'a OperationRequest) -> Result<Plan<Self>, Problem> {
        let OperationRequest::SnapshotClone { origin, snapshot, wish } = request else {
            return Err(wrong_request());
        };
        let records = &desk.cluster.records;
        let origin = records.require::<Vm>(origin.as_str())?;
        let snapshot = records.find_snapshot(&origin.value.id, snapshot.as_str())?;
        refuse_bad(&snapshot, "make the new VM of another one")?;
        let host = reachable_host(desk.cluster, &origin)?;
        if origin.status.state == VmState::Migrating {
            return Err(wrong_state(
                &origin,
                "to make a VM from its snapshot",
                "not on its way to another host",
            ));
        }
        let wanted = as_wish(desk.cluster, &origin, wish, &host.value.id)?;
        let goes_on = snapshot.facts.has_memory && !wish.cold;
        let added = |spec: &_| {
            let vm = Added::vm(spec);
            if goes_on { vm.with_snapshot(&snapshot.facts) } else { vm }
        };
        let NewVm { vm, host, transaction } = new_vm(desk, &wanted, added).await?;
        let share = vm.segment == origin.segment;
        let first = goes_on.then(|| first(desk.cluster, &vm, &origin, &snapshot));
        Ok(Plan {
            subject: vm.full_name(),
            summary: summary(desk.cluster, &vm, &origin, &snapshot, goes_on),
            record: CloneRecord {
                vm: vm.id.clone(),
                host,
                origin: origin.value.id.clone(),
                snapshot: snapshot.value.id.clone(),
                first,
                share,
                paused: wish.paused,
                state: VmState::Stopped,
                facts: CloneFacts::default(),
            },
            about: About::NewVm(Box::new(vm)),
            transaction,
        })
    }

    fn result(record: &Self::Record) -> OperationResult {
        OperationResult::Clone { snapshot: record.snapshot.clone(), facts: record.facts.clone() }
    }
}

/// The wish for a VM that is what the origin is, but for who it is.
pub(super) fn as_wish(
    cluster: &Cluster,
    origin: &Vm,
    wish: &Wish,
    host: &HostId,
) -> Result<CreateVm, Problem> {
    let spec = &origin.spec;
    let segment = wish.segment.clone().unwrap_or_else(|| origin.segment.to_string());
    let image = cluster.records.require::<Image>(spec.image.as_str())?;
    let target = cluster.records.find_segment(&segment)?;
    if image.segment.as_ref().is_some_and(|only| *only != target.value.id) {
        let expected = "the snapshot's own, whose image is for no other";
        return Err(Problem::field("segment", &target.name, expected));
    }
    Ok(CreateVm {
        segment,
        name: wish.name.clone(),
        image: spec.image.to_string(),
        vcpus: Some(spec.vcpus),
        memory_mib: Some(spec.memory_mib),
        disk_mib: Some(spec.disk_mib),
        data_disks_mib: spec.data_disks_mib.clone(),
        pool: Some(spec.pool.clone()),
        nics: Some(spec.nics.iter().map(|nic| new_nic(cluster, nic)).collect()),
        user_data: spec.user_data.clone(),
        cpu_model: Some(spec.cpu_model.clone()),
        machine_type: Some(spec.machine_type.clone()),
        firmware: Some(spec.firmware),
        tpm: spec.tpm,
        host: Some(host.to_string()),
        protected: false,
        class: Some(spec.class.clone()),
        ready_timeout_s: Some(spec.ready_timeout_s),
        stopped: false,
    })
}

/// An interface of the same kind, with addresses of its own: one that was given is given anew where the cluster has
/// addresses to give, and asked for otherwise.
pub(super) fn new_nic(cluster: &Cluster, nic: &Nic) -> NewNic {
    let plain = nic.address.as_ref().and_then(|text| text.split('/').next()?.parse().ok());
    let ours = cluster.settings.addresses.zip(plain).is_some_and(|(range, plain)| range.contains(plain));
    nic_like(nic, ours)
}

/// An interface of the same kind, whose address the cluster gives, or which asks for one.
pub(super) fn nic_like(nic: &Nic, given: bool) -> NewNic {
    let forwards = nic.forwards.iter().map(|forward| PortForward { host_port: 0, ..forward.clone() });
    NewNic { mac: None, address: (!given).then(|| DHCP.to_owned()), forwards: forwards.collect() }
}

/// The snapshot as the clone's own, which is its baseline.
fn first(cluster: &Cluster, vm: &Vm, origin: &Vm, snapshot: &Snapshot) -> Capture {
    // Who sees the clone need not know of the other segment.
    let note = if vm.segment == origin.segment {
        format!("snapshot {} of {}, from which it was made", snapshot.name, origin.full_name())
    } else {
        "what it was made from".to_owned()
    };
    Capture::first_of(cluster, vm, note, snapshot.facts.clone())
}

fn summary(cluster: &Cluster, vm: &Vm, origin: &Vm, snapshot: &Snapshot, goes_on: bool) -> String {
    let from = if goes_on { "" } else { "the disk of " };
    let how = if vm.segment == origin.segment {
        "sharing its files".to_owned()
    } else {
        let memory = if goes_on { snapshot.facts.memory_stored_bytes } else { 0 };
        let bytes = memory.saturating_add(disk_bytes(cluster, origin, snapshot));
        let seconds = bytes.div_ceil(COPIED_BYTES_PER_SECOND);
        format!("copying {} MiB in about {seconds} s", bytes.div_ceil(1 << 20))
    };
    let (name, full_name) = (&snapshot.name, origin.full_name());
    format!("make {} from {from}snapshot {name} of {full_name}, {how}", vm.full_name())
}

/// What the layers below a snapshot occupy, as far as its ancestors say.
fn disk_bytes(cluster: &Cluster, origin: &Vm, snapshot: &Snapshot) -> u64 {
    let all: Vec<Arc<Row<Snapshot>>> = cluster.records.snapshots_of(&origin.id);
    let below = all
        .iter()
        .filter(|row| row.facts.layers.last().is_some_and(|newest| snapshot.facts.layers.contains(newest)));
    below.map(|row| row.facts.disk_stored_bytes).sum()
}

/// The record was written in the transaction that began the operation.
async fn recorded(_run: &mut Run<CloneSnapshot>) -> Result<(), Problem> {
    Ok(())
}

async fn forget(run: &mut Run<CloneSnapshot>) -> Result<(), Problem> {
    forget_vm(&run.cluster, &run.record.vm).await
}

async fn clone(run: &mut Run<CloneSnapshot>) -> Result<(), Problem> {
    let CloneRecord { vm, host, origin, snapshot, first, share, paused, .. } = &run.record;
    let row = run.cluster.records.require::<Vm>(vm.as_str())?;
    let spec = TaskSpec::CloneVm {
        definition: definition(&run.cluster, &row)?,
        origin: origin.clone(),
        snapshot: snapshot.clone(),
        first_snapshot: first.as_ref().map(|first| first.snapshot.id.clone()),
        share: *share,
        paused: *paused,
    };
    match run.command(Command { host, vm: Some(vm), label: "clone", spec }).await? {
        TaskOutput::Cloned { facts, state } => (run.record.facts, run.record.state) = (facts, state),
        _ => {
            return Err(Problem::new(ProblemCode::Internal, "the agent made a VM and did not say how it is"));
        }
    }
    Ok(())
}

async fn remove(run: &mut Run<CloneSnapshot>) -> Result<(), Problem> {
    let CloneRecord { vm, host, .. } = &run.record;
    let pool = run.cluster.records.require::<Vm>(vm.as_str())?.spec.pool.clone();
    let spec = TaskSpec::DeleteVm { pool, keep_files: false };
    let command = Command { host, vm: Some(vm), label: "remove", spec };
    run.command_or_owe(command, "the VM could not be made from the snapshot").await
}

async fn keep_snapshot(run: &mut Run<CloneSnapshot>) -> Result<(), Problem> {
    keep_first(run, &run.record.vm, run.record.first.as_ref(), run.record.state).await
}

async fn unkeep_snapshot(run: &mut Run<CloneSnapshot>) -> Result<(), Problem> {
    unkeep_first(run, run.record.first.as_ref()).await
}
