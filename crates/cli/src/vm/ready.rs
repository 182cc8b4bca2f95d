//! Waiting for a VM that was just made: until it runs, until its guest says that it is ready, until its baseline is
//! there.
//!
//! The baseline is taken by the manager itself, in an operation of its own; while one is going on it is followed, so
//! that its progress is seen, and in between the VM is asked how it is.

use std::time::{Duration, Instant};

use berth_api::endpoint::Nothing;
use berth_api::manager::VmShow;
use berth_model::vm::{GuestState, Vm, VmState};
use berth_model::{Problem, ProblemCode};

use crate::exit::Failure;
use crate::lookup::VmRef;
use crate::session::Session;
use crate::wait;

/// How often the VM is asked. More often buys nothing that a person sees.
const INTERVAL: Duration = Duration::from_millis(200);
/// How long the manager may take to begin the baseline of a guest that is ready.
const BASELINE_BEGINS_WITHIN: Duration = Duration::from_secs(60);

/// What to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Goal {
    /// Until it runs.
    Running,
    /// Until its guest says that it is ready.
    Ready,
    /// Until its baseline is there.
    Baseline,
}

/// Waits, and gives the VM as it is then.
///
/// # Errors
/// When it is not so in time, or can't be any more: why.
pub async fn wait_for(session: &Session, vm: &VmRef, goal: Goal) -> Result<Vm, Failure> {
    let begun = Instant::now();
    let mut ready_since: Option<Instant> = None;
    loop {
        let now = session.ask::<VmShow>(&vm.path(), &Nothing {}).await?;
        if is_there(&now, goal) {
            return Ok(now);
        }
        if let Some(reason) = hopeless(&now) {
            return Err(never(&now, goal, &reason));
        }
        if now.status.guest == GuestState::Ready {
            ready_since.get_or_insert_with(Instant::now);
        }
        let timeout = Duration::from_secs(now.spec.ready_timeout_s.into());
        let late = match ready_since {
            Some(since) => since.elapsed() > BASELINE_BEGINS_WITHIN,
            None => begun.elapsed() > timeout,
        };
        match &now.status.operation {
            Some(operation) => follow(session, operation).await?,
            // The manager writes down why there is none only when it has given up for the time being.
            None if late || (goal == Goal::Baseline && now.status.baseline_note.is_some()) => {
                return Err(never(&now, goal, &why(&now)));
            }
            None => tokio::time::sleep(INTERVAL).await,
        }
    }
}

async fn follow(session: &Session, operation: &berth_model::OperationId) -> Result<(), Failure> {
    // How it ends shows in the VM; a failed baseline is tried again by the manager, and has its note.
    match wait::show(session, operation).await {
        Ok(operation) if !operation.state.is_over() => wait::to_end(session, operation).await.map(drop),
        Ok(_) | Err(_) => {
            tokio::time::sleep(INTERVAL).await;
            Ok(())
        }
    }
}

fn is_there(vm: &Vm, goal: Goal) -> bool {
    match goal {
        Goal::Running => true,
        Goal::Ready => vm.status.guest == GuestState::Ready,
        Goal::Baseline => vm.status.baseline.is_some(),
    }
}

/// Why the goal can't be reached any more, if it can't.
fn hopeless(vm: &Vm) -> Option<String> {
    if vm.status.guest == GuestState::Panicked {
        return Some("its kernel has panicked".to_owned());
    }
    match vm.status.state {
        VmState::Stopped | VmState::Paused => Some(match &vm.status.trouble {
            Some(trouble) => format!("it is {}: {trouble}", vm.status.state),
            None => format!("it is {}", vm.status.state),
        }),
        VmState::Starting | VmState::Running | VmState::Migrating | VmState::Unknown => None,
    }
}

fn why(vm: &Vm) -> String {
    if let Some(note) = &vm.status.baseline_note {
        return note.clone();
    }
    match vm.status.guest {
        GuestState::Ready => "its guest is ready, and no snapshot was begun".to_owned(),
        _ => format!("its guest has not said within {} s that it is ready", vm.spec.ready_timeout_s),
    }
}

fn never(vm: &Vm, goal: Goal, reason: &str) -> Failure {
    let name = vm.full_name();
    let what = match goal {
        Goal::Running => "it does not run",
        Goal::Ready => "its guest is not ready",
        Goal::Baseline => "no baseline yet",
    };
    let message = format!("{name} is made, but {what}: {reason}; look at it with 'berth vm console {name}'");
    Problem::new(ProblemCode::Guest, message).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{self, Fake};

    #[tokio::test]
    async fn a_guest_that_dies_is_not_waited_for() {
        let mut vm = fake::vm("books");
        vm.status.guest = GuestState::Panicked;
        let fake = Fake::new().answer("GET /v1/vms/default%2Fbooks", &vm);
        let failed = wait_for(&fake.session(), &"books".parse().expect("name"), Goal::Baseline).await;
        let failure = failed.expect_err("no baseline");
        assert_eq!(failure.code(), 1);
        let message = &failure.problem().expect("a problem").message;
        assert!(message.contains("no baseline yet: its kernel has panicked"), "{message}");
    }

    #[tokio::test(start_paused = true)]
    async fn the_baseline_is_waited_for_after_the_guest_is_ready() {
        let mut booting = fake::vm("books");
        booting.status.guest = GuestState::Booting;
        let ready = fake::vm("books");
        let mut there = fake::vm("books");
        there.status.baseline = Some(berth_model::SnapshotId::from_entropy([1; 10]));
        let route = "GET /v1/vms/default%2Fbooks";
        let fake = Fake::new().answer(route, &booting).answer(route, &ready).answer(route, &there);
        let vm =
            wait_for(&fake.session(), &"books".parse().expect("name"), Goal::Baseline).await.expect("there");
        assert_eq!(vm.status.baseline, there.status.baseline);
        assert_eq!(fake.asked().len(), 3);
    }
}
