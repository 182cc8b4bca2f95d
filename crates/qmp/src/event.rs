//! Events: what QEMU says unasked.
//!
//! The events in use are typed. Every other one, and one of these whose data has an unexpected form, arrives as
//! [`EventKind::Other`]: a newer QEMU must never break a session by having more to say.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::commands::{JobStatus, MigrationStatus};

/// An instant on the host's clock: microseconds since 1970-01-01 UTC. QEMU stamps its events with it, so two events
/// of one host can be subtracted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostTime(u64);

impl HostTime {
    /// QEMU could not read its clock, or did not say.
    pub const UNKNOWN: Self = Self(0);

    /// The instant that many microseconds after the epoch.
    #[must_use]
    pub fn from_epoch_us(us: u64) -> Self {
        Self(us)
    }

    /// Microseconds since the epoch.
    #[must_use]
    pub fn epoch_us(self) -> u64 {
        self.0
    }

    /// Microseconds from `earlier` to here; `None` when the order is the other way round or one is unknown.
    #[must_use]
    pub fn us_since(self, earlier: Self) -> Option<u64> {
        if self == Self::UNKNOWN || earlier == Self::UNKNOWN {
            return None;
        }
        self.0.checked_sub(earlier.0)
    }
}

/// Something that happened, and when.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// When, by QEMU's host.
    pub at: HostTime,
    /// What.
    pub kind: EventKind,
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum EventKind {
    /// The guest's processors stand still.
    Stop,
    /// They run again.
    Resume,
    /// QEMU is asked to end.
    Shutdown {
        /// Whether the guest did it.
        guest: bool,
        /// QEMU's word for why, such as `guest-shutdown` or `host-qmp-quit`.
        reason: String,
    },
    /// The guest was asked to switch off.
    Powerdown,
    /// The guest was reset.
    Reset {
        /// Whether the guest did it.
        guest: bool,
        /// QEMU's word for why.
        reason: String,
    },
    /// The migration's status changed (capability `events`).
    Migration(MigrationStatus),
    /// A pass over the guest's memory begins.
    MigrationPass(u64),
    /// A block job is done; [`BlockJob::error`] says whether well.
    BlockJobCompleted(BlockJob),
    /// A block job was cancelled.
    BlockJobCancelled(BlockJob),
    /// A mirror or an active commit has caught up.
    BlockJobReady(BlockJob),
    /// A block job met a fault.
    BlockJobError {
        /// The job's id.
        device: String,
        /// `read` or `write`.
        operation: String,
        /// What QEMU does about it: `ignore`, `report` or `stop`.
        action: String,
    },
    /// A job went on to another status.
    JobStatusChange {
        /// The job's id.
        id: String,
        /// The new status.
        status: JobStatus,
    },
    /// A guest's disk request failed.
    BlockIoError {
        /// The block node, where QEMU names one.
        node_name: Option<String>,
        /// `read` or `write`.
        operation: String,
        /// What QEMU does about it: `ignore`, `report` or `stop`.
        action: String,
        /// Whether the disk is full.
        nospace: bool,
        /// The fault in words.
        reason: String,
    },
    /// The guest's kernel says that it has panicked.
    GuestPanicked {
        /// What QEMU does about it: `pause`, `poweroff` or `run`.
        action: String,
    },
    /// A device was unplugged for good.
    DeviceDeleted {
        /// The device's id, when it has one.
        device: Option<String>,
        /// Its path in QEMU's object tree.
        path: String,
    },
    /// Anything else.
    Other {
        /// QEMU's name for it.
        name: String,
        /// Its data, `null` when it has none.
        data: Value,
    },
}

/// What an event says of a block job.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct BlockJob {
    /// `mirror`, `commit`, `stream` or `backup`.
    #[serde(rename = "type", default)]
    pub kind: String,
    /// The job's id.
    pub device: String,
    /// The work in all, in bytes.
    #[serde(rename = "len", default)]
    pub length_bytes: u64,
    /// The work done, in bytes.
    #[serde(rename = "offset", default)]
    pub done_bytes: u64,
    /// Why it failed, when it did.
    pub error: Option<String>,
}

impl Event {
    /// Reads a message that has an `event` key; `None` when that is not a name.
    pub(crate) fn from_object(mut object: Map<String, Value>) -> Option<Self> {
        let at = time_of(object.get("timestamp"));
        let data = object.remove("data").unwrap_or(Value::Null);
        let name = object.get("event")?.as_str()?;
        let kind = known(name, &data).unwrap_or_else(|| EventKind::Other { name: name.to_owned(), data });
        Some(Self { at, kind })
    }
}

fn time_of(timestamp: Option<&Value>) -> HostTime {
    // QEMU says -1 for both where the clock cannot be read.
    let part = |key| timestamp.and_then(|time| time.get(key)).and_then(Value::as_u64);
    let us = part("seconds").zip(part("microseconds"));
    us.and_then(|(seconds, us)| seconds.checked_mul(1_000_000)?.checked_add(us))
        .map_or(HostTime::UNKNOWN, HostTime)
}

fn known(name: &str, data: &Value) -> Option<EventKind> {
    let text = |key: &str| data.get(key).and_then(Value::as_str).map(str::to_owned);
    let word = |key: &str| text(key).unwrap_or_default();
    let flag = |key: &str| data.get(key).and_then(Value::as_bool).unwrap_or(false);
    Some(match name {
        "STOP" => EventKind::Stop,
        "RESUME" => EventKind::Resume,
        "SHUTDOWN" => EventKind::Shutdown { guest: flag("guest"), reason: word("reason") },
        "POWERDOWN" => EventKind::Powerdown,
        "RESET" => EventKind::Reset { guest: flag("guest"), reason: word("reason") },
        "MIGRATION" => EventKind::Migration(field(data, "status")?),
        "MIGRATION_PASS" => EventKind::MigrationPass(field(data, "pass")?),
        "BLOCK_JOB_COMPLETED" => EventKind::BlockJobCompleted(whole(data)?),
        "BLOCK_JOB_CANCELLED" => EventKind::BlockJobCancelled(whole(data)?),
        "BLOCK_JOB_READY" => EventKind::BlockJobReady(whole(data)?),
        "BLOCK_JOB_ERROR" => EventKind::BlockJobError {
            device: text("device")?,
            operation: word("operation"),
            action: word("action"),
        },
        "JOB_STATUS_CHANGE" => EventKind::JobStatusChange { id: text("id")?, status: field(data, "status")? },
        "BLOCK_IO_ERROR" => EventKind::BlockIoError {
            node_name: text("node-name"),
            operation: word("operation"),
            action: word("action"),
            nospace: flag("nospace"),
            reason: word("reason"),
        },
        "GUEST_PANICKED" => EventKind::GuestPanicked { action: word("action") },
        "DEVICE_DELETED" => EventKind::DeviceDeleted { device: text("device"), path: word("path") },
        _ => return None,
    })
}

fn whole<T: DeserializeOwned>(data: &Value) -> Option<T> {
    T::deserialize(data).ok()
}

fn field<T: DeserializeOwned>(data: &Value, key: &str) -> Option<T> {
    data.get(key).and_then(whole)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn event(value: Value) -> Event {
        let Value::Object(object) = value else { panic!("an object") };
        Event::from_object(object).expect("an event")
    }

    #[test]
    fn a_timestamp_becomes_microseconds_and_nonsense_becomes_unknown() {
        let stop =
            event(json!({"event": "STOP", "timestamp": {"seconds": 1_700_000_000, "microseconds": 5}}));
        assert_eq!(stop, Event { at: HostTime(1_700_000_000_000_005), kind: EventKind::Stop });
        for time in [
            json!({"seconds": -1, "microseconds": -1}),
            json!(7),
            json!({"seconds": u64::MAX, "microseconds": 1}),
        ] {
            assert_eq!(event(json!({"event": "STOP", "timestamp": time})).at, HostTime::UNKNOWN);
        }
    }

    #[test]
    fn what_is_new_or_misshapen_arrives_as_other() {
        for (name, data) in [
            ("DEVICE_TRAY_MOVED", json!({"id": "cd0", "tray-open": true})),
            ("SOMETHING_OF_QEMU_12", Value::Null),
            ("MIGRATION", json!({"status": 5})),
            ("JOB_STATUS_CHANGE", json!([])),
            ("BLOCK_JOB_COMPLETED", json!({"device": {}})),
        ] {
            let expected = EventKind::Other { name: name.into(), data: data.clone() };
            assert_eq!(event(json!({"event": name, "data": data})).kind, expected);
        }
    }

    #[test]
    fn a_migration_status_of_the_future_is_kept_as_a_word() {
        let kind = event(json!({"event": "MIGRATION", "data": {"status": "teleporting"}})).kind;
        assert_eq!(kind, EventKind::Migration(MigrationStatus::Unknown("teleporting".into())));
    }
}
