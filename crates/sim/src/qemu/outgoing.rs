//! Sending the machine: passes over memory while the guest runs, its pause, and what is left.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::command::text;
use super::{Machine, Refusal, RunState, Shared, stream};

/// What there is to be switched; others are refused, as by a version that does not know them.
const CAPABILITIES: [&str; 8] = [
    "auto-converge",
    "background-snapshot",
    "events",
    "late-block-activate",
    "pause-before-switchover",
    "postcopy-ram",
    "return-path",
    "xbzrle",
];
/// How long after a failure the guest goes on.
const GOES_ON_AFTER: Duration = Duration::from_millis(5);

/// Where a migration stands, either way.
#[derive(Debug, Default)]
pub(super) struct Migration {
    pub(super) status: Option<&'static str>,
    on: BTreeMap<String, bool>,
    pass: u64,
    error: Option<String>,
    go_on: Arc<Notify>,
    cancel: Option<CancellationToken>,
    /// A second handle to the stream, to break it with.
    stream: Option<OwnedFd>,
    /// Whether the guest is to be let run as soon as it is loaded.
    pub(super) run_when_loaded: bool,
}

impl Migration {
    pub(super) fn is(&self, capability: &str) -> bool {
        self.on.get(capability).copied().unwrap_or(false)
    }

    pub(super) fn is_under_way(&self) -> bool {
        matches!(self.status, Some("setup" | "active" | "pre-switchover" | "device" | "cancelling"))
    }

    /// Makes it known by which stream it goes.
    pub(super) fn opens(&mut self, stream: &StdUnixStream) -> io::Result<()> {
        self.stream = Some(stream.try_clone()?.into());
        Ok(())
    }

    /// Breaks the stream.
    pub(super) fn sever(&mut self) {
        if let Some(stream) = self.stream.take() {
            // One that is closed already needs no breaking.
            let _ = rustix::net::shutdown(&stream, rustix::net::Shutdown::Both);
        }
    }

    pub(super) fn closes(&mut self) {
        self.stream = None;
    }

    pub(super) fn cancel(&self) {
        if self.is_under_way()
            && let Some(cancel) = &self.cancel
        {
            cancel.cancel();
        }
    }

    pub(super) fn go_on(&self, arguments: &Value) -> Result<Value, Refusal> {
        let expected = text(arguments, "state");
        match self.status {
            Some("pre-switchover") if expected == "pre-switchover" => {
                self.go_on.notify_one();
                Ok(json!({}))
            }
            status => {
                Err(Refusal::new(format!("Migration not in expected state: {}", status.unwrap_or("none"))))
            }
        }
    }

    pub(super) fn set_capabilities(&mut self, arguments: &Value) -> Result<Value, Refusal> {
        if self.is_under_way() {
            return Err(Refusal::new("There's a migration process in progress"));
        }
        let wanted = arguments["capabilities"].as_array().cloned().unwrap_or_default();
        if let Some(strange) = wanted.iter().find(|one| !CAPABILITIES.contains(&text(one, "capability"))) {
            let name = text(strange, "capability");
            return Err(Refusal::new(format!("Parameter 'capability' does not accept value '{name}'")));
        }
        for one in wanted {
            let on = one["state"].as_bool().unwrap_or(false);
            self.on.insert(text(&one, "capability").to_owned(), on);
        }
        Ok(json!({}))
    }

    pub(super) fn capabilities(&self) -> Value {
        CAPABILITIES.iter().map(|name| json!({"capability": name, "state": self.is(name)})).collect()
    }

    pub(super) fn describe(&self, memory_bytes: u64) -> Value {
        let Some(status) = self.status else { return json!({}) };
        let mut described = json!({"status": status, "total-time": 10, "ram": {
            "transferred": self.pass * 16_384, "remaining": 4096, "total": memory_bytes, "duplicate": 1,
            "normal": self.pass * 4, "dirty-pages-rate": 4, "dirty-sync-count": self.pass, "mbps": 1000.0,
            "page-size": 4096, "pages-per-second": 400, "postcopy-requests": 0,
        }});
        if let Some(error) = &self.error {
            described["error-desc"] = error.clone().into();
        }
        described
    }

    fn begins(&mut self) -> (CancellationToken, Arc<Notify>) {
        let cancel = CancellationToken::new();
        self.cancel = Some(cancel.clone());
        // A go-ahead that an earlier one did not use is not for this one.
        self.go_on = Arc::default();
        (self.pass, self.error) = (0, None);
        (cancel, Arc::clone(&self.go_on))
    }
}

impl Machine {
    /// The migration is at another point, and says so where that is wanted.
    pub(super) fn migration_is(&mut self, status: &'static str) {
        self.migration.status = Some(status);
        if self.migration.is("events") {
            self.event("MIGRATION", &json!({"status": status}));
        }
    }

    pub(super) fn migration_failed(&mut self, error: String) {
        self.migration.error = Some(error);
        self.migration_is("failed");
    }

    /// The stream that a URI names.
    pub(super) fn stream_of(&mut self, arguments: &Value) -> Result<StdUnixStream, Refusal> {
        let uri = text(arguments, "uri");
        let Some(name) = uri.strip_prefix("fd:") else {
            return Err(Refusal::new(format!("unknown migration protocol: {uri}")));
        };
        let Some(descriptor) = self.descriptors.remove(name) else {
            return Err(Refusal::new(format!("File descriptor named '{name}' has not been found")));
        };
        let stream = StdUnixStream::from(descriptor);
        let registered = stream.set_nonblocking(true).and_then(|()| self.migration.opens(&stream));
        registered.map_err(|error| Refusal::new(error.to_string()))?;
        Ok(stream)
    }
}

/// `migrate`.
pub(super) fn begin(
    shared: &Arc<Shared>,
    machine: &mut Machine,
    arguments: &Value,
) -> Result<Value, Refusal> {
    if machine.migration.is_under_way() {
        return Err(Refusal::new("There's a migration process in progress"));
    }
    match machine.state {
        RunState::InMigrate => return Err(Refusal::new("Guest is waiting for an incoming migration")),
        RunState::PostMigrate => {
            return Err(Refusal::new("Can't migrate the vm that was paused due to previous migration"));
        }
        _ => {}
    }
    let stream = machine.stream_of(arguments)?;
    let (cancel, go_on) = machine.migration.begins();
    machine.migration_is("setup");
    let shared = Arc::clone(shared);
    let runtime = shared.world.runtime.clone();
    runtime
        .spawn(async move { Sender { shared, go_on, ran: false, before: None }.run(stream, cancel).await });
    Ok(json!({}))
}

struct Sender {
    shared: Arc<Shared>,
    go_on: Arc<Notify>,
    /// The guest ran when it was held.
    ran: bool,
    /// What it was doing before it was held.
    before: Option<RunState>,
}

enum Broken {
    Cancelled,
    Stream(io::Error),
}

impl Sender {
    async fn run(mut self, stream: StdUnixStream, cancel: CancellationToken) {
        let over = self.shared.over.clone();
        let sent = match UnixStream::from_std(stream) {
            Ok(stream) => tokio::select! {
                biased;
                () = over.cancelled() => return,
                () = cancel.cancelled() => Err(Broken::Cancelled),
                sent = self.send(stream) => sent.map_err(Broken::Stream),
            },
            Err(error) => Err(Broken::Stream(error)),
        };
        self.conclude(sent).await;
    }

    async fn send(&mut self, mut stream: UnixStream) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let (chance, pace) = (&shared.world.chance, shared.world.pace);
        shared.lock().migration_is("active");
        stream.write_all(&stream::head(shared.memory_bytes)).await?;
        for pass in 1..=1 + chance.below(pace.passes.max(1)) {
            let part = {
                let mut machine = shared.lock();
                machine.migration.pass = pass;
                if machine.migration.is("events") {
                    machine.event("MIGRATION_PASS", &json!({"pass": pass}));
                }
                stream::part(machine.guest.memory())
            };
            stream.write_all(&part).await?;
            tokio::time::sleep(chance.up_to(pace.pass)).await;
        }
        if self.switch_over() {
            self.go_on.notified().await;
            shared.lock().migration_is("device");
        }
        let guest = shared.lock().guest.memory();
        stream.write_all(&stream::end(guest)).await?;
        if shared.lock().migration.is("return-path") {
            let mut answer = [0; stream::SHUT.len()];
            stream.read_exact(&mut answer).await?;
            if answer != stream::SHUT {
                return Err(io::Error::other("the target reports an error"));
            }
        }
        Ok(())
    }

    /// Holds the guest. Gives whether somebody wants to be asked before it goes on.
    fn switch_over(&mut self) -> bool {
        let shared = &self.shared;
        let mut machine = shared.lock();
        self.ran = machine.guest.runs();
        self.before = Some(machine.state);
        shared.hold(&mut machine, RunState::FinishMigrate);
        let asks = machine.migration.is("pause-before-switchover");
        if asks {
            machine.migration_is("pre-switchover");
        }
        asks
    }

    async fn conclude(self, sent: Result<(), Broken>) {
        {
            let mut machine = self.shared.lock();
            if machine.ended {
                return;
            }
            machine.migration.closes();
            match sent {
                Ok(()) => {
                    machine.state = RunState::PostMigrate;
                    machine.migration_is("completed");
                    return;
                }
                Err(Broken::Cancelled) => {
                    machine.migration_is("cancelling");
                    self.bring_back(&mut machine);
                    machine.migration_is("cancelled");
                    return;
                }
                Err(Broken::Stream(error)) => {
                    machine.migration_failed(format!("Unable to write to socket: {error}"));
                }
            }
        }
        // The guest goes on by itself, but not in the same instant.
        tokio::time::sleep(GOES_ON_AFTER).await;
        let mut machine = self.shared.lock();
        self.bring_back(&mut machine);
    }

    fn bring_back(&self, machine: &mut Machine) {
        if machine.state != RunState::FinishMigrate {
            return;
        }
        if let Some(before) = self.before {
            machine.state = before;
        }
        if self.ran {
            self.shared.resume(machine);
        }
    }
}
