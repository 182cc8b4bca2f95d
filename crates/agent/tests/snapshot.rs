//! Snapshots on a real QEMU: what is taken comes back, and what fails harms nobody.

#[path = "snapshot/host.rs"]
#[allow(dead_code, reason = "each test program uses a part of it")]
mod host;

use std::sync::Arc;
use std::time::Duration;

use berth_api::agent::{TaskOutput, TaskSpec};
use berth_model::snapshot::{RestoreFacts, SnapshotFacts};
use berth_model::vm::VmState;
use berth_model::{HostId, Problem, ProblemCode, SnapshotId};
use berth_qmp::guest_agent::GuestAgent;
use guest_probe::memory::{Rewrite, Settings};
use host::{LONG, NoPeers, SmallDisk, TestHost, TestVm, entropy, layer, snapshot};

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

async fn attempt(host: &TestHost, vm: &TestVm) -> Result<TaskOutput, Problem> {
    host.task(&vm.id, TaskSpec::TakeSnapshot { snapshot: snapshot(), new_top: layer() }).await
}

/// The layers on record and those that are there.
fn layers(host: &TestHost, vm: &TestVm) -> (usize, usize) {
    let directory = host.vm_directory(&vm.id);
    let record: serde_json::Value =
        serde_json::from_slice(&std::fs::read(directory.join("vm.json")).expect("record")).expect("JSON");
    let there = std::fs::read_dir(directory.join("layers")).expect("layers").count();
    (record["chain"].as_array().expect("chain").len(), there)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_held_guest_is_taken_as_often_as_wanted_and_comes_back_held() {
    let host = TestHost::start().await;
    let vm = host.running_vm(128).await;
    host.probe(&vm.id).write(3).expect("files");
    host.task(&vm.id, TaskSpec::PauseVm).await.expect("held");
    let (first, second, third) = (snapshot(), snapshot(), snapshot());
    assert_eq!(take(&host, &vm, &first).await.paused_us, 0);
    take(&host, &vm, &second).await;
    assert_eq!(host.state(&vm.id), Some(VmState::Paused));
    host.task(&vm.id, TaskSpec::ResumeVm).await.expect("goes on");
    host.probe(&vm.id).write(2).expect("files");
    host.task(&vm.id, TaskSpec::PauseVm).await.expect("held again");
    take(&host, &vm, &third).await;
    restore(&host, &vm, &second).await;
    assert_eq!(host.state(&vm.id), Some(VmState::Paused));
    host.task(&vm.id, TaskSpec::ResumeVm).await.expect("goes on");
    let found = host.probe(&vm.id).verify(LONG).expect("verified");
    assert_eq!((found.pages_wrong, found.files, found.files_wrong), (0, 3, 0));
    restore(&host, &vm, &third).await;
    host.task(&vm.id, TaskSpec::ResumeVm).await.expect("goes on");
    let found = host.probe(&vm.id).verify(LONG).expect("verified");
    assert_eq!((found.pages_wrong, found.files, found.files_wrong), (0, 5, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_vm_is_taken_without_memory_and_put_back_while_it_runs() {
    let host = TestHost::start().await;
    let vm = host.running_vm(128).await;
    host.probe(&vm.id).write(3).expect("files");
    host.task(&vm.id, TaskSpec::StopVm).await.expect("stopped");
    let taken = snapshot();
    assert!(!take(&host, &vm, &taken).await.has_memory);
    host.task(&vm.id, TaskSpec::StartVm { definition: vm.boxed() }).await.expect("started");
    host.task(&vm.id, TaskSpec::WaitReady { timeout_ms: 120_000 }).await.expect("ready");
    restore(&host, &vm, &taken).await;
    assert_eq!(host.state(&vm.id), Some(VmState::Stopped));
    host.task(&vm.id, TaskSpec::StartVm { definition: vm.boxed() }).await.expect("started");
    let delete = TaskSpec::DeleteSnapshot { snapshot: taken };
    host.task(&vm.id, delete.clone()).await.expect("deleted");
    host.task(&vm.id, delete).await.expect("deleted again");
    assert_eq!(layers(&host, &vm), (2, 2), "the layers that the VM lies on are still there");
}

/// Cuts a snapshot's device state short; `believed` says whether the manifest is made to agree with that.
fn cut_device_state(host: &TestHost, vm: &TestVm, snapshot: &SnapshotId, believed: bool) {
    let directory = host.vm_directory(&vm.id).join("snapshots").join(snapshot.as_str());
    let (device, manifest) = (directory.join("device.bin"), directory.join("snapshot.json"));
    let mut bytes = std::fs::read(&device).expect("device state");
    bytes.truncate(bytes.len() / 2);
    std::fs::remove_file(&device).expect("removed");
    std::fs::write(&device, &bytes).expect("written");
    if believed {
        let text = std::fs::read(&manifest).expect("manifest");
        let mut value: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
        value["memory"]["device_blake3"] = blake3::hash(&bytes).to_hex().as_str().into();
        std::fs::remove_file(&manifest).expect("removed");
        std::fs::write(&manifest, value.to_string()).expect("written");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_that_fails_leaves_the_vm_on_the_disk_that_it_had() {
    let host = TestHost::start().await;
    let vm = host.running_vm(128).await;
    let taken = snapshot();
    take(&host, &vm, &taken).await;
    let nonce = host.probe(&vm.id).tick().expect("tick").nonce;
    host.probe(&vm.id).write(3).expect("files");
    let (pid, before) = (host.pid(&vm.id), layers(&host, &vm));
    let try_it = async || {
        let definition = vm.boxed();
        let spec = TaskSpec::RestoreSnapshot { definition, snapshot: taken.clone(), new_top: layer() };
        host.task(&vm.id, spec).await.expect_err("it is not whole")
    };

    // What can be seen harms nothing: the guest does not notice.
    cut_device_state(&host, &vm, &taken, false);
    assert_eq!(try_it().await.code, ProblemCode::BadImage);
    assert_eq!((host.state(&vm.id), host.pid(&vm.id)), (Some(VmState::Running), pid));
    assert_eq!(host.probe(&vm.id).tick().expect("alive").nonce, nonce);

    // What only QEMU finds ends the guest; its disk is what it was, and what was made for it is gone.
    let undo = snapshot();
    take(&host, &vm, &undo).await;
    cut_device_state(&host, &vm, &taken, true);
    assert_eq!(try_it().await.code, ProblemCode::Hypervisor);
    assert_eq!(host.state(&vm.id), Some(VmState::Stopped));
    assert_eq!(layers(&host, &vm), (before.0 + 1, before.1 + 1), "those of the undo snapshot, and no more");

    // So the snapshot that was taken before brings it back, as whoever commanded this does.
    restore(&host, &vm, &undo).await;
    let found = host.probe(&vm.id).verify(LONG).expect("verified");
    assert_eq!((found.tick.nonce, found.files, found.files_wrong, found.pages_wrong), (nonce, 3, 0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_fails_the_snapshot_and_harms_nothing_else() {
    let Some(small) = SmallDisk::mount(200) else { return };
    let host =
        TestHost::start_with(Some(small.path()), Arc::new(NoPeers), HostId::from_entropy(entropy())).await;
    let vm = host.running_vm(512).await;
    let probe = host.probe(&vm.id);
    probe
        .set(Settings { memory_mib: 256, rate_mib_s: 10, hot_mib: 32, rewrite: Rewrite::Whole }, LONG)
        .expect("busy");
    for _ in 0..2 {
        let problem = attempt(&host, &vm).await.expect_err("no room");
        assert_eq!(problem.code, ProblemCode::NoSpace, "{problem:?}");
        assert_eq!(host.state(&vm.id), Some(VmState::Running));
        assert_eq!(layers(&host, &vm), (1, 1));
        let left = std::fs::read_dir(host.vm_directory(&vm.id).join("snapshots")).expect("snapshots").count();
        assert_eq!(left, 0);
        assert_eq!(probe.verify(LONG).expect("verified").pages_wrong, 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_dies_in_a_snapshot_the_vm_is_as_it_was_and_the_next_one_works() {
    let mut host = TestHost::start().await;
    let vm = host.running_vm(256).await;
    let busy = Settings { memory_mib: 100, rate_mib_s: 100, hot_mib: 100, rewrite: Rewrite::Whole };
    host.probe(&vm.id).set(busy, LONG).expect("busy");
    for delay_ms in [0, 60, 150, 300, 600] {
        let (taken, new_top) = (snapshot(), layer());
        let spec = TaskSpec::TakeSnapshot { snapshot: taken.clone(), new_top };
        host.put(&vm.id, spec.clone());
        tokio::time::sleep(Duration::from_millis(delay_ms)).await;
        host.replace_agent().await;
        assert_eq!(host.state(&vm.id), Some(VmState::Running), "after {delay_ms} ms");
        let found = host.probe(&vm.id).verify(LONG).expect("verified");
        assert_eq!((found.pages_wrong, found.files_wrong), (0, 0));
        // The manager asks again, with the same ids.
        host.task(&vm.id, spec).await.expect("taken in the end");
    }
    let task = host.put(&vm.id, TaskSpec::TakeSnapshot { snapshot: snapshot(), new_top: layer() });
    host::kill(host.pid(&vm.id).expect("a process"));
    host.wait(&task).await.expect_err("killed");
    host.until_stopped(&vm.id).await;
    let start = TaskSpec::StartVm { definition: vm.boxed() };
    host.task(&vm.id, start).await.expect("it starts from what is on the disk");
    host.task(&vm.id, TaskSpec::WaitReady { timeout_ms: 120_000 }).await.expect("ready");
}

async fn take_disk(
    host: &TestHost,
    vm: &TestVm,
    snapshot: &SnapshotId,
    quiesce: bool,
) -> Result<SnapshotFacts, Problem> {
    let spec = TaskSpec::TakeDiskSnapshot { snapshot: snapshot.clone(), new_top: layer(), quiesce };
    match host.task(&vm.id, spec).await? {
        TaskOutput::Snapshot { facts } => Ok(facts),
        other => panic!("{other:?}"),
    }
}

/// The guest's agent, asked past Berth's.
async fn guest_agent(host: &TestHost, vm: &TestVm) -> GuestAgent {
    let socket = host.root().join("run").join(vm.id.as_str()).join("guest-agent.sock");
    let agent = GuestAgent::connect(socket).await.expect("the port is open");
    let answers = async { while agent.ping(Duration::from_secs(1)).await.is_err() {} };
    tokio::time::timeout(LONG, answers).await.expect("the guest agent answers");
    agent
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_disk_alone_is_taken_while_the_guest_runs_with_its_file_systems_frozen_or_not() {
    let mut host = TestHost::start().await;
    let vm = host.running_vm(128).await;
    host.probe(&vm.id).write(3).expect("files");
    drop(guest_agent(&host, &vm).await);
    let (plain, quiesced) = (snapshot(), snapshot());
    let facts = take_disk(&host, &vm, &plain, false).await.expect("taken");
    println!("taken: {facts:?}");
    assert!(!facts.has_memory && !facts.quiesced && facts.paused_us > 0 && facts.memory_bytes == 0);
    host.probe(&vm.id).write(2).expect("the guest writes on");
    let facts = take_disk(&host, &vm, &quiesced, true).await.expect("taken");
    println!("taken, frozen: {facts:?}");
    assert!(!facts.has_memory && facts.quiesced && facts.layers.len() == 2);
    host.probe(&vm.id).write(2).expect("it writes on, so it was thawed");
    assert_eq!(host.state(&vm.id), Some(VmState::Running));

    // An agent that dies at any point of it leaves no guest frozen, and asked again it is taken.
    for delay_ms in [0, 40, 100, 200] {
        let spec = TaskSpec::TakeDiskSnapshot { snapshot: snapshot(), new_top: layer(), quiesce: true };
        host.put(&vm.id, spec.clone());
        tokio::time::sleep(Duration::from_millis(delay_ms)).await;
        host.replace_agent().await;
        host.probe(&vm.id).write(1).expect("not frozen");
        host.task(&vm.id, spec).await.expect("taken in the end");
    }
    let found = host.probe(&vm.id).verify(LONG).expect("verified");
    assert_eq!((found.pages_wrong, found.files, found.files_wrong), (0, 11, 0));

    restore(&host, &vm, &quiesced).await;
    assert_eq!(host.state(&vm.id), Some(VmState::Stopped));
    host.task(&vm.id, TaskSpec::StartVm { definition: vm.boxed() }).await.expect("started");
    host.task(&vm.id, TaskSpec::WaitReady { timeout_ms: 120_000 }).await.expect("ready");
    assert_eq!(host.probe(&vm.id).verify(LONG).expect("verified").files_wrong, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_an_agent_left_frozen_is_thawed_by_the_next() {
    let mut host = TestHost::start().await;
    let vm = host.running_vm(128).await;
    let agent = guest_agent(&host, &vm).await;
    // As an agent leaves it that dies in between.
    let marker = host.root().join("run").join(vm.id.as_str()).join("frozen.json");
    std::fs::write(&marker, serde_json::json!({"layer": layer()}).to_string()).expect("marker");
    assert!(agent.freeze(LONG).await.expect("frozen") > 0);
    drop(agent);
    host.replace_agent().await;
    host.probe(&vm.id).write(1).expect("thawed");
    assert!(!marker.exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_can_not_be_taken_leaves_the_vm_as_it_was() {
    let Some(small) = SmallDisk::mount(200) else { return };
    let host =
        TestHost::start_with(Some(small.path()), Arc::new(NoPeers), HostId::from_entropy(entropy())).await;
    let vm = host.running_vm(128).await;
    host.probe(&vm.id).write(1).expect("files");
    drop(guest_agent(&host, &vm).await);
    let filler = small.path().join("filler");
    let _ = std::io::copy(&mut std::io::repeat(1), &mut std::fs::File::create(&filler).expect("filler"));
    for quiesce in [false, true] {
        let problem = take_disk(&host, &vm, &snapshot(), quiesce).await.expect_err("no room");
        assert_eq!(problem.code, ProblemCode::NoSpace, "{problem:?}");
        assert_eq!((host.state(&vm.id), layers(&host, &vm)), (Some(VmState::Running), (1, 1)));
    }
    std::fs::remove_file(&filler).expect("room");
    host.probe(&vm.id).write(1).expect("the guest is not frozen");

    // Nobody in a held guest can freeze its file systems; its disk can be taken, and its memory after that.
    host.task(&vm.id, TaskSpec::PauseVm).await.expect("held");
    take(&host, &vm, &snapshot()).await;
    let problem = take_disk(&host, &vm, &snapshot(), true).await.expect_err("nobody answers");
    assert_eq!(problem.code, ProblemCode::Guest, "{problem:?}");
    assert!(problem.message.contains("qemu-guest-agent"), "{problem:?}");
    assert_eq!(layers(&host, &vm), (2, 2));
    assert!(!take_disk(&host, &vm, &snapshot(), false).await.expect("taken").has_memory);
    let last = snapshot();
    assert!(take(&host, &vm, &last).await.has_memory);
    host.task(&vm.id, TaskSpec::ResumeVm).await.expect("goes on");
    host.probe(&vm.id).write(1).expect("files");
    restore(&host, &vm, &last).await;
    host.task(&vm.id, TaskSpec::ResumeVm).await.expect("goes on");
    let found = host.probe(&vm.id).verify(LONG).expect("verified");
    assert_eq!((found.pages_wrong, found.files, found.files_wrong), (0, 2, 0));
}

/// A file of a snapshot.
fn file_of(host: &TestHost, vm: &TestVm, snapshot: &SnapshotId, name: &str) -> std::path::PathBuf {
    host.vm_directory(&vm.id).join("snapshots").join(snapshot.as_str()).join(name)
}

/// A guest whose memory is filled, and then left alone but for `hot_mib` of it.
const fn filled(hot_mib: u32) -> Settings {
    Settings { memory_mib: 96, rate_mib_s: 40, hot_mib, rewrite: Rewrite::Whole }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chain_of_differences_comes_back_page_by_page_whichever_are_deleted() {
    let host = TestHost::start().await;
    let vm = host.running_vm(256).await;
    let probe = host.probe(&vm.id);
    probe.set(filled(4), LONG).expect("filled");
    let mut taken = Vec::new();
    // More than an image may have files, so that what the differences hold is taken over once.
    for round in 0..10 {
        let one = snapshot();
        let facts = take(&host, &vm, &one).await;
        println!("{round}: {facts:?}");
        let at = probe.tick().expect("tick");
        assert_eq!(facts.memory_shared_bytes > 0, round > 0, "{facts:?}");
        taken.push((one, at, facts));
        probe.write(1).expect("a file");
    }
    let first = &taken[0].2;
    for (_, _, facts) in &taken[1..] {
        let percent = facts.memory_stored_bytes * 100 / first.memory_stored_bytes;
        assert!(percent < 40, "{percent} % of the first: {facts:?}");
    }
    // Of what is deleted nothing is missing to the others, in whatever order.
    let delete = async |index: usize| {
        let spec = TaskSpec::DeleteSnapshot { snapshot: taken[index].0.clone() };
        host.task(&vm.id, spec).await.expect("deleted");
    };
    let check = async |index: usize| {
        let (one, at, _) = &taken[index];
        let facts = restore(&host, &vm, one).await;
        let probe = host.probe(&vm.id);
        let back = probe.tick().expect("alive");
        assert!(back.nonce == at.nonce, "{back:?}, taken at {at:?}");
        let found = probe.verify(LONG).expect("verified");
        println!("{index} restored: {facts:?}, {found:?}");
        assert_eq!((found.pages_wrong, found.files as usize, found.files_wrong), (0, index, 0));
        assert!(found.pages > 0);
    };
    check(9).await;
    check(3).await;
    delete(0).await;
    delete(4).await;
    check(5).await;
    delete(9).await;
    delete(1).await;
    check(8).await;
    check(2).await;
    for (index, kept) in [(2, false), (3, true)] {
        delete(2).await;
        assert_eq!(file_of(&host, &vm, &taken[index].0, "memory.raw").exists(), kept);
    }
    check(7).await;
}
