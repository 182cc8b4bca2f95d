//! A VM is put back to a snapshot on another host, through the command line.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use berth_e2e::Cluster;
use berth_e2e::process::wait_until;
use berth_e2e::testing::{Pool, answering, guest_in, has_files, up};

const LIMIT: Duration = Duration::from_secs(120);

fn is_on(cluster: &Cluster, host: &str, files: u64) -> Result<()> {
    ensure!(cluster.host_of("books")? == host, "it is not on {host}");
    has_files(cluster, "books", files)
}

fn story(pool: Pool) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cluster = up(folder.path(), 2)?;
    let guest = guest_in(&cluster, "books", pool)?;
    let first = cluster.host_of("books")?;
    let other = if first == "h1" { "h2" } else { "h1" };
    guest.probe.write(6)?;
    cluster.berth.run(&["snapshot", "create", "books", "--name", "working"])?;
    guest.probe.write(3)?;

    let nowhere = cluster.berth.refuses(&["snapshot", "restore", "books", "working", "--host", "h9"])?.text;
    ensure!(nowhere.contains("h9"), "{nowhere}");
    let dry = ["snapshot", "restore", "books", "working", "--host", other, "--dry-run"];
    let would = cluster.berth.run(&dry)?.to_string();
    ensure!(would.contains(&format!("on host {other}")), "{would}");

    cluster.berth.run(&["snapshot", "restore", "books", "working", "--host", other])?;
    is_on(&cluster, other, 6)?;
    // What it was there came along, and so it is taken back here.
    cluster.berth.run(&["snapshot", "undo", "books"])?;
    is_on(&cluster, other, 9)?;
    // A VM that is stopped goes back as well, and its host's own name is no move.
    cluster.berth.run(&["vm", "stop", "books"])?;
    cluster.berth.run(&["snapshot", "restore", "books", "working", "--host", &first])?;
    is_on(&cluster, &first, 6)?;
    cluster.berth.run(&["snapshot", "restore", "books", "baseline", "--host", &first])?;
    is_on(&cluster, &first, 0)?;
    cluster.berth.run(&["snapshot", "verify", "books", "working"])?;
    cluster.berth.run(&["vm", "migrate", "books"])?;
    is_on(&cluster, other, 0)?;
    cluster.down()
}

#[test]
fn a_vm_is_put_back_on_another_host_in_a_shared_pool() -> Result<()> {
    story(Pool::Shared)
}

#[test]
fn a_vm_is_put_back_on_another_host_with_local_pools() -> Result<()> {
    story(Pool::Local)
}

/// Whom to kill: a daemon's name, of hosts by what they are in the move.
#[derive(Debug, Clone, Copy)]
enum Victim {
    Manager,
    Source,
    Target,
}

/// Killed so many milliseconds after the restore was asked for: before it has begun, while the undo snapshot is taken, while
/// files are sent, while the machine is made ready, while it is given away, and when all is over.
const AFTER_MS: [u64; 8] = [0, 150, 400, 700, 1000, 1300, 1800, 2500];

fn is_settled(cluster: &Cluster) -> Result<bool> {
    let Ok(hosts) = cluster.berth.attempt(&["host", "list"])? else { return Ok(false) };
    if hosts.as_array().into_iter().flatten().any(|host| host["state"] != "online") {
        return Ok(false);
    }
    let Ok(vm) = cluster.berth.attempt(&["vm", "show", "books"])? else { return Ok(false) };
    let quiet = vm["status"]["operation"].is_null() && vm["status"]["state"] == "running";
    Ok(quiet && cluster.qemus_of("books")?.len() == 1)
}

/// Afterwards the VM runs once, on one of the two, as it was or put back.
fn kills(victim: Victim, pool: Pool) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cluster = up(folder.path(), 2)?;
    let guest = guest_in(&cluster, "books", pool)?;
    guest.probe.write(6)?;
    cluster.berth.run(&["snapshot", "create", "books", "--name", "working"])?;
    for after_ms in AFTER_MS {
        let what = format!("{victim:?} killed after {after_ms} ms, {pool:?} pool");
        answering(&cluster, "books")?.probe.write(3)?;
        let files = cluster.guest("books")?.verify()?.files;
        let source = cluster.host_of("books")?;
        let target = if source == "h1" { "h2" } else { "h1" };
        let asking = ["snapshot", "restore", "books", "working", "--host", target, "--no-wait"];
        cluster.berth.run(&asking).context(what.clone())?;
        std::thread::sleep(Duration::from_millis(after_ms));
        let name = match victim {
            Victim::Manager => "manager",
            Victim::Source => &source,
            Victim::Target => target,
        };
        cluster.daemon(name)?.kill()?;
        cluster.restart_dead()?;
        wait_until(LIMIT, "everything to settle", || is_settled(&cluster)).context(what.clone())?;
        let seen = answering(&cluster, "books")?.verify().context(what.clone())?;
        let moved = cluster.host_of("books")? != source;
        eprintln!("{what}: {}, {} files", if moved { "moved" } else { "stayed" }, seen.files);
        let expected = if moved { 6 } else { files };
        ensure!(seen.files == expected, "{what}: {} files, not {expected}", seen.files);
    }
    cluster.berth.run(&["snapshot", "verify", "books", "working"])?;
    cluster.down()
}

#[test]
fn a_killed_manager_leaves_it_in_one_place() -> Result<()> {
    kills(Victim::Manager, Pool::Local)
}

#[test]
fn a_killed_source_leaves_it_in_one_place() -> Result<()> {
    kills(Victim::Source, Pool::Local)?;
    kills(Victim::Source, Pool::Shared)
}

#[test]
fn a_killed_target_leaves_it_in_one_place() -> Result<()> {
    kills(Victim::Target, Pool::Local)?;
    kills(Victim::Target, Pool::Shared)
}
