//! How an agent comes by fake QEMUs: its launcher, and a tool for images that needs no program.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use berth_agent::disk::merging::Merging;
use berth_agent::disk::pace::Pace;
use berth_agent::disk::{ImageTool, NewLayer, WRITABLE_MODE};
use berth_agent::launcher::{
    Argument, Duplex, Exit, Hypervisor, LaunchError, LaunchSpec, Launched, Launcher, Process, ProcessRecord,
    Socket,
};
use berth_agent::snapshot::overlay::{self, Below};
use berth_api::transport::BoxFuture;
use berth_model::host::{Accelerator, QemuAbilities};
use berth_model::{Problem, ProblemCode};
use berth_qmp::{ConnectOptions, Events, Qmp, QmpError};

use crate::oracle::ProcessName;
use crate::qemu::{FakeQemu, Port, Start, World};

/// The machine type that fake QEMUs have.
pub const MACHINE_TYPE: &str = "pc-q35-7.2";
/// The CPU model that they have.
pub const CPU_MODEL: &str = "qemu64";
/// Which boot of the machine it is: there is only one.
const BOOT_ID: &str = "sim";
/// How long a command may take. A machine that hangs would hold up a story for longer than it is worth.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(5);

/// Starts fake QEMUs on one host, and knows them again when another agent asks.
pub struct SimLauncher {
    host: String,
    world: Arc<World>,
    processes: Mutex<BTreeMap<i32, Running>>,
}

struct Running {
    qemu: FakeQemu,
    run_dir: PathBuf,
}

/// Numbers of processes, unique in this program.
static NUMBERS: AtomicU64 = AtomicU64::new(1);

impl SimLauncher {
    /// The launcher of a host.
    pub fn new(host: &str, world: Arc<World>) -> Self {
        Self { host: host.to_owned(), world, processes: Mutex::default() }
    }

    /// The machines that there are.
    pub fn machines(&self) -> Vec<FakeQemu> {
        self.lock().values().map(|running| running.qemu.clone()).collect()
    }

    /// The agent has died: what it held open is closed.
    pub fn agent_died(&self) {
        self.machines().iter().for_each(FakeQemu::peer_died);
    }

    /// The machine itself dies, with everything on it.
    pub fn power_cut(&self) {
        self.machines().iter().for_each(FakeQemu::kill);
    }

    async fn start(&self, spec: LaunchSpec) -> Result<Launched, LaunchError> {
        fs::create_dir_all(&spec.run_dir)
            .map_err(|source| LaunchError::System { doing: "making the run directory", source })?;
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        let start = Start {
            vm: spec.vm,
            process: ProcessName { number, host: self.host.clone() },
            words: spec.arguments.iter().map(word).collect(),
            memory_bytes: spec.machine.memory_bytes,
        };
        let qemu = FakeQemu::start(start, Arc::clone(&self.world)).map_err(|last_words| {
            LaunchError::Died { exit: Exit { code: Some(1), signal: None, last_words } }
        })?;
        let pid = i32::try_from(number).unwrap_or(i32::MAX);
        {
            let mut processes = self.lock();
            processes.retain(|_, old| old.qemu.ended().borrow().is_none());
            processes.insert(pid, Running { qemu: qemu.clone(), run_dir: spec.run_dir });
        }
        match greet(&qemu).await {
            Ok((qmp, events)) => Ok(Launched { qmp, events, process: process(&qemu, record(pid)) }),
            Err(source) => {
                qemu.kill();
                Err(LaunchError::Monitor { source, process: None })
            }
        }
    }

    async fn find(&self, known: &ProcessRecord) -> Result<Option<Launched>, LaunchError> {
        let qemu = match self.lock().get(&known.pid) {
            Some(running) if running.qemu.ended().borrow().is_none() => running.qemu.clone(),
            _ => return Ok(None),
        };
        let process = process(&qemu, known.clone());
        match greet(&qemu).await {
            Ok((qmp, events)) => Ok(Some(Launched { qmp, events, process })),
            Err(_) if process.has_exited() => Ok(None),
            Err(source) => Err(LaunchError::Monitor { source, process: Some(process) }),
        }
    }

    fn open(&self, run_dir: &Path, socket: Socket) -> io::Result<Box<dyn Duplex>> {
        let port = match socket {
            Socket::Console => Port::Console,
            Socket::GuestAgent => Port::GuestAgent,
            Socket::Probe => Port::Probe,
            Socket::Qmp | Socket::Observe => return Err(io::ErrorKind::Unsupported.into()),
        };
        let processes = self.lock();
        // The newest has made the sockets anew.
        let running = processes.values().rev().find(|running| running.run_dir == run_dir);
        match running.filter(|running| running.qemu.ended().borrow().is_none()) {
            Some(running) => Ok(Box::new(running.qemu.open_port(port))),
            None => Err(io::ErrorKind::ConnectionRefused.into()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<i32, Running>> {
        self.processes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Launcher for SimLauncher {
    fn launch(&self, spec: LaunchSpec) -> BoxFuture<'_, Result<Launched, LaunchError>> {
        Box::pin(self.start(spec))
    }

    fn adopt<'a>(
        &'a self,
        record: &'a ProcessRecord,
        _run_dir: &'a Path,
    ) -> BoxFuture<'a, Result<Option<Launched>, LaunchError>> {
        Box::pin(self.find(record))
    }

    fn end_unknown<'a>(&'a self, known: &'a [ProcessRecord]) -> BoxFuture<'a, ()> {
        let strays: Vec<FakeQemu> = self
            .lock()
            .iter()
            .filter(|(pid, _)| !known.iter().any(|record| record.pid == **pid))
            .map(|(_, running)| running.qemu.clone())
            .collect();
        strays.iter().for_each(FakeQemu::kill);
        Box::pin(async {})
    }

    fn connect<'a>(
        &'a self,
        run_dir: &'a Path,
        socket: Socket,
    ) -> BoxFuture<'a, io::Result<Box<dyn Duplex>>> {
        let opened = self.open(run_dir, socket);
        Box::pin(async { opened })
    }

    fn inspect(&self) -> BoxFuture<'_, Result<Hypervisor, LaunchError>> {
        let abilities = QemuAbilities {
            version: "10.0.2".to_owned(),
            machine_types: vec![MACHINE_TYPE.to_owned()],
            cpu_models: vec![CPU_MODEL.to_owned()],
            migration_capabilities: vec!["events".to_owned(), "pause-before-switchover".to_owned()],
            devices: vec!["vmgenid".to_owned()],
        };
        let note = Some("a simulation".to_owned());
        let found = Hypervisor { accelerator: Accelerator::Tcg, accelerator_note: note, abilities };
        Box::pin(async { Ok(found) })
    }
}

fn word(argument: &Argument) -> String {
    match argument {
        Argument::Text(text) => text.clone(),
        Argument::WithDescriptor { before, after, .. } => format!("{before}99{after}"),
    }
}

fn record(pid: i32) -> ProcessRecord {
    ProcessRecord { pid, start_time_ticks: 1, boot_id: BOOT_ID.to_owned(), tpm: None }
}

fn process(qemu: &FakeQemu, record: ProcessRecord) -> Process {
    let killed = qemu.clone();
    Process::new(record, qemu.ended(), Arc::new(move || killed.kill()))
}

async fn greet(qemu: &FakeQemu) -> Result<(Qmp, Events), QmpError> {
    let connect = |source| QmpError::Connect { path: PathBuf::from("monitor"), source };
    let stream = qemu.open_monitor().and_then(tokio::net::UnixStream::from_std).map_err(connect)?;
    let options = ConnectOptions {
        connect_timeout: COMMAND_TIMEOUT,
        command_timeout: COMMAND_TIMEOUT,
        ..ConnectOptions::default()
    };
    Qmp::over_unix(stream, options).await
}

/// Makes layers that hold nothing; they are what they say they are all the same, for verifications read them.
#[derive(Debug, Clone, Copy)]
pub struct SimImages;

impl ImageTool for SimImages {
    fn create_layer(&self, layer: NewLayer) -> BoxFuture<'_, Result<(), Problem>> {
        let made = || {
            let below = Below { path: "image", format: "raw" };
            overlay::create(&layer.path, layer.virtual_size_bytes, below, None)?;
            fs::set_permissions(&layer.path, fs::Permissions::from_mode(WRITABLE_MODE))
        };
        let made = made().map_err(|error| {
            Problem::new(ProblemCode::Internal, format!("{}: {error}", layer.path.display()))
        });
        Box::pin(async { made })
    }

    fn merge_layers(&self, _work: Merging, _pace: Pace) -> BoxFuture<'_, Result<(), Problem>> {
        Box::pin(async { Err(Problem::new(ProblemCode::Internal, "these layers hold nothing to merge")) })
    }

    fn measure_layers(&self, _layers: Vec<PathBuf>) -> BoxFuture<'_, Result<u64, Problem>> {
        Box::pin(async { Ok(0) })
    }

    fn check_qcow2<'a>(&'a self, _path: &'a Path) -> BoxFuture<'a, Result<(), Problem>> {
        Box::pin(async { Ok(()) })
    }
}
