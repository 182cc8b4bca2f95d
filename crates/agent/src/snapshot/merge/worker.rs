//! Merging in the background: beside the VM's owner, who is only bothered to carry out what has been prepared.
//!
//! After each piece of work the owner has the layers looked at. When some are to be merged, they are read and the new
//! layer is written by a task of its own, which changes nothing that anybody sees. Then the owner, between two pieces of
//! work, makes sure that what was prepared is still wanted, and carries it out.

use std::time::Duration;

use berth_model::Problem;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::throttle::Throttle;
use super::{Ground, Merge};
use crate::disk::pace::Pace;
use crate::durable;
use crate::vm::VmRuntime;

/// After how long a merge that failed is tried again: a full disk may have room then.
const TRY_AGAIN: Duration = Duration::from_secs(60);

/// What became of a look at the layers.
#[derive(Debug)]
pub struct Outcome {
    serial: u64,
    found: Result<Option<Merge>, Problem>,
}

/// Prepares a VM's merges, one at a time.
#[derive(Debug)]
pub struct Worker {
    present: Option<Present>,
    serial: u64,
    /// Something was done since the layers were looked at last.
    changed: bool,
    outcomes: mpsc::UnboundedSender<Outcome>,
}

#[derive(Debug)]
struct Present {
    pace: Pace,
    task: AbortHandle,
}

impl Drop for Present {
    fn drop(&mut self) {
        self.task.abort();
        self.pace.break_off();
    }
}

impl Worker {
    /// One that has nothing to do yet, and where what it has done is told.
    pub fn new() -> (Self, mpsc::UnboundedReceiver<Outcome>) {
        let (outcomes, done) = mpsc::unbounded_channel();
        (Self { present: None, serial: 0, changed: true, outcomes }, done)
    }

    /// Work is about to be done on the VM: until [`Self::go_on`], the disk is left to it.
    pub fn make_way(&self) {
        if let Some(present) = &self.present {
            present.pace.hold(true);
        }
    }

    /// The work is done; the layers may be others now.
    pub fn go_on(&mut self, vm: &VmRuntime) {
        self.changed = true;
        if let Some(present) = &self.present {
            present.pace.hold(false);
        }
        self.look(vm);
    }

    /// Breaks off what is being prepared: the VM is about to leave, or is gone.
    pub fn break_off(&mut self) {
        self.present = None;
    }

    /// Begins to prepare a merge, if there is one to be done.
    pub fn look(&mut self, vm: &VmRuntime) {
        if self.present.is_some() || !self.changed {
            return;
        }
        let Some(ground) = Ground::of(vm) else { return };
        self.changed = false;
        self.serial += 1;
        let (serial, outcomes, pace) = (self.serial, self.outcomes.clone(), Pace::new(0));
        let (qmp, kept) = (vm.qmp().ok().cloned(), pace.clone());
        let task = tokio::spawn(async move {
            let found = prepare(&ground, qmp, &kept).await;
            if let Err(problem) = &found {
                tracing::warn!(vm = %ground.vm(), %problem, "layers could not be merged");
                tokio::time::sleep(TRY_AGAIN).await;
            }
            // The owner may be gone: then the agent is ending.
            let _ = outcomes.send(Outcome { serial, found });
        });
        self.present = Some(Present { pace, task: task.abort_handle() });
    }

    /// Carries out what was prepared, and looks for more.
    pub async fn take(&mut self, vm: &mut VmRuntime, outcome: Outcome) {
        if outcome.serial == self.serial && self.present.is_some() {
            self.present = None;
            self.changed |= outcome.found.is_err();
            if let Ok(Some(merge)) = outcome.found {
                self.changed = true;
                if let Err(problem) = super::carry_out(vm, &merge).await {
                    tracing::warn!(vm = %vm.id(), %problem, "layers that were merged could not be put in place");
                    // Tried again with the next change of the VM's, and not in a circle.
                    self.changed = false;
                }
            }
        } else if let (Ok(Some(merge)), Ok(dirs)) = (outcome.found, vm.dirs()) {
            // Nobody wants it any more.
            if let Err(error) = durable::remove_file(&dirs.unfinished_layer(&merge.result)) {
                tracing::warn!(vm = %vm.id(), %error, "a merged layer stays behind");
            }
        }
        self.look(vm);
    }
}

async fn prepare(
    ground: &Ground,
    qmp: Option<berth_qmp::Qmp>,
    pace: &Pace,
) -> Result<Option<Merge>, Problem> {
    let Some(chosen) = ground.choose(0).await? else { return Ok(None) };
    let throttle = Throttle::learn(qmp).await;
    pace.set(throttle.first_pace());
    tokio::select! {
        merged = ground.merge(chosen, pace) => merged.map(Some),
        () = throttle.run(pace) => Ok(None),
    }
}
