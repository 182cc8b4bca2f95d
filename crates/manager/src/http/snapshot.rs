//! Snapshots: seeing them, taking and deleting them, and saying which one is the baseline.

use std::time::Duration;

use berth_api::ClientError;
use berth_api::agent::{ComparePath, CompareQuery, SnapshotCompare};
use berth_api::manager::{
    DIFF_LIST_MAX, OperationRef, Page, SnapshotClone, SnapshotCreate, SnapshotDelete, SnapshotDiff,
    SnapshotExport, SnapshotList, SnapshotPin, SnapshotShow, SnapshotUnpin, SnapshotVerify,
};
use berth_model::access::Action;
use berth_model::operation::OperationKind;
use berth_model::snapshot::{Snapshot, SnapshotKind};
use berth_model::vm::Vm;
use berth_model::{Problem, ProblemCode};

use super::{list, operation};
use crate::cluster::Cluster;
use crate::door::target::{TheSnapshot, TheVm, vm_resource};
use crate::door::{Answer, Call, Door};
use crate::operations::{Begin, OperationRequest};
use crate::policy::Resource;
use crate::records::{RecordsError, Transaction};
use crate::workflow::vm::reachable_host;

/// How long an agent may take to compare two snapshots: a disk with a million files takes about a minute, one of which all
/// content is read as long as reading it takes.
const COMPARE_TIMEOUT: Duration = Duration::from_secs(1800);
/// Longest note on a snapshot, in characters.
const NOTE_CHARS_MAX: usize = 1000;

/// How many changes of files a diff lists when nobody says.
const DIFF_LIST_DEFAULT: u32 = 200;

/// Mounts the routes of this file.
pub fn mount(door: Door) -> Door {
    door.mount(show_all)
        .mount(create)
        .mount(show)
        .mount(diff)
        .mount(delete)
        .mount(pin)
        .mount(unpin)
        .mount(clone)
        .mount(verify)
        .mount(export)
}

async fn show_all(call: Call<SnapshotList, TheVm>) -> Result<Answer<Page<Snapshot>>, Problem> {
    let query = &call.input.query;
    let (cluster, TheVm(vm)) = (call.ctx.cluster(), &call.target);
    let visible = call.ctx.visible(Action::SnapshotView);
    let mut all = cluster.records.snapshots_of(&vm.value.id);
    let is_last = all.len() == 1;
    all.retain(|row| {
        visible.shows(Some(&vm.segment), || Resource::snapshot(vm_resource(cluster, vm), vm, row, is_last))
    });
    let page = list::page(
        &all,
        query.limit,
        query.cursor.as_deref(),
        |row| format!("{:020} {}", row.created_at.as_millis(), row.value.id),
        |row| row.value.clone(),
    )?;
    Ok(Answer::new(page))
}

async fn show(call: Call<SnapshotShow, TheSnapshot>) -> Result<Answer<Snapshot>, Problem> {
    let snapshot = call.target.snapshot;
    Ok(Answer::new(snapshot.value.clone()).at(snapshot.revision))
}

async fn diff(
    call: Call<SnapshotDiff, TheSnapshot>,
) -> Result<Answer<berth_model::diff::SnapshotDiff>, Problem> {
    let (cluster, query) = (call.ctx.cluster(), &call.input.query);
    let TheSnapshot { vm, snapshot } = &call.target;
    let list = query.limit.unwrap_or(DIFF_LIST_DEFAULT);
    if list > DIFF_LIST_MAX {
        return Err(Problem::field("limit", list, format!("at most {DIFF_LIST_MAX}")));
    }
    let to = match (&query.to, &vm.status.at_snapshot) {
        (Some(name), _) => name.as_str(),
        (None, Some(at)) => at.as_str(),
        (None, None) => return Err(Problem::field("to", "", "the name of a snapshot")),
    };
    let to = call.ctx.snapshot(vm.value.id.as_str(), to, Action::SnapshotDiff)?.snapshot;
    let host = reachable_host(cluster, vm)?;
    let (from, to) = (snapshot.value.id.clone(), to.value.id.clone());
    let path = ComparePath { vm: vm.value.id.clone(), from, to };
    let query = CompareQuery { content: query.content, list: usize::try_from(list).ok() };
    let compared = cluster.agents.call::<SnapshotCompare>(&host, &path, &query, &(), COMPARE_TIMEOUT).await;
    compared.map(Answer::new).map_err(ClientError::into_problem)
}

async fn create(call: Call<SnapshotCreate, TheVm>) -> Result<Answer<OperationRef>, Problem> {
    let (if_match, dry_run) = (call.if_match()?, call.input.query.dry_run.unwrap_or_default());
    let wish = call.input.body;
    if wish.note.chars().count() > NOTE_CHARS_MAX {
        return Err(Problem::field("note", &wish.note, format!("at most {NOTE_CHARS_MAX} characters")));
    }
    let request = OperationRequest::SnapshotCreate {
        vm: call.target.0.value.id.clone(),
        kind: SnapshotKind::Manual,
        occasion: None,
        name: wish.name,
        note: wish.note,
        extent: wish.extent,
    };
    let begin = Begin { if_match, ..Begin::new(call.ctx.actor(), request) };
    operation::submit(call.ctx.cluster(), begin, dry_run).await
}

async fn delete(call: Call<SnapshotDelete, TheSnapshot>) -> Result<Answer<OperationRef>, Problem> {
    let dry_run = call.input.query.dry_run.unwrap_or_default();
    let TheSnapshot { vm, snapshot } = call.target;
    let request =
        OperationRequest::SnapshotDelete { vm: vm.value.id.clone(), snapshot: snapshot.value.id.clone() };
    // Whether it is the last one was looked at for this state of the VM: two deletions at once must not both be allowed
    // because each saw the other's snapshot.
    let if_match = Some(vm.revision);
    let begin = Begin { if_match, approved: call.ctx.approved, ..Begin::new(call.ctx.actor(), request) };
    operation::submit(call.ctx.cluster(), begin, dry_run).await
}

async fn clone(call: Call<SnapshotClone, TheSnapshot>) -> Result<Answer<OperationRef>, Problem> {
    let (ctx, dry_run) = (&call.ctx, call.input.query.dry_run.unwrap_or_default());
    let (TheSnapshot { vm, snapshot }, mut wish) = (&call.target, call.input.body);
    if wish.cold && wish.paused {
        return Err(Problem::field(
            "paused",
            true,
            "false: a guest that starts from its disk was nowhere yet",
        ));
    }
    let own = vm.segment.to_string();
    let segment = ctx.segment(wish.segment.as_deref().unwrap_or(&own), Action::VmCreate)?.0;
    if segment.value.id != vm.segment {
        // Whoever has rights there will have all that the guest knew.
        let is_last = ctx.cluster().records.snapshots_of(&vm.value.id).len() == 1;
        let resource = Resource::snapshot(vm_resource(ctx.cluster(), vm), vm, snapshot, is_last);
        ctx.require(Action::SnapshotMemory, &resource)?;
    }
    // From here on by id: what was checked is what is used, whoever renames what meanwhile.
    wish.segment = Some(segment.value.id.to_string());
    let (origin, snapshot) = (vm.value.id.clone(), snapshot.value.id.clone());
    let request = OperationRequest::SnapshotClone { origin, snapshot, wish };
    let begin = Begin { approved: ctx.approved, ..Begin::new(ctx.actor(), request) };
    operation::submit(ctx.cluster(), begin, dry_run).await
}

async fn verify(call: Call<SnapshotVerify, TheSnapshot>) -> Result<Answer<OperationRef>, Problem> {
    let dry_run = call.input.query.dry_run.unwrap_or_default();
    let (vm, snapshot) = (call.target.vm.value.id.clone(), call.target.snapshot.value.id.clone());
    let request = OperationRequest::SnapshotVerify { vm, snapshot, boot: call.input.body.boot };
    operation::submit(call.ctx.cluster(), Begin::new(call.ctx.actor(), request), dry_run).await
}

async fn export(call: Call<SnapshotExport, TheSnapshot>) -> Result<Answer<OperationRef>, Problem> {
    let (ctx, dry_run) = (&call.ctx, call.input.query.dry_run.unwrap_or_default());
    let repository = ctx.repository(&call.input.body.repository, Action::RepositoryView)?.0;
    let TheSnapshot { vm, snapshot } = &call.target;
    let request = OperationRequest::SnapshotExport {
        origin: vm.value.id.clone(),
        snapshot: snapshot.value.id.clone(),
        repository: repository.value.id.clone(),
    };
    let begin = Begin { approved: ctx.approved, ..Begin::new(ctx.actor(), request) };
    operation::submit(ctx.cluster(), begin, dry_run).await
}

async fn pin(call: Call<SnapshotPin, TheSnapshot>) -> Result<Answer<Snapshot>, Problem> {
    change(call.ctx.cluster(), &call.target, |vm, snapshot| {
        vm.status.baseline = Some(snapshot.id.clone());
        vm.status.baseline_note = None;
        snapshot.pinned = true;
        snapshot.expires_at = None;
        Ok(())
    })
    .await
}

async fn unpin(call: Call<SnapshotUnpin, TheSnapshot>) -> Result<Answer<Snapshot>, Problem> {
    change(call.ctx.cluster(), &call.target, |vm, snapshot| {
        if vm.status.baseline.as_ref() == Some(&snapshot.id) {
            let message = format!(
                "snapshot {} is the baseline of {}: pin another one instead",
                snapshot.name,
                vm.full_name()
            );
            return Err(Problem::new(ProblemCode::Protected, message));
        }
        snapshot.pinned = false;
        Ok(())
    })
    .await
}

/// Changes a snapshot and its VM together, against the newest of both.
async fn change(
    cluster: &Cluster,
    target: &TheSnapshot,
    apply: impl Fn(&mut Vm, &mut Snapshot) -> Result<(), Problem>,
) -> Result<Answer<Snapshot>, Problem> {
    let (vm_id, snapshot_key) = (target.vm.value.id.as_str(), target.snapshot.id.as_str());
    loop {
        let vm = cluster.records.require::<Vm>(vm_id)?;
        let snapshot = cluster.records.require::<Snapshot>(snapshot_key)?;
        refuse_while_it_goes(cluster, &vm)?;
        let (mut vm_then, mut snapshot_then) = (vm.value.clone(), snapshot.value.clone());
        apply(&mut vm_then, &mut snapshot_then)?;
        let mut transaction = Transaction::new();
        transaction.replace(&vm, &vm_then);
        transaction.replace(&snapshot, &snapshot_then);
        match cluster.records.commit(transaction).await {
            Ok(_) => {
                let row = cluster.records.require::<Snapshot>(snapshot_key)?;
                return Ok(Answer::new(row.value.clone()).at(row.revision));
            }
            // Something else about the VM changed at the same moment: look again.
            Err(RecordsError::Conflict { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// A snapshot that is being deleted can't be made the baseline: whoever came first wins.
fn refuse_while_it_goes(cluster: &Cluster, vm: &Vm) -> Result<(), Problem> {
    let Some(id) = &vm.status.operation else { return Ok(()) };
    let operation = cluster.operations.get(id)?;
    match operation.kind {
        OperationKind::SnapshotDelete | OperationKind::VmDelete => {
            let message = format!("a {} of {} is under way ({id})", operation.kind, vm.full_name());
            Err(Problem::new(ProblemCode::Busy, message))
        }
        _ => Ok(()),
    }
}
