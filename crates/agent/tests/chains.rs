//! Chains of layers on a real QEMU: however many snapshots come and go, they stay short, and nobody loses a byte.

#[path = "snapshot/host.rs"]
#[allow(dead_code, reason = "each test program uses a part of it")]
mod host;

use std::time::{Duration, Instant};

use berth_agent::config::LAYERS_MAX;
use berth_api::agent::{TaskOutput, TaskSpec};
use berth_model::SnapshotId;
use berth_model::vm::VmState;
use guest_probe::memory::{Rewrite, Settings};
use host::{LONG, TestHost, TestVm, layer, snapshot};

const BUSY: Settings = Settings { memory_mib: 16, rate_mib_s: 10, hot_mib: 8, rewrite: Rewrite::Whole };

/// A snapshot, and how many files the guest had then.
type Taken = (SnapshotId, u64);

async fn take(host: &TestHost, vm: &TestVm) -> SnapshotId {
    let taken = snapshot();
    let spec = TaskSpec::TakeSnapshot { snapshot: taken.clone(), new_top: layer(), next: None };
    match host.task(&vm.id, spec).await.expect("taken") {
        TaskOutput::Snapshot { .. } => taken,
        other => panic!("{other:?}"),
    }
}

async fn delete(host: &TestHost, vm: &TestVm, snapshot: SnapshotId) {
    host.task(&vm.id, TaskSpec::DeleteSnapshot { snapshot }).await.expect("deleted");
}

async fn restore(host: &TestHost, vm: &TestVm, snapshot: SnapshotId) {
    let spec =
        TaskSpec::RestoreSnapshot { definition: vm.boxed(), snapshot, new_top: layer(), paused: false };
    host.task(&vm.id, spec).await.expect("restored");
}

/// The layers on record.
fn chain(host: &TestHost, vm: &TestVm) -> Vec<String> {
    let text = std::fs::read(host.vm_directory(&vm.id).join("vm.json")).expect("record");
    let record: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
    serde_json::from_value(record["chain"].clone()).expect("chain")
}

/// The layers that are there, unfinished ones too.
fn files(host: &TestHost, vm: &TestVm) -> Vec<String> {
    let entries = std::fs::read_dir(host.vm_directory(&vm.id).join("layers")).expect("layers");
    let mut names: Vec<String> =
        entries.map(|entry| entry.expect("entry").file_name().into_string().expect("name")).collect();
    names.sort();
    names
}

/// The layers that the VM's process has open.
fn open_files(host: &TestHost, vm: &TestVm) -> usize {
    let pid = host.pid(&vm.id).expect("a process");
    let links = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("files");
    let targets = links.filter_map(|link| std::fs::read_link(link.ok()?.path()).ok());
    let mut layers: Vec<_> = targets.filter(|path| path.to_string_lossy().contains("/layers/")).collect();
    layers.sort();
    layers.dedup();
    layers.len()
}

/// Waits until the chain is as long as that.
async fn until_chain_is(host: &TestHost, vm: &TestVm, length: usize) {
    let began = Instant::now();
    while chain(host, vm).len() != length {
        assert!(began.elapsed() < LONG, "the chain stays at {:?}", chain(host, vm));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// No layer is there that nobody needs, and none is missing.
fn assert_tidy(host: &TestHost, vm: &TestVm) {
    let mut needed = chain(host, vm);
    for entry in std::fs::read_dir(host.vm_directory(&vm.id).join("snapshots")).expect("snapshots") {
        let text = std::fs::read(entry.expect("entry").path().join("snapshot.json")).expect("manifest");
        let manifest: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
        needed.extend(serde_json::from_value::<Vec<String>>(manifest["layers"].clone()).expect("layers"));
    }
    let mut needed: Vec<String> = needed.into_iter().map(|layer| format!("{layer}.qcow2")).collect();
    needed.sort();
    needed.dedup();
    assert_eq!(files(host, vm), needed);
}

fn verify(host: &TestHost, vm: &TestVm, files: u64) {
    let found = host.probe(&vm.id).verify(LONG).expect("verified");
    assert_eq!((found.pages_wrong, found.files, found.files_wrong), (0, files, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn snapshots_come_and_go_for_long_and_the_chain_stays_short_while_the_guest_writes() {
    let host = TestHost::start().await;
    let vm = host.running_vm(128).await;
    let probe = host.probe(&vm.id);
    probe.set(BUSY, LONG).expect("busy");
    let mut kept: Vec<Taken> = Vec::new();
    let (mut written, mut longest) = (0, 0);
    for round in 0..30 {
        probe.write(2).expect("files");
        written += 2;
        kept.push((take(&host, &vm).await, written));
        longest = longest.max(chain(&host, &vm).len());
        // The newest three are kept, and one of the first for good.
        if kept.len() > 4 {
            let (old, _) = kept.remove(1);
            delete(&host, &vm, old).await;
        }
        if round % 10 == 9 {
            verify(&host, &vm, written);
        }
    }
    println!("the chain had {longest} layers at most, has {}", chain(&host, &vm).len());
    assert!(longest <= LAYERS_MAX);
    // The first, what was between, the three newest with nothing between them, and the writable one.
    until_chain_is(&host, &vm, 5).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_tidy(&host, &vm);
    assert_eq!(open_files(&host, &vm), 5, "QEMU has let go of what was merged");
    verify(&host, &vm, written);
    for (snapshot, files) in kept {
        restore(&host, &vm, snapshot).await;
        verify(&host, &vm, files);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn as_many_snapshots_as_one_likes_may_be_kept() {
    let host = TestHost::start().await;
    let vm = host.running_vm(128).await;
    let probe = host.probe(&vm.id);
    let mut kept: Vec<Taken> = Vec::new();
    for round in 0..(LAYERS_MAX as u64 + 6) {
        probe.write(1).expect("files");
        kept.push((take(&host, &vm).await, round + 1));
        assert!(chain(&host, &vm).len() <= LAYERS_MAX);
    }
    host.task(&vm.id, TaskSpec::StopVm).await.expect("stopped");
    // At rest as well.
    for _ in 0..LAYERS_MAX {
        take(&host, &vm).await;
        assert!(chain(&host, &vm).len() <= LAYERS_MAX);
    }
    for (snapshot, files) in kept.into_iter().step_by(5) {
        restore(&host, &vm, snapshot).await;
        assert_eq!(host.state(&vm.id), Some(VmState::Running));
        verify(&host, &vm, files);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disks_that_are_taken_alone_keep_to_the_limit_too() {
    let host = TestHost::start().await;
    let vm = host.running_vm(128).await;
    for round in 0..(LAYERS_MAX as u64 + 3) {
        host.probe(&vm.id).write(1).expect("files");
        let spec = TaskSpec::TakeDiskSnapshot { snapshot: snapshot(), new_top: layer(), quiesce: false };
        host.task(&vm.id, spec).await.expect("taken");
        assert!(chain(&host, &vm).len() <= LAYERS_MAX, "after {round}: {:?}", chain(&host, &vm));
    }
    verify(&host, &vm, LAYERS_MAX as u64 + 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_dies_in_a_merge_the_vm_and_its_snapshots_are_whole_and_it_is_merged_in_the_end() {
    let mut host = TestHost::start().await;
    let vm = host.running_vm(128).await;
    host.probe(&vm.id).set(BUSY, LONG).expect("busy");
    let mut written = 0;
    // A merge begins a second after the last work.
    for delay_ms in [900, 1000, 1020, 1040, 1060, 1080, 1100, 1150, 1250] {
        let mut taken = Vec::new();
        for _ in 0..2 {
            host.probe(&vm.id).write(2).expect("files");
            written += 2;
            taken.push((take(&host, &vm).await, written));
        }
        let (newest, _) = taken.pop().expect("two");
        delete(&host, &vm, newest).await;
        tokio::time::sleep(Duration::from_millis(delay_ms)).await;
        host.replace_agent().await;
        assert_eq!(host.state(&vm.id), Some(VmState::Running), "after {delay_ms} ms");
        until_chain_is(&host, &vm, 3).await;
        verify(&host, &vm, written);
        let (snapshot, files) = taken.pop().expect("one");
        restore(&host, &vm, snapshot.clone()).await;
        written = files;
        verify(&host, &vm, files);
        delete(&host, &vm, snapshot).await;
        until_chain_is(&host, &vm, 2).await;
        assert_tidy(&host, &vm);
    }
    // And QEMU. Once: the guest's ext2 has no journal, and is not to be written to after its power was cut.
    host.probe(&vm.id).write(1).expect("files");
    written += 1;
    let taken = take(&host, &vm).await;
    delete(&host, &vm, taken).await;
    tokio::time::sleep(Duration::from_millis(1050)).await;
    host::kill(host.pid(&vm.id).expect("a process"));
    host.until_stopped(&vm.id).await;
    host.task(&vm.id, TaskSpec::StartVm { definition: vm.boxed() }).await.expect("started");
    host.task(&vm.id, TaskSpec::WaitReady { timeout_ms: 120_000 }).await.expect("ready");
    verify(&host, &vm, written);
    until_chain_is(&host, &vm, 2).await;
    assert_tidy(&host, &vm);
}
