//! File descriptors given to QEMU: send these with [`crate::Qmp::call_with_fds`].

use serde::Deserialize;

use super::{Done, command};

command! {
    /// Gives QEMU one descriptor under a name, which `fd:NAME` then stands for.
    GetFd = "getfd" -> Done {
        /// The name; not all digits.
        name: String = "fdname",
    }
}
command! {
    /// Closes a descriptor that was given.
    CloseFd = "closefd" -> Done {
        /// The name.
        name: String = "fdname",
    }
}
command! {
    /// Gives QEMU one descriptor for a set, which the path `/dev/fdset/N` then stands for.
    AddFd = "add-fd" -> AddedFd {
        /// The set; a new one when not given.
        set_id: Option<u64> = "fdset-id",
        /// A note for people.
        opaque: Option<String> = "opaque",
    }
}

/// A descriptor in a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct AddedFd {
    /// The set.
    #[serde(rename = "fdset-id")]
    pub set_id: u64,
    /// The descriptor's number in QEMU.
    pub fd: i32,
}

command! {
    /// Removes a set once nothing uses it.
    RemoveFd = "remove-fd" -> Done {
        /// The set.
        set_id: u64 = "fdset-id",
    }
}
