//! How fast a guest is back: with everything in the page cache, with nothing in it, and seen from outside.
//!
//! The bar is on restores as everybody does them, with an undo snapshot first; what that takes is not counted, the guest
//! runs meanwhile, but what it leaves to be written is felt. The peers do no such thing, so the ratio to libvirt is of
//! restores without.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::{cluster, scaled};
use crate::bench::Run;
use crate::bench::figures::Figures;
use crate::bench::subject::{Subject, facts_of};
use crate::bench::work::{self, BUSY, GUEST_MIB, LARGE_GUEST_MIB, number};

/// The snapshot that is restored.
const WORKING: &str = "working";
/// What is done less often: each with an undo snapshot of a large guest, and each with cold caches.
const FEW: u32 = 3;
/// From the command to the first answer, without undo snapshot.
pub const UDP: &str = "restore_udp_ms";

/// Restores of 2 GiB.
///
/// # Errors
/// When one fails, or the guest is not as it was.
pub fn small(run: &Run, figures: &mut Figures) -> Result<()> {
    let cluster = cluster(run, "restores")?;
    let subject = Subject::make(&cluster, "restored", GUEST_MIB)?;
    work::begin(&subject.probe, BUSY)?;
    subject.take(WORKING)?;
    if run.wants("restore_running_ms_2gib") {
        restored(&subject, figures, run.runs, "_2gib")?;
    }
    if run.wants("restore_running_ms_2gib") || run.wants("restore_udp_vs_libvirt_ratio") {
        let alone = restored_without_undo(&subject, run.runs)?;
        figures.add("restore_running_no_undo_ms_2gib", "2 GiB, without an undo snapshot", &alone.running_ms);
        figures.add(UDP, "command (no undo) to the guest's first UDP answer, 2 GiB", &alone.first_ms);
    }
    subject.verify()?;
    if run.wants("restore_running_cold_ms") {
        cold(&subject, figures, scaled(run, FEW))?;
        subject.verify()?;
    }
    cluster.down()
}

/// Restores of 8 GiB.
///
/// # Errors
/// When one fails, or the guest is not as it was.
pub fn large(run: &Run, figures: &mut Figures) -> Result<()> {
    let cluster = cluster(run, "large-restores")?;
    let subject = Subject::make(&cluster, "large", LARGE_GUEST_MIB)?;
    work::begin(&subject.probe, BUSY)?;
    subject.take(WORKING)?;
    restored(&subject, figures, scaled(run, FEW), "_8gib")?;
    let alone = restored_without_undo(&subject, run.runs)?;
    figures.add("restore_running_no_undo_ms_8gib", "8 GiB, without an undo snapshot", &alone.running_ms);
    figures.add("restore_udp_ms_8gib", "command (no undo) to the first UDP answer, 8 GiB", &alone.first_ms);
    subject.verify()?;
    cluster.down()
}

/// Says how the time to the first answer compares to libvirt's, when both were taken.
pub fn compare(figures: &mut Figures) {
    let (Some(ours), Some(theirs)) = (figures.samples(UDP), figures.peer_median(UDP, "libvirt_revert"))
    else {
        return;
    };
    let ratios: Vec<f64> = ours.iter().map(|each| each / theirs).collect();
    let meaning = "command to UDP answer divided by the median of libvirt's revert";
    figures.add("restore_udp_vs_libvirt_ratio", meaning, &ratios);
}

/// As everybody does it.
fn restored(subject: &Subject<'_>, figures: &mut Figures, runs: u32, suffix: &str) -> Result<()> {
    let (mut running, mut undo, mut first) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..runs {
        work::settle();
        let (facts, life) = subject.put_back(WORKING, &[])?;
        running.push(number(&facts["running_us"])? / 1000.0);
        undo.push(number(&facts["undo_us"])? / 1000.0);
        first.push(life.first_sign_ms);
        subject.forget_undo()?;
    }
    let named = |name: &str| format!("{name}{suffix}");
    figures.add(&named("restore_running_ms"), "restore: agent told to guest running", &running);
    figures.add(&named("restore_undo_ms"), "the undo snapshot before it; the guest still runs", &undo);
    figures.add(&named("restore_udp_with_undo_ms"), "command to first UDP answer, undo included", &first);
    Ok(())
}

struct Restores {
    running_ms: Vec<f64>,
    first_ms: Vec<f64>,
}

fn restored_without_undo(subject: &Subject<'_>, runs: u32) -> Result<Restores> {
    let mut restores = Restores { running_ms: Vec::new(), first_ms: Vec::new() };
    for _ in 0..runs {
        work::settle();
        let (facts, life) = subject.put_back(WORKING, &["--no-undo"])?;
        restores.running_ms.push(number(&facts["running_us"])? / 1000.0);
        restores.first_ms.push(life.first_sign_ms);
    }
    Ok(restores)
}

/// With nothing in the page cache: not the snapshot, and not QEMU. What a process has mapped stays there, so the VM is
/// stopped first. The agent and the manager run on, and so does what they have mapped.
fn cold(subject: &Subject<'_>, figures: &mut Figures, runs: u32) -> Result<()> {
    let (mut running, mut first) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        subject.cluster.berth.run(&["vm", "stop", subject.name])?;
        drop_page_cache()?;
        let words = ["snapshot", "restore", subject.name, WORKING];
        let (over, first_ms) =
            work::until_first_answer(subject.probe.address(), || subject.cluster.berth.run(&words))?;
        running.push(number(&facts_of(over)?["running_us"])? / 1000.0);
        first.push(first_ms);
    }
    figures.add("restore_running_cold_ms", "of a stopped VM, page cache dropped: told to running", &running);
    figures.add("restore_udp_cold_ms", "of that: command to the first UDP answer", &first);
    Ok(())
}

/// Writes out what is to be written, and has the kernel forget what it can read again.
fn drop_page_cache() -> Result<()> {
    ensure!(Command::new("sync").status().context("sync")?.success(), "sync failed");
    let path = "/proc/sys/vm/drop_caches";
    fs::write(path, "3").with_context(|| format!("writing {path}: dropping the page cache needs root"))
}
