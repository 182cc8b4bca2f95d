//! The file and its life: who may read it, who may open it, what is there when it is opened again.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use berth_store::{
    Clock, Commit, Error, ManualClock, Operation, Query, Revision, SqliteStore, Store, SystemClock, Watch,
};

async fn open(path: &Path) -> Result<SqliteStore, Error> {
    SqliteStore::open(path, Arc::new(ManualClock::new())).await
}

#[tokio::test]
async fn only_its_owner_may_read_any_of_the_stores_files() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let modes = || {
        let files = std::fs::read_dir(directory.path()).unwrap().map(|file| file.unwrap());
        files.map(|file| (file.file_name(), file.metadata().unwrap().permissions().mode() & 0o777))
    };
    let store = open(&path).await.unwrap();
    store.put("/a", "secret".into()).await.unwrap();
    assert!(modes().count() >= 3, "file, log and lock");
    assert!(modes().all(|(_, mode)| mode == 0o600), "{:?}", modes().collect::<Vec<_>>());
    store.close().await;
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
    let store = open(&path).await.unwrap();
    store.put("/a", "secret".into()).await.unwrap();
    assert!(modes().all(|(_, mode)| mode == 0o600), "{:?}", modes().collect::<Vec<_>>());
    store.close().await;
}

#[tokio::test]
async fn a_store_is_open_once_at_a_time() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let store = open(&path).await.unwrap();
    let error = open(&path).await.err().expect("it is in use");
    assert!(matches!(error, Error::InUse { .. }), "{error:?}");
    store.close().await;
    open(&path).await.unwrap().close().await;
}

#[tokio::test]
async fn a_reopened_store_goes_on_where_it_was() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let store = open(&path).await.unwrap();
    for n in 0..10 {
        store.put(&format!("/r/{}", n % 3), format!("{n}").into()).await.unwrap();
    }
    let last = store.delete("/r/1").await.unwrap();
    store.compact(Revision(4)).await.unwrap();
    let before = store.list(Query::prefix("")).await.unwrap();
    store.close().await;
    let store = open(&path).await.unwrap();
    assert_eq!(store.list(Query::prefix("")).await.unwrap(), before);
    let mut watch = store.watch("/r/", Revision(5));
    for revision in 5..=last.0 {
        assert_eq!(next(&mut watch).await.revision, Revision(revision));
    }
    assert!(matches!(store.list(Query::prefix("").at(Revision(3))).await, Err(Error::Compacted { .. })));
    let after = store.put("/r/1", "x".into()).await.unwrap();
    assert_eq!(after, last.next());
    assert_eq!(next(&mut watch).await.revision, after);
    store.close().await;
}

#[tokio::test]
async fn leases_of_a_reopened_store_have_their_full_time_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let clock = ManualClock::new();
    let store = SqliteStore::open(&path, Arc::new(clock.clone())).await.unwrap();
    let lease = store.grant_lease(Duration::from_secs(10)).await.unwrap();
    let operation = Operation::put_leased("/a", "x", lease.id);
    let put = store.transact(Vec::new(), vec![operation]).await.unwrap();
    clock.advance(Duration::from_secs(9));
    store.close().await;
    clock.advance(Duration::from_secs(9));
    let store = SqliteStore::open(&path, Arc::new(clock.clone())).await.unwrap();
    clock.advance(Duration::from_secs(9));
    assert_eq!(store.revision().await.unwrap(), put, "not over yet");
    let other = store.put("/b", "x".into()).await.unwrap();
    assert!(store.get("/a").await.unwrap().is_some());
    clock.advance(Duration::from_secs(1));
    let mut watch = store.watch("/a", put.next());
    assert_eq!(next(&mut watch).await.revision, other.next(), "now it is");
    assert_eq!(store.get("/a").await.unwrap(), None);
    let other = store.grant_lease(Duration::from_secs(10)).await.unwrap();
    assert!(other.id > lease.id, "ids are not used again");
    store.close().await;
}

#[tokio::test]
async fn a_closed_store_says_so_to_callers_and_watchers() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(&directory.path().join("store")).await.unwrap();
    let mut watch = store.watch("/", Revision(2));
    let waiting = tokio::spawn(async move { watch.next().await });
    store.close().await;
    let told = tokio::time::timeout(Duration::from_secs(30), waiting).await.expect("it is told").unwrap();
    assert!(matches!(told, Some(Err(Error::Closed))), "{told:?}");
    assert!(matches!(store.get("/a").await, Err(Error::Closed)));
    assert!(matches!(store.put("/a", "1".into()).await, Err(Error::Closed)));
    assert!(matches!(store.watch("/", Revision(2)).next().await, Some(Err(Error::Closed))));
    store.close().await;
}

#[tokio::test]
async fn a_dropped_store_frees_its_file_although_somebody_still_watches() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let store = open(&path).await.unwrap();
    let mut watch = store.watch("/", Revision(2));
    drop(store);
    let told = tokio::time::timeout(Duration::from_secs(30), watch.next()).await.expect("it is told");
    assert!(matches!(told, Some(Err(Error::Closed))), "{told:?}");
    let clock = SystemClock::new();
    let store = loop {
        match open(&path).await {
            Err(Error::InUse { .. }) if clock.now() < Duration::from_secs(30) => {
                tokio::task::yield_now().await
            }
            result => break result.unwrap(),
        }
    };
    store.close().await;
}

#[tokio::test]
async fn a_change_handed_in_before_closing_is_finished() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let store = Arc::new(open(&path).await.unwrap());
    let writers: Vec<_> = (0..50)
        .map(|n| {
            let store = store.clone();
            tokio::spawn(async move { store.put(&format!("/{n:02}"), "x".into()).await.map(|_| n) })
        })
        .collect();
    tokio::task::yield_now().await;
    store.close().await;
    let mut made = Vec::new();
    for writer in writers {
        match writer.await.unwrap() {
            Ok(n) => made.push(format!("/{n:02}")),
            Err(error) => assert!(matches!(error, Error::Closed), "{error:?}"),
        }
    }
    let store = open(&path).await.unwrap();
    let page = store.list(Query::prefix("/")).await.unwrap();
    assert!(page.entries.iter().map(|entry| &entry.key).eq(&made));
    store.close().await;
}

#[tokio::test]
async fn a_store_of_a_newer_version_is_refused_untouched() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    open(&path).await.unwrap().close().await;
    rusqlite::Connection::open(&path).unwrap().execute_batch("PRAGMA user_version = 99").unwrap();
    let before = std::fs::read(&path).unwrap();
    let error = open(&path).await.err().expect("it is from the future");
    assert!(matches!(error, Error::NewerSchema { found: 99, .. }), "{error:?}");
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

#[tokio::test]
async fn a_watcher_far_behind_catches_up_from_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::new(open(&directory.path().join("store")).await.unwrap());
    let mut watch = store.watch("/even/", Revision(2));
    let value = vec![7; 100 << 10];
    // More bytes than are kept in memory for watchers.
    for n in 0..80u32 {
        let key = format!("/{}/{n}", if n % 2 == 0 { "even" } else { "odd" });
        store.put(&key, value.clone().into()).await.unwrap();
    }
    for n in (0..80u32).step_by(2) {
        let commit = next(&mut watch).await;
        assert_eq!(commit.changes[0].key(), format!("/even/{n}"));
    }
    store.close().await;
}

/// The next commit; fails the test when none comes.
async fn next(watch: &mut Watch) -> Commit {
    let next = tokio::time::timeout(Duration::from_secs(60), watch.next()).await.expect("a commit comes");
    next.expect("the watch goes on").expect("a commit and no error")
}
