//! Verifying snapshots on a real QEMU: whatever is wrong with one is found, with its file and its place, and nothing else.

#[path = "snapshot/host.rs"]
#[allow(dead_code, reason = "each test program uses a part of it")]
mod host;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use berth_api::agent::{TaskOutput, TaskSpec};
use berth_model::SnapshotId;
use berth_model::verification::{SnapshotFault, VerificationFacts};
use berth_model::vm::VmState;
use guest_probe::memory::{Rewrite, Settings};
use host::{LONG, TestHost, TestVm, layer, snapshot};

const BUSY: Settings = Settings { memory_mib: 16, rate_mib_s: 10, hot_mib: 8, rewrite: Rewrite::Whole };

async fn take(host: &TestHost, vm: &TestVm) -> SnapshotId {
    let taken = snapshot();
    let spec = TaskSpec::TakeSnapshot { snapshot: taken.clone(), new_top: layer(), next: None };
    host.task(&vm.id, spec).await.expect("taken");
    taken
}

async fn verify(host: &TestHost, vm: &TestVm, snapshot: &SnapshotId) -> VerificationFacts {
    match host.task(&vm.id, TaskSpec::VerifySnapshot { snapshot: snapshot.clone() }).await.expect("verified")
    {
        TaskOutput::Verified { facts } => facts,
        other => panic!("{other:?}"),
    }
}

/// The layers of a snapshot, by its manifest.
fn layers(host: &TestHost, vm: &TestVm, snapshot: &SnapshotId) -> Vec<String> {
    let path = host.vm_directory(&vm.id).join("snapshots").join(snapshot.as_str()).join("snapshot.json");
    let manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(path).expect("manifest")).expect("JSON");
    serde_json::from_value(manifest["layers"].clone()).expect("layers")
}

/// Waits until all layers of a snapshot have their hashes.
async fn until_hashed(host: &TestHost, vm: &TestVm, snapshot: &SnapshotId) {
    let began = Instant::now();
    loop {
        let hashes = host.vm_directory(&vm.id).join("hashes");
        if layers(host, vm, snapshot).iter().all(|layer| hashes.join(format!("{layer}.b3")).exists()) {
            return;
        }
        assert!(began.elapsed() < LONG, "layers are not hashed");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Makes a file writable, has something done to it, and makes it as it was.
fn meddle(path: &Path, deed: impl FnOnce(&fs::File)) {
    let mode = fs::metadata(path).expect("metadata").permissions();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).expect("mode");
    let file = OpenOptions::new().read(true).write(true).open(path).expect("open");
    deed(&file);
    fs::set_permissions(path, mode).expect("mode");
}

fn flip(path: &Path, at: u64) {
    meddle(path, |file| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).expect("read");
        file.write_all_at(&[byte[0] ^ 0x40], at).expect("write");
    });
}

/// Where a file has its first data behind some place.
fn data_behind(path: &Path, at: u64) -> u64 {
    let file = fs::File::open(path).expect("open");
    rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)).expect("data")
}

fn cut(path: &Path, by: u64) {
    meddle(path, |file| file.set_len(file.metadata().expect("metadata").len() - by).expect("cut"));
}

fn swap(a: &Path, b: &Path) {
    let aside = a.with_extension("aside");
    fs::rename(a, &aside)
        .and_then(|()| fs::rename(b, a))
        .and_then(|()| fs::rename(&aside, b))
        .expect("swapped");
}

/// What is done, what is to be found, and what undoes it.
type Case<'a> = (&'a str, Box<dyn Fn() + 'a>, PathBuf, Option<u64>, Box<dyn Fn() + 'a>);

fn flipped<'a>(what: &'a str, path: PathBuf, at: u64, block: Option<u64>) -> Case<'a> {
    let (there, back) = (path.clone(), path.clone());
    (what, Box::new(move || flip(&there, at)), path, block, Box::new(move || flip(&back, at)))
}

fn truncated<'a>(what: &'a str, path: PathBuf, block: Option<u64>, aside: PathBuf) -> Case<'a> {
    let (there, back, kept) = (path.clone(), path.clone(), aside.clone());
    let deed = move || {
        let status =
            std::process::Command::new("cp").args(["-p", "--sparse=always"]).arg(&there).arg(&kept).status();
        assert!(status.expect("cp").success());
        // Another file, as a torn copy would be: those that share this one are not touched.
        let torn = there.with_extension("torn");
        let status =
            std::process::Command::new("cp").args(["-p", "--sparse=always"]).arg(&there).arg(&torn).status();
        assert!(status.expect("cp").success());
        cut(&torn, 4096.min(torn.metadata().expect("metadata").len()));
        fs::rename(&torn, &there).expect("renamed");
    };
    (what, Box::new(deed), path, block, Box::new(move || fs::rename(&aside, &back).expect("put back")))
}

fn page(at: u64) -> Option<u64> {
    Some(at - at % 4096)
}

/// What can be wrong with a snapshot whose files are in `own`, of a VM whose are in `home`.
fn cases<'a>(home: &Path, own: &Path, lying: &[String], aside: &Path) -> Vec<Case<'a>> {
    let [lower, upper] = [0, 1].map(|at| home.join("layers").join(format!("{}.qcow2", lying[at])));
    let difference = own.join("memory.1.raw");
    assert!(difference.exists(), "the second shares the first's memory");
    let in_difference = data_behind(&difference, 1 << 20);
    let length = |path: &Path| path.metadata().expect("metadata").size();
    let (layer_cut, last) = (length(&upper) - 4096, length(&lower) - 1);
    // Of layers of different lengths it is where the shorter one ends.
    let other_from = if length(&lower) == length(&upper) { 0 } else { length(&lower).min(length(&upper)) };
    let swapped = || -> Box<dyn Fn() + 'a> {
        let (lower, upper) = (lower.clone(), upper.clone());
        Box::new(move || swap(&lower, &upper))
    };
    let cut = |what, path: PathBuf, block| truncated(what, path, block, aside.to_owned());
    let hashes = home.join("hashes").join(format!("{}.b3", lying[1]));
    vec![
        flipped("a byte of a layer", upper.clone(), 70_000, Some(0)),
        flipped("the last byte of a layer", lower.clone(), last, Some(last - last % (1 << 20))),
        flipped("a byte of the layer's hashes", hashes, 100, None),
        flipped("a byte of device.bin", own.join("device.bin"), 5000, None),
        flipped("a byte of pages.idx", own.join("pages.idx"), 5000, None),
        flipped("a byte of the difference", difference.clone(), in_difference + 99, page(in_difference)),
        cut("a layer is cut", upper.clone(), Some(layer_cut)),
        cut("the difference is cut", difference, None),
        cut("the full image is cut", own.join("memory.raw"), None),
        cut("device.bin is cut", own.join("device.bin"), None),
        cut("pages.idx is cut", own.join("pages.idx"), None),
        ("layers are swapped", swapped(), lower.clone(), Some(other_from), swapped()),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_is_another_is_found_with_its_file_and_its_place() {
    let host = TestHost::start().await;
    let vm = host.running_vm(128).await;
    let probe = host.probe(&vm.id);
    probe.set(BUSY, LONG).expect("busy");
    probe.write(6).expect("files");
    let first = take(&host, &vm).await;
    probe.write(6).expect("more files");
    let second = take(&host, &vm).await;
    until_hashed(&host, &vm, &second).await;
    for snapshot in [&first, &second] {
        let facts = verify(&host, &vm, snapshot).await;
        println!("{facts:?}");
        assert_eq!((facts.faults.as_slice(), facts.first_hashed), (&[][..], 0));
        assert!(facts.read_bytes > 32 << 20, "{facts:?}");
    }
    let home = host.vm_directory(&vm.id);
    let own = home.join("snapshots").join(second.as_str());
    let aside = host.root().join("aside");
    let cases = cases(&home, &own, &layers(&host, &vm, &second), &aside);
    for (what, deed, path, offset, undo) in &cases {
        deed();
        let found = verify(&host, &vm, &second).await;
        undo();
        println!("{what}: {:?}", found.faults);
        let SnapshotFault { file, offset: at, .. } = &found.faults.first().expect(what);
        assert_eq!(&home.join(file), path, "{what}");
        assert_eq!(at, offset, "{what}: {:?}", found.faults);
        assert_eq!(
            found.faults.len(),
            if what.contains("swapped") { 2 } else { 1 },
            "{what}: {:?}",
            found.faults
        );
    }
    // A byte of the full image is a fault of whoever uses that page of it.
    let full = home.join("snapshots").join(first.as_str()).join("memory.raw");
    let at = data_behind(&full, 40 << 20);
    flip(&full, at + 7);
    let found = verify(&host, &vm, &first).await;
    flip(&full, at + 7);
    assert_eq!(found.faults[0].offset, page(at), "{:?}", found.faults);
    assert!(found.faults[0].file.ends_with("memory.raw"), "{:?}", found.faults);
    // So is what stands where nobody said that anything is: it would be mapped.
    let gap =
        rustix::fs::seek(fs::File::open(&full).expect("open"), rustix::fs::SeekFrom::Hole(0)).expect("hole");
    meddle(&full, |file| file.write_all_at(&[1], gap + 9).expect("write"));
    let found = verify(&host, &vm, &first).await;
    meddle(&full, |file| file.write_all_at(&[0], gap + 9).expect("write"));
    assert_eq!(found.faults[0].offset, page(gap), "{:?}", found.faults);
    fs::rename(own.join("device.bin"), &aside).expect("renamed");
    let found = verify(&host, &vm, &second).await;
    assert_eq!(found.faults[0].detail, "it is missing");
    fs::rename(&aside, own.join("device.bin")).expect("put back");
    assert_eq!(verify(&host, &vm, &second).await.faults, []);
    assert_eq!(probe.verify(LONG).expect("verified").pages_wrong, 0, "the guest did not notice");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_dies_leaves_hashes_to_be_made_and_merged_layers_verify() {
    let mut host = TestHost::start().await;
    let vm = host.running_vm(128).await;
    let probe = host.probe(&vm.id);
    probe.write(3).expect("files");
    let first = take(&host, &vm).await;
    // In the middle of hashing, or before it, and of a verification.
    host.put(&vm.id, TaskSpec::VerifySnapshot { snapshot: first.clone() });
    host.replace_agent().await;
    assert_eq!(host.state(&vm.id), Some(VmState::Running));
    until_hashed(&host, &vm, &first).await;
    assert_eq!(verify(&host, &vm, &first).await.faults, []);
    // One whose layers were never hashed says so, once.
    let hashes = host.vm_directory(&vm.id).join("hashes");
    for layer in layers(&host, &vm, &first) {
        fs::remove_file(hashes.join(format!("{layer}.b3"))).expect("removed");
    }
    let now = verify(&host, &vm, &first).await;
    // The owner of the VM may have been quicker.
    assert!(now.faults.is_empty() && now.first_hashed <= 1, "{now:?}");
    // Until layers are merged, and what is verified then lies on the merged one.
    let before = layers(&host, &vm, &first);
    let mut taken = vec![first];
    while layers(&host, &vm, taken.last().expect("one")).starts_with(&before) {
        assert!(taken.len() < 40, "nothing is merged");
        probe.write(1).expect("file");
        taken.push(take(&host, &vm).await);
        if taken.len() > 2 {
            let old = taken.remove(0);
            host.task(&vm.id, TaskSpec::DeleteSnapshot { snapshot: old }).await.expect("deleted");
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let last = taken.last().expect("one");
    // While it may be merged on.
    assert_eq!(verify(&host, &vm, last).await.faults, []);
    until_hashed(&host, &vm, last).await;
    let now = verify(&host, &vm, last).await;
    assert_eq!((now.faults.as_slice(), now.first_hashed), (&[][..], 0));
    let there =
        |directory: &str| fs::read_dir(host.vm_directory(&vm.id).join(directory)).expect("list").count();
    assert!(there("hashes") <= there("layers"), "hashes go with their layers");
    // Deleted in the middle: it is not there, and that is no verdict.
    let id = host.put(&vm.id, TaskSpec::VerifySnapshot { snapshot: last.clone() });
    host.task(&vm.id, TaskSpec::DeleteSnapshot { snapshot: last.clone() }).await.expect("deleted");
    match host.wait(&id).await {
        Ok(TaskOutput::Verified { facts }) => assert_eq!(facts.faults, [], "it was read before"),
        Err(problem) => assert_eq!(problem.code, berth_model::ProblemCode::NotFound, "{problem}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(probe.verify(LONG).expect("verified").files_wrong, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clone_without_a_network_comes_up_and_is_heard() {
    let host = TestHost::start().await;
    let vm = host.running_vm(128).await;
    host.probe(&vm.id).write(3).expect("files");
    let taken = take(&host, &vm).await;
    for first in [Some(snapshot()), None] {
        let mut definition = host::definition(128);
        definition.image = vm.definition.image.clone();
        definition.spec.image = vm.definition.spec.image.clone();
        definition.spec.isolated = true;
        let id = definition.id.clone();
        let spec = TaskSpec::CloneVm {
            definition: Box::new(definition),
            origin: vm.id.clone(),
            snapshot: taken.clone(),
            first_snapshot: first,
            share: true,
            paused: false,
        };
        host.task(&id, spec).await.expect("cloned");
        let ready = host.task(&id, TaskSpec::WaitReady { timeout_ms: 120_000 }).await.expect("ready");
        println!("{ready:?}");
        let report = host.agent.services().board.vm(&id).expect("report");
        assert!(report.forwards.is_empty(), "nobody gets in: {report:?}");
        let pid = host.pid(&id).expect("a process");
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).expect("line");
        assert!(line.contains("restrict=on") && !line.contains("hostfwd"), "{line}");
        let delete = TaskSpec::DeleteVm { pool: "local".parse().expect("name"), keep_files: false };
        host.task(&id, delete).await.expect("deleted");
    }
    assert_eq!(host.probe(&vm.id).verify(LONG).expect("verified").files_wrong, 0);
}
