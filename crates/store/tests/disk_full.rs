//! A full disk refuses changes, says so, loses nothing, and is forgotten once there is room.
//!
//! Two ways to be full: a small file system in a mount namespace of its own (the system says so itself), and a limit
//! on file sizes, which anybody can set (the system says something else). Both need a process of their own, for which
//! the test runs its binary again.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use berth_store::{Error, Query, SqliteStore, Store, SystemClock};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Set in the child: where its store is.
const DIRECTORY: &str = "BERTH_TEST_FULL_DIRECTORY";

#[test]
fn a_full_file_system_is_told_and_survived() {
    let directory = tempfile::tempdir().unwrap();
    let script =
        "mount -t tmpfs -o size=2m,mode=700 store \"$BERTH_TEST_FULL_DIRECTORY\" && exec \"$0\" \"$@\"";
    // Ordinary users may do the same where user namespaces are allowed.
    let flags = if rustix::process::geteuid().is_root() { "-m" } else { "-Urm" };
    let possible =
        Command::new("unshare").args([flags, "true"]).status().is_ok_and(|status| status.success());
    if !possible {
        eprintln!("skipped: this user can't make mount namespaces here");
        return;
    }
    run(Command::new("unshare").args([flags, "sh", "-c", script]), "child_on_small_disk", directory.path());
}

#[test]
fn a_file_size_limit_is_told_and_survived() {
    let directory = tempfile::tempdir().unwrap();
    // Ignored, the signal becomes an error of the write; in blocks of 512 bytes.
    let script = "trap '' XFSZ && ulimit -S -f 2048 && exec \"$0\" \"$@\"";
    run(Command::new("sh").args(["-c", script]), "child_under_limit", directory.path());
}

fn run(command: &mut Command, child: &str, directory: &Path) {
    let output = command
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", child, "--nocapture"])
        .env(DIRECTORY, directory)
        .output()
        .unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("child is done"), "{text}");
}

/// Not a test: the child in the small file system.
#[tokio::test]
async fn child_on_small_disk() {
    let Some(directory) = directory() else { return };
    let ballast = directory.join("ballast");
    std::fs::write(&ballast, vec![1; 1 << 20]).unwrap();
    survive(&directory.join("store"), || std::fs::remove_file(&ballast).unwrap()).await;
    // Full before there is a store at all.
    let second = directory.join("second");
    let fill = || {
        let mut file = std::fs::File::create(&ballast).unwrap();
        while std::io::Write::write_all(&mut file, &[1; 512]).is_ok() {}
    };
    fill();
    let error =
        SqliteStore::open(&second, Arc::new(SystemClock::new())).await.err().expect("there is no room");
    assert!(matches!(error, Error::NoSpace { .. }), "{error}");
    assert!(!second.exists());
    std::fs::remove_file(&ballast).unwrap();
    let store = SqliteStore::open(&second, Arc::new(SystemClock::new())).await.unwrap();
    store.close().await;
    println!("child is done");
}

/// Not a test: the child that may not write large files.
#[tokio::test]
async fn child_under_limit() {
    let Some(directory) = directory() else { return };
    survive(&directory.join("store"), || {
        let limit = getrlimit(Resource::Fsize);
        setrlimit(Resource::Fsize, Rlimit { current: limit.maximum, ..limit }).unwrap();
    })
    .await;
    println!("child is done");
}

fn directory() -> Option<PathBuf> {
    std::env::var_os(DIRECTORY).map(PathBuf::from)
}

/// Writes until it is full, from several tasks at once, makes room, and checks that the store is all it should be.
async fn survive(path: &Path, make_room: impl FnOnce()) {
    let store = Arc::new(SqliteStore::open(path, Arc::new(SystemClock::new())).await.unwrap());
    let start = store.revision().await.unwrap();
    let tasks: Vec<_> = (0..4).map(|task| tokio::spawn(write_until_full(store.clone(), task))).collect();
    let mut acknowledged = Vec::new();
    for task in tasks {
        acknowledged.extend(task.await.unwrap());
    }
    assert!(!acknowledged.is_empty());
    // Full is not broken: it can be read, and said again.
    let before = check(&*store, &acknowledged).await;
    assert_eq!(before.0 - start.0, acknowledged.len() as u64, "what was refused was not made");
    let again = store.put("/more", vec![7; 200 << 10].into()).await.unwrap_err();
    assert!(matches!(again, Error::NoSpace { .. }), "{again}");
    make_room();
    store.put("/after", "there is room".into()).await.unwrap();
    assert_eq!(check(&*store, &acknowledged).await, before.next());
    store.close().await;
    let store = SqliteStore::open(path, Arc::new(SystemClock::new())).await.unwrap();
    assert_eq!(check(&store, &acknowledged).await, before.next(), "after reopening too");
    assert_eq!(&store.get("/after").await.unwrap().unwrap().value[..], b"there is room");
    store.close().await;
}

async fn write_until_full(store: Arc<SqliteStore>, task: usize) -> Vec<String> {
    let mut acknowledged = Vec::new();
    for n in 0..10_000 {
        let key = format!("/fill/{task}-{n:05}");
        let value = key.repeat(500);
        match store.put(&key, value.into()).await {
            Ok(_) => acknowledged.push(key),
            Err(Error::NoSpace { .. }) => return acknowledged,
            Err(error) => panic!("full must be told from broken: {error:?}"),
        }
    }
    panic!("it never became full");
}

async fn check(store: &dyn Store, acknowledged: &[String]) -> berth_store::Revision {
    let page = store.list(Query::prefix("/fill/")).await.unwrap();
    let mut expected: Vec<&String> = acknowledged.iter().collect();
    expected.sort();
    assert!(page.entries.iter().map(|entry| &entry.key).eq(expected));
    assert!(page.entries.iter().all(|entry| entry.value == entry.key.repeat(500)));
    page.revision
}
