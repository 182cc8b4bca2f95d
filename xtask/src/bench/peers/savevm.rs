//! Plain QEMU's own snapshots: `savevm` and `loadvm` with everything in the disk's qcow2 file.

use std::fs::File;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;

use super::net::{self, Net};
use super::qemu::{self, GUEST, Qemu};
use super::{Wanted, event_us, ms_between, now_us, run_program};
use crate::bench::Run;
use crate::bench::figures::Figures;
use crate::bench::work::{self, BUSY};

const WHO: &str = "qemu";
/// How long after a command its event may come.
const EVENT_MAX: Duration = Duration::from_secs(5);

/// Measures snapshots, and restores of the last of them.
///
/// # Errors
/// When the process or a command fails.
pub fn measure(run: &Run, wanted: Wanted, figures: &mut Figures) -> Result<()> {
    let mut net = Net::make()?;
    let (namespace, _) = net.add_host("plain", None)?;
    net.add_tap(&namespace, "tap0")?;
    let dir = run.dir.join("savevm");
    std::fs::create_dir_all(&dir)?;
    let (disk, socket) = (dir.join("disk.qcow2"), dir.join("qmp"));
    run_program("qemu-img", &["create", "-q", "-f", "qcow2", disk.to_str().unwrap_or_default(), "1G"])?;
    let words = qemu::words(&disk, "qcow2", &socket)?;
    let mut qemu = Qemu::start(&namespace, &words, &socket, File::create(dir.join("log"))?)?;
    let probe = work::booted(SocketAddr::from((net::address(GUEST), guest_probe::UDP_PORT)))?;
    work::begin(&probe, BUSY)?;

    let (mut paused, mut total, mut gaps) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..wanted.runs {
        work::settle();
        let begun = now_us();
        let ((), gap_ms) = work::with_gap(probe.address(), || monitor(&mut qemu, "savevm kept"))?;
        total.push(ms_between(now_us(), begun));
        let stopped_us = event_us(&qemu.qmp.event("STOP", EVENT_MAX)?)?;
        let resumed_us = event_us(&qemu.qmp.event("RESUME", EVENT_MAX)?)?;
        paused.push(ms_between(resumed_us, stopped_us));
        gaps.push(gap_ms);
    }
    if let Some(names) = wanted.snapshots {
        figures.add_peer(names[0], WHO, "plain QEMU, savevm: STOP to RESUME", &paused);
        figures.add_peer(names[1], WHO, "plain QEMU, savevm: in all", &total);
        figures.add_peer(names[2], WHO, "plain QEMU, savevm: UDP gap", &gaps);
    }
    let Some(names) = wanted.restores else { return Ok(()) };
    let (mut running, mut first) = (Vec::new(), Vec::new());
    for _ in 0..wanted.runs {
        work::settle();
        let begun = now_us();
        let ((), life) = work::put_back(probe.address(), || monitor(&mut qemu, "loadvm kept"))?;
        running.push(ms_between(event_us(&qemu.qmp.event("RESUME", EVENT_MAX)?)?, begun));
        first.push(life.first_sign_ms);
    }
    figures.add_peer(names[0], WHO, "plain QEMU, loadvm: command to RESUME", &running);
    figures.add_peer(names[1], WHO, "plain QEMU, loadvm: command to the first answer", &first);
    Ok(())
}

/// A command for people, of which QEMU says nothing when it works.
fn monitor(qemu: &mut Qemu, line: &str) -> Result<()> {
    qemu.qmp.forget_events();
    let said = qemu.qmp.command("human-monitor-command", &json!({"command-line": line}))?;
    let said = said.as_str().unwrap_or_default().trim();
    ensure!(said.is_empty(), "{line}: {said}");
    Ok(())
}
