//! Quotas: refused before anything is done, nested ones counted, and not told to who has no business there.

use berth_api::manager::{Quota, Segment};
use berth_model::snapshot::SnapshotFacts;
use berth_model::vm::Vm;
use serde_json::{Value, json};

use super::support::sample_image;
use super::world::{self, Place, World, member, put};
use crate::operations::OperationRow;
use crate::records::ImagePlace;

async fn limit(world: &World, place: &Place, quota: Quota) {
    put(world.cluster(), &Segment { quota, ..place.segment.clone() }).await;
}

fn wish(segment: &str, name: &str) -> Value {
    json!({
        "segment": segment, "name": name, "image": "debian",
        "vcpus": 2, "memory_mib": 1024, "disk_mib": 1536, "data_disks_mib": [256, 256],
    })
}

/// Each place has one VM of 1 virtual CPU, 512 MiB of memory and 1024 MiB of disk, with two snapshots.
#[tokio::test]
async fn each_quota_holds_to_the_unit_and_nothing_is_done_when_it_refuses() {
    let world = World::new().await;
    let admin = &world.fixture.admin;
    let none = Quota::default;
    for (field, exact, short) in [
        ("vms", Quota { vms: Some(2), ..none() }, Quota { vms: Some(1), ..none() }),
        ("vcpus", Quota { vcpus: Some(3), ..none() }, Quota { vcpus: Some(2), ..none() }),
        (
            "memory_mib",
            Quota { memory_mib: Some(1536), ..none() },
            Quota { memory_mib: Some(1535), ..none() },
        ),
        ("disk_mib", Quota { disk_mib: Some(3072), ..none() }, Quota { disk_mib: Some(3071), ..none() }),
    ] {
        limit(&world, &world.foreign, exact).await;
        world.must(admin, "POST", "/v1/vms?dry_run=true", wish("foreign", "new")).await;
        limit(&world, &world.foreign, short).await;
        let operations = world.cluster().records.list::<OperationRow>().len();
        let got = world.ask(admin, "POST", "/v1/vms", wish("foreign", "new")).await;
        assert_eq!(got.problem(), ("over-quota".to_owned(), field.to_owned()), "{}", got.json());
        assert_eq!(world.cluster().records.list::<OperationRow>().len(), operations, "nothing was begun");
        assert_eq!(world.ask(admin, "GET", "/v1/vms/foreign%2Fnew", Value::Null).await.status, 404);
    }
    for (field, exact, short) in [
        ("snapshots", Quota { snapshots: Some(3), ..none() }, Quota { snapshots: Some(2), ..none() }),
        // What there is rounds down; what comes counts as the whole memory.
        (
            "snapshot_mib",
            Quota { snapshot_mib: Some(522), ..none() },
            Quota { snapshot_mib: Some(521), ..none() },
        ),
    ] {
        let mut first = world.foreign.snapshot.clone();
        first.facts =
            SnapshotFacts { memory_stored_bytes: 7 << 20, disk_stored_bytes: 3 << 20, ..first.facts };
        put(world.cluster(), &first).await;
        limit(&world, &world.foreign, exact).await;
        let path = "/v1/vms/foreign%2Fthing/snapshots";
        world.must(admin, "POST", &format!("{path}?dry_run=true"), json!({})).await;
        limit(&world, &world.foreign, short).await;
        let got = world.ask(admin, "POST", path, json!({})).await;
        assert_eq!(got.problem(), ("over-quota".to_owned(), field.to_owned()), "{}", got.json());
    }
}

/// What is inside counts outside; and whoever is only inside is not told what is outside.
#[tokio::test]
async fn a_segment_around_bounds_those_inside_without_telling_of_itself() {
    let world = World::new().await;
    let (_, inside) = member(world.cluster(), "in", &[("configurator", Some(&world.nested.segment))]).await;
    limit(&world, &world.own, Quota { vms: Some(2), ..Quota::default() }).await;
    limit(&world, &world.nested, Quota { vms: Some(50), ..Quota::default() }).await;
    let got = world.ask(&inside, "POST", "/v1/vms", wish("nested", "new")).await;
    assert_eq!(got.problem(), ("over-quota".to_owned(), "vms".to_owned()), "{}", got.json());
    let text = got.json()["message"].as_str().expect("text").to_owned();
    assert!(!text.contains("own") && !text.contains('2'), "{text}");
    // Foreign ones don't count.
    limit(&world, &world.own, Quota { vms: Some(3), ..Quota::default() }).await;
    world.must(&inside, "POST", "/v1/vms?dry_run=true", wish("nested", "new")).await;
    let shown = world.must(&world.fixture.admin, "GET", "/v1/segments/own", Value::Null).await;
    assert_eq!(shown["usage"]["vms"], 2);
}

#[tokio::test]
async fn lowering_a_quota_below_what_is_used_is_allowed_and_refuses_only_more() {
    let world = World::new().await;
    let (_, owner) = member(world.cluster(), "owner", &[("admin", None)]).await;
    let (_, inside) = member(world.cluster(), "inside", &[("admin", Some(&world.own.segment))]).await;
    let (_, user) = member(world.cluster(), "conf", &[("configurator", Some(&world.own.segment))]).await;
    let lower = json!({"quota": {"vms": 0, "snapshots": 0, "memory_mib": 0}});
    assert_eq!(world.refused(&user, "PATCH", "/v1/segments/own", lower.clone()).await, "not-allowed");
    let refused = world.refused(&inside, "PATCH", "/v1/segments/own", lower.clone()).await;
    assert_eq!(refused, "not-allowed", "also who has every right inside does not set the bounds around it");
    world.must(&owner, "PATCH", "/v1/segments/own", lower).await;
    world.must(&user, "GET", "/v1/vms/own%2Fthing", Value::Null).await;
    world.must(&user, "POST", "/v1/vms/own%2Fthing/stop?dry_run=true", Value::Null).await;
    world.must(&user, "DELETE", "/v1/vms/own%2Fthing/snapshots/first?dry_run=true", Value::Null).await;
    assert_eq!(world.refused(&user, "POST", "/v1/vms", wish("own", "new")).await, "over-quota");
    // Nobody lifts the bound of a segment that it is only inside of.
    let (_, inner) = member(world.cluster(), "inner", &[("admin", Some(&world.nested.segment))]).await;
    let lift = json!({"quota": {}});
    assert_eq!(world.refused(&inner, "PATCH", "/v1/segments/own", lift).await, "not-allowed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_at_once_do_not_both_pass_the_last_place() {
    let world = World::new().await;
    limit(&world, &world.own, Quota { vms: Some(3), ..Quota::default() }).await;
    // With the image in place the creation goes on to a host that does not answer, and waits for it there.
    let place =
        ImagePlace { image: sample_image().id, pool_uuid: "uuid-1".to_owned(), pool: world::name("default") };
    put(world.cluster(), &place).await;
    let ask = |name: &'static str, segment: &'static str| {
        world.ask(&world.fixture.admin, "POST", "/v1/vms", wish(segment, name))
    };
    let got = tokio::join!(ask("a", "own"), ask("b", "nested"), ask("c", "own"), ask("d", "nested"));
    let all = [got.0, got.1, got.2, got.3];
    let passed = all.iter().filter(|got| got.status.is_success()).count();
    let codes: Vec<String> = all.iter().map(|got| got.problem().0).collect();
    assert_eq!(passed, 1, "{codes:?}");
    assert_eq!(codes.iter().filter(|code| *code == "over-quota").count(), 3, "{codes:?}");
    let vms = world.cluster().records.list_where::<Vm>(|vm| vm.segment != world.foreign.segment.id);
    assert!(vms.len() <= 4, "one of the default segment, two of these, one new");
}
