//! For each kind of operation a case in which it succeeds.

use std::fmt;

use berth_api::manager::{CloneSnapshot, CreateVm, ImportSnapshot, MigrateVm, RestoreVm};
use berth_manager::cluster::Cluster;
use berth_manager::operations::step::StepInfo;
use berth_manager::operations::{OperationRequest, steps_of};
use berth_manager::records::{RepositoryKeysRow, Transaction};
use berth_model::image::Image;
use berth_model::operation::OperationKind;
use berth_model::repository::{BackupContents, Repository, RepositoryKeys, Secret};
use berth_model::snapshot::{SnapshotExtent, SnapshotKind};
use berth_model::vm::Vm;
use berth_model::{ImageId, RepositoryId, SnapshotId, VmId};

use crate::world::{World, done, running_vm, wish};

/// What is gone through: each kind of operation, and what goes another way within its kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Case {
    pub kind: OperationKind,
    /// A restore on another host.
    pub elsewhere: bool,
}

impl Case {
    pub fn all() -> impl Iterator<Item = Self> {
        let plain = OperationKind::ALL.into_iter().map(Self::of);
        plain.chain([Self { kind: OperationKind::SnapshotRestore, elsewhere: true }])
    }

    pub const fn of(kind: OperationKind) -> Self {
        Self { kind, elsewhere: false }
    }

    /// The steps that have something to do in it.
    pub fn steps(self) -> Vec<StepInfo> {
        let mut steps = steps_of(self.kind);
        if self == Self::of(OperationKind::SnapshotRestore) {
            steps.retain(|step| !matches!(step.name, "fetch-image" | "admit" | "forget-on-source"));
        }
        steps
    }

    /// In this step the source needs the target and, on its own, gives up without it.
    pub fn gives_up_alone(self, step: &str) -> bool {
        (self.kind, step) == (OperationKind::VmMigrate, "move") || self.elsewhere && step == "restore"
    }
}

impl fmt::Display for Case {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}{}", self.kind, if self.elsewhere { " elsewhere" } else { "" })
    }
}

/// Prepares a case, and says what is to be asked for.
pub async fn prepare(world: &World, cluster: &Cluster, case: Case) -> OperationRequest {
    // A second VM, which nothing may happen to.
    running_vm(cluster, "bystander").await;
    match case.kind {
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
            let host = case.elsewhere.then(|| "h2".to_owned());
            let wish = RestoreVm { snapshot: Some("first".to_owned()), host, ..RestoreVm::default() };
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
        OperationKind::SnapshotExport | OperationKind::SnapshotImport => backup(cluster, case.kind).await,
        OperationKind::SnapshotDelete => {
            let (vm, snapshot) = one_of_two(cluster).await;
            OperationRequest::SnapshotDelete { vm, snapshot }
        }
        OperationKind::ImageDelete => {
            let image = ImageId::from_entropy([8; 10]);
            world.add_image(&image, "unused").await;
            let is_seen = |cluster: &Cluster| cluster.records.find_image("unused").is_ok();
            crate::world::until(cluster, "the image is seen", is_seen).await;
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

async fn backup(cluster: &Cluster, kind: OperationKind) -> OperationRequest {
    let vm = running_vm(cluster, "books").await;
    let first = snapshot(cluster, &vm, "first").await;
    let repository = repository(cluster).await;
    if kind == OperationKind::SnapshotExport {
        return OperationRequest::SnapshotExport { origin: vm, snapshot: first, repository };
    }
    let mut contents = contents_of(cluster, &vm, &first);
    // As from another cluster, whose image is none of this one's.
    contents.image.id = ImageId::from_entropy([9; 10]);
    contents.spec.image = contents.image.id.clone();
    import(repository, contents, "books-2")
}

/// A repository that is known.
pub async fn repository(cluster: &Cluster) -> RepositoryId {
    let keys = RepositoryKeys {
        password: Secret::new("hunter2hunter2".to_owned()),
        key: None,
        known_hosts: None,
        ca: None,
    };
    let repository = Repository {
        id: RepositoryId::from_entropy([7; 10]),
        name: "offsite".parse().unwrap(),
        url: "/srv/backup".parse().unwrap(),
        segment: None,
        created_at: cluster.clock.now(),
    };
    let mut transaction = Transaction::new();
    transaction.put(&repository);
    transaction.put(&RepositoryKeysRow { repository: repository.id.clone(), keys });
    cluster.records.commit(transaction).await.unwrap();
    repository.id
}

/// What a backup of a snapshot says of itself.
pub fn contents_of(cluster: &Cluster, vm: &VmId, snapshot: &SnapshotId) -> BackupContents {
    let vm = cluster.records.require::<Vm>(vm.as_str()).unwrap();
    let image = cluster.records.require::<Image>(vm.spec.image.as_str()).unwrap();
    BackupContents {
        format: BackupContents::FORMAT,
        vm: vm.full_name(),
        spec: vm.spec.clone(),
        image: image.value.clone(),
        snapshot: cluster.records.find_snapshot(&vm.value.id, snapshot.as_str()).unwrap().value.clone(),
    }
}

pub fn import(repository: RepositoryId, contents: BackupContents, name: &str) -> OperationRequest {
    let wish = ImportSnapshot {
        backup: "00".repeat(32),
        name: name.parse().unwrap(),
        segment: "default".to_owned(),
        host: Some("h2".to_owned()),
        pool: None,
        cold: false,
        paused: false,
    };
    OperationRequest::SnapshotImport {
        repository,
        backup: wish.backup.clone(),
        contents: Box::new(contents),
        wish,
    }
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
