//! The manager's contract: what users, the web console and other programs ask of a cluster.
//!
//! A VM is named in a path by its id or by `segment/name` (the slash percent-encoded); other things by id or name.
//! Changes that take time answer with an operation; who wants to wait asks [`OperationWait`].

use berth_model::access::Action;
use berth_model::image::{ImagePart, PartRole};
use berth_model::name::Name;
use berth_model::operation::{Operation, OperationState};
use berth_model::vm::{Firmware, Nic, Vm};
use berth_model::{ApprovalId, GrantId, HostId, OperationId, SegmentId, Timestamp, TokenId, UserId};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

mod access;
mod audit;
mod login;
mod repository;
mod routes;
mod schedule;
mod snapshot;

pub use access::*;
pub use audit::{
    AuditCheckpoint, AuditExportQuery, AuditKey, AuditListQuery, AuditRecord, ConsistencyProof,
    ConsistencyQuery, InclusionProof, InclusionQuery,
};
pub use login::*;
pub use repository::{CreateRepository, ExportSnapshot, ImportSnapshot};
pub use routes::*;
pub use schedule::{CreateSchedule, Doomed, ScheduleListQuery, ScheduleReport, ScheduledVm, UpdateSchedule};
pub use snapshot::{CloneSnapshot, CreateSnapshot, DIFF_LIST_MAX, DiffQuery, RestoreVm, VerifySnapshot};

/// Longest page of a list.
pub const PAGE_LIMIT_MAX: u32 = 5000;
/// Page of a list when none is asked for.
pub const PAGE_LIMIT_DEFAULT: u32 = 500;
/// Longest wait of one request, in milliseconds. Longer, and proxies in between begin to cut it off.
pub const WAIT_MS_MAX: u64 = 55_000;

/// Which page of a list.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct PageQuery {
    /// Most items in the answer.
    #[serde(default)]
    pub limit: Option<u32>,
    /// Where the last page ended: its `next_cursor`.
    #[serde(default)]
    pub cursor: Option<String>,
}

/// Which VMs.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct VmListQuery {
    /// Only those of this segment (id or name).
    #[serde(default)]
    pub segment: Option<String>,
    /// Only those on this host (id or name).
    #[serde(default)]
    pub host: Option<String>,
    /// Most items in the answer.
    #[serde(default)]
    pub limit: Option<u32>,
    /// Where the last page ended: its `next_cursor`.
    #[serde(default)]
    pub cursor: Option<String>,
}

/// Which operations.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct OperationListQuery {
    /// Only those about this VM (id or `segment/name`).
    #[serde(default)]
    pub vm: Option<String>,
    /// Only those of this kind (`vm.migrate`).
    #[serde(default)]
    pub kind: Option<String>,
    /// Only those that are not over.
    #[serde(default)]
    pub active: Option<bool>,
    /// Most items in the answer.
    #[serde(default)]
    pub limit: Option<u32>,
    /// Where the last page ended: its `next_cursor`.
    #[serde(default)]
    pub cursor: Option<String>,
}

/// How long to wait.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct WaitQuery {
    /// At most so many milliseconds.
    #[serde(default)]
    pub wait_ms: Option<u64>,
}

/// Only try: check everything that can be checked and change nothing.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ChangeQuery {
    /// Whether to only try.
    #[serde(default)]
    pub dry_run: Option<bool>,
}

/// How to delete.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct DeleteQuery {
    /// Also when it runs; protection is not overruled by it.
    #[serde(default)]
    pub force: Option<bool>,
    /// Whether to only try.
    #[serde(default)]
    pub dry_run: Option<bool>,
}

/// What is asked about.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct CanIQuery {
    /// The action (`snapshot.restore`).
    #[serde(default)]
    pub action: String,
    /// The resource (`default/books`, a segment's name); none: the cluster.
    #[serde(default)]
    pub resource: Option<String>,
}

macro_rules! paths {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty),* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Serialize, Deserialize)]
        pub struct $name { $($(#[$field_doc])* pub $field: $type),* }
    )*};
}

paths! {
    /// A VM in a path.
    VmPath { /** Id, or `segment/name`. */ vm: String }
    /// A snapshot of a VM in a path.
    SnapshotPath { /** The VM: id, or `segment/name`. */ vm: String, /** The snapshot: id or name. */ snapshot: String }
    /// A host in a path.
    HostPath { /** Id or name. */ host: String }
    /// A segment in a path.
    SegmentPath { /** Id or name. */ segment: String }
    /// An image in a path.
    ImagePath { /** Id, `segment/name`, or the name of one that is for all. */ image: String }
    /// A part of an image in a path.
    ImagePartPath { /** Id, `segment/name`, or the name of one that is for all. */ image: String, /** The part. */ role: PartRole }
    /// An operation in a path.
    OperationPath { /** Id. */ operation: OperationId }
    /// A user in a path.
    UserPath { /** Id or name. */ user: String }
    /// A token in a path.
    TokenPath { /** Id. */ token: TokenId }
    /// A team in a path.
    TeamPath { /** Id or name. */ team: String }
    /// A role in a path.
    RolePath { /** Name, or id. */ role_name: String }
    /// A grant in a path.
    GrantPath { /** Id. */ grant: GrantId }
    /// A policy in a path.
    PolicyPath { /** Id or name. */ policy: String }
    /// A repository in a path.
    RepositoryPath { /** Id or name. */ repository: String }
    /// A schedule in a path.
    SchedulePath { /** Id, or `segment/name`. */ schedule: String }
    /// An approval in a path.
    ApprovalPath { /** Id. */ approval: ApprovalId }
}

/// A page of a list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Page<T> {
    /// The items.
    pub items: Vec<T>,
    /// Where the next page begins; none: this is the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

/// Who the caller is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WhoAmI {
    /// The user's name.
    pub user: Name,
    /// The user's id.
    pub id: UserId,
    /// The teams that the user is in, by name.
    pub teams: Vec<Name>,
    /// The token or session that was shown.
    pub token: TokenId,
    /// How the caller proved who it is.
    pub method: String,
    /// What the token may be used for; none: for all that its owner may do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<Scope>,
}

/// Whether something is allowed, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CanIReply {
    /// Whether.
    pub allowed: bool,
    /// Why, in a sentence.
    pub reason: String,
}

/// Wish for a join token.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
pub struct CreateJoinToken {
    /// How long it may be used, in seconds; none: an hour.
    #[serde(default)]
    pub expires_s: Option<u64>,
}

/// A join token, shown once.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct JoinToken {
    /// The secret to give to `berth agent join`, once; it carries the CA's fingerprint.
    pub token: String,
    /// Until when.
    pub expires_at: Timestamp,
}

/// A machine that wants to join.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct EnrolRequest {
    /// The join token.
    pub token: String,
    /// The host's name to be.
    pub name: Name,
    /// Where its agent will listen, `address:port`.
    pub address: String,
    /// Certificate signing request in PEM; its key never leaves the machine.
    pub csr_pem: String,
}

/// The answer to a machine that joins or renews.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct EnrolReply {
    /// The host's id.
    pub host: HostId,
    /// Its certificate in PEM.
    pub certificate_pem: String,
    /// The cluster's CA in PEM.
    pub ca_pem: String,
}

/// A host that renews its certificate.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct RenewRequest {
    /// Certificate signing request in PEM.
    pub csr_pem: String,
}

/// A segment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Segment {
    /// Its id.
    pub id: SegmentId,
    /// Its name, unique in the cluster.
    pub name: Name,
    /// The segment that it is inside of: what is granted there, is granted here as well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<SegmentId>,
    /// The most that its VMs may be and take together.
    #[serde(default)]
    pub quota: Quota,
    /// When it was made.
    pub created_at: Timestamp,
}

/// Wish for a segment.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct CreateSegment {
    /// Its name.
    pub name: Name,
    /// The segment that it is to be inside of (id or name).
    #[serde(default)]
    pub parent: Option<String>,
    /// The most that its VMs may be and take together.
    #[serde(default)]
    pub quota: Quota,
}

/// Wish for an image: its parts are uploaded after this, each with [`ImagePartUpload`].
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct CreateImage {
    /// Its name, unique in its segment, or among those that are for all.
    pub name: Name,
    /// The segment whose VMs may use it (id or name); none: all.
    #[serde(default)]
    pub segment: Option<String>,
    /// Its parts, with format, size and checksum stated.
    pub parts: Vec<ImagePart>,
    /// The kernel's command line, for images with a kernel.
    #[serde(default)]
    pub kernel_command_line: String,
    /// The pool to put it in; none: `default`.
    #[serde(default)]
    pub pool: Option<Name>,
}

/// Wish for a VM.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct CreateVm {
    /// The segment (id or name).
    pub segment: String,
    /// Its name.
    pub name: Name,
    /// The image: id, `segment/name`, or the name of one of the segment's own or, failing that, of one for all.
    pub image: String,
    /// Virtual CPUs; none: 1.
    #[serde(default)]
    pub vcpus: Option<u32>,
    /// Memory in MiB; none: 1024.
    #[serde(default)]
    pub memory_mib: Option<u64>,
    /// Disk in MiB; none: the image's own size, at least 1024.
    #[serde(default)]
    pub disk_mib: Option<u64>,
    /// Data disks in MiB each, empty at first: beside the one that lies on the image.
    #[serde(default)]
    pub data_disks_mib: Vec<u64>,
    /// The pool; none: `default`.
    #[serde(default)]
    pub pool: Option<Name>,
    /// Network interfaces; none: one with an address of the cluster's own range.
    #[serde(default)]
    pub nics: Option<Vec<NewNic>>,
    /// cloud-init user data.
    #[serde(default)]
    pub user_data: Option<String>,
    /// The CPU model; none: one that every host offers.
    #[serde(default)]
    pub cpu_model: Option<String>,
    /// The machine type; none: the newest that every host offers.
    #[serde(default)]
    pub machine_type: Option<String>,
    /// What starts it; none: a BIOS.
    #[serde(default)]
    pub firmware: Option<Firmware>,
    /// It has a TPM.
    #[serde(default)]
    pub tpm: bool,
    /// The host to start on (id or name); none: Berth chooses.
    #[serde(default)]
    pub host: Option<String>,
    /// Held against deletion.
    #[serde(default)]
    pub protected: bool,
    /// What kind of VM it is to the policies; none: `standard`.
    #[serde(default)]
    pub class: Option<Name>,
    /// How long the guest may take to be ready, in seconds; none: 300.
    #[serde(default)]
    pub ready_timeout_s: Option<u32>,
    /// Make it, but don't start it.
    #[serde(default)]
    pub stopped: bool,
}

/// Wish for a network interface.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
pub struct NewNic {
    /// The Ethernet address; none: Berth chooses.
    #[serde(default)]
    pub mac: Option<String>,
    /// The IPv4 address with prefix length; none: Berth chooses; `dhcp`: the guest asks.
    #[serde(default)]
    pub address: Option<String>,
    /// With user-mode networking: ports to forward to the guest.
    #[serde(default)]
    pub forwards: Vec<berth_model::vm::PortForward>,
}

/// A VM with a network interface's wish made real.
pub type NicReply = Nic;

/// A change of a VM's settings; what is absent stays.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
pub struct UpdateVm {
    /// Held against deletion. To lift that needs `vm.classify`.
    #[serde(default)]
    pub protected: Option<bool>,
    /// What kind of VM it is to the policies; to change it needs `vm.classify`.
    #[serde(default)]
    pub class: Option<Name>,
    /// How long the guest may take to be ready, in seconds.
    #[serde(default)]
    pub ready_timeout_s: Option<u32>,
}

/// How to shut down.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
pub struct ShutdownVm {
    /// How long the guest may take, in seconds; none: 120.
    #[serde(default)]
    pub timeout_s: Option<u32>,
}

/// How to migrate.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
pub struct MigrateVm {
    /// The host to go to (id or name); none: Berth chooses.
    #[serde(default)]
    pub target: Option<String>,
    /// Most bytes a second to send; none: as the link takes.
    #[serde(default)]
    pub bandwidth_bytes_per_second: Option<u64>,
}

/// An operation that was begun, or, when only tried, would have been.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct OperationRef {
    /// The operation; none when it was only tried.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<Operation>,
    /// What it does or would do, in a sentence.
    pub summary: String,
    /// The VM as it was when the operation began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<Vm>,
}

/// A user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct User {
    /// Its id.
    pub id: UserId,
    /// Its name.
    pub name: Name,
    /// Shut out: none of its tokens and sessions is good.
    #[serde(default)]
    pub disabled: bool,
    /// The groups that login providers said it is in, when it last logged in through them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub external_groups: Vec<ExternalGroup>,
    /// When it was made.
    pub created_at: Timestamp,
}

/// Wish for a user.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct CreateUser {
    /// Its name.
    pub name: Name,
}

/// What kind of bearer secret it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TokenKind {
    /// Made by its owner, or by an administrator for it, for a program; it can't make others.
    #[default]
    Token,
    /// Came of a login.
    Session,
    /// Made at the cluster's first start, for its first administrator to begin with.
    First,
}

/// A token, without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Token {
    /// Its id.
    pub id: TokenId,
    /// Whose it is.
    pub user: UserId,
    /// What kind it is.
    #[serde(default)]
    pub kind: TokenKind,
    /// How its owner proved who it is when it was made: `password`, `oidc`, `ldap`; for other kinds, the kind.
    #[serde(default)]
    pub method: String,
    /// Whether a second factor was part of that.
    #[serde(default)]
    pub second_factor: bool,
    /// What it may be used for; none: for all that its owner may do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<Scope>,
    /// A word about it.
    pub note: String,
    /// When it was made.
    pub created_at: Timestamp,
    /// Until when; none: until revoked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
}

/// Wish for a token.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
pub struct CreateToken {
    /// Whose (id or name); none: the caller's.
    #[serde(default)]
    pub user: Option<String>,
    /// What it may be used for; none: for all that its owner may do.
    #[serde(default)]
    pub actions: Option<Vec<Action>>,
    /// In which segment (id or name); none: wherever its owner may.
    #[serde(default)]
    pub segment: Option<String>,
    /// A word about it.
    #[serde(default)]
    pub note: String,
    /// How long it is good, in seconds; none: until revoked.
    #[serde(default)]
    pub expires_s: Option<u64>,
}

/// A new token with its secret, shown once.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct NewToken {
    /// The token.
    pub token: Token,
    /// The bearer secret.
    pub secret: String,
}

/// That the manager lives.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// Its version.
    pub version: String,
    /// `ok`.
    pub status: String,
}

/// States in which an operation is over, for clients that wait.
pub const OVER: [OperationState; 3] =
    [OperationState::Succeeded, OperationState::Failed, OperationState::Cancelled];
