//! Random histories give the same answers in memory and in SQLite.
//!
//! The two drivers share no code but the limits, so what they agree on is what the contract says, or the same mistake
//! made twice.

use std::sync::Arc;
use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;

use crate::store::{Condition, LeaseId, Operation, Query, Revision, Store};
use crate::{ManualClock, MemoryStore, SqliteStore};

/// Few keys, so that they meet; some of them prefixes of others.
const KEYS: &[&str] = &["/a", "/a/", "/a/b", "/a0", "/ä", "/b"];

/// What an operation writes, and under which lease; nothing to delete.
type Written = Option<(u8, Option<u64>)>;

/// One step of a history. Revisions are told as distances back from the newest, so that most of them make sense.
#[derive(Clone, Debug)]
enum Step {
    Transact(Vec<(usize, Guess)>, Vec<(usize, Written)>),
    Compact(u64),
    Grant(u64),
    KeepAlive(u64),
    Revoke(u64),
    Pass(u64),
    Reopen,
    Get(usize),
    List { prefix: usize, after: Option<usize>, limit: Option<usize>, back: Option<u64> },
    Watch { prefix: usize, back: u64 },
}

/// What a condition says of a key.
#[derive(Clone, Debug)]
enum Guess {
    Right,
    Absent,
    Back(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let key = 0..KEYS.len();
    let lease = 1..6u64;
    let guess =
        prop_oneof![8 => Just(Guess::Right), 1 => Just(Guess::Absent), 1 => (0..4u64).prop_map(Guess::Back)];
    let value =
        proptest::option::weighted(0.75, (any::<u8>(), proptest::option::weighted(0.3, lease.clone())));
    let transact = (vec((key.clone(), guess), 0..3), vec((key.clone(), value), 0..4));
    let list = (
        key.clone(),
        proptest::option::of(key.clone()),
        proptest::option::of(0..5usize),
        proptest::option::of(0..9u64),
    );
    let step = prop_oneof![
        12 => transact.prop_map(|(conditions, operations)| Step::Transact(conditions, operations)),
        3 => (0..8u64).prop_map(Step::Compact),
        2 => (1..5u64).prop_map(Step::Grant),
        2 => lease.clone().prop_map(Step::KeepAlive),
        1 => lease.prop_map(Step::Revoke),
        2 => (1..4u64).prop_map(Step::Pass),
        1 => Just(Step::Reopen),
        2 => key.clone().prop_map(Step::Get),
        6 => list.prop_map(|(prefix, after, limit, back)| Step::List { prefix, after, limit, back }),
        4 => (key, 0..12u64).prop_map(|(prefix, back)| Step::Watch { prefix, back }),
    ];
    vec(step, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_histories_give_the_same_answers_in_memory_and_in_sqlite(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build().unwrap();
        runtime.block_on(compare(steps))?;
    }
}

async fn compare(steps: Vec<Step>) -> Result<(), TestCaseError> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let clock = ManualClock::new();
    let memory = MemoryStore::new(Arc::new(clock.clone()));
    let mut sqlite = SqliteStore::open(&path, Arc::new(clock.clone())).await.unwrap();
    for (number, step) in steps.iter().enumerate() {
        if let Step::Pass(seconds) = step {
            clock.advance(Duration::from_secs(*seconds));
        }
        if let Step::Reopen = step {
            // Leases start afresh with a reopened store; do the same to those of the other.
            for id in 1..100 {
                let _ = memory.keep_lease_alive(LeaseId(id)).await;
            }
            sqlite.close().await;
            sqlite = SqliteStore::open(&path, Arc::new(clock.clone())).await.unwrap();
        }
        let (expected, found) = (play(&memory, step).await, play(&sqlite, step).await);
        prop_assert_eq!(expected, found, "step {} of {:#?}", number, steps);
    }
    sqlite.close().await;
    Ok(())
}

/// What a store answers to a step, as text.
async fn play(store: &dyn Store, step: &Step) -> String {
    // An empty transaction, before which leases that are over must have ended in any driver of ours.
    let head = store.transact(Vec::new(), Vec::new()).await.unwrap();
    let back = |distance: u64| Revision(head.0.saturating_sub(distance));
    match step {
        Step::Transact(conditions, operations) => {
            let conditions = guesses(store, head, conditions).await;
            let operations = operations.iter().map(|(key, value)| operation(KEYS[*key], value)).collect();
            format!("{:?}", store.transact(conditions, operations).await)
        }
        Step::Compact(distance) => format!("{:?}", store.compact(back(*distance)).await),
        Step::Grant(seconds) => format!("{:?}", store.grant_lease(Duration::from_secs(*seconds)).await),
        Step::KeepAlive(id) => format!("{:?}", store.keep_lease_alive(LeaseId(*id)).await),
        Step::Revoke(id) => format!("{:?}", store.revoke_lease(LeaseId(*id)).await),
        Step::Pass(_) | Step::Reopen => format!("{:?}", store.list(Query::prefix("")).await),
        Step::Get(key) => format!("{:?}", store.get(KEYS[*key]).await),
        Step::List { prefix, after, limit, back: distance } => {
            let mut query = Query::prefix(KEYS[*prefix]);
            query.after = after.map(|key| KEYS[key].to_owned());
            query.limit = *limit;
            query.at = distance.map(back);
            format!("{:?}", store.list(query).await)
        }
        Step::Watch { prefix, back: distance } => watched(store, KEYS[*prefix], back(*distance), head).await,
    }
}

async fn guesses(store: &dyn Store, head: Revision, conditions: &[(usize, Guess)]) -> Vec<Condition> {
    let mut made = Vec::new();
    for (key, guess) in conditions {
        let revision = match guess {
            Guess::Right => {
                store.get(KEYS[*key]).await.unwrap().map_or(Revision::ABSENT, |entry| entry.mod_revision)
            }
            Guess::Absent => Revision::ABSENT,
            Guess::Back(distance) => Revision(head.0.saturating_sub(*distance)),
        };
        made.push(Condition::unchanged(KEYS[*key], revision));
    }
    made
}

fn operation(key: &str, value: &Written) -> Operation {
    match value {
        None => Operation::delete(key),
        Some((value, None)) => Operation::put(key, vec![*value]),
        Some((value, Some(lease))) => Operation::put_leased(key, vec![*value], LeaseId(*lease)),
    }
}

/// All that a watch shows up to the newest revision.
async fn watched(store: &dyn Store, prefix: &str, from: Revision, head: Revision) -> String {
    // The end is not visible under a prefix, so the whole is watched and the part compared with it.
    let mut whole = store.watch("", from);
    let mut part = store.watch(prefix, from);
    let mut shown = String::new();
    let mut last = Revision::ABSENT;
    while last < head && from <= head && head > Revision::EMPTY_STORE {
        match whole.next().await {
            Some(Ok(commit)) => {
                last = commit.revision;
                shown += &format!("{commit:?}\n");
                if let Some(expected) = crate::watch::matching(&commit, prefix) {
                    assert_eq!(part.next().await.unwrap().unwrap(), expected);
                }
            }
            end => return format!("{shown}{end:?}"),
        }
    }
    shown
}
