//! How fast a guest is back: with everything in the page cache, with nothing in it, and seen from outside.
//!
//! With an undo snapshot first, which is what everybody does, the agent has time to make the target process ready while
//! that is taken: these are the restores with a warm process. Without one a process is started when the command comes:
//! these are the ones that the bars for 2 and 8 GiB are on, and what the peers, who keep no undo, are held against. What
//! the undo snapshot takes is counted in neither; the guest runs meanwhile.

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

/// What [`small`] takes.
pub const SMALL: [&str; 4] = [
    "restore_running_ms_2gib",
    "restore_running_warm_process_ms",
    "restore_running_cold_ms",
    "restore_udp_vs_libvirt_ratio",
];

/// Restores of 2 GiB.
///
/// # Errors
/// When one fails, or the guest is not as it was.
pub fn small(run: &Run, figures: &mut Figures) -> Result<()> {
    let cluster = cluster(run, "restores")?;
    let subject = Subject::make(&cluster, "restored", GUEST_MIB)?;
    work::begin(&subject.probe, BUSY)?;
    subject.take(WORKING)?;
    if run.wants("restore_running_ms_2gib") || run.wants("restore_udp_vs_libvirt_ratio") {
        let restores = Restores::of(&subject, run.runs, Undo::No)?;
        restores.keep(figures, "_2gib", UDP);
    }
    if run.wants("restore_running_warm_process_ms") {
        let restores = Restores::of(&subject, run.runs, Undo::First)?;
        restores.keep_with_undo(figures, "_2gib");
        let meaning = "restore: agent told to guest running, process made ready before";
        figures.add("restore_running_warm_process_ms", meaning, &restores.warm_ms);
        if restores.warm_ms.is_empty() {
            println!("   no restore found a process made ready: that figure is left out");
        }
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
    Restores::of(&subject, run.runs, Undo::No)?.keep(figures, "_8gib", "restore_udp_ms_8gib");
    Restores::of(&subject, scaled(run, FEW), Undo::First)?.keep_with_undo(figures, "_8gib");
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

/// Whether what the VM is now is kept before it is put back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Undo {
    First,
    No,
}

/// What some restores measured.
#[derive(Debug, Default)]
struct Restores {
    running_ms: Vec<f64>,
    /// Those of them that found a process ready.
    warm_ms: Vec<f64>,
    first_ms: Vec<f64>,
    undo_ms: Vec<f64>,
}

impl Restores {
    fn of(subject: &Subject<'_>, runs: u32, undo: Undo) -> Result<Self> {
        let more: &[&str] = if undo == Undo::First { &[] } else { &["--no-undo"] };
        let mut restores = Self::default();
        for _ in 0..runs {
            work::settle();
            let (facts, life) = subject.put_back(WORKING, more)?;
            let running_ms = number(&facts["running_us"])? / 1000.0;
            restores.running_ms.push(running_ms);
            restores.warm_ms.extend((facts["warm_process"] == true).then_some(running_ms));
            restores.undo_ms.push(number(&facts["undo_us"])? / 1000.0);
            restores.first_ms.push(life.first_sign_ms);
            if undo == Undo::First {
                subject.forget_undo()?;
            }
        }
        Ok(restores)
    }

    fn keep(&self, figures: &mut Figures, suffix: &str, udp: &str) {
        let meaning = "restore (no undo): agent told to guest running";
        figures.add(&format!("restore_running_ms{suffix}"), meaning, &self.running_ms);
        figures.add(udp, "command (no undo) to the guest's first UDP answer", &self.first_ms);
    }

    fn keep_with_undo(&self, figures: &mut Figures, suffix: &str) {
        let named = |name: &str| format!("{name}{suffix}");
        let meaning = "restore, undo snapshot first: agent told to guest running";
        figures.add(&named("restore_running_with_undo_ms"), meaning, &self.running_ms);
        figures.add(&named("restore_undo_ms"), "that undo snapshot; the guest still runs", &self.undo_ms);
        let meaning = "command to first UDP answer, undo snapshot included";
        figures.add(&named("restore_udp_with_undo_ms"), meaning, &self.first_ms);
    }
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
