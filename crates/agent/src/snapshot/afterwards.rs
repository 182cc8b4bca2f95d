//! What a restored guest is owed once it runs, done past the VM's queue: its clock is set, the network is told where it
//! is, and what of its memory it needed first is remembered for the next restore.
//!
//! None of it holds the guest up, and none of it can fail the restore: what could not be done is in the log, and as trouble
//! nowhere, since the guest is as well as its snapshot was.

use std::sync::Arc;
use std::time::Duration;

use berth_model::snapshot::ClockSetting;
use berth_model::{Problem, SnapshotId, VmId};
use berth_qmp::Qmp;
use berth_qmp::commands::AnnounceSelf;
use berth_qmp::guest_agent::GuestAgent;
use tokio::sync::oneshot;

use super::archive::SnapshotFiles;
use super::working_set;
use crate::durable::with_causes;
use crate::launcher::{Process, Socket};
use crate::services::Services;
use crate::vm::VmRuntime;

/// For how long a guest agent is asked. Longer: a guest without one is asked in vain for longer.
const ASK_FOR: Duration = Duration::from_secs(30);
/// Pause between two questions to a guest agent that does not answer.
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// How long a guest agent may take to set the clock: some read and write the hardware clock as well.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// After how long a guest has touched what it needs first. Longer: ever more is in it that it would have touched anyway.
const WORKING_SET_AFTER: Duration = Duration::from_secs(3);

struct Afterwards {
    services: Arc<Services>,
    vm: VmId,
    run_dir: std::path::PathBuf,
    qmp: Qmp,
    process: Process,
    files: SnapshotFiles,
}

/// Begins it. What becomes of the clock is told when it is known.
///
/// # Errors
/// When the VM has no process.
pub fn begin(vm: &VmRuntime, snapshot: &SnapshotId) -> Result<oneshot::Receiver<ClockSetting>, Problem> {
    let process = vm.process().cloned().ok_or_else(|| vm.wrong_state("a running VM"))?;
    let afterwards = Afterwards {
        services: Arc::clone(vm.services()),
        vm: vm.id().clone(),
        run_dir: vm.run_dir(),
        qmp: vm.qmp()?.clone(),
        process,
        files: SnapshotFiles::of(vm.dirs()?, snapshot),
    };
    let (tell, told) = oneshot::channel();
    tokio::spawn(async move {
        let ended = afterwards.process.clone();
        tokio::select! {
            _ = ended.exited() => {}
            () = afterwards.run(tell) => {}
        }
    });
    Ok(told)
}

impl Afterwards {
    async fn run(&self, tell: oneshot::Sender<ClockSetting>) {
        let clock = async {
            let setting = self.set_clock().await;
            tracing::info!(vm = %self.vm, ?setting, "the guest's clock after a restore");
            // Whoever waited may have gone on.
            let _ = tell.send(setting);
        };
        tokio::join!(self.announce(), clock, self.remember_working_set());
    }

    async fn announce(&self) {
        let announcement = AnnounceSelf { initial_ms: 50, max_ms: 550, rounds: 5, step_ms: 100 };
        if let Err(error) = self.qmp.call(announcement).await {
            tracing::warn!(vm = %self.vm, %error, "the network is not told where the guest is");
        }
    }

    /// Sets the guest's clock to the host's time, as soon as its agent answers.
    async fn set_clock(&self) -> ClockSetting {
        let asked = tokio::time::timeout(ASK_FOR, async {
            loop {
                if let Some(setting) = self.try_clock().await {
                    return setting;
                }
                tokio::time::sleep(ASK_AGAIN).await;
            }
        });
        asked.await.unwrap_or(ClockSetting::NoAgent)
    }

    /// None when nobody answers.
    async fn try_clock(&self) -> Option<ClockSetting> {
        let stream = self.services.launcher.connect(&self.run_dir, Socket::GuestAgent).await.ok()?;
        let agent = GuestAgent::over(stream);
        agent.ping(ANSWER_TIMEOUT).await.ok()?;
        let now_ns = i64::try_from(self.services.clock.now().as_millis()).ok()?.checked_mul(1_000_000)?;
        Some(match agent.set_time(Some(now_ns), ANSWER_TIMEOUT).await {
            Ok(()) => ClockSetting::Set,
            // It sets the system's clock first, and fails when there is no hardware clock to be set too.
            Err(error) if error.refusal().is_some_and(|words| words.contains("hwclock")) => ClockSetting::Set,
            Err(error) => ClockSetting::Refused { reason: with_causes(&error) },
        })
    }

    async fn remember_working_set(&self) {
        tokio::time::sleep(WORKING_SET_AFTER).await;
        if let Err(problem) = working_set::remember(self.process.record().pid, &self.files).await {
            tracing::debug!(vm = %self.vm, %problem, "what the guest needed first is not known");
        }
    }
}
