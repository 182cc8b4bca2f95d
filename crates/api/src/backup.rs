//! What an agent says to the process that works on a repository for it, and what that answers.
//!
//! That process is `berth backup-worker`, a child of the agent: it needs much memory for a short time, and whatever happens to
//! it happens to nothing else. The request is the one line that it reads; what it writes are lines as well, of which the last
//! is the end. Passwords and keys go this way and no other: not as arguments, and not in the environment. When what it reads
//! from is closed it stops, so it does not outlive the agent.

use std::path::PathBuf;

use berth_model::repository::{Backup, ExportFacts, ImportFacts, RepositoryAccess};
use berth_model::{OperationId, Problem, VmId};
use serde::{Deserialize, Serialize};

/// The hidden subcommand of `berth` that is this process.
pub const WORKER_COMMAND: &str = "backup-worker";
/// What a backup's description of itself is called in it.
pub const CONTENTS_FILE: &str = "backup.json";

/// What is wanted.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct WorkerRequest {
    /// Of which repository.
    pub access: RepositoryAccess,
    /// What.
    pub work: Work,
}

/// What a repository can be asked for.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum Work {
    /// Make it, where there is none.
    Init,
    /// Open it.
    Open,
    /// Say what is in it.
    List,
    /// Say what one backup is of.
    Look {
        /// The beginning of its id.
        backup: String,
    },
    /// Put files in.
    Export {
        /// The VM's `segment/name`.
        full_name: String,
        /// The VM.
        vm: VmId,
        /// What the snapshot is called.
        snapshot: String,
        /// For which operation: it gets one backup, however often it is tried.
        operation: OperationId,
        /// Which files, each with its name in the backup.
        files: Vec<(String, PathBuf)>,
    },
    /// Take the files of a backup out, into an empty directory.
    Import {
        /// Its id.
        backup: String,
        /// The directory.
        directory: PathBuf,
        /// How long the files may be in all, holes counted.
        bytes_max: u64,
    },
}

/// What it says.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum WorkerEvent {
    /// How far it is.
    Progress {
        /// Bytes done.
        done_bytes: u64,
        /// Bytes in all.
        total_bytes: u64,
    },
    /// It is done.
    Done {
        /// What came of it.
        reply: WorkerReply,
    },
    /// It is not done.
    Failed {
        /// Why.
        problem: Problem,
    },
}

/// What came of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "of", rename_all = "kebab-case")]
pub enum WorkerReply {
    /// Nothing more than that it is done.
    Done,
    /// What is in the repository.
    Backups {
        /// All backups, the oldest first.
        backups: Vec<Backup>,
    },
    /// What a backup is of.
    Contents {
        /// The backup.
        backup: Backup,
        /// Its [`CONTENTS_FILE`], as it stands there.
        text: String,
    },
    /// A backup was made.
    Exported {
        /// What was measured.
        facts: ExportFacts,
    },
    /// A backup's files are there.
    Imported {
        /// What was measured.
        facts: ImportFacts,
    },
}
