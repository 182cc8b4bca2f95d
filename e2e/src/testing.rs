//! What the stories share.

use std::path::Path;

use anyhow::Result;

use crate::{Berth, Cluster, Guest, UpOptions};

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
