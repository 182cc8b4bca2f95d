//! A VM is put back to a snapshot on another host, through the command line.

use std::time::Duration;

use anyhow::{Result, ensure};
use berth_e2e::testing::{Pool, guest_in, up};
use berth_e2e::{Cluster, process};

const LIMIT: Duration = Duration::from_secs(120);

fn is_on(cluster: &Cluster, host: &str, files: u64) -> Result<()> {
    ensure!(cluster.host_of("books")? == host, "it is not on {host}");
    process::wait_until(LIMIT, "the guest to answer", || {
        Ok(cluster.guest("books")?.probe.tick_within(Duration::from_millis(500)).is_ok())
    })?;
    let seen = cluster.guest("books")?.verify()?;
    ensure!(seen.files == files, "{} files, not {files}", seen.files);
    Ok(())
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
