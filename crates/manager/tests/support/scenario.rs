//! For each kind of operation a case in which it succeeds.

use berth_api::manager::{CloneSnapshot, CreateVm, MigrateVm, RestoreVm};
use berth_manager::cluster::Cluster;
use berth_manager::operations::OperationRequest;
use berth_model::operation::OperationKind;
use berth_model::snapshot::{SnapshotExtent, SnapshotKind};
use berth_model::{ImageId, SnapshotId, VmId};

use crate::world::{World, done, running_vm, wish};

/// Prepares a case, and says what is to be asked for.
pub async fn prepare(world: &World, cluster: &Cluster, kind: OperationKind) -> OperationRequest {
    // A second VM, which nothing may happen to.
    running_vm(cluster, "bystander").await;
    match kind {
        OperationKind::VmCreate => {
            // On the host that has still to fetch the image.
            let wish = CreateVm { host: Some("h2".to_owned()), ..wish("books") };
            OperationRequest::VmCreate { wish: Box::new(wish) }
        }
        OperationKind::VmStart => {
            let vm = running_vm(cluster, "books").await;
            done(cluster, OperationRequest::VmStop { vm: vm.clone() }).await;
            OperationRequest::VmStart { vm }
        }
        OperationKind::VmShutdown => {
            OperationRequest::VmShutdown { vm: running_vm(cluster, "books").await, timeout_s: None }
        }
        OperationKind::VmStop => OperationRequest::VmStop { vm: running_vm(cluster, "books").await },
        OperationKind::VmRestart => OperationRequest::VmRestart { vm: running_vm(cluster, "books").await },
        OperationKind::VmPause => OperationRequest::VmPause { vm: running_vm(cluster, "books").await },
        OperationKind::VmResume => {
            let vm = running_vm(cluster, "books").await;
            done(cluster, OperationRequest::VmPause { vm: vm.clone() }).await;
            OperationRequest::VmResume { vm }
        }
        OperationKind::VmDelete => {
            let vm = running_vm(cluster, "books").await;
            snapshot(cluster, &vm, "first").await;
            OperationRequest::VmDelete { vm, force: true }
        }
        OperationKind::VmMigrate => {
            let vm = running_vm(cluster, "books").await;
            snapshot(cluster, &vm, "first").await;
            let wish = MigrateVm { target: Some("h2".to_owned()), ..MigrateVm::default() };
            OperationRequest::VmMigrate { vm, wish }
        }
        OperationKind::SnapshotCreate => {
            let vm = running_vm(cluster, "books").await;
            snapshot(cluster, &vm, "first").await;
            take(&vm, "second")
        }
        OperationKind::SnapshotRestore => {
            let (vm, _) = one_of_two(cluster).await;
            let wish = RestoreVm { snapshot: Some("first".to_owned()), no_undo: false, ..Default::default() };
            OperationRequest::SnapshotRestore { vm, wish }
        }
        OperationKind::SnapshotClone => {
            let vm = running_vm(cluster, "books").await;
            let first = snapshot(cluster, &vm, "first").await;
            clone_of(&vm, &first, "books-2")
        }
        OperationKind::SnapshotVerify => {
            let (vm, snapshot) = one_of_two(cluster).await;
            OperationRequest::SnapshotVerify { vm, snapshot, boot: true }
        }
        OperationKind::SnapshotDelete => {
            let (vm, snapshot) = one_of_two(cluster).await;
            OperationRequest::SnapshotDelete { vm, snapshot }
        }
        OperationKind::ImageDelete => {
            let image = ImageId::from_entropy([8; 10]);
            world.add_image(&image, "unused").await;
            crate::world::until(cluster, "the image is seen", |cluster| {
                cluster.records.find_image("unused").is_ok()
            })
            .await;
            OperationRequest::ImageDelete { image }
        }
    }
}

/// The first of two snapshots of a running VM.
async fn one_of_two(cluster: &Cluster) -> (VmId, SnapshotId) {
    let vm = running_vm(cluster, "books").await;
    let first = snapshot(cluster, &vm, "first").await;
    snapshot(cluster, &vm, "second").await;
    (vm, first)
}

pub fn clone_of(vm: &VmId, snapshot: &SnapshotId, name: &str) -> OperationRequest {
    let wish = CloneSnapshot { name: name.parse().unwrap(), segment: None, cold: false, paused: false };
    OperationRequest::SnapshotClone { origin: vm.clone(), snapshot: snapshot.clone(), wish }
}

pub fn take(vm: &VmId, name: &str) -> OperationRequest {
    OperationRequest::SnapshotCreate {
        vm: vm.clone(),
        kind: SnapshotKind::Manual,
        occasion: None,
        name: Some(name.parse().unwrap()),
        note: String::new(),
        extent: SnapshotExtent::Machine,
    }
}

pub async fn snapshot(cluster: &Cluster, vm: &VmId, name: &str) -> SnapshotId {
    done(cluster, take(vm, name)).await;
    cluster.records.find_snapshot(vm, name).expect("a snapshot").value.id.clone()
}
