//! What permissions cost: one decision, and a list that is filtered, in a cluster of 10,000 VMs in 100 segments, 1,000
//! users in 50 teams, and 200 grants.
//!
//! The manager is the real one with its store on the disk. Decisions are asked of the policies as the door asks them,
//! for random users, actions and VMs, what the VM is in looked up each time. The list is `vm list` of a user who may
//! see 50 VMs, through the door: credential, decision, audit record on the disk, filter, answer. Prints one line of JSON.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use axum::body::Body;
use berth_api::manager::{CreateToken, CreateUser, Grant, Quota, Segment, Team, TokenKind, User};
use berth_api::pki::Peer;
use berth_api::serve::Caller;
use berth_manager::ManagerConfig;
use berth_manager::auth::session::SessionRow;
use berth_manager::auth::{Principal, UserPrincipal, accounts};
use berth_manager::cluster::Cluster;
use berth_manager::door::target::vm_resource;
use berth_manager::records::{Transaction, UniqueName};
use berth_model::access::Action;
use berth_model::vm::{GuestState, Vm, VmSpec, VmState, VmStatus};
use berth_model::{GrantId, HostId, ImageId, LayerId, SegmentId, TeamId, Timestamp, VmId};
use http_body_util::BodyExt;
use tower::ServiceExt;

const VMS: u32 = 10_000;
const SEGMENTS: u32 = 100;
const TEAMS: u32 = 50;
const USERS: u32 = 1_000;
const GRANTS: u32 = 200;
/// VMs of the segment that the user of the list may see.
const SEEN: u32 = 50;
const DECISIONS: usize = 200_000;
/// Decisions before it counts: what is asked for the first time after a grant has changed is made ready then.
const DECISIONS_FIRST: usize = 20_000;
const LISTS: usize = 300;
/// Rounds before it counts: caches, the allocator.
const WARM_UP: usize = 20;

#[tokio::main]
async fn main() {
    let directory = tempfile::tempdir().expect("a directory");
    let config = ManagerConfig {
        listen: (Ipv4Addr::LOCALHOST, 0).into(),
        state_dir: directory.path().join("manager"),
        first_token_file: Some(directory.path().join("token")),
        ..ManagerConfig::default()
    };
    let bound = berth_manager::run::bind(config).await.expect("a manager");
    let manager = bound.manager();
    let people = fill(manager.cluster()).await;
    let decisions = decide(manager.gate(), &people.users);
    let lists = list(manager.router(), &people.secret).await;
    println!(
        "{{{}, {}}}",
        figures("decision", "us", &decisions, 1e6),
        figures("filtered_list", "ms", &lists, 1e3)
    );
    manager.shutdown().await;
}

struct People {
    users: Vec<Principal>,
    /// The session of the user who may see fifty VMs.
    secret: String,
}

fn entropy(noun: u8, number: u32) -> [u8; 10] {
    let [_, top, high, low] = number.to_be_bytes();
    [noun, top, high, low, 99, 3, 250, 17, 0, 1]
}

/// Writes down so much at a time as a store takes at once.
struct Filling<'a> {
    cluster: &'a Cluster,
    transaction: Transaction,
}

impl Filling<'_> {
    async fn put(&mut self, add: impl FnOnce(&mut Transaction)) {
        add(&mut self.transaction);
        if self.transaction.is_full() {
            self.commit().await;
        }
    }

    async fn commit(&mut self) {
        let transaction = std::mem::take(&mut self.transaction);
        self.cluster.records.commit(transaction).await.expect("recorded");
    }
}

async fn fill(cluster: &Cluster) -> People {
    let mut filling = Filling { cluster, transaction: Transaction::new() };
    let segments: Vec<Segment> = (0..SEGMENTS).map(segment).collect();
    for segment in &segments {
        filling.put(|all| all.create(segment)).await;
    }
    for number in 0..VMS {
        // The last segment has exactly what is to be seen.
        let at = if number < SEEN { SEGMENTS - 1 } else { number % (SEGMENTS - 1) };
        let vm = vm(number, &segments[at as usize]);
        let name = UniqueName::vm(&vm.segment, &vm.name);
        filling
            .put(|all| {
                all.create(&vm);
                all.claim(&name, vm.id.as_str());
            })
            .await;
    }
    let (users, secret) = fill_people(&mut filling, &segments).await;
    filling.commit().await;
    People { users, secret }
}

async fn fill_people(filling: &mut Filling<'_>, segments: &[Segment]) -> (Vec<Principal>, String) {
    let (random, now) = (&*filling.cluster.entropy, filling.cluster.clock.now());
    let (mut users, mut secret) = (Vec::new(), String::new());
    for number in 0..USERS {
        let name = format!("user-{number:04}").parse().expect("a name");
        let user = accounts::new_user(CreateUser { name }, random, now);
        let wish = CreateToken::default();
        let made = accounts::new_token(&user.id, TokenKind::Session, None, &wish, random, now);
        let (row, new) = made.expect("in range");
        if number == 0 {
            secret = new.secret;
        }
        filling
            .put(|all| {
                accounts::add_user(all, &user);
                all.create(&row);
                all.create(&SessionRow {
                    token: row.token.id.clone(),
                    user: user.id.clone(),
                    address: Ipv4Addr::LOCALHOST.into(),
                    used_at: now,
                });
            })
            .await;
        users.push(user);
    }
    for number in 0..TEAMS {
        let team = team(number, &users[1..]);
        filling.put(|all| all.create(&team)).await;
    }
    let roles = ["viewer", "operator", "configurator", "security-officer"];
    for number in 0..GRANTS {
        let team = TeamId::from_entropy(entropy(4, number % TEAMS));
        let role = roles[(number / TEAMS) as usize % roles.len()];
        let segment = &segments[(number % (SEGMENTS - 1)) as usize];
        let mut grant = grant(number, role, segment);
        grant.team = Some(team);
        if number == 0 {
            // The user of the list has this one, and nothing else.
            (grant.team, grant.user) = (None, Some(users[0].id.clone()));
            grant.segment = Some(segments[SEGMENTS as usize - 1].id.clone());
        }
        filling.put(|all| all.create(&grant)).await;
    }
    (users.iter().map(principal).collect(), secret)
}

fn segment(number: u32) -> Segment {
    // Every tenth is inside the one before it.
    let parent = (number % 10 == 9).then(|| SegmentId::from_entropy(entropy(3, number - 1)));
    Segment {
        id: SegmentId::from_entropy(entropy(3, number)),
        name: format!("segment-{number:03}").parse().expect("a name"),
        parent: parent.filter(|_| number + 1 != SEGMENTS),
        quota: Quota::default(),
        created_at: Timestamp::from_millis(1_795_352_752_000),
    }
}

fn team(number: u32, users: &[User]) -> Team {
    let members = users.iter().skip(number as usize).step_by(TEAMS as usize);
    Team {
        id: TeamId::from_entropy(entropy(4, number)),
        name: format!("team-{number:03}").parse().expect("a name"),
        parent: (number % 10 == 9).then(|| TeamId::from_entropy(entropy(4, number - 1))),
        members: members.map(|user| user.id.clone()).collect(),
        external_groups: Vec::new(),
        created_at: Timestamp::from_millis(1_795_352_752_000),
    }
}

fn grant(number: u32, role: &str, segment: &Segment) -> Grant {
    Grant {
        id: GrantId::from_entropy(entropy(5, number)),
        team: None,
        user: None,
        role: role.parse().expect("a name"),
        segment: Some(segment.id.clone()),
        // A quarter of them end some day.
        until: number.is_multiple_of(4).then_some(Timestamp::from_millis(4_000_000_000_000)),
        note: String::new(),
        granted_by: "example".to_owned(),
        created_at: Timestamp::from_millis(1_795_352_752_000),
    }
}

fn principal(user: &User) -> Principal {
    Principal::User(UserPrincipal {
        id: user.id.clone(),
        name: user.name.clone(),
        token: berth_model::TokenId::from_entropy(entropy(6, 1)),
        kind: TokenKind::Session,
        method: "password".to_owned(),
        second_factor: false,
        scope: None,
    })
}

fn vm(number: u32, segment: &Segment) -> Vm {
    Vm {
        id: VmId::from_entropy(entropy(1, number)),
        number,
        segment: segment.id.clone(),
        segment_name: segment.name.clone(),
        name: format!("vm-{number:05}").parse().expect("a name"),
        spec: VmSpec {
            vcpus: 2,
            memory_mib: 2048,
            disk_mib: 20_480,
            data_disks_mib: Vec::new(),
            image: ImageId::from_entropy(entropy(2, 1)),
            pool: "default".parse().expect("a name"),
            machine_type: "pc-q35-7.2".to_owned(),
            firmware: berth_model::vm::Firmware::default(),
            tpm: false,
            cpu_model: "qemu64".to_owned(),
            nics: Vec::new(),
            user_data: None,
            protected: false,
            class: berth_model::vm::standard_class(),
            ready_timeout_s: 300,
            isolated: false,
        },
        status: VmStatus {
            state: VmState::Stopped,
            host: Some(HostId::from_entropy(entropy(7, number % 100))),
            guest: GuestState::Off,
            baseline: None,
            baseline_note: None,
            at_snapshot: None,
            top_layer: LayerId::from_entropy(entropy(8, number)),
            layers: 1,
            operation: None,
            generation: 3,
            trouble: None,
        },
        created_at: Timestamp::from_millis(1_795_352_752_000),
    }
}

/// A plain generator (xorshift): which users and VMs come together must not repeat in step.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % bound as u64).expect("below a bound")
    }
}

fn decide(gate: &berth_manager::door::Gate, users: &[Principal]) -> Vec<Duration> {
    let vms = gate.cluster.records.list::<Vm>();
    let actions = [Action::VmView, Action::VmStart, Action::VmMigrate, Action::VmConfigure, Action::VmDelete];
    let (mut dice, mut took) = (Dice(0x9e37_79b9_7f4a_7c15), Vec::with_capacity(DECISIONS));
    let mut allowed = 0_u32;
    for round in 0..DECISIONS_FIRST + DECISIONS {
        let user = &users[dice.below(users.len())];
        let vm = &vms[dice.below(vms.len())];
        let action = actions[dice.below(actions.len())];
        let began = Instant::now();
        let resource = vm_resource(&gate.cluster, vm);
        let decision = gate.policies.decide(user, action, &resource, false);
        if round >= DECISIONS_FIRST {
            took.push(began.elapsed());
            allowed += u32::from(decision.allowed);
        }
    }
    assert!(allowed > 0 && (allowed as usize) < DECISIONS, "{allowed} of {DECISIONS} allowed");
    took.sort_unstable();
    took
}

async fn list(router: axum::Router, secret: &str) -> Vec<Duration> {
    let mut took = Vec::with_capacity(LISTS);
    for round in 0..WARM_UP + LISTS {
        let mut request = http::Request::builder()
            .uri("/v1/vms")
            .header("authorization", format!("Bearer {secret}"))
            .body(Body::empty())
            .expect("a request");
        let remote = (Ipv4Addr::LOCALHOST, 1).into();
        request.extensions_mut().insert(Caller { remote, peer: Peer::Anonymous });
        let router = router.clone();
        let began = Instant::now();
        let response = router.oneshot(request).await.expect("a router does not fail");
        let body = response.into_body().collect().await.expect("a whole answer").to_bytes();
        if round >= WARM_UP {
            took.push(began.elapsed());
        }
        let page: serde_json::Value = serde_json::from_slice(&body).expect("JSON");
        assert_eq!(page["items"].as_array().map(Vec::len), Some(SEEN as usize), "{page}");
    }
    took.sort_unstable();
    took
}

fn figures(name: &str, unit: &str, took: &[Duration], scale: f64) -> String {
    let at = |at: usize| took[at.min(took.len() - 1)].as_secs_f64() * scale;
    format!(
        "\"{name}_p50_{unit}\": {:.2}, \"{name}_p99_{unit}\": {:.2}, \"{name}_worst_{unit}\": {:.2}",
        at(took.len() / 2),
        at(took.len() * 99 / 100),
        at(took.len() - 1)
    )
}
