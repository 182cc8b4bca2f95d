//! Processes that `berth up` starts and that outlive it: found again by number and start time, ended by a descriptor.
//!
//! A number alone names whatever has it now. So a process is taken for ours only if it also started when ours did, in
//! the same boot; and it is ended through a descriptor that was opened before that was checked.
//!
//! Each is started with a mark in its environment too, so that one whose file was never written (we were killed in
//! between) is found all the same.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use super::directory::Directory;
use crate::config::write_private;

/// The mark in the environment of what we start: the directory of its cluster.
const MARK: &str = "BERTH_UP";
/// The mark that an agent gives its QEMUs: their run directory.
const QEMU_MARK: &str = "BERTH_RUN";
/// How long a process may take to end by itself. QEMU flushes its disks in it.
const END_TIMEOUT: Duration = Duration::from_secs(15);
/// How much of a log is shown when its process died.
const LAST_WORDS_LINES: usize = 12;
const LAST_WORDS_BYTES: usize = 4096;

/// By what a process is known again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessFile {
    /// Its number.
    pub pid: i32,
    /// When it started, in clock ticks since the machine's boot.
    pub start_time_ticks: u64,
    /// Which boot.
    pub boot_id: String,
}

/// The present boot of the machine.
///
/// # Errors
/// When the kernel doesn't say.
pub fn boot_id() -> Result<String> {
    berth_agent::launcher::process::proc::boot_id().context("the kernel's boot id can't be read")
}

/// Starts `berth` with these arguments in a session of its own, in a network namespace if one is named.
///
/// # Errors
/// When it can't be started, or can't be written down.
pub fn start(directory: &Directory, name: &str, arguments: &[&str], namespace: Option<&str>) -> Result<()> {
    let program = std::env::current_exe().context("it is not known which program this is")?;
    let log = directory.log(name);
    let file = File::options()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(&log)
        .with_context(|| format!("{} can't be opened", log.display()))?;
    let mut command = match namespace {
        Some(namespace) => {
            let mut command = Command::new("nsenter");
            command.arg(format!("--net=/run/netns/{namespace}")).arg("--").arg(&program);
            command
        }
        None => Command::new(&program),
    };
    command
        .args(arguments)
        .arg("--own-session")
        .env(MARK, directory.path())
        .env_remove("BERTH_TOKEN")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(file.try_clone().context("a log can't be shared")?)
        .stderr(file);
    let mut child = command.spawn().with_context(|| format!("{name} can't be started"))?;
    let pid = i32::try_from(child.id()).context("a process number that is none")?;
    let start_time_ticks = start_time_ticks(pid).context("a process that was just started is gone")?;
    let known = ProcessFile { pid, start_time_ticks, boot_id: boot_id()? };
    let text = serde_json::to_vec(&known).context("a process can't be written down")?;
    write_private(&directory.pid_file(name), &text)?;
    // Whoever outlives its child has to take note of its end, or the child stays as a zombie.
    std::thread::spawn(move || child.wait());
    Ok(())
}

/// The process of this name, if it lives.
pub fn alive(directory: &Directory, name: &str) -> Option<ProcessFile> {
    let text = fs::read(directory.pid_file(name)).ok()?;
    let known: ProcessFile = serde_json::from_slice(&text).ok()?;
    lives(&known).then_some(known)
}

fn lives(known: &ProcessFile) -> bool {
    boot_id().is_ok_and(|boot| boot == known.boot_id)
        && start_time_ticks(known.pid).is_ok_and(|ticks| ticks == known.start_time_ticks)
        && !is_dead(known.pid)
}

/// What of this cluster lives without being written down: QEMUs, and what was started when we were killed.
pub fn strays(directory: &Directory) -> Vec<ProcessFile> {
    let directory = directory.path().as_os_str().as_encoded_bytes();
    let ours = [MARK.as_bytes(), b"=", directory].concat();
    let qemu = [QEMU_MARK.as_bytes(), b"=", directory, b"/"].concat();
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let Ok(boot_id) = boot_id() else { return Vec::new() };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .filter_map(|pid| {
            // The start time is read first: if the number changes hands in between, the process is simply not found.
            let start_time_ticks = start_time_ticks(pid).ok()?;
            let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
            let marked = environment
                .split(|byte| *byte == 0)
                .any(|variable| variable == ours || variable.starts_with(&qemu));
            (marked && !is_dead(pid)).then(|| ProcessFile { pid, start_time_ticks, boot_id: boot_id.clone() })
        })
        .collect()
}

/// Ends a process: asks it first, and takes it down when it doesn't.
///
/// # Errors
/// When it is not ours to end.
pub async fn end(known: &ProcessFile) -> Result<()> {
    let Some(pid) = Pid::from_raw(known.pid) else { return Ok(()) };
    let descriptor = match pidfd_open(pid, PidfdFlags::NONBLOCK) {
        Ok(descriptor) => descriptor,
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("process {} can't be held", known.pid)),
    };
    if !lives(known) {
        return Ok(());
    }
    let pid = known.pid;
    let ending = tokio::task::spawn_blocking(move || {
        for signal in [Signal::TERM, Signal::KILL] {
            send(&descriptor, signal)?;
            if ended_within(&descriptor, END_TIMEOUT)? {
                return Ok(());
            }
        }
        bail!("process {pid} does not end")
    });
    ending.await.context("waiting for a process was cut short")?
}

fn send(descriptor: &OwnedFd, signal: Signal) -> Result<()> {
    match pidfd_send_signal(descriptor, signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(error).context("a process can't be told to end"),
    }
}

/// A process's descriptor is readable once it has ended.
fn ended_within(descriptor: &OwnedFd, limit: Duration) -> Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).context("a time that is none")?;
        match poll(&mut [PollFd::new(descriptor, PollFlags::IN)], Some(&left)) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("a process can't be waited for"),
        }
    }
}

/// The end of a log, to be shown when its process died.
pub fn last_words(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text[text.len().saturating_sub(LAST_WORDS_BYTES)..]).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LAST_WORDS_LINES)..].join("\n")
}

fn start_time_ticks(pid: i32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    fields(&stat)
        .and_then(|mut fields| fields.nth(19)?.parse().ok())
        .ok_or_else(|| io::Error::other("the kernel's line about the process can't be read"))
}

fn is_dead(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    matches!(fields(&stat).and_then(|mut fields| fields.next()), None | Some("Z" | "X"))
}

/// The fields from the state on: a process's name, before them, may have blanks and parentheses in it.
fn fields(stat: &str) -> Option<std::str::SplitWhitespace<'_>> {
    stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper(directory: &Path) -> (std::process::Child, ProcessFile) {
        let mut command = Command::new("sleep");
        let child = command.arg("600").env(MARK, directory).spawn().expect("started");
        let pid = i32::try_from(child.id()).expect("a number");
        let start_time_ticks = start_time_ticks(pid).expect("alive");
        (child, ProcessFile { pid, start_time_ticks, boot_id: boot_id().expect("a boot") })
    }

    #[tokio::test]
    async fn a_process_is_ended_and_a_number_that_was_used_again_is_not() {
        let directory = tempfile::tempdir().expect("a directory");
        let (mut child, known) = sleeper(directory.path());
        let other = ProcessFile { start_time_ticks: known.start_time_ticks + 1, ..known.clone() };
        end(&other).await.expect("nothing to do");
        let before = ProcessFile { boot_id: "another".to_owned(), ..known.clone() };
        end(&before).await.expect("nothing to do");
        assert!(lives(&known));
        end(&known).await.expect("ended");
        assert!(!lives(&known));
        child.wait().expect("waited");
        end(&known).await.expect("nothing to do");
    }

    #[tokio::test]
    async fn what_was_not_written_down_is_found_by_its_mark() {
        let base = tempfile::tempdir().expect("a directory");
        fs::set_permissions(base.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .expect("opened");
        let directory = Directory::open_or_make(&base.path().join("up")).expect("made");
        let (mut ours, known) = sleeper(directory.path());
        let (mut neighbour, other) = sleeper(&base.path().join("up2"));
        // The child may still be on its way from our program to its own.
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while strays(&directory).is_empty() && std::time::Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert_eq!(strays(&directory), std::slice::from_ref(&known));
        end(&known).await.expect("ended");
        end(&other).await.expect("ended");
        ours.wait().expect("waited");
        neighbour.wait().expect("waited");
    }
}
