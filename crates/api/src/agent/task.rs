//! Tasks: what a host is told to do, how that goes, and what it has to say when it is done.

use berth_model::image::Image;
use berth_model::migration::MigrationReport;
use berth_model::name::Name;
use berth_model::operation::Progress;
use berth_model::repository::{BackupContents, ExportFacts, ImportFacts, RepositoryAccess};
use berth_model::snapshot::{CloneFacts, DeletionFacts, RestoreFacts, SnapshotFacts};
use berth_model::verification::VerificationFacts;
use berth_model::vm::{VmSpec, VmState};
use berth_model::{HostId, ImageId, LayerId, OperationId, Problem, SnapshotId, VmId};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What an agent must know of a VM to run it: everything, so that no other question is needed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmDefinition {
    /// Its id.
    pub id: VmId,
    /// Its number, from which its user id is derived: the same on every host.
    pub number: u32,
    /// `segment/name`, for logs and the process list.
    pub full_name: String,
    /// The host name that the guest is given.
    pub hostname: Name,
    /// What it is to be.
    pub spec: VmSpec,
    /// Its image.
    pub image: Image,
    /// The id of the first writable layer.
    pub first_layer: LayerId,
}

/// A restore that is about to be asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NextRestore {
    /// The VM.
    pub definition: VmDefinition,
    /// To which snapshot.
    pub snapshot: SnapshotId,
    /// The id of the writable layer after it.
    pub new_top: LayerId,
}

/// Something to be done by an agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum TaskSpec {
    /// Make an image's parts present in a pool by copying them from another host; nothing if they are.
    FetchImage {
        /// The image.
        image: Image,
        /// The pool.
        pool: Name,
        /// The host that has it; it may be this one, when it has it in another pool.
        from: HostId,
        /// The pool in which that host has it.
        from_pool: Name,
        /// That host's address.
        from_address: String,
    },
    /// Remove an image from a pool.
    DeleteImage {
        /// The image.
        image: ImageId,
        /// The pool.
        pool: Name,
    },
    /// Make the VM's directory, first writable layer and seed.
    PrepareVm {
        /// The VM.
        definition: Box<VmDefinition>,
    },
    /// Start a process for a VM that has none, and let the guest run; nothing if it runs.
    StartVm {
        /// The VM as it is to be.
        definition: Box<VmDefinition>,
    },
    /// Ask the guest to power down; done when the process has gone.
    ShutdownVm {
        /// How long it may take, in milliseconds.
        timeout_ms: u64,
    },
    /// Take the power away; done when the process has gone.
    StopVm,
    /// Reset the machine: a warm restart in the same process.
    RestartVm,
    /// Hold the guest.
    PauseVm,
    /// Let it go on.
    ResumeVm,
    /// Wait until the guest says that it is ready.
    WaitReady {
        /// How long it may take, in milliseconds.
        timeout_ms: u64,
    },
    /// Stop the VM if it runs, and remove what this host has of it.
    DeleteVm {
        /// Its pool.
        pool: Name,
        /// Keep what is in the pool: another host owns it now.
        keep_files: bool,
    },
    /// Take a snapshot; of a stopped VM, of its disk alone.
    TakeSnapshot {
        /// Its id.
        snapshot: SnapshotId,
        /// The id of the writable layer after it.
        new_top: LayerId,
        /// Where the VM will be put back to next: a process for that is made ready meanwhile.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        next: Option<Box<NextRestore>>,
    },
    /// Take a snapshot of the disk alone, of a VM that runs as well.
    TakeDiskSnapshot {
        /// Its id.
        snapshot: SnapshotId,
        /// The id of the writable layer after it.
        new_top: LayerId,
        /// Have the guest agent flush and freeze the guest's file systems for the instant; without one it fails.
        quiesce: bool,
    },
    /// Put the VM back to a snapshot, whatever it is doing; it runs (or rests, for one without memory) as it was then.
    RestoreSnapshot {
        /// The VM.
        definition: Box<VmDefinition>,
        /// To which.
        snapshot: SnapshotId,
        /// The id of the writable layer after it.
        new_top: LayerId,
        /// The guest is held afterwards, though it ran then.
        #[serde(default)]
        paused: bool,
    },
    /// Make a new VM from another one's snapshot and start it; nothing if it runs.
    CloneVm {
        /// The new VM. Its first layer is its writable one, on the snapshot's.
        definition: Box<VmDefinition>,
        /// The VM that the snapshot is of, in the same pool.
        origin: VmId,
        /// Its snapshot.
        snapshot: SnapshotId,
        /// What the snapshot becomes among the new VM's own; none: start from the disk alone, and keep no snapshot.
        first_snapshot: Option<SnapshotId>,
        /// Share the origin's files; otherwise copy them.
        share: bool,
        /// Hold the guest.
        paused: bool,
    },
    /// Read all that a snapshot consists of and hold it against its hashes, slowly, beside the VM's other work. It changes
    /// nothing of the VM's, so its generation says nothing.
    VerifySnapshot {
        /// Which.
        snapshot: SnapshotId,
    },
    /// Put a snapshot into a repository. The VM is left alone, and this waits for none of its other tasks.
    ExportSnapshot {
        /// The VM.
        vm: VmId,
        /// Its pool.
        pool: Name,
        /// Its snapshot.
        snapshot: SnapshotId,
        /// What the backup says of itself.
        contents: Box<BackupContents>,
        /// The operation: it gets one backup, however often it is tried.
        operation: OperationId,
        /// The repository.
        access: Box<RepositoryAccess>,
    },
    /// Bring a backup's files here, checked, for a VM that is to be made of them, and its image into the pool.
    FetchBackup {
        /// The VM that is to be.
        vm: VmId,
        /// The pool.
        pool: Name,
        /// What the backup says of itself.
        contents: Box<BackupContents>,
        /// The backup's id.
        backup: String,
        /// The repository.
        access: Box<RepositoryAccess>,
    },
    /// Remove what was fetched for a VM; nothing if there is none.
    DropFetched {
        /// The VM that was to be.
        vm: VmId,
        /// The pool.
        pool: Name,
    },
    /// Make a new VM of what was fetched for it, and start it; nothing if it runs.
    ImportVm {
        /// The new VM. Its first layer is its writable one, on the snapshot's.
        definition: Box<VmDefinition>,
        /// The snapshot that was fetched.
        snapshot: SnapshotId,
        /// What it becomes among the new VM's own; none: start from the disk alone, and keep no snapshot.
        first_snapshot: Option<SnapshotId>,
        /// Hold the guest.
        paused: bool,
    },
    /// Remove a snapshot's memory, and its layers where nothing else needs them.
    DeleteSnapshot {
        /// Which.
        snapshot: SnapshotId,
    },
    /// As target: expect this VM from that host. The source's agent does the rest.
    AdmitMigration {
        /// The migration: its operation's id.
        migration: OperationId,
        /// The VM.
        definition: Box<VmDefinition>,
        /// Where it comes from.
        source: HostId,
        /// Both hosts see the VM's directory in one shared pool.
        shared_pool: bool,
        /// It is put back here to one of its snapshots, instead of going on where it is; none: it goes on.
        #[serde(default)]
        put_back: Option<PutBack>,
    },
    /// As target: forget the migration and remove what came of it; refused once the guest runs here.
    RefuseMigration {
        /// The migration.
        migration: OperationId,
        /// Both hosts see the VM's directory in one shared pool.
        shared_pool: bool,
    },
    /// As target: the source is known to have handed the VM over; let it run. Nothing if it runs.
    TakeOver {
        /// The migration.
        migration: OperationId,
    },
    /// As source: move the VM; see [`TaskOutput::Moved`] and [`TaskOutput::HandedOver`].
    MoveVm {
        /// The migration.
        migration: OperationId,
        /// Where to.
        target: HostId,
        /// That host's address.
        target_address: String,
        /// Both hosts see the VM's directory in one shared pool.
        shared_pool: bool,
        /// Most bytes a second to send; none: as the link takes.
        bandwidth_bytes_per_second: Option<u64>,
        /// Ids for layers that have to be frozen on the way, in order of use.
        spare_layers: Vec<LayerId>,
        /// The target puts it back to a snapshot, as it was told: what its memory and its writable layers hold stays here.
        /// It need not run.
        #[serde(default)]
        put_back: bool,
    },
    /// As source: the target is known to have no process; take the VM back and let it run.
    TakeBack {
        /// The migration.
        migration: OperationId,
    },
}

/// What a task has to say when it succeeded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "of", rename_all = "kebab-case")]
pub enum TaskOutput {
    /// Nothing more than that it is done.
    Done,
    /// A snapshot was taken.
    Snapshot {
        /// What it cost.
        facts: SnapshotFacts,
    },
    /// A snapshot was deleted.
    Deleted {
        /// What that freed, and what follows.
        facts: DeletionFacts,
    },
    /// A snapshot was read.
    Verified {
        /// What was found.
        facts: VerificationFacts,
    },
    /// The VM was put back.
    Restored {
        /// What it cost.
        facts: RestoreFacts,
    },
    /// A VM was made from a snapshot.
    Cloned {
        /// What it cost.
        facts: CloneFacts,
        /// The state that it was brought to.
        state: VmState,
    },
    /// A snapshot was put into a repository.
    Exported {
        /// What was measured.
        facts: ExportFacts,
    },
    /// A backup's files are here.
    Fetched {
        /// What was measured.
        facts: ImportFacts,
    },
    /// The guest said that it is ready.
    Ready {
        /// How it said so: `guest-agent` or `probe`.
        signal: String,
        /// How long it took from the start of waiting, in milliseconds.
        after_ms: u64,
    },
    /// The guest runs on the target.
    Moved {
        /// What was measured.
        report: MigrationReport,
        /// The writable layer that it runs on now.
        top: LayerId,
    },
    /// The source has handed the VM over, and does not know whether the target lets it run: ask the target.
    HandedOver {
        /// What was measured so far.
        report: MigrationReport,
        /// The writable layer that it is to run on.
        top: LayerId,
    },
}

/// How a task stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum TaskState {
    /// It is being done, or waits for its turn.
    Running {
        /// How far it is.
        progress: Progress,
    },
    /// Done.
    Succeeded {
        /// What it has to say.
        output: TaskOutput,
    },
    /// Not done, and nothing of it left.
    Failed {
        /// Why.
        problem: Problem,
    },
}

/// A task with how it stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Task {
    /// Its id.
    pub id: String,
    /// Rises with each change of the task: the next wait is for one above it.
    pub version: u64,
    /// How it stands.
    pub state: TaskState,
}

/// A task to be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PutTask {
    /// The VM it is about; none for images.
    #[serde(default)]
    pub vm: Option<VmId>,
    /// The VM's generation: a command with an older one than the agent has seen is refused.
    #[serde(default)]
    pub generation: u64,
    /// What to do.
    pub spec: TaskSpec,
}

/// What a VM is put back to on the host that it comes to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PutBack {
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// The layer that the VM is to write to.
    pub new_top: LayerId,
    /// Hold the guest afterwards, though it ran then.
    pub paused: bool,
}
