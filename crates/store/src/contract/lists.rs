//! Promises about reading many records, now and as they were.

use bytes::Bytes;

use super::{Subject, put};
use crate::error::Error;
use crate::store::{Query, Revision, Store};

async fn keys(store: &dyn Store, query: Query) -> Vec<String> {
    store.list(query).await.unwrap().entries.into_iter().map(|entry| entry.key).collect()
}

/// Neighbours of the prefix are the traps: shorter, longer, one more, and the end of Unicode.
pub async fn a_list_holds_what_begins_with_the_prefix_in_byte_order(subject: Subject) {
    let store = &*subject.store;
    let inside = ["/vms/", "/vms/\u{1}", "/vms/Z", "/vms/a", "/vms/a/b", "/vms/ä", "/vms/\u{10ffff}x"];
    let outside = ["/vms", "/vms.", "/vms0", "/vm", "/VMS/a", "a", "\u{10ffff}"];
    for key in inside.iter().rev().chain(&outside) {
        put(store, key, key).await;
    }
    assert_eq!(keys(store, Query::prefix("/vms/")).await, inside);
    assert_eq!(keys(store, Query::prefix("/vms/a")).await, ["/vms/a", "/vms/a/b"]);
    assert_eq!(keys(store, Query::prefix("\u{10ffff}")).await, ["\u{10ffff}"]);
    assert_eq!(keys(store, Query::prefix("/nothing")).await, [""; 0]);
    let mut all = [&inside[..], &outside].concat();
    all.sort_unstable();
    assert_eq!(keys(store, Query::prefix("")).await, all);
}

/// Whatever the size of a page, and wherever the last one ended.
pub async fn pages_join_to_the_whole(subject: Subject) {
    let store = &*subject.store;
    for n in 0..10 {
        put(store, &format!("/p/{n}"), "x").await;
    }
    put(store, "/q", "beyond").await;
    let whole = store.list(Query::prefix("/p/")).await.unwrap();
    assert!(!whole.more);
    for limit in [1, 2, 3, 5, 9, 10, 11, usize::MAX] {
        let mut joined = Vec::new();
        let mut query = Query::prefix("/p/").limit(limit);
        loop {
            let page = store.list(query.clone()).await.unwrap();
            assert!(page.entries.len() <= limit);
            assert!(!page.entries.is_empty(), "a page that was announced holds something");
            joined.extend(page.entries);
            if !page.more {
                break;
            }
            query = query.after(&*joined.last().expect("checked above").key);
        }
        assert_eq!(joined, whole.entries, "in pages of {limit}");
    }
    assert_eq!(keys(store, Query::prefix("/p/").after("/a")).await.len(), 10, "after what lies before");
    assert_eq!(keys(store, Query::prefix("/p/").after("/p/4x")).await[0], "/p/5", "after what is not there");
    assert!(keys(store, Query::prefix("/p/").after("/q")).await.is_empty(), "after what lies behind");
}

/// A reader who holds on to the first page's revision sees no part of what happens meanwhile.
pub async fn paging_sees_one_revision_while_others_write(subject: Subject) {
    let store = &*subject.store;
    for n in 0..20 {
        put(store, &format!("/p/{n:02}"), "old").await;
    }
    let whole = store.list(Query::prefix("/p/")).await.unwrap();
    let mut page = store.list(Query::prefix("/p/").limit(3)).await.unwrap();
    let mut joined = page.entries.clone();
    while page.more {
        let last = &joined.last().expect("a page that was announced holds something").key;
        let number: u32 = last[3..].parse().expect("keys end in a number");
        store.delete(&format!("/p/{:02}", number + 1)).await.unwrap();
        put(store, &format!("/p/{:02}", number + 2), "new").await;
        put(store, &format!("{last}-new"), "new").await;
        let query = Query::prefix("/p/").limit(3).at(page.revision).after(&**last);
        page = store.list(query).await.unwrap();
        assert_eq!(page.revision, whole.revision);
        joined.extend(page.entries.clone());
    }
    assert_eq!(joined, whole.entries);
}

/// Every state from the compacted revision on, none before.
pub async fn an_earlier_state_can_be_listed_until_it_is_compacted(subject: Subject) {
    let store = &*subject.store;
    let mut states = Vec::new();
    for n in 0..12u32 {
        let key = format!("/s/{}", n % 3);
        if n % 4 == 3 {
            store.delete(&key).await.unwrap();
        } else {
            put(store, &key, &n.to_string()).await;
        }
        states.push(store.list(Query::prefix("/s/")).await.unwrap());
    }
    for compacted in [0, 4, 7, 11] {
        store.compact(states[compacted].revision).await.unwrap();
        for (n, state) in states.iter().enumerate() {
            let query = Query::prefix("/s/").at(state.revision);
            match store.list(query).await {
                Ok(page) if n >= compacted => assert_eq!(&page, state),
                Err(Error::Compacted { asked, oldest }) if n < compacted => {
                    assert_eq!((asked, oldest), (state.revision, states[compacted].revision));
                }
                other => panic!("state {n} with {compacted} compacted: {other:?}"),
            }
        }
    }
}

/// Nobody can promise what will be.
pub async fn a_revision_that_is_not_reached_is_refused(subject: Subject) {
    let store = &*subject.store;
    let head = put(store, "/a", "1").await;
    for revision in [head.next(), Revision(u64::MAX)] {
        let list = store.list(Query::prefix("/").at(revision)).await.unwrap_err();
        assert!(matches!(list, Error::Invalid { field: "revision", .. }), "{list}");
        let compact = store.compact(revision).await.unwrap_err();
        assert!(matches!(compact, Error::Invalid { field: "revision", .. }), "{compact}");
    }
    assert_eq!(store.list(Query::prefix("/").at(head)).await.unwrap().entries.len(), 1);
}

/// Compaction is about the past only.
pub async fn compacting_keeps_the_present_and_may_be_repeated(subject: Subject) {
    let store = &*subject.store;
    let old = put(store, "/a", "1").await;
    put(store, "/b", "1").await;
    store.delete("/b").await.unwrap();
    let head = put(store, "/a", "2").await;
    let before = store.list(Query::prefix("")).await.unwrap();
    for revision in [head, head, old] {
        store.compact(revision).await.unwrap();
        assert_eq!(store.list(Query::prefix("")).await.unwrap(), before);
        assert_eq!(store.list(Query::prefix("").at(head)).await.unwrap(), before);
    }
    assert_eq!(store.revision().await.unwrap(), head, "forgetting is no change");
    store.put("/b", Bytes::from_static(b"2")).await.unwrap();
    let entry = store.get("/a").await.unwrap().expect("it was put");
    assert_eq!((entry.create_revision, entry.version), (old, 2), "what an entry says of itself stays true");
}
