//! Putting a VM back to a snapshot, whatever it is doing: running, held, panicked, hung, or without a process.
//!
//! ```text
//! the old process is killed ┐                       nothing here grows with the guest's memory: the image is mapped,
//! a new layer is made       ├─► the new process ─► device state (0.3 MB) is loaded ─► cont
//! the record is written     ┘   maps memory.raw
//! ```
//!
//! The old process is killed without a word, since a guest that is to be put back has nothing to say, and without being
//! waited for: once the signal is sent, the kernel lets none of its threads run another instruction of its own, while
//! taking its memory apart takes the longer the larger it was. Nor could it harm: the new process writes to a new layer,
//! and everything below is frozen. It is waited for before the snapshot's old neighbour, the layer that it wrote to, is
//! removed.
//!
//! **A restore that fails** leaves the VM on the disk that it had. What can be known to be wrong is found before the old
//! process is killed, and harms nothing. When it is QEMU that fails afterwards, the record names the old chain again, the
//! new layer is removed, and the VM is stopped: whoever commanded this takes an undo snapshot first, and has the VM
//! put back to that.
//!
//! A restore that is run again does the same again, on the same new layer, made empty again.

use std::time::{Duration, Instant};

use berth_api::agent::{TaskOutput, VmDefinition};
use berth_model::snapshot::RestoreFacts;
use berth_model::{LayerId, Problem, ProblemCode, SnapshotId};

use super::archive::{self, Manifest, MemoryManifest, SnapshotFiles};
use super::image::{self, MemoryImage};
use super::lending::Openable;
use super::{identity, layers};
use crate::durable::{FileError, blocking, with_causes};
use crate::layout::VmRecord;
use crate::migration::incoming::{Incoming, IncomingError};
use crate::task::TaskContext;
use crate::vm::{LaunchPlan, Memory, VmRuntime};

/// How long the old process may take to let go of its network: it is a matter of a millisecond, unless it hangs.
const UNPLUG_TIMEOUT: Duration = Duration::from_millis(100);
/// How many pages of a full image are looked at before it is mapped: enough to know that it is not another one.
const SAMPLED_PAGES: u64 = 16;

impl From<IncomingError> for Problem {
    fn from(error: IncomingError) -> Self {
        let code = match &error {
            IncomingError::Socket(_) => ProblemCode::Internal,
            _ => ProblemCode::Hypervisor,
        };
        Problem::new(code, with_causes(&error))
    }
}

/// Puts the VM back to a snapshot. `paused`: its guest is held there, though it ran then.
///
/// # Errors
/// When the snapshot is not here or not whole: the VM is then as it was. When QEMU can't load it: the VM is then
/// stopped, and its disk as it was.
pub async fn restore(
    vm: &mut VmRuntime,
    context: &TaskContext,
    definition: &VmDefinition,
    snapshot: &SnapshotId,
    new_top: &LayerId,
    paused: bool,
) -> Result<TaskOutput, Problem> {
    let started = Instant::now();
    context.phase("restoring");
    let mut manifest = archive::read(vm.dirs()?, snapshot)?;
    if let Some(memory) = &mut manifest.memory {
        memory.was_running &= !paused;
    }
    let files = SnapshotFiles::of(vm.dirs()?, snapshot);
    check(vm, &manifest, &files, new_top)?;
    let device = read_device(&manifest, &files).await?;
    let image = open_memory(&manifest, &files).await?;
    let old_record = vm.vm_record().ok().cloned();
    let old_process = vm.process().cloned();
    if let Some(process) = &old_process {
        unplug(vm).await;
        process.kill();
    }
    if let Err(problem) = put_back(vm, definition, &manifest, (device, image), new_top).await {
        return Err(go_back(vm, problem, old_record, new_top).await);
    }
    let running_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
    // The guest runs: now there is time for the disk.
    layers::sync(&vm.dirs()?.layer(new_top)).await?;
    if let Some(process) = old_process {
        process.exited().await;
    }
    remove_abandoned(vm, &old_record.map(|record| record.chain).unwrap_or_default()).await;
    Ok(TaskOutput::Restored { facts: RestoreFacts { running_us, undo_us: 0 } })
}

/// The deed: the disk, and then the machine.
async fn put_back(
    vm: &mut VmRuntime,
    definition: &VmDefinition,
    manifest: &Manifest,
    (device, image): (Vec<u8>, Option<MemoryImage>),
    new_top: &LayerId,
) -> Result<(), Problem> {
    put_disk_back(vm, definition, manifest, new_top).await?;
    let borrowed = manifest.borrowed_nics.clone();
    vm.change_host_record(|record| record.borrowed_nics = borrowed).await?;
    match (&manifest.memory, image) {
        (Some(memory), Some(image)) => start(vm, memory, device, image).await,
        _ => vm.end_process().await.map(drop),
    }
}

/// After a failure: no process, the disk that the VM had, and the record saying so.
async fn go_back(
    vm: &mut VmRuntime,
    mut problem: Problem,
    old_record: Option<VmRecord>,
    new_top: &LayerId,
) -> Problem {
    let undone = async {
        vm.end_process().await?;
        let Some(record) = old_record else { return Ok(()) };
        // A try of the same task that was broken off may have made the new layer the VM's already.
        let was_new = record.chain.contains(new_top);
        vm.set_vm_record(record).await?;
        if was_new {
            return Ok(());
        }
        layers::close(vm, new_top).await
    };
    if let Err(error) = undone.await {
        tracing::warn!(vm = %vm.id(), %error, "a failed restore leaves something behind");
        problem.message.push_str("; and the VM could not be given its disk back: ");
        problem.message.push_str(&error.message);
    }
    problem
}

/// Finds out what can be found out before anything is done.
fn check(
    vm: &VmRuntime,
    manifest: &Manifest,
    files: &SnapshotFiles,
    new_top: &LayerId,
) -> Result<(), Problem> {
    let below = vm.chain().unwrap_or_default().split_last().map_or(&[][..], |(_, below)| below);
    if manifest.layers.contains(new_top) || below.contains(new_top) {
        let message = format!("{new_top} is a frozen layer of {}", vm.id());
        return Err(Problem::new(ProblemCode::InvalidInput, message).at("new_top", new_top, "a new id"));
    }
    for layer in &manifest.layers {
        let path = vm.dirs()?.layer(layer);
        std::fs::metadata(&path).map_err(FileError::io(&path, "found"))?;
    }
    if let Some(memory) = &manifest.memory {
        let path = files.memory();
        let length = std::fs::metadata(&path).map_err(FileError::io(&path, "found"))?.len();
        let expected = vm.memory_bytes()?;
        if length != memory.bytes || length != expected {
            return Err(archive::ArchiveError::Damaged {
                snapshot: manifest.snapshot.clone(),
                path,
                detail: format!("{length} bytes, expected {expected}"),
            }
            .into());
        }
    }
    Ok(())
}

/// The device state, found unharmed; nothing when the snapshot is of a disk alone.
async fn read_device(manifest: &Manifest, files: &SnapshotFiles) -> Result<Vec<u8>, Problem> {
    let Some(memory) = &manifest.memory else { return Ok(Vec::new()) };
    let (path, snapshot, expected) =
        (files.device(), manifest.snapshot.clone(), memory.device_blake3.clone());
    blocking(move || {
        let bytes = std::fs::read(&path).map_err(FileError::io(&path, "read"))?;
        if blake3::hash(&bytes).to_hex().as_str() == expected {
            return Ok(bytes);
        }
        let detail = "its checksum differs".to_owned();
        Err(archive::ArchiveError::Damaged { snapshot, path, detail }.into())
    })
    .await
}

/// The memory, as far as it can be seen to be unharmed without reading all of it.
async fn open_memory(manifest: &Manifest, files: &SnapshotFiles) -> Result<Option<MemoryImage>, Problem> {
    let Some(memory) = manifest.memory.clone() else { return Ok(None) };
    let (files, snapshot) = (files.clone(), manifest.snapshot.clone());
    blocking(move || {
        let image = MemoryImage::open(&files, &snapshot, &memory)?;
        image.sample(SAMPLED_PAGES)?;
        Ok(Some(image))
    })
    .await
}

/// Takes the old process off the network, so that its taps and ports are free for the new one before its memory has been
/// taken apart. One that does not obey is killed all the same, and the new one waits for it.
async fn unplug(vm: &VmRuntime) {
    let (Ok(qmp), Ok(definition)) = (vm.qmp(), vm.definition()) else { return };
    let unplugged = async {
        for index in 0..definition.spec.nics.len() {
            // It may have gone already.
            let _ = qmp.call_untyped("netdev_del", serde_json::json!({"id": format!("net{index}")})).await;
        }
    };
    let _ = tokio::time::timeout(UNPLUG_TIMEOUT, unplugged).await;
}

/// A new layer on the snapshot's, and the record of it. The machine is the one that the snapshot is of.
async fn put_disk_back(
    vm: &mut VmRuntime,
    definition: &VmDefinition,
    manifest: &Manifest,
    new_top: &LayerId,
) -> Result<(), Problem> {
    let below = super::last(&manifest.layers)?;
    let definition = VmDefinition {
        spec: manifest.definition.spec.clone(),
        image: manifest.definition.image.clone(),
        ..definition.clone()
    };
    let mut chain = manifest.layers.clone();
    chain.push(new_top.clone());
    layers::create(vm, below, new_top).await?;
    vm.set_vm_record(VmRecord { definition, chain }).await
}

/// A new process with the snapshot's memory, loaded and, if it ran then, running.
async fn start(
    vm: &mut VmRuntime,
    memory: &MemoryManifest,
    device: Vec<u8>,
    image: MemoryImage,
) -> Result<(), Problem> {
    let mapped = image.paths().memory();
    let plan =
        LaunchPlan { chain: vm.chain()?.to_vec(), memory: Memory::Image(mapped.clone()), incoming: true };
    let openable = Openable::open(mapped, vm.user_id()?).await?;
    let launched = vm.launch(&plan).await?;
    drop(openable);
    let qmp = launched.qmp.clone();
    vm.install(launched).await?;
    let (mut incoming, stream) = Incoming::start(&qmp, false).await?;
    let fed = blocking(move || Ok(image::feed(stream, &device, image)?));
    let (fed, loaded) = tokio::join!(fed, incoming.until_loaded());
    fed?;
    loaded?;
    identity::isolate(vm).await?;
    if memory.was_running {
        incoming.run().await?;
    } else {
        vm.status().process_rests();
    }
    Ok(())
}

/// Removes the layer that the VM wrote to before. The restore has succeeded: that this fails is only worth a warning.
async fn remove_abandoned(vm: &VmRuntime, old_chain: &[LayerId]) {
    let (Ok(dirs), Ok(chain)) = (vm.dirs(), vm.chain()) else { return };
    let (dirs, chain) = (dirs.clone(), chain.to_vec());
    if old_chain == chain {
        return;
    }
    let removed = blocking(move || super::remove_unneeded_layers(&dirs, &chain)).await;
    if let Err(error) = removed {
        tracing::warn!(vm = %vm.id(), %error, "a layer that nothing needs stays behind");
    }
}
