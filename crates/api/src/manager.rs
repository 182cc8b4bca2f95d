//! The manager's contract: what users, the web console and other programs ask of a cluster.
//!
//! A VM is named in a path by its id or by `segment/name` (the slash percent-encoded); other things by id or name.
//! Changes that take time answer with an operation; who wants to wait asks [`OperationWait`].

use berth_model::access::Action;
use berth_model::host::Host;
use berth_model::image::{Image, ImagePart, PartRole};
use berth_model::name::Name;
use berth_model::operation::{Operation, OperationState};
use berth_model::repository::Repository;
use berth_model::schedule::Schedule;
use berth_model::snapshot::Snapshot;
use berth_model::vm::{Firmware, Nic, Vm};
use berth_model::{ApprovalId, GrantId, HostId, OperationId, SegmentId, Timestamp, TokenId, UserId};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::agent::BackupList;
use crate::endpoint::Nothing;

mod access;
mod audit;
mod login;
mod repository;
mod schedule;
mod snapshot;

pub use access::*;
pub use audit::{
    AuditCheckpoint, AuditExportQuery, AuditKey, AuditListQuery, AuditRecord, ConsistencyProof,
    ConsistencyQuery, InclusionProof, InclusionQuery,
};
pub use login::*;
pub use repository::{CreateRepository, ExportSnapshot, ImportSnapshot};
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

crate::endpoints! {
    /// Whether the manager lives.
    HealthShow: GET "/healthz", Json, Public, path Nothing, query Nothing, body (), reply Health;
    /// This document.
    OpenApiShow: GET "/v1/openapi.json", Text, Public, path Nothing, query Nothing, body (), reply ();
    /// The manager's metrics, in Prometheus' text format.
    MetricsShow: GET "/metrics", Text, MetricsView, path Nothing, query Nothing, body (), reply ();
    /// Who the caller is.
    WhoAmIShow: GET "/v1/whoami", Json, SelfView, path Nothing, query Nothing, body (), reply WhoAmI;
    /// Whether the caller may do something, and why.
    CanI: GET "/v1/can-i", Json, SelfView, path Nothing, query CanIQuery, body (), reply CanIReply;
    /// The ways to log in.
    LoginShow: GET "/v1/login", Json, Login, path Nothing, query Nothing, body (), reply LoginWays;
    /// Begin a login with a name and a password.
    LoginBegin: POST "/v1/login", Json, Login, path Nothing, query Nothing, body LoginRequest, reply LoginReply;
    /// Go on with a login: answer exactly what it needs.
    LoginContinue: POST "/v1/login/{login}", Json, Login, path LoginPath, query Nothing, body LoginAnswer, reply LoginReply;
    /// Send a browser to a provider.
    OidcBegin: GET "/v1/login/oidc/{provider}", Text, Login, path ProviderPath, query Nothing, body (), reply ();
    /// Where the provider sends the browser back to; answers like a step of a login.
    OidcCallback: GET "/v1/login/oidc/{provider}/callback", Text, Login, path ProviderPath, query CallbackQuery, body (), reply ();
    /// Begin a login that is confirmed on another device.
    OidcDevice: POST "/v1/login/oidc/{provider}/device", Json, Login, path ProviderPath, query Nothing, body (), reply LoginReply;
    /// End the session that asks.
    Logout: POST "/v1/logout", Json, SelfChange, path Nothing, query Nothing, body (), reply ();
    /// Change one's own password; the other sessions end.
    OwnPasswordChange: POST "/v1/self/password", Json, SelfChange, path Nothing, query Nothing, body ChangePassword, reply ();
    /// Make a second factor; it counts after it was confirmed.
    OwnTotpEnrol: POST "/v1/self/totp", Json, SelfChange, path Nothing, query Nothing, body EnrolTotp, reply TotpOffer;
    /// Confirm the second factor with a code of it.
    OwnTotpConfirm: POST "/v1/self/totp/confirm", Json, SelfChange, path Nothing, query Nothing, body Code, reply RecoveryCodes;
    /// Remove the second factor with a code of it.
    OwnTotpRemove: POST "/v1/self/totp/remove", Json, SelfChange, path Nothing, query Nothing, body Code, reply ();
    /// One's own sessions, newest first.
    OwnSessionList: GET "/v1/self/sessions", Json, SelfView, path Nothing, query SessionListQuery, body (), reply Page<Session>;
    /// End one of one's own sessions.
    OwnSessionDelete: DELETE "/v1/self/sessions/{session}", Json, SelfChange, path SessionPath, query Nothing, body (), reply ();
    /// Who may do something.
    WhoCan: GET "/v1/who-can", Json, GrantView, path Nothing, query CanIQuery, body (), reply Page<Holder>;
    /// What the caller, or another user, may do.
    WhatCan: GET "/v1/what-can", Json, SelfView, path Nothing, query WhatCanQuery, body (), reply Page<Holding>;

    /// Make a token with which one machine can join.
    JoinTokenCreate: POST "/v1/join-tokens", Json, HostJoin, path Nothing, query Nothing, body CreateJoinToken, reply JoinToken;
    /// Join this machine to the cluster.
    HostEnrol: POST "/v1/enrol", Json, Enrol, path Nothing, query Nothing, body EnrolRequest, reply EnrolReply;
    /// Renew the certificate of the host that asks.
    CertificateRenew: POST "/v1/certificate", Json, CertificateRenew, path Nothing, query Nothing, body RenewRequest, reply EnrolReply;
    /// The hosts.
    HostList: GET "/v1/hosts", Json, HostView, path Nothing, query PageQuery, body (), reply Page<Host>;
    /// A host.
    HostShow: GET "/v1/hosts/{host}", Json, HostView, path HostPath, query Nothing, body (), reply Host;
    /// Take a host without VMs out of the cluster.
    HostDelete: DELETE "/v1/hosts/{host}", Json, HostRemove, path HostPath, query Nothing, body (), reply ();

    /// The segments.
    SegmentList: GET "/v1/segments", Json, SegmentView, path Nothing, query PageQuery, body (), reply Page<Segment>;
    /// Make a segment.
    SegmentCreate: POST "/v1/segments", Json, SegmentCreate, path Nothing, query Nothing, body CreateSegment, reply Segment;
    /// A segment, and what is used of its quota.
    SegmentShow: GET "/v1/segments/{segment}", Json, SegmentView, path SegmentPath, query Nothing, body (), reply SegmentReport;
    /// Rename a segment, or set its quota.
    SegmentUpdate: PATCH "/v1/segments/{segment}", Json, SegmentConfigure, path SegmentPath, query Nothing, body UpdateSegment, reply Segment;
    /// Delete an empty segment.
    SegmentDelete: DELETE "/v1/segments/{segment}", Json, SegmentDelete, path SegmentPath, query Nothing, body (), reply ();

    /// The images.
    ImageList: GET "/v1/images", Json, ImageView, path Nothing, query PageQuery, body (), reply Page<Image>;
    /// Declare an image whose parts will be uploaded.
    ImageCreate: POST "/v1/images", Json, ImageImport, path Nothing, query Nothing, body CreateImage, reply Image;
    /// An image.
    ImageShow: GET "/v1/images/{image}", Json, ImageView, path ImagePath, query Nothing, body (), reply Image;
    /// Upload a part; it is checked against what was declared, and the image is ready when all have arrived.
    ImagePartUpload: PUT "/v1/images/{image}/parts/{role}", Upload, ImageImport, path ImagePartPath, query Nothing, body (), reply Image;
    /// Delete an image that no VM needs.
    ImageDelete: DELETE "/v1/images/{image}", Json, ImageDelete, path ImagePath, query Nothing, body (), reply OperationRef;

    /// The VMs.
    VmList: GET "/v1/vms", Json, VmView, path Nothing, query VmListQuery, body (), reply Page<Vm>;
    /// Make a VM and start it.
    VmCreate: POST "/v1/vms", Json, VmCreate, path Nothing, query ChangeQuery, body CreateVm, reply OperationRef;
    /// A VM; its revision is in the ETag.
    VmShow: GET "/v1/vms/{vm}", Json, VmView, path VmPath, query Nothing, body (), reply Vm;
    /// Change a VM's settings (If-Match is honoured).
    VmUpdate: PATCH "/v1/vms/{vm}", Json, VmConfigure, path VmPath, query ChangeQuery, body UpdateVm, reply Vm;
    /// Delete a VM with its disk and snapshots (If-Match is honoured).
    VmDelete: DELETE "/v1/vms/{vm}", Json, VmDelete, path VmPath, query DeleteQuery, body (), reply OperationRef;
    /// Start a stopped VM.
    VmStart: POST "/v1/vms/{vm}/start", Json, VmStart, path VmPath, query ChangeQuery, body (), reply OperationRef;
    /// Ask the guest to power down, and wait until it has.
    VmShutdown: POST "/v1/vms/{vm}/shutdown", Json, VmStop, path VmPath, query ChangeQuery, body ShutdownVm, reply OperationRef;
    /// Take the power away.
    VmStop: POST "/v1/vms/{vm}/stop", Json, VmStop, path VmPath, query ChangeQuery, body (), reply OperationRef;
    /// Take the power away and give it back.
    VmRestart: POST "/v1/vms/{vm}/restart", Json, VmStart, path VmPath, query ChangeQuery, body (), reply OperationRef;
    /// Hold the guest.
    VmPause: POST "/v1/vms/{vm}/pause", Json, VmStop, path VmPath, query ChangeQuery, body (), reply OperationRef;
    /// Let a held guest go on.
    VmResume: POST "/v1/vms/{vm}/resume", Json, VmStart, path VmPath, query ChangeQuery, body (), reply OperationRef;
    /// Move a VM to another host while it runs.
    VmMigrate: POST "/v1/vms/{vm}/migrate", Json, VmMigrate, path VmPath, query ChangeQuery, body MigrateVm, reply OperationRef;
    /// The serial console, as a websocket of binary messages; the last of what it showed comes first.
    VmConsole: GET "/v1/vms/{vm}/console", WebSocket, VmConsole, path VmPath, query Nothing, body (), reply ();

    /// The snapshots of a VM, oldest first.
    SnapshotList: GET "/v1/vms/{vm}/snapshots", Json, SnapshotView, path VmPath, query PageQuery, body (), reply Page<Snapshot>;
    /// Take a snapshot of disk, memory and devices.
    SnapshotCreate: POST "/v1/vms/{vm}/snapshots", Json, SnapshotCreate, path VmPath, query ChangeQuery, body CreateSnapshot, reply OperationRef;
    /// A snapshot.
    SnapshotShow: GET "/v1/vms/{vm}/snapshots/{snapshot}", Json, SnapshotView, path SnapshotPath, query Nothing, body (), reply Snapshot;
    /// Delete a snapshot; the others stay.
    SnapshotDelete: DELETE "/v1/vms/{vm}/snapshots/{snapshot}", Json, SnapshotDelete, path SnapshotPath, query ChangeQuery, body (), reply OperationRef;
    /// Make this snapshot the VM's baseline, and hold it against deletion.
    SnapshotPin: POST "/v1/vms/{vm}/snapshots/{snapshot}/pin", Json, SnapshotPin, path SnapshotPath, query Nothing, body (), reply Snapshot;
    /// Hold this snapshot no longer; the baseline can't be let go.
    SnapshotUnpin: POST "/v1/vms/{vm}/snapshots/{snapshot}/unpin", Json, SnapshotPin, path SnapshotPath, query Nothing, body (), reply Snapshot;
    /// Make a new VM from a snapshot, running as the snapshot's VM was then.
    SnapshotClone: POST "/v1/vms/{vm}/snapshots/{snapshot}/clone", Json, SnapshotClone, path SnapshotPath, query ChangeQuery, body CloneSnapshot, reply OperationRef;
    /// See whether a snapshot is still what it was; the verdict is kept with it.
    SnapshotVerify: POST "/v1/vms/{vm}/snapshots/{snapshot}/verify", Json, SnapshotVerify, path SnapshotPath, query ChangeQuery, body VerifySnapshot, reply OperationRef;
    /// Put a snapshot into a repository; it takes `repository.view` on that as well.
    SnapshotExport: POST "/v1/vms/{vm}/snapshots/{snapshot}/export", Json, SnapshotExport, path SnapshotPath, query ChangeQuery, body ExportSnapshot, reply OperationRef;

    /// The repositories.
    RepositoryList: GET "/v1/repositories", Json, RepositoryView, path Nothing, query PageQuery, body (), reply Page<Repository>;
    /// Make a repository known, which a host has opened or made first.
    RepositoryCreate: POST "/v1/repositories", Json, RepositoryManage, path Nothing, query Nothing, body CreateRepository, reply Repository;
    /// One repository.
    RepositoryShow: GET "/v1/repositories/{repository}", Json, RepositoryView, path RepositoryPath, query Nothing, body (), reply Repository;
    /// Forget a repository and its keys; what is in it stays.
    RepositoryDelete: DELETE "/v1/repositories/{repository}", Json, RepositoryManage, path RepositoryPath, query Nothing, body (), reply ();
    /// The backups in a repository, read by a host.
    RepositoryBackups: GET "/v1/repositories/{repository}/backups", Json, SnapshotImport, path RepositoryPath, query Nothing, body (), reply BackupList;
    /// Make a new VM from a backup; it takes `vm.create` in the segment as well.
    SnapshotImport: POST "/v1/repositories/{repository}/import", Json, SnapshotImport, path RepositoryPath, query ChangeQuery, body ImportSnapshot, reply OperationRef;
    /// What differs between this snapshot of a VM and another one.
    SnapshotDiff: GET "/v1/vms/{vm}/snapshots/{snapshot}/diff", Json, SnapshotDiff, path SnapshotPath, query DiffQuery, body (), reply berth_model::diff::SnapshotDiff;
    /// Put a VM back to a snapshot, running as it was then.
    VmRestore: POST "/v1/vms/{vm}/restore", Json, SnapshotRestore, path VmPath, query ChangeQuery, body RestoreVm, reply OperationRef;

    /// The schedules.
    ScheduleList: GET "/v1/schedules", Json, ScheduleView, path Nothing, query ScheduleListQuery, body (), reply Page<Schedule>;
    /// Make a schedule; when only tried, the answer says when it would run and of what.
    ScheduleCreate: POST "/v1/schedules", Json, ScheduleManage, path Nothing, query ChangeQuery, body CreateSchedule, reply ScheduleReport;
    /// A schedule, how its last run went, and what comes next.
    ScheduleShow: GET "/v1/schedules/{schedule}", Json, ScheduleView, path SchedulePath, query Nothing, body (), reply ScheduleReport;
    /// Change a schedule, and answer for it from now on; when only tried, the answer says what would be deleted.
    ScheduleUpdate: PATCH "/v1/schedules/{schedule}", Json, ScheduleManage, path SchedulePath, query ChangeQuery, body UpdateSchedule, reply ScheduleReport;
    /// Let a schedule do nothing for now.
    SchedulePause: POST "/v1/schedules/{schedule}/pause", Json, ScheduleManage, path SchedulePath, query Nothing, body (), reply Schedule;
    /// Let it go on, and answer for it from now on; what came due meanwhile is not made up for.
    ScheduleResume: POST "/v1/schedules/{schedule}/resume", Json, ScheduleManage, path SchedulePath, query Nothing, body (), reply Schedule;
    /// Run a schedule now.
    ScheduleRunNow: POST "/v1/schedules/{schedule}/run", Json, ScheduleManage, path SchedulePath, query ChangeQuery, body (), reply ScheduleReport;
    /// Delete a schedule; the snapshots that it took stay.
    ScheduleDelete: DELETE "/v1/schedules/{schedule}", Json, ScheduleManage, path SchedulePath, query Nothing, body (), reply ();

    /// The operations, newest first.
    OperationList: GET "/v1/operations", Json, OperationView, path Nothing, query OperationListQuery, body (), reply Page<Operation>;
    /// An operation.
    OperationShow: GET "/v1/operations/{operation}", Json, OperationView, path OperationPath, query Nothing, body (), reply Operation;
    /// Wait until an operation is over, or the time is; answers how it stands then.
    OperationWait: GET "/v1/operations/{operation}/wait", Json, OperationView, path OperationPath, query WaitQuery, body (), reply Operation;
    /// An operation each time something of it changes, until it is over.
    OperationEvents: GET "/v1/operations/{operation}/events", Events, OperationView, path OperationPath, query Nothing, body (), reply Operation;
    /// Ask an operation to stop and to undo what it did.
    OperationCancel: POST "/v1/operations/{operation}/cancel", Json, OperationCancel, path OperationPath, query Nothing, body (), reply Operation;

    /// The audit, newest first.
    AuditList: GET "/v1/audit", Json, AuditView, path Nothing, query AuditListQuery, body (), reply Page<AuditRecord>;
    /// What the audit's log is now, signed.
    AuditCheckpointShow: GET "/v1/audit/checkpoint", Json, AuditView, path Nothing, query Nothing, body (), reply AuditCheckpoint;
    /// The public key that the audit's checkpoints are signed with.
    AuditKeyShow: GET "/v1/audit/key", Json, AuditView, path Nothing, query Nothing, body (), reply AuditKey;
    /// Proof that a record is in the audit's log.
    AuditInclusionShow: GET "/v1/audit/proof/inclusion", Json, AuditView, path Nothing, query InclusionQuery, body (), reply InclusionProof;
    /// Proof that the audit's log has only grown.
    AuditConsistencyShow: GET "/v1/audit/proof/consistency", Json, AuditView, path Nothing, query ConsistencyQuery, body (), reply ConsistencyProof;
    /// The audit, written out: as JSON lines that can be verified offline, as OCSF or as CEF.
    AuditExport: GET "/v1/audit/export", Download, AuditView, path Nothing, query AuditExportQuery, body (), reply ();

    /// The users.
    UserList: GET "/v1/users", Json, UserView, path Nothing, query PageQuery, body (), reply Page<User>;
    /// Make a user.
    UserCreate: POST "/v1/users", Json, UserManage, path Nothing, query Nothing, body CreateUser, reply User;
    /// Shut a user out: no token is good any more, and sessions, consoles and streams end at once.
    UserDisable: POST "/v1/users/{user}/disable", Json, UserManage, path UserPath, query Nothing, body (), reply User;
    /// Let a user in again.
    UserEnable: POST "/v1/users/{user}/enable", Json, UserManage, path UserPath, query Nothing, body (), reply User;
    /// How a user logs in.
    UserLoginShow: GET "/v1/users/{user}/login", Json, UserView, path UserPath, query Nothing, body (), reply UserLogin;
    /// Give a user a password that has to be changed at the next login; sessions end.
    UserPasswordReset: POST "/v1/users/{user}/password", Json, UserManage, path UserPath, query Nothing, body SetPassword, reply NewPassword;
    /// Remove a user's second factor; sessions end.
    UserTotpReset: POST "/v1/users/{user}/totp/reset", Json, UserManage, path UserPath, query Nothing, body (), reply ();
    /// Say who a user is at a provider or in a directory.
    UserIdentityLink: POST "/v1/users/{user}/identities", Json, UserManage, path UserPath, query Nothing, body LinkIdentity, reply Identity;
    /// Take that back; sessions end.
    UserIdentityUnlink: DELETE "/v1/users/{user}/identities", Json, UserManage, path UserPath, query IdentityQuery, body (), reply ();
    /// Delete a user with all tokens.
    UserDelete: DELETE "/v1/users/{user}", Json, UserManage, path UserPath, query Nothing, body (), reply ();
    /// The tokens, without their secrets.
    TokenList: GET "/v1/tokens", Json, UserView, path Nothing, query PageQuery, body (), reply Page<Token>;
    /// Make a token; its secret is shown once.
    TokenCreate: POST "/v1/tokens", Json, TokenCreate, path Nothing, query Nothing, body CreateToken, reply NewToken;
    /// A user.
    UserShow: GET "/v1/users/{user}", Json, UserView, path UserPath, query Nothing, body (), reply User;

    /// The teams.
    TeamList: GET "/v1/teams", Json, UserView, path Nothing, query PageQuery, body (), reply Page<Team>;
    /// Make a team.
    TeamCreate: POST "/v1/teams", Json, TeamManage, path Nothing, query Nothing, body CreateTeam, reply Team;
    /// A team.
    TeamShow: GET "/v1/teams/{team}", Json, UserView, path TeamPath, query Nothing, body (), reply Team;
    /// Change a team; who comes in must not get more than the caller has.
    TeamUpdate: PATCH "/v1/teams/{team}", Json, TeamManage, path TeamPath, query Nothing, body UpdateTeam, reply Team;
    /// Delete a team that has no grants and no teams in it.
    TeamDelete: DELETE "/v1/teams/{team}", Json, TeamManage, path TeamPath, query Nothing, body (), reply ();

    /// The roles, built-in ones first.
    RoleList: GET "/v1/roles", Json, SelfView, path Nothing, query PageQuery, body (), reply Page<Role>;
    /// Make a role, from nothing or as a copy.
    RoleCreate: POST "/v1/roles", Json, RoleManage, path Nothing, query Nothing, body CreateRole, reply Role;
    /// Change a role that somebody made.
    RoleUpdate: PATCH "/v1/roles/{role_name}", Json, RoleManage, path RolePath, query Nothing, body UpdateRole, reply Role;
    /// Delete a role that nobody has.
    RoleDelete: DELETE "/v1/roles/{role_name}", Json, RoleManage, path RolePath, query Nothing, body (), reply ();

    /// The grants that the caller may see, and its own.
    GrantList: GET "/v1/grants", Json, GrantView, path Nothing, query GrantListQuery, body (), reply Page<Grant>;
    /// Give a team or a user a role; one can give only what one has.
    GrantCreate: POST "/v1/grants", Json, GrantManage, path Nothing, query Nothing, body CreateGrant, reply Grant;
    /// Take a grant away.
    GrantDelete: DELETE "/v1/grants/{grant}", Json, GrantManage, path GrantPath, query Nothing, body (), reply ();
    /// Ask for a role for some time; somebody else approves.
    GrantRequest: POST "/v1/grant-requests", Json, GrantRequest, path Nothing, query Nothing, body RequestGrant, reply Approval;

    /// The policies that somebody wrote.
    PolicyList: GET "/v1/policies", Json, PolicyView, path Nothing, query PageQuery, body (), reply Page<Policy>;
    /// Write a policy; it is checked strictly, and begins in shadow.
    PolicyCreate: POST "/v1/policies", Json, PolicyManage, path Nothing, query Nothing, body CreatePolicy, reply PolicyReport;
    /// A policy, and what it changes or would change.
    PolicyShow: GET "/v1/policies/{policy}", Json, PolicyView, path PolicyPath, query Nothing, body (), reply PolicyReport;
    /// Let a policy count.
    PolicyActivate: POST "/v1/policies/{policy}/activate", Json, PolicyManage, path PolicyPath, query Nothing, body (), reply PolicyReport;
    /// Put a policy back into shadow.
    PolicyDeactivate: POST "/v1/policies/{policy}/deactivate", Json, PolicyManage, path PolicyPath, query Nothing, body (), reply PolicyReport;
    /// Delete a policy.
    PolicyDelete: DELETE "/v1/policies/{policy}", Json, PolicyManage, path PolicyPath, query Nothing, body (), reply ();

    /// What waits for a second person: the caller's own, and what it may decide.
    ApprovalList: GET "/v1/approvals", Json, SelfView, path Nothing, query PageQuery, body (), reply Page<Approval>;
    /// Approve: the request may be made again, once.
    ApprovalApprove: POST "/v1/approvals/{approval}/approve", Json, ApprovalDecide, path ApprovalPath, query Nothing, body (), reply Approval;
    /// Deny.
    ApprovalDeny: POST "/v1/approvals/{approval}/deny", Json, ApprovalDecide, path ApprovalPath, query Nothing, body (), reply Approval;

    /// Revoke a token.
    TokenDelete: DELETE "/v1/tokens/{token}", Json, UserManage, path TokenPath, query Nothing, body (), reply ();
}
