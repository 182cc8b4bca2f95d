//! Schedules by a clock that runs as fast as the work allows: what is taken, what is kept, and what happens when the
//! manager, the host, the owner's rights or the room is gone.

use std::sync::Arc;
use std::time::Duration;

use berth_api::manager::{Grant, Quota, Segment, User};
use berth_manager::Manager;
use berth_manager::cluster::Cluster;
use berth_manager::operations::{Filter, OperationRequest};
use berth_manager::records::{Transaction, UniqueName};
use berth_manager::schedules;
use berth_model::schedule::reserve::Room;
use berth_model::schedule::{Keep, Outcome, Part, Schedule, ScheduleStatus, Tally, Zone};
use berth_model::snapshot::{SnapshotExtent, SnapshotKind};
use berth_model::{GrantId, ScheduleId, SegmentId, Timestamp, UserId, VmId};

use crate::world::{MortalStore, Pools, World, done, hosts_are_seen, quiet, running_vm, until};

const HOUR: Duration = Duration::from_secs(3600);
/// How often it is looked whether a run is over.
const LOOK_EVERY: Duration = Duration::from_secs(1);

struct Stage {
    world: World,
    manager: Manager,
    schedule: ScheduleId,
}

impl Stage {
    /// Some running VMs, and a schedule of all of them.
    async fn new(vms: usize, cron: &str, keep: &str) -> (Self, Vec<VmId>) {
        let world = World::new(Pools::Local).await;
        let manager = world.whole_manager(MortalStore::immortal(&world.inner)).await;
        let cluster = manager.cluster();
        hosts_are_seen(cluster).await;
        let mut ids = Vec::new();
        for number in 0..vms {
            ids.push(running_vm(cluster, &format!("vm-{number:02}")).await);
        }
        let schedule = add_schedule(cluster, cron, keep).await;
        (Self { world, manager, schedule }, ids)
    }

    fn cluster(&self) -> &Arc<Cluster> {
        self.manager.cluster()
    }

    fn schedule(&self) -> Schedule {
        self.cluster().records.require::<Schedule>(self.schedule.as_str()).expect("it is there").value.clone()
    }

    /// Waits until so many runs are over.
    async fn runs(&self, count: u64) {
        let over = async {
            loop {
                let status = self.schedule().status;
                if status.runs >= count && status.running().is_none() {
                    return;
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        // The clock's hours pass as fast as the work allows.
        assert!(tokio::time::timeout(1000 * HOUR, over).await.is_ok(), "never: {count} runs are over");
    }

    fn part(&self, vm: &VmId) -> Part {
        let id = format!("{}/{vm}", self.schedule);
        self.cluster().records.require::<Part>(&id).expect("its part").value.clone()
    }

    /// When the scheduled snapshots of a VM were due.
    fn due(&self, vm: &VmId) -> Vec<Timestamp> {
        let snapshots = self.cluster().records.snapshots_of(vm);
        snapshots.iter().filter_map(|row| row.occasion.as_ref().map(|occasion| occasion.due_at)).collect()
    }

    /// The manager is killed, time passes, and another one takes over.
    async fn another_manager(&mut self, after: Duration) {
        self.manager.shutdown().await;
        tokio::time::sleep(after).await;
        self.manager = self.world.whole_manager(MortalStore::immortal(&self.world.inner)).await;
    }

    async fn change_segment(&self, change: impl Fn(&mut Segment)) {
        let segment = segment().to_string();
        let changed = self.cluster().records.update::<Segment, berth_model::Problem>(&segment, |row| {
            change(row);
            Ok(())
        });
        changed.await.expect("a change");
    }
}

fn segment() -> SegmentId {
    SegmentId::from_entropy([5; 10])
}

fn owner() -> UserId {
    UserId::from_entropy([6; 10])
}

fn grant() -> GrantId {
    GrantId::from_entropy([6; 10])
}

async fn add_schedule(cluster: &Cluster, cron: &str, keep: &str) -> ScheduleId {
    let now = cluster.clock.now();
    let mut transaction = Transaction::new();
    transaction.create(&User {
        id: owner(),
        name: "ada".parse().unwrap(),
        disabled: false,
        external_groups: Vec::new(),
        created_at: now,
    });
    transaction.create(&Grant {
        id: grant(),
        team: None,
        user: Some(owner()),
        role: "configurator".parse().unwrap(),
        segment: Some(segment()),
        until: None,
        note: String::new(),
        granted_by: "test".to_owned(),
        created_at: now,
    });
    let schedule = Schedule {
        id: ScheduleId::from_entropy([6; 10]),
        segment: segment(),
        name: "steady".parse().unwrap(),
        vm: None,
        cron: cron.parse().unwrap(),
        timezone: Zone::UTC,
        keep: keep.parse().unwrap(),
        extent: SnapshotExtent::Machine,
        paused: false,
        owner: owner(),
        created_at: now,
        status: ScheduleStatus::new(now),
    };
    transaction.create(&schedule);
    transaction.claim(&UniqueName::schedule(&schedule.segment, &schedule.name), schedule.id.as_str());
    cluster.records.commit(transaction).await.expect("recorded");
    schedule.id
}

#[tokio::test(start_paused = true)]
async fn a_hundred_snapshots_are_taken_and_pruned_whoever_dies_in_between() {
    let (mut stage, vms) = Stage::new(3, "0 * * * *", "last=3,daily=3").await;
    done(stage.cluster(), OperationRequest::VmStop { vm: vms[2].clone() }).await;
    // What others made is no business of a schedule.
    crate::scenario::snapshot(stage.cluster(), &vms[0], "by-hand").await;
    for _ in 0..10 {
        let store = MortalStore::dying_after(&stage.world.inner, 40);
        stage.manager.shutdown().await;
        // One that dies in the middle of a run, at whatever it writes, and one that goes on.
        stage.manager = stage.world.whole_manager(Arc::clone(&store)).await;
        let _ = tokio::time::timeout(2 * HOUR, store.died()).await;
        stage.another_manager(Duration::ZERO).await;
        let runs = stage.schedule().status.runs;
        stage.runs(runs + 10).await;
    }
    quiet(stage.cluster()).await;
    let status = stage.schedule().status;
    assert!(status.runs >= 100, "{status:?}");
    for vm in &vms[..2] {
        let due = stage.due(vm);
        // Three hours, the last of which is of today, and the two days before.
        assert_eq!(due.len(), 5, "{due:?}");
        assert!(due.is_sorted() && due.windows(2).all(|two| two[0] < two[1]), "{due:?}");
        assert_eq!(stage.part(vm).outcome, Outcome::Taken);
    }
    let kinds = stage.cluster().records.snapshots_of(&vms[0]);
    assert_eq!(kinds.iter().filter(|row| row.kind == SnapshotKind::Manual).count(), 1, "not the schedule's");
    let stopped = stage.part(&vms[2]);
    assert_eq!((stopped.outcome, stopped.why.as_deref()), (Outcome::Skipped, Some("the VM is stopped")));
    assert!(stopped.in_a_row >= 100 && stage.due(&vms[2]).is_empty(), "{stopped:?}");
    crate::faults::settle(&stage.world, stage.cluster()).await;
    stage.world.check_whole(stage.cluster()).await;
    stage.manager.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn three_days_without_a_manager_cost_one_snapshot() {
    let (mut stage, vms) = Stage::new(1, "0 * * * *", "last=100").await;
    stage.runs(1).await;
    stage.another_manager(72 * HOUR).await;
    stage.runs(2).await;
    let (due, status) = (stage.due(&vms[0]), stage.schedule().status);
    assert_eq!((due.len(), status.missed), (2, 71), "{due:?}");
    assert_eq!(due[1].millis_since(due[0]), 72 * 3_600_000, "the last of the missed ones");
    stage.runs(3).await;
    assert_eq!(stage.due(&vms[0])[2].millis_since(due[1]), 3_600_000, "and on as before");
    stage.manager.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_host_takes_two_at_a_time_and_whoever_comes_later_is_included() {
    let (stage, _) = Stage::new(6, "0 * * * *", "last=2").await;
    let filter = Filter { active: true, ..Filter::default() };
    let mut most = 0;
    while stage.schedule().status.run.is_none_or(|run| !run.is_over()) {
        most = most.max(stage.cluster().operations.list(&filter).len());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(most, 2);
    let tally = |taken| Some(Tally { taken, ..Tally::default() });
    assert_eq!(stage.schedule().status.run.map(|run| run.tally), tally(6));
    let late = running_vm(stage.cluster(), "late").await;
    stage.runs(2).await;
    assert_eq!(stage.schedule().status.run.map(|run| run.tally), tally(7));
    assert_eq!(stage.due(&late).len(), 1);
    stage.manager.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn what_its_owner_has_lost_a_schedule_has_lost() {
    let (stage, vms) = Stage::new(1, "0 * * * *", "last=1").await;
    stage.runs(2).await;
    let before = stage.due(&vms[0]);
    let mut transaction = Transaction::new();
    transaction.forget::<Grant>(grant().as_str());
    stage.cluster().records.commit(transaction).await.expect("taken away");
    stage.runs(4).await;
    let part = stage.part(&vms[0]);
    let why = part.why.unwrap_or_default();
    assert_eq!((part.outcome, part.in_a_row), (Outcome::Failed, 2), "{why}");
    assert!(why.contains("ada, who answers for this schedule, may not 'snapshot.create' there"), "{why}");
    assert_eq!(stage.due(&vms[0]), before, "nothing is taken, nothing is deleted");
    assert_eq!(stage.schedule().status.run.map(|run| run.tally.failed), Some(1));
    stage.manager.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_quota_that_is_reached_fails_the_run_and_says_so() {
    let (stage, vms) = Stage::new(1, "0 * * * *", "last=5").await;
    stage.change_segment(|segment| segment.quota = Quota { snapshots: Some(2), ..Quota::default() }).await;
    stage.runs(3).await;
    let part = stage.part(&vms[0]);
    assert_eq!((part.outcome, stage.due(&vms[0]).len()), (Outcome::Failed, 2));
    let why = part.why.unwrap_or_default();
    assert!(why.contains("segment default may have 2 snapshots, has 2"), "{why}");
    stage.manager.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_pool_below_its_reserve_gets_no_more_of_them_and_what_is_not_kept_still_goes() {
    let (stage, vms) = Stage::new(1, "0 * * * *", "last=2").await;
    stage.runs(3).await;
    let vm = &vms[0];
    let room = || {
        let rows = schedules::vms(stage.cluster(), &stage.schedule());
        let rooms = schedules::pools(stage.cluster(), &stage.schedule(), &rows, stage.cluster().clock.now());
        (rooms[0].room, rooms[0].missing_bytes)
    };
    assert_eq!(room(), (Room::Ample, 0));
    stage.world.agent(0).leave_free(15 << 30);
    stage.runs(4).await;
    assert_eq!((room(), stage.part(vm).outcome), ((Room::Low, 0), Outcome::Taken));
    // Two are kept now; the rule then says one.
    stage.world.agent(0).leave_free(9 << 30);
    let keep = serde_json::from_value(serde_json::json!({"last": 1})).expect("a rule");
    let changed =
        stage.cluster().records.update::<Schedule, berth_model::Problem>(stage.schedule.as_str(), |row| {
            row.keep = Keep::clone(&keep);
            Ok(())
        });
    changed.await.expect("changed");
    stage.runs(5).await;
    let part = stage.part(vm);
    assert_eq!((part.outcome, part.deleted, stage.due(vm).len()), (Outcome::Failed, 1, 1));
    let why = part.why.unwrap_or_default();
    assert!(why.contains("below its reserve") && why.contains("1024 MiB are missing"), "{why}");
    assert_eq!(room(), (Room::Below, 1 << 30));
    stage.world.agent(0).leave_free(90 << 30);
    stage.runs(6).await;
    assert_eq!(stage.part(vm).outcome, Outcome::Taken, "there is room again");
    stage.manager.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_that_failed_its_verification_fills_no_place_of_a_good_one() {
    let (stage, vms) = Stage::new(1, "0 * * * *", "last=2").await;
    stage.runs(2).await;
    let newest = stage.cluster().records.snapshots_of(&vms[0]).last().expect("two").value.clone();
    let (file, detail) = ("layers/a.qcow2".to_owned(), "it is truncated".to_owned());
    let torn = berth_model::verification::SnapshotFault { file, offset: None, detail };
    stage.world.agent(0).damage(&newest.id, Some(torn));
    let verify = OperationRequest::SnapshotVerify { vm: vms[0].clone(), snapshot: newest.id, boot: false };
    done(stage.cluster(), verify).await;
    let before = stage.due(&vms[0]);
    stage.runs(3).await;
    let after = stage.due(&vms[0]);
    assert_eq!(
        (after.len(), after[0]),
        (2, before[0]),
        "the older good one stays, the bad one goes: {after:?}"
    );
    assert!(!after.contains(&before[1]), "{after:?}");
    stage.manager.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_schedule_goes_with_its_vm_and_what_is_pinned_stays() {
    let (stage, vms) = Stage::new(1, "0 * * * *", "last=1").await;
    stage.runs(1).await;
    let first = stage.cluster().records.snapshots_of(&vms[0]).last().expect("one").value.clone();
    let id = format!("{}/{}", first.vm, first.id);
    let pinned =
        stage.cluster().records.update::<berth_model::snapshot::Snapshot, berth_model::Problem>(&id, |row| {
            row.pinned = true;
            Ok(())
        });
    pinned.await.expect("pinned");
    let own =
        stage.cluster().records.update::<Schedule, berth_model::Problem>(stage.schedule.as_str(), |row| {
            row.vm = Some(vms[0].clone());
            Ok(())
        });
    own.await.expect("changed");
    stage.runs(4).await;
    let due = stage.due(&vms[0]);
    assert_eq!(due.len(), 2, "the pinned one and the newest: {due:?}");
    done(stage.cluster(), OperationRequest::VmDelete { vm: vms[0].clone(), force: true }).await;
    assert!(stage.cluster().records.list::<Schedule>().is_empty());
    until(stage.cluster(), "its parts are gone too", |cluster| cluster.records.list::<Part>().is_empty())
        .await;
    stage.manager.shutdown().await;
}
