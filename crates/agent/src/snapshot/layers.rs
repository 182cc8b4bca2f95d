//! Switching a running guest to a new writable layer, and back.
//!
//! The new layer is made and opened while the guest runs; the switch itself is one transaction, about a millisecond.
//! What the old top then holds is frozen: nobody writes to it again, unless the switch is taken back.
//!
//! **What is written down when.** The chain with the new layer is on record *before* the switch. An empty layer on top
//! changes nothing of what the disk says, so a VM that is started from that record finds its disk, whether the switch
//! came to be or not. A process that is found running is asked which layer it writes to ([`top_of`]): it knows best.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
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
use crate::durable::{self, FileError, blocking};
use crate::qemu::disk::{Access, Backing, image_node, layer_node, layer_options};
use crate::vm::VmRuntime;

/// How long a switch that is taken back may take: what the guest wrote since is copied down.
const TAKE_BACK_TIMEOUT: Duration = Duration::from_secs(120);

/// Makes the file of a new layer on top of another; one that is there is replaced. [`sync`] brings it to the disk.
///
/// # Errors
/// When the system refuses, a full disk for one.
pub async fn create(vm: &VmRuntime, below: &LayerId, new_top: &LayerId) -> Result<(), Problem> {
    let path = vm.dirs()?.layer(new_top);
    let owner = vm.user_id()?;
    let size_bytes = vm.definition()?.spec.disk_mib.saturating_mul(1 << 20);
    let below = format!("{below}.qcow2");
    blocking(move || {
        let below = Below { path: &below, format: "qcow2" };
        Ok(overlay::create(&path, size_bytes, below, owner).map_err(FileError::io(&path, "made"))?)
    })
    .await
}

/// Brings a new layer's file to the disk, with its name.
///
/// # Errors
/// When the system refuses.
pub async fn sync(path: &Path) -> Result<(), Problem> {
    let path = path.to_owned();
    blocking(move || {
        let file = File::open(&path).map_err(FileError::io(&path, "opened"))?;
        file.sync_all().map_err(FileError::io(&path, "brought to the disk"))?;
        Ok(durable::sync_parent(&path)?)
    })
    .await
}

/// Opens the new layer in the VM's process, beside the chain that the guest uses. The file must be there.
///
/// # Errors
/// When QEMU refuses.
pub async fn open(vm: &VmRuntime, new_top: &LayerId) -> Result<(), Problem> {
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

/// Freezes the layer that a running guest writes to and switches it to a new one, on record before it is done. The new
/// layer stays, whatever becomes of what it was done for.
///
/// # Errors
/// When QEMU or the system refuses: the guest then writes to its layer as before.
pub async fn freeze_top(vm: &mut VmRuntime, new_top: &LayerId) -> Result<(), Problem> {
    let chain = vm.chain()?.to_vec();
    let Some(old_top) = chain.last().filter(|_| !chain.contains(new_top)) else { return Ok(()) };
    create(vm, old_top, new_top).await?;
    sync(&vm.dirs()?.layer(new_top)).await?;
    open(vm, new_top).await?;
    let mut longer = chain.clone();
    longer.push(new_top.clone());
    vm.set_chain(longer).await?;
    let path = vm.dirs()?.layer(old_top);
    flush(&path).await?;
    if let Err(error) = switch(vm.qmp()?, old_top, new_top).await {
        close(vm, new_top).await?;
        vm.set_chain(chain).await?;
        return Err(refused(error));
    }
    freeze(vm, old_top).await
}

/// Closes a layer that the guest was not switched to, and removes its file.
///
/// # Errors
/// When QEMU refuses or the file can't be removed.
pub async fn close(vm: &VmRuntime, new_top: &LayerId) -> Result<(), Problem> {
    if let Ok(qmp) = vm.qmp() {
        close_node(qmp, new_top).await?;
    }
    let path = vm.dirs()?.layer(new_top);
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

/// Opens a frozen layer of a chain in the VM's process, on what it lies on there; nothing if it is open.
///
/// # Errors
/// When QEMU refuses.
pub async fn open_frozen(vm: &VmRuntime, chain: &[LayerId], at: usize) -> Result<(), Problem> {
    let (qmp, layer) = (vm.qmp()?, &chain[at]);
    if is_open(qmp, layer).await.map_err(refused)? {
        return Ok(());
    }
    let below = backing_in(vm, chain, at)?;
    let options = layer_options(vm.dirs()?, layer, &below, Access::Frozen);
    qmp.call(BlockdevAdd { options }).await.map(|_| ()).map_err(refused)
}

/// Has the layer above one of a chain, which is open, lie on it in the VM's process. The guest runs meanwhile: its
/// requests wait for a moment.
///
/// # Errors
/// When QEMU refuses: all is then as it was.
pub async fn put_under(vm: &VmRuntime, chain: &[LayerId], at: usize) -> Result<(), Problem> {
    let qmp = vm.qmp()?;
    let Some(above) = chain.get(at + 1) else {
        return Err(Problem::new(ProblemCode::Internal, "a frozen layer with nothing on it"));
    };
    let access = match at + 2 == chain.len() {
        true => Access::Writable { direct_io: direct_io(vm)? },
        // As it is: see `Access::JustFrozen`.
        false => Access::JustFrozen { direct_io: is_direct(qmp, above).await.map_err(refused)? },
    };
    let mut node = layer_options(vm.dirs()?, above, &backing_in(vm, chain, at + 1)?, access);
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

/// Switches the guest from `old_top` to `new_top`, which is open and empty.
///
/// # Errors
/// When QEMU refuses: the guest then writes to `old_top` as before.
pub async fn switch(qmp: &Qmp, old_top: &LayerId, new_top: &LayerId) -> Result<(), QmpError> {
    let snapshot =
        TransactionAction::BlockdevSnapshot { node: layer_node(old_top), overlay: layer_node(new_top) };
    qmp.call(Transaction { actions: vec![snapshot] }).await.map(|_| ())
}

/// The layer of `chain` that the VM's process writes to; none when it is none of them.
///
/// # Errors
/// When QEMU can't be asked.
pub async fn top_of(qmp: &Qmp, chain: &[LayerId]) -> Result<Option<LayerId>, QmpError> {
    let drives = qmp.call(QueryBlock {}).await?;
    let used: Vec<String> =
        drives.into_iter().filter_map(|drive| drive.inserted.and_then(|node| node.node_name)).collect();
    Ok(chain.iter().rev().find(|layer| used.contains(&layer_node(layer))).cloned())
}

/// Takes a switch back: what the guest wrote to `new_top` goes down into `old_top`, the guest writes to that again, and
/// `new_top` is closed and removed. The guest runs meanwhile. Only for an `old_top` that was not yet frozen.
///
/// # Errors
/// When QEMU can't: the guest then goes on with `new_top`, and both layers stay as they are.
pub async fn take_back(vm: &VmRuntime, old_top: &LayerId, new_top: &LayerId) -> Result<(), Problem> {
    let qmp = vm.qmp()?;
    let committed = tokio::time::timeout(TAKE_BACK_TIMEOUT, commit(qmp, old_top, new_top)).await;
    match committed {
        Ok(Ok(())) => {}
        Ok(Err(error)) => return Err(error),
        Err(_) => {
            let message = format!("merging layer {new_top} back took longer than {TAKE_BACK_TIMEOUT:?}");
            return Err(Problem::new(ProblemCode::Hypervisor, message));
        }
    }
    close(vm, new_top).await
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
pub async fn flush(path: &Path) -> Result<(), Problem> {
    let path = path.to_owned();
    blocking(move || {
        let file = File::open(&path).map_err(FileError::io(&path, "opened"))?;
        Ok(file.sync_data().map_err(FileError::io(&path, "brought to the disk"))?)
    })
    .await
}

/// The same after a while: to be done again and again as long as the guest writes.
///
/// # Errors
/// As [`flush`].
pub async fn flush_after(wait: Duration, path: &Path) -> Result<(), Problem> {
    tokio::time::sleep(wait).await;
    flush(path).await
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
        let mut node = layer_options(vm.dirs()?, layer, &backing_of(vm, layer)?, access);
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

fn backing_of(vm: &VmRuntime, layer: &LayerId) -> Result<Backing, Problem> {
    let chain = vm.chain()?;
    backing_in(vm, chain, chain.iter().position(|one| one == layer).unwrap_or(0))
}

fn backing_in(vm: &VmRuntime, chain: &[LayerId], at: usize) -> Result<Backing, Problem> {
    if let Some(below) = at.checked_sub(1) {
        return Ok(Backing::Node(layer_node(&chain[below])));
    }
    let image = &vm.definition()?.image;
    Ok(image.part(PartRole::Disk).map_or(Backing::None, |_| Backing::Node(image_node(image))))
}

/// QEMU's refusal as a problem.
pub fn refused(error: QmpError) -> Problem {
    Problem::new(ProblemCode::Hypervisor, durable::with_causes(&error))
}
