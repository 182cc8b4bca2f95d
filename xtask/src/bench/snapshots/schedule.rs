//! A hundred snapshots taken and pruned by a schedule while the guest writes: every run must succeed, the disk's chain
//! must stay short, and every snapshot that is kept must come up with everything right.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use berth_e2e::process::wait_until;
use guest_probe::memory::{Rewrite, Settings};
use serde_json::Value;

use super::{cluster, scaled};
use crate::bench::Run;
use crate::bench::figures::Figures;
use crate::bench::subject::Subject;
use crate::bench::work::{count, number};

/// How many runs.
const RUNS: u32 = 100;
/// How many snapshots the schedule keeps.
const KEPT: u32 = 8;
/// The guest's memory in MiB: it is about the number of snapshots here, and not about their size.
const MEMORY_MIB: u32 = 256;
/// What it does meanwhile, besides writing files.
const WORK: Settings = Settings { memory_mib: 64, rate_mib_s: 5, hot_mib: 0, rewrite: Rewrite::Whole };
/// How many files it writes in each run.
const FILES: u32 = 2;
/// The schedule; by its clock it comes up once in four years, so that it runs when it is told to.
const SCHEDULE: &str = "often";
const CRON: &str = "0 0 29 2 *";
/// How long one run may take, pruning included, and how long filling.
const PATIENCE: Duration = Duration::from_secs(120);

/// Takes the figures.
///
/// # Errors
/// When the schedule can't be made or the guest is silent; a run that fails is counted.
pub fn measure(run: &Run, figures: &mut Figures) -> Result<()> {
    let cluster = cluster(run, "schedule")?;
    let subject = Subject::make(&cluster, "kept", MEMORY_MIB)?;
    subject.probe.set(WORK, PATIENCE)?;
    let keep = format!("last={KEPT}");
    let words = ["schedule", "create", SCHEDULE, "--vm", subject.name, "--cron", CRON, "--keep", &keep];
    cluster.berth.run(&words)?;
    let (mut errors, mut chain_max) = (0, 0.0_f64);
    let runs = scaled(run, RUNS);
    for _ in 0..runs {
        subject.probe.write(FILES)?;
        cluster.berth.run(&["schedule", "run", SCHEDULE])?;
        errors += faults(&finished(&subject)?)?;
        chain_max = chain_max.max(number(&cluster.vm(subject.name)?["status"]["layers"])?);
    }
    let kept = kept(&subject)?;
    ensure!(kept.len() as u32 == KEPT.min(runs), "{} snapshots are kept, not {KEPT}", kept.len());
    for snapshot in &kept {
        if let Err(error) = comes_up(&subject, snapshot) {
            println!("   {snapshot} does not come up as it was: {error:#}");
            errors += 1;
        }
    }
    println!("   {runs} runs; {} snapshots are kept, each was put back to and verified", kept.len());
    figures.add(
        "schedule_100_errors",
        "runs that failed, and kept snapshots that don't come up",
        &[count(errors)],
    );
    figures.add("schedule_chain_max", "most layers of the VM's disk after a run", &[chain_max]);
    cluster.down()
}

/// The run that was just begun, when it is over.
fn finished(subject: &Subject<'_>) -> Result<Value> {
    let mut last = Value::Null;
    wait_until(PATIENCE, "the schedule's run to be over", || {
        let mut report = subject.cluster.berth.run(&["schedule", "show", SCHEDULE])?;
        last = report["schedule"]["status"]["run"].take();
        Ok(!last["finished_at"].is_null())
    })?;
    Ok(last)
}

/// What went wrong in a run of one VM: nothing may, and its snapshot is taken.
fn faults(run: &Value) -> Result<u64> {
    let tally = &run["tally"];
    let of = |field: &str| tally[field].as_u64().with_context(|| format!("a run without {field}: {run}"));
    let faults = of("failed")? + of("skipped")? + u64::from(of("taken")? != 1);
    if faults > 0 {
        println!("   a run went wrong: {run}");
    }
    Ok(faults)
}

/// The ids of the snapshots that the schedule keeps.
fn kept(subject: &Subject<'_>) -> Result<Vec<String>> {
    let snapshots = subject.snapshots("scheduled")?;
    let id =
        |snapshot: &Value| snapshot["id"].as_str().map(str::to_owned).context("a snapshot without an id");
    snapshots.iter().map(id).collect()
}

fn comes_up(subject: &Subject<'_>, snapshot: &str) -> Result<()> {
    subject.cluster.berth.run(&["snapshot", "restore", subject.name, snapshot, "--no-undo"])?;
    subject.cluster.guest(subject.name)?.verify().map(drop)
}
