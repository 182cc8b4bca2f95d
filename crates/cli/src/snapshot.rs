//! `berth snapshot`: VMs at one instant, and back to it.

mod clone;
mod diff;
mod export;
mod tree;
mod verify;

use berth_api::endpoint::Nothing;
use berth_api::manager::{
    ChangeQuery, CreateSnapshot, PageQuery, RestoreVm, SnapshotCreate, SnapshotDelete, SnapshotList,
    SnapshotPin, SnapshotShow, SnapshotUnpin, VmRestore, VmShow,
};
use berth_model::SnapshotId;
use berth_model::name::Name;
use berth_model::operation::{Operation, OperationResult};
use berth_model::repository::{ExportFacts, ImportFacts};
use berth_model::snapshot::{
    CaptureWay, ClockSetting, CloneFacts, DeletionFacts, RestoreFacts, Snapshot, SnapshotExtent,
    SnapshotFacts,
};
use clap::{Args, Subcommand};

use crate::arguments::{ChangeArguments, DryRunArguments, ListArguments};
use crate::exit::Failure;
use crate::lookup::{HostNames, VmRef, parse_name};
pub use verify::in_words as verification_in_words;

use crate::output::{Facts, instant, word};
use crate::session::Session;
use crate::{operation, units, wait};

/// The word for the VM's baseline, whatever its snapshot is called.
const BASELINE: &str = "baseline";

/// How much of a backup's id is shown: what `restic` shows.
pub const BACKUP_ID_CHARS: usize = 8;

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Take a snapshot of disk, memory and devices
    Create(CreateArguments),
    /// Show a VM's snapshots as a tree; NOW is where the VM is
    List {
        /// The VM
        vm: VmRef,
        #[command(flatten)]
        list: ListArguments,
    },
    /// Show a snapshot
    Show(Which),
    /// Show what differs between two snapshots: files, memory, configuration
    Diff(diff::Arguments),
    /// Put a VM back to a snapshot, running as it was then; an undo snapshot is taken first. With --clone: make a new VM
    /// of it instead
    Restore(RestoreArguments),
    /// Take the newest restore back; what the VM is now is kept as an undo snapshot in its turn
    Undo(UndoArguments),
    /// See whether snapshots are still what they were; exit code 1 when one is not
    Verify(verify::Arguments),
    /// Delete a snapshot; the others stay
    Delete {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        change: ChangeArguments,
    },
    /// Put a snapshot into a repository, off the host
    Export(export::ExportArguments),
    /// Make a new VM of a backup in a repository, running as its snapshot was
    Import(export::ImportArguments),
    /// Make a snapshot the VM's baseline, and hold it against deletion
    Pin {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        dry_run: DryRunArguments,
    },
    /// Hold a snapshot no longer
    Unpin {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        dry_run: DryRunArguments,
    },
}

/// A snapshot of a VM.
#[derive(Debug, Clone, Args)]
pub struct Which {
    /// The VM
    vm: VmRef,
    /// The snapshot's name or id; 'baseline' is the VM's baseline
    snapshot: String,
}

/// What to take.
#[derive(Debug, Args)]
pub struct CreateArguments {
    /// The VM
    vm: VmRef,
    /// Its name; made of the time without it
    #[arg(long, value_parser = parse_name)]
    name: Option<Name>,
    /// A word about it
    #[arg(long, default_value = "")]
    note: String,
    /// Only the disk, as after a power cut; the guest runs on
    #[arg(long)]
    no_memory: bool,
    /// Only the disk, with the guest's file systems flushed and frozen by its guest agent for the instant
    #[arg(long, conflicts_with = "no_memory")]
    filesystem: bool,
    #[command(flatten)]
    change: ChangeArguments,
}

/// Where to put the VM back to.
#[derive(Debug, Args)]
pub struct RestoreArguments {
    /// The VM
    vm: VmRef,
    /// The snapshot's name or id; the baseline without it
    snapshot: Option<String>,
    /// Don't take an undo snapshot first: what the VM is now is lost
    #[arg(long)]
    no_undo: bool,
    /// Hold the guest afterwards, though it ran then
    #[arg(long)]
    paused: bool,
    /// Also when the snapshot failed its last verification
    #[arg(long, conflicts_with = "name")]
    force: bool,
    /// Put it back on this host, to which it moves; what it is on the host that it is on goes
    #[arg(long, conflicts_with = "name")]
    host: Option<String>,
    #[command(flatten)]
    clone: clone::CloneArguments,
    #[command(flatten)]
    change: ChangeArguments,
}

/// Which VM's restore to take back.
#[derive(Debug, Args)]
pub struct UndoArguments {
    /// The VM
    vm: VmRef,
    /// Hold the guest afterwards, though it ran then
    #[arg(long)]
    paused: bool,
    #[command(flatten)]
    change: ChangeArguments,
}

/// Does it.
///
/// # Errors
/// When the manager refuses or can't be reached, and the operation's failure.
pub async fn run(session: &Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::Create(arguments) => create(session, arguments).await,
        Verb::List { vm, list } => show_tree(session, &vm, list.limit).await,
        Verb::Show(which) => {
            let snapshot = find(session, &which).await?;
            session.output.one(&snapshot, || facts(&snapshot))
        }
        Verb::Diff(arguments) => diff::run(session, arguments).await,
        Verb::Restore(arguments) => {
            let RestoreArguments { vm, snapshot, no_undo, paused, force, host, clone, change } = arguments;
            if clone.is_wanted() {
                return clone::run(session, vm, snapshot, (clone, paused), change).await;
            }
            // The manager's own word for the baseline is no name at all, whatever the snapshot is called.
            let snapshot = snapshot.filter(|name| name != BASELINE);
            let wish = RestoreVm { snapshot, no_undo, paused, newest_undo: false, force, host };
            restore(session, &vm, &wish, change).await
        }
        Verb::Undo(UndoArguments { vm, paused, change }) => {
            let wish = RestoreVm { newest_undo: true, paused, ..RestoreVm::default() };
            restore(session, &vm, &wish, change).await
        }
        Verb::Verify(arguments) => verify::run(session, arguments).await,
        Verb::Delete { which, change } => delete(session, &which, change).await,
        Verb::Export(arguments) => export::export(session, arguments).await,
        Verb::Import(arguments) => export::import(session, arguments).await,
        Verb::Pin { which, dry_run } => pin(session, &which, dry_run).await,
        Verb::Unpin { which, dry_run } => unpin(session, &which, dry_run).await,
    }
}

async fn create(session: &Session, arguments: CreateArguments) -> Result<(), Failure> {
    let CreateArguments { vm, name, note, no_memory, filesystem, change } = arguments;
    let extent = match (no_memory, filesystem) {
        (_, true) => SnapshotExtent::Filesystem,
        (true, false) => SnapshotExtent::Disk,
        (false, false) => SnapshotExtent::Machine,
    };
    let wish = CreateSnapshot { name, note, extent };
    let reply = session.send::<SnapshotCreate>(&vm.path(), &change_query(change), &wish).await?;
    let Some(over) = wait::carry_through(session, change, reply).await? else { return Ok(()) };
    let name = match &over.result {
        Some(OperationResult::Snapshot { snapshot, .. }) => name_of(session, &vm, snapshot.as_str()).await,
        _ => String::new(),
    };
    wait::done(session, &over, |over| match &over.result {
        Some(OperationResult::Snapshot { facts, .. }) => {
            format!("{}: snapshot {name} taken, {}", over.subject, facts_in_words(facts))
        }
        _ => operation::outcome(over, &HostNames::default()),
    })
}

/// The snapshot's name; its id if it is gone again.
async fn name_of(session: &Session, vm: &VmRef, id: &str) -> String {
    let shown = session.ask::<SnapshotShow>(&vm.snapshot_path(id), &Nothing {}).await;
    shown.map_or_else(|_| id.to_string(), |snapshot| snapshot.name.to_string())
}

async fn restore(
    session: &Session,
    vm: &VmRef,
    wish: &RestoreVm,
    change: ChangeArguments,
) -> Result<(), Failure> {
    let reply = session.send::<VmRestore>(&vm.path(), &change_query(change), wish).await?;
    wait::carry_through_and_tell(session, change, reply, tell).await
}

async fn delete(session: &Session, which: &Which, change: ChangeArguments) -> Result<(), Failure> {
    let path = which.vm.snapshot_path(&resolve(session, which).await?);
    let reply = session.ask::<SnapshotDelete>(&path, &change_query(change)).await?;
    wait::carry_through_and_tell(session, change, reply, |over| {
        let freed = match &over.result {
            Some(OperationResult::SnapshotDeleted { facts }) => format!(", {}", deletion_in_words(facts)),
            _ => String::new(),
        };
        format!("snapshot {} of {} is deleted{freed}", which.snapshot, which.vm)
    })
    .await
}

async fn pin(session: &Session, which: &Which, dry_run: DryRunArguments) -> Result<(), Failure> {
    let path = which.vm.snapshot_path(&resolve(session, which).await?);
    if dry_run.dry_run {
        let found = session.ask::<SnapshotShow>(&path, &Nothing {}).await?;
        let summary = format!("would make snapshot {} the baseline of {}", found.name, which.vm);
        return session.tried(&summary);
    }
    let pinned = session.ask::<SnapshotPin>(&path, &Nothing {}).await?;
    session.output.done(&pinned, || format!("snapshot {} is the baseline of {}", pinned.name, which.vm))
}

async fn unpin(session: &Session, which: &Which, dry_run: DryRunArguments) -> Result<(), Failure> {
    let path = which.vm.snapshot_path(&resolve(session, which).await?);
    if dry_run.dry_run {
        let found = session.ask::<SnapshotShow>(&path, &Nothing {}).await?;
        let summary = format!("would no longer hold snapshot {} of {}", found.name, which.vm);
        return session.tried(&summary);
    }
    let unpinned = session.ask::<SnapshotUnpin>(&path, &Nothing {}).await?;
    session.output.done(&unpinned, || {
        format!("snapshot {} of {} is no longer held against deletion", unpinned.name, which.vm)
    })
}

const fn change_query(change: ChangeArguments) -> ChangeQuery {
    ChangeQuery { dry_run: if change.dry_run { Some(true) } else { None } }
}

async fn find(session: &Session, which: &Which) -> Result<Snapshot, Failure> {
    let path = which.vm.snapshot_path(&resolve(session, which).await?);
    session.ask::<SnapshotShow>(&path, &Nothing {}).await
}

/// The snapshot's name for a path: the word `baseline` is looked up.
async fn resolve(session: &Session, which: &Which) -> Result<String, Failure> {
    if which.snapshot != BASELINE {
        return Ok(which.snapshot.clone());
    }
    let vm = session.ask::<VmShow>(&which.vm.path(), &Nothing {}).await?;
    Ok(vm.status.baseline.map_or_else(|| BASELINE.to_owned(), |id| id.to_string()))
}

async fn show_tree(session: &Session, vm: &VmRef, limit: Option<u32>) -> Result<(), Failure> {
    let found = session.ask::<VmShow>(&vm.path(), &Nothing {}).await?;
    let query = |limit, cursor| PageQuery { limit, cursor };
    let snapshots = session.pages::<SnapshotList, _>(&vm.path(), limit, query).await?;
    session.output.list(&snapshots, || tree::table(&snapshots, &found.status, units::now()))
}

fn tell(over: &Operation) -> String {
    operation::outcome(over, &HostNames::default())
}

/// What a capture cost, in words: `guest paused 12.3 ms, 412 MiB on disk, in 1.10 s`.
pub fn facts_in_words(facts: &SnapshotFacts) -> String {
    let stored = units::bytes(facts.memory_stored_bytes.saturating_add(facts.disk_stored_bytes));
    let total = units::millis(facts.total_ms);
    let paused = units::micros(facts.paused_us);
    let cost = match (facts.has_memory, facts.quiesced) {
        (true, _) => format!("guest paused {paused}"),
        (false, true) => format!("disk only, file systems frozen for {paused}"),
        (false, false) if facts.paused_us > 0 => format!("disk only, writes held for {paused}"),
        (false, false) => "disk only".to_owned(),
    };
    format!("{cost}, {stored} on disk, in {total}")
}

/// What a deletion freed and what follows, in words: `412 MiB free, 80 MiB more after 120 MiB are merged in 3.0 s`.
pub fn deletion_in_words(facts: &DeletionFacts) -> String {
    let freed = format!("{} free", units::bytes(facts.freed_bytes));
    if facts.merged_bytes == 0 {
        return freed;
    }
    format!(
        "{freed}, {} more after {} are merged in {}",
        units::bytes(facts.freed_later_bytes),
        units::bytes(facts.merged_bytes),
        units::millis(facts.merging_ms)
    )
}

/// What a clone cost, in words: `running 93 ms after the command, shares 412 MiB`.
pub fn clone_in_words(facts: &CloneFacts) -> String {
    let files = match facts.copied_bytes {
        0 => format!("shares {}", units::bytes(facts.shared_bytes)),
        copied => format!("{} copied", units::bytes(copied)),
    };
    match facts.running_us {
        0 => files,
        micros => format!("running {} after the command, {files}", units::micros(micros)),
    }
}

/// What a restore cost, in words: `running 93 ms after the command`.
pub fn restore_in_words(facts: &RestoreFacts, undo: Option<&SnapshotId>) -> String {
    let mut running = match facts.clock {
        ClockSetting::Held => format!("there {} after the command", units::micros(facts.running_us)),
        _ => format!("running {} after the command", units::micros(facts.running_us)),
    };
    if let Some(blackout_us) = facts.blackout_us {
        running.push_str(&format!(" on the other host, standing still for {}", units::micros(blackout_us)));
    }
    if facts.warm_process {
        running.push_str(" (its process was ready)");
    }
    match &facts.clock {
        ClockSetting::Set => running.push_str(", clock set"),
        ClockSetting::NoAgent => running.push_str(", clock not set: no guest agent answered"),
        ClockSetting::Refused { reason } => {
            running.push_str(&format!(", clock not set: {reason}"));
        }
        ClockSetting::Pending | ClockSetting::Held => {}
    }
    match undo {
        Some(undo) => {
            format!("{running}; {undo} undoes it (taken before in {})", units::micros(facts.undo_us))
        }
        None => running,
    }
}

/// What an export cost, in words: `backup 1f3a5b7c, 96 MiB of 2.1 GiB read, 40 MiB added, in 3.1 s`.
pub fn export_in_words(facts: &ExportFacts) -> String {
    let short: String = facts.backup.chars().take(BACKUP_ID_CHARS).collect();
    format!(
        "backup {short}, {} of {} read, {} added, in {}",
        units::bytes(facts.read_bytes),
        units::bytes(facts.bytes),
        units::bytes(facts.added_bytes),
        units::millis(facts.total_ms)
    )
}

/// What an import cost, in words: `96 MiB of 2.1 GiB written, in 3.1 s`.
pub fn import_in_words(facts: &ImportFacts) -> String {
    format!(
        "{} of {} written, in {}",
        units::bytes(facts.written_bytes),
        units::bytes(facts.bytes),
        units::millis(facts.total_ms)
    )
}

const fn holds(facts: &SnapshotFacts) -> &'static str {
    match (facts.has_memory, facts.quiesced) {
        (true, _) => "disk, memory and devices",
        (false, true) => "disk, file systems frozen",
        (false, false) => "disk",
    }
}

fn facts(snapshot: &Snapshot) -> Facts {
    let captured = &snapshot.facts;
    Facts::new()
        .with("name", &snapshot.name)
        .with("id", &snapshot.id)
        .with("kind", word(&snapshot.kind))
        .with_some("schedule", snapshot.occasion.as_ref().map(|occasion| &occasion.schedule))
        .with("taken", instant(snapshot.created_at))
        .with_some("parent", snapshot.parent.as_ref())
        .with("pinned", if snapshot.pinned { "yes" } else { "no" })
        .with_some("note", (!snapshot.note.is_empty()).then_some(&snapshot.note))
        .with_some("expires", snapshot.expires_at.map(instant))
        .with("verified", verify::cell(snapshot.verified.as_ref(), units::now()))
        .with("holds", holds(captured))
        .with("memory", if captured.has_memory { units::bytes(captured.memory_bytes) } else { "none".into() })
        .with("memory on disk", units::bytes(captured.memory_stored_bytes))
        .with("memory shared", units::bytes(captured.memory_shared_bytes))
        .with("disk on disk", units::bytes(captured.disk_stored_bytes))
        .with("guest paused", units::micros(captured.paused_us))
        .with_some("guest slower by", captured.guest_slowdown_percent.map(|percent| format!("{percent} %")))
        .with("took", units::millis(captured.total_ms))
        .with_some("memory taken", captured.way.map(|way| taken(way, captured.rounds)))
        .with("layers", captured.longest_chain())
}

fn taken(way: CaptureWay, rounds: u64) -> String {
    match way {
        CaptureWay::PreCopy => format!("in {rounds} passes"),
        CaptureWay::Background => "in the background".to_owned(),
    }
}
