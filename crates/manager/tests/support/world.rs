//! A cluster in one process: hosts that are not there, a store that can die after any write, and managers on it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use berth_api::manager::{CreateVm, OperationRef, Segment};
use berth_api::pki::Authority;
use berth_manager::Manager;
use berth_manager::clock::{Clock, Entropy, Sleep};
use berth_manager::cluster::{Cluster, Parts, Settings};
use berth_manager::operations::interfere::Interference;
use berth_manager::operations::{Begin, Filter, OperationRequest, OperationRow};
use berth_manager::records::{Debt, ImagePlace, Records, Transaction, UniqueName};
use berth_model::host::{Host, HostState};
use berth_model::image::{Image, ImagePart, ImageState, PartFormat, PartRole};
use berth_model::operation::{Operation, OperationState};
use berth_model::schedule::Schedule;
use berth_model::snapshot::{Snapshot, SnapshotKind};
use berth_model::vm::{Vm, VmState};
use berth_model::{HostId, ImageId, OperationId, Problem, SegmentId, Timestamp, VmId};
use berth_store::{
    Condition, Entry, Lease, LeaseId, ManualClock, MemoryStore, Page, Pending, Query, Revision, Store, Watch,
};
use tokio::sync::watch;

use crate::agent::{FakeAgent, Net, Process, default_pool};

/// Longer than anything takes, in time that passes only when nobody has anything to do.
pub const LONG: Duration = Duration::from_secs(3600);

/// A store that stops answering once a number of writes were made: as the manager is killed right after one of them.
pub struct MortalStore {
    inner: Arc<MemoryStore>,
    left: AtomicUsize,
    dead: watch::Sender<bool>,
}

impl MortalStore {
    pub fn immortal(inner: &Arc<MemoryStore>) -> Arc<Self> {
        Self::dying_after(inner, usize::MAX)
    }

    pub fn dying_after(inner: &Arc<MemoryStore>, writes: usize) -> Arc<Self> {
        Arc::new(Self {
            inner: Arc::clone(inner),
            left: AtomicUsize::new(writes),
            dead: watch::Sender::new(false),
        })
    }

    pub async fn died(&self) {
        let mut dead = self.dead.subscribe();
        dead.wait_for(|dead| *dead).await.expect("the sender is here");
    }

    fn alive<'a, T: Send + 'a>(&'a self, pending: Pending<'a, T>) -> Pending<'a, T> {
        if *self.dead.borrow() { Box::pin(std::future::pending()) } else { pending }
    }
}

impl Store for MortalStore {
    fn revision(&self) -> Pending<'_, Revision> {
        self.alive(self.inner.revision())
    }
    fn get<'a>(&'a self, key: &'a str) -> Pending<'a, Option<Entry>> {
        self.alive(self.inner.get(key))
    }
    fn list(&self, query: Query) -> Pending<'_, Page> {
        self.alive(self.inner.list(query))
    }
    fn transact(
        &self,
        conditions: Vec<Condition>,
        operations: Vec<berth_store::Operation>,
    ) -> Pending<'_, Revision> {
        if *self.dead.borrow() {
            return Box::pin(std::future::pending());
        }
        Box::pin(async move {
            let revision = self.inner.transact(conditions, operations).await?;
            let left = self.left.load(Ordering::SeqCst);
            if left != usize::MAX {
                self.left.store(left.saturating_sub(1), Ordering::SeqCst);
                if left <= 1 {
                    self.dead.send_replace(true);
                    std::future::pending::<()>().await;
                }
            }
            Ok(revision)
        })
    }
    fn watch(&self, prefix: &str, from_revision: Revision) -> Watch {
        self.inner.watch(prefix, from_revision)
    }
    fn grant_lease(&self, ttl: Duration) -> Pending<'_, Lease> {
        self.inner.grant_lease(ttl)
    }
    fn keep_lease_alive(&self, id: LeaseId) -> Pending<'_, Lease> {
        self.inner.keep_lease_alive(id)
    }
    fn revoke_lease(&self, id: LeaseId) -> Pending<'_, ()> {
        self.inner.revoke_lease(id)
    }
    fn compact(&self, revision: Revision) -> Pending<'_, ()> {
        self.inner.compact(revision)
    }
}

/// The time of the runtime, which tests hold still.
pub struct TestClock {
    start: tokio::time::Instant,
}

impl Clock for TestClock {
    fn now(&self) -> Timestamp {
        let passed = u64::try_from(self.start.elapsed().as_millis()).unwrap();
        Timestamp::from_millis(1_795_352_752_007 + passed)
    }
    fn sleep(&self, duration: Duration) -> Sleep {
        Box::pin(tokio::time::sleep(duration))
    }
}

/// Ids that count up.
#[derive(Default)]
pub struct TestEntropy(AtomicU64);

impl Entropy for TestEntropy {
    fn fill(&self, bytes: &mut [u8]) {
        let number = self.0.fetch_add(1, Ordering::SeqCst).to_be_bytes();
        bytes.fill(0);
        let start = bytes.len().saturating_sub(number.len());
        for (place, value) in bytes.iter_mut().skip(start).zip(number) {
            *place = value;
        }
    }
}

/// Hosts, a store, and what managers need.
pub struct World {
    pub net: Arc<Net>,
    pub inner: Arc<MemoryStore>,
    pub hosts: Vec<HostId>,
    pub image: ImageId,
    pub settings: Settings,
    clock: Arc<TestClock>,
    entropy: Arc<TestEntropy>,
    authority: Arc<Authority>,
}

/// Whether hosts see one directory or each its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pools {
    Shared,
    Local,
}

impl World {
    pub async fn new(pools: Pools) -> Self {
        let identity = authority();
        let world = Self {
            net: Arc::new(Net::default()),
            inner: Arc::new(MemoryStore::new(Arc::new(ManualClock::new()))),
            hosts: (1..=2).map(|number| HostId::from_entropy([number; 10])).collect(),
            image: ImageId::from_entropy([7; 10]),
            settings: Settings::default(),
            clock: Arc::new(TestClock { start: tokio::time::Instant::now() }),
            entropy: Arc::default(),
            authority: identity,
        };
        for (index, id) in world.hosts.iter().enumerate() {
            let pool = if pools == Pools::Shared { "pool".to_owned() } else { format!("pool-{index}") };
            world.net.add(id.clone(), &pool);
        }
        world.furnish().await;
        world
    }

    async fn furnish(&self) {
        let records = Records::open(Arc::clone(&self.inner) as Arc<dyn Store>).await.expect("a store");
        let mut transaction = Transaction::new();
        for (index, id) in self.hosts.iter().enumerate() {
            let name = format!("h{}", index + 1).parse().unwrap();
            transaction.claim(&UniqueName::in_cluster("host", &name), id.as_str());
            transaction.create(&Host {
                id: id.clone(),
                name,
                address: format!("{}:1", id),
                state: HostState::Online,
                inventory: None,
                last_seen_at: None,
                offline_reason: None,
                joined_at: self.clock.now(),
            });
        }
        let segment = Segment {
            id: SegmentId::from_entropy([5; 10]),
            parent: None,
            quota: berth_api::manager::Quota::default(),
            name: "default".parse().unwrap(),
            created_at: self.clock.now(),
        };
        transaction.claim(&UniqueName::in_cluster("segment", &segment.name), segment.id.as_str());
        transaction.create(&segment);
        records.commit(transaction).await.expect("a commit");
        records.close();
        self.add_image(&self.image, "alpine").await;
    }

    /// An image that is whole in the first host's pool.
    pub async fn add_image(&self, id: &ImageId, name: &str) {
        let records = Records::open(Arc::clone(&self.inner) as Arc<dyn Store>).await.expect("a store");
        let (pool_uuid, mut transaction) = (self.pool_uuid(0), Transaction::new());
        let image = Image {
            id: id.clone(),
            name: name.parse().unwrap(),
            segment: None,
            state: ImageState::Ready,
            parts: vec![ImagePart {
                role: PartRole::Disk,
                format: PartFormat::Qcow2,
                size_bytes: 1 << 20,
                sha256: "00".repeat(32),
                virtual_size_bytes: Some(512 << 20),
            }],
            kernel_command_line: String::new(),
            arrived: vec![PartRole::Disk],
            created_at: self.clock.now(),
        };
        transaction.claim(&UniqueName::image(image.segment.as_ref(), &image.name), id.as_str());
        transaction.create(&image);
        let place = ImagePlace { image: id.clone(), pool_uuid: pool_uuid.clone(), pool: default_pool() };
        transaction.create(&place);
        records.commit(transaction).await.expect("a commit");
        records.close();
        self.net.pools.lock().unwrap().get_mut(&pool_uuid).unwrap().images.insert(id.clone());
    }

    fn pool_uuid(&self, host: usize) -> String {
        let pools = self.net.pools.lock().unwrap();
        let own = format!("pool-{host}");
        if pools.contains_key(&own) { own } else { "pool".to_owned() }
    }

    /// A manager, with its hosts seen.
    pub async fn manager(&self) -> Arc<Cluster> {
        self.manager_on(MortalStore::immortal(&self.inner), None).await
    }

    pub async fn manager_on(
        &self,
        store: Arc<MortalStore>,
        interference: Option<Arc<dyn Interference>>,
    ) -> Arc<Cluster> {
        let cluster = Cluster::open_with(self.parts(store), interference).await.expect("a cluster");
        cluster.start().expect("a start");
        cluster
    }

    /// A manager with a door, whose schedules run.
    pub async fn whole_manager(&self, store: Arc<MortalStore>) -> Manager {
        let manager = Manager::new(self.parts(store)).await.expect("a manager");
        manager.start().await.expect("a start");
        manager
    }

    fn parts(&self, store: Arc<MortalStore>) -> Parts {
        Parts {
            store,
            connector: Arc::clone(&self.net) as _,
            clock: Arc::clone(&self.clock) as _,
            entropy: Arc::clone(&self.entropy) as _,
            authority: Arc::clone(&self.authority),
            settings: self.settings.clone(),
        }
    }

    pub async fn manager_with_hosts(&self) -> Arc<Cluster> {
        let cluster = self.manager().await;
        hosts_are_seen(&cluster).await;
        cluster
    }

    pub fn agent(&self, host: usize) -> Arc<FakeAgent> {
        self.net.agent(&self.hosts[host])
    }

    /// Everything that there is, without what differs from run to run.
    pub fn digest(&self, cluster: &Cluster) -> String {
        let host_name = |id: &HostId| cluster.host_name(id);
        let mut lines = Vec::new();
        for vm in cluster.records.list::<Vm>() {
            let snapshots = cluster.records.snapshots_of(&vm.value.id);
            let name_of = |id: &Option<berth_model::SnapshotId>| {
                let found = snapshots.iter().find(|row| Some(&row.value.id) == id.as_ref());
                found.map(|row| plain(row)).unwrap_or_default()
            };
            lines.push(format!(
                "vm {} {} on {} at '{}' baseline '{}'",
                vm.full_name(),
                vm.status.state,
                vm.status.host.as_ref().map(host_name).unwrap_or_default(),
                name_of(&vm.status.at_snapshot),
                name_of(&vm.status.baseline),
            ));
            for snapshot in &snapshots {
                let memory = snapshot.facts.has_memory;
                let parent = name_of(&snapshot.parent);
                let verified = snapshot.verified.as_ref().map(|found| (found.by, found.verdict));
                let line =
                    format!("  snapshot {} of '{parent}' memory {memory} {verified:?}", plain(snapshot));
                lines.push(line);
            }
        }
        for image in cluster.records.list::<Image>() {
            // It may have been fetched to a pool more: that is kept.
            let somewhere = !cluster.records.places_of(&image.value.id).is_empty();
            lines.push(format!("image {} is somewhere: {somewhere}", image.name));
        }
        for agent in self.net.agents() {
            for (vm, machine) in agent.machines() {
                let name = cluster.records.get::<Vm>(vm.as_str()).map(|vm| vm.full_name());
                lines.push(format!("{} has {name:?} {:?}", host_name(&agent.id), machine.process));
            }
        }
        for (uuid, pool) in self.net.pools.lock().unwrap().iter() {
            // Images stay where they were fetched to.
            for (vm, files) in &pool.vms {
                let name = cluster.records.get::<Vm>(vm.as_str()).map(|vm| vm.full_name());
                lines.push(format!("{uuid} has files of {name:?} with {} snapshots", files.snapshots.len()));
            }
        }
        lines.join("\n")
    }

    /// Nothing is held, half done, or at odds with what the hosts have.
    pub async fn check_whole(&self, cluster: &Cluster) {
        for row in cluster.records.list::<OperationRow>() {
            assert!(row.operation.state.is_over(), "{:?}", row.operation);
        }
        assert_eq!(cluster.records.list::<Debt>().len(), 0, "nothing is owed");
        for agent in self.net.agents() {
            assert!(agent.is_idle(), "an agent is still at work");
            for vm in agent.machines().keys() {
                let row = cluster.records.get::<Vm>(vm.as_str());
                let owner = row.and_then(|row| row.status.host.clone());
                assert_eq!(owner.as_ref(), Some(&agent.id), "{vm} is left on a host");
            }
        }
        for pool in self.net.pools.lock().unwrap().values() {
            assert!(pool.fetched.is_empty(), "what was fetched of a backup is left");
        }
        for vm in cluster.records.list::<Vm>() {
            self.check_vm(cluster, &vm.value);
        }
        self.check_names(cluster).await;
    }

    fn check_vm(&self, cluster: &Cluster, vm: &Vm) {
        assert_eq!(vm.status.operation, None, "the slot is free");
        let agent = self.net.agent(vm.status.host.as_ref().expect("a host"));
        let machine = agent.machine(&vm.id).expect("the host has the VM");
        let state = match machine.process {
            Process::None => VmState::Stopped,
            Process::Running => VmState::Running,
            Process::Paused => VmState::Paused,
            Process::Incoming | Process::GivenAway => panic!("{} is between two hosts", vm.full_name()),
        };
        assert_eq!(vm.status.state, state, "the record says how {} is", vm.full_name());
        let files = agent.files(&vm.id).expect("the VM has files");
        assert_eq!(vm.status.top_layer, files.top, "the record knows the top layer");
        let recorded: Vec<_> =
            cluster.records.snapshots_of(&vm.id).iter().map(|row| row.value.id.clone()).collect();
        let mut there: Vec<_> = files.snapshots.keys().cloned().collect();
        let mut recorded_sorted = recorded.clone();
        recorded_sorted.sort();
        there.sort();
        assert_eq!(recorded_sorted, there, "snapshots and their records are one");
        for id in vm.status.at_snapshot.iter().chain(&vm.status.baseline) {
            assert!(recorded.contains(id), "{id} is still recorded");
        }
        let own_pool = self.pool_uuid(self.hosts.iter().position(|id| *id == agent.id).unwrap());
        for (uuid, pool) in self.net.pools.lock().unwrap().iter() {
            let own = *uuid == own_pool;
            assert!(own || !pool.vms.contains_key(&vm.id), "files of {} are left in {uuid}", vm.full_name());
        }
    }

    async fn check_names(&self, cluster: &Cluster) {
        let mut expected = BTreeMap::new();
        for host in cluster.records.list::<Host>() {
            expected.insert(UniqueName::in_cluster("host", &host.name).key(), host.id.clone());
        }
        for segment in cluster.records.list::<Segment>() {
            expected.insert(UniqueName::in_cluster("segment", &segment.name).key(), segment.id.clone());
        }
        for image in cluster.records.list::<Image>() {
            expected.insert(UniqueName::image(image.segment.as_ref(), &image.name).key(), image.id.clone());
        }
        for vm in cluster.records.list::<Vm>() {
            expected.insert(UniqueName::vm(&vm.segment, &vm.name).key(), vm.id.clone());
        }
        for row in cluster.records.list::<Schedule>() {
            expected.insert(UniqueName::schedule(&row.segment, &row.name).key(), row.value.id.to_string());
        }
        for row in cluster.records.list::<Snapshot>() {
            expected.insert(UniqueName::snapshot(&row.vm, &row.name).key(), row.value.id.to_string());
        }
        let page = self.inner.list(Query::prefix("/names/")).await.expect("a list");
        let found: BTreeMap<String, String> = page
            .entries
            .into_iter()
            .map(|entry| (entry.key, String::from_utf8(entry.value.to_vec()).unwrap()))
            .collect();
        assert_eq!(found, expected, "each thing has its name and each name its thing");
    }
}

fn plain(snapshot: &Snapshot) -> String {
    // Those that nobody named carry the time.
    match snapshot.kind {
        SnapshotKind::Undo => "undo".to_owned(),
        SnapshotKind::Manual | SnapshotKind::Baseline | SnapshotKind::Scheduled => snapshot.name.to_string(),
    }
}

/// One for all tests: making keys takes time.
fn authority() -> Arc<Authority> {
    static ONE: Mutex<Option<Arc<Authority>>> = Mutex::new(None);
    let mut one = ONE.lock().unwrap();
    Arc::clone(one.get_or_insert_with(|| {
        let identity = Authority::create(1_795_352_752).expect("an authority");
        Arc::new(Authority::load(&identity).expect("an authority"))
    }))
}

/// Waits until something is so, looking whenever time passes.
pub async fn until(cluster: &Cluster, what: &str, so: impl Fn(&Cluster) -> bool) {
    let waiting = async {
        while !so(cluster) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    assert!(tokio::time::timeout(LONG, waiting).await.is_ok(), "never: {what}");
}

/// Waits until the manager knows what its hosts have.
pub async fn hosts_are_seen(cluster: &Cluster) {
    until(cluster, "hosts are seen", |cluster| {
        cluster.records.list::<Host>().iter().all(|host| host.inventory.is_some())
    })
    .await;
}

pub async fn begin(cluster: &Cluster, request: OperationRequest) -> Result<OperationRef, Problem> {
    cluster.operations.begin(Begin::new("tester", request)).await
}

/// Begins and waits for the end.
pub async fn whole(cluster: &Cluster, request: OperationRequest) -> Operation {
    let begun = begin(cluster, request).await.expect("a beginning");
    over(cluster, &begun.operation.expect("an operation").id).await
}

/// The same, which must succeed.
pub async fn done(cluster: &Cluster, request: OperationRequest) -> Operation {
    let operation = whole(cluster, request).await;
    assert_eq!(operation.state, OperationState::Succeeded, "{operation:?}");
    operation
}

pub async fn over(cluster: &Cluster, id: &OperationId) -> Operation {
    let operation = cluster.operations.wait(id, LONG).await.expect("an operation");
    assert!(operation.state.is_over(), "{operation:?}");
    operation
}

/// Waits until nothing is under way.
pub async fn quiet(cluster: &Cluster) {
    until(cluster, "all operations are over", |cluster| {
        let active = Filter { active: true, ..Filter::default() };
        cluster.operations.list(&active).is_empty() && cluster.records.list::<Debt>().is_empty()
    })
    .await;
}

pub fn wish(name: &str) -> CreateVm {
    let json = serde_json::json!({
        "segment": "default", "name": name, "image": "alpine", "memory_mib": 256, "ready_timeout_s": 1_000_000,
    });
    serde_json::from_value(json).expect("a wish")
}

pub fn create(name: &str) -> OperationRequest {
    OperationRequest::VmCreate { wish: Box::new(wish(name)) }
}

/// A running VM on the first host.
pub async fn running_vm(cluster: &Cluster, name: &str) -> VmId {
    let wish = CreateVm { host: Some("h1".to_owned()), ..wish(name) };
    let operation = done(cluster, OperationRequest::VmCreate { wish: Box::new(wish) }).await;
    operation.vm.expect("a VM")
}

pub fn vm(cluster: &Cluster, id: &VmId) -> Vm {
    cluster.records.require::<Vm>(id.as_str()).expect("a VM").value.clone()
}
