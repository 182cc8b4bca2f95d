//! A VM's process: started, made the VM's, watched, ended, found again.
//!
//! The order is what keeps a VM from running twice. A process comes up with its guest standing still; it is written
//! down as the VM's; only then is the guest let run. An agent that dies in between leaves a process that is on no
//! record and has done nothing, and the next agent ends it.

use std::sync::Arc;
use std::time::Duration;

use berth_api::agent::VmDefinition;
use berth_model::host::NetworkMode;
use berth_model::vm::GuestState;
use berth_model::{Problem, ProblemCode};
use berth_qmp::commands::{QueryStatus, Quit};
use berth_qmp::{EventKind, Events, Qmp};
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;

use super::status::Status;
use super::{LaunchPlan, VmRuntime, sensor};
use crate::launcher::{Exit, LaunchError, LaunchSpec, Launched, Process, TpmSpec};
use crate::layout::VmDirs;
use crate::network::{self, Lease};
use crate::qemu::Machine;
use crate::services::Services;
use crate::snapshot::identity::{self, Introduction};

/// How long a killed process may take to be gone. The kernel gives back its memory first, some 20 ms a GiB; longer
/// means that it hangs in the kernel, where nothing reaches it.
const END_TIMEOUT: Duration = Duration::from_secs(30);
/// How long QEMU may take to end when it is asked to: its disks are flushed.
const QUIT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a process may live on without its monitor before that counts as a loss of the monitor alone.
const END_AFTER_MONITOR: Duration = Duration::from_secs(2);

/// After how long a process whose monitor does not answer is tried again.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// Something that a process's watcher tells the VM's owner.
#[derive(Debug)]
pub enum Notice {
    /// The process has ended.
    Ended {
        /// Which.
        serial: u64,
        /// How.
        exit: Exit,
        /// QEMU's word for why it ended, if it ended by itself.
        reason: Option<String>,
    },
    /// The process lives and its monitor's connection is gone.
    MonitorLost {
        /// Which.
        serial: u64,
    },
    /// The guest has taken its own addresses, having had another VM's.
    Introduced {
        /// Which.
        serial: u64,
    },
    /// The process's TPM has ended, and the process lives on without it.
    TpmEnded {
        /// Which.
        serial: u64,
        /// How.
        exit: Exit,
    },
    /// The guest is held because a request to its disk failed.
    DiskFailed {
        /// Which.
        serial: u64,
        /// What failed, in words.
        trouble: String,
    },
}

/// The VM's present process with all that listens to it.
pub(super) struct Running {
    pub(super) serial: u64,
    pub(super) qmp: Qmp,
    pub(super) process: Process,
    listeners: Vec<AbortHandle>,
}

impl Drop for Running {
    fn drop(&mut self) {
        for listener in &self.listeners {
            listener.abort();
        }
    }
}

/// All that a VM's process is started from: what its owner knows, so that one can be started while the owner does
/// something else.
#[derive(Clone)]
pub struct Ground {
    /// What the whole agent shares.
    pub services: Arc<Services>,
    /// What the VM is to be.
    pub definition: VmDefinition,
    /// Its directories.
    pub dirs: VmDirs,
}

impl Ground {
    /// The user and group of the process; none when it is the agent's own.
    pub fn user_id(&self) -> Option<u32> {
        self.services.user_id(self.definition.number)
    }

    /// Starts a process with this network. `sockets` names the directory for its sockets; none: that of a process that
    /// is started while there is no other.
    ///
    /// # Errors
    /// When the process does not come up; there is then none.
    pub async fn launch(
        &self,
        plan: &LaunchPlan,
        sockets: Option<&str>,
        lease: Lease,
    ) -> Result<Launched, Problem> {
        let hypervisor = self.services.hypervisor().await.ok_or_else(stopping)?;
        let Lease { nics, taps, .. } = lease;
        let machine = Machine {
            definition: &self.definition,
            dirs: &self.dirs,
            plan,
            accelerator: hypervisor.accelerator,
            nics: &nics,
            firmware_code: &self.services.config.machine.firmware_code,
            direct_io: self.services.pool_facts(&self.dirs.pool.name).is_some_and(|pool| pool.direct_io),
        };
        let spec = LaunchSpec {
            vm: self.definition.id.clone(),
            arguments: machine.arguments(),
            descriptors: taps,
            run_dir: self.dirs.sockets(sockets),
            user_id: self.user_id(),
            tpm: machine
                .tpm_state()
                .map(|state| TpmSpec { binary: self.services.config.machine.tpm_binary.clone(), state }),
            machine: machine.summary(),
        };
        Ok(self.services.launcher.launch(spec).await?)
    }
}

pub(super) async fn launch(vm: &mut VmRuntime, plan: &LaunchPlan) -> Result<Launched, Problem> {
    let ground = vm.ground()?;
    if ground.services.config.network.mode == NetworkMode::User
        && let Some(before) = vm.process()
    {
        // Its ports are free only when it is gone. A tap is waited for by itself.
        let _ = tokio::time::timeout(END_TIMEOUT, before.exited()).await;
    }
    let known = identity::as_the_guest_knows(vm)?;
    let lease = network::lease(&ground.services, &known, &vm.host_record()?.forwards).await?;
    let forwards = lease.forwards.clone();
    vm.change_host_record(|record| record.forwards = forwards).await?;
    ground.launch(plan, None, lease).await
}

pub(super) async fn install(vm: &mut VmRuntime, launched: Launched) -> Result<(), Problem> {
    end_running(vm).await?;
    let record = launched.process.record().clone();
    let written = vm.change_host_record(|host| {
        host.process = Some(record);
        host.sockets = None;
        host.trouble = None;
    });
    if let Err(problem) = written.await {
        launched.process.kill();
        launched.process.exited().await;
        return Err(problem);
    }
    attach(vm, launched);
    Ok(())
}

/// Makes a process the VM's present one that is on record already. The one before, if there is one, has been killed, and
/// need not be gone.
pub(super) fn replace(vm: &mut VmRuntime, launched: Launched) {
    vm.running = None;
    vm.stray = None;
    attach(vm, launched);
}

/// Takes up a process that an agent before this one installed.
///
/// # Errors
/// When it does not say how it is: it is then held as a stray, and looked for again by itself.
pub(super) async fn adopt(vm: &mut VmRuntime, launched: Launched) -> Result<(), Problem> {
    let serial = attach(vm, launched);
    match vm.qmp()?.call(QueryStatus {}).await {
        Ok(status) => {
            vm.status().process_runs(serial, status.running);
            Ok(())
        }
        Err(error) => {
            let_go(vm);
            Err(hypervisor_problem(error))
        }
    }
}

/// Lets go of the present process, which did not answer when it was taken up, so that it is looked for again.
pub(super) fn let_go(vm: &mut VmRuntime) {
    if let Some(running) = vm.running.take() {
        hold_stray(vm, running.process.clone());
    }
}

fn attach(vm: &mut VmRuntime, launched: Launched) -> u64 {
    let Launched { qmp, events, process } = launched;
    let serial = vm.next_serial;
    vm.next_serial += 1;
    vm.status.process_begins(serial);
    let (resets, reset) = watch::channel(0);
    let watcher = Watcher {
        serial,
        status: Arc::clone(&vm.status),
        process: process.clone(),
        notices: vm.notices.clone(),
        resets,
    };
    let sensor = sensor::Sensor {
        serial,
        status: Arc::clone(&vm.status),
        launcher: Arc::clone(&vm.services.launcher),
        run_dir: vm.run_dir(),
        resets: reset,
    };
    let console = Arc::clone(&vm.console).run(Arc::clone(&vm.services.launcher), vm.run_dir());
    let mut listeners = vec![tokio::spawn(watcher.run(events)).abort_handle()];
    listeners.push(tokio::spawn(sensor.run()).abort_handle());
    listeners.push(tokio::spawn(console).abort_handle());
    if let Some(tpm) = process.tpm().cloned() {
        let notices = vm.notices.clone();
        let task = tokio::spawn(async move {
            let exit = tpm.exited().await;
            // That it ends with its process is as it should be: then this is over.
            tokio::time::sleep(END_AFTER_MONITOR).await;
            // The owner may be gone: then the agent is ending.
            let _ = notices.send(Notice::TpmEnded { serial, exit });
        });
        listeners.push(task.abort_handle());
    }
    match Introduction::of(vm) {
        Ok(Some(introduction)) => {
            let notices = vm.notices.clone();
            let task = tokio::spawn(async move {
                introduction.introduce().await;
                // The owner may be gone: then the agent is ending.
                let _ = notices.send(Notice::Introduced { serial });
            });
            listeners.push(task.abort_handle());
        }
        Ok(None) => {}
        Err(problem) => tracing::error!(vm = %vm.id, %problem, "its guest is not told who it is"),
    }
    vm.running = Some(Running { serial, qmp, process, listeners });
    serial
}

pub(super) async fn end(vm: &mut VmRuntime) -> Result<Option<Exit>, Problem> {
    let exit = end_running(vm).await?;
    if vm.is_known() {
        vm.change_host_record(|record| record.process = None).await?;
    }
    Ok(exit)
}

/// Asks QEMU to end, which flushes its disks; if it does not, it is ended.
pub(super) async fn quit(vm: &mut VmRuntime) -> Result<(), Problem> {
    if let Some(running) = &vm.running {
        let asked = async {
            // An answer may not come any more; that the process ends is what counts.
            let _ = running.qmp.call_within(Quit {}, QUIT_TIMEOUT).await;
            running.process.exited().await;
        };
        if tokio::time::timeout(QUIT_TIMEOUT, asked).await.is_err() {
            tracing::warn!(vm = %vm.id(), "QEMU does not end when asked to: it is killed");
        }
    }
    end(vm).await.map(drop)
}

async fn end_running(vm: &mut VmRuntime) -> Result<Option<Exit>, Problem> {
    let present = vm.running.as_ref().map(|running| (running.serial, running.process.clone()));
    let stray = || vm.stray.as_ref().map(|stray| (stray.serial, stray.process.clone()));
    let Some((serial, process)) = present.or_else(stray) else { return Ok(None) };
    process.kill();
    let Ok(exit) = tokio::time::timeout(END_TIMEOUT, process.exited()).await else {
        let message = format!("the process of {} does not end", vm.id());
        return Err(Problem::new(ProblemCode::Hypervisor, message));
    };
    vm.running = None;
    vm.stray = None;
    vm.status.process_ended(serial);
    Ok(Some(exit))
}

/// Takes note of what a watcher has seen.
pub(super) async fn take_notice(vm: &mut VmRuntime, notice: Notice) {
    let present = vm.running.as_ref().map(|running| running.serial);
    let present = present.or_else(|| vm.stray.as_ref().map(|stray| stray.serial));
    match notice {
        Notice::Ended { serial, exit, reason } if present == Some(serial) => {
            vm.running = None;
            let trouble = trouble_of(&exit, reason.as_deref());
            tracing::info!(vm = %vm.id(), ?reason, end = %exit.summary(), "the process has ended");
            let written = vm.change_host_record(|record| {
                record.process = None;
                record.trouble = trouble;
            });
            if let Err(problem) = written.await {
                tracing::error!(vm = %vm.id(), %problem, "its end can't be written down");
            }
            vm.status.process_ended(serial);
        }
        Notice::MonitorLost { serial } if present == Some(serial) => {
            vm.running = None;
            let found = match find_again(vm).await {
                Ok(()) => super::actor::recover(vm).await,
                Err(problem) => Err(problem),
            };
            if let Err(problem) = found {
                tracing::error!(vm = %vm.id(), %problem, "the monitor is lost");
                let_go(vm);
            }
        }
        Notice::Introduced { serial } if present == Some(serial) => {
            if let Err(problem) = identity::join(vm).await {
                tracing::error!(vm = %vm.id(), %problem, "a clone that has its own addresses stays off the network");
            }
        }
        Notice::TpmEnded { serial, exit } if present == Some(serial) => {
            let end = exit.summary();
            let trouble = format!("its TPM {end}: the guest goes on without; stop and start the VM");
            if let Err(problem) = vm.change_host_record(|record| record.trouble = Some(trouble)).await {
                tracing::error!(vm = %vm.id(), %problem, "its trouble can't be written down");
            }
        }
        Notice::DiskFailed { serial, trouble } if present == Some(serial) => {
            if let Err(problem) = vm.change_host_record(|record| record.trouble = Some(trouble)).await {
                tracing::error!(vm = %vm.id(), %problem, "its trouble can't be written down");
            }
        }
        Notice::Ended { .. }
        | Notice::MonitorLost { .. }
        | Notice::Introduced { .. }
        | Notice::TpmEnded { .. }
        | Notice::DiskFailed { .. } => {}
    }
}

/// Connects anew to a process that is on record; if it has ended, that is written down.
///
/// # Errors
/// When it lives and its monitor does not answer: it is then held as a stray, never taken for ended, and looked for
/// again by itself.
pub(super) async fn find_again(vm: &mut VmRuntime) -> Result<(), Problem> {
    if vm.running.is_some() {
        return Ok(());
    }
    let Some(record) = vm.host_record()?.process.clone() else { return Ok(()) };
    let services = Arc::clone(vm.services());
    let run_dir = vm.run_dir();
    match services.launcher.adopt(&record, &run_dir).await {
        Ok(Some(launched)) => {
            vm.stray = None;
            adopt(vm, launched).await
        }
        Ok(None) => {
            if let Some(stray) = vm.stray.take() {
                vm.status.process_ended(stray.serial);
            }
            let trouble = "QEMU ended while the agent was away".to_owned();
            vm.change_host_record(|record| {
                record.process = None;
                record.trouble = Some(trouble);
            })
            .await
        }
        Err(LaunchError::Monitor { source, process: Some(process) }) => {
            hold_stray(vm, process);
            Err(hypervisor_problem(source))
        }
        Err(error) => Err(error.into()),
    }
}

/// A process of the VM that can't be spoken to. It is looked for again after a while.
pub(super) struct Stray {
    serial: u64,
    process: Process,
}

fn hold_stray(vm: &mut VmRuntime, process: Process) {
    let serial = match &vm.stray {
        Some(stray) => stray.serial,
        None => {
            let serial = vm.next_serial;
            vm.next_serial += 1;
            vm.status.process_begins(serial);
            serial
        }
    };
    vm.stray = Some(Stray { serial, process });
    let notices = vm.notices.clone();
    tokio::spawn(async move {
        tokio::time::sleep(LOOK_AGAIN).await;
        // The owner may be gone: then the agent is ending.
        let _ = notices.send(Notice::MonitorLost { serial });
    });
}

/// What is wrong when a process has ended: nothing, if it said why.
fn trouble_of(exit: &Exit, reason: Option<&str>) -> Option<String> {
    match reason {
        Some("guest-shutdown" | "host-qmp-quit") => None,
        Some("guest-panic") => Some("the guest's kernel panicked".to_owned()),
        Some(reason) => Some(format!("QEMU ended by itself ({reason})")),
        None => Some(format!("QEMU {}", exit.summary())),
    }
}

struct Watcher {
    serial: u64,
    status: Arc<Status>,
    process: Process,
    notices: mpsc::UnboundedSender<Notice>,
    resets: watch::Sender<u64>,
}

impl Watcher {
    async fn run(self, mut events: Events) {
        let mut reason = None;
        while let Some(event) = events.recv().await {
            match event.kind {
                EventKind::Stop => self.status.process_runs(self.serial, false),
                EventKind::Resume => self.status.process_runs(self.serial, true),
                EventKind::Shutdown { reason: why, .. } => reason = Some(why),
                EventKind::GuestPanicked { .. } => {
                    self.status.guest_is(self.serial, GuestState::Panicked, None);
                }
                EventKind::BlockIoError { operation, nospace, reason, action, .. } if action == "stop" => {
                    let full = if nospace { "the pool is full" } else { reason.as_str() };
                    let trouble = format!("the guest is held: a {operation} on its disk failed ({full})");
                    // The owner may be gone: then the agent is ending.
                    let _ = self.notices.send(Notice::DiskFailed { serial: self.serial, trouble });
                }
                EventKind::Reset { .. } => {
                    self.status.guest_is(self.serial, GuestState::Booting, None);
                    self.resets.send_modify(|count| *count += 1);
                }
                _ => {}
            }
        }
        let ended = tokio::time::timeout(END_AFTER_MONITOR, self.process.exited()).await;
        let notice = match ended {
            Ok(exit) => Notice::Ended { serial: self.serial, exit, reason },
            Err(_) => Notice::MonitorLost { serial: self.serial },
        };
        // The owner may be gone: then the agent is ending.
        let _ = self.notices.send(notice);
    }
}

/// A problem that says that the agent is ending.
pub fn stopping() -> Problem {
    Problem::new(ProblemCode::Unreachable, "the agent is ending")
}

/// A problem of QEMU's monitor.
pub fn hypervisor_problem(error: berth_qmp::QmpError) -> Problem {
    Problem::new(ProblemCode::Hypervisor, crate::durable::with_causes(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_that_was_wanted_is_no_trouble() {
        let exit = Exit { code: None, signal: Some(9), last_words: "out of memory\n".into() };
        assert_eq!(trouble_of(&exit, Some("guest-shutdown")), None);
        let text = trouble_of(&exit, None).expect("trouble");
        assert_eq!(text, "QEMU was ended by signal 9, saying: out of memory");
    }
}
