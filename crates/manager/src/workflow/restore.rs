//! `snapshot.restore`: a VM back to what it was, as one step that can itself be taken back.
//!
//! A running or paused VM is first captured as an *undo snapshot*, which expires by itself: also one whose guest has
//! panicked, because its QEMU is well. Restoring itself is one task of the agent. What became of it must be known before
//! the operation can end, so a host that stops answering in the middle of it is waited for.
//!
//! **On another host** the VM moves there and is put back in one: the target makes the snapshot's machine ready while the VM
//! is still what it is, and only then is it given away, by the same steps as in a migration ([`super::migration`]).
//!
//! When it fails, the agent has either touched nothing or left the VM stopped, on the disk that it had. In the second
//! case the VM is put back to the undo snapshot, so that it goes on as it was, but for the moment in between; then
//! the undo snapshot is removed again, too. It stays if the VM could not be put back to it: it is then all that is left of
//! what the guest had in its memory.

use std::sync::Arc;

use berth_api::agent::{NextRestore, PutBack, TaskOutput, TaskSpec};
use berth_api::manager::RestoreVm;
use berth_model::host::Host;
use berth_model::operation::{OperationKind, OperationResult};
use berth_model::snapshot::{RestoreFacts, Snapshot, SnapshotKind, UNDO_KEPT_MS};
use berth_model::vm::{GuestState, Vm, VmState};
use berth_model::{HostId, LayerId, Problem, ProblemCode, SnapshotId, VmId};
use serde::{Deserialize, Serialize};

use super::migration::{self, Sending, Way};
use super::snapshot::{Capture, drop_files, keep, take, unkeep};
use super::verify::refuse_bad;
use super::vm::{definition, look, reachable_host, settle};
use crate::cluster::Cluster;
use crate::operations::OperationRequest;
use crate::operations::step::{About, Command, Desk, Plan, Run, Step, Workflow, step, wrong_request};
use crate::quota::{self, Added};
use crate::records::{Records, Row, Transaction};

/// See the module's head.
pub enum RestoreSnapshot {}

/// What is known of a restore.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RestoreRecord {
    vm: VmId,
    host: HostId,
    snapshot: SnapshotId,
    has_memory: bool,
    new_top: LayerId,
    /// What the VM writes to after it was put back to the undo snapshot.
    back_top: LayerId,
    undo: Option<Capture>,
    #[serde(default)]
    paused: bool,
    /// To the host on which it is put back; none: it stays.
    #[serde(default)]
    way: Option<Way>,
    facts: RestoreFacts,
}

impl Workflow for RestoreSnapshot {
    type Record = RestoreRecord;
    const KIND: OperationKind = OperationKind::SnapshotRestore;
    const DECIDES: bool = true;
    const STEPS: &'static [Step<Self>] = &[
        step!("undo-snapshot", take_undo, drop_undo),
        step!("fetch-image", fetch_image),
        step!("admit", admit, refuse),
        step!("restore", restore, go_back; no_return),
        step!("record", record),
        step!("forget-on-source", forget_on_source),
    ];

    async fn check<'a>(desk: &'a Desk<'a>, request: &'a OperationRequest) -> Result<Plan<Self>, Problem> {
        let OperationRequest::SnapshotRestore { wish, .. } = request else { return Err(wrong_request()) };
        let vm = desk.vm()?;
        let host = reachable_host(desk.cluster, vm)?;
        let snapshot = wanted(&desk.cluster.records, vm, wish)?;
        if !wish.force {
            refuse_bad(&snapshot, "go back to another one, or to this one all the same with --force")?;
        }
        let way = way_to(desk.cluster, vm, &host, wish)?;
        let running = matches!(vm.status.state, VmState::Running | VmState::Paused);
        let undo = if running && !wish.no_undo {
            // Whoever restores again and again must not fill what a segment may have: without an undo snapshot it
            // takes nothing.
            quota::check(desk.cluster, &vm.segment, &Added::snapshot(vm)).map_err(|mut problem| {
                problem.message.push_str("; without an undo snapshot (--no-undo) the restore can go on");
                problem
            })?;
            let mut capture = Capture::new(desk.cluster, vm, SnapshotKind::Undo, None)?;
            capture.snapshot.note = format!("before the restore to {}", snapshot.name);
            let expires_at = capture.snapshot.created_at.plus_millis(UNDO_KEPT_MS);
            capture.snapshot.expires_at = Some(expires_at);
            Some(capture)
        } else {
            None
        };
        let first = if undo.is_some() { "take an undo snapshot and " } else { "" };
        let held = if wish.paused { " and hold it there" } else { "" };
        let there = match &way {
            Some(way) => {
                format!(" on host {}", desk.cluster.records.require::<Host>(way.target.as_str())?.name)
            }
            None => String::new(),
        };
        Ok(Plan {
            subject: vm.full_name(),
            summary: format!("{first}put {} back to snapshot {}{there}{held}", vm.full_name(), snapshot.name),
            record: RestoreRecord {
                vm: vm.value.id.clone(),
                host: host.value.id.clone(),
                snapshot: snapshot.value.id.clone(),
                has_memory: snapshot.facts.has_memory,
                new_top: desk.cluster.new_layer_id(),
                back_top: desk.cluster.new_layer_id(),
                undo,
                paused: wish.paused,
                way,
                facts: RestoreFacts::default(),
            },
            about: About::Vm(Arc::clone(vm)),
            transaction: Transaction::new(),
        })
    }

    fn result(record: &Self::Record) -> OperationResult {
        OperationResult::Restore {
            snapshot: record.snapshot.clone(),
            undo: record.undo.as_ref().map(|capture| capture.snapshot.id.clone()),
            facts: record.facts.clone(),
        }
    }

    fn skips(record: &Self::Record, step: &str) -> bool {
        record.way.is_none() && matches!(step, "fetch-image" | "admit" | "forget-on-source")
    }

    fn target(record: &Self::Record) -> Option<(VmId, HostId)> {
        record.way.as_ref().map(Way::at_target)
    }
}

/// The way to the host that is wished for, if it is another one than the VM's.
fn way_to(
    cluster: &Cluster,
    vm: &Row<Vm>,
    source: &Row<Host>,
    wish: &RestoreVm,
) -> Result<Option<Way>, Problem> {
    let Some(named) = wish.host.as_deref() else { return Ok(None) };
    let target = cluster.records.find_host(named)?;
    if target.value.id == source.value.id {
        return Ok(None);
    }
    let target = migration::choose(cluster, vm, source, Some(target)).map_err(|mut problem| {
        problem.field = problem.field.map(|_| "host".to_owned());
        problem
    })?;
    Ok(Some(Way::between(cluster, vm, source, &target)))
}

/// The snapshot that a VM is to be put back to: the named one, its newest undo snapshot, or its baseline.
pub(crate) fn wanted(
    records: &Records,
    vm: &Row<Vm>,
    wish: &RestoreVm,
) -> Result<Arc<Row<Snapshot>>, Problem> {
    let named = wish.snapshot.as_deref();
    if wish.newest_undo {
        return match named {
            Some(name) => Err(Problem::field("snapshot", name, "no snapshot beside newest_undo")),
            None => newest_undo(records, vm),
        };
    }
    match (named, &vm.status.baseline) {
        (Some(name), _) => records.find_snapshot(&vm.value.id, name),
        (None, Some(baseline)) => records.find_snapshot(&vm.value.id, baseline.as_str()),
        (None, None) => {
            let why = vm.status.baseline_note.as_deref().unwrap_or("none was taken yet");
            let message = format!("{} has no baseline to go back to: {why}", vm.full_name());
            Err(Problem::new(ProblemCode::WrongState, message).at("snapshot", "", "the name of a snapshot"))
        }
    }
}

/// What takes back the newest restore of a VM.
fn newest_undo(records: &Records, vm: &Row<Vm>) -> Result<Arc<Row<Snapshot>>, Problem> {
    let undo = records.snapshots_of(&vm.value.id).into_iter().filter(|one| one.kind == SnapshotKind::Undo);
    undo.max_by_key(|one| (one.created_at, one.id.clone())).ok_or_else(|| {
        let message = format!("{} has no undo snapshot: it was not restored lately", vm.full_name());
        Problem::new(ProblemCode::WrongState, message).at("newest_undo", true, "a restore to take back")
    })
}

async fn take_undo(run: &mut Run<RestoreSnapshot>) -> Result<(), Problem> {
    let Some(mut capture) = run.record.undo.clone() else { return Ok(()) };
    let row = run.cluster.records.require::<Vm>(run.record.vm.as_str())?;
    let next = match &run.record.way {
        Some(_) => None,
        None => Some(Box::new(NextRestore {
            definition: *definition(&run.cluster, &row)?,
            snapshot: run.record.snapshot.clone(),
            new_top: run.record.new_top.clone(),
        })),
    };
    let taken = take(run, &run.record.host, &capture, "undo-snapshot", next).await;
    capture.snapshot.facts = match taken {
        Ok(facts) => facts,
        Err(mut problem) => {
            problem.message = format!("no undo snapshot could be taken: {} (see no_undo)", problem.message);
            return Err(problem);
        }
    };
    keep(run, &capture).await?;
    run.record.facts.undo_us = capture.snapshot.facts.total_ms.saturating_mul(1000);
    run.record.undo = Some(capture);
    Ok(())
}

async fn drop_undo(run: &mut Run<RestoreSnapshot>) -> Result<(), Problem> {
    let Some(capture) = &run.record.undo else { return Ok(()) };
    look(run, &run.record.vm, &run.record.host).await?;
    let vm = run.cluster.records.require::<Vm>(run.record.vm.as_str())?;
    let lives = matches!(vm.status.state, VmState::Running | VmState::Paused | VmState::Starting);
    // Whether it was taken is what the records say: this may be another manager than the one that took it.
    if !lives && run.cluster.records.find_snapshot(&vm.value.id, capture.snapshot.id.as_str()).is_ok() {
        let (vm, snapshot) = (vm.full_name(), &capture.snapshot.name);
        tracing::warn!(%vm, %snapshot, "the VM is not back where it was: its undo snapshot is kept");
        return Ok(());
    }
    unkeep(run, &capture.snapshot).await?;
    drop_files(run, &run.record.host, &capture.snapshot, "drop-undo").await?;
    look(run, &run.record.vm, &run.record.host).await
}

/// The way to another host, for the steps that there are for no other restore.
fn way(record: &RestoreRecord) -> Result<&Way, Problem> {
    let none = || Problem::new(ProblemCode::Internal, "a restore that stays was to move");
    record.way.as_ref().ok_or_else(none)
}

async fn fetch_image(run: &mut Run<RestoreSnapshot>) -> Result<(), Problem> {
    migration::fetch_image_to(run, way(&run.record)?).await
}

async fn admit(run: &mut Run<RestoreSnapshot>) -> Result<(), Problem> {
    let RestoreRecord { snapshot, new_top, paused, .. } = &run.record;
    let put_back = PutBack { snapshot: snapshot.clone(), new_top: new_top.clone(), paused: *paused };
    migration::admit_to(run, way(&run.record)?, Some(put_back)).await
}

async fn refuse(run: &mut Run<RestoreSnapshot>) -> Result<(), Problem> {
    migration::refuse_at(run, way(&run.record)?).await
}

async fn forget_on_source(run: &mut Run<RestoreSnapshot>) -> Result<(), Problem> {
    migration::forget_at_source(run, way(&run.record)?).await
}

async fn restore(run: &mut Run<RestoreSnapshot>) -> Result<(), Problem> {
    if let Some(way) = &run.record.way {
        let sending = Sending { bandwidth_bytes_per_second: None, spare_layers: Vec::new(), put_back: true };
        let moved = migration::move_along(run, way, sending).await?;
        run.record.facts.running_us = moved.report.total_ms.saturating_mul(1000);
        run.record.facts.blackout_us = Some(moved.report.blackout_us);
        return Ok(());
    }
    let RestoreRecord { vm, host, snapshot, new_top, .. } = &run.record;
    let row = run.cluster.records.require::<Vm>(vm.as_str())?;
    let spec = TaskSpec::RestoreSnapshot {
        definition: definition(&run.cluster, &row)?,
        snapshot: snapshot.clone(),
        new_top: new_top.clone(),
        paused: run.record.paused,
    };
    let output = run.command_to_the_end(Command { host, vm: Some(vm), label: "restore", spec }).await?;
    // Nothing that could fail may come after the deed: see `no_return`.
    if let TaskOutput::Restored { facts } = output {
        run.record.facts = RestoreFacts { undo_us: run.record.facts.undo_us, ..facts };
    } else {
        tracing::error!(operation = %run.id(), ?output, "the agent restored and did not say how");
    }
    Ok(())
}

/// Puts the VM back to its undo snapshot, unless it is still what it was before.
async fn go_back(run: &mut Run<RestoreSnapshot>) -> Result<(), Problem> {
    let RestoreRecord { vm, host, new_top, back_top, undo, .. } = &run.record;
    let went_back = match undo {
        Some(capture) if was_touched(run, host, vm, new_top).await => {
            let row = run.cluster.records.require::<Vm>(vm.as_str())?;
            let spec = TaskSpec::RestoreSnapshot {
                definition: definition(&run.cluster, &row)?,
                snapshot: capture.snapshot.id.clone(),
                new_top: back_top.clone(),
                paused: false,
            };
            let command = Command { host, vm: Some(vm), label: "go-back", spec };
            run.command_or_pass(command).await.map(drop)
        }
        _ => Ok(()),
    };
    look(run, vm, host).await?;
    went_back
}

/// Whether the restore has killed the VM's process or taken effect, as far as the host says.
async fn was_touched(run: &Run<RestoreSnapshot>, host: &HostId, vm: &VmId, new_top: &LayerId) -> bool {
    let Ok(host) = run.cluster.records.require::<Host>(host.as_str()) else { return false };
    match run.cluster.agents.report_of(&host, vm).await {
        Ok(Some(report)) => report.state == VmState::Stopped || report.top.as_ref() == Some(new_top),
        // What can't be asked can't be told either.
        Ok(None) | Err(_) => false,
    }
}

async fn record(run: &mut Run<RestoreSnapshot>) -> Result<(), Problem> {
    let RestoreRecord { vm, snapshot, has_memory, new_top, paused, way, .. } = &run.record;
    let state = match (has_memory, paused) {
        (true, true) => VmState::Paused,
        (true, false) => VmState::Running,
        (false, _) => VmState::Stopped,
    };
    run.change_status(vm, |status| {
        status.at_snapshot = Some(snapshot.clone());
        status.top_layer = new_top.clone();
        if let Some(way) = way {
            status.host = Some(way.target.clone());
        }
        settle(status, state);
        // What was known of the guest was of the one before.
        if *has_memory {
            status.guest = GuestState::Booting;
        }
    })
    .await?;
    Ok(())
}
