//! QEMU's receiving side, for restores and migrations alike.
//!
//! The process was started with `-incoming defer -S`: it takes the machine in and stays paused, and with
//! `late-block-activate` it does not touch its disks before it is told to run. So a target that has loaded everything
//! is still harmless to a source that goes on. A restore has no such source.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use berth_qmp::commands::{
    Cont, GetFd, MigrateIncoming, MigrateSetParameters, MigrationStatus, QueryMigrate, QueryStatus,
};
use berth_qmp::{CloseReason, EventKind, Events, HostTime, Qmp, QmpError};

use super::outgoing::{set_capabilities, stream_pair};

const STREAM_FD: &str = "berth-incoming";
/// How long a loaded guest may take to run. Its disks are opened for writing in this time.
const RUN_TIMEOUT: Duration = Duration::from_secs(10);

/// Why taking in did not work.
#[derive(Debug, thiserror::Error)]
pub enum IncomingError {
    /// QEMU refused a command.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// QEMU could not read the stream.
    #[error("QEMU could not load the machine: {reason}")]
    Failed {
        /// In its words, as far as it had any.
        reason: String,
    },
    /// It has ended: older versions do when a stream breaks.
    #[error("QEMU ended while it loaded the machine ({reason})")]
    Ended {
        /// How the connection ended.
        reason: CloseReason,
    },
    /// A socket pair could not be made.
    #[error("no socket for the stream")]
    Socket(#[source] std::io::Error),
    /// The guest does not run.
    #[error("the guest was loaded and did not run within {} s", RUN_TIMEOUT.as_secs())]
    NotRunning,
}

/// Where a machine comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// From another QEMU, which may go on with the disks: they are left alone until the guest is told to run, and it is
    /// answered.
    Machine,
    /// From a snapshot: the layer that is written to is the process's own, and is ready before the guest is told to run.
    Snapshot,
}

/// A migration that QEMU takes in.
pub struct Incoming {
    qmp: Qmp,
    events: Events,
}

impl Incoming {
    /// Starts to take in. Write the stream to the socket.
    ///
    /// # Errors
    /// When QEMU refuses.
    pub async fn start(qmp: &Qmp, origin: Origin) -> Result<(Self, UnixStream), IncomingError> {
        let wanted: &[&str] = match origin {
            Origin::Machine => &["events", "late-block-activate", "return-path"],
            Origin::Snapshot => &["events"],
        };
        set_capabilities(qmp, wanted).await?;
        let events = qmp.events();
        let (ours, theirs) = stream_pair().map_err(IncomingError::Socket)?;
        qmp.call_with_fds(GetFd { name: STREAM_FD.into() }, vec![theirs]).await?;
        qmp.call(MigrateIncoming { uri: format!("fd:{STREAM_FD}") }).await?;
        Ok((Self { qmp: qmp.clone(), events }, ours))
    }

    /// Waits until all is loaded. The guest is paused then, its disks untouched.
    ///
    /// # Errors
    /// When QEMU can't read the stream, or ends.
    pub async fn until_loaded(&mut self) -> Result<(), IncomingError> {
        loop {
            match self.events.recv().await.map(|event| event.kind) {
                Some(EventKind::Migration(MigrationStatus::Completed)) => return Ok(()),
                Some(EventKind::Migration(MigrationStatus::Failed | MigrationStatus::Cancelled)) => {
                    let reason = self.qmp.call(QueryMigrate {}).await.ok().and_then(|info| info.error_desc);
                    let reason = reason.unwrap_or_else(|| "its log says more".into());
                    return Err(IncomingError::Failed { reason });
                }
                Some(_) => {}
                None => return Err(IncomingError::Ended { reason: self.qmp.closed().await }),
            }
        }
    }

    /// Lets the guest run, and says since when, by QEMU's clock.
    ///
    /// # Errors
    /// When QEMU refuses: another process holds the disk, for one.
    pub async fn run(&mut self) -> Result<HostTime, IncomingError> {
        self.qmp.call(Cont {}).await?;
        let resumed = self.events.wait_for(|kind| *kind == EventKind::Resume);
        let resumed = tokio::time::timeout(RUN_TIMEOUT, resumed).await;
        resumed.ok().flatten().map(|event| event.at).ok_or(IncomingError::NotRunning)
    }
}

/// Lets a guest that was loaded before run, if it does not yet; since when, if it was done now.
///
/// # Errors
/// As [`Incoming::run`].
pub async fn run_loaded(qmp: &Qmp) -> Result<Option<HostTime>, IncomingError> {
    if qmp.call(QueryStatus {}).await?.running {
        return Ok(None);
    }
    let mut incoming = Incoming { qmp: qmp.clone(), events: qmp.events() };
    incoming.run().await.map(Some)
}

/// Lifts what QEMU's defaults hold back on the receiving side.
///
/// # Errors
/// When QEMU refuses.
pub async fn lift_limits(qmp: &Qmp) -> Result<(), QmpError> {
    let parameters =
        MigrateSetParameters { bandwidth_bytes_per_second_max: Some(0), ..MigrateSetParameters::default() };
    qmp.call(parameters).await.map(|_| ())
}
