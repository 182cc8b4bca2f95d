//! A new VM from another one's snapshot.
//!
//! ```text
//! POOL/vms/<origin>/layers/a, b          ◄── hard links ──   POOL/vms/<clone>/layers/a, b, and a writable top of its own
//! POOL/vms/<origin>/snapshots/<s>/…      ◄── hard links ──   POOL/vms/<clone>/snapshots/<first>/…  (its baseline)
//! ```
//!
//! What is frozen is never written again, so two VMs may have it: as links to the same files, which share their pages in
//! the host's cache too, and which go with the last of them, whichever that is. So a clone costs what it changes, and
//! origin, clone and snapshots may be deleted in any order.
//!
//! Into another segment nothing is shared: by the time that reading takes, a guest could learn which pages another has
//! touched. There the files are copied.
//!
//! **The origin is not held.** This runs in the clone's queue and only reads the origin's directory, so that ten clones
//! are made side by side while the origin works. Its snapshot may be deleted in the middle: then a file is missing, and
//! the clone fails with nothing left, or every file was linked before, and nothing is lost.
//!
//! The snapshot becomes the clone's own first one, with the clone's addresses as its machine's and the origin's as those
//! that its guest knows ([`super::identity`]). It is what the clone can be put back to at once, and what keeps the image
//! that its memory is mapped from.
//!
//! **Run again** after the agent died: a clone that runs is done. Otherwise its guest has not run, so its process is
//! ended, its top made anew, and it is started. One that fails is removed altogether.

use std::fs;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use berth_api::agent::{TaskOutput, TaskSpec, VmDefinition};
use berth_model::snapshot::CloneFacts;
use berth_model::vm::VmState;
use berth_model::{LayerId, Problem, ProblemCode, SnapshotId};
use berth_qmp::commands::{QueryStatus, RunState};
use rustix::fs::{SeekFrom, ioctl_ficlone, seek};
use rustix::io::Errno;

use super::archive::{self, Draft, Manifest, SnapshotFiles};
use super::{Target, hashes, layers, restore};
use crate::disk::FROZEN_MODE;
use crate::disks::Disks;
use crate::durable::{self, FileError, blocking};
use crate::image;
use crate::layout::{VmDirs, VmRecord};
use crate::nvram::{self, Place};
use crate::room::Room;
use crate::task::TaskContext;
use crate::vm::process::Ground;
use crate::vm::{VmRuntime, files, lifecycle};

/// How much is copied at once where the file system can't share blocks.
const COPY_BYTES: usize = 1 << 20;

/// What is to be made.
pub(super) struct Wish<'a> {
    /// The new VM.
    pub(super) definition: &'a VmDefinition,
    /// Where the frozen files are.
    pub(super) origin: VmDirs,
    /// The snapshot there.
    pub(super) snapshot: &'a SnapshotId,
    /// What it becomes.
    pub(super) first_snapshot: Option<&'a SnapshotId>,
    /// Link the files, or copy them.
    pub(super) share: bool,
    /// Hold the guest.
    pub(super) paused: bool,
}

/// Makes a new VM from another one's snapshot and starts it.
///
/// # Errors
/// When the snapshot is not here or not whole, the disk is full, or QEMU can't load it: nothing is left then.
pub async fn clone_vm(vm: &mut VmRuntime, task: &TaskContext) -> Result<TaskOutput, Problem> {
    let TaskSpec::CloneVm { definition, origin, snapshot, first_snapshot, share, paused } = &task.put().spec
    else {
        return Err(Problem::new(ProblemCode::Internal, "this task makes no VM from a snapshot"));
    };
    let wish = Wish {
        definition,
        origin: vm.services().layout.vm(origin, &definition.spec.pool)?,
        snapshot,
        first_snapshot: first_snapshot.as_ref(),
        share: *share,
        paused: *paused,
    };
    lifecycle::check_identity(vm, definition)?;
    task.phase("cloning");
    make_and_start(vm, task, &wish).await
}

/// Makes a VM of frozen files that are somewhere on this host.
///
/// # Errors
/// As [`clone_vm`].
pub(super) async fn make_and_start(
    vm: &mut VmRuntime,
    task: &TaskContext,
    wish: &Wish<'_>,
) -> Result<TaskOutput, Problem> {
    let started = Instant::now();
    let runs = match bring_up(vm, task, wish).await {
        Ok(runs) => runs,
        Err(problem) => return Err(remove(vm, wish, problem).await),
    };
    let after_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
    let (state, running_us) = if runs { (VmState::Running, after_us) } else { (VmState::Paused, 0) };
    // The guest runs: now there is time for the disk.
    layers::sync(vm.dirs()?, &vm.disks()?).await?;
    let stored = stored_bytes(vm, wish).await?;
    let (shared_bytes, copied_bytes) = if wish.share { (stored, 0) } else { (0, stored) };
    let facts = CloneFacts { running_us, shared_bytes, copied_bytes };
    Ok(TaskOutput::Cloned { facts, state })
}

/// Whether its guest runs then, or is held.
async fn bring_up(vm: &mut VmRuntime, task: &TaskContext, wish: &Wish<'_>) -> Result<bool, Problem> {
    vm.make_home(&wish.definition.spec.pool).await?;
    if let Some(runs) = is_up(vm, wish).await? {
        return Ok(runs);
    }
    vm.end_process().await?;
    if vm.vm_record().is_err() {
        make(vm, task, wish).await?;
    }
    let definition = vm.definition()?.clone();
    let kept = match wish.first_snapshot {
        Some(first) => archive::read(vm.dirs()?, first)?.memory.map(|memory| (first, memory.was_running)),
        None => None,
    };
    let Some((first, was_running)) = kept else {
        return lifecycle::start(vm, task, &definition).await.map(|_| true);
    };
    // To go on where the snapshot stands is to be put back to it. The top is made anew: what a process wrote to it that
    // never came to run its guest is not part of the disk.
    let new_top = &definition.first_layer;
    let target = Target { definition: &definition, snapshot: first, new_top, paused: wish.paused };
    restore(vm, task, target).await?;
    Ok(was_running && !wish.paused)
}

/// Whether an earlier try of the same task has come to its end, and the guest runs then, or is held.
async fn is_up(vm: &VmRuntime, wish: &Wish<'_>) -> Result<Option<bool>, Problem> {
    let Ok(qmp) = vm.qmp() else { return Ok(None) };
    let status = qmp.call(QueryStatus {}).await.map_err(layers::refused)?;
    let is_held = wish.paused && status.status == RunState::Paused;
    Ok((status.running || is_held).then_some(status.running))
}

/// The clone's files. The record comes last: without it, this is done again.
async fn make(vm: &mut VmRuntime, task: &TaskContext, wish: &Wish<'_>) -> Result<(), Problem> {
    let services = Arc::clone(vm.services());
    let dirs = vm.dirs()?.clone();
    let origin = wish.origin.clone();
    let reader = services.user_id(wish.definition.number);
    files::make_directories(&services, &dirs, wish.definition).await?;
    let mut manifest = archive::read(&origin, wish.snapshot)?;
    let definition = machine(&manifest, wish.definition)?;
    image::check_present(&dirs.pool, &definition.image).await?;
    let taking = Taking { origin, dirs: dirs.clone(), share: wish.share, task: task.clone() };
    while let Err(problem) = take(&taking, &manifest, &definition, wish.first_snapshot, reader).await {
        // The origin's layers may have been merged in the middle: then the snapshot lies on others now.
        let now = archive::read(&taking.origin, wish.snapshot)?;
        if now.disks() == manifest.disks() {
            return Err(problem);
        }
        manifest = now;
    }
    let ground = Ground { services: Arc::clone(&services), definition, dirs: dirs.clone() };
    let definition = &ground.definition;
    let top = &definition.first_layer;
    layers::create(&ground, &manifest.disks(), top).await?;
    make_nvram(&taking, reader, &manifest, top).await?;
    files::write_seed(&services, &dirs, definition).await?;
    let fittings = manifest.fittings.renewed(top)?;
    let disks = manifest.disks().with_tops(top);
    vm.set_vm_record(VmRecord::new(ground.definition, disks, fittings)).await
}

/// What is frozen.
async fn take(
    taking: &Taking,
    manifest: &Manifest,
    definition: &VmDefinition,
    first: Option<&SnapshotId>,
    reader: Option<u32>,
) -> Result<(), Problem> {
    let (taking, manifest) = (taking.clone(), manifest.clone());
    let own = first.map(|snapshot| first_manifest(&manifest, definition, snapshot.clone()));
    blocking(move || {
        taking.layers(&manifest.disks())?;
        own.map_or(Ok(()), |own| taking.snapshot(&manifest.snapshot, &own, reader))
    })
    .await
}

/// The machine is the one that the snapshot is of, who it is is the clone.
fn machine(manifest: &Manifest, wanted: &VmDefinition) -> Result<VmDefinition, Problem> {
    let then = &manifest.definition;
    if then.spec.nics.len() != wanted.spec.nics.len() {
        let expected = format!("{}, as many as the snapshot has", then.spec.nics.len());
        return Err(Problem::field("definition.spec.nics", wanted.spec.nics.len(), expected));
    }
    let mut definition = VmDefinition { image: then.image.clone(), ..wanted.clone() };
    let (spec, was) = (&mut definition.spec, &then.spec);
    (spec.vcpus, spec.memory_mib, spec.disk_mib) = (was.vcpus, was.memory_mib, was.disk_mib);
    spec.data_disks_mib.clone_from(&was.data_disks_mib);
    spec.image.clone_from(&was.image);
    spec.machine_type.clone_from(&was.machine_type);
    (spec.firmware, spec.tpm) = (was.firmware, was.tpm);
    spec.cpu_model.clone_from(&was.cpu_model);
    Ok(definition)
}

/// The snapshot as the clone's own.
fn first_manifest(manifest: &Manifest, definition: &VmDefinition, snapshot: SnapshotId) -> Manifest {
    let known = || manifest.definition.spec.nics.clone();
    Manifest {
        snapshot,
        definition: definition.clone(),
        borrowed_nics: Some(manifest.borrowed_nics.clone().unwrap_or_else(known)),
        ..manifest.clone()
    }
}

/// What the clone's machine remembers beside its disk: what the origin's did. It is the clone's own from here on.
async fn make_nvram(
    taking: &Taking,
    owner: Option<u32>,
    manifest: &Manifest,
    top: &LayerId,
) -> Result<(), Problem> {
    if manifest.fittings.nvram.is_none() {
        return Ok(());
    }
    let (origin, manifest, top) = (taking.origin.clone(), manifest.clone(), top.clone());
    let place = Place { dirs: taking.dirs.clone(), owner };
    blocking(move || {
        place.make(&top, &archive::remembered(&origin, &manifest)?)?;
        Ok(nvram::sync(&place.dirs, &top)?)
    })
    .await
}

/// Takes what is frozen over from the origin. Blocks.
#[derive(Clone)]
pub(super) struct Taking {
    /// Where they are.
    pub(super) origin: VmDirs,
    /// Where they are to be.
    pub(super) dirs: VmDirs,
    /// Link them, or copy them.
    pub(super) share: bool,
    /// Whether it is still wanted.
    pub(super) task: TaskContext,
}

impl Taking {
    /// Frozen layers.
    ///
    /// # Errors
    /// When one is not there, or not frozen.
    pub(super) fn layers(&self, disks: &Disks) -> Result<(), Problem> {
        for layer in disks.layers() {
            let (from, to) = (self.origin.layer(layer), self.dirs.layer(layer));
            let found = fs::metadata(&from).map_err(FileError::io(&from, "found"))?;
            if found.permissions().mode() & 0o222 != 0 {
                let message =
                    format!("layer {layer} of {} is not frozen yet: try again", self.origin.disk.display());
                return Err(Problem::new(ProblemCode::Busy, message));
            }
            self.take(&from, &to)?;
            if self.share {
                hashes::link(&self.origin, &self.dirs, layer)?;
            }
        }
        Ok(disks.tops().next().map_or(Ok(()), |last| durable::sync_parent(&self.dirs.layer(last)))?)
    }

    /// A snapshot's files, which become those of this manifest's.
    ///
    /// # Errors
    /// When the system refuses.
    pub(super) fn snapshot(
        &self,
        from: &SnapshotId,
        own: &Manifest,
        reader: Option<u32>,
    ) -> Result<(), Problem> {
        let source = SnapshotFiles::of(&self.origin, from);
        // A whole one that an earlier try left, which died before the record was written.
        archive::remove(&self.dirs, &own.snapshot)?;
        let draft = Draft::begin(&self.dirs, &own.snapshot, reader)?;
        let directory = source.directory();
        for entry in fs::read_dir(directory).map_err(FileError::io(directory, "read"))? {
            let name = entry.map_err(FileError::io(directory, "read"))?.file_name();
            let path = directory.join(&name);
            if path != source.manifest() {
                self.take(&path, &draft.files().directory().join(&name))?;
            }
        }
        Ok(draft.finish(own)?)
    }

    fn take(&self, from: &Path, to: &Path) -> Result<(), Problem> {
        self.task.check_cancelled()?;
        // What an earlier try left.
        durable::remove_file(to)?;
        if self.share {
            return Ok(fs::hard_link(from, to).map_err(FileError::io(to, "linked"))?);
        }
        let file = copy(from, to, &self.task).map_err(FileError::io(to, "copied"))?;
        let mode = fs::metadata(from).map_err(FileError::io(from, "examined"))?.permissions().mode();
        file.set_permissions(fs::Permissions::from_mode(mode & FROZEN_MODE))
            .and_then(|()| file.sync_all())
            .map_err(FileError::io(to, "brought to the disk"))?;
        Ok(())
    }
}

/// Copies a file with its holes: as shared blocks where the file system can, which is not shared memory.
fn copy(from: &Path, to: &Path, task: &TaskContext) -> io::Result<fs::File> {
    let source = fs::File::open(from)?;
    let length = source.metadata()?.len();
    let target = fs::OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(to)?;
    if ioctl_ficlone(&target, &source).is_ok() {
        return Ok(target);
    }
    target.set_len(length)?;
    let (mut room, mut buffer, mut at) = (Room::default(), vec![0; COPY_BYTES], 0);
    while let Some(begin) = after(&source, SeekFrom::Data(at))? {
        let end = after(&source, SeekFrom::Hole(begin))?.unwrap_or(length);
        at = begin;
        while at < end {
            task.check_cancelled().map_err(|_| io::Error::from(io::ErrorKind::Interrupted))?;
            let most = usize::try_from(end - at).map_or(COPY_BYTES, |left| left.min(COPY_BYTES));
            source.read_exact_at(&mut buffer[..most], at)?;
            room.take(&target, most as u64)?;
            target.write_all_at(&buffer[..most], at)?;
            at += most as u64;
        }
    }
    Ok(target)
}

/// Where data, or a hole, begins; none behind the last.
fn after(file: &fs::File, from: SeekFrom) -> io::Result<Option<u64>> {
    match seek(file, from) {
        Ok(at) => Ok(Some(at)),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// What the clone's frozen files occupy.
async fn stored_bytes(vm: &VmRuntime, wish: &Wish<'_>) -> Result<u64, Problem> {
    let dirs = vm.dirs()?.clone();
    let below = vm.disks()?.frozen();
    let snapshot = wish.first_snapshot.map(|first| dirs.snapshot(first));
    blocking(move || {
        let mut paths: Vec<_> = below.layers().map(|layer| dirs.layer(layer)).collect();
        if let Some(directory) = snapshot {
            let entries = fs::read_dir(&directory).map_err(FileError::io(&directory, "read"))?;
            paths.extend(entries.flatten().map(|entry| entry.path()));
        }
        let stored = paths.iter().filter_map(|path| fs::metadata(path).ok()).map(|file| file.blocks() * 512);
        Ok(stored.sum())
    })
    .await
}

/// After a failure: nothing of the clone is left.
async fn remove(vm: &mut VmRuntime, wish: &Wish<'_>, mut problem: Problem) -> Problem {
    let pool = &wish.definition.spec.pool;
    if let Err(error) = lifecycle::delete(vm, pool, false).await {
        tracing::warn!(vm = %vm.id(), %error, "a clone that failed leaves something behind");
        problem.message.push_str("; and it could not be removed: ");
        problem.message.push_str(&error.message);
    }
    problem
}
