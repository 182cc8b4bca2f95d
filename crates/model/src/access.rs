//! Who may do what: the actions that exist, the groups they are in, and the roles that are made of them.
//!
//! The list is closed: every route names one of these, and the policy engine knows no others. Each action is in one
//! group. A role is a set of actions; the built-in ones can be copied, never changed, so that "operator" means the
//! same in every cluster. What reads all of a VM's data (console, commands in the guest, memory images) is in a group
//! of its own that no role has by the way.

use serde::{Deserialize, Serialize};

mod role;

pub use role::{BUILT_IN_ROLES, BuiltInRole, built_in_role};

/// What kind of action it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ActionGroup {
    /// Of the door itself: granted to nobody, decided by fixed policies.
    Door,
    /// Seeing.
    View,
    /// Running what is there: power, snapshots, restores, moves.
    Operate,
    /// Reading all of a VM's data. Each of these is a right of its own.
    Data,
    /// Making, changing and deleting.
    Configure,
    /// Deciding on others' risky changes, and reading what happened.
    Secure,
    /// Saying who may do what.
    Govern,
}

impl ActionGroup {
    /// Every group that actions can be granted from.
    pub const GRANTABLE: [Self; 6] =
        [Self::View, Self::Operate, Self::Data, Self::Configure, Self::Secure, Self::Govern];

    /// The group's name in policies.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Door => "door",
            Self::View => "view",
            Self::Operate => "operate",
            Self::Data => "data",
            Self::Configure => "configure",
            Self::Secure => "secure",
            Self::Govern => "govern",
        }
    }
}

macro_rules! actions {
    ($($(#[doc = $doc:literal])* $name:ident = $text:literal in $group:ident;)*) => {
        /// Something that can be done through the API.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema)]
        pub enum Action {$(
            $(#[doc = $doc])*
            #[serde(rename = $text)]
            $name,
        )*}

        impl Action {
            /// Every action.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The action's name, as in policies, audit and `berth can-i`.
            pub const fn as_str(self) -> &'static str {
                match self {$(Self::$name => $text),*}
            }

            /// The group that it is in.
            pub const fn group(self) -> ActionGroup {
                match self {$(Self::$name => ActionGroup::$group),*}
            }

            /// What it is, in a line.
            pub const fn meaning(self) -> &'static str {
                match self {$(Self::$name => concat!($($doc),*)),*}
            }
        }

        impl std::str::FromStr for Action {
            type Err = UnknownAction;
            fn from_str(text: &str) -> Result<Self, UnknownAction> {
                match text {
                    $($text => Ok(Self::$name),)*
                    // What people say who look for it among the things that are done to a VM.
                    "vm.restore" => Ok(Self::SnapshotRestore),
                    _ => Err(UnknownAction { text: text.chars().take(64).collect() }),
                }
            }
        }
    };
}

impl Action {
    /// Whether a role can have it.
    pub const fn is_grantable(self) -> bool {
        !matches!(self.group(), ActionGroup::Door)
    }
}

/// A word that is no action.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not an action")]
pub struct UnknownAction {
    /// What was given.
    pub text: String,
}

actions! {
    /// Ask whether the manager lives, and what its API is.
    Public = "public" in Door;
    /// Log in; proved by what the request says.
    Login = "login" in Door;
    /// Join a machine to the cluster; proved by a join token.
    Enrol = "enrol" in Door;
    /// Renew the certificate of the host that asks; proved by its present one.
    CertificateRenew = "certificate.renew" in Door;
    /// Ask who one is and what one may do.
    SelfView = "self.view" in Door;
    /// Change one's own password, second factor and sessions.
    SelfChange = "self.change" in Door;
    /// Make tokens with a part of one's own rights.
    TokenCreate = "token.create" in Door;
    /// Ask for a role for some time.
    GrantRequest = "grant.request" in Door;
    /// See hosts.
    HostView = "host.view" in View;
    /// See segments.
    SegmentView = "segment.view" in View;
    /// See images.
    ImageView = "image.view" in View;
    /// See VMs.
    VmView = "vm.view" in View;
    /// See snapshots.
    SnapshotView = "snapshot.view" in View;
    /// See schedules, and how their runs went.
    ScheduleView = "schedule.view" in View;
    /// See repositories; whoever may export into one has to see it.
    RepositoryView = "repository.view" in View;
    /// See operations.
    OperationView = "operation.view" in View;
    /// Start, restart and resume.
    VmStart = "vm.start" in Operate;
    /// Shut down, stop and pause.
    VmStop = "vm.stop" in Operate;
    /// Move VMs between hosts.
    VmMigrate = "vm.migrate" in Operate;
    /// Take snapshots.
    SnapshotCreate = "snapshot.create" in Operate;
    /// See whether snapshots are still what they were, by reading them or by starting a clone without a network.
    SnapshotVerify = "snapshot.verify" in Operate;
    /// Put a VM back to a snapshot.
    SnapshotRestore = "snapshot.restore" in Operate;
    /// Cancel operations.
    OperationCancel = "operation.cancel" in Operate;
    /// Use the serial console: whoever has it reads what the guest shows.
    VmConsole = "vm.console" in Data;
    /// Run commands in the guest.
    VmExec = "vm.exec" in Data;
    /// See what differs between snapshots: names of files are the guest's data.
    SnapshotDiff = "snapshot.diff" in Data;
    /// Read memory images: all that a guest knew at that moment.
    SnapshotMemory = "snapshot.memory" in Data;
    /// Put snapshots into a repository: all that the VM has and knew leaves the cluster.
    SnapshotExport = "snapshot.export" in Data;
    /// Say what is in a repository, and make VMs of it: asked of the repository, whosever VMs are in it.
    SnapshotImport = "snapshot.import" in Data;
    /// Make VMs.
    VmCreate = "vm.create" in Configure;
    /// Change a VM's settings.
    VmConfigure = "vm.configure" in Configure;
    /// Delete VMs.
    VmDelete = "vm.delete" in Configure;
    /// Make new VMs from snapshots; in another segment than the snapshot's it takes `snapshot.memory` as well.
    SnapshotClone = "snapshot.clone" in Configure;
    /// Pin and unpin: say what the baseline is.
    SnapshotPin = "snapshot.pin" in Configure;
    /// Delete snapshots.
    SnapshotDelete = "snapshot.delete" in Configure;
    /// Make, change, pause, run and delete schedules.
    ScheduleManage = "schedule.manage" in Configure;
    /// Make repositories known, and forget them.
    RepositoryManage = "repository.manage" in Configure;
    /// Bring images in.
    ImageImport = "image.import" in Configure;
    /// Delete unused images.
    ImageDelete = "image.delete" in Configure;
    /// Make segments.
    SegmentCreate = "segment.create" in Configure;
    /// Rename segments, and set their quotas.
    SegmentConfigure = "segment.configure" in Configure;
    /// Delete empty segments.
    SegmentDelete = "segment.delete" in Configure;
    /// Make join tokens.
    HostJoin = "host.join" in Configure;
    /// Take a host out of the cluster.
    HostRemove = "host.remove" in Configure;
    /// Read the metrics.
    MetricsView = "metrics.view" in Secure;
    /// Read the audit.
    AuditView = "audit.view" in Secure;
    /// Approve or deny what needs a second person.
    ApprovalDecide = "approval.decide" in Secure;
    /// Say of which class a VM is, and lift its protection.
    VmClassify = "vm.classify" in Secure;
    /// See users, teams, and others' tokens.
    UserView = "user.view" in Govern;
    /// Make, change, disable and delete users, and their tokens.
    UserManage = "user.manage" in Govern;
    /// Make, change and delete teams.
    TeamManage = "team.manage" in Govern;
    /// See grants and roles, and who can do what.
    GrantView = "grant.view" in Govern;
    /// Make and take away grants.
    GrantManage = "grant.manage" in Govern;
    /// Make, change and delete roles.
    RoleManage = "role.manage" in Govern;
    /// See policies.
    PolicyView = "policy.view" in Govern;
    /// Make, activate and delete policies.
    PolicyManage = "policy.manage" in Govern;
    /// Say where the audit goes to, and switch that off.
    AuditConfigure = "audit.configure" in Govern;
}
