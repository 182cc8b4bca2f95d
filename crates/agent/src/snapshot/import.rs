//! A backup out of a repository, and a new VM of it.
//!
//! Two tasks, for the second is the VM's own and the first is not: [`fetch`] brings the files into a staging directory and
//! looks at all of them, and puts the image into the pool; [`make_vm`] makes the VM of what is staged, as a clone is made of
//! another VM's snapshot, and lets it run.
//!
//! What comes may be anybody's. Names are compared with what the manifest says there has to be, each layer's head with what
//! it has to lie on and how long the disk is (a qcow2 file can name any file of the host), and everything with its hashes as
//! [`verify`] does, which also gives those to layers that came without; the image goes the way that an upload goes. Only then
//! does anything get a place where a VM could use it.
//!
//! **Run again** after the agent died: what was staged is gone, so the first task begins anew, and the second finds its VM
//! made, or fails.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use berth_api::agent::{TaskOutput, TaskSpec};
use berth_api::backup::{CONTENTS_FILE, Work, WorkerReply, WorkerRequest};
use berth_model::image::{Image, PartRole};
use berth_model::name::Name;
use berth_model::repository::BackupContents;
use berth_model::vm::{Firmware, VmSpec};
use berth_model::{LayerId, Problem, ProblemCode, VmId};
use futures_util::StreamExt;

use super::archive::{self, FORMAT, Manifest};
use super::clone::{self, Wish};
use super::export::{HASHES_DIRECTORY, SNAPSHOT_DIRECTORY};
use super::hashes;
use super::verify;
use crate::backup::{Staging, foreign, worker};
use crate::disk::FROZEN_MODE;
use crate::disks;
use crate::durable::{self, FileError, blocking};
use crate::fittings::is_uuid;
use crate::image::{Expected, Images};
use crate::layout::{PoolDirs, part_file};
use crate::nvram;
use crate::qcow2;
use crate::room::Room;
use crate::services::Services;
use crate::task::TaskContext;
use crate::vm::{VmRuntime, lifecycle};

/// How many times as long as disk and memory the files of a backup may be: a snapshot has at most so many layers, and so
/// many files of memory.
const COPIES_MAX: u64 = 20;
/// How long everything else may be, in bytes: device state, indexes, manifests.
const REST_BYTES_MAX: u64 = 4 << 30;
/// How often it is looked whether the pool still has room for its guests, while files come.
const ROOM_EVERY: Duration = Duration::from_millis(200);
/// How much may come between two such looks, in bytes: what a fast disk takes.
const ROOM_BYTES: u64 = 128 << 20;
/// Longest manifest, and what an index may have beside its entries, in bytes.
const SMALL_BYTES_MAX: u64 = 4 << 20;
/// Longest device state, in bytes: the memory of a machine's graphics is most of it.
const DEVICE_BYTES_MAX: u64 = 256 << 20;
/// How many bytes of memory or of a layer have at most a byte in their index.
const INDEXED_BYTES: u64 = 64;
/// How much of an image's part is read at once.
const CHUNK_BYTES: usize = 1 << 20;

/// Brings a backup's files here, checked.
///
/// # Errors
/// When the repository can't be read, the backup is not one of ours or is damaged, or there is no room: nothing is left then.
pub async fn fetch(services: &Services, images: &Images, task: &TaskContext) -> Result<TaskOutput, Problem> {
    let TaskSpec::FetchBackup { vm, pool, contents, backup, access } = &task.put().spec else {
        return Err(Problem::new(ProblemCode::Internal, "this task fetches no backup"));
    };
    let dirs = services.layout.pool(pool)?;
    let (place, host, name) = (dirs.clone(), services.host.clone(), vm.to_string());
    let staging = blocking(move || Ok(Staging::begin(&place, &host, &name)?)).await?;
    let request = WorkerRequest {
        access: (**access).clone(),
        work: Work::Import {
            backup: backup.clone(),
            directory: staging.path().to_owned(),
            bytes_max: bytes_max(contents),
        },
    };
    let reply = tokio::select! {
        reply = worker::work(services, task, "importing", &request) => reply?,
        full = until_full(staging.path()) => return Err(full),
    };
    let WorkerReply::Imported { facts } = reply else { return Err(worker::astray()) };
    task.phase("checking");
    let checked = Checked { contents: contents.clone(), backup: backup.clone(), task: task.clone() };
    let staging = blocking(move || checked.check(&staging).map(|()| staging)).await?;
    task.phase("checking the image");
    take_image(services, images, &dirs, &contents.image, &staging).await?;
    staging.keep();
    Ok(TaskOutput::Fetched { facts })
}

fn bytes_max(contents: &BackupContents) -> u64 {
    let spec = &contents.spec;
    let machine = spec.memory_mib.saturating_add(spec.disks_mib()).saturating_mul(1 << 20);
    let image: u64 = contents.image.parts.iter().map(|part| part.size_bytes).fold(0, u64::saturating_add);
    machine.saturating_mul(COPIES_MAX).saturating_add(image).saturating_add(REST_BYTES_MAX)
}

/// Ends when the pool has hardly any room left: guests that write must not be held for files that come.
async fn until_full(directory: &Path) -> Problem {
    loop {
        let path = directory.to_owned();
        let looked = blocking(move || {
            let file = File::open(&path).map_err(FileError::io(&path, "opened"))?;
            Ok(Room::default().take(&file, ROOM_BYTES).map_err(FileError::io(&path, "filled further"))?)
        });
        if let Err(problem) = looked.await {
            return problem;
        }
        tokio::time::sleep(ROOM_EVERY).await;
    }
}

/// Removes what was staged for a VM.
///
/// # Errors
/// When the system refuses.
pub async fn drop_fetched(services: &Services, vm: &VmId, pool: &Name) -> Result<(), Problem> {
    let (pool, host, name) = (services.layout.pool(pool)?, services.host.clone(), vm.to_string());
    blocking(move || Ok(durable::remove_tree(Staging::of(&pool, &host, &name).path())?)).await
}

/// Makes a new VM of what was fetched, and starts it.
///
/// # Errors
/// When nothing is staged for it, the disk is full, or QEMU can't load it: nothing is left then.
pub async fn make_vm(vm: &mut VmRuntime, task: &TaskContext) -> Result<TaskOutput, Problem> {
    let TaskSpec::ImportVm { definition, snapshot, first_snapshot, paused } = &task.put().spec else {
        return Err(Problem::new(ProblemCode::Internal, "this task makes no VM of a backup"));
    };
    lifecycle::check_identity(vm, definition)?;
    let services = std::sync::Arc::clone(vm.services());
    let pool = services.layout.pool(&definition.spec.pool)?;
    let staging = Staging::of(&pool, &services.host, definition.id.as_str());
    let wish = Wish {
        definition,
        origin: staging.dirs().clone(),
        snapshot,
        first_snapshot: first_snapshot.as_ref(),
        share: true,
        paused: *paused,
    };
    let made = clone::make_and_start(vm, task, &wish).await;
    // With the VM made its files have their own names, and without it they are of no use.
    blocking(move || {
        drop(staging);
        Ok(())
    })
    .await?;
    made
}

/// What came, and what it has to be. Blocks.
struct Checked {
    contents: Box<BackupContents>,
    backup: String,
    task: TaskContext,
}

impl Checked {
    fn foreign(&self, detail: impl AsRef<str>) -> Problem {
        foreign(&self.backup, detail.as_ref())
    }

    fn check(&self, staging: &Staging) -> Result<(), Problem> {
        let dirs = staging.dirs();
        let came = staging.path().join(SNAPSHOT_DIRECTORY);
        let manifest = self.manifest(&came.join("snapshot.json"))?;
        self.names(staging.path(), &manifest)?;
        self.lengths(staging, &manifest)?;
        let snapshot = dirs.snapshot(&manifest.snapshot);
        fs::create_dir_all(dirs.snapshots()).map_err(FileError::io(&dirs.snapshots(), "made"))?;
        fs::rename(&came, &snapshot).map_err(FileError::io(&snapshot, "named"))?;
        self.layers(staging, &manifest)?;
        freeze(&dirs.layers(), FROZEN_MODE)?;
        freeze(&snapshot, archive::FROZEN_MODE)?;
        if dirs.hashes().exists() {
            freeze(&dirs.hashes(), hashes::MODE)?;
        }
        let found = verify::look_at_arrived(dirs, &manifest.snapshot, self.task.cancel())?;
        match found.faults.first() {
            Some(fault) => Err(self.foreign(format!("its {fault}"))),
            None => Ok(()),
        }
    }

    fn manifest(&self, path: &Path) -> Result<Manifest, Problem> {
        if path.exists() {
            self.length(path, SMALL_BYTES_MAX)?;
        }
        let found: Option<Manifest> =
            durable::read_json(path).map_err(|error| self.foreign(format!("its manifest: {error}")))?;
        let manifest = found.ok_or_else(|| self.foreign("it has no manifest"))?;
        let expected = &self.contents.snapshot;
        if manifest.format != FORMAT {
            return Err(self.foreign(format!("its manifest is of format {}, not {FORMAT}", manifest.format)));
        }
        let (image, spec) = (&manifest.definition.image, &manifest.definition.spec);
        let known = &self.contents.image;
        // What the manager has looked at is what counts: of the machine, everything.
        let agrees = manifest.snapshot == expected.id
            && (&image.id, &image.parts) == (&known.id, &known.parts)
            && image.kernel_command_line == known.kernel_command_line
            && *spec == self.contents.spec
            && manifest.memory.is_some() == expected.facts.has_memory
            && manifest.memory.as_ref().is_none_or(|memory| memory.bytes <= spec.memory_mib << 20);
        if !agrees || !disks::are_of(&manifest.disks(), &manifest.definition) {
            return Err(self.foreign("its manifest is of another snapshot than it says"));
        }
        // The guest's own view of its interfaces becomes words to QEMU and to the guest's agent.
        let borrowed = manifest.borrowed_nics.clone().unwrap_or_default();
        let as_borrowed = VmSpec { nics: borrowed, ..spec.clone() };
        as_borrowed.check().map_err(|problem| self.foreign(problem.message))?;
        self.fittings(&manifest)?;
        Ok(manifest)
    }

    /// That the machine is fitted as one of its definition is, and remembers what such a one can.
    fn fittings(&self, manifest: &Manifest) -> Result<(), Problem> {
        let (fittings, spec) = (&manifest.fittings, &manifest.definition.spec);
        // It becomes a word to QEMU.
        if fittings.generation_id.as_ref().is_some_and(|text| !is_uuid(text)) {
            return Err(self.foreign("its generation id is no UUID"));
        }
        let is_uefi = spec.firmware == Firmware::Uefi;
        let agrees = fittings.nvram.is_some() == (is_uefi || spec.tpm)
            && manifest.nvram.contains_key(nvram::VARIABLES) == is_uefi
            && (spec.tpm || !manifest.nvram.contains_key(nvram::TPM_STATE))
            && manifest.nvram.keys().all(|name| nvram::FILES.contains(&name.as_str()));
        if !agrees {
            return Err(self.foreign("what its machine remembers is not what a machine of its kind does"));
        }
        Ok(())
    }

    /// What is read into memory as a whole is no longer than what it is of needs.
    fn lengths(&self, staging: &Staging, manifest: &Manifest) -> Result<(), Problem> {
        let (came, dirs) = (staging.path().join(SNAPSHOT_DIRECTORY), staging.dirs());
        for name in manifest.nvram.keys() {
            self.length(&came.join(name), nvram::FILE_BYTES_MAX as u64)?;
        }
        if let Some(memory) = &manifest.memory {
            self.length(&came.join("device.bin"), DEVICE_BYTES_MAX)?;
            self.length(&came.join("pages.idx"), SMALL_BYTES_MAX + memory.bytes / INDEXED_BYTES)?;
        }
        for layer in manifest.disks().layers() {
            let hashed = fs::metadata(dirs.layer(layer)).map_or(0, |file| file.len());
            let hashes = dirs.layer_hashes(layer);
            if hashes.exists() {
                self.length(&hashes, SMALL_BYTES_MAX + hashed / INDEXED_BYTES)?;
            }
        }
        Ok(())
    }

    fn length(&self, path: &Path, bytes_max: u64) -> Result<(), Problem> {
        let length = fs::metadata(path).map_err(FileError::io(path, "examined"))?.len();
        if length <= bytes_max {
            return Ok(());
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        Err(self.foreign(format!("its {name} has {length} bytes, at most {bytes_max} are read")))
    }

    /// That there is what has to be there, and nothing else.
    fn names(&self, directory: &Path, manifest: &Manifest) -> Result<(), Problem> {
        let mut expected: BTreeSet<String> = BTreeSet::from([CONTENTS_FILE.to_owned()]);
        expected.insert(format!("{SNAPSHOT_DIRECTORY}/snapshot.json"));
        expected.extend(manifest.disks().layers().map(|layer| format!("layers/{layer}.qcow2")));
        let parts = self.contents.image.parts.iter();
        expected.extend(parts.map(|part| format!("image/{}", part_file(part.role, part.format))));
        if let Some(memory) = &manifest.memory {
            let numbers = memory.differences.iter().map(|number| format!("memory.{number}.raw"));
            let fixed = ["memory.raw", "device.bin", "pages.idx"].map(str::to_owned);
            expected
                .extend(fixed.into_iter().chain(numbers).map(|name| format!("{SNAPSHOT_DIRECTORY}/{name}")));
        }
        expected.extend(manifest.nvram.keys().map(|name| format!("{SNAPSHOT_DIRECTORY}/{name}")));
        let mut found = BTreeSet::new();
        for entry in fs::read_dir(directory).map_err(FileError::io(directory, "read"))? {
            let entry = entry.map_err(FileError::io(directory, "read"))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if !entry.path().is_dir() {
                found.insert(name);
                continue;
            }
            for inner in fs::read_dir(entry.path()).map_err(FileError::io(&entry.path(), "read"))? {
                let inner = inner.map_err(FileError::io(&entry.path(), "read"))?;
                found.insert(format!("{name}/{}", inner.file_name().to_string_lossy()));
            }
        }
        // What was learnt of earlier restores may be there, and is no part of the snapshot; a layer may have its hashes.
        let hashes = |layer: &LayerId| format!("{HASHES_DIRECTORY}/{layer}.b3");
        let mut extra: BTreeSet<String> = manifest.disks().layers().map(hashes).collect();
        extra.insert(format!("{SNAPSHOT_DIRECTORY}/working-set.bin"));
        let odd: Vec<_> =
            found.symmetric_difference(&expected).filter(|name| !extra.contains(*name)).collect();
        if let Some(name) = odd.first() {
            let what = if found.contains(*name) { "has" } else { "lacks" };
            return Err(self.foreign(format!("it {what} {name}")));
        }
        Ok(())
    }

    /// Each layer lies on a layer or, of the root disk, on the image, by its own word. On which is for the manifest to say: QEMU is told, and
    /// the name in the file may be that of one that was merged since.
    fn layers(&self, staging: &Staging, manifest: &Manifest) -> Result<(), Problem> {
        let image = image_file(&manifest.definition.image);
        let is_layer =
            |name: &str| name.strip_suffix(".qcow2").is_some_and(|layer| layer.parse::<LayerId>().is_ok());
        for (disk, chain) in manifest.disks().each().enumerate() {
            let image = image.as_deref().filter(|_| disk == disks::ROOT);
            let may_lie_on = |name: &str| is_layer(name) || image == Some(name);
            let size_bytes = disks::size_bytes(&manifest.definition, disk);
            for layer in chain {
                let path = staging.dirs().layer(layer);
                let head = read_head(&path)?;
                let length = fs::metadata(&path).map_err(FileError::io(&path, "examined"))?.len();
                let found = qcow2::check_layer(&head, length, &may_lie_on)
                    .map_err(|fault| self.foreign(format!("layer {layer}: {fault}")))?;
                if found.virtual_size_bytes > size_bytes {
                    return Err(self.foreign(format!("layer {layer} is longer than the disk")));
                }
            }
        }
        Ok(())
    }
}

/// What the image's disk is called by the layer that lies on it.
fn image_file(image: &Image) -> Option<String> {
    let part = image.part(PartRole::Disk)?;
    Some(format!("../../../images/{}/{}", image.id, part_file(PartRole::Disk, part.format)))
}

fn read_head(path: &Path) -> Result<Vec<u8>, Problem> {
    let mut head = Vec::new();
    let read = File::open(path).and_then(|file| file.take(qcow2::HEAD_BYTES as u64).read_to_end(&mut head));
    read.map_err(FileError::io(path, "read"))?;
    Ok(head)
}

fn freeze(directory: &Path, mode: u32) -> Result<(), Problem> {
    for entry in fs::read_dir(directory).map_err(FileError::io(directory, "read"))? {
        let path = entry.map_err(FileError::io(directory, "read"))?.path();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))
            .map_err(FileError::io(&path, "made read-only"))?;
    }
    Ok(durable::sync_parent(&directory.join("any"))?)
}

/// The image's parts, as if somebody uploaded them; those that the pool has already are not looked at.
async fn take_image(
    services: &Services,
    images: &Images,
    pool: &PoolDirs,
    image: &Image,
    staging: &Staging,
) -> Result<(), Problem> {
    for part in &image.parts {
        let path = staging.image().join(part_file(part.role, part.format));
        let file = tokio::fs::File::open(&path).await.map_err(FileError::io(&path, "opened"))?;
        let chunks = tokio_util::io::ReaderStream::with_capacity(file, CHUNK_BYTES);
        let mut bytes = chunks.map(|chunk| chunk.map_err(|error| error.to_string())).boxed();
        let expected = Expected::from_part(part)?;
        images.take(services, pool, &image.id, &expected, &mut bytes).await?;
    }
    Ok(())
}
