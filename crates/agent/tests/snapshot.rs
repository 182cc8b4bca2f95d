//! Snapshots on a real QEMU: what is taken comes back, and what fails harms nobody.

#[path = "snapshot/host.rs"]
#[allow(dead_code, reason = "each test program uses a part of it")]
mod host;

use berth_api::agent::{TaskOutput, TaskSpec};
use berth_model::snapshot::{RestoreFacts, SnapshotFacts};
use berth_model::vm::VmState;
use berth_model::SnapshotId;
use guest_probe::memory::{Rewrite, Settings};
use host::{LONG, TestHost, TestVm, layer, snapshot};

async fn take(host: &TestHost, vm: &TestVm, snapshot: &SnapshotId) -> SnapshotFacts {
    let spec = TaskSpec::TakeSnapshot { snapshot: snapshot.clone(), new_top: layer() };
    match host.task(&vm.id, spec).await.expect("taken") {
        TaskOutput::Snapshot { facts } => facts,
        other => panic!("{other:?}"),
    }
}

async fn restore(host: &TestHost, vm: &TestVm, snapshot: &SnapshotId) -> RestoreFacts {
    let spec =
        TaskSpec::RestoreSnapshot { definition: vm.boxed(), snapshot: snapshot.clone(), new_top: layer() };
    match host.task(&vm.id, spec).await.expect("restored") {
        TaskOutput::Restored { facts } => facts,
        other => panic!("{other:?}"),
    }
}

const BUSY: Settings = Settings { memory_mib: 64, rate_mib_s: 20, hot_mib: 32, rewrite: Rewrite::Whole };

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_comes_back_with_every_page_and_file_as_they_were() {
    let host = TestHost::start().await;
    let vm = host.running_vm(256).await;
    let probe = host.probe(&vm.id);
    probe.set(BUSY, LONG).expect("busy");
    probe.write(10).expect("files");
    let first = snapshot();
    let facts = take(&host, &vm, &first).await;
    println!("taken: {facts:?}");
    assert!(facts.has_memory && facts.paused_us > 0 && facts.paused_us < 200_000, "{facts:?}");
    assert_eq!(host.state(&vm.id), Some(VmState::Running));
    let at = probe.tick().expect("tick");
    probe.write(5).expect("more files");
    assert_eq!(probe.verify(LONG).expect("verified").pages_wrong, 0, "the guest that goes on is unharmed");
    probe.break_data().expect("broken");
    probe.break_panic().expect("panicked");
    let facts = restore(&host, &vm, &first).await;
    println!("restored: {facts:?}");
    let probe = host.probe(&vm.id);
    let back = probe.tick().expect("alive");
    assert_eq!(back.nonce, at.nonce);
    let found = probe.verify(LONG).expect("verified");
    assert_eq!((found.pages_wrong, found.files, found.files_wrong), (0, 10, 0));
    assert!(found.pages > 0);
    // And again, from the same snapshot, over a guest that runs.
    probe.write(3).expect("files");
    println!("restored again: {:?}", restore(&host, &vm, &first).await);
    let found = host.probe(&vm.id).verify(LONG).expect("verified");
    assert_eq!((found.pages_wrong, found.files, found.files_wrong), (0, 10, 0));
    // A restored guest, whose memory is mapped from a file, can be taken as well.
    let second = snapshot();
    println!("taken again: {:?}", take(&host, &vm, &second).await);
    restore(&host, &vm, &second).await;
    let found = host.probe(&vm.id).verify(LONG).expect("verified");
    assert_eq!((found.pages_wrong, found.files_wrong), (0, 0));
}
