//! What a disk, or a hand, does to the file is refused or read correctly: never a wrong record, never a panic, never
//! a fresh start.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use berth_store::{Commit, Error, ManualClock, Operation, Page, Query, Revision, SqliteStore, Store, Watch};
use tempfile::TempDir;

/// Everything that a store says.
#[derive(Clone, Debug, PartialEq)]
struct Content {
    page: Page,
    commits: Vec<Commit>,
}

#[tokio::test]
async fn a_flipped_byte_is_refused_or_harmless() {
    let (directory, path, expected) = sample().await;
    let good = fs::read(&path).unwrap();
    let mut random = numbers(1);
    let mut refused = 0;
    // All of the header, where a byte means most, and random places elsewhere.
    let header = (0..100).map(|place| (place, 0xff));
    let places: Vec<(usize, u8)> =
        header.chain((0..500).map(|_| (random(good.len() as u64) as usize, 1 << random(8)))).collect();
    for (place, mask) in places {
        let mut bad = good.clone();
        bad[place] ^= mask;
        fs::write(&path, &bad).unwrap();
        match content(&path).await {
            Ok(found) => assert!(found == expected, "byte {place} ^ {mask:#x} changed a record unnoticed"),
            Err(Error::Corrupt { .. } | Error::NewerSchema { .. }) => {
                refused += 1;
                assert!(fs::read(&path).unwrap() == bad, "a damaged file is left as it is");
            }
            Err(error) => panic!("byte {place} ^ {mask:#x} gave {error:?}"),
        }
    }
    assert!(refused > 300, "most of the file holds something: {refused}");
    drop(directory);
}

#[tokio::test]
async fn a_cut_file_is_refused_unless_nothing_of_it_is_missing() {
    let (directory, path, expected) = sample().await;
    let good = fs::read(&path).unwrap();
    let mut random = numbers(2);
    let lengths = [0, 1, 15, 16, 99, 100, 512, 4095, 4096, 4097, 8192, good.len() - 4096, good.len() - 1];
    for length in lengths.into_iter().chain((0..40).map(|_| random(good.len() as u64) as usize)) {
        fs::write(&path, &good[..length]).unwrap();
        match content(&path).await {
            // Bytes at the end of the last page that no record reaches.
            Ok(found) => {
                assert!(found == expected && length + 4096 > good.len(), "{length} bytes were enough")
            }
            Err(Error::Corrupt { .. }) => {
                assert!(fs::read(&path).unwrap() == good[..length], "a damaged file is left as it is");
            }
            Err(error) => panic!("{length} bytes gave {error:?}"),
        }
    }
    drop(directory);
}

#[tokio::test]
async fn pages_that_were_lost_or_swapped_are_refused() {
    const PAGE: usize = 4096;
    let (directory, path, expected) = sample().await;
    let good = fs::read(&path).unwrap();
    let pages = good.len() / PAGE;
    let mut random = numbers(3);
    for _ in 0..60 {
        let (one, other) = (random(pages as u64) as usize, random(pages as u64) as usize);
        let mut bad = good.clone();
        bad.copy_within(other * PAGE..(other + 1) * PAGE, one * PAGE);
        if random(2) == 0 {
            bad[one * PAGE..(one + 1) * PAGE].fill(0);
        }
        fs::write(&path, &bad).unwrap();
        match content(&path).await {
            Ok(found) => assert!(found == expected, "page {one} from {other} went unnoticed"),
            Err(error) => {
                assert!(matches!(error, Error::Corrupt { .. }), "page {one} from {other}: {error:?}")
            }
        }
    }
    drop(directory);
}

/// The log's tail can't be told from one that was never finished: what is read is the state of some moment, whole.
#[tokio::test]
async fn a_damaged_log_gives_a_state_that_once_was_or_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let store = open(&path).await.unwrap();
    let mut states = vec![read(&store).await];
    for n in 0..30 {
        let operations = vec![Operation::put("/one", format!("{n}")), Operation::put("/two", format!("{n}"))];
        store.transact(Vec::new(), operations).await.unwrap();
        states.push(read(&store).await);
    }
    // As after a power cut: the files as they are while the store is open.
    let (file, log) = (fs::read(&path).unwrap(), fs::read(beside(&path, "-wal")).unwrap());
    store.close().await;
    let copy = directory.path().join("copy");
    let mut random = numbers(4);
    for round in 0..120 {
        let mut bad = log.clone();
        if round % 3 == 0 {
            bad.truncate(random(log.len() as u64) as usize);
        } else {
            bad[random(log.len() as u64) as usize] ^= 1 << random(8);
        }
        fs::write(&copy, &file).unwrap();
        fs::write(beside(&copy, "-wal"), &bad).unwrap();
        let _ = fs::remove_file(beside(&copy, "-shm"));
        match content(&copy).await {
            Ok(found) => assert!(states.contains(&found), "round {round} made up {found:?}"),
            Err(error) => assert!(matches!(error, Error::Corrupt { .. }), "round {round}: {error:?}"),
        }
    }
}

#[tokio::test]
async fn rows_that_were_tampered_with_are_refused() {
    for tampering in [
        "UPDATE entry SET value = x'00' WHERE key = '/records/003'",
        "UPDATE entry SET version = version + 1 WHERE key = '/records/003'",
        "UPDATE change SET value = x'00' WHERE revision = 5",
        "UPDATE meta SET revision = revision + 1",
        "UPDATE meta SET revision = revision - 1",
        "UPDATE meta SET last_lease = 0",
        "UPDATE lease SET ttl_ms = 1",
        "DELETE FROM meta",
        "DELETE FROM entry WHERE key = '/records/003'",
        "DELETE FROM change WHERE revision = 5",
        "DELETE FROM change WHERE revision = (SELECT max(revision) FROM change)",
        "INSERT INTO entry SELECT 999, '/other', value, create_revision, mod_revision, version, lease, seal FROM entry LIMIT 1",
        "DROP INDEX change_by_revision",
        "CREATE TRIGGER t AFTER INSERT ON entry BEGIN DELETE FROM entry; END",
        "PRAGMA user_version = 0",
        "PRAGMA application_id = 0",
    ] {
        let (directory, path, _) = sample().await;
        rusqlite::Connection::open(&path).unwrap().execute_batch(tampering).unwrap();
        let error = content(&path).await.expect_err(tampering);
        assert!(matches!(error, Error::Corrupt { .. }), "{tampering}: {error:?}");
        drop(directory);
    }
}

#[tokio::test]
async fn damage_that_happens_while_the_store_is_open_is_a_clean_error() {
    let (directory, path, expected) = sample().await;
    let store = open(&path).await.unwrap();
    let other = rusqlite::Connection::open(&path).unwrap();
    other.execute_batch("UPDATE entry SET value = x'00' WHERE key = '/records/003'").unwrap();
    let error = store.get("/records/003").await.unwrap_err();
    assert!(matches!(&error, Error::Corrupt { detail, .. } if detail.contains("/records/003")), "{error:?}");
    assert!(matches!(store.list(Query::prefix("/")).await, Err(Error::Corrupt { .. })));
    assert!(matches!(store.put("/records/003", "x".into()).await, Err(Error::Corrupt { .. })));
    let intact = store.get("/records/004").await.unwrap();
    assert!(expected.page.entries.contains(&intact.unwrap()), "the rest can still be read");
    store.put("/records/005", "x".into()).await.unwrap();
    store.close().await;
    drop(directory);
}

#[tokio::test]
async fn what_is_no_store_is_refused_and_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let foreign = directory.path().join("foreign");
    rusqlite::Connection::open(&foreign).unwrap().execute_batch("CREATE TABLE theirs (a)").unwrap();
    let text = directory.path().join("text");
    fs::write(&text, "precious notes\n".repeat(1000)).unwrap();
    for path in [foreign, text] {
        let before = fs::read(&path).unwrap();
        let error = content(&path).await.unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{error:?}");
        assert!(fs::read(&path).unwrap() == before);
    }
    let error = open(directory.path()).await.err().expect("a directory is no file");
    assert!(matches!(error, Error::Io { .. }), "{error:?}");
    let error = open(&directory.path().join("none/store")).await.err().expect("there is no such directory");
    assert!(matches!(error, Error::Io { .. }), "{error:?}");
}

#[tokio::test]
async fn a_log_without_its_file_is_not_taken_for_a_new_store() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let store = open(&path).await.unwrap();
    store.put("/a", "1".into()).await.unwrap();
    let log = fs::read(beside(&path, "-wal")).unwrap();
    store.close().await;
    fs::write(beside(&path, "-wal"), log).unwrap();
    fs::remove_file(&path).unwrap();
    assert!(matches!(content(&path).await, Err(Error::Corrupt { .. })));
    assert!(!path.exists());
}

/// A closed store with something of everything in it, in one file without a log.
async fn sample() -> (TempDir, PathBuf, Content) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let store = open(&path).await.unwrap();
    let lease = store.grant_lease(Duration::from_secs(3600)).await.unwrap();
    for n in 0..40 {
        let key = format!("/records/{:03}", n % 25);
        let value = format!("{n}").repeat(n * 3);
        let operation =
            if n % 4 == 0 { Operation::put_leased(key, value, lease.id) } else { Operation::put(key, value) };
        store.transact(Vec::new(), vec![operation]).await.unwrap();
    }
    store.put("/records/large", vec![7; 20_000].into()).await.unwrap();
    store.delete("/records/007").await.unwrap();
    let expected = read(&store).await;
    store.close().await;
    assert!(!beside(&path, "-wal").exists(), "a closed store is one file");
    (directory, path, expected)
}

async fn open(path: &Path) -> Result<SqliteStore, Error> {
    SqliteStore::open(path, Arc::new(ManualClock::new())).await
}

async fn content(path: &Path) -> Result<Content, Error> {
    let store = open(path).await?;
    let content = read(&store).await;
    store.close().await;
    Ok(content)
}

/// What was opened without complaint must be readable without complaint.
async fn read(store: &SqliteStore) -> Content {
    let page = store.list(Query::prefix("")).await.unwrap();
    let mut commits: Vec<Commit> = Vec::new();
    let mut watch = store.watch("", Revision::EMPTY_STORE.next());
    while commits.last().map_or(Revision::EMPTY_STORE, |last| last.revision) < page.revision {
        commits.push(next(&mut watch).await);
    }
    Content { page, commits }
}

/// Random numbers below a bound, the same in each run, so that a failure can be looked at.
fn numbers(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut digits = blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof();
    move |below| {
        let mut number = [0; 8];
        digits.fill(&mut number);
        u64::from_le_bytes(number) % below
    }
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// The next commit; fails the test when none comes.
async fn next(watch: &mut Watch) -> Commit {
    let next = tokio::time::timeout(Duration::from_secs(60), watch.next()).await.expect("a commit comes");
    next.expect("the watch goes on").expect("a commit and no error")
}
