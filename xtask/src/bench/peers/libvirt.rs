//! libvirt at snapshots and restores: internal, external and live, saved and restored.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, Result};

use super::daemon::Daemon;
use super::net::{self, Net};
use super::{Boot, CPU, MACHINE, QEMU, Wanted, ms_between, now_us, run_program};
use crate::bench::Run;
use crate::bench::figures::Figures;
use crate::bench::fleet::{VMS, resident_mb};
use crate::bench::work::{self, BUSY, GUEST_MIB};

/// The guest's last number in the network.
const GUEST: u8 = 100;
const VM: &str = "peer";

/// Measures libvirt for the figures that are wanted.
///
/// # Errors
/// When libvirt does not start, or fails at what is measured.
pub fn measure(run: &Run, wanted: Wanted, figures: &mut Figures) -> Result<()> {
    let mut net = Net::make()?;
    let (namespace, _) = net.add_host("lv", None)?;
    let dir = run.dir.join("libvirt");
    std::fs::create_dir_all(&dir)?;
    let daemon = Daemon::start(&dir, &namespace)?;
    let version = daemon.virsh(&["version", "--daemon"])?;
    println!("   {}", version.lines().find(|line| line.contains("daemon")).unwrap_or("libvirt").trim());
    let outcome = all(wanted, &daemon, figures);
    // QEMU outlives the daemon; it must not outlive the bench.
    for name in daemon.virsh(&["list", "--name"])?.lines().filter(|line| !line.is_empty()) {
        daemon.virsh(&["destroy", name])?;
    }
    drop(daemon);
    drop(net);
    outcome
}

fn all(wanted: Wanted, daemon: &Daemon, figures: &mut Figures) -> Result<()> {
    if wanted.snapshots.is_some() || wanted.restores.is_some() {
        let guest = Guest::start(wanted.runs, daemon)?;
        if let Some(names) = wanted.snapshots {
            guest.external(figures, names)?;
        }
        guest.internal(figures, wanted.snapshots)?;
        if let Some(names) = wanted.restores {
            guest.reverts(figures, names)?;
            if wanted.saves {
                guest.saves(figures, names)?;
            }
        }
        daemon.virsh(&["destroy", VM])?;
    }
    if let Some(name) = wanted.daemon {
        daemon_memory(daemon, figures, name)?;
    }
    Ok(())
}

struct Guest<'a> {
    runs: u32,
    daemon: &'a Daemon,
    address: SocketAddr,
}

impl<'a> Guest<'a> {
    fn start(runs: u32, daemon: &'a Daemon) -> Result<Self> {
        define(daemon, VM, GUEST_MIB, Some(GUEST))?;
        daemon.virsh(&["start", VM])?;
        let address = SocketAddr::from((net::address(GUEST), guest_probe::UDP_PORT));
        let probe = work::booted(address)?;
        work::begin(&probe, BUSY)?;
        Ok(Self { runs, daemon, address })
    }

    fn external(&self, figures: &mut Figures, names: [&str; 3]) -> Result<()> {
        let disks = self.daemon.disks();
        let mut made = Pauses::default();
        for run in 0..self.runs {
            work::settle();
            let name = format!("external-{run}");
            let memory = disks.join(format!("{name}.memory"));
            let to_memory = format!("file={},snapshot=external", memory.display());
            let to_disk = format!("vda,snapshot=external,file={}/{name}.qcow2", disks.display());
            let words = ["snapshot-create-as", VM, &name, "--memspec", &to_memory, "--diskspec", &to_disk];
            self.paused_by(&[&words[..], &["--atomic", "--live"]].concat(), &mut made)?;
            std::fs::remove_file(&memory).with_context(|| format!("removing {}", memory.display()))?;
            self.daemon.virsh(&["snapshot-delete", VM, &name, "--metadata"])?;
        }
        made.keep(figures, names, "libvirt_external", "libvirt, external live snapshot with memory");
        Ok(())
    }

    /// Leaves one snapshot behind, to go back to.
    fn internal(&self, figures: &mut Figures, names: Option<[&str; 3]>) -> Result<()> {
        let mut made = Pauses::default();
        for run in 0..self.runs {
            work::settle();
            if run > 0 {
                self.daemon.virsh(&["snapshot-delete", VM, "internal"])?;
            }
            self.paused_by(&["snapshot-create-as", VM, "internal"], &mut made)?;
        }
        if let Some(names) = names {
            made.keep(figures, names, "libvirt_internal", "libvirt, internal snapshot with memory");
        }
        Ok(())
    }

    fn paused_by(&self, words: &[&str], made: &mut Pauses) -> Result<()> {
        let mark = self.daemon.mark()?;
        let begun = now_us();
        let (_, gap_ms) = work::with_gap(self.address, || self.daemon.virsh(words))?;
        let (stops, resumes) = (self.daemon.stamps(mark, "STOP")?, self.daemon.stamps(mark, "RESUME")?);
        let stopped = stops.first().context("libvirt's log has no STOP")?;
        let resumed = resumes.last().context("libvirt's log has no RESUME")?;
        made.paused.push(ms_between(*resumed, *stopped));
        made.total.push(ms_between(now_us(), begun));
        made.gaps.push(gap_ms);
        Ok(())
    }

    fn reverts(&self, figures: &mut Figures, names: [&str; 2]) -> Result<()> {
        let (mut running, mut first) = (Vec::new(), Vec::new());
        for _ in 0..self.runs {
            work::settle();
            self.put_back(&["snapshot-revert", VM, "internal"], &mut running, &mut first)?;
        }
        keep_restores(
            figures,
            names,
            "libvirt_revert",
            "libvirt, revert to an internal snapshot",
            &running,
            &first,
        );
        Ok(())
    }

    /// A saved guest is gone until it is restored, so there is no old answer to tell the first new one from; the tick
    /// stands still meanwhile, and the first answer after the command is the one.
    fn saves(&self, figures: &mut Figures, names: [&str; 2]) -> Result<()> {
        let (mut running, mut first) = (Vec::new(), Vec::new());
        let file = self.daemon.disks().join("saved");
        let path = file.to_str().context("path")?;
        for _ in 0..self.runs {
            work::settle();
            self.daemon.virsh(&["save", VM, path])?;
            let mark = self.daemon.mark()?;
            let begun = now_us();
            let ((), gap_ms) =
                work::until_first_answer(self.address, || self.daemon.virsh(&["restore", path]).map(drop))?;
            let resumed = self.daemon.stamps(mark, "RESUME")?;
            running.push(ms_between(*resumed.last().context("libvirt's log has no RESUME")?, begun));
            first.push(gap_ms);
        }
        keep_restores(
            figures,
            names,
            "libvirt_restore",
            "libvirt, restore of a saved guest",
            &running,
            &first,
        );
        Ok(())
    }

    fn put_back(&self, words: &[&str], running: &mut Vec<f64>, first: &mut Vec<f64>) -> Result<()> {
        let mark = self.daemon.mark()?;
        let mut begun = 0;
        let (_, life) = work::put_back(self.address, || {
            begun = now_us();
            self.daemon.virsh(words)
        })?;
        let resumed = self.daemon.stamps(mark, "RESUME")?;
        running.push(ms_between(*resumed.last().context("libvirt's log has no RESUME")?, begun));
        first.push(life.first_sign_ms);
        Ok(())
    }
}

#[derive(Debug, Default)]
struct Pauses {
    paused: Vec<f64>,
    total: Vec<f64>,
    gaps: Vec<f64>,
}

impl Pauses {
    fn keep(&self, figures: &mut Figures, names: [&str; 3], who: &str, how: &str) {
        figures.add_peer(names[0], who, &format!("{how}: STOP to RESUME"), &self.paused);
        figures.add_peer(names[1], who, &format!("{how}: in all"), &self.total);
        figures.add_peer(names[2], who, &format!("{how}: UDP gap"), &self.gaps);
    }
}

fn keep_restores(
    figures: &mut Figures,
    names: [&str; 2],
    who: &str,
    how: &str,
    running: &[f64],
    first: &[f64],
) {
    figures.add_peer(names[0], who, &format!("{how}: command to RESUME"), running);
    figures.add_peer(names[1], who, &format!("{how}: command to the first answer"), first);
}

/// Ten guests that are held at their start: the daemon's part is the same, and the machine is spared ten boots.
fn daemon_memory(daemon: &Daemon, figures: &mut Figures, figure: &str) -> Result<()> {
    for number in 0..VMS {
        let name = format!("small-{number}");
        define(daemon, &name, 128, None)?;
        daemon.virsh(&["start", "--paused", &name])?;
    }
    let (now, _) = resident_mb(daemon.pid())?;
    figures.add_peer(figure, "libvirtd", "libvirtd's resident memory with 10 paused VMs", &[now]);
    Ok(())
}

/// Defines a guest with a disk of its own; without a number it has no network.
fn define(daemon: &Daemon, name: &str, memory_mib: u32, number: Option<u8>) -> Result<()> {
    let disk = daemon.disks().join(format!("{name}.qcow2"));
    run_program("qemu-img", &["create", "-q", "-f", "qcow2", disk.to_str().context("path")?, "1G"])?;
    let text = domain(name, memory_mib, &disk, number)?;
    let file = daemon.disks().join(format!("{name}.xml"));
    std::fs::write(&file, text)?;
    daemon.virsh(&["define", file.to_str().context("path")?]).map(drop)
}

fn domain(name: &str, memory_mib: u32, disk: &Path, number: Option<u8>) -> Result<String> {
    let Boot { kernel, initrd, append } = Boot::at(&net::address(number.unwrap_or(GUEST)).to_string())?;
    let nic = match number {
        Some(_) => "<interface type='bridge'><source bridge='br0'/><model type='virtio'/></interface>",
        None => "",
    };
    Ok(format!(
        "<domain type='qemu'><name>{name}</name><memory unit='MiB'>{memory_mib}</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='{MACHINE}'>hvm</type><kernel>{kernel}</kernel><initrd>{initrd}</initrd>\
         <cmdline>{append}</cmdline></os><features><acpi/></features>\
         <cpu mode='custom' match='exact'><model>{CPU}</model></cpu><devices><emulator>{QEMU}</emulator>\
         <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{disk}'/>\
         <target dev='vda' bus='virtio'/></disk>{nic}<serial type='null'/><memballoon model='none'/>\
         </devices></domain>",
        disk = disk.display(),
    ))
}
