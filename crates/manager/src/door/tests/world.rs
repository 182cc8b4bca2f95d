//! Three segments (one's own, one inside it, a foreign one) with one of each thing in each, and people to ask about them.

use axum::body::Body;
use berth_api::manager::{
    Approval, ApprovalState, CreateToken, CreateUser, Grant, Policy, Quota, Role, Scope, Segment, Team,
    TokenKind, User,
};
use berth_api::pki::Peer;
use berth_model::access::Action;
use berth_model::image::Image;
use berth_model::name::Name;
use berth_model::operation::{Operation, OperationKind, OperationState, Progress};
use berth_model::repository::{Repository, RepositoryKeys, Secret};
use berth_model::schedule::{Schedule, ScheduleStatus, Zone};
use berth_model::snapshot::{Snapshot, SnapshotExtent, SnapshotFacts, SnapshotKind};
use berth_model::vm::Vm;
use berth_model::{
    ApprovalId, GrantId, ImageId, OperationId, PolicyId, RepositoryId, RoleId, ScheduleId, SegmentId,
    SnapshotId, TeamId, Timestamp, UserId,
};
use http::Request;
use http::header::AUTHORIZATION;
use serde_json::Value;

use super::support::{Fixture, Got, NOW, sample_host, sample_image, sample_vm};
use crate::auth::accounts::{self, TokenRow};
use crate::auth::{Bearer, Principal};
use crate::cluster::Cluster;
use crate::operations::{OperationRequest, OperationRow};
use crate::records::{Record, RepositoryKeysRow, Transaction, UniqueName};

/// The password of every repository here, which no answer may show.
pub const REPOSITORY_PASSWORD: &str = "repository-hunter2";

pub fn name(text: &str) -> Name {
    text.parse().expect("a name")
}

/// A credential to be made.
#[derive(Clone)]
pub struct Credential {
    pub kind: TokenKind,
    pub scope: Option<Scope>,
    pub expires_at: Option<Timestamp>,
}

pub const SESSION: Credential = Credential { kind: TokenKind::Session, scope: None, expires_at: None };
pub const TOKEN: Credential = Credential { kind: TokenKind::Token, scope: None, expires_at: None };

pub fn scoped(actions: &[Action], segment: Option<&SegmentId>) -> Credential {
    let scope = Scope { actions: actions.to_vec(), segment: segment.cloned() };
    Credential { kind: TokenKind::Token, scope: Some(scope), expires_at: None }
}

/// Makes credentials of a user, and gives their secrets.
pub async fn credentials(cluster: &Cluster, user: &UserId, wanted: &[Credential]) -> Vec<String> {
    let (entropy, wish) = (&*cluster.entropy, CreateToken::default());
    let mut transaction = Transaction::new();
    let mut secrets = Vec::new();
    for one in wanted {
        let (mut row, new) =
            accounts::new_token(user, one.kind, one.scope.clone(), &wish, entropy, cluster.clock.now())
                .expect("in range");
        row.token.expires_at = one.expires_at;
        transaction.create::<TokenRow>(&row);
        if one.kind == TokenKind::Session {
            transaction.create(&super::support::session_of(&row, cluster.clock.now()));
        }
        secrets.push(new.secret);
    }
    cluster.records.commit(transaction).await.expect("recorded");
    secrets
}

/// Makes a user without anything.
pub async fn user(cluster: &Cluster, called: &str) -> User {
    let user = accounts::new_user(CreateUser { name: name(called) }, &*cluster.entropy, cluster.clock.now());
    accounts::create_user(&cluster.records, &user).await.expect("recorded");
    user
}

/// Makes a user with a session, and these roles in these places.
pub async fn member(cluster: &Cluster, called: &str, roles: &[(&str, Option<&Segment>)]) -> (User, String) {
    let user = user(cluster, called).await;
    for (role, segment) in roles {
        give(cluster, &user, role, *segment, None).await;
    }
    let session = credentials(cluster, &user.id, &[SESSION]).await.remove(0);
    (user, session)
}

/// Gives a user a role, asking nobody.
pub async fn give(
    cluster: &Cluster,
    user: &User,
    role: &str,
    segment: Option<&Segment>,
    until: Option<Timestamp>,
) -> GrantId {
    let grant = Grant { until, ..super::support::grant_of(cluster, user, role, segment) };
    put(cluster, &grant).await;
    grant.id
}

/// Writes a record, whatever was there.
pub async fn put<T: Record>(cluster: &Cluster, value: &T) {
    let mut transaction = Transaction::new();
    transaction.put(value);
    cluster.records.commit(transaction).await.expect("recorded");
}

/// Makes a role of these actions.
pub async fn role(cluster: &Cluster, called: &str, actions: &[Action]) -> Role {
    let id = Some(RoleId::from_entropy(cluster.entropy.id()));
    let role = Role { id, name: name(called), summary: String::new(), actions: actions.to_vec() };
    named(cluster, &role, &role.name, Role::NOUN).await;
    role
}

/// Makes a team of these users.
pub async fn team(cluster: &Cluster, called: &str, members: &[&User]) -> Team {
    let team = Team {
        id: TeamId::from_entropy(cluster.entropy.id()),
        name: name(called),
        parent: None,
        members: members.iter().map(|user| user.id.clone()).collect(),
        external_groups: Vec::new(),
        created_at: NOW,
    };
    named(cluster, &team, &team.name, Team::NOUN).await;
    team
}

/// Writes a policy that counts or not, asking nobody.
pub async fn policy(cluster: &Cluster, called: &str, text: &str, active: bool) -> Policy {
    let policy = Policy {
        id: PolicyId::from_entropy(cluster.entropy.id()),
        name: name(called),
        text: text.to_owned(),
        active,
        written_by: "test".to_owned(),
        created_at: NOW,
    };
    named(cluster, &policy, &policy.name, Policy::NOUN).await;
    policy
}

async fn named<T: Record>(cluster: &Cluster, value: &T, called: &Name, noun: &'static str) {
    let mut transaction = Transaction::new();
    transaction.create(value);
    transaction.claim(&UniqueName::in_cluster(noun, called), &value.record_id());
    cluster.records.commit(transaction).await.expect("recorded");
}

pub async fn segment(cluster: &Cluster, called: &str, parent: Option<&Segment>) -> Segment {
    let mut segment = crate::http::segment::new_segment(name(called), &*cluster.entropy, NOW);
    (segment.parent, segment.quota) = (parent.map(|parent| parent.id.clone()), Quota::default());
    named(cluster, &segment, &segment.name, Segment::NOUN).await;
    segment
}

pub fn image(cluster: &Cluster, segment: Option<&Segment>, called: &str) -> Image {
    let id = ImageId::from_entropy(cluster.entropy.id());
    Image { id, name: name(called), segment: segment.map(|segment| segment.id.clone()), ..sample_image() }
}

pub async fn add_image(cluster: &Cluster, image: &Image) {
    let mut transaction = Transaction::new();
    transaction.create(image);
    transaction.claim(&UniqueName::image(image.segment.as_ref(), &image.name), image.id.as_str());
    cluster.records.commit(transaction).await.expect("recorded");
}

pub fn snapshot(cluster: &Cluster, vm: &Vm, called: &str) -> Snapshot {
    Snapshot {
        id: SnapshotId::from_entropy(cluster.entropy.id()),
        vm: vm.id.clone(),
        name: name(called),
        kind: SnapshotKind::Manual,
        occasion: None,
        parent: None,
        pinned: false,
        note: String::new(),
        facts: SnapshotFacts::default(),
        created_at: NOW,
        expires_at: None,
        verified: None,
    }
}

pub async fn add_snapshot(cluster: &Cluster, snapshot: &Snapshot) {
    let mut transaction = Transaction::new();
    transaction.create(snapshot);
    transaction.claim(&UniqueName::snapshot(&snapshot.vm, &snapshot.name), snapshot.id.as_str());
    cluster.records.commit(transaction).await.expect("recorded");
}

pub async fn add_vm(cluster: &Cluster, vm: &Vm) {
    let mut transaction = Transaction::new();
    transaction.create(vm);
    transaction.claim(&UniqueName::vm(&vm.segment, &vm.name), vm.id.as_str());
    cluster.records.commit(transaction).await.expect("recorded");
}

/// An operation that is over.
pub fn operation(cluster: &Cluster, vm: Option<&Vm>, segment: Option<&SegmentId>) -> OperationRow {
    let gone = berth_model::VmId::from_entropy([0xee; 10]);
    let request = OperationRequest::VmStart { vm: vm.map_or(gone, |vm| vm.id.clone()) };
    OperationRow {
        operation: Operation {
            id: OperationId::from_entropy(cluster.entropy.id()),
            kind: OperationKind::VmStart,
            vm: vm.map(|vm| vm.id.clone()),
            image: None,
            segment: segment.cloned(),
            subject: "thing".to_owned(),
            actor: "test".to_owned(),
            state: OperationState::Succeeded,
            progress: Progress::default(),
            steps_done: Vec::new(),
            cancel_requested: false,
            result: None,
            problem: None,
            created_at: NOW,
            finished_at: Some(NOW),
        },
        request: (&request).into(),
        record: Value::Null,
        undo_left: 0,
        attempt: 1,
    }
}

pub fn approval(cluster: &Cluster, by: &User, segment: Option<&SegmentId>) -> Approval {
    Approval {
        id: ApprovalId::from_entropy(cluster.entropy.id()),
        requested_by: by.id.clone(),
        requester: by.name.clone(),
        action: Action::VmDelete,
        resource: "vm:x".to_owned(),
        segment: segment.cloned(),
        request: "DELETE /v1/vms/x".to_owned(),
        request_sha256: "00".repeat(32),
        reason: "test".to_owned(),
        grant: None,
        state: ApprovalState::Pending,
        decided_by: None,
        approver: None,
        created_at: NOW,
        expires_at: NOW.plus_millis(24 * 3600 * 1000),
    }
}

/// A schedule of a segment that somebody answers for.
pub fn schedule(cluster: &Cluster, owner: &User, segment: &Segment, called: &str) -> Schedule {
    Schedule {
        id: ScheduleId::from_entropy(cluster.entropy.id()),
        segment: segment.id.clone(),
        name: name(called),
        vm: None,
        cron: "0 2 * * *".parse().expect("a cron"),
        timezone: Zone::UTC,
        keep: "daily=7".parse().expect("a rule"),
        extent: SnapshotExtent::Machine,
        paused: false,
        owner: owner.id.clone(),
        created_at: NOW,
        status: ScheduleStatus::new(NOW),
    }
}

pub async fn add_schedule(cluster: &Cluster, schedule: &Schedule) {
    let mut transaction = Transaction::new();
    transaction.put(schedule);
    let name = UniqueName::schedule(&schedule.segment, &schedule.name);
    if cluster.records.id_of(&name).is_none() {
        transaction.claim(&name, schedule.id.as_str());
    }
    cluster.records.commit(transaction).await.expect("recorded");
}

/// A repository of a segment: `own-backups` of `own`. The segment's id says which its is.
pub fn repository(cluster: &Cluster, segment: &Segment) -> Repository {
    let called = format!("{}-backups", segment.name);
    let known = cluster.records.id_of(&UniqueName::in_cluster("repository", &name(&called)));
    let id = known.and_then(|id| id.parse().ok());
    Repository {
        id: id.unwrap_or_else(|| RepositoryId::from_entropy(cluster.entropy.id())),
        name: name(&called),
        url: "/srv/backup".parse().expect("a place"),
        segment: Some(segment.id.clone()),
        created_at: NOW,
    }
}

/// Writes a repository with its keys, whatever was there.
pub async fn add_repository(cluster: &Cluster, repository: &Repository) {
    let keys = RepositoryKeys {
        password: Secret::new(REPOSITORY_PASSWORD.to_owned()),
        key: None,
        known_hosts: None,
        ca: None,
    };
    let mut transaction = Transaction::new();
    transaction.put(repository);
    transaction.put(&RepositoryKeysRow { repository: repository.id.clone(), keys });
    let name = UniqueName::in_cluster("repository", &repository.name);
    if cluster.records.id_of(&name).is_none() {
        transaction.claim(&name, repository.id.as_str());
    }
    cluster.records.commit(transaction).await.expect("recorded");
}

/// The things of one segment.
pub struct Place {
    pub segment: Segment,
    pub vm: Vm,
    pub image: Image,
    pub snapshot: Snapshot,
    pub schedule: Schedule,
    pub operation: OperationId,
    pub grant: Grant,
    pub approval: Approval,
}

/// See the module's head.
pub struct World {
    pub fixture: Fixture,
    pub own: Place,
    pub nested: Place,
    pub foreign: Place,
    /// Somebody whom all this is about: a user with a token, grants and requests.
    pub someone: User,
    /// Somebody who has nothing.
    pub loner: User,
    pub token: TokenRow,
    pub grant: Grant,
    pub approval: Approval,
}

impl World {
    pub async fn new() -> Self {
        let fixture = Fixture::new().await;
        let cluster = fixture.cluster();
        let someone = user(cluster, "someone").await;
        let loner = user(cluster, "loner").await;
        let own = segment(cluster, "own", None).await;
        let nested = segment(cluster, "nested", Some(&own)).await;
        let foreign = segment(cluster, "foreign", None).await;
        let own = place(cluster, own, &someone, 11).await;
        let nested = place(cluster, nested, &someone, 12).await;
        let foreign = place(cluster, foreign, &someone, 13).await;
        let (token, _) = accounts::new_token(
            &someone.id,
            TokenKind::Token,
            None,
            &CreateToken::default(),
            &*cluster.entropy,
            NOW,
        )
        .expect("in range");
        let grant = super::support::grant_of(cluster, &someone, "viewer", None);
        let approval = approval(cluster, &someone, None);
        put(cluster, &token).await;
        put(cluster, &grant).await;
        put(cluster, &approval).await;
        Self { fixture, own, nested, foreign, someone, loner, token, grant, approval }
    }

    pub fn cluster(&self) -> &Cluster {
        self.fixture.cluster()
    }

    pub fn places(&self) -> [(&'static str, &Place); 3] {
        [("own", &self.own), ("nested", &self.nested), ("foreign", &self.foreign)]
    }

    /// A request by whoever shows this.
    pub async fn ask(&self, who: &str, method: &str, path: &str, body: Value) -> Got {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        self.fixture.call(method, path, Some(who), &body).await
    }

    /// The same, with the promise that it succeeds.
    pub async fn must(&self, who: &str, method: &str, path: &str, body: Value) -> Value {
        let got = self.ask(who, method, path, body).await;
        assert!(got.status.is_success(), "{method} {path}: {}", got.json());
        got.json()
    }

    /// The same, with the promise that it is refused so.
    pub async fn refused(&self, who: &str, method: &str, path: &str, body: Value) -> String {
        let got = self.ask(who, method, path, body).await;
        assert!(got.status.is_client_error(), "{method} {path}: {} {}", got.status, got.json());
        got.problem().0
    }

    /// Puts back what successful requests take away.
    pub async fn put_back(&self) {
        let cluster = self.cluster();
        put(cluster, &self.loner).await;
        put(cluster, &self.token).await;
        put(cluster, &self.grant).await;
        for (_, place) in self.places() {
            put(cluster, &place.grant).await;
            add_schedule(cluster, &place.schedule).await;
            add_repository(cluster, &repository(cluster, &place.segment)).await;
        }
    }
}

/// Who it is to the policies that shows this.
pub fn principal(fixture: &Fixture, secret: &str) -> Principal {
    let bearer: Bearer = secret.parse().expect("a bearer secret");
    let cluster = fixture.cluster();
    Principal::User(
        accounts::authenticate(&cluster.records, &bearer, cluster.clock.now()).expect("a good one"),
    )
}

async fn place(cluster: &Cluster, segment: Segment, someone: &User, number: u32) -> Place {
    let image = image(cluster, Some(&segment), "disk");
    add_image(cluster, &image).await;
    let mut vm = sample_vm(number, &segment, &sample_host(1), &image);
    vm.name = name("thing");
    add_vm(cluster, &vm).await;
    let first = snapshot(cluster, &vm, "first");
    add_snapshot(cluster, &first).await;
    add_snapshot(cluster, &snapshot(cluster, &vm, "second")).await;
    add_repository(cluster, &repository(cluster, &segment)).await;
    let schedule = schedule(cluster, someone, &segment, "nightly");
    add_schedule(cluster, &schedule).await;
    let row = operation(cluster, Some(&vm), Some(&segment.id));
    put(cluster, &row).await;
    let grant = super::support::grant_of(cluster, someone, "viewer", Some(&segment));
    put(cluster, &grant).await;
    let approval = approval(cluster, someone, Some(&segment.id));
    put(cluster, &approval).await;
    Place { segment, vm, image, snapshot: first, schedule, operation: row.operation.id, grant, approval }
}

/// A request with headers and a path of one's own choice, as bytes that may be no path at all.
pub async fn raw(fixture: &Fixture, who: &str, method: &str, path: &str) -> Option<Got> {
    let request = Request::builder().method(method).uri(path).header(AUTHORIZATION, format!("Bearer {who}"));
    Some(fixture.send(request.body(Body::empty()).ok()?, Peer::Anonymous).await)
}
