//! A snapshot of the disks alone, of a VM that has a process: the layers are switched in one transaction, and the guest's
//! processors run on.
//!
//! Such a disk is as after a power cut. With `quiesce` it is as its file systems want it: the guest agent in the guest has
//! them written out and frozen, the layers are switched, and they are thawed.
//!
//! **A guest whose file systems are frozen hangs at its next write.** So they are thawed whatever fails, and that they may
//! be frozen is written down before they are: an agent that finds this has them thawed ([`thaw_left_frozen`]).

use std::path::PathBuf;
use std::time::{Duration, Instant};

use berth_model::snapshot::SnapshotFacts;
use berth_model::{LayerId, Problem, ProblemCode, SnapshotId};
use berth_qmp::guest_agent::GuestAgent;

use super::archive::Draft;
use super::capture::CaptureFailure;
use super::{begin, facts_of, keeping, layers, put_away, split_disks, undo, undo_half_done};
use crate::disks::Disks;
use crate::durable::{self, with_causes};
use crate::launcher::Socket;
use crate::task::TaskContext;
use crate::vm::VmRuntime;

/// How long the guest agent may take to say that it is there.
const PING_TIMEOUT: Duration = Duration::from_secs(3);
/// How long freezing may take. A guest writes out all that it holds back, and everything that writes waits meanwhile.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(20);
/// How long one try to thaw may take.
const THAW_TIMEOUT: Duration = Duration::from_secs(10);
/// How often thawing is tried before the guest is given up as hanging.
const THAW_TRIES: u32 = 3;

/// Takes the disk of a VM that has a process.
///
/// # Errors
/// When QEMU or the disk fails, or, with `quiesce`, no guest agent answers or it refuses: the VM is then as it was.
pub(super) async fn take_of_running(
    vm: &mut VmRuntime,
    context: &TaskContext,
    snapshot: &SnapshotId,
    new_top: &LayerId,
    quiesce: bool,
    started: Instant,
) -> Result<SnapshotFacts, Problem> {
    thaw_left_frozen(vm).await?;
    undo_half_done(vm, new_top).await?;
    let agent = if quiesce { Some(guest_agent(vm).await?) } else { None };
    let (frozen, _) = split_disks(vm, new_top)?;
    let draft = begin(vm, snapshot).await?;
    let result = async {
        layers::prepare_switch(vm, &frozen, new_top).await?;
        if context.cancel().is_cancelled() {
            return Err(Problem::new(ProblemCode::Cancelled, "it was cancelled").into());
        }
        context.phase("switching layers");
        match &agent {
            Some(agent) => switch_frozen(vm, agent, &draft, &frozen, new_top).await,
            None => switch(vm, &draft, &frozen, new_top).await,
        }
    };
    let outcome: Result<u64, CaptureFailure> = result.await;
    let failure = match outcome {
        Ok(paused_us) => {
            let facts = SnapshotFacts { paused_us, quiesced: quiesce, ..facts_of(frozen.clone()) };
            match put_away(vm, draft, snapshot, facts, None, started).await {
                Ok(facts) => return Ok(facts),
                Err(problem) => CaptureFailure { problem, switched: true },
            }
        }
        Err(failure) => {
            drop(draft);
            failure
        }
    };
    Err(undo(vm, failure, &frozen, new_top).await)
}

/// Has the guest's file systems thawed if an agent died while they may have been frozen. Nothing to do: nothing is done.
///
/// # Errors
/// When the guest can't be reached or refuses; it is tried again at the next occasion.
pub(super) async fn thaw_left_frozen(vm: &VmRuntime) -> Result<(), Problem> {
    let marker = marker(vm)?;
    if durable::read_json::<SnapshotMark>(&marker)?.is_none() {
        return Ok(());
    }
    if vm.qmp().is_ok() {
        thaw(&connect(vm).await?).await?;
    }
    Ok(durable::remove_file(&marker)?)
}

/// Switches the layers; gives how long writes waited, in microseconds. What the machine remembers beside its disk is that
/// of the moment after: its guest runs, but a firmware's variables are written once in a long while.
async fn switch(
    vm: &VmRuntime,
    draft: &Draft,
    frozen: &Disks,
    new_top: &LayerId,
) -> Result<u64, CaptureFailure> {
    let keeping = keeping(vm, draft)?;
    let asked = Instant::now();
    layers::switch(vm.qmp()?, frozen, new_top).await.map_err(layers::refused)?;
    let waited_us = us_since(asked);
    if let Some(keeping) = keeping {
        keeping.keep().await.map_err(|problem| CaptureFailure { problem, switched: true })?;
    }
    Ok(waited_us)
}

/// As [`switch`], with the guest's file systems frozen meanwhile, and thawed afterwards in any case.
async fn switch_frozen(
    vm: &VmRuntime,
    agent: &GuestAgent,
    draft: &Draft,
    disks: &Disks,
    new_top: &LayerId,
) -> Result<u64, CaptureFailure> {
    let marker = marker(vm)?;
    durable::write_json(&marker, &SnapshotMark { layer: new_top.clone() }).map_err(Problem::from)?;
    let asked = Instant::now();
    let frozen = agent.freeze(FREEZE_TIMEOUT).await;
    let switched = match &frozen {
        Ok(1..) => switch(vm, draft, disks, new_top).await.map(|_| ()),
        Ok(0) => Err(guest_problem("the guest agent froze none of the guest's file systems").into()),
        Err(error) => {
            let words = format!("the guest's file systems can't be frozen: {}", with_causes(error));
            Err(guest_problem(&words).into())
        }
    };
    // Also when freezing failed: the guest may be late with it.
    let thawed = thaw(agent).await;
    let waited_us = us_since(asked);
    match (switched, thawed) {
        (Ok(()), Ok(())) => {
            durable::remove_file(&marker)
                .map_err(|error| CaptureFailure { problem: error.into(), switched: true })?;
            Ok(waited_us)
        }
        (Ok(()), Err(problem)) => Err(CaptureFailure { problem, switched: true }),
        (Err(failure), Ok(())) => {
            durable::remove_file(&marker).map_err(Problem::from)?;
            Err(failure)
        }
        (Err(mut failure), Err(problem)) => {
            failure.problem.message.push_str("; and ");
            failure.problem.message.push_str(&problem.message);
            Err(failure)
        }
    }
}

async fn thaw(agent: &GuestAgent) -> Result<(), Problem> {
    let mut tries = 0;
    loop {
        tries += 1;
        match agent.thaw(THAW_TIMEOUT).await {
            Ok(_) => return Ok(()),
            Err(error) if tries == THAW_TRIES => {
                let words = with_causes(&error);
                return Err(guest_problem(&format!(
                    "the guest's file systems may still be frozen, as its guest agent does not thaw them: {words}"
                )));
            }
            Err(error) => tracing::warn!(%error, "a guest's file systems are not thawed yet"),
        }
    }
}

/// The guest's agent, which has answered.
async fn guest_agent(vm: &VmRuntime) -> Result<GuestAgent, Problem> {
    let agent = connect(vm).await?;
    match agent.ping(PING_TIMEOUT).await {
        Ok(()) => Ok(agent),
        Err(error) => Err(guest_problem(&format!(
            "no guest agent answers in the guest, so its file systems can't be frozen: {}; install and start \
             qemu-guest-agent there, or take the disk as it is (--no-memory)",
            with_causes(&error)
        ))),
    }
}

async fn connect(vm: &VmRuntime) -> Result<GuestAgent, Problem> {
    let services = vm.services();
    let stream = services.launcher.connect(&vm.run_dir(), Socket::GuestAgent).await;
    let stream = stream.map_err(|error| {
        guest_problem(&format!("the guest agent's port can't be reached: {}", with_causes(&error)))
    })?;
    Ok(GuestAgent::over(stream))
}

fn guest_problem(words: &str) -> Problem {
    Problem::new(ProblemCode::Guest, words)
}

/// What is written down before a guest's file systems are frozen.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct SnapshotMark {
    /// The layer for which it was done.
    layer: LayerId,
}

fn marker(vm: &VmRuntime) -> Result<PathBuf, Problem> {
    Ok(vm.dirs()?.run.join("frozen.json"))
}

fn us_since(instant: Instant) -> u64 {
    u64::try_from(instant.elapsed().as_micros()).unwrap_or(u64::MAX)
}
