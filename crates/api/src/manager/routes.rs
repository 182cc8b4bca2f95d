//! The routes of the manager: who asks what of whom, in one list.

use berth_model::host::Host;
use berth_model::image::Image;
use berth_model::operation::Operation;
use berth_model::repository::Repository;
use berth_model::schedule::Schedule;
use berth_model::snapshot::Snapshot;
use berth_model::vm::Vm;

use super::*;
use crate::agent::BackupList;
use crate::endpoint::Nothing;

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
