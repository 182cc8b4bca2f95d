//! The target's side of a migration: [`run`] is the list of phases.
//!
//! **What is left behind.** Whatever fails before everything is loaded: nothing, neither process nor file. After it, the
//! loaded process stays, guest not running and disks untouched, and does nothing until the source says `Commit` or the
//! manager decides, for the source may have given the VM away with a word that was lost. Once the guest was told to run,
//! the VM is this host's, whatever becomes of its process ([`arrival`]).

use std::time::Duration;

use berth_api::agent::{MigrationSide, PutBack, VmDefinition};
use berth_model::{HostId, OperationId, Problem, ProblemCode};
use berth_qmp::commands::AnnounceSelf;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::arrival::{self, NotRunning};
use super::incoming::{Incoming, Origin, lift_limits};
use super::link::{self, Link, Sender};
use super::marker::{Mark, Marker};
use super::put_back;
use super::storage::receiving::Files;
use super::wire::{FromSource, FromTarget, VERSION, WireError};
use crate::disks::{self, Disks};
use crate::durable::{self, blocking};
use crate::fittings::Fittings;
use crate::layout::VmRecord;
use crate::nvram::{self, Encoded, Place};
use crate::snapshot::layers;
use crate::vm::actor::Receive;
use crate::vm::{LaunchPlan, Memory, VmRuntime, files};

/// How long the source may be silent while nothing is under way that takes long.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(600);
/// How long the source may take to write down that it gives the VM away.
pub(super) const COMMIT_TIMEOUT: Duration = Duration::from_secs(30);

/// What the manager said of a VM that is to come: kept on the disk, for it must outlive the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Admission {
    /// The migration.
    pub migration: OperationId,
    /// From where it comes.
    pub source: HostId,
    /// Both hosts see the VM's directory.
    pub shared_pool: bool,
    /// The VM.
    pub definition: VmDefinition,
    /// What it is put back to here; none: it goes on where it is.
    #[serde(default)]
    pub put_back: Option<PutBack>,
}

impl Admission {
    /// The admission that a VM has here, if it has one.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn read(vm: &VmRuntime) -> Result<Option<Self>, Problem> {
        Ok(durable::read_json(&vm.dirs()?.state.join("admission.json"))?)
    }

    /// Writes it down.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn write(&self, vm: &VmRuntime) -> Result<(), Problem> {
        Ok(durable::write_json(&vm.dirs()?.state.join("admission.json"), self)?)
    }
}

/// Takes a VM in over a connection of its source's agent.
///
/// # Errors
/// What went wrong, if anything did before all was loaded; nothing is then left.
pub async fn receive(vm: &mut VmRuntime, receive: Receive) -> Result<(), Problem> {
    let Receive { migration, peer, connection, decided } = receive;
    let admission = admitted(vm, &migration, &peer)?;
    match arrival::mark(vm).await? {
        Mark::Clear => {}
        // The source has the VM, since it sends it: what came before the machine went down never ran.
        Mark::Lost => arrival::remove(vm, admission.shared_pool).await?,
        Mark::Set => return Err(received_before(vm, &migration)),
    }
    let files = Files::start(vm.dirs()?.clone(), vm.services().user_id(admission.definition.number));
    let mut link = Link::open(link::tuned(connection), files.clone());
    let result = run(vm, &admission, &mut link, &files, &decided).await;
    match result {
        Ok(()) => Ok(()),
        Err(Failure { problem, loaded: true }) => {
            // Whether it is ours now the manager must say. (An agent that dies here finds out by asking QEMU.)
            vm.set_migration(Some(MigrationSide::Target { migration, loaded: true })).await?;
            tracing::warn!(vm = %vm.id(), %problem, "loaded, and not told to run");
            Err(problem)
        }
        Err(Failure { problem, loaded: false }) => {
            // If the connection is what broke, the source knows.
            let (host, pool) = (&vm.services().config.name, admission.definition.spec.pool.as_str());
            let problem = problem.of_host(host.as_str(), Some(pool));
            let _ = link.sender.say(&FromTarget::Failed { problem: problem.clone() }).await;
            link.sender.close().await;
            drop((link, files));
            arrival::remove(vm, admission.shared_pool).await?;
            Err(problem)
        }
    }
}

struct Failure {
    problem: Problem,
    loaded: bool,
}

impl<E: Into<Problem>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self { problem: error.into(), loaded: false }
    }
}

/// The phases, in order.
async fn run(
    vm: &mut VmRuntime,
    admission: &Admission,
    link: &mut Link<FromSource>,
    files: &Files,
    decided: &CancellationToken,
) -> Result<(), Failure> {
    welcome(vm, admission, link, decided).await?;
    if !admission.shared_pool {
        files::make_directories(vm.services(), vm.dirs()?, &admission.definition).await?;
    }
    let launch = take_files(link, files, decided).await?;
    let (disks, fittings, nvram) = match (launch, &admission.put_back) {
        (Some(launch), None) => launch,
        (None, Some(wanted)) => {
            // Boxed, as whatever makes a machine ready is: together they are more than a thread's stack holds.
            return Ok(Box::pin(put_back::arrive(vm, admission, wanted, link, decided)).await?);
        }
        (Some(_), Some(_)) => return Err(not_as_admitted("it is to be put back to a snapshot here").into()),
        (None, None) => return Err(not_as_admitted("it is to go on where it is").into()),
    };
    let record = VmRecord::new(admission.definition.clone(), disks, fittings);
    if !admission.shared_pool {
        make_nvram(vm, &record, &nvram).await?;
    }
    let mut incoming = start_process(vm, admission, record, link, files).await?;
    let marker = arrival::prepare(vm).await?;
    link.sender.say(&FromTarget::Waiting).await?;
    load(&mut incoming, admission.shared_pool, link, files, decided).await?;
    link.sender.say(&FromTarget::Loaded).await?;
    let after_load = |problem| Failure { problem, loaded: true };
    match next(link, decided, COMMIT_TIMEOUT).await.map_err(after_load)? {
        FromSource::Commit => {}
        // The source has failed after all, and runs on.
        FromSource::Failed { problem } => return Err(problem.into()),
        other => return Err(after_load(unexpected(&other, "a commit"))),
    }
    commit(vm, marker, &mut incoming, link).await.map_err(after_load)
}

/// Lets the guest run: the VM is this host's from then on.
async fn commit(
    vm: &mut VmRuntime,
    marker: Marker,
    incoming: &mut Incoming,
    link: &Link<FromSource>,
) -> Result<(), Problem> {
    // Whether the source still hears of it changes nothing.
    match arrival::let_run(marker, incoming.run()).await {
        Ok(running) => {
            let _ = link.sender.say(&FromTarget::Running { at_us: running.epoch_us() }).await;
        }
        Err(NotRunning::Never(problem)) => return Err(problem),
        Err(NotRunning::Perhaps(problem)) => {
            may_run(vm, link, problem).await;
        }
    }
    settle_in(vm).await
}

/// The guest was told to run, and it is not known whether it does: the VM is this host's, with what there is of it.
pub(super) async fn may_run(vm: &VmRuntime, link: &Link<FromSource>, problem: Problem) {
    tracing::error!(vm = %vm.id(), %problem, "it was told to run, and did not say that it does");
    // Whether the source still hears of it changes nothing.
    let _ = link.sender.say(&FromTarget::Failed { problem }).await;
    vm.status().process_rests();
}

/// The VM is this host's: the migration is over, and the network is told where it is.
pub async fn settle_in(vm: &mut VmRuntime) -> Result<(), Problem> {
    let announce = AnnounceSelf { initial_ms: 20, max_ms: 500, rounds: 4, step_ms: 100 };
    if let Ok(qmp) = vm.qmp()
        && let Err(error) = qmp.call(announce).await
    {
        tracing::warn!(vm = %vm.id(), %error, "the network is not told where the guest is");
    }
    vm.set_migration(None).await?;
    let admission = vm.dirs()?.state.join("admission.json");
    blocking(move || Ok(durable::remove_file(&admission)?)).await?;
    arrival::forget(vm).await
}

fn admitted(vm: &VmRuntime, migration: &OperationId, peer: &HostId) -> Result<Admission, Problem> {
    let refused = |message: String| Problem::new(ProblemCode::WrongState, message);
    let none = || refused(format!("no VM is expected in migration {migration}"));
    if !vm.is_known() {
        return Err(none());
    }
    let admission =
        Admission::read(vm)?.filter(|admission| admission.migration == *migration).ok_or_else(none)?;
    if admission.source != *peer {
        let message = format!("{} is expected from {}, not from {peer}", vm.id(), admission.source);
        return Err(Problem::new(ProblemCode::NotAllowed, message));
    }
    match &vm.host_record()?.migration {
        Some(MigrationSide::Target { loaded: false, migration: of }) if of == migration => {}
        _ => return Err(received_before(vm, migration)),
    }
    if vm.process().is_some() {
        return Err(vm.wrong_state("a VM without a process"));
    }
    Ok(admission)
}

fn received_before(vm: &VmRuntime, migration: &OperationId) -> Problem {
    let message = format!("{} has been received in migration {migration} before", vm.id());
    Problem::new(ProblemCode::WrongState, message)
}

/// Both sides must speak of the same thing.
async fn welcome(
    vm: &VmRuntime,
    admission: &Admission,
    link: &mut Link<FromSource>,
    decided: &CancellationToken,
) -> Result<(), Problem> {
    let first = next(link, decided, COMMIT_TIMEOUT).await?;
    let FromSource::Begin { version, shared_pool, pool_uuid } = first else {
        return Err(unexpected(&first, "a beginning"));
    };
    if version != VERSION {
        let message =
            format!("the source speaks version {version} of the migration protocol, this host {VERSION}");
        return Err(Problem::new(ProblemCode::WrongState, message));
    }
    let pool = &vm.dirs()?.pool.name;
    let same = vm.services().pool_facts(pool).is_some_and(|facts| facts.uuid == pool_uuid);
    if shared_pool != admission.shared_pool || same != shared_pool {
        let word = |shared| if shared { "shared" } else { "not shared" };
        let message = format!(
            "pool '{pool}' is {} by what it says of itself, {} by the source and {} by the manager",
            word(same),
            word(shared_pool),
            word(admission.shared_pool)
        );
        return Err(Problem::new(ProblemCode::WrongState, message));
    }
    Ok(link.sender.say(&FromTarget::Welcome { version: VERSION }).await?)
}

fn not_as_admitted(expected: &str) -> Problem {
    let message = format!("the source sends the VM otherwise than the manager said: {expected}");
    Problem::new(ProblemCode::WrongState, message)
}

/// Takes what does not change, until the source asks for a process; gives the disks' layers, what the machine is fitted
/// with, and what it remembers beside its disk. None: the VM is to be put back to a snapshot, which has come.
async fn take_files(
    link: &mut Link<FromSource>,
    files: &Files,
    decided: &CancellationToken,
) -> Result<Option<(Disks, Fittings, Encoded)>, Problem> {
    loop {
        match next(link, decided, SILENCE_TIMEOUT).await? {
            FromSource::Ping { number } => pong(&link.sender, number).await?,
            FromSource::Offer { files: offers } => {
                let checksums = files.offer(offers).await?;
                link.sender.say(&FromTarget::Have { checksums }).await?;
            }
            FromSource::Sync { top_lengths_bytes } => {
                files.sync(top_lengths_bytes).await?;
                link.sender.say(&FromTarget::Synced).await?;
            }
            FromSource::Launch { chain, data, fittings, nvram } => {
                return Ok(Some((Disks::new(chain, data), fittings, nvram)));
            }
            FromSource::PutBack => return Ok(None),
            FromSource::Failed { problem } => return Err(problem),
            other => return Err(unexpected(&other, "files")),
        }
    }
}

/// A process that waits, guest not running. With a pool of our own the writable tops are made anew, empty: they are written
/// over while the process has them open, which looks at them again before the guest runs.
async fn start_process(
    vm: &mut VmRuntime,
    admission: &Admission,
    record: VmRecord,
    link: &mut Link<FromSource>,
    files: &Files,
) -> Result<Incoming, Problem> {
    let (disks, fittings) = (record.disks(), record.fittings.clone());
    check_disks(&disks, &record.definition)?;
    vm.set_vm_record(record).await?;
    if !admission.shared_pool {
        make_tops(vm, &disks).await?;
        files.expect_tops(layers::top_files(vm.dirs()?, &disks)).await?;
    }
    let plan = LaunchPlan { disks, memory: Memory::Anonymous, fittings, incoming: true };
    let launched = vm.launch(&plan).await?;
    vm.install(launched).await?;
    let qmp = vm.qmp()?;
    lift_limits(qmp).await.map_err(layers::refused)?;
    let (incoming, stream) = Incoming::start(qmp, Origin::Machine).await?;
    let (read, write) = link::halves(stream)?;
    link.messages.deliver_stream(write);
    link.sender.send_answers(read);
    Ok(incoming)
}

/// What the machine remembers beside its disk, as it was a moment ago: the stream has what it is in the end.
async fn make_nvram(vm: &VmRuntime, record: &VmRecord, nvram: &Encoded) -> Result<(), Problem> {
    let Some(id) = record.fittings.nvram.clone() else { return Ok(()) };
    let contents = nvram::decode(nvram)?;
    let owner = vm.services().user_id(record.definition.number);
    let place = Place { dirs: vm.dirs()?.clone(), owner };
    blocking(move || {
        place.make(&id, &contents)?;
        Ok(nvram::sync(&place.dirs, &id)?)
    })
    .await
}

/// The source must name as many disks as the manager did, and no layer twice.
fn check_disks(disks: &Disks, definition: &VmDefinition) -> Result<(), Problem> {
    if disks::are_of(disks, definition) {
        return Ok(());
    }
    let message = format!(
        "the source named layers of {} disks, or some twice or none, expected those of {}",
        disks.count(),
        disks::count(definition)
    );
    Err(Problem::new(ProblemCode::InvalidInput, message))
}

async fn make_tops(vm: &VmRuntime, disks: &Disks) -> Result<(), Problem> {
    let dirs = vm.dirs()?;
    if disks.clone().frozen().layers().any(|layer| !dirs.layer(layer).exists()) {
        return Err(Problem::new(ProblemCode::InvalidInput, "the source named layers that it did not send"));
    }
    for (disk, chain) in disks.each().enumerate() {
        let Some((top, below)) = chain.split_last() else { continue };
        crate::disk::create_layer(vm, disk, top, below.last()).await?;
    }
    Ok(())
}

/// The stream goes into QEMU and the tops' changes onto the disk, until both are through.
async fn load(
    incoming: &mut Incoming,
    mut synced: bool,
    link: &mut Link<FromSource>,
    files: &Files,
    decided: &CancellationToken,
) -> Result<(), Problem> {
    let mut loaded = false;
    while !(loaded && synced) {
        let message = tokio::select! {
            result = incoming.until_loaded(), if !loaded => {
                result?;
                loaded = true;
                continue;
            }
            message = link.messages.next() => message?,
            () = decided.cancelled() => return Err(was_decided()),
        };
        match message {
            // The only one after a process was asked for: the guest has stopped and the tops are as they will be.
            FromSource::Sync { top_lengths_bytes } => {
                files.sync(top_lengths_bytes).await?;
                link.sender.say(&FromTarget::Synced).await?;
                synced = true;
            }
            FromSource::Failed { problem } => return Err(problem),
            other => return Err(unexpected(&other, "the stream")),
        }
    }
    Ok(())
}

async fn pong(sender: &Sender, number: u32) -> Result<(), Problem> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let at_us = u64::try_from(now.as_micros()).unwrap_or(u64::MAX);
    Ok(sender.say(&FromTarget::Pong { number, at_us }).await?)
}

pub(super) async fn next(
    link: &mut Link<FromSource>,
    decided: &CancellationToken,
    timeout: Duration,
) -> Result<FromSource, Problem> {
    tokio::select! {
        biased;
        () = decided.cancelled() => Err(was_decided()),
        message = tokio::time::timeout(timeout, link.messages.next()) => match message {
            Ok(message) => Ok(message?),
            Err(_) => {
                let message = format!("the source said nothing for {} s", timeout.as_secs());
                Err(Problem::new(ProblemCode::Unreachable, message))
            }
        },
    }
}

fn was_decided() -> Problem {
    Problem::new(ProblemCode::Cancelled, "the manager has decided the migration otherwise")
}

pub(super) fn unexpected(message: &FromSource, expected: &'static str) -> Problem {
    WireError::Unexpected { what: format!("{message:?}"), expected }.into()
}
