//! The power goes while a snapshot is taken, restored, deleted or merged: what nobody had brought to the disk is gone, and
//! what is there afterwards is a VM that starts, with all that its guest was told is safe, and snapshots that are whole.
//!
//! The host's files are on a file system of their own in a file. A process of the agent's is killed on it, and its QEMUs; then that file
//! is copied, as the power's going would leave the disk, and the copy takes its place: what the kernel held and had not
//! written is in the file system that was there before, and gone. Needs root.

#[path = "snapshot/host.rs"]
#[allow(dead_code, reason = "each test program uses a part of it")]
mod host;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use berth_agent::launcher::process::proc;
use berth_api::agent::{TaskOutput, TaskSpec, VmDefinition};
use berth_model::{HostId, SnapshotId, VmId};
use guest_probe::memory::{Rewrite, Settings};
use host::{LONG, TestHost, TestVm, definition, directory, layer, open_directory, snapshot};
use serde::{Deserialize, Serialize};

/// Where the child process finds what it is to do.
const DEED: &str = "BERTH_TEST_POWER_CUT";
/// What it says when it begins.
const BEGUN: &str = "the deed is begun";
const DISK_MIB: u64 = 1536;
const BUSY: Settings = Settings { memory_mib: 24, rate_mib_s: 20, hot_mib: 0, rewrite: Rewrite::Whole };

/// What is being done when the power goes.
#[derive(Clone, Serialize, Deserialize)]
struct Deed {
    /// Where the host's files are.
    root: PathBuf,
    definition: VmDefinition,
    /// The snapshot that it is put back to before.
    origin: SnapshotId,
    /// How many files it has there.
    origin_files: u64,
    spec: TaskSpec,
}

fn host_id() -> HostId {
    HostId::from_entropy([8; 10])
}

fn restore(definition: &VmDefinition, origin: &SnapshotId) -> TaskSpec {
    let (definition, snapshot) = (Box::new(definition.clone()), origin.clone());
    TaskSpec::RestoreSnapshot { definition, snapshot, new_top: layer(), paused: false }
}

/// Not a test of its own: the process that dies.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_process_that_dies() {
    let Some(deed) = std::env::var_os(DEED) else { return };
    let deed: Deed = serde_json::from_slice(&std::fs::read(deed).expect("read")).expect("a deed");
    let host = TestHost::start_at(&deed.root, host_id()).await;
    let vm = deed.definition.id.clone();
    host.task(&vm, restore(&deed.definition, &deed.origin)).await.expect("put back");
    host.probe(&vm).set(BUSY, LONG).expect("busy");
    let written = host.probe(&vm).write(2).expect("files that are safe");
    assert_eq!(written, deed.origin_files + 2);
    println!("\n{BEGUN}");
    let done = host.task(&vm, deed.spec).await;
    println!("done: {done:?}");
    // Until it is killed, with what goes on in the background.
    tokio::time::sleep(LONG).await;
}

/// A file system in a file, mounted.
struct Disk {
    files: tempfile::TempDir,
    mount: tempfile::TempDir,
    copies: u32,
}

fn run(program: &str, words: &[&str]) -> bool {
    Command::new(program).args(words).stdout(Stdio::null()).status().is_ok_and(|status| status.success())
}

impl Disk {
    /// None where no file system can be mounted.
    fn make() -> Option<Self> {
        let disk = Self { files: directory(), mount: directory(), copies: 0 };
        let file = disk.file();
        std::fs::File::create(&file).expect("a file").set_len(DISK_MIB << 20).expect("long");
        assert!(run("mkfs.ext4", &["-q", "-F", file.to_str().expect("text")]));
        if disk.mount() {
            return Some(disk);
        }
        println!("no file system can be mounted here: not tried");
        None
    }

    fn file(&self) -> PathBuf {
        self.files.path().join(format!("disk-{}", self.copies))
    }

    fn root(&self) -> PathBuf {
        self.mount.path().join("host")
    }

    /// The journal is written by itself only every five minutes: only what is waited for is on the disk before.
    fn mount(&self) -> bool {
        let [file, mount] = [self.file(), self.mount.path().to_owned()];
        let [file, mount] = [&file, &mount].map(|path| path.to_str().expect("text"));
        let mounted = run("mount", &["-o", "loop,commit=300", file, mount]);
        if mounted {
            open_directory(self.mount.path());
        }
        mounted
    }

    fn unmount(&self) {
        run("umount", &["-l", self.mount.path().to_str().expect("text")]);
    }

    /// What is not on the disk is gone.
    fn lose_power(&mut self) {
        let before = self.file();
        self.copies += 1;
        let [from, to] = [&before, &self.file()].map(|path| path.to_str().expect("text").to_owned());
        assert!(run("cp", &["--sparse=always", &from, &to]), "copied");
        self.unmount();
        std::fs::remove_file(before).expect("removed");
        assert!(self.mount(), "the file system mends itself");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.unmount();
    }
}

/// Kills the agent's process and all QEMUs of its.
fn kill(mut agent: Child, root: &Path) {
    agent.kill().expect("killed");
    agent.wait().expect("gone");
    let mark = [b"BERTH_RUN=", root.as_os_str().as_encoded_bytes()].concat();
    let began = Instant::now();
    loop {
        let alive = proc::with_environment(&mark);
        if alive.is_empty() {
            return;
        }
        assert!(began.elapsed() < LONG, "{alive:?} do not end");
        alive.into_iter().for_each(host::kill);
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Has the deed done in a process of its own, and kills it so long after it has begun.
fn cut(deed: &Deed, after: Duration) {
    let path = deed.root.parent().expect("the mount").join("deed.json");
    std::fs::write(&path, serde_json::to_vec(deed).expect("JSON")).expect("written");
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "the_process_that_dies", "--nocapture"])
        .env(DEED, &path)
        .stdout(Stdio::piped())
        .spawn()
        .expect("spawned");
    let lines = BufReader::new(child.stdout.take().expect("its words")).lines();
    let mut lines = lines.map_while(Result::ok).inspect(|line| println!("  {line}"));
    assert!(lines.any(|line| line == BEGUN), "it never begins");
    std::thread::sleep(after);
    kill(child, &deed.root);
}

/// A VM with a snapshot with memory and three of its disk, at rest.
async fn prepare(root: &Path) -> (TestVm, SnapshotId, u64, Vec<SnapshotId>) {
    let host = TestHost::start_at(root, host_id()).await;
    let vm = host.vm_of(definition(128)).await;
    let probe = host.probe(&vm.id);
    let mut files = probe.write(5).expect("files");
    let mut below = Vec::new();
    for _ in 0..3 {
        let id = snapshot();
        let spec = TaskSpec::TakeDiskSnapshot { snapshot: id.clone(), new_top: layer(), quiesce: false };
        host.task(&vm.id, spec).await.expect("taken");
        files = probe.write(2).expect("files");
        below.push(id);
    }
    let origin = snapshot();
    let spec = TaskSpec::TakeSnapshot { snapshot: origin.clone(), new_top: layer(), next: None };
    host.task(&vm.id, spec).await.expect("taken");
    (vm, origin, files, below)
}

/// What is there after the power has come back, and that everything goes on from it.
async fn check(deed: &Deed, when: &str) {
    let host = TestHost::start_at(&deed.root, host_id()).await;
    let vm = deed.definition.id.clone();
    host.until_stopped(&vm).await;
    all_whole(&host, &vm, when).await;
    // The manager asks again, with the same ids, before anybody else may have anything done with the VM.
    host.task(&vm, deed.spec.clone()).await.unwrap_or_else(|problem| panic!("{when}: again: {problem}"));
    all_whole(&host, &vm, when).await;
    let is_restored = matches!(deed.spec, TaskSpec::RestoreSnapshot { .. });
    if !is_restored {
        let start = TaskSpec::StartVm { definition: Box::new(deed.definition.clone()) };
        host.task(&vm, start).await.unwrap_or_else(|problem| panic!("{when}: it does not start: {problem}"));
        host.task(&vm, TaskSpec::WaitReady { timeout_ms: 120_000 }).await.expect("ready");
    }
    let found = host.probe(&vm).verify(LONG).expect("verified");
    assert_eq!((found.pages_wrong, found.files_wrong), (0, 0), "{when}: {found:?}");
    // A restore has put the VM back to before the last two.
    let safe = deed.origin_files + if is_restored { 0 } else { 2 };
    assert!(found.files >= safe, "{when}: {} of {safe} files that were safe", found.files);
    host.task(&vm, restore(&deed.definition, &deed.origin)).await.expect("put back");
    let found = host.probe(&vm).verify(LONG).expect("verified");
    let all = (found.pages_wrong, found.files_wrong, found.files);
    assert_eq!(all, (0, 0, deed.origin_files), "{when}");
    host.task(&vm, TaskSpec::StopVm).await.expect("stopped");
}

/// Every snapshot that is listed is what it was.
async fn all_whole(host: &TestHost, vm: &VmId, when: &str) {
    let listed = std::fs::read_dir(host.vm_directory(vm).join("snapshots")).expect("snapshots");
    for entry in listed.flatten().filter(|entry| entry.path().join("snapshot.json").exists()) {
        let id: SnapshotId = entry.file_name().to_str().expect("text").parse().expect("an id");
        match host.task(vm, TaskSpec::VerifySnapshot { snapshot: id.clone() }).await.expect("verified") {
            TaskOutput::Verified { facts } => assert_eq!(facts.faults, [], "{when}: {id}"),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whenever_the_power_goes_the_vm_starts_and_what_is_listed_is_whole() {
    let Some(mut disk) = Disk::make() else { return };
    let root = disk.root();
    std::fs::create_dir(&root).expect("made");
    open_directory(&root);
    let (vm, origin, origin_files, below) = prepare(&root).await;
    let spec = || TaskSpec::TakeSnapshot { snapshot: snapshot(), new_top: layer(), next: None };
    let mut deeds: Vec<(&str, TaskSpec, u64)> = Vec::new();
    deeds.extend([5, 150, 500].map(|ms| ("taking", spec(), ms)));
    deeds.extend([10, 100, 300].map(|ms| ("restoring", restore(&vm.definition, &origin), ms)));
    let unneeded = below.into_iter().map(|snapshot| TaskSpec::DeleteSnapshot { snapshot });
    deeds.extend(unneeded.zip([5, 60, 250]).map(|(spec, ms)| ("deleting and merging", spec, ms)));
    for (what, spec, ms) in deeds {
        let when = format!("{what}, {ms} ms");
        println!("{when}");
        let (origin, definition) = (origin.clone(), vm.definition.clone());
        let deed = Deed { root: root.clone(), definition, origin, origin_files, spec };
        cut(&deed, Duration::from_millis(ms));
        disk.lose_power();
        check(&deed, &when).await;
    }
}
