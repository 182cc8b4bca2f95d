//! Taking a guest's memory as it was at one instant while the guest goes on writing to it.
//!
//! QEMU stops the guest, keeps the state of its devices, write-protects all memory, and lets the guest go on; a page that the
//! guest is about to write to is sent first (capability `background-snapshot`). So each page is sent once, whatever the
//! guest does, and nothing has to be followed in a bitmap, which is what a guest under translation waits for.
//!
//! **The disk's instant.** QEMU stops the guest and lets it go on by itself, and takes in no command in between. If it were
//! stopped by us first, it would prepare memory (each page is looked at) with the guest standing still. So the guest's
//! processors are held ([`Holder`]) as soon as QEMU says that it has stopped them; QEMU goes on, and the guest does not,
//! until the layers are switched:
//!
//! ```text
//! QEMU     …prepares memory   STOP  flush, devices, write protection   RESUME   switches layers
//! us                               hold processors ───────────────────────────────────────────► let them go
//! ```
//!
//! Whether they were held before RESUME is seen by the clock; if not, the guest may have written to the disk between the
//! two instants, and it was for nothing. What QEMU itself does to the disk in between are requests that the memory still
//! has as not begun: a restored guest's machine carries them out again, with the same data.
//!
//! Memory must be anonymous, so a guest that was restored, whose memory is a mapped file, is taken the other way.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use berth_model::LayerId;
use berth_qmp::commands::{GetFd, Migrate, MigrateSetParameters, MigrationStatus, QueryMigrate};
use berth_qmp::{EventKind, Events, HostTime, Qmp, QmpError};
use tokio_util::sync::CancellationToken;

use super::vcpus::Holder;
use crate::migration::outgoing::{self, OutgoingError, Passage};
use crate::snapshot::layers;

/// What QEMU must be able to do.
const CAPABILITIES: [&str; 2] = ["background-snapshot", "events"];
/// The name that the stream's descriptor has in QEMU.
const STREAM_FD: &str = "berth-background";
/// How long QEMU may take from the command to the guest's going on: it looks at each page of memory first.
const BEGIN_MAX: Duration = Duration::from_secs(60);
/// How often QEMU is asked how it goes.
const LOOK_EVERY: Duration = Duration::from_millis(200);

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

/// A background snapshot under way.
pub struct Background {
    qmp: Qmp,
    events: Events,
}

impl Background {
    /// Begins; read from the socket at once.
    ///
    /// # Errors
    /// When QEMU refuses: the guest then runs as before.
    pub async fn start(qmp: &Qmp) -> Result<(Self, UnixStream), OutgoingError> {
        outgoing::set_capabilities(qmp, &CAPABILITIES).await?;
        let no_limit = MigrateSetParameters { bandwidth_bytes_per_second_max: Some(0), ..Default::default() };
        qmp.call(no_limit).await?;
        let events = qmp.events();
        let (ours, theirs) = outgoing::stream_pair().map_err(OutgoingError::Socket)?;
        qmp.call_with_fds(GetFd { name: STREAM_FD.into() }, vec![theirs]).await?;
        qmp.call(Migrate::to(format!("fd:{STREAM_FD}"))).await?;
        Ok((Self { qmp: qmp.clone(), events }, ours))
    }

    /// Holds the guest when QEMU stops it, and lets it go on when the layers are switched; how long it stood, in
    /// microseconds. `switched` is set when they are, also when there is an error.
    ///
    /// # Errors
    /// When it comes to nothing, or the guest may have run between the two instants: the caller must then abandon it.
    pub async fn switch(
        &mut self,
        holder: Holder,
        [old_top, new_top]: [&LayerId; 2],
        switched: &mut bool,
    ) -> Result<u64, OutgoingError> {
        let stopped = self.wait_for(&EventKind::Stop).await?;
        let held = holder.hold().await.map_err(not_held)?;
        layers::switch(&self.qmp, old_top, new_top).await?;
        *switched = true;
        let resumed = self.wait_for(&EventKind::Resume).await?;
        let released = holder.release().await.map_err(not_held)?;
        // At the same microseconds is as good as before: it may have been after.
        if resumed.us_since(held).is_none_or(|us| us == 0) {
            return Err(not_held(std::io::Error::other("it was let go before it was held")));
        }
        let us = |time: HostTime| time.us_since(stopped).unwrap_or(0);
        tracing::debug!(
            held = us(held),
            resumed = us(resumed),
            released = us(released),
            "the guest was paused"
        );
        Ok(us(released))
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
        loop {
            tokio::select! {
                event = self.events.recv() => match event.map(|event| event.kind) {
                    Some(EventKind::Migration(MigrationStatus::Completed)) => return Ok(()),
                    Some(EventKind::Migration(status)) => self.check(&status).await?,
                    Some(_) => {}
                    None => return Err(self.gone().await),
                },
                _ = looks.tick() => report(outgoing::passage(&self.qmp.call(QueryMigrate {}).await?, 1)),
                () = cancel.cancelled() => return Err(OutgoingError::Cancelled),
            }
        }
    }

    async fn wait_for(&mut self, wanted: &EventKind) -> Result<HostTime, OutgoingError> {
        let waited = async {
            loop {
                let event = self.events.recv().await;
                match event.map(|event| (event.kind, event.at)) {
                    Some((kind, at)) if kind == *wanted => return Ok(at),
                    Some((EventKind::Migration(status), _)) => self.check(&status).await?,
                    Some(_) => {}
                    None => return Err(self.gone().await),
                }
            }
        };
        tokio::time::timeout(BEGIN_MAX, waited).await.unwrap_or(Err(OutgoingError::Stuck))
    }

    async fn check(&self, status: &MigrationStatus) -> Result<(), OutgoingError> {
        outgoing::check(&self.qmp, status).await
    }

    async fn gone(&self) -> OutgoingError {
        OutgoingError::Qmp(QmpError::from(self.qmp.closed().await))
    }
}

fn not_held(error: std::io::Error) -> OutgoingError {
    OutgoingError::Failed { reason: format!("the guest's processors could not be held in time: {error}") }
}
