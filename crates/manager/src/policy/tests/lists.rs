//! Lists are what asking about every single thing gives, whatever was granted, nested, scoped and written.

use std::collections::BTreeSet;

use berth_api::manager::{Approval, Grant, Segment, Team, User};
use berth_model::access::Action;
use berth_model::host::Host;
use berth_model::image::Image;
use berth_model::snapshot::Snapshot;
use berth_model::vm::Vm;
use proptest::prelude::*;
use serde_json::Value;

use crate::auth::Principal;
use crate::auth::accounts::TokenRow;
use crate::door::target::access::{approval_resource, grant_resource};
use crate::door::target::{
    host_resource, image_resource, operation_resource, segment_resource, token_resource, vm_resource,
};
use crate::door::tests::support::{Fixture, NOW, grant_of, sample_host, sample_image, sample_vm};
use crate::door::tests::world::{
    self, SESSION, TOKEN, add_image, add_snapshot, add_vm, approval, image, operation, put, scoped, snapshot,
};
use crate::operations::OperationRow;
use crate::policy::Resource;

const ROLES: [&str; 5] = ["viewer", "host-operator", "security-officer", "admin", "auditor"];
const SCOPES: [Action; 6] = [
    Action::VmView,
    Action::ImageView,
    Action::SnapshotView,
    Action::OperationView,
    Action::GrantView,
    Action::UserView,
];

/// What a policy says; `{s}` and `{t}` are a segment and a team.
const POLICIES: [&str; 12] = [
    "forbid (principal, action == Action::\"vm.view\", resource is Vm) when { resource.class == \"production\" };",
    "permit (principal, action == Action::\"vm.view\", resource is Vm) when { resource.protected };",
    "forbid (principal, action == Action::\"image.view\", resource is Image) when { resource.for_all };",
    "permit (principal in Team::\"{t}\", action == Action::\"snapshot.view\", resource in Segment::\"{s}\");",
    "forbid (principal, action == Action::\"snapshot.view\", resource is Snapshot) when { resource.baseline };",
    "forbid (principal, action in Action::\"view\", resource in Segment::\"{s}\");",
    "permit (principal, action == Action::\"operation.view\", resource is Operation);",
    "permit (principal in Team::\"{t}\", action == Action::\"host.view\", resource is Host);",
    "forbid (principal, action == Action::\"user.view\", resource is Token);",
    "permit (principal, action == Action::\"grant.view\", resource in Segment::\"{s}\");",
    "forbid (principal, action == Action::\"vm.view\", resource is Vm) when { context.method == \"token\" };",
    // One that fails while it is asked: whatever it is about is denied.
    "forbid (principal, action == Action::\"segment.view\", resource is Segment) when { context.now_ms + 9223372036854775807 > 0 };",
];

#[derive(Debug, Clone)]
struct Shape {
    /// For each segment but the first, inside which of those before it, if any.
    parents: Vec<Option<usize>>,
    /// Member and parent of each team.
    teams: Vec<(usize, bool)>,
    /// Receiver (users, then teams), role, segment or everywhere, and end in seconds.
    grants: Vec<(usize, usize, Option<usize>, Option<u64>)>,
    /// Segment, class, protection.
    vms: Vec<(usize, bool, bool)>,
    images: Vec<Option<usize>>,
    policies: Vec<(usize, usize)>,
    /// A token's actions and segment.
    scope: (BTreeSet<usize>, Option<usize>),
    later_s: u64,
    limit: u32,
}

fn shapes() -> impl Strategy<Value = Shape> {
    let segment = 0..5_usize;
    let parts = (
        proptest::collection::vec(proptest::option::of(0..4_usize), 4),
        proptest::collection::vec((0..2_usize, any::<bool>()), 3),
        proptest::collection::vec(
            (
                0..5_usize,
                0..ROLES.len(),
                proptest::option::weighted(0.9, segment.clone()),
                proptest::option::of(1..20_u64),
            ),
            0..7,
        ),
        proptest::collection::vec((segment.clone(), any::<bool>(), any::<bool>()), 3..9),
        proptest::collection::vec(proptest::option::of(segment.clone()), 1..5),
        proptest::collection::vec((0..POLICIES.len(), segment.clone()), 0..4),
        (proptest::collection::btree_set(0..SCOPES.len(), 1..6), proptest::option::of(segment)),
        0..20_u64,
        1..6_u32,
    );
    parts.prop_map(|(parents, teams, grants, vms, images, policies, scope, later_s, limit)| Shape {
        parents,
        teams,
        grants,
        vms,
        images,
        policies,
        scope,
        later_s,
        limit,
    })
}

struct Built {
    fixture: Fixture,
    secrets: Vec<String>,
}

async fn build(shape: &Shape) -> Built {
    let fixture = Fixture::new().await;
    let cluster = fixture.cluster();
    let mut segments: Vec<Segment> = vec![world::segment(cluster, "s-0", None).await];
    for (index, parent) in shape.parents.iter().enumerate() {
        let parent = parent.and_then(|at| segments.get(at)).cloned();
        segments.push(world::segment(cluster, &format!("s-{}", index + 1), parent.as_ref()).await);
    }
    let users = [world::user(cluster, "one").await, world::user(cluster, "two").await];
    let teams = teams(&fixture, shape, &users).await;
    grants(&fixture, shape, &segments, &users, &teams).await;
    things(&fixture, shape, &segments, &users).await;
    for (index, (at, place)) in shape.policies.iter().enumerate() {
        let text =
            POLICIES[*at].replace("{s}", segments[*place].id.as_str()).replace("{t}", teams[0].id.as_str());
        world::policy(cluster, &format!("p-{index}"), &text, true).await;
    }
    let actions: Vec<Action> = shape.scope.0.iter().map(|at| SCOPES[*at]).collect();
    let narrowed = scoped(&actions, shape.scope.1.map(|at| &segments[at].id));
    let mut secrets = Vec::new();
    for user in &users {
        secrets.extend(world::credentials(cluster, &user.id, &[SESSION, TOKEN, narrowed.clone()]).await);
    }
    fixture.clock.advance(std::time::Duration::from_secs(shape.later_s));
    Built { fixture, secrets }
}

async fn teams(fixture: &Fixture, shape: &Shape, users: &[User; 2]) -> Vec<Team> {
    let cluster = fixture.cluster();
    let mut teams: Vec<Team> = Vec::new();
    for (index, (member, inside)) in shape.teams.iter().enumerate() {
        let mut team = world::team(cluster, &format!("t-{index}"), &[&users[*member]]).await;
        team.parent = teams.last().filter(|_| *inside).map(|last| last.id.clone());
        put(cluster, &team).await;
        teams.push(team);
    }
    teams
}

async fn grants(fixture: &Fixture, shape: &Shape, segments: &[Segment], users: &[User; 2], teams: &[Team]) {
    let cluster = fixture.cluster();
    for (to, role, place, until_s) in &shape.grants {
        let place = place.map(|at| &segments[at]);
        let mut grant = grant_of(cluster, &users[to % 2], ROLES[*role], place);
        grant.until = until_s.map(|seconds| NOW.plus_millis(seconds * 1000));
        if let Some(team) = to.checked_sub(2) {
            (grant.user, grant.team) = (None, Some(teams[team].id.clone()));
        }
        put(cluster, &grant).await;
    }
}

async fn things(fixture: &Fixture, shape: &Shape, segments: &[Segment], users: &[User; 2]) {
    let cluster = fixture.cluster();
    for (index, place) in shape.images.iter().enumerate() {
        add_image(cluster, &image(cluster, place.map(|at| &segments[at]), &format!("i-{index}"))).await;
    }
    for (number, (place, production, protected)) in (20..).zip(&shape.vms) {
        let mut vm = sample_vm(number, &segments[*place], &sample_host(1), &sample_image());
        vm.spec.protected = *protected;
        if *production {
            vm.spec.class = world::name("production");
        }
        let one = snapshot(cluster, &vm, "one");
        vm.status.baseline = Some(one.id.clone());
        add_vm(cluster, &vm).await;
        add_snapshot(cluster, &one).await;
        add_snapshot(cluster, &snapshot(cluster, &vm, "two")).await;
        put(cluster, &operation(cluster, Some(&vm), Some(&vm.segment))).await;
        put(cluster, &operation(cluster, None, Some(&vm.segment))).await;
        put(cluster, &approval(cluster, &users[0], Some(&vm.segment))).await;
    }
    put(cluster, &operation(cluster, None, None)).await;
    put(cluster, &approval(cluster, &users[1], None)).await;
}

/// All pages of a list, by id; none: the list itself is refused.
async fn listed(built: &Built, secret: &str, path: &str, limit: u32) -> Option<Vec<String>> {
    let (mut ids, mut cursor) = (Vec::new(), None::<String>);
    for _ in 0..500 {
        let after = cursor.as_ref().map(|cursor| format!("&cursor={cursor}")).unwrap_or_default();
        let got = built.fixture.call("GET", &format!("{path}?limit={limit}{after}"), Some(secret), "").await;
        if got.status == 403 {
            return None;
        }
        let json = got.json();
        assert_eq!(got.status, 200, "{path}: {json}");
        let items = json["items"].as_array().expect("items");
        assert!(items.len() <= limit as usize, "{path}");
        ids.extend(items.iter().map(|item| item["id"].as_str().expect("an id").to_owned()));
        match &json["next_cursor"] {
            Value::String(next) => cursor = Some(next.clone()),
            _ => return Some(ids),
        }
    }
    panic!("{path} does not end");
}

/// What asking about every single thing gives, by the list's path.
fn one_by_one(built: &Built, principal: &Principal) -> Vec<(String, Vec<String>)> {
    let cluster = built.fixture.cluster();
    let records = &cluster.records;
    let sees = |action: Action, resource: &Resource| {
        built.fixture.manager.gate().policies.look(principal, action, resource, false).allowed
    };
    let Principal::User(me) = principal else { panic!("a user") };
    let teams = built.fixture.manager.gate().policies.teams_of(me);
    let mut all = vec![
        (
            "/v1/vms".to_owned(),
            kept(&records.list::<Vm>(), |vm| sees(Action::VmView, &vm_resource(cluster, vm))),
        ),
        (
            "/v1/images".to_owned(),
            kept(&records.list::<Image>(), |one| sees(Action::ImageView, &image_resource(cluster, one))),
        ),
        (
            "/v1/segments".to_owned(),
            kept(&records.list::<Segment>(), |one| {
                sees(Action::SegmentView, &segment_resource(cluster, &one.id))
            }),
        ),
        (
            "/v1/hosts".to_owned(),
            kept(&records.list::<Host>(), |host| sees(Action::HostView, &host_resource(host))),
        ),
        (
            "/v1/operations".to_owned(),
            kept(&records.list::<OperationRow>(), |row| {
                sees(Action::OperationView, &operation_resource(cluster, &row.operation))
            }),
        ),
        (
            "/v1/tokens".to_owned(),
            kept(&records.list::<TokenRow>(), |row| sees(Action::UserView, &token_resource(&row.token))),
        ),
        (
            "/v1/grants".to_owned(),
            kept(&records.list::<Grant>(), |grant| {
                let own = grant.user.as_ref() == Some(&me.id)
                    || grant.team.as_ref().is_some_and(|team| teams.contains(team));
                own || sees(Action::GrantView, &grant_resource(cluster, grant))
            }),
        ),
        (
            "/v1/approvals".to_owned(),
            kept(&records.list::<Approval>(), |one| {
                one.requested_by == me.id || sees(Action::ApprovalDecide, &approval_resource(cluster, one))
            }),
        ),
    ];
    for vm in records.list::<Vm>() {
        let around = vm_resource(cluster, &vm);
        if sees(Action::SnapshotView, &around) {
            let of_vm: Vec<_> = records.snapshots_of(&vm.value.id);
            let seen = of_vm.iter().filter(|one| {
                let resource = Resource::snapshot(vm_resource(cluster, &vm), &vm, one, of_vm.len() == 1);
                sees(Action::SnapshotView, &resource)
            });
            let ids =
                seen.map(|row: &std::sync::Arc<crate::records::Row<Snapshot>>| row.value.id.to_string());
            all.push((format!("/v1/vms/{}/snapshots", vm.id), ids.collect()));
        }
    }
    all
}

fn kept<T>(rows: &[std::sync::Arc<crate::records::Row<T>>], sees: impl Fn(&T) -> bool) -> Vec<String> {
    rows.iter().filter(|row| sees(&row.value)).map(|row| row.id.clone()).collect()
}

async fn compare(shape: &Shape) {
    let built = build(shape).await;
    for secret in &built.secrets {
        let principal = world::principal(&built.fixture, secret);
        for (path, mut expected) in one_by_one(&built, &principal) {
            // Who may not ask for the list at all is a token that is not for it.
            let Some(mut seen) = listed(&built, secret, &path, shape.limit).await else {
                let Principal::User(user) = &principal else { panic!("a user") };
                assert!(user.scope.is_some(), "{path} is shut to a user");
                continue;
            };
            let count = seen.len();
            expected.sort_unstable();
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len(), count, "{path}: something was shown twice");
            assert_eq!(seen, expected, "{path} for {}", principal.actor());
        }
    }
}

#[test]
fn lists_are_what_asking_about_every_single_thing_gives() {
    let config = ProptestConfig {
        cases: 24,
        failure_persistence: None,
        max_shrink_iters: 64,
        ..ProptestConfig::default()
    };
    proptest!(config, |(shape in shapes())| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(compare(&shape));
    });
}
