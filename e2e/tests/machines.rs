//! A machine with UEFI and a TPM, through the command line: made, snapshotted, moved, put back and cloned like any other.

use anyhow::{Result, ensure};
use berth_e2e::Console;
use berth_e2e::testing::{Pool, has_files, up};

/// What the guest finds of its machine, typed so that the answer is not in the question.
const FOUND: &str = "echo found-$(ls -d /sys/firmware/efi /dev/tpm0 | wc -l)";
fn story(pool: Pool) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cluster = up(folder.path(), 2)?;
    let words =
        ["--memory", "256MiB", "--disk", "256MiB", "--pool", pool.name(), "--firmware", "uefi", "--tpm"];
    let guest = cluster.create_guest("books", "probe", &words)?;
    let spec = &cluster.vm("books")?["spec"];
    ensure!(spec["firmware"] == "uefi" && spec["tpm"] == true, "{spec}");
    Console::attach(&cluster.berth, "books")?.type_until(FOUND, "found-2")?;
    guest.probe.write(5)?;
    cluster.berth.run(&["snapshot", "create", "books", "--name", "working"])?;
    let first_host = cluster.host_of("books")?;
    cluster.berth.run(&["vm", "migrate", "books"])?;
    ensure!(cluster.host_of("books")? != first_host, "the VM did not move");
    has_files(&cluster, "books", 5)?;
    cluster.guest("books")?.probe.write(3)?;
    cluster.berth.run(&["snapshot", "restore", "books", "working"])?;
    has_files(&cluster, "books", 5)?;
    cluster.berth.run(&["snapshot", "restore", "books", "working", "--clone", "other"])?;
    let spec = &cluster.vm("other")?["spec"];
    ensure!(spec["firmware"] == "uefi" && spec["tpm"] == true, "{spec}");
    for name in ["books", "other"] {
        cluster.berth.run(&["vm", "stop", name])?;
        cluster.berth.run(&["vm", "start", name])?;
        has_files(&cluster, name, 5)?;
        Console::attach(&cluster.berth, name)?.type_until(FOUND, "found-2")?;
    }
    cluster.down()
}

#[test]
fn a_machine_with_uefi_and_a_tpm_in_a_shared_pool() -> Result<()> {
    story(Pool::Shared)
}

#[test]
fn a_machine_with_uefi_and_a_tpm_in_local_pools() -> Result<()> {
    story(Pool::Local)
}
