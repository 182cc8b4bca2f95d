//! A QEMU that is none: its monitor, its run states and its migration behave like the real one's, its guest is a counter.
//!
//! What is real is everything that the agent sees: command lines are read for nodes, memory and `-incoming`; the
//! monitor is a unix socket that takes descriptors; a migration is a valid stream through the descriptor that was given;
//! a snapshot's image is read from the file that the command line names. What is not is time (everything takes some
//! milliseconds) and size.
//!
//! Where versions of QEMU differ, the stricter one is played: a machine that was sent away while it stood still can't
//! be sent again, and a target whose stream breaks ends in half of the cases.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use berth_agent::launcher::Exit;
use berth_model::VmId;
use serde_json::{Value, json};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::chance::Chance;
use crate::fault::Faults;
use crate::oracle::{Oracle, Origin, ProcessName};

pub mod guest;

mod command;
mod disk;
mod incoming;
mod monitor;
mod outgoing;
mod ports;
mod stream;

pub use ports::Port;

use disk::Disk;
use guest::{Guest, Memory};
use outgoing::Migration;

/// What all fake QEMUs of a world share.
#[derive(Debug)]
pub struct World {
    /// Sees what runs.
    pub oracle: Oracle,
    /// What is to go wrong.
    pub faults: Faults,
    /// Draws delays and the guests' tokens.
    pub chance: Chance,
    /// How long things take.
    pub pace: Pace,
    /// How guests say that they are ready.
    pub guests: Guests,
    /// Where the machines live: they must outlive whoever started them.
    pub runtime: Handle,
}

/// How long things take.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// From a start to the guest's being ready.
    pub boot: Duration,
    /// The longest pass over memory.
    pub pass: Duration,
    /// The longest time to power down.
    pub powerdown: Duration,
    /// The most passes.
    pub passes: u64,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            boot: Duration::from_millis(30),
            pass: Duration::from_millis(15),
            powerdown: Duration::from_millis(20),
            passes: 3,
        }
    }
}

/// How guests say that they are ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guests {
    /// Half of them by the guest agent, the others by the probe.
    Speak,
    /// Not at all.
    AreMute,
}

fn ended_by_itself(code: i32, words: impl Into<String>) -> Exit {
    Exit { code: Some(code), signal: None, last_words: words.into() }
}

fn ended_by_signal(signal: i32) -> Exit {
    Exit { code: None, signal: Some(signal), last_words: String::new() }
}

/// What a machine is started with.
#[derive(Debug, Clone)]
pub struct Start {
    /// Whose it is.
    pub vm: VmId,
    /// Which process it is.
    pub process: ProcessName,
    /// The command line, without the descriptors' numbers.
    pub words: Vec<String>,
    /// The guest's memory in bytes.
    pub memory_bytes: u64,
}

/// A refusal, in QEMU's form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    class: &'static str,
    desc: String,
}

impl Refusal {
    fn new(desc: impl Into<String>) -> Self {
        Self { class: "GenericError", desc: desc.into() }
    }
}

/// QEMU's words for what a machine is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RunState {
    Prelaunch,
    InMigrate,
    Running,
    Paused,
    FinishMigrate,
    PostMigrate,
    Shutdown,
}

impl RunState {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Prelaunch => "prelaunch",
            Self::InMigrate => "inmigrate",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::FinishMigrate => "finish-migrate",
            Self::PostMigrate => "postmigrate",
            Self::Shutdown => "shutdown",
        }
    }
}

/// What a guest's ports say of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Booting,
    /// It is ready; the token says which boot.
    Ready(u64),
}

/// A machine; clones are the same one. Dropping it leaves it running, as a process is left.
#[derive(Debug, Clone)]
pub struct FakeQemu {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    start: Start,
    memory_bytes: u64,
    image: Option<PathBuf>,
    world: Arc<World>,
    machine: Mutex<Machine>,
    /// A monitor serves one client, the next when that one has gone.
    turn: tokio::sync::Mutex<()>,
    phase: watch::Sender<Phase>,
    end: watch::Sender<Option<Exit>>,
    over: CancellationToken,
}

#[derive(Debug)]
struct Machine {
    state: RunState,
    guest: Guest,
    origin: Origin,
    disk: Disk,
    migration: Migration,
    descriptors: BTreeMap<String, OwnedFd>,
    monitor: Option<mpsc::UnboundedSender<Vec<u8>>>,
    hangs: bool,
    ended: bool,
}

impl FakeQemu {
    /// Starts a machine; its guest stands still.
    ///
    /// # Errors
    /// What it says on its standard error when it ends at once.
    pub fn start(start: Start, world: Arc<World>) -> Result<Self, String> {
        if let Some(words) = world.faults.at_start(&start.vm) {
            world.oracle.note(&start.vm, format!("{} dies at its start", start.process));
            return Err(words);
        }
        if !start.words.iter().any(|word| word == "-S") {
            world.oracle.wrong(&start.vm, format!("{} was started without -S", start.process));
        }
        let disk = Disk::open(&start.words).map_err(|words| format!("qemu-system-x86_64: {words}"))?;
        let image = image_of(&start.words);
        if let Some(path) = image.as_ref().filter(|path| !path.exists()) {
            return Err(format!("can't open backing store {} for guest RAM", path.display()));
        }
        let incoming = start.words.iter().any(|word| word == "-incoming");
        world.oracle.note(
            &start.vm,
            format!("{} started (incoming: {incoming}, image: {})", start.process, image.is_some()),
        );
        let boot = Memory { token: world.chance.next(), ticks: 0, ready: false };
        let machine = Machine {
            state: if incoming { RunState::InMigrate } else { RunState::Prelaunch },
            guest: Guest::new(boot),
            origin: Origin::Boot,
            disk,
            migration: Migration::default(),
            descriptors: BTreeMap::new(),
            monitor: None,
            hangs: false,
            ended: false,
        };
        let shared = Shared {
            memory_bytes: start.memory_bytes,
            image,
            start,
            world,
            machine: Mutex::new(machine),
            turn: tokio::sync::Mutex::new(()),
            phase: watch::Sender::new(Phase::Booting),
            end: watch::Sender::new(None),
            over: CancellationToken::new(),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Opens a connection to its monitor.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn open_monitor(&self) -> std::io::Result<std::os::unix::net::UnixStream> {
        monitor::open(&self.shared)
    }

    /// Opens a connection to one of its other sockets.
    pub fn open_port(&self, port: Port) -> tokio::io::DuplexStream {
        ports::open(&self.shared, port)
    }

    /// Ends it as the kernel would.
    pub fn kill(&self) {
        self.shared.end(ended_by_signal(9));
    }

    /// How it ended, once it has.
    pub fn ended(&self) -> watch::Receiver<Option<Exit>> {
        self.shared.end.subscribe()
    }

    /// Which process it is.
    pub fn process(&self) -> &ProcessName {
        &self.shared.start.process
    }

    /// Whose it is.
    pub fn vm(&self) -> &VmId {
        &self.shared.start.vm
    }

    /// Whether it obeys no more.
    pub fn hangs(&self) -> bool {
        self.shared.lock().hangs
    }

    /// What its guest remembers now.
    pub fn memory(&self) -> Memory {
        self.shared.lock().guest.memory()
    }

    /// Closes what it shares with a process that has died: the streams of its migrations.
    pub fn peer_died(&self) {
        self.shared.lock().migration.sever();
    }
}

fn image_of(words: &[String]) -> Option<PathBuf> {
    let backend = words.iter().find(|word| word.starts_with("memory-backend-file,"))?;
    backend.split(',').find_map(|option| option.strip_prefix("mem-path=")).map(PathBuf::from)
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    const fn vm(&self) -> &VmId {
        &self.start.vm
    }

    fn oracle(&self) -> &Oracle {
        &self.world.oracle
    }

    /// The guest goes on.
    fn resume(self: &Arc<Self>, machine: &mut Machine) {
        if machine.guest.runs() || machine.ended {
            return;
        }
        let (memory, found) = (machine.guest.memory(), machine.disk.look());
        self.oracle().resumes(self.vm(), &self.start.process, memory, machine.origin, &found);
        if machine.origin == Origin::Boot {
            self.boot(memory.token);
        }
        machine.origin = Origin::Before;
        machine.state = RunState::Running;
        machine.guest.resume();
        machine.event("RESUME", &json!({}));
    }

    /// The guest stands still from now on, and its disk is flushed.
    fn hold(&self, machine: &mut Machine, state: RunState) {
        if machine.guest.runs() && !machine.ended {
            let memory = machine.guest.pause();
            self.flush(machine, memory);
            self.oracle().stands(self.vm(), &self.start.process, memory);
            machine.event("STOP", &json!({}));
        }
        machine.state = state;
    }

    fn flush(&self, machine: &Machine, memory: Memory) {
        match machine.disk.flush(memory) {
            Ok(Some(layer)) => self.oracle().wrote(self.vm(), &layer, memory),
            Ok(None) => {}
            Err(wrong) => self.oracle().wrong(self.vm(), format!("{}: {wrong}", self.start.process)),
        }
    }

    /// The guest comes up in its own time.
    fn boot(self: &Arc<Self>, token: u64) {
        self.phase.send_replace(Phase::Booting);
        if self.world.guests == Guests::AreMute {
            return;
        }
        let shared = Arc::clone(self);
        self.world.runtime.spawn(async move {
            tokio::time::sleep(shared.world.pace.boot).await;
            let mut machine = shared.lock();
            if machine.guest.memory().token == token && !machine.ended {
                machine.guest.set_ready();
                shared.phase.send_replace(Phase::Ready(token));
            }
        });
    }

    /// The guest powers itself down, if it runs.
    fn power_down(self: &Arc<Self>) {
        let shared = Arc::clone(self);
        self.world.runtime.spawn(async move {
            tokio::time::sleep(shared.world.chance.up_to(shared.world.pace.powerdown)).await;
            let mut machine = shared.lock();
            if machine.guest.runs() {
                shared.leave(&mut machine, true, "guest-shutdown");
                drop(machine);
                shared.end(ended_by_itself(0, ""));
            }
        });
    }

    /// The last words of a machine that ends in order.
    fn leave(&self, machine: &mut Machine, guest: bool, reason: &str) {
        machine.event("SHUTDOWN", &json!({"guest": guest, "reason": reason}));
        if machine.guest.runs() {
            let memory = machine.guest.pause();
            self.flush(machine, memory);
            self.oracle().stands(self.vm(), &self.start.process, memory);
        }
        machine.state = RunState::Shutdown;
    }

    /// It is no more.
    fn end(&self, end: Exit) {
        let mut machine = self.lock();
        if machine.ended {
            return;
        }
        machine.ended = true;
        machine.guest.pause();
        let how = match (end.code, end.signal) {
            (Some(code), _) => format!("code {code} {}", end.last_words),
            (None, _) => "killed".to_owned(),
        };
        self.oracle().ended(self.vm(), &self.start.process, &how);
        machine.monitor = None;
        machine.descriptors.clear();
        machine.migration.sever();
        drop(machine);
        self.over.cancel();
        self.end.send_replace(Some(end));
    }
}

impl Machine {
    /// Says something to whoever is at the monitor.
    fn event(&self, name: &str, data: &Value) {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let timestamp = json!({"seconds": now.as_secs(), "microseconds": now.subsec_micros()});
        self.say(&json!({"event": name, "data": data, "timestamp": timestamp}));
    }

    fn say(&self, message: &Value) {
        if let Some(monitor) = &self.monitor {
            // Whoever was there may just have gone.
            let _ = monitor.send(format!("{message}\r\n").into_bytes());
        }
    }
}

#[cfg(test)]
mod tests;
