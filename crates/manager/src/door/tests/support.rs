//! A manager in memory, and requests to it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use berth_api::manager::{AuditRecord, CreateToken, CreateUser, Grant, Segment, TokenKind, User};
use berth_api::pki::{Authority, Identity, Peer};
use berth_api::serve::Caller;
use berth_api::transport::{self, BoxFuture};
use berth_api::{Client, Transport, TransportError};
use berth_model::host::{Accelerator, Host, HostState, Inventory, NetworkMode, PoolReport, QemuAbilities};
use berth_model::image::{Image, ImagePart, ImageState, PartFormat, PartRole};
use berth_model::vm::{GuestState, Vm, VmSpec, VmState, VmStatus};
use berth_model::{GrantId, HostId, ImageId, LayerId, Timestamp, VmId};
use berth_store::MemoryStore;
use bytes::Bytes;
use http::header::AUTHORIZATION;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::BodyExt;
use serde_json::Value;
use tower::ServiceExt;

use crate::agents::AgentConnector;
use crate::auth::accounts::{self, TokenRow};
use crate::auth::session::SessionRow;
use crate::clock::{Clock, Entropy, Sleep};
use crate::cluster::{Cluster, Parts, Settings};
use crate::records::{Record, Transaction, UniqueName};
use crate::run::Manager;

/// When the tests happen.
pub const NOW: Timestamp = Timestamp::from_millis(1_795_352_752_000);

/// A clock that a test sets; waits are real.
#[derive(Default)]
pub struct TestClock {
    ahead_ms: AtomicU64,
}

impl TestClock {
    pub fn advance(&self, by: Duration) {
        let millis = u64::try_from(by.as_millis()).expect("a test's time");
        self.ahead_ms.fetch_add(millis, Ordering::SeqCst);
    }

    pub fn set_back(&self, by: Duration) {
        let millis = u64::try_from(by.as_millis()).expect("a test's time");
        self.ahead_ms.fetch_sub(millis, Ordering::SeqCst);
    }
}

impl Clock for TestClock {
    fn now(&self) -> Timestamp {
        NOW.plus_millis(self.ahead_ms.load(Ordering::SeqCst))
    }
    fn sleep(&self, duration: Duration) -> Sleep {
        Box::pin(tokio::time::sleep(duration))
    }
}

/// Ids that are all different and the same in each run.
#[derive(Default)]
pub struct Counting {
    next: AtomicU64,
}

impl Entropy for Counting {
    fn fill(&self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let number = self.next.fetch_add(1, Ordering::SeqCst).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            chunk.copy_from_slice(&number.to_be_bytes()[..chunk.len()]);
        }
    }
}

/// What an agent is to answer: given the request and its whole body.
pub type AnswerFn = dyn Fn(Request<Bytes>) -> Response<Vec<u8>> + Send + Sync;

/// Agents as one function; none: nobody answers.
#[derive(Default, Clone)]
pub struct FakeAgents {
    answer: Arc<Mutex<Option<Arc<AnswerFn>>>>,
}

impl FakeAgents {
    pub fn answer_with(&self, answer: impl Fn(Request<Bytes>) -> Response<Vec<u8>> + Send + Sync + 'static) {
        *self.answer.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(answer));
    }
}

impl AgentConnector for FakeAgents {
    fn connect(&self, _: &Host) -> Client {
        Client::new(Arc::new(self.clone()))
    }
}

impl Transport for FakeAgents {
    fn send(
        &self,
        request: Request<transport::Body>,
    ) -> BoxFuture<'_, Result<Response<transport::Body>, TransportError>> {
        Box::pin(async move {
            let broken = |source| TransportError::Broken { address: "fake".to_owned(), source };
            let answer = self.answer.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let Some(answer) = answer else {
                return Err(TransportError::Connect {
                    address: "fake".to_owned(),
                    source: "nobody there".into(),
                });
            };
            let (parts, body) = request.into_parts();
            let bytes = body.collect().await.map_err(broken)?.to_bytes();
            Ok(answer(Request::from_parts(parts, bytes)).map(transport::full))
        })
    }
    fn address(&self) -> &'static str {
        "fake"
    }
}

fn ca() -> &'static Identity {
    static CA: OnceLock<Identity> = OnceLock::new();
    CA.get_or_init(|| Authority::create(unix_seconds()).expect("a CA"))
}

pub fn unix_seconds() -> i64 {
    i64::try_from(NOW.as_millis() / 1000).expect("a date")
}

/// A manager in memory with an administrator, a user without roles, and one of each thing.
pub struct Fixture {
    pub manager: Manager,
    pub router: Router,
    pub clock: Arc<TestClock>,
    pub agents: FakeAgents,
    pub store: Arc<MemoryStore>,
    pub admin: String,
    pub nobody: String,
}

/// An answer.
#[derive(Debug)]
pub struct Got {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Got {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| Value::String(format!("{:?}", self.body)))
    }

    /// The stable code of the problem, and the field at fault.
    pub fn problem(&self) -> (String, String) {
        let json = self.json();
        let text = |field: &str| json[field].as_str().unwrap_or_default().to_owned();
        (text("code"), text("field"))
    }

    pub fn etag(&self) -> String {
        self.headers["etag"].to_str().expect("text").to_owned()
    }
}

impl Fixture {
    pub async fn new() -> Self {
        let store = Arc::new(MemoryStore::new(Arc::new(berth_store::SystemClock::new())));
        Self::on(store).await
    }

    pub async fn on(store: Arc<MemoryStore>) -> Self {
        let (clock, agents) = (Arc::new(TestClock::default()), FakeAgents::default());
        let manager = Manager::new(Parts {
            store: Arc::<MemoryStore>::clone(&store),
            connector: Arc::new(agents.clone()),
            clock: Arc::<TestClock>::clone(&clock),
            entropy: Arc::new(Counting::default()),
            authority: Arc::new(Authority::load(ca()).expect("the test's CA")),
            settings: Settings::default(),
        })
        .await
        .expect("a manager");
        let first = manager.first_start().expect("nobody has started it before");
        let admin = first.secret().to_owned();
        first.commit(manager.cluster()).await.expect("recorded");
        let nobody = add_user(manager.cluster(), "nobody", &[]).await;
        let router = manager.router();
        let fixture = Self { manager, router, clock, agents, store, admin, nobody };
        fixture.add_things().await;
        fixture
    }

    pub fn cluster(&self) -> &Arc<Cluster> {
        self.manager.cluster()
    }

    async fn add_things(&self) {
        let segment = self.cluster().records.list::<Segment>()[0].value.clone();
        let host = sample_host(1);
        let image = sample_image();
        let vm = sample_vm(1, &segment, &host, &image);
        let mut transaction = Transaction::new();
        transaction.create(&host);
        transaction.claim(&UniqueName::in_cluster(Host::NOUN, &host.name), host.id.as_str());
        transaction.create(&image);
        transaction.claim(&UniqueName::image(None, &image.name), image.id.as_str());
        transaction.create(&vm);
        transaction.claim(&UniqueName::vm(&segment.id, &vm.name), vm.id.as_str());
        self.cluster().records.commit(transaction).await.expect("recorded");
    }

    /// Adds VMs `first..=last` to the default segment.
    pub async fn add_vms(&self, numbers: std::ops::RangeInclusive<u32>) {
        let records = &self.cluster().records;
        let segment = records.list::<Segment>()[0].value.clone();
        let (host, image) = (sample_host(1), sample_image());
        for number in numbers {
            let vm = sample_vm(number, &segment, &host, &image);
            let mut transaction = Transaction::new();
            transaction.create(&vm);
            transaction.claim(&UniqueName::vm(&segment.id, &vm.name), vm.id.as_str());
            records.commit(transaction).await.expect("recorded");
        }
    }

    pub async fn send(&self, request: Request<Body>, peer: Peer) -> Got {
        answer(self.router.clone(), request, peer).await
    }

    pub async fn call(&self, method: &str, path: &str, token: Option<&str>, body: &str) -> Got {
        let mut request = Request::builder().method(method).uri(path);
        if let Some(token) = token {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        self.send(request.body(Body::from(body.to_owned())).expect("a request"), Peer::Anonymous).await
    }

    pub async fn admin(&self, method: &str, path: &str, body: Value) -> Got {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        self.call(method, path, Some(&self.admin), &body).await
    }

    pub async fn get(&self, path: &str) -> Got {
        self.admin("GET", path, Value::Null).await
    }

    /// All records of the audit, oldest first, with all ends written.
    pub async fn audit(&self) -> Vec<AuditRecord> {
        self.manager.audit().flush().await;
        let filter = crate::audit::Filter::default();
        let found = self.manager.audit().newest(&filter, None, 5000).await.expect("an audit");
        assert_eq!(found.more_below, None, "a test that makes more than 5000 records");
        let mut records = found.records;
        records.reverse();
        records
    }
}

pub async fn answer(router: Router, request: Request<Body>, peer: Peer) -> Got {
    answer_to(router, request, Caller { remote: ([192, 0, 2, 1], 40000).into(), peer }).await
}

pub async fn answer_to(router: Router, mut request: Request<Body>, caller: Caller) -> Got {
    request.extensions_mut().insert(caller);
    let response = router.oneshot(request).await.expect("a router does not fail");
    let (parts, body) = response.into_parts();
    let body = body.collect().await.expect("a whole answer").to_bytes();
    Got { status: parts.status, headers: parts.headers, body }
}

/// What makes a bearer secret a session.
pub fn session_of(row: &TokenRow, now: Timestamp) -> SessionRow {
    let address = [192, 0, 2, 1].into();
    SessionRow { token: row.token.id.clone(), user: row.token.user.clone(), address, used_at: now }
}

/// A grant that is to be, of a role in a segment or everywhere.
pub fn grant_of(cluster: &Cluster, user: &User, role: &str, segment: Option<&Segment>) -> Grant {
    Grant {
        id: GrantId::from_entropy(cluster.entropy.id()),
        team: None,
        user: Some(user.id.clone()),
        role: role.parse().expect("a name"),
        segment: segment.map(|segment| segment.id.clone()),
        until: None,
        note: String::new(),
        granted_by: "test".to_owned(),
        created_at: cluster.clock.now(),
    }
}

/// Adds a user with a session and these roles everywhere, and gives the session's secret.
pub async fn add_user(cluster: &Cluster, name: &str, roles: &[&str]) -> String {
    let (entropy, now) = (&*cluster.entropy, cluster.clock.now());
    let user = accounts::new_user(CreateUser { name: name.parse().expect("a name") }, entropy, now);
    let (row, token) =
        accounts::new_token(&user.id, TokenKind::Session, None, &CreateToken::default(), entropy, now)
            .expect("in range");
    let mut transaction = Transaction::new();
    transaction.create(&session_of(&row, now));
    for role in roles {
        transaction.create(&grant_of(cluster, &user, role, None));
    }
    accounts::add_user(&mut transaction, &user);
    transaction.create(&row);
    cluster.records.commit(transaction).await.expect("recorded");
    token.secret
}

pub fn sample_host(number: u8) -> Host {
    Host {
        id: HostId::from_entropy([number; 10]),
        name: format!("host-{number}").parse().expect("a name"),
        address: "192.0.2.10:8444".to_owned(),
        state: HostState::Online,
        inventory: Some(Inventory {
            hostname: "box".to_owned(),
            cpus: 4,
            memory_mib: 16 * 1024,
            memory_available_mib: 15 * 1024,
            accelerator: Accelerator::Tcg,
            accelerator_note: None,
            qemu: QemuAbilities {
                version: "10.0.2".to_owned(),
                machine_types: vec!["pc-q35-10.0".to_owned()],
                cpu_models: vec!["qemu64".to_owned()],
                migration_capabilities: Vec::new(),
                devices: Vec::new(),
            },
            pools: vec![PoolReport {
                name: "default".parse().expect("a name"),
                pool_uuid: format!("uuid-{number}"),
                size_bytes: 100 << 30,
                free_bytes: (50 << 30) - u64::from(number),
                reserve_bytes: 0,
            }],
            network: NetworkMode::User,
            uefi: true,
            tpm: true,
            isolated_users: false,
            agent_version: "0.1.0".to_owned(),
        }),
        last_seen_at: Some(NOW),
        offline_reason: None,
        joined_at: NOW,
    }
}

pub fn sample_image() -> Image {
    Image {
        id: ImageId::from_entropy([3; 10]),
        name: "debian".parse().expect("a name"),
        segment: None,
        state: ImageState::Ready,
        parts: vec![ImagePart {
            role: PartRole::Disk,
            format: PartFormat::Qcow2,
            size_bytes: 1000,
            sha256: "ab".repeat(32),
            virtual_size_bytes: Some(1 << 30),
        }],
        kernel_command_line: String::new(),
        arrived: vec![PartRole::Disk],
        created_at: NOW,
    }
}

pub fn sample_vm(number: u32, segment: &Segment, host: &Host, image: &Image) -> Vm {
    let mut entropy = [7; 10];
    entropy[..4].copy_from_slice(&number.to_be_bytes());
    let name = if number == 1 { "books".to_owned() } else { format!("vm-{number:04}") };
    Vm {
        id: VmId::from_entropy(entropy),
        number,
        segment: segment.id.clone(),
        segment_name: segment.name.clone(),
        name: name.parse().expect("a name"),
        spec: VmSpec {
            vcpus: 1,
            memory_mib: 512,
            disk_mib: 1024,
            data_disks_mib: Vec::new(),
            image: image.id.clone(),
            pool: "default".parse().expect("a name"),
            machine_type: "pc-q35-10.0".to_owned(),
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
            state: VmState::Running,
            host: Some(host.id.clone()),
            guest: GuestState::Ready,
            baseline: None,
            baseline_note: None,
            at_snapshot: None,
            top_layer: LayerId::from_entropy(entropy),
            layers: 1,
            operation: None,
            generation: 1,
            trouble: None,
        },
        created_at: NOW,
    }
}
