//! Others at the same work: libvirt with its snapshots, plain QEMU with its migration.
//!
//! They get the same guest (kernel, ramdisk, memory, disk, work) and the same QEMU, and, where it matters, a network of
//! the same shape with the same shaping. They are measured the same way: STOP and RESUME as QEMU stamps them, the UDP
//! gap from outside, and the time from the command to the guest's first answer. They are not tuned, except where a
//! figure's name says so.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use guest_probe::image::GuestImage;
use serde_json::Value;

use super::figures::Figures;
use super::{Run, part};

mod daemon;
mod libvirt;
mod net;
mod qemu;
mod qmp;

/// The machine that the peers' guests have.
const MACHINE: &str = "pc-q35-7.2";
/// Its processor.
const CPU: &str = "Nehalem";
const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// What libvirt as a peer is made of: a file of it, and the package that has the file.
const LIBVIRT: [(&str, &str); 3] = [
    ("/usr/sbin/libvirtd", "libvirt-daemon"),
    (
        "/usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_qemu.so",
        "libvirt-daemon-driver-qemu",
    ),
    ("/usr/bin/virsh", "libvirt-clients"),
];

/// Measures the peers for the figures that are wanted.
pub fn measure(run: &Run, figures: &mut Figures) {
    if !rustix::process::geteuid().is_root() {
        println!("\npeers are left out: their networks need root");
        return;
    }
    let qemu_version = Command::new(QEMU).arg("--version").output();
    let Ok(version) = qemu_version else {
        println!("\npeers are left out: there is no {QEMU}; the package is qemu-system-x86");
        return;
    };
    let version = String::from_utf8_lossy(&version.stdout).lines().next().unwrap_or_default().to_owned();
    println!("\npeers use {version}");
    if run.wants("snapshot_paused_ms") || run.wants("restore_running_ms") || run.wants("agent_resident_mb") {
        let missing: Vec<&str> = LIBVIRT
            .iter()
            .filter(|(file, _)| !Path::new(file).exists())
            .map(|(_, package)| *package)
            .collect();
        if missing.is_empty() {
            part(figures, "peer: libvirt", |figures| libvirt::measure(run, figures));
        } else {
            println!("libvirt is left out: it needs the packages {}", missing.join(", "));
        }
    }
    if run.wants("migration_blackout_ms") {
        part(figures, "peer: plain QEMU's migration", |figures| qemu::measure(run, figures));
    }
}

/// The test guest's parts as words, with the address that it is to have.
struct Boot {
    kernel: String,
    initrd: String,
    append: String,
}

impl Boot {
    fn at(address: &str) -> Result<Self> {
        let guest = GuestImage::locate()?;
        let text = |path: &Path| path.to_str().map(str::to_owned).context("the guest's path is not UTF-8");
        Ok(Self {
            kernel: text(&guest.kernel)?,
            initrd: text(&guest.initrd)?,
            append: format!("{} ip={address}/24 probe.memory_mib=16", guest.cmdline),
        })
    }
}

/// When an event was, as QEMU stamped it, in microseconds since the epoch.
fn event_us(event: &Value) -> Result<u64> {
    let stamp = &event["timestamp"];
    let field =
        |name: &str| stamp[name].as_u64().with_context(|| format!("an event without {name}: {event}"));
    Ok(field("seconds")? * 1_000_000 + field("microseconds")?)
}

/// Milliseconds between two stamps; the later one first.
fn ms_between(later_us: u64, earlier_us: u64) -> f64 {
    super::work::count(later_us.saturating_sub(earlier_us)) / 1000.0
}

/// Now, on the clock that events are stamped with.
fn now_us() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}

/// Runs a program that must succeed, and gives what it printed.
fn run_program(program: &str, words: &[&str]) -> Result<String> {
    let output = Command::new(program).args(words).output().with_context(|| format!("starting {program}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{program} {} ended with {}: {}", words.join(" "), output.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
