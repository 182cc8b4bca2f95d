//! A cluster on this machine, made by `berth up` and taken down again whatever happens.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use guest_probe::image::GuestImage;
use serde_json::Value;

use crate::berth::Berth;
use crate::guest::Guest;
use crate::process::{Process, wait_until};

/// What kind of cluster.
#[derive(Debug, Clone)]
pub struct UpOptions {
    /// Where its files go; must not exist or be empty.
    pub dir: PathBuf,
    /// How many hosts.
    pub hosts: u32,
    /// The link between the hosts, in Mbit/s; none: as fast as it goes.
    pub link_mbit: Option<u32>,
    /// Leave it running when this value is dropped.
    pub keep: bool,
}

/// A running cluster.
#[derive(Debug)]
pub struct Cluster {
    /// The binary, pointed at this cluster.
    pub berth: Berth,
    dir: PathBuf,
    keep: bool,
    tells_logs: bool,
}

/// So many lines of each log are told.
const LOG_LINES: usize = 80;

impl Cluster {
    /// Starts a cluster and waits until all hosts are online.
    ///
    /// # Errors
    /// When `berth up` fails; nothing is left then.
    pub fn up(berth: &Berth, options: &UpOptions) -> Result<Self> {
        let dir = options.dir.to_str().context("the cluster's folder has a name that is not UTF-8")?;
        let hosts = options.hosts.to_string();
        // How full the disk is on which tests run decides nothing in them.
        let mut words = vec!["up", "--hosts", &hosts, "--dir", dir, "--detach", "--pool-reserve", "0"];
        let link = options.link_mbit.map(|mbit| mbit.to_string());
        if let Some(link) = &link {
            words.extend(["--link-mbit", link]);
        }
        let config = options.dir.join("client.toml");
        // Made first, so that whatever came up before a failure is taken down by its drop.
        let cluster = Self {
            berth: berth.clone().with_config(&config),
            dir: options.dir.clone(),
            keep: options.keep,
            tells_logs: false,
        };
        berth.run(&words)?;
        Ok(cluster)
    }

    /// Shows the end of each daemon's log when it is dropped without [`Self::down`]: a test has failed then.
    #[must_use]
    pub const fn telling_logs(mut self) -> Self {
        self.tells_logs = true;
        self
    }

    /// Where its files are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Imports the test guest as an image, with more words for its kernel (`probe.memory_mib=64`).
    ///
    /// # Errors
    /// When the guest has not been built, or the import fails.
    pub fn import_guest(&self, image: &str, more: &str) -> Result<()> {
        let guest = GuestImage::locate()?;
        let append = format!("{} {more}", guest.cmdline);
        let (kernel, initrd) =
            (guest.kernel.to_str().context("path")?, guest.initrd.to_str().context("path")?);
        let words =
            ["image", "import", "--name", image, "--kernel", kernel, "--initrd", initrd, "--append", &append];
        self.berth.run(&words).map(drop)
    }

    /// Makes a VM of the test guest and waits until it has its baseline.
    ///
    /// # Errors
    /// When it is not made or not ready.
    pub fn create_guest(&self, name: &str, image: &str, more: &[&str]) -> Result<Guest> {
        let mut words = vec!["vm", "create", name, "--image", image];
        words.extend(more);
        self.berth.run(&words)?;
        self.guest(name)
    }

    /// A guest that is there.
    ///
    /// # Errors
    /// When it has no address to be asked at.
    pub fn guest(&self, name: &str) -> Result<Guest> {
        Guest::of(&self.vm(name)?)
    }

    /// A VM as the API shows it.
    ///
    /// # Errors
    /// When it is not there.
    pub fn vm(&self, name: &str) -> Result<Value> {
        self.berth.run(&["vm", "show", name])
    }

    /// The name of the host that owns a VM.
    ///
    /// # Errors
    /// When the VM is not there.
    pub fn host_of(&self, name: &str) -> Result<String> {
        let vm = self.vm(name)?;
        let id = vm["status"]["host"].as_str().context("the VM is on no host")?;
        let host = self.berth.run(&["host", "show", id])?;
        Ok(host["name"].as_str().context("a host without a name")?.to_owned())
    }

    /// Waits until a VM is in this state.
    ///
    /// # Errors
    /// When it is not within two minutes.
    pub fn wait_for_state(&self, name: &str, state: &str) -> Result<()> {
        wait_until(Duration::from_secs(120), &format!("{name} to be {state}"), || {
            Ok(self.vm(name)?["status"]["state"] == state)
        })
    }

    /// The QEMU processes of a VM, by its id, on all hosts.
    ///
    /// # Errors
    /// When the VM is not there.
    pub fn qemus_of(&self, name: &str) -> Result<Vec<Process>> {
        let vm = self.vm(name)?;
        let id = vm["id"].as_str().context("a VM without an id")?;
        Ok(crate::process::with_words(&["qemu-system", id]))
    }

    /// A daemon of this cluster: `manager`, or a host's name for its agent.
    ///
    /// # Errors
    /// When it does not run.
    pub fn daemon(&self, name: &str) -> Result<Process> {
        let path = self.dir.join("pids").join(format!("{name}.json"));
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let record: Value = serde_json::from_str(&text)?;
        let pid = record["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).context("no pid")?;
        Process::find(pid).with_context(|| format!("{name} does not run"))
    }

    /// Starts the daemons again that are dead.
    ///
    /// # Errors
    /// When `berth up` fails.
    pub fn restart_dead(&self) -> Result<()> {
        let dir = self.dir.to_str().context("path")?;
        self.berth.run(&["up", "--dir", dir, "--detach"]).map(drop)
    }

    /// Takes it down and removes all its files.
    ///
    /// # Errors
    /// When something of it can't be removed.
    pub fn down(mut self) -> Result<()> {
        self.keep = true;
        self.remove()
    }

    fn remove(&self) -> Result<()> {
        let dir = self.dir.to_str().context("path")?;
        self.berth.run(&["down", "--dir", dir, "--purge"]).map(drop)
    }

    fn tell_logs(&self) {
        for entry in std::fs::read_dir(self.dir.join("log")).into_iter().flatten().flatten() {
            let text = std::fs::read(entry.path()).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let lines: Vec<&str> = text.lines().collect();
            let end = &lines[lines.len().saturating_sub(LOG_LINES)..];
            eprintln!("the end of {}:\n{}", entry.file_name().display(), end.join("\n"));
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        if self.tells_logs {
            self.tell_logs();
        }
        if self.dir.exists()
            && let Err(error) = self.remove()
        {
            eprintln!("the cluster in {} could not be taken down: {error:#}", self.dir.display());
        }
    }
}
