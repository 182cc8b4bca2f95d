//! Taking a guest's memory as it was at one instant while the guest goes on writing to it.
//!
//! QEMU keeps the state of the guest's devices, write-protects all memory, and lets the guest go on; a page that the guest
//! is about to write to is sent first (capability `background-snapshot`). So each page is sent once, whatever the
//! guest does. What it costs: the guest stalls at its first write to each page, and is paused while QEMU looks at each page
//! once, some 20 to 60 ms for 2 GiB.
//!
//! **The disk's instant** is the memory's because the guest is stopped by us, first:
//!
//! ```text
//! us      stop   switch layers   migrate ─────────────────────────► first page is there: go on
//! QEMU    STOP                   looks at all memory, write-protects, sends     RESUME   …sends the rest
//! ```
//!
//! The first page of memory in the stream is the sign that everything is protected: QEMU sends none before. A guest that
//! went on sooner would write to pages that are of the disk's instant no more.
//!
//! **Broken off** it must leave a guest that runs. QEMU takes the protection away when such a migration ends, whichever way
//! it ends, only since the release that [`releases_broken_off`] knows; 7.2 does so only when all was sent, and a guest whose snapshot was
//! cancelled, or whose agent died, waits for ever at its next write (its `bg_migration_completion`). There it isn't done.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use berth_qmp::commands::{Cont, GetFd, Migrate, MigrateSetParameters, MigrationStatus, QueryMigrate, Stop};
use berth_qmp::{EventKind, Events, HostTime, Qmp, QmpError};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::migration::outgoing::{self, OutgoingError, Passage};

/// What QEMU must be able to do.
const CAPABILITIES: [&str; 2] = ["background-snapshot", "events"];
/// The name that the stream's descriptor has in QEMU.
const STREAM_FD: &str = "berth-background";
/// How long QEMU may take to look at all memory and to protect it, the guest standing still: as long as for the last part
/// of a capture in passes.
const BEGIN_MAX: Duration = Duration::from_secs(30);
/// How often QEMU is asked how it goes.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// The first release of a machine type that exists only in a QEMU which is known to let a guest go on when its background
/// snapshot is broken off: read in its source (`bg_migration_iteration_finish`).
const RELEASES_SINCE_MACHINE: u32 = 10;

/// Whether every QEMU that has this machine type lets a guest go on when its background snapshot is broken off.
pub fn releases_broken_off(machine_type: &str) -> bool {
    crate::qemu::release_of_machine(machine_type).is_some_and(|major| major >= RELEASES_SINCE_MACHINE)
}

/// Whether this QEMU could do it now: its kernel lets it, and its guest's memory is of the right kind. All other
/// capabilities are off then.
pub async fn is_possible(qmp: &Qmp) -> bool {
    match outgoing::set_capabilities(qmp, &CAPABILITIES).await {
        Ok(()) => true,
        Err(error) => {
            tracing::debug!(%error, "QEMU can't take a snapshot in the background");
            false
        }
    }
}

/// A background snapshot that is about to be taken, or under way.
pub struct Background {
    qmp: Qmp,
    events: Events,
    /// When QEMU stopped the guest, by its own clock.
    stopped_at: HostTime,
}

impl Background {
    /// Makes QEMU ready and stops the guest; read from the socket at once. The layers are to be switched now.
    ///
    /// # Errors
    /// When QEMU refuses: the caller must let the guest go on.
    pub async fn stop(qmp: &Qmp) -> Result<(Self, UnixStream), OutgoingError> {
        outgoing::set_capabilities(qmp, &CAPABILITIES).await?;
        let no_limit = MigrateSetParameters { bandwidth_bytes_per_second_max: Some(0), ..Default::default() };
        qmp.call(no_limit).await?;
        let (ours, theirs) = outgoing::stream_pair().map_err(OutgoingError::Socket)?;
        qmp.call_with_fds(GetFd { name: STREAM_FD.into() }, vec![theirs]).await?;
        let events = qmp.events();
        qmp.call(Stop {}).await?;
        let mut background = Self { qmp: qmp.clone(), events, stopped_at: HostTime::UNKNOWN };
        background.stopped_at = background.wait_for(&EventKind::Stop).await?;
        Ok((background, ours))
    }

    /// Lets QEMU begin, and the guest go on as soon as its memory is protected: how long it stood, in microseconds.
    /// `first_page` says that the first page of memory has arrived.
    ///
    /// # Errors
    /// When it comes to nothing: the caller must then break it off.
    pub async fn begin(&mut self, first_page: oneshot::Receiver<()>) -> Result<u64, OutgoingError> {
        self.qmp.call(Migrate::to(format!("fd:{STREAM_FD}"))).await?;
        let protected = async {
            tokio::select! {
                biased;
                arrived = first_page => arrived.map_err(|_| OutgoingError::Stuck),
                failed = self.until_over() => Err(failed.err().unwrap_or(OutgoingError::Stuck)),
            }
        };
        tokio::time::timeout(BEGIN_MAX, protected).await.unwrap_or(Err(OutgoingError::Stuck))?;
        self.qmp.call(Cont {}).await?;
        let resumed_at = self.wait_for(&EventKind::Resume).await?;
        Ok(resumed_at.us_since(self.stopped_at).unwrap_or(0))
    }

    /// Waits until everything is sent. The guest runs.
    ///
    /// # Errors
    /// When it comes to nothing.
    pub async fn until_sent(
        &mut self,
        cancel: &CancellationToken,
        mut report: impl FnMut(Passage),
    ) -> Result<(), OutgoingError> {
        let mut looks = tokio::time::interval(LOOK_EVERY);
        let qmp = self.qmp.clone();
        loop {
            tokio::select! {
                over = self.until_over() => return over,
                _ = looks.tick() => {
                    let info = qmp.call(QueryMigrate {}).await?;
                    // Its events may have come before we listened for them here.
                    if info.status == MigrationStatus::Completed {
                        return Ok(());
                    }
                    outgoing::check(&qmp, &info.status).await?;
                    report(outgoing::passage(&info, 1));
                }
                () = cancel.cancelled() => return Err(OutgoingError::Cancelled),
            }
        }
    }

    /// Waits for QEMU's word that it is through, or that it came to nothing.
    async fn until_over(&mut self) -> Result<(), OutgoingError> {
        loop {
            match self.events.recv().await.map(|event| event.kind) {
                Some(EventKind::Migration(MigrationStatus::Completed)) => return Ok(()),
                Some(EventKind::Migration(status)) => outgoing::check(&self.qmp, &status).await?,
                Some(_) => {}
                None => return Err(self.gone().await),
            }
        }
    }

    async fn wait_for(&mut self, wanted: &EventKind) -> Result<HostTime, OutgoingError> {
        let waited = async {
            loop {
                match self.events.recv().await {
                    Some(event) if event.kind == *wanted => return Ok(event.at),
                    Some(_) => {}
                    None => return Err(self.gone().await),
                }
            }
        };
        tokio::time::timeout(BEGIN_MAX, waited).await.unwrap_or(Err(OutgoingError::Stuck))
    }

    async fn gone(&self) -> OutgoingError {
        OutgoingError::Qmp(QmpError::from(self.qmp.closed().await))
    }
}
