//! Each step of each workflow fails, panics and is repeated: nothing may remain.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use berth_manager::operations::interfere::{Interference, Meddling};
use berth_manager::operations::step::StepInfo;
use berth_model::operation::{Operation, OperationKind, OperationState};

use crate::scenario::{Case, prepare};
use crate::world::{MortalStore, Pools, World, begin, over, quiet, until};

/// Does something to a step, the first time that it comes by, and something to every undo.
pub struct Once {
    pub step: &'static str,
    pub meddling: Meddling,
    pub undo: Meddling,
    pub kind: OperationKind,
    done: Mutex<BTreeSet<(&'static str, bool)>>,
}

impl Once {
    pub fn new(kind: OperationKind, step: &'static str, meddling: Meddling, undo: Meddling) -> Arc<Self> {
        Arc::new(Self { step, meddling, undo, kind, done: Mutex::default() })
    }
}

impl Interference for Once {
    fn meddle(&self, operation: &Operation, step: &'static str, undoing: bool) -> Meddling {
        let mine = undoing || step == self.step;
        if operation.kind != self.kind || !mine || !self.done.lock().unwrap().insert((step, undoing)) {
            return Meddling::None;
        }
        if undoing { self.undo } else { self.meddling }
    }
}

/// Every step of every operation is done twice.
struct AllTwice;

impl Interference for AllTwice {
    fn meddle(&self, _operation: &Operation, _step: &'static str, _undoing: bool) -> Meddling {
        Meddling::Twice
    }
}

pub struct Outcome {
    pub operation: Operation,
    pub before: String,
    pub after: String,
}

/// A case of this kind from its beginning to its end, with somebody who interferes.
pub async fn go(case: Case, pools: Pools, interference: Option<Arc<dyn Interference>>) -> Outcome {
    let world = World::new(pools).await;
    let first = world.manager_with_hosts().await;
    let request = prepare(&world, &first, case).await;
    quiet(&first).await;
    let before = world.digest(&first);
    first.shutdown().await;
    let cluster = world.manager_on(MortalStore::immortal(&world.inner), interference).await;
    let begun = begin(&cluster, request).await.expect("a beginning");
    let operation = over(&cluster, &begun.operation.expect("an operation").id).await;
    quiet(&cluster).await;
    settle(&world, &cluster).await;
    world.check_whole(&cluster).await;
    let after = world.digest(&cluster);
    cluster.shutdown().await;
    Outcome { operation, before, after }
}

/// Waits until the hosts have been heard after the last operation.
pub async fn settle(world: &World, cluster: &berth_manager::cluster::Cluster) {
    let mut asked = Vec::new();
    for agent in world.net.agents() {
        cluster.watchers.nudge(&agent.id);
        asked.push(agent);
    }
    // Two rounds of questions: the first may have been on its way.
    tokio::time::sleep(std::time::Duration::from_secs(20)).await;
    until(cluster, "the agents are idle", |_| asked.iter().all(|agent| agent.is_idle())).await;
}

fn steps(case: Case) -> Vec<StepInfo> {
    let steps = case.steps();
    assert!(!steps.is_empty(), "{case} has steps");
    steps
}

#[tokio::test(start_paused = true)]
async fn every_workflow_succeeds_alike_when_each_step_is_done_twice() {
    for case in Case::all() {
        for pools in [Pools::Local, Pools::Shared] {
            let plain = go(case, pools, None).await;
            assert_eq!(plain.operation.state, OperationState::Succeeded, "{case}: {:?}", plain.operation);
            let twice = go(case, pools, Some(Arc::new(AllTwice))).await;
            assert_eq!(twice.operation.state, OperationState::Succeeded, "{case}: {:?}", twice.operation);
            assert_eq!(plain.after, twice.after, "{case} with {pools:?} pools");
            // A restart leaves everything as it was, and what an export does is in the repository.
            let leaves = matches!(case.kind, OperationKind::VmRestart | OperationKind::SnapshotExport);
            assert!(leaves || plain.before != plain.after, "{case} did something");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_step_that_fails_leaves_everything_as_it_was_or_is_done_in_the_end() {
    for case in Case::all() {
        let plain = go(case, Pools::Local, None).await.after;
        let mut past_return = false;
        for step in steps(case) {
            for meddling in [Meddling::FailBefore, Meddling::FailAfter, Meddling::Panic] {
                for undo in [Meddling::None, Meddling::Twice, Meddling::FailBefore, Meddling::FailAfter] {
                    // What was done and can't be taken back has not failed.
                    let beyond = step.no_return && meddling == Meddling::FailAfter;
                    if beyond || (past_return && undo != Meddling::None) {
                        continue;
                    }
                    let once = Once::new(case.kind, step.name, meddling, undo);
                    let end = go(case, Pools::Local, Some(once)).await;
                    let what = format!("{case} with '{}' {meddling:?}, undo {undo:?}", step.name);
                    if past_return {
                        assert_eq!(end.operation.state, OperationState::Succeeded, "{what}");
                        assert_eq!(end.after, plain, "{what}");
                    } else {
                        assert_eq!(end.operation.state, OperationState::Failed, "{what}");
                        assert_eq!(end.after, end.before, "{what}");
                    }
                }
            }
            past_return |= step.no_return;
        }
    }
}
