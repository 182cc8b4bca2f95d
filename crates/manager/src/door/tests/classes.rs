//! Every class of bug that bit this field, tried.

use std::collections::BTreeSet;
use std::time::Instant;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use berth_api::manager::{Quota, Segment};
use berth_model::access::Action;
use berth_model::vm::Vm;
use serde_json::{Value, json};

use super::support::Got;
use super::world::{self, TOKEN, World, add_image, give, image, member, put, scoped};
use crate::http::token::TOKENS_MAX;

/// Class: checked at edit, not at restore. A restore goes by the VM as it is now: class, protection and segment stay,
/// and what would not fit the quota today is refused.
#[tokio::test]
async fn a_restore_brings_back_no_class_no_protection_and_no_room() {
    let world = World::new().await;
    let cluster = world.cluster();
    let (_, operator) = member(cluster, "op", &[("operator", Some(&world.own.segment))]).await;
    let restore = "/v1/vms/own%2Fthing/restore";
    let body = json!({"snapshot": "first"});
    world.must(&operator, "POST", &format!("{restore}?dry_run=true"), body.clone()).await;
    // It was standard when the snapshot was taken, and is production now: now counts.
    let mut vm: Vm = cluster.records.require::<Vm>(world.own.vm.id.as_str()).expect("there").value.clone();
    vm.spec.class = world::name("production");
    put(cluster, &vm).await;
    assert_eq!(world.refused(&operator, "POST", restore, body.clone()).await, "approval-needed");
    vm.spec.class = berth_model::vm::standard_class();
    put(cluster, &vm).await;
    // The undo snapshot of a restore takes room as any other.
    let quota = Quota { snapshots: Some(2), ..Quota::default() };
    put(cluster, &Segment { quota, ..world.own.segment.clone() }).await;
    assert_eq!(world.refused(&operator, "POST", restore, body).await, "over-quota");
    let without = json!({"snapshot": "first", "no_undo": true});
    world.must(&operator, "POST", &format!("{restore}?dry_run=true"), without).await;
    // A snapshot of another VM is none of this one's, by name or by id.
    let other = json!({"snapshot": world.foreign.snapshot.id.to_string()});
    assert_eq!(world.refused(&operator, "POST", restore, other).await, "not-allowed");
}

/// To put a VM back on another host is to move it as well.
#[tokio::test]
async fn a_restore_on_a_host_of_ones_choice_takes_the_right_to_move() {
    let world = World::new().await;
    let cluster = world.cluster();
    let own = Some(&world.own.segment);
    world::role(cluster, "restorer", &[Action::VmView, Action::SnapshotView, Action::SnapshotRestore]).await;
    let (user, asks) = member(cluster, "ada", &[("restorer", own)]).await;
    let restore = "/v1/vms/own%2Fthing/restore?dry_run=true";
    let there = json!({"snapshot": "first", "host": "host-1"});
    world.must(&asks, "POST", restore, json!({"snapshot": "first"})).await;
    assert_eq!(world.refused(&asks, "POST", restore, there.clone()).await, "not-allowed");
    world::role(cluster, "mover", &[Action::VmMigrate]).await;
    give(cluster, &user, "mover", own, None).await;
    world.must(&asks, "POST", restore, there).await;
    let nowhere = json!({"snapshot": "first", "host": "host-9"});
    assert_eq!(world.refused(&asks, "POST", restore, nowhere).await, "not-found");
}

/// Requests that name something foreign, and the same with something that is not there. A query of the path says
/// `foreign`, which is put in place by the caller.
fn pairs(world: &World) -> Vec<(&'static str, &'static str, Value, Value)> {
    let vm = |field: &str, value: &str| {
        let mut wish = json!({"segment": "own", "name": "new", "image": "debian"});
        wish[field] = json!(value);
        wish
    };
    let image_id = world.foreign.image.id.to_string();
    let segment_id = world.foreign.segment.id.to_string();
    vec![
        ("POST", "/v1/vms", vm("image", "foreign/disk"), vm("image", "foreign/ghost")),
        ("POST", "/v1/vms", vm("image", &image_id), vm("image", "img-0000000000000000")),
        ("POST", "/v1/vms", vm("segment", "foreign"), vm("segment", "ghost")),
        ("POST", "/v1/vms", vm("segment", &segment_id), vm("segment", "seg-0000000000000000")),
        ("POST", "/v1/vms", vm("host", "host-1"), vm("host", "host-9")),
        ("POST", "/v1/vms/own%2Fthing/migrate", json!({"target": "host-1"}), json!({"target": "host-9"})),
        (
            "POST",
            "/v1/vms/own%2Fthing/restore",
            json!({"snapshot": world.foreign.snapshot.id.to_string()}),
            json!({"snapshot": "snap-0000000000000000"}),
        ),
        ("POST", "/v1/tokens", json!({"segment": "foreign"}), json!({"segment": "ghost"})),
        ("POST", "/v1/tokens", json!({"user": "admin"}), json!({"user": "ghost"})),
        (
            "POST",
            "/v1/grants",
            json!({"user": "someone", "role": "viewer", "segment": "foreign"}),
            json!({"user": "someone", "role": "viewer", "segment": "ghost"}),
        ),
        (
            "POST",
            "/v1/segments",
            json!({"name": "mine", "parent": "foreign"}),
            json!({"name": "mine", "parent": "ghost"}),
        ),
        (
            "POST",
            "/v1/images",
            json!({"name": "mine", "segment": "foreign", "parts": []}),
            json!({"name": "mine", "segment": "ghost", "parts": []}),
        ),
        (
            "POST",
            "/v1/grant-requests",
            json!({"role": "viewer", "segment": "foreign", "for_s": 60}),
            json!({"role": "viewer", "segment": "ghost", "for_s": 60}),
        ),
        ("GET", "/v1/vms?segment=foreign", Value::Null, Value::Null),
        ("GET", "/v1/operations?vm=foreign%2Fthing", Value::Null, Value::Null),
        ("GET", "/v1/what-can?user=admin", Value::Null, Value::Null),
        ("GET", "/v1/who-can?action=vm.view&resource=foreign%2Fthing", Value::Null, Value::Null),
    ]
}

/// Class: second object not authorised. Everything that a body or a query names is authorised by itself, and what is
/// foreign is answered as what is not there.
#[tokio::test]
async fn everything_that_a_request_names_is_authorised() {
    let world = World::new().await;
    let cluster = world.cluster();
    let (_, who) = member(cluster, "own-admin", &[("admin", Some(&world.own.segment))]).await;
    for (method, path, there, absent) in pairs(&world) {
        let other = path.replace("foreign", "ghost").replace("user=admin", "user=ghost");
        let first = world.ask(&who, method, path, there.clone()).await;
        let second = world.ask(&who, method, &other, absent).await;
        assert_eq!(first.problem().0, "not-allowed", "{method} {path} {there}: {}", first.json());
        assert_eq!(told(&first), told(&second), "{method} {path} {there}");
    }
}

/// Class: second object not authorised, where what is named would give rights: a team's parent, a role that is copied.
#[tokio::test]
async fn a_named_parent_or_role_gives_its_maker_nothing() {
    let world = World::new().await;
    let cluster = world.cluster();
    // A team's parent: with the right to manage teams, but not what the parent has.
    world::role(cluster, "leader", &[Action::TeamManage]).await;
    let (_, lead) = member(cluster, "lead", &[("leader", None)]).await;
    world::team(cluster, "crew", &[]).await;
    let into = json!({"parent": "administrators"});
    assert_eq!(world.refused(&lead, "PATCH", "/v1/teams/crew", into).await, "not-allowed");
    let made = json!({"name": "mine", "parent": "administrators", "members": ["lead"]});
    assert_eq!(world.refused(&lead, "POST", "/v1/teams", made).await, "not-allowed");
    // A copied role gives its maker nothing: it still has to be granted.
    world::role(cluster, "smith", &[Action::RoleManage, Action::GrantManage]).await;
    let (_, smith) = member(cluster, "smith", &[("smith", None)]).await;
    world.must(&smith, "POST", "/v1/roles", json!({"name": "copy", "copy_of": "admin"})).await;
    let grant = json!({"user": "smith", "role": "copy"});
    assert_eq!(world.refused(&smith, "POST", "/v1/grants", grant).await, "not-allowed");
    // Nor does a role that one has, once one adds to it.
    let more = json!({"add_actions": ["vm.view"]});
    assert_eq!(world.refused(&smith, "PATCH", "/v1/roles/smith", more).await, "not-allowed");
}

/// What an answer tells, but for its request's id.
fn told(got: &Got) -> (u16, Value, Vec<String>) {
    let mut json = got.json();
    if let Some(fields) = json.as_object_mut() {
        fields.remove("request_id");
    }
    let headers = got.headers.iter().filter(|(name, _)| *name != "x-request-id");
    (got.status.as_u16(), json, headers.map(|(name, value)| format!("{name}: {value:?}")).collect())
}

/// Class: one API of many forgot its check. A handler is mounted by its endpoint's type, and its target says what is
/// authorised; the door has no other way in. Every route names an action that the schema knows, and asks about
/// something that the action can be done to.
#[test]
fn there_is_no_route_without_an_action_that_policies_decide() {
    let known = crate::policy::engine::Engine::new().expect("a schema").action_names();
    let actions: BTreeSet<&str> =
        berth_api::manager::ENDPOINTS.iter().map(|endpoint| endpoint.action.as_str()).collect();
    for action in actions {
        assert!(known.contains(action), "{action} is decided by nobody");
    }
}

/// Class: derived credential wider than its parent. A token is its owner's rights cut by its scope, at the moment of
/// use; a scoped one makes no tokens, asks for no rights, and gives none.
#[tokio::test]
async fn a_token_is_never_more_than_its_owner_and_its_scope() {
    let world = World::new().await;
    let cluster = world.cluster();
    let (owner, session) = member(cluster, "owner", &[]).await;
    let grant = give(cluster, &owner, "admin", Some(&world.own.segment), None).await;
    let view = scoped(&[Action::VmView], Some(&world.own.segment.id));
    let all: Vec<Action> = Action::ALL.iter().copied().filter(|action| action.is_grantable()).collect();
    let wide = scoped(&all, None);
    let secrets = world::credentials(cluster, &owner.id, &[view, TOKEN, wide]).await;
    let (view, plain, wide) = (&secrets[0], &secrets[1], &secrets[2]);
    world.must(view, "GET", "/v1/vms/own%2Fthing", Value::Null).await;
    world.must(view, "GET", "/v1/vms/nested%2Fthing", Value::Null).await;
    for (method, path, body) in [
        ("GET", "/v1/vms/foreign%2Fthing", Value::Null),
        ("GET", "/v1/images", Value::Null),
        ("POST", "/v1/vms/own%2Fthing/start", Value::Null),
        ("POST", "/v1/tokens", json!({})),
        ("POST", "/v1/grant-requests", json!({"role": "viewer", "for_s": 60})),
    ] {
        assert_eq!(world.refused(view, method, path, body).await, "not-allowed", "{method} {path}");
    }
    for token in [plain, wide] {
        assert_eq!(
            world.refused(token, "POST", "/v1/tokens", json!({})).await,
            "not-allowed",
            "a token of a token"
        );
    }
    // A scope of everything that can be granted is still no right of its own.
    assert_eq!(world.refused(wide, "GET", "/v1/audit", Value::Null).await, "not-allowed");
    let asks = json!({"role": "viewer", "for_s": 60});
    assert_eq!(world.refused(wide, "POST", "/v1/grant-requests", asks).await, "not-allowed");
    // The owner loses the grant: so does each token, at once.
    world.must(&world.fixture.admin, "DELETE", &format!("/v1/grants/{grant}"), Value::Null).await;
    for secret in [view, plain, wide, &session] {
        assert_eq!(world.refused(secret, "GET", "/v1/vms/own%2Fthing", Value::Null).await, "not-allowed");
    }
    // A token for a segment may use what is for all segments, and sees in lists what it sees one by one.
    give(cluster, &owner, "configurator", Some(&world.own.segment), None).await;
    let all_here = scoped(&all, Some(&world.own.segment.id));
    let here = world::credentials(cluster, &owner.id, &[all_here]).await.remove(0);
    world.must(&here, "GET", "/v1/images/debian", Value::Null).await;
    let wish = json!({"segment": "own", "name": "new", "image": "debian"});
    world.must(&here, "POST", "/v1/vms?dry_run=true", wish).await;
    let tokens = world.must(&here, "GET", "/v1/tokens", Value::Null).await;
    assert_eq!(tokens["items"], json!([]), "tokens are in no segment");
}

/// Class: names leak. Foreign and absent are the same in status, body, headers and time.
#[tokio::test]
async fn foreign_and_absent_take_the_same_time() {
    let world = World::new().await;
    let (_, who) = member(world.cluster(), "own-viewer", &[("viewer", Some(&world.own.segment))]).await;
    for path in ["/v1/vms/{x}%2Fthing", "/v1/segments/{x}", "/v1/images/{x}%2Fdisk", "/v1/vms?segment={x}"] {
        let mut times: [Vec<u128>; 2] = [Vec::new(), Vec::new()];
        let mut answers = Vec::new();
        for round in 0..60 {
            for (slot, name) in ["foreign", "phantom"].iter().enumerate() {
                let path = path.replace("{x}", name);
                let began = Instant::now();
                let got = world.ask(&who, "GET", &path, Value::Null).await;
                times[slot].push(began.elapsed().as_micros());
                if round == 0 {
                    answers.push(told(&got));
                }
            }
        }
        assert_eq!(answers[0], answers[1], "{path}");
        let medians = times.map(|mut one| {
            one.sort_unstable();
            one[one.len() / 2].max(1)
        });
        let (least, most) = (medians[0].min(medians[1]), medians[0].max(medians[1]));
        // Generous: other work runs on the same cores. A look that is left out shows as several times as long.
        assert!(most < least * 4 + 2000, "{path}: {medians:?} µs");
    }
}

/// Class: names leak, in lists: neither items nor cursors nor counts tell of what one does not see.
#[tokio::test]
async fn lists_counts_and_cursors_tell_nothing_of_foreign_things() {
    let world = World::new().await;
    let (_, who) = member(world.cluster(), "own-viewer", &[("viewer", Some(&world.own.segment))]).await;
    let foreign = [
        world.foreign.segment.id.as_str(),
        world.foreign.vm.id.as_str(),
        world.foreign.image.id.as_str(),
        world.foreign.operation.as_str(),
        world.foreign.grant.id.as_str(),
        "foreign",
    ];
    for path in [
        "/v1/vms?limit=1",
        "/v1/vms?limit=2",
        "/v1/images?limit=3",
        "/v1/segments?limit=2",
        "/v1/operations?limit=2",
        "/v1/grants",
        "/v1/hosts",
        "/v1/approvals",
        "/v1/teams",
        "/v1/tokens",
        "/v1/segments/own",
        "/v1/what-can",
        "/v1/whoami",
    ] {
        let text = world.must(&who, "GET", path, Value::Null).await.to_string();
        for secret in foreign {
            assert!(!text.contains(secret), "{path} tells of {secret}: {text}");
        }
        let cursor = serde_json::from_str::<Value>(&text).expect("JSON")["next_cursor"].clone();
        if let Some(cursor) = cursor.as_str() {
            let open = String::from_utf8(URL_SAFE_NO_PAD.decode(cursor).expect("ours")).expect("text");
            assert!(!foreign.iter().any(|secret| open.contains(secret)), "{path}: {open}");
        }
    }
    let pages = world.must(&who, "GET", "/v1/vms?limit=2", Value::Null).await;
    assert_eq!((pages["items"].as_array().map(Vec::len), pages["next_cursor"].is_null()), (Some(2), true));
}

/// Class: names leak, in conflicts: making something tells nothing of foreign things of that name.
#[tokio::test]
async fn a_conflict_on_making_something_tells_nothing_of_a_foreign_segment() {
    let world = World::new().await;
    let cluster = world.cluster();
    let (_, who) = member(cluster, "own-maker", &[("configurator", Some(&world.own.segment))]).await;
    let secret = image(cluster, Some(&world.foreign.segment), "secret");
    add_image(cluster, &secret).await;
    let part = json!({"role": "disk", "format": "raw", "size_bytes": 1, "sha256": "ab".repeat(32)});
    let wish = |name: &str| json!({"name": name, "segment": "own", "parts": [part]});
    world.must(&who, "POST", "/v1/images", wish("secret")).await;
    world.must(&who, "POST", "/v1/images", wish("debian")).await;
    assert_eq!(world.refused(&who, "POST", "/v1/images", wish("secret")).await, "already-exists");
    // Each is found by its own name, and a VM's image first in its own segment.
    let own = world.must(&who, "GET", "/v1/images/own%2Fdebian", Value::Null).await;
    let all = world.must(&who, "GET", "/v1/images/debian", Value::Null).await;
    assert_ne!(own["id"], all["id"]);
    let vm = json!({"segment": "own", "name": "new", "image": "debian"});
    let refused = world.ask(&who, "POST", "/v1/vms", vm).await;
    assert_eq!(
        refused.problem().0,
        "wrong-state",
        "the segment's own, which is not whole yet: {}",
        refused.json()
    );
    assert_eq!(world.refused(&who, "GET", "/v1/images/foreign%2Fsecret", Value::Null).await, "not-allowed");
    // VMs of the same name in different segments don't know of each other.
    let vm = json!({"segment": "own", "name": "books", "image": "own/disk"});
    world.must(&who, "POST", "/v1/vms?dry_run=true", vm).await;
    // Deleting an image that is needed says how many need it, and not which.
    let got = world.ask(&world.fixture.admin, "DELETE", "/v1/images/foreign%2Fdisk", Value::Null).await;
    assert_eq!(got.problem().0, "protected");
    assert!(!got.json().to_string().contains("foreign/thing"), "{}", got.json());
}

/// Class: resource exhaustion, by what everybody may make: tokens and requests for rights.
#[tokio::test]
async fn what_everybody_may_make_is_bounded() {
    let world = World::new().await;
    let cluster = world.cluster();
    let (user, session) = member(cluster, "greedy", &[]).await;
    let many: Vec<_> = (0..TOKENS_MAX / 50).collect();
    for _ in many {
        world::credentials(cluster, &user.id, &vec![TOKEN; 50]).await;
    }
    assert_eq!(world.refused(&session, "POST", "/v1/tokens", json!({})).await, "busy");
    let mut made = 0;
    for seconds in 1..200 {
        let got = world
            .ask(&session, "POST", "/v1/grant-requests", json!({"role": "admin", "for_s": seconds}))
            .await;
        if !got.status.is_success() {
            assert_eq!(got.problem().0, "busy", "{}", got.json());
            break;
        }
        made += 1;
    }
    assert_eq!(made, crate::door::second_person::WAITING_MAX);
    // The same wish again is the same request, not another one.
    world.must(&session, "POST", "/v1/grant-requests", json!({"role": "admin", "for_s": 1})).await;
}

/// Class: magic group names. No name means anything: not a team's, not a user's, not an external group's.
#[tokio::test]
async fn no_name_has_a_meaning_of_its_own() {
    let world = World::new().await;
    let cluster = world.cluster();
    let admin = &world.fixture.admin;
    for called in ["admin-s", "root", "admins", "domain-admins", "esx-admins", "wheel", "system"] {
        let (_, session) = member(cluster, called, &[]).await;
        let team = format!("{called}-team");
        world.must(admin, "POST", "/v1/teams", json!({"name": team, "members": [called]})).await;
        assert_eq!(world.refused(&session, "GET", "/v1/vms/own%2Fthing", Value::Null).await, "not-allowed");
    }
    // A team of the first team's name, after that one is gone, and a user called as the first administrator was.
    let (second, session) = member(cluster, "second", &[("admin", None)]).await;
    let teams = world.must(&session, "GET", "/v1/teams", Value::Null).await;
    let first =
        teams["items"].as_array().expect("a list").iter().find(|team| team["name"] == "administrators");
    let first = first.expect("there")["id"].as_str().expect("an id").to_owned();
    for grant in cluster.records.list::<berth_api::manager::Grant>() {
        if grant.team.as_ref().is_some_and(|team| team.as_str() == first) {
            world.must(&session, "DELETE", &format!("/v1/grants/{}", grant.id), Value::Null).await;
        }
    }
    world.must(&session, "DELETE", "/v1/teams/administrators", Value::Null).await;
    world.must(&session, "DELETE", "/v1/users/admin", Value::Null).await;
    assert_eq!(world.ask(admin, "GET", "/v1/whoami", Value::Null).await.status, 401);
    let (late, late_session) = member(cluster, "admin", &[]).await;
    let wish = json!({"name": "administrators", "members": ["admin"], "external_groups": [
        {"provider": "ldap", "group": "ESX Admins"}, {"provider": "ldap", "group": "Domain Admins"}]});
    world.must(&session, "POST", "/v1/teams", wish).await;
    let seen = world.must(&late_session, "GET", "/v1/users", Value::Null).await;
    assert_eq!(seen["items"].as_array().map(Vec::len), Some(1), "itself and nobody else: {seen}");
    assert_eq!(world.refused(&late_session, "GET", "/v1/audit", Value::Null).await, "not-allowed");
    assert_ne!(late.id, second.id);
    // A role can't be called as a built-in one, so that nobody is misled, nor does a name that looks like one help.
    for called in ["admin", "viewer"] {
        assert_eq!(
            world.refused(&session, "POST", "/v1/roles", json!({"name": called})).await,
            "already-exists"
        );
    }
    for called in ["Admin", "ADMIN", "admın", "аdmin", "admin ", "admin\u{200b}"] {
        assert_eq!(
            world.refused(&session, "POST", "/v1/roles", json!({"name": called})).await,
            "invalid-input"
        );
        let grant = json!({"user": "admin", "role": called});
        assert_eq!(world.refused(&session, "POST", "/v1/grants", grant).await, "invalid-input", "{called:?}");
    }
}

/// Class: a deeper entry replaces an inherited one. Grants only add, wherever they stand; guards only forbid.
#[tokio::test]
async fn grants_only_add_and_guards_only_forbid() {
    let world = World::new().await;
    let cluster = world.cluster();
    let (user, session) = member(cluster, "adder", &[("operator", Some(&world.own.segment))]).await;
    let start = "/v1/vms/nested%2Fthing/start?dry_run=true";
    let code = |got: Got| if got.status.is_success() { String::new() } else { got.problem().0 };
    let before = code(world.ask(&session, "POST", start, Value::Null).await);
    assert_ne!(before, "not-allowed");
    // A lesser role deeper down takes nothing away.
    give(cluster, &user, "viewer", Some(&world.nested.segment), None).await;
    assert_ne!(code(world.ask(&session, "POST", start, Value::Null).await), "not-allowed");
    // A guard outside holds inside, whatever is granted inside.
    let text = format!(
        "forbid (principal, action == Action::\"vm.start\", resource in Segment::\"{}\");",
        world.own.segment.id
    );
    world::policy(cluster, "no-starts", &text, true).await;
    give(cluster, &user, "admin", Some(&world.nested.segment), None).await;
    assert_eq!(code(world.ask(&session, "POST", start, Value::Null).await), "not-allowed");
    assert_eq!(
        code(world.ask(&world.fixture.admin, "POST", start, Value::Null).await),
        "not-allowed",
        "not for administrators either"
    );
    // A guard gives nothing to who had nothing.
    let (_, nobody) = member(cluster, "nobody-else", &[]).await;
    assert_eq!(world.refused(&nobody, "GET", "/v1/vms/own%2Fthing", Value::Null).await, "not-allowed");
}

/// A user with the right to configure must not take down what guards look at, nor by racing somebody who puts it up.
#[tokio::test]
async fn what_guards_look_at_is_changed_only_by_who_may_classify() {
    let world = World::new().await;
    let cluster = world.cluster();
    let (_, who) = member(cluster, "conf", &[("configurator", Some(&world.own.segment))]).await;
    let vm = "/v1/vms/own%2Fthing";
    world.must(&who, "PATCH", vm, json!({"protected": true})).await;
    assert_eq!(world.refused(&who, "PATCH", vm, json!({"protected": false})).await, "not-allowed");
    assert_eq!(world.refused(&who, "PATCH", vm, json!({"class": "production"})).await, "not-allowed");
    let wish = json!({"segment": "own", "name": "new", "image": "debian", "class": "production"});
    assert_eq!(world.refused(&who, "POST", "/v1/vms", wish).await, "not-allowed");
    assert_eq!(
        world.refused(&who, "DELETE", &format!("{vm}?force=true"), Value::Null).await,
        "approval-needed"
    );
}

/// A malformed request is told what is wrong with it, whatever one may: that says nothing of what there is.
#[tokio::test]
async fn a_malformed_request_is_answered_alike_for_foreign_and_absent() {
    let world = World::new().await;
    let cluster = world.cluster();
    let (_, who) = member(cluster, "conf", &[("configurator", Some(&world.own.segment))]).await;
    for path in ["/v1/vms/own%2Fthing", "/v1/vms/foreign%2Fthing", "/v1/vms/ghost%2Fthing"] {
        let got = world.ask(&who, "PATCH", path, json!({"protectd": true})).await;
        assert_eq!((got.status.as_u16(), got.problem().1.as_str()), (400, "protectd"), "{path}");
    }
}
