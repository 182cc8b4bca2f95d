//! An agent in this process, over directories that are gone afterwards.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use berth_agent::clock::SystemClock;
use berth_agent::config::{NetworkConfig, PoolConfig};
use berth_agent::disk::tool::QemuImg;
use berth_agent::launcher::process::ProcessLauncher;
use berth_agent::services::{Handles, PeerConnector};
use berth_agent::{Agent, AgentConfig};
use berth_api::agent::{
    PartQuery, PoolImagePath, PoolImageUpload, PutTask, ReportQuery, ReportShow, StoredPart, Task,
    TaskOutput, TaskPath, TaskPut, TaskQuery, TaskShow, TaskSpec, TaskState, VmDefinition, VmReport,
};
use berth_api::endpoint::Nothing;
use berth_api::pki::Peer;
use berth_api::serve::Caller;
use berth_api::transport::{BoxFuture, Transport, TransportError};
use berth_api::{Client, ClientError};
use berth_model::image::{Image, ImagePart, ImageState, PartFormat, PartRole};
use berth_model::vm::{Nic, VmSpec};
use berth_model::{HostId, ImageId, LayerId, Problem, Timestamp, VmId};
use guest_probe::image::GuestImage;
use http::{Request, Response};
use http_body_util::BodyExt;
use sha2::{Digest, Sha256};
use tower::ServiceExt;

pub const DEADLINE: Duration = Duration::from_secs(60);

/// A host's directories; everything of it is gone when it is dropped, its QEMUs too.
pub struct Host {
    pub id: HostId,
    pub root: tempfile::TempDir,
    pub agent: Option<Arc<Agent>>,
    pub network: NetworkConfig,
    pub peers: Arc<Peers>,
}

/// Calls an agent's routes without a network, as a caller of one's choice.
struct InProcess {
    router: Router,
    peer: Peer,
}

impl Transport for InProcess {
    fn send(
        &self,
        request: Request<berth_api::Body>,
    ) -> BoxFuture<'_, Result<Response<berth_api::Body>, TransportError>> {
        let mut request = request.map(Body::new);
        let remote = "127.0.0.1:1".parse().expect("address");
        request.extensions_mut().insert(Caller { remote, peer: self.peer.clone() });
        let router = self.router.clone();
        Box::pin(async move {
            let response = router.oneshot(request).await.expect("routers don't fail");
            Ok(response.map(|body| body.map_err(Into::into).boxed_unsync()))
        })
    }

    fn address(&self) -> &str {
        "in this process"
    }
}

/// The other hosts that there are, in this process too.
#[derive(Default)]
pub struct Peers(std::sync::Mutex<Vec<(HostId, Client)>>);

impl Peers {
    pub fn add(&self, host: &Host, as_host: &HostId) {
        let client = host.client_of(Peer::Host(as_host.clone()));
        self.0.lock().expect("lock").push((host.id.clone(), client));
    }
}

impl PeerConnector for Peers {
    fn connect(&self, host: &HostId, address: &str) -> Client {
        let peers = self.0.lock().expect("lock");
        let found = peers.iter().find(|(id, _)| id == host);
        found.unwrap_or_else(|| panic!("nobody is at {address}")).1.clone()
    }
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// An agent over a directory, with the machine's QEMU or with another one (`BERTH_QEMU`, `BERTH_QEMU_ARGUMENTS`).
pub fn config(root: &Path) -> AgentConfig {
    AgentConfig {
        name: "h1".parse().expect("name"),
        listen: "127.0.0.1:0".parse().expect("address"),
        manager: "127.0.0.1:1".into(),
        state_dir: root.join("state"),
        run_dir: root.join("run"),
        pools: vec![PoolConfig { name: "local".parse().expect("name"), path: root.join("pool") }],
        qemu_binary: variable("BERTH_QEMU").unwrap_or_else(|| "/usr/bin/qemu-system-x86_64".into()).into(),
        qemu_arguments: variable("BERTH_QEMU_ARGUMENTS")
            .map(|words| words.split_whitespace().map(str::to_owned).collect())
            .unwrap_or_default(),
        qemu_img_binary: "/usr/bin/qemu-img".into(),
        machine: berth_agent::config::MachineConfig::default(),
        network: NetworkConfig::default(),
        pool_reserve_percent: 0,
        user_id_base: 2_000_000,
        layers_max: berth_agent::config::LAYERS_MAX,
    }
}

/// A directory that QEMUs of other users can get to.
pub fn directory() -> tempfile::TempDir {
    let root = tempfile::Builder::new().prefix("berth-agent-").tempdir().expect("directory");
    std::fs::set_permissions(root.path(), std::fs::Permissions::from_mode(0o711)).expect("open");
    std::fs::create_dir(root.path().join("pool")).expect("pool");
    root
}

impl Host {
    pub async fn start() -> Self {
        Self::start_with(directory(), NetworkConfig::default()).await
    }

    pub async fn start_with(root: tempfile::TempDir, network: NetworkConfig) -> Self {
        let mut host =
            Self { id: HostId::from_entropy([9; 10]), root, agent: None, network, peers: Arc::default() };
        host.start_agent().await;
        host
    }

    pub async fn start_agent(&mut self) {
        let config = AgentConfig { network: self.network.clone(), ..config(self.root.path()) };
        self.agent = Some(start_agent(self.id.clone(), config, self.peers.clone()).await.expect("agent"));
    }

    /// Ends the agent and leaves its QEMUs alone.
    pub fn stop_agent(&mut self) {
        if let Some(agent) = self.agent.take() {
            agent.stop();
        }
    }

    pub fn agent(&self) -> &Arc<Agent> {
        self.agent.as_ref().expect("running")
    }

    pub fn pool(&self) -> PathBuf {
        self.root.path().join("pool")
    }

    pub fn client(&self) -> Client {
        self.client_of(Peer::Manager)
    }

    pub fn client_of(&self, peer: Peer) -> Client {
        Client::new(Arc::new(InProcess { router: berth_agent::http::router(self.agent()), peer }))
    }

    /// Puts a task and waits for its end.
    pub async fn task(&self, vm: &VmId, spec: TaskSpec) -> Result<TaskOutput, Problem> {
        let generation = self.report(vm).await.map_or(1, |report| report.generation);
        self.task_of(Some(vm), generation, spec).await
    }

    pub async fn task_of(
        &self,
        vm: Option<&VmId>,
        generation: u64,
        spec: TaskSpec,
    ) -> Result<TaskOutput, Problem> {
        let number = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("time");
        let path = TaskPath { task: format!("op-test.{}", number.as_nanos()) };
        let put = PutTask { vm: vm.cloned(), generation, spec };
        let client = self.client();
        let mut task =
            client.call::<TaskPut>(&path, &Nothing {}, &put).await.map_err(ClientError::into_problem)?;
        let began = std::time::Instant::now();
        loop {
            match task.state {
                TaskState::Running { .. } => {}
                TaskState::Succeeded { output } => return Ok(output),
                TaskState::Failed { problem } => return Err(problem),
            }
            assert!(began.elapsed() < 3 * DEADLINE, "the task does not end: {:?}", put.spec);
            task = wait(&client, &path, &task).await;
        }
    }

    pub async fn report(&self, vm: &VmId) -> Option<VmReport> {
        let report = self.client().call::<ReportShow>(&Nothing {}, &ReportQuery::default(), &()).await;
        report.expect("report").vms.into_iter().find(|report| report.vm == *vm)
    }

    /// Waits until the VM's report is as it is wanted.
    pub async fn until(&self, vm: &VmId, wanted: impl Fn(&VmReport) -> bool) -> VmReport {
        let client = self.client();
        let mut query = ReportQuery::default();
        let waiting = async {
            loop {
                let report = client.call::<ReportShow>(&Nothing {}, &query, &()).await.expect("report");
                if let Some(found) = report.vms.into_iter().find(|report| report.vm == *vm)
                    && wanted(&found)
                {
                    return found;
                }
                query = ReportQuery {
                    incarnation: Some(report.incarnation),
                    after: Some(report.generation),
                    wait_ms: Some(10_000),
                };
            }
        };
        tokio::time::timeout(DEADLINE, waiting).await.expect("the VM does not get there")
    }

    pub async fn upload(
        &self,
        image: &ImageId,
        role: PartRole,
        format: &str,
        bytes: Vec<u8>,
        sha256: String,
    ) -> Result<StoredPart, Problem> {
        let path = PoolImagePath { pool: "local".parse().expect("name"), image: image.clone(), role };
        let length = bytes.len() as u64;
        let query = PartQuery { format: format.to_owned(), size_bytes: length, sha256 };
        let body = berth_api::transport::full(bytes);
        let stored = self.client().upload::<PoolImageUpload>(&path, &query, body, length).await;
        stored.map_err(ClientError::into_problem)
    }

    /// A VM on an image that has been uploaded: a raw disk of 1 MiB that no BIOS boots from.
    pub async fn vm_on_a_blank_disk(&self, number: u8) -> VmDefinition {
        let bytes = vec![number; 1 << 20];
        let definition = definition(number, &[(PartRole::Disk, PartFormat::Raw, bytes.clone())]);
        let sha256 = sha256(&bytes);
        self.upload(&definition.image.id, PartRole::Disk, "raw", bytes, sha256).await.expect("uploaded");
        definition
    }

    /// A VM that runs the test guest, prepared.
    pub async fn guest(&self, number: u8, nics: Vec<Nic>) -> VmDefinition {
        let image = GuestImage::locate().unwrap_or_else(|error| panic!("{error}"));
        let read = |path: &Path| std::fs::read(path).expect("the test guest's files");
        let (kernel, initrd) = (read(&image.kernel), read(&image.initrd));
        let mut definition = definition(
            number,
            &[
                (PartRole::Kernel, PartFormat::Raw, kernel.clone()),
                (PartRole::Initrd, PartFormat::Raw, initrd.clone()),
            ],
        );
        definition.image.kernel_command_line = image.cmdline.clone();
        definition.spec.memory_mib = 256;
        definition.spec.cpu_model = "max".into();
        definition.spec.nics = nics;
        for (role, bytes) in [(PartRole::Kernel, kernel), (PartRole::Initrd, initrd)] {
            let sha256 = sha256(&bytes);
            self.upload(&definition.image.id, role, "raw", bytes, sha256).await.expect("uploaded");
        }
        let prepare = TaskSpec::PrepareVm { definition: Box::new(definition.clone()) };
        self.task(&definition.id, prepare).await.expect("prepared");
        definition
    }

    /// Every file under a directory of this host, for tests that nothing is left.
    pub fn files(&self, directory: &str) -> Vec<String> {
        let mut all = Vec::new();
        list(&self.root.path().join(directory), &mut all);
        all.sort();
        all
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.stop_agent();
        // By the mark that the launcher puts on its own, so only those of this directory.
        let mark = [b"BERTH_RUN=", self.root.path().as_os_str().as_encoded_bytes()].concat();
        for pid in berth_agent::launcher::process::proc::with_environment(&mark) {
            if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
}

fn list(directory: &Path, all: &mut Vec<String>) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            list(&entry.path(), all);
        } else {
            all.push(entry.path().display().to_string());
        }
    }
}

pub async fn start_agent(
    id: HostId,
    config: AgentConfig,
    peers: Arc<Peers>,
) -> Result<Arc<Agent>, berth_agent::StartError> {
    let scratch =
        berth_agent::sandbox::can_become_users_from(config.user_id_base).then_some(config.user_id_base);
    let launcher = ProcessLauncher::new(
        config.qemu_binary.clone(),
        config.qemu_arguments.clone(),
        config.run_dir.clone(),
        scratch,
    )
    .expect("launcher");
    let handles = Handles {
        launcher: Arc::new(launcher),
        images: Arc::new(QemuImg::new(config.qemu_img_binary.clone(), scratch)),
        clock: Arc::new(SystemClock),
        peers,
    };
    Agent::start(id, config, handles).await
}

async fn wait(client: &Client, path: &TaskPath, task: &Task) -> Task {
    let query = TaskQuery { after: Some(task.version), wait_ms: Some(10_000) };
    client.call::<TaskShow>(path, &query, &()).await.expect("task")
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A VM of that number, on an image with these parts.
pub fn definition(number: u8, parts: &[(PartRole, PartFormat, Vec<u8>)]) -> VmDefinition {
    let image = ImageId::from_entropy([number; 10]);
    let part = |(role, format, bytes): &(PartRole, PartFormat, Vec<u8>)| ImagePart {
        role: *role,
        format: *format,
        size_bytes: bytes.len() as u64,
        sha256: sha256(bytes),
        virtual_size_bytes: (*role == PartRole::Disk).then_some(bytes.len() as u64),
    };
    VmDefinition {
        id: VmId::from_entropy([number; 10]),
        number: number.into(),
        full_name: format!("default/vm{number}"),
        hostname: format!("vm{number}").parse().expect("name"),
        spec: VmSpec {
            vcpus: 1,
            memory_mib: 64,
            disk_mib: 16,
            data_disks_mib: Vec::new(),
            image: image.clone(),
            pool: "local".parse().expect("name"),
            machine_type: "pc-q35-7.2".into(),
            firmware: berth_model::vm::Firmware::default(),
            tpm: false,
            cpu_model: "qemu64".into(),
            nics: Vec::new(),
            user_data: None,
            protected: false,
            class: berth_model::vm::standard_class(),
            ready_timeout_s: 60,
            isolated: false,
        },
        image: Image {
            id: image,
            name: "tiny".parse().expect("name"),
            segment: None,
            state: ImageState::Ready,
            parts: parts.iter().map(part).collect(),
            kernel_command_line: String::new(),
            arrived: Vec::new(),
            created_at: Timestamp::from_millis(0),
        },
        first_layer: LayerId::from_entropy([number; 10]),
    }
}
