//! Going on, undoing, ending: the same for every workflow.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use berth_model::operation::{OperationKind, OperationResult, OperationState};
use berth_model::vm::Vm;
use berth_model::{Problem, ProblemCode};
use futures_util::FutureExt;

use super::handle::Handle;
use super::interfere::Meddling;
use super::row::OperationRow;
use super::step::{Run, Step, StepFn, StepInfo, Workflow};
use crate::cluster::Cluster;
use crate::records::{Row, Transaction};
use crate::workflow;

/// How often an undo that fails is tried again before the operation ends without it.
const UNDO_ATTEMPTS_MAX: u32 = 4;
/// First and longest pause before a step or an undo that failed is tried again.
const PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// Calls `$call::<W>` for the workflow of a kind.
macro_rules! for_workflow {
    ($kind:expr, $call:ident($($argument:expr),*)) => {
        match $kind {
            OperationKind::VmCreate => $call::<workflow::create::CreateVm>($($argument),*),
            OperationKind::VmStart => $call::<workflow::power::StartVm>($($argument),*),
            OperationKind::VmShutdown => $call::<workflow::power::ShutdownVm>($($argument),*),
            OperationKind::VmStop => $call::<workflow::power::StopVm>($($argument),*),
            OperationKind::VmRestart => $call::<workflow::power::RestartVm>($($argument),*),
            OperationKind::VmPause => $call::<workflow::power::PauseVm>($($argument),*),
            OperationKind::VmResume => $call::<workflow::power::ResumeVm>($($argument),*),
            OperationKind::VmDelete => $call::<workflow::delete::DeleteVm>($($argument),*),
            OperationKind::VmMigrate => $call::<workflow::migration::MigrateVm>($($argument),*),
            OperationKind::SnapshotCreate => $call::<workflow::snapshot::CreateSnapshot>($($argument),*),
            OperationKind::SnapshotRestore => $call::<workflow::restore::RestoreSnapshot>($($argument),*),
            OperationKind::SnapshotClone => $call::<workflow::clone::CloneSnapshot>($($argument),*),
            OperationKind::SnapshotVerify => $call::<workflow::verify::VerifySnapshot>($($argument),*),
            OperationKind::SnapshotExport => $call::<workflow::export::ExportSnapshot>($($argument),*),
            OperationKind::SnapshotImport => $call::<workflow::import::ImportSnapshot>($($argument),*),
            OperationKind::SnapshotDelete => $call::<workflow::snapshot::DeleteSnapshot>($($argument),*),
            OperationKind::ImageDelete => $call::<workflow::image::DeleteImage>($($argument),*),
        }
    };
}
pub(super) use for_workflow;

/// Goes on with an operation of an earlier manager.
pub(super) fn resume(cluster: &Arc<Cluster>, row: &Row<OperationRow>) -> Result<(), Problem> {
    fn go_on<W: Workflow>(cluster: &Arc<Cluster>, row: &Row<OperationRow>) -> Result<(), Problem> {
        let record = read_record::<W>(&row.value)?;
        let handle = Handle::new(row.value.clone(), row.revision, W::target(&record));
        cluster.operations.add(handle.id.clone(), Arc::clone(&handle));
        tracing::info!(operation = %handle.id, kind = %W::KIND, "going on with an operation");
        spawn::<W>(cluster, handle, true);
        Ok(())
    }
    for_workflow!(row.operation.kind, go_on(cluster, row))
}

/// The steps of the workflow of a kind.
pub fn steps_of(kind: OperationKind) -> Vec<StepInfo> {
    fn list<W: Workflow>() -> Vec<StepInfo> {
        let info = |step: &Step<W>| StepInfo {
            name: step.name,
            has_undo: step.undo.is_some(),
            no_return: step.no_return,
        };
        W::STEPS.iter().map(info).collect()
    }
    for_workflow!(kind, list())
}

fn read_record<W: Workflow>(row: &OperationRow) -> Result<W::Record, Problem> {
    serde_json::from_value(row.record.clone()).map_err(|error| {
        let message = format!("the record of operation {} can't be read: {error}", row.operation.id);
        Problem::new(ProblemCode::Internal, message)
    })
}

pub(super) fn spawn<W: Workflow>(cluster: &Arc<Cluster>, handle: Arc<Handle>, resumed: bool) {
    let owned = Arc::clone(cluster);
    cluster.spawn(async move {
        let id = handle.id.clone();
        if let Err(problem) = whole::<W>(&owned, handle, resumed).await {
            tracing::error!(operation = %id, %problem, "an operation is left as it is");
        }
        owned.operations.remove(&id);
    });
}

/// An operation from where it is to its end.
async fn whole<W: Workflow>(
    cluster: &Arc<Cluster>,
    handle: Arc<Handle>,
    resumed: bool,
) -> Result<(), Problem> {
    let row = handle.row().await;
    let mut run = Run::<W> {
        cluster: Arc::clone(cluster),
        record: read_record::<W>(&row)?,
        handle,
        undoing: false,
        attempt: row.attempt.max(1),
    };
    let mut problem = match row.operation.state {
        OperationState::Undoing => {
            row.operation.problem.unwrap_or_else(|| Problem::new(ProblemCode::Internal, "it failed"))
        }
        _ => match forward(&mut run, resumed).await? {
            None => return succeed(&run).await,
            Some(problem) => problem,
        },
    };
    run.undoing = true;
    if let Some(left) = undo(&mut run).await? {
        problem.message = format!("{}; and {left}", problem.message);
    }
    let state = match problem.code {
        ProblemCode::Cancelled => OperationState::Cancelled,
        _ => OperationState::Failed,
    };
    finish(&run, state, None, Some(problem)).await
}

/// Does the steps that are left. The problem, when one failed or it was cancelled; undoing has then been announced.
async fn forward<W: Workflow>(run: &mut Run<W>, resumed: bool) -> Result<Option<Problem>, Problem> {
    let done = run.handle.row().await.operation.steps_done.len();
    let mut past_return = W::STEPS.iter().take(done).any(|step| step.no_return);
    let mut left = W::STEPS.iter().enumerate().skip(done);
    let first =
        left.find(|(_, step)| !W::skips(&run.record, step.name)).map_or(W::STEPS.len(), |(index, _)| index);
    let mut skipped: Vec<String> = Vec::new();
    for (index, step) in W::STEPS.iter().enumerate().skip(done) {
        if W::skips(&run.record, step.name) {
            // Counted with the next one that is done: nothing is lost if it is not.
            skipped.push(step.name.to_owned());
            continue;
        }
        if past_return {
            run.handle.pass_return();
        }
        // A step that an earlier manager may have begun is done (and told of the cancel) before it is undone, so that
        // nothing of it is still under way.
        let maybe_begun = resumed && index == first;
        if run.handle.is_cancelled() && !past_return && !maybe_begun {
            let problem = run.handle.cancel_problem();
            announce_undo(run, &problem, index).await?;
            return Ok(Some(problem));
        }
        run.phase(step.name);
        let mut pause = PAUSES.0;
        while let Err(problem) = once(run, step, step.run).await {
            if past_return {
                tracing::warn!(operation = %run.id(), step = step.name, %problem, "there is only forward: again");
                run.cluster.clock.sleep(pause).await;
                pause = (pause * 2).min(PAUSES.1);
                next_attempt(run).await?;
                continue;
            }
            let cancelled = run.handle.is_cancelled();
            let problem = if cancelled { run.handle.cancel_problem() } else { problem };
            announce_undo(run, &problem, index + 1).await?;
            return Ok(Some(problem));
        }
        past_return |= step.no_return;
        if past_return {
            run.handle.pass_return();
        }
        run.attempt = 1;
        let record = serde_json::to_value(&run.record).expect("records are plain data");
        run.handle
            .save(&run.cluster.records, |row| {
                row.operation.steps_done.append(&mut skipped);
                row.operation.steps_done.push(step.name.to_owned());
                row.record.clone_from(&record);
                row.attempt = 1;
            })
            .await?;
    }
    Ok(None)
}

async fn announce_undo<W: Workflow>(run: &Run<W>, problem: &Problem, steps: usize) -> Result<(), Problem> {
    run.handle
        .save(&run.cluster.records, |row| {
            row.operation.state = OperationState::Undoing;
            row.operation.problem = Some(problem.clone());
            row.undo_left = steps;
        })
        .await
}

async fn next_attempt<W: Workflow>(run: &mut Run<W>) -> Result<(), Problem> {
    run.attempt += 1;
    let attempt = run.attempt;
    run.handle.save(&run.cluster.records, |row| row.attempt = attempt).await
}

/// Undoes what was done, the last step first. What could not be undone is said in words.
async fn undo<W: Workflow>(run: &mut Run<W>) -> Result<Option<String>, Problem> {
    let mut left = None;
    let count = run.handle.row().await.undo_left.min(W::STEPS.len());
    for (index, step) in W::STEPS.iter().enumerate().take(count).rev() {
        if let Some(undo) = step.undo.filter(|_| !W::skips(&run.record, step.name)) {
            run.phase(&format!("undoing {}", step.name));
            let mut pause = PAUSES.0;
            let mut tries = 0;
            while let Err(problem) = once(run, step, undo).await {
                tries += 1;
                if tries == UNDO_ATTEMPTS_MAX {
                    tracing::error!(operation = %run.id(), step = step.name, %problem, "could not be undone");
                    left = Some(format!("'{}' could not be undone: {problem}", step.name));
                    break;
                }
                run.cluster.clock.sleep(pause).await;
                pause = (pause * 2).min(PAUSES.1);
                next_attempt(run).await?;
            }
        }
        run.handle.save(&run.cluster.records, |row| row.undo_left = index).await?;
    }
    Ok(left)
}

/// One step or undo, once, with whatever is done to it on purpose.
async fn once<W: Workflow>(run: &mut Run<W>, step: &Step<W>, work: StepFn<W>) -> Result<(), Problem> {
    let meddling = match &run.cluster.interference {
        Some(interference) => interference.meddle(&run.handle.show(), step.name, run.undoing),
        None => Meddling::None,
    };
    let meant = || Problem::new(ProblemCode::Internal, format!("'{}' was made to fail", step.name));
    let before = run.record.clone();
    match meddling {
        Meddling::None => guarded(run, work).await,
        Meddling::FailBefore => Err(meant()),
        Meddling::FailAfter => {
            guarded(run, work).await?;
            run.record = before;
            Err(meant())
        }
        Meddling::Twice => {
            guarded(run, work).await?;
            run.record = before;
            guarded(run, work).await
        }
        Meddling::Panic => guarded(run, |_| Box::pin(async { panic!("made to panic") })).await,
    }
}

/// A step that panics has failed, and is undone like any other: the VM's slot must not stay taken.
async fn guarded<W: Workflow>(run: &mut Run<W>, work: StepFn<W>) -> Result<(), Problem> {
    AssertUnwindSafe(work(run)).catch_unwind().await.unwrap_or_else(|_| {
        Err(Problem::new(ProblemCode::Internal, "a step broke off; the manager's log says where"))
    })
}

async fn succeed<W: Workflow>(run: &Run<W>) -> Result<(), Problem> {
    finish(run, OperationState::Succeeded, Some(W::result(&run.record)), None).await
}

/// The end, and the slot free again, in one transaction.
async fn finish<W: Workflow>(
    run: &Run<W>,
    state: OperationState,
    result: Option<OperationResult>,
    problem: Option<Problem>,
) -> Result<(), Problem> {
    let records = &run.cluster.records;
    let now = run.cluster.clock.now();
    let vm_id = run.handle.show().vm;
    if let Some(vm) = &vm_id {
        // Before the slot is free: news from before now must not be taken for news from after.
        run.cluster.watchers.fence(vm);
    }
    run.handle
        .save_with(records, |row| {
            row.operation.state = state;
            row.operation.result.clone_from(&result);
            row.operation.problem.clone_from(&problem);
            row.operation.finished_at = Some(now);
            row.operation.progress.phase = state.as_str().to_owned();
            let mut transaction = Transaction::new();
            if let Some(vm) = vm_id.as_ref().and_then(|vm| records.get::<Vm>(vm.as_str()))
                && vm.status.operation.as_ref() == Some(run.id())
            {
                transaction.replace(&vm, &released(&vm, W::KIND, problem.as_ref()));
            }
            if let Some(image) = &row.operation.image {
                transaction.release(&workflow::image::slot_of(image));
            }
            transaction
        })
        .await?;
    tracing::info!(operation = %run.id(), kind = %W::KIND, state = state.as_str(), "an operation is over");
    if let Some(vm) = &vm_id {
        let host = records.get::<Vm>(vm.as_str()).and_then(|row| row.status.host.clone());
        host.iter().for_each(|host| run.cluster.watchers.nudge(host));
    }
    Ok(())
}

fn released(vm: &Vm, kind: OperationKind, problem: Option<&Problem>) -> Vm {
    let mut vm = vm.clone();
    vm.status.operation = None;
    match problem {
        None if workflow::makes_well(kind) => vm.status.trouble = None,
        Some(problem) if problem.code != ProblemCode::Cancelled => {
            vm.status.trouble = Some(format!("{kind} failed: {problem}"));
        }
        _ => {}
    }
    vm
}
