//! What the stories share.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::process::wait_until;
use crate::{Berth, Cluster, Guest, UpOptions};

/// How long a guest may take to answer. Longer helps nobody: a machine so slow fails elsewhere.
const ANSWER_LIMIT: Duration = Duration::from_secs(120);

/// Where a VM's disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pool {
    /// In a directory that all hosts see.
    Shared,
    /// In a directory of its host.
    Local,
}

impl Pool {
    /// The pool's name in a cluster made by `berth up`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Shared => "default",
            Self::Local => "local",
        }
    }
}

/// A cluster in this folder, with the test guest as image `probe`.
///
/// # Errors
/// When it does not come up.
pub fn up(folder: &Path, hosts: u32) -> Result<Cluster> {
    let berth = Berth::beside_this_program()?;
    let options = UpOptions { dir: folder.join("cluster"), hosts, link_mbit: None, keep: false };
    let cluster = Cluster::up(&berth, &options)?.telling_logs();
    cluster.import_guest("probe", "")?;
    Ok(cluster)
}

/// A small VM of the test guest with its baseline.
///
/// # Errors
/// When it is not made or not ready.
pub fn guest_in(cluster: &Cluster, name: &str, pool: Pool) -> Result<Guest> {
    cluster.create_guest(name, "probe", &["--memory", "192MiB", "--disk", "256MiB", "--pool", pool.name()])
}

/// A guest as soon as it answers.
///
/// # Errors
/// When it does not, with how its VM is.
pub fn answering(cluster: &Cluster, name: &str) -> Result<Guest> {
    let mut found = None;
    wait_until(ANSWER_LIMIT, &format!("{name} to answer"), || {
        let guest = cluster.guest(name)?;
        if guest.probe.tick_within(Duration::from_millis(500)).is_ok() {
            found = Some(guest);
        }
        Ok(found.is_some())
    })
    .with_context(|| format!("{:#}", cluster.vm(name).unwrap_or_default()["status"]))?;
    found.context("it answered")
}

/// Waits until a guest answers, and sees that everything in it is right and it has so many files.
///
/// # Errors
/// When it does not answer, something is wrong, or there are more or fewer.
pub fn has_files(cluster: &Cluster, name: &str, files: u64) -> Result<()> {
    let seen = answering(cluster, name)?.verify()?;
    ensure!(seen.files == files, "{name} has {} files, not {files}", seen.files);
    Ok(())
}
