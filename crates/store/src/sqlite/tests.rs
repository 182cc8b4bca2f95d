//! The contract, and what can only be seen from within.

use super::*;
use crate::contract::Subject;
use crate::{ManualClock, store_contract};

async fn open(path: &Path) -> SqliteStore {
    SqliteStore::open(path, Arc::new(ManualClock::new())).await.unwrap()
}

async fn subject() -> Subject {
    let directory = tempfile::tempdir().unwrap();
    let clock = ManualClock::new();
    let store = SqliteStore::open(directory.path().join("store"), Arc::new(clock.clone())).await.unwrap();
    Subject::new(Arc::new(store), clock, directory)
}

store_contract!(subject());

#[test]
fn every_commit_is_synced() {
    let directory = tempfile::tempdir().unwrap();
    for _ in ["created", "opened again"] {
        let Opened { writer, .. } = file::open(&directory.path().join("store")).unwrap();
        let synchronous: i64 = writer.pragma_query_value(None, "synchronous", |row| row.get(0)).unwrap();
        let journal: String = writer.pragma_query_value(None, "journal_mode", |row| row.get(0)).unwrap();
        assert_eq!(
            (synchronous, &*journal),
            (2, "wal"),
            "2 is full: the log is synced before a commit returns"
        );
    }
}

#[tokio::test]
async fn a_compacted_store_keeps_nothing_that_is_not_needed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let store = open(&path).await;
    for n in 0..60 {
        let key = format!("/r/{}", n % 20);
        if n % 3 == 2 {
            store.delete(&key).await.unwrap();
        } else {
            store.put(&key, "x".into()).await.unwrap();
        }
    }
    let page = store.list(Query::prefix("")).await.unwrap();
    store.compact(page.revision).await.unwrap();
    let rows = store
        .reads
        .run(|connection| connection.query_row("SELECT count(*) FROM change", [], |row| row.get::<_, u32>(0)))
        .await
        .unwrap();
    assert_eq!(rows as usize, page.entries.len(), "one row of history for each living entry");
    store.close().await;
}

/// A failed sync can't be made to happen here; a commit that fails for another reason goes the same way.
#[tokio::test]
async fn a_store_stops_when_it_is_not_known_what_was_committed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let store = open(&path).await;
    let revision = store.put("/a", "1".into()).await.unwrap();
    let mut watch = store.watch("/", revision.next());
    let sabotaged = store.change(|transaction| {
        transaction.sql(|connection| {
            connection.execute_batch(
                "CREATE TEMP TABLE parent (id INTEGER PRIMARY KEY);
                 CREATE TEMP TABLE child (parent REFERENCES parent DEFERRABLE INITIALLY DEFERRED);
                 INSERT INTO child VALUES (1);",
            )
        })?;
        transaction.transact(&[], &[Operation::put("/a", "2")])
    });
    let error = sabotaged.await.unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error:?}");
    assert!(matches!(store.put("/a", "3".into()).await, Err(Error::Closed)));
    let told = tokio::time::timeout(Duration::from_secs(60), watch.next()).await.expect("it is told");
    assert!(matches!(told, Some(Err(Error::Closed))), "nothing uncommitted is shown");
    store.close().await;
    let store = open(&path).await;
    assert_eq!(&store.get("/a").await.unwrap().unwrap().value[..], b"1");
    assert_eq!(store.revision().await.unwrap(), revision);
    store.close().await;
}

/// Answers depend on what came before in the same batch, and must be as if each had been committed by itself.
#[tokio::test]
async fn changes_that_share_a_sync_keep_their_order() {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::new(open(&directory.path().join("store")).await);
    // Polled once each, in order, so that all are queued in this order before the first is answered.
    let step = |n: u64| {
        let condition = Condition::unchanged("/a", Revision(if n == 0 { 0 } else { 1 + n }));
        store.transact(vec![condition], vec![Operation::put("/a", n.to_string())])
    };
    let results = futures_util::future::join_all((0..100).map(step)).await;
    for (n, result) in results.into_iter().enumerate() {
        assert_eq!(result.unwrap(), Revision(2 + n as u64));
    }
    store.close().await;
}

/// A full disk, say, while leases are over: what can't be ended now is ended later, without a change in between.
#[tokio::test]
async fn leases_that_could_not_be_ended_are_ended_later() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let clock = ManualClock::new();
    let store = SqliteStore::open(&path, Arc::new(clock.clone())).await.unwrap();
    let lease = store.grant_lease(Duration::from_secs(10)).await.unwrap();
    let operation = Operation::put_leased("/a", "x", lease.id);
    let put = store.transact(Vec::new(), vec![operation]).await.unwrap();
    let other = Connection::open(&path).unwrap();
    other
        .execute_batch("CREATE TRIGGER t BEFORE DELETE ON entry BEGIN SELECT RAISE(ABORT, 'no'); END")
        .unwrap();
    clock.advance(lease.ttl);
    let refused = store.put("/b", "x".into()).await.unwrap_err();
    assert!(refused.is_storage(), "nothing is done past a lease that is over: {refused:?}");
    other.execute_batch("DROP TRIGGER t").unwrap();
    let mut watch = store.watch("/a", put.next());
    let ended = async {
        loop {
            // The store tries again after a while on its own clock, which nobody else moves.
            clock.advance(Duration::from_secs(1));
            tokio::select! {
                commit = watch.next() => return commit,
                () = tokio::time::sleep(Duration::from_millis(1)) => {}
            }
        }
    };
    let commit =
        tokio::time::timeout(Duration::from_secs(60), ended).await.expect("it ends").unwrap().unwrap();
    assert_eq!(commit.revision, put.next());
    store.close().await;
}
