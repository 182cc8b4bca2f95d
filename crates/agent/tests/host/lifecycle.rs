//! A VM's life on a real QEMU, without a guest: SeaBIOS alone.

use berth_api::agent::{PutTask, TaskOutput, TaskSpec};
use berth_model::ProblemCode;
use berth_model::vm::{GuestState, VmState};

use crate::support::Host;

fn prepare(definition: &berth_api::agent::VmDefinition) -> TaskSpec {
    TaskSpec::PrepareVm { definition: Box::new(definition.clone()) }
}

fn start(definition: &berth_api::agent::VmDefinition) -> TaskSpec {
    TaskSpec::StartVm { definition: Box::new(definition.clone()) }
}

fn delete() -> TaskSpec {
    TaskSpec::DeleteVm { pool: "local".parse().expect("name"), keep_files: false }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_lives_through_every_plain_task_and_leaves_nothing() {
    let host = Host::start().await;
    let definition = host.vm_on_a_blank_disk(1).await;
    let vm = &definition.id;
    // Each one twice: a task that is done already is done.
    for _ in 0..2 {
        host.task(vm, prepare(&definition)).await.expect("prepared");
    }
    assert_eq!(host.report(vm).await.expect("known").state, VmState::Stopped);
    for _ in 0..2 {
        host.task(vm, start(&definition)).await.expect("started");
        assert_eq!(host.report(vm).await.expect("known").state, VmState::Running);
    }
    for _ in 0..2 {
        host.task(vm, TaskSpec::PauseVm).await.expect("paused");
        assert_eq!(host.report(vm).await.expect("known").state, VmState::Paused);
    }
    for _ in 0..2 {
        host.task(vm, TaskSpec::ResumeVm).await.expect("resumed");
        assert_eq!(host.report(vm).await.expect("known").state, VmState::Running);
    }
    host.task(vm, TaskSpec::RestartVm).await.expect("restarted");
    let report = host.until(vm, |report| report.state == VmState::Running).await;
    assert_eq!(report.guest, GuestState::Booting);
    for _ in 0..2 {
        host.task(vm, TaskSpec::StopVm).await.expect("stopped");
        let report = host.report(vm).await.expect("known");
        assert_eq!((report.state, report.guest, report.trouble), (VmState::Stopped, GuestState::Off, None));
    }
    host.task(vm, start(&definition)).await.expect("started again");
    for _ in 0..2 {
        host.task(vm, delete()).await.expect("deleted");
        assert_eq!(host.report(vm).await, None);
    }
    for directory in ["state/vms", "run", "pool/vms"] {
        assert_eq!(host.files(directory), Vec::<String>::new());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_has_its_own_user_no_rights_and_no_listener() {
    let host = Host::start().await;
    let definition = host.vm_on_a_blank_disk(1).await;
    host.task(&definition.id, prepare(&definition)).await.expect("prepared");
    host.task(&definition.id, start(&definition)).await.expect("started");
    let mark = [b"BERTH_RUN=", host.root.path().as_os_str().as_encoded_bytes()].concat();
    let pids = berth_agent::launcher::process::proc::with_environment(&mark);
    let [pid] = pids[..] else { panic!("one process: {pids:?}") };
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    for line in ["CapEff:\t0000000000000000", "CapPrm:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(status.contains(line), "{line} is not in {status}");
    }
    if host.agent().services().isolated_users {
        assert!(status.contains("Uid:\t2000001\t2000001\t2000001\t2000001"), "{status}");
        assert!(status.contains("CapBnd:\t0000000000000000"), "{status}");
    }
    let mut inodes = std::collections::BTreeSet::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).expect("files").flatten() {
        let link = std::fs::read_link(entry.path()).unwrap_or_default().display().to_string();
        inodes.extend(link.strip_prefix("socket:[").map(|rest| rest.trim_end_matches(']').to_owned()));
    }
    for table in ["tcp", "tcp6", "udp", "udp6"] {
        let table = std::fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
        for line in table.lines().skip(1) {
            let inode = line.split_whitespace().nth(9).unwrap_or_default();
            assert!(!inodes.contains(inode), "QEMU has a network socket: {line}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_starts_anew_finds_its_vms_as_they_are() {
    let mut host = Host::start().await;
    let (running, paused) = (host.vm_on_a_blank_disk(1).await, host.vm_on_a_blank_disk(2).await);
    for definition in [&running, &paused] {
        host.task(&definition.id, prepare(definition)).await.expect("prepared");
        host.task(&definition.id, start(definition)).await.expect("started");
    }
    host.task(&paused.id, TaskSpec::PauseVm).await.expect("paused");
    host.stop_agent();
    host.start_agent().await;
    assert_eq!(host.report(&running.id).await.expect("known").state, VmState::Running);
    assert_eq!(host.report(&paused.id).await.expect("known").state, VmState::Paused);
    host.task(&paused.id, TaskSpec::ResumeVm).await.expect("resumed");
    host.task(&running.id, TaskSpec::StopVm).await.expect("stopped");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_vm_is_reported_whatever_became_of_its_pool() {
    let mut host = Host::start().await;
    let definition = host.vm_on_a_blank_disk(1).await;
    let vm = &definition.id;
    host.task(vm, prepare(&definition)).await.expect("prepared");
    host.task(vm, start(&definition)).await.expect("started");
    host.stop_agent();
    let mut config = crate::support::config(host.root.path());
    config.pools[0].name = "other".parse().expect("name");
    let refused = crate::support::start_agent(host.id.clone(), config, host.peers.clone()).await;
    let refused = refused.err().expect("its pool is not configured").to_string();
    assert!(refused.contains("'local'"), "{refused}");
    std::fs::write(host.pool().join("vms").join(vm.as_str()).join("vm.json"), "torn").expect("torn");
    host.start_agent().await;
    assert_eq!(host.report(vm).await.expect("known").state, VmState::Running);
    host.task(vm, TaskSpec::StopVm).await.expect("stopped");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_qemu_that_dies_is_reported_with_its_last_words_and_can_be_started_again() {
    let host = Host::start().await;
    let definition = host.vm_on_a_blank_disk(1).await;
    let vm = &definition.id;
    host.task(vm, prepare(&definition)).await.expect("prepared");
    host.task(vm, start(&definition)).await.expect("started");
    let mark = [b"BERTH_RUN=", host.root.path().as_os_str().as_encoded_bytes()].concat();
    for pid in berth_agent::launcher::process::proc::with_environment(&mark) {
        let pid = rustix::process::Pid::from_raw(pid).expect("number");
        rustix::process::kill_process(pid, rustix::process::Signal::SEGV).expect("killed");
    }
    let report = host.until(vm, |report| report.state == VmState::Stopped && report.trouble.is_some()).await;
    let trouble = report.trouble.unwrap_or_default();
    assert!(trouble.contains("signal 11"), "{trouble}");
    host.task(vm, start(&definition)).await.expect("started again");
    assert_eq!(host.report(vm).await.expect("known").trouble, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_qemu_that_dies_at_its_start_says_why_in_the_error() {
    let host = Host::start().await;
    let mut definition = host.vm_on_a_blank_disk(1).await;
    definition.spec.machine_type = "pc-q35-99.9".into();
    let vm = &definition.id;
    host.task(vm, prepare(&definition)).await.expect("prepared");
    let problem = host.task(vm, start(&definition)).await.expect_err("no such machine");
    assert_eq!(problem.code, ProblemCode::Hypervisor);
    assert!(problem.message.contains("unsupported machine type"), "{problem}");
    assert_eq!(host.report(vm).await.expect("known").state, VmState::Stopped);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_never_gets_ready_says_what_was_waited_for() {
    let host = Host::start().await;
    let definition = host.vm_on_a_blank_disk(1).await;
    let vm = &definition.id;
    host.task(vm, prepare(&definition)).await.expect("prepared");
    host.task(vm, start(&definition)).await.expect("started");
    let problem = host.task(vm, TaskSpec::WaitReady { timeout_ms: 200 }).await.expect_err("never");
    assert_eq!(problem.code, ProblemCode::Guest);
    assert!(problem.message.contains("dev.berth.probe"), "{problem}");
    let problem = host.task(vm, TaskSpec::ShutdownVm { timeout_ms: 200 }).await.expect_err("never");
    assert_eq!(problem.code, ProblemCode::Guest);
    host.task(vm, TaskSpec::StopVm).await.expect("stopped");
    let problem = host.task(vm, TaskSpec::WaitReady { timeout_ms: 60_000 }).await.expect_err("stopped");
    assert!(problem.message.contains("not running"), "{problem}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn older_commands_and_nonsense_are_refused() {
    let host = Host::start().await;
    let definition = host.vm_on_a_blank_disk(1).await;
    let vm = &definition.id;
    host.task_of(Some(vm), 5, prepare(&definition)).await.expect("prepared");
    let problem = host.task_of(Some(vm), 4, start(&definition)).await.expect_err("older");
    assert_eq!((problem.code, problem.field.as_deref()), (ProblemCode::WrongState, Some("generation")));
    let problem = host.task_of(None, 5, TaskSpec::StopVm).await.expect_err("no VM");
    assert_eq!(problem.field.as_deref(), Some("vm"));
    let mut other = definition.clone();
    other.id = berth_model::VmId::from_entropy([7; 10]);
    let problem = host.task_of(Some(vm), 5, start(&other)).await.expect_err("other VM");
    assert_eq!(problem.field.as_deref(), Some("definition.id"));
    let problem = host.task_of(Some(&other.id), 1, start(&other)).await.expect_err("not prepared");
    assert_eq!(problem.code, ProblemCode::WrongState);
    let mut small = host.vm_on_a_blank_disk(3).await;
    small.image.parts[0].virtual_size_bytes = Some(1 << 40);
    let problem = host.task(&small.id, prepare(&small)).await.expect_err("too small");
    assert_eq!(problem.field.as_deref(), Some("disk_mib"));
    let mut missing = host.vm_on_a_blank_disk(4).await;
    missing.image.id = berth_model::ImageId::from_entropy([8; 10]);
    let problem = host.task(&missing.id, prepare(&missing)).await.expect_err("no image");
    assert_eq!(problem.code, ProblemCode::WrongState);
    assert_eq!(host.files("pool/vms").len(), 3, "only the VM that was prepared");
    for vm in [&small.id, &missing.id] {
        assert_eq!(host.report(vm).await, None);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_is_put_twice_runs_once_and_one_that_is_cancelled_stops() {
    let host = Host::start().await;
    let definition = host.vm_on_a_blank_disk(1).await;
    let vm = &definition.id;
    host.task(vm, prepare(&definition)).await.expect("prepared");
    host.task(vm, start(&definition)).await.expect("started");
    let put =
        PutTask { vm: Some(vm.clone()), generation: 1, spec: TaskSpec::WaitReady { timeout_ms: 60_000 } };
    host.agent().put_task("wait", put.clone()).expect("put");
    host.agent().put_task("wait", put).expect("put again");
    assert_eq!(host.agent().tasks().running(), 1);
    host.agent().tasks().cancel("wait").expect("cancelled");
    let task = host.agent().tasks().show("wait", Some(1), crate::support::DEADLINE).await.expect("task");
    let task = match task.state {
        berth_api::agent::TaskState::Running { .. } => host
            .agent()
            .tasks()
            .show("wait", Some(task.version), crate::support::DEADLINE)
            .await
            .expect("task"),
        _ => task,
    };
    let berth_api::agent::TaskState::Failed { problem } = task.state else { panic!("{task:?}") };
    assert_eq!(problem.code, ProblemCode::Cancelled);
    assert_eq!(host.task(vm, TaskSpec::StopVm).await.expect("stopped"), TaskOutput::Done);
}
