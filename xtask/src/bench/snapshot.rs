//! Our snapshots and restores: a 2 GiB guest of which 600 MiB are being rewritten, and one of 8 GiB.

use anyhow::{Context, Result};
use berth_e2e::{Cluster, UpOptions};
use guest_probe::client::ProbeClient;

use super::Run;
use super::figures::Figures;
use super::work::{self, BUSY, GUEST_MIB, LARGE_GUEST_MIB, items, number};

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

    let mut small = Subject::make(run, &cluster, "small", GUEST_MIB)?;
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
        small.snapshots(figures)?;
    }
    let growth = run.wants("restore_growth_ratio");
    if run.wants("restore_running_ms") || growth {
        let running = small.restores(figures, "")?;
        figures.add("restore_running_ms", "restore: agent's command to guest running, 2 GiB", &running);
        let alone = small.restores_without_undo(figures, "")?;
        figures.add("restore_running_no_undo_ms", "the same without an undo snapshot before it", &alone);
        small.verify()?;
    }
    if growth {
        small.delete()?;
        let mut large = Subject::make(run, &cluster, "large", LARGE_GUEST_MIB)?;
        work::begin(&large.probe, BUSY)?;
        let running = large.restores(figures, "_8gib")?;
        figures.add("restore_running_ms_8gib", "restore: agent's command to guest running, 8 GiB", &running);
        let base =
            figures.median("restore_running_ms").context("no restore of the 2 GiB guest to compare with")?;
        let ratios: Vec<f64> = running.iter().map(|each| each / base).collect();
        figures.add("restore_growth_ratio", "restore of 8 GiB divided by the median of 2 GiB", &ratios);
        let alone = large.restores_without_undo(figures, "_8gib")?;
        figures.add("restore_running_no_undo_ms_8gib", "8 GiB, without an undo snapshot before it", &alone);
        let base = figures.median("restore_running_no_undo_ms").context("no restore without undo")?;
        let ratios: Vec<f64> = alone.iter().map(|each| each / base).collect();
        figures.add("restore_growth_ratio_no_undo", "the same, without undo snapshots", &ratios);
        large.verify()?;
    }
    cluster.down()
}

/// A VM that is measured.
struct Subject<'a> {
    run: &'a Run,
    cluster: &'a Cluster,
    name: &'static str,
    probe: ProbeClient,
}

impl<'a> Subject<'a> {
    fn make(run: &'a Run, cluster: &'a Cluster, name: &'static str, memory_mib: u32) -> Result<Self> {
        let memory = format!("{memory_mib}MiB");
        let guest = cluster.create_guest(name, "probe", &["--memory", &memory, "--disk", "1GiB"])?;
        Ok(Self { run, cluster, name, probe: guest.probe })
    }

    fn snapshots(&mut self, figures: &mut Figures) -> Result<()> {
        let (mut paused, mut total, mut gaps) = (Vec::new(), Vec::new(), Vec::new());
        for number_of_run in 0..self.run.runs {
            let snapshot = format!("run-{number_of_run}");
            let words = ["snapshot", "create", self.name, "--name", &snapshot];
            let ((), gap_ms) =
                work::with_gap(self.probe.address(), || self.cluster.berth.run(&words).map(drop))?;
            let facts = self.cluster.berth.run(&["snapshot", "show", self.name, &snapshot])?["facts"].take();
            paused.push(number(&facts["paused_us"])? / 1000.0);
            total.push(number(&facts["total_ms"])?);
            gaps.push(gap_ms);
            self.forget(&snapshot)?;
            work::settle();
        }
        figures.add("snapshot_paused_ms", "guest paused by a snapshot with memory", &paused);
        figures.add("snapshot_total_ms", "the snapshot in all", &total);
        figures.add("snapshot_udp_gap_ms", "longest gap seen by a UDP client meanwhile", &gaps);
        Ok(())
    }

    /// Restores as everybody does, an undo snapshot first; gives the times to running.
    fn restores(&mut self, figures: &mut Figures, suffix: &str) -> Result<Vec<f64>> {
        self.cluster.berth.run(&["snapshot", "create", self.name, "--name", WORKING])?;
        let (mut running, mut undo, mut first) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..self.run.runs {
            work::settle();
            let words = ["snapshot", "restore", self.name, WORKING];
            let (_, life) = work::put_back(self.probe.address(), || self.cluster.berth.run(&words))?;
            let facts = self.last_restore()?;
            running.push(number(&facts["running_us"])? / 1000.0);
            undo.push(number(&facts["undo_us"])? / 1000.0);
            first.push(life.first_sign_ms);
            self.forget_undo()?;
        }
        let named = |name: &str| format!("{name}{suffix}");
        figures.add(
            &named("restore_undo_ms"),
            "the undo snapshot before a restore; the guest still runs",
            &undo,
        );
        let meaning = "user's command to the first answer, undo snapshot included";
        figures.add(&named("restore_first_sign_with_undo_ms"), meaning, &first);
        Ok(running)
    }

    /// Restores without an undo snapshot, which is what the peers do.
    fn restores_without_undo(&mut self, figures: &mut Figures, suffix: &str) -> Result<Vec<f64>> {
        let (mut running, mut first, mut command) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..self.run.runs {
            work::settle();
            let words = ["snapshot", "restore", self.name, WORKING, "--no-undo"];
            let (_, life) = work::put_back(self.probe.address(), || self.cluster.berth.run(&words))?;
            running.push(number(&self.last_restore()?["running_us"])? / 1000.0);
            first.push(life.first_sign_ms);
            command.push(life.command_ms);
        }
        let named = |name: &str| format!("{name}{suffix}");
        let meaning = "user's command (no undo) to the guest's first answer";
        figures.add(&named("restore_first_sign_ms"), meaning, &first);
        figures.add(&named("restore_command_ms"), "user's command (no undo) until it comes back", &command);
        Ok(running)
    }

    fn last_restore(&self) -> Result<serde_json::Value> {
        let operations = items(&self.cluster.berth.run(&["operation", "list"])?)?;
        let newest = operations.into_iter().find(|operation| operation["kind"] == "snapshot.restore");
        Ok(newest.context("no restore is listed")?["result"]["facts"].take())
    }

    fn forget(&self, snapshot: &str) -> Result<()> {
        self.cluster.berth.run(&["snapshot", "delete", self.name, snapshot]).map(drop)
    }

    fn forget_undo(&self) -> Result<()> {
        let snapshots = items(&self.cluster.berth.run(&["snapshot", "list", self.name])?)?;
        for snapshot in snapshots.iter().filter(|snapshot| snapshot["kind"] == "undo") {
            self.forget(snapshot["id"].as_str().context("a snapshot without an id")?)?;
        }
        Ok(())
    }

    /// A fast restore of something wrong is no restore.
    fn verify(&self) -> Result<()> {
        let guest = self.cluster.guest(self.name)?;
        let seen = guest.verify()?;
        println!("   {} pages verified afterwards: all right", seen.pages);
        Ok(())
    }

    fn delete(&self) -> Result<()> {
        self.cluster.berth.run(&["vm", "delete", self.name, "--force"]).map(drop)
    }
}
