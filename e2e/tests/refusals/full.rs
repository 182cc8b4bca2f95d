//! Disks that are full in the middle of a snapshot, an import, a migration. Needs root, for small file systems.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use berth_e2e::Cluster;
use berth_e2e::process::wait_until;
use berth_e2e::testing::up;

use super::hosts::{edit, restart};
use super::running::Worker;
use super::{Stand, refused, refused_once, wanted};

const MIB: usize = 1 << 20;

fn is_root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout == b"0\n")
}

fn run(program: &str, words: &[&str]) -> Result<()> {
    let output = Command::new(program).args(words).output().with_context(|| program.to_owned())?;
    ensure!(output.status.success(), "{program} {words:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// A small file system that goes with its value.
struct Small(PathBuf);

impl Small {
    fn mount(path: PathBuf, size_mib: u32) -> Result<Self> {
        std::fs::create_dir_all(&path)?;
        let options = format!("size={size_mib}m,mode=711");
        run("mount", &["-t", "tmpfs", "-o", &options, "berth-test", path.to_str().context("path")?])?;
        Ok(Self(path))
    }

    /// Writes until all but so many MiB are taken.
    fn fill_but(&self, left_mib: usize) -> Result<()> {
        let mut filler = File::create(self.filler())?;
        while filler.write_all(&[0; MIB]).is_ok() {}
        filler.set_len(filler.metadata()?.len().saturating_sub((left_mib * MIB) as u64))?;
        Ok(())
    }

    fn filler(&self) -> PathBuf {
        self.0.join("filler")
    }

    fn make_room(&self) -> Result<()> {
        Ok(std::fs::remove_file(self.filler())?)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Gives a host a pool `small` at this place.
fn add_pool(cluster: &Cluster, host: &str, path: &Path) -> Result<()> {
    let table = format!("[[pools]]\nname = \"small\"\npath = \"{}\"\n\n[network]", path.display());
    edit(cluster, host, |text| text.replace("[network]", &table))?;
    restart(cluster, host, None)
}

#[test]
fn a_disk_full_in_the_middle_leaves_everything_as_it_was() -> Result<()> {
    if !is_root() {
        eprintln!("skipped: only root can mount the small file systems that this test fills");
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let cluster = up(folder.path(), 2)?;
    let roomy = Small::mount(folder.path().join("small/h1"), 420)?;
    let tight = Small::mount(folder.path().join("small/h2"), 100)?;
    add_pool(&cluster, "h1", &roomy.0)?;
    add_pool(&cluster, "h2", &tight.0)?;
    import(&cluster, folder.path(), &roomy)?;

    let words = ["--memory", "192MiB", "--disk", "256MiB", "--pool", "small", "--host", "h1"];
    let worker = Worker::begin(cluster.create_guest("books", "probe", &words)?)?;
    snapshot(&cluster, &roomy).context("a snapshot")?;
    worker.is_well(&cluster, "books")?;
    migration(&cluster).context("a migration")?;
    worker.is_well(&cluster, "books")?;
    // Files that are still open keep a file system; the cluster goes first.
    cluster.berth.run(&["vm", "delete", "books", "--force"])?;
    drop((roomy, tight));
    cluster.down()
}

/// One that fits when it begins, and does not any more when it is half there.
fn import(cluster: &Cluster, folder: &Path, pool: &Small) -> Result<()> {
    let path = folder.join("large.raw");
    File::create(&path)?.set_len(200 * MIB as u64)?;
    let path = path.to_str().context("path")?;
    let before = Stand::of(cluster)?;
    let words = ["image", "import", path, "--format", "raw", "--name", "large", "--pool", "small"];
    let wanted = wanted("no-space", 1, "pool", "small", "room left in it on host h1");
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let filling = scope.spawn(|| {
            wait_until(Duration::from_secs(60), "the image to be on its way", || {
                Ok(is_arriving(&pool.0.join("images")) || over.load(Ordering::Relaxed))
            })?;
            pool.fill_but(0)
        });
        let refusal = refused_once(cluster, &words, wanted);
        over.store(true, Ordering::Relaxed);
        filling.join().expect("the filler does not panic")?;
        refusal
    })?;
    pool.make_room()?;
    before.unchanged(|| Stand::of(cluster)).context("an import")?;
    // With room it goes; without, from the beginning, it is refused with what is needed.
    cluster.berth.run(&words)?;
    cluster.berth.run(&["image", "delete", "large"])?;
    Ok(())
}

/// Whether something larger than nothing is there that has not its name yet.
fn is_arriving(images: &Path) -> bool {
    let entries = |path: &Path| std::fs::read_dir(path).into_iter().flatten().flatten();
    entries(images).flat_map(|image| std::fs::read_dir(image.path()).into_iter().flatten().flatten()).any(
        |part| {
            part.file_name().to_string_lossy().starts_with(".part-")
                && part.metadata().is_ok_and(|metadata| metadata.len() > 0)
        },
    )
}

/// The guest writes meanwhile: what is left to it must be enough, or it is held for a snapshot that is not even taken.
fn snapshot(cluster: &Cluster, pool: &Small) -> Result<()> {
    // What has changed since the baseline is stored, and no more: some megabytes beyond what is left free for guests.
    pool.fill_but(36)?;
    let before = Stand::of(cluster)?;
    let words = ["snapshot", "create", "books", "--name", "kept"];
    let probe = cluster.guest("books")?.probe;
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                probe.write(1).context("the guest's disk")?;
            }
            anyhow::Ok(())
        });
        let wanted = wanted("no-space", 1, "pool", "small", "room left in it on host h1");
        let refusal = refused(cluster, &words, wanted);
        over.store(true, Ordering::Relaxed);
        writing.join().expect("the writer does not panic")?;
        refusal
    })?;
    before.unchanged(|| Stand::of(cluster))?;
    ensure!(cluster.vm("books")?["status"]["state"] == "running", "the guest was stopped");
    pool.make_room()?;
    cluster.berth.run(&words).context("with room again")?;
    cluster.berth.run(&["snapshot", "delete", "books", "kept"]).map(drop)
}

fn migration(cluster: &Cluster) -> Result<()> {
    let before = Stand::of(cluster)?.but_image_files();
    let words = ["vm", "migrate", "books", "--to", "h2"];
    refused(cluster, &words, wanted("no-space", 1, "pool", "small", "room left in it on host h2"))?;
    before.unchanged(|| Ok(Stand::of(cluster)?.but_image_files()))?;
    ensure!(cluster.host_of("books")? == "h1", "it must be where it was");
    Ok(())
}
