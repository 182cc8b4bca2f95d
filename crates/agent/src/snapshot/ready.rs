//! A process for a snapshot, up and loaded and standing still, while the VM still is what it was.
//!
//! ```text
//! new layers are made ┐
//! QEMU comes up       ├─► device state is loaded ─► ready: it lacks the network, and has not touched the new layer
//! device.bin is read  ┘
//! ```
//!
//! Whatever can go wrong with a snapshot goes wrong here, and harms nobody: the VM's present process knows nothing of
//! it. The two have nothing in common that either would write to: frozen layers are open for reading in both, the new
//! layer belongs to the new one, which leaves it alone until its guest runs, sockets lie in a directory of its own. Only
//! the network can't be shared: it is handed over by the [`Plug`] when the present process is off it.
//!
//! A process that is ready owns nothing (its guest never ran, no record names it): dropped, it is killed; an agent that
//! starts finds it by its mark and ends it.
//!
//! It may be made ready before the restore is asked for ([`Warm`]): the manager says which one comes next when it has
//! the undo snapshot taken, and what takes longest is done then.

use std::time::Duration;

use berth_api::agent::{NextRestore, TaskSpec, VmDefinition};
use berth_model::vm::PortForward;
use berth_model::{LayerId, Problem, SnapshotId};
use berth_qmp::Qmp;
use berth_qmp::commands::QueryStatus;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;

use super::archive::{self, ArchiveError, Manifest, MemoryManifest, SnapshotFiles};
use super::image::{self, MemoryImage};
use super::lending::Openable;
use super::{identity, layers, working_set};
use crate::disks::{self, DISKS_MAX};
use crate::durable::{self, FileError, blocking};
use crate::launcher::{Launched, Process};
use crate::layout::{VmDirs, VmRecord};
use crate::migration::incoming::{Incoming, Origin};
use crate::network::{self, Plug};
use crate::nvram::Place;
use crate::qemu;
use crate::vm::process::Ground;
use crate::vm::{LaunchPlan, Memory, VmRuntime};

/// How long a process is kept for a restore that was announced and has not been asked for: it holds no more memory than
/// its own. Shorter: an undo snapshot whose records are slow to be written loses it. Longer: a manager that died leaves
/// it for longer.
const KEPT: Duration = Duration::from_secs(60);

/// How many pages of a full image are looked at before it is used: enough to know that it is not another one.
const SAMPLED_PAGES: u64 = 16;

/// What is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The VM as it is told to be; the machine is the snapshot's.
    pub definition: VmDefinition,
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// The layer that the guest is to write to. Its file is made anew.
    pub new_top: LayerId,
}

/// Who has the VM's network.
#[derive(Debug, Clone)]
pub enum Network {
    /// Nobody: the process gets it at once. The ports are those of the process before.
    Free(Vec<Vec<PortForward>>),
    /// The VM's present process, with these ports.
    Taken(Vec<Vec<PortForward>>),
}

/// A machine that is loaded and stands still; dropped, its process is killed.
pub struct Ready {
    /// What the snapshot is.
    pub manifest: Manifest,
    /// What is to be on record.
    pub record: VmRecord,
    /// The ports that lead to it.
    pub forwards: Vec<Vec<PortForward>>,
    /// The machine; none for a snapshot of a disk alone.
    pub machine: Option<Machine>,
    /// What of the memory is read ahead, in bytes.
    pub working_set_bytes: u64,
}

/// A process with a guest that is loaded and stands still.
pub struct Machine {
    launched: Launched,
    /// Lets it run.
    pub incoming: Incoming,
    /// Gives it its network.
    pub plug: Plug,
    /// The directory with its sockets.
    pub sockets: String,
    guard: Guard,
}

impl Machine {
    /// Its monitor.
    pub const fn qmp(&self) -> &Qmp {
        &self.launched.qmp
    }

    /// Its process.
    pub const fn process(&self) -> &Process {
        &self.launched.process
    }

    /// The process, which from now on is the caller's to end.
    pub fn into_parts(mut self) -> (Launched, Incoming) {
        self.guard.0 = None;
        (self.launched, self.incoming)
    }
}

/// Kills a process that nobody took.
struct Guard(Option<Process>);

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(process) = &self.0 {
            process.kill();
        }
    }
}

/// Nothing was made ready.
#[derive(Debug)]
pub struct NotReady {
    /// Why.
    pub problem: Problem,
    /// The present process may have been in the way: without it another try may do.
    pub in_the_way: bool,
}

impl From<Problem> for NotReady {
    fn from(problem: Problem) -> Self {
        Self { problem, in_the_way: false }
    }
}

/// Makes a process ready. `ground` is of the VM as it is; what is `wanted` says what it is to be.
///
/// # Errors
/// When the snapshot is not here or not whole, or QEMU can't come up or load it. There is then no process; the new
/// layer's file may be there.
pub async fn make(ground: &Ground, wanted: &Wanted, network: Network) -> Result<Ready, NotReady> {
    let dirs = ground.dirs.clone();
    let manifest = archive::read(&dirs, &wanted.snapshot).map_err(Problem::from)?;
    let definition = VmDefinition {
        spec: manifest.definition.spec.clone(),
        image: manifest.definition.image.clone(),
        ..wanted.definition.clone()
    };
    let ground = Ground { definition, ..ground.clone() };
    check(&ground, &manifest).await?;
    // Nothing waits for the disk: they are brought there once the guest runs.
    layers::create(&ground, &manifest.disks(), &wanted.new_top).await?;
    let disks = manifest.disks().with_tops(&wanted.new_top);
    let fittings = manifest.fittings.renewed(&wanted.new_top)?;
    make_nvram(&ground, &manifest, &wanted.new_top).await?;
    let record = VmRecord::new(ground.definition.clone(), disks, fittings);
    let Some(memory) = &manifest.memory else {
        let (Network::Free(forwards) | Network::Taken(forwards)) = network;
        return Ok(Ready { manifest, record, forwards, machine: None, working_set_bytes: 0 });
    };
    let files = SnapshotFiles::of(&dirs, &manifest.snapshot);
    let reading_ahead = working_set::read_ahead(&files);
    let device = read_device(&files, &manifest.snapshot, memory.device_blake3.clone());
    let sockets = wanted.new_top.to_string();
    let image = open_memory(&files, &manifest.snapshot, memory);
    let launched = launch(&ground, &manifest, &record, &sockets, network);
    let (launched, device, image) = tokio::join!(launched, device, image);
    let (launched, guard, plug, forwards) = launched?;
    let incoming = load(&launched.qmp, device?, image?).await?;
    let machine = Some(Machine { launched, incoming, plug, sockets, guard });
    Ok(Ready { manifest, record, forwards, machine, working_set_bytes: reading_ahead.await })
}

/// Finds out what can be found out without a process.
async fn check(ground: &Ground, manifest: &Manifest) -> Result<(), Problem> {
    for layer in manifest.disks().layers() {
        let path = ground.dirs.layer(layer);
        std::fs::metadata(&path).map_err(FileError::io(&path, "found"))?;
    }
    let Some(memory) = &manifest.memory else { return Ok(()) };
    let hypervisor = ground.services.hypervisor().await.ok_or_else(crate::vm::process::stopping)?;
    let path = SnapshotFiles::of(&ground.dirs, &manifest.snapshot).memory();
    let length = std::fs::metadata(&path).map_err(FileError::io(&path, "found"))?.len();
    let spec = &ground.definition.spec;
    let expected = qemu::memory_bytes(spec.memory_mib, hypervisor.accelerator, &spec.machine_type);
    if length == memory.bytes && length == expected {
        return Ok(());
    }
    let detail = format!("{length} bytes, expected {expected}");
    Err(ArchiveError::Damaged { snapshot: manifest.snapshot.clone(), path, detail }.into())
}

/// What the machine remembers beside its disk, in a directory of its own.
async fn make_nvram(ground: &Ground, manifest: &Manifest, new_top: &LayerId) -> Result<(), Problem> {
    if manifest.fittings.nvram.is_none() {
        return Ok(());
    }
    let (manifest, new_top) = (manifest.clone(), new_top.clone());
    let place = Place { dirs: ground.dirs.clone(), owner: ground.user_id() };
    blocking(move || Ok(place.make(&new_top, &archive::remembered(&place.dirs, &manifest)?)?)).await
}

/// The device state, found unharmed.
async fn read_device(
    files: &SnapshotFiles,
    snapshot: &SnapshotId,
    expected: String,
) -> Result<Vec<u8>, Problem> {
    let (path, snapshot) = (files.device(), snapshot.clone());
    blocking(move || {
        let bytes = std::fs::read(&path).map_err(FileError::io(&path, "read"))?;
        if blake3::hash(&bytes).to_hex().as_str() == expected {
            return Ok(bytes);
        }
        let detail = "its checksum differs".to_owned();
        Err(ArchiveError::Damaged { snapshot, path, detail }.into())
    })
    .await
}

/// The memory, as far as it can be seen to be unharmed without reading all of it.
async fn open_memory(
    files: &SnapshotFiles,
    snapshot: &SnapshotId,
    memory: &MemoryManifest,
) -> Result<MemoryImage, Problem> {
    let (files, snapshot, memory) = (files.clone(), snapshot.clone(), memory.clone());
    blocking(move || {
        let image = MemoryImage::open(&files, &snapshot, &memory)?;
        image.sample(SAMPLED_PAGES)?;
        Ok(image)
    })
    .await
}

type Started = (Launched, Guard, Plug, Vec<Vec<PortForward>>);

async fn launch(
    ground: &Ground,
    manifest: &Manifest,
    record: &VmRecord,
    sockets: &str,
    network: Network,
) -> Result<Started, NotReady> {
    let beside = matches!(network, Network::Taken(_));
    let started = async {
        let services = &ground.services;
        let files = SnapshotFiles::of(&ground.dirs, &manifest.snapshot);
        let known = identity::known_by_guest(&ground.definition, manifest.borrowed_nics.as_deref());
        let (lease, plug) = match &network {
            Network::Free(before) => (network::lease(services, &known, before).await?, Plug::default()),
            Network::Taken(before) => network::lease_beside(services, &known, before).await?,
        };
        let forwards = lease.forwards.clone();
        let memory = Memory::Image(files.memory());
        let (disks, fittings) = (record.disks(), record.fittings.clone());
        let plan = LaunchPlan { disks, memory, fittings, incoming: true };
        let openable = Openable::open(files.memory(), ground.user_id()).await?;
        let launched = ground.launch(&plan, Some(sockets), lease).await?;
        drop(openable);
        let guard = Guard(Some(launched.process.clone()));
        Ok((launched, guard, plug, forwards))
    };
    started.await.map_err(|problem: Problem| NotReady { problem, in_the_way: beside })
}

/// Has the process take in the device state, and before it the pages that the full image does not have. Its guest stands
/// still afterwards.
async fn load(qmp: &Qmp, device: Vec<u8>, image: MemoryImage) -> Result<Incoming, Problem> {
    let (mut incoming, stream) = Incoming::start(qmp, Origin::Snapshot).await?;
    let fed = blocking(move || Ok(image::feed(stream, &device, image)?));
    let (fed, loaded) = tokio::join!(fed, incoming.until_loaded());
    fed?;
    loaded?;
    Ok(incoming)
}

/// A process that is being made ready, or is, for a restore that was announced.
pub struct Warm {
    wanted: Wanted,
    claim: Option<oneshot::Sender<Reply>>,
    work: AbortHandle,
}

type Reply = oneshot::Sender<Result<Ready, NotReady>>;

impl Drop for Warm {
    fn drop(&mut self) {
        if self.claim.is_some() {
            self.work.abort();
        }
    }
}

impl Warm {
    fn begin(ground: Ground, wanted: Wanted, network: Network) -> Self {
        let (claim, claimed) = oneshot::channel::<Reply>();
        let next = wanted.clone();
        let work = tokio::spawn(async move {
            let made = make(&ground, &next, network).await;
            if let Err(NotReady { problem, .. }) = &made {
                tracing::warn!(vm = %next.definition.id, %problem, "no process could be made ready for a restore");
            }
            if let Ok(Ok(reply)) = tokio::time::timeout(KEPT, claimed).await {
                // Whoever asked may have gone: then it is dropped here.
                let _ = reply.send(made);
            }
        });
        Self { wanted, claim: Some(claim), work: work.abort_handle() }
    }

    /// The machine, once it is ready; none when it could not be made so or was kept for too long.
    pub async fn take(mut self) -> Option<Ready> {
        let (reply, made) = oneshot::channel();
        self.claim.take()?.send(reply).ok()?;
        let ready = made.await.ok()?.ok()?;
        // One that died meanwhile may not have been seen to: asking it takes a fraction of a millisecond, and a restore that
        // begins with a dead process stops the VM.
        if let Some(machine) = &ready.machine {
            machine.qmp().call(QueryStatus {}).await.ok()?;
        }
        Some(ready)
    }

    /// Whether it is for this restore.
    pub fn is_for(&self, wanted: &Wanted) -> bool {
        self.wanted == *wanted
    }
}

/// Begins to make a process ready for the restore that comes next. That it can't be is no error: the restore will do
/// without, and say what is wrong.
pub fn make_ready(vm: &mut VmRuntime, next: &NextRestore) {
    let NextRestore { definition, snapshot, new_top } = next.clone();
    let (Ok(ground), Some(network)) = (vm.ground(), beside(vm, &new_top)) else { return };
    let wanted = Wanted { definition, snapshot, new_top };
    *vm.ready_mut() = Some(Warm::begin(ground, wanted, network));
}

/// The network for a process that is to come up beside the present one; none when there is none, or when it can't be
/// had beside it: a process that does not talk would not let go of anything, and one that writes to the very layer that
/// is to be made anew has to go first.
pub(super) fn beside(vm: &VmRuntime, new_top: &LayerId) -> Option<Network> {
    let lives = vm.process().is_some_and(|process| !process.has_exited()) && !vm.has_stray();
    let chain = vm.chain().ok()?;
    (lives && !chain.contains(new_top))
        .then(|| vm.host_record().ok().map(|host| host.forwards.clone()))?
        .map(Network::Taken)
}

/// Drops a process that was made ready, unless the task is the one that it is for.
pub async fn drop_unwanted(vm: &mut VmRuntime, spec: &TaskSpec) {
    let Some(warm) = vm.ready_mut() else { return };
    if let TaskSpec::RestoreSnapshot { definition, snapshot, new_top, .. } = spec {
        let (definition, snapshot, new_top) = ((**definition).clone(), snapshot.clone(), new_top.clone());
        if warm.is_for(&Wanted { definition, snapshot, new_top }) {
            return;
        }
    }
    drop_ready(vm).await;
}

/// Drops a process that was made ready, and what was made for it.
pub async fn drop_ready(vm: &mut VmRuntime) {
    let Some(warm) = vm.ready_mut().take() else { return };
    let new_top = warm.wanted.new_top.clone();
    drop(warm);
    if let Ok(dirs) = vm.dirs() {
        forget_layer(dirs, vm.chain().unwrap_or_default(), &new_top).await;
    }
}

/// Removes the files of new layers that were made and not used, and what was made with them.
pub(super) async fn forget_layer(dirs: &VmDirs, chain: &[LayerId], layer: &LayerId) {
    if chain.contains(layer) {
        return;
    }
    let (paths, nvram) = (disks::tops(layer, DISKS_MAX).map(|top| dirs.layer(&top)), dirs.nvram(layer));
    let paths: Vec<_> = paths.collect();
    let removed = blocking(move || {
        paths.iter().try_for_each(|path| durable::remove_file(path))?;
        Ok(durable::remove_tree(&nvram)?)
    });
    if let Err(error) = removed.await {
        tracing::warn!(%layer, %error, "a layer that nothing needs stays behind");
    }
}
