//! Plain QEMU to plain QEMU over the same shaped link: what a move costs with nobody's help.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::net::{self, Net};
use super::qmp::Qmp;
use super::{Boot, CPU, MACHINE, QEMU, event_us, ms_between, run_program};
use crate::bench::Run;
use crate::bench::figures::Figures;
use crate::bench::migration::LINK_MBIT;
use crate::bench::work::{self, GUEST_MIB, WHOLE, number};

/// The guest's last number in the network.
pub const GUEST: u8 = 100;
const PORT: u16 = 4444;
/// The guest's memory in KiB: as under Berth 8 KiB less than asked for, because QEMU before 9 loses what a translated guest
/// writes while it is sent when the length is a multiple of 256 KiB, and the guest dies.
const GUEST_KIB: u32 = GUEST_MIB * 1024 - 8;
/// How long a move may take: five times what the link needs for all of the guest.
const MOVE_MAX: Duration = Duration::from_secs(90);
/// QEMU's own default, in milliseconds.
const LIMIT_DEFAULT_MS: u32 = 300;
/// A limit that somebody who knows may set.
const LIMIT_SMALL_MS: u32 = 30;

/// Measures moves there and back, with QEMU's defaults and with a small downtime limit.
///
/// # Errors
/// When a process or a move fails.
pub fn measure(run: &Run, figures: &mut Figures) -> Result<()> {
    let mut net = Net::make()?;
    let mut places = Vec::new();
    for name in ["host-a", "host-b"] {
        let (namespace, address) = net.add_host(name, Some(LINK_MBIT))?;
        net.add_tap(&namespace, "tap0")?;
        places.push(Place { namespace, address });
    }
    let dir = run.dir.join("qemu");
    std::fs::create_dir_all(&dir)?;
    let disk = dir.join("disk.raw");
    run_program("qemu-img", &["create", "-q", "-f", "raw", disk.to_str().context("path")?, "1G"])?;
    let mut stage = Stage { dir, disk, places, at: 0, started: 0 };
    let mut current = stage.start(0, false)?;
    current.qmp.command("cont", &json!({}))?;
    let probe = work::booted(SocketAddr::from((net::address(GUEST), guest_probe::UDP_PORT)))?;
    work::begin(&probe, WHOLE)?;
    for (limit_ms, who) in [(LIMIT_DEFAULT_MS, "qemu_default"), (LIMIT_SMALL_MS, "qemu_limit_30ms")] {
        let (mut blackout, mut gaps, mut total, mut bytes, mut said) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for _ in 0..run.runs {
            work::settle();
            let (moved, gap_ms) =
                work::with_gap(probe.address(), || stage.move_over(&mut current, limit_ms))?;
            blackout.push(moved.blackout_ms);
            total.push(moved.total_ms);
            bytes.push(moved.bytes);
            said.push(moved.downtime_said_ms);
            gaps.push(gap_ms);
        }
        let how = format!("plain QEMU, downtime limit {limit_ms} ms, whole pages");
        figures.add_peer("migration_blackout_ms", who, &format!("{how}: STOP to RESUME"), &blackout);
        figures.add_peer("migration_udp_gap_ms", who, &format!("{how}: UDP gap"), &gaps);
        figures.add_peer("migration_total_ms", who, &format!("{how}: in all"), &total);
        figures.add_peer("migration_bytes", who, &format!("{how}: bytes"), &bytes);
        figures.add_peer("migration_downtime_said_ms", who, &format!("{how}: QEMU's own word"), &said);
    }
    let seen = probe.verify(Duration::from_secs(300))?;
    println!("   {} pages verified afterwards: {} wrong", seen.pages, seen.pages_wrong);
    drop(current);
    drop(net);
    Ok(())
}

struct Place {
    namespace: String,
    address: Ipv4Addr,
}

struct Stage {
    dir: PathBuf,
    disk: PathBuf,
    places: Vec<Place>,
    /// Where the guest runs.
    at: usize,
    /// How many processes there have been.
    started: u32,
}

struct Moved {
    blackout_ms: f64,
    total_ms: f64,
    bytes: f64,
    downtime_said_ms: f64,
}

/// A QEMU that is killed when it is dropped.
pub struct Qemu {
    child: Child,
    /// Its monitor.
    pub qmp: Qmp,
}

impl Qemu {
    /// Starts a process in a network namespace, and waits for its monitor.
    ///
    /// # Errors
    /// When it can't be started, or does not open its monitor.
    pub fn start(namespace: &str, words: &[String], socket: &Path, log: File) -> Result<Self> {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", namespace, QEMU]).args(words);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().context("QEMU")?;
        let mut guard = Unconnected(Some(child));
        let qmp = Qmp::connect(socket)?;
        let child = guard.0.take().context("the process was just started")?;
        Ok(Self { child, qmp })
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Both fail only when it is gone already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Stage {
    /// Starts a process in a place, the guest not yet running.
    fn start(&mut self, place: usize, incoming: bool) -> Result<Qemu> {
        self.started += 1;
        let socket = self.dir.join(format!("qmp-{}", self.started));
        let log = File::create(self.dir.join(format!("log-{}", self.started)))?;
        let mut words = words(&self.disk, "raw", &socket)?;
        let more: &[&str] = if incoming { &["-incoming", "defer"] } else { &["-S"] };
        words.extend(more.iter().map(|word| (*word).to_owned()));
        Qemu::start(&self.places[place].namespace, &words, &socket, log)
    }

    fn move_over(&mut self, current: &mut Qemu, limit_ms: u32) -> Result<Moved> {
        let place = 1 - self.at;
        let begun = Instant::now();
        let mut target = self.start(place, true)?;
        let uri = format!("tcp:{}:{PORT}", self.places[place].address);
        target.qmp.command("migrate-incoming", &json!({"uri": uri}))?;
        let source = &mut current.qmp;
        source.command("migrate-set-parameters", &json!({"downtime-limit": limit_ms}))?;
        source.forget_events();
        source.command("migrate", &json!({"uri": uri}))?;
        let info = completed(source)?;
        let stopped_us = event_us(&source.event("STOP", Duration::from_secs(1))?)?;
        let resumed_us = event_us(&target.qmp.event("RESUME", Duration::from_secs(30))?)?;
        let moved = Moved {
            blackout_ms: ms_between(resumed_us, stopped_us),
            total_ms: work::ms(begun.elapsed()),
            bytes: number(&info["ram"]["transferred"])?,
            downtime_said_ms: number(&info["downtime"])?,
        };
        self.at = place;
        *current = target;
        Ok(moved)
    }
}

/// A process whose monitor has not answered yet.
struct Unconnected(Option<Child>);

impl Drop for Unconnected {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn completed(source: &mut Qmp) -> Result<serde_json::Value> {
    let end = Instant::now() + MOVE_MAX;
    loop {
        let info = source.command("query-migrate", &json!({}))?;
        match info["status"].as_str() {
            Some("completed") => return Ok(info),
            Some("failed" | "cancelled") => bail!("the migration failed: {info}"),
            _ if Instant::now() >= end => bail!("the migration does not end: {info}"),
            _ => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// What QEMU is started with, for a disk of this format.
///
/// # Errors
/// When a path is not UTF-8, or the guest has not been made.
pub fn words(disk: &Path, format: &str, socket: &Path) -> Result<Vec<String>> {
    let boot = Boot::at(&net::address(GUEST).to_string())?;
    let (disk, socket) = (disk.to_str().context("path")?, socket.to_str().context("path")?);
    let lists = [
        "-nodefaults -no-user-config -display none -vga none".to_owned(),
        format!("-machine {MACHINE},usb=off -accel tcg,thread=multi -cpu {CPU} -smp 1 -m {GUEST_KIB}K"),
        "-netdev tap,id=net0,ifname=tap0,script=no,downscript=no,vhost=off".to_owned(),
        "-device virtio-net-pci,romfile=,netdev=net0,mac=52:54:00:be:27:01".to_owned(),
        "-device virtio-blk-pci,drive=disk0 -device virtio-rng-pci -serial null".to_owned(),
    ];
    let mut words: Vec<String> = lists.iter().flat_map(|list| list.split(' ').map(str::to_owned)).collect();
    words.extend([
        "-blockdev".to_owned(),
        json!({"driver": format, "node-name": "disk0",
        "file": {"driver": "file", "filename": disk}})
        .to_string(),
    ]);
    words.extend(["-qmp".to_owned(), format!("unix:{socket},server=on,wait=off")]);
    words.extend(
        ["-kernel", &boot.kernel, "-initrd", &boot.initrd, "-append", &boot.append].map(str::to_owned),
    );
    Ok(words)
}
