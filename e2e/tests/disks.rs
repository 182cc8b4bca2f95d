//! A VM with data disks, through the command line: made, snapshotted, compared, put back, moved, cloned and started again,
//! always with all of its disks.

use anyhow::{Context, Result, ensure};
use berth_e2e::Cluster;
use berth_e2e::testing::{Pool, has_files, up};

/// The files of the guest are on its disks in turn.
fn is_on_all_disks(cluster: &Cluster, files: usize) -> Result<()> {
    let diff = cluster.berth.run(&["snapshot", "diff", "books", "baseline", "now"])?;
    let volumes = diff["file_systems"].as_array().context("file systems")?;
    let added = |name: &str| {
        let changes = volumes.iter().filter(|found| found["volume"] == name);
        let changes = changes.flat_map(|found| found["changes"].as_array().into_iter().flatten());
        let is_file = |path: &str| path.starts_with("/probe/file-");
        changes.filter(|change| change["path"].as_str().is_some_and(is_file)).count()
    };
    for name in ["disk", "data1", "data2"] {
        ensure!(added(name) == files / 3, "{name} has {} new files: {diff}", added(name));
    }
    Ok(())
}

fn story(pool: Pool) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cluster = up(folder.path(), 2)?;
    let words = [
        "--memory",
        "256MiB",
        "--disk",
        "256MiB",
        "--pool",
        pool.name(),
        "--data-disk",
        "128MiB",
        "--data-disk",
        "64MiB",
    ];
    let guest = cluster.create_guest("books", "probe", &words)?;
    ensure!(cluster.vm("books")?["spec"]["data_disks_mib"] == serde_json::json!([128, 64]), "sizes");
    guest.probe.write(9)?;
    is_on_all_disks(&cluster, 9)?;
    cluster.berth.run(&["snapshot", "create", "books", "--name", "working"])?;
    guest.probe.write(3)?;
    cluster.berth.run(&["snapshot", "restore", "books", "working"])?;
    has_files(&cluster, "books", 9)?;
    let first_host = cluster.host_of("books")?;
    cluster.guest("books")?.probe.write(6)?;
    cluster.berth.run(&["vm", "migrate", "books"])?;
    ensure!(cluster.host_of("books")? != first_host, "the VM did not move");
    has_files(&cluster, "books", 15)?;
    cluster.berth.run(&["snapshot", "verify", "books", "working", "--boot"])?;
    cluster.berth.run(&["snapshot", "restore", "books", "working", "--clone", "other"])?;
    has_files(&cluster, "other", 9)?;
    cluster.berth.run(&["snapshot", "undo", "books"])?;
    for (name, files) in [("books", 12), ("other", 9)] {
        cluster.berth.run(&["vm", "stop", name])?;
        cluster.berth.run(&["vm", "start", name])?;
        has_files(&cluster, name, files)?;
    }
    cluster.berth.run(&["snapshot", "delete", "books", "working"])?;
    has_files(&cluster, "books", 12)?;
    cluster.down()
}

#[test]
fn a_vm_with_data_disks_in_a_shared_pool() -> Result<()> {
    story(Pool::Shared)
}

#[test]
fn a_vm_with_data_disks_in_local_pools() -> Result<()> {
    story(Pool::Local)
}
