//! Restores on a real QEMU: a process made ready beforehand, and what a guest is owed after it.

#[path = "snapshot/host.rs"]
#[allow(dead_code, reason = "each test program uses a part of it")]
mod host;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use berth_api::agent::{NextRestore, TaskOutput, TaskSpec};
use berth_model::snapshot::{ClockSetting, RestoreFacts};
use berth_model::vm::VmState;
use berth_model::{LayerId, SnapshotId};
use guest_probe::client::ProbeClient;
use host::{LONG, TestHost, TestVm, layer, snapshot};

async fn take(host: &TestHost, vm: &TestVm, snapshot: &SnapshotId, next: Option<NextRestore>) {
    let spec =
        TaskSpec::TakeSnapshot { snapshot: snapshot.clone(), new_top: layer(), next: next.map(Box::new) };
    host.task(&vm.id, spec).await.expect("taken");
}

async fn restore(
    host: &TestHost,
    vm: &TestVm,
    snapshot: &SnapshotId,
    new_top: LayerId,
    paused: bool,
) -> RestoreFacts {
    let spec =
        TaskSpec::RestoreSnapshot { definition: vm.boxed(), snapshot: snapshot.clone(), new_top, paused };
    match host.task(&vm.id, spec).await.expect("restored") {
        TaskOutput::Restored { facts } => facts,
        other => panic!("{other:?}"),
    }
}

fn next(vm: &TestVm, snapshot: &SnapshotId) -> NextRestore {
    NextRestore { definition: vm.definition.clone(), snapshot: snapshot.clone(), new_top: layer() }
}

/// The run directories of the processes that carry a VM's mark and have not ended.
fn processes(host: &TestHost, vm: &TestVm) -> Vec<PathBuf> {
    let mark = format!("BERTH_RUN={}", host.root().join("run").join(vm.id.as_str()).display());
    let all = std::fs::read_dir("/proc").expect("processes").flatten();
    let environments = all.filter_map(|one| std::fs::read(one.path().join("environ")).ok());
    let marked = environments.filter_map(|environment| {
        let variable = environment.split(|&byte| byte == 0).find(|one| one.starts_with(mark.as_bytes()))?;
        let path = String::from_utf8_lossy(variable).into_owned();
        Some(PathBuf::from(path.strip_prefix("BERTH_RUN=")?))
    });
    marked.collect()
}

async fn until_one_process(host: &TestHost, vm: &TestVm) -> PathBuf {
    let looked = async {
        loop {
            let found = processes(host, vm);
            if found.len() == 1 {
                return found[0].clone();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(LONG, looked).await.expect("the other one ends")
}

fn is_unharmed(probe: &ProbeClient, files: u64) {
    let found = probe.verify(LONG).expect("verified");
    assert_eq!((found.pages_wrong, found.files, found.files_wrong), (0, files, 0));
    assert!(found.pages > 0);
}

fn layer_files(host: &TestHost, vm: &TestVm) -> usize {
    std::fs::read_dir(host.vm_directory(&vm.id).join("layers")).expect("layers").count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_was_made_ready_takes_over_and_is_a_process_like_any_other() {
    let mut host = TestHost::start().await;
    let vm = host.running_vm(256).await;
    host.probe(&vm.id).write(4).expect("files");
    let ports = host.probe_address(&vm.id);
    let first = snapshot();
    take(&host, &vm, &first, None).await;
    host.probe(&vm.id).write(3).expect("more files");

    let undo = snapshot();
    let next = next(&vm, &first);
    take(&host, &vm, &undo, Some(next.clone())).await;
    assert_eq!(processes(&host, &vm).len(), 2, "one runs, one is ready");
    let warm = restore(&host, &vm, &first, next.new_top, false).await;
    println!("with a process that was ready: {warm:?}");
    assert!(warm.warm_process && warm.pages_faulted > 0, "{warm:?}");
    let directory = until_one_process(&host, &vm).await;
    assert_ne!(directory, host.root().join("run").join(vm.id.as_str()), "it has one of its own");
    assert_eq!(host.probe_address(&vm.id), ports, "it is reached where the one before was");
    is_unharmed(&host.probe(&vm.id), 4);

    // An agent that starts finds it, and it can be taken, restored, held and stopped as before.
    host.replace_agent().await;
    assert_eq!(host.state(&vm.id), Some(VmState::Running));
    let second = snapshot();
    take(&host, &vm, &second, None).await;
    let cold = restore(&host, &vm, &undo, layer(), false).await;
    println!("without: {cold:?}");
    assert!(!cold.warm_process);
    is_unharmed(&host.probe(&vm.id), 7);
    let delete = TaskSpec::DeleteSnapshot { snapshot: undo };
    host.task(&vm.id, delete).await.expect("deleted, though its memory is mapped");
    is_unharmed(&host.probe(&vm.id), 7);
    restore(&host, &vm, &second, layer(), false).await;
    is_unharmed(&host.probe(&vm.id), 4);
    host.task(&vm.id, TaskSpec::StopVm).await.expect("stopped");
    assert_eq!(processes(&host, &vm).len(), 0);
    host.task(&vm.id, TaskSpec::StartVm { definition: vm.boxed() }).await.expect("started");
    host.task(&vm.id, TaskSpec::WaitReady { timeout_ms: 120_000 }).await.expect("ready");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_was_made_ready_in_vain_leaves_nothing() {
    let mut host = TestHost::start().await;
    let vm = host.running_vm(128).await;
    let (first, second) = (snapshot(), snapshot());
    take(&host, &vm, &first, None).await;
    let files = layer_files(&host, &vm);

    // Something else is wanted.
    take(&host, &vm, &second, Some(next(&vm, &first))).await;
    assert_eq!(processes(&host, &vm).len(), 2);
    host.task(&vm.id, TaskSpec::PauseVm).await.expect("held");
    until_one_process(&host, &vm).await;
    assert_eq!(layer_files(&host, &vm), files + 1, "the second snapshot's, and no more");
    host.task(&vm.id, TaskSpec::ResumeVm).await.expect("goes on");

    // The agent dies.
    let third = snapshot();
    take(&host, &vm, &third, Some(next(&vm, &first))).await;
    assert_eq!(processes(&host, &vm).len(), 2);
    host.replace_agent().await;
    until_one_process(&host, &vm).await;
    assert_eq!(host.state(&vm.id), Some(VmState::Running));
    host.probe(&vm.id).tick().expect("the guest has noticed nothing");

    // It is killed itself: the restore does without.
    let (fourth, wanted) = (snapshot(), next(&vm, &first));
    take(&host, &vm, &fourth, Some(wanted.clone())).await;
    let own = host.pid(&vm.id).expect("a process");
    for pid in pids(&host, &vm).into_iter().filter(|&pid| pid != own) {
        host::kill(pid);
    }
    let facts = restore(&host, &vm, &first, wanted.new_top, false).await;
    assert!(!facts.warm_process);
    host.probe(&vm.id).tick().expect("it is back");
}

fn pids(host: &TestHost, vm: &TestVm) -> Vec<i32> {
    let mark = format!("BERTH_RUN={}", host.root().join("run").join(vm.id.as_str()).display());
    let all = std::fs::read_dir("/proc").expect("processes").flatten();
    let ours = all.filter(|one| {
        std::fs::read(one.path().join("environ"))
            .is_ok_and(|text| text.windows(mark.len()).any(|part| part == mark.as_bytes()))
    });
    ours.filter_map(|one| one.file_name().to_str()?.parse().ok()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_is_to_be_held_is_there_and_goes_on_when_it_is_told_to() {
    let host = TestHost::start().await;
    let vm = host.running_vm(128).await;
    let first = snapshot();
    take(&host, &vm, &first, None).await;
    let facts = restore(&host, &vm, &first, layer(), true).await;
    assert_eq!(facts.clock, ClockSetting::Held);
    assert_eq!(host.state(&vm.id), Some(VmState::Paused));
    assert!(host.probe(&vm.id).tick().is_err(), "it does not run");
    // It may be taken as it stands, and be put back to that.
    let second = snapshot();
    take(&host, &vm, &second, None).await;
    restore(&host, &vm, &second, layer(), false).await;
    assert_eq!(host.state(&vm.id), Some(VmState::Paused), "it was held when it was taken");
    host.task(&vm.id, TaskSpec::ResumeVm).await.expect("goes on");
    is_unharmed(&host.probe(&vm.id), 0);
}

/// The guest's clock, asked of its agent, in seconds since the epoch.
fn guest_time(run_dir: &Path) -> Option<u64> {
    let stream = UnixStream::connect(run_dir.join("guest-agent.sock")).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    (&stream).write_all(b"{\"execute\":\"guest-get-time\"}\n").ok()?;
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line).ok()?;
    let answer: serde_json::Value = serde_json::from_str(&line).ok()?;
    Some(answer["return"].as_u64()? / 1_000_000_000)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restored_guest_is_told_the_time_and_what_it_needed_first_is_remembered() {
    let host = TestHost::start().await;
    let vm = host.running_vm(128).await;
    let first = snapshot();
    take(&host, &vm, &first, None).await;
    // A clock that is not set would be behind by this much.
    tokio::time::sleep(Duration::from_secs(20)).await;
    let facts = restore(&host, &vm, &first, layer(), false).await;
    println!("restored: {facts:?}");
    assert_eq!(facts.working_set_bytes, 0, "nobody knows yet what it needs");
    let run_dir = until_one_process(&host, &vm).await;
    let right = async {
        loop {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
            match guest_time(&run_dir) {
                Some(time) if now.abs_diff(time) <= 3 => return,
                other => println!("the guest says {other:?}, and it is {now}"),
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    };
    tokio::time::timeout(LONG, right).await.expect("its clock is set");
    let list = host.vm_directory(&vm.id).join("snapshots").join(first.as_str()).join("working-set.bin");
    let remembered = async {
        while !list.exists() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(LONG, remembered).await.expect("remembered");
    let facts = restore(&host, &vm, &first, layer(), false).await;
    println!("with what is known: {facts:?}");
    assert!(facts.working_set_bytes > 0);
    host.probe(&vm.id).tick().expect("it runs");
}
