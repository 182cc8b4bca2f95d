//! In each step of each workflow somebody cancels, hosts stop answering, agents are restarted.

use std::sync::Arc;
use std::time::Duration;

use berth_manager::cluster::Cluster;
use berth_manager::operations::interfere::{Interference, Meddling};
use berth_model::operation::{Operation, OperationKind, OperationState};
use berth_model::{OperationId, ProblemCode};
use tokio::sync::mpsc;

use crate::agent::KINDS;
use crate::faults::{go, settle};
use crate::scenario::{Case, prepare};
use crate::world::{MortalStore, Pools, World, begin, over, quiet};

/// Says when a step is about to be done.
struct Announce {
    kind: OperationKind,
    step: &'static str,
    at: mpsc::UnboundedSender<OperationId>,
}

impl Interference for Announce {
    fn meddle(&self, operation: &Operation, step: &'static str, undoing: bool) -> Meddling {
        if operation.kind == self.kind && step == self.step && !undoing {
            let _ = self.at.send(operation.id.clone());
        }
        Meddling::None
    }
}

/// Goes through a case, and makes trouble when it comes to this step.
async fn troubled<F>(case: Case, step: &'static str, trouble: F) -> (Operation, String, String)
where
    F: AsyncFn(&World, &Arc<Cluster>, &OperationId),
{
    let world = World::new(Pools::Local).await;
    let first = world.manager_with_hosts().await;
    let request = prepare(&world, &first, case).await;
    quiet(&first).await;
    let before = world.digest(&first);
    first.shutdown().await;
    let (at, mut announced) = mpsc::unbounded_channel();
    let announce = Arc::new(Announce { kind: case.kind, step, at });
    let cluster = world.manager_on(MortalStore::immortal(&world.inner), Some(announce)).await;
    // The hosts stop at whatever they are asked from this step on, until they are let go.
    let begun = begin(&cluster, request).await.expect("a beginning").operation.expect("an operation");
    let id = announced.recv().await.expect("the step comes");
    assert_eq!(id, begun.id);
    trouble(&world, &cluster, &id).await;
    let operation = over(&cluster, &id).await;
    quiet(&cluster).await;
    settle(&world, &cluster).await;
    world.check_whole(&cluster).await;
    let after = world.digest(&cluster);
    cluster.shutdown().await;
    (operation, before, after)
}

fn hold_all(world: &World) {
    for agent in world.net.agents() {
        KINDS.iter().for_each(|kind| agent.hold(kind));
    }
}

fn release_all(world: &World) {
    world.net.agents().iter().for_each(|agent| agent.release());
}

#[tokio::test(start_paused = true)]
async fn an_operation_that_is_cancelled_in_any_step_is_undone_or_past_it() {
    for case in Case::all() {
        let plain = go(case, Pools::Local, None).await.after;
        for step in case.steps() {
            let cancel = async |world: &World, cluster: &Arc<Cluster>, id: &OperationId| {
                hold_all(world);
                tokio::time::sleep(Duration::from_millis(10)).await;
                let asked = cluster.operations.cancel(id, "tester").await;
                if let Err(problem) = asked {
                    assert_eq!(problem.code, ProblemCode::WrongState, "{problem}");
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
                release_all(world);
            };
            let (operation, before, after) = troubled(case, step.name, cancel).await;
            let what = format!("{case} cancelled in '{}'", step.name);
            match operation.state {
                OperationState::Cancelled => {
                    assert_eq!(after, before, "{what}");
                    let problem = operation.problem.expect("a reason");
                    assert_eq!(problem.message, "cancelled by tester", "{what}");
                }
                OperationState::Succeeded => assert_eq!(after, plain, "{what}"),
                state => panic!("{what}: {state:?}, {:?}", operation.problem),
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_cancel_survives_the_manager_that_took_it() {
    for case in Case::all() {
        let plain = go(case, Pools::Local, None).await.after;
        for step in case.steps() {
            let world = World::new(Pools::Local).await;
            let first = world.manager_with_hosts().await;
            let request = prepare(&world, &first, case).await;
            quiet(&first).await;
            let before = world.digest(&first);
            first.shutdown().await;
            let (at, mut announced) = mpsc::unbounded_channel();
            let announce = Arc::new(Announce { kind: case.kind, step: step.name, at });
            let second = world.manager_on(MortalStore::immortal(&world.inner), Some(announce)).await;
            begin(&second, request).await.expect("a beginning");
            let id = announced.recv().await.expect("the step comes");
            hold_all(&world);
            tokio::time::sleep(Duration::from_millis(10)).await;
            let _ = second.operations.cancel(&id, "tester").await;
            second.shutdown().await;
            // What the hosts were doing takes longer than the next manager needs to undo it.
            let third = world.manager().await;
            tokio::time::sleep(Duration::from_millis(500)).await;
            release_all(&world);
            let operation = over(&third, &id).await;
            quiet(&third).await;
            settle(&world, &third).await;
            world.check_whole(&third).await;
            let what = format!("{case} cancelled in '{}' of another manager: {operation:?}", step.name);
            match operation.state {
                OperationState::Cancelled => assert_eq!(world.digest(&third), before, "{what}"),
                OperationState::Succeeded => assert_eq!(world.digest(&third), plain, "{what}"),
                _ => panic!("{what}"),
            }
            third.shutdown().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_operation_waits_for_hosts_that_stop_answering_in_any_step() {
    for case in Case::all() {
        let plain = go(case, Pools::Local, None).await.after;
        for step in case.steps() {
            let cut = async |world: &World, cluster: &Arc<Cluster>, id: &OperationId| {
                world.net.agents().iter().for_each(|agent| agent.cut());
                // Long enough for hosts to be offline and their VMs unknown.
                tokio::time::sleep(Duration::from_secs(30)).await;
                let phase = cluster.operations.get(id).expect("an operation").progress.phase;
                let is_over = cluster.operations.get(id).expect("an operation").state.is_over();
                assert!(is_over || phase.starts_with("waiting for host h"), "{phase}");
                world.net.agents().iter().for_each(|agent| agent.mend());
            };
            let (operation, before, after) = troubled(case, step.name, cut).await;
            let what = format!("{case} with hosts cut off in '{}': {:?}", step.name, operation.problem);
            if case.gives_up_alone(step.name) {
                // The source can't reach the target either, and goes on running the guest.
                assert_eq!((operation.state, after), (OperationState::Failed, before), "{what}");
                continue;
            }
            assert_eq!(operation.state, OperationState::Succeeded, "{what}");
            assert_eq!(after, plain, "{what}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_operation_goes_on_after_agents_were_restarted_in_any_step() {
    for case in Case::all() {
        let plain = go(case, Pools::Local, None).await.after;
        for step in case.steps() {
            let restart = async |world: &World, _: &Arc<Cluster>, _: &OperationId| {
                hold_all(world);
                tokio::time::sleep(Duration::from_millis(200)).await;
                world.net.agents().iter().for_each(|agent| agent.restart());
                release_all(world);
            };
            let (operation, _, after) = troubled(case, step.name, restart).await;
            let what = format!("{case} with agents restarted in '{}': {:?}", step.name, operation.problem);
            assert_eq!(operation.state, OperationState::Succeeded, "{what}");
            assert_eq!(after, plain, "{what}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_operation_on_a_host_that_is_gone_can_be_cancelled_and_is_cleaned_up_when_it_is_back() {
    for kind in [OperationKind::VmCreate, OperationKind::VmMigrate] {
        // In both, the second host has something of the VM by then.
        let step = if kind == OperationKind::VmCreate { "start" } else { "move" };
        let gone = async |world: &World, cluster: &Arc<Cluster>, id: &OperationId| {
            world.agent(1).cut();
            tokio::time::sleep(Duration::from_secs(1)).await;
            // A migration may have given up by itself.
            let _ = cluster.operations.cancel(id, "tester").await;
            let operation = over(cluster, id).await;
            assert_ne!(operation.state, OperationState::Succeeded, "{operation:?}");
            assert!(!world.agent(1).machines().is_empty(), "the host that is gone still has it");
            world.agent(1).mend();
        };
        let (operation, before, after) = troubled(Case::of(kind), step, gone).await;
        assert_ne!(operation.state, OperationState::Succeeded, "{operation:?}");
        assert_eq!(after, before, "{kind}");
    }
}
