//! What is asked of a VM whose guest runs, and must not disturb it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use berth_e2e::testing::{Pool, guest_in, up};
use berth_e2e::{Cluster, Guest};
use guest_probe::memory::{Rewrite, Settings};

use super::{Stand, refused, refused_once, wanted};

const WORK: Settings = Settings { memory_mib: 32, rate_mib_s: 5, hot_mib: 0, rewrite: Rewrite::Whole };
/// What placement keeps of a host's memory for the host, and adds to each VM's, in MiB.
const KEPT_MIB: u64 = 512 + 96;

/// A guest that works, to be asked afterwards whether all of it is still right.
pub struct Worker {
    guest: Guest,
    nonce: String,
}

impl Worker {
    pub fn begin(guest: Guest) -> Result<Self> {
        guest.probe.set(WORK, Duration::from_secs(60))?;
        guest.probe.write(10)?;
        let nonce = guest.probe.tick()?.nonce.to_string();
        Ok(Self { guest, nonce })
    }

    /// Fails unless it is the same guest, in one process, with every page and file.
    pub fn is_well(&self, cluster: &Cluster, vm: &str) -> Result<()> {
        let seen = if self.guest.forwarded { cluster.guest(vm)?.verify()? } else { self.guest.verify()? };
        ensure!(seen.tick.nonce == self.nonce, "the guest was started anew");
        ensure!(seen.files >= 10, "{} files are left", seen.files);
        ensure!(cluster.qemus_of(vm)?.len() == 1, "a VM has one process");
        Ok(())
    }
}

pub fn other_than(host: &str) -> &'static str {
    if host == "h1" { "h2" } else { "h1" }
}

#[test]
fn a_running_vm_is_as_it_was_after_every_refusal() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cluster = up(folder.path(), 2)?;
    let worker = Worker::begin(guest_in(&cluster, "books", Pool::Shared)?)?;
    let here = cluster.host_of("books")?;
    let before = Stand::of(&cluster)?;
    for (words, wanted) in [
        (
            vec!["vm", "migrate", "books", "--to", &here],
            wanted("invalid-input", 2, "target", &here, "a host other than"),
        ),
        (
            vec!["vm", "migrate", "books", "--to", "h9"],
            wanted("not-found", 4, "host", "h9", "an existing host"),
        ),
        (
            vec!["vm", "migrate", "books", "--bandwidth", "0mbit"],
            wanted("invalid-input", 2, "bandwidth", "0mbit", "a bandwidth like"),
        ),
        (
            vec!["snapshot", "create", "books", "--name", "baseline"],
            wanted("already-exists", 5, "name", "baseline", "a name that no other snapshot has"),
        ),
        (
            vec!["snapshot", "restore", "books", "never"],
            wanted("not-found", 4, "snapshot", "never", "an existing snapshot"),
        ),
        (vec!["vm", "start", "books"], wanted("wrong-state", 5, "state", "running", "stopped")),
        (vec!["vm", "delete", "books"], wanted("wrong-state", 5, "force", "false", "true")),
    ] {
        refused(&cluster, &words, wanted)?;
    }
    before.unchanged(|| Stand::of(&cluster))?;
    worker.is_well(&cluster, "books")?;
    no_room(&cluster, &here)?;
    worker.is_well(&cluster, "books")?;
    two_at_once(&cluster)?;
    worker.is_well(&cluster, "books")?;
    cluster.down()
}

/// A target whose memory another VM has.
fn no_room(cluster: &Cluster, here: &str) -> Result<()> {
    let target = other_than(here);
    let installed = cluster.berth.run(&["host", "show", target])?["inventory"]["memory_mib"]
        .as_u64()
        .context("a host without memory")?;
    let size = format!("{}MiB", installed - KEPT_MIB - 100);
    cluster.berth.run(&[
        "vm",
        "create",
        "large",
        "--image",
        "probe",
        "--memory",
        &size,
        "--disk",
        "64MiB",
        "--host",
        target,
        "--wait-for",
        "running",
    ])?;
    // It has its promise when it is held, and does not fill this machine.
    cluster.berth.run(&["vm", "pause", "large"])?;
    let before = Stand::of(cluster)?;
    let expected = "a host that can take the VM";
    let wanted_there = wanted("no-placement", 1, "target", target, expected);
    let refusal = refused(cluster, &["vm", "migrate", "books", "--to", target], wanted_there)?;
    ensure!(refusal.text.contains("288 MiB are wanted"), "{}", refusal.text);
    refused(cluster, &["vm", "migrate", "books"], wanted("no-placement", 1, "target", "any", expected))?;
    let words = ["vm", "create", "a", "--image", "probe", "--memory", "192MiB", "--host", target];
    refused(cluster, &words, wanted("no-placement", 1, "host", target, expected))?;
    before.unchanged(|| Stand::of(cluster))?;
    cluster.berth.run(&["vm", "delete", "large", "--force"]).map(drop)
}

/// The second of two changes hears of the first, which goes on.
fn two_at_once(cluster: &Cluster) -> Result<()> {
    let begun = cluster.berth.run(&["vm", "migrate", "books", "--bandwidth", "150mbit", "--no-wait"])?;
    let first = begun["operation"]["id"].as_str().context("no operation")?;
    for words in [
        ["snapshot", "create", "books", "--name", "meanwhile"].as_slice(),
        &["vm", "migrate", "books"],
        &["vm", "stop", "books"],
        &["vm", "delete", "books", "--force"],
        &["snapshot", "restore", "books", "baseline"],
    ] {
        let wanted = wanted("busy", 5, "operation", first, "no other operation on this VM");
        let refusal = refused_once(cluster, words, wanted)?;
        let message = refusal.problem["message"].as_str().unwrap_or_default();
        ensure!(message.contains("vm.migrate") && message.contains(first), "{message}");
    }
    let over = cluster.berth.run(&["operation", "wait", first])?;
    let state = over["operation"]["state"].as_str().or(over["state"].as_str());
    ensure!(state == Some("succeeded"), "the first was disturbed: {over}");
    Ok(())
}
