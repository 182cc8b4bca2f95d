//! The demo's story as a test: made, worked, snapshotted, moved, broken, restored; every page and file right.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use berth_e2e::Console;
use berth_e2e::testing::{Pool, guest_in, up};
use guest_probe::memory::{Rewrite, Settings};

const WORK: Settings = Settings { memory_mib: 64, rate_mib_s: 5, hot_mib: 0, rewrite: Rewrite::Whole };

fn story(pool: Pool) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cluster = up(folder.path(), 2)?;
    let guest = guest_in(&cluster, "books", pool)?;
    let baseline = guest.probe.tick()?;
    guest.probe.set(WORK, Duration::from_secs(60))?;
    guest.probe.write(20)?;
    guest.verify()?;

    let mut console = Console::attach(&cluster.berth, "books")?;
    console.ask("before")?;
    cluster.berth.run(&["snapshot", "create", "books", "--name", "working"])?;
    let first_host = cluster.host_of("books")?;
    cluster.berth.run(&["vm", "migrate", "books"])?;
    ensure!(cluster.host_of("books")? != first_host, "the VM did not move");
    ensure!(cluster.qemus_of("books")?.len() == 1, "a VM has one process");
    let moved = cluster.guest("books")?;
    ensure!(moved.probe.tick()?.nonce == baseline.nonce, "the guest was not moved but started anew");
    ensure!(moved.verify()?.files == 20, "files were lost");

    console.ask("moved")?;

    moved.probe.break_data()?;
    moved.probe.break_panic()?;
    cluster.berth.run(&["snapshot", "restore", "books", "working"])?;
    let restored = cluster.guest("books")?;
    let seen = restored.verify()?;
    ensure!(seen.tick.nonce == baseline.nonce && seen.files == 20, "not the guest that was kept");

    cluster.berth.run(&["snapshot", "restore", "books", "baseline"])?;
    let back = cluster.guest("books")?;
    let seen = back.verify()?;
    ensure!(seen.tick.nonce == baseline.nonce && seen.files == 0, "not the baseline");

    cluster.berth.run(&["vm", "migrate", "books"])?;
    cluster.guest("books")?.verify()?;
    console.ask("moved-back")?;
    cluster.berth.run(&["vm", "delete", "books", "--force"])?;
    let gone = cluster.berth.refuses(&["vm", "show", "books"])?;
    ensure!(gone.exit_code == 4, "a deleted VM is still there");
    let dir = cluster.dir().to_owned();
    cluster.down()?;
    ensure!(!dir.exists(), "{} is left", dir.display());
    Ok(())
}

#[test]
fn the_story_holds_in_a_shared_pool() -> Result<()> {
    story(Pool::Shared).context("shared pool")
}

#[test]
fn the_story_holds_in_local_pools() -> Result<()> {
    story(Pool::Local).context("local pools")
}
