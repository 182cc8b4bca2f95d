//! VMs from snapshots: many at once, while the origin works, and whatever is deleted first.

use berth_api::manager::CloneSnapshot;
use berth_manager::operations::OperationRequest;
use berth_model::operation::{OperationResult, OperationState};
use berth_model::snapshot::SnapshotKind;
use berth_model::vm::{Vm, VmState};
use berth_model::{Problem, ProblemCode};

use crate::faults::settle;
use crate::scenario::{clone_of, snapshot, take};
use crate::world::{Pools, World, begin, done, over, quiet, running_vm, vm};

#[tokio::test(start_paused = true)]
async fn six_clones_at_once_each_has_its_own_name_number_and_addresses_and_a_baseline() {
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    let id = running_vm(&cluster, "books").await;
    let first = snapshot(&cluster, &id, "first").await;
    // The origin is not held: it is snapshotted meanwhile.
    let names: Vec<String> = (0..6).map(|number| format!("copy-{number}")).collect();
    let clones = names.iter().map(|name| begin(&cluster, clone_of(&id, &first, name)));
    let (begun, other) =
        tokio::join!(futures_util::future::join_all(clones), begin(&cluster, take(&id, "second")));
    assert!(other.is_ok(), "{other:?}");
    for one in begun {
        let operation = over(&cluster, &one.expect("begun").operation.expect("an operation").id).await;
        assert_eq!(operation.state, OperationState::Succeeded, "{operation:?}");
        let Some(OperationResult::Clone { snapshot, facts }) = operation.result else {
            panic!("{operation:?}")
        };
        assert_eq!((snapshot, facts.running_us), (first.clone(), 60_000));
    }
    quiet(&cluster).await;
    settle(&world, &cluster).await;
    let all = cluster.records.list::<Vm>();
    let count = |what: fn(&Vm) -> String| {
        all.iter().map(|row| what(row)).collect::<std::collections::BTreeSet<_>>().len()
    };
    assert_eq!(count(|vm| vm.number.to_string()), 7);
    assert_eq!(count(|vm| vm.spec.nics[0].mac.clone()), 7);
    for name in &names {
        let row = cluster.records.find_vm(&format!("default/{name}")).expect("a clone");
        assert_eq!(row.status.state, VmState::Running);
        let kept = cluster.records.snapshots_of(&row.value.id);
        assert_eq!(kept.len(), 1, "its baseline is what it was made from, and no other is taken");
        assert_eq!(row.status.baseline.as_ref(), Some(&kept[0].value.id));
        assert!(kept[0].kind == SnapshotKind::Baseline && kept[0].pinned && kept[0].parent.is_none());
    }
    // In any order.
    done(&cluster, OperationRequest::VmDelete { vm: id, force: true }).await;
    world.check_whole(&cluster).await;
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_clone_is_held_or_starts_from_the_disk_when_that_is_wished() {
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    let id = running_vm(&cluster, "books").await;
    let first = snapshot(&cluster, &id, "first").await;
    for (name, cold, paused) in [("held", false, true), ("cold", true, false)] {
        let wish = CloneSnapshot { name: name.parse().unwrap(), segment: None, cold, paused };
        let request = OperationRequest::SnapshotClone { origin: id.clone(), snapshot: first.clone(), wish };
        let made = done(&cluster, request).await.vm.expect("a VM");
        let status = vm(&cluster, &made).status;
        assert_eq!(status.state, if paused { VmState::Paused } else { VmState::Running });
        assert_eq!(status.baseline.is_some(), !cold, "one from the disk has nothing to go back to yet");
    }
    settle(&world, &cluster).await;
    world.check_whole(&cluster).await;
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_clone_that_its_host_refuses_leaves_nothing_and_its_name_is_free() {
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    let id = running_vm(&cluster, "books").await;
    let first = snapshot(&cluster, &id, "first").await;
    world.agent(0).refuse("clone", Problem::new(ProblemCode::NoSpace, "the pool is full"));
    let begun = begin(&cluster, clone_of(&id, &first, "copy")).await.expect("begun");
    let operation = over(&cluster, &begun.operation.expect("an operation").id).await;
    assert_eq!(operation.state, OperationState::Failed);
    assert_eq!(operation.problem.map(|problem| problem.code), Some(ProblemCode::NoSpace));
    assert_eq!(cluster.records.list::<Vm>().len(), 1);
    done(&cluster, clone_of(&id, &first, "copy")).await;
    settle(&world, &cluster).await;
    world.check_whole(&cluster).await;
    cluster.shutdown().await;
}
