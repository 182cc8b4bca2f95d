//! Block nodes offered to others over NBD.

use serde::Serialize;

use super::{Done, command};

command! {
    /// Starts to listen.
    NbdServerStart = "nbd-server-start" -> Done {
        /// Where.
        address: NbdAddress = "addr",
        /// How many may connect; no limit when not given.
        connections_max: Option<u32> = "max-connections",
    }
}

/// Where an NBD server listens. Only sockets of the file system: nothing of QEMU's faces the network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
pub enum NbdAddress {
    /// A unix socket.
    Unix {
        /// Its path.
        path: String,
    },
    /// A listening socket that was given to QEMU by `getfd`.
    Fd {
        /// Its name.
        str: String,
    },
}

command! {
    /// Stops listening and ends all exports.
    NbdServerStop = "nbd-server-stop" -> Done {}
}

command! {
    /// Offers a node.
    BlockExportAdd = "block-export-add" -> Done {
        /// How: `nbd`.
        kind: ExportKind = "type",
        /// The export's id.
        id: String = "id",
        /// The node.
        node_name: String = "node-name",
        /// The name that clients ask for; the node's when not given.
        name: Option<String> = "name",
        /// Whether clients may write.
        writable: Option<bool> = "writable",
    }
}

/// A way to offer a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExportKind {
    /// Over the NBD server.
    Nbd,
}

command! {
    /// Ends an offer. `BLOCK_EXPORT_DELETED` says when it is gone.
    BlockExportDel = "block-export-del" -> Done {
        /// The export's id.
        id: String = "id",
        /// Whether clients are cut off: `hard`; fails when there are any: `safe`, the default.
        mode: Option<String> = "mode",
    }
}
