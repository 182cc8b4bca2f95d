//! Promises about changing records.

use std::sync::Arc;

use bytes::Bytes;

use super::{Subject, put, within};
use crate::error::Error;
use crate::limits::{KEY_BYTES_MAX, OPERATIONS_MAX, TRANSACTION_BYTES_MAX, VALUE_BYTES_MAX};
use crate::store::{Condition, Operation, Query, Revision, Store};

/// Nothing is made up.
pub async fn a_key_that_was_never_put_is_absent(subject: Subject) {
    put(&*subject.store, "/a", "1").await;
    for key in ["/", "/b", "/a/", "/a/b", "a"] {
        assert_eq!(subject.store.get(key).await.unwrap(), None, "{key}");
    }
}

/// Value and numbers are what was written, now and after it was written again.
pub async fn a_put_is_read_back_with_where_it_stands_in_history(subject: Subject) {
    let store = &*subject.store;
    let first = put(store, "/a", "one").await;
    put(store, "/b", "other").await;
    let third = put(store, "/a", "three").await;
    let entry = store.get("/a").await.unwrap().expect("it was put");
    assert_eq!((&*entry.key, &entry.value[..]), ("/a", &b"three"[..]));
    assert_eq!((entry.create_revision, entry.mod_revision, entry.version), (first, third, 2));
    assert_eq!(entry.lease, None);
    assert_eq!(store.revision().await.unwrap(), third);
}

/// However many keys it changes, a transaction is one step.
pub async fn a_transaction_has_one_revision_and_adds_one(subject: Subject) {
    let store = &*subject.store;
    let before = put(store, "/b", "x").await;
    let operations = vec![Operation::put("/a", "1"), Operation::delete("/b"), Operation::put("/c", "3")];
    let revision = store.transact(Vec::new(), operations).await.unwrap();
    assert_eq!(revision, before.next());
    let page = store.list(Query::prefix("/")).await.unwrap();
    let found: Vec<_> = page.entries.iter().map(|entry| (&*entry.key, entry.mod_revision)).collect();
    assert_eq!(found, [("/a", revision), ("/c", revision)]);
    assert_eq!(page.revision, revision);
}

/// Deletes of nothing, conditions alone, and failures leave the revision where it is.
pub async fn what_changes_nothing_makes_no_revision(subject: Subject) {
    let store = &*subject.store;
    let revision = put(store, "/a", "1").await;
    assert_eq!(store.delete("/none").await.unwrap(), revision);
    assert_eq!(store.transact(Vec::new(), Vec::new()).await.unwrap(), revision);
    let holds = vec![Condition::unchanged("/a", revision), Condition::absent("/none")];
    assert_eq!(store.transact(holds, Vec::new()).await.unwrap(), revision);
    store.transact(vec![Condition::absent("/a")], vec![Operation::put("/b", "")]).await.unwrap_err();
    assert_eq!(store.revision().await.unwrap(), revision);
    assert_eq!(put(store, "/a", "1").await, revision.next(), "the same value again is a change");
}

/// Nothing of a key's former life is left.
pub async fn a_deleted_key_starts_afresh(subject: Subject) {
    let store = &*subject.store;
    let first = put(store, "/a", "1").await;
    put(store, "/a", "2").await;
    store.delete("/a").await.unwrap();
    assert_eq!(store.get("/a").await.unwrap(), None);
    let error = store.transact(vec![Condition::unchanged("/a", first)], vec![]).await.unwrap_err();
    assert!(matches!(error, Error::Conflict { found: Revision::ABSENT, .. }), "{error}");
    let again = put(store, "/a", "3").await;
    let entry = store.get("/a").await.unwrap().expect("it was put");
    assert_eq!((entry.create_revision, entry.mod_revision, entry.version), (again, again, 1));
}

/// Also when other conditions hold, and whatever the operations are.
pub async fn a_condition_that_fails_changes_nothing_and_says_what_was_found(subject: Subject) {
    let store = &*subject.store;
    let old = put(store, "/a", "1").await;
    let new = put(store, "/a", "2").await;
    let before = store.list(Query::prefix("")).await.unwrap();
    for (condition, found) in [
        (Condition::unchanged("/a", old), new),
        (Condition::absent("/a"), new),
        (Condition::unchanged("/a", Revision(u64::MAX)), new),
        (Condition::unchanged("/b", new), Revision::ABSENT),
    ] {
        let conditions = vec![Condition::unchanged("/a", new), condition.clone()];
        let operations = vec![Operation::put("/c", "3"), Operation::delete("/a")];
        match store.transact(conditions, operations).await {
            Err(Error::Conflict { key, expected, found: was }) => {
                assert_eq!((key, expected, was), (condition.key, condition.mod_revision, found));
            }
            other => panic!("{condition:?} gave {other:?}"),
        }
    }
    assert_eq!(store.list(Query::prefix("")).await.unwrap(), before);
}

/// In the order in which they were given.
pub async fn the_first_of_several_failing_conditions_is_named(subject: Subject) {
    let store = &*subject.store;
    put(store, "/a", "1").await;
    put(store, "/z", "1").await;
    let conditions = ["/none", "/z", "/a"].map(Condition::absent).to_vec();
    let error = store.transact(conditions, Vec::new()).await.unwrap_err();
    assert!(matches!(&error, Error::Conflict { key, .. } if key == "/z"), "{error}");
}

/// Which of them would have counted is anybody's guess.
pub async fn a_key_named_by_two_operations_is_refused(subject: Subject) {
    let store = &*subject.store;
    for second in [Operation::put("/a", "2"), Operation::delete("/a")] {
        let error = store.transact(Vec::new(), vec![Operation::put("/a", "1"), second]).await.unwrap_err();
        assert!(matches!(error, Error::Invalid { field: "operations", .. }), "{error}");
    }
    assert_eq!(store.get("/a").await.unwrap(), None);
}

/// Each limit, each verb that it bounds.
pub async fn input_beyond_the_limits_is_refused_and_changes_nothing(subject: Subject) {
    let store = &*subject.store;
    let before = store.revision().await.unwrap();
    let long = "k".repeat(KEY_BYTES_MAX + 1);
    for key in ["", "/a\0b", &*long] {
        refused("key", store.get(key).await);
        refused("key", store.put(key, Bytes::new()).await);
        refused("key", store.delete(key).await);
        refused("key", store.transact(vec![Condition::absent(key)], Vec::new()).await);
        refused("key", store.list(Query::prefix("/").after(key)).await);
    }
    for prefix in ["/a\0b", &*long] {
        refused("prefix", store.list(Query::prefix(prefix)).await);
        refused("prefix", within("a refusal", store.watch(prefix, before.next()).next()).await.unwrap());
    }
    refused("limit", store.list(Query::prefix("/").limit(0)).await);
    refused("value", store.put("/a", vec![0; VALUE_BYTES_MAX + 1].into()).await);
    let many = || (0..=OPERATIONS_MAX).map(|n| format!("/{n}"));
    refused("operations", store.transact(Vec::new(), many().map(Operation::delete).collect()).await);
    refused("conditions", store.transact(many().map(Condition::absent).collect(), Vec::new()).await);
    let half = Bytes::from(vec![0; TRANSACTION_BYTES_MAX / 2]);
    let heavy = vec![Operation::put("/a", half.clone()), Operation::put("/b", half)];
    refused("operations", store.transact(Vec::new(), heavy).await);
    refused("ttl", store.grant_lease(std::time::Duration::ZERO).await);
    refused("ttl", store.grant_lease(std::time::Duration::MAX).await);
    assert_eq!(store.revision().await.unwrap(), before);
}

fn refused<T: std::fmt::Debug>(expected: &str, result: Result<T, Error>) {
    match result {
        Err(Error::Invalid { field, .. }) if field == expected => {}
        other => panic!("expected {expected} to be refused, got {other:?}"),
    }
}

/// What is allowed works.
pub async fn input_at_the_limits_is_kept(subject: Subject) {
    let store = &*subject.store;
    let long = format!("/{}", "k".repeat(KEY_BYTES_MAX - 1));
    let large: Bytes = (0..VALUE_BYTES_MAX).map(|n| (n % 251) as u8).collect();
    store.put(&long, large.clone()).await.unwrap();
    assert_eq!(store.get(&long).await.unwrap().expect("it was put").value, large);
    let odd = "/\u{1}\u{10ffff}ü\u{301}\n'\"%_*";
    store.put(odd, Bytes::new()).await.unwrap();
    assert!(store.get(odd).await.unwrap().expect("it was put").value.is_empty());
    let keys: Vec<String> = (0..OPERATIONS_MAX).map(|n| format!("/many/{n:03}")).collect();
    let conditions = keys.iter().map(Condition::absent).collect();
    let operations = keys.iter().map(|key| Operation::put(key, "x")).collect();
    store.transact(conditions, operations).await.unwrap();
    let page = store.list(Query::prefix("/many/")).await.unwrap();
    assert!(page.entries.iter().map(|entry| &entry.key).eq(&keys));
}

/// Compare-and-set is all that is needed to count.
pub async fn a_counter_incremented_by_many_tasks_loses_nothing(subject: Subject) {
    const TASKS: u64 = 16;
    const STEPS: u64 = 25;
    let before = subject.store.revision().await.unwrap();
    let tasks: Vec<_> = (0..TASKS).map(|_| tokio::spawn(increment(subject.store.clone(), STEPS))).collect();
    for task in tasks {
        within("all increments", task).await.expect("a task does not panic");
    }
    let entry = subject.store.get("/counter").await.unwrap().expect("it was counted up");
    assert_eq!(&entry.value[..], (TASKS * STEPS).to_string().as_bytes());
    assert_eq!(entry.version, TASKS * STEPS);
    assert_eq!(entry.mod_revision, Revision(before.0 + TASKS * STEPS), "lost races made no revisions");
}

async fn increment(store: Arc<dyn Store>, steps: u64) {
    let mut done = 0;
    while done < steps {
        let entry = store.get("/counter").await.unwrap();
        let (revision, value) = entry.map_or((Revision::ABSENT, 0), |entry| {
            let text = std::str::from_utf8(&entry.value).expect("a number was written");
            (entry.mod_revision, text.parse::<u64>().expect("a number was written"))
        });
        let condition = Condition::unchanged("/counter", revision);
        let operation = Operation::put("/counter", (value + 1).to_string());
        match store.transact(vec![condition], vec![operation]).await {
            Ok(_) => done += 1,
            Err(Error::Conflict { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

/// A reader sees a transaction whole or not at all.
pub async fn transfers_are_never_seen_half_done(subject: Subject) {
    let writer = subject.store.clone();
    let transfers = tokio::spawn(async move {
        for step in 0..200u32 {
            let operations = vec![
                Operation::put("/accounts/a", (1000 - step).to_string()),
                Operation::put("/accounts/b", step.to_string()),
            ];
            writer.transact(Vec::new(), operations).await.unwrap();
        }
    });
    while !transfers.is_finished() {
        let page = subject.store.list(Query::prefix("/accounts/")).await.unwrap();
        let amount = |bytes: &Bytes| std::str::from_utf8(bytes).unwrap().parse::<u32>().unwrap();
        let sum: u32 = page.entries.iter().map(|entry| amount(&entry.value)).sum();
        assert!(page.entries.is_empty() || sum == 1000, "at {}: {:?}", page.revision, page.entries);
    }
    transfers.await.expect("all transfers were made");
}

/// Names can be taken.
pub async fn only_one_of_many_creators_wins(subject: Subject) {
    let creators: Vec<_> = (0..16)
        .map(|who: u32| {
            let store = subject.store.clone();
            tokio::spawn(async move {
                let operation = Operation::put("/name", who.to_string());
                store.transact(vec![Condition::absent("/name")], vec![operation]).await.map(|_| who)
            })
        })
        .collect();
    let mut winners = Vec::new();
    for creator in creators {
        match creator.await.expect("a task does not panic") {
            Ok(who) => winners.push(who),
            Err(error) => assert!(matches!(error, Error::Conflict { .. }), "{error}"),
        }
    }
    let entry = subject.store.get("/name").await.unwrap().expect("somebody won");
    assert_eq!(winners.iter().map(u32::to_string).collect::<String>().as_bytes(), &entry.value[..]);
}
