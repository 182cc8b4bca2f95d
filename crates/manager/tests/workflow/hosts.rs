//! What hosts and guests do by themselves, and what the records say of it.

use std::time::Duration;

use berth_manager::cluster::Cluster;
use berth_manager::operations::{Filter, OperationRequest};
use berth_model::host::{Host, HostState};
use berth_model::operation::OperationKind;
use berth_model::snapshot::{SnapshotKind, UNDO_KEPT_MS};
use berth_model::vm::{GuestState, VmState};
use berth_model::{Problem, ProblemCode, VmId};

use crate::agent::Process;
use crate::faults::settle;
use crate::scenario::{snapshot, take};
use crate::world::{Pools, World, begin, done, quiet, running_vm, until, vm, wish};

async fn host_is(cluster: &Cluster, name: &str, state: HostState) {
    until(cluster, "the host's state", |cluster| {
        cluster.records.find_host(name).is_ok_and(|host| host.state == state)
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_host_that_is_gone_makes_its_vms_unknown_and_not_stopped() {
    let world = World::new(Pools::Shared).await;
    let cluster = world.manager_with_hosts().await;
    let id = running_vm(&cluster, "books").await;
    world.agent(0).cut();
    host_is(&cluster, "h1", HostState::Offline).await;
    until(&cluster, "the VM is unknown", |cluster| vm(cluster, &id).status.state == VmState::Unknown).await;
    let host = cluster.records.find_host("h1").expect("a host");
    assert!(host.offline_reason.as_deref().is_some_and(|reason| reason.contains("refused")));

    // Whatever is asked of it now is refused with the reason; above all, nobody starts a second one.
    for request in [
        OperationRequest::VmStart { vm: id.clone() },
        OperationRequest::VmStop { vm: id.clone() },
        OperationRequest::VmMigrate { vm: id.clone(), wish: Default::default() },
        OperationRequest::VmDelete { vm: id.clone(), force: true },
        take(&id, "now"),
    ] {
        let problem = begin(&cluster, request).await.expect_err("it can't be asked");
        assert_eq!(problem.code, ProblemCode::Unreachable);
        assert!(problem.message.contains("host h1, which is offline"), "{problem}");
    }
    world.agent(0).mend();
    host_is(&cluster, "h1", HostState::Online).await;
    until(&cluster, "the VM runs", |cluster| vm(cluster, &id).status.state == VmState::Running).await;
    world.check_whole(&cluster).await;
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_died_while_its_host_was_away_is_stopped_when_it_is_back() {
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    let id = running_vm(&cluster, "books").await;
    world.agent(0).cut();
    until(&cluster, "the VM is unknown", |cluster| vm(cluster, &id).status.state == VmState::Unknown).await;
    world.agent(0).kill(&id);
    world.agent(0).mend();
    until(&cluster, "the VM is stopped", |cluster| vm(cluster, &id).status.state == VmState::Stopped).await;
    done(&cluster, OperationRequest::VmStart { vm: id.clone() }).await;
    world.check_whole(&cluster).await;
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_vm_whose_process_ends_by_itself_is_stopped_and_says_so() {
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    let id = running_vm(&cluster, "books").await;
    settle(&world, &cluster).await;
    world.agent(0).kill(&id);
    until(&cluster, "the VM is stopped", |cluster| vm(cluster, &id).status.state == VmState::Stopped).await;
    let status = vm(&cluster, &id).status;
    assert_eq!(status.trouble.as_deref(), Some("its QEMU process ended by itself"));
    assert_eq!(status.guest, GuestState::Off);
    done(&cluster, OperationRequest::VmStart { vm: id.clone() }).await;
    assert_eq!(vm(&cluster, &id).status.trouble, None, "starting it puts an end to that");
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_is_restarted_changes_nothing() {
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    let id = running_vm(&cluster, "books").await;
    world.agent(0).restart();
    settle(&world, &cluster).await;
    assert_eq!(vm(&cluster, &id).status.state, VmState::Running);
    assert_eq!(vm(&cluster, &id).status.trouble, None);
    world.check_whole(&cluster).await;
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn news_from_before_an_operation_never_moves_a_state_back() {
    // Every order of commands and reports that comes up in many quick turns.
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    let id = running_vm(&cluster, "books").await;
    for _ in 0..40 {
        done(&cluster, OperationRequest::VmPause { vm: id.clone() }).await;
        for _ in 0..20 {
            assert_eq!(vm(&cluster, &id).status.state, VmState::Paused);
            tokio::task::yield_now().await;
        }
        done(&cluster, OperationRequest::VmResume { vm: id.clone() }).await;
        for _ in 0..20 {
            assert_eq!(vm(&cluster, &id).status.state, VmState::Running);
            tokio::task::yield_now().await;
        }
    }
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_baseline_is_taken_when_the_guest_is_first_ready_and_only_then() {
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    let id = running_vm(&cluster, "books").await;
    settle(&world, &cluster).await;
    assert_eq!(vm(&cluster, &id).status.baseline, None, "not before it is ready");
    world.agent(0).set_guests(GuestState::Ready);
    until(&cluster, "the baseline is there", |cluster| vm(cluster, &id).status.baseline.is_some()).await;
    let baseline = vm(&cluster, &id).status.baseline.expect("a baseline");
    let snapshot = cluster.records.find_snapshot(&id, baseline.as_str()).expect("a snapshot");
    assert_eq!((snapshot.kind, snapshot.name.as_str()), (SnapshotKind::Baseline, "baseline"));
    assert!(snapshot.pinned);
    // And once only, whatever the guest does later.
    quiet(&cluster).await;
    world.agent(0).set_guests(GuestState::Booting);
    settle(&world, &cluster).await;
    world.agent(0).set_guests(GuestState::Ready);
    settle(&world, &cluster).await;
    assert_eq!(cluster.records.snapshots_of(&id).len(), 1);
    world.check_whole(&cluster).await;
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_is_not_ready_in_time_is_said_not_to_be() {
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    let wish =
        berth_api::manager::CreateVm { ready_timeout_s: Some(60), host: Some("h1".into()), ..wish("books") };
    let id: VmId =
        done(&cluster, OperationRequest::VmCreate { wish: Box::new(wish) }).await.vm.expect("a VM");
    until(&cluster, "it is noted", |cluster| vm(cluster, &id).status.baseline_note.is_some()).await;
    let note = vm(&cluster, &id).status.baseline_note.expect("a note");
    assert_eq!(
        note,
        "the guest was not ready within 60 s: neither its guest agent nor its probe has answered"
    );
    // Late is better than never.
    world.agent(0).set_guests(GuestState::Ready);
    until(&cluster, "the baseline is there", |cluster| vm(cluster, &id).status.baseline.is_some()).await;
    assert_eq!(vm(&cluster, &id).status.baseline_note, None);
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_was_restarted_is_asked_at_once_what_its_host_has() {
    let world = World::new(Pools::Shared).await;
    let cluster = world.manager_with_hosts().await;
    let begun = tokio::time::Instant::now();
    for (incarnation, cut) in [("2", false), ("3", true)] {
        if cut {
            world.agent(0).cut();
        }
        world.agent(0).restart();
        until(&cluster, "the new agent's inventory", |cluster| {
            let host = cluster.records.find_host("h1").expect("the host");
            host.inventory.as_ref().is_some_and(|inventory| inventory.agent_version == incarnation)
        })
        .await;
    }
    assert!(begun.elapsed() < Duration::from_secs(10), "only after {:?}", begun.elapsed());
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_baseline_that_can_not_be_taken_is_tried_again_later() {
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    world.agent(0).refuse("snapshot", Problem::new(ProblemCode::NoSpace, "the pool is full"));
    let id = running_vm(&cluster, "books").await;
    world.agent(0).set_guests(GuestState::Ready);
    until(&cluster, "it is noted", |cluster| vm(cluster, &id).status.baseline_note.is_some()).await;
    let note = vm(&cluster, &id).status.baseline_note.expect("a note");
    assert_eq!(note, "taking it failed: pool default of host h1 is full: the pool is full");
    until(&cluster, "the baseline is there", |cluster| vm(cluster, &id).status.baseline.is_some()).await;
    let tries = Filter { kind: Some(OperationKind::SnapshotCreate), ..Filter::default() };
    assert_eq!(cluster.operations.list(&tries).len(), 2);
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn an_undo_snapshot_expires_after_a_day() {
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    let id = running_vm(&cluster, "books").await;
    snapshot(&cluster, &id, "first").await;
    let wish = berth_api::manager::RestoreVm {
        snapshot: Some("first".into()),
        no_undo: false,
        ..Default::default()
    };
    done(&cluster, OperationRequest::SnapshotRestore { vm: id.clone(), wish }).await;
    assert_eq!(cluster.records.snapshots_of(&id).len(), 2);
    tokio::time::sleep(Duration::from_millis(UNDO_KEPT_MS - 120_000)).await;
    assert_eq!(cluster.records.snapshots_of(&id).len(), 2, "not before");
    tokio::time::sleep(Duration::from_secs(240)).await;
    quiet(&cluster).await;
    let left = cluster.records.snapshots_of(&id);
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].name.as_str(), "first");
    world.check_whole(&cluster).await;
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn what_a_host_has_and_nobody_knows_is_reported_and_not_deleted() {
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    running_vm(&cluster, "books").await;
    let stranger = VmId::from_entropy([99; 10]);
    world.agent(1).plant(&stranger);
    until(&cluster, "it is reported", |cluster| !cluster.watchers.leftovers().is_empty()).await;
    let leftovers = cluster.watchers.leftovers();
    assert_eq!(leftovers.get(&world.hosts[1]), Some(&vec![stranger.clone()]));
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(world.agent(1).machine(&stranger).expect("still there").process, Process::None);
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_host_that_joins_later_is_watched_without_anybody_saying_so() {
    let world = World::new(Pools::Shared).await;
    let cluster = world.manager_with_hosts().await;
    let id = berth_model::HostId::from_entropy([3; 10]);
    world.net.add(id.clone(), "pool");
    let mut host = cluster.records.find_host("h1").expect("a host").value.clone();
    host.id = id.clone();
    host.name = "h3".parse().unwrap();
    host.inventory = None;
    let mut transaction = berth_manager::records::Transaction::new();
    transaction.claim(&berth_manager::records::UniqueName::in_cluster("host", &host.name), id.as_str());
    transaction.create(&host);
    cluster.records.commit(transaction).await.expect("a commit");
    until(&cluster, "it is seen", |cluster| {
        cluster.records.get::<Host>(id.as_str()).is_some_and(|host| host.inventory.is_some())
    })
    .await;
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn what_is_deleted_or_moved_is_never_taken_for_a_stranger() {
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    for turn in 0..10 {
        // Answers that were given before are still on their way when the VM has gone.
        world.agent(0).lag(Duration::from_millis(turn * 15));
        let id = running_vm(&cluster, "books").await;
        let moved = OperationRequest::VmMigrate { vm: id.clone(), wish: Default::default() };
        done(&cluster, moved).await;
        for _ in 0..50 {
            assert!(cluster.watchers.leftovers().is_empty());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        done(&cluster, OperationRequest::VmDelete { vm: id, force: true }).await;
        for _ in 0..50 {
            assert!(cluster.watchers.leftovers().is_empty());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    cluster.shutdown().await;
}
