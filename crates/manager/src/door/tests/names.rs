//! Ids and names that are not what they seem, that have moved on, or that somebody else had before.

use std::time::Duration;

use berth_model::access::Action;
use berth_model::vm::Vm;
use serde_json::{Value, json};

use super::support::NOW;
use super::world::{self, SESSION, World, add_vm, give, member, put, raw};
use crate::records::{Transaction, UniqueName};

/// What somebody may try in a path who looks for `foreign/thing`.
const TRICKS: &[&str] = &[
    "foreign%2fthing",
    "foreign%2Fthing",
    "foreign%252Fthing",
    "foreign%25252Fthing",
    "own%2F..%2Fforeign%2Fthing",
    "own%2F%2e%2e%2Fforeign%2Fthing",
    "own/../foreign%2Fthing",
    "own%2Fthing%2F..%2F..%2Fforeign%2Fthing",
    "..%2F..%2Fvms%2Fforeign%2Fthing",
    "foreign%5Cthing",
    "foreign%00%2Fthing",
    "own%2Fthing%00foreign%2Fthing",
    "foreign%2Fthing%00",
    "foreign%2Fthing%20",
    "%20foreign%2Fthing",
    "foreign%2Fthing%0a",
    "foreign%c0%afthing",
    "foreign%e0%80%afthing",
    "%ff%fe",
    "FOREIGN%2Fthing",
    "Foreign%2FThing",
    "f%D0%BEreign%2Fthing",
    "foreign%EF%BC%8Fthing",
    "foreign%E2%88%95thing",
    "foreign%2Fth%C4%B1ng",
    "foreign%E2%80%8B%2Fthing",
    "foreign%2F",
    "%2Fthing",
    "%2F",
    "%2F%2F",
    "%",
    "%2",
    "foreign%2Fthing;x=1",
    "foreign%2Fthing%3Fsegment=own",
    "foreign%2Fthing%23own",
    "*",
    "%2A",
    "own%2F*",
    "absent",
    "cluster",
    "listing",
    "null",
    "-",
    "0",
    "own%2Fabsent",
];

/// The same with what has to be made.
fn tricks(world: &World) -> Vec<String> {
    let foreign = &world.foreign;
    let mut all: Vec<String> = TRICKS.iter().map(|trick| (*trick).to_owned()).collect();
    all.push("a".repeat(3000));
    all.push(format!("foreign%2F{}", "a".repeat(300)));
    all.push("%2F".repeat(500));
    all.push("%F0%9F%90%99".repeat(100));
    for id in [
        foreign.vm.id.as_str(),
        foreign.segment.id.as_str(),
        foreign.image.id.as_str(),
        foreign.snapshot.id.as_str(),
        foreign.operation.as_str(),
        foreign.grant.id.as_str(),
        foreign.approval.id.as_str(),
        world.someone.id.as_str(),
        world.token.token.id.as_str(),
    ] {
        all.push(id.to_owned());
        all.push(id.to_uppercase());
        all.push(format!("{id}%00"));
        all.push(format!("own%2F{id}"));
        all.push(format!("foreign%2F{id}"));
    }
    all
}

#[tokio::test]
async fn no_trick_with_names_and_ids_reaches_a_foreign_thing_or_breaks_anything() {
    let world = World::new().await;
    let (_, who) = member(world.cluster(), "own-admin", &[("admin", Some(&world.own.segment))]).await;
    let foreign = [world.foreign.vm.id.as_str(), world.foreign.image.id.as_str()];
    for trick in tricks(&world) {
        for (method, path) in [
            ("GET", "/v1/vms/{x}"),
            ("GET", "/v1/vms/{x}/snapshots"),
            ("GET", "/v1/vms/own%2Fthing/snapshots/{x}"),
            ("GET", "/v1/segments/{x}"),
            ("GET", "/v1/images/{x}"),
            ("GET", "/v1/hosts/{x}"),
            ("GET", "/v1/operations/{x}"),
            ("GET", "/v1/users/{x}"),
            ("GET", "/v1/teams/{x}"),
            ("GET", "/v1/policies/{x}"),
            ("DELETE", "/v1/vms/{x}?force=true&dry_run=true"),
            ("DELETE", "/v1/tokens/{x}"),
            ("DELETE", "/v1/grants/{x}"),
            ("POST", "/v1/approvals/{x}/approve"),
            ("GET", "/v1/vms?segment={x}"),
            ("GET", "/v1/operations?vm={x}"),
            ("GET", "/v1/who-can?action=vm.view&resource={x}"),
        ] {
            let path = path.replace("{x}", &trick);
            let Some(got) = raw(&world.fixture, &who, method, &path).await else { continue };
            assert!(got.status.is_client_error(), "{method} {path}: {} {}", got.status, got.json());
            // What was asked for may be said back: nothing else about the foreign thing.
            let text = got.json().to_string();
            let told = foreign.iter().any(|id| text.contains(id) && !path.contains(id));
            assert!(!told, "{method} {path}: {text}");
        }
        let asked =
            raw(&world.fixture, &who, "GET", &format!("/v1/can-i?action=vm.view&resource={trick}")).await;
        if let Some(got) = asked.filter(|got| got.status.is_success()) {
            assert_eq!(got.json()["allowed"], false, "{trick}");
        }
    }
}

/// Rights follow the id: a renamed segment keeps them, and whoever takes its old name gets none of them.
#[tokio::test]
async fn a_renamed_segment_keeps_its_rights_and_its_old_name_carries_none() {
    let world = World::new().await;
    let cluster = world.cluster();
    let (admin, vm) = (&world.fixture.admin, "/v1/vms/own%2Fthing");
    let (_, who) = member(cluster, "own-viewer", &[("viewer", Some(&world.own.segment))]).await;
    world.must(admin, "PATCH", "/v1/segments/own", json!({"name": "renamed"})).await;
    world.must(&who, "GET", "/v1/vms/renamed%2Fthing", Value::Null).await;
    world.must(&who, "GET", "/v1/images/renamed%2Fdisk", Value::Null).await;
    assert_eq!(world.refused(&who, "GET", vm, Value::Null).await, "not-allowed");
    // Another segment takes the old name, with a VM of the old name.
    world.must(admin, "PATCH", "/v1/segments/foreign", json!({"name": "own"})).await;
    assert_eq!(world.must(admin, "GET", vm, Value::Null).await["id"], world.foreign.vm.id.to_string());
    for path in [vm, "/v1/segments/own", "/v1/images/own%2Fdisk", "/v1/vms?segment=own"] {
        assert_eq!(world.refused(&who, "GET", path, Value::Null).await, "not-allowed", "{path}");
    }
}

/// Ids are never used again, so what is made under an old name inherits nothing.
#[tokio::test]
async fn what_is_made_under_an_old_name_inherits_nothing() {
    let world = World::new().await;
    let cluster = world.cluster();
    let admin = &world.fixture.admin;
    // A user: grants of the one before are not its.
    let (_, _) = member(cluster, "ghost", &[("admin", Some(&world.own.segment))]).await;
    world.must(admin, "DELETE", "/v1/users/ghost", Value::Null).await;
    let (ghost, session) = member(cluster, "ghost", &[]).await;
    assert_eq!(world.refused(&session, "GET", "/v1/vms/own%2Fthing", Value::Null).await, "not-allowed");
    // A team: the user was a member of the one before.
    world.must(admin, "POST", "/v1/teams", json!({"name": "crew", "members": ["ghost"]})).await;
    world.must(admin, "DELETE", "/v1/teams/crew", Value::Null).await;
    world.must(admin, "POST", "/v1/teams", json!({"name": "crew"})).await;
    world
        .must(admin, "POST", "/v1/grants", json!({"team": "crew", "role": "viewer", "segment": "own"}))
        .await;
    assert_eq!(world.refused(&session, "GET", "/v1/vms/own%2Fthing", Value::Null).await, "not-allowed");
    // A role that is granted can't go, so none of its name can take its place.
    world.must(admin, "POST", "/v1/roles", json!({"name": "helpers", "actions": ["segment.view"]})).await;
    let made = world.must(admin, "POST", "/v1/grants", json!({"user": "ghost", "role": "helpers"})).await;
    assert_eq!(world.refused(admin, "DELETE", "/v1/roles/helpers", Value::Null).await, "protected");
    world
        .must(admin, "DELETE", &format!("/v1/grants/{}", made["id"].as_str().expect("an id")), Value::Null)
        .await;
    world.must(admin, "DELETE", "/v1/roles/helpers", Value::Null).await;
    world.must(admin, "POST", "/v1/roles", json!({"name": "helpers", "copy_of": "admin"})).await;
    assert_eq!(world.refused(&session, "GET", "/v1/segments/own", Value::Null).await, "not-allowed");
    // A segment: a token for the one before is for nothing now.
    let old = world::segment(cluster, "brief", None).await;
    give(cluster, &ghost, "viewer", None, None).await;
    let scope = world::scoped(&[Action::SegmentView, Action::VmView], Some(&old.id));
    let token = world::credentials(cluster, &ghost.id, &[scope]).await.remove(0);
    world.must(&token, "GET", "/v1/segments/brief", Value::Null).await;
    world.must(admin, "DELETE", "/v1/segments/brief", Value::Null).await;
    world.must(admin, "POST", "/v1/segments", json!({"name": "brief"})).await;
    world.must(&session, "GET", "/v1/segments/brief", Value::Null).await;
    assert_eq!(world.refused(&token, "GET", "/v1/segments/brief", Value::Null).await, "not-allowed");
    // A VM: snapshots and operations of the one before are not its.
    let old = world.own.vm.clone();
    let mut transaction = Transaction::new();
    transaction.forget::<Vm>(old.id.as_str());
    transaction.release(&UniqueName::vm(&old.segment, &old.name));
    cluster.records.commit(transaction).await.expect("recorded");
    let mut new =
        super::support::sample_vm(99, &world.own.segment, &super::support::sample_host(1), &world.own.image);
    new.name = old.name.clone();
    add_vm(cluster, &new).await;
    let snapshots = world.must(admin, "GET", "/v1/vms/own%2Fthing/snapshots", Value::Null).await;
    assert_eq!(snapshots["items"], json!([]));
    let operations = world.must(admin, "GET", "/v1/operations?vm=own%2Fthing", Value::Null).await;
    assert_eq!(operations["items"], json!([]));
}

/// A grant holds until the millisecond before its end; and a clock that is set back does not bring it back.
#[tokio::test]
async fn a_grant_ends_at_the_very_millisecond_and_stays_ended() {
    let world = World::new().await;
    let cluster = world.cluster();
    let (user, session) = member(cluster, "brief", &[]).await;
    give(cluster, &user, "viewer", Some(&world.own.segment), Some(NOW.plus_millis(1000))).await;
    let expired = world::Credential { expires_at: Some(NOW.plus_millis(1000)), ..SESSION };
    let token = world::credentials(cluster, &user.id, &[expired]).await.remove(0);
    let vm = "/v1/vms/own%2Fthing";
    world.fixture.clock.advance(Duration::from_millis(999));
    world.must(&session, "GET", vm, Value::Null).await;
    world.must(&token, "GET", vm, Value::Null).await;
    assert_eq!(
        world.must(&session, "GET", "/v1/vms", Value::Null).await["items"].as_array().map(Vec::len),
        Some(2)
    );
    world.fixture.clock.advance(Duration::from_millis(1));
    assert_eq!(world.refused(&session, "GET", vm, Value::Null).await, "not-allowed");
    assert_eq!(world.ask(&token, "GET", vm, Value::Null).await.status, 401);
    world.fixture.clock.set_back(Duration::from_millis(500));
    assert_eq!(
        world.refused(&session, "GET", vm, Value::Null).await,
        "not-allowed",
        "the clock was set back"
    );
    assert_eq!(world.must(&session, "GET", "/v1/vms", Value::Null).await["items"], json!([]));
    assert_eq!(world.ask(&token, "GET", vm, Value::Null).await.status, 401, "the clock was set back");
    // Nor can it be passed on.
    let gift = json!({"user": "someone", "role": "viewer", "segment": "own"});
    assert_eq!(world.refused(&session, "POST", "/v1/grants", gift).await, "not-allowed");
}

/// A VM whose record says another segment is where its record says: rights follow it at once.
#[tokio::test]
async fn a_vm_that_moved_to_another_segment_is_seen_from_there_only() {
    let world = World::new().await;
    let cluster = world.cluster();
    let (_, who) = member(cluster, "own-viewer", &[("viewer", Some(&world.own.segment))]).await;
    let id = world.own.vm.id.clone();
    world.must(&who, "GET", &format!("/v1/vms/{id}"), Value::Null).await;
    let mut vm: Vm = cluster.records.require::<Vm>(id.as_str()).expect("there").value.clone();
    vm.segment = world.foreign.segment.id.clone();
    put(cluster, &vm).await;
    for path in
        [format!("/v1/vms/{id}"), format!("/v1/vms/{id}/snapshots"), format!("/v1/operations?vm={id}")]
    {
        assert_eq!(world.refused(&who, "GET", &path, Value::Null).await, "not-allowed", "{path}");
    }
    let listed = world.must(&who, "GET", "/v1/vms", Value::Null).await.to_string();
    assert!(!listed.contains(id.as_str()), "{listed}");
}
