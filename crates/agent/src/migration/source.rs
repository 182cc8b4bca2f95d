//! The source's side of a migration: [`run`] is the list of phases.
//!
//! **Where the guest runs.** Whatever fails before [`hand_over`] has written its marker, here, as before. After it, not
//! here: if the target's word that the guest runs there does not come, the process is kept as it is, stopped, until
//! the manager has found out.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use berth_api::agent::{MigrationPath, MigrationSide, TaskOutput, TaskSpec};
use berth_model::migration::{MigrationEvent, MigrationPhase, MigrationReport};
use berth_model::vm::{VmEvent, VmState};
use berth_model::{HostId, LayerId, OperationId, Problem, ProblemCode};
use tokio_util::sync::CancellationToken;

use super::convergence::PauseBudget;
use super::journey::Journey;
use super::link::{self, Link, Messages, NoFiles};
use super::marker::{self, Deed, Marker};
use super::outgoing::{Outgoing, Sending, settle};
use super::put_back;
use super::storage::copying::copy_unchanging;
use super::storage::sending::Tops;
use super::wire::{FromSource, FromTarget, VERSION, WireError};
use crate::durable::blocking;
use crate::layout::VmRecord;
use crate::nvram;
use crate::snapshot::{capture, identity, layers};
use crate::task::TaskContext;
use crate::vm::VmRuntime;

/// How often the clocks are compared: the quickest exchange counts.
const PINGS: u32 = 8;
/// How long the target may take for things that are quick.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long it may take to bring what it was sent to its disk, or to start a process.
pub(super) const SLOW_ANSWER_TIMEOUT: Duration = Duration::from_secs(600);
/// How long the target may take to say why its QEMU failed.
const REASON_TIMEOUT: Duration = Duration::from_millis(500);
/// How long the target may be silent after it was told to let the guest run, before its answer is given up.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(15);
/// Time between two passes over the tops during the warm-up.
const TOP_PASS_EVERY: Duration = Duration::from_millis(400);

/// What the manager asked for.
pub struct Order {
    /// The migration.
    pub migration: OperationId,
    /// Where to.
    pub target: HostId,
    /// That host's address.
    pub address: String,
    /// Both hosts see the VM's directory.
    pub shared_pool: bool,
    /// Most bytes a second to send; none: as the link takes.
    pub bandwidth_bytes_per_second: Option<u64>,
    /// Ids for layers that have to be frozen on the way.
    pub spare_layers: Vec<LayerId>,
    /// It is put back to a snapshot there.
    pub put_back: bool,
}

impl Order {
    fn of(spec: &TaskSpec) -> Option<Self> {
        let TaskSpec::MoveVm {
            migration,
            target,
            target_address,
            shared_pool,
            bandwidth_bytes_per_second,
            spare_layers,
            put_back,
        } = spec
        else {
            return None;
        };
        Some(Self {
            migration: migration.clone(),
            target: target.clone(),
            address: target_address.clone(),
            shared_pool: *shared_pool,
            bandwidth_bytes_per_second: *bandwidth_bytes_per_second,
            spare_layers: spare_layers.clone(),
            put_back: *put_back,
        })
    }
}

/// Moves the VM to another host.
///
/// # Errors
/// Whatever fails before the VM was given away; it then runs here as before.
pub async fn move_away(vm: &mut VmRuntime, context: &TaskContext) -> Result<TaskOutput, Problem> {
    let order = Order::of(&context.put().spec)
        .ok_or_else(|| Problem::new(ProblemCode::Internal, "a task that moves nothing"))?;
    let side = vm.host_record()?.migration.clone();
    if let Some(MigrationSide::Source { migration, handed_over: true, .. }) = side {
        // Run again after the agent died: what happened to the VM only the target can tell.
        return given_away(vm, &order, &migration);
    }
    let held = !vm.status().runs();
    if !order.put_back {
        if held {
            return Err(vm.wrong_state("a running VM"));
        }
        vm.qmp()?;
        identity::check_may_move(vm)?;
    }
    let side = MigrationSide::Source { migration: order.migration.clone(), handed_over: false, held };
    vm.set_migration(Some(side)).await?;
    let mut journey = Journey::new();
    let result = if order.put_back {
        Box::pin(put_back::leave(vm, context, &order, &mut journey)).await
    } else {
        vm.status().apply(VmEvent::MigrationBegun);
        run(vm, context, &order, &mut journey).await
    };
    let result = match result {
        Ok(output) => Ok(output),
        Err(problem) => Err(give_up(vm, problem).await),
    };
    if vm.status().state() == VmState::Migrating {
        vm.status().apply(VmEvent::MigrationOver);
    }
    result
}

/// The phases, in order.
async fn run(
    vm: &mut VmRuntime,
    context: &TaskContext,
    order: &Order,
    journey: &mut Journey,
) -> Result<TaskOutput, Problem> {
    let mut link = begin(vm, context, order, journey).await?;
    let mut tops = launch_target(vm, order, &mut link).await?;
    let marker = prepare_marker(vm).await?;
    let mut outgoing = start_sending(vm, order, &mut link).await?;
    let writable = layers::top_files(vm.dirs()?, &vm.disks()?);
    let stopped = warm_up(&mut outgoing, context, &mut link, tops.as_mut(), &writable).await;
    journey.step(MigrationEvent::GuestStopped);
    let loaded = match stopped {
        Ok(()) => stop_and_copy(&mut outgoing, &mut link, tops.as_mut()).await,
        Err(problem) => Err(problem),
    };
    if let Err(problem) = loaded {
        let problem = reason_of_target(&mut link, problem).await;
        // QEMU first, so that the guest goes on; then the target, so that it need not wait for a time-out.
        let settled = outgoing.abandon(true).await;
        // If the connection is what broke, the target knows.
        let _ = link.sender.say(&FromSource::Failed { problem: problem.clone() }).await;
        return settled.map_err(Problem::from).and(Err(problem));
    }
    journey.step(MigrationEvent::StateLoaded);
    let top = top_of(vm)?;
    let running = hand_over(vm, order, marker, &mut link).await?;
    if running.is_some() {
        journey.step(MigrationEvent::GuestRunning);
    }
    let stopped_us = outgoing.stopped_at().map(berth_qmp::HostTime::epoch_us);
    let report = journey.report(vm, order, &link.sender, stopped_us, running);
    let report = MigrationReport { rounds: outgoing.passes(), ..report };
    Ok(given(vm, report, top, running.is_some()).await)
}

/// The marker that says that the VM was given away. To be prepared while the guest runs: it waits for the disk.
pub(super) async fn prepare_marker(vm: &VmRuntime) -> Result<Marker, Problem> {
    let state = vm.dirs()?.state.clone();
    blocking(move || Ok(Marker::prepare(&state, Deed::GivenAway)?)).await
}

/// What there is to say of a VM that was given away. What is left of it here is ended, if it is known to run there.
pub(super) async fn given(
    vm: &mut VmRuntime,
    report: MigrationReport,
    top: LayerId,
    runs_there: bool,
) -> TaskOutput {
    if !runs_there {
        return TaskOutput::HandedOver { report, top };
    }
    if let Err(problem) = vm.end_process().await {
        // It is stopped, has let go of the disk, and the marker keeps it so.
        tracing::warn!(vm = %vm.id(), %problem, "the process of a VM that has moved stays behind");
    }
    TaskOutput::Moved { report, top }
}

/// Up to where the target has all that does not change.
pub(super) async fn begin(
    vm: &mut VmRuntime,
    context: &TaskContext,
    order: &Order,
    journey: &mut Journey,
) -> Result<Link<FromTarget>, Problem> {
    context.phase(MigrationPhase::Preparing.as_str());
    let mut link = connect(vm, order).await?;
    journey.clock_offset_us = compare_clocks(&mut link).await?;
    if order.shared_pool {
        journey.step(MigrationEvent::NothingToCopy);
    } else {
        journey.step(MigrationEvent::TargetReady);
        copy_unchanging(vm, context, order, &mut link).await?;
        journey.step(MigrationEvent::LayersThere);
    }
    Ok(link)
}

/// Reaches the target's agent, and says what is coming.
async fn connect(vm: &VmRuntime, order: &Order) -> Result<Link<FromTarget>, Problem> {
    let client = vm.services().peers.connect(&order.target, &order.address);
    let path = MigrationPath { migration: order.migration.clone() };
    let connection = link::connect(&client, &path).await?;
    let mut link = Link::open(connection, NoFiles);
    let pool = &vm.dirs()?.pool.name;
    let pool_uuid = vm.services().pool_facts(pool).map(|facts| facts.uuid.clone()).unwrap_or_default();
    link.sender
        .say(&FromSource::Begin { version: VERSION, shared_pool: order.shared_pool, pool_uuid })
        .await?;
    answer(&mut link.messages, ANSWER_TIMEOUT, "a welcome", |message| {
        matches!(message, FromTarget::Welcome { .. })
    })
    .await?;
    Ok(link)
}

/// How far the target's clock is ahead of ours, in microseconds: what it says in the middle of the quickest exchange.
async fn compare_clocks(link: &mut Link<FromTarget>) -> Result<i64, Problem> {
    let mut best = (u64::MAX, 0);
    for number in 0..PINGS {
        let asked_us = now_us();
        let asked = Instant::now();
        link.sender.say(&FromSource::Ping { number }).await?;
        let pong =
            |message: &FromTarget| matches!(message, FromTarget::Pong { number: of, .. } if *of == number);
        let reply = answer(&mut link.messages, ANSWER_TIMEOUT, "an answer to a ping", pong).await?;
        let FromTarget::Pong { at_us, .. } = reply else { continue };
        let took_us = u64::try_from(asked.elapsed().as_micros()).unwrap_or(u64::MAX);
        if took_us < best.0 {
            best = (took_us, at_us.cast_signed() - (asked_us + took_us / 2).cast_signed());
        }
    }
    Ok(best.1)
}

/// Lets the target start a process that waits, and sends the tops as they are now, if the target needs them.
async fn launch_target(
    vm: &VmRuntime,
    order: &Order,
    link: &mut Link<FromTarget>,
) -> Result<Option<Tops>, Problem> {
    let VmRecord { chain, data, fittings, .. } = vm.vm_record()?.clone();
    let nvram = match &fittings.nvram {
        Some(id) if !order.shared_pool => {
            let directory = vm.dirs()?.nvram(id);
            nvram::encode(&blocking(move || Ok(nvram::read(&directory)?)).await?)
        }
        Some(_) | None => nvram::Encoded::new(),
    };
    link.sender.say(&FromSource::Launch { chain, data, fittings, nvram }).await?;
    let waiting = |message: &FromTarget| matches!(message, FromTarget::Waiting);
    answer(&mut link.messages, SLOW_ANSWER_TIMEOUT, "a process that waits", waiting).await?;
    if order.shared_pool {
        return Ok(None);
    }
    let mut tops = Tops::new(layers::top_files(vm.dirs()?, &vm.disks()?));
    tops.pass(&link.sender).await?;
    Ok(Some(tops))
}

/// Lets QEMU start to send, through us.
async fn start_sending(
    vm: &VmRuntime,
    order: &Order,
    link: &mut Link<FromTarget>,
) -> Result<Outgoing, Problem> {
    let sending = Sending {
        budget: PauseBudget::MIGRATION,
        bandwidth_bytes_per_second: order.bandwidth_bytes_per_second,
        return_path: true,
        slow_guest_down: true,
        finish_timeout: ANSWER_TIMEOUT,
    };
    layers::flush(&layers::top_files(vm.dirs()?, &vm.disks()?)).await?;
    let (outgoing, stream) = Outgoing::start(vm.qmp()?, sending).await?;
    let (read, write) = link::halves(stream)?;
    link.sender.send_stream(read);
    link.messages.deliver_stream(write);
    Ok(outgoing)
}

/// Memory goes over in rounds, and the tops in passes beside it, until QEMU has stopped the guest.
async fn warm_up(
    outgoing: &mut Outgoing,
    context: &TaskContext,
    link: &mut Link<FromTarget>,
    mut tops: Option<&mut Tops>,
    writable: &[PathBuf],
) -> Result<(), Problem> {
    context.phase(MigrationPhase::WarmUp.as_str());
    let stopped = CancellationToken::new();
    let memory = async {
        let report = |passage| context.progress(capture::progress(passage));
        outgoing.until_switchover(context.cancel(), report).await?;
        stopped.cancel();
        Ok::<(), Problem>(())
    };
    let disk = async {
        loop {
            tokio::select! {
                biased;
                // What is being flushed then goes on by itself: the guest stands still, and nobody waits for it.
                () = stopped.cancelled() => return Ok(()),
                flushed = layers::flush_after(TOP_PASS_EVERY, writable) => flushed?,
            }
            if let Some(tops) = &mut tops {
                tops.pass(&link.sender).await?;
            }
        }
    };
    let target = async {
        tokio::select! {
            biased;
            () = stopped.cancelled() => Ok(()),
            reply = link.messages.next() => Err(match reply {
                Ok(FromTarget::Failed { problem }) => problem,
                Ok(other) => unexpected(&other, "nothing during the warm-up"),
                Err(error) => error.into(),
            }),
        }
    };
    tokio::try_join!(memory, disk, target).map(|_| ())
}

/// The last of memory, the devices, and what changed on the disks since the last pass; until the target has loaded it.
async fn stop_and_copy(
    outgoing: &mut Outgoing,
    link: &mut Link<FromTarget>,
    tops: Option<&mut Tops>,
) -> Result<(), Problem> {
    let Link { sender, messages } = link;
    let mut synced = tops.is_none();
    let disk = async {
        let Some(tops) = tops else { return Ok(()) };
        // QEMU has flushed them when it stopped the guest.
        let message = FromSource::Sync { top_lengths_bytes: tops.pass(sender).await? };
        sender.say(&message).await.map_err(Problem::from)
    };
    let target = async {
        let mut loaded = false;
        while !(synced && loaded) {
            let wanted = |message: &FromTarget| matches!(message, FromTarget::Synced | FromTarget::Loaded);
            match answer(messages, ANSWER_TIMEOUT, "that all is loaded", wanted).await? {
                FromTarget::Synced => synced = true,
                _ => loaded = true,
            }
        }
        Ok(())
    };
    let memory = async { outgoing.finish().await.map_err(Problem::from) };
    tokio::try_join!(memory, disk, target).map(|_| ())
}

/// The point of no return: it is written down that the VM is given away, and then the target is told. Gives when the
/// guest ran there, in microseconds by the target's clock; none: it is not known whether it does.
pub(super) async fn hand_over(
    vm: &mut VmRuntime,
    order: &Order,
    marker: Marker,
    link: &mut Link<FromTarget>,
) -> Result<Option<u64>, Problem> {
    if let Err(problem) = blocking(move || Ok(marker.set()?)).await {
        // It may be on the disk all the same: it must be off it before the guest may run here.
        let state = vm.dirs()?.state.clone();
        blocking(move || Ok(marker::remove(&state, Deed::GivenAway)?)).await?;
        return Err(problem);
    }
    let told = async {
        link.sender.say(&FromSource::Commit).await?;
        let running = |message: &FromTarget| matches!(message, FromTarget::Running { .. });
        answer(&mut link.messages, COMMIT_TIMEOUT, "that the guest runs", running).await
    };
    let running_at_us = match tokio::time::timeout(COMMIT_TIMEOUT, told).await {
        Ok(Ok(FromTarget::Running { at_us })) => Some(at_us),
        Ok(Ok(_)) | Err(_) => None,
        Ok(Err(problem)) => {
            tracing::warn!(vm = %vm.id(), %problem, "the VM was given away and the target does not answer");
            None
        }
    };
    let held = was_held(vm);
    let side = MigrationSide::Source { migration: order.migration.clone(), handed_over: true, held };
    if let Err(problem) = vm.set_migration(Some(side)).await {
        // The marker says it, until the next start at least.
        tracing::error!(vm = %vm.id(), %problem, "that the VM was given away is not on record");
    }
    Ok(running_at_us)
}

/// A QEMU whose stream is closed can't say why: the target may.
async fn reason_of_target(link: &mut Link<FromTarget>, problem: Problem) -> Problem {
    if problem.code != ProblemCode::Hypervisor {
        return problem;
    }
    match tokio::time::timeout(REASON_TIMEOUT, link.messages.next()).await {
        Ok(Ok(FromTarget::Failed { problem })) => problem,
        Ok(Ok(_) | Err(_)) | Err(_) => problem,
    }
}

/// The VM runs here as before; what is left of the migration is forgotten.
async fn give_up(vm: &mut VmRuntime, problem: Problem) -> Problem {
    if let Err(error) = stay(vm).await {
        tracing::error!(vm = %vm.id(), %error, "the guest does not go on after a migration that failed");
    }
    problem
}

async fn stay(vm: &mut VmRuntime) -> Result<(), Problem> {
    let state = vm.dirs()?.state.clone();
    let given_away = blocking(move || {
        // One that can't be taken off the disk forbids to run what the target might be told to run.
        let given_away = marker::was_given_away(&state)?;
        if !given_away {
            marker::remove(&state, Deed::GivenAway)?;
        }
        Ok(given_away)
    })
    .await?;
    if given_away {
        return Err(Problem::new(
            ProblemCode::Internal,
            "the marker that it was given away can't be removed",
        ));
    }
    if let Ok(qmp) = vm.qmp().cloned() {
        settle(&qmp, !was_held(vm)).await?;
    }
    vm.set_migration(None).await
}

/// Whether the guest stood still before all began.
fn was_held(vm: &VmRuntime) -> bool {
    let side = vm.host_record().ok().and_then(|host| host.migration.clone());
    matches!(side, Some(MigrationSide::Source { held: true, .. }))
}

fn given_away(vm: &VmRuntime, order: &Order, migration: &OperationId) -> Result<TaskOutput, Problem> {
    if *migration != order.migration {
        let message = format!("{} was given away in migration {migration}", vm.id());
        return Err(Problem::new(ProblemCode::WrongState, message));
    }
    Ok(TaskOutput::HandedOver { report: Journey::new().empty_report(vm, order), top: top_of(vm)? })
}

/// Waits for a message of the kind that has its place here.
pub(super) async fn answer(
    messages: &mut Messages<FromTarget>,
    timeout: Duration,
    expected: &'static str,
    wanted: impl Fn(&FromTarget) -> bool,
) -> Result<FromTarget, Problem> {
    match tokio::time::timeout(timeout, messages.next()).await {
        Ok(Ok(message)) if wanted(&message) => Ok(message),
        Ok(Ok(FromTarget::Failed { problem })) => Err(problem),
        Ok(Ok(other)) => Err(unexpected(&other, expected)),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => {
            let message = format!("the target did not say {expected} within {} s", timeout.as_secs());
            Err(Problem::new(ProblemCode::Unreachable, message))
        }
    }
}

fn unexpected(message: &FromTarget, expected: &'static str) -> Problem {
    WireError::Unexpected { what: format!("{message:?}"), expected }.into()
}

/// The layer that the guest writes to on its root disk.
pub(super) fn top_of(vm: &VmRuntime) -> Result<LayerId, Problem> {
    let top = vm.chain()?.last().cloned();
    top.ok_or_else(|| Problem::new(ProblemCode::Internal, "a VM without layers"))
}

pub(super) fn now_us() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}
