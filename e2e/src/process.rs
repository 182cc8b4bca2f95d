//! Processes by id and start time: a number alone may by now be somebody else's.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// A process that can't be mistaken for another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// When it started, in the kernel's ticks since boot.
    start_ticks: u64,
}

impl Process {
    /// The process that has this id now.
    pub fn find(pid: u32) -> Option<Self> {
        Some(Self { pid, start_ticks: start_ticks(pid)? })
    }

    /// Whether it still is.
    pub fn lives(&self) -> bool {
        start_ticks(self.pid) == Some(self.start_ticks)
    }

    /// Sends it a signal by name (`KILL`, `STOP`, `CONT`, `TERM`), if it still is.
    ///
    /// # Errors
    /// When the signal can't be sent.
    pub fn signal(&self, name: &str) -> Result<()> {
        if !self.lives() {
            return Ok(());
        }
        let status =
            Command::new("kill").args(["-s", name, &self.pid.to_string()]).status().context("kill")?;
        if !status.success() && self.lives() {
            bail!("process {} could not be sent {name}", self.pid);
        }
        Ok(())
    }

    /// Kills it and waits until it is gone.
    ///
    /// # Errors
    /// When it does not go within ten seconds.
    pub fn kill(&self) -> Result<()> {
        self.signal("KILL")?;
        wait_until(Duration::from_secs(10), &format!("process {} to be gone", self.pid), || Ok(!self.lives()))
    }
}

/// Field 22 of `/proc/PID/stat`; none for a process that is gone or only waits to be reaped.
fn start_ticks(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold anything, but ends with the last parenthesis.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    if fields.first() == Some(&"Z") {
        return None;
    }
    fields.get(19)?.parse().ok()
}

/// Processes whose command line holds all of these words.
pub fn with_words(words: &[&str]) -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        *pid != std::process::id() && words.iter().all(|word| line.contains(word))
    })
    .filter_map(Process::find)
    .collect()
}

/// Asks again and again until it is so.
///
/// # Errors
/// When it is not so in time, or asking fails.
pub fn wait_until(limit: Duration, what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + limit;
    loop {
        if is_so()? {
            return Ok(());
        }
        if Instant::now() >= end {
            bail!("waited {} s in vain for {what}", limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
