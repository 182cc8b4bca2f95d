//! Nobody gives what it does not have, whatever sequence of changes is tried.
//!
//! Users with rights to govern, and others, make random changes of grants, teams, roles and tokens through the door.
//! After each one that was allowed, whatever anybody can do that it could not do before must be something that the one
//! who made the change could do.

use std::collections::BTreeSet;

use berth_api::manager::{Segment, User};
use berth_model::access::Action;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::auth::Principal;
use crate::door::target::segment_resource;
use crate::door::tests::support::{Fixture, NOW, grant_of};
use crate::door::tests::world::{self, SESSION, put};
use crate::policy::Resource;

/// What is asked about: enough of each group to notice.
const WATCHED: [Action; 12] = [
    Action::VmView,
    Action::VmStart,
    Action::VmDelete,
    Action::VmConsole,
    Action::VmClassify,
    Action::ApprovalDecide,
    Action::AuditView,
    Action::GrantManage,
    Action::GrantView,
    Action::RoleManage,
    Action::TeamManage,
    Action::UserManage,
];
const NAMES: [&str; 4] = ["ann", "bob", "cat", "dan"];
const TEAMS: [&str; 3] = ["t-0", "t-1", "t-2"];
const PLACES: [&str; 3] = ["out", "in", "far"];
const GIVEN: [&str; 5] = ["viewer", "operator", "admin", "mixed", "giver"];

#[derive(Debug, Clone)]
enum Change {
    Grant { to_team: bool, to: usize, role: usize, place: Option<usize> },
    Revoke { at: usize },
    Join { team: usize, user: usize },
    Leave { team: usize, user: usize },
    Into { team: usize, parent: Option<usize> },
    NewTeam { parent: usize, user: usize },
    Widen { action: usize },
    Narrow { action: usize },
    Token { user: usize },
}

fn changes() -> impl Strategy<Value = Change> {
    let team = 0..TEAMS.len();
    let user = 0..NAMES.len();
    let action = 0..WATCHED.len();
    prop_oneof![
        4 => (any::<bool>(), 0..3_usize, 0..GIVEN.len(), proptest::option::of(0..PLACES.len()))
            .prop_map(|(to_team, to, role, place)| Change::Grant { to_team, to, role, place }),
        1 => (0..10_usize).prop_map(|at| Change::Revoke { at }),
        3 => (team.clone(), user.clone()).prop_map(|(team, user)| Change::Join { team, user }),
        2 => (team.clone(), user.clone()).prop_map(|(team, user)| Change::Leave { team, user }),
        2 => (team.clone(), proptest::option::of(team.clone())).prop_map(|(team, parent)| Change::Into { team, parent }),
        1 => (team, user.clone()).prop_map(|(parent, user)| Change::NewTeam { parent, user }),
        2 => action.clone().prop_map(|action| Change::Widen { action }),
        1 => action.prop_map(|action| Change::Narrow { action }),
        1 => user.prop_map(|user| Change::Token { user }),
    ]
}

#[derive(Debug, Clone)]
struct Start {
    /// For each user: roles out of `GIVEN` and where.
    grants: Vec<(usize, usize, Option<usize>)>,
    members: Vec<(usize, usize)>,
    team_grants: Vec<(usize, usize, Option<usize>)>,
    hangs_on_team: bool,
    steps: Vec<(usize, Change)>,
}

fn starts() -> impl Strategy<Value = Start> {
    let grant = || (0..4_usize, 0..GIVEN.len(), proptest::option::of(0..PLACES.len()));
    (
        proptest::collection::vec(grant(), 1..5),
        proptest::collection::vec((0..TEAMS.len(), 0..NAMES.len()), 0..4),
        proptest::collection::vec(grant(), 0..3),
        any::<bool>(),
        proptest::collection::vec((prop_oneof![3 => Just(0), 2 => 0..NAMES.len()], changes()), 6..14),
    )
        .prop_map(|(grants, members, team_grants, hangs_on_team, steps)| Start {
            grants,
            members,
            team_grants,
            hangs_on_team,
            steps,
        })
}

struct Scene {
    fixture: Fixture,
    users: Vec<(User, String)>,
    segments: Vec<Segment>,
    made: usize,
}

type Rights = BTreeSet<(&'static str, usize)>;

impl Scene {
    async fn new(start: &Start) -> Self {
        let fixture = Fixture::new().await;
        let cluster = fixture.cluster();
        let out = world::segment(cluster, "out", None).await;
        let segments =
            vec![world::segment(cluster, "in", Some(&out)).await, world::segment(cluster, "far", None).await];
        let segments: Vec<Segment> = std::iter::once(out).chain(segments).collect();
        world::role(cluster, "mixed", &[Action::VmView, Action::VmStart]).await;
        let govern = [
            Action::GrantManage,
            Action::GrantView,
            Action::RoleManage,
            Action::TeamManage,
            Action::UserManage,
            Action::SegmentView,
            Action::VmView,
        ];
        world::role(cluster, "giver", &govern).await;
        let mut users = Vec::new();
        for called in NAMES {
            users.push(world::member(cluster, called, &[]).await);
        }
        // Somebody who governs everywhere and has little else, or there would be few changes to judge.
        put(cluster, &grant_of(cluster, &users[0].0, "giver", None)).await;
        for (user, role, place) in &start.grants {
            let grant = grant_of(cluster, &users[*user].0, GIVEN[*role], place.map(|at| &segments[at]));
            put(cluster, &grant).await;
        }
        for (index, called) in TEAMS.iter().enumerate() {
            let members = start.members.iter().filter(|(team, _)| *team == index);
            let members: Vec<&User> = members.map(|(_, user)| &users[*user].0).collect();
            let team = world::team(cluster, called, &members).await;
            for (_, role, place) in start.team_grants.iter().filter(|(to, ..)| *to == index) {
                let mut grant = grant_of(cluster, &users[0].0, GIVEN[*role], place.map(|at| &segments[at]));
                (grant.user, grant.team) = (None, Some(team.id.clone()));
                put(cluster, &grant).await;
            }
            if start.hangs_on_team && index < 2 {
                let text = if index == 0 {
                    format!(
                        "permit (principal in Team::\"{}\", action == Action::\"vm.console\", resource);",
                        team.id
                    )
                } else {
                    format!(
                        "forbid (principal in Team::\"{}\", action == Action::\"vm.delete\", resource);",
                        team.id
                    )
                };
                world::policy(cluster, &format!("p-{index}"), &text, true).await;
            }
        }
        Self { fixture, users, segments, made: 0 }
    }

    /// Everything that somebody can do, by asking.
    fn rights(&self, user: &User) -> Rights {
        let (policies, cluster) = (&self.fixture.manager.gate().policies, self.fixture.cluster());
        let principal = Principal::as_if(user);
        let mut places = vec![Resource::cluster()];
        places.extend(self.segments.iter().map(|segment| segment_resource(cluster, &segment.id)));
        let mut rights = Rights::new();
        for action in WATCHED {
            for (at, place) in places.iter().enumerate() {
                if policies.look(&principal, action, place, false).allowed {
                    rights.insert((action.as_str(), at));
                }
            }
        }
        rights
    }

    fn all_rights(&self) -> Vec<Rights> {
        self.users.iter().map(|(user, _)| self.rights(user)).collect()
    }

    async fn make(&mut self, by: usize, change: &Change) -> bool {
        let (method, path, body) = self.request(change);
        self.made += 1;
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let got = self.fixture.call(method, &path, Some(&self.users[by].1), &body).await;
        assert!(!got.status.is_server_error(), "{path}: {}", got.json());
        got.status.is_success()
    }

    fn request(&self, change: &Change) -> (&'static str, String, Value) {
        match change {
            Change::Grant { to_team, to, role, place } => {
                let to = if *to_team { json!({"team": TEAMS[*to]}) } else { json!({"user": NAMES[*to]}) };
                let mut body = to;
                body["role"] = json!(GIVEN[*role]);
                body["segment"] = json!(place.map(|at| PLACES[at]));
                ("POST", "/v1/grants".to_owned(), body)
            }
            Change::Revoke { at } => {
                let grants = self.fixture.cluster().records.list::<berth_api::manager::Grant>();
                let id = grants.get(*at).map_or("g-0000000000000000", |row| row.id.as_str());
                ("DELETE", format!("/v1/grants/{id}"), Value::Null)
            }
            Change::Join { team, user } => {
                ("PATCH", format!("/v1/teams/{}", TEAMS[*team]), json!({"add_members": [NAMES[*user]]}))
            }
            Change::Leave { team, user } => {
                ("PATCH", format!("/v1/teams/{}", TEAMS[*team]), json!({"remove_members": [NAMES[*user]]}))
            }
            Change::Into { team, parent } => {
                let parent = parent.map_or("", |at| TEAMS[at]);
                ("PATCH", format!("/v1/teams/{}", TEAMS[*team]), json!({"parent": parent}))
            }
            Change::NewTeam { parent, user } => {
                let called = format!("n-{}", self.made);
                let body = json!({"name": called, "parent": TEAMS[*parent], "members": [NAMES[*user]]});
                ("POST", "/v1/teams".to_owned(), body)
            }
            Change::Widen { action } => {
                ("PATCH", "/v1/roles/mixed".to_owned(), json!({"add_actions": [WATCHED[*action].as_str()]}))
            }
            Change::Narrow { action } => (
                "PATCH",
                "/v1/roles/mixed".to_owned(),
                json!({"remove_actions": [WATCHED[*action].as_str()]}),
            ),
            Change::Token { user } => ("POST", "/v1/tokens".to_owned(), json!({"user": NAMES[*user]})),
        }
    }
}

async fn play(start: &Start) {
    let mut scene = Scene::new(start).await;
    let mut before = scene.all_rights();
    for (by, change) in &start.steps {
        if !scene.make(*by, change).await {
            continue;
        }
        let after = scene.all_rights();
        for (index, rights) in after.iter().enumerate() {
            let new: Rights = rights.difference(&before[index]).copied().collect();
            let beyond: Vec<_> = new.difference(&before[*by]).collect();
            assert!(beyond.is_empty(), "{} gave {} by {change:?}: {beyond:?}", NAMES[*by], NAMES[index]);
        }
        if let Change::Token { user } = change {
            // Whoever has somebody's token can do what that one can.
            let beyond: Vec<_> = after[*user].difference(&before[*by]).collect();
            assert!(beyond.is_empty(), "{} took {}'s rights: {beyond:?}", NAMES[*by], NAMES[*user]);
        }
        before = after;
    }
}

#[test]
fn whatever_is_changed_nobody_gains_what_the_changer_does_not_have() {
    let config = ProptestConfig {
        cases: 48,
        failure_persistence: None,
        max_shrink_iters: 64,
        ..ProptestConfig::default()
    };
    proptest!(config, |(start in starts())| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(play(&start));
    });
}

/// A right that ends can't be passed on for longer, nor in another's name, nor by a token that is narrower.
#[tokio::test]
async fn what_is_given_ends_no_later_and_reaches_no_further_than_what_one_has() {
    let world = world::World::new().await;
    let cluster = world.cluster();
    let (giver, session) = world::member(cluster, "giver-of-own", &[]).await;
    let end = NOW.plus_millis(1000);
    world::give(cluster, &giver, "admin", Some(&world.own.segment), Some(end)).await;
    let wish = |segment: Option<&str>, until: Option<String>| json!({"user": "someone", "role": "viewer", "segment": segment, "until": until});
    for (segment, until, allowed) in [
        (Some("own"), Some(end.to_string()), true),
        (Some("nested"), Some(end.to_string()), true),
        (Some("own"), Some(end.plus_millis(1).to_string()), false),
        (Some("own"), None, false),
        (Some("foreign"), Some(end.to_string()), false),
        (None, Some(end.to_string()), false),
    ] {
        let got = world.ask(&session, "POST", "/v1/grants", wish(segment, until.clone())).await;
        assert_eq!(got.status.is_success(), allowed, "{segment:?} {until:?}: {}", got.json());
    }
    let narrow = world::scoped(&[Action::GrantManage, Action::SegmentView], None);
    let token = world::credentials(cluster, &giver.id, &[narrow, SESSION]).await.remove(0);
    let got = world.ask(&token, "POST", "/v1/grants", wish(Some("own"), Some(end.to_string()))).await;
    assert_eq!(got.problem().0, "not-allowed", "its scope has not what it would give");
}

/// The refusal names no segment that the giver does not see.
#[tokio::test]
async fn a_refused_gift_does_not_name_a_foreign_segment() {
    let world = world::World::new().await;
    let cluster = world.cluster();
    world::role(cluster, "leader", &[Action::TeamManage, Action::UserView]).await;
    let (_, session) = world::member(cluster, "lead", &[("leader", None)]).await;
    let crew = world::team(cluster, "crew", &[]).await;
    let mut grant = grant_of(cluster, &world.someone, "viewer", Some(&world.foreign.segment));
    (grant.user, grant.team) = (None, Some(crew.id.clone()));
    put(cluster, &grant).await;
    let got = world.ask(&session, "PATCH", "/v1/teams/crew", json!({"add_members": ["lead"]})).await;
    assert_eq!(got.problem().0, "not-allowed");
    assert!(!got.json().to_string().contains("foreign"), "{}", got.json());
}

/// A written policy that names a team gives to whoever is in it, or takes from them: coming in and going out are then
/// for those who have what it is about.
#[tokio::test]
async fn a_policy_that_hangs_on_a_team_counts_for_who_lets_people_in_or_out() {
    let world = world::World::new().await;
    let cluster = world.cluster();
    world::role(cluster, "leader", &[Action::TeamManage, Action::UserManage]).await;
    let (lead, session) = world::member(cluster, "lead", &[("leader", None)]).await;
    let gifted = world::team(cluster, "gifted", &[&world.someone]).await;
    let bound = world::team(cluster, "bound", &[&lead]).await;
    let text =
        format!("permit (principal in Team::\"{}\", action == Action::\"vm.console\", resource);", gifted.id);
    world::policy(cluster, "gift", &text, true).await;
    let text =
        format!("forbid (principal in Team::\"{}\", action == Action::\"vm.delete\", resource);", bound.id);
    world::policy(cluster, "bounds", &text, true).await;
    for (path, body) in [
        ("/v1/teams/gifted", json!({"add_members": ["lead"]})),
        ("/v1/teams/gifted", json!({"add_external_groups": [{"provider": "ldap", "group": "x"}]})),
        ("/v1/teams/bound", json!({"remove_members": ["lead"]})),
        ("/v1/teams/bound", json!({"parent": "gifted"})),
    ] {
        assert_eq!(
            world.refused(&session, "PATCH", path, body.clone()).await,
            "not-allowed",
            "{path} {body}"
        );
    }
    let inside = json!({"name": "inside", "parent": "gifted", "members": ["lead"]});
    assert_eq!(world.refused(&session, "POST", "/v1/teams", inside).await, "not-allowed");
    // Nor by somebody's token.
    let grants = [
        world.grant.clone(),
        world.own.grant.clone(),
        world.nested.grant.clone(),
        world.foreign.grant.clone(),
    ];
    for grant in grants {
        world.must(&world.fixture.admin, "DELETE", &format!("/v1/grants/{}", grant.id), Value::Null).await;
    }
    assert_eq!(
        world.refused(&session, "POST", "/v1/tokens", json!({"user": "someone"})).await,
        "not-allowed"
    );
    world.must(&world.fixture.admin, "PATCH", "/v1/teams/gifted", json!({"add_members": ["lead"]})).await;
}

/// Who is kept from something in person does not get around it by giving it to somebody else; what everybody is kept
/// from may be given.
#[tokio::test]
async fn what_a_guard_keeps_one_from_in_person_one_does_not_give_to_others() {
    let world = world::World::new().await;
    let cluster = world.cluster();
    let (user, session) = world::member(cluster, "bound", &[("admin", None)]).await;
    let wish = json!({"user": "someone", "role": "operator", "segment": "own"});
    let against = |who: &str| {
        format!(
            "forbid ({who}, action == Action::\"vm.start\", resource is Vm) when {{ resource.protected }};"
        )
    };
    world::policy(cluster, "all", &against("principal"), true).await;
    world.must(&session, "POST", "/v1/grants", wish.clone()).await;
    world::policy(cluster, "one", &against(&format!("principal == User::\"{}\"", user.id)), true).await;
    assert_eq!(world.refused(&session, "POST", "/v1/grants", wish.clone()).await, "not-allowed");
    world
        .must(&session, "POST", "/v1/grants", json!({"user": "someone", "role": "viewer", "segment": "own"}))
        .await;
    world.must(&world.fixture.admin, "POST", "/v1/grants", wish).await;
}
