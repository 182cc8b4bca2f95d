//! A second person, for that very request, once; wishes for a role; and policies that somebody writes.

use std::time::Duration;

use berth_api::manager::{Approval, ApprovalState, Policy, User};
use berth_model::access::Action;
use berth_model::vm::Vm;
use serde_json::{Value, json};

use super::world::{self, TOKEN, World, add_snapshot, give, member, put, scoped, snapshot};

const DELETE: &str = "/v1/vms/own%2Fthing?force=true";

struct Scene {
    world: World,
    asker: String,
    asker_user: User,
    officer: String,
    officer_user: User,
}

/// A protected VM in each segment, somebody who may delete it with a second person, and that person.
async fn scene() -> Scene {
    let world = World::new().await;
    let cluster = world.cluster();
    let own = Some(&world.own.segment);
    let (asker_user, _) = member(cluster, "asker", &[("admin", own)]).await;
    let (officer_user, _) = member(cluster, "officer", &[("security-officer", own)]).await;
    // Tokens, because sessions end by themselves before an approval does.
    let asker = world::credentials(cluster, &asker_user.id, &[TOKEN]).await.remove(0);
    let officer = world::credentials(cluster, &officer_user.id, &[TOKEN]).await.remove(0);
    for (_, place) in world.places() {
        let mut vm = place.vm.clone();
        vm.spec.protected = true;
        put(cluster, &vm).await;
    }
    Scene { world, asker, asker_user, officer, officer_user }
}

impl Scene {
    /// Asks for it, and gives the id of what waits.
    async fn wait(&self, method: &str, path: &str, body: Value) -> String {
        let got = self.world.ask(&self.asker, method, path, body).await;
        assert_eq!(got.problem().0, "approval-needed", "{path}: {}", got.json());
        got.json()["value"].as_str().expect("an approval's id").to_owned()
    }

    async fn approve(&self, who: &str, id: &str) -> String {
        let got = self.world.ask(who, "POST", &format!("/v1/approvals/{id}/approve"), Value::Null).await;
        if got.status.is_success() { String::new() } else { got.problem().0 }
    }

    fn state(&self, id: &str) -> ApprovalState {
        self.world.cluster().records.require::<Approval>(id).expect("there").state
    }
}

#[tokio::test]
async fn an_approval_is_for_that_very_request_and_no_other() {
    let scene = scene().await;
    let world = &scene.world;
    let id = scene.wait("DELETE", DELETE, Value::Null).await;
    assert_eq!(
        scene.wait("DELETE", DELETE, Value::Null).await,
        id,
        "the same request waits for the same approval"
    );
    assert_eq!(scene.approve(&scene.officer, &id).await, "");
    // Another VM, another query, another user, the same VM by its id: each is another request.
    let nested = scene.wait("DELETE", "/v1/vms/nested%2Fthing?force=true", Value::Null).await;
    let forceless = scene.wait("DELETE", "/v1/vms/own%2Fthing?force=false", Value::Null).await;
    let by_id = format!("/v1/vms/{}?force=true", world.own.vm.id);
    let by_id = scene.wait("DELETE", &by_id, Value::Null).await;
    assert!([&nested, &forceless, &by_id].iter().all(|other| **other != id));
    let (_, other) = member(world.cluster(), "other", &[("admin", Some(&world.own.segment))]).await;
    assert_eq!(world.refused(&other, "DELETE", DELETE, Value::Null).await, "approval-needed");
    // A dry run neither uses it up nor asks for another.
    let before = world.cluster().records.list::<Approval>().len();
    let dry = format!("{DELETE}&dry_run=true");
    assert_eq!(world.refused(&scene.asker, "DELETE", &dry, Value::Null).await, "approval-needed");
    let odd = format!("{DELETE}&dry%5Frun=true");
    world.refused(&scene.asker, "DELETE", &odd, Value::Null).await;
    assert!(world.cluster().records.list::<Approval>().len() <= before + 1);
    assert_eq!(scene.state(&id), ApprovalState::Approved);
    // Once, and then it is used.
    world.must(&scene.asker, "DELETE", DELETE, Value::Null).await;
    assert_eq!(scene.state(&id), ApprovalState::Used);
    assert_ne!(scene.wait("DELETE", DELETE, Value::Null).await, id);
}

#[tokio::test]
async fn another_vm_of_the_same_name_is_not_the_one_that_was_approved() {
    let scene = scene().await;
    let world = &scene.world;
    let id = scene.wait("DELETE", DELETE, Value::Null).await;
    assert_eq!(scene.approve(&scene.officer, &id).await, "");
    // The segments change names: `own/thing` is another VM now, in a segment where the asker may as well.
    give(world.cluster(), &scene.asker_user, "admin", Some(&world.foreign.segment), None).await;
    world.must(&world.fixture.admin, "PATCH", "/v1/segments/own", json!({"name": "was-own"})).await;
    world.must(&world.fixture.admin, "PATCH", "/v1/segments/foreign", json!({"name": "own"})).await;
    assert_ne!(scene.wait("DELETE", DELETE, Value::Null).await, id);
    assert_eq!(scene.state(&id), ApprovalState::Approved);
}

#[tokio::test]
async fn nobody_approves_for_oneself_or_without_the_right_or_too_late_or_twice() {
    let scene = scene().await;
    let world = &scene.world;
    let cluster = world.cluster();
    let id = scene.wait("DELETE", DELETE, Value::Null).await;
    // The asker is an administrator there and has the right; by a token it is still the same person.
    assert_eq!(scene.approve(&scene.asker, &id).await, "not-allowed");
    let narrow = scoped(&[Action::ApprovalDecide], None);
    for secret in world::credentials(cluster, &scene.asker_user.id, &[TOKEN, narrow]).await {
        assert_eq!(scene.approve(&secret, &id).await, "not-allowed");
    }
    // Rights elsewhere, or of another kind, or in a token that is for something else, don't do.
    let (_, far) = member(cluster, "far", &[("security-officer", Some(&world.foreign.segment))]).await;
    let (_, viewer) = member(cluster, "viewer", &[("auditor", Some(&world.own.segment))]).await;
    let view = scoped(&[Action::VmView], None);
    let for_view = world::credentials(cluster, &scene.officer_user.id, &[view]).await.remove(0);
    for secret in [&far, &viewer, &for_view, &world.fixture.nobody] {
        assert_eq!(scene.approve(secret, &id).await, "not-allowed");
        let list = world.must(secret, "GET", "/v1/approvals", Value::Null).await.to_string();
        assert!(!list.contains(&id), "only what one may decide is listed: {list}");
    }
    let list = world.must(&scene.officer, "GET", "/v1/approvals", Value::Null).await.to_string();
    assert!(list.contains(&id) && !list.contains(world.foreign.approval.id.as_str()), "{list}");
    world.must(&scene.officer, "POST", &format!("/v1/approvals/{id}/deny"), Value::Null).await;
    assert_eq!(scene.approve(&scene.officer, &id).await, "wrong-state", "denied is denied");
    let again = scene.wait("DELETE", DELETE, Value::Null).await;
    assert_ne!(again, id);
    world.fixture.clock.advance(Duration::from_millis(24 * 3600 * 1000));
    assert_eq!(scene.approve(&scene.officer, &again).await, "wrong-state", "it expired at this very moment");
    let late = scene.wait("DELETE", DELETE, Value::Null).await;
    assert_ne!(late, again);
    assert_eq!(scene.approve(&scene.officer, &late).await, "");
    assert_eq!(scene.approve(&scene.officer, &late).await, "wrong-state", "approved is approved");
    world.fixture.clock.advance(Duration::from_millis(24 * 3600 * 1000));
    assert_eq!(
        world.refused(&scene.asker, "DELETE", DELETE, Value::Null).await,
        "approval-needed",
        "too late"
    );
}

#[tokio::test]
async fn an_approval_is_worth_nothing_once_its_approver_may_not_decide() {
    let scene = scene().await;
    let world = &scene.world;
    let cluster = world.cluster();
    let id = scene.wait("DELETE", DELETE, Value::Null).await;
    assert_eq!(scene.approve(&scene.officer, &id).await, "");
    put(cluster, &User { disabled: true, ..scene.officer_user.clone() }).await;
    assert_ne!(scene.wait("DELETE", DELETE, Value::Null).await, id, "the approver was shut out");
    put(cluster, &scene.officer_user).await;
    world.must(&scene.asker, "DELETE", DELETE, Value::Null).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_that_use_an_approval_at_once_one_gets_through() {
    let scene = scene().await;
    let world = &scene.world;
    for _ in 0..10 {
        let id = scene.wait("DELETE", DELETE, Value::Null).await;
        assert_eq!(scene.approve(&scene.officer, &id).await, "");
        let ask = || world.ask(&scene.asker, "DELETE", DELETE, Value::Null);
        let got = tokio::join!(ask(), ask(), ask());
        let codes = [got.0, got.1, got.2].map(|got| got.problem().0);
        let held = codes.iter().filter(|code| *code == "approval-needed").count();
        assert_eq!(held, 2, "{codes:?}");
    }
}

#[tokio::test]
async fn every_guard_asks_for_a_second_person() {
    let scene = scene().await;
    let world = &scene.world;
    let cluster = world.cluster();
    let mut vm: Vm = world.nested.vm.clone();
    vm.status.baseline = Some(world.nested.snapshot.id.clone());
    vm.spec.class = world::name("production");
    put(cluster, &vm).await;
    scene.wait("DELETE", "/v1/vms/nested%2Fthing/snapshots/first", Value::Null).await;
    scene.wait("POST", "/v1/vms/nested%2Fthing/restore", json!({"snapshot": "second"})).await;
    let second = scene.wait("POST", "/v1/vms/nested%2Fthing/restore", json!({"snapshot": "first"})).await;
    // No snapshot named is the baseline, and still another request than naming it.
    assert_ne!(scene.wait("POST", "/v1/vms/nested%2Fthing/restore", Value::Null).await, second);
    let lonely =
        super::support::sample_vm(77, &world.own.segment, &super::support::sample_host(1), &world.own.image);
    world::add_vm(cluster, &lonely).await;
    add_snapshot(cluster, &snapshot(cluster, &lonely, "only")).await;
    scene.wait("DELETE", &format!("/v1/vms/{}/snapshots/only", lonely.id), Value::Null).await;
    let text = "forbid (principal, action == Action::\"vm.start\", resource);";
    world.must(&world.fixture.admin, "POST", "/v1/policies", json!({"name": "night", "text": text})).await;
    for (method, path) in [("POST", "/v1/policies/night/activate"), ("DELETE", "/v1/policies/night")] {
        assert_eq!(world.refused(&world.fixture.admin, method, path, Value::Null).await, "approval-needed");
    }
}

#[tokio::test]
async fn a_wished_role_is_given_by_who_has_it_and_ends_by_itself() {
    let scene = scene().await;
    let world = &scene.world;
    let (_, user) = member(world.cluster(), "wisher", &[("viewer", Some(&world.own.segment))]).await;
    let start = "/v1/vms/own%2Fthing/start?dry_run=true";
    let wish = json!({"role": "operator", "segment": "own", "for_s": 60, "reason": "on call"});
    let made = world.must(&user, "POST", "/v1/grant-requests", wish).await;
    let id = made["id"].as_str().expect("an id").to_owned();
    assert_eq!(scene.approve(&user, &id).await, "not-allowed");
    assert_eq!(
        scene.approve(&scene.officer, &id).await,
        "not-allowed",
        "may decide, and has not what it would give"
    );
    assert_eq!(world.refused(&user, "POST", start, Value::Null).await, "not-allowed");
    assert_eq!(scene.approve(&scene.asker, &id).await, "");
    assert_ne!(world.ask(&user, "POST", start, Value::Null).await.problem().0, "not-allowed");
    assert_eq!(
        world.refused(&user, "POST", "/v1/vms/foreign%2Fthing/start", Value::Null).await,
        "not-allowed"
    );
    assert_eq!(scene.approve(&scene.asker, &id).await, "wrong-state", "once");
    world.fixture.clock.advance(Duration::from_millis(59_999));
    assert_ne!(world.ask(&user, "POST", start, Value::Null).await.problem().0, "not-allowed");
    world.fixture.clock.advance(Duration::from_millis(1));
    assert_eq!(world.refused(&user, "POST", start, Value::Null).await, "not-allowed");
    // A wish whose segment is gone meanwhile comes to nothing.
    let brief = world::segment(world.cluster(), "brief", Some(&world.own.segment)).await;
    let made = world
        .must(
            &scene.asker,
            "POST",
            "/v1/grant-requests",
            json!({"role": "viewer", "segment": "brief", "for_s": 60}),
        )
        .await;
    world.must(&world.fixture.admin, "DELETE", &format!("/v1/segments/{}", brief.id), Value::Null).await;
    assert_eq!(scene.approve(&world.fixture.admin, made["id"].as_str().expect("an id")).await, "not-found");
}

#[tokio::test]
async fn a_policy_is_checked_strictly_shown_in_shadow_and_gives_only_what_its_writer_has() {
    let scene = scene().await;
    let world = &scene.world;
    let cluster = world.cluster();
    let admin = &world.fixture.admin;
    let write = |name: &str, text: &str| json!({"name": name, "text": text});
    for bad in [
        "",
        "permit (principal, action",
        "permit (principal, action == Action::\"vm.fly\", resource);",
        "permit (principal == ?principal, action, resource);",
        "forbid (principal, action == Action::\"vm.view\", resource is Host);",
        "forbid (principal, action == Action::\"vm.view\", resource) when { resource.owner == principal };",
        "forbid (principal, action == Action::\"vm.view\", resource) when { context.now_ms == \"x\" };",
    ] {
        let got = world.ask(admin, "POST", "/v1/policies", write("bad", bad)).await;
        assert_eq!((got.problem().0.as_str(), got.problem().1.as_str()), ("invalid-input", "text"), "{bad}");
    }
    world::role(cluster, "lawyer", &[Action::PolicyManage, Action::PolicyView, Action::VmView]).await;
    let (_, lawyer) = member(cluster, "lawyer", &[("lawyer", None)]).await;
    for more in [
        "permit (principal, action == Action::\"vm.delete\", resource);",
        "permit (principal, action, resource);",
        "permit (principal, action in Action::\"govern\", resource);",
        "permit (principal, action in [Action::\"vm.view\", Action::\"vm.start\"], resource);",
    ] {
        assert_eq!(
            world.refused(&lawyer, "POST", "/v1/policies", write("more", more)).await,
            "not-allowed",
            "{more}"
        );
    }
    // What has come before is looked at again: two sights of a VM, one of which the policy would take.
    let (_, viewer) = member(cluster, "viewer", &[("viewer", Some(&world.own.segment))]).await;
    world.must(&viewer, "GET", "/v1/vms/own%2Fthing", Value::Null).await;
    world.must(&viewer, "GET", "/v1/vms/own%2Fthing", Value::Null).await;
    let text = format!(
        "forbid (principal, action == Action::\"vm.view\", resource == Vm::\"{}\");",
        world.own.vm.id
    );
    let report = world.must(&lawyer, "POST", "/v1/policies", write("hide", &text)).await;
    let found = report["differences"].as_array().expect("a list").iter().find(|one| one["actor"] == "viewer");
    let found = found.expect("a difference");
    assert_eq!((found["was"].as_str(), found["would_be"].as_str()), (Some("allow"), Some("deny")));
    assert_eq!((found["times"].as_u64(), report["policy"]["active"].as_bool()), (Some(2), Some(false)));
    world.must(&viewer, "GET", "/v1/vms/own%2Fthing", Value::Null).await;
    // Two people let it count, at once for everybody.
    let activate = "/v1/policies/hide/activate";
    let got = world.ask(&lawyer, "POST", activate, Value::Null).await;
    let id = got.json()["value"].as_str().expect("an approval").to_owned();
    world.must(admin, "POST", &format!("/v1/approvals/{id}/approve"), Value::Null).await;
    world.must(&lawyer, "POST", activate, Value::Null).await;
    assert_eq!(world.refused(&viewer, "GET", "/v1/vms/own%2Fthing", Value::Null).await, "not-allowed");
    assert_eq!(world.refused(admin, "GET", "/v1/vms/own%2Fthing", Value::Null).await, "not-allowed");
    assert!(cluster.records.list::<Policy>().iter().all(|row| row.active));
}

/// Cedar skips a policy that fails, and a skipped `forbid` forbids nothing: here, failing denies, and only what the
/// policy is about.
#[tokio::test]
async fn a_policy_that_fails_while_it_is_asked_denies_what_it_is_about_and_nothing_else() {
    let scene = scene().await;
    let world = &scene.world;
    let failing = "forbid (principal, action == Action::\"vm.view\", resource is Vm) when { context.now_ms + 9223372036854775807 > 0 };";
    let report = world
        .must(&world.fixture.admin, "POST", "/v1/policies", json!({"name": "fails", "text": failing}))
        .await;
    assert_eq!(report["policy"]["active"], false);
    world.must(&world.fixture.admin, "GET", "/v1/vms/own%2Fthing", Value::Null).await;
    world::policy(world.cluster(), "fails-now", failing, true).await;
    assert_eq!(
        world.refused(&world.fixture.admin, "GET", "/v1/vms/own%2Fthing", Value::Null).await,
        "not-allowed"
    );
    let list = world.must(&world.fixture.admin, "GET", "/v1/vms", Value::Null).await;
    assert_eq!(list["items"], json!([]), "lists are no way around it");
    world.must(&world.fixture.admin, "GET", "/v1/segments/own", Value::Null).await;
    world.must(&world.fixture.admin, "GET", "/v1/vms/own%2Fthing/snapshots", Value::Null).await;
    let shown = world.must(&world.fixture.admin, "GET", "/v1/policies/fails-now", Value::Null).await;
    assert_ne!(shown["errors"], json!([]), "the report says so");
}
