//! Migration between two real agents over real TLS, with real QEMUs: the VM runs exactly once afterwards, whatever broke
//! and when, and every page and file in it is right.

#[path = "snapshot/host.rs"]
mod host;
#[path = "migration/pair.rs"]
mod pair;

use std::sync::atomic::Ordering;

use berth_api::agent::{TaskOutput, TaskSpec};
use berth_model::migration::MigrationReport;
use berth_model::vm::VmState;
use berth_model::{OperationId, Problem, ProblemCode};
use guest_probe::memory::{Rewrite, Settings};
use host::{LONG, TestVm, entropy, layer, snapshot};
use pair::{Link, Pair};

const BUSY: Settings = Settings { memory_mib: 64, rate_mib_s: 20, hot_mib: 32, rewrite: Rewrite::Whole };

impl Pair {
    async fn admit(&self, vm: &TestVm, migration: &OperationId, shared_pool: bool) {
        self.target.take_image(&vm.definition.image).await;
        let spec = TaskSpec::AdmitMigration {
            migration: migration.clone(),
            definition: vm.boxed(),
            source: self.source.id.clone(),
            shared_pool,
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
        }
    }

    async fn move_vm(&self, vm: &TestVm, shared_pool: bool) -> Result<MigrationReport, Problem> {
        let migration = OperationId::from_entropy(entropy());
        self.admit(vm, &migration, shared_pool).await;
        let order = self.order(&migration, &self.target_address.to_string(), shared_pool);
        let result = self.source.task(&vm.id, order).await;
        if result.is_err() {
            for host in [&self.source, &self.target] {
                let log = std::fs::read_to_string(host.root().join("run").join(vm.id.as_str()).join("qemu.log"));
                println!("{}: {log:?}", host.id);
            }
        }
        match result? {
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
async fn a_guest_moves_between_pools_with_its_disk_and_snapshots() {
    let pair = Pair::with_own_pools().await;
    let vm = pair.source.running_vm(256).await;
    let probe = pair.source.probe(&vm.id);
    probe.write(20).expect("files");
    let taken = snapshot();
    let spec = TaskSpec::TakeSnapshot { snapshot: taken.clone(), new_top: layer() };
    pair.source.task(&vm.id, spec).await.expect("snapshot");
    probe.set(BUSY, LONG).expect("busy");
    probe.ask("write", "30 1024", LONG).expect("more files");
    let report = pair.move_vm(&vm, false).await.expect("moved");
    println!("moved: {report:?}");
    let probe = pair.target.probe(&vm.id);
    let found = probe.verify(LONG).expect("verified");
    assert_eq!((found.pages_wrong, found.files, found.files_wrong), (0, 50, 0));
    probe.write(5).expect("it can still write");
    let restored = TaskSpec::RestoreSnapshot { definition: vm.boxed(), snapshot: taken, new_top: layer() };
    pair.target.task(&vm.id, restored).await.expect("restored there");
    let found = pair.target.probe(&vm.id).verify(LONG).expect("verified");
    assert_eq!((found.pages_wrong, found.files, found.files_wrong), (0, 20, 0));
}
