//! A host for tests: a real agent with real QEMUs in a directory of its own, all of it gone when it is dropped.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use berth_agent::clock::SystemClock;
use berth_agent::config::{AgentConfig, LAYERS_MAX, MachineConfig, NetworkConfig, PoolConfig};
use berth_agent::disk::tool::QemuImg;
use berth_agent::image::{Expected, chunks};
use berth_agent::launcher::process::ProcessLauncher;
use berth_agent::services::{Handles, PeerConnector};
use berth_agent::{Agent, sandbox};
use berth_api::agent::{PutTask, ReportQuery, TaskOutput, TaskSpec, TaskState, VmDefinition};
use berth_api::{Client, transport};
use berth_model::image::{Image, ImagePart, ImageState, PartFormat, PartRole};
use berth_model::vm::{Nic, VmSpec, VmState};
use berth_model::{HostId, ImageId, LayerId, Problem, SnapshotId, Timestamp, VmId};
use guest_probe::client::ProbeClient;
use guest_probe::image::GuestImage;
use tokio::runtime::Runtime;

/// Longest wait for anything: an emulated guest on a busy machine boots in a fraction of it.
pub const LONG: Duration = Duration::from_secs(120);

/// A random id.
pub fn entropy() -> [u8; 10] {
    let mut bytes = [0; 10];
    getrandom::fill(&mut bytes).expect("random numbers");
    bytes
}

pub fn layer() -> LayerId {
    LayerId::from_entropy(entropy())
}

pub fn snapshot() -> SnapshotId {
    SnapshotId::from_entropy(entropy())
}

/// Reaches nobody.
pub struct NoPeers;

impl PeerConnector for NoPeers {
    fn connect(&self, host: &HostId, _: &str) -> Client {
        panic!("nobody is to be reached, least of all {host}");
    }
}

/// A directory that VMs' own users can pass.
pub fn directory() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("directory");
    open_directory(directory.path());
    directory
}

pub fn open_directory(path: &Path) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o711)).expect("mode");
}

pub struct TestHost {
    pub agent: Arc<Agent>,
    /// What the agent's tasks run on: it dies by losing it.
    runtime: Option<Runtime>,
    pub id: HostId,
    root: PathBuf,
    /// That root, if it is to be gone afterwards.
    temporary: Option<tempfile::TempDir>,
    config: AgentConfig,
    peers: Arc<dyn PeerConnector>,
    vms: std::sync::Mutex<Vec<VmId>>,
}

impl TestHost {
    /// A host with a pool of its own.
    pub async fn start() -> Self {
        Self::start_with(None, Arc::new(NoPeers), HostId::from_entropy(entropy())).await
    }

    /// A host with this pool, if one is given, and these peers.
    pub async fn start_with(pool: Option<PathBuf>, peers: Arc<dyn PeerConnector>, id: HostId) -> Self {
        let temporary = directory();
        let root = temporary.path().to_owned();
        let pool = pool.unwrap_or_else(|| root.join("pool"));
        let mut host = Self::start_in(root, pool, peers, id).await;
        host.temporary = Some(temporary);
        host
    }

    /// A host whose files are in this directory and stay there; it may have been there before.
    pub async fn start_at(root: &Path, id: HostId) -> Self {
        Self::start_in(root.to_owned(), root.join("pool"), Arc::new(NoPeers), id).await
    }

    async fn start_in(root: PathBuf, pool: PathBuf, peers: Arc<dyn PeerConnector>, id: HostId) -> Self {
        // A second test in the same process finds it set up.
        let _ = tracing_subscriber::fmt().with_env_filter("berth_agent=info").with_test_writer().try_init();
        std::fs::create_dir_all(&pool).expect("pool");
        open_directory(&pool);
        let config = AgentConfig {
            name: "h1".parse().expect("name"),
            listen: "127.0.0.1:0".parse().expect("address"),
            manager: "127.0.0.1:1".into(),
            state_dir: root.join("state"),
            run_dir: root.join("run"),
            pools: vec![PoolConfig { name: "local".parse().expect("name"), path: pool }],
            qemu_binary: std::env::var("BERTH_QEMU").unwrap_or("/usr/bin/qemu-system-x86_64".into()).into(),
            qemu_arguments: std::env::var("BERTH_QEMU_ARGUMENTS")
                .map(|words| words.split_whitespace().map(str::to_owned).collect())
                .unwrap_or_default(),
            qemu_img_binary: "/usr/bin/qemu-img".into(),
            machine: MachineConfig::default(),
            network: NetworkConfig::default(),
            pool_reserve_percent: 0,
            user_id_base: 2_000_000,
            layers_max: LAYERS_MAX,
        };
        std::fs::create_dir_all(&config.state_dir).expect("state");
        std::fs::create_dir_all(&config.run_dir).expect("run");
        let (agent, runtime) = start_agent(&id, &config, &peers).await;
        let vms = std::sync::Mutex::default();
        Self { agent, runtime: Some(runtime), id, root, temporary: None, config, peers, vms }
    }

    /// The agent dies in the middle of whatever it does, and another takes its place.
    pub async fn replace_agent(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
        let (agent, runtime) = start_agent(&self.id, &self.config, &self.peers).await;
        (self.agent, self.runtime) = (agent, Some(runtime));
    }

    /// Has something done where the agent's tasks are.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.runtime.as_ref().expect("alive").spawn(work);
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn pool(&self) -> &Path {
        &self.config.pools[0].path
    }

    pub fn vm_directory(&self, vm: &VmId) -> PathBuf {
        self.pool().join("vms").join(vm.as_str())
    }

    /// Has something done about a VM.
    pub async fn task(&self, vm: &VmId, spec: TaskSpec) -> Result<TaskOutput, Problem> {
        let id = self.put(vm, spec);
        self.wait(&id).await
    }

    /// Puts a task and gives its id.
    pub fn put(&self, vm: &VmId, spec: TaskSpec) -> String {
        let id = LayerId::from_entropy(entropy()).to_string();
        self.vms.lock().expect("lock").push(vm.clone());
        let _guard = self.runtime.as_ref().expect("alive").enter();
        self.agent.put_task(&id, PutTask { vm: Some(vm.clone()), generation: 1, spec }).expect("put");
        id
    }

    /// Waits for a task's end.
    pub async fn wait(&self, id: &str) -> Result<TaskOutput, Problem> {
        self.watch(id, |_| {}).await
    }

    /// Waits for a task's end and shows each phase it goes through.
    pub async fn watch(&self, id: &str, mut seen: impl FnMut(&str)) -> Result<TaskOutput, Problem> {
        let mut after = 0;
        loop {
            let task = self.agent.tasks().show(id, Some(after), LONG).await.expect("task");
            assert!(task.version > after, "{id} does not get on");
            after = task.version;
            match task.state {
                TaskState::Running { progress } => seen(&progress.phase),
                TaskState::Succeeded { output } => return Ok(output),
                TaskState::Failed { problem } => return Err(problem),
            }
        }
    }

    pub fn state(&self, vm: &VmId) -> Option<VmState> {
        self.agent.services().board.vm(vm).map(|report| report.state)
    }

    /// What is wrong with a VM.
    pub fn trouble(&self, vm: &VmId) -> Option<String> {
        self.agent.services().board.vm(vm).and_then(|report| report.trouble)
    }

    /// Waits until the agent has noticed that a VM has no process.
    pub async fn until_stopped(&self, vm: &VmId) {
        self.until(vm, VmState::Stopped).await;
    }

    /// Waits until the agent has noticed that a VM is in this state.
    pub async fn until(&self, vm: &VmId, wanted: VmState) {
        let services = self.agent.services();
        let mut report = services.board.now();
        while self.state(vm) != Some(wanted) {
            let query = ReportQuery {
                incarnation: Some(report.incarnation),
                after: Some(report.generation),
                wait_ms: Some(10_000),
            };
            let newer = services.board.wait(&query).await;
            assert!(newer.generation > report.generation, "the VM is not seen to be {wanted}");
            report = newer;
        }
    }

    /// The process of a VM as it is on record.
    pub fn pid(&self, vm: &VmId) -> Option<i32> {
        let text =
            std::fs::read(self.config.state_dir.join("vms").join(vm.as_str()).join("host.json")).ok()?;
        let record: serde_json::Value = serde_json::from_slice(&text).expect("record");
        record["process"]["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok())
    }

    /// Puts the test guest's image into the pool.
    pub async fn take_image(&self, image: &Image) {
        let guest = GuestImage::locate().expect("the test guest: cargo xtask guest");
        let services = self.agent.services();
        let pool = services.layout.pool(&"local".parse().expect("name")).expect("pool");
        for (part, path) in image.parts.iter().zip([&guest.kernel, &guest.initrd]) {
            let expected = Expected::from_part(part).expect("part");
            let bytes = std::fs::read(path).expect("read");
            let mut bytes = chunks(transport::full(bytes));
            let taken = self.agent.images().take(services, &pool, &image.id, &expected, &mut bytes);
            taken.await.expect("image");
        }
    }

    /// A VM that runs and whose guest answers.
    pub async fn running_vm(&self, memory_mib: u64) -> TestVm {
        self.vm_of(definition(memory_mib)).await
    }

    /// A VM of this definition that runs and whose guest answers.
    pub async fn vm_of(&self, definition: VmDefinition) -> TestVm {
        self.take_image(&definition.image).await;
        let vm = definition.id.clone();
        let boxed = || Box::new(definition.clone());
        self.task(&vm, TaskSpec::PrepareVm { definition: boxed() }).await.expect("prepared");
        self.task(&vm, TaskSpec::StartVm { definition: boxed() }).await.expect("started");
        let ready = self.task(&vm, TaskSpec::WaitReady { timeout_ms: 300_000 }).await;
        ready.expect("ready");
        TestVm { id: vm, definition }
    }

    /// Where the guest's probe can be asked.
    pub fn probe(&self, vm: &VmId) -> ProbeClient {
        ProbeClient::new(self.probe_address(vm)).expect("socket")
    }

    pub fn probe_address(&self, vm: &VmId) -> SocketAddr {
        let report = self.agent.services().board.vm(vm).expect("report");
        let forward = report.forwards[0].iter().find(|forward| forward.guest_port == 7007).expect("forward");
        SocketAddr::from(([127, 0, 0, 1], forward.host_port))
    }
}

impl Drop for TestHost {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
        let vms = std::mem::take(&mut *self.vms.lock().expect("lock"));
        for pid in vms.iter().filter_map(|vm| self.pid(vm)) {
            kill(pid);
        }
    }
}

/// Kills a process of the test's own.
pub fn kill(pid: i32) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

async fn start_agent(
    id: &HostId,
    config: &AgentConfig,
    peers: &Arc<dyn PeerConnector>,
) -> (Arc<Agent>, Runtime) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.expect("runtime");
    let (id, config, peers) = (id.clone(), config.clone(), Arc::clone(peers));
    let agent = runtime.spawn(async move { new_agent(&id, &config, &peers).await }).await.expect("started");
    (agent, runtime)
}

async fn new_agent(id: &HostId, config: &AgentConfig, peers: &Arc<dyn PeerConnector>) -> Arc<Agent> {
    let nobody = sandbox::can_become_users_from(config.user_id_base).then_some(config.user_id_base);
    let launcher = ProcessLauncher::new(
        config.qemu_binary.clone(),
        config.qemu_arguments.clone(),
        config.run_dir.clone(),
        nobody,
    );
    let handles = Handles {
        launcher: Arc::new(launcher.expect("launcher")),
        images: Arc::new(QemuImg::new(config.qemu_img_binary.clone(), nobody)),
        clock: Arc::new(SystemClock),
        peers: Arc::clone(peers),
    };
    Agent::start(id.clone(), config.clone(), handles).await.expect("agent")
}

pub struct TestVm {
    pub id: VmId,
    pub definition: VmDefinition,
}

impl TestVm {
    pub fn boxed(&self) -> Box<VmDefinition> {
        Box::new(self.definition.clone())
    }
}

/// The test guest, with a disk of its own and an interface.
pub fn definition(memory_mib: u64) -> VmDefinition {
    let guest = GuestImage::locate().expect("the test guest: cargo xtask guest");
    let part = |role, path: &Path, sha256: &str| ImagePart {
        role,
        format: PartFormat::Raw,
        size_bytes: std::fs::metadata(path).expect("part").len(),
        sha256: sha256.to_owned(),
        virtual_size_bytes: None,
    };
    let entropy = entropy();
    let image = ImageId::from_entropy(entropy);
    VmDefinition {
        id: VmId::from_entropy(entropy),
        number: 1 + u32::from(u16::from_be_bytes([entropy[0], entropy[1]])),
        full_name: "default/test".into(),
        hostname: "test".parse().expect("name"),
        spec: VmSpec {
            vcpus: 1,
            memory_mib,
            disk_mib: 256,
            data_disks_mib: Vec::new(),
            image: image.clone(),
            pool: "local".parse().expect("name"),
            machine_type: std::env::var("BERTH_MACHINE_TYPE").unwrap_or("pc-q35-7.2".into()),
            firmware: berth_model::vm::Firmware::default(),
            tpm: false,
            cpu_model: "max".into(),
            nics: vec![Nic {
                mac: format!("52:54:00:{:02x}:{:02x}:{:02x}", entropy[0], entropy[1], entropy[2]),
                address: None,
                gateway: None,
                forwards: Vec::new(),
            }],
            user_data: None,
            protected: false,
            class: berth_model::vm::standard_class(),
            ready_timeout_s: 120,
            isolated: false,
        },
        image: Image {
            id: image,
            name: "guest".parse().expect("name"),
            segment: None,
            state: ImageState::Ready,
            parts: vec![
                part(PartRole::Kernel, &guest.kernel, &guest.kernel_sha256),
                part(PartRole::Initrd, &guest.initrd, &guest.initrd_sha256),
            ],
            kernel_command_line: guest.cmdline,
            arrived: vec![PartRole::Kernel, PartRole::Initrd],
            created_at: Timestamp::from_millis(0),
        },
        first_layer: LayerId::from_entropy(entropy),
    }
}

/// A small file system of its own, gone when it is dropped. Needs root.
pub struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    pub fn mount(size_mib: u64) -> Option<Self> {
        let directory = directory();
        let options = format!("size={size_mib}m,mode=0711");
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
            .arg(directory.path())
            .status();
        if mounted.is_ok_and(|status| status.success()) {
            return Some(Self(directory));
        }
        println!("no file system can be mounted here: not tried");
        None
    }

    pub fn path(&self) -> PathBuf {
        self.0.path().to_owned()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a process that was just killed may still hold it.
        let _ = std::process::Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}
