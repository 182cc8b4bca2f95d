//! Snapshots of a VM on this host: taking them, putting the VM back to one, removing them.
//!
//! Taking one costs the guest a pause of some ten milliseconds, whatever its size ([`capture`]): memory is read while
//! it runs, and in the pause the last of it is read and the disks' layers are switched ([`layers`]), so that memory
//! and disks are of one instant. What was taken is put away as a directory that is either whole or not there
//! ([`archive`]). Putting the VM back maps the memory instead of reading it, in a process that is made ready beside the
//! present one ([`ready`], [`mod@restore`]).
//!
//! **A capture that fails** leaves the VM as it was: running if it ran, and on the layer that it wrote to. If the layers
//! were switched already, the switch is taken back, by merging the new layer down while the guest runs. Should that
//! fail too (the disk is full, most likely), the new layer stays: the chain on record names it, everything on the
//! disk is right, there is merely one layer more; trouble says so.
//!
//! **A capture that is run again** after the agent died finds a whole snapshot and returns its facts, or takes back the
//! switch that it finds, and begins anew.

use std::time::Instant;

use berth_api::agent::TaskOutput;
use berth_model::snapshot::SnapshotFacts;
use berth_model::{LayerId, Problem, ProblemCode, SnapshotId};
use berth_qmp::commands::{MigrationStatus, QueryMigrate, QueryStatus, RunState};

use crate::disks::Disks;
use crate::durable::{self, FileError, blocking};
use crate::layout::{VmDirs, VmRecord};
use crate::migration::outgoing::settle;
use crate::nvram::{self, Keeping};
use crate::task::TaskContext;
use crate::vm::VmRuntime;

mod afterwards;
pub mod archive;
mod base;
pub mod capture;
pub mod clone;
pub mod deletion;
mod diff;
mod disk;
mod export;
pub mod hashes;
mod held;
pub mod identity;
pub mod image;
mod import;
pub mod layers;
pub mod lending;
pub mod memory;
pub mod merge;
pub mod overlay;
pub mod ready;
pub mod restore;
mod slowdown;
pub mod verify;
mod working_set;

pub use diff::compare;
pub use export::export;
pub use import::{drop_fetched, fetch, make_vm};
pub use ready::{Warm, drop_ready, drop_unwanted, make_ready};
pub use restore::{Target, restore};

use archive::{ArchiveError, Draft, Manifest, MemoryManifest, SnapshotFiles};
use capture::{Capture, CaptureFailure, Ways};
use slowdown::CpuTime;

impl From<ArchiveError> for Problem {
    fn from(error: ArchiveError) -> Self {
        let code = match error {
            ArchiveError::File(error) => return error.into(),
            ArchiveError::Missing { .. } => ProblemCode::NotFound,
            ArchiveError::Foreign { .. } | ArchiveError::Damaged { .. } => ProblemCode::BadImage,
        };
        Problem::new(code, durable::with_causes(&error))
    }
}

/// Takes a snapshot: of a VM with a process, with its memory; of one that rests, of its disk alone.
///
/// # Errors
/// When QEMU or the disk fails, or somebody cancels: the VM is then as it was, and there is no snapshot.
pub async fn take(
    vm: &mut VmRuntime,
    context: &TaskContext,
    snapshot: &SnapshotId,
    new_top: &LayerId,
) -> Result<TaskOutput, Problem> {
    let started = Instant::now();
    if let Some(facts) = taken_before(vm, snapshot).await? {
        return Ok(TaskOutput::Snapshot { facts });
    }
    merge::make_room(vm, context).await?;
    let facts = if vm.qmp().is_ok() {
        take_of_machine(vm, context, snapshot, new_top, started).await?
    } else {
        take_of_disk(vm, snapshot, new_top, started).await?
    };
    Ok(TaskOutput::Snapshot { facts })
}

/// Takes a snapshot of a VM's disk alone, also while it runs; with `quiesce`, with the guest's file systems frozen for the
/// instant.
///
/// # Errors
/// When QEMU or the disk fails, somebody cancels, or, with `quiesce`, there is no guest that freezes its file systems:
/// the VM is then as it was, and there is no snapshot.
pub async fn take_disk(
    vm: &mut VmRuntime,
    context: &TaskContext,
    snapshot: &SnapshotId,
    new_top: &LayerId,
    quiesce: bool,
) -> Result<TaskOutput, Problem> {
    let started = Instant::now();
    if let Some(facts) = taken_before(vm, snapshot).await? {
        return Ok(TaskOutput::Snapshot { facts });
    }
    let runs = vm.qmp().is_ok();
    if quiesce && !runs {
        let message = format!("{} does not run: there is no guest to freeze its file systems", vm.id());
        return Err(Problem::new(ProblemCode::WrongState, message));
    }
    merge::make_room(vm, context).await?;
    let facts = if runs {
        disk::take_of_running(vm, context, snapshot, new_top, quiesce, started).await?
    } else {
        take_of_disk(vm, snapshot, new_top, started).await?
    };
    Ok(TaskOutput::Snapshot { facts })
}

/// What a snapshot cost that a try of the same task, which died before it could say so, has finished.
async fn taken_before(vm: &VmRuntime, snapshot: &SnapshotId) -> Result<Option<SnapshotFacts>, Problem> {
    match archive::read(vm.dirs()?, snapshot) {
        Ok(manifest) => {
            freeze_tops(vm, &manifest.disks()).await;
            Ok(Some(manifest.facts))
        }
        Err(ArchiveError::Missing { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Finds how things stand after an agent died in the middle of a snapshot: what was not finished is removed, the guest
/// goes on if the capture had stopped it, and the record names the layer that it writes to.
///
/// # Errors
/// When QEMU refuses or the system does.
pub async fn recover(vm: &mut VmRuntime) -> Result<(), Problem> {
    if vm.vm_record().is_err() {
        return Ok(());
    }
    let dirs = vm.dirs()?.clone();
    blocking(move || Ok(archive::remove_unfinished(&dirs)?)).await?;
    // A process in a migration is not ours to touch.
    if vm.host_record()?.migration.is_some() {
        return Ok(());
    }
    let Ok(qmp) = vm.qmp().cloned() else { return Ok(()) };
    settle(&qmp, false).await?;
    if let Err(error) = disk::thaw_left_frozen(vm).await {
        tracing::error!(vm = %vm.id(), %error, "a guest's file systems may be frozen and can't be thawed");
    }
    let sent = qmp.call(QueryMigrate {}).await.map_err(layers::refused)?.status;
    let state = qmp.call(QueryStatus {}).await.map_err(layers::refused)?.status;
    // A guest that was held when it was taken ends as `failed`: it stays held.
    if sent == MigrationStatus::Completed && state == RunState::PostMigrate {
        settle(&qmp, true).await?;
    }
    let disks = vm.disks()?;
    let Some(used) = layers::used_of(&qmp, &disks).await.map_err(layers::refused)? else { return Ok(()) };
    let unused: Vec<&LayerId> = disks.layers().filter(|layer| !used.contains(layer)).collect();
    for layer in &unused {
        layers::close_node(&qmp, layer).await?;
    }
    // Before their files go: no record ever names a file that is gone.
    vm.set_disks(used).await?;
    for layer in unused {
        layers::close(vm, layer).await?;
    }
    Ok(())
}

/// Removes layers that are neither in `live` nor in any snapshot. Blocks. Only for a VM at rest from other work.
///
/// # Errors
/// When a manifest can't be read (nothing is removed then) or a file not removed.
pub fn remove_unneeded_layers(dirs: &VmDirs, live: &Disks) -> Result<(), Problem> {
    let mut needed: Vec<LayerId> = live.layers().cloned().collect();
    for snapshot in archive::list(dirs)? {
        // A directory without a manifest is what is left of a removal, and needs nothing.
        match archive::read(dirs, &snapshot) {
            Ok(manifest) => needed.extend(manifest.disks().layers().cloned()),
            Err(ArchiveError::Missing { .. }) => archive::remove(dirs, &snapshot)?,
            Err(error) => return Err(error.into()),
        }
    }
    for layer in layers_present(dirs)? {
        if !needed.contains(&layer) {
            durable::remove_file(&dirs.layer(&layer))?;
        }
    }
    Ok(hashes::remove_strays(dirs)?)
}

/// The layers whose files are in a VM's directory.
///
/// # Errors
/// When the directory can't be read.
pub fn layers_present(dirs: &VmDirs) -> Result<Vec<LayerId>, FileError> {
    let directory = dirs.layers();
    let entries = std::fs::read_dir(&directory).map_err(FileError::io(&directory, "read"))?;
    let mut layers = Vec::new();
    for entry in entries {
        let name = entry.map_err(FileError::io(&directory, "read"))?.file_name();
        let id = name.to_str().and_then(|name| name.strip_suffix(".qcow2")).and_then(|id| id.parse().ok());
        layers.extend(id);
    }
    layers.sort();
    Ok(layers)
}

async fn take_of_disk(
    vm: &mut VmRuntime,
    snapshot: &SnapshotId,
    new_top: &LayerId,
    started: Instant,
) -> Result<SnapshotFacts, Problem> {
    let (frozen, _) = split_disks(vm, new_top)?;
    let draft = begin(vm, snapshot).await?;
    let more = frozen.clone().with_tops(new_top);
    // A first try that died after this step has done it, and nothing has run since.
    if vm.disks()? != more {
        layers::create(&vm.ground()?, &frozen, new_top).await?;
        layers::sync(vm.dirs()?, &more).await?;
        vm.set_disks(more).await?;
    }
    if let Some(keeping) = keeping(vm, &draft)? {
        keeping.keep().await?;
    }
    put_away(vm, draft, snapshot, facts_of(frozen), None, started).await
}

async fn take_of_machine(
    vm: &mut VmRuntime,
    context: &TaskContext,
    snapshot: &SnapshotId,
    new_top: &LayerId,
    started: Instant,
) -> Result<SnapshotFacts, Problem> {
    undo_half_done(vm, new_top).await?;
    let status = vm.qmp()?.call(QueryStatus {}).await.map_err(layers::refused)?;
    let mut ways = Ways::of(vm, status.running).await;
    loop {
        match take_one_way(vm, context, snapshot, new_top, (&ways, started)).await {
            Ok(facts) => return Ok(facts),
            Err(problem) => {
                let way = ways.next();
                let Some(left) = ways.after(&problem) else { return Err(problem) };
                tracing::warn!(vm = %vm.id(), ?way, %problem, "a snapshot is taken another way");
                ways = left;
            }
        }
    }
}

async fn take_one_way(
    vm: &mut VmRuntime,
    context: &TaskContext,
    snapshot: &SnapshotId,
    new_top: &LayerId,
    (ways, started): (&Ways, Instant),
) -> Result<SnapshotFacts, Problem> {
    let (frozen, memory_bytes) = split_disks(vm, new_top)?;
    let status = vm.qmp()?.call(QueryStatus {}).await.map_err(layers::refused)?;
    let quiet = vm.status().quiet();
    let draft = begin(vm, snapshot).await?;
    let result = async {
        let before = if status.running { CpuTime::now(vm.qmp()?).await } else { None };
        let (prepared, ()) =
            tokio::join!(layers::prepare_switch(vm, &frozen, new_top), look_before(before.as_ref()));
        prepared?;
        let held = if status.status == RunState::PostMigrate { held::find(vm, frozen.root())? } else { None };
        match held {
            Some(earlier) => take_again(vm, &draft, &earlier, &frozen, new_top).await,
            None => {
                let capture = Capture {
                    qmp: vm.qmp()?,
                    files: draft.files(),
                    memory_bytes,
                    disks: &frozen,
                    top_files: layers::top_files(vm.dirs()?, &frozen),
                    new_top,
                    nvram: keeping(vm, &draft)?,
                    was_running: status.running,
                    way: ways.next(),
                    slow_guest_down: !ways.has_other(),
                    cpu_before: before,
                };
                take_anew(&capture, vm.dirs()?, context).await
            }
        }
    }
    .await;
    let result = match result {
        Ok((mut facts, memory)) => {
            (facts.layers, facts.data) = frozen.clone().into_parts();
            if !status.running {
                held::remember(vm, snapshot)?;
            }
            let finished = put_away(vm, draft, snapshot, facts, Some(memory), started).await;
            finished.map_err(|problem| CaptureFailure { problem, switched: true })
        }
        Err(failure) => {
            drop(draft);
            Err(failure)
        }
    };
    drop(quiet);
    match result {
        Ok(facts) => Ok(facts),
        Err(failure) => Err(undo(vm, failure, &frozen, new_top).await),
    }
}

impl From<Problem> for CaptureFailure {
    fn from(problem: Problem) -> Self {
        Self { problem, switched: false }
    }
}

/// What is known of a snapshot whose disks are these and of which nothing else was measured.
fn facts_of(disks: Disks) -> SnapshotFacts {
    let (layers, data) = disks.into_parts();
    SnapshotFacts { layers, data, ..SnapshotFacts::default() }
}

/// Gives the guest time to show what it does when it is left alone.
async fn look_before(cpu: Option<&CpuTime>) {
    if cpu.is_some() {
        tokio::time::sleep(slowdown::LOOK_BEFORE).await;
    }
}

async fn take_anew(
    capture: &Capture<'_>,
    dirs: &VmDirs,
    context: &TaskContext,
) -> Result<(SnapshotFacts, MemoryManifest), CaptureFailure> {
    let (dirs, layers, memory_bytes) = (dirs.clone(), capture.disks.root().to_vec(), capture.memory_bytes);
    let earlier = blocking(move || Ok(base::choose(&dirs, &layers, memory_bytes))).await?;
    let (linked, base) = earlier.map(|earlier| (earlier.paths, earlier.base)).unzip();
    let captured = capture.run(context, base).await?;
    context.phase("writing");
    let (paused_us, rounds) = (captured.paused_us, captured.rounds);
    let guest_slowdown_percent = captured.guest_slowdown_percent;
    let (files, was_running, way) = (capture.files.clone(), capture.was_running, capture.way);
    let written = blocking(move || {
        let image = image::complete(captured.collected, &files, linked.as_ref(), base::SENT_BYTES_MAX)?;
        let manifest = MemoryManifest {
            bytes: memory_bytes,
            was_running,
            device_blake3: archive::blake3_of(&files.device())?,
            index_blake3: image.identity,
            differences: image.differences,
        };
        let facts = SnapshotFacts {
            has_memory: true,
            paused_us,
            memory_bytes,
            memory_stored_bytes: image.own_bytes,
            memory_shared_bytes: image.shared_bytes,
            rounds,
            way: Some(way),
            guest_slowdown_percent,
            ..SnapshotFacts::default()
        };
        Ok((facts, manifest))
    });
    written.await.map_err(|problem| CaptureFailure { problem, switched: true })
}

/// A guest that has not moved since an earlier snapshot: its memory is that snapshot's, and only the layers are switched.
async fn take_again(
    vm: &VmRuntime,
    draft: &Draft,
    earlier: &Manifest,
    frozen: &Disks,
    new_top: &LayerId,
) -> Result<(SnapshotFacts, MemoryManifest), CaptureFailure> {
    let Some(memory) = earlier.memory.clone() else {
        return Err(Problem::new(ProblemCode::Internal, "a snapshot of a held guest without memory").into());
    };
    let files = SnapshotFiles::of(vm.dirs()?, &earlier.snapshot);
    held::link(&files, &memory, draft.files()).map_err(Problem::from)?;
    let keeping = keeping(vm, draft)?;
    layers::switch(vm.qmp()?, frozen, new_top).await.map_err(layers::refused)?;
    if let Some(keeping) = keeping {
        keeping.keep().await.map_err(|problem| CaptureFailure { problem, switched: true })?;
    }
    let facts = SnapshotFacts {
        paused_us: 0,
        total_ms: 0,
        rounds: 0,
        way: None,
        guest_slowdown_percent: None,
        memory_stored_bytes: 0,
        memory_shared_bytes: earlier.facts.memory_stored_bytes + earlier.facts.memory_shared_bytes,
        ..earlier.facts.clone()
    };
    Ok((facts, memory))
}

/// Writes the manifest and gives the snapshot its name; the old layers are frozen.
async fn put_away(
    vm: &VmRuntime,
    draft: Draft,
    snapshot: &SnapshotId,
    mut facts: SnapshotFacts,
    memory: Option<MemoryManifest>,
    started: Instant,
) -> Result<SnapshotFacts, Problem> {
    let VmRecord { definition, fittings, .. } = vm.vm_record()?.clone();
    let borrowed_nics = vm.host_record()?.borrowed_nics.clone().filter(|_| memory.is_some());
    let disks = Disks::new(facts.layers.clone(), facts.data.clone());
    let newest = layers::top_files(vm.dirs()?, &disks);
    let snapshot = snapshot.clone();
    let facts = blocking(move || {
        facts.disk_stored_bytes = 0;
        for newest in &newest {
            let file = std::fs::File::open(newest).map_err(FileError::io(newest, "opened"))?;
            file.sync_all().map_err(FileError::io(newest, "brought to the disk"))?;
            facts.disk_stored_bytes +=
                memory::stored_bytes(&file).map_err(FileError::io(newest, "examined"))?;
        }
        facts.total_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let (layers, data) = (facts.layers.clone(), facts.data.clone());
        let nvram = nvram::freeze(draft.files().directory())?;
        let manifest = Manifest {
            format: archive::FORMAT,
            snapshot,
            definition,
            layers,
            data,
            fittings,
            nvram,
            memory,
            facts: facts.clone(),
            borrowed_nics,
        };
        draft.finish(&manifest)?;
        Ok(facts)
    })
    .await?;
    freeze_tops(vm, &disks).await;
    Ok(facts)
}

/// The snapshot is whole: a layer that could still be written to is worth a warning, and is tried again at the next
/// occasion.
async fn freeze_tops(vm: &VmRuntime, disks: &Disks) {
    for layer in disks.tops() {
        if let Err(error) = layers::freeze(vm, layer).await {
            tracing::warn!(vm = %vm.id(), %layer, %error, "a snapshot's layer can't be made read-only");
        }
    }
}

/// After a failure: the guest on the layers that it had, the new ones gone, and the record saying so.
async fn undo(vm: &mut VmRuntime, failure: CaptureFailure, frozen: &Disks, new_top: &LayerId) -> Problem {
    let CaptureFailure { mut problem, switched } = failure;
    let undone = match switched {
        true if vm.qmp().is_ok() => layers::take_switch_back(vm, frozen, new_top).await,
        // It may have written to the new layers before it died: the record, which has both, is right.
        true => Ok(()),
        false => match vm.set_disks(frozen.clone()).await {
            Ok(()) => layers::close_tops(vm, frozen.count(), new_top).await,
            Err(error) => Err(error),
        },
    };
    if let Err(error) = undone {
        tracing::warn!(vm = %vm.id(), %error, "a failed snapshot leaves a layer more");
        problem
            .message
            .push_str("; the VM goes on with one layer more, because it could not be taken back: ");
        problem.message.push_str(&error.message);
    }
    problem
}

/// Takes back what a try of the same task left that died in the middle.
async fn undo_half_done(vm: &mut VmRuntime, new_top: &LayerId) -> Result<(), Problem> {
    held::forget_unless_held(vm).await?;
    let qmp = vm.qmp()?.clone();
    let disks = vm.disks()?;
    let Some(below) = disks.clone().without_tops(new_top).filter(|below| *below != disks) else {
        return Ok(());
    };
    let running = vm.status().runs();
    settle(&qmp, running).await?;
    layers::take_switch_back(vm, &below, new_top).await
}

async fn begin(vm: &VmRuntime, snapshot: &SnapshotId) -> Result<Draft, Problem> {
    let (dirs, snapshot, reader) = (vm.dirs()?.clone(), snapshot.clone(), vm.user_id()?);
    blocking(move || Ok(Draft::begin(&dirs, &snapshot, reader)?)).await
}

/// How what the machine remembers beside its disk is kept; none: it remembers nothing.
fn keeping(vm: &VmRuntime, draft: &Draft) -> Result<Option<Keeping>, Problem> {
    let (dirs, id) = (vm.dirs()?, vm.vm_record()?.fittings.nvram.as_ref());
    let to = draft.files().directory().to_owned();
    Ok(id.map(|id| Keeping { from: dirs.nvram(id), to }))
}

/// The layers that a snapshot taken now would have, and the guest's memory in bytes.
fn split_disks(vm: &VmRuntime, new_top: &LayerId) -> Result<(Disks, u64), Problem> {
    let frozen = vm.disks()?.without_tops(new_top).ok_or_else(|| {
        let message = format!("{new_top} can't be the next layer of {}", vm.id());
        Problem::new(ProblemCode::InvalidInput, message).at("new_top", new_top, "a new id")
    })?;
    Ok((frozen, vm.memory_bytes()?))
}

fn last(layers: &[LayerId]) -> Result<&LayerId, Problem> {
    layers.last().ok_or_else(|| Problem::new(ProblemCode::Internal, "a VM without layers"))
}
