//! Promises about leases: keys that vanish when nobody cares for them any more.

use std::time::Duration;

use super::{Subject, next, put, shown};
use crate::error::Error;
use crate::store::{LeaseId, Operation, Query, Store};

const TTL: Duration = Duration::from_secs(10);

async fn put_leased(store: &dyn Store, key: &str, lease: LeaseId) {
    store.transact(Vec::new(), vec![Operation::put_leased(key, "x", lease)]).await.unwrap();
}

async fn keys(store: &dyn Store) -> Vec<String> {
    store.list(Query::prefix("/")).await.unwrap().entries.into_iter().map(|entry| entry.key).collect()
}

/// And no other keys do; nobody has to call the store for it to happen.
pub async fn keys_vanish_with_their_lease_in_one_commit(subject: Subject) {
    let store = &*subject.store;
    let short = store.grant_lease(TTL).await.unwrap();
    let long = store.grant_lease(TTL * 100).await.unwrap();
    put_leased(store, "/b", short.id).await;
    put_leased(store, "/a", short.id).await;
    put_leased(store, "/long", long.id).await;
    let free = put(store, "/free", "x").await;
    assert_eq!(store.get("/a").await.unwrap().expect("it was put").lease, Some(short.id));
    let mut watch = store.watch("/", free.next());
    subject.time.pass(short.ttl).await;
    let commit = next(&mut watch).await;
    assert_eq!((shown(&commit).as_str(), commit.revision), ("-/a -/b", free.next()));
    assert_eq!(keys(store).await, ["/free", "/long"]);
}

/// For as often as it is kept alive, and not once longer.
pub async fn a_lease_that_is_kept_alive_lives_on(subject: Subject) {
    let store = &*subject.store;
    let lease = store.grant_lease(TTL).await.unwrap();
    put_leased(store, "/a", lease.id).await;
    let head = store.revision().await.unwrap();
    for _ in 0..5 {
        subject.time.pass(lease.ttl / 2).await;
        assert_eq!(store.keep_lease_alive(lease.id).await.unwrap(), lease);
        assert_eq!(keys(store).await, ["/a"]);
    }
    assert_eq!(store.revision().await.unwrap(), head, "keeping alive is no change");
    subject.time.pass(lease.ttl).await;
    assert_eq!(shown(&next(&mut store.watch("/", head.next())).await), "-/a");
}

/// Not by keep-alive, not for new keys, not a second time.
pub async fn an_ended_lease_can_not_be_used(subject: Subject) {
    let store = &*subject.store;
    let expired = store.grant_lease(TTL).await.unwrap();
    put_leased(store, "/a", expired.id).await;
    let head = store.revision().await.unwrap();
    subject.time.pass(expired.ttl).await;
    next(&mut store.watch("/", head.next())).await;
    let revoked = store.grant_lease(TTL).await.unwrap();
    store.revoke_lease(revoked.id).await.unwrap();
    for id in [expired.id, revoked.id, LeaseId(u64::MAX)] {
        let unknown = |error| matches!(error, Error::LeaseNotFound { id: named } if named == id);
        assert!(unknown(store.keep_lease_alive(id).await.unwrap_err()));
        assert!(unknown(store.revoke_lease(id).await.unwrap_err()));
        let operations = vec![Operation::put("/b", "x"), Operation::put_leased("/c", "x", id)];
        assert!(unknown(store.transact(Vec::new(), operations).await.unwrap_err()));
    }
    assert!(keys(store).await.is_empty(), "a transaction under an ended lease does nothing");
}

/// Giving up a lease does not wait for any clock.
pub async fn a_revoked_lease_takes_its_keys_at_once(subject: Subject) {
    let store = &*subject.store;
    let lease = store.grant_lease(TTL).await.unwrap();
    put_leased(store, "/a", lease.id).await;
    put_leased(store, "/b", lease.id).await;
    let head = put(store, "/free", "x").await;
    store.revoke_lease(lease.id).await.unwrap();
    assert_eq!(keys(store).await, ["/free"]);
    assert_eq!(store.revision().await.unwrap(), head.next());
    assert_eq!(shown(&next(&mut store.watch("/", head.next())).await), "-/a -/b");
}

/// The last put decides, also when it names no lease.
pub async fn a_key_that_is_put_again_belongs_to_its_new_lease_only(subject: Subject) {
    let store = &*subject.store;
    let one = store.grant_lease(TTL).await.unwrap();
    let two = store.grant_lease(TTL).await.unwrap();
    for key in ["/freed", "/moved", "/stays"] {
        put_leased(store, key, one.id).await;
    }
    put(store, "/freed", "x").await;
    put_leased(store, "/moved", two.id).await;
    store.revoke_lease(one.id).await.unwrap();
    assert_eq!(keys(store).await, ["/freed", "/moved"]);
    store.revoke_lease(two.id).await.unwrap();
    assert_eq!(keys(store).await, ["/freed"]);
}

/// Rounding is only ever up.
pub async fn a_lease_lasts_at_least_as_long_as_asked(subject: Subject) {
    let store = &*subject.store;
    for ttl in [Duration::from_nanos(1), Duration::from_micros(1_234_567), TTL] {
        let lease = store.grant_lease(ttl).await.unwrap();
        assert!(lease.ttl >= ttl, "{lease:?} for {ttl:?}");
        assert!(lease.ttl <= ttl + Duration::from_secs(10), "{lease:?} for {ttl:?}");
    }
}
