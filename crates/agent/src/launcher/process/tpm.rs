//! The software TPM of a VM: a swtpm beside its QEMU, of the same user and as confined.
//!
//! The two talk through a pair of sockets that exist before either does, so there is no path that another could reach. A
//! swtpm ends when its QEMU does; one whose QEMU never came to be is ended here, or by the next agent. That it does not
//! run twice on the same files is what Berth takes care of for the whole VM: swtpm's own lock would keep the target of a
//! migration within a shared pool from loading before the source has gone.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Plan, failed, log, open_pidfd, proc};
use crate::durable;
use crate::launcher::{LaunchError, LaunchSpec, ProcessRecord, TpmSpec};
use crate::sandbox::{self, Confinement, Limits};

/// The name of the mark in a swtpm's environment.
const MARK: &str = "BERTH_TPM";
/// The file that swtpm locks.
const LOCK: &str = ".lock";

/// Where the log of the swtpm with this run directory is.
pub(super) fn log_path(run_dir: &Path) -> PathBuf {
    run_dir.join("tpm.log")
}

/// A swtpm that was started.
pub(super) struct Started {
    /// By what it is known again.
    pub(super) record: ProcessRecord,
    /// The process.
    pub(super) pidfd: OwnedFd,
    /// QEMU's end of the way to it.
    pub(super) socket: OwnedFd,
}

/// Starts it.
pub(super) fn start(plan: &Plan, spec: &LaunchSpec, tpm: &TpmSpec) -> Result<Started, LaunchError> {
    let doing = "starting its TPM";
    let unlock = durable::remove_file(&tpm.state.join(LOCK));
    unlock.map_err(|error| failed("unlocking its TPM's files")(io::Error::other(error)))?;
    let (ours, theirs) = UnixStream::pair().map_err(failed(doing))?;
    let log = log::begin(&log_path(&spec.run_dir)).map_err(failed(doing))?;
    let errors = log.try_clone().map_err(failed(doing))?;
    let theirs = OwnedFd::from(theirs);
    let mut command = Command::new(&tpm.binary);
    command.args(["socket", "--tpm2", "--terminate", "--tpmstate", "dir=.,mode=0600"]);
    command.arg("--ctrl").arg(format!("type=unixio,clientfd={}", theirs.as_raw_fd()));
    command.stdout(log).stderr(errors);
    let confinement = Confinement { user_id: spec.user_id, groups: Vec::new(), limits: Limits::default() };
    sandbox::confine(&mut command, confinement, vec![theirs]);
    // In its options a comma in a path would begin another option.
    command.current_dir(&tpm.state).env(MARK, &spec.run_dir);
    let child = command.spawn().map_err(failed(doing))?;
    // With it goes our copy of its end: it must notice when QEMU's closes.
    drop(command);
    let pid = i32::try_from(child.id()).map_err(|error| failed(doing)(io::Error::other(error)))?;
    let pidfd = open_pidfd(pid).and_then(|found| found.ok_or_else(|| io::ErrorKind::NotFound.into()));
    let pidfd = pidfd.map_err(failed(doing))?;
    let start_time_ticks = proc::start_time_ticks(pid).map_err(failed(doing))?;
    let record = ProcessRecord { pid, start_time_ticks, boot_id: plan.boot_id.clone(), tpm: None };
    Ok(Started { record, pidfd, socket: ours.into() })
}

/// Ends those whose QEMU is not there: they were being started when an agent died.
pub(super) fn end_left_over(run_dir: &Path, qemu_mark: &[u8]) {
    let mark = [MARK.as_bytes(), b"=", run_dir.as_os_str().as_encoded_bytes(), b"/"].concat();
    let run_dirs: Vec<PathBuf> = proc::with_environment(qemu_mark)
        .into_iter()
        .filter_map(|pid| proc::environment(pid, qemu_mark))
        .collect();
    for pid in proc::with_environment(&mark) {
        let Ok(Some(pidfd)) = open_pidfd(pid) else { continue };
        // Looked at now that the process is held: the number may have gone to another.
        let left_over = proc::environment(pid, &mark).is_some_and(|run_dir| !run_dirs.contains(&run_dir));
        if left_over {
            tracing::warn!(pid, "a TPM without a QEMU is ended");
            // One that has ended already needs no killing.
            let _ = rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL);
        }
    }
}

/// Finds one again that an agent before this one started; none if it has ended.
pub(super) fn find(record: &ProcessRecord) -> Result<Option<OwnedFd>, LaunchError> {
    let Some(pidfd) = open_pidfd(record.pid).map_err(failed("looking for its TPM"))? else { return Ok(None) };
    let ticks = proc::start_time_ticks(record.pid);
    let is_it = ticks.is_ok_and(|ticks| ticks == record.start_time_ticks) && !proc::is_dead(record.pid);
    Ok(is_it.then_some(pidfd))
}
