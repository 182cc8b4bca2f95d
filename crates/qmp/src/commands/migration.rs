//! Migration: capabilities, parameters, start, progress, end.

use serde::{Deserialize, Serialize};

use super::{Done, command, open_enum};

command! {
    /// Starts to send this machine to `uri`, such as `unix:/path` or `fd:name`. The answer comes at once; progress
    /// comes by events and [`QueryMigrate`].
    Migrate = "migrate" -> Done {
        /// Where to.
        uri: String = "uri",
        /// Whether a paused post-copy is taken up again.
        resume: Option<bool> = "resume",
    }
}

impl Migrate {
    /// A new migration.
    #[must_use]
    pub fn to(uri: impl Into<String>) -> Self {
        Self { uri: uri.into(), resume: None }
    }

    /// The continuation of a post-copy migration that lost its link.
    #[must_use]
    pub fn resume_to(uri: impl Into<String>) -> Self {
        Self { uri: uri.into(), resume: Some(true) }
    }
}

command! {
    /// Starts to take a machine in; QEMU must have been started with `-incoming defer`.
    MigrateIncoming = "migrate-incoming" -> Done {
        /// Where from.
        uri: String = "uri",
    }
}
command! {
    /// Goes on after the pause that `pause-before-switchover` makes.
    MigrateContinue = "migrate-continue" -> Done {
        /// The status that is to be left: the command fails when it is another one.
        state: MigrationStatus = "state",
    }
}
command! {
    /// Cancels; the guest runs on here. Not in post-copy.
    MigrateCancel = "migrate_cancel" -> Done {}
}
command! {
    /// Switches to post-copy.
    MigrateStartPostcopy = "migrate-start-postcopy" -> Done {}
}
command! {
    /// Breaks off the link of a post-copy, to be taken up again.
    MigratePause = "migrate-pause" oob -> Done {}
}
command! {
    /// On the target: waits for a broken post-copy to be taken up again at `uri`.
    MigrateRecover = "migrate-recover" oob -> Done {
        /// Where from.
        uri: String = "uri",
    }
}
command! {
    /// Asks which capabilities there are, and which are on.
    QueryMigrateCapabilities = "query-migrate-capabilities" -> Vec<MigrationCapability> {}
}
command! {
    /// Switches capabilities; all or none are changed.
    MigrateSetCapabilities = "migrate-set-capabilities" -> Done {
        /// Those to change.
        capabilities: Vec<MigrationCapability> = "capabilities",
    }
}

impl MigrateSetCapabilities {
    /// Switches each named capability on or off.
    #[must_use]
    pub fn new<'a>(switches: impl IntoIterator<Item = (&'a str, bool)>) -> Self {
        let capability = |(name, on): (&str, bool)| MigrationCapability { name: name.to_owned(), on };
        Self { capabilities: switches.into_iter().map(capability).collect() }
    }
}

/// A capability and whether it is on. Names are words, as which ones there are differs by version: ask
/// [`crate::Abilities`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationCapability {
    /// QEMU's name, such as `postcopy-ram`.
    #[serde(rename = "capability")]
    pub name: String,
    /// Whether it is on.
    #[serde(rename = "state")]
    pub on: bool,
}

/// Sets parameters; those that are `None` stay as they are. Some may be changed while a migration runs.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct MigrateSetParameters {
    /// The most to send in a second, 0 for no limit. QEMU's own default is 128 MiB/s.
    #[serde(rename = "max-bandwidth")]
    pub bandwidth_bytes_per_second_max: Option<u64>,
    /// The same for post-copy's background pages.
    #[serde(rename = "max-postcopy-bandwidth")]
    pub postcopy_bandwidth_bytes_per_second_max: Option<u64>,
    /// The bandwidth that the forecast of the pause uses, instead of a measured one. From QEMU 8.2 on.
    #[serde(rename = "avail-switchover-bandwidth")]
    pub switchover_bandwidth_bytes_per_second: Option<u64>,
    /// How long the guest may stand still at the end. QEMU uses all of it.
    #[serde(rename = "downtime-limit")]
    pub downtime_limit_ms: Option<u64>,
}

impl super::Command for MigrateSetParameters {
    const NAME: &'static str = "migrate-set-parameters";
    type Reply = Done;
}

command! {
    /// Asks how the migration goes.
    QueryMigrate = "query-migrate" -> MigrationInfo {}
}

open_enum! {
    /// Where a migration stands.
    #[derive(Default)]
    MigrationStatus {
        /// None was ever started.
        #[default]
        None = "none",
        /// Connects.
        Setup = "setup",
        /// Being cancelled.
        Cancelling = "cancelling",
        /// Cancelled.
        Cancelled = "cancelled",
        /// Sends memory, guest running.
        Active = "active",
        /// Post-copy: the guest runs on the target.
        PostcopyActive = "postcopy-active",
        /// Post-copy has lost its link.
        PostcopyPaused = "postcopy-paused",
        /// The link is being set up again.
        PostcopyRecoverSetup = "postcopy-recover-setup",
        /// Both sides agree on what is missing.
        PostcopyRecover = "postcopy-recover",
        /// Done.
        Completed = "completed",
        /// Failed.
        Failed = "failed",
        /// Replicated by COLO.
        Colo = "colo",
        /// Stopped, waits for `migrate-continue`.
        PreSwitchover = "pre-switchover",
        /// Sends the devices' state.
        Device = "device",
        /// Waits for a device to let go.
        WaitUnplug = "wait-unplug",
    }
}

/// How a migration goes.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct MigrationInfo {
    /// Where it stands.
    #[serde(default)]
    pub status: MigrationStatus,
    /// Memory; once the migration is active.
    pub ram: Option<RamProgress>,
    /// Time since the start, or in all.
    #[serde(rename = "total-time")]
    pub total_time_ms: Option<u64>,
    /// Time that the set-up took.
    #[serde(rename = "setup-time")]
    pub setup_time_ms: Option<u64>,
    /// What QEMU believes the pause was; loading and starting on the target is not in it.
    #[serde(rename = "downtime")]
    pub downtime_ms: Option<u64>,
    /// What QEMU expects the pause to be.
    #[serde(rename = "expected-downtime")]
    pub expected_downtime_ms: Option<i64>,
    /// Why it failed.
    #[serde(rename = "error-desc")]
    pub error_desc: Option<String>,
    /// Why it can't be started.
    #[serde(rename = "blocked-reasons", default)]
    pub blocked_reasons: Vec<String>,
}

/// How far memory is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct RamProgress {
    /// Sent so far.
    #[serde(rename = "transferred")]
    pub transferred_bytes: u64,
    /// Left to send, as known.
    #[serde(rename = "remaining")]
    pub remaining_bytes: u64,
    /// The guest's memory.
    #[serde(rename = "total")]
    pub total_bytes: u64,
    /// Zero pages sent.
    #[serde(rename = "duplicate")]
    pub duplicate_pages: u64,
    /// Other pages sent.
    #[serde(rename = "normal")]
    pub normal_pages: u64,
    /// Pages that the guest changes in a second.
    #[serde(rename = "dirty-pages-rate")]
    pub dirty_pages_per_second: u64,
    /// Passes over the memory so far.
    #[serde(rename = "dirty-sync-count")]
    pub dirty_sync_count: u64,
    /// Throughput in megabits a second.
    pub mbps: f64,
    /// The size of a page in bytes.
    #[serde(rename = "page-size")]
    pub page_size_bytes: u64,
    /// Pages sent in a second.
    #[serde(rename = "pages-per-second")]
    pub pages_per_second: u64,
    /// Pages that the target asked for in post-copy.
    #[serde(rename = "postcopy-requests")]
    pub postcopy_requests: u64,
}
