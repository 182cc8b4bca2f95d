//! Who may do what: the actions that exist.
//!
//! The list is closed: every route names one of these, and the policy engine knows no others. `public` is for what
//! anybody may ask (liveness, the API's description) and `enrol` for a machine that shows a join token.

use serde::{Deserialize, Serialize};

macro_rules! actions {
    ($($(#[doc = $doc:literal])* $name:ident = $text:literal;)*) => {
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
        }

        impl std::str::FromStr for Action {
            type Err = UnknownAction;
            fn from_str(text: &str) -> Result<Self, UnknownAction> {
                match text {
                    $($text => Ok(Self::$name),)*
                    _ => Err(UnknownAction { text: text.chars().take(64).collect() }),
                }
            }
        }
    };
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
    Public = "public";
    /// Join a machine to the cluster; proved by a join token.
    Enrol = "enrol";
    /// Renew the certificate of the host that asks; proved by its present one.
    CertificateRenew = "certificate.renew";
    /// Ask who one is and what one may do.
    SelfView = "self.view";
    /// Read the metrics.
    MetricsView = "metrics.view";
    /// See hosts.
    HostView = "host.view";
    /// Make join tokens.
    HostJoin = "host.join";
    /// Take a host out of the cluster.
    HostRemove = "host.remove";
    /// See segments.
    SegmentView = "segment.view";
    /// Make segments.
    SegmentCreate = "segment.create";
    /// Delete empty segments.
    SegmentDelete = "segment.delete";
    /// See images.
    ImageView = "image.view";
    /// Bring images in.
    ImageImport = "image.import";
    /// Delete unused images.
    ImageDelete = "image.delete";
    /// See VMs.
    VmView = "vm.view";
    /// Make VMs.
    VmCreate = "vm.create";
    /// Change a VM's settings.
    VmConfigure = "vm.configure";
    /// Start, restart and resume.
    VmStart = "vm.start";
    /// Shut down, stop and pause.
    VmStop = "vm.stop";
    /// Delete VMs.
    VmDelete = "vm.delete";
    /// Move VMs between hosts.
    VmMigrate = "vm.migrate";
    /// Use the serial console: whoever has it reads what the guest shows.
    VmConsole = "vm.console";
    /// See snapshots.
    SnapshotView = "snapshot.view";
    /// Take snapshots.
    SnapshotCreate = "snapshot.create";
    /// Put a VM back to a snapshot.
    SnapshotRestore = "snapshot.restore";
    /// Pin and unpin: say what the baseline is.
    SnapshotPin = "snapshot.pin";
    /// Delete snapshots.
    SnapshotDelete = "snapshot.delete";
    /// See operations.
    OperationView = "operation.view";
    /// Cancel operations.
    OperationCancel = "operation.cancel";
    /// Read the audit.
    AuditView = "audit.view";
    /// See users and tokens.
    UserView = "user.view";
    /// Make and delete users and their tokens.
    UserManage = "user.manage";
}
