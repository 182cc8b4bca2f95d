//! A process that dies at any moment loses no change that it was told is made, and leaves no half of one.
//!
//! The test runs its own binary again as the victim, which writes as fast as it can and prints what was acknowledged;
//! it is killed after a random number of lines, in the middle of whatever it does then.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use berth_store::{
    Change, Commit, Condition, Error, Operation, Query, Revision, SqliteStore, Store, SystemClock, Watch,
};

/// Set in the victim: the store that it writes to.
const VICTIM: &str = "BERTH_TEST_STORE_VICTIM";

const ROUNDS: u64 = 20;
const WRITERS: u64 = 8;

#[tokio::test]
async fn a_killed_process_loses_no_acknowledged_change() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let mut acknowledged = BTreeMap::new();
    for round in 0..ROUNDS {
        // From "barely started" to "long enough for checkpoints", not evenly spread.
        let lines = (round * round * 2) as usize;
        let victim = Victim::start("victim_writes", &path);
        let printed = victim.kill_after(lines);
        assert!(printed.len() >= lines, "round {round}: {} of {lines} lines", printed.len());
        acknowledged.extend(printed.iter().map(|line| parse(line)));
        check_pages(&path);
        check_records(&path, &acknowledged).await;
    }
    assert!(acknowledged.len() > 1000, "the victims got to do something: {}", acknowledged.len());
}

#[tokio::test]
async fn a_process_killed_while_it_creates_a_store_leaves_one_that_opens_or_none() {
    let directory = tempfile::tempdir().unwrap();
    // How long a creation takes here, so that the kills fall all over it.
    let begin = Instant::now();
    let whole = Victim::start("victim_writes", &directory.path().join("whole")).kill_after(1);
    assert!(!whole.is_empty());
    let full_time = begin.elapsed();
    for round in 0..20 {
        let path = directory.path().join(format!("store-{round}"));
        let mut victim = Victim::start("victim_writes", &path);
        std::thread::sleep(full_time * round / 20);
        victim.kill();
        let store = open(&path).await;
        store.put("/after", "x".into()).await.unwrap();
        store.close().await;
        assert!(!beside(&path, ".new").exists(), "nothing half-made is left");
    }
}

fn parse(line: &str) -> (String, String) {
    let (key, value) = line.split_once(' ').unwrap_or_else(|| panic!("{line:?} is not what victims print"));
    (key.to_owned(), value.to_owned())
}

fn check_pages(path: &Path) {
    // A copy, so that what the store itself will do to the files is not done for it.
    let copy = tempfile::tempdir().unwrap();
    for suffix in ["", "-wal"] {
        let from = beside(path, suffix);
        if from.exists() {
            std::fs::copy(&from, copy.path().join(format!("copy{suffix}"))).unwrap();
        } else {
            assert_ne!(suffix, "", "the victim had the store open");
        }
    }
    let connection = rusqlite::Connection::open(copy.path().join("copy")).unwrap();
    let verdict: String = connection.pragma_query_value(None, "integrity_check", |row| row.get(0)).unwrap();
    assert_eq!(verdict, "ok");
}

async fn check_records(path: &Path, acknowledged: &BTreeMap<String, String>) {
    let store = open(path).await;
    let records = store.list(Query::prefix("/records/")).await.unwrap();
    let found: BTreeMap<&str, &[u8]> =
        records.entries.iter().map(|entry| (&*entry.key, &entry.value[..])).collect();
    for (key, value) in acknowledged {
        assert_eq!(found.get(&**key), Some(&value.as_bytes()), "{key} was acknowledged and is lost");
    }
    // Each transaction wrote a record and its twin: one without the other would be half a transaction.
    let twins = store.list(Query::prefix("/twins/")).await.unwrap();
    assert_eq!(records.entries.len(), twins.entries.len());
    for (record, twin) in records.entries.iter().zip(&twins.entries) {
        assert_eq!(record.key.strip_prefix("/records"), twin.key.strip_prefix("/twins"));
        assert_eq!((record.mod_revision, &record.value), (twin.mod_revision, &twin.value));
    }
    let mut watch = store.watch("", Revision::EMPTY_STORE.next());
    let mut seen = Revision::EMPTY_STORE;
    while seen < twins.revision {
        let commit = next(&mut watch).await;
        assert_eq!(commit.revision, seen.next(), "history has no gaps");
        assert!(commit.changes.iter().all(|change| matches!(change, Change::Put(_))));
        seen = commit.revision;
    }
    store.close().await;
}

/// Not a test: what the child process does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn victim_writes() {
    let Some(path) = std::env::var_os(VICTIM) else { return };
    let store = Arc::new(open(Path::new(&path)).await);
    let run = store.revision().await.unwrap();
    let writers: Vec<_> =
        (0..WRITERS).map(|writer| tokio::spawn(write_for_ever(store.clone(), run, writer))).collect();
    for writer in writers {
        writer.await.unwrap();
    }
}

async fn write_for_ever(store: Arc<SqliteStore>, run: Revision, writer: u64) {
    for n in 0u64.. {
        let key = format!("/records/{run}-{writer}-{n}");
        let value = format!("{run}:{writer}:{n}:").repeat(1 + (n as usize * 37) % 100);
        let twin = key.replace("/records", "/twins");
        let operations = vec![Operation::put(&*key, value.clone()), Operation::put(twin, value.clone())];
        match store.transact(vec![Condition::absent(&*key)], operations).await {
            // One write call a line: a line is either there or not.
            Ok(_) => std::io::stdout().write_all(format!("{key} {value}\n").as_bytes()).unwrap(),
            Err(error) => panic!("{error}"),
        }
    }
}

/// A child process; killed at the latest when the test is over.
struct Victim {
    child: Child,
}

impl Victim {
    fn start(test: &str, path: &Path) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture", "--quiet"])
            .env(VICTIM, path)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { child }
    }

    /// Kills it when it has printed so many lines, and returns all that it managed to print.
    fn kill_after(mut self, lines: usize) -> Vec<String> {
        let mut output = BufReader::new(self.child.stdout.take().unwrap());
        let mut printed = Vec::new();
        let mut line = String::new();
        // The pipe may end within a line, which then was not told to anybody.
        while output.read_line(&mut line).unwrap() > 0 && line.ends_with('\n') {
            if line.starts_with("/records/") {
                printed.push(line.trim_end().to_owned());
            }
            if printed.len() >= lines.max(1) {
                self.kill();
            }
            line.clear();
        }
        printed
    }

    fn kill(&mut self) {
        // Sent to a child that was not waited for yet, so the process is surely ours.
        self.child.kill().unwrap();
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Opens a store that may still be held for a moment by a process that is being killed.
async fn open(path: &Path) -> SqliteStore {
    let give_up = Instant::now() + Duration::from_secs(30);
    loop {
        match SqliteStore::open(path, Arc::new(SystemClock::new())).await {
            Err(Error::InUse { .. }) if Instant::now() < give_up => tokio::task::yield_now().await,
            result => return result.unwrap(),
        }
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
