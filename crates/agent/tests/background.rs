//! Snapshots in the background on a real QEMU: the memory of a guest that writes faster than it can be taken is copied while it
//! writes, and is of the instant of the disk all the same.
//!
//! They need a QEMU of release 10 or later, and a machine of it: `make test` runs them with one.

#[path = "snapshot/host.rs"]
#[allow(dead_code, reason = "each test program uses a part of it")]
mod host;

use std::fs;
use std::time::Duration;

use berth_api::agent::{TaskOutput, TaskSpec, TaskState};
use berth_model::SnapshotId;
use berth_model::snapshot::{CaptureWay, SnapshotFacts};
use berth_model::vm::VmState;
use guest_probe::memory::{Rewrite, Settings};
use host::{LONG, TestHost, TestVm, layer, snapshot};

/// Much of the guest's memory, rewritten as fast as it can.
const BUSY: Settings = Settings { memory_mib: 96, rate_mib_s: 60_000, hot_mib: 0, rewrite: Rewrite::Word };
const CALM: Settings = Settings { rate_mib_s: 5, ..BUSY };

/// Whether the machines of this run are of a release that can do it.
fn is_new() -> bool {
    let machine_type = host::definition(256).spec.machine_type;
    let is_new = berth_agent::qemu::release_of_machine(&machine_type).is_some_and(|major| major >= 10);
    if !is_new {
        println!("{machine_type} is taken in passes only: not tried");
    }
    is_new
}

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
        rustix::fs::flock(&turn, rustix::fs::FlockOperation::LockExclusive).expect("locked");
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

/// Waits until the guest is about to be stopped for it.
async fn until_in_the_background(host: &TestHost, task: &str) {
    let mut after = 0;
    loop {
        let task = host.agent.tasks().show(task, Some(after), LONG).await.expect("task");
        match &task.state {
            TaskState::Running { progress } if progress.phase == "background" => return,
            TaskState::Running { .. } if task.version > after => after = task.version,
            other => panic!("it never comes to that: {other:?}"),
        }
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
async fn a_guest_that_writes_too_fast_is_taken_in_the_background_with_every_page_and_file() {
    if !is_new() {
        return;
    }
    let _allowed = Allowed::now();
    let host = TestHost::start().await;
    let vm = host.running_vm(256).await;
    let probe = host.probe(&vm.id);
    probe.set(CALM, LONG).expect("calm");
    probe.write(10).expect("files");
    let (calm, first, second, third) = (snapshot(), snapshot(), snapshot(), snapshot());
    assert_eq!(take(&host, &vm, &calm).await.way, Some(CaptureWay::PreCopy));
    probe.set(BUSY, LONG).expect("busy");
    let facts = take(&host, &vm, &first).await;
    println!("taken: {facts:?}");
    assert_eq!((facts.way, facts.rounds), (Some(CaptureWay::Background), 1));
    assert!(facts.paused_us > 0 && facts.paused_us < 500_000, "{facts:?}");
    probe.write(5).expect("more files");
    // The second is a difference to the first.
    let facts = take(&host, &vm, &second).await;
    println!("taken again: {facts:?}");
    assert_eq!(facts.way, Some(CaptureWay::Background));
    let found = probe.verify(LONG).expect("verified");
    assert_eq!((found.pages_wrong, found.files, found.files_wrong), (0, 15, 0), "it goes on unharmed");

    assert_eq!(files_after_restore(&host, &vm, &first).await, 10);
    assert_eq!(files_after_restore(&host, &vm, &second).await, 15);
    // A memory that is a mapped file can't be followed: it is taken all the same.
    host.probe(&vm.id).set(CALM, LONG).expect("less busy");
    assert_eq!(take(&host, &vm, &third).await.way, Some(CaptureWay::PreCopy));
    assert_eq!(files_after_restore(&host, &vm, &third).await, 15);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_breaks_one_off_leaves_a_guest_that_runs_and_writes() {
    if !is_new() {
        return;
    }
    let _allowed = Allowed::now();
    let mut host = TestHost::start().await;
    let vm = host.running_vm(256).await;
    host.probe(&vm.id).set(BUSY, LONG).expect("busy");
    let mut in_the_background = 0;
    for (number, delay_ms) in [0, 10, 30, 60, 120, 250].into_iter().enumerate() {
        let spec = TaskSpec::TakeSnapshot { snapshot: snapshot(), new_top: layer(), next: None };
        let task = host.put(&vm.id, spec.clone());
        until_in_the_background(&host, &task).await;
        tokio::time::sleep(Duration::from_millis(delay_ms)).await;
        if number % 2 == 0 {
            host.replace_agent().await;
        } else {
            host.agent.tasks().cancel(&task).expect("cancelled");
            in_the_background += u32::from(host.wait(&task).await.is_err());
        }
        host.until(&vm.id, VmState::Running).await;
        let found = host.probe(&vm.id).verify(LONG).expect("verified");
        assert_eq!((found.pages_wrong, found.files_wrong), (0, 0));
        // The manager asks again, with the same ids.
        host.task(&vm.id, spec).await.expect("taken in the end");
    }
    assert!(in_the_background > 0, "none was broken off in time");
}
