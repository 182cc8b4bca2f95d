//! Jobs: work that QEMU does in the background.

use serde::Deserialize;

use super::{Done, command, open_enum};

command! {
    /// Asks for the jobs that there are.
    QueryJobs = "query-jobs" -> Vec<Job> {}
}

/// A job.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Job {
    /// Its id.
    pub id: String,
    /// `commit`, `stream`, `mirror`, `create`, …
    #[serde(rename = "type")]
    pub kind: String,
    /// Where it stands.
    pub status: JobStatus,
    /// Done so far, in units of its own (bytes for block jobs).
    #[serde(rename = "current-progress", default)]
    pub current_progress: u64,
    /// In all, as known.
    #[serde(rename = "total-progress", default)]
    pub total_progress: u64,
    /// Why it failed.
    pub error: Option<String>,
}

open_enum! {
    /// Where a job stands.
    JobStatus {
        /// Not started.
        Created = "created",
        /// Works.
        Running = "running",
        /// Stopped for a while.
        Paused = "paused",
        /// Has caught up, waits to be completed or cancelled.
        Ready = "ready",
        /// Stopped while it was ready.
        Standby = "standby",
        /// Waits for others of its transaction.
        Waiting = "waiting",
        /// Waits for `job-finalize`.
        Pending = "pending",
        /// Is being undone.
        Aborting = "aborting",
        /// Done, well or badly; waits for `job-dismiss`.
        Concluded = "concluded",
        /// Gone.
        Null = "null",
        /// Never there.
        Undefined = "undefined",
    }
}

command! {
    /// Forgets a job that has concluded.
    JobDismiss = "job-dismiss" -> Done {
        /// The job.
        id: String = "id",
    }
}
command! {
    /// Cancels a job; a mirror that is ready is broken off.
    JobCancel = "job-cancel" -> Done {
        /// The job.
        id: String = "id",
    }
}
command! {
    /// Lets a job that is ready switch over and end.
    JobComplete = "job-complete" -> Done {
        /// The job.
        id: String = "id",
    }
}
command! {
    /// Lets a job that is pending end.
    JobFinalize = "job-finalize" -> Done {
        /// The job.
        id: String = "id",
    }
}
