//! Snapshots that are not what they were: found by reading them, refused by whoever would use them, and no schedule's
//! newest.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use berth_e2e::Cluster;
use berth_e2e::process::wait_until;
use berth_e2e::testing::{Pool, guest_in, up};
use serde_json::Value;

use super::{refused, wanted};

/// How long a clone may take to get ready on a busy machine.
const LIMIT: Duration = Duration::from_secs(90);

/// The files of a snapshot.
fn directory(cluster: &Cluster, vm: &str, snapshot: &Value) -> Result<PathBuf> {
    let of = |value: &Value| value["id"].as_str().map(str::to_owned).context("without an id");
    let home = cluster.dir().join("pools/shared/vms").join(of(&cluster.vm(vm)?)?);
    Ok(home.join("snapshots").join(of(snapshot)?))
}

fn flip(path: &Path, at: u64) -> Result<()> {
    // Whoever is root may write to what is read-only; who is not owns it.
    let mode = path.metadata()?.permissions();
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    file.write_all_at(&[byte[0] ^ 1], at)?;
    std::fs::set_permissions(path, mode)?;
    Ok(())
}

fn show(cluster: &Cluster, snapshot: &str) -> Result<Value> {
    cluster.berth.run(&["snapshot", "show", "books", snapshot])
}

fn names(cluster: &Cluster) -> Result<Vec<String>> {
    let list = cluster.berth.run(&["snapshot", "list", "books"])?;
    let all = list.as_array().context("no list")?.iter();
    Ok(all.filter_map(|one| one["name"].as_str().map(str::to_owned)).collect())
}

#[test]
fn a_flipped_byte_is_named_and_nobody_goes_back_to_it() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cluster = up(folder.path(), 1)?;
    let guest = guest_in(&cluster, "books", Pool::Shared)?;
    guest.probe.write(5)?;
    cluster.berth.run(&["snapshot", "create", "books", "--name", "origin"])?;
    ensure!(show(&cluster, "origin")?["verified"].is_null(), "nobody has looked yet");
    cluster.berth.run(&["snapshot", "verify", "books", "origin"])?;
    let good = show(&cluster, "origin")?;
    ensure!(good["verified"]["verdict"] == "good" && good["verified"]["by"] == "hash", "{good}");

    // It starts, and nothing of the trial remains.
    cluster.berth.run(&["snapshot", "verify", "books", "origin", "--boot"])?;
    let good = show(&cluster, "origin")?;
    ensure!(good["verified"]["verdict"] == "good" && good["verified"]["by"] == "boot", "{good}");
    let vms = cluster.berth.run(&["vm", "list"])?;
    ensure!(vms.as_array().is_some_and(|vms| vms.len() == 1), "the trial is still there: {vms}");

    let device = directory(&cluster, "books", &good)?.join("device.bin");
    flip(&device, 4242)?;
    let found = cluster.berth.refuses(&["snapshot", "verify", "books", "origin"])?;
    ensure!(found.exit_code == 1 && found.text.contains("device.bin"), "{found:?}");
    let bad = show(&cluster, "origin")?;
    ensure!(bad["verified"]["verdict"] == "bad", "{bad}");
    let trouble = cluster.vm("books")?["status"]["trouble"].to_string();
    ensure!(trouble.contains("snapshot origin") && trouble.contains("device.bin"), "{trouble}");
    let whole = wanted("bad-image", 1, "snapshot", "origin", "a snapshot that is whole");
    refused(&cluster, &["snapshot", "restore", "books", "origin"], whole)?;
    refused(&cluster, &["snapshot", "restore", "books", "origin", "--clone", "copy"], whole)?;
    let seen = cluster.berth.run(&["audit", "list", "--action", "snapshot.verify"])?.to_string();
    ensure!(seen.contains("verification"), "the audit has nothing of it: {seen}");
    // All are looked at, and one of them is bad.
    let all = cluster.berth.refuses(&["snapshot", "verify", "--all"])?;
    ensure!(all.exit_code == 1 && all.text.contains("snapshot origin of default/books is bad"), "{all:?}");
    ensure!(show(&cluster, "baseline")?["verified"]["verdict"] == "good", "the baseline is as it was");

    flip(&device, 4242)?;
    cluster.berth.run(&["snapshot", "verify", "books", "origin"])?;
    ensure!(cluster.vm("books")?["status"]["trouble"].is_null(), "it is well again");
    cluster.berth.run(&["snapshot", "restore", "books", "origin"])?;
    ensure!(cluster.guest("books")?.verify()?.files == 5, "not what was kept");
    cluster.down()
}

#[test]
fn a_schedule_keeps_the_newest_good_one() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cluster = up(folder.path(), 1)?;
    guest_in(&cluster, "books", Pool::Shared)?;
    let words = ["schedule", "create", "steady", "--vm", "books", "--cron", "0 0 1 1 *", "--keep", "last=2"];
    cluster.berth.run(&words)?;
    let run = |count: usize| -> Result<Vec<String>> {
        let before = names(&cluster)?;
        cluster.berth.run(&["schedule", "run", "steady"])?;
        wait_until(LIMIT, &format!("run {count} to be over"), || {
            let now = names(&cluster)?;
            Ok(now.iter().any(|name| !before.contains(name)) && !is_running(&cluster)?)
        })?;
        Ok(names(&cluster)?.into_iter().filter(|name| name != "baseline").collect())
    };
    let first = run(1)?;
    let second = run(2)?;
    ensure!(first.len() == 1 && second.len() == 2, "{first:?} {second:?}");
    let newest = second.iter().find(|name| !first.contains(name)).context("a new one")?;
    flip(&directory(&cluster, "books", &show(&cluster, newest)?)?.join("device.bin"), 4242)?;
    cluster.berth.refuses(&["snapshot", "verify", "books", newest])?;
    run(3)?;
    // What is kept no longer goes when the run is over.
    wait_until(LIMIT, "the bad one to go, and no other", || {
        let third = names(&cluster)?;
        ensure!(third.contains(&first[0]), "the good one went: {second:?} {third:?}");
        Ok(!third.contains(newest) && third.len() == 3)
    })?;
    cluster.down()
}

fn is_running(cluster: &Cluster) -> Result<bool> {
    let shown = cluster.berth.run(&["schedule", "show", "steady"])?;
    let run = &shown["status"]["run"];
    Ok(!run.is_null() && run["finished_at"].is_null())
}
