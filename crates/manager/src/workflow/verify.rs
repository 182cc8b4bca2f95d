//! `snapshot.verify`: whether a snapshot is still what it was, as its host finds, written down with it.
//!
//! The host reads all of it. With `boot` a clone without any network is then made of it, which must say that it is ready,
//! and is removed again whatever comes. The snapshot's own VM is not held: neither its slot nor its queue is taken, since
//! nothing of it changes. The clone is a VM like any other to quotas, reports and people, and this operation has its slot.
//!
//! A bad snapshot is a result and no failure. What keeps the look from being made (a host that is gone, no room for the
//! clone) is a failure, and says nothing of the snapshot.

use std::sync::Arc;

use berth_api::agent::{TaskOutput, TaskSpec};
use berth_api::manager::CloneSnapshot as CloneWish;
use berth_model::name::Name;
use berth_model::operation::{OperationKind, OperationResult};
use berth_model::snapshot::Snapshot;
use berth_model::verification::{self, Means, SnapshotFault, Verdict, Verification, VerificationFacts};
use berth_model::vm::{Vm, VmState};
use berth_model::{HostId, Problem, ProblemCode, SnapshotId, VmId};
use serde::{Deserialize, Serialize};

use super::clone::as_wish;
use super::create::{NewVm, new_vm};
use super::vm::{definition, forget_vm, reachable_host, settle, wrong_state};
use crate::cluster::Cluster;
use crate::operations::OperationRequest;
use crate::operations::step::{About, Command, Desk, Plan, Run, Step, Workflow, step, wrong_request};
use crate::quota::Added;
use crate::records::{RecordsError, Row, Transaction};

/// See the module's head.
pub enum VerifySnapshot {}

/// What is known of a verification.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VerifyRecord {
    vm: VmId,
    host: HostId,
    snapshot: SnapshotId,
    /// What is started from it; none: it is only read.
    clone: Option<Trial>,
    facts: VerificationFacts,
    /// Why the clone did not come up.
    boot_fault: Option<String>,
    found: Option<Verification>,
}

/// The clone.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Trial {
    vm: VmId,
    /// The snapshot among the clone's own; none: it has no memory.
    first: Option<SnapshotId>,
    timeout_ms: u64,
}

impl Workflow for VerifySnapshot {
    type Record = VerifyRecord;
    const KIND: OperationKind = OperationKind::SnapshotVerify;
    const DECIDES: bool = true;
    const STEPS: &'static [Step<Self>] = &[
        step!("begin", begun, forget_clone),
        step!("read", read),
        step!("start-clone", start_clone, remove_clone),
        step!("wait-ready", wait_ready),
        step!("remove-clone", remove_and_forget),
        step!("record", record; no_return),
    ];

    async fn check<'a>(desk: &'a Desk<'a>, request: &'a OperationRequest) -> Result<Plan<Self>, Problem> {
        let OperationRequest::SnapshotVerify { vm, snapshot, boot } = request else {
            return Err(wrong_request());
        };
        let records = &desk.cluster.records;
        let vm = records.require::<Vm>(vm.as_str())?;
        let snapshot = records.find_snapshot(&vm.value.id, snapshot.as_str())?;
        let host = reachable_host(desk.cluster, &vm)?;
        if vm.status.state == VmState::Migrating {
            return Err(wrong_state(&vm, "to verify its snapshot", "not on its way to another host"));
        }
        let mut record = VerifyRecord {
            vm: vm.value.id.clone(),
            host: host.value.id.clone(),
            snapshot: snapshot.value.id.clone(),
            clone: None,
            facts: VerificationFacts::default(),
            boot_fault: None,
            found: None,
        };
        let (subject, name) = (vm.full_name(), &snapshot.name);
        let mut summary = format!("read all of snapshot {name} of {subject}");
        let (mut about, mut transaction) = (About::Aside(Arc::clone(&vm)), Transaction::new());
        if *boot {
            let new = clone_of(desk, &vm, &snapshot, &host.value.id).await?;
            summary.push_str(&format!(" and start it as {}, without a network", new.vm.full_name()));
            record.clone = Some(Trial {
                vm: new.vm.id.clone(),
                first: snapshot.facts.has_memory.then(|| desk.cluster.new_snapshot_id()),
                timeout_ms: u64::from(vm.spec.ready_timeout_s) * 1000,
            });
            (about, transaction) = (About::NewVm(Box::new(new.vm)), new.transaction);
        }
        Ok(Plan { subject, summary, record, about, transaction })
    }

    fn result(record: &Self::Record) -> OperationResult {
        let found =
            record.found.clone().unwrap_or_else(|| verdict(record, berth_model::Timestamp::from_millis(0)));
        OperationResult::Verification {
            snapshot: record.snapshot.clone(),
            verification: found,
            facts: record.facts.clone(),
        }
    }
}

/// The VM that is to be started from the snapshot: marked as what it is by its name, and without a network.
async fn clone_of(
    desk: &Desk<'_>,
    vm: &Row<Vm>,
    snapshot: &Row<Snapshot>,
    host: &HostId,
) -> Result<NewVm, Problem> {
    let cluster = desk.cluster;
    let wish = CloneWish {
        name: clone_name(cluster, &snapshot.value.id),
        segment: None,
        cold: !snapshot.facts.has_memory,
        paused: false,
    };
    let wanted = as_wish(cluster, vm, &wish, host)?;
    let mut new = new_vm(desk, &wanted, Added::vm).await?;
    new.vm.spec.isolated = true;
    Ok(new)
}

/// `verify-…` with the end of an id of its own: two that verify the same snapshot don't get into each other's way.
fn clone_name(cluster: &Cluster, snapshot: &SnapshotId) -> Name {
    let own = cluster.new_snapshot_id();
    let tail = |id: &SnapshotId| {
        let text = id.as_str();
        text[text.len().saturating_sub(6)..].to_owned()
    };
    format!("verify-{}-{}", tail(snapshot), tail(&own)).parse().expect("ids are made of letters and digits")
}

/// The clone's record was written in the transaction that began the operation.
async fn begun(_run: &mut Run<VerifySnapshot>) -> Result<(), Problem> {
    Ok(())
}

async fn forget_clone(run: &mut Run<VerifySnapshot>) -> Result<(), Problem> {
    match &run.record.clone {
        Some(clone) => forget_vm(&run.cluster, &clone.vm).await,
        None => Ok(()),
    }
}

async fn read(run: &mut Run<VerifySnapshot>) -> Result<(), Problem> {
    let VerifyRecord { vm, host, snapshot, .. } = &run.record;
    let spec = TaskSpec::VerifySnapshot { snapshot: snapshot.clone() };
    match run.ask(Command { host, vm: Some(vm), label: "read", spec }).await {
        Ok(TaskOutput::Verified { facts }) => run.record.facts = facts,
        Ok(_) => {
            return Err(Problem::new(
                ProblemCode::Internal,
                "the agent read a snapshot and did not say what it found",
            ));
        }
        Err(problem) if problem.code == ProblemCode::NotFound && is_to_be_there(run) => {
            let file = format!("snapshots/{snapshot}/snapshot.json");
            run.record.facts.faults = vec![SnapshotFault { file, offset: None, detail: problem.message }];
        }
        Err(problem) => return Err(problem),
    }
    Ok(())
}

/// Whether a host that does not find the snapshot should have it: nobody is deleting it or moving its VM.
fn is_to_be_there(run: &Run<VerifySnapshot>) -> bool {
    let VerifyRecord { vm, host, snapshot, .. } = &run.record;
    let records = &run.cluster.records;
    let rests = records
        .get::<Vm>(vm.as_str())
        .is_some_and(|vm| vm.status.operation.is_none() && vm.status.host.as_ref() == Some(host));
    // In this order: a deletion ends with the record gone, and then lets go of the VM.
    rests && records.find_snapshot(vm, snapshot.as_str()).is_ok()
}

/// The clone, as long as there is a reason to start it.
fn trial(record: &VerifyRecord) -> Option<&Trial> {
    record.clone.as_ref().filter(|_| record.facts.faults.is_empty() && record.boot_fault.is_none())
}

async fn start_clone(run: &mut Run<VerifySnapshot>) -> Result<(), Problem> {
    let VerifyRecord { vm: origin, host, snapshot, .. } = &run.record;
    let Some(Trial { vm, first, .. }) = trial(&run.record) else { return Ok(()) };
    let row = run.cluster.records.require::<Vm>(vm.as_str())?;
    let spec = TaskSpec::CloneVm {
        definition: definition(&run.cluster, &row)?,
        origin: origin.clone(),
        snapshot: snapshot.clone(),
        first_snapshot: first.clone(),
        share: true,
        paused: false,
    };
    let started = match run.command(Command { host, vm: Some(vm), label: "clone", spec }).await {
        // It was held when it was taken, and goes on for once.
        Ok(TaskOutput::Cloned { state: VmState::Paused, .. }) => {
            let spec = TaskSpec::ResumeVm;
            run.command(Command { host, vm: Some(vm), label: "resume", spec }).await
        }
        other => other,
    };
    run.change_status(vm, |status| settle(status, VmState::Running)).await?;
    run.record.boot_fault = said_of_snapshot(started)?;
    Ok(())
}

async fn wait_ready(run: &mut Run<VerifySnapshot>) -> Result<(), Problem> {
    let host = &run.record.host;
    let Some(Trial { vm, timeout_ms, .. }) = trial(&run.record) else { return Ok(()) };
    let spec = TaskSpec::WaitReady { timeout_ms: *timeout_ms };
    let waited = run.command(Command { host, vm: Some(vm), label: "wait-ready", spec }).await;
    run.record.boot_fault = said_of_snapshot(waited)?;
    Ok(())
}

/// What a start that failed says of the snapshot.
///
/// # Errors
/// What says nothing of it.
fn said_of_snapshot(tried: Result<TaskOutput, Problem>) -> Result<Option<String>, Problem> {
    match tried {
        Ok(_) => Ok(None),
        Err(problem) => match problem.code {
            ProblemCode::Guest | ProblemCode::Hypervisor | ProblemCode::BadImage => Ok(Some(problem.message)),
            _ => Err(problem),
        },
    }
}

async fn remove_clone(run: &mut Run<VerifySnapshot>) -> Result<(), Problem> {
    let host = &run.record.host;
    let Some(Trial { vm, .. }) = &run.record.clone else { return Ok(()) };
    // Removed and forgotten by an earlier try.
    let Some(row) = run.cluster.records.get::<Vm>(vm.as_str()) else { return Ok(()) };
    let spec = TaskSpec::DeleteVm { pool: row.spec.pool.clone(), keep_files: false };
    let command = Command { host, vm: Some(vm), label: "remove", spec };
    run.command_or_owe(command, "it was only to show whether a snapshot starts").await
}

async fn remove_and_forget(run: &mut Run<VerifySnapshot>) -> Result<(), Problem> {
    remove_clone(run).await?;
    forget_clone(run).await
}

fn verdict(record: &VerifyRecord, at: berth_model::Timestamp) -> Verification {
    let (by, fault) = match (&record.clone, &record.boot_fault) {
        (Some(_), fault) if record.facts.faults.is_empty() => (Means::Boot, fault.clone()),
        _ => (Means::Hash, (!record.facts.faults.is_empty()).then(|| record.facts.detail())),
    };
    let verdict = if fault.is_some() { Verdict::Bad } else { Verdict::Good };
    Verification { at, by, verdict, detail: fault.unwrap_or_else(|| record.facts.detail()) }
}

/// Writes it down with the snapshot; of a bad one the VM says so, and the audit and the log have it.
async fn record(run: &mut Run<VerifySnapshot>) -> Result<(), Problem> {
    let (cluster, now) = (&run.cluster, run.cluster.clock.now());
    let VerifyRecord { vm, snapshot, .. } = &run.record;
    let found = verdict(&run.record, now);
    keep(cluster, vm, snapshot, &found).await?;
    if found.is_bad() {
        tracing::error!(%vm, %snapshot, detail = found.detail, "a snapshot failed its verification");
        cluster.did_by_itself("verification", "snapshot.verify", &format!("snapshot:{snapshot}"), "bad");
    }
    run.record.found = Some(found);
    Ok(())
}

async fn keep(
    cluster: &Cluster,
    vm: &VmId,
    snapshot: &SnapshotId,
    found: &Verification,
) -> Result<(), Problem> {
    let records = &cluster.records;
    loop {
        let vm = records.require::<Vm>(vm.as_str())?;
        // Deleted while it was read: there is nothing to say it of.
        let snapshot = records.find_snapshot(&vm.value.id, snapshot.as_str())?;
        let (mut vm_then, mut then) = (vm.value.clone(), snapshot.value.clone());
        let kept = found.clone().after(then.verified.as_ref());
        if kept.is_bad() {
            vm_then.status.trouble = Some(verification::refusal(&then.id, &then.name, &kept));
        } else {
            verification::end_trouble(&mut vm_then.status.trouble, &then.id);
        }
        then.verified = Some(kept);
        let mut transaction = Transaction::new();
        transaction.replace(&vm, &vm_then);
        transaction.replace(&snapshot, &then);
        match records.commit(transaction).await {
            Err(RecordsError::Conflict { .. }) => records.catch_up().await?,
            other => return other.map(drop).map_err(Into::into),
        }
    }
}

/// Refuses what is asked of a snapshot that was found bad.
///
/// # Errors
/// That it was, with what is wrong; `help` says what can be done.
pub(super) fn refuse_bad(snapshot: &Snapshot, help: &str) -> Result<(), Problem> {
    let Some(bad) = snapshot.verified.as_ref().filter(|verified| verified.is_bad()) else { return Ok(()) };
    let message = format!("{}; {help}", verification::refusal(&snapshot.id, &snapshot.name, bad));
    Err(Problem::new(ProblemCode::BadImage, message).at(
        "snapshot",
        &snapshot.name,
        "a snapshot that is whole",
    ))
}
