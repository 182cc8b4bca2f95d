//! Merging layers, so that the chain under a VM stays short: at most `layers_max` (16), whatever is snapshotted.
//!
//! ```text
//!   before   image ← a ← b ← c ← d ← top          the run b, c is read, and bc is written beside it
//!   after    image ← a ← bc ← d ← top             whatever went through all of b, c now goes through bc
//! ```
//!
//! Frozen layers are never written again, so a merge makes a new layer and lets go of the old ones. Nothing is ever
//! merged into a layer that a snapshot, or a clone under a name of its own, may lie on; and what ends or turns off between
//! b and c goes on with the old files ([`choice`]). Whether the VM runs makes no difference to the reading and writing,
//! which is done beside everything else ([`worker`]), slowly enough for the guest ([`throttle`]).
//!
//! Each of a VM's disks has a tree of its own.
//!
//! **Carrying it out**, between two pieces of the VM's work:
//!
//! | step | done when | the agent dies after it |
//! |---|---|---|
//! | the new layer gets its name | | it is needed by nobody, and removed |
//! | `merge.json` says what takes whose place | durable | from here on it is carried out, by whoever starts next |
//! | QEMU opens the new layer | | |
//! | `vm.json` names it | durable | a start of the VM finds the same content either way |
//! | QEMU puts it under the layer above: one `blockdev-reopen`, a few milliseconds | | |
//! | the snapshots' manifests name it | durable, one by one | old and new layers are both there |
//! | QEMU closes the old layers | | |
//! | what nobody needs is removed, and then `merge.json` | | |
//!
//! Each step finds done what was done before, so that carrying out again is carrying on. A QEMU that refuses leaves all as
//! it was. Power that fails meets the same states: a record names only what was brought to the disk before.
//!
//! **A snapshot that finds the chain full** waits for a merge at full speed ([`make_room`]); if that fails, it is refused.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use berth_api::agent::VmDefinition;
use berth_model::{LayerId, Problem, ProblemCode, SnapshotId, VmId};
use serde::{Deserialize, Serialize};

use super::archive::{self, ArchiveError, Manifest};
use super::{layers, layers_present, remove_unneeded_layers};
use crate::disk::merging::Merging;
use crate::disk::pace::Pace;
use crate::disk::{self, FROZEN_MODE, ImageTool};
use crate::disks::{Disks, ROOT};
use crate::durable::{self, FileError, blocking};
use crate::layout::VmDirs;
use crate::migration::storage::receiving::remove_unfinished;
use crate::nvram;
use crate::task::TaskContext;
use crate::vm::VmRuntime;

pub mod choice;
pub mod throttle;
pub mod worker;

use choice::{Run, Stored, Tree, replaced};

/// What takes whose place: `merge.json`, while it is being carried out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Merge {
    /// The new layer.
    pub result: LayerId,
    /// The layers that it was made of, from the lowest to the uppermost.
    pub run: Vec<LayerId>,
}

impl Merge {
    /// These disks with the new layer in the place of the run, where the whole of that is.
    fn carried_out(&self, mut disks: Disks) -> Disks {
        for way in disks.each_mut() {
            if let Some(new) = replaced(way, &self.run, &self.result) {
                *way = new;
            }
        }
        disks
    }
}

/// A run of a disk's layers that are to be merged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskRun {
    /// Which disk.
    pub disk: usize,
    /// The run.
    pub run: Run,
}

/// What this host's merges have come to since the agent started.
#[derive(Debug, Default)]
pub struct MergeStatistics {
    /// Merges that were carried out.
    pub merges: AtomicU64,
    /// Layers that are fewer for it.
    pub layers: AtomicU64,
    /// What was copied, in bytes.
    pub copied_bytes: AtomicU64,
    /// What the copying took, in milliseconds.
    pub copied_ms: AtomicU64,
}

/// What preparing a merge needs to know of a VM: so much that it can be done beside the VM's other work.
#[derive(Clone)]
pub struct Ground {
    dirs: VmDirs,
    definition: VmDefinition,
    live: Disks,
    layers_max: usize,
    images: Arc<dyn ImageTool>,
    statistics: Arc<MergeStatistics>,
}

impl Ground {
    /// What there is now; none when this VM's layers are not to be merged here and now.
    pub fn of(vm: &VmRuntime) -> Option<Self> {
        let record = vm.vm_record().ok()?;
        let services = vm.services();
        let at_home = vm.host_record().ok()?.migration.is_none();
        (at_home && services.config.layers_max > 0).then(|| Self {
            dirs: vm.dirs().expect("a VM with a record has directories").clone(),
            definition: record.definition.clone(),
            live: record.disks(),
            layers_max: services.config.layers_max,
            images: Arc::clone(&services.images),
            statistics: Arc::clone(&services.merges),
        })
    }

    /// Which VM.
    pub const fn vm(&self) -> &VmId {
        &self.definition.id
    }

    /// What is to be merged next, among disks of this many layers or more.
    ///
    /// # Errors
    /// When a manifest or a directory can't be read.
    pub async fn choose(&self, layers_min: usize) -> Result<Option<DiskRun>, Problem> {
        let (dirs, live, layers_max) = (self.dirs.clone(), self.live.clone(), self.layers_max);
        blocking(move || {
            let trees = read_trees(&dirs, &live, None)?;
            let mut trees = trees.iter().enumerate().filter(|(_, tree)| tree.live.len() >= layers_min);
            Ok(trees.find_map(|(disk, tree)| Some(DiskRun { disk, run: tree.choose(layers_max)? })))
        })
        .await
    }

    /// Writes the merged layer, under a name that says that it is not finished.
    ///
    /// # Errors
    /// When a layer can't be read, there is no room, or it is broken off. Nothing is left of it then.
    pub async fn merge(&self, chosen: DiskRun, pace: &Pace) -> Result<Merge, Problem> {
        let DiskRun { disk, run } = chosen;
        let result = new_layer_id()?;
        let below = run.below.as_ref();
        let place = disk::Place { dirs: &self.dirs, definition: &self.definition, disk };
        let backing = disk::new_layer(place, None, &result, below).backing;
        let from = run.layers.iter().map(|layer| self.dirs.layer(layer)).collect();
        let to = self.dirs.unfinished_layer(&result);
        let (began, before) = (Instant::now(), pace.done_bytes());
        self.images.merge_layers(Merging { from, to, backing }, pace.clone()).await?;
        let copied_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.statistics.copied_bytes.fetch_add(pace.done_bytes() - before, Ordering::Relaxed);
        self.statistics.copied_ms.fetch_add(copied_ms, Ordering::Relaxed);
        Ok(Merge { result, run: run.layers })
    }
}

fn new_layer_id() -> Result<LayerId, Problem> {
    let mut entropy = [0; 10];
    getrandom::fill(&mut entropy)
        .map_err(|error| Problem::new(ProblemCode::Internal, format!("no random numbers: {error}")))?;
    Ok(LayerId::from_entropy(entropy))
}

/// The layers of each disk as they are on the pool, and as they would be needed if it were not for one snapshot. Those that
/// nothing names are counted to the root disk's. Blocks.
///
/// # Errors
/// When a manifest or a directory can't be read.
pub fn read_trees(dirs: &VmDirs, live: &Disks, without: Option<&SnapshotId>) -> Result<Vec<Tree>, Problem> {
    let manifests = manifests(dirs)?;
    let mut trees: Vec<Tree> =
        live.each().map(|live| Tree { live: live.to_vec(), ..Tree::default() }).collect();
    for manifest in manifests.iter().filter(|manifest| Some(&manifest.snapshot) != without) {
        for (tree, way) in trees.iter_mut().zip(manifest.disks().each()) {
            tree.snapshots.push(way.to_vec());
        }
    }
    let named: Vec<Disks> = manifests.iter().map(Manifest::disks).chain([live.clone()]).collect();
    for layer in layers_present(dirs)? {
        let disk = named.iter().find_map(|disks| disks.find(&layer)).map_or(ROOT, |(disk, _)| disk);
        let Some(tree) = trees.get_mut(disk) else { continue };
        let path = dirs.layer(&layer);
        let file = std::fs::metadata(&path).map_err(FileError::io(&path, "examined"))?;
        let stored = Stored {
            bytes: file.blocks() * 512,
            frozen: file.permissions().mode() & 0o777 == FROZEN_MODE,
            shared: file.nlink() > 1,
        };
        tree.stored.insert(layer, stored);
    }
    Ok(trees)
}

fn manifests(dirs: &VmDirs) -> Result<Vec<Manifest>, Problem> {
    let mut manifests = Vec::new();
    for snapshot in archive::list(dirs)? {
        match archive::read(dirs, &snapshot) {
            Ok(manifest) => manifests.push(manifest),
            // What is left of a removal is no snapshot.
            Err(ArchiveError::Missing { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(manifests)
}

/// Makes sure that one more layer may lie on the VM's, by merging some if need be.
///
/// # Errors
/// When the chain is full and can't be merged, with what to do; when somebody cancels.
pub async fn make_room(vm: &mut VmRuntime, context: &TaskContext) -> Result<(), Problem> {
    loop {
        let Some(ground) = Ground::of(vm) else { return Ok(()) };
        if ground.live.longest() < ground.layers_max {
            return Ok(());
        }
        context.phase("merging");
        let pace = Pace::new(u64::MAX);
        let merged = context
            .unless_cancelled(async {
                match ground.choose(ground.layers_max).await? {
                    Some(chosen) => ground.merge(chosen, &pace).await,
                    None => Err(Problem::new(ProblemCode::WrongState, "none of its layers is frozen yet")),
                }
            })
            .await;
        let carried_out = match merged.unwrap_or_else(|problem| {
            pace.break_off();
            Err(problem)
        }) {
            Ok(merge) => carry_out(vm, &merge).await,
            Err(problem) => Err(problem),
        };
        if let Err(mut problem) = carried_out {
            if problem.code != ProblemCode::Cancelled {
                problem.message = format!(
                    "a disk of {} lies on {} layers, the most that is allowed (layers_max), and they can't be merged: \
                     {}; make room on the pool, or delete snapshots that are not needed",
                    vm.id(),
                    ground.live.longest(),
                    problem.message
                );
            }
            return Err(problem);
        }
    }
}

/// Puts a merged layer in the place of those that it was made of; nothing, but that it is removed, if it is not wanted
/// any more.
///
/// # Errors
/// When QEMU or the system refuses. What was begun is then undone, or stands in `merge.json` and is gone on with.
pub async fn carry_out(vm: &mut VmRuntime, merge: &Merge) -> Result<(), Problem> {
    if vm.qmp().is_err() && !vm.rests() {
        discard(vm, merge).await?;
        return Err(vm.wrong_state("a VM whose process can be spoken to, or none"));
    }
    // A process that was made ready for a restore has the old layers open, a record that names them, and a layer of its
    // own that is on no record yet.
    super::drop_ready(vm).await;
    finish_begun(vm).await?;
    let (dirs, live, wanted) = (vm.dirs()?.clone(), vm.disks()?, merge.clone());
    let named = blocking(move || name(&dirs, &live, &wanted)).await;
    if !matches!(named, Ok(true)) {
        discard(vm, merge).await?;
        return named.map(drop);
    }
    go_on(vm, merge).await?;
    let statistics = &vm.services().merges;
    statistics.merges.fetch_add(1, Ordering::Relaxed);
    statistics.layers.fetch_add(merge.run.len() as u64 - 1, Ordering::Relaxed);
    tracing::info!(vm = %vm.id(), layers = merge.run.len(), result = %merge.result, chain = vm.disks()?.longest(), "layers were merged");
    Ok(())
}

/// Gives the new layer its name and writes down what it is for; false when nobody wants it any more.
fn name(dirs: &VmDirs, live: &Disks, merge: &Merge) -> Result<bool, Problem> {
    let is_wanted = |tree: &Tree| {
        let there = merge.run.iter().all(|layer| tree.stored.get(layer).is_some_and(|stored| stored.frozen));
        let mut ways = std::iter::once(&tree.live).chain(&tree.snapshots);
        there && ways.any(|way| replaced(way, &merge.run, &merge.result).is_some())
    };
    let is_written = live.tops().any(|top| merge.run.contains(top));
    if is_written || !read_trees(dirs, live, None)?.iter().any(is_wanted) {
        return Ok(false);
    }
    let path = dirs.layer(&merge.result);
    std::fs::rename(dirs.unfinished_layer(&merge.result), &path).map_err(FileError::io(&path, "named"))?;
    durable::sync_parent(&path)?;
    durable::write_json(&dirs.merge_record(), merge)?;
    Ok(true)
}

/// Carries out what `merge.json` says, from wherever it stands.
async fn go_on(vm: &mut VmRuntime, merge: &Merge) -> Result<(), Problem> {
    let dirs = vm.dirs()?.clone();
    if let Err(problem) = switch(vm, merge).await {
        if !vm.disks()?.contains(&merge.result) {
            discard(vm, merge).await?;
        }
        return Err(problem);
    }
    let (at, rewriting) = (dirs.clone(), merge.clone());
    blocking(move || rewrite_manifests(&at, &rewriting)).await?;
    close_old(vm, merge).await?;
    let live = vm.disks()?;
    blocking(move || {
        remove_unneeded_layers(&dirs, &live)?;
        Ok(durable::remove_file(&dirs.merge_record())?)
    })
    .await
}

/// The VM itself: its record, and its process if it has one.
async fn switch(vm: &mut VmRuntime, merge: &Merge) -> Result<(), Problem> {
    let before = vm.disks()?;
    let after = merge.carried_out(before.clone());
    if !after.contains(&merge.result) {
        return Ok(());
    }
    if vm.qmp().is_err() {
        return vm.set_disks(after).await;
    }
    layers::open_frozen(vm, &after, &merge.result).await?;
    vm.set_disks(after.clone()).await?;
    if let Err(problem) = layers::put_under(vm, &after, &merge.result).await {
        // On record is what QEMU has, so that the next work on the disk finds it.
        vm.set_disks(before).await?;
        return Err(problem);
    }
    Ok(())
}

fn rewrite_manifests(dirs: &VmDirs, merge: &Merge) -> Result<(), Problem> {
    for mut manifest in manifests(dirs)? {
        let (before, after) = (manifest.disks(), merge.carried_out(manifest.disks()));
        if before != after {
            manifest.set_disks(after);
            archive::rewrite(dirs, &manifest)?;
        }
    }
    Ok(())
}

async fn close_old(vm: &VmRuntime, merge: &Merge) -> Result<(), Problem> {
    let Ok(qmp) = vm.qmp() else { return Ok(()) };
    let used = vm.disks()?;
    for layer in merge.run.iter().rev().filter(|layer| !used.contains(layer)) {
        layers::close_node(qmp, layer).await?;
    }
    Ok(())
}

/// Lets go of a merge: what was made for it is removed, unless somebody needs it by now.
async fn discard(vm: &VmRuntime, merge: &Merge) -> Result<(), Problem> {
    let (dirs, live, result) = (vm.dirs()?.clone(), vm.disks()?, merge.result.clone());
    if let Ok(qmp) = vm.qmp()
        && !live.contains(&result)
    {
        layers::close_node(qmp, &result).await?;
    }
    blocking(move || {
        durable::remove_file(&dirs.merge_record())?;
        durable::remove_file(&dirs.unfinished_layer(&result))?;
        remove_unneeded_layers(&dirs, &live)
    })
    .await
}

/// Goes on with a merge that was begun and not ended.
async fn finish_begun(vm: &mut VmRuntime) -> Result<(), Problem> {
    let dirs = vm.dirs()?.clone();
    let at = dirs.clone();
    let begun: Option<Merge> = blocking(move || Ok(durable::read_json(&at.merge_record())?)).await?;
    match begun {
        Some(merge) if dirs.layer(&merge.result).exists() => go_on(vm, &merge).await,
        Some(merge) => discard(vm, &merge).await,
        None => Ok(()),
    }
}

/// Goes on with a merge that an agent before this one was carrying out, and removes what was only prepared.
///
/// # Errors
/// When QEMU refuses or the system does.
pub async fn recover(vm: &mut VmRuntime) -> Result<(), Problem> {
    // A VM that is on its way has its layers looked at by whoever has it in the end.
    let spoken_to = vm.qmp().is_ok() || vm.rests();
    if vm.vm_record().is_err() || vm.host_record()?.migration.is_some() || !spoken_to {
        return Ok(());
    }
    finish_begun(vm).await?;
    // One that is being made ready for a restore has files that are on no record yet.
    let is_alone = vm.ready_mut().is_none();
    let (live, fittings) = (vm.disks()?, vm.vm_record()?.fittings.clone());
    let dirs = vm.dirs()?.clone();
    blocking(move || {
        if is_alone {
            nvram::remove_others(&dirs, fittings.nvram.as_ref())?;
        }
        remove_unfinished(&dirs.layers())?;
        remove_unneeded_layers(&dirs, &live)
    })
    .await
}
