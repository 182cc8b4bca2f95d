//! The full matrix: every route × every role × own, nested and foreign × session and tokens of every kind.
//!
//! What is expected is worked out by the one rule that there is: whoever has a role with the route's action, in a
//! segment that the thing is in or in the whole cluster, may; a token may what its owner may and its scope has. The
//! answers come through the door. A route that is new has to say here what it is about, or this fails.

use std::fmt::Write as _;

use berth_api::EndpointInfo;
use berth_api::manager::{ENDPOINTS, TokenKind, User};
use berth_model::access::{Action, ActionGroup, BUILT_IN_ROLES};

use super::support::NOW;
use super::world::{
    Credential, Place, SESSION, TOKEN, World, credentials, give, policy, role, scoped, team, user,
};

/// What a route is about.
#[derive(Clone, Copy, PartialEq, Eq)]
enum About {
    /// Anybody may.
    Anybody,
    /// Machines that join, by a token in the body.
    Joining,
    /// Hosts, by their certificate.
    Agents,
    /// Every user, about itself.
    OneSelf,
    /// A list, which is filtered.
    List,
    /// Whoever is nobody yet: a user who shows who it is does not log in.
    Strangers,
    /// The caller, who has to prove itself once more.
    Proof,
    /// The cluster, or something directly in it.
    Cluster,
    /// Something in a segment.
    Segment,
    /// Something in a segment or, left out, in the cluster.
    Either,
}

/// What a route is about, its query, and its body. `{s}` is the segment's name, `"{s?}"` the same or null.
fn entry(name: &str) -> (About, &'static str, &'static str) {
    use About::{Agents, Anybody, Cluster, Either, Joining, List, OneSelf, Proof, Segment, Strangers};
    match name {
        "HealthShow" | "OpenApiShow" => (Anybody, "", ""),
        "HostEnrol" => (Joining, "", r#"{"token":"x","name":"new","address":"192.0.2.1:1","csr_pem":"x"}"#),
        "CertificateRenew" => (Agents, "", r#"{"csr_pem":"x"}"#),
        "LoginShow" | "OidcBegin" | "OidcCallback" | "OidcDevice" => (Strangers, "", ""),
        "LoginBegin" => (Strangers, "", r#"{"user":"x","password":"y"}"#),
        "LoginContinue" => (Strangers, "", r#"{"totp":"000000"}"#),
        "OwnPasswordChange" => (Proof, "", r#"{"old_password":"x","new_password":"y"}"#),
        "Logout" => (Proof, "", ""),
        "OwnTotpRemove" => (Proof, "", r#"{"code":"000000"}"#),
        "OwnTotpEnrol" => (OneSelf, "", "{}"),
        "OwnTotpConfirm" => (OneSelf, "", r#"{"code":"000000"}"#),
        "OwnSessionList" | "OwnSessionDelete" => (OneSelf, "", ""),
        "WhoAmIShow" | "WhatCan" | "RoleList" | "ApprovalList" => (OneSelf, "", ""),
        "CanI" => (OneSelf, "?action=vm.view", ""),
        "TokenCreate" => (OneSelf, "", "{}"),
        "GrantRequest" => (OneSelf, "", r#"{"role":"viewer","for_s":60}"#),
        "RepositoryList" | "ScheduleList" | "HostList" | "UserList" | "SegmentList" | "ImageList"
        | "VmList" | "OperationList" | "TokenList" | "TeamList" | "GrantList" => (List, "", ""),
        "AuditCheckpointShow" | "AuditKeyShow" | "AuditExport" => (Cluster, "", ""),
        "AuditInclusionShow" => (Cluster, "?sequence=0&size=1", ""),
        "AuditConsistencyShow" => (Cluster, "?from=1&to=1", ""),
        "UserDisable" | "UserEnable" | "UserLoginShow" | "UserTotpReset" => (Cluster, "", ""),
        "UserPasswordReset" => (Cluster, "", "{}"),
        "UserIdentityLink" => (Cluster, "", r#"{"source":"x","subject":"y"}"#),
        "UserIdentityUnlink" => (Cluster, "?identity=x", ""),
        "MetricsShow" | "AuditList" | "PolicyList" | "HostShow" | "HostDelete" | "UserShow"
        | "UserDelete" | "TokenDelete" | "TeamShow" | "TeamDelete" | "RoleDelete" | "PolicyShow"
        | "PolicyActivate" | "PolicyDeactivate" | "PolicyDelete" => (Cluster, "", ""),
        "JoinTokenCreate" | "TeamUpdate" | "RoleUpdate" => (Cluster, "", "{}"),
        "UserCreate" | "TeamCreate" | "RoleCreate" => (Cluster, "", r#"{"name":"new"}"#),
        "PolicyCreate" => (Cluster, "", r#"{"name":"new","text":"x"}"#),
        "WhoCan" => (Either, "?action=vm.view{r}", ""),
        "SegmentCreate" => (Either, "", r#"{"name":"new","parent":"{s?}"}"#),
        "ImageCreate" => (Either, "", r#"{"name":"new","segment":"{s?}","parts":[]}"#),
        "GrantCreate" => (Either, "", r#"{"user":"someone","role":"viewer","segment":"{s?}"}"#),
        "GrantDelete" | "ApprovalApprove" | "ApprovalDeny" => (Either, "", ""),
        "SegmentShow" | "SegmentDelete" | "ImageShow" | "ImagePartUpload" | "ImageDelete" | "VmShow"
        | "VmConsole" | "SnapshotList" | "SnapshotShow" | "SnapshotPin" | "SnapshotUnpin"
        | "SnapshotDiff" | "OperationShow" | "OperationEvents" | "OperationCancel" => (Segment, "", ""),
        "OperationWait" => (Segment, "?wait_ms=0", ""),
        "SegmentUpdate" => (Segment, "", "{}"),
        "ScheduleCreate" => (
            Segment,
            "?dry_run=true",
            r#"{"name":"new","segment":"{s}","cron":"0 2 * * *","keep":{"daily":7}}"#,
        ),
        "ScheduleUpdate" | "ScheduleRunNow" => (Segment, "?dry_run=true", ""),
        "ScheduleShow" | "SchedulePause" | "ScheduleResume" | "ScheduleDelete" => (Segment, "", ""),
        "VmCreate" => (Segment, "?dry_run=true", r#"{"segment":"{s}","name":"new","image":"debian"}"#),
        "VmUpdate" | "VmDelete" | "VmStart" | "VmShutdown" | "VmStop" | "VmRestart" | "VmPause"
        | "VmResume" | "VmMigrate" | "SnapshotCreate" => (Segment, "?dry_run=true", ""),
        "SnapshotDelete" => (Segment, "?dry_run=true", ""),
        "SnapshotVerify" => (Segment, "?dry_run=true", "{}"),
        "SnapshotExport" => (Segment, "?dry_run=true", r#"{"repository":"{s}-backups"}"#),
        "SnapshotImport" => (Segment, "?dry_run=true", r#"{"backup":"00","name":"new","segment":"{s}"}"#),
        "RepositoryCreate" => {
            (Either, "", r#"{"name":"new","url":"/srv/x","segment":"{s?}","keys":{"password":"x"}}"#)
        }
        "RepositoryShow" | "RepositoryBackups" | "RepositoryDelete" => (Segment, "", ""),
        "SnapshotClone" => (Segment, "?dry_run=true", r#"{"name":"new"}"#),
        "VmRestore" => (Segment, "?dry_run=true", r#"{"snapshot":"first"}"#),
        new => panic!("the route {new} is new: say here what it is about"),
    }
}

fn request(world: &World, endpoint: &EndpointInfo, place: Option<&Place>) -> (String, String) {
    let (_, query, body) = entry(endpoint.name);
    let segment = place.map(|place| place.segment.name.to_string());
    let grant = place.map_or(&world.grant, |place| &place.grant);
    let approval = place.map_or(&world.approval, |place| &place.approval);
    let here = place.unwrap_or(&world.own);
    let path = endpoint
        .path
        .replace("{vm}", &format!("{}%2Fthing", here.segment.name))
        .replace("{snapshot}", "first")
        .replace("{host}", "host-1")
        .replace("{segment}", here.segment.name.as_str())
        .replace("{image}", &format!("{}%2Fdisk", here.segment.name))
        .replace("{role}", "disk")
        .replace("{operation}", here.operation.as_str())
        .replace("{user}", world.loner.id.as_str())
        .replace("{login}", "0000000000000000000000000000000000000000000")
        .replace("{provider}", "nowhere")
        .replace("{session}", "token-0000000000000000")
        .replace("{token}", world.token.token.id.as_str())
        .replace("{team}", "crew")
        .replace("{role_name}", "helpers")
        .replace("{grant}", grant.id.as_str())
        .replace("{policy}", "night")
        .replace("{schedule}", &format!("{}%2Fnightly", here.segment.name))
        .replace("{repository}", &format!("{}-backups", here.segment.name))
        .replace("{approval}", approval.id.as_str());
    let resource = segment.as_ref().map(|name| format!("&resource={name}")).unwrap_or_default();
    let or_null = segment.as_ref().map_or("null".to_owned(), |name| format!("\"{name}\""));
    let body = body.replace("\"{s?}\"", &or_null).replace("{s}", segment.as_deref().unwrap_or_default());
    (format!("{path}{}", query.replace("{r}", &resource)), body)
}

/// Somebody, with what the one rule has to know.
struct Person {
    user: User,
    role: Option<&'static str>,
    everywhere: bool,
    session: String,
    token: String,
    expired: String,
}

async fn people(world: &World) -> Vec<Person> {
    let cluster = world.cluster();
    let mut all = Vec::new();
    let roles = BUILT_IN_ROLES.iter().map(|role| (Some(role.name), false));
    for (role, everywhere) in roles.chain([(None, false), (Some("admin"), true)]) {
        let called = format!("a-{}-{everywhere}", role.unwrap_or("nobody"));
        let user = user(cluster, &called).await;
        if let Some(role) = role {
            give(cluster, &user, role, (!everywhere).then_some(&world.own.segment), None).await;
        }
        let expired = Credential { expires_at: Some(NOW), ..SESSION };
        let secrets = credentials(cluster, &user.id, &[SESSION, TOKEN, expired]).await;
        let [session, token, expired] = secrets.try_into().expect("three");
        all.push(Person { user, role, everywhere, session, token, expired });
    }
    all
}

/// The one rule, for a credential without a scope.
fn may(person: &Person, about: About, action: Action, place: &str, kind: TokenKind) -> bool {
    match about {
        About::Anybody | About::List => true,
        About::Joining | About::Agents | About::Strangers => false,
        About::OneSelf | About::Proof => {
            kind != TokenKind::Token || !matches!(action, Action::TokenCreate | Action::SelfChange)
        }
        About::Cluster | About::Segment | About::Either => {
            let has = person
                .role
                .is_some_and(|name| BUILT_IN_ROLES.iter().any(|role| role.name == name && role.has(action)));
            has && (person.everywhere || matches!(place, "own" | "nested"))
        }
    }
}

fn is_refused(code: &str) -> bool {
    matches!(code, "unauthenticated" | "not-allowed")
}

struct Tally {
    wrong: String,
    asked: usize,
}

impl Tally {
    async fn expect(
        &mut self,
        world: &World,
        endpoint: &EndpointInfo,
        what: &str,
        place: Option<&Place>,
        secret: Option<&str>,
        allowed: bool,
    ) {
        let goes = matches!(endpoint.name, "UserDelete" | "TokenDelete" | "GrantDelete" | "ScheduleDelete");
        // What is asked of repositories after their deletion needs them as well.
        if goes || endpoint.name.starts_with("Repository") || endpoint.name == "SnapshotImport" {
            world.put_back().await;
        }
        let (path, body) = request(world, endpoint, place);
        let got = world.fixture.call(endpoint.method, &path, secret, &body).await;
        self.asked += 1;
        let code = if got.status.is_success() { String::new() } else { got.problem().0 };
        assert!(!got.status.is_server_error() || code == "unreachable", "{path}: {}", got.json());
        if is_refused(&code) == allowed {
            let place = place.map_or("cluster", |place| place.segment.name.as_str());
            let _ = writeln!(
                self.wrong,
                "{} in {place} by {what}: expected {allowed}, got {} {}",
                endpoint.name,
                got.status,
                got.json()
            );
        }
    }
}

async fn things(world: &World, people: &[Person]) {
    let cluster = world.cluster();
    let crew = team(cluster, "crew", &[]).await;
    let helpers = role(cluster, "helpers", &[Action::VmView]).await;
    let mut grant = super::support::grant_of(cluster, &people[0].user, helpers.name.as_str(), None);
    (grant.team, grant.user) = (Some(crew.id), None);
    super::world::put(cluster, &grant).await;
    policy(cluster, "night", "forbid (principal, action == Action::\"vm.start\", resource);", false).await;
}

#[tokio::test]
async fn every_route_answers_every_role_credential_and_place_by_the_one_rule() {
    let world = World::new().await;
    let people = people(&world).await;
    things(&world, &people).await;
    let cluster = world.cluster();
    let (shut_out, secret) = super::world::member(cluster, "shut-out", &[("admin", None)]).await;
    super::world::put(cluster, &User { disabled: true, ..shut_out }).await;
    let mut tally = Tally { wrong: String::new(), asked: 0 };
    for endpoint in ENDPOINTS {
        let (about, ..) = entry(endpoint.name);
        let segments = world.places().map(|(label, place)| (label, Some(place)));
        let places: Vec<(&str, Option<&Place>)> = match about {
            About::Segment => segments.to_vec(),
            About::Either => segments.into_iter().chain([("cluster", None)]).collect(),
            _ => vec![("cluster", None)],
        };
        let public = about == About::Anybody;
        if about != About::Strangers {
            tally.expect(&world, endpoint, "nobody", places[0].1, None, public).await;
        }
        tally.expect(&world, endpoint, "a disabled user", places[0].1, Some(&secret), false).await;
        for person in &people {
            tally.person(&world, endpoint, person, about, &places).await;
        }
    }
    assert!(tally.wrong.is_empty(), "{}", tally.wrong);
    assert!(tally.asked > 5000, "{} is not the whole matrix", tally.asked);
}

impl Tally {
    async fn person(
        &mut self,
        world: &World,
        endpoint: &EndpointInfo,
        person: &Person,
        about: About,
        places: &[(&str, Option<&Place>)],
    ) {
        let action = endpoint.action;
        let other = if action == Action::MetricsView { Action::AuditView } else { Action::MetricsView };
        let all: Vec<Action> = Action::ALL.iter().copied().filter(|one| one.is_grantable()).collect();
        let mut needed = vec![action, Action::ImageView];
        if endpoint.name == "GrantCreate" {
            needed.extend(BUILT_IN_ROLES[0].actions());
        }
        if matches!(endpoint.name, "ScheduleCreate" | "ScheduleUpdate" | "ScheduleResume") {
            needed.extend([Action::SnapshotCreate, Action::SnapshotDelete]);
        }
        if matches!(endpoint.name, "SnapshotClone" | "SnapshotImport") {
            needed.push(Action::VmCreate);
        }
        if endpoint.name == "SnapshotExport" {
            needed.push(Action::RepositoryView);
        }
        let wanted = [
            // A VM names its image, which is authorised by itself; a grant gives what its role has.
            scoped(&needed, None),
            scoped(&[other], None),
            scoped(&all, Some(&world.foreign.segment.id)),
        ];
        let secrets = credentials(world.cluster(), &person.user.id, &wanted).await;
        let lasting = matches!(action, Action::SelfView | Action::Public);
        let who = person.user.name.as_str();
        self.expect(world, endpoint, who, places[0].1, Some(&person.expired), false).await;
        for (label, place) in places {
            let grantable = action.group() != ActionGroup::Door;
            let by_session = may(person, about, action, label, TokenKind::Session);
            let by_token = may(person, about, action, label, TokenKind::Token);
            let here = about == About::List || *label == "foreign";
            let cases = [
                ("session", &person.session, by_session),
                ("token", &person.token, by_token),
                ("token for it", &secrets[0], by_token && (lasting || grantable)),
                ("token for another action", &secrets[1], by_token && lasting),
                ("token for another segment", &secrets[2], by_token && (lasting || (grantable && here))),
            ];
            for (credential, secret, allowed) in cases {
                if about == About::Proof && allowed {
                    // What is wrong then is the proof, which has tests of its own.
                    continue;
                }
                let what = format!("{who} with {credential}");
                self.expect(world, endpoint, &what, *place, Some(secret), allowed).await;
            }
        }
    }
}
