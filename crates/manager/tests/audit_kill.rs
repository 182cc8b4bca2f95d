//! A manager that is killed at any moment loses no record that was begun, and leaves a log that can be verified.
//!
//! The test runs its own binary again as the victim, which writes to a real file as fast as it can and prints what was
//! begun; it is killed after a number of lines, in the middle of whatever it does then.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use berth_api::manager::AuditRecord;
use berth_manager::audit::format::Format;
use berth_manager::audit::{Audit, End, Filter, OtherKey};
use berth_manager::clock::SystemClock;
use berth_store::{Error, SqliteStore};
use berth_tlog::export::{Question, verify};
use berth_tlog::{Checkpoint, SigningKey};
use futures_util::TryStreamExt;

/// Set in the victim: the directory that it writes to.
const VICTIM: &str = "BERTH_TEST_AUDIT_VICTIM";
const ORIGIN: &str = "berth-audit/kill";
const ROUNDS: usize = 8;
const CALLERS: usize = 24;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_manager_loses_no_record_that_was_begun_and_its_log_only_grows() {
    let directory = tempfile::tempdir().expect("a directory");
    let key = SigningKey::generate(ORIGIN).expect("a key");
    std::fs::write(directory.path().join("key"), key.to_pem()).expect("written");
    let (mut begun, mut known) = (BTreeSet::new(), None::<Checkpoint>);
    for round in 0..ROUNDS {
        begun.extend(run_victim(directory.path(), round, round * round * 40));
        let (store, audit) = open(directory.path()).await;
        let stream = audit.export(Format::Jsonl, None, None).await.expect("an export");
        let parts: Vec<bytes::Bytes> = stream.try_collect().await.expect("a whole export");
        let question = Question { keys: vec![key.public().clone()], known: known.take() };
        let found =
            verify(&parts.concat()[..], &question).unwrap_or_else(|fault| panic!("round {round}: {fault}"));
        assert!(found.is_whole() && found.end == audit.size());
        known = Some(found.checkpoint);
        let logged: Vec<String> = all(&audit).await.into_iter().map(|record| record.request_id).collect();
        let different: BTreeSet<&String> = logged.iter().collect();
        assert_eq!(different.len(), logged.len(), "round {round}: each record once");
        for request in &begun {
            assert!(different.contains(request), "round {round}: {request} was begun and is lost");
        }
        drop(audit);
        store.close().await;
    }
    assert!(begun.len() > 1000, "the victims got to do something: {}", begun.len());
}

async fn all(audit: &Audit) -> Vec<AuditRecord> {
    let (mut records, mut before) = (Vec::new(), None);
    loop {
        let found = audit.newest(&Filter::default(), before, 10_000).await.expect("records");
        records.extend(found.records);
        before = found.more_below;
        if before.is_none() {
            return records;
        }
    }
}

/// Starts a victim, kills it when it has printed so many lines, and gives what it printed.
fn run_victim(directory: &Path, round: usize, lines: usize) -> Vec<String> {
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "victim_writes", "--nocapture", "--quiet"])
        .env(VICTIM, format!("{round}:{}", directory.display()))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("a victim");
    let mut output = BufReader::new(child.stdout.take().expect("piped"));
    let (mut printed, mut line) = (Vec::new(), String::new());
    // The pipe may end within a line, which then was not told to anybody.
    while output.read_line(&mut line).expect("read") > 0 && line.ends_with('\n') {
        if line.starts_with("req-") {
            printed.push(line.trim_end().to_owned());
        }
        if printed.len() > lines {
            // Sent to a child that was not waited for yet, so the process is surely ours.
            child.kill().expect("killed");
        }
        line.clear();
    }
    let _ = child.kill();
    let _ = child.wait();
    assert!(printed.len() > lines, "round {round}: {} of {lines} lines", printed.len());
    printed
}

/// Not a test: what the child process does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn victim_writes() {
    let Some(text) = std::env::var_os(VICTIM) else { return };
    let text = text.into_string().expect("text");
    let (round, directory) = text.split_once(':').expect("what the test gives");
    let (_store, audit) = open(Path::new(directory)).await;
    let callers: Vec<_> = (0..CALLERS)
        .map(|caller| tokio::spawn(write_for_ever(audit.clone(), format!("req-{round}-{caller}"))))
        .collect();
    for caller in callers {
        caller.await.expect("no panic");
    }
}

async fn write_for_ever(audit: Audit, name: String) {
    for number in 0u64.. {
        let request_id = format!("{name}-{number}");
        let record = AuditRecord { request_id: request_id.clone(), ..AuditRecord::default() };
        let mut open = audit.begin(record).await.expect("begun");
        // One write call a line: a line is either there or not.
        std::io::stdout().write_all(format!("{request_id}\n").as_bytes()).expect("printed");
        open.set(End::status(200));
    }
}

/// Opens an audit whose store may still be held for a moment by a process that is being killed.
async fn open(directory: &Path) -> (Arc<SqliteStore>, Audit) {
    let give_up = Instant::now() + Duration::from_secs(30);
    let store = loop {
        let steady = Arc::new(berth_store::SystemClock::new());
        match SqliteStore::open(directory.join("store"), steady).await {
            Err(Error::InUse { .. }) if Instant::now() < give_up => tokio::task::yield_now().await,
            result => break Arc::new(result.expect("a store")),
        }
    };
    let pem = std::fs::read_to_string(directory.join("key")).expect("a key");
    let key = Arc::new(SigningKey::from_pem(ORIGIN, &pem).expect("a key"));
    let audit =
        Audit::open(Arc::<SqliteStore>::clone(&store), Arc::new(SystemClock), key, OtherKey::Refused).await;
    (store, audit.expect("an audit"))
}
