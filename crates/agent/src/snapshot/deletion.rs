//! Deleting a snapshot, and what that will come to.
//!
//! What is free at once is the snapshot's memory, if no other snapshot has the same, and the layers that nothing else lies
//! on. What follows is merging, in the background: the forecast makes the same choices as the merges will, on the tree as it
//! will be, and reads the layers' tables to know how much of their data is hidden by what lies on it.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use berth_api::agent::TaskOutput;
use berth_model::snapshot::DeletionFacts;
use berth_model::{LayerId, Problem, SnapshotId, VmId};

use super::archive::{self, SnapshotFiles};
use super::merge::choice::{Stored, Tree, replaced};
use super::merge::{MergeStatistics, read_trees};
use super::remove_unneeded_layers;
use crate::disks::Disks;
use crate::durable::{self, FileError, blocking};
use crate::layout::{HostRecord, VmDirs, VmRecord};
use crate::services::Services;
use crate::task::TaskContext;
use crate::vm::VmRuntime;

/// The pace that merges are taken to have before there was one, in bytes a millisecond: a slow disk's.
const PACE_AT_FIRST: u64 = (32 << 20) / 1000;
/// How many merges a forecast looks ahead.
const MERGES_AHEAD: usize = 16;

/// Removes a snapshot, and the layers that nothing needs any more; nothing if there is none.
///
/// # Errors
/// When the system refuses.
pub async fn delete(
    vm: &mut VmRuntime,
    context: &TaskContext,
    snapshot: &SnapshotId,
) -> Result<TaskOutput, Problem> {
    context.phase("deleting");
    let (dirs, live, snapshot) = (vm.dirs()?.clone(), vm.disks()?, snapshot.clone());
    let facts = forecast_of(vm.services(), &dirs, &live, &snapshot).await?;
    blocking(move || {
        archive::remove(&dirs, &snapshot)?;
        remove_unneeded_layers(&dirs, &live)
    })
    .await?;
    Ok(TaskOutput::Deleted { facts })
}

/// What deleting a snapshot of a VM on this host would come to; done past the VM's queue, since it only looks.
///
/// # Errors
/// When this host has no such VM or snapshot, or a file can't be read.
pub async fn forecast(
    services: &Services,
    vm: &VmId,
    snapshot: &SnapshotId,
) -> Result<DeletionFacts, Problem> {
    let (layout, id, wanted) = (services.layout.clone(), vm.clone(), snapshot.clone());
    let (dirs, record) = blocking(move || {
        let host: Option<HostRecord> = durable::read_json(&layout.host_record(&id))?;
        let host = host.ok_or_else(|| Problem::not_found("vm", &id))?;
        let dirs = layout.vm(&id, &host.pool)?;
        archive::read(&dirs, &wanted)?;
        let record: Option<VmRecord> = durable::read_json(&dirs.vm_record())?;
        Ok((dirs, record))
    })
    .await?;
    let live = record.ok_or_else(|| Problem::not_found("vm", vm))?.disks();
    forecast_of(services, &dirs, &live, snapshot).await
}

async fn forecast_of(
    services: &Services,
    dirs: &VmDirs,
    live: &Disks,
    snapshot: &SnapshotId,
) -> Result<DeletionFacts, Problem> {
    let (at, live, gone) = (dirs.clone(), live.clone(), snapshot.clone());
    let (trees, mut facts) = blocking(move || {
        let mut facts = DeletionFacts { freed_bytes: own_bytes(&at, &gone)?, ..DeletionFacts::default() };
        let mut trees = read_trees(&at, &live, Some(&gone))?;
        facts.freed_bytes += trees.iter_mut().map(drop_unneeded).sum::<u64>();
        Ok((trees, facts))
    })
    .await?;
    for tree in trees {
        merges_ahead(services, dirs, tree, &mut facts).await;
    }
    facts.merging_ms = facts.merged_bytes / pace(&services.merges);
    Ok(facts)
}

/// What the merges of one disk's layers will come to.
async fn merges_ahead(services: &Services, dirs: &VmDirs, mut tree: Tree, facts: &mut DeletionFacts) {
    // What a layer that is yet to be made is made of.
    let mut made_of: BTreeMap<LayerId, Vec<LayerId>> = BTreeMap::new();
    for number in 0..MERGES_AHEAD {
        if services.config.layers_max == 0 {
            break;
        }
        let Some(run) = tree.choose(services.config.layers_max) else { break };
        let parts = |layer: &LayerId| made_of.get(layer).cloned().unwrap_or_else(|| vec![layer.clone()]);
        let layers: Vec<LayerId> = run.layers.iter().flat_map(parts).collect();
        let paths: Vec<PathBuf> = layers.iter().map(|layer| dirs.layer(layer)).collect();
        // Layers that can't be measured can't be merged either.
        let Ok(bytes) = services.images.measure_layers(paths).await else { break };
        let result = stand_in(number);
        made_of.insert(result.clone(), layers);
        for way in std::iter::once(&mut tree.live).chain(&mut tree.snapshots) {
            if let Some(new) = replaced(way, &run.layers, &result) {
                *way = new;
            }
        }
        tree.stored.insert(result, Stored { bytes, frozen: true, shared: false });
        facts.merged_bytes += bytes;
        facts.freed_later_bytes += drop_unneeded(&mut tree).saturating_sub(bytes);
    }
}

/// An id that no layer has.
fn stand_in(number: usize) -> LayerId {
    let mut entropy = [0xff; 10];
    entropy[9] = u8::try_from(number).unwrap_or(u8::MAX);
    LayerId::from_entropy(entropy)
}

/// Takes out what nobody needs; gives what that frees, in bytes.
fn drop_unneeded(tree: &mut Tree) -> u64 {
    let gone: Vec<LayerId> = tree.unneeded().cloned().collect();
    let removed = gone.iter().filter_map(|layer| tree.stored.remove(layer));
    removed.filter(|stored| !stored.shared).map(|stored| stored.bytes).sum()
}

/// What a snapshot's own directory occupies and no other name of it keeps, in bytes.
fn own_bytes(dirs: &VmDirs, snapshot: &SnapshotId) -> Result<u64, Problem> {
    let directory = SnapshotFiles::of(dirs, snapshot).directory().to_owned();
    let Ok(entries) = std::fs::read_dir(&directory) else { return Ok(0) };
    let mut bytes = 0;
    for entry in entries.flatten() {
        let file = entry.metadata().map_err(FileError::io(&entry.path(), "examined"))?;
        bytes += if file.is_file() && file.nlink() == 1 { file.blocks() * 512 } else { 0 };
    }
    Ok(bytes)
}

/// How fast layers were merged on this host so far, in bytes a millisecond.
fn pace(statistics: &MergeStatistics) -> u64 {
    let copied = statistics.copied_bytes.load(Ordering::Relaxed);
    let took = statistics.copied_ms.load(Ordering::Relaxed);
    copied.checked_div(took).filter(|pace| *pace > 0).unwrap_or(PACE_AT_FIRST)
}
