//! The agent as the daemon that it is, in a process of its own, over TLS: killed, started anew, and small.

use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use berth_agent::AgentConfig;
use berth_agent::identity::{HostIdentity, IdentityFiles};
use berth_api::agent::{
    AgentMetrics, AgentVmPath, ConsoleOpen, InventoryShow, PutTask, ReportQuery, ReportShow, TaskPath,
    TaskPut, TaskQuery, TaskShow, TaskSpec, TaskState, VmDefinition,
};
use berth_api::endpoint::Nothing;
use berth_api::pki::{self, Authority, Identity};
use berth_api::tls;
use berth_api::transport::TlsTransport;
use berth_api::{Client, ClientError};
use berth_model::host::Accelerator;
use berth_model::vm::VmState;
use berth_model::{HostId, ProblemCode};

use crate::support::{DEADLINE, config, definition, directory};

/// Where the child process finds its configuration.
const CONFIG: &str = "BERTH_TEST_AGENT_CONFIG";
/// Most resident memory of an agent with ten VMs, in KiB.
const RESIDENT_KIB_MAX: u64 = 30 * 1024;

/// Not a test of its own: the child process of the others.
#[test]
fn agent_process() {
    let Some(path) = std::env::var_os(CONFIG) else { return };
    let config = AgentConfig::load(std::path::Path::new(&path)).expect("configuration");
    let (_stop, stopped) = tokio::sync::watch::channel(false);
    let runtime = berth_agent::runtime().expect("runtime");
    runtime.block_on(berth_agent::run(config, stopped)).expect("runs");
}

struct Daemon {
    root: tempfile::TempDir,
    host: HostId,
    authority: Authority,
    manager: Identity,
    address: SocketAddr,
    child: Option<Child>,
}

impl Daemon {
    fn new() -> Self {
        let root = directory();
        let now = i64::try_from(
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("time").as_secs(),
        )
        .expect("seconds");
        let authority = Authority::load(&Authority::create(now).expect("CA")).expect("own CA");
        let manager = authority.issue_manager(&[], now).expect("manager");
        let host = HostId::from_entropy([9; 10]);
        let (key_pem, csr) = pki::signing_request().expect("request");
        let certificate_pem = authority.sign_host(&csr, &host, now).expect("signed");
        let identity = HostIdentity {
            host: host.clone(),
            identity: Identity { certificate_pem, key_pem },
            ca_pem: authority.certificate_pem().to_owned(),
        };
        IdentityFiles::new(root.path().join("state/identity")).store(&identity).expect("stored");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("address");
        let config = AgentConfig { listen: address, ..config(root.path()) };
        let text = toml_of(&config);
        std::fs::write(root.path().join("agent.toml"), text).expect("configuration");
        Self { root, host, authority, manager, address, child: None }
    }

    async fn start(&mut self) {
        let child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "killed::agent_process", "--nocapture"])
            .env(CONFIG, self.root.path().join("agent.toml"))
            .stdout(Stdio::null())
            .spawn();
        self.child = Some(child.expect("spawned"));
        let client = self.client(&self.manager);
        let up = async {
            while client.call::<ReportShow>(&Nothing {}, &ReportQuery::default(), &()).await.is_err() {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(DEADLINE, up).await.expect("the agent answers");
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("killed");
            child.wait().expect("gone");
        }
    }

    fn client(&self, identity: &Identity) -> Client {
        let config = tls::client_config(self.authority.certificate_pem(), Some(identity)).expect("TLS");
        let name = tls::server_name(&pki::host_name(&self.host)).expect("name");
        Client::new(Arc::new(TlsTransport::new(self.address.to_string(), name, config)))
    }

    async fn task(&self, definition: &VmDefinition, name: &str, spec: TaskSpec) {
        let state = self.ended(definition, name, spec).await;
        assert!(matches!(state, TaskState::Succeeded { .. }), "{state:?}");
    }

    async fn ended(&self, definition: &VmDefinition, name: &str, spec: TaskSpec) -> TaskState {
        let client = self.client(&self.manager);
        let path = TaskPath { task: format!("{}.{name}", definition.id) };
        let put = PutTask { vm: Some(definition.id.clone()), generation: 1, spec };
        let mut task = client.call::<TaskPut>(&path, &Nothing {}, &put).await.expect("put");
        while let TaskState::Running { .. } = task.state {
            let query = TaskQuery { after: Some(task.version), wait_ms: Some(10_000) };
            task = client.call::<TaskShow>(&path, &query, &()).await.expect("shown");
        }
        task.state
    }

    async fn make(&self, definition: &VmDefinition) {
        let boxed = Box::new(definition.clone());
        self.task(definition, "prepare", TaskSpec::PrepareVm { definition: boxed.clone() }).await;
        self.task(definition, "start", TaskSpec::StartVm { definition: boxed }).await;
    }

    async fn states(&self) -> Vec<VmState> {
        let client = self.client(&self.manager);
        let report =
            client.call::<ReportShow>(&Nothing {}, &ReportQuery::default(), &()).await.expect("report");
        report.vms.into_iter().map(|vm| vm.state).collect()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
        let mark = [b"BERTH_RUN=", self.root.path().as_os_str().as_encoded_bytes()].concat();
        for pid in berth_agent::launcher::process::proc::with_environment(&mark) {
            if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
}

fn toml_of(config: &AgentConfig) -> String {
    toml::to_string(config).expect("TOML")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_was_killed_finds_its_vm_running() {
    let mut daemon = Daemon::new();
    daemon.start().await;
    let definition = definition(1, &[]);
    daemon.make(&definition).await;
    daemon.kill();
    let mark = [b"BERTH_RUN=", daemon.root.path().as_os_str().as_encoded_bytes()].concat();
    let alive = berth_agent::launcher::process::proc::with_environment(&mark);
    assert_eq!(alive.len(), 1, "the VM outlives its agent");
    daemon.start().await;
    assert_eq!(daemon.states().await, [VmState::Running]);
    assert_eq!(berth_agent::launcher::process::proc::with_environment(&mark), alive);
    daemon.task(&definition, "stop", TaskSpec::StopVm).await;
    assert_eq!(daemon.states().await, [VmState::Stopped]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_qemu_that_was_being_started_when_the_agent_died_is_ended() {
    let mut daemon = Daemon::new();
    let config = config(daemon.root.path());
    let run_dir = config.run_dir.join(definition(1, &[]).id.as_str());
    std::fs::create_dir_all(&run_dir).expect("made");
    let mut half_started = Command::new(&config.qemu_binary)
        .args(&config.qemu_arguments)
        .args(["-machine", "none", "-nodefaults", "-display", "none", "-S", "-qmp"])
        .arg(format!("unix:{}/qmp.sock,server=on,wait=off", run_dir.display()))
        .env("BERTH_RUN", &run_dir)
        .spawn()
        .expect("QEMU");
    let listens = async {
        while !run_dir.join("qmp.sock").exists() {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(DEADLINE, listens).await.expect("QEMU listens");
    daemon.start().await;
    // The agent answers only after it has looked for such.
    use std::os::unix::process::ExitStatusExt;
    assert_eq!(half_started.wait().expect("ended").signal(), Some(9));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_whose_record_was_lost_is_neither_stopped_nor_started_twice() {
    let mut daemon = Daemon::new();
    daemon.start().await;
    let definition = definition(1, &[]);
    daemon.make(&definition).await;
    daemon.kill();
    let path = daemon.root.path().join(format!("state/vms/{}/host.json", definition.id));
    let text = std::fs::read(&path).expect("record");
    let mut record: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
    record["process"] = serde_json::Value::Null;
    std::fs::write(&path, record.to_string()).expect("record");
    daemon.start().await;
    let mark = [b"BERTH_RUN=", daemon.root.path().as_os_str().as_encoded_bytes()].concat();
    assert_eq!(berth_agent::launcher::process::proc::with_environment(&mark).len(), 1);
    let start = TaskSpec::StartVm { definition: Box::new(definition.clone()) };
    let TaskState::Failed { problem } = daemon.ended(&definition, "again", start).await else {
        panic!("a second one was started")
    };
    assert!(problem.message.contains("lock"), "{problem}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_manager_commands_and_the_inventory_tells_the_truth() {
    let mut daemon = Daemon::new();
    daemon.start().await;
    let client = daemon.client(&daemon.manager);
    let inventory = client.call::<InventoryShow>(&Nothing {}, &Nothing {}, &()).await.expect("inventory");
    assert!(inventory.qemu.machine_types.iter().any(|name| name.starts_with("pc-q35-")), "{inventory:?}");
    assert!(inventory.qemu.cpu_models.iter().any(|name| name == "max"), "{inventory:?}");
    assert!(inventory.qemu.migration_capabilities.iter().any(|name| name == "postcopy-ram"));
    assert_eq!(inventory.pools.len(), 1);
    if inventory.accelerator == Accelerator::Tcg {
        assert!(inventory.accelerator_note.is_some());
    }
    let now = i64::try_from(
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("time").as_secs(),
    )
    .expect("seconds");
    let (key_pem, csr) = pki::signing_request().expect("request");
    let other = HostId::from_entropy([8; 10]);
    let certificate_pem = daemon.authority.sign_host(&csr, &other, now).expect("signed");
    let client = daemon.client(&Identity { certificate_pem, key_pem });
    let refused = client.call::<InventoryShow>(&Nothing {}, &Nothing {}, &()).await.expect_err("a host");
    let ClientError::Problem(problem) = refused else { panic!("{refused}") };
    assert_eq!(problem.code, ProblemCode::NotAllowed);
    let stranger = Authority::load(&Authority::create(now).expect("CA")).expect("own CA");
    let client = daemon.client(&stranger.issue_manager(&[], now).expect("manager"));
    let refused = client.call::<InventoryShow>(&Nothing {}, &Nothing {}, &()).await.expect_err("a stranger");
    assert!(matches!(refused, ClientError::Transport(_)), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_console_is_a_websocket_and_the_metrics_count() {
    use futures_util::{SinkExt, StreamExt};
    use tokio_tungstenite::WebSocketStream;
    use tokio_tungstenite::tungstenite::Message;
    use tokio_tungstenite::tungstenite::protocol::Role;
    let mut daemon = Daemon::new();
    daemon.start().await;
    let definition = definition(1, &[]);
    daemon.make(&definition).await;
    let client = daemon.client(&daemon.manager);
    let headers = [
        ("sec-websocket-version", "13".to_owned()),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==".to_owned()),
    ];
    let path = AgentVmPath { vm: definition.id.clone() };
    let stream = client.upgrade::<ConsoleOpen>(&path, "websocket", &headers).await.expect("upgraded");
    let mut socket = WebSocketStream::from_raw_socket(stream, Role::Client, None).await;
    // No guest reads it; that it takes what is typed is all that can be seen.
    for _ in 0..1000 {
        socket.send(Message::Binary(vec![b'x'; 100].into())).await.expect("typed");
    }
    socket.close(None).await.expect("closed");
    while let Some(Ok(_)) = socket.next().await {}
    let unknown = AgentVmPath { vm: berth_model::VmId::from_entropy([6; 10]) };
    let refused =
        client.upgrade::<ConsoleOpen>(&unknown, "websocket", &headers).await.expect_err("no such VM");
    assert!(matches!(refused, ClientError::Problem(problem) if problem.code == ProblemCode::NotFound));
    let metrics = client.download::<AgentMetrics>(&Nothing {}, &Nothing {}).await.expect("metrics");
    let text = http_body_util::BodyExt::collect(metrics.into_body()).await.expect("text").to_bytes();
    let text = String::from_utf8(text.to_vec()).expect("text");
    assert!(text.contains("berth_agent_vms{state=\"running\"} 1"), "{text}");
    assert!(text.contains("berth_agent_resident_memory_bytes "), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_vms_cost_the_agent_little_memory() {
    let mut daemon = Daemon::new();
    daemon.start().await;
    for number in 1..=10 {
        daemon.make(&definition(number, &[])).await;
    }
    assert_eq!(daemon.states().await, [VmState::Running; 10]);
    let pid = daemon.child.as_ref().expect("running").id();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("resident");
    let resident_kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("number");
    println!("resident with ten VMs: {resident_kib} KiB");
    assert!(resident_kib <= RESIDENT_KIB_MAX, "{status}");
}
