//! Our snapshots and restores: a 2 GiB guest of which 600 MiB are being rewritten, and one of 8 GiB.

use anyhow::{Context, Result};
use berth_e2e::{Cluster, UpOptions};

use super::Run;
use super::figures::Figures;
use super::subject::Subject;
use super::work::{self, BUSY, GUEST_MIB, LARGE_GUEST_MIB, number};

/// The snapshot that is restored.
const WORKING: &str = "working";

/// Takes the figures of snapshot and restore.
///
/// # Errors
/// When the product fails at what is measured.
pub fn measure(run: &Run, figures: &mut Figures) -> Result<()> {
    let options = UpOptions { dir: run.dir.join("snapshot"), hosts: 1, link_mbit: None, keep: false };
    let cluster = Cluster::up(run.berth()?, &options)?;
    cluster.import_guest("probe", "")?;

    let small = Subject::make(&cluster, "small", GUEST_MIB)?;
    let pace = work::begin(&small.probe, BUSY)?;
    figures.add(
        "snapshot_guest_rate_mib_s",
        "rewritten by the guest that is snapshotted",
        &[pace.reached_mib_s],
    );
    figures.add(
        "snapshot_quiet_gap_ms",
        "longest UDP gap of that guest when left alone",
        &[pace.quiet_gap_ms],
    );
    if run.wants("snapshot_paused_ms") {
        snapshots(run, &small, figures)?;
    }
    let growth = run.wants("restore_growth_ratio");
    if run.wants("restore_running_ms") || growth {
        let running = restores(run, &small, figures, "")?;
        figures.add("restore_running_ms", "restore: agent's command to guest running, 2 GiB", &running);
        let alone = restores_without_undo(run, &small, figures, "")?;
        figures.add("restore_running_no_undo_ms", "the same without an undo snapshot before it", &alone);
        small.verify()?;
    }
    if growth {
        small.delete()?;
        let large = Subject::make(&cluster, "large", LARGE_GUEST_MIB)?;
        work::begin(&large.probe, BUSY)?;
        let running = restores(run, &large, figures, "_8gib")?;
        figures.add("restore_running_ms_8gib", "restore: agent's command to guest running, 8 GiB", &running);
        let base =
            figures.median("restore_running_ms").context("no restore of the 2 GiB guest to compare with")?;
        let ratios: Vec<f64> = running.iter().map(|each| each / base).collect();
        figures.add("restore_growth_ratio", "restore of 8 GiB divided by the median of 2 GiB", &ratios);
        let alone = restores_without_undo(run, &large, figures, "_8gib")?;
        figures.add("restore_running_no_undo_ms_8gib", "8 GiB, without an undo snapshot before it", &alone);
        let base = figures.median("restore_running_no_undo_ms").context("no restore without undo")?;
        let ratios: Vec<f64> = alone.iter().map(|each| each / base).collect();
        figures.add("restore_growth_ratio_no_undo", "the same, without undo snapshots", &ratios);
        large.verify()?;
    }
    cluster.down()
}

fn snapshots(run: &Run, subject: &Subject<'_>, figures: &mut Figures) -> Result<()> {
    let (mut paused, mut total, mut gaps) = (Vec::new(), Vec::new(), Vec::new());
    for number_of_run in 0..run.runs {
        let snapshot = format!("run-{number_of_run}");
        let (facts, gap_ms) = work::with_gap(subject.probe.address(), || subject.take(&snapshot))?;
        paused.push(number(&facts["paused_us"])? / 1000.0);
        total.push(number(&facts["total_ms"])?);
        gaps.push(gap_ms);
        subject.forget(&snapshot)?;
        work::settle();
    }
    figures.add("snapshot_paused_ms", "guest paused by a snapshot with memory", &paused);
    figures.add("snapshot_total_ms", "the snapshot in all", &total);
    figures.add("snapshot_udp_gap_ms", "longest gap seen by a UDP client meanwhile", &gaps);
    Ok(())
}

/// Restores as everybody does, an undo snapshot first; gives the times to running.
fn restores(run: &Run, subject: &Subject<'_>, figures: &mut Figures, suffix: &str) -> Result<Vec<f64>> {
    subject.take(WORKING)?;
    let (mut running, mut undo, mut first) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..run.runs {
        work::settle();
        let (facts, life) = subject.put_back(WORKING, &[])?;
        running.push(number(&facts["running_us"])? / 1000.0);
        undo.push(number(&facts["undo_us"])? / 1000.0);
        first.push(life.first_sign_ms);
        subject.forget_undo()?;
    }
    let named = |name: &str| format!("{name}{suffix}");
    figures.add(&named("restore_undo_ms"), "the undo snapshot before a restore; the guest still runs", &undo);
    let meaning = "user's command to the first answer, undo snapshot included";
    figures.add(&named("restore_first_sign_with_undo_ms"), meaning, &first);
    Ok(running)
}

/// Restores without an undo snapshot, which is what the peers do.
fn restores_without_undo(
    run: &Run,
    subject: &Subject<'_>,
    figures: &mut Figures,
    suffix: &str,
) -> Result<Vec<f64>> {
    let (mut running, mut first, mut command) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..run.runs {
        work::settle();
        let (facts, life) = subject.put_back(WORKING, &["--no-undo"])?;
        running.push(number(&facts["running_us"])? / 1000.0);
        first.push(life.first_sign_ms);
        command.push(life.command_ms);
    }
    let named = |name: &str| format!("{name}{suffix}");
    let meaning = "user's command (no undo) to the guest's first answer";
    figures.add(&named("restore_first_sign_ms"), meaning, &first);
    figures.add(&named("restore_command_ms"), "user's command (no undo) until it comes back", &command);
    Ok(running)
}
