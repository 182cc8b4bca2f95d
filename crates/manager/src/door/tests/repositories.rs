//! Repositories: what leaves the cluster and what comes into it takes rights of its own, and no answer has a key in it.

use berth_model::access::Action;
use berth_model::vm::Vm;
use serde_json::{Value, json};

use super::world::{REPOSITORY_PASSWORD, World, give, member, put, role};

const EXPORT: &str = "/v1/vms/own%2Fthing/snapshots/first/export?dry_run=true";
const IMPORT: &str = "/v1/repositories/own-backups/import?dry_run=true";

fn to(repository: &str) -> Value {
    json!({"repository": repository})
}

#[tokio::test]
async fn an_export_takes_the_right_to_it_and_a_repository_that_one_sees() {
    let world = World::new().await;
    let cluster = world.cluster();
    let (own, foreign) = (Some(&world.own.segment), Some(&world.foreign.segment));
    role(cluster, "exporter", &[Action::SnapshotExport]).await;
    let (user, asks) = member(cluster, "ada", &[("configurator", own)]).await;
    assert_eq!(world.refused(&asks, "POST", EXPORT, to("own-backups")).await, "not-allowed");
    give(cluster, &user, "exporter", own, None).await;
    let said = world.must(&asks, "POST", EXPORT, to("own-backups")).await;
    assert!(said["summary"].as_str().is_some_and(|text| text.contains("own-backups")), "{said}");
    // Another's repository is for it not there, as one that is nowhere.
    assert_eq!(world.refused(&asks, "POST", EXPORT, to("foreign-backups")).await, "not-allowed");
    assert_eq!(world.refused(&asks, "POST", EXPORT, to("nowhere")).await, "not-allowed");
    give(cluster, &user, "viewer", foreign, None).await;
    world.must(&asks, "POST", EXPORT, to("foreign-backups")).await;
    assert_eq!(
        world.refused(&asks, "POST", &EXPORT.replace("own", "foreign"), to("own-backups")).await,
        "not-allowed"
    );
}

#[tokio::test]
async fn production_is_exported_by_two_people() {
    let world = World::new().await;
    let cluster = world.cluster();
    let mut vm: Vm = world.own.vm.clone();
    vm.spec.class = "production".parse().expect("a name");
    put(cluster, &vm).await;
    let (_, asks) = member(cluster, "ada", &[("admin", Some(&world.own.segment))]).await;
    assert_eq!(world.refused(&asks, "POST", EXPORT, to("own-backups")).await, "approval-needed");
}

#[tokio::test]
async fn to_read_a_repository_takes_a_right_there_and_to_make_a_vm_of_it_one_where_that_is_to_be() {
    let world = World::new().await;
    let cluster = world.cluster();
    let own = Some(&world.own.segment);
    role(cluster, "importer", &[Action::SnapshotImport]).await;
    let (user, asks) = member(cluster, "ada", &[("configurator", own)]).await;
    let wish = |segment: &str| json!({"backup": "00", "name": "new", "segment": segment});
    let backups = "/v1/repositories/own-backups/backups";
    assert_eq!(world.refused(&asks, "POST", IMPORT, wish("own")).await, "not-allowed");
    assert_eq!(world.refused(&asks, "GET", backups, Value::Null).await, "not-allowed");
    give(cluster, &user, "importer", own, None).await;
    assert_eq!(world.refused(&asks, "POST", IMPORT, wish("foreign")).await, "not-allowed");
    // What is asked from here on is a host, and there is none that answers.
    let got = world.ask(&asks, "POST", IMPORT, wish("own")).await;
    assert_eq!(got.problem().0, "unreachable", "{}", got.json());
    let other = IMPORT.replace("own-", "foreign-");
    assert_eq!(world.refused(&asks, "POST", &other, wish("own")).await, "not-allowed");
}

#[tokio::test]
async fn a_segments_repository_has_keys_of_its_own_and_uses_none_of_the_hosts() {
    let world = World::new().await;
    let cluster = world.cluster();
    let (_, asks) = member(cluster, "ada", &[("admin", Some(&world.own.segment))]).await;
    let key = json!({"password": "x", "key": "k"});
    let all = json!({"password": "x", "key": "k", "known_hosts": "nas ssh-ed25519 AAAA"});
    let s3 = json!({"password": "x", "key": "access_key_id=a\nsecret_access_key=b"});
    for (url, keys, expected) in [
        ("/srv/backups", json!({"password": "x"}), Some("url")),
        ("sftp://nas/srv", json!({"password": "x"}), Some("keys.key")),
        ("sftp://nas/srv", key, Some("keys.known_hosts")),
        ("sftp://nas/srv", all, None),
        ("s3://bucket", s3, None),
    ] {
        let wish = json!({"name": "new", "segment": "own", "url": url, "keys": keys});
        let got = world.ask(&asks, "POST", "/v1/repositories", wish).await;
        match expected {
            Some(field) => assert_eq!(got.json()["field"], field, "{url}: {}", got.json()),
            // A host is asked next, and there is none that answers.
            None => assert_eq!(got.problem().0, "unreachable", "{url}: {}", got.json()),
        }
    }
}

#[tokio::test]
async fn no_answer_and_no_record_of_the_audit_has_a_key_in_it() {
    let world = World::new().await;
    let admin = &world.fixture.admin;
    let all = world.must(admin, "GET", "/v1/repositories", Value::Null).await;
    assert_eq!(all["items"].as_array().map(Vec::len), Some(3), "{all}");
    let one = world.must(admin, "GET", "/v1/repositories/own-backups", Value::Null).await;
    let wish = json!({"name": "new", "url": "/srv/x", "keys": {"password": REPOSITORY_PASSWORD, "key": "x"}});
    let refused = world.ask(admin, "POST", "/v1/repositories", wish).await.json();
    assert_eq!(refused["field"], "keys.key", "a directory needs none: {refused}");
    let wish = json!({"name": "new", "url": format!("sftp://u:{REPOSITORY_PASSWORD}@x/y"), "keys": {"password": "x"}});
    let url = world.ask(admin, "POST", "/v1/repositories", wish).await.json();
    let audit = format!("{:?}", world.fixture.audit().await);
    for (what, text) in [("list", &all), ("one", &one), ("refusal", &refused), ("url", &url)] {
        assert!(!text.to_string().contains(REPOSITORY_PASSWORD), "{what}: {text}");
    }
    assert!(!audit.contains(REPOSITORY_PASSWORD));
}
