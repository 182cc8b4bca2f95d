//! Schedules: seeing them, making and changing them, and asking for a run.
//!
//! Whoever makes, changes or resumes a schedule answers for it from then on, and must hold what its runs do: taking
//! snapshots and deleting them. Whoever pauses or deletes one, or asks for a run, lets it do no more than it may.

use berth_api::manager::{
    Doomed, Page, ScheduleCreate, ScheduleDelete, ScheduleList, SchedulePause, ScheduleReport,
    ScheduleResume, ScheduleRunNow, ScheduleShow, ScheduleUpdate, ScheduledVm,
};
use berth_model::access::Action;
use berth_model::schedule::{Part, Schedule, ScheduleStatus, Zone};
use berth_model::snapshot::Snapshot;
use berth_model::{Problem, ProblemCode, ScheduleId, UserId};

use super::list;
use crate::cluster::Cluster;
use crate::door::target::{TheList, TheSchedule, ToSchedule, vm_resource};
use crate::door::{Answer, Call, Ctx, Door};
use crate::policy::Resource;
use crate::records::{RecordsError, Transaction, UniqueName};
use crate::schedules::{self, stored_by};

/// How many coming runs are shown.
const RUNS_SHOWN: usize = 5;

/// Mounts the routes of this file.
pub fn mount(door: Door) -> Door {
    let door = door.mount(show_all).mount(create).mount(show).mount(update);
    door.mount(pause).mount(resume).mount(run_now).mount(delete)
}

async fn show_all(call: Call<ScheduleList, TheList>) -> Result<Answer<Page<Schedule>>, Problem> {
    let (ctx, query) = (&call.ctx, &call.input.query);
    let segment = query.segment.as_deref().map(|name| ctx.segment(name, Action::SegmentView)).transpose()?;
    let (cluster, visible) = (ctx.cluster(), ctx.visible(Action::ScheduleView));
    let mut all = cluster.records.list::<Schedule>();
    all.retain(|row| {
        segment.as_ref().is_none_or(|segment| segment.0.value.id == row.segment)
            && visible.shows(Some(&row.segment), || schedules::resource(cluster, row))
    });
    let key = |row: &std::sync::Arc<crate::records::Row<Schedule>>| row.id.clone();
    let page = list::page(&all, query.limit, query.cursor.as_deref(), key, |row| row.value.clone())?;
    Ok(Answer::new(page))
}

async fn create(call: Call<ScheduleCreate, ToSchedule>) -> Result<Answer<ScheduleReport>, Problem> {
    let (ctx, target, wish) = (&call.ctx, &call.target, call.input.body);
    let owner = answers_for_it(ctx, &target.resource)?;
    if !wish.keep.is_sound() {
        return Err(wrong_rule(&wish.keep));
    }
    let (cluster, now) = (ctx.cluster(), ctx.now());
    let schedule = Schedule {
        id: ScheduleId::from_entropy(cluster.entropy.id()),
        segment: target.segment.clone(),
        name: wish.name,
        vm: target.vm.as_ref().map(|vm| vm.value.id.clone()),
        cron: wish.cron,
        timezone: wish.timezone.unwrap_or(Zone::UTC),
        keep: wish.keep,
        extent: wish.extent,
        paused: false,
        owner,
        created_at: now,
        status: ScheduleStatus::new(now),
    };
    let name = UniqueName::schedule(&schedule.segment, &schedule.name);
    if call.input.query.dry_run.unwrap_or_default() {
        if cluster.records.id_of(&name).is_some() {
            let taken = RecordsError::Taken { noun: "schedule".to_owned(), name: schedule.name.to_string() };
            return Err(taken.into());
        }
        return Ok(Answer::new(report(ctx, &schedule)));
    }
    // Neither the segment nor the VM may go between the look and the deed.
    let _deciding = cluster.deciding().await;
    cluster.records.require::<berth_api::manager::Segment>(schedule.segment.as_str())?;
    let mut transaction = Transaction::new();
    if let Some(vm) = &schedule.vm {
        let vm = cluster.records.require::<berth_model::vm::Vm>(vm.as_str())?;
        transaction.unchanged(&vm);
    }
    transaction.create(&schedule);
    transaction.claim(&name, schedule.id.as_str());
    cluster.records.commit(transaction).await?;
    Ok(Answer::new(report(ctx, &schedule)))
}

async fn show(call: Call<ScheduleShow, TheSchedule>) -> Result<Answer<ScheduleReport>, Problem> {
    let row = &call.target.0;
    Ok(Answer::new(report(&call.ctx, row)).at(row.revision))
}

async fn update(call: Call<ScheduleUpdate, TheSchedule>) -> Result<Answer<ScheduleReport>, Problem> {
    let (ctx, wish) = (&call.ctx, call.input.body);
    let (cluster, now) = (ctx.cluster(), ctx.now());
    let owner = answers_for_it(ctx, &schedules::about(cluster, &call.target.0))?;
    if let Some(keep) = wish.keep.filter(|keep| !keep.is_sound()) {
        return Err(wrong_rule(&keep));
    }
    let dry_run = call.input.query.dry_run.unwrap_or_default();
    loop {
        let row = cluster.records.require::<Schedule>(&call.target.0.id)?;
        let mut schedule = row.value.clone();
        let mut transaction = Transaction::new();
        if let Some(name) = wish.name.clone().filter(|name| *name != schedule.name) {
            transaction.claim(&UniqueName::schedule(&schedule.segment, &name), &row.id);
            transaction.release(&UniqueName::schedule(&schedule.segment, &schedule.name));
            schedule.name = name;
        }
        if wish.cron.is_some() || wish.timezone.is_some() {
            // What another clock would have asked for before now does not count.
            schedule.status.seen_until = now;
        }
        schedule.cron = wish.cron.clone().unwrap_or(schedule.cron);
        schedule.timezone = wish.timezone.clone().unwrap_or(schedule.timezone);
        schedule.keep = wish.keep.unwrap_or(schedule.keep);
        schedule.owner = owner.clone();
        if dry_run {
            return Ok(Answer::new(report(ctx, &schedule)));
        }
        transaction.replace(&row, &schedule);
        match cluster.records.commit(transaction).await {
            Ok(revision) => return Ok(Answer::new(report(ctx, &schedule)).at(revision)),
            // A run has begun or ended at the same moment.
            Err(RecordsError::Conflict { .. }) => cluster.records.catch_up().await?,
            Err(error) => return Err(error.into()),
        }
    }
}

async fn pause(call: Call<SchedulePause, TheSchedule>) -> Result<Answer<Schedule>, Problem> {
    change(call.ctx.cluster(), &call.target.0.id, |schedule| schedule.paused = true).await
}

async fn resume(call: Call<ScheduleResume, TheSchedule>) -> Result<Answer<Schedule>, Problem> {
    let (cluster, now) = (call.ctx.cluster(), call.ctx.now());
    let owner = answers_for_it(&call.ctx, &schedules::about(cluster, &call.target.0))?;
    change(cluster, &call.target.0.id, |schedule| {
        if std::mem::take(&mut schedule.paused) {
            schedule.status.seen_until = now;
        }
        schedule.owner = owner.clone();
    })
    .await
}

async fn run_now(call: Call<ScheduleRunNow, TheSchedule>) -> Result<Answer<ScheduleReport>, Problem> {
    let (ctx, cluster) = (&call.ctx, call.ctx.cluster());
    let (actor, now) = (ctx.actor(), ctx.now());
    let dry_run = call.input.query.dry_run.unwrap_or_default();
    let begin = |schedule: &mut Schedule| {
        let name = schedules::full_name(cluster, schedule);
        if schedule.paused {
            let message = format!("schedule {name} is paused: resume it first");
            return Err(Problem::new(ProblemCode::WrongState, message));
        }
        let run = schedule.asked(actor.clone(), now);
        schedule.begin(run).map_err(|going| {
            let message = format!("schedule {name} has a run that goes since {}", going.begun_at);
            Problem::new(ProblemCode::Busy, message)
        })
    };
    if dry_run {
        let mut schedule = call.target.0.value.clone();
        begin(&mut schedule)?;
        return Ok(Answer::new(report(ctx, &call.target.0)));
    }
    let row = cluster.records.update::<Schedule, Problem>(&call.target.0.id, begin).await?;
    Ok(Answer::new(report(ctx, &row)).at(row.revision))
}

async fn delete(call: Call<ScheduleDelete, TheSchedule>) -> Result<Answer<()>, Problem> {
    let cluster = call.ctx.cluster();
    loop {
        let row = cluster.records.require::<Schedule>(&call.target.0.id)?;
        let mut transaction = Transaction::new();
        transaction.remove(&row);
        transaction.release(&UniqueName::schedule(&row.segment, &row.name));
        match cluster.records.commit(transaction).await {
            Err(RecordsError::Conflict { .. }) => cluster.records.catch_up().await?,
            other => return other.map(|_| Answer::new(())).map_err(Into::into),
        }
    }
}

/// The caller, if it holds what a schedule's runs do.
fn answers_for_it(ctx: &Ctx, about: &Resource) -> Result<UserId, Problem> {
    ctx.require(Action::SnapshotCreate, about)?;
    ctx.require(Action::SnapshotDelete, about)?;
    Ok(ctx.user()?.id.clone())
}

fn wrong_rule(keep: &berth_model::schedule::Keep) -> Problem {
    Problem::field("keep", keep, berth_model::schedule::retention::KEEP_RULE)
}

async fn change(
    cluster: &Cluster,
    id: &str,
    mut change: impl FnMut(&mut Schedule),
) -> Result<Answer<Schedule>, Problem> {
    let row = cluster.records.update::<Schedule, Problem>(id, |schedule| {
        change(schedule);
        Ok(())
    });
    let row = row.await?;
    Ok(Answer::new(row.value.clone()).at(row.revision))
}

fn report(ctx: &Ctx, schedule: &Schedule) -> ScheduleReport {
    let (cluster, now) = (ctx.cluster(), ctx.now());
    let visible = ctx.visible(Action::VmView);
    let mut vms = schedules::vms(cluster, schedule);
    vms.retain(|vm| visible.shows(Some(&vm.segment), || vm_resource(cluster, vm)));
    let rule = (&schedule.id, &schedule.keep, &schedule.timezone);
    let (mut would_delete, mut snapshots, mut stored_bytes) = (Vec::new(), 0, 0);
    for vm in &vms {
        let is_own =
            |row: &Snapshot| row.occasion.as_ref().is_some_and(|occasion| occasion.schedule == schedule.id);
        for snapshot in cluster.records.snapshots_of(&vm.value.id).iter().filter(|row| is_own(row)) {
            snapshots += 1;
            stored_bytes += stored_by(snapshot);
        }
        would_delete.extend(schedules::doomed(cluster, rule, vm, now).iter().map(|row| Doomed {
            vm: vm.value.id.clone(),
            vm_name: vm.full_name(),
            snapshot: row.value.id.clone(),
            name: row.name.clone(),
            taken_at: row.created_at,
            stored_bytes: stored_by(row),
        }));
    }
    let last = |vm: &berth_model::VmId| cluster.records.get::<Part>(&format!("{}/{vm}", schedule.id));
    let about = schedules::about(cluster, schedule);
    let held = schedules::owner_may(ctx.gate(), &schedule.owner, Action::SnapshotCreate, &about).err();
    let runs = if schedule.paused { 0 } else { RUNS_SHOWN };
    ScheduleReport {
        next_runs: schedule.cron.next(&schedule.timezone, now, runs),
        vms: vms
            .iter()
            .map(|vm| ScheduledVm {
                vm: vm.value.id.clone(),
                name: vm.full_name(),
                last: last(&vm.value.id).map(|row| row.value.clone()),
            })
            .collect(),
        would_delete,
        snapshots,
        stored_bytes,
        pools: schedules::pools(cluster, schedule, &vms, now),
        held,
        schedule: schedule.clone(),
    }
}
