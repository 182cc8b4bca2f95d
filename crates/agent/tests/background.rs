//! Snapshots in the background on a real QEMU: memory is copied while the guest writes to it, and is of the instant of the
//! disk all the same.

#[path = "snapshot/host.rs"]
#[allow(dead_code, reason = "each test program uses a part of it")]
mod host;

use std::fs;
use std::time::Duration;

use berth_api::agent::{TaskOutput, TaskSpec};
use berth_model::SnapshotId;
use berth_model::snapshot::{CaptureWay, SnapshotFacts};
use berth_model::vm::VmState;
use guest_probe::memory::{Rewrite, Settings};
use host::{LONG, TestHost, TestVm, layer, snapshot};

/// Half of the guest's memory, rewritten twice a second.
const BUSY: Settings = Settings { memory_mib: 96, rate_mib_s: 200, hot_mib: 0, rewrite: Rewrite::Word };

/// Lets processes without privileges follow writes to their memory, which QEMU needs for it; as it was when dropped. One
/// test at a time does so, that none takes it from another.
struct Allowed {
    before: String,
    _turn: fs::File,
}

const SWITCH: &str = "/proc/sys/vm/unprivileged_userfaultfd";

impl Allowed {
    fn now() -> Self {
        let turn =
            fs::File::create(std::env::temp_dir().join("berth-test-userfaultfd")).expect("a file to lock");
        turn.lock().expect("locked");
        let before = fs::read_to_string(SWITCH).expect("a kernel with userfaultfd");
        fs::write(SWITCH, "1").expect("root may allow it");
        Self { before, _turn: turn }
    }
}

impl Drop for Allowed {
    fn drop(&mut self) {
        fs::write(SWITCH, &self.before).expect("as it was");
    }
}

async fn take(host: &TestHost, vm: &TestVm, snapshot: &SnapshotId) -> SnapshotFacts {
    let spec = TaskSpec::TakeSnapshot { snapshot: snapshot.clone(), new_top: layer(), next: None };
    match host.task(&vm.id, spec).await.expect("taken") {
        TaskOutput::Snapshot { facts } => facts,
        other => panic!("{other:?}"),
    }
}

async fn files_after_restore(host: &TestHost, vm: &TestVm, snapshot: &SnapshotId) -> u64 {
    let spec = TaskSpec::RestoreSnapshot {
        definition: vm.boxed(),
        snapshot: snapshot.clone(),
        new_top: layer(),
        paused: false,
    };
    host.task(&vm.id, spec).await.expect("restored");
    let found = host.probe(&vm.id).verify(LONG).expect("verified");
    assert_eq!((found.pages_wrong, found.files_wrong), (0, 0), "{found:?}");
    found.files
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_writes_all_the_while_comes_back_with_every_page_and_file() {
    let _allowed = Allowed::now();
    let host = TestHost::start().await;
    let vm = host.running_vm(192).await;
    let probe = host.probe(&vm.id);
    probe.set(BUSY, LONG).expect("busy");
    probe.write(10).expect("files");
    let (first, second, third) = (snapshot(), snapshot(), snapshot());
    let facts = take(&host, &vm, &first).await;
    println!("taken: {facts:?}");
    assert_eq!((facts.way, facts.rounds), (Some(CaptureWay::Background), 1));
    assert!(facts.paused_us > 0 && facts.paused_us < 500_000, "{facts:?}");
    probe.write(5).expect("more files");
    // The second is a difference to the first, of a memory whose pages are small now.
    let facts = take(&host, &vm, &second).await;
    println!("taken again: {facts:?}");
    assert_eq!(facts.way, Some(CaptureWay::Background));
    let found = probe.verify(LONG).expect("verified");
    assert_eq!((found.pages_wrong, found.files, found.files_wrong), (0, 15, 0), "it goes on unharmed");

    assert_eq!(files_after_restore(&host, &vm, &first).await, 10);
    assert_eq!(files_after_restore(&host, &vm, &second).await, 15);
    // A memory that is a mapped file can't be followed: it is taken all the same.
    host.probe(&vm.id).set(Settings { rate_mib_s: 5, ..BUSY }, LONG).expect("less busy");
    assert_eq!(take(&host, &vm, &third).await.way, Some(CaptureWay::PreCopy));
    assert_eq!(files_after_restore(&host, &vm, &third).await, 15);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_dies_in_the_middle_holds_nobody_and_leaves_nothing() {
    let _allowed = Allowed::now();
    let mut host = TestHost::start().await;
    let vm = host.running_vm(192).await;
    host.probe(&vm.id).set(BUSY, LONG).expect("busy");
    for delay_ms in [20, 60, 120, 200, 400] {
        let (taken, new_top) = (snapshot(), layer());
        let spec = TaskSpec::TakeSnapshot { snapshot: taken.clone(), new_top, next: None };
        host.put(&vm.id, spec.clone());
        tokio::time::sleep(Duration::from_millis(delay_ms)).await;
        host.replace_agent().await;
        assert_eq!(host.state(&vm.id), Some(VmState::Running), "after {delay_ms} ms");
        let found = host.probe(&vm.id).verify(LONG).expect("verified");
        assert_eq!((found.pages_wrong, found.files_wrong), (0, 0));
        // The manager asks again, with the same ids.
        host.task(&vm.id, spec).await.expect("taken in the end");
    }
}
