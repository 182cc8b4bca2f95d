//! The agent's contract: what the manager asks of a host, and what agents ask of each other.
//!
//! Everything that changes something is a **task**: the manager chooses its id (derived from its operation and step),
//! puts it, and asks how it is. Putting the same task twice is the same as once, so a manager that died asks again
//! with the same id; an agent that died has forgotten the task, is given it again, and finds in what is on disk and in
//! the running QEMU how far it had come. So each task must bear being run twice, and after any half of it.
//!
//! Routes under `/v1/peer` are for other hosts of the cluster, all others for the manager alone; the certificate says
//! who asks.

use berth_model::diff::SnapshotDiff;
use berth_model::host::Inventory;
use berth_model::image::PartRole;
use berth_model::name::Name;
use berth_model::repository::{Backup, BackupContents, RepositoryAccess};
use berth_model::snapshot::DeletionFacts;
use berth_model::vm::{GuestState, PortForward, VmState};
use berth_model::{ImageId, LayerId, OperationId, SnapshotId, VmId};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::endpoint::Nothing;

mod task;

pub use task::{NextRestore, PutBack, PutTask, Task, TaskOutput, TaskSpec, TaskState, VmDefinition};

/// Where this host stands in a migration of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "side", rename_all = "kebab-case")]
pub enum MigrationSide {
    /// It sends the VM.
    Source {
        /// The migration.
        migration: OperationId,
        /// It has given the VM away, durably.
        handed_over: bool,
        /// The guest did not run before it began, and is not let run when it comes to nothing.
        #[serde(default)]
        held: bool,
    },
    /// It receives the VM.
    Target {
        /// The migration.
        migration: OperationId,
        /// All state is loaded.
        loaded: bool,
    },
}

/// How a VM is, as its host sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmReport {
    /// Which.
    pub vm: VmId,
    /// The newest generation that was commanded here.
    pub generation: u64,
    /// Its state; never `unknown`.
    pub state: VmState,
    /// What is known of the guest.
    pub guest: GuestState,
    /// Its part in a migration, if one is under way or unresolved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationSide>,
    /// The writable layer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top: Option<LayerId>,
    /// How many layers its disk lies on, the writable one counted.
    #[serde(default)]
    pub layers: u32,
    /// With user-mode networking: the ports that lead to each interface.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub forwards: Vec<Vec<PortForward>>,
    /// The last thing that went wrong, in a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
}

/// All VMs of a host at one instant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AgentReport {
    /// Random for each start of the agent.
    pub incarnation: String,
    /// Rises with each change within one incarnation.
    pub generation: u64,
    /// The VMs that this host has anything of.
    pub vms: Vec<VmReport>,
}

/// Which report to wait for.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ReportQuery {
    /// The incarnation of the last report that was read.
    #[serde(default)]
    pub incarnation: Option<String>,
    /// Its generation: answer when there is a newer one.
    #[serde(default)]
    pub after: Option<u64>,
    /// Or after so many milliseconds.
    #[serde(default)]
    pub wait_ms: Option<u64>,
}

/// Which change of a task to wait for.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct TaskQuery {
    /// The version that was read last: answer when there is a newer one.
    #[serde(default)]
    pub after: Option<u64>,
    /// Or after so many milliseconds.
    #[serde(default)]
    pub wait_ms: Option<u64>,
}

/// A task in a path.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TaskPath {
    /// Its id: `[A-Za-z0-9._-]`, at most 128 characters.
    pub task: String,
}

/// A VM in a path.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AgentVmPath {
    /// Its id.
    pub vm: VmId,
}

/// A snapshot of a VM in a path.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AgentSnapshotPath {
    /// The VM's id.
    pub vm: VmId,
    /// The snapshot's.
    pub snapshot: SnapshotId,
}

/// A part of an image in a pool, in a path.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PoolImagePath {
    /// The pool.
    pub pool: Name,
    /// The image.
    pub image: ImageId,
    /// The part.
    pub role: PartRole,
}

/// What an uploaded part must be.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct PartQuery {
    /// `raw` or `qcow2`.
    #[serde(default)]
    pub format: String,
    /// Its length.
    #[serde(default)]
    pub size_bytes: u64,
    /// Its SHA-256 in hexadecimal.
    #[serde(default)]
    pub sha256: String,
}

/// A part that was stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StoredPart {
    /// The size that a guest sees, in bytes.
    pub virtual_size_bytes: u64,
}

/// A migration in a path.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MigrationPath {
    /// Its operation's id.
    pub migration: OperationId,
}

/// Two snapshots of a VM, in a path.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ComparePath {
    /// The VM.
    pub vm: VmId,
    /// The earlier snapshot.
    pub from: SnapshotId,
    /// The later one.
    pub to: SnapshotId,
}

/// How to compare two snapshots.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct CompareQuery {
    /// Read all files, also those whose size and times agree.
    #[serde(default)]
    pub content: Option<bool>,
    /// How many changes of files to list; all are counted.
    #[serde(default)]
    pub list: Option<usize>,
}

/// A repository that is to be opened, or made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OpenRepository {
    /// The repository.
    pub access: RepositoryAccess,
    /// Make it, where there is none.
    pub init: bool,
}

/// A backup that is asked about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RepositoryContents {
    /// The repository.
    pub access: RepositoryAccess,
    /// The beginning of the backup's id.
    pub backup: String,
}

/// What is in a repository.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BackupList {
    /// The backups, the oldest first.
    pub backups: Vec<Backup>,
}

/// A backup with what it says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FoundBackup {
    /// The backup.
    pub backup: Backup,
    /// What it says of itself.
    pub contents: BackupContents,
}

crate::endpoints! {
    /// What this host has and can do.
    InventoryShow: GET "/v1/inventory", Json, HostView, path Nothing, query Nothing, body (), reply Inventory;
    /// All VMs of this host; waits for news when asked to.
    ReportShow: GET "/v1/report", Json, HostView, path Nothing, query ReportQuery, body (), reply AgentReport;
    /// Do something; the same task twice is the same as once.
    TaskPut: PUT "/v1/tasks/{task}", Json, VmConfigure, path TaskPath, query Nothing, body PutTask, reply Task;
    /// How a task stands; waits for news when asked to.
    TaskShow: GET "/v1/tasks/{task}", Json, OperationView, path TaskPath, query TaskQuery, body (), reply Task;
    /// Ask a task to stop and to leave nothing behind.
    TaskCancel: POST "/v1/tasks/{task}/cancel", Json, OperationCancel, path TaskPath, query Nothing, body (), reply Task;
    /// A VM's serial console, as a websocket of binary messages.
    ConsoleOpen: GET "/v1/vms/{vm}/console", WebSocket, VmConsole, path AgentVmPath, query Nothing, body (), reply ();
    /// What deleting a snapshot would free and cost.
    DeletionForecast: GET "/v1/vms/{vm}/snapshots/{snapshot}/deletion", Json, SnapshotView, path AgentSnapshotPath, query Nothing, body (), reply DeletionFacts;
    /// What differs between two snapshots of a VM. Takes as long as reading the directories of its disk.
    SnapshotCompare: GET "/v1/vms/{vm}/snapshots/{from}/compare/{to}", Json, SnapshotDiff, path ComparePath, query CompareQuery, body (), reply SnapshotDiff;
    /// Open a repository from this host, or make it.
    RepositoryOpen: POST "/v1/repository/open", Json, RepositoryManage, path Nothing, query Nothing, body OpenRepository, reply ();
    /// What is in a repository.
    RepositoryList: POST "/v1/repository/list", Json, SnapshotImport, path Nothing, query Nothing, body RepositoryAccess, reply BackupList;
    /// What a backup is of.
    RepositoryLook: POST "/v1/repository/look", Json, SnapshotImport, path Nothing, query Nothing, body RepositoryContents, reply FoundBackup;
    /// Put a part of an image into a pool, checking it.
    PoolImageUpload: PUT "/v1/pools/{pool}/images/{image}/parts/{role}", Upload, ImageImport, path PoolImagePath, query PartQuery, body (), reply StoredPart;
    /// The agent's metrics, in Prometheus' text format.
    AgentMetrics: GET "/metrics", Text, MetricsView, path Nothing, query Nothing, body (), reply ();

    /// For other hosts: the bytes of a part of an image.
    PeerImageDownload: GET "/v1/peer/pools/{pool}/images/{image}/parts/{role}", Download, ImageView, path PoolImagePath, query Nothing, body (), reply ();
    /// For other hosts: send a VM here, in the migration's own protocol; only one that was admitted.
    PeerMigrationOpen: POST "/v1/peer/migrations/{migration}", Upgrade, VmMigrate, path MigrationPath, query Nothing, body (), reply ();
}
