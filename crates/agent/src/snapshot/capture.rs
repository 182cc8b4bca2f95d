//! Taking the memory and device state of a guest, together with its disks' layers, at one instant.
//!
//! ```text
//! guest runs   QEMU ──pass 1, 2, 3 …──► collector (a thread) ──► memory.raw
//! STOP         what is left fits into the pause; disks are flushed
//!              layers are switched: the disks' instant is the memory's; the firmware's variables are copied
//!              last pages and device state                ──► memory.raw, device.bin
//! RESUME       the guest goes on, on the new layer
//! ```
//!
//! A guest that writes faster than this takes its memory is taken in the [`background`] where that can be done: stopped once,
//! and copied from then on. Which ways there are is said by [`Ways`].
//!
//! A guest that does not run (held, or panicked) is taken the same way, but QEMU must not come to believe that it is gone:
//! a machine that was sent away while paused can't be sent again and has let go of its disks. So the reader says
//! nothing at the end and hangs up: QEMU takes that for a failure, and keeps its disks.

use std::path::PathBuf;
use std::time::Duration;

use berth_model::LayerId;
use berth_model::operation::Progress;
use berth_model::snapshot::CaptureWay;
use berth_model::{Problem, ProblemCode};
use berth_qmp::Qmp;
use berth_stream::Base;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::archive::SnapshotFiles;
use super::image::MemoryImage;
use super::layers;
use super::memory::{CollectError, Collected, collect};
use super::slowdown::{self, CpuTime};
use crate::disks::Disks;
use crate::durable::with_causes;
use crate::migration::convergence::PauseBudget;
use crate::migration::outgoing::{Outgoing, Passage, Sending, settle};
use crate::nvram::Keeping;
use crate::task::TaskContext;

pub mod background;
mod ways;

pub use ways::Ways;

use background::Background;

/// How often what the guest has written is brought to the disk.
const FLUSH_EVERY: Duration = Duration::from_millis(150);
/// How long QEMU may take for the last part, guest stopped: a local disk takes it, at worst as slowly as it writes.
const FINISH_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the collector may take for what QEMU has sent, after QEMU says that it has sent everything.
const COLLECT_TIMEOUT: Duration = Duration::from_secs(60);

/// What a task's progress calls a capture in the background; one in passes is in its warm-up.
const BACKGROUND: &str = "background";

/// What is captured, and where to.
#[derive(Debug)]
pub struct Capture<'a> {
    /// The VM's monitor.
    pub qmp: &'a Qmp,
    /// Where the files go.
    pub files: &'a SnapshotFiles,
    /// Length of the guest's memory in bytes.
    pub memory_bytes: u64,
    /// The disks' layers, whose tops the guest writes to and are frozen.
    pub disks: &'a Disks,
    /// Those tops' files.
    pub top_files: Vec<PathBuf>,
    /// What the layers that it writes to afterwards are named by; open and empty.
    pub new_top: &'a LayerId,
    /// What the machine remembers beside its disk, and where it is kept.
    pub nvram: Option<Keeping>,
    /// Whether the guest runs.
    pub was_running: bool,
    /// How its memory is taken.
    pub way: CaptureWay,
    /// Slow the guest down when it writes too fast for [`CaptureWay::PreCopy`]; if not, that fails then.
    pub slow_guest_down: bool,
    /// What its processors had got a moment ago, if that is known.
    pub cpu_before: Option<CpuTime>,
}

/// What came of it.
#[derive(Debug)]
pub struct Captured {
    /// The files.
    pub collected: Collected,
    /// How long the guest stood still, in microseconds.
    pub paused_us: u64,
    /// Passes over memory.
    pub rounds: u64,
    /// What the guest's processors lost of their time meanwhile, in percent of what they had before.
    pub guest_slowdown_percent: Option<u32>,
}

/// A capture that failed, and how far it had come.
#[derive(Debug)]
pub struct CaptureFailure {
    /// Why.
    pub problem: Problem,
    /// The guest writes to the new layer already.
    pub switched: bool,
}

impl Capture<'_> {
    /// Does it. The guest is as it was afterwards, running or not, in either case; which layer it writes to is said.
    ///
    /// # Errors
    /// When QEMU or the disk fails, or somebody cancels.
    pub async fn run(
        &self,
        context: &TaskContext,
        base: Option<Base<MemoryImage>>,
    ) -> Result<Captured, CaptureFailure> {
        match self.way {
            CaptureWay::PreCopy => self.run_in_passes(context, base).await,
            CaptureWay::Background => self.run_in_background(context, base).await,
        }
    }

    async fn run_in_passes(
        &self,
        context: &TaskContext,
        base: Option<Base<MemoryImage>>,
    ) -> Result<Captured, CaptureFailure> {
        let sending = Sending {
            budget: PauseBudget::SNAPSHOT,
            bandwidth_bytes_per_second: None,
            return_path: !self.was_running,
            slow_guest_down: self.slow_guest_down,
            finish_timeout: FINISH_TIMEOUT,
        };
        let mut switched = false;
        let cpu_begun = self.cpu_before.as_ref().and_then(CpuTime::later);
        let (mut outgoing, stream) =
            Outgoing::start(self.qmp, sending).await.map_err(|error| failure(error.into(), switched))?;
        let collector = self.collector(stream, base, None);
        let taken = self.take(&mut outgoing, context, &mut switched).await;
        self.conclude(taken, collector, switched, cpu_begun).await
    }

    async fn run_in_background(
        &self,
        context: &TaskContext,
        base: Option<Base<MemoryImage>>,
    ) -> Result<Captured, CaptureFailure> {
        let mut switched = false;
        let cpu_begun = self.cpu_before.as_ref().and_then(CpuTime::later);
        context.phase(BACKGROUND);
        // Now and not when QEMU flushes with the guest stopped.
        let _ = layers::flush_after(Duration::ZERO, &self.top_files).await;
        let (mut background, stream) = match Background::stop(self.qmp).await {
            Ok(stopped) => stopped,
            Err(error) => {
                self.bring_back().await;
                return Err(failure(error.into(), switched));
            }
        };
        let (arrived, first_page) = oneshot::channel();
        let collector = self.collector(stream, base, Some(arrived));
        let taken = async {
            layers::switch(self.qmp, self.disks, self.new_top).await.map_err(layers::refused)?;
            switched = true;
            let paused_us = background.begin(first_page).await?;
            let report =
                |passage| context.progress(Progress { phase: BACKGROUND.to_owned(), ..progress(passage) });
            background.until_sent(context.cancel(), report).await?;
            let cpu_ended = self.cpu_before.as_ref().and_then(CpuTime::later);
            Ok::<_, Problem>(Taken { paused_us, cpu_ended, rounds: 1 })
        };
        let taken = taken.await;
        // QEMU's own descriptor, if it never began: the collector ends when there is none left.
        self.conclude(taken, collector, switched, cpu_begun).await
    }

    /// What was taken and collected, or why not: the guest is then brought back to what it was.
    async fn conclude(
        &self,
        taken: Result<Taken, Problem>,
        collector: Collector,
        switched: bool,
        cpu_begun: Option<CpuTime>,
    ) -> Result<Captured, CaptureFailure> {
        if taken.is_err() {
            // QEMU first: the collector ends when QEMU closes its end.
            self.bring_back().await;
        }
        let collected = wait_for(collector).await;
        match (taken, collected) {
            (Ok(Taken { paused_us, cpu_ended, rounds }), Ok(collected)) => {
                let cpu = self.cpu_before.as_ref().zip(cpu_begun).zip(cpu_ended);
                let guest_slowdown_percent =
                    cpu.and_then(|((before, begun), ended)| slowdown::percent(before, &begun, &ended));
                Ok(Captured { collected, paused_us, rounds, guest_slowdown_percent })
            }
            // The collector's fault is what QEMU met as a broken stream: it is the one to tell of.
            (_, Err(Some(error))) if self.is_cause(&error) => Err(failure(collect_problem(&error), switched)),
            (Err(problem), _) => Err(failure(problem, switched)),
            (Ok(_), Err(error)) => {
                let problem = error.map_or_else(stuck, |error| collect_problem(&error));
                Err(failure(problem, switched))
            }
        }
    }

    /// Makes sure that the guest is as it was, whatever QEMU was told meanwhile.
    async fn bring_back(&self) {
        if let Err(error) = settle(self.qmp, self.was_running).await {
            tracing::error!(%error, "the guest could not be brought back after a failed capture");
        }
    }

    /// From the first pass to the guest's going on.
    async fn take(
        &self,
        outgoing: &mut Outgoing,
        context: &TaskContext,
        switched: &mut bool,
    ) -> Result<Taken, Problem> {
        tokio::select! {
            stopped = outgoing.until_switchover(context.cancel(), |passage| context.progress(progress(passage))) => {
                stopped?;
            }
            () = self.keep_flushed() => {}
        }
        layers::switch(self.qmp, self.disks, self.new_top).await.map_err(layers::refused)?;
        *switched = true;
        if let Some(nvram) = &self.nvram {
            nvram.keep().await?;
        }
        if self.was_running {
            outgoing.finish().await?;
            let paused_us = outgoing.take_back().await?;
            // The pause is in it: a few milliseconds of what took seconds.
            let cpu_ended = self.cpu_before.as_ref().and_then(CpuTime::later);
            Ok(Taken { paused_us, cpu_ended, rounds: outgoing.passes() })
        } else {
            outgoing.finish_unanswered().await?;
            Ok(Taken { paused_us: 0, cpu_ended: None, rounds: outgoing.passes() })
        }
    }

    /// What the guest writes goes to the disk while it runs, and not when QEMU flushes with the guest stopped.
    async fn keep_flushed(&self) {
        loop {
            // A disk that can't be flushed is the guest's to be told of, by QEMU.
            let _ = layers::flush_after(FLUSH_EVERY, &self.top_files).await;
        }
    }

    fn collector(
        &self,
        stream: std::os::unix::net::UnixStream,
        base: Option<Base<MemoryImage>>,
        first_page: Option<oneshot::Sender<()>>,
    ) -> Collector {
        let (files, bytes) = (self.files.clone(), self.memory_bytes);
        tokio::task::spawn_blocking(move || collect(stream, &files, bytes, base, first_page))
    }

    /// Whether a collector's error came before QEMU's: a stream that was merely cut is QEMU's doing.
    fn is_cause(&self, error: &CollectError) -> bool {
        match error {
            CollectError::Split(berth_stream::SplitError::Stream(error)) => {
                !matches!(error.fault, berth_stream::Fault::Truncated { .. })
            }
            CollectError::Create(_) | CollectError::Split(_) => true,
            CollectError::Read(_) => false,
        }
    }
}

/// What came of the taking.
struct Taken {
    paused_us: u64,
    cpu_ended: Option<CpuTime>,
    rounds: u64,
}

type Collector = JoinHandle<Result<Collected, CollectError>>;

async fn wait_for(collector: Collector) -> Result<Collected, Option<CollectError>> {
    match tokio::time::timeout(COLLECT_TIMEOUT, collector).await {
        Ok(Ok(result)) => result.map_err(Some),
        Ok(Err(_)) | Err(_) => Err(None),
    }
}

fn failure(problem: Problem, switched: bool) -> CaptureFailure {
    CaptureFailure { problem, switched }
}

fn stuck() -> Problem {
    Problem::new(ProblemCode::Internal, "the snapshot's stream was not written in time")
}

fn collect_problem(error: &CollectError) -> Problem {
    let code = if error.is_no_space() { ProblemCode::NoSpace } else { ProblemCode::Hypervisor };
    Problem::new(code, with_causes(error))
}

/// A passage as a task's progress. While memory is passed over once, what is done and left adds up to it; later passes
/// say what is left of what the guest rewrote.
pub fn progress(passage: Passage) -> Progress {
    let left_ms = (passage.left_bytes * 1000).checked_div(passage.bytes_per_second);
    Progress {
        phase: "warm-up".to_owned(),
        done_bytes: passage.total_bytes.saturating_sub(passage.left_bytes),
        total_bytes: passage.total_bytes,
        bytes_per_second: passage.bytes_per_second,
        round: passage.pass,
        dirty_bytes_per_second: passage.dirty_bytes_per_second,
        left_ms,
    }
}
