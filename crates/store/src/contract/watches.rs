//! Promises about watching: in order, without gaps, each once.

use std::time::Duration;

use super::{Subject, next, put, shown, within};
use crate::error::Error;
use crate::store::{Condition, Operation, Query, Revision};

/// What was before the watch and what comes after it join up.
pub async fn a_watch_shows_the_past_then_the_present_without_a_gap(subject: Subject) {
    let store = &*subject.store;
    put(store, "/w/0", "before").await;
    let start = store.revision().await.unwrap();
    put(store, "/w/a", "1").await;
    store.delete("/w/a").await.unwrap();
    let mut watch = store.watch("/w/", start.next());
    put(store, "/w/b", "2").await;
    let seen = [next(&mut watch).await, next(&mut watch).await, next(&mut watch).await];
    assert_eq!(seen.each_ref().map(shown), ["+/w/a=1", "-/w/a", "+/w/b=2"]);
    let revisions = seen.map(|commit| commit.revision.0 - start.0);
    assert_eq!(revisions, [1, 2, 3]);
    put(store, "/w/c", "3").await;
    assert_eq!(shown(&next(&mut watch).await), "+/w/c=3");
}

/// A watcher's commits hold its part of the transaction, and transactions without such a part are left out.
pub async fn a_watch_shows_only_its_prefix(subject: Subject) {
    let store = &*subject.store;
    let start = store.revision().await.unwrap();
    let mut watch = store.watch("/w/", start.next());
    let mut all = store.watch("", start.next());
    put(store, "/v/a", "1").await;
    put(store, "/w", "1").await;
    let operations =
        vec![Operation::put("/w0", "1"), Operation::put("/w/a", "1"), Operation::put("/v/b", "1")];
    let mixed = store.transact(Vec::new(), operations).await.unwrap();
    let commit = next(&mut watch).await;
    assert_eq!((shown(&commit).as_str(), commit.revision), ("+/w/a=1", mixed));
    assert_eq!(shown(&next(&mut all).await), "+/v/a=1");
    assert_eq!(shown(&next(&mut all).await), "+/w=1");
    assert_eq!(shown(&next(&mut all).await), "+/v/b=1 +/w/a=1 +/w0=1");
}

/// Whoever has seen a commit has seen the whole transaction, and can go on from the next revision.
pub async fn a_transaction_is_one_commit_in_order_of_keys(subject: Subject) {
    let store = &*subject.store;
    put(store, "/w/b", "0").await;
    let operations = vec![
        Operation::put("/w/d", "1"),
        Operation::delete("/w/b"),
        Operation::delete("/w/none"),
        Operation::put("/w/a", "2"),
    ];
    let revision = store.transact(Vec::new(), operations).await.unwrap();
    let commit = next(&mut store.watch("/w/", revision)).await;
    assert_eq!((shown(&commit).as_str(), commit.revision), ("+/w/a=2 -/w/b +/w/d=1", revision));
}

/// Changes before it stay unseen.
pub async fn a_watch_from_a_future_revision_waits_for_it(subject: Subject) {
    let store = &*subject.store;
    let head = put(store, "/w/a", "0").await;
    let mut watch = store.watch("/w/", Revision(head.0 + 3));
    for n in 1..=3 {
        put(store, "/w/a", &n.to_string()).await;
    }
    let commit = next(&mut watch).await;
    assert_eq!((shown(&commit).as_str(), commit.revision), ("+/w/a=3", Revision(head.0 + 3)));
}

/// Only what happened is told.
pub async fn a_failed_transaction_is_not_seen_by_watchers(subject: Subject) {
    let store = &*subject.store;
    let head = put(store, "/w/a", "0").await;
    let mut watch = store.watch("/w/", head.next());
    let wrong = vec![Condition::absent("/w/a")];
    store.transact(wrong, vec![Operation::put("/w/a", "never")]).await.unwrap_err();
    store.delete("/w/none").await.unwrap();
    put(store, "/w/a", "1").await;
    assert_eq!(shown(&next(&mut watch).await), "+/w/a=1");
}

/// The error names where a watch can start, and it then can.
pub async fn a_watch_of_compacted_changes_is_refused(subject: Subject) {
    let store = &*subject.store;
    let first = put(store, "/w/a", "1").await;
    let second = put(store, "/w/a", "2").await;
    let third = put(store, "/w/a", "3").await;
    store.compact(second).await.unwrap();
    for from in [Revision(1), first, second] {
        let mut watch = store.watch("/w/", from);
        match within("a refusal", watch.next()).await {
            Some(Err(Error::Compacted { asked, oldest })) => assert_eq!((asked, oldest), (from, third)),
            other => panic!("watching from {from} gave {other:?}"),
        }
        assert!(within("the end", watch.next()).await.is_none(), "after an error a watch is over");
    }
    assert_eq!(shown(&next(&mut store.watch("/w/", third)).await), "+/w/a=3");
}

/// A watcher that sleeps through a compaction never skips over what it missed.
pub async fn a_slow_watcher_sees_everything_or_is_told(subject: Subject) {
    let store = &*subject.store;
    let start = store.revision().await.unwrap();
    let mut watch = store.watch("/w/", start.next());
    put(store, "/w/a", "0").await;
    assert_eq!(next(&mut watch).await.revision, start.next());
    for n in 1..50 {
        put(store, "/w/a", &n.to_string()).await;
    }
    store.compact(Revision(start.0 + 40)).await.unwrap();
    let mut expected = start.next().next();
    loop {
        match within("an answer", watch.next()).await {
            Some(Ok(commit)) => assert_eq!(commit.revision, expected, "nothing is left out"),
            Some(Err(Error::Compacted { .. })) => break,
            other => panic!("at {expected}: {other:?}"),
        }
        if expected.0 == start.0 + 50 {
            break;
        }
        expected = expected.next();
    }
}

/// Many writers, a watcher that loses its watch again and again and goes on from the last commit it saw.
pub async fn a_reconnecting_watcher_sees_each_change_once_in_order(subject: Subject) {
    const WRITERS: u64 = 8;
    const WRITES: u64 = 25;
    let start = subject.store.revision().await.unwrap();
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let store = subject.store.clone();
            tokio::spawn(async move {
                for n in 0..WRITES {
                    put(&*store, &format!("/w/{writer}"), &n.to_string()).await;
                }
            })
        })
        .collect();
    let mut last = start;
    let mut counts = [0; WRITERS as usize];
    while last.0 < start.0 + WRITERS * WRITES {
        let mut watch = subject.store.watch("/w/", last.next());
        for _ in 0..=(last.0 % 7) {
            if last.0 == start.0 + WRITERS * WRITES {
                break;
            }
            let commit = next(&mut watch).await;
            assert_eq!(commit.revision, last.next(), "each commit once and in order");
            let text = shown(&commit);
            let (writer, n) = text.trim_start_matches("+/w/").split_once('=').expect("a put");
            let count: &mut u64 = &mut counts[writer.parse::<usize>().unwrap()];
            assert_eq!(n, count.to_string(), "a writer's changes stay in its order");
            *count += 1;
            last = commit.revision;
        }
    }
    for writer in writers {
        writer.await.expect("a task does not panic");
    }
    assert_eq!(counts, [WRITES; WRITERS as usize]);
    let page = subject.store.list(Query::prefix("/w/")).await.unwrap();
    assert_eq!(page.revision, last);
}

/// Revision 0 means "now" to some and "ever" to others.
pub async fn a_watch_without_a_revision_is_refused(subject: Subject) {
    let mut watch = subject.store.watch("/w/", Revision::ABSENT);
    let first = within("a refusal", watch.next()).await;
    assert!(matches!(first, Some(Err(Error::Invalid { field: "from_revision", .. }))), "{first:?}");
    assert!(within("the end", watch.next()).await.is_none());
}

/// Watches are waited for next to other things, with `select!`.
pub async fn dropping_the_wait_for_a_commit_loses_nothing(subject: Subject) {
    let store = &*subject.store;
    let start = store.revision().await.unwrap();
    let mut watch = store.watch("/w/", start.next());
    for n in 0..20u32 {
        // Dropped at the first poll, or, as the commit may have come just then, with what it got.
        let early = tokio::time::timeout(Duration::ZERO, watch.next()).await;
        assert!(early.is_err(), "nothing has been written yet");
        put(store, "/w/a", &n.to_string()).await;
        let commit = next(&mut watch).await;
        assert_eq!(shown(&commit), format!("+/w/a={n}"));
    }
}
