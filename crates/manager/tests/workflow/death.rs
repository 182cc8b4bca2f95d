//! The manager is killed after every write that it makes, and another one takes over.

use std::sync::Arc;

use berth_manager::operations::OperationRow;
use berth_manager::operations::interfere::{Interference, Meddling};
use berth_model::operation::OperationState;

use crate::faults::{Once, go, settle};
use crate::scenario::{Case, prepare};
use crate::world::{MortalStore, Pools, World, begin, quiet};

/// Kills the manager after its `writes`th write; says what is there in the end, or nothing when it did not get so far.
async fn killed_after(
    case: Case,
    writes: usize,
    interference: Option<Arc<dyn Interference>>,
) -> Option<(String, String, Option<OperationState>)> {
    let world = World::new(Pools::Local).await;
    let first = world.manager_with_hosts().await;
    let request = prepare(&world, &first, case).await;
    quiet(&first).await;
    let before = world.digest(&first);
    let earlier: Vec<String> =
        first.records.list::<OperationRow>().iter().map(|row| row.id.clone()).collect();
    first.shutdown().await;

    let store = MortalStore::dying_after(&world.inner, writes);
    let second = world.manager_on(Arc::clone(&store), interference).await;
    let work = async {
        let begun = begin(&second, request).await.expect("a beginning");
        crate::world::over(&second, &begun.operation.expect("an operation").id).await
    };
    let died = tokio::select! {
        biased;
        () = store.died() => true,
        _ = work => false,
    };
    second.shutdown().await;

    let third = world.manager().await;
    quiet(&third).await;
    settle(&world, &third).await;
    world.check_whole(&third).await;
    let rows = third.records.list::<OperationRow>();
    let state = rows.iter().find(|row| !earlier.contains(&row.id)).map(|row| row.operation.state);
    let after = world.digest(&third);
    third.shutdown().await;
    died.then_some((before, after, state))
}

#[tokio::test(start_paused = true)]
async fn an_operation_whose_manager_is_killed_at_any_write_is_finished_by_the_next() {
    for case in Case::all() {
        let plain = go(case, Pools::Local, None).await.after;
        let mut writes = 1;
        while let Some((before, after, state)) = killed_after(case, writes, None).await {
            let what = format!("{case} killed after write {writes}: {state:?}");
            match state {
                Some(OperationState::Succeeded) => assert_eq!(after, plain, "{what}"),
                // Writes that are not the operation's may come before its first one.
                None => assert_eq!(after, before, "{what}"),
                Some(_) => panic!("{what}"),
            }
            writes += 1;
            assert!(writes < 200, "{case} never ends");
        }
        assert!(writes > 3, "{case} writes down what it does");
    }
}

#[tokio::test(start_paused = true)]
async fn an_operation_whose_manager_is_killed_while_undoing_is_undone_by_the_next() {
    for case in Case::all() {
        let Some(step) = case.steps().into_iter().rfind(|step| step.has_undo) else { continue };
        let mut writes = 1;
        loop {
            let once = Once::new(case.kind, step.name, Meddling::FailBefore, Meddling::None);
            let Some((before, after, state)) = killed_after(case, writes, Some(once)).await else { break };
            let what = format!("{case} failing at '{}', killed after write {writes}: {state:?}", step.name);
            match state {
                // Killed before the failure: the next manager has nobody who interferes.
                Some(OperationState::Succeeded) => {}
                Some(_) | None => assert_eq!(after, before, "{what}"),
            }
            writes += 1;
            assert!(writes < 200, "{case} never ends");
        }
    }
}
