//! VMs with several disks on a real QEMU: whatever is done, all of them are of one instant.
//!
//! The guest's files are on its disks in turn, each on the disk before the next begins. So a state of both in which a
//! number is missing below the newest one is of two instants.

#[path = "snapshot/host.rs"]
#[allow(dead_code, reason = "each test program uses a part of it")]
mod host;

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::sync::Arc;
use std::time::{Duration, Instant};

use berth_agent::config::LAYERS_MAX;
use berth_agent::disks::{Disks, tops};
use berth_api::agent::{ComparePath, CompareQuery, TaskOutput, TaskSpec};
use berth_model::diff::SnapshotDiff;
use berth_model::snapshot::SnapshotFacts;
use berth_model::verification::VerificationFacts;
use berth_model::vm::VmState;
use berth_model::{HostId, LayerId, ProblemCode, SnapshotId};
use guest_probe::memory::{Rewrite, Settings};
use host::{LONG, NoPeers, SmallDisk, TestHost, TestVm, definition, entropy, layer, snapshot};
use serde_json::Value;

const BUSY: Settings = Settings { memory_mib: 16, rate_mib_s: 10, hot_mib: 8, rewrite: Rewrite::Whole };
const DISK_MIB: u64 = 256;

/// A guest with files on two disks.
async fn vm_with_two_disks(host: &TestHost) -> TestVm {
    let mut definition = definition(128);
    definition.spec.data_disks_mib = vec![DISK_MIB];
    host.vm_of(definition).await
}

async fn take(host: &TestHost, vm: &TestVm) -> SnapshotId {
    let taken = snapshot();
    let spec = TaskSpec::TakeSnapshot { snapshot: taken.clone(), new_top: layer(), next: None };
    let facts = facts(host.task(&vm.id, spec).await.expect("taken"));
    assert!(facts.data.len() == 1 && !facts.data[0].is_empty(), "{facts:?}");
    taken
}

fn facts(output: TaskOutput) -> SnapshotFacts {
    match output {
        TaskOutput::Snapshot { facts } => facts,
        other => panic!("{other:?}"),
    }
}

async fn take_disks(host: &TestHost, vm: &TestVm) -> SnapshotId {
    let taken = snapshot();
    let spec = TaskSpec::TakeDiskSnapshot { snapshot: taken.clone(), new_top: layer(), quiesce: false };
    facts(host.task(&vm.id, spec).await.expect("taken"));
    taken
}

async fn restore(host: &TestHost, vm: &TestVm, snapshot: &SnapshotId) {
    let spec = TaskSpec::RestoreSnapshot {
        definition: vm.boxed(),
        snapshot: snapshot.clone(),
        new_top: layer(),
        paused: false,
    };
    host.task(&vm.id, spec).await.expect("restored");
}

async fn delete(host: &TestHost, vm: &TestVm, snapshot: SnapshotId) {
    host.task(&vm.id, TaskSpec::DeleteSnapshot { snapshot }).await.expect("deleted");
}

async fn start(host: &TestHost, vm: &TestVm) {
    host.task(&vm.id, TaskSpec::StartVm { definition: vm.boxed() }).await.expect("started");
    host.task(&vm.id, TaskSpec::WaitReady { timeout_ms: 300_000 }).await.expect("ready");
}

/// Every page and every file on both disks.
fn verify(host: &TestHost, vm: &TestVm, files: u64) {
    let found = host.probe(&vm.id).verify(LONG).expect("verified");
    assert_eq!((found.pages_wrong, found.files, found.files_wrong), (0, files, 0));
}

/// Has files written without waiting for them.
fn begin_to_write(host: &TestHost, vm: &TestVm, files: u32) -> std::thread::JoinHandle<()> {
    let probe = host.probe(&vm.id);
    // The snapshot may be put back before the answer: then nobody hears it.
    std::thread::spawn(move || drop(probe.write(files)))
}

async fn compare(host: &TestHost, vm: &TestVm, from: &SnapshotId, to: &SnapshotId) -> SnapshotDiff {
    let path = ComparePath { vm: vm.id.clone(), from: from.clone(), to: to.clone() };
    let query = CompareQuery { content: None, list: Some(10_000) };
    berth_agent::snapshot::compare(&host.agent, path, query).await.expect("compared")
}

/// The numbers of the files that came to each disk.
fn numbers_on(diff: &SnapshotDiff) -> BTreeMap<String, BTreeSet<u64>> {
    let number = |path: &str| path.rsplit_once("/file-")?.1.parse().ok();
    let of_volume = |found: &berth_model::diff::FileSystemDiff| {
        (found.volume.clone(), found.changes.iter().filter_map(|change| number(&change.path)).collect())
    };
    diff.file_systems.iter().map(of_volume).collect()
}

/// Asserts that no file is missing below the newest one; gives how many there are.
fn assert_one_instant(diff: &SnapshotDiff) -> usize {
    let disks = numbers_on(diff);
    assert_eq!(disks.keys().collect::<Vec<_>>(), ["data1", "disk"], "{diff:?}");
    assert!(disks.values().all(|numbers| !numbers.is_empty()), "{disks:?}");
    let all: BTreeSet<u64> = disks.values().flatten().copied().collect();
    let (first, last) = (all.first().expect("files"), all.last().expect("files"));
    assert_eq!(last - first + 1, all.len() as u64, "a gap: the disks are of two instants: {disks:?}");
    assert!(disks["disk"].iter().all(|number| number % 2 == 0), "{disks:?}");
    assert!(disks["data1"].iter().all(|number| number % 2 == 1), "{disks:?}");
    all.len()
}

fn record(host: &TestHost, vm: &TestVm) -> Disks {
    let text = std::fs::read(host.vm_directory(&vm.id).join("vm.json")).expect("record");
    disks_in(&serde_json::from_slice(&text).expect("JSON"), "chain")
}

fn disks_in(record: &Value, root: &str) -> Disks {
    let root = serde_json::from_value(record[root].clone()).expect("layers");
    Disks::new(root, serde_json::from_value(record["data"].clone()).expect("data"))
}

/// The layers that are there.
fn files(host: &TestHost, vm: &TestVm) -> BTreeSet<String> {
    let entries = std::fs::read_dir(host.vm_directory(&vm.id).join("layers")).expect("layers");
    entries.map(|entry| entry.expect("entry").file_name().into_string().expect("name")).collect()
}

/// No layer is there that nobody needs, and none is missing.
fn assert_tidy(host: &TestHost, vm: &TestVm) {
    let mut needed: BTreeSet<LayerId> = record(host, vm).layers().cloned().collect();
    for entry in std::fs::read_dir(host.vm_directory(&vm.id).join("snapshots")).expect("snapshots") {
        let text = std::fs::read(entry.expect("entry").path().join("snapshot.json")).expect("manifest");
        let manifest = disks_in(&serde_json::from_slice(&text).expect("JSON"), "layers");
        needed.extend(manifest.layers().cloned());
    }
    let needed: BTreeSet<String> = needed.into_iter().map(|layer| format!("{layer}.qcow2")).collect();
    assert_eq!(files(host, vm), needed);
}

async fn until_chains_are(host: &TestHost, vm: &TestVm, length: usize) {
    let began = Instant::now();
    while record(host, vm).each().any(|chain| chain.len() != length) {
        assert!(began.elapsed() < LONG, "the chains stay at {:?}", record(host, vm));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_disks_of_a_guest_that_writes_are_of_one_instant_and_come_back_together() {
    let host = TestHost::start().await;
    let vm = vm_with_two_disks(&host).await;
    let empty = take(&host, &vm).await;
    host.probe(&vm.id).set(BUSY, LONG).expect("busy");
    let (mut taken, mut written) = (Vec::new(), 0);
    for round in 0..6 {
        let writing = begin_to_write(&host, &vm, 150);
        tokio::time::sleep(Duration::from_millis(150)).await;
        let one = if round % 2 == 0 { take(&host, &vm).await } else { take_disks(&host, &vm).await };
        writing.join().expect("written");
        written += 150;
        let diff = compare(&host, &vm, &empty, &one).await;
        let there = assert_one_instant(&diff) as u64;
        println!("{round}: {there} files of {written} were there");
        assert!(there <= written);
        taken.push((one, there, written));
    }
    assert!(taken.iter().any(|(_, there, written)| there < written), "no snapshot was taken while it wrote");
    verify(&host, &vm, written);
    // With memory: the guest goes on writing where it was, and has all of them in the end.
    for (one, _, written) in taken.iter().step_by(2).rev() {
        restore(&host, &vm, one).await;
        verify(&host, &vm, *written);
    }
    // Without: it begins on both disks as they were.
    let (one, there, _) = &taken[1];
    restore(&host, &vm, one).await;
    assert_eq!(host.state(&vm.id), Some(VmState::Stopped));
    start(&host, &vm).await;
    verify(&host, &vm, *there);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_disks_of_a_vm_at_rest_are_taken_and_put_back() {
    let host = TestHost::start().await;
    let vm = vm_with_two_disks(&host).await;
    host.probe(&vm.id).write(4).expect("files");
    host.task(&vm.id, TaskSpec::StopVm).await.expect("stopped");
    let taken = take(&host, &vm).await;
    start(&host, &vm).await;
    verify(&host, &vm, 4);
    let before = record(&host, &vm);
    restore(&host, &vm, &taken).await;
    let now = record(&host, &vm);
    assert!(now.each().zip(before.each()).all(|(now, before)| now[0] == before[0] && now[1] != before[1]));
    start(&host, &vm).await;
    verify(&host, &vm, 4);
    assert_tidy(&host, &vm);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clone_has_all_disks_and_keeps_them_when_its_origin_goes() {
    let host = TestHost::start().await;
    let vm = vm_with_two_disks(&host).await;
    host.probe(&vm.id).write(10).expect("files");
    let taken = take(&host, &vm).await;
    host.probe(&vm.id).write(3).expect("files");
    let mut clones = Vec::new();
    // Sharing files and with copies of its own, going on and beginning anew.
    for (share, warm) in [(true, true), (false, true), (true, false)] {
        let mut definition = definition(128);
        (definition.spec.image, definition.image) =
            (vm.definition.spec.image.clone(), vm.definition.image.clone());
        let clone = TestVm { id: definition.id.clone(), definition };
        let spec = TaskSpec::CloneVm {
            definition: clone.boxed(),
            origin: vm.id.clone(),
            snapshot: taken.clone(),
            first_snapshot: warm.then(snapshot),
            share,
            paused: false,
        };
        host.task(&clone.id, spec).await.expect("cloned");
        clones.push((clone, warm));
    }
    host.task(&vm.id, TaskSpec::DeleteVm { pool: "local".parse().expect("name"), keep_files: false })
        .await
        .expect("deleted");
    for (clone, warm) in &clones {
        host.task(&clone.id, TaskSpec::WaitReady { timeout_ms: 300_000 }).await.expect("ready");
        verify(&host, clone, 10);
        // The guest's ext2 has no journal, and is not to be written to after its power was cut.
        if *warm {
            host.probe(&clone.id).write(2).expect("files");
            verify(&host, clone, 12);
        }
        assert_tidy(&host, clone);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_chains_of_both_disks_stay_short_and_nobody_loses_a_byte() {
    let host = TestHost::start().await;
    let vm = vm_with_two_disks(&host).await;
    let (mut kept, mut written) = (Vec::new(), 0);
    for _ in 0..(LAYERS_MAX as u64 + 8) {
        host.probe(&vm.id).write(2).expect("files");
        written += 2;
        kept.push((take(&host, &vm).await, written));
        let disks = record(&host, &vm);
        assert!(disks.longest() <= LAYERS_MAX, "{disks:?}");
        if kept.len() > 4 {
            delete(&host, &vm, kept.remove(1).0).await;
        }
    }
    until_chains_are(&host, &vm, 5).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_tidy(&host, &vm);
    verify(&host, &vm, written);
    for (snapshot, files) in kept {
        restore(&host, &vm, &snapshot).await;
        verify(&host, &vm, files);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_dies_in_a_snapshot_both_disks_are_whole_and_the_next_one_works() {
    let mut host = TestHost::start().await;
    let vm = vm_with_two_disks(&host).await;
    let busy = Settings { memory_mib: 20, rate_mib_s: 60, hot_mib: 20, rewrite: Rewrite::Whole };
    host.probe(&vm.id).set(busy, LONG).expect("busy");
    let mut written = 0;
    for delay_ms in [0, 20, 60, 120, 180, 250, 350, 500] {
        let (taken, new_top) = (snapshot(), layer());
        let spec = TaskSpec::TakeSnapshot { snapshot: taken.clone(), new_top, next: None };
        host.put(&vm.id, spec.clone());
        tokio::time::sleep(Duration::from_millis(delay_ms)).await;
        host.replace_agent().await;
        assert_eq!(host.state(&vm.id), Some(VmState::Running), "after {delay_ms} ms");
        host.probe(&vm.id).write(2).expect("files");
        written += 2;
        verify(&host, &vm, written);
        // The manager asks again, with the same ids.
        host.task(&vm.id, spec).await.expect("taken in the end");
        let disks = record(&host, &vm);
        assert!(disks.each().all(|chain| chain.len() == disks.longest()), "{disks:?}");
        restore(&host, &vm, &taken).await;
        written = host.probe(&vm.id).status().expect("status").files;
        verify(&host, &vm, written);
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_tidy(&host, &vm);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_without_room_for_the_second_disks_layer_leaves_the_vm_as_it_was() {
    let Some(small) = SmallDisk::mount(200) else { return };
    let host =
        TestHost::start_with(Some(small.path()), Arc::new(NoPeers), HostId::from_entropy(entropy())).await;
    let vm = vm_with_two_disks(&host).await;
    host.probe(&vm.id).write(4).expect("files");
    let before = (record(&host, &vm), files(&host, &vm));
    let filler = small.path().join("filler");
    let file = std::fs::File::create(&filler).expect("filler");
    let _ = std::io::copy(&mut std::io::repeat(1), &mut &file);
    // One empty layer takes a quarter of a MiB.
    file.set_len(file.metadata().expect("metadata").len() - (320 << 10)).expect("room for one");
    for machine in [true, false] {
        let (taken, new_top) = (snapshot(), layer());
        let second = tops(&new_top, 2).last().expect("two");
        let spec = match machine {
            true => TaskSpec::TakeSnapshot { snapshot: taken, new_top, next: None },
            false => TaskSpec::TakeDiskSnapshot { snapshot: taken, new_top, quiesce: false },
        };
        let problem = host.task(&vm.id, spec).await.expect_err("no room");
        assert_eq!(problem.code, ProblemCode::NoSpace, "{problem:?}");
        assert!(problem.message.contains(second.as_str()), "the first had room: {problem:?}");
        assert_eq!(host.state(&vm.id), Some(VmState::Running));
        assert_eq!((record(&host, &vm), files(&host, &vm)), before);
    }
    std::fs::remove_file(&filler).expect("room");
    host.probe(&vm.id).write(2).expect("files");
    verify(&host, &vm, 6);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bit_that_flips_on_a_data_disk_is_found_with_its_file() {
    let host = TestHost::start().await;
    let vm = vm_with_two_disks(&host).await;
    host.probe(&vm.id).write(4).expect("files");
    let taken = take(&host, &vm).await;
    let look = async || -> VerificationFacts {
        match host.task(&vm.id, TaskSpec::VerifySnapshot { snapshot: taken.clone() }).await.expect("read") {
            TaskOutput::Verified { facts } => facts,
            other => panic!("{other:?}"),
        }
    };
    let facts = look().await;
    assert!(facts.faults.is_empty(), "{facts:?}");
    let frozen = record(&host, &vm).frozen();
    let path = host.vm_directory(&vm.id).join("layers").join(format!("{}.qcow2", frozen.of(1)[0]));
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("mode");
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).expect("open");
    let mut byte = [0];
    file.read_exact_at(&mut byte, 0x5_0000).expect("read");
    file.write_all_at(&[byte[0] ^ 0x40], 0x5_0000).expect("write");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o444)).expect("mode");
    let facts = look().await;
    let named: Vec<&str> = facts.faults.iter().map(|fault| fault.file.as_str()).collect();
    assert!(named.len() == 1 && named[0].ends_with(&format!("{}.qcow2", frozen.of(1)[0])), "{facts:?}");
}
