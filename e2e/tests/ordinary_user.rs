//! The short story as told by an ordinary user: no root anywhere, QEMU as the same user as its agent, user-mode networking.
//!
//! Run by root, the test makes itself such a user for each `berth` command; run by an ordinary user, it is one.

use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use berth_e2e::process::with_words;
use berth_e2e::testing::{Pool, guest_in};
use berth_e2e::{Berth, Cluster, Console, UpOptions};
use guest_probe::image::GuestImage;

/// A user that nobody is.
const STRANGER: u32 = 47_123;

/// What the user needs, where the user can read it: a checkout may lie where only root can look.
struct Shelf {
    berth: Berth,
    kernel: PathBuf,
    initrd: PathBuf,
    append: String,
}

fn shelf(folder: &Path) -> Result<Shelf> {
    let berth = Berth::beside_this_program()?;
    let guest = GuestImage::locate()?;
    // Whoever made the folder has its user's number.
    if std::fs::metadata(folder)?.uid() != 0 {
        return Ok(Shelf { berth, kernel: guest.kernel, initrd: guest.initrd, append: guest.cmdline });
    }
    let brought = |from: &Path, name: &str| {
        let to = folder.join(name);
        std::fs::copy(from, &to).with_context(|| format!("copying {}", from.display()))?;
        chown(&to, Some(STRANGER), Some(STRANGER))?;
        anyhow::Ok(to)
    };
    let binary = brought(berth.binary(), "berth")?;
    let (kernel, initrd) = (brought(&guest.kernel, "kernel")?, brought(&guest.initrd, "initrd")?);
    chown(folder, Some(STRANGER), Some(STRANGER))?;
    Ok(Shelf { berth: Berth::new(&binary).run_by(STRANGER, folder), kernel, initrd, append: guest.cmdline })
}

fn import(cluster: &Cluster, shelf: &Shelf) -> Result<()> {
    let (kernel, initrd) = (shelf.kernel.to_str().context("path")?, shelf.initrd.to_str().context("path")?);
    let words = ["image", "import", "--name", "probe", "--kernel", kernel, "--initrd", initrd, "--append"];
    cluster.berth.run(&[&words[..], &[&shelf.append]].concat()).map(drop)
}

fn story(pool: Pool) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let shelf = shelf(folder.path())?;
    let options = UpOptions { dir: folder.path().join("cluster"), hosts: 2, link_mbit: None, keep: false };
    let cluster = Cluster::up(&shelf.berth, &options)?;
    import(&cluster, &shelf)?;
    let guest = guest_in(&cluster, "books", pool)?;
    ensure!(guest.forwarded, "an ordinary user's guest is reached through a forwarded port");
    let nonce = guest.probe.tick()?.nonce;
    guest.probe.write(20)?;

    let mut console = Console::attach(&cluster.berth, "books")?;
    console.ask("before")?;
    cluster.berth.run(&["snapshot", "create", "books", "--name", "working"])?;
    let first_host = cluster.host_of("books")?;
    cluster.berth.run(&["vm", "migrate", "books"])?;
    ensure!(cluster.host_of("books")? != first_host, "the VM did not move");
    console.ask("moved")?;

    let moved = cluster.guest("books")?;
    ensure!(moved.verify()?.files == 20, "files were lost");
    moved.probe.break_data()?;
    moved.probe.break_panic()?;
    cluster.berth.run(&["snapshot", "restore", "books", "working"])?;
    let restored = cluster.guest("books")?.verify()?;
    ensure!(restored.tick.nonce == nonce && restored.files == 20, "not the guest that was kept");
    console.ask("restored")?;
    frozen_again(folder.path())?;

    cluster.berth.run(&["snapshot", "restore", "books", "baseline"])?;
    ensure!(cluster.guest("books")?.verify()?.files == 0, "not the baseline");
    let dir = cluster.dir().to_owned();
    cluster.down()?;
    ensure!(!dir.exists(), "{} is left", dir.display());
    let left = with_words(&[dir.to_str().context("path")?]);
    ensure!(left.is_empty(), "processes are left: {left:?}");
    Ok(())
}

/// No memory image can be written to: the right to it was lent for a moment only.
fn frozen_again(folder: &Path) -> Result<()> {
    let mut open = vec![folder.join("cluster")];
    let mut images = 0;
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(&directory)?.flatten() {
            let kind = entry.file_type()?;
            if kind.is_dir() {
                open.push(entry.path());
            } else if entry.file_name() == "memory.raw" {
                let mode = entry.metadata()?.mode();
                ensure!(mode & 0o222 == 0, "{} has mode {mode:o}", entry.path().display());
                images += 1;
            }
        }
    }
    ensure!(images >= 2, "{images} memory images, of at least two snapshots");
    Ok(())
}

#[test]
fn an_ordinary_user_goes_the_whole_way_in_a_shared_pool() -> Result<()> {
    story(Pool::Shared)
}

#[test]
fn an_ordinary_user_goes_the_whole_way_in_local_pools() -> Result<()> {
    story(Pool::Local)
}

#[test]
fn clusters_that_are_brought_up_at_the_same_moment_do_not_take_each_others_ports() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let shelf = shelf(folder.path())?;
    let up = |number: u32| {
        let dir = folder.path().join(format!("cluster-{number}"));
        let cluster = Cluster::up(&shelf.berth, &UpOptions { dir, hosts: 1, link_mbit: None, keep: false })?;
        cluster.berth.run(&["host", "list"])?;
        cluster.down()
    };
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..4).map(|number| scope.spawn(move || up(number))).collect();
        all.into_iter().try_for_each(|one| one.join().expect("no panic"))
    })
}
