//! VMs: seeing them, and beginning what changes them.

use std::sync::Arc;

use berth_api::endpoint::Endpoint;
use berth_api::manager::{
    ChangeQuery, OperationRef, Page, UpdateVm, VmCreate, VmDelete, VmList, VmMigrate, VmPath, VmPause,
    VmRestart, VmRestore, VmResume, VmShow, VmShutdown, VmStart, VmStop, VmUpdate,
};
use berth_model::access::Action;
use berth_model::vm::{STANDARD_CLASS, Vm};
use berth_model::{Problem, ProblemCode, VmId};

use super::{list, operation};
use crate::door::target::{self, IntoSegment, TheList, TheSnapshot, TheVm, ToRestore};
use crate::door::{Answer, Call, Door};
use crate::operations::{Begin, OperationRequest};
use crate::records::{RecordsError, Row, Transaction};

/// Longest time that a guest may be given to become ready, or to shut down, in seconds: a day. Longer is a mistake
/// in units.
const GUEST_WAIT_S_MAX: u32 = 24 * 3600;

/// Mounts the routes of this file.
pub fn mount(door: Door) -> Door {
    door.mount(show_all)
        .mount(create)
        .mount(show)
        .mount(update)
        .mount(delete)
        .mount(start)
        .mount(shutdown)
        .mount(stop)
        .mount(restart)
        .mount(pause)
        .mount(resume)
        .mount(migrate)
        .mount(restore)
}

async fn show_all(call: Call<VmList, TheList>) -> Result<Answer<Page<Vm>>, Problem> {
    let (ctx, query) = (&call.ctx, &call.input.query);
    let segment = query.segment.as_deref().map(|name| ctx.segment(name, Action::SegmentView)).transpose()?;
    let host = query.host.as_deref().map(|name| ctx.host(name, Action::HostView)).transpose()?;
    let (cluster, visible) = (ctx.cluster(), ctx.visible(Action::VmView));
    let mut found = cluster.records.list_where::<Vm>(|vm| {
        segment.as_ref().is_none_or(|segment| vm.segment == segment.0.value.id)
            && host.as_ref().is_none_or(|host| vm.status.host.as_ref() == Some(&host.0.value.id))
            && visible.may_show(Some(&vm.segment))
    });
    found.retain(|vm| visible.shows(Some(&vm.segment), || target::vm_resource(cluster, vm)));
    found.sort_by(|a, b| (&a.segment_name, &a.name).cmp(&(&b.segment_name, &b.name)));
    // The slash sorts after the dash, but before letters and digits: a space keeps the order of the pair.
    let key = |row: &Arc<Row<Vm>>| format!("{} {}", row.segment_name, row.name);
    let page = list::page(&found, query.limit, query.cursor.as_deref(), key, |row| row.value.clone())?;
    Ok(Answer::new(page))
}

async fn show(call: Call<VmShow, TheVm>) -> Result<Answer<Vm>, Problem> {
    let TheVm(vm) = call.target;
    Ok(Answer::new(vm.value.clone()).at(vm.revision))
}

async fn create(call: Call<VmCreate, IntoSegment>) -> Result<Answer<OperationRef>, Problem> {
    let (ctx, mut wish) = (&call.ctx, call.input.body);
    let IntoSegment(segment) = call.target;
    if let Some(seconds) = wish.ready_timeout_s {
        check_wait("ready_timeout_s", seconds)?;
    }
    let image = ctx.image_for(&segment.value.id, &wish.image, Action::ImageView)?.0;
    if image.segment.as_ref().is_some_and(|only| *only != segment.value.id) {
        return Err(Problem::field(
            "image",
            &wish.image,
            "an image of the VM's own segment, or of all segments",
        ));
    }
    if wish.class.as_ref().is_some_and(|class| class.as_str() != STANDARD_CLASS) {
        call.ctx.require(Action::VmClassify, &target::segment_resource(ctx.cluster(), &segment.value.id))?;
    }
    // From here on by id: what was checked is what is used, whoever renames what meanwhile.
    wish.image = image.value.id.to_string();
    wish.segment = segment.value.id.to_string();
    if let Some(host) = &mut wish.host {
        *host = ctx.host(host, Action::HostView)?.0.value.id.to_string();
    }
    let dry_run = call.input.query.dry_run.unwrap_or_default();
    let request = OperationRequest::VmCreate { wish: Box::new(wish) };
    let begin = Begin::new(ctx.actor(), request);
    operation::submit(ctx.cluster(), begin, dry_run).await
}

/// Begins (or only tries) an operation on the VM that the path names.
async fn change<E>(
    call: Call<E, TheVm>,
    dry_run: Option<bool>,
    request: impl FnOnce(VmId) -> OperationRequest,
) -> Result<Answer<OperationRef>, Problem>
where
    E: Endpoint<Path = VmPath>,
{
    let if_match = call.if_match()?;
    let request = request(call.target.0.value.id.clone());
    let begin = Begin { if_match, approved: call.ctx.approved, ..Begin::new(call.ctx.actor(), request) };
    operation::submit(call.ctx.cluster(), begin, dry_run.unwrap_or_default()).await
}

/// The same for requests that say nothing but which VM.
async fn plain<E>(
    call: Call<E, TheVm>,
    request: impl FnOnce(VmId) -> OperationRequest,
) -> Result<Answer<OperationRef>, Problem>
where
    E: Endpoint<Path = VmPath, Query = ChangeQuery>,
{
    let dry_run = call.input.query.dry_run;
    change(call, dry_run, request).await
}

async fn start(call: Call<VmStart, TheVm>) -> Result<Answer<OperationRef>, Problem> {
    plain(call, |vm| OperationRequest::VmStart { vm }).await
}

async fn stop(call: Call<VmStop, TheVm>) -> Result<Answer<OperationRef>, Problem> {
    plain(call, |vm| OperationRequest::VmStop { vm }).await
}

async fn restart(call: Call<VmRestart, TheVm>) -> Result<Answer<OperationRef>, Problem> {
    plain(call, |vm| OperationRequest::VmRestart { vm }).await
}

async fn pause(call: Call<VmPause, TheVm>) -> Result<Answer<OperationRef>, Problem> {
    plain(call, |vm| OperationRequest::VmPause { vm }).await
}

async fn resume(call: Call<VmResume, TheVm>) -> Result<Answer<OperationRef>, Problem> {
    plain(call, |vm| OperationRequest::VmResume { vm }).await
}

async fn shutdown(call: Call<VmShutdown, TheVm>) -> Result<Answer<OperationRef>, Problem> {
    let timeout_s = call.input.body.timeout_s;
    if let Some(seconds) = timeout_s {
        check_wait("timeout_s", seconds)?;
    }
    plain(call, |vm| OperationRequest::VmShutdown { vm, timeout_s }).await
}

async fn delete(call: Call<VmDelete, TheVm>) -> Result<Answer<OperationRef>, Problem> {
    let (dry_run, force) = (call.input.query.dry_run, call.input.query.force.unwrap_or_default());
    change(call, dry_run, |vm| OperationRequest::VmDelete { vm, force }).await
}

async fn migrate(call: Call<VmMigrate, TheVm>) -> Result<Answer<OperationRef>, Problem> {
    let mut wish = call.input.body.clone();
    if wish.bandwidth_bytes_per_second == Some(0) {
        return Err(Problem::field("bandwidth_bytes_per_second", 0, "more than 0"));
    }
    if let Some(target) = &mut wish.target {
        *target = call.ctx.host(target, Action::HostView)?.0.value.id.to_string();
    }
    plain(call, |vm| OperationRequest::VmMigrate { vm, wish }).await
}

async fn restore(call: Call<VmRestore, ToRestore>) -> Result<Answer<OperationRef>, Problem> {
    let (if_match, dry_run) = (call.if_match()?, call.input.query.dry_run.unwrap_or_default());
    let TheSnapshot { vm, snapshot } = &call.target.0;
    let mut wish = call.input.body;
    // What was asked about is what is done, whatever the newest one is by then.
    wish.snapshot = Some(snapshot.value.id.to_string());
    wish.newest_undo = false;
    if wish.host.is_some() {
        call.ctx.require(Action::VmMigrate, &target::vm_resource(call.ctx.cluster(), vm))?;
    }
    let request = OperationRequest::SnapshotRestore { vm: vm.value.id.clone(), wish };
    let begin = Begin { if_match, ..Begin::new(call.ctx.actor(), request) };
    operation::submit(call.ctx.cluster(), begin, dry_run).await
}

async fn update(call: Call<VmUpdate, TheVm>) -> Result<Answer<Vm>, Problem> {
    let (if_match, wish) = (call.if_match()?, &call.input.body);
    let TheVm(vm) = &call.target;
    if let Some(seconds) = wish.ready_timeout_s {
        check_wait("ready_timeout_s", seconds)?;
    }
    if lifts_guards(wish, vm) {
        // What guards look at is not for everybody who may configure.
        call.ctx.require(Action::VmClassify, &target::vm_resource(call.ctx.cluster(), vm))?;
    }
    if if_match.is_some_and(|expected| expected != vm.revision) {
        return Err(has_changed(vm));
    }
    let records = &call.ctx.cluster().records;
    if call.input.query.dry_run.unwrap_or_default() {
        let mut changed = vm.value.clone();
        apply(wish, &mut changed);
        return Ok(Answer::new(changed).at(vm.revision));
    }
    if if_match.is_none() {
        let row = records
            .update::<Vm, Problem>(vm.value.id.as_str(), |now| {
                // Somebody may have put a guard up since it was looked at.
                if lifts_guards(wish, now) && !lifts_guards(wish, vm) {
                    return Err(has_changed(now));
                }
                apply(wish, now);
                Ok(())
            })
            .await?;
        return Ok(Answer::new(row.value.clone()).at(row.revision));
    }
    // Exactly the revision that was looked at, or nothing.
    let mut changed = vm.value.clone();
    apply(wish, &mut changed);
    let mut transaction = Transaction::new();
    transaction.replace(vm, &changed);
    match records.commit(transaction).await {
        Ok(_) => {}
        Err(RecordsError::Conflict { .. }) => return Err(has_changed(vm)),
        Err(error) => return Err(error.into()),
    }
    let row = records.require::<Vm>(vm.value.id.as_str())?;
    Ok(Answer::new(row.value.clone()).at(row.revision))
}

/// Whether a change takes from a VM what guards look at.
fn lifts_guards(wish: &UpdateVm, vm: &Vm) -> bool {
    wish.class.as_ref().is_some_and(|class| *class != vm.spec.class)
        || (vm.spec.protected && wish.protected == Some(false))
}

fn apply(wish: &UpdateVm, vm: &mut Vm) {
    vm.spec.protected = wish.protected.unwrap_or(vm.spec.protected);
    if let Some(class) = &wish.class {
        vm.spec.class = class.clone();
    }
    vm.spec.ready_timeout_s = wish.ready_timeout_s.unwrap_or(vm.spec.ready_timeout_s);
}

fn has_changed(vm: &Vm) -> Problem {
    let message = format!("VM {} has changed since it was read: read it again", vm.full_name());
    Problem::new(ProblemCode::Changed, message)
}

fn check_wait(field: &str, seconds: u32) -> Result<(), Problem> {
    if seconds == 0 || seconds > GUEST_WAIT_S_MAX {
        return Err(Problem::field(field, seconds, format!("1 to {GUEST_WAIT_S_MAX} seconds")));
    }
    Ok(())
}
