//! What can become of a VM between two hosts: it runs on exactly one of them, and the record says on which.

use std::time::Duration;

use berth_api::manager::MigrateVm;
use berth_manager::cluster::Cluster;
use berth_manager::operations::OperationRequest;
use berth_model::operation::{Operation, OperationResult, OperationState};
use berth_model::vm::VmState;
use berth_model::{ProblemCode, VmId};

use crate::agent::MoveScript;
use crate::faults::settle;
use crate::world::{Pools, World, begin, over, quiet, running_vm, until, vm, whole};

fn to(vm: &VmId, target: Option<&str>) -> OperationRequest {
    let wish = MigrateVm { target: target.map(str::to_owned), ..MigrateVm::default() };
    OperationRequest::VmMigrate { vm: vm.clone(), wish }
}

/// Where it runs in the end, which is where the record says.
async fn where_it_runs(world: &World, cluster: &Cluster, id: &VmId) -> usize {
    quiet(cluster).await;
    settle(world, cluster).await;
    world.check_whole(cluster).await;
    let owners = world.net.owners(id);
    assert_eq!(owners.len(), 1, "exactly one owner");
    assert_eq!(vm(cluster, id).status.state, VmState::Running);
    world.hosts.iter().position(|host| *host == owners[0]).expect("a host")
}

async fn begun(cluster: &Cluster, id: &VmId) -> Operation {
    begin(cluster, to(id, Some("h2"))).await.expect("a beginning").operation.expect("an operation")
}

#[tokio::test(start_paused = true)]
async fn a_migration_says_what_it_measured_and_chooses_the_other_host_by_itself() {
    let world = World::new(Pools::Shared).await;
    let cluster = world.manager_with_hosts().await;
    let id = running_vm(&cluster, "books").await;
    let operation = whole(&cluster, to(&id, None)).await;
    let Some(OperationResult::Migration { report }) = operation.result else { panic!("{operation:?}") };
    assert_eq!((report.blackout_us, report.target), (9000, world.hosts[1].clone()));
    assert_eq!(where_it_runs(&world, &cluster, &id).await, 1);
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_hand_over_of_which_the_target_never_heard_is_finished_by_the_manager() {
    for pools in [Pools::Local, Pools::Shared] {
        let world = World::new(pools).await;
        let cluster = world.manager_with_hosts().await;
        let id = running_vm(&cluster, "books").await;
        world.agent(0).script(MoveScript::LostAtHandOver);
        let operation = whole(&cluster, to(&id, Some("h2"))).await;
        assert_eq!(operation.state, OperationState::Succeeded, "{operation:?}");
        assert_eq!(where_it_runs(&world, &cluster, &id).await, 1);
        cluster.shutdown().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_target_that_runs_the_guest_without_the_source_knowing_keeps_it() {
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    let id = running_vm(&cluster, "books").await;
    world.agent(0).script(MoveScript::LostAfterCommit);
    let operation = whole(&cluster, to(&id, Some("h2"))).await;
    assert_eq!(operation.state, OperationState::Succeeded, "{operation:?}");
    assert_eq!(where_it_runs(&world, &cluster, &id).await, 1);
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_target_whose_process_died_after_the_hand_over_gives_the_vm_back() {
    for pools in [Pools::Local, Pools::Shared] {
        let world = World::new(pools).await;
        let cluster = world.manager_with_hosts().await;
        let id = running_vm(&cluster, "books").await;
        world.agent(0).script(MoveScript::TargetDiesAtHandOver);
        let operation = whole(&cluster, to(&id, Some("h2"))).await;
        assert_eq!(operation.state, OperationState::Failed, "{operation:?}");
        let problem = operation.problem.expect("a reason");
        assert!(problem.message.starts_with("the target could not let the VM run"), "{problem}");
        assert_eq!(where_it_runs(&world, &cluster, &id).await, 0);
        cluster.shutdown().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_target_that_can_not_be_asked_after_the_hand_over_is_waited_for() {
    for script in [MoveScript::LostAtHandOver, MoveScript::TargetDiesAtHandOver] {
        let world = World::new(Pools::Shared).await;
        let cluster = world.manager_with_hosts().await;
        let id = running_vm(&cluster, "books").await;
        world.agent(0).script(script);
        world.agent(1).hold("take-over");
        let operation = begun(&cluster, &id).await;
        until(&cluster, "it is handed over", |_| world.net.owners(&id).is_empty()).await;
        world.agent(1).cut();
        // Neither host may run it for as long as the target can't be asked.
        tokio::time::sleep(Duration::from_secs(900)).await;
        assert!(world.net.owners(&id).is_empty());
        assert!(!cluster.operations.get(&operation.id).expect("an operation").state.is_over());
        world.agent(1).mend();
        world.agent(1).restart();
        world.agent(1).release();
        let end = over(&cluster, &operation.id).await;
        let moved = end.state == OperationState::Succeeded;
        assert_eq!(moved, script == MoveScript::LostAtHandOver, "{end:?}");
        assert_eq!(where_it_runs(&world, &cluster, &id).await, usize::from(moved));
        cluster.shutdown().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_source_that_is_gone_after_the_guest_runs_on_the_target_holds_nothing_up() {
    let world = World::new(Pools::Shared).await;
    let cluster = world.manager_with_hosts().await;
    let id = running_vm(&cluster, "books").await;
    world.agent(0).script(MoveScript::LostAfterCommit);
    let operation = begun(&cluster, &id).await;
    until(&cluster, "the target has it", |_| world.net.owners(&id).contains(&world.hosts[1])).await;
    world.agent(0).cut();
    let end = over(&cluster, &operation.id).await;
    assert_eq!(end.state, OperationState::Succeeded, "{end:?}");
    assert_eq!(vm(&cluster, &id).status.host.as_ref(), Some(&world.hosts[1]));
    // What is left on the source is removed when it is back; until then the VM does not go there.
    until(&cluster, "the host is offline", |cluster| {
        cluster.records.find_host("h1").is_ok_and(|host| host.offline_reason.is_some())
    })
    .await;
    world.agent(0).mend();
    assert_eq!(where_it_runs(&world, &cluster, &id).await, 1);
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_manager_killed_with_the_vm_between_two_hosts_finds_it() {
    for script in [MoveScript::LostAtHandOver, MoveScript::TargetDiesAtHandOver, MoveScript::LostAfterCommit]
    {
        let world = World::new(Pools::Local).await;
        let first = world.manager_with_hosts().await;
        let id = running_vm(&first, "books").await;
        world.agent(0).script(script);
        world.agent(1).hold("take-over");
        begun(&first, &id).await;
        until(&first, "it is handed over", |_| !world.net.owners(&id).contains(&world.hosts[0])).await;
        first.shutdown().await;
        world.net.agents().iter().for_each(|agent| agent.restart());
        world.agent(1).release();
        let second = world.manager().await;
        let target_has_it = script != MoveScript::TargetDiesAtHandOver;
        assert_eq!(where_it_runs(&world, &second, &id).await, usize::from(target_has_it), "{script:?}");
        second.shutdown().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_migration_that_can_not_be_is_refused_with_the_reason_before_it_starts() {
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    let id = running_vm(&cluster, "books").await;
    let refused = async |target: &str| begin(&cluster, to(&id, Some(target))).await.expect_err(target);

    let problem = refused("h1").await;
    assert_eq!((problem.code, problem.field.as_deref()), (ProblemCode::InvalidInput, Some("target")));
    assert_eq!(problem.message, "default/books is on host h1 already");
    let problem = refused("nowhere").await;
    assert_eq!((problem.code, problem.value.as_deref()), (ProblemCode::NotFound, Some("nowhere")));

    world.agent(1).cut();
    until(&cluster, "h2 is offline", |cluster| {
        cluster.records.find_host("h2").is_ok_and(|host| host.offline_reason.is_some())
    })
    .await;
    let problem = refused("h2").await;
    assert_eq!(problem.message, "host h2 can't take default/books: it is offline");
    let problem = begin(&cluster, to(&id, None)).await.expect_err("nowhere to go");
    assert_eq!(problem.code, ProblemCode::NoPlacement);
    assert!(problem.message.contains("h2: it is offline"), "{problem}");
    world.check_whole(&cluster).await;
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_target_that_ran_the_guest_keeps_it_although_the_guest_has_ended_since() {
    // Its disk may have been written to: the source's memory is of another time.
    let world = World::new(Pools::Shared).await;
    let cluster = world.manager_with_hosts().await;
    let id = running_vm(&cluster, "books").await;
    world.agent(0).script(MoveScript::LostAfterCommit);
    world.agent(1).hold("take-over");
    let operation = begun(&cluster, &id).await;
    until(&cluster, "the target has it", |_| world.net.owners(&id).contains(&world.hosts[1])).await;
    world.agent(1).kill(&id);
    world.agent(1).release();
    let end = over(&cluster, &operation.id).await;
    assert_eq!(end.state, OperationState::Succeeded, "{end:?}");
    settle(&world, &cluster).await;
    world.check_whole(&cluster).await;
    assert_eq!(vm(&cluster, &id).status.host.as_ref(), Some(&world.hosts[1]));
    assert_eq!(vm(&cluster, &id).status.state, VmState::Stopped);
    cluster.shutdown().await;
}
