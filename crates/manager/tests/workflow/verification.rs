//! Verifying snapshots: what comes of a bad one, that nobody waits for it, and that nothing of a trial start remains.

use std::sync::Arc;
use std::time::Duration;

use berth_api::manager::RestoreVm;
use berth_manager::cluster::Cluster;
use berth_manager::operations::OperationRequest;
use berth_model::operation::{Operation, OperationKind, OperationResult, OperationState};
use berth_model::snapshot::Snapshot;
use berth_model::verification::{FIRST_AFTER_MS, Means, SnapshotFault, Verdict, Verification};
use berth_model::vm::Vm;
use berth_model::{Problem, ProblemCode, SnapshotId, VmId};

use crate::faults::settle;
use crate::scenario::{clone_of, snapshot, take};
use crate::world::{Pools, World, begin, done, over, quiet, running_vm, until, vm};

fn verify(vm: &VmId, snapshot: &SnapshotId, boot: bool) -> OperationRequest {
    OperationRequest::SnapshotVerify { vm: vm.clone(), snapshot: snapshot.clone(), boot }
}

fn restore(vm: &VmId, force: bool) -> OperationRequest {
    let wish = RestoreVm { snapshot: Some("first".to_owned()), force, ..RestoreVm::default() };
    OperationRequest::SnapshotRestore { vm: vm.clone(), wish }
}

fn torn() -> Option<SnapshotFault> {
    let detail = "it is truncated".to_owned();
    Some(SnapshotFault { file: "layers/a.qcow2".to_owned(), offset: Some(4096), detail })
}

fn verified(cluster: &Cluster, vm: &VmId, snapshot: &SnapshotId) -> Option<Verification> {
    cluster.records.require::<Snapshot>(&format!("{vm}/{snapshot}")).expect("there").verified.clone()
}

fn found(operation: &Operation) -> (Means, Verdict) {
    match &operation.result {
        Some(OperationResult::Verification { verification, .. }) => (verification.by, verification.verdict),
        other => panic!("{other:?}"),
    }
}

async fn stage() -> (World, Arc<Cluster>, VmId, SnapshotId) {
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    let books = running_vm(&cluster, "books").await;
    let first = snapshot(&cluster, &books, "first").await;
    (world, cluster, books, first)
}

#[tokio::test(start_paused = true)]
async fn a_bad_snapshot_is_not_gone_back_to_and_its_vm_says_so_until_it_is_good() {
    let (world, cluster, books, first) = stage().await;
    world.agent(0).damage(&first, torn());
    assert_eq!(found(&done(&cluster, verify(&books, &first, true)).await), (Means::Hash, Verdict::Bad));
    let said = verified(&cluster, &books, &first).expect("verified").detail;
    assert_eq!(said, "layers/a.qcow2 at byte 4096: it is truncated");
    let trouble = vm(&cluster, &books).status.trouble.expect("trouble");
    assert!(trouble.contains("snapshot first") && trouble.contains(&said), "{trouble}");
    assert_eq!(cluster.records.list::<Vm>().len(), 1, "nothing was started from it");
    for refused in [restore(&books, false), clone_of(&books, &first, "copy")] {
        let problem = begin(&cluster, refused).await.expect_err("refused");
        assert_eq!(problem.code, ProblemCode::BadImage);
        assert!(problem.message.contains(&said), "{problem}");
    }
    done(&cluster, restore(&books, true)).await;
    world.agent(0).damage(&first, None);
    assert_eq!(found(&done(&cluster, verify(&books, &first, false)).await), (Means::Hash, Verdict::Good));
    assert_eq!(vm(&cluster, &books).status.trouble, None);
    done(&cluster, restore(&books, false)).await;
    // One that is bad takes its trouble with it.
    world.agent(0).damage(&first, torn());
    done(&cluster, verify(&books, &first, false)).await;
    assert!(vm(&cluster, &books).status.trouble.is_some());
    done(&cluster, OperationRequest::SnapshotDelete { vm: books.clone(), snapshot: first }).await;
    assert_eq!(vm(&cluster, &books).status.trouble, None);
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_whose_guest_does_not_get_ready_is_bad_until_one_does() {
    let (world, cluster, books, first) = stage().await;
    world.agent(0).refuse("wait-ready", Problem::new(ProblemCode::Guest, "it is silent"));
    assert_eq!(found(&done(&cluster, verify(&books, &first, true)).await), (Means::Boot, Verdict::Bad));
    // Its bytes are right, and say nothing of that.
    assert_eq!(found(&done(&cluster, verify(&books, &first, false)).await), (Means::Hash, Verdict::Good));
    let kept = verified(&cluster, &books, &first).expect("verified");
    assert_eq!((kept.by, kept.detail.as_str()), (Means::Boot, "it is silent"));
    assert!(begin(&cluster, restore(&books, false)).await.is_err());
    world.agent(0).refuse("clone", Problem::new(ProblemCode::Hypervisor, "it can't be loaded"));
    assert_eq!(found(&done(&cluster, verify(&books, &first, true)).await), (Means::Boot, Verdict::Bad));
    assert_eq!(found(&done(&cluster, verify(&books, &first, true)).await), (Means::Boot, Verdict::Good));
    done(&cluster, restore(&books, false)).await;
    // What keeps it from being started says nothing of it.
    world.agent(0).refuse("clone", Problem::new(ProblemCode::NoSpace, "the pool is full"));
    let begun = begin(&cluster, verify(&books, &first, true)).await.expect("begun");
    let failed = over(&cluster, &begun.operation.expect("an operation").id).await;
    assert_eq!(failed.state, OperationState::Failed);
    assert_eq!(verified(&cluster, &books, &first).map(|kept| kept.verdict), Some(Verdict::Good));
    quiet(&cluster).await;
    settle(&world, &cluster).await;
    assert_eq!(cluster.records.list::<Vm>().len(), 1, "nothing of a trial remains");
    assert_eq!(world.agent(0).machines().len() + world.agent(1).machines().len(), 1);
    world.check_whole(&cluster).await;
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_for_a_snapshot_to_be_read() {
    let (world, cluster, books, first) = stage().await;
    world.agent(0).hold("verify");
    let reading = begin(&cluster, verify(&books, &first, false)).await.expect("begun");
    let reading = reading.operation.expect("an operation").id;
    done(&cluster, take(&books, "second")).await;
    done(&cluster, restore(&books, false)).await;
    // It is deleted under the reader's hands.
    done(&cluster, OperationRequest::SnapshotDelete { vm: books.clone(), snapshot: first }).await;
    world.agent(0).release();
    let read = over(&cluster, &reading).await;
    assert_eq!(read.problem.map(|problem| problem.code), Some(ProblemCode::NotFound));
    // One that should be there is bad when it is not.
    let second = cluster.records.find_snapshot(&books, "second").expect("there").value.id.clone();
    world.net.pools.lock().unwrap().values_mut().for_each(|pool| {
        pool.vms.values_mut().for_each(|files| {
            files.snapshots.remove(&second);
        });
    });
    assert_eq!(found(&done(&cluster, verify(&books, &second, false)).await), (Means::Hash, Verdict::Bad));
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn each_snapshot_is_verified_by_itself_and_never_of_a_vm_that_is_being_changed() {
    let (world, cluster, books, first) = stage().await;
    let second = snapshot(&cluster, &books, "second").await;
    let at = |snapshot| verified(&cluster, &books, snapshot).map(|found| found.at);
    tokio::time::sleep(Duration::from_millis(FIRST_AFTER_MS / 2)).await;
    assert_eq!((at(&first), at(&second)), (None, None));
    world.agent(0).hold("pause");
    begin(&cluster, OperationRequest::VmPause { vm: books.clone() }).await.expect("begun");
    tokio::time::sleep(Duration::from_millis(FIRST_AFTER_MS)).await;
    assert_eq!((at(&first), at(&second)), (None, None), "it is being changed");
    world.agent(0).release();
    quiet(&cluster).await;
    world.agent(0).hold("verify");
    until(&cluster, "one is begun", |cluster| active(cluster) == 1).await;
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert_eq!(active(&cluster), 1, "one at a time");
    world.agent(0).release();
    until(&cluster, "both are verified", |_| at(&first).is_some() && at(&second).is_some()).await;
    assert!(at(&first) < at(&second), "the oldest first");
    cluster.shutdown().await;
}

fn active(cluster: &Cluster) -> usize {
    let filter = berth_manager::operations::Filter {
        kind: Some(OperationKind::SnapshotVerify),
        active: true,
        ..Default::default()
    };
    cluster.operations.list(&filter).len()
}
