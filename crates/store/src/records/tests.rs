//! Promises of the typed layer, on the memory driver.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::*;
use crate::{ManualClock, MemoryStore};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Lamp {
    name: String,
    lumens: u32,
}

fn lamp(name: &str, lumens: u32) -> Lamp {
    Lamp { name: name.to_owned(), lumens }
}

fn store() -> MemoryStore {
    MemoryStore::new(Arc::new(ManualClock::new()))
}

#[tokio::test]
async fn a_record_is_read_back_as_what_it_was() {
    let store = store();
    let lamps = Records::<Lamp>::new(&store, "/lamps/");
    let revision = lamps.create("hall", &lamp("Hall ü \"1\"", 800)).await.unwrap();
    let found = lamps.require("hall").await.unwrap();
    assert_eq!(found, Versioned { id: "hall".to_owned(), value: lamp("Hall ü \"1\"", 800), revision });
    assert_eq!(lamps.get("attic").await.unwrap(), None);
    let error = lamps.require("attic").await.unwrap_err();
    assert!(matches!(&error, Error::NotFound { key } if key == "/lamps/attic"), "{error}");
}

#[tokio::test]
async fn a_record_is_created_once_and_changed_only_by_who_saw_its_last_state() {
    let store = store();
    let lamps = Records::<Lamp>::new(&store, "/lamps/");
    let first = lamps.create("hall", &lamp("a", 1)).await.unwrap();
    assert!(matches!(lamps.create("hall", &lamp("b", 2)).await, Err(Error::Conflict { .. })));
    let second = lamps.update("hall", &lamp("c", 3), first).await.unwrap();
    assert!(matches!(lamps.update("hall", &lamp("d", 4), first).await, Err(Error::Conflict { .. })));
    assert!(matches!(lamps.delete("hall", first).await, Err(Error::Conflict { .. })));
    assert_eq!(lamps.require("hall").await.unwrap().value, lamp("c", 3));
    lamps.delete("hall", second).await.unwrap();
    assert_eq!(lamps.get("hall").await.unwrap(), None);
    assert!(matches!(lamps.update("hall", &lamp("e", 5), second).await, Err(Error::Conflict { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn updates_by_function_lose_nothing_however_many_run_at_once() {
    let store: Arc<dyn Store> = Arc::new(store());
    Records::<Lamp>::new(&*store, "/lamps/").create("hall", &lamp("a", 0)).await.unwrap();
    let tasks: Vec<_> = (0..32)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move {
                let lamps = Records::<Lamp>::new(&*store, "/lamps/");
                for _ in 0..20 {
                    lamps.update_with("hall", |lamp| brighter(lamp, 1)).await.unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let lamps = Records::<Lamp>::new(&*store, "/lamps/");
    assert_eq!(lamps.require("hall").await.unwrap().value.lumens, 32 * 20);
}

fn brighter(lamp: &mut Lamp, lumens: u32) -> Result<(), Error> {
    lamp.lumens += lumens;
    Ok(())
}

#[tokio::test]
async fn an_update_by_function_that_changes_nothing_writes_nothing() {
    let store = store();
    let lamps = Records::<Lamp>::new(&store, "/lamps/");
    let revision = lamps.create("hall", &lamp("a", 1)).await.unwrap();
    let same = lamps.update_with("hall", |lamp| brighter(lamp, 0)).await.unwrap();
    assert_eq!(same.revision, revision);
    let other = lamps.update_with("hall", |lamp| brighter(lamp, 1)).await.unwrap();
    assert_eq!((other.revision, other.value.lumens), (revision.next(), 2));
    assert_eq!(store.revision().await.unwrap(), revision.next());
}

#[tokio::test]
async fn an_update_by_function_ends_with_the_functions_error_and_changes_nothing() {
    #[derive(Debug, thiserror::Error)]
    enum Refused {
        #[error("too bright")]
        TooBright,
        #[error("the store")]
        Store(#[from] Error),
    }
    let store = store();
    let lamps = Records::<Lamp>::new(&store, "/lamps/");
    let revision = lamps.create("hall", &lamp("a", 1)).await.unwrap();
    let refuse = |lamp: &mut Lamp| {
        lamp.lumens = u32::MAX;
        Err(Refused::TooBright)
    };
    assert!(matches!(lamps.update_with("hall", refuse).await, Err(Refused::TooBright)));
    assert_eq!(lamps.require("hall").await.unwrap().revision, revision);
    let missing = lamps.update_with("attic", |_| Ok::<(), Refused>(())).await.unwrap_err();
    assert!(matches!(missing, Refused::Store(Error::NotFound { .. })), "{missing}");
}

#[tokio::test]
async fn a_value_of_another_type_is_an_error_that_names_the_record() {
    let store = store();
    let lamps = Records::<Lamp>::new(&store, "/lamps/");
    for value in ["", "null", "{\"name\":\"a\"}", "{\"name\":\"a\",\"lumens\":-1}", "[", "\u{feff}{}"] {
        store.put("/lamps/odd", value.to_owned().into()).await.unwrap();
        let undecodable = |error: Error| match error {
            Error::Undecodable { key, expected, .. } => {
                assert_eq!(key, "/lamps/odd");
                assert!(expected.ends_with("Lamp"), "{expected}");
            }
            other => panic!("{value} gave {other}"),
        };
        undecodable(lamps.get("odd").await.unwrap_err());
        undecodable(lamps.list().await.unwrap_err());
        undecodable(lamps.update_with("odd", |_| Ok::<(), Error>(())).await.unwrap_err());
    }
}

#[tokio::test]
async fn a_list_holds_all_records_of_its_kind_however_many() {
    let store = store();
    let lamps = Records::<Lamp>::new(&store, "/lamps/");
    let count = PAGE_RECORDS * 2 + 1;
    for n in 0..count {
        lamps.create(&format!("{n:05}"), &lamp("a", 1)).await.unwrap();
    }
    Records::<u32>::new(&store, "/other/").create("x", &1).await.unwrap();
    let (all, revision) = lamps.list().await.unwrap();
    assert_eq!(all.len(), count);
    assert!(all.iter().enumerate().all(|(n, lamp)| lamp.id == format!("{n:05}")));
    assert_eq!(revision, store.revision().await.unwrap());
    let (page, at, more) = lamps.page(Some("00001"), 2, None).await.unwrap();
    assert_eq!((&*page[0].id, &*page[1].id, at, more), ("00002", "00003", revision, true));
}

#[tokio::test]
async fn several_records_change_together_or_not_at_all() {
    let store = store();
    let lamps = Records::<Lamp>::new(&store, "/lamps/");
    let counts = Records::<u32>::new(&store, "/counts/");
    let count = counts.create("lamps", &0).await.unwrap();
    let both = || vec![lamps.put("hall", &lamp("a", 1)).unwrap(), counts.put("lamps", &1).unwrap()];
    let conditions = || vec![lamps.absent("hall"), counts.unchanged("lamps", count)];
    let revision = store.transact(conditions(), both()).await.unwrap();
    assert_eq!(lamps.require("hall").await.unwrap().revision, revision);
    assert_eq!(
        counts.require("lamps").await.unwrap(),
        Versioned { id: "lamps".to_owned(), value: 1, revision }
    );
    assert!(matches!(store.transact(conditions(), both()).await, Err(Error::Conflict { .. })));
}
