//! Switching a running guest to new writable layers, and back.
//!
//! The new layers, one for each disk, are made and opened while the guest runs; the switch itself is one transaction, about
//! a millisecond: all disks are switched in one instant, or none is. What the old tops then hold is frozen: nobody writes
//! to it again, unless the switch is taken back.
//!
//! **What is written down when.** The chains with the new layers are on record *before* the switch. An empty layer on top
//! changes nothing of what the disk says, so a VM that is started from that record finds its disk, whether the switch
//! came to be or not. A process that is found running is asked which layers it writes to ([`used_of`]): it knows best.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use berth_model::image::PartRole;
use berth_model::{LayerId, Problem, ProblemCode};
use berth_qmp::commands::{
    BlockCommit, BlockdevAdd, BlockdevDel, JobComplete, JobDismiss, JobStatus, QueryBlock, QueryJobs,
    QueryNamedBlockNodes, Transaction, TransactionAction,
};
use berth_qmp::{EventKind, Qmp, QmpError};
use serde_json::{Value, json};

use super::overlay::{self, Below};
use crate::disk::FROZEN_MODE;
use crate::disks::{self, Disks};
use crate::durable::{self, FileError, blocking};
use crate::layout::VmDirs;
use crate::qemu::disk::{Access, Backing, image_node, layer_node, layer_options};
use crate::vm::VmRuntime;
use crate::vm::process::Ground;

/// How long a switch that is taken back may take: what the guest wrote since is copied down.
const TAKE_BACK_TIMEOUT: Duration = Duration::from_secs(120);

/// Makes the files of new layers on top of these disks; those that are there are replaced. [`sync`] brings them to the
/// disk.
///
/// # Errors
/// When the system refuses, a full disk for one, or a disk has no layer. Some of the files may be there.
pub async fn create(ground: &Ground, below: &Disks, new_top: &LayerId) -> Result<(), Problem> {
    let (ground, below, new_top) = (ground.clone(), below.clone(), new_top.clone());
    blocking(move || {
        let owner = ground.user_id();
        for (disk, chain) in below.each().enumerate() {
            let path = ground.dirs.layer(&disks::top(&new_top, disk));
            let size_bytes = disks::size_bytes(&ground.definition, disk);
            let name = format!("{}.qcow2", super::last(chain)?);
            let below = Below { path: &name, format: "qcow2" };
            overlay::create(&path, size_bytes, below, owner).map_err(FileError::io(&path, "made"))?;
        }
        Ok(())
    })
    .await
}

/// Brings the files of a VM's writable layers to the disk, with their names.
///
/// # Errors
/// When the system refuses.
pub async fn sync(dirs: &VmDirs, disks: &Disks) -> Result<(), Problem> {
    let paths: Vec<PathBuf> = disks.tops().map(|layer| dirs.layer(layer)).collect();
    blocking(move || {
        for path in &paths {
            let file = File::open(path).map_err(FileError::io(path, "opened"))?;
            file.sync_all().map_err(FileError::io(path, "brought to the disk"))?;
        }
        Ok(paths.first().map_or(Ok(()), |path| durable::sync_parent(path))?)
    })
    .await
}

/// Makes, opens and writes down new layers on these, which the guest uses and may write to; what it has written is brought
/// to the disk.
///
/// # Errors
/// When QEMU or the system refuses. Some of the layers may be there and open.
pub async fn prepare_switch(vm: &mut VmRuntime, disks: &Disks, new_top: &LayerId) -> Result<(), Problem> {
    create(&vm.ground()?, disks, new_top).await?;
    let more = disks.clone().with_tops(new_top);
    sync(vm.dirs()?, &more).await?;
    for layer in more.tops() {
        open(vm, layer).await?;
    }
    vm.set_disks(more).await?;
    flush(&top_files(vm.dirs()?, disks)).await
}

/// The files of the uppermost layers.
pub fn top_files(dirs: &VmDirs, disks: &Disks) -> Vec<PathBuf> {
    disks.tops().map(|layer| dirs.layer(layer)).collect()
}

/// Opens the new layer in the VM's process, beside the chain that the guest uses. The file must be there.
///
/// # Errors
/// When QEMU refuses.
async fn open(vm: &VmRuntime, new_top: &LayerId) -> Result<(), Problem> {
    let qmp = vm.qmp()?;
    // What an earlier try left open.
    let _ = qmp.call(BlockdevDel { node_name: layer_node(new_top) }).await;
    let access = Access::Writable { direct_io: direct_io(vm)? };
    let options = layer_options(vm.dirs()?, new_top, &Backing::None, access);
    qmp.call(BlockdevAdd { options }).await.map(|_| ()).map_err(refused)
}

fn direct_io(vm: &VmRuntime) -> Result<bool, Problem> {
    let pool = &vm.dirs()?.pool.name;
    Ok(vm.services().pool_facts(pool).is_some_and(|facts| facts.direct_io))
}

/// Freezes the layers that a running guest writes to and switches it to new ones, on record before it is done. The new
/// layers stay, whatever becomes of what it was done for.
///
/// # Errors
/// When QEMU or the system refuses: the guest then writes to its layers as before.
pub async fn freeze_tops(vm: &mut VmRuntime, new_top: &LayerId) -> Result<(), Problem> {
    let disks = vm.disks()?;
    if disks.contains(new_top) {
        return Ok(());
    }
    let switched = match prepare_switch(vm, &disks, new_top).await {
        Ok(()) => switch(vm.qmp()?, &disks, new_top).await.map_err(refused),
        Err(problem) => Err(problem),
    };
    if let Err(problem) = switched {
        let count = disks.count();
        vm.set_disks(disks).await?;
        close_tops(vm, count, new_top).await?;
        return Err(problem);
    }
    for layer in disks.tops() {
        freeze(vm, layer).await?;
    }
    Ok(())
}

/// Closes layers that the guest was not switched to, and removes their files.
///
/// # Errors
/// When QEMU refuses or a file can't be removed.
pub async fn close_tops(vm: &VmRuntime, count: usize, new_top: &LayerId) -> Result<(), Problem> {
    for layer in disks::tops(new_top, count) {
        close(vm, &layer).await?;
    }
    Ok(())
}

/// Closes a layer that the guest was not switched to, and removes its file.
///
/// # Errors
/// When QEMU refuses or the file can't be removed.
pub async fn close(vm: &VmRuntime, layer: &LayerId) -> Result<(), Problem> {
    if let Ok(qmp) = vm.qmp() {
        close_node(qmp, layer).await?;
    }
    remove(vm, layer).await
}

async fn remove(vm: &VmRuntime, layer: &LayerId) -> Result<(), Problem> {
    let path = vm.dirs()?.layer(layer);
    blocking(move || Ok(durable::remove_file(&path)?)).await
}

/// Closes a layer in a VM's process; nothing if it is not open there.
///
/// # Errors
/// When QEMU refuses, because it is in use for one.
pub async fn close_node(qmp: &Qmp, layer: &LayerId) -> Result<(), Problem> {
    match qmp.call(BlockdevDel { node_name: layer_node(layer) }).await {
        Ok(_) => Ok(()),
        Err(error) if error.is_connection_lost() => Ok(()),
        // It was not open.
        Err(error) if error.refusal().is_some_and(|words| words.contains("ind node")) => Ok(()),
        Err(error) => Err(refused(error)),
    }
}

/// Opens a frozen layer in the VM's process, on what it lies on in these disks; nothing if it is open.
///
/// # Errors
/// When QEMU refuses.
pub async fn open_frozen(vm: &VmRuntime, disks: &Disks, layer: &LayerId) -> Result<(), Problem> {
    let qmp = vm.qmp()?;
    if is_open(qmp, layer).await.map_err(refused)? {
        return Ok(());
    }
    let below = backing_in(vm, disks, layer)?;
    let options = layer_options(vm.dirs()?, layer, &below, Access::Frozen);
    qmp.call(BlockdevAdd { options }).await.map(|_| ()).map_err(refused)
}

/// Has the layer above one of these disks', which is open, lie on it in the VM's process. The guest runs meanwhile: its
/// requests wait for a moment.
///
/// # Errors
/// When QEMU refuses: all is then as it was.
pub async fn put_under(vm: &VmRuntime, disks: &Disks, layer: &LayerId) -> Result<(), Problem> {
    let qmp = vm.qmp()?;
    let above = disks.find(layer).and_then(|(disk, at)| disks.of(disk).get(at + 1));
    let Some(above) = above else {
        return Err(Problem::new(ProblemCode::Internal, "a frozen layer with nothing on it"));
    };
    let access = match disks.tops().any(|top| top == above) {
        true => Access::Writable { direct_io: direct_io(vm)? },
        // As it is: see `Access::JustFrozen`.
        false => Access::JustFrozen { direct_io: is_direct(qmp, above).await.map_err(refused)? },
    };
    let mut node = layer_options(vm.dirs()?, above, &backing_in(vm, disks, above)?, access);
    let file = node.remove("file").unwrap_or_default();
    node.insert("file".into(), file["node-name"].clone());
    qmp.call_untyped("blockdev-reopen", json!({"options": [node]})).await.map(drop).map_err(refused)
}

async fn is_direct(qmp: &Qmp, layer: &LayerId) -> Result<bool, QmpError> {
    let nodes = qmp.call(QueryNamedBlockNodes { flat: Some(true) }).await?;
    let name = layer_node(layer);
    let node = nodes.into_iter().find(|node| node.node_name.as_deref() == Some(&name));
    Ok(node.and_then(|node| node.cache).is_some_and(|cache| cache.direct))
}

/// Switches the guest from the tops of these disks to new ones, which are open and empty: all in one instant.
///
/// # Errors
/// When QEMU refuses: the guest then writes to the old tops as before, all of them.
pub async fn switch(qmp: &Qmp, disks: &Disks, new_top: &LayerId) -> Result<(), QmpError> {
    let snapshot = |(old, new): (&LayerId, LayerId)| TransactionAction::BlockdevSnapshot {
        node: layer_node(old),
        overlay: layer_node(&new),
    };
    let actions = disks.tops().zip(disks::tops(new_top, disks.count())).map(snapshot).collect();
    qmp.call(Transaction { actions }).await.map(|_| ())
}

/// The part of each disk's layers that the VM's process uses, up to the layer that it writes to; none when it writes to none
/// of a disk's.
///
/// # Errors
/// When QEMU can't be asked.
pub async fn used_of(qmp: &Qmp, disks: &Disks) -> Result<Option<Disks>, QmpError> {
    let drives = qmp.call(QueryBlock {}).await?;
    let written: Vec<String> =
        drives.into_iter().filter_map(|drive| drive.inserted.and_then(|node| node.node_name)).collect();
    let mut used = disks.clone();
    for chain in used.each_mut() {
        let Some(top) = chain.iter().rposition(|layer| written.contains(&layer_node(layer))) else {
            return Ok(None);
        };
        chain.truncate(top + 1);
    }
    Ok(Some(used))
}

/// Takes a switch back, disk by disk: what the guest wrote to the new layers goes down into the tops of `disks`, the guest
/// writes to those again, and the new layers are closed and removed. The guest runs meanwhile. Only for tops that were not
/// yet frozen. What was taken back, or never switched, before stays so: this may be done again.
///
/// # Errors
/// When QEMU can't: the guest then goes on with the new layer of one disk or several, and on record are those that it has.
pub async fn take_switch_back(vm: &mut VmRuntime, disks: &Disks, new_top: &LayerId) -> Result<(), Problem> {
    let more = disks.clone().with_tops(new_top);
    let used = used_of(vm.qmp()?, &more).await.map_err(refused)?.unwrap_or(more);
    for (disk, before) in disks.each().enumerate() {
        let (old_top, new) = (super::last(before)?, disks::top(new_top, disk));
        if used.contains(&new) {
            take_back(vm, old_top, &new).await?;
        }
        close_node(vm.qmp()?, &new).await?;
        // One by one, so that a record names a layer that was taken back for no longer than it takes to write it; and
        // before the file goes, so that none ever names a file that is gone.
        vm.set_disks(vm.disks()?.with_disk(disk, before)).await?;
        remove(vm, &new).await?;
    }
    Ok(())
}

async fn take_back(vm: &VmRuntime, old_top: &LayerId, new_top: &LayerId) -> Result<(), Problem> {
    let qmp = vm.qmp()?;
    let committed = tokio::time::timeout(TAKE_BACK_TIMEOUT, commit(qmp, old_top, new_top)).await;
    match committed {
        Ok(result) => result,
        Err(_) => {
            let message = format!("merging layer {new_top} back took longer than {TAKE_BACK_TIMEOUT:?}");
            Err(Problem::new(ProblemCode::Hypervisor, message))
        }
    }
}

async fn commit(qmp: &Qmp, old_top: &LayerId, new_top: &LayerId) -> Result<(), Problem> {
    let job = format!("take-back-{}", layer_node(new_top));
    let mut events = qmp.events();
    qmp.call(BlockCommit {
        job_id: Some(job.clone()),
        device: layer_node(new_top),
        top_node: None,
        base_node: Some(layer_node(old_top)),
        backing_file: None,
        speed_bytes_per_second: None,
        auto_finalize: Some(true),
        auto_dismiss: Some(false),
    })
    .await
    .map_err(refused)?;
    loop {
        let event = events.recv().await;
        match event.map(|event| event.kind) {
            Some(EventKind::JobStatusChange { id, status }) if id == job => match status {
                JobStatus::Ready => {
                    qmp.call(JobComplete { id: job.clone() }).await.map_err(refused)?;
                }
                JobStatus::Concluded => return conclude(qmp, job).await,
                _ => {}
            },
            Some(_) => {}
            None => return Err(refused(QmpError::from(qmp.closed().await))),
        }
    }
}

async fn conclude(qmp: &Qmp, job: String) -> Result<(), Problem> {
    let jobs = qmp.call(QueryJobs {}).await.map_err(refused)?;
    let fault = jobs.into_iter().find(|one| one.id == job).and_then(|one| one.error);
    qmp.call(JobDismiss { id: job }).await.map_err(refused)?;
    match fault {
        None => Ok(()),
        Some(fault) => {
            Err(Problem::new(ProblemCode::Hypervisor, format!("merging a layer back failed: {fault}")))
        }
    }
}

/// Whether a layer is open in the VM's process.
///
/// # Errors
/// When QEMU can't be asked.
pub async fn is_open(qmp: &Qmp, layer: &LayerId) -> Result<bool, QmpError> {
    let nodes = qmp.call(QueryNamedBlockNodes { flat: Some(true) }).await?;
    let name = layer_node(layer);
    Ok(nodes.iter().any(|node| node.node_name.as_deref() == Some(&name)))
}

/// Brings what the guest has written so far to the disk, so that little of it is left to be written when QEMU flushes
/// with the guest stopped.
///
/// # Errors
/// When the system refuses.
pub async fn flush(paths: &[PathBuf]) -> Result<(), Problem> {
    let paths = paths.to_vec();
    blocking(move || {
        for path in &paths {
            let file = File::open(path).map_err(FileError::io(path, "opened"))?;
            file.sync_data().map_err(FileError::io(path, "brought to the disk"))?;
        }
        Ok(())
    })
    .await
}

/// The same after a while: to be done again and again as long as the guest writes.
///
/// # Errors
/// As [`flush`].
pub async fn flush_after(wait: Duration, paths: &[PathBuf]) -> Result<(), Problem> {
    tokio::time::sleep(wait).await;
    flush(paths).await
}

/// Freezes a layer that lies below the VM's writable one: the process, if there is one, opens it anew, only for reading,
/// and then the file is made read-only and taken from the VM's user.
///
/// In this order: QEMU opens files anew by itself whenever what it does with them changes, and one that it believes to be
/// writable and may not open so makes it fail at the next thing it does, such as letting go of its disks.
///
/// # Errors
/// When QEMU or the system refuses.
pub async fn freeze(vm: &VmRuntime, layer: &LayerId) -> Result<(), Problem> {
    if let Ok(qmp) = vm.qmp() {
        let access = Access::JustFrozen { direct_io: direct_io(vm)? };
        let mut node = layer_options(vm.dirs()?, layer, &backing_in(vm, &vm.disks()?, layer)?, access);
        let file = node.remove("file").unwrap_or_default();
        node.insert("file".into(), file["node-name"].clone());
        // One after the other: the file can be opened for reading alone only once nothing above it would write.
        for options in [Value::Object(node), file] {
            qmp.call_untyped("blockdev-reopen", json!({"options": [options]})).await.map_err(refused)?;
        }
    }
    let path = vm.dirs()?.layer(layer);
    let owner = vm.user_id()?.map(|_| rustix::process::geteuid().as_raw());
    blocking(move || Ok(freeze_file(&path, owner).map_err(FileError::io(&path, "frozen"))?)).await
}

fn freeze_file(path: &Path, owner: Option<u32>) -> std::io::Result<()> {
    if owner.is_some() {
        std::os::unix::fs::chown(path, owner, owner)?;
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(FROZEN_MODE))
}

fn backing_in(vm: &VmRuntime, disks: &Disks, layer: &LayerId) -> Result<Backing, Problem> {
    let (disk, at) = disks
        .find(layer)
        .ok_or_else(|| Problem::new(ProblemCode::Internal, format!("{layer} is no layer of {}", vm.id())))?;
    if let Some(below) = at.checked_sub(1) {
        return Ok(Backing::Node(layer_node(&disks.of(disk)[below])));
    }
    let image = &vm.definition()?.image;
    let bottom = image.part(PartRole::Disk).filter(|_| disk == disks::ROOT);
    Ok(bottom.map_or(Backing::None, |_| Backing::Node(image_node(image))))
}

/// QEMU's refusal as a problem.
pub fn refused(error: QmpError) -> Problem {
    Problem::new(ProblemCode::Hypervisor, durable::with_causes(&error))
}
