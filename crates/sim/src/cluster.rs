//! A whole cluster: a manager, agents, fake QEMUs, the network between them, and what is done with it all.
//!
//! Everything goes through the door: the simulation's own user has a token and calls the manager's routes; hosts join
//! with join tokens. What is not played is TLS: connections say by themselves who is at the other end.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use berth_agent::config::{NetworkConfig, PoolConfig};
use berth_agent::services::{Handles, PeerConnector};
use berth_agent::{Agent, AgentConfig};
use berth_api::Client;
use berth_api::endpoint::Nothing;
use berth_api::manager::{CreateJoinToken, EnrolRequest, HostEnrol, JoinTokenCreate};
use berth_api::pki::{Authority, Peer, signing_request};
use berth_manager::agents::AgentConnector;
use berth_manager::clock::Entropy;
use berth_manager::cluster::Settings;
use berth_manager::{Manager, Parts};
use berth_model::host::Host;
use berth_model::name::Name;
use berth_model::{HostId, VmId};
use berth_store::MemoryStore;
use tempfile::TempDir;
use tokio::runtime::Handle;

use crate::chance::Chance;
use crate::clock::SimClock;
use crate::fault::Faults;
use crate::launcher::{SimImages, SimLauncher};
use crate::network::Network;
use crate::oracle::Oracle;
use crate::qemu::{FakeQemu, Guests, Pace, World};

pub mod act;

mod daemon;
mod requests;

use daemon::Daemon;
pub use requests::{IMAGE, POOL, RequestError, VmWish, done};

/// The manager's place on the network.
pub const MANAGER: &str = "manager";
/// The user's place on the network.
pub const USER: &str = "user";
const MANAGER_ADDRESS: &str = "manager:8443";

/// What a cluster is to be.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// How many hosts.
    pub hosts: usize,
    /// The seed of everything that is drawn.
    pub seed: u64,
    /// Whether all hosts see one pool.
    pub shared_pool: bool,
    /// How guests say that they are ready. Those that do get a baseline.
    pub guests: Guests,
    /// How long things take.
    pub pace: Pace,
}

impl Plan {
    /// Hosts with a pool of their own each, and guests that speak.
    pub fn new(hosts: usize, seed: u64) -> Self {
        Self { hosts, seed, shared_pool: false, guests: Guests::Speak, pace: Pace::default() }
    }
}

/// A cluster in this process.
pub struct SimCluster {
    world: Arc<World>,
    network: Arc<Network>,
    store: Arc<MemoryStore>,
    authority: Arc<Authority>,
    entropy: Arc<SeededEntropy>,
    clock: Arc<SimClock>,
    token: Mutex<Option<String>>,
    hosts: Vec<SimHost>,
    manager: tokio::sync::Mutex<Option<Daemon>>,
    // Last: what the daemons have open goes before the directory does.
    directory: TempDir,
}

struct SimHost {
    name: String,
    id: HostId,
    config: AgentConfig,
    launcher: Arc<SimLauncher>,
    agent: tokio::sync::Mutex<Option<Daemon>>,
}

impl SimCluster {
    /// A cluster of so many hosts, up and online, with an image to make VMs of.
    ///
    /// # Panics
    /// When it does not come up.
    pub async fn new(hosts: usize, seed: u64) -> Self {
        Self::with(Plan::new(hosts, seed)).await
    }

    /// The same, as planned.
    ///
    /// # Panics
    /// When it does not come up.
    pub async fn with(plan: Plan) -> Self {
        lift_open_files();
        let world = Arc::new(World {
            oracle: Oracle::default(),
            faults: Faults::default(),
            chance: Chance::new(plan.seed),
            pace: plan.pace,
            guests: plan.guests,
            runtime: Handle::current(),
        });
        let now_unix_s = std::time::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs());
        let made = Authority::create(i64::try_from(now_unix_s).unwrap_or(0)).expect("a CA");
        let mut cluster = Self {
            network: Network::new(),
            store: Arc::new(MemoryStore::new(Arc::new(berth_store::SystemClock::new()))),
            authority: Arc::new(Authority::load(&made).expect("its own CA")),
            entropy: Arc::new(SeededEntropy(Chance::new(plan.seed ^ 0x5eed))),
            clock: Arc::new(SimClock::new()),
            token: Mutex::default(),
            hosts: Vec::new(),
            manager: tokio::sync::Mutex::new(None),
            directory: scratch(),
            world,
        };
        cluster.start_manager().await;
        for number in 1..=plan.hosts {
            let host = cluster.join(number, plan.shared_pool).await;
            cluster.hosts.push(host);
        }
        for number in 0..plan.hosts {
            cluster.start_agent(number).await;
        }
        cluster.until_online().await;
        cluster.import_image().await;
        cluster
    }

    /// What the fake QEMUs share: the oracle and the faults to come among it.
    pub fn world(&self) -> &Arc<World> {
        &self.world
    }

    /// The network.
    pub fn network(&self) -> &Arc<Network> {
        &self.network
    }

    /// The managers' clock.
    pub fn clock(&self) -> &SimClock {
        &self.clock
    }

    /// The hosts' names, in order.
    pub fn hosts(&self) -> Vec<String> {
        self.hosts.iter().map(|host| host.name.clone()).collect()
    }

    /// Where everything of this cluster's is.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// A client of the manager, with the first administrator's token.
    pub fn client(&self) -> Client {
        let transport = self.network.transport(USER, Peer::Anonymous, MANAGER_ADDRESS);
        let token = self.token.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Client::new(transport).with_token(&token.unwrap_or_default())
    }

    /// Starts a manager on the store as it is; nothing if one runs.
    ///
    /// # Panics
    /// When it does not start.
    pub async fn start_manager(&self) {
        let mut manager = self.manager.lock().await;
        if manager.is_some() {
            return;
        }
        let parts = Parts {
            store: Arc::<MemoryStore>::clone(&self.store),
            connector: Arc::new(ToAgents(Arc::clone(&self.network))),
            clock: Arc::<SimClock>::clone(&self.clock),
            entropy: Arc::<SeededEntropy>::clone(&self.entropy),
            authority: Arc::clone(&self.authority),
            settings: Settings::default(),
        };
        let listener = self.network.listen(MANAGER, MANAGER_ADDRESS);
        let (told, first_token) = tokio::sync::oneshot::channel();
        let daemon = Daemon::spawn(
            MANAGER,
            || {},
            move |ready| async move {
                let manager = Manager::new(parts).await.expect("the store's records are good");
                match manager.first_start() {
                    Some(first) => {
                        told.send(first.secret().to_owned()).expect("the cluster waits");
                        first.commit(manager.cluster()).await.expect("an empty store takes them");
                    }
                    None => drop(told),
                }
                manager.start().await.expect("what was under way can be gone on with");
                ready();
                listener.serve(manager.router()).await;
            },
        );
        *manager = Some(daemon.await);
        if let Ok(secret) = first_token.await {
            *self.token.lock().unwrap_or_else(PoisonError::into_inner) = Some(secret);
        }
    }

    /// Kills the manager; nothing if there is none.
    pub async fn kill_manager(&self) {
        if let Some(manager) = self.manager.lock().await.take() {
            manager.kill().await;
        }
    }

    /// Starts a host's agent on the state directory as it is; nothing if one runs.
    ///
    /// # Panics
    /// When it does not start.
    pub async fn start_agent(&self, number: usize) {
        let host = &self.hosts[number];
        let mut agent = host.agent.lock().await;
        if agent.is_some() {
            return;
        }
        let (id, config) = (host.id.clone(), host.config.clone());
        let launcher = Arc::clone(&host.launcher);
        let (network, place, address) =
            (Arc::clone(&self.network), host.name.clone(), address_of(&host.config));
        let handles = Handles {
            launcher: Arc::<SimLauncher>::clone(&launcher),
            images: Arc::new(SimImages),
            clock: Arc::new(berth_agent::clock::SystemClock),
            peers: Arc::new(ToPeers { network: Arc::clone(&network), place: place.clone(), id: id.clone() }),
        };
        let daemon = Daemon::spawn(
            &host.name,
            move || launcher.agent_died(),
            move |ready| async move {
                let started = Agent::start(id, config, handles).await.expect("the state directory is good");
                let listener = network.listen(&place, &address);
                ready();
                listener.serve(berth_agent::http::router(&started)).await;
            },
        );
        *agent = Some(daemon.await);
    }

    /// Kills a host's agent; nothing if there is none. Its QEMUs go on.
    pub async fn kill_agent(&self, number: usize) {
        if let Some(agent) = self.hosts[number].agent.lock().await.take() {
            agent.kill().await;
        }
    }

    /// Whether a host's agent is up.
    pub async fn has_agent(&self, number: usize) -> bool {
        self.hosts[number].agent.lock().await.is_some()
    }

    /// Cuts the power of a host: its agent and its QEMUs are gone, its disk stays.
    pub async fn cut_power(&self, number: usize) {
        self.hosts[number].launcher.power_cut();
        self.kill_agent(number).await;
    }

    /// The hosts on which a VM has processes, whether their guests run or not.
    pub fn processes_of(&self, vm: &VmId) -> Vec<String> {
        let mut found = Vec::new();
        for host in &self.hosts {
            let alive = |qemu: &FakeQemu| qemu.vm() == vm && qemu.ended().borrow().is_none();
            found.extend(
                host.launcher.machines().iter().filter(|qemu| alive(qemu)).map(|_| host.name.clone()),
            );
        }
        found
    }

    /// The names of the VMs' directories: in each host's state, runtime directory and pool.
    pub fn vm_directories(&self) -> Vec<(String, Vec<String>)> {
        let mut all = Vec::new();
        for host in &self.hosts {
            let config = &host.config;
            let pool = config.pools[0].path.join("vms");
            for directory in [config.state_dir.join("vms"), config.run_dir.clone(), pool] {
                let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
                let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
                all.push((directory.display().to_string(), names.collect()));
            }
        }
        all
    }

    /// Kills the processes that a host has of a VM.
    pub fn kill_qemu(&self, number: usize, vm: &VmId) {
        let machines = self.hosts[number].launcher.machines();
        machines.iter().filter(|qemu| qemu.vm() == vm).for_each(FakeQemu::kill);
    }

    /// Ends the machines that obey no more.
    pub fn kill_hung(&self) {
        let machines = self.hosts.iter().flat_map(|host| host.launcher.machines());
        machines.filter(FakeQemu::hangs).for_each(|qemu| qemu.kill());
    }

    /// Ends everything.
    pub async fn shut_down(self) {
        self.kill_manager().await;
        for number in 0..self.hosts.len() {
            self.cut_power(number).await;
        }
    }

    /// Makes a machine a host, through the door.
    async fn join(&self, number: usize, shared_pool: bool) -> SimHost {
        let name = format!("host-{number}");
        let config = self.agent_config(number, &name, shared_pool);
        let client = self.client();
        let wish = CreateJoinToken::default();
        let token =
            client.call::<JoinTokenCreate>(&Nothing {}, &Nothing {}, &wish).await.expect("a join token");
        let (_key, csr_pem) = signing_request().expect("a request");
        let request = EnrolRequest {
            token: token.token,
            name: config.name.clone(),
            address: address_of(&config),
            csr_pem,
        };
        let stranger = Client::new(self.network.transport(&name, Peer::Anonymous, MANAGER_ADDRESS));
        let reply = stranger.call::<HostEnrol>(&Nothing {}, &Nothing {}, &request).await.expect("enrolled");
        let launcher = Arc::new(SimLauncher::new(&name, Arc::clone(&self.world)));
        SimHost { name, id: reply.host, config, launcher, agent: tokio::sync::Mutex::new(None) }
    }

    fn agent_config(&self, number: usize, name: &str, shared_pool: bool) -> AgentConfig {
        let home = self.directory.path().join(name);
        let pool = if shared_pool { self.directory.path().join("shared") } else { home.join("pool") };
        for directory in [&home, &pool] {
            fs::create_dir_all(directory).expect("a directory");
            // The VMs' own users must be able to pass.
            fs::set_permissions(directory, fs::Permissions::from_mode(0o711)).expect("its mode");
        }
        let port = u16::try_from(10_000 + number).expect("hosts are few enough");
        AgentConfig {
            name: name.parse().expect("a name"),
            listen: ([127, 0, 0, 1], port).into(),
            manager: MANAGER_ADDRESS.to_owned(),
            state_dir: home.join("state"),
            run_dir: home.join("run"),
            pools: vec![PoolConfig { name: pool_name(), path: pool }],
            qemu_binary: PathBuf::from("/nonexistent/qemu"),
            qemu_arguments: Vec::new(),
            qemu_img_binary: PathBuf::from("/nonexistent/qemu-img"),
            machine: berth_agent::config::MachineConfig::default(),
            network: NetworkConfig::default(),
            pool_reserve_percent: 0,
            user_id_base: berth_agent::config::USER_ID_BASE,
            // What a layer here holds is no qcow2.
            layers_max: 0,
        }
    }
}

fn pool_name() -> Name {
    POOL.parse().expect("a name")
}

fn address_of(config: &AgentConfig) -> String {
    config.listen.to_string()
}

/// A directory that costs no disk where that can be had: thousands of records are brought to the disk one by one.
fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    let made = tempfile::Builder::new().prefix("berth-sim-").tempdir_in(memory);
    let directory = made.or_else(|_| tempfile::tempdir()).expect("a directory");
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o711)).expect("its mode");
    directory
}

/// Each VM takes two descriptors: more than a shell allows, but not more than the system does.
fn lift_open_files() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "large clusters may run out of file descriptors");
    }
}

/// The manager's way to agents.
struct ToAgents(Arc<Network>);

impl AgentConnector for ToAgents {
    fn connect(&self, host: &Host) -> Client {
        Client::new(self.0.transport(MANAGER, Peer::Manager, &host.address))
    }
}

/// A host's way to others.
struct ToPeers {
    network: Arc<Network>,
    place: String,
    id: HostId,
}

impl PeerConnector for ToPeers {
    fn connect(&self, _host: &HostId, address: &str) -> Client {
        Client::new(self.network.transport(&self.place, Peer::Host(self.id.clone()), address))
    }
}

/// Ids and secrets from the seed; it outlives the managers, so that none is drawn twice.
struct SeededEntropy(Chance);

impl Entropy for SeededEntropy {
    fn fill(&self, bytes: &mut [u8]) {
        self.0.fill(bytes);
    }
}
