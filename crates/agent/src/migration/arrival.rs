//! The target's word on whether a guest that came has run here, and what follows from it.
//!
//! One command lets the guest run, and a QEMU may die before it answers, or its agent before it writes the answer down.
//! What the guest did meanwhile is on its disk; the source's memory is older than that. So before the command is sent, a
//! marker says that it will be ([`Deed::ToldToRun`]), and from then on the VM is this host's:
//!
//! | the marker | what it means | what may be done |
//! |---|---|---|
//! | clear | the guest was never told to run, or QEMU refused | what came may be thrown away; the source may take the VM back |
//! | set | it may have run, and the source gave it away | the VM is this host's, in whatever state: crashed, if its QEMU is gone |
//! | lost | the machine went down while the VM was being loaded | in a shared pool: if the source gave it away, as if set; otherwise as if clear |
//!
//! A VM that may have run is never thrown away here and never goes on at the source; its disk is as after a power cut, and
//! a snapshot is there to restore. Only a QEMU that refuses the command proves that the guest did not run, and only the
//! first time: one that did run may refuse as well.
//!
//! Whether the source gave it away the manager knows, who has asked: it says so with `TakeOver` or `RefuseMigration`. In a
//! pool of this host's own, a lost marker is no reason to keep the VM. What came may not be whole, and the source's disk
//! and memory still fit each other; if the guest did run here, then for the milliseconds until the host's record said so.
//! A set marker is one also there: everything was on this host's disk before the source gave the VM away.

use berth_api::agent::MigrationSide;
use berth_model::Problem;
use berth_qmp::QmpError;

use super::incoming::IncomingError;
use super::marker::{self, Deed, Mark, Marker};
use super::target::Admission;
use crate::durable::{self, blocking};
use crate::vm::VmRuntime;

/// Why it is not certain that a guest runs that was told to.
#[derive(Debug)]
pub enum NotRunning {
    /// It has not run: it was not told to, or QEMU refused. The marker is clear.
    Never(Problem),
    /// It may have run: the VM is this host's.
    Perhaps(Problem),
}

impl From<IncomingError> for NotRunning {
    fn from(error: IncomingError) -> Self {
        match error {
            refusal @ IncomingError::Qmp(QmpError::Command { .. }) => Self::Never(refusal.into()),
            error => Self::Perhaps(error.into()),
        }
    }
}

/// Prepares the marker. To be done before the source stops the guest: it waits for the disk.
///
/// # Errors
/// When it can't be written.
pub async fn prepare(vm: &VmRuntime) -> Result<Marker, Problem> {
    let state = vm.dirs()?.state.clone();
    blocking(move || Ok(Marker::prepare(&state, Deed::ToldToRun)?)).await
}

/// What is known of whether the guest has run here, as it counts: see the table.
///
/// # Errors
/// When it can't be found out.
pub async fn mark(vm: &VmRuntime) -> Result<Mark, Problem> {
    let state = vm.dirs()?.state.clone();
    let mark = blocking(move || Ok(marker::read(&state, Deed::ToldToRun)?)).await?;
    let own_pool = || Ok::<_, Problem>(Admission::read(vm)?.is_some_and(|admission| !admission.shared_pool));
    Ok(if mark == Mark::Lost && own_pool()? { Mark::Clear } else { mark })
}

/// Takes the marker off the disk.
///
/// # Errors
/// When it can't be removed.
pub async fn forget(vm: &VmRuntime) -> Result<(), Problem> {
    let state = vm.dirs()?.state.clone();
    blocking(move || Ok(marker::remove(&state, Deed::ToldToRun)?)).await
}

/// Lets a guest run that never did: sets the marker, then does what `run` does.
///
/// # Errors
/// See [`NotRunning`].
pub async fn let_run<T, E: Into<NotRunning>>(
    marker: Marker,
    run: impl Future<Output = Result<T, E>>,
) -> Result<T, NotRunning> {
    let (marker, set) = blocking(move || {
        let set = marker.set();
        Ok((marker, set))
    })
    .await
    .map_err(NotRunning::Never)?;
    let refusal = match set {
        Ok(()) => match run.await.map_err(Into::into) {
            Ok(running) => return Ok(running),
            Err(NotRunning::Never(refusal)) => refusal,
            Err(perhaps) => return Err(perhaps),
        },
        Err(error) => error.into(),
    };
    // A marker that stays keeps the VM here: it is told to run again, which is no harm.
    if let Err(problem) = blocking(move || Ok(marker.clear()?)).await {
        tracing::error!(%problem, "the marker that the guest was told to run can't be taken back");
    }
    Err(NotRunning::Never(refusal))
}

/// Ends the process that waited and removes the files that came, unless they are the source's too. The guest must not
/// have run here.
///
/// # Errors
/// When the process does not end, or something can't be removed.
pub async fn remove(vm: &mut VmRuntime, shared_pool: bool) -> Result<(), Problem> {
    vm.end_process().await?;
    if !shared_pool {
        let directory = vm.dirs()?.disk.clone();
        blocking(move || Ok(durable::remove_tree(&directory)?)).await?;
        vm.drop_vm_record()?;
    }
    if let Some(MigrationSide::Target { migration, loaded: true }) = vm.host_record()?.migration.clone() {
        vm.set_migration(Some(MigrationSide::Target { migration, loaded: false })).await?;
    }
    forget(vm).await
}
