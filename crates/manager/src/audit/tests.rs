use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use berth_model::access::Action;
use berth_store::{Condition, Lease, LeaseId, MemoryStore, Page, Pending, Revision, Watch};

use super::*;
use crate::clock::SystemClock;

fn memory() -> Arc<MemoryStore> {
    Arc::new(MemoryStore::new(Arc::new(berth_store::SystemClock::new())))
}

async fn open_on(store: Arc<dyn Store>) -> Audit {
    Audit::open(store, Arc::new(SystemClock)).await.expect("an audit")
}

fn record(request: &str) -> AuditRecord {
    AuditRecord {
        sequence: 0,
        request_id: "req".to_owned(),
        actor: "somebody".to_owned(),
        action: Action::VmView,
        request: request.to_owned(),
        resource: "cluster".to_owned(),
        decision: ALLOW.to_owned(),
        reason: String::new(),
        started_at: Timestamp::from_millis(1),
        finished_at: None,
        interrupted: false,
        status: None,
        operation: None,
        remote: String::new(),
    }
}

async fn all(audit: &Audit) -> Vec<AuditRecord> {
    audit.flush().await;
    let (mut records, more) = audit.newest(None, 10_000).await.expect("records");
    assert!(!more);
    records.reverse();
    records
}

fn without_gaps(records: &[AuditRecord]) {
    let numbers: Vec<u64> = records.iter().map(|record| record.sequence).collect();
    assert_eq!(numbers, (1..=records.len() as u64).collect::<Vec<_>>());
}

#[tokio::test]
async fn many_at_once_get_numbers_without_gaps_and_each_its_end() {
    let audit = open_on(memory()).await;
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..500u16 {
        let audit = audit.clone();
        tasks.spawn(async move {
            let mut open = audit.begin(record("GET /x")).await.expect("begun");
            tokio::task::yield_now().await;
            open.set(End::status(200 + number % 7));
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.expect("no panic");
    }
    let records = all(&audit).await;
    assert_eq!(records.len(), 500);
    without_gaps(&records);
    assert!(records.iter().all(|record| record.finished_at.is_some() && record.status >= Some(200)));
}

#[tokio::test]
async fn the_start_is_down_when_begin_returns() {
    let store = memory();
    let audit = open_on(store.clone()).await;
    let open = audit.begin(record("GET /x")).await.expect("begun");
    let entry = store.get(&key(open.sequence())).await.expect("a store").expect("the record");
    let written: AuditRecord = serde_json::from_slice(&entry.value).expect("a record");
    assert_eq!((written.request.as_str(), written.finished_at), ("GET /x", None));
}

#[tokio::test]
async fn what_a_dead_manager_left_open_is_marked_and_nothing_else() {
    let store = memory();
    let first = open_on(store.clone()).await;
    let mut left = Vec::new();
    for number in 0..250 {
        let open = first.begin(record("GET /x")).await.expect("begun");
        if number % 100 == 42 {
            left.push(open);
        }
    }
    let sequences: Vec<u64> = left.iter().map(Open::sequence).collect();
    first.flush().await;
    // As after kill -9: nothing is said any more.
    left.into_iter().for_each(std::mem::forget);
    let second = open_on(store.clone()).await;
    let next = second.begin(record("GET /y")).await.expect("begun");
    assert_eq!(next.sequence(), 251, "the numbers go on");
    drop(next);
    let records = all(&second).await;
    without_gaps(&records);
    let marked: Vec<u64> =
        records.iter().filter(|record| record.interrupted).map(|record| record.sequence).collect();
    assert_eq!(marked, sequences);
    assert!(records.iter().all(|record| record.interrupted != record.finished_at.is_some()));
    let third = open_on(store).await;
    assert_eq!(all(&third).await, records, "a second start marks nothing again");
}

#[tokio::test]
async fn a_caller_that_hangs_up_while_its_start_is_written_leaves_no_open_record() {
    let audit = open_on(memory()).await;
    for _ in 0..50 {
        let begin = audit.begin(record("GET /x"));
        // Polled once, so that the start is on its way, and dropped.
        let mut begin = Box::pin(begin);
        let _ = futures_util::poll!(&mut begin);
        drop(begin);
    }
    let ended = async {
        loop {
            let records = all(&audit).await;
            if records.iter().all(|record| record.finished_at.is_some()) {
                return records;
            }
            tokio::task::yield_now().await;
        }
    };
    let records = tokio::time::timeout(Duration::from_secs(10), ended).await.expect("all end");
    without_gaps(&records);
    assert!(records.iter().all(|record| record.status == Some(STATUS_CALLER_GONE)));
}

/// A store that refuses changes while it is told to.
struct Failing {
    inner: Arc<MemoryStore>,
    fails: AtomicBool,
}

impl Store for Failing {
    fn revision(&self) -> Pending<'_, Revision> {
        self.inner.revision()
    }
    fn get<'a>(&'a self, key: &'a str) -> Pending<'a, Option<berth_store::Entry>> {
        self.inner.get(key)
    }
    fn list(&self, query: Query) -> Pending<'_, Page> {
        self.inner.list(query)
    }
    fn transact(&self, conditions: Vec<Condition>, operations: Vec<Operation>) -> Pending<'_, Revision> {
        if self.fails.load(Ordering::SeqCst) {
            return Box::pin(std::future::ready(Err(berth_store::Error::NoSpace { path: "full".into() })));
        }
        self.inner.transact(conditions, operations)
    }
    fn watch(&self, prefix: &str, from_revision: Revision) -> Watch {
        self.inner.watch(prefix, from_revision)
    }
    fn grant_lease(&self, ttl: Duration) -> Pending<'_, Lease> {
        self.inner.grant_lease(ttl)
    }
    fn keep_lease_alive(&self, id: LeaseId) -> Pending<'_, Lease> {
        self.inner.keep_lease_alive(id)
    }
    fn revoke_lease(&self, id: LeaseId) -> Pending<'_, ()> {
        self.inner.revoke_lease(id)
    }
    fn compact(&self, revision: Revision) -> Pending<'_, ()> {
        self.inner.compact(revision)
    }
}

#[tokio::test]
async fn a_full_disk_refuses_starts_loses_no_end_and_leaves_no_gap() {
    let store = Arc::new(Failing { inner: memory(), fails: AtomicBool::new(false) });
    let audit = open_on(store.clone()).await;
    let mut early = audit.begin(record("GET /early")).await.expect("begun");
    store.fails.store(true, Ordering::SeqCst);
    early.set(End::status(204));
    drop(early);
    for _ in 0..3 {
        assert!(audit.begin(record("GET /refused")).await.is_err(), "nothing without a record");
    }
    store.fails.store(false, Ordering::SeqCst);
    drop(audit.begin(record("GET /late")).await.expect("there is room again"));
    let records = all(&audit).await;
    without_gaps(&records);
    assert_eq!(
        records.iter().map(|record| (record.request.as_str(), record.status)).collect::<Vec<_>>(),
        [("GET /early", Some(204)), ("GET /late", Some(STATUS_CALLER_GONE))]
    );
}

#[tokio::test]
async fn pages_go_back_to_the_first() {
    let audit = open_on(memory()).await;
    for _ in 0..7 {
        drop(audit.begin(record("GET /x")).await.expect("begun"));
    }
    audit.flush().await;
    let (mut seen, mut before) = (Vec::new(), None);
    loop {
        let (page, more) = audit.newest(before, 3).await.expect("a page");
        seen.extend(page.iter().map(|record| record.sequence));
        before = seen.last().copied();
        if !more {
            break;
        }
    }
    assert_eq!(seen, [7, 6, 5, 4, 3, 2, 1]);
    assert_eq!(open_on(memory()).await.newest(None, 3).await.expect("nothing").0, Vec::new());
}
