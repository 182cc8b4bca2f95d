//! Taking snapshots and deleting them: `snapshot.create`, `snapshot.delete`.

use std::sync::Arc;
use std::time::Duration;

use berth_api::agent::{AgentSnapshotPath, DeletionForecast, NextRestore, TaskOutput, TaskSpec};
use berth_api::endpoint::Nothing;
use berth_model::host::Host;
use berth_model::name::Name;
use berth_model::operation::{OperationKind, OperationResult};
use berth_model::snapshot::{DeletionFacts, Snapshot, SnapshotExtent, SnapshotFacts, SnapshotKind};
use berth_model::verification;
use berth_model::vm::{Vm, VmState};
use berth_model::{HostId, LayerId, Problem, ProblemCode, SnapshotId, Timestamp, VmId};
use serde::{Deserialize, Serialize};

use super::vm::{first_layer, reachable_host, settle, wrong_state};
use crate::cluster::Cluster;
use crate::operations::OperationRequest;
use crate::operations::step::{About, Command, Desk, Plan, Run, Step, Workflow, step, wrong_request};
use crate::quota::{self, Added};
use crate::records::{RecordsError, Row, Transaction, UniqueName};

/// How long a host may take to forecast a deletion, beside what any answer may take: it reads layers' tables.
const FORECAST_WAIT: Duration = Duration::from_secs(10);
/// The name of a VM's first baseline.
pub(super) const BASELINE_NAME: &str = "baseline";

/// `snapshot.create`: afterwards the snapshot is whole and recorded, or there is none; the VM goes on as it was.
pub enum CreateSnapshot {}

/// What is known of a snapshot that is being taken.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CreateSnapshotRecord {
    host: HostId,
    capture: Capture,
}

/// A snapshot as it will be, and what the VM will stand on after it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Capture {
    pub(super) snapshot: Snapshot,
    pub(super) new_top: LayerId,
    #[serde(default)]
    pub(super) extent: SnapshotExtent,
}

impl Workflow for CreateSnapshot {
    type Record = CreateSnapshotRecord;
    const KIND: OperationKind = OperationKind::SnapshotCreate;
    const DECIDES: bool = true;
    const STEPS: &'static [Step<Self>] =
        &[step!("capture", capture, discard), step!("record", record, unrecord)];

    async fn check<'a>(desk: &'a Desk<'a>, request: &'a OperationRequest) -> Result<Plan<Self>, Problem> {
        let OperationRequest::SnapshotCreate { kind, name, note, occasion, extent, .. } = request else {
            return Err(wrong_request());
        };
        let vm = desk.vm()?;
        let host = reachable_host(desk.cluster, vm)?;
        if !matches!(vm.status.state, VmState::Running | VmState::Paused | VmState::Stopped) {
            return Err(wrong_state(vm, "to take a snapshot", "running, paused or stopped"));
        }
        if *extent == SnapshotExtent::Filesystem && vm.status.state != VmState::Running {
            return Err(wrong_state(vm, "to freeze its file systems for a snapshot", "running"));
        }
        // What Berth takes by itself keeps a VM safe: it counts, and is not refused.
        if matches!(kind, SnapshotKind::Manual | SnapshotKind::Scheduled) {
            quota::check(desk.cluster, &vm.segment, &Added::snapshot(vm))?;
        }
        let mut capture = Capture::new(desk.cluster, vm, *kind, name.clone())?;
        capture.snapshot.note.clone_from(note);
        capture.snapshot.occasion.clone_from(occasion);
        capture.extent = *extent;
        let what = match extent {
            SnapshotExtent::Machine if vm.status.state != VmState::Stopped => "disk, memory and devices",
            SnapshotExtent::Machine | SnapshotExtent::Disk => "its disk",
            SnapshotExtent::Filesystem => "its disk, file systems frozen for the instant",
        };
        Ok(Plan {
            subject: vm.full_name(),
            summary: format!("take snapshot {} of {} ({what})", capture.snapshot.name, vm.full_name()),
            record: CreateSnapshotRecord { host: host.value.id.clone(), capture },
            about: About::Vm(Arc::clone(vm)),
            transaction: Transaction::new(),
        })
    }

    fn result(record: &Self::Record) -> OperationResult {
        let snapshot = &record.capture.snapshot;
        OperationResult::Snapshot { snapshot: snapshot.id.clone(), facts: snapshot.facts.clone() }
    }
}

async fn capture(run: &mut Run<CreateSnapshot>) -> Result<(), Problem> {
    run.record.capture.snapshot.facts =
        take(run, &run.record.host, &run.record.capture, "capture", None).await?;
    Ok(())
}

async fn discard(run: &mut Run<CreateSnapshot>) -> Result<(), Problem> {
    drop_files(run, &run.record.host, &run.record.capture.snapshot, "discard").await
}

async fn record(run: &mut Run<CreateSnapshot>) -> Result<(), Problem> {
    keep(run, &run.record.capture).await
}

async fn unrecord(run: &mut Run<CreateSnapshot>) -> Result<(), Problem> {
    unkeep(run, &run.record.capture.snapshot).await
}

impl Capture {
    /// One that is to be taken of this VM now.
    pub(super) fn new(
        cluster: &Cluster,
        vm: &Vm,
        kind: SnapshotKind,
        name: Option<Name>,
    ) -> Result<Self, Problem> {
        let now = cluster.clock.now();
        let id = cluster.new_snapshot_id();
        let taken = |name: &Name| cluster.records.id_of(&UniqueName::snapshot(&vm.id, name)).is_some();
        let name = match name {
            Some(name) if taken(&name) => {
                return Err(
                    RecordsError::Taken { noun: "snapshot".to_owned(), name: name.to_string() }.into()
                );
            }
            Some(name) => name,
            None => free_name(kind, now, &id, taken),
        };
        let snapshot = Snapshot {
            id,
            vm: vm.id.clone(),
            name,
            kind,
            occasion: None,
            parent: vm.status.at_snapshot.clone(),
            pinned: kind == SnapshotKind::Baseline,
            note: String::new(),
            facts: SnapshotFacts::default(),
            created_at: now,
            expires_at: None,
            verified: None,
        };
        Ok(Self { snapshot, new_top: cluster.new_layer_id(), extent: SnapshotExtent::Machine })
    }

    /// The snapshot that a new VM is made of, as that VM's own, which is its baseline.
    pub(super) fn first_of(cluster: &Cluster, vm: &Vm, note: String, facts: SnapshotFacts) -> Self {
        let snapshot = Snapshot {
            id: cluster.new_snapshot_id(),
            vm: vm.id.clone(),
            name: BASELINE_NAME.parse().expect("a good name"),
            kind: SnapshotKind::Baseline,
            occasion: None,
            parent: None,
            pinned: true,
            note,
            facts,
            created_at: cluster.clock.now(),
            expires_at: None,
            verified: None,
        };
        Self { snapshot, new_top: first_layer(&vm.id), extent: SnapshotExtent::Machine }
    }
}

/// A name made of the time; of the id as well, should the clock have been set back.
fn free_name(kind: SnapshotKind, now: Timestamp, id: &SnapshotId, taken: impl Fn(&Name) -> bool) -> Name {
    let time: String = now
        .to_string()
        .chars()
        .map_while(|letter| match letter {
            'Z' => None,
            letter if letter.is_ascii_digit() => Some(letter),
            _ => Some('-'),
        })
        .collect();
    let candidates = match kind {
        SnapshotKind::Baseline => [BASELINE_NAME.to_owned(), format!("{BASELINE_NAME}-{time}")],
        SnapshotKind::Undo => [format!("undo-{time}"), format!("undo-{id}")],
        SnapshotKind::Manual => [time, id.to_string()],
        SnapshotKind::Scheduled => [format!("scheduled-{time}"), format!("scheduled-{id}")],
    };
    let names = candidates.into_iter().chain([id.to_string()]).filter_map(|text| text.parse::<Name>().ok());
    let mut free = names.filter(|name| !taken(name));
    free.next().expect("an id is a name that nobody has")
}

/// Has the host take a snapshot.
pub(super) async fn take<W: Workflow>(
    run: &Run<W>,
    host: &HostId,
    capture: &Capture,
    label: &str,
    next: Option<Box<NextRestore>>,
) -> Result<SnapshotFacts, Problem> {
    let (vm, snapshot, new_top) =
        (&capture.snapshot.vm, capture.snapshot.id.clone(), capture.new_top.clone());
    let spec = match capture.extent {
        SnapshotExtent::Machine => TaskSpec::TakeSnapshot { snapshot, new_top, next },
        SnapshotExtent::Disk => TaskSpec::TakeDiskSnapshot { snapshot, new_top, quiesce: false },
        SnapshotExtent::Filesystem => TaskSpec::TakeDiskSnapshot { snapshot, new_top, quiesce: true },
    };
    match run.command(Command { host, vm: Some(vm), label, spec }).await? {
        TaskOutput::Snapshot { facts } => Ok(facts),
        _ => Err(Problem::new(ProblemCode::Internal, "the agent took a snapshot and did not say which")),
    }
}

/// Has the host remove a snapshot's files, now or when it is back.
pub(super) async fn drop_files<W: Workflow>(
    run: &Run<W>,
    host: &HostId,
    snapshot: &Snapshot,
    label: &str,
) -> Result<(), Problem> {
    let spec = TaskSpec::DeleteSnapshot { snapshot: snapshot.id.clone() };
    let command = Command { host, vm: Some(&snapshot.vm), label, spec };
    run.command_or_owe(command, "the snapshot was given up").await
}

/// Records a snapshot that was taken, with its name and what the VM stands on now.
pub(super) async fn keep<W: Workflow>(run: &Run<W>, capture: &Capture) -> Result<(), Problem> {
    let snapshot = &capture.snapshot;
    with_vm(run, snapshot, |vm, known, transaction| {
        if known.is_some() {
            return None;
        }
        transaction.create(snapshot);
        transaction.claim(&UniqueName::snapshot(&snapshot.vm, &snapshot.name), snapshot.id.as_str());
        vm.status.at_snapshot = Some(snapshot.id.clone());
        vm.status.top_layer = capture.new_top.clone();
        if snapshot.kind == SnapshotKind::Baseline {
            vm.status.baseline = Some(snapshot.id.clone());
            vm.status.baseline_note = None;
        }
        Some(())
    })
    .await
}

/// Takes that back.
pub(super) async fn unkeep<W: Workflow>(run: &Run<W>, snapshot: &Snapshot) -> Result<(), Problem> {
    with_vm(run, snapshot, |vm, known, transaction| {
        let known = known?;
        transaction.remove(known);
        transaction.release(&UniqueName::snapshot(&snapshot.vm, &snapshot.name));
        if vm.status.at_snapshot.as_ref() == Some(&snapshot.id) {
            vm.status.at_snapshot.clone_from(&snapshot.parent);
        }
        if vm.status.baseline.as_ref() == Some(&snapshot.id) {
            vm.status.baseline = None;
        }
        verification::end_trouble(&mut vm.status.trouble, &snapshot.id);
        Some(())
    })
    .await
}

/// Records how a VM is that was made of a snapshot, and that snapshot as its own; none: it began from its disk.
pub(super) async fn keep_first<W: Workflow>(
    run: &Run<W>,
    vm: &VmId,
    first: Option<&Capture>,
    state: VmState,
) -> Result<(), Problem> {
    if let Some(first) = first {
        keep(run, first).await?;
    }
    run.change_status(vm, |status| settle(status, state)).await?;
    Ok(())
}

/// Takes that back.
pub(super) async fn unkeep_first<W: Workflow>(run: &Run<W>, first: Option<&Capture>) -> Result<(), Problem> {
    match first {
        Some(first) => unkeep(run, &first.snapshot).await,
        None => Ok(()),
    }
}

/// Changes a VM and one of its snapshots in one transaction; `change` answers none when there is nothing to do.
async fn with_vm<W: Workflow>(
    run: &Run<W>,
    snapshot: &Snapshot,
    change: impl Fn(&mut Vm, Option<&Row<Snapshot>>, &mut Transaction) -> Option<()>,
) -> Result<(), Problem> {
    let records = &run.cluster.records;
    loop {
        let row = records.require::<Vm>(snapshot.vm.as_str())?;
        let known = records.get::<Snapshot>(&format!("{}/{}", snapshot.vm, snapshot.id));
        let (mut vm, mut transaction) = (row.value.clone(), Transaction::new());
        if change(&mut vm, known.as_deref(), &mut transaction).is_none() {
            return Ok(());
        }
        transaction.replace(&row, &vm);
        match records.commit(transaction).await {
            Err(RecordsError::Conflict { .. }) => records.catch_up().await?,
            other => return other.map(drop).map_err(Into::into),
        }
    }
}

/// `snapshot.delete`: afterwards the snapshot is gone, its children hang on its parent, and everything else is as it
/// was; or, when its host refused, it is all still there.
pub enum DeleteSnapshot {}

/// What is known of a snapshot that is being deleted.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DeleteSnapshotRecord {
    host: HostId,
    snapshot: Snapshot,
    #[serde(default)]
    facts: DeletionFacts,
}

impl Workflow for DeleteSnapshot {
    type Record = DeleteSnapshotRecord;
    const KIND: OperationKind = OperationKind::SnapshotDelete;
    const STEPS: &'static [Step<Self>] = &[
        step!("remove", remove; no_return),
        step!("adopt-children", adopt_children),
        step!("forget", forget),
    ];

    fn result(record: &Self::Record) -> OperationResult {
        OperationResult::SnapshotDeleted { facts: record.facts }
    }

    async fn check<'a>(desk: &'a Desk<'a>, request: &'a OperationRequest) -> Result<Plan<Self>, Problem> {
        let OperationRequest::SnapshotDelete { snapshot, .. } = request else { return Err(wrong_request()) };
        let vm = desk.vm()?;
        let snapshot = desk.cluster.records.find_snapshot(&vm.value.id, snapshot.as_str())?;
        let is_baseline = vm.status.baseline.as_ref() == Some(&snapshot.value.id);
        if is_baseline && !desk.approved {
            let message = format!(
                "{} is the baseline of {}: pin another snapshot first",
                snapshot.name,
                vm.full_name()
            );
            return Err(Problem::new(ProblemCode::Protected, message));
        }
        if snapshot.pinned && !is_baseline {
            let message =
                format!("snapshot {} of {} is pinned: unpin it first", snapshot.name, vm.full_name());
            return Err(Problem::new(ProblemCode::Protected, message));
        }
        let host = reachable_host(desk.cluster, vm)?;
        let frees = match desk.dry_run {
            true => forecast(desk.cluster, &host.value, &snapshot.value).await,
            false => String::new(),
        };
        Ok(Plan {
            subject: vm.full_name(),
            summary: format!("delete snapshot {} of {}{frees}", snapshot.name, vm.full_name()),
            record: DeleteSnapshotRecord {
                host: host.value.id.clone(),
                snapshot: snapshot.value.clone(),
                facts: DeletionFacts::default(),
            },
            about: About::Vm(Arc::clone(vm)),
            transaction: Transaction::new(),
        })
    }
}

/// What deleting it would free and cost, by the word of the host that has it; when that says nothing, what is known.
async fn forecast(cluster: &Cluster, host: &Host, snapshot: &Snapshot) -> String {
    let path = AgentSnapshotPath { vm: snapshot.vm.clone(), snapshot: snapshot.id.clone() };
    let asked = cluster.agents.call::<DeletionForecast>(host, &path, &Nothing {}, &(), FORECAST_WAIT).await;
    let facts = match asked {
        Ok(facts) => facts,
        Err(error) => {
            let most = mib(snapshot.facts.memory_stored_bytes + snapshot.facts.disk_stored_bytes);
            let problem = error.into_problem();
            return format!(", which frees {most} at most; host {} can't say more: {problem}", host.name);
        }
    };
    let freed = format!(", which frees {}", mib(facts.freed_bytes));
    if facts.merged_bytes == 0 {
        return freed;
    }
    format!(
        "{freed} at once and {} more after {} have been merged in the background, in {:.1} s or longer while the guest \
         is busy",
        mib(facts.freed_later_bytes),
        mib(facts.merged_bytes),
        facts.merging_ms as f64 / 1000.0
    )
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

async fn remove(run: &mut Run<DeleteSnapshot>) -> Result<(), Problem> {
    let DeleteSnapshotRecord { host, snapshot, .. } = &run.record;
    let spec = TaskSpec::DeleteSnapshot { snapshot: snapshot.id.clone() };
    let done = run.command(Command { host, vm: Some(&snapshot.vm), label: "remove", spec }).await?;
    if let TaskOutput::Deleted { facts } = done {
        run.record.facts = facts;
    }
    Ok(())
}

async fn adopt_children(run: &mut Run<DeleteSnapshot>) -> Result<(), Problem> {
    let gone = &run.record.snapshot;
    for child in run.cluster.records.snapshots_of(&gone.vm) {
        if child.parent.as_ref() == Some(&gone.id) {
            run.cluster
                .records
                .update::<Snapshot, Problem>(&child.id, |child| {
                    child.parent.clone_from(&gone.parent);
                    Ok(())
                })
                .await?;
        }
    }
    Ok(())
}

async fn forget(run: &mut Run<DeleteSnapshot>) -> Result<(), Problem> {
    unkeep(run, &run.record.snapshot).await
}
