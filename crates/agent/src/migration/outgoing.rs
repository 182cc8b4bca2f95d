//! QEMU's sending side, for snapshots and migrations alike: both take the guest's memory while it runs, stop it for the
//! last of it, and differ in who reads the stream.
//!
//! The stream leaves QEMU through one end of a socket pair that it is given as a descriptor, so nothing has to listen
//! anywhere, QEMU's sandbox need not allow it to connect, and whoever holds the other end is the only reader. When the
//! agent dies, its end closes, and QEMU's migration fails by itself.
//!
//! **Where the guest runs.** Until [`Outgoing::finish`] returns, here: a migration that fails or is cancelled before
//! lets the guest go on, by QEMU itself or by [`settle`]. After it the guest is stopped, its disks are let go, and
//! `cont` takes both back.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use berth_model::{Problem, ProblemCode};
use berth_qmp::commands::{
    Cont, GetFd, Migrate, MigrateCancel, MigrateContinue, MigrateSetCapabilities, MigrateSetParameters,
    MigrationInfo, MigrationStatus, QueryMigrate, QueryMigrateCapabilities, QueryStatus,
};
use berth_qmp::{EventKind, Events, HostTime, Qmp, QmpError};
use tokio_util::sync::CancellationToken;

use super::convergence::{Advice, Convergence, PauseBudget};
use crate::durable::with_causes;

/// The name that a stream's descriptor has in QEMU.
const STREAM_FD: &str = "berth-stream";
/// What QEMU may have written that nobody has read, in bytes. More: it is all sent within the pause, and QEMU believes
/// that it was sent before. Less: more switches between the two processes.
const STREAM_BUFFER_BYTES: usize = 256 << 10;
/// QEMU may slow a guest down when it rewrites this much of what is sent in the same time. That is so at the end of every
/// migration, when each pass sends just what the last one left: so QEMU is not left to decide when, and this is low.
const THROTTLE_THRESHOLD_PERCENT: u32 = 1;
/// The least that QEMU can slow a guest down by, in percent: for as long as it is not to be slowed down.
const THROTTLE_NOT_PERCENT: u32 = 1;
/// The first step in which a guest is slowed down, and each further one, in percent.
const THROTTLE_STEP_PERCENT: u32 = 20;
/// How often QEMU is asked how it goes.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How long a guest may take to run again after a failure.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a QEMU that gives up is looked at, if it says nothing.
const SETTLE_LOOK_EVERY: Duration = Duration::from_millis(50);
/// How many looks find a QEMU giving up before it is taken to wait for something. The guest stands still meanwhile; it
/// is done in a millisecond or two otherwise.
const LOOKS_AT_CANCELLING: u32 = 4;

/// Why sending did not work.
#[derive(Debug, thiserror::Error)]
pub enum OutgoingError {
    /// QEMU refused a command or is gone.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// QEMU gave up.
    #[error("QEMU gave up sending the machine: {reason}")]
    Failed {
        /// In its words, as far as it had any.
        reason: String,
    },
    /// It was asked to stop.
    #[error("it was cancelled")]
    Cancelled,
    /// The guest is too busy.
    #[error(
        "the guest rewrites its memory faster than it can be sent: after {passes} passes over it the rest does not fit into a pause of {limit_ms} ms"
    )]
    TooFast {
        /// Passes that were made.
        passes: u64,
        /// The longest pause that was allowed.
        limit_ms: u64,
    },
    /// The last part hangs.
    #[error("QEMU did not come to an end with it in time")]
    Stuck,
    /// A socket pair could not be made.
    #[error("no socket for the stream")]
    Socket(#[source] std::io::Error),
}

impl From<OutgoingError> for Problem {
    fn from(error: OutgoingError) -> Self {
        let code = match &error {
            OutgoingError::Cancelled => ProblemCode::Cancelled,
            OutgoingError::TooFast { .. } => ProblemCode::Guest,
            OutgoingError::Qmp(_) | OutgoingError::Failed { .. } | OutgoingError::Stuck => {
                ProblemCode::Hypervisor
            }
            OutgoingError::Socket(_) => ProblemCode::Internal,
        };
        Problem::new(code, with_causes(&error))
    }
}

/// How many of the longest pauses must be left for a guest to be called too fast at once. Fewer: one that would be caught a
/// little later is given up. More: one that never is costs its host seconds of sending.
const HOPELESS_PAUSES: u64 = 4;
/// How much of what is sent must have been rewritten meanwhile for that, in percent. At 80, sixteen passes make 600 MiB small enough.
const HOPELESS_PERCENT: u64 = 80;

/// How to send.
#[derive(Debug, Clone, Copy)]
pub struct Sending {
    /// How long the pause may be.
    pub budget: PauseBudget,
    /// Most bytes a second while the guest runs; none: as fast as it is read.
    pub bandwidth_bytes_per_second: Option<u64>,
    /// The reader answers: QEMU is done only when the reader says that it has everything.
    pub return_path: bool,
    /// Slow the guest down when it will not converge otherwise; if not, it is given up then.
    pub slow_guest_down: bool,
    /// How long QEMU may take for the last part, guest stopped. It is megabytes: longer means that the other end hangs,
    /// and the guest stands still for as long.
    pub finish_timeout: Duration,
}

/// How it goes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Passage {
    /// The pass over memory, from 1.
    pub pass: u64,
    /// Sent so far.
    pub sent_bytes: u64,
    /// Left, as known.
    pub left_bytes: u64,
    /// The guest's memory.
    pub total_bytes: u64,
    /// What the guest rewrites in a second.
    pub dirty_bytes_per_second: u64,
    /// What is sent in a second.
    pub bytes_per_second: u64,
}

impl Passage {
    /// Whether passes will not catch the guest, or not soon, if it may be paused for so long at most: it rewrites memory
    /// nearly as fast as that is sent, and far more is left than fits into the pause. (Never faster, as QEMU counts it: a
    /// page that is rewritten twice in a pass counts once.) The first two passes don't tell: one is all of
    /// memory, the other what was rewritten meanwhile.
    fn is_hopeless(&self, pause_ms_max: u64) -> bool {
        let fits_bytes = self.bytes_per_second.saturating_mul(pause_ms_max) / 1000;
        self.pass > 2
            && self.bytes_per_second > 0
            && self.dirty_bytes_per_second / HOPELESS_PERCENT >= self.bytes_per_second / 100
            && self.left_bytes > fits_bytes.saturating_mul(HOPELESS_PAUSES)
    }
}

/// A migration that QEMU is sending.
pub struct Outgoing {
    qmp: Qmp,
    events: Events,
    convergence: Convergence,
    slow_guest_down: bool,
    max_ms: u64,
    finish_timeout: Duration,
    started: Instant,
    pass: u64,
    stopped_at: Option<HostTime>,
    /// What happened in the pause, and when, by the host's clock.
    marks: Vec<(&'static str, HostTime)>,
}

impl Outgoing {
    /// Starts to send. The guest runs on; read from the socket.
    ///
    /// # Errors
    /// When QEMU refuses: the guest then runs as before.
    pub async fn start(qmp: &Qmp, sending: Sending) -> Result<(Self, UnixStream), OutgoingError> {
        let mut wanted = vec!["events", "pause-before-switchover"];
        wanted.extend(sending.return_path.then_some("return-path"));
        wanted.extend(sending.slow_guest_down.then_some("auto-converge"));
        set_capabilities(qmp, &wanted).await?;
        qmp.call(MigrateSetParameters {
            bandwidth_bytes_per_second_max: Some(sending.bandwidth_bytes_per_second.unwrap_or(0)),
            downtime_limit_ms: Some(sending.budget.start_ms),
            ..MigrateSetParameters::default()
        })
        .await?;
        if sending.slow_guest_down {
            set_throttle(qmp, THROTTLE_NOT_PERCENT).await?;
        }
        let events = qmp.events();
        let (ours, theirs) = stream_pair().map_err(OutgoingError::Socket)?;
        qmp.call_with_fds(GetFd { name: STREAM_FD.into() }, vec![theirs]).await?;
        qmp.call(Migrate::to(format!("fd:{STREAM_FD}"))).await?;
        let outgoing = Self {
            qmp: qmp.clone(),
            events,
            convergence: Convergence::new(sending.budget),
            slow_guest_down: sending.slow_guest_down,
            max_ms: sending.budget.max_ms,
            finish_timeout: sending.finish_timeout,
            started: Instant::now(),
            pass: 0,
            stopped_at: None,
            marks: Vec::new(),
        };
        Ok((outgoing, ours))
    }

    /// Waits until QEMU has stopped the guest and waits for [`Self::finish`]: its disks are flushed and still.
    ///
    /// # Errors
    /// When it comes to nothing: the caller must then [`Self::abandon`] it.
    pub async fn until_switchover(
        &mut self,
        cancel: &CancellationToken,
        mut report: impl FnMut(Passage),
    ) -> Result<(), OutgoingError> {
        let mut looks = tokio::time::interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                event = self.events.recv() => match event.map(|event| (event.kind, event.at)) {
                    Some((EventKind::Migration(MigrationStatus::PreSwitchover), at)) => {
                        self.marks.push(("flushed", at));
                        return Ok(());
                    }
                    Some((EventKind::Migration(status), _)) => self.check(&status).await?,
                    Some((EventKind::MigrationPass(pass), _)) => self.pass = pass,
                    Some((EventKind::Stop, at)) => self.stopped_at = Some(at),
                    Some(_) => {}
                    None => return Err(self.gone().await),
                },
                _ = looks.tick() => report(self.look().await?),
                () = cancel.cancelled() => return Err(OutgoingError::Cancelled),
            }
        }
    }

    /// Lets QEMU send the last part, and waits until it is sent (and, with a return path, loaded). The guest is then
    /// stopped and its disks let go.
    ///
    /// # Errors
    /// When it comes to nothing: the caller must then [`Self::abandon`] it.
    pub async fn finish(&mut self) -> Result<(), OutgoingError> {
        self.mark("switched");
        self.go_on().await?;
        self.mark("told to go on");
        let finish_timeout = self.finish_timeout;
        let finished = async {
            loop {
                let event = self.events.recv().await;
                match event.map(|event| (event.kind, event.at)) {
                    Some((EventKind::Migration(MigrationStatus::Completed), at)) => {
                        self.marks.push(("sent", at));
                        return Ok(());
                    }
                    Some((EventKind::Migration(status), _)) => self.check(&status).await?,
                    Some((EventKind::MigrationPass(pass), at)) => {
                        self.marks.push(("synced", at));
                        self.pass = pass;
                    }
                    Some(_) => {}
                    None => return Err(self.gone().await),
                }
            }
        };
        tokio::time::timeout(finish_timeout, finished).await.unwrap_or(Err(OutgoingError::Stuck))
    }

    /// The word for which QEMU waits with the last part. One that has kept a word from a migration before, which was
    /// given up just then, does not wait: that is no harm here, for nothing is done in this time.
    async fn go_on(&self) -> Result<(), OutgoingError> {
        match self.qmp.call(MigrateContinue { state: MigrationStatus::PreSwitchover }).await {
            Ok(_) => Ok(()),
            Err(error @ QmpError::Command { .. }) => match self.qmp.call(QueryMigrate {}).await?.status {
                MigrationStatus::Device | MigrationStatus::Completed => Ok(()),
                _ => Err(error.into()),
            },
            Err(error) => Err(error.into()),
        }
    }

    /// As [`Self::finish`], for a reader that hangs up at the end instead of answering: QEMU then calls it a failure and
    /// keeps its disks. Whether all was read only the reader knows.
    ///
    /// # Errors
    /// As [`Self::finish`].
    pub async fn finish_unanswered(&mut self) -> Result<(), OutgoingError> {
        self.qmp.call(MigrateContinue { state: MigrationStatus::PreSwitchover }).await?;
        let over = |kind: &EventKind| {
            matches!(kind, EventKind::Migration(MigrationStatus::Failed | MigrationStatus::Completed))
        };
        match tokio::time::timeout(self.finish_timeout, self.events.wait_for(over)).await {
            Ok(Some(_)) => Ok(()),
            Ok(None) => Err(self.gone().await),
            Err(_) => Err(OutgoingError::Stuck),
        }
    }

    /// Lets the guest run here again after [`Self::finish`], and says how long it stood still, in microseconds.
    ///
    /// # Errors
    /// When QEMU refuses.
    pub async fn take_back(&mut self) -> Result<u64, OutgoingError> {
        // QEMU says that it is done a moment before it is ("not finalized yet"): the guest waits for us, so ask often.
        let asked = Instant::now();
        self.mark("told");
        while let Err(error) = self.qmp.call(Cont {}).await {
            if error.is_connection_lost() || asked.elapsed() > SETTLE_TIMEOUT {
                return Err(error.into());
            }
            tokio::time::sleep(Duration::from_micros(300)).await;
        }
        self.mark("taken back");
        let resumed = self.events.wait_for(|kind| *kind == EventKind::Resume);
        let resumed = tokio::time::timeout(SETTLE_TIMEOUT, resumed).await.ok().flatten();
        let resumed = resumed.ok_or(OutgoingError::Failed { reason: "the guest did not go on".into() })?;
        self.marks.push(("runs", resumed.at));
        self.tell_pause();
        Ok(self.stopped_at.and_then(|stopped| resumed.at.us_since(stopped)).unwrap_or(0))
    }

    /// The pause in its parts, each as microseconds since the guest was stopped.
    fn tell_pause(&self) {
        let Some(stopped) = self.stopped_at else { return };
        let parts: Vec<String> = self
            .marks
            .iter()
            .filter_map(|(what, at)| Some(format!("{what} {}", at.us_since(stopped)?)))
            .collect();
        let (passes, limit_ms) = (self.pass, self.convergence.limit_ms());
        tracing::debug!(passes, limit_ms, us = %parts.join(", "), "the guest was paused");
    }

    fn mark(&mut self, what: &'static str) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now = HostTime::from_epoch_us(u64::try_from(now.as_micros()).unwrap_or(0));
        self.marks.push((what, now));
    }

    /// Breaks it off, and makes sure that the guest is as it was: running if `was_running`.
    ///
    /// # Errors
    /// When QEMU is gone or refuses to let the guest run.
    pub async fn abandon(&mut self, was_running: bool) -> Result<(), OutgoingError> {
        settle(&self.qmp, was_running).await
    }

    /// When QEMU stopped the guest, by its own clock.
    pub const fn stopped_at(&self) -> Option<HostTime> {
        self.stopped_at
    }

    /// Passes over memory so far.
    pub const fn passes(&self) -> u64 {
        self.pass
    }

    async fn look(&mut self) -> Result<Passage, OutgoingError> {
        let info = self.qmp.call(QueryMigrate {}).await?;
        let passage = passage(&info, self.pass);
        if !self.slow_guest_down && passage.is_hopeless(self.max_ms) {
            return Err(OutgoingError::TooFast { passes: self.pass, limit_ms: self.max_ms });
        }
        match self.convergence.look(self.pass, self.started.elapsed()) {
            Advice::Wait => {}
            Advice::Raise(limit_ms) => {
                tracing::debug!(limit_ms, pass = self.pass, "the guest is busy: allowing a longer pause");
                let parameters = MigrateSetParameters {
                    downtime_limit_ms: Some(limit_ms),
                    ..MigrateSetParameters::default()
                };
                self.qmp.call(parameters).await?;
            }
            Advice::SlowDown(percent) if self.slow_guest_down => {
                tracing::debug!(percent, pass = self.pass, "the guest is too busy: slowing it down");
                set_throttle(&self.qmp, percent).await?;
            }
            Advice::SlowDown(_) | Advice::GiveUp => {
                let limit_ms = self.convergence.limit_ms();
                return Err(OutgoingError::TooFast { passes: self.pass, limit_ms });
            }
        }
        Ok(passage)
    }

    async fn check(&self, status: &MigrationStatus) -> Result<(), OutgoingError> {
        check(&self.qmp, status).await
    }

    async fn gone(&self) -> OutgoingError {
        OutgoingError::Qmp(QmpError::from(self.qmp.closed().await))
    }
}

/// Whether a migration of this status is still one.
///
/// # Errors
/// When it has come to nothing, with QEMU's reason.
pub async fn check(qmp: &Qmp, status: &MigrationStatus) -> Result<(), OutgoingError> {
    match status {
        MigrationStatus::Failed | MigrationStatus::Cancelled => {
            let info = qmp.call(QueryMigrate {}).await?;
            let reason = info.error_desc.unwrap_or_else(|| "the other end stopped reading".into());
            Err(OutgoingError::Failed { reason })
        }
        _ => Ok(()),
    }
}

/// Sets how far QEMU may slow the guest down (capability `auto-converge`).
async fn set_throttle(qmp: &Qmp, percent_max: u32) -> Result<(), QmpError> {
    let step_percent = percent_max.min(THROTTLE_STEP_PERCENT);
    let parameters = serde_json::json!({
        "throttle-trigger-threshold": THROTTLE_THRESHOLD_PERCENT,
        "cpu-throttle-initial": step_percent,
        "cpu-throttle-increment": step_percent,
        "max-cpu-throttle": percent_max,
    });
    qmp.call_untyped("migrate-set-parameters", parameters).await.map(|_| ())
}

/// Two ends of a socket with a small buffer: ours, and the one that QEMU gets.
///
/// # Errors
/// When the system refuses.
pub fn stream_pair() -> std::io::Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = UnixStream::pair()?;
    for end in [&ours, &theirs] {
        rustix::net::sockopt::set_socket_send_buffer_size(end, STREAM_BUFFER_BYTES)?;
    }
    Ok((ours, theirs.into()))
}

/// Switches on these migration capabilities and every other one off, for they outlive a migration.
///
/// # Errors
/// When QEMU refuses, or has not one of them.
pub async fn set_capabilities(qmp: &Qmp, wanted: &[&str]) -> Result<(), QmpError> {
    let present = qmp.call(QueryMigrateCapabilities {}).await?;
    let unknown = wanted.iter().filter(|name| !present.iter().any(|one| one.name == **name));
    let changes: Vec<(&str, bool)> = present
        .iter()
        .map(|one| (one.name.as_str(), one.on, wanted.contains(&one.name.as_str())))
        .filter(|(_, is, should)| is != should)
        .map(|(name, _, should)| (name, should))
        .chain(unknown.map(|name| (*name, true)))
        .collect();
    if !changes.is_empty() {
        qmp.call(MigrateSetCapabilities::new(changes)).await?;
    }
    Ok(())
}

/// Brings a QEMU whose migration is not wanted (any more) to rest: cancelled if it is under way, and the guest running
/// if it shall. May be called in any state, twice as well.
///
/// # Errors
/// When QEMU is gone, or refuses to let the guest run.
pub async fn settle(qmp: &Qmp, shall_run: bool) -> Result<(), OutgoingError> {
    let mut events = qmp.events();
    let deadline = Instant::now() + SETTLE_TIMEOUT;
    let mut cancelling = 0;
    loop {
        let status = qmp.call(QueryMigrate {}).await?.status;
        match status {
            MigrationStatus::Setup
            | MigrationStatus::Active
            | MigrationStatus::PreSwitchover
            | MigrationStatus::Device
            | MigrationStatus::WaitUnplug => {
                qmp.call(MigrateCancel {}).await?;
            }
            MigrationStatus::Cancelling => {
                cancelling += 1;
                if cancelling == LOOKS_AT_CANCELLING {
                    // A QEMU that is told to give up between its stopping the guest and its waiting for our word waits
                    // for that word all the same. One that does not wait keeps it: see `Outgoing::go_on`.
                    tracing::warn!(
                        "QEMU does not give up a migration, and gets the word that it may wait for"
                    );
                    let _ = qmp.call(MigrateContinue { state: MigrationStatus::Cancelling }).await;
                }
            }
            _ => break,
        }
        // `cancelled`, `failed` or `completed`: each says so by an event. The look every so often is for a QEMU whose
        // event came before we listened.
        let over = events.wait_for(|kind| matches!(kind, EventKind::Migration(_)));
        let _ = tokio::time::timeout(SETTLE_LOOK_EVERY, over).await;
        if Instant::now() > deadline {
            return Err(OutgoingError::Stuck);
        }
    }
    if !shall_run {
        return Ok(());
    }
    loop {
        // QEMU lets the guest run by itself after a failure, a moment after it says so; asking for it as well is no harm.
        // And it must be asked once even then: versions before 8.1 that failed in the last part have let the disks go
        // and do not take them back before they let the guest run, but do when they are asked to.
        let asked = qmp.call(Cont {}).await;
        let runs = qmp.call(QueryStatus {}).await?.running;
        match asked {
            Ok(_) if runs => return Ok(()),
            Err(error) if Instant::now() > deadline || error.is_connection_lost() => return Err(error.into()),
            Ok(_) if Instant::now() > deadline => return Err(OutgoingError::Stuck),
            Ok(_) | Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// What QEMU says of how it goes.
pub fn passage(info: &MigrationInfo, pass: u64) -> Passage {
    let ram = info.ram.unwrap_or_default();
    let page_bytes = if ram.page_size_bytes == 0 { 4096 } else { ram.page_size_bytes };
    Passage {
        pass,
        sent_bytes: ram.transferred_bytes,
        left_bytes: ram.remaining_bytes,
        total_bytes: ram.total_bytes,
        dirty_bytes_per_second: ram.dirty_pages_per_second.saturating_mul(page_bytes),
        bytes_per_second: (ram.mbps.max(0.0) * 125_000.0) as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_too_fast_when_what_is_left_is_much_and_grows_back_as_fast_as_it_is_sent() {
        const MIB: u64 = 1 << 20;
        let busy = Passage {
            pass: 3,
            left_bytes: 300 * MIB,
            dirty_bytes_per_second: 600 * MIB,
            bytes_per_second: 600 * MIB,
            ..Passage::default()
        };
        assert!(busy.is_hopeless(28));
        for (why, other) in [
            ("too early to tell", Passage { pass: 2, ..busy }),
            ("it shrinks", Passage { dirty_bytes_per_second: 400 * MIB, ..busy }),
            ("it will fit", Passage { left_bytes: 60 * MIB, ..busy }),
            ("nothing is known", Passage { pass: 3, left_bytes: MIB, ..Passage::default() }),
        ] {
            assert!(!other.is_hopeless(28), "{why}");
        }
    }
}
