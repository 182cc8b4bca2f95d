//! New VMs from snapshots: they go on where the snapshot stands, each is somebody of its own, and none sees another's.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use berth_e2e::process::wait_until;
use berth_e2e::testing::{Pool, answering, guest_in, up};
use berth_e2e::{Cluster, Guest};
use guest_probe::memory::{Rewrite, Settings};
use serde_json::Value;

const WORK: Settings = Settings { memory_mib: 48, rate_mib_s: 1, hot_mib: 0, rewrite: Rewrite::Whole };
const LIMIT: Duration = Duration::from_secs(90);
const CLONES: usize = 10;

/// A working guest `books` with five files and a snapshot `origin`, taken when its guest agent answers.
fn origin(cluster: &Cluster, pool: Pool) -> Result<String> {
    let guest = guest_in(cluster, "books", pool)?;
    guest.probe.set(WORK, Duration::from_secs(60))?;
    guest.probe.write(5)?;
    cluster.berth.run(&["snapshot", "create", "books", "--name", "origin"])?;
    Ok(guest.probe.tick()?.nonce)
}

fn macs(vm: &Value) -> Vec<String> {
    let nics = vm["spec"]["nics"].as_array().cloned().unwrap_or_default();
    nics.iter().filter_map(|nic| nic["mac"].as_str().map(str::to_owned)).collect()
}

/// The VM's directory in the shared pool.
fn directory(cluster: &Cluster, name: &str) -> Result<PathBuf> {
    let vm = cluster.vm(name)?;
    let id = vm["id"].as_str().context("a VM without an id")?;
    Ok(cluster.dir().join("pools/shared/vms").join(id))
}

/// The frozen files below a directory, by their number.
fn frozen(directory: &Path) -> Result<BTreeSet<u64>> {
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(frozen(&path)?);
        } else if path.metadata()?.mode() & 0o222 == 0 && !path.ends_with("seed.img") {
            found.insert(path.metadata()?.ino());
        }
    }
    Ok(found)
}

#[test]
fn ten_clones_answer_each_as_itself_and_none_sees_what_another_writes() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cluster = up(folder.path(), 2)?;
    let nonce = origin(&cluster, Pool::Shared)?;
    let began = Instant::now();
    let count = CLONES.to_string();
    cluster.berth.run(&["snapshot", "restore", "books", "origin", "--clone", "copy", "--count", &count])?;
    let running = began.elapsed();
    let names: Vec<String> = (1..=CLONES).map(|number| format!("copy-{number}")).collect();
    let guests: Result<Vec<Guest>> = names.iter().map(|name| answering(&cluster, name)).collect();
    let guests = guests?;
    eprintln!("{CLONES} clones run after {running:?} and answer after {:?}", began.elapsed());

    let mut seen_macs: BTreeSet<String> = macs(&cluster.vm("books")?).into_iter().collect();
    for (name, guest) in names.iter().zip(&guests) {
        let seen = guest.verify().context(name.clone())?;
        ensure!(
            seen.tick.nonce == nonce && seen.files == 5,
            "{name} is not the guest that was kept: {seen:?}"
        );
        let vm = cluster.vm(name)?;
        ensure!(macs(&vm).into_iter().all(|mac| seen_macs.insert(mac)), "{name} has another's address");
        ensure!(vm["status"]["trouble"].is_null(), "{name}: {:#}", vm["status"]);
        ensure!(!vm["status"]["baseline"].is_null(), "{name} has nothing to go back to");
    }
    guests[0].probe.write(3)?;
    ensure!(guests[0].verify()?.files == 8 && guests[1].verify()?.files == 5, "a clone wrote into another");
    ensure!(cluster.guest("books")?.verify()?.files == 5, "a clone wrote into its origin");

    // The clones don't need what they were made from, nor it them.
    cluster.berth.run(&["vm", "delete", "copy-1", "--force"])?;
    cluster.berth.run(&["snapshot", "delete", "books", "origin"])?;
    ensure!(cluster.guest("books")?.verify()?.files == 5, "the origin lost something with its clone");
    cluster.berth.run(&["vm", "delete", "books", "--force"])?;
    guests[1].probe.write(1)?;
    ensure!(guests[1].verify()?.files == 6, "a clone lost something with its origin");
    cluster.berth.run(&["snapshot", "restore", "copy-2", "baseline", "--no-undo"])?;
    let back = answering(&cluster, "copy-2")?.verify()?;
    ensure!(back.tick.nonce == nonce && back.files == 5, "the clone is not back at what it was made from");
    // A clone is a VM like any other.
    cluster.berth.run(&["vm", "migrate", "copy-3"])?;
    let moved = answering(&cluster, "copy-3")?.verify()?;
    ensure!(moved.tick.nonce == nonce && moved.files == 5, "the clone was not moved but started anew");
    cluster.berth.run(&["snapshot", "create", "copy-3", "--name", "own"])?;
    cluster.berth.run(&["snapshot", "restore", "copy-3", "own", "--clone", "grandchild"])?;
    ensure!(answering(&cluster, "grandchild")?.verify()?.files == 5, "a clone of a clone is not one");
    cluster.down()
}

#[test]
fn a_clone_in_another_segment_shares_no_file_and_one_from_the_disk_begins_anew() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cluster = up(folder.path(), 1)?;
    let nonce = origin(&cluster, Pool::Shared)?;
    cluster.berth.run(&["segment", "create", "lab"])?;
    let words = ["snapshot", "restore", "books", "origin", "--clone", "copy", "--segment", "lab"];
    let tried = cluster.berth.run(&[&words[..], &["--dry-run"]].concat())?;
    let summary = tried.to_string();
    ensure!(summary.contains("copying ") && summary.contains(" MiB in about "), "{summary}");
    cluster.berth.run(&words)?;
    let seen = answering(&cluster, "lab/copy")?.verify()?;
    ensure!(seen.tick.nonce == nonce && seen.files == 5, "not the guest that was kept");
    let (origins, copies) =
        (frozen(&directory(&cluster, "books")?)?, frozen(&directory(&cluster, "lab/copy")?)?);
    ensure!(copies.len() >= 4 && origins.is_disjoint(&copies), "{copies:?} of {origins:?}");

    cluster.berth.run(&["snapshot", "restore", "books", "origin", "--clone", "cold", "--cold"])?;
    let cold = answering(&cluster, "cold")?.verify()?;
    ensure!(cold.tick.nonce != nonce && cold.files == 5, "it did not begin anew on the snapshot's disk");
    ensure!(!frozen(&directory(&cluster, "cold")?)?.is_disjoint(&origins), "it shares no layer");

    cluster.berth.run(&["snapshot", "restore", "books", "origin", "--clone", "held", "--paused"])?;
    ensure!(cluster.vm("held")?["status"]["state"] == "paused", "{:#}", cluster.vm("held")?["status"]);
    cluster.berth.run(&["vm", "resume", "held"])?;
    ensure!(answering(&cluster, "held")?.verify()?.files == 5, "files were lost");
    cluster.down()
}

#[test]
fn a_clone_whose_agent_or_manager_is_killed_is_made_whole_or_not_at_all() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cluster = up(folder.path(), 1)?;
    let nonce = origin(&cluster, Pool::Shared)?;
    for (number, after_ms) in [0, 60, 200].into_iter().enumerate() {
        for victim in ["h1", "manager"] {
            let name = format!("copy-{victim}-{number}");
            let clone = ["snapshot", "restore", "books", "origin", "--clone", &name];
            let making = cluster.berth.start(&clone)?;
            // From when the operation is there: what comes before is not the clone's.
            let began = wait_until(LIMIT, "the clone to begin", || {
                Ok(cluster.berth.attempt(&["vm", "show", &name])?.is_ok())
            });
            std::thread::sleep(Duration::from_millis(after_ms));
            cluster.daemon(victim)?.kill()?;
            cluster.restart_dead()?;
            began?;
            let _ = making.wait_with_output()?;
            wait_until(LIMIT, &format!("{name} to be settled"), || {
                let Ok(vm) = cluster.berth.attempt(&["vm", "show", &name])? else { return Ok(false) };
                Ok(vm["status"]["operation"].is_null() && vm["status"]["state"] == "running")
            })
            .with_context(|| format!("{victim} killed after {after_ms} ms"))?;
            let seen = answering(&cluster, &name)?.verify()?;
            ensure!(seen.tick.nonce == nonce && seen.files == 5, "{name}: {seen:?}");
            ensure!(cluster.qemus_of(&name)?.len() == 1, "{name} has one process");
            cluster.berth.run(&["vm", "delete", &name, "--force"])?;
        }
    }
    let left = std::fs::read_dir(cluster.dir().join("pools/shared/vms"))?.count();
    ensure!(left == 1, "{left} VMs have files where one is left");
    ensure!(cluster.guest("books")?.verify()?.files == 5, "the origin was harmed");
    cluster.down()
}
