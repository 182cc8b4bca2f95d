//! When the source's answer does not say where the guest runs.
//!
//! What is certain, and why:
//!
//! - The target lets the guest run only after the source gave it away, durably, and is then no target any more but the
//!   VM's host. So a target that has the VM and is in no migration owns it, whatever the source says or fails to say,
//!   and also when the guest has ended there since: what it wrote is on the disk.
//! - A source that gave the VM away never runs it again by itself. So it may be told to take it back once the target
//!   has thrown away what it had (`RefuseMigration` done, and nothing of the VM in its report): then nothing is left
//!   there that could run, and nothing has.
//! - A source that did not give it away runs it, and the target can't.
//!
//! Each loop here ends with one of these, and goes on asking otherwise.

use std::time::Duration;

use berth_api::agent::{MigrationSide, TaskSpec, VmReport};
use berth_model::host::Host;
use berth_model::migration::MigrationReport;
use berth_model::{HostId, Problem};

use super::{Moved, Way};
use crate::operations::step::{Command, Run, Workflow};

/// How often a target is looked at while the source moves the VM to it.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// How long the source may take to say itself that it is done, once the guest is seen on the target. Shorter: its
/// measurements are lost for no reason.
const SOURCE_MAY_TAKE: Duration = Duration::from_secs(15);
/// Pause before both are asked again.
const AGAIN_AFTER: Duration = Duration::from_secs(1);

/// The source gave the VM away and does not know more: has the target run it, or has the source take it back.
pub(super) async fn resolve<W: Workflow>(run: &Run<W>, way: &Way, moved: Moved) -> Result<Moved, Problem> {
    let migration = run.id().clone();
    let (vm, source, target) = (Some(&way.vm), &way.source, &way.target);
    run.phase("handed-over");
    let mut round = 0;
    loop {
        round += 1;
        let label = format!("take-over-{round}");
        let spec = TaskSpec::TakeOver { migration: migration.clone() };
        let refusal = match run.insist(Command { host: target, vm, label: &label, spec }).await {
            Ok(_) => return Ok(moved),
            Err(refusal) => refusal,
        };
        match ask(run, way, target).await {
            Ok(Some(report)) if owns(&report) => {
                return Ok(Moved { top: report.top.or_else(|| moved.top.clone()), ..moved });
            }
            // It has what it was sent, and is told to throw that away; then it is asked again.
            Ok(Some(_)) => {
                let label = format!("give-up-{round}");
                let spec =
                    TaskSpec::RefuseMigration { migration: migration.clone(), shared_pool: way.shared_pool };
                let _ = run.insist(Command { host: target, vm, label: &label, spec }).await;
                if !matches!(ask(run, way, target).await, Ok(None)) {
                    run.cluster.clock.sleep(AGAIN_AFTER).await;
                    continue;
                }
            }
            Ok(None) => {}
            Err(Silent) => {
                run.cluster.clock.sleep(AGAIN_AFTER).await;
                continue;
            }
        }
        let label = format!("take-back-{round}");
        let spec = TaskSpec::TakeBack { migration: migration.clone() };
        let taken = run.insist(Command { host: source, vm, label: &label, spec }).await;
        let mut message = format!("the target could not let the VM run: {}", refusal.message);
        if let Err(problem) = taken {
            message = format!("{message}; and the source could not take it back: {}", problem.message);
        }
        return Err(Problem { message, ..refusal });
    }
}

/// The source says that it failed. That is so, unless its failure was in knowing.
pub(super) async fn after_failure<W: Workflow>(
    run: &Run<W>,
    way: &Way,
    problem: Problem,
) -> Result<Moved, Problem> {
    if let Ok(Some(report)) = ask(run, way, &way.target).await
        && owns(&report)
    {
        return Ok(Moved { report: unmeasured(run, way), top: report.top });
    }
    let gave_away = matches!(
        ask(run, way, &way.source).await.map(|report| report.and_then(|report| report.migration)),
        Ok(Some(MigrationSide::Source { handed_over: true, .. }))
    );
    if gave_away {
        let moved = Moved { report: unmeasured(run, way), top: None };
        return resolve(run, way, moved).await;
    }
    Err(problem)
}

/// Done once the guest has been seen on the target and the source has had its time to say so itself: the source's
/// host may be gone for good.
pub(super) async fn seen_on_target<W: Workflow>(run: &Run<W>, way: &Way) -> Moved {
    loop {
        run.cluster.clock.sleep(LOOK_EVERY).await;
        let top = match ask(run, way, &way.target).await {
            Ok(Some(report)) if owns(&report) => report.top,
            _ => continue,
        };
        run.cluster.clock.sleep(SOURCE_MAY_TAKE).await;
        return Moved { report: unmeasured(run, way), top };
    }
}

/// Whether the target that says this has become the VM's host.
fn owns(report: &VmReport) -> bool {
    report.migration.is_none()
}

/// A host did not answer.
struct Silent;

/// What a host says of the VM; none: it has nothing of it.
async fn ask<W: Workflow>(run: &Run<W>, way: &Way, host: &HostId) -> Result<Option<VmReport>, Silent> {
    let host = run.cluster.records.get::<Host>(host.as_str()).ok_or(Silent)?;
    run.cluster.agents.report_of(&host, &way.vm).await.map_err(|_| Silent)
}

fn unmeasured<W: Workflow>(run: &Run<W>, way: &Way) -> MigrationReport {
    MigrationReport {
        source: way.source.clone(),
        target: way.target.clone(),
        phases: Vec::new(),
        total_ms: run.cluster.clock.now().millis_since(way.began_at),
        blackout_us: 0,
        memory_bytes: 0,
        storage_bytes: 0,
        rounds: 0,
        clock_offset_us: 0,
    }
}
