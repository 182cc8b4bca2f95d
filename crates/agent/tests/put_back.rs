//! A VM is put back to a snapshot on another host: between two real agents, over real TLS, with real QEMUs. It is in one
//! place afterwards, whatever broke, and every page and file of it is right.

#[path = "snapshot/host.rs"]
#[allow(dead_code, reason = "each test program uses a part of it")]
mod host;
#[path = "migration/pair.rs"]
#[allow(dead_code, reason = "each test program uses a part of it")]
mod pair;

use std::sync::atomic::Ordering;

use berth_api::agent::{PutBack, TaskOutput, TaskSpec};
use berth_model::migration::MigrationReport;
use berth_model::vm::VmState;
use berth_model::{OperationId, Problem, SnapshotId};
use guest_probe::memory::{Rewrite, Settings};
use host::{LONG, TestVm, entropy, layer, snapshot};
use pair::{Link, Pair};

const BUSY: Settings = Settings { memory_mib: 16, rate_mib_s: 4, hot_mib: 8, rewrite: Rewrite::Whole };
/// Files at the snapshot, and after it.
const THEN: u32 = 10;
const LATER: u32 = 25;

/// A VM that was snapshotted and has worked on since.
async fn worked_on(pair: &Pair, memory_mib: u64) -> (TestVm, SnapshotId, String) {
    let vm = pair.source.running_vm(memory_mib).await;
    let probe = pair.source.probe(&vm.id);
    probe.set(BUSY, LONG).expect("busy");
    probe.write(THEN).expect("files");
    let taken = snapshot();
    let spec = TaskSpec::TakeSnapshot { snapshot: taken.clone(), new_top: layer(), next: None };
    pair.source.task(&vm.id, spec).await.expect("snapshot");
    let nonce = probe.tick().expect("tick").nonce;
    probe.write(LATER - THEN).expect("more files");
    (vm, taken, nonce)
}

/// What is asked of the two hosts.
struct Wish {
    migration: OperationId,
    put_back: PutBack,
    shared_pool: bool,
}

impl Wish {
    fn of(snapshot: &SnapshotId, shared_pool: bool) -> Self {
        let put_back = PutBack { snapshot: snapshot.clone(), new_top: layer(), paused: false };
        Self { migration: OperationId::from_entropy(entropy()), put_back, shared_pool }
    }

    async fn admit(&self, pair: &Pair, vm: &TestVm) {
        pair.target.take_image(&vm.definition.image).await;
        let spec = TaskSpec::AdmitMigration {
            migration: self.migration.clone(),
            definition: vm.boxed(),
            source: pair.source.id.clone(),
            shared_pool: self.shared_pool,
            put_back: Some(self.put_back.clone()),
        };
        pair.target.task(&vm.id, spec).await.expect("admitted");
    }

    fn order(&self, pair: &Pair, address: &str) -> TaskSpec {
        TaskSpec::MoveVm {
            migration: self.migration.clone(),
            target: pair.target.id.clone(),
            target_address: address.to_owned(),
            shared_pool: self.shared_pool,
            bandwidth_bytes_per_second: None,
            spare_layers: Vec::new(),
            put_back: true,
        }
    }

    async fn go(&self, pair: &Pair, vm: &TestVm) -> Result<MigrationReport, Problem> {
        self.admit(pair, vm).await;
        match pair.source.task(&vm.id, self.order(pair, &pair.target_address.to_string())).await? {
            TaskOutput::Moved { report, .. } => Ok(report),
            other => panic!("{other:?}"),
        }
    }

    /// What is left to the manager after a failure: the target throws away what it has.
    async fn refuse(&self, pair: &Pair, vm: &TestVm) {
        let spec =
            TaskSpec::RefuseMigration { migration: self.migration.clone(), shared_pool: self.shared_pool };
        pair.target.task(&vm.id, spec).await.expect("refused");
        assert_eq!(pair.target.state(&vm.id), None, "nothing of it is on the target");
        assert!(self.shared_pool || !pair.target.vm_directory(&vm.id).exists());
        assert!(
            !pair
                .source
                .vm_directory(&vm.id)
                .join(format!("layers/{}.qcow2", self.put_back.new_top))
                .exists()
        );
    }
}

fn runs_as_it_was_then(pair: &Pair, vm: &TestVm, nonce: &str) {
    assert_eq!(pair.target.state(&vm.id), Some(VmState::Running));
    let probe = pair.target.probe(&vm.id);
    let found = probe.verify(LONG).expect("verified");
    assert_eq!((found.pages_wrong, found.files, found.files_wrong), (0, u64::from(THEN), 0));
    assert_eq!(probe.tick().expect("tick").nonce, nonce, "it is the guest that was");
    probe.write(3).expect("it can still write");
}

fn goes_on_where_it_is(pair: &Pair, vm: &TestVm) {
    assert_eq!(pair.source.state(&vm.id), Some(VmState::Running));
    let found = pair.source.probe(&vm.id).verify(LONG).expect("verified");
    assert_eq!((found.pages_wrong, found.files, found.files_wrong), (0, u64::from(LATER), 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_vm_is_put_back_where_its_files_are_and_where_they_are_not() {
    for shared_pool in [true, false] {
        let pair = if shared_pool { Pair::with_shared_pool().await } else { Pair::with_own_pools().await };
        let (vm, taken, nonce) = worked_on(&pair, 128).await;
        let report = Wish::of(&taken, shared_pool).go(&pair, &vm).await.expect("put back");
        println!("shared: {shared_pool}: {report:?}");
        assert!(report.blackout_us > 0 && report.memory_bytes == 0, "{report:?}");
        assert_eq!(pair.source.state(&vm.id), Some(VmState::Stopped));
        let gone = TaskSpec::DeleteVm { pool: vm.definition.spec.pool.clone(), keep_files: shared_pool };
        pair.source.task(&vm.id, gone).await.expect("forgotten");
        runs_as_it_was_then(&pair, &vm, &nonce);
        let (definition, new_top) = (vm.boxed(), layer());
        let again = TaskSpec::RestoreSnapshot { definition, snapshot: taken, new_top, paused: false };
        pair.target.task(&vm.id, again).await.expect("and put back again, as any VM");
        runs_as_it_was_then(&pair, &vm, &nonce);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_that_is_stopped_or_hangs_is_put_back_as_well_and_may_be_held() {
    for hangs in [false, true] {
        let pair = Pair::with_own_pools().await;
        let (vm, taken, nonce) = worked_on(&pair, 128).await;
        let process = pair.source.pid(&vm.id).expect("a process");
        if hangs {
            let pid = rustix::process::Pid::from_raw(process).expect("a process");
            rustix::process::kill_process(pid, rustix::process::Signal::STOP).expect("stopped");
        } else {
            pair.source.task(&vm.id, TaskSpec::StopVm).await.expect("stopped");
        }
        let mut wish = Wish::of(&taken, false);
        wish.put_back.paused = true;
        println!("hangs: {hangs}: {:?}", wish.go(&pair, &vm).await.expect("put back"));
        assert_eq!(pair.target.state(&vm.id), Some(VmState::Paused));
        assert_eq!(pair.source.state(&vm.id), Some(VmState::Stopped));
        pair.target.task(&vm.id, TaskSpec::ResumeVm).await.expect("resumed");
        runs_as_it_was_then(&pair, &vm, &nonce);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_breaks_anywhere_leaves_the_vm_in_one_place() {
    let pair = Pair::with_own_pools().await;
    let (vm, taken, nonce) = worked_on(&pair, 128).await;
    let mut bytes_max = 1000;
    loop {
        let link = Link::to(pair.target_address, bytes_max).await;
        let wish = Wish::of(&taken, false);
        wish.admit(&pair, &vm).await;
        let result = pair.source.task(&vm.id, wish.order(&pair, &link.address.to_string())).await;
        let carried = link.carried.load(Ordering::Relaxed);
        println!("{bytes_max}: {:?}", result.as_ref().map_err(|problem| &problem.message));
        match result {
            Ok(TaskOutput::Moved { .. }) => break,
            Ok(TaskOutput::HandedOver { .. }) => {
                let over = TaskSpec::TakeOver { migration: wish.migration.clone() };
                if pair.target.task(&vm.id, over).await.is_ok() {
                    break;
                }
                wish.refuse(&pair, &vm).await;
                let back = TaskSpec::TakeBack { migration: wish.migration.clone() };
                pair.source.task(&vm.id, back).await.expect("taken back");
            }
            Ok(other) => panic!("{other:?}"),
            Err(_) => wish.refuse(&pair, &vm).await,
        }
        assert!(carried > bytes_max, "it failed before the link broke");
        goes_on_where_it_is(&pair, &vm);
        bytes_max += (bytes_max / 2).clamp(20_000, 12_000_000);
    }
    runs_as_it_was_then(&pair, &vm, &nonce);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_that_is_damaged_or_an_agent_that_dies_leaves_the_vm_where_it_is() {
    for shared_pool in [true, false] {
        let mut pair =
            if shared_pool { Pair::with_shared_pool().await } else { Pair::with_own_pools().await };
        let (vm, taken, nonce) = worked_on(&pair, 128).await;
        let device =
            pair.source.vm_directory(&vm.id).join("snapshots").join(taken.as_str()).join("device.bin");
        let whole = std::fs::read(&device).expect("device state");
        let mut damaged = whole.clone();
        damaged[1000] ^= 1;
        std::fs::remove_file(&device).expect("removed");
        std::fs::write(&device, damaged).expect("written");
        let wish = Wish::of(&taken, shared_pool);
        let problem = wish.go(&pair, &vm).await.expect_err("damaged");
        assert!(problem.message.contains("device.bin"), "{problem:?}");
        wish.refuse(&pair, &vm).await;
        goes_on_where_it_is(&pair, &vm);
        std::fs::remove_file(&device).expect("removed");
        std::fs::write(&device, whole).expect("written");

        let wish = Wish::of(&taken, shared_pool);
        wish.admit(&pair, &vm).await;
        pair.source.put(&vm.id, wish.order(&pair, &pair.target_address.to_string()));
        pair.source.replace_agent().await;
        wish.refuse(&pair, &vm).await;
        goes_on_where_it_is(&pair, &vm);
        println!("{:?}", wish_again(&pair, &vm, &taken, shared_pool).await);
        runs_as_it_was_then(&pair, &vm, &nonce);
    }
}

async fn wish_again(pair: &Pair, vm: &TestVm, taken: &SnapshotId, shared_pool: bool) -> MigrationReport {
    Wish::of(taken, shared_pool).go(pair, vm).await.expect("and in the end it is put back there")
}
