//! A VM from a snapshot: who may is asked where the snapshot is and where the VM is to be.

use berth_model::access::Action;
use berth_model::vm::Vm;
use serde_json::{Value, json};

use super::support::sample_image;
use super::world::{World, give, member, put, role};

const CLONE: &str = "/v1/vms/own%2Fthing/snapshots/first/clone?dry_run=true";

fn into(segment: &str) -> Value {
    json!({"name": "new", "segment": segment})
}

#[tokio::test]
async fn it_takes_the_right_to_clone_here_and_to_make_there() {
    let world = World::new().await;
    let cluster = world.cluster();
    // Of an image that is for all: one of a segment's own keeps its VMs there.
    let mut vm = world.own.vm.clone();
    vm.spec.image = sample_image().id;
    put(cluster, &vm).await;
    let (own, foreign) = (Some(&world.own.segment), Some(&world.foreign.segment));
    role(cluster, "cloner", &[Action::SnapshotClone, Action::SnapshotView]).await;
    role(cluster, "maker", &[Action::VmCreate, Action::SegmentView]).await;
    role(cluster, "reader", &[Action::SnapshotMemory]).await;
    let (user, asks) = member(cluster, "ada", &[("cloner", own)]).await;
    assert_eq!(world.refused(&asks, "POST", CLONE, json!({"name": "new"})).await, "not-allowed");
    give(cluster, &user, "maker", own, None).await;
    world.must(&asks, "POST", CLONE, json!({"name": "new"})).await;

    // Into another segment, where she may make VMs: what the guest knew would be everybody's there.
    assert_eq!(world.refused(&asks, "POST", CLONE, into("foreign")).await, "not-allowed");
    give(cluster, &user, "maker", foreign, None).await;
    assert_eq!(world.refused(&asks, "POST", CLONE, into("foreign")).await, "not-allowed");
    give(cluster, &user, "reader", foreign, None).await;
    let why = "the right to read memory is asked for where the snapshot is";
    assert_eq!(world.refused(&asks, "POST", CLONE, into("foreign")).await, "not-allowed", "{why}");
    give(cluster, &user, "reader", own, None).await;
    let said = world.must(&asks, "POST", CLONE, into("foreign")).await;
    assert!(said["summary"].as_str().is_some_and(|text| text.contains("copying")), "{said}");

    // Rights to make VMs alone, wherever, are none to others' snapshots; and what is not there looks the same.
    let (_, maker) = member(cluster, "max", &[("maker", None), ("reader", None)]).await;
    assert_eq!(world.refused(&maker, "POST", CLONE, into("foreign")).await, "not-allowed");
    let absent = world.refused(&asks, "POST", CLONE, into("nowhere")).await;
    assert_eq!(absent, "not-allowed");
}

#[tokio::test]
async fn production_is_cloned_by_two_people_and_stays_production() {
    let world = World::new().await;
    let cluster = world.cluster();
    let mut vm: Vm = world.own.vm.clone();
    vm.spec.class = "production".parse().expect("a name");
    put(cluster, &vm).await;
    let (_, asks) = member(cluster, "ada", &[("configurator", Some(&world.own.segment))]).await;
    let (_, officer) = member(cluster, "max", &[("security-officer", Some(&world.own.segment))]).await;
    let path = CLONE.trim_end_matches("?dry_run=true");
    let got = world.ask(&asks, "POST", path, json!({"name": "new"})).await;
    assert_eq!(got.problem().0, "approval-needed", "{}", got.json());
    let id = got.json()["value"].as_str().expect("an approval").to_owned();
    world.must(&officer, "POST", &format!("/v1/approvals/{id}/approve"), Value::Null).await;
    let other = world.refused(&asks, "POST", path, json!({"name": "another"})).await;
    assert_eq!(other, "approval-needed", "it is for that very request");
    let begun = world.must(&asks, "POST", path, json!({"name": "new"})).await;
    assert_eq!(begun["vm"]["spec"]["class"], "production");
    assert_eq!(begun["vm"]["segment_name"], "own");
}

#[tokio::test]
async fn a_wish_that_makes_no_sense_is_refused_with_its_field() {
    let world = World::new().await;
    let admin = &world.fixture.admin;
    for (wish, field) in [
        (json!({"name": "new", "cold": true, "paused": true}), "paused"),
        (json!({"name": "thing"}), "name"),
        (json!({"name": "No Name"}), "body"),
    ] {
        let got = world.ask(admin, "POST", CLONE, wish.clone()).await;
        assert!(got.status.is_client_error(), "{wish}: {}", got.json());
        if field != "body" {
            assert_eq!(got.problem().1, field, "{}", got.json());
        }
    }
}
