//! Devices of the guest.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Command, Done, command};

/// Plugs a device in. Its options are free, as every device has its own; they must have `driver`.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(transparent)]
pub struct DeviceAdd {
    /// The device's options.
    pub options: Map<String, Value>,
}

impl Command for DeviceAdd {
    const NAME: &'static str = "device_add";
    type Reply = Done;
}

command! {
    /// Asks the guest to let a device go; `DEVICE_DELETED` says when it has.
    DeviceDel = "device_del" -> Done {
        /// The device's id or path.
        id: String = "id",
    }
}
command! {
    /// Plugs a network cable in or out.
    SetLink = "set_link" -> Done {
        /// The network device or back end.
        name: String = "name",
        /// Whether it is in.
        up: bool = "up",
    }
}
command! {
    /// Tells the network where the guest now is.
    AnnounceSelf = "announce-self" -> Done {
        /// The first pause between announcements.
        initial_ms: u64 = "initial",
        /// The longest.
        max_ms: u64 = "max",
        /// How many.
        rounds: u64 = "rounds",
        /// How much each pause is longer than the one before.
        step_ms: u64 = "step",
    }
}
command! {
    /// Asks how much memory the guest has with its balloon.
    QueryBalloon = "query-balloon" -> Balloon {}
}

/// How much memory the guest has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Balloon {
    /// In bytes.
    #[serde(rename = "actual")]
    pub actual_bytes: u64,
}
