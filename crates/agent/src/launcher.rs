//! Starting QEMU: a handle, so that a simulated cluster can bring a QEMU of its own.
//!
//! [`process`] is the real one. What it starts outlives the agent; an agent that starts anew finds its QEMUs again by
//! their [`ProcessRecord`]s, and ends those that carry its mark, that no record names and whose guest does not run: they
//! were being started when it died, for a QEMU is told to run its guest only once it is on record.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use berth_api::transport::BoxFuture;
use berth_model::host::{Accelerator, QemuAbilities};
use berth_model::{Problem, ProblemCode, VmId};
use berth_qmp::{Events, Qmp};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;

pub mod process;

/// A socket on which a VM's QEMU listens. The agent makes it, in a directory that only the agent can enter, and QEMU
/// is given the open descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Socket {
    /// The monitor that commands go to.
    Qmp,
    /// A second monitor, for those who only look.
    Observe,
    /// The serial console.
    Console,
    /// The guest agent's port.
    GuestAgent,
    /// The port of the probe in test guests.
    Probe,
}

impl Socket {
    /// Every socket.
    pub const ALL: [Self; 5] = [Self::Qmp, Self::Observe, Self::Console, Self::GuestAgent, Self::Probe];

    /// Its name in the VM's run directory.
    pub const fn file_name(self) -> &'static str {
        match self {
            Self::Qmp => "qmp.sock",
            Self::Observe => "observe.sock",
            Self::Console => "console.sock",
            Self::GuestAgent => "guest-agent.sock",
            Self::Probe => "probe.sock",
        }
    }

    /// Its character device's id in QEMU.
    pub const fn device(self) -> &'static str {
        match self {
            Self::Qmp => "qmp",
            Self::Observe => "observe",
            Self::Console => "console",
            Self::GuestAgent => "guest-agent",
            Self::Probe => "probe",
        }
    }
}

/// An open file that QEMU is given at its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Descriptor {
    /// The listening end of a socket, which the launcher makes.
    Socket(Socket),
    /// The tap of an interface, by its number.
    Tap(usize),
    /// The way to the TPM, which the launcher makes.
    Tpm,
    /// Anything else that a caller brings, by a number of its own.
    Extra(usize),
}

/// A word of QEMU's command line. Which number a descriptor has is known only when it has been opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Argument {
    /// Text as it is.
    Text(String),
    /// Text with a descriptor's number in it.
    WithDescriptor {
        /// What stands before the number.
        before: String,
        /// Whose number.
        descriptor: Descriptor,
        /// What stands after it.
        after: String,
    },
}

impl From<&str> for Argument {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Argument {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

/// What is to be started.
#[derive(Debug)]
pub struct LaunchSpec {
    /// Whose process it will be.
    pub vm: VmId,
    /// The command line after the program's name.
    pub arguments: Vec<Argument>,
    /// Open files to pass on, besides the sockets.
    pub descriptors: Vec<(Descriptor, OwnedFd)>,
    /// The directory for sockets and the log; made if it is not there.
    pub run_dir: PathBuf,
    /// The user and group that it runs as; none: the agent's own.
    pub user_id: Option<u32>,
    /// The TPM that it is to have.
    pub tpm: Option<TpmSpec>,
    /// What a QEMU that is not real must know of the guest.
    pub machine: MachineSummary,
}

/// A software TPM that is to be started beside a QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TpmSpec {
    /// The program, a swtpm.
    pub binary: PathBuf,
    /// The directory with its state, which is its user's own.
    pub state: PathBuf,
}

/// What a process is started for, in a form that needs no reading of command lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineSummary {
    /// The guest's memory in bytes.
    pub memory_bytes: u64,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// The disk's nodes from the image to the writable top.
    pub nodes: Vec<String>,
    /// It waits for an incoming migration.
    pub incoming: bool,
}

/// By what a process is known again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRecord {
    /// Its number.
    pub pid: i32,
    /// When it started, in clock ticks since the machine's boot: a number that is used again is not taken for it.
    pub start_time_ticks: u64,
    /// Which boot of the machine.
    pub boot_id: String,
    /// Its TPM's process, which ends when it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpm: Option<Box<ProcessRecord>>,
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// Its exit code, if it ended by itself and was our child.
    pub code: Option<i32>,
    /// The signal that ended it, if one did and it was our child.
    pub signal: Option<i32>,
    /// The end of what it said on its standard error.
    pub last_words: String,
}

impl Exit {
    /// The end in a few words.
    pub fn summary(&self) -> String {
        let how = match (self.code, self.signal) {
            (Some(code), _) => format!("ended with code {code}"),
            (None, Some(signal)) => format!("was ended by signal {signal}"),
            (None, None) => "ended".to_owned(),
        };
        match self.last_words.trim() {
            "" => how,
            words => format!("{how}, saying: {words}"),
        }
    }
}

/// A handle to a process; clones are the same process. Dropping it leaves the process as it is.
#[derive(Clone)]
pub struct Process {
    record: ProcessRecord,
    exited: watch::Receiver<Option<Exit>>,
    kill: Arc<dyn Fn() + Send + Sync>,
    tpm: Option<Arc<Process>>,
}

impl std::fmt::Debug for Process {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("Process").field(&self.record.pid).finish()
    }
}

impl Process {
    /// A handle to a process that `kill` takes down at once and whose end `exited` tells.
    pub fn new(
        record: ProcessRecord,
        exited: watch::Receiver<Option<Exit>>,
        kill: Arc<dyn Fn() + Send + Sync>,
    ) -> Self {
        Self { record, exited, kill, tpm: None }
    }

    /// The same with its TPM's process.
    pub fn with_tpm(mut self, tpm: Option<Self>) -> Self {
        self.tpm = tpm.map(Arc::new);
        self
    }

    /// Its TPM's process; none: it has no TPM.
    pub fn tpm(&self) -> Option<&Self> {
        self.tpm.as_deref()
    }

    /// By what it is known again.
    pub const fn record(&self) -> &ProcessRecord {
        &self.record
    }

    /// Takes it down at once, without waiting for its end.
    pub fn kill(&self) {
        (self.kill)();
    }

    /// Waits for its end.
    pub async fn exited(&self) -> Exit {
        let mut exited = self.exited.clone();
        match exited.wait_for(Option::is_some).await {
            Ok(exit) => exit.clone(),
            Err(_) => None,
        }
        .unwrap_or(Exit { code: None, signal: None, last_words: String::new() })
    }

    /// Whether it has ended.
    pub fn has_exited(&self) -> bool {
        self.exited.borrow().is_some()
    }
}

/// A QEMU that is up and greets.
#[derive(Debug)]
pub struct Launched {
    /// Its monitor.
    pub qmp: Qmp,
    /// Everything that it has said since the monitor was opened.
    pub events: Events,
    /// The process.
    pub process: Process,
}

/// A QEMU that did not come up, or a process that can't be had.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// Something around the start was refused by the system.
    #[error("QEMU can't be started: {doing} failed")]
    System {
        /// What was being done.
        doing: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It ended before it greeted.
    #[error("QEMU {}", exit.summary())]
    Died {
        /// How.
        exit: Exit,
    },
    /// Its monitor can't be spoken to.
    #[error("QEMU's monitor does not answer")]
    Monitor {
        /// Why.
        #[source]
        source: berth_qmp::QmpError,
        /// The process that lives on without it, when it was there before.
        process: Option<Process>,
    },
}

impl From<LaunchError> for Problem {
    fn from(error: LaunchError) -> Self {
        Problem::new(ProblemCode::Hypervisor, crate::durable::with_causes(&error))
    }
}

/// What the QEMU of this host can do, and with what it runs guests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hypervisor {
    /// With what it runs guests.
    pub accelerator: Accelerator,
    /// Why not with KVM, when it does not.
    pub accelerator_note: Option<String>,
    /// What it can do.
    pub abilities: QemuAbilities,
}

/// Both directions of a socket.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// Starts QEMUs and finds them again.
pub trait Launcher: Send + Sync {
    /// Starts a process and waits until its monitor greets. On an error there is no process.
    fn launch(&self, spec: LaunchSpec) -> BoxFuture<'_, Result<Launched, LaunchError>>;

    /// Finds a process that an agent before this one started; none if it has ended.
    fn adopt<'a>(
        &'a self,
        record: &'a ProcessRecord,
        run_dir: &'a std::path::Path,
    ) -> BoxFuture<'a, Result<Option<Launched>, LaunchError>>;

    /// Ends every process that a launcher of this host started, that is in none of these records, and whose guest does
    /// not run.
    fn end_unknown<'a>(&'a self, known: &'a [ProcessRecord]) -> BoxFuture<'a, ()>;

    /// Opens a connection to a socket of a VM's process.
    fn connect<'a>(
        &'a self,
        run_dir: &'a std::path::Path,
        socket: Socket,
    ) -> BoxFuture<'a, std::io::Result<Box<dyn Duplex>>>;

    /// Asks what QEMU can do here.
    fn inspect(&self) -> BoxFuture<'_, Result<Hypervisor, LaunchError>>;
}
