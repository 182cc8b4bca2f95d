//! Others at the same work: libvirt with its snapshots, plain QEMU with its own and with its migration.
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
mod savevm;

/// How often `snapshots` has a peer do a thing.
const FEW: u32 = 3;
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

/// What the figures are called that a peer is measured for; none: not wanted.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wanted {
    /// Pauses, whole times and UDP gaps of snapshots.
    pub snapshots: Option<[&'static str; 3]>,
    /// Times to running and to the first answer of restores.
    pub restores: Option<[&'static str; 2]>,
    /// Restores of guests that were saved, too, and not only reverts.
    pub saves: bool,
    /// The daemon's memory.
    pub daemon: Option<&'static str>,
    /// How often each thing is done.
    pub runs: u32,
}

/// Measures the peers for the figures of `first-light` that are wanted.
pub fn measure(run: &Run, figures: &mut Figures) {
    if !are_possible() {
        return;
    }
    let wanted = Wanted {
        snapshots: run.wants("snapshot_paused_ms").then_some([
            "snapshot_paused_ms",
            "snapshot_total_ms",
            "snapshot_udp_gap_ms",
        ]),
        restores: run.wants("restore_running_ms").then_some(["restore_running_ms", "restore_first_sign_ms"]),
        saves: true,
        daemon: run.wants("agent_resident_mb").then_some("agent_resident_mb"),
        runs: run.runs,
    };
    libvirt_for(run, wanted, figures);
    if run.wants("migration_blackout_ms") {
        part(figures, "peer: plain QEMU's migration", |figures| qemu::measure(run, figures));
    }
}

/// Measures the peers for the figures of `snapshots` that are wanted. What takes them seconds each is done a few times:
/// they are slower than we are by so much that more would tell nothing.
pub fn measure_snapshots(run: &Run, figures: &mut Figures) {
    let snapshots = run.wants("paused_ms_p50") || run.wants("paused_ms_max");
    let restores = run.wants("restore_running_ms_2gib") || run.wants("restore_udp_vs_libvirt_ratio");
    if !(snapshots || restores) || !are_possible() {
        return;
    }
    let wanted = Wanted {
        snapshots: snapshots.then_some(["paused_ms_p50", "snapshot_total_ms", "snapshot_udp_gap_ms"]),
        restores: restores.then_some(["restore_running_ms_2gib", "restore_udp_ms"]),
        saves: false,
        daemon: None,
        runs: run.runs.min(FEW),
    };
    libvirt_for(run, wanted, figures);
    part(figures, "peer: plain QEMU's savevm and loadvm", |figures| savevm::measure(run, wanted, figures));
}

/// Says what is missing for any peer.
fn are_possible() -> bool {
    if !rustix::process::geteuid().is_root() {
        println!("\npeers are left out: their networks need root");
        return false;
    }
    let Ok(version) = Command::new(QEMU).arg("--version").output() else {
        println!("\npeers are left out: there is no {QEMU}; the package is qemu-system-x86");
        return false;
    };
    let version = String::from_utf8_lossy(&version.stdout).lines().next().unwrap_or_default().to_owned();
    println!("\npeers use {version}");
    true
}

fn libvirt_for(run: &Run, wanted: Wanted, figures: &mut Figures) {
    if wanted.snapshots.is_none() && wanted.restores.is_none() && wanted.daemon.is_none() {
        return;
    }
    let missing: Vec<&str> =
        LIBVIRT.iter().filter(|(file, _)| !Path::new(file).exists()).map(|(_, package)| *package).collect();
    if missing.is_empty() {
        part(figures, "peer: libvirt", |figures| libvirt::measure(run, wanted, figures));
    } else {
        println!("libvirt is left out: it needs the packages {}", missing.join(", "));
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
