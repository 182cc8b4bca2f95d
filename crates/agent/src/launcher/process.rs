//! The real launcher: QEMU as a process that outlives the agent.
//!
//! A process is watched by a descriptor of it, never by its number alone, so one that ended is not mistaken for
//! another. Which processes are this agent's is told by a mark in their environment that names the VM's run directory.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use berth_api::transport::BoxFuture;
use berth_qmp::commands::QueryStatus;
use berth_qmp::{ConnectOptions, Events, Qmp};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use super::{
    Argument, Descriptor, Duplex, Exit, Hypervisor, LaunchError, LaunchSpec, Launched, Launcher, Process,
    ProcessRecord, Socket,
};
use crate::sandbox::{self, Confinement, Limits};

pub mod abilities;
pub mod log;
pub mod proc;
mod sockets;
mod tpm;

/// The name of the mark in the environment of our processes.
const MARK: &str = "BERTH_RUN";
/// How long QEMU may take to greet. A loaded host starts it slowly; one that hangs would hold its VM's queue for ever.
const GREETING_TIMEOUT: Duration = Duration::from_secs(60);
/// How long one that is up already may take to greet an agent that has just started.
const ADOPTION_TIMEOUT: Duration = Duration::from_secs(10);

/// Starts real QEMUs.
pub struct ProcessLauncher {
    binary: PathBuf,
    first_arguments: Vec<String>,
    run_dir: PathBuf,
    boot_id: String,
    kvm_group: Option<u32>,
    probe_user: Option<u32>,
}

impl ProcessLauncher {
    /// A launcher of this binary. `probe_user` is who a QEMU runs as that is only asked what it can do.
    ///
    /// # Errors
    /// When the system's own facts can't be read.
    pub fn new(
        binary: PathBuf,
        first_arguments: Vec<String>,
        run_dir: PathBuf,
        probe_user: Option<u32>,
    ) -> io::Result<Self> {
        let boot_id = proc::boot_id()?;
        let kvm_group = sandbox::group_of(Path::new("/dev/kvm")).filter(|&group| group != 0);
        Ok(Self { binary, first_arguments, run_dir, boot_id, kvm_group, probe_user })
    }

    async fn start(&self, spec: LaunchSpec) -> Result<Launched, LaunchError> {
        let plan = Plan {
            binary: self.binary.clone(),
            first_arguments: self.first_arguments.clone(),
            groups: self.kvm_group.into_iter().collect(),
            boot_id: self.boot_id.clone(),
        };
        let run_dir = spec.run_dir.clone();
        let spawned = tokio::task::spawn_blocking(move || plan.spawn(spec)).await;
        let Spawned { record, pidfd, tpm } =
            spawned.map_err(|error| failed("making a process")(io::Error::other(error)))??;
        let tpm =
            tpm.map(|(record, pidfd)| watched(record, pidfd, tpm::log_path(&run_dir), true)).transpose()?;
        let process = watched(record, pidfd, log::path(&run_dir), true)?.with_tpm(tpm);
        // Whoever stops waiting for the greeting must not leave a process behind.
        let mut guard = Guard(Some(process.clone()));
        let launched = tokio::select! {
            greeted = greet(&run_dir, GREETING_TIMEOUT) => match greeted {
                Ok((qmp, events)) => Ok(Launched { qmp, events, process: process.clone() }),
                Err(source) => Err(ended_or(&process, source).await),
            },
            exit = process.exited() => Err(LaunchError::Died { exit }),
        };
        if launched.is_ok() {
            guard.0 = None;
        } else {
            process.kill();
            process.exited().await;
            if let Some(tpm) = process.tpm() {
                tpm.kill();
                tpm.exited().await;
            }
        }
        launched
    }

    async fn find(&self, record: &ProcessRecord, run_dir: &Path) -> Result<Option<Launched>, LaunchError> {
        if record.boot_id != self.boot_id {
            return Ok(None);
        }
        let Some(pidfd) = open_pidfd(record.pid).map_err(failed("looking for a process"))? else {
            return Ok(None);
        };
        // The descriptor is of whatever has the number now; only after it is held can the start time be relied on.
        match proc::start_time_ticks(record.pid) {
            Ok(ticks) if ticks == record.start_time_ticks && !proc::is_dead(record.pid) => {}
            _ => return Ok(None),
        }
        let process = watched(record.clone(), pidfd, log::path(run_dir), false)?;
        let process = process.with_tpm(find_tpm(record, run_dir)?);
        match greet(run_dir, ADOPTION_TIMEOUT).await {
            Ok((qmp, events)) => Ok(Some(Launched { qmp, events, process })),
            Err(_) if process.has_exited() => Ok(None),
            Err(source) => Err(LaunchError::Monitor { source, process: Some(process) }),
        }
    }
}

impl Launcher for ProcessLauncher {
    fn launch(&self, spec: LaunchSpec) -> BoxFuture<'_, Result<Launched, LaunchError>> {
        Box::pin(self.start(spec))
    }

    fn adopt<'a>(
        &'a self,
        record: &'a ProcessRecord,
        run_dir: &'a Path,
    ) -> BoxFuture<'a, Result<Option<Launched>, LaunchError>> {
        Box::pin(self.find(record, run_dir))
    }

    fn end_unknown<'a>(&'a self, known: &'a [ProcessRecord]) -> BoxFuture<'a, ()> {
        let mark = [MARK.as_bytes(), b"=", self.run_dir.as_os_str().as_encoded_bytes(), b"/"].concat();
        Box::pin(async move {
            for pid in proc::with_environment(&mark) {
                if !known.iter().any(|record| record.pid == pid) {
                    end_stray(pid, &mark).await;
                }
            }
            tpm::end_left_over(&self.run_dir, &mark);
        })
    }

    fn connect<'a>(
        &'a self,
        run_dir: &'a Path,
        socket: Socket,
    ) -> BoxFuture<'a, io::Result<Box<dyn Duplex>>> {
        Box::pin(async move {
            Ok(Box::new(sockets::connect(run_dir, socket.file_name()).await?) as Box<dyn Duplex>)
        })
    }

    fn inspect(&self) -> BoxFuture<'_, Result<Hypervisor, LaunchError>> {
        Box::pin(abilities::inspect(self))
    }
}

/// Ends a process when it is dropped before it was disarmed.
struct Guard(Option<Process>);

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(process) = &self.0 {
            process.kill();
            // Its QEMU may not have spoken to it yet, and then it does not notice.
            if let Some(tpm) = process.tpm() {
                tpm.kill();
            }
        }
    }
}

/// Everything that making a process needs, so that it can be done on a thread that may block.
struct Plan {
    binary: PathBuf,
    first_arguments: Vec<String>,
    groups: Vec<u32>,
    boot_id: String,
}

/// Processes that were made.
struct Spawned {
    record: ProcessRecord,
    pidfd: OwnedFd,
    tpm: Option<(ProcessRecord, OwnedFd)>,
}

impl Plan {
    fn spawn(self, mut spec: LaunchSpec) -> Result<Spawned, LaunchError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&spec.run_dir)
            .map_err(failed("making the run directory"))?;
        let mut files: BTreeMap<Descriptor, OwnedFd> =
            std::mem::take(&mut spec.descriptors).into_iter().collect();
        for socket in spec.arguments.iter().filter_map(wanted_socket) {
            let listener: UnixListener = sockets::listen(&spec.run_dir, socket.file_name())
                .map_err(failed("making QEMU's sockets"))?;
            files.insert(Descriptor::Socket(socket), listener.into());
        }
        let Some(tpm) = &spec.tpm else {
            let (record, pidfd) = self.spawn_qemu(&spec, files)?;
            return Ok(Spawned { record, pidfd, tpm: None });
        };
        let tpm = tpm::start(&self, &spec, tpm)?;
        files.insert(Descriptor::Tpm, tpm.socket);
        match self.spawn_qemu(&spec, files) {
            Ok((record, pidfd)) => {
                let record = ProcessRecord { tpm: Some(Box::new(tpm.record.clone())), ..record };
                Ok(Spawned { record, pidfd, tpm: Some((tpm.record, tpm.pidfd)) })
            }
            Err(error) => {
                // One that has ended already needs no killing.
                let _ = rustix::process::pidfd_send_signal(&tpm.pidfd, Signal::KILL);
                Err(error)
            }
        }
    }

    fn spawn_qemu(
        &self,
        spec: &LaunchSpec,
        files: BTreeMap<Descriptor, OwnedFd>,
    ) -> Result<(ProcessRecord, OwnedFd), LaunchError> {
        let words = words(&spec.arguments, &files).map_err(failed("writing the command line"))?;
        let log = log::begin(&log::path(&spec.run_dir)).map_err(failed("opening QEMU's log"))?;
        let errors = log.try_clone().map_err(failed("opening QEMU's log"))?;
        let mut command = Command::new(&self.binary);
        command.args(&self.first_arguments).args(words).stdout(log).stderr(errors);
        let confinement = Confinement {
            user_id: spec.user_id,
            groups: if spec.user_id.is_some() { self.groups.clone() } else { Vec::new() },
            limits: Limits::default(),
        };
        sandbox::confine(&mut command, confinement, files.into_values().collect());
        command.env(MARK, &spec.run_dir);
        let child = command.spawn().map_err(failed("starting its program"))?;
        // With it go the files that QEMU has now: its ends of the sockets must close when it ends.
        drop(command);
        let pid = i32::try_from(child.id())
            .map_err(|error| failed("naming the process")(io::Error::other(error)))?;
        let pidfd = open_pidfd(pid).and_then(|found| found.ok_or_else(|| io::ErrorKind::NotFound.into()));
        let pidfd = pidfd.map_err(failed("watching the process"))?;
        let start_time_ticks = proc::start_time_ticks(pid).map_err(failed("watching the process"))?;
        Ok((ProcessRecord { pid, start_time_ticks, boot_id: self.boot_id.clone(), tpm: None }, pidfd))
    }
}

/// The TPM of a process that was found again. One that has ended meanwhile is one that has ended.
fn find_tpm(record: &ProcessRecord, run_dir: &Path) -> Result<Option<Process>, LaunchError> {
    let Some(record) = record.tpm.as_deref() else { return Ok(None) };
    let path = tpm::log_path(run_dir);
    if let Some(pidfd) = tpm::find(record)? {
        return watched(record.clone(), pidfd, path, false).map(Some);
    }
    let (_, exited) =
        watch::channel(Some(Exit { code: None, signal: None, last_words: log::last_words(&path) }));
    Ok(Some(Process::new(record.clone(), exited, Arc::new(|| {}))))
}

fn failed(doing: &'static str) -> impl FnOnce(io::Error) -> LaunchError {
    move |source| LaunchError::System { doing, source }
}

fn wanted_socket(argument: &Argument) -> Option<Socket> {
    match argument {
        Argument::WithDescriptor { descriptor: Descriptor::Socket(socket), .. } => Some(*socket),
        Argument::Text(_) | Argument::WithDescriptor { .. } => None,
    }
}

fn words(arguments: &[Argument], files: &BTreeMap<Descriptor, OwnedFd>) -> io::Result<Vec<String>> {
    let word = |argument: &Argument| match argument {
        Argument::Text(text) => Ok(text.clone()),
        Argument::WithDescriptor { before, descriptor, after } => {
            let number: RawFd = files
                .get(descriptor)
                .ok_or_else(|| io::Error::other(format!("{descriptor:?} was not opened")))?
                .as_raw_fd();
            Ok(format!("{before}{number}{after}"))
        }
    };
    arguments.iter().map(word).collect()
}

fn open_pidfd(pid: i32) -> io::Result<Option<OwnedFd>> {
    let Some(pid) = Pid::from_raw(pid) else { return Ok(None) };
    match rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK) {
        Ok(pidfd) => Ok(Some(pidfd)),
        Err(rustix::io::Errno::SRCH) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn listen_to(pidfd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open as long as it lives and is always of the same number.
    #[allow(unsafe_code)]
    let registered = unsafe { AsyncFd::register(pidfd) };
    registered.map_err(|error| error.into_parts().1)
}

/// A handle to a process, with a task that waits for its end.
fn watched(
    record: ProcessRecord,
    pidfd: OwnedFd,
    log: PathBuf,
    is_child: bool,
) -> Result<Process, LaunchError> {
    let pidfd = Arc::new(listen_to(pidfd).map_err(failed("watching the process"))?);
    let (ended, exited) = watch::channel(None);
    let killed = Arc::clone(&pidfd);
    tokio::spawn(async move {
        tokio::select! {
            // An error is that of a runtime that is ending.
            _ = pidfd.readable() => {}
            () = log::keep_bounded(&log) => {}
        }
        let (code, signal) = if is_child { reap(&pidfd) } else { (None, None) };
        ended.send_replace(Some(Exit { code, signal, last_words: log::last_words(&log) }));
    });
    let kill = move || {
        // One that has ended already needs no killing.
        let _ = rustix::process::pidfd_send_signal(killed.get_ref(), Signal::KILL);
    };
    Ok(Process::new(record, exited, Arc::new(kill)))
}

fn reap(pidfd: &AsyncFd<OwnedFd>) -> (Option<i32>, Option<i32>) {
    use std::os::fd::AsFd;
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    match rustix::process::waitid(WaitId::PidFd(pidfd.get_ref().as_fd()), options) {
        Ok(Some(status)) => (status.exit_status(), status.terminating_signal()),
        Ok(None) | Err(_) => (None, None),
    }
}

async fn greet(run_dir: &Path, connect_timeout: Duration) -> Result<(Qmp, Events), berth_qmp::QmpError> {
    let name = Socket::Qmp.file_name();
    let stream = sockets::connect(run_dir, name)
        .await
        .map_err(|source| berth_qmp::QmpError::Connect { path: run_dir.join(name), source })?;
    let options = ConnectOptions { connect_timeout, ..ConnectOptions::default() };
    Qmp::over_unix(stream, options).await
}

/// A monitor that breaks off is mostly a process that ends: its own words are the better error.
async fn ended_or(process: &Process, source: berth_qmp::QmpError) -> LaunchError {
    match tokio::time::timeout(Duration::from_secs(1), process.exited()).await {
        Ok(exit) => LaunchError::Died { exit },
        Err(_) => LaunchError::Monitor { source, process: None },
    }
}

/// Ends a process that no record names, if its guest does not run: then it was being started when an agent died. One
/// whose guest runs is left alone, for its record may only be lost, and nobody has leave to stop it.
async fn end_stray(pid: i32, mark: &[u8]) {
    let Ok(Some(pidfd)) = open_pidfd(pid) else { return };
    // Looked at again now that the process is held: the number may have gone to another since it was found.
    let Some(run_dir) = proc::environment(pid, mark) else { return };
    if guest_may_run(&run_dir).await {
        tracing::error!(pid, run_dir = %run_dir.display(), "a QEMU that no record names may be running its guest: it is left alone");
        return;
    }
    tracing::warn!(pid, "a QEMU that was being started when an agent died is ended");
    if let Err(error) = rustix::process::pidfd_send_signal(&pidfd, Signal::KILL) {
        tracing::warn!(pid, %error, "it can't be ended");
        return;
    }
    if let Ok(pidfd) = listen_to(pidfd)
        && tokio::time::timeout(Duration::from_secs(30), pidfd.readable()).await.is_err()
    {
        tracing::error!(pid, "it does not end");
    }
}

async fn guest_may_run(run_dir: &Path) -> bool {
    let Ok((qmp, _)) = greet(run_dir, ADOPTION_TIMEOUT).await else { return true };
    qmp.call(QueryStatus {}).await.map_or(true, |status| status.running)
}
