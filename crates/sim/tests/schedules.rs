//! A month of a schedule in seconds: a real manager that is killed now and then, a real agent, and a clock that is set.

use std::time::{Duration, SystemTime};

use berth_api::endpoint::Nothing;
use berth_api::manager as contract;
use berth_model::schedule::{Outcome, Schedule};
use berth_model::snapshot::SnapshotKind;
use berth_model::{Timestamp, VmId};
use berth_sim::cluster::act::snapshots;
use berth_sim::{SimCluster, settled};

const DEADLINE: Duration = Duration::from_secs(60);
const SIX_HOURS: Duration = Duration::from_secs(6 * 3600);

async fn make(cluster: &SimCluster) -> contract::ScheduleReport {
    let wish = serde_json::json!({
        "name": "quarterly", "segment": "default", "cron": "0 */6 * * *", "timezone": "Europe/Berlin",
        "keep": {"last": 2, "daily": 5, "weekly": 2},
    });
    let wish = serde_json::from_value(wish).expect("a wish");
    let query = contract::ChangeQuery::default();
    cluster.client().call::<contract::ScheduleCreate>(&Nothing {}, &query, &wish).await.expect("made")
}

async fn show(cluster: &SimCluster, schedule: &Schedule) -> Option<contract::ScheduleReport> {
    let path = contract::SchedulePath { schedule: schedule.id.to_string() };
    cluster.client().call::<contract::ScheduleShow>(&path, &Nothing {}, &()).await.ok()
}

/// Waits until so many runs are over.
async fn runs(cluster: &SimCluster, schedule: &Schedule, count: u64) -> contract::ScheduleReport {
    let waiting = async {
        loop {
            if let Some(report) = show(cluster, schedule).await
                && report.schedule.status.runs >= count
                && report.schedule.status.running().is_none()
            {
                return report;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    match tokio::time::timeout(DEADLINE, waiting).await {
        Ok(report) => report,
        Err(_) => panic!("{count} runs never are over: {:?}", show(cluster, schedule).await),
    }
}

/// Until it is one o'clock in the afternoon, UTC: what a rule keeps depends on how many runs the last day has had.
fn until_afternoon() -> Duration {
    const DAY_S: u64 = 24 * 3600;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a clock");
    Duration::from_secs((DAY_S + 13 * 3600 - now.as_secs() % DAY_S) % DAY_S)
}

/// When those snapshots of a VM were taken that a schedule made.
async fn scheduled(cluster: &SimCluster, vm: &VmId) -> Vec<Timestamp> {
    let mut all = snapshots(&cluster.client(), vm).await.expect("snapshots");
    all.retain(|snapshot| snapshot.kind == SnapshotKind::Scheduled);
    all.into_iter().map(|snapshot| snapshot.created_at).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_month_of_snapshots_is_taken_and_pruned_by_managers_that_die() {
    let cluster = SimCluster::new(1, 31).await;
    let vms = cluster.create_vms(2).await;
    settled::wait(&cluster, DEADLINE).await.expect("settled");
    cluster.clock().advance(until_afternoon());
    let schedule = make(&cluster).await.schedule;
    let mut count = 0;
    for quarter in 1..=120 {
        cluster.clock().advance(SIX_HOURS);
        if quarter % 15 == 0 {
            // In the middle of a run, or just before or after it.
            tokio::time::sleep(Duration::from_millis(quarter)).await;
            cluster.kill_manager().await;
            cluster.start_manager().await;
        }
        count += 1;
        let report = runs(&cluster, &schedule, count).await;
        // Those that clocks that were set meanwhile cost are counted, not made up for.
        count = report.schedule.status.runs;
        for vm in &report.vms {
            let last = vm.last.as_ref().expect("a part");
            assert_eq!(last.outcome, Outcome::Taken, "{last:?}");
        }
    }
    let report = runs(&cluster, &schedule, count).await;
    let status = &report.schedule.status;
    assert!(status.runs + status.missed >= 120 && status.runs >= 110, "{status:?}");
    assert_eq!(report.would_delete, [], "everything was pruned that had to be");
    for vm in &vms {
        let kept = scheduled(&cluster, vm).await;
        // Two, the four days before, and at most two weeks that are not among these.
        assert!((6..=8).contains(&kept.len()), "{kept:?} with {status:?}");
    }
    settled::wait(&cluster, DEADLINE).await.expect("settled");
    cluster.shut_down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn days_without_a_manager_cost_one_snapshot_and_a_stopped_vm_is_skipped() {
    let cluster = SimCluster::new(1, 32).await;
    let vms = cluster.create_vms(2).await;
    settled::wait(&cluster, DEADLINE).await.expect("settled");
    let path = contract::VmPath { vm: vms[1].to_string() };
    let query = contract::ChangeQuery::default();
    let begun = cluster.client().call::<contract::VmStop>(&path, &query, &()).await.expect("begun");
    berth_sim::cluster::done(&cluster.client(), begun.operation).await.expect("stopped");
    let schedule = make(&cluster).await.schedule;
    cluster.kill_manager().await;
    cluster.clock().advance(SIX_HOURS * 12);
    cluster.start_manager().await;
    let report = runs(&cluster, &schedule, 1).await;
    let (running, stopped) = (scheduled(&cluster, &vms[0]).await, scheduled(&cluster, &vms[1]).await);
    assert_eq!((running.len(), stopped.len()), (1, 0));
    let status = &report.schedule.status;
    assert_eq!((status.runs, status.missed), (1, 11));
    let skipped = report.vms.iter().find(|vm| vm.vm == vms[1]).and_then(|vm| vm.last.clone());
    assert_eq!(skipped.and_then(|part| part.why).as_deref(), Some("the VM is stopped"));
    cluster.shut_down().await;
}
