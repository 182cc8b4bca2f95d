//! Schedules: what is due is begun, what was begun is gone on with, and the end is written down.
//!
//! A run is in the schedule's own record from before its first snapshot to after its last, and each VM's part is written
//! down when it is over. So a manager that dies leaves either nothing or a run that goes; the next one asks for what is
//! left of it, and finds a snapshot that was taken and not noted by the run that stands in the snapshot itself. Of one
//! VM there is never more than one change at a time, because each needs the VM's slot; of a host there are [`AT_ONCE`].

mod turn;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use berth_model::schedule::reserve::Room;
use berth_model::schedule::{Due, Outcome, Part, Schedule, ScheduleRun, Tally};
use berth_model::vm::Vm;
use berth_model::{HostId, Problem, ScheduleId};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use crate::audit::OK;
use crate::cluster::Cluster;
use crate::door::Gate;
use crate::records::{RecordsError, Row, Transaction};
use crate::schedules;
use turn::Turn;

/// How long until schedules are looked at when nothing has changed: clocks may be set, and rows be left behind.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// How many snapshots schedules take or delete on one host at a time. More: guests feel their neighbours' snapshots, and
/// disks write several images at once. Fewer: a large segment is not done when its next run is due.
const AT_ONCE: usize = 2;
/// Pause before a run is gone on with that could not be written down.
const AGAIN_AFTER: Duration = Duration::from_secs(5);

/// Looks whenever a schedule changes, when the next one is due, and now and then.
pub(crate) async fn keep(gate: Arc<Gate>) {
    let cluster = Arc::clone(&gate.cluster);
    let mut changes = cluster.records.changes::<Schedule>();
    let keeper = Arc::new(Keeper {
        gate,
        hosts: Mutex::default(),
        going: Arc::default(),
        ended: Arc::new(Notify::new()),
    });
    loop {
        changes.mark_unchanged();
        let wait = keeper.look().await;
        if let Err(error) = forget_strays(&cluster).await {
            tracing::error!(%error, "what is left of deleted schedules can't be removed");
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = cluster.clock.sleep(wait) => {}
            () = keeper.ended.notified() => {}
        }
    }
}

/// What all runs share.
struct Keeper {
    gate: Arc<Gate>,
    hosts: Mutex<HashMap<HostId, Arc<Semaphore>>>,
    going: Arc<Mutex<HashSet<ScheduleId>>>,
    ended: Arc<Notify>,
}

/// That a run goes, as long as it is held.
struct Going {
    id: ScheduleId,
    going: Arc<Mutex<HashSet<ScheduleId>>>,
    ended: Arc<Notify>,
}

impl Drop for Going {
    fn drop(&mut self) {
        self.going.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
        self.ended.notify_one();
    }
}

impl Keeper {
    fn cluster(&self) -> &Arc<Cluster> {
        &self.gate.cluster
    }

    /// Begins what is due; says how long there is nothing to do.
    async fn look(self: &Arc<Self>) -> Duration {
        let mut wait = LOOK_EVERY;
        for schedule in self.cluster().records.list::<Schedule>() {
            if self.going.lock().unwrap_or_else(PoisonError::into_inner).contains(&schedule.value.id) {
                continue;
            }
            let now = self.cluster().clock.now();
            match schedule.due(now) {
                Due::Wait(Some(at)) => wait = wait.min(Duration::from_millis(at.millis_since(now))),
                Due::Wait(None) => {}
                Due::GoOn => self.set_out(&schedule.value.id),
                Due::Begin(_) => match self.begin(&schedule).await {
                    Ok(()) => self.set_out(&schedule.value.id),
                    Err(problem) => {
                        let schedule = schedules::full_name(self.cluster(), &schedule);
                        tracing::error!(schedule, %problem, "a run can't be begun");
                    }
                },
            }
        }
        wait
    }

    async fn begin(&self, schedule: &Row<Schedule>) -> Result<(), Problem> {
        let now = self.cluster().clock.now();
        let begun = self.cluster().records.update::<Schedule, RecordsError>(&schedule.id, |schedule| {
            // Somebody may have changed it since it was looked at.
            if let Due::Begin(run) = schedule.due(now) {
                let _ = schedule.begin(run);
            }
            Ok(())
        });
        match begun.await {
            Ok(_) | Err(RecordsError::Missing { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn set_out(self: &Arc<Self>, id: &ScheduleId) {
        self.going.lock().unwrap_or_else(PoisonError::into_inner).insert(id.clone());
        let mark = Going { id: id.clone(), going: Arc::clone(&self.going), ended: Arc::clone(&self.ended) };
        let keeper = Arc::clone(self);
        self.cluster().spawn(async move {
            if let Err(problem) = keeper.run(&mark.id).await {
                tracing::error!(schedule = %mark.id, %problem, "a run can't go on");
                keeper.cluster().clock.sleep(AGAIN_AFTER).await;
            }
        });
    }

    /// A run from where it is to its end.
    async fn run(self: &Arc<Self>, id: &ScheduleId) -> Result<(), Problem> {
        let cluster = self.cluster();
        let Some(schedule) = cluster.records.get::<Schedule>(id.as_str()) else { return Ok(()) };
        let Some(run) = schedule.status.running().cloned() else { return Ok(()) };
        let done: HashSet<_> = parts_in(cluster, id, &run).into_iter().map(|part| part.vm.clone()).collect();
        let mut vms = schedules::vms(cluster, &schedule);
        vms.retain(|vm| !done.contains(&vm.value.id));
        // Who has waited longest goes first, should the run be broken off time and again.
        vms.sort_by_key(|vm| last_part(cluster, id, vm).map(|part| part.at));
        let turns = vms.iter().map(|vm| Turn::new(self, id, &run, &vm.value.id).whole());
        let mut turns: FuturesUnordered<_> = turns.collect();
        while let Some(part) = turns.next().await {
            if let Some(part) = part? {
                self.note(&part).await?;
            }
        }
        drop(turns);
        self.finish(id, &run).await
    }

    /// Writes down what came of a VM's part.
    async fn note(&self, part: &Part) -> Result<(), Problem> {
        let cluster = self.cluster();
        let mut transaction = Transaction::new();
        transaction.put(part);
        cluster.records.commit(transaction).await?;
        self.gate.metrics.known_good().schedule_part_over(part);
        let vm = cluster.records.get::<Vm>(part.vm.as_str()).map_or_else(String::new, |vm| vm.full_name());
        let result = if part.outcome == Outcome::Taken { OK } else { part.outcome.as_str() };
        cluster.did_by_itself("schedule", "snapshot.create", &format!("vm:{vm}"), result);
        if part.outcome == Outcome::Failed {
            let why = part.why.as_deref().unwrap_or_default();
            tracing::warn!(schedule = %part.schedule, vm, why, "a scheduled snapshot failed");
        }
        Ok(())
    }

    async fn finish(&self, id: &ScheduleId, run: &ScheduleRun) -> Result<(), Problem> {
        let cluster = self.cluster();
        let (now, parts) = (cluster.clock.now(), parts_in(cluster, id, run));
        let tally = Tally::of(parts.iter().map(|part| &part.value));
        let before = cluster.records.get::<Schedule>(id.as_str()).map_or(0, |row| row.status.missed);
        let finished = cluster.records.update::<Schedule, RecordsError>(id.as_str(), |schedule| {
            schedule.finish(run.due_at, tally, now);
            Ok(())
        });
        match finished.await {
            Ok(schedule) => {
                let meanwhile = schedule.status.missed.saturating_sub(before);
                self.gate.metrics.known_good().schedule_run_over(run.missed + meanwhile);
                let label = format!("schedule:{}", schedules::full_name(cluster, &schedule));
                let result = if tally.failed > 0 { Outcome::Failed.as_str() } else { OK };
                cluster.did_by_itself("schedule", "schedule.run", &label, result);
                self.warn_of_pools(&schedule);
                Ok(())
            }
            Err(RecordsError::Missing { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Says which pools are near their reserve or below it.
    fn warn_of_pools(&self, schedule: &Schedule) {
        let cluster = self.cluster();
        let vms = schedules::vms(cluster, schedule);
        for pool in schedules::pools(cluster, schedule, &vms, cluster.clock.now()) {
            let result = match pool.room {
                Room::Ample => continue,
                Room::Low => "low",
                Room::Below => "below-reserve",
            };
            let label = format!("pool:{}/{}", pool.host, pool.pool);
            tracing::warn!(pool = label, free_bytes = pool.free_bytes, result, "a pool is near its reserve");
            cluster.did_by_itself("schedule", "pool.watch", &label, result);
        }
    }

    /// A place among those that schedules may have on a host at a time.
    async fn place_on(&self, host: &HostId) -> Result<OwnedSemaphorePermit, Problem> {
        let places = {
            let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(hosts.entry(host.clone()).or_insert_with(|| Arc::new(Semaphore::new(AT_ONCE))))
        };
        places
            .acquire_owned()
            .await
            .map_err(|_| Problem::new(berth_model::ProblemCode::Unreachable, "the manager is being stopped"))
    }
}

fn parts_in(cluster: &Cluster, id: &ScheduleId, run: &ScheduleRun) -> Vec<Arc<Row<Part>>> {
    let mut parts = cluster.records.list_below::<Part>(&format!("{id}/"));
    parts.retain(|part| part.due_at == run.due_at);
    parts
}

fn last_part(cluster: &Cluster, id: &ScheduleId, vm: &Vm) -> Option<Arc<Row<Part>>> {
    cluster.records.get::<Part>(&format!("{id}/{}", vm.id))
}

/// Removes what is left of schedules and VMs that are no more.
async fn forget_strays(cluster: &Cluster) -> Result<(), RecordsError> {
    let records = &cluster.records;
    let mut transaction = Transaction::new();
    let mut found = false;
    for part in records.list::<Part>() {
        let is_stray = records.get::<Schedule>(part.schedule.as_str()).is_none()
            || records.get::<Vm>(part.vm.as_str()).is_none();
        if is_stray && !transaction.is_full() {
            transaction.forget::<Part>(&part.id);
            found = true;
        }
    }
    if found {
        records.commit(transaction).await?;
    }
    Ok(())
}
