//! The demo's story as a test: made, worked, snapshotted, moved, broken, restored; every page and file right.

use std::fs::{OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use berth_e2e::testing::{Pool, guest_in, up};
use berth_e2e::{Cluster, Console};
use guest_probe::memory::{Rewrite, Settings};

const WORK: Settings = Settings { memory_mib: 64, rate_mib_s: 5, hot_mib: 0, rewrite: Rewrite::Whole };

/// What the guest wrote since its baseline is found from outside, and nothing stays of the looking.
fn differs_from_the_baseline(cluster: &Cluster) -> Result<()> {
    let diff = cluster.berth.run(&["snapshot", "diff", "books", "baseline", "now", "--limit", "5"])?;
    let found = &diff["file_systems"][0];
    ensure!(found["added"].as_u64().is_some_and(|added| added >= 20), "20 files are new: {diff}");
    ensure!(found["changes"].as_array().is_some_and(|listed| listed.len() == 5), "five are listed: {diff}");
    ensure!(diff["memory"]["changed_pages"].as_u64().is_some_and(|pages| pages > 0), "memory: {diff}");
    ensure!(
        diff["unread"] == serde_json::json!([]) && diff["configuration"] == serde_json::json!([]),
        "{diff}"
    );
    let left = cluster.berth.run(&["snapshot", "list", "books"])?;
    ensure!(left.as_array().is_some_and(|left| left.len() == 1), "only the baseline is left: {left}");
    Ok(())
}

fn story(pool: Pool) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cluster = up(folder.path(), 2)?;
    let guest = guest_in(&cluster, "books", pool)?;
    let baseline = guest.probe.tick()?;
    guest.probe.set(WORK, Duration::from_secs(60))?;
    guest.probe.write(20)?;
    guest.verify()?;
    differs_from_the_baseline(&cluster)?;

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

/// The file of the newest layer that only this snapshot has.
fn newest_layer_of(cluster: &Cluster, snapshot: &str) -> Result<PathBuf> {
    let list = cluster.berth.run(&["snapshot", "list", "books"])?;
    let items = list.as_array().or_else(|| list["items"].as_array()).context("a list")?;
    let found = items.iter().find(|item| item["name"] == snapshot).context("the snapshot")?;
    let layer = found["facts"]["layers"].as_array().and_then(|layers| layers.last()?.as_str());
    let vm = found["vm"].as_str().context("its VM")?;
    let file = format!("pools/shared/vms/{vm}/layers/{}.qcow2", layer.context("its layers")?);
    Ok(cluster.dir().join(file))
}

#[test]
fn a_restore_that_fails_leaves_the_vm_running_as_it_was() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cluster = up(folder.path(), 1)?;
    let guest = guest_in(&cluster, "books", Pool::Shared)?;
    let nonce = guest.probe.tick()?.nonce;
    guest.probe.write(5)?;
    cluster.berth.run(&["snapshot", "create", "books", "--name", "harmed"])?;
    let harmed = newest_layer_of(&cluster, "harmed")?;
    cluster.berth.run(&["snapshot", "restore", "books", "baseline"])?;
    let guest = cluster.guest("books")?;
    guest.probe.write(7)?;
    let disk_before = cluster.vm("books")?["status"]["at_snapshot"].clone();

    // Only QEMU finds this, when the process that was there has been killed already.
    let frozen = std::fs::metadata(&harmed)?.permissions();
    std::fs::set_permissions(&harmed, Permissions::from_mode(0o600))?;
    OpenOptions::new().write(true).open(&harmed)?.write_all(&[0; 4096])?;
    std::fs::set_permissions(&harmed, frozen)?;
    let refusal = cluster.berth.refuses(&["snapshot", "restore", "books", "harmed"])?;
    ensure!(refusal.code() == "hypervisor", "{}", refusal.text);

    ensure!(cluster.vm("books")?["status"]["state"] == "running", "{:#}", cluster.vm("books")?);
    let seen = cluster.guest("books")?.verify()?;
    ensure!(seen.tick.nonce == nonce && seen.files == 7, "not the guest that was there: {seen:?}");
    ensure!(cluster.vm("books")?["status"]["at_snapshot"] == disk_before, "it says that it is elsewhere");
    ensure!(cluster.qemus_of("books")?.len() == 1, "a VM has one process");
    // And it is well: it can be taken, put back and moved on.
    cluster.berth.run(&["snapshot", "create", "books", "--name", "after"])?;
    cluster.berth.run(&["snapshot", "restore", "books", "after"])?;
    ensure!(cluster.guest("books")?.verify()?.files == 7, "files were lost");
    cluster.down()
}

#[test]
fn the_story_holds_in_a_shared_pool() -> Result<()> {
    story(Pool::Shared).context("shared pool")
}

#[test]
fn the_story_holds_in_local_pools() -> Result<()> {
    story(Pool::Local).context("local pools")
}
