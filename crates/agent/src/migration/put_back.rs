//! A VM that is put back to a snapshot on another host: what both hosts do of it that is not a migration's.
//!
//! The machine of the snapshot is made ready on the target, as for any restore, while the VM is on the source whatever it
//! was. Only when it stands there, loaded, is the guest on the source stopped, the VM given away, and the machine let run:
//! what is wrong with the snapshot, or with the target, is found before, and the VM then goes on as it was. The VM's memory
//! and what it wrote since its last snapshot stay on the source, and go with the rest once the VM has moved.

use std::time::Duration;

use berth_api::agent::{PutBack, TaskOutput};
use berth_model::Problem;
use berth_model::migration::MigrationEvent;
use berth_qmp::commands::Stop;
use tokio_util::sync::CancellationToken;

use super::arrival::{self, NotRunning};
use super::journey::Journey;
use super::link::Link;
use super::source::{
    Order, SLOW_ANSWER_TIMEOUT, answer, begin, given, hand_over, now_us, prepare_marker, top_of,
};
use super::target::{Admission, COMMIT_TIMEOUT, may_run, next, settle_in, unexpected};
use super::wire::{FromSource, FromTarget};
use crate::layout::VmRecord;
use crate::snapshot::archive;
use crate::snapshot::restore::{self, Target};
use crate::task::TaskContext;
use crate::vm::VmRuntime;

/// How long a QEMU may take to stop its guest, before it is killed: the VM is to be put back because something is wrong
/// with it.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// As source: gives the VM away to be put back on the target.
///
/// # Errors
/// Whatever fails before it was given away; it is then here as before, but for a QEMU that had to be killed.
pub(super) async fn leave(
    vm: &mut VmRuntime,
    context: &TaskContext,
    order: &Order,
    journey: &mut Journey,
) -> Result<TaskOutput, Problem> {
    let mut link = begin(vm, context, order, journey).await?;
    link.sender.say(&FromSource::PutBack).await?;
    let waiting = |message: &FromTarget| matches!(message, FromTarget::Waiting);
    answer(&mut link.messages, SLOW_ANSWER_TIMEOUT, "a machine that waits", waiting).await?;
    context.check_cancelled()?;
    let marker = prepare_marker(vm).await?;
    let top = top_of(vm)?;
    let stopped_us = hold(vm).await?;
    journey.step(MigrationEvent::GuestStopped);
    journey.step(MigrationEvent::StateLoaded);
    let running = hand_over(vm, order, marker, &mut link).await?;
    if running.is_some() {
        journey.step(MigrationEvent::GuestRunning);
    }
    let report = journey.report(vm, order, &link.sender, stopped_us, running);
    Ok(given(vm, report, top, running.is_some()).await)
}

/// Sees to it that the guest does not run here; since when, by our clock in microseconds, if it did.
async fn hold(vm: &mut VmRuntime) -> Result<Option<u64>, Problem> {
    let runs = vm.status().runs();
    if vm.process().is_none() {
        return Ok(None);
    }
    let stopped = match vm.qmp() {
        Ok(qmp) => tokio::time::timeout(STOP_TIMEOUT, qmp.call(Stop {})).await.is_ok_and(|it| it.is_ok()),
        Err(_) => false,
    };
    if !stopped {
        tracing::warn!(vm = %vm.id(), "its QEMU does not stop the guest, and is killed");
        vm.end_process().await?;
    }
    Ok(runs.then(now_us))
}

/// As target: makes the machine of the snapshot ready, and lets it run once the VM was given away.
///
/// # Errors
/// What went wrong before the guest could run here: it never did.
pub(super) async fn arrive(
    vm: &mut VmRuntime,
    admission: &Admission,
    wanted: &PutBack,
    link: &mut Link<FromSource>,
    decided: &CancellationToken,
) -> Result<(), Problem> {
    let PutBack { snapshot, new_top, paused } = wanted;
    if !admission.shared_pool {
        // In a shared pool the record is the source's, and stays so for as long as the VM is.
        let manifest = archive::read(vm.dirs()?, snapshot)?;
        let (disks, fittings) = (manifest.disks().with_tops(new_top), manifest.fittings.renewed(new_top)?);
        vm.set_vm_record(VmRecord::new(admission.definition.clone(), disks, fittings)).await?;
    }
    let target = Target { definition: &admission.definition, snapshot, new_top, paused: *paused };
    let marker = arrival::prepare(vm).await?;
    let prepared = Box::pin(restore::prepare(vm, target)).await?;
    let told = async {
        link.sender.say(&FromTarget::Waiting).await?;
        match next(link, decided, COMMIT_TIMEOUT).await? {
            FromSource::Commit => Ok(()),
            FromSource::Failed { problem } => Err(problem),
            other => Err(unexpected(&other, "a commit")),
        }
    };
    if let Err(problem) = told.await {
        prepared.abandon(vm).await;
        return Err(problem);
    }
    let run = async {
        let mut placed = prepared.take_place(vm).await.map_err(NotRunning::Never)?;
        match placed.let_go_on(vm).await.map_err(NotRunning::from) {
            Ok(running) => Ok((placed, running)),
            Err(NotRunning::Never(problem)) => Err(NotRunning::Never(placed.go_back(vm, problem).await)),
            Err(perhaps) => Err(perhaps),
        }
    };
    let placed = match arrival::let_run(marker, run).await {
        Ok((placed, running)) => {
            let at_us = running.map_or_else(now_us, berth_qmp::HostTime::epoch_us);
            // Whether the source still hears of it changes nothing.
            let _ = link.sender.say(&FromTarget::Running { at_us }).await;
            Some(placed)
        }
        Err(NotRunning::Never(problem)) => return Err(problem),
        Err(NotRunning::Perhaps(problem)) => {
            may_run(vm, link, problem).await;
            None
        }
    };
    // The VM is this host's, whatever comes.
    if let Err(problem) = settle(vm, placed).await {
        tracing::error!(vm = %vm.id(), %problem, "a VM that was put back here is not settled");
    }
    Ok(())
}

async fn settle(vm: &mut VmRuntime, placed: Option<restore::Placed>) -> Result<(), Problem> {
    settle_in(vm).await?;
    match placed {
        Some(placed) => placed.settle(vm).await.map(drop),
        None => Ok(()),
    }
}
