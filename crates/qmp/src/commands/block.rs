//! Disks: nodes, chains and the work on them.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Command, Done, command};

command! {
    /// Does several things at one instant, all or none.
    Transaction = "transaction" -> Done {
        /// What to do.
        actions: Vec<TransactionAction> = "actions",
    }
}

/// A thing that can be done in a transaction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
pub enum TransactionAction {
    /// Puts the prepared node `overlay` on top of `node`, which is not written any more.
    BlockdevSnapshot {
        /// The node that is frozen.
        node: String,
        /// The node that takes its place.
        overlay: String,
    },
}

/// Adds a block node. Its options are free, as every driver has its own; they must have `driver` and `node-name`.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(transparent)]
pub struct BlockdevAdd {
    /// The node's options, nested as QEMU wants them.
    pub options: Map<String, Value>,
}

impl Command for BlockdevAdd {
    const NAME: &'static str = "blockdev-add";
    type Reply = Done;
}

command! {
    /// Removes a block node that nothing uses.
    BlockdevDel = "blockdev-del" -> Done {
        /// The node.
        node_name: String = "node-name",
    }
}
command! {
    /// Asks for the named block nodes, without those below them.
    QueryNamedBlockNodes = "query-named-block-nodes" -> Vec<BlockNode> {
        /// `true` leaves out each node's tree of backing files, which grows with the square of the chain.
        flat: Option<bool> = "flat",
    }
}

/// A block node.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct BlockNode {
    /// Its name.
    #[serde(rename = "node-name")]
    pub node_name: Option<String>,
    /// The file, or QEMU's description of where the data is.
    pub file: String,
    /// The driver, such as `qcow2` or `file`.
    #[serde(rename = "drv")]
    pub driver: String,
    /// Whether it is only read.
    #[serde(rename = "ro")]
    pub read_only: bool,
    /// The file below it, when it has one.
    pub backing_file: Option<String>,
    /// How it uses the host's page cache.
    pub cache: Option<NodeCache>,
}

/// How a block node uses the host's page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct NodeCache {
    /// It goes past it.
    pub direct: bool,
}

command! {
    /// Asks for the guest's drives.
    QueryBlock = "query-block" -> Vec<Drive> {}
}

/// A drive of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Drive {
    /// The drive's old name, often empty.
    pub device: String,
    /// Its path in QEMU's object tree, or its id.
    pub qdev: Option<String>,
    /// What is in it.
    pub inserted: Option<BlockNode>,
    /// Whether its requests fail: `ok`, `failed` or `nospace`.
    #[serde(rename = "io-status")]
    pub io_status: Option<String>,
}

command! {
    /// Asks what the guest's drives have done.
    QueryBlockstats = "query-blockstats" -> Vec<DriveStatistics> {}
}

/// What a drive of the guest has done since its QEMU started.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct DriveStatistics {
    /// Its path in QEMU's object tree, or its id.
    pub qdev: Option<String>,
    /// The sums.
    pub stats: RequestStatistics,
}

/// Sums over a drive's requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub struct RequestStatistics {
    /// Reads that are done.
    #[serde(rename = "rd_operations")]
    pub reads: u64,
    /// Writes that are done.
    #[serde(rename = "wr_operations")]
    pub writes: u64,
    /// Flushes that are done.
    #[serde(rename = "flush_operations")]
    pub flushes: u64,
    /// What the reads took, in nanoseconds.
    #[serde(rename = "rd_total_time_ns")]
    pub read_ns: u64,
    /// What the writes took, in nanoseconds.
    #[serde(rename = "wr_total_time_ns")]
    pub write_ns: u64,
    /// What the flushes took, in nanoseconds.
    #[serde(rename = "flush_total_time_ns")]
    pub flush_ns: u64,
}

command! {
    /// Merges nodes downwards, in the background.
    BlockCommit = "block-commit" -> Done {
        /// The job's id.
        job_id: Option<String> = "job-id",
        /// The chain's top, by node or drive.
        device: String = "device",
        /// The node that is merged downwards, the chain's top when not given.
        top_node: Option<String> = "top-node",
        /// The node that takes the data, the chain's bottom when not given.
        base_node: Option<String> = "base-node",
        /// What the overlay's header says of its backing file afterwards.
        backing_file: Option<String> = "backing-file",
        /// The most to copy in a second, 0 for no limit.
        speed_bytes_per_second: Option<u64> = "speed",
        /// Whether the job ends by itself.
        auto_finalize: Option<bool> = "auto-finalize",
        /// Whether the job disappears by itself; `false` keeps its result readable.
        auto_dismiss: Option<bool> = "auto-dismiss",
    }
}
command! {
    /// Pulls data up from the nodes below, in the background.
    BlockStream = "block-stream" -> Done {
        /// The job's id.
        job_id: Option<String> = "job-id",
        /// The node that takes the data.
        device: String = "device",
        /// The node that stays below; all are pulled up when not given.
        base_node: Option<String> = "base-node",
        /// The most to copy in a second, 0 for no limit.
        speed_bytes_per_second: Option<u64> = "speed",
        /// Whether the job ends by itself.
        auto_finalize: Option<bool> = "auto-finalize",
        /// Whether the job disappears by itself.
        auto_dismiss: Option<bool> = "auto-dismiss",
    }
}
command! {
    /// Copies a node to another and keeps them equal until told otherwise.
    BlockdevMirror = "blockdev-mirror" -> Done {
        /// The job's id.
        job_id: Option<String> = "job-id",
        /// The node that is copied.
        device: String = "device",
        /// The node that takes the copy.
        target: String = "target",
        /// `full`, `top` or `none`.
        sync: String = "sync",
        /// `background` or `write-blocking`.
        copy_mode: Option<String> = "copy-mode",
        /// The most to copy in a second, 0 for no limit.
        speed_bytes_per_second: Option<u64> = "speed",
        /// Whether the job ends by itself.
        auto_finalize: Option<bool> = "auto-finalize",
        /// Whether the job disappears by itself.
        auto_dismiss: Option<bool> = "auto-dismiss",
    }
}
command! {
    /// Cancels a block job. A mirror that is ready ends well and leaves a true copy, unless `force` is set.
    BlockJobCancel = "block-job-cancel" -> Done {
        /// The job's id.
        device: String = "device",
        /// Whether a ready mirror is broken off.
        force: Option<bool> = "force",
    }
}
command! {
    /// Changes how fast a block job may be.
    BlockJobSetSpeed = "block-job-set-speed" -> Done {
        /// The job's id.
        device: String = "device",
        /// The most to copy in a second, 0 for no limit.
        speed_bytes_per_second: u64 = "speed",
    }
}
