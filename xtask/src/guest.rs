//! Makes the test guest: a kernel and an initial ramdisk that is the guest's whole system.
//!
//! The kernel, busybox and the QEMU guest agent come from the distribution's packages, which are downloaded and
//! unpacked but never installed; the probe is ours, linked statically. The result is kept with a hash of
//! everything of ours that went into it, so that asking again costs milliseconds and a change makes it anew.
//! Nothing here needs root.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use anyhow::{Context, Result, bail, ensure};
use guest_probe::image::{GuestImage, MANIFEST, default_directory, workspace};
use serde_json::json;
use sha2::{Digest, Sha256};

mod cpio;
mod elf;
mod modules;
pub mod packages;
mod system;

/// How the guest's kernel is started: a console, no tests of its own ciphers and no measures against attacks
/// from its own programs, since both cost boot time under emulation; the time-stamp counter is trusted, as
/// otherwise a busy host makes the guest fall back to a slow clock. A panicked kernel stays as it is, dead, so
/// that a broken guest is really broken.
const CMDLINE: &str =
    "console=ttyS0 quiet panic=0 tsc=reliable no_timer_check mitigations=off cryptomgr.notests";

/// Everything of ours that shapes the image but is not read from the disk when it is made.
const OWN_SOURCES: [&str; 10] = [
    include_str!("guest.rs"),
    include_str!("guest/cpio.rs"),
    include_str!("guest/elf.rs"),
    include_str!("guest/modules.rs"),
    include_str!("guest/packages.rs"),
    include_str!("guest/system.rs"),
    system::INIT,
    system::SHUTDOWN,
    system::UDHCPC,
    CMDLINE,
];

const KERNEL: &str = "vmlinuz";
const INITRD: &str = "initrd.img";
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Arguments of `cargo xtask guest`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Put the image there too; it is always kept in $BERTH_CACHE, by default target/guest.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Make it anew even when nothing has changed.
    #[arg(long)]
    force: bool,
}

/// Makes the image where that is needed and says where it is.
pub fn run(arguments: &Arguments) -> Result<()> {
    let cache = default_directory();
    fs::create_dir_all(&cache).with_context(|| format!("{} can't be made", cache.display()))?;
    let _lock = lock(&cache)?;
    let inputs = inputs()?;
    if arguments.force || !is_current(&cache, &inputs) {
        make(&cache, &inputs)?;
    }
    let directory = match &arguments.dir {
        Some(directory) => {
            copy(&cache, directory)?;
            directory
        }
        None => &cache,
    };
    let image = GuestImage::in_directory(directory)?;
    println!("{}", image.kernel.display());
    println!("{}", image.initrd.display());
    Ok(())
}

/// Two builders of one image would unpack over each other.
fn lock(cache: &Path) -> Result<File> {
    let path = cache.join("lock");
    let file = File::create(&path).with_context(|| format!("{} can't be made", path.display()))?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)?;
    Ok(file)
}

/// Hash of everything that, when it changes, makes another image.
fn inputs() -> Result<String> {
    let mut hash = Sha256::new();
    for source in OWN_SOURCES {
        hash.update(source.len().to_le_bytes());
        hash.update(source);
    }
    let probe = workspace().join("crates/guest-probe");
    let mut files = vec![probe.join("Cargo.toml")];
    for entry in fs::read_dir(probe.join("src")).context("the probe's sources can't be listed")? {
        files.push(entry?.path());
    }
    files.sort();
    for file in files {
        let bytes = fs::read(&file).with_context(|| format!("{} can't be read", file.display()))?;
        hash.update(bytes.len().to_le_bytes());
        hash.update(bytes);
    }
    hash.update(fs::read("/etc/os-release").unwrap_or_default());
    Ok(hex(&hash.finalize()))
}

fn is_current(cache: &Path, inputs: &str) -> bool {
    let Ok(text) = fs::read(cache.join(MANIFEST)) else { return false };
    let manifest: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
    let whole = |part: &str, file: &str| {
        let bytes = fs::metadata(cache.join(file)).map(|file| file.len()).ok();
        bytes.is_some() && manifest[part]["bytes"].as_u64() == bytes
    };
    manifest["inputs"] == inputs && whole("kernel", KERNEL) && whole("initrd", INITRD)
}

fn make(cache: &Path, inputs: &str) -> Result<()> {
    ensure!(
        cfg!(all(target_arch = "x86_64", target_os = "linux")),
        "the test guest is made on x86-64 Linux only"
    );
    eprintln!("making the test guest in {}", cache.display());
    let probe = start_probe_build(cache)?;
    let unpacked = packages::fetch(cache)?;
    let probe = finish_probe_build(probe, cache)?;
    let initrd = system::assemble(&unpacked, &probe)?;
    let (release, kernel) = unpacked.kernel()?;
    let kernel = fs::read(&kernel).with_context(|| format!("{} can't be read", kernel.display()))?;
    // The manifest comes last: until then the old one names other inputs, so the image would be made again.
    publish(cache, KERNEL, &kernel)?;
    publish(cache, INITRD, &initrd)?;
    let manifest = json!({
        "inputs": inputs,
        "architecture": "x86_64",
        "cmdline": CMDLINE,
        "kernel": {"file": KERNEL, "bytes": kernel.len(), "sha256": sha256(&kernel), "release": release},
        "initrd": {"file": INITRD, "bytes": initrd.len(), "sha256": sha256(&initrd)},
        "packages": unpacked.packages,
    });
    publish(cache, MANIFEST, format!("{manifest:#}\n").as_bytes())?;
    fs::remove_dir_all(&unpacked.root)?;
    Ok(())
}

/// Puts a file in its place whole: a guest may be booting from the one that was there.
fn publish(directory: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let (unfinished, path) = (directory.join(format!("{name}.tmp")), directory.join(name));
    fs::write(&unfinished, bytes).with_context(|| format!("{} can't be written", unfinished.display()))?;
    fs::rename(&unfinished, &path).with_context(|| format!("{} can't be written", path.display()))
}

/// Builds the probe beside the downloads; in a target directory of its own, because its flags are others'.
fn start_probe_build(cache: &Path) -> Result<Child> {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["build", "--quiet", "--release", "--package", "guest-probe", "--bin", "guest-probe"])
        .args(["--config", "profile.release.strip=true", "--target", TARGET, "--target-dir"])
        .arg(cache.join("build"))
        .current_dir(workspace())
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .spawn()
        .context("cargo can't be started")
}

fn finish_probe_build(mut build: Child, cache: &Path) -> Result<PathBuf> {
    ensure!(build.wait()?.success(), "the probe does not compile");
    Ok(cache.join("build").join(TARGET).join("release/guest-probe"))
}

fn copy(cache: &Path, directory: &Path) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("{} can't be made", directory.display()))?;
    for file in [KERNEL, INITRD, MANIFEST] {
        let from = cache.join(file);
        let bytes = fs::read(&from).with_context(|| format!("{} can't be read", from.display()))?;
        publish(directory, file, &bytes)?;
    }
    Ok(())
}

/// Runs a command and returns what it prints.
/// What a program wrote; that it failed is an error, with its words.
pub fn output(command: &mut Command) -> Result<Vec<u8>> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("{name} can't be started"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{name} failed ({}): {}", output.status, said.trim());
    }
    Ok(output.stdout)
}

fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
