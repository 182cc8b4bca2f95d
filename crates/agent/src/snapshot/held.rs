//! A guest that is held may be taken again and again, and QEMU 7.2 lets a machine be sent only once between two runs.
//!
//! But a guest that has not run has not changed: the next snapshot's memory is the last one's. So the last snapshot of a
//! held guest is remembered beside its sockets, as long as QEMU says that it is where that snapshot left it.

use std::fs;
use std::path::PathBuf;

use berth_model::{LayerId, Problem, SnapshotId};
use berth_qmp::commands::{QueryStatus, RunState};

use super::archive::{self, Manifest, MemoryManifest, SnapshotFiles};
use crate::durable::{self, FileError};
use crate::vm::VmRuntime;

fn marker(vm: &VmRuntime) -> Result<PathBuf, Problem> {
    Ok(vm.dirs()?.run.join("held.json"))
}

/// Remembers that the guest is where this snapshot left it.
pub fn remember(vm: &VmRuntime, snapshot: &SnapshotId) -> Result<(), Problem> {
    Ok(durable::write_json(&marker(vm)?, snapshot)?)
}

/// Forgets it when the guest may have run since.
pub async fn forget_unless_held(vm: &VmRuntime) -> Result<(), Problem> {
    let status = vm.qmp()?.call(QueryStatus {}).await.map_err(super::layers::refused)?;
    if status.status != RunState::PostMigrate {
        durable::remove_file(&marker(vm)?)?;
    }
    Ok(())
}

/// The snapshot that the guest was left at, if nothing came between it and now.
pub fn find(vm: &VmRuntime, chain_below_top: &[LayerId]) -> Result<Option<Manifest>, Problem> {
    let Some(snapshot) = durable::read_json::<SnapshotId>(&marker(vm)?)? else { return Ok(None) };
    let Ok(manifest) = archive::read(vm.dirs()?, &snapshot) else { return Ok(None) };
    // What lies on the snapshot's layers is empty: the one that the guest, had it run, would have written to, and those
    // of snapshots of the disk alone.
    let is_on_it =
        chain_below_top.len() > manifest.layers.len() && chain_below_top.starts_with(&manifest.layers);
    Ok((is_on_it && manifest.memory.is_some()).then_some(manifest))
}

/// Gives the new snapshot the earlier one's files, which are never written again.
pub fn link(earlier: &SnapshotFiles, memory: &MemoryManifest, new: &SnapshotFiles) -> Result<(), FileError> {
    earlier.link_memory(new, memory.differences.iter().copied())?;
    for (from, to) in [(earlier.device(), new.device()), (earlier.index(), new.index())] {
        fs::hard_link(&from, &to).map_err(FileError::io(&to, "linked"))?;
    }
    Ok(())
}
