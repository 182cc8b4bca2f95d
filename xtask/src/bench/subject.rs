//! A VM of ours that is measured: what is done to it goes through the `berth` command, as everything does.

use anyhow::{Context, Result};
use berth_e2e::Cluster;
use guest_probe::client::ProbeClient;
use serde_json::Value;

use super::work::{self, Life, items};

/// A VM that is measured.
pub struct Subject<'a> {
    /// The cluster that it is in.
    pub cluster: &'a Cluster,
    /// Its name.
    pub name: &'a str,
    /// The probe in its guest.
    pub probe: ProbeClient,
}

impl<'a> Subject<'a> {
    /// Makes a VM of the test guest, with its baseline.
    ///
    /// # Errors
    /// When it is not made, or its guest is not ready.
    pub fn make(cluster: &'a Cluster, name: &'a str, memory_mib: u32) -> Result<Self> {
        let memory = format!("{memory_mib}MiB");
        let guest = cluster.create_guest(name, "probe", &["--memory", &memory, "--disk", "1GiB"])?;
        Ok(Self { cluster, name, probe: guest.probe })
    }

    /// Takes a snapshot, and gives what was measured of it.
    ///
    /// # Errors
    /// When it fails.
    pub fn take(&self, snapshot: &str) -> Result<Value> {
        facts_of(self.cluster.berth.run(&["snapshot", "create", self.name, "--name", snapshot])?)
    }

    /// Puts the VM back, and gives what was measured of that, from inside and from outside.
    ///
    /// # Errors
    /// When it fails, or the guest is silent afterwards.
    pub fn put_back(&self, snapshot: &str, more: &[&str]) -> Result<(Value, Life)> {
        let words = [&["snapshot", "restore", self.name, snapshot][..], more].concat();
        let (over, life) = work::put_back(self.probe.address(), || self.cluster.berth.run(&words))?;
        Ok((facts_of(over)?, life))
    }

    /// Deletes a snapshot.
    ///
    /// # Errors
    /// When it is refused.
    pub fn forget(&self, snapshot: &str) -> Result<()> {
        self.cluster.berth.run(&["snapshot", "delete", self.name, snapshot]).map(drop)
    }

    /// The snapshots of this kind.
    ///
    /// # Errors
    /// When they can't be listed.
    pub fn snapshots(&self, kind: &str) -> Result<Vec<Value>> {
        let mut snapshots = items(&self.cluster.berth.run(&["snapshot", "list", self.name])?)?;
        snapshots.retain(|snapshot| snapshot["kind"] == kind);
        Ok(snapshots)
    }

    /// Deletes the undo snapshots.
    ///
    /// # Errors
    /// When that is refused.
    pub fn forget_undo(&self) -> Result<()> {
        for snapshot in self.snapshots("undo")? {
            self.forget(snapshot["id"].as_str().context("a snapshot without an id")?)?;
        }
        Ok(())
    }

    /// Has every page and file of the guest verified: a fast restore of something wrong is no restore.
    ///
    /// # Errors
    /// When one is wrong, or the guest is silent.
    pub fn verify(&self) -> Result<()> {
        let seen = self.cluster.guest(self.name)?.verify()?;
        println!("   {} pages verified afterwards: all right", seen.pages);
        Ok(())
    }

    /// Deletes the VM.
    ///
    /// # Errors
    /// When it is refused.
    pub fn delete(self) -> Result<()> {
        self.cluster.berth.run(&["vm", "delete", self.name, "--force"]).map(drop)
    }
}

/// What an operation that was waited for has measured.
///
/// # Errors
/// When it says nothing.
pub fn facts_of(mut over: Value) -> Result<Value> {
    let facts = over["operation"]["result"]["facts"].take();
    if facts.is_null() { Err(anyhow::anyhow!("an operation without facts: {over}")) } else { Ok(facts) }
}
