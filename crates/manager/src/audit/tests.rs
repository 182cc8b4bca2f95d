use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU8, Ordering};
use std::time::Duration;

use berth_store::{
    Condition, Entry, Lease, LeaseId, MemoryStore, Operation, Page, Pending, Query, Revision, Watch,
};
use berth_tlog::export::{Question, Verified, verify};
use berth_tlog::{Checkpoint, Hash, VerifyingKey, proof};
use futures_util::TryStreamExt;

use super::*;
use crate::audit::format::Format;
use crate::clock::SystemClock;

fn memory() -> Arc<MemoryStore> {
    Arc::new(MemoryStore::new(Arc::new(berth_store::SystemClock::new())))
}

fn signing_key() -> Arc<SigningKey> {
    Arc::new(SigningKey::generate("berth-audit/test").expect("a key"))
}

async fn open_on(store: Arc<dyn Store>) -> Audit {
    open_with(store, &signing_key()).await
}

async fn open_with(store: Arc<dyn Store>, key: &Arc<SigningKey>) -> Audit {
    Audit::open(store, Arc::new(SystemClock), Arc::clone(key), OtherKey::Refused).await.expect("an audit")
}

fn record(request: &str) -> AuditRecord {
    AuditRecord {
        request_id: "req".to_owned(),
        actor: "somebody".to_owned(),
        method: "token".to_owned(),
        action: "vm.view".to_owned(),
        request: request.to_owned(),
        resources: vec!["cluster".to_owned()],
        decision: ALLOW.to_owned(),
        started_at: Timestamp::from_millis(1),
        ..AuditRecord::default()
    }
}

async fn all(audit: &Audit) -> Vec<AuditRecord> {
    audit.flush().await;
    let found = audit.newest(&Filter::default(), None, 10_000).await.expect("records");
    assert_eq!(found.more_below, None);
    found.records.into_iter().rev().collect()
}

fn without_gaps(records: &[AuditRecord]) {
    let numbers: Vec<u64> = records.iter().filter_map(|record| record.sequence).collect();
    assert_eq!(numbers, (0..records.len() as u64).collect::<Vec<_>>());
}

async fn export(audit: &Audit, since: Option<u64>, until: Option<u64>) -> Vec<u8> {
    let time = |millis: Option<u64>| millis.map(Timestamp::from_millis);
    let stream = audit.export(Format::Jsonl, time(since), time(until)).await.expect("an export");
    let parts: Vec<bytes::Bytes> = stream.try_collect().await.expect("a whole export");
    parts.concat()
}

fn check(export: &[u8], audit: &Audit) -> Verified {
    let key: VerifyingKey = audit.key().key.parse().expect("a key");
    verify(export, &Question { keys: vec![key], known: None }).unwrap_or_else(|fault| panic!("{fault}"))
}

/// Writes so many records, many of them at once.
async fn fill(audit: &Audit, count: u32) {
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..count {
        let audit = audit.clone();
        tasks.spawn(async move {
            let mut open = audit.begin(record(&format!("GET /{number}"))).await.expect("begun");
            tokio::task::yield_now().await;
            open.set(End::status(200));
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.expect("no panic");
    }
    audit.flush().await;
}

#[tokio::test]
async fn many_at_once_get_numbers_without_gaps_and_each_its_end() {
    let audit = open_on(memory()).await;
    fill(&audit, 3000).await;
    let records = all(&audit).await;
    assert_eq!(records.len(), 3000);
    without_gaps(&records);
    assert!(records.iter().all(|record| record.finished_at.is_some() && record.status == Some(200)));
    assert!(records.iter().all(|record| record.result == OK));
    assert!(check(&export(&audit, None, None).await, &audit).is_whole());
}

#[tokio::test]
async fn the_start_is_down_when_begin_returns() {
    let store = memory();
    let audit = open_on(store.clone()).await;
    let open = audit.begin(record("GET /x")).await.expect("begun");
    let entries = store.list(Query::prefix("/audit/open/")).await.expect("a store").entries;
    assert_eq!(entries.len(), 1);
    assert!(String::from_utf8_lossy(&entries[0].value).contains("GET /x"));
    drop(open);
    audit.flush().await;
    let left = store.list(Query::prefix("/audit/open/")).await.expect("a store").entries;
    assert_eq!(left, [], "a record is in the log or in the open area, not in both");
}

#[tokio::test]
async fn what_a_dead_manager_left_open_is_marked_and_nothing_else() {
    let store = memory();
    let key = signing_key();
    let first = open_with(store.clone(), &key).await;
    let mut left = Vec::new();
    for number in 0..250 {
        let open = first.begin(record(&format!("GET /{number}"))).await.expect("begun");
        if number % 100 == 42 {
            left.push(open);
        }
    }
    first.flush().await;
    // As after kill -9: nothing is said any more.
    left.into_iter().for_each(std::mem::forget);
    let second = open_with(store.clone(), &key).await;
    assert_eq!(second.size(), 250, "the numbers go on");
    drop(second.begin(record("GET /y")).await.expect("begun"));
    let records = all(&second).await;
    without_gaps(&records);
    let mut marked: Vec<&str> =
        records.iter().filter(|record| record.interrupted).map(|record| &*record.request).collect();
    marked.sort_unstable();
    assert_eq!(marked, ["GET /142", "GET /242", "GET /42"]);
    assert!(records.iter().all(|record| record.interrupted != record.finished_at.is_some()));
    let third = open_with(store, &key).await;
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
            if records.len() == 50 {
                return records;
            }
            tokio::task::yield_now().await;
        }
    };
    let records = tokio::time::timeout(Duration::from_secs(10), ended).await.expect("all end");
    without_gaps(&records);
    assert!(records.iter().all(|record| record.status == Some(STATUS_CALLER_GONE)));
    assert_eq!(audit.under_way(), []);
}

/// How a store fails.
const NEVER: u8 = 0;
/// It is full.
const FULL: u8 = 1;
/// It says that it failed, and wrote all the same; and can't be read for a while either.
const LIES: u8 = 2;

/// A store that fails as it is told to, and dies after so many changes.
struct Failing {
    inner: Arc<MemoryStore>,
    how: AtomicU8,
    /// How many changes are still made; below 0: nothing is made and nothing answered any more.
    left: AtomicI64,
}

impl Failing {
    fn on(inner: Arc<MemoryStore>) -> Arc<Self> {
        Arc::new(Self { inner, how: AtomicU8::new(NEVER), left: AtomicI64::new(i64::MAX) })
    }
}

impl Store for Failing {
    fn revision(&self) -> Pending<'_, Revision> {
        self.inner.revision()
    }
    fn get<'a>(&'a self, key: &'a str) -> Pending<'a, Option<Entry>> {
        self.inner.get(key)
    }
    fn list(&self, query: Query) -> Pending<'_, Page> {
        self.inner.list(query)
    }
    fn transact(&self, conditions: Vec<Condition>, operations: Vec<Operation>) -> Pending<'_, Revision> {
        let left = self.left.fetch_sub(1, Ordering::SeqCst);
        if left == 0 {
            // Killed in the middle: made, and nobody is told.
            return Box::pin(async move {
                let _ = self.inner.transact(conditions, operations).await;
                std::future::pending().await
            });
        }
        if left < 0 {
            return Box::pin(std::future::pending());
        }
        match self.how.load(Ordering::SeqCst) {
            FULL => Box::pin(std::future::ready(Err(berth_store::Error::NoSpace { path: "full".into() }))),
            LIES => Box::pin(async move {
                self.inner.transact(conditions, operations).await?;
                Err(berth_store::Error::Closed)
            }),
            _ => self.inner.transact(conditions, operations),
        }
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

async fn refuses_and_recovers(how: u8) {
    let store = Failing::on(memory());
    let key = signing_key();
    let audit = open_with(store.clone(), &key).await;
    let mut early = audit.begin(record("GET /early")).await.expect("begun");
    store.how.store(how, Ordering::SeqCst);
    early.set(End::status(204));
    drop(early);
    for _ in 0..3 {
        assert!(audit.begin(record("GET /refused")).await.is_err(), "nothing without a record");
        assert!(audit.write(record("GET /refused"), End::status(403)).await.is_err() || how == LIES);
    }
    store.how.store(NEVER, Ordering::SeqCst);
    drop(audit.begin(record("GET /late")).await.expect("there is room again"));
    let records = all(&audit).await;
    without_gaps(&records);
    let of = |request: &str| records.iter().filter(|record| record.request == request).collect::<Vec<_>>();
    assert_eq!(of("GET /early").len(), 1, "written once, whatever was said of it: {records:?}");
    assert_eq!(of("GET /early")[0].status, Some(204));
    assert_eq!(of("GET /late").len(), 1);
    assert_eq!(records.len() - of("GET /refused").len(), 2);
    assert!(how == LIES || of("GET /refused").is_empty());
    assert!(check(&export(&audit, None, None).await, &audit).is_whole());
    // What was refused is not taken for open by the next manager either.
    let next = open_with(store, &key).await;
    assert_eq!(all(&next).await, records);
}

#[tokio::test]
async fn a_full_disk_refuses_starts_loses_no_end_and_leaves_no_gap() {
    refuses_and_recovers(FULL).await;
}

#[tokio::test]
async fn a_write_that_was_made_although_it_failed_is_found_out_and_not_repeated() {
    refuses_and_recovers(LIES).await;
}

#[tokio::test]
async fn a_manager_killed_at_any_write_loses_nothing_that_was_begun_and_logs_nothing_twice() {
    for killed_at in 0..24 {
        let (inner, key) = (memory(), signing_key());
        let dying = Failing::on(inner.clone());
        let first = open_with(dying.clone(), &key).await;
        dying.left.store(killed_at, Ordering::SeqCst);
        let (begun, counted) =
            (Arc::new(std::sync::Mutex::new(Vec::new())), Arc::new(tokio::sync::Notify::new()));
        let mut tasks = tokio::task::JoinSet::new();
        for number in 0..40 {
            let (first, begun, counted) = (first.clone(), Arc::clone(&begun), Arc::clone(&counted));
            tasks.spawn(async move {
                for round in 0..8 {
                    let name = format!("GET /{number}-{round}");
                    let Ok(mut open) = first.begin(record(&name)).await else { return };
                    begun.lock().expect("lock").push(name);
                    counted.notify_one();
                    open.set(End::status(200));
                    drop(open);
                    tokio::task::yield_now().await;
                }
            });
        }
        let dead = async {
            while dying.left.load(Ordering::SeqCst) >= 0 {
                if tokio::time::timeout(Duration::from_millis(20), counted.notified()).await.is_err()
                    && tasks.try_join_next().is_some()
                {
                    return;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(20), dead).await.expect("it dies");
        tasks.shutdown().await;
        drop(first);
        let second = open_with(inner, &key).await;
        let records = all(&second).await;
        without_gaps(&records);
        let mut names: Vec<&str> = records.iter().map(|record| &*record.request).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count, "killed at {killed_at}: one record for each request");
        for name in begun.lock().expect("lock").iter() {
            assert!(names.binary_search(&name.as_str()).is_ok(), "killed at {killed_at}: {name} is lost");
        }
        assert!(records.iter().all(|record| record.interrupted != record.finished_at.is_some()));
        assert!(check(&export(&second, None, None).await, &second).is_whole());
    }
}

#[tokio::test]
async fn pages_go_back_to_the_first_and_filters_take_what_they_say() {
    let audit = open_on(memory()).await;
    for number in 0..7 {
        let actor = if number % 2 == 0 { "even" } else { "odd" };
        let record = AuditRecord { actor: actor.to_owned(), ..record("GET /x") };
        drop(audit.begin(record).await.expect("begun"));
    }
    audit.record_system("baseline", "snapshot.create", "vm:default/books", OK);
    audit.flush().await;
    let (mut seen, mut before) = (Vec::new(), None);
    loop {
        let page = audit.newest(&Filter::default(), before, 3).await.expect("a page");
        seen.extend(page.records.iter().filter_map(|record| record.sequence));
        before = page.more_below;
        if before.is_none() {
            break;
        }
    }
    assert_eq!(seen, [7, 6, 5, 4, 3, 2, 1, 0]);
    let count = async |filter: Filter| audit.newest(&filter, None, 100).await.expect("a page").records.len();
    let text = |text: &str| Some(text.to_owned());
    assert_eq!(count(Filter { actor: text("odd"), ..Filter::default() }).await, 3);
    assert_eq!(count(Filter { actor: text("system:baseline"), ..Filter::default() }).await, 1);
    assert_eq!(count(Filter { action: text("vm"), ..Filter::default() }).await, 7);
    assert_eq!(count(Filter { action: text("snapshot.create"), ..Filter::default() }).await, 1);
    assert_eq!(count(Filter { resource: text("default/books"), ..Filter::default() }).await, 1);
    assert_eq!(count(Filter { decision: text(DENY), ..Filter::default() }).await, 0);
    let far = Timestamp::from_millis(u64::MAX / 4);
    assert_eq!(count(Filter { since: Some(far), ..Filter::default() }).await, 0);
    assert_eq!(count(Filter { until: Some(far), ..Filter::default() }).await, 8);
    assert_eq!(open_on(memory()).await.newest(&Filter::default(), None, 3).await.expect("none").records, []);
}

#[tokio::test]
async fn proofs_lead_from_each_record_to_the_signed_root_and_from_each_old_log_to_the_new() {
    let audit = open_on(memory()).await;
    let mut seen: Vec<Checkpoint> = Vec::new();
    for count in [1, 200, 55, 1, 300, 7] {
        fill(&audit, count).await;
        let keys = [audit.key().key.parse().expect("a key")];
        seen.push(Checkpoint::open(&audit.checkpoint().note, &keys).expect("signed"));
    }
    let newest = seen.last().expect("some").clone();
    assert_eq!(newest.size, 564);
    let hashes =
        |texts: &[String]| -> Vec<Hash> { texts.iter().map(|text| text.parse().expect("a hash")).collect() };
    for sequence in [0, 1, 199, 200, 255, 256, 257, 511, 512, 563] {
        let found = audit.inclusion(sequence, None).await.expect("in it");
        let leaf = Hash::leaf(found.leaf.as_bytes());
        proof::verify_inclusion(&leaf, sequence, newest.size, &newest.root, &hashes(&found.proof))
            .expect("proven");
        assert!(found.leaf.starts_with(&format!("{{\"sequence\":{sequence},")));
    }
    for old in &seen {
        let found = audit.consistency(old.size, None).await.expect("smaller");
        let steps = hashes(&found.proof);
        proof::verify_consistency(old.size, newest.size, &old.root, &newest.root, &steps).expect("proven");
        let inner = audit.inclusion(0, Some(old.size)).await.expect("in it");
        assert_eq!(inner.root, old.root.to_string());
    }
    assert!(audit.inclusion(564, None).await.is_err());
    assert!(audit.consistency(9, Some(565)).await.is_err());
}

/// A clock that goes on a millisecond each time it is asked.
#[derive(Default)]
struct Ticking(std::sync::atomic::AtomicU64);

impl Clock for Ticking {
    fn now(&self) -> Timestamp {
        Timestamp::from_millis(self.0.fetch_add(1, Ordering::SeqCst))
    }
    fn sleep(&self, duration: Duration) -> crate::clock::Sleep {
        Box::pin(tokio::time::sleep(duration))
    }
}

#[tokio::test]
async fn any_stretch_of_time_is_exported_whole_and_can_be_verified() {
    let audit = Audit::open(memory(), Arc::new(Ticking::default()), signing_key(), OtherKey::Refused)
        .await
        .expect("an audit");
    for round in [300u64, 468] {
        for number in 0..round {
            audit.record_system("test", "tick", &number.to_string(), OK);
        }
        audit.flush().await;
    }
    assert_eq!(audit.size(), 768);
    let cuts = [0, 1, 100, 255, 256, 257, 300, 511, 512, 600, 767, 768, 5000];
    for since in cuts {
        for until in cuts {
            let found = check(&export(&audit, Some(since), Some(until)).await, &audit);
            let expected = since.min(768)..until.min(768).max(since.min(768));
            assert_eq!(found.first..found.end, expected, "{since} {until}");
        }
    }
    let odd = Audit::open(memory(), Arc::new(Ticking::default()), signing_key(), OtherKey::Refused)
        .await
        .expect("an audit");
    assert!(check(&export(&odd, None, None).await, &odd).is_whole(), "a log without records");
    for _ in 0..300 {
        odd.record_system("test", "tick", "x", OK);
    }
    odd.flush().await;
    for (since, until) in [(290, 295), (255, 257), (300, 300), (299, 299), (9999, 9999)] {
        check(&export(&odd, Some(since), Some(until)).await, &odd);
    }
}

#[tokio::test]
async fn a_store_that_was_tampered_with_stops_the_start() {
    let (store, key) = (memory(), signing_key());
    let audit = open_with(store.clone(), &key).await;
    fill(&audit, 300).await;
    let leaves = store.list(Query::prefix("/audit/leaves/000000000001/")).await.expect("leaves").entries;
    let text = String::from_utf8(leaves[0].value.to_vec()).expect("text").replace("somebody", "nobody!!");
    store.put(&leaves[0].key, text.into()).await.expect("tampered");
    let refused =
        Audit::open(store.clone(), Arc::new(SystemClock), Arc::clone(&key), OtherKey::Refused).await.err();
    assert!(matches!(refused, Some(AuditError::Damaged { .. })), "{refused:?}");
    store.put(&leaves[0].key, leaves[0].value.clone()).await.expect("mended");
    open_with(store.clone(), &key).await;
    let head = store.get("/audit/head").await.expect("a store").expect("a head");
    let text = String::from_utf8(head.value.to_vec()).expect("text").replace("300", "299");
    store.put("/audit/head", text.into()).await.expect("tampered");
    assert!(Audit::open(store, Arc::new(SystemClock), key, OtherKey::Refused).await.is_err());
}

#[tokio::test]
async fn a_log_that_another_key_signed_is_gone_on_with_only_on_purpose() {
    let (store, clock) = (memory(), Arc::new(SystemClock));
    fill(&open_on(store.clone()).await, 3).await;
    let forger = signing_key();
    let refused =
        Audit::open(store.clone(), clock.clone(), Arc::clone(&forger), OtherKey::Refused).await.err();
    assert!(matches!(refused, Some(AuditError::Damaged { .. })), "{refused:?}");
    let on = Audit::open(store.clone(), clock.clone(), Arc::clone(&forger), OtherKey::Accepted).await;
    fill(&on.expect("on purpose"), 3).await;
    Audit::open(store, clock, forger, OtherKey::Refused).await.expect("from then on it is the log's key");
}

#[tokio::test]
async fn two_managers_on_one_log_don_t_both_write() {
    let (store, key) = (memory(), signing_key());
    let (first, second) = (open_with(store.clone(), &key).await, open_with(store.clone(), &key).await);
    fill(&first, 3).await;
    assert!(second.write(record("GET /x"), End::status(403)).await.is_err());
    assert!(matches!(
        second.begin(record("GET /x")).await.err(),
        Some(AuditError::Closed | AuditError::Refused(_))
    ));
    fill(&first, 3).await;
    assert_eq!(all(&first).await.len(), 6);
}

#[tokio::test]
async fn what_a_caller_stuffs_into_a_request_does_not_make_a_record_large() {
    let audit = open_on(memory()).await;
    let long = "\u{1f4a3}".repeat(100_000);
    let stuffed = AuditRecord {
        reason: long.clone(),
        resources: vec![long.clone(); 100],
        ..record(&format!("GET /{long}"))
    };
    let mut open = audit.begin(stuffed).await.expect("begun");
    let named = Named::default();
    (0..100).for_each(|number| named.add(&format!("{number}{long}")));
    open.share(named);
    drop(open);
    audit.flush().await;
    let lines = audit.lines_from(0).await.expect("lines");
    assert!(lines[0].len() < 100_000, "{}", lines[0].len());
}
