//! Migration between two real agents over real TLS, with real QEMUs: the VM runs exactly once afterwards, whatever broke
//! and when, and every page and file in it is right.

#[path = "snapshot/host.rs"]
#[allow(dead_code, reason = "each test program uses a part of it")]
mod host;
#[path = "migration/pair.rs"]
mod pair;
#[path = "snapshot/remembering.rs"]
#[allow(dead_code, reason = "each test program uses a part of it")]
mod remembering;

use std::sync::atomic::Ordering;
use std::time::Duration;

use berth_api::agent::{TaskOutput, TaskSpec, TaskState};
use berth_model::migration::MigrationReport;
use berth_model::vm::{Firmware, VmState};
use berth_model::{OperationId, Problem, ProblemCode};
use berth_qmp::{EventKind, Qmp};
use guest_probe::memory::{Rewrite, Settings};
use host::{LONG, TestVm, definition, entropy, layer, snapshot};
use pair::{Link, Pair};
use remembering::{Tpm, has_variable, write_variable};

const BUSY: Settings = Settings { memory_mib: 64, rate_mib_s: 20, hot_mib: 32, rewrite: Rewrite::Whole };

impl Pair {
    async fn admit(&self, vm: &TestVm, migration: &OperationId, shared_pool: bool) {
        self.target.take_image(&vm.definition.image).await;
        let spec = TaskSpec::AdmitMigration {
            migration: migration.clone(),
            definition: vm.boxed(),
            source: self.source.id.clone(),
            shared_pool,
            put_back: None,
        };
        self.target.task(&vm.id, spec).await.expect("admitted");
    }

    fn order(&self, migration: &OperationId, address: &str, shared_pool: bool) -> TaskSpec {
        TaskSpec::MoveVm {
            migration: migration.clone(),
            target: self.target.id.clone(),
            target_address: address.to_owned(),
            shared_pool,
            bandwidth_bytes_per_second: None,
            spare_layers: vec![layer(), layer(), layer()],
            put_back: false,
        }
    }

    async fn move_vm(&self, vm: &TestVm, shared_pool: bool) -> Result<MigrationReport, Problem> {
        let migration = OperationId::from_entropy(entropy());
        self.admit(vm, &migration, shared_pool).await;
        let order = self.order(&migration, &self.target_address.to_string(), shared_pool);
        match self.source.task(&vm.id, order).await? {
            TaskOutput::Moved { report, .. } => Ok(report),
            other => panic!("{other:?}"),
        }
    }

    async fn refuse(&self, vm: &TestVm, migration: &OperationId, shared_pool: bool) {
        let spec = TaskSpec::RefuseMigration { migration: migration.clone(), shared_pool };
        self.target.task(&vm.id, spec).await.expect("refused");
        assert_eq!(self.target.state(&vm.id), None, "nothing of it is on the target");
        if !shared_pool {
            assert!(!self.target.vm_directory(&vm.id).exists());
        }
    }
}

fn migration() -> OperationId {
    OperationId::from_entropy(entropy())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_moves_within_a_shared_pool_and_back() {
    let pair = Pair::with_shared_pool().await;
    let vm = pair.source.running_vm(256).await;
    let probe = pair.source.probe(&vm.id);
    probe.set(BUSY, LONG).expect("busy");
    probe.write(10).expect("files");
    let before = probe.tick().expect("tick");
    let report = pair.move_vm(&vm, true).await.expect("moved");
    println!("moved: {report:?}");
    assert!(report.blackout_us > 0 && report.blackout_us < 500_000, "{report:?}");
    assert_eq!(pair.target.state(&vm.id), Some(VmState::Running));
    assert_eq!(pair.source.state(&vm.id), Some(VmState::Stopped));
    let probe = pair.target.probe(&vm.id);
    assert_eq!(probe.tick().expect("tick").nonce, before.nonce);
    let found = probe.verify(LONG).expect("verified");
    assert_eq!((found.pages_wrong, found.files, found.files_wrong), (0, 10, 0));
    probe.write(5).expect("it can still write");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_machine_remembers_moves_with_it() {
    for shared in [true, false] {
        let pair = if shared { Pair::with_shared_pool().await } else { Pair::with_own_pools().await };
        let mut definition = definition(256);
        (definition.spec.firmware, definition.spec.tpm) = (Firmware::Uefi, true);
        let vm = pair.source.vm_of(definition).await;
        let id = pair.source.vm_directory(&vm.id).join("vm.json");
        let generation = |path| {
            let bytes = std::fs::read(path).expect("record");
            let record: serde_json::Value = serde_json::from_slice(&bytes).expect("JSON");
            record["fittings"]["generation_id"].as_str().expect("it has one").to_owned()
        };
        let before = generation(id);
        let tpm = Tpm { host: &pair.source, vm: &vm.id };
        tpm.define().await;
        tpm.write("first---").await;
        tpm.extend().await;
        write_variable(&pair.source, &vm.id, "first").await;
        let taken = snapshot();
        let spec = TaskSpec::TakeSnapshot { snapshot: taken.clone(), new_top: layer(), next: None };
        pair.source.task(&vm.id, spec).await.expect("snapshot");
        tpm.write("later---").await;
        write_variable(&pair.source, &vm.id, "later").await;
        println!("moved: {:?}", pair.move_vm(&vm, shared).await.expect("moved"));

        let tpm = Tpm { host: &pair.target, vm: &vm.id };
        assert!(tpm.holds("later---").await && tpm.is_extended().await, "shared: {shared}");
        assert!(has_variable(&pair.target, &vm.id, "later").await, "shared: {shared}");
        assert_eq!(generation(pair.target.vm_directory(&vm.id).join("vm.json")), before, "it lives on");
        tpm.write("there---").await;
        pair.target.task(&vm.id, TaskSpec::StopVm).await.expect("stopped");
        pair.target.task(&vm.id, TaskSpec::StartVm { definition: vm.boxed() }).await.expect("started");
        let ready = pair.target.task(&vm.id, TaskSpec::WaitReady { timeout_ms: 300_000 }).await;
        ready.expect("ready");
        assert!(tpm.holds("there---").await && has_variable(&pair.target, &vm.id, "later").await);
        let (definition, new_top) = (vm.boxed(), layer());
        let spec = TaskSpec::RestoreSnapshot { definition, snapshot: taken, new_top, paused: false };
        pair.target.task(&vm.id, spec).await.expect("restored");
        assert!(tpm.holds("first---").await && has_variable(&pair.target, &vm.id, "first").await);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_moves_between_pools_with_its_disk_and_snapshots() {
    let pair = Pair::with_own_pools().await;
    let vm = pair.source.running_vm(256).await;
    let probe = pair.source.probe(&vm.id);
    probe.write(20).expect("files");
    let taken = snapshot();
    let spec = TaskSpec::TakeSnapshot { snapshot: taken.clone(), new_top: layer(), next: None };
    pair.source.task(&vm.id, spec).await.expect("snapshot");
    probe.set(BUSY, LONG).expect("busy");
    probe.ask("write", "30 1024", LONG).expect("more files");
    let report = pair.move_vm(&vm, false).await.expect("moved");
    println!("moved: {report:?}");
    let probe = pair.target.probe(&vm.id);
    let found = probe.verify(LONG).expect("verified");
    assert_eq!((found.pages_wrong, found.files, found.files_wrong), (0, 50, 0));
    probe.write(5).expect("it can still write");
    let restored = TaskSpec::RestoreSnapshot {
        definition: vm.boxed(),
        snapshot: taken,
        new_top: layer(),
        paused: false,
    };
    pair.target.task(&vm.id, restored).await.expect("restored there");
    let found = pair.target.probe(&vm.id).verify(LONG).expect("verified");
    assert_eq!((found.pages_wrong, found.files, found.files_wrong), (0, 20, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_disks_of_a_guest_move_with_it() {
    for shared in [false, true] {
        let pair = if shared { Pair::with_shared_pool().await } else { Pair::with_own_pools().await };
        let mut definition = definition(256);
        definition.spec.data_disks_mib = vec![256, 128];
        let vm = pair.source.vm_of(definition).await;
        let probe = pair.source.probe(&vm.id);
        probe.write(9).expect("files");
        let taken = snapshot();
        let spec = TaskSpec::TakeSnapshot { snapshot: taken.clone(), new_top: layer(), next: None };
        pair.source.task(&vm.id, spec).await.expect("snapshot");
        probe.set(BUSY, LONG).expect("busy");
        // So much that the tops are frozen on the way, where they are copied.
        probe.ask("write", "30 1024", LONG).expect("more files");
        let writing = std::thread::spawn(move || drop(probe.write(200)));
        println!("moved: {:?}", pair.move_vm(&vm, shared).await.expect("moved"));
        writing.join().expect("asked");
        let verify = |files: u64| {
            let found = pair.target.probe(&vm.id).verify(LONG).expect("verified");
            assert_eq!(
                (found.pages_wrong, found.files, found.files_wrong),
                (0, files, 0),
                "shared: {shared}"
            );
        };
        verify(239);
        pair.target.probe(&vm.id).write(6).expect("it can still write");
        verify(245);
        pair.target.task(&vm.id, TaskSpec::StopVm).await.expect("stopped");
        pair.target.task(&vm.id, TaskSpec::StartVm { definition: vm.boxed() }).await.expect("started");
        let ready = pair.target.task(&vm.id, TaskSpec::WaitReady { timeout_ms: 300_000 }).await;
        ready.expect("ready");
        verify(245);
        let (definition, new_top) = (vm.boxed(), layer());
        let spec = TaskSpec::RestoreSnapshot { definition, snapshot: taken, new_top, paused: false };
        pair.target.task(&vm.id, spec).await.expect("restored there");
        verify(9);
    }
}

/// What is left to the manager when the source's task is over; gives whether the VM has moved.
async fn settle(
    pair: &Pair,
    vm: &TestVm,
    migration: &OperationId,
    result: Result<TaskOutput, Problem>,
) -> bool {
    let moved = match result {
        Ok(TaskOutput::Moved { .. }) => true,
        Ok(TaskOutput::HandedOver { .. }) => {
            let spec = TaskSpec::TakeOver { migration: migration.clone() };
            pair.target.task(&vm.id, spec).await.expect("taken over");
            true
        }
        Ok(other) => panic!("{other:?}"),
        Err(_) => {
            pair.refuse(vm, migration, false).await;
            false
        }
    };
    let (here, there) = if moved { (&pair.target, &pair.source) } else { (&pair.source, &pair.target) };
    assert_eq!(here.state(&vm.id), Some(VmState::Running));
    assert!(matches!(there.state(&vm.id), None | Some(VmState::Stopped | VmState::Paused)));
    let found = here.probe(&vm.id).verify(LONG).expect("verified");
    assert_eq!((found.pages_wrong, found.files_wrong), (0, 0));
    moved
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_breaks_anywhere_leaves_the_guest_running_exactly_once() {
    let pair = Pair::with_own_pools().await;
    let vm = pair.source.running_vm(128).await;
    let probe = pair.source.probe(&vm.id);
    probe.set(Settings { memory_mib: 16, rate_mib_s: 4, hot_mib: 8, ..BUSY }, LONG).expect("busy");
    probe.write(10).expect("files");
    let mut bytes_max = 1000;
    loop {
        let link = Link::to(pair.target_address, bytes_max).await;
        let migration = migration();
        pair.admit(&vm, &migration, false).await;
        let result = pair.source.task(&vm.id, pair.order(&migration, &link.address.to_string(), false)).await;
        let carried = link.carried.load(Ordering::Relaxed);
        println!("{bytes_max}: {:?}", result.as_ref().map(|_| "moved").map_err(|problem| &problem.message));
        if settle(&pair, &vm, &migration, result).await {
            break;
        }
        assert!(carried > bytes_max, "it failed before the link broke");
        // Steps that grow, and become small near the end, which is where it gets delicate.
        bytes_max += (bytes_max / 3).clamp(20_000, 6_000_000);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_breaks_while_the_guest_stands_still_leaves_it_running_exactly_once() {
    let pair = Pair::with_own_pools().await;
    let vm = pair.source.running_vm(128).await;
    pair.source.probe(&vm.id).write(10).expect("files");
    let observed = pair.source.root().join("run").join(vm.id.as_str()).join("observe.sock");
    let qmp = Qmp::connect(observed).await.expect("monitor");
    for delay_us in (0..).step_by(700) {
        let link = Link::to(pair.target_address, u64::MAX).await;
        let migration = migration();
        pair.admit(&vm, &migration, false).await;
        let mut events = qmp.events();
        let task = pair.source.put(&vm.id, pair.order(&migration, &link.address.to_string(), false));
        events.wait_for(|kind| *kind == EventKind::Stop).await.expect("stopped");
        tokio::time::sleep(Duration::from_micros(delay_us)).await;
        link.cut.cancel();
        let result = pair.source.wait(&task).await;
        println!("{delay_us}: {result:?}");
        if settle(&pair, &vm, &migration, result).await {
            break;
        }
    }
}

/// A migration that is slow enough to be disturbed while memory goes over.
async fn slow(pair: &Pair, vm: &TestVm, migration: &OperationId, address: &str, mib_s: u64) -> String {
    pair.admit(vm, migration, false).await;
    let TaskSpec::MoveVm { target, target_address, spare_layers, .. } = pair.order(migration, address, false)
    else {
        panic!("an order");
    };
    let spec = TaskSpec::MoveVm {
        migration: migration.clone(),
        target,
        target_address,
        shared_pool: false,
        bandwidth_bytes_per_second: Some(mib_s << 20),
        spare_layers,
        put_back: false,
    };
    let task = pair.source.put(&vm.id, spec);
    let mut after = 0;
    loop {
        let shown = pair.source.agent.tasks().show(&task, Some(after), LONG).await.expect("task");
        after = shown.version;
        match shown.state {
            TaskState::Running { progress } if progress.phase == "warm-up" && progress.round > 0 => {
                return task;
            }
            TaskState::Running { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancelling_or_killing_in_the_warm_up_leaves_the_guest_where_it_is() {
    let mut pair = Pair::with_own_pools().await;
    let vm = pair.source.running_vm(128).await;
    pair.source.probe(&vm.id).write(10).expect("files");
    let address = pair.target_address.to_string();

    let cancelled = migration();
    let task = slow(&pair, &vm, &cancelled, &address, 4).await;
    pair.source.agent.tasks().cancel(&task).expect("cancelled");
    let result = pair.source.wait(&task).await;
    assert_eq!(result.as_ref().expect_err("cancelled").code, ProblemCode::Cancelled);
    assert!(!settle(&pair, &vm, &cancelled, result).await);

    let killed = migration();
    let task = slow(&pair, &vm, &killed, &address, 4).await;
    host::kill(pair.target.pid(&vm.id).expect("a process that waits"));
    let result = pair.source.wait(&task).await;
    let problem = result.as_ref().expect_err("killed");
    assert_eq!(problem.code, ProblemCode::Hypervisor, "{problem:?}");
    assert!(!settle(&pair, &vm, &killed, result).await);

    let cut = migration();
    let link = Link::to(pair.target_address, u64::MAX).await;
    let task = slow(&pair, &vm, &cut, &link.address.to_string(), 4).await;
    link.cut.cancel();
    let result = pair.source.wait(&task).await;
    assert_eq!(result.as_ref().expect_err("cut").code, ProblemCode::Unreachable);
    assert!(!settle(&pair, &vm, &cut, result).await);

    let orphaned = migration();
    slow(&pair, &vm, &orphaned, &address, 4).await;
    pair.source.replace_agent().await;
    assert_eq!(pair.source.state(&vm.id), Some(VmState::Running));
    let lost = Err(Problem::new(ProblemCode::Unreachable, "the agent died"));
    assert!(!settle(&pair, &vm, &orphaned, lost).await);
    pair.move_vm(&vm, false).await.expect("and in the end it moves");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_ran_on_a_target_that_died_belongs_there_and_is_never_thrown_away() {
    let mut pair = Pair::with_own_pools().await;
    for agent_dies in [false, true] {
        let vm = pair.source.running_vm(128).await;
        let migration = migration();
        let task = slow(&pair, &vm, &migration, &pair.target_address.to_string(), 12).await;
        let observed = pair.target.root().join("run").join(vm.id.as_str()).join("observe.sock");
        let qmp = Qmp::connect(observed).await.expect("monitor");
        let process = pair.target.pid(&vm.id).expect("a process that waits");
        let mut events = qmp.events();
        events.wait_for(|kind| *kind == EventKind::Resume).await.expect("it runs");
        host::kill(process);
        if agent_dies {
            pair.target.replace_agent().await;
        }
        let given_away = pair.source.wait(&task).await.expect("given away");
        assert!(matches!(given_away, TaskOutput::Moved { .. } | TaskOutput::HandedOver { .. }));
        // What a manager says that was told nothing: the first is refused if the target has seen to it by itself.
        let taken = TaskSpec::TakeOver { migration: migration.clone() };
        println!("agent dies: {agent_dies}: {given_away:?}, {:?}", pair.target.task(&vm.id, taken).await);
        let refused = TaskSpec::RefuseMigration { migration, shared_pool: false };
        println!("{:?}", pair.target.task(&vm.id, refused).await);
        pair.target.until_stopped(&vm.id).await;
        let report = pair.target.agent.services().board.vm(&vm.id).expect("it is the target's");
        assert_eq!(report.migration, None);
        assert_ne!(pair.source.state(&vm.id), Some(VmState::Running));
        let started = TaskSpec::StartVm { definition: vm.boxed() };
        pair.target.task(&vm.id, started).await.expect("it boots from its disk");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_the_targets_machine_went_down_a_vm_in_a_shared_pool_is_its_own_if_it_was_given_away() {
    for (shared_pool, given_away) in [(true, true), (true, false), (false, true), (false, false)] {
        let mut pair =
            if shared_pool { Pair::with_shared_pool().await } else { Pair::with_own_pools().await };
        let definition = host::definition(128);
        let vm = TestVm { id: definition.id.clone(), definition };
        pair.source.take_image(&vm.definition.image).await;
        let prepared = TaskSpec::PrepareVm { definition: vm.boxed() };
        pair.source.task(&vm.id, prepared).await.expect("prepared");
        let migration = migration();
        pair.admit(&vm, &migration, shared_pool).await;
        let state = pair.target.root().join("state").join("vms").join(vm.id.as_str());
        std::fs::write(state.join("loading.json"), r#"{"boot_id": "another"}"#).expect("written");
        pair.target.replace_agent().await;
        let is_kept = shared_pool && given_away;
        if given_away {
            let spec = TaskSpec::TakeOver { migration: migration.clone() };
            assert_eq!(pair.target.task(&vm.id, spec).await.is_ok(), is_kept);
        }
        let spec = TaskSpec::RefuseMigration { migration, shared_pool };
        pair.target.task(&vm.id, spec).await.expect("nothing is left that could be refused");
        let report = pair.target.agent.services().board.vm(&vm.id);
        let found = report.map(|report| (report.state, report.migration));
        assert_eq!(found, is_kept.then_some((VmState::Stopped, None)));
        assert!(pair.source.vm_directory(&vm.id).exists());
    }
}
