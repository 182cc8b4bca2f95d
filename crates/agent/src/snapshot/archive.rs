//! A snapshot on the disk: `snapshots/<snapshot>/`.
//!
//! ```text
//! memory.raw     the guest's memory, holes for zeros            } only of a guest that ran or was held
//! memory.1.raw … pages that differ from it, see [`super::image`] }
//! device.bin     everything else that QEMU sent: loadable       }
//! pages.idx      hash and place of each page of memory          }
//! vars.fd …      the firmware's variables and the TPM's state, of a machine that has such, see [`crate::nvram`]
//! snapshot.json  the manifest: what the VM was, its layers, checksums, what it cost
//! ```
//!
//! It is made under a name that says so (`.new-<snapshot>`), brought to the disk, made read-only, and renamed. So a
//! directory with a snapshot's name is a whole snapshot, and anything else is a leftover. The manifest also stands for
//! the layers: they are named in it and lie with the VM's other layers, for they are shared between snapshots.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use berth_api::agent::VmDefinition;
use berth_model::snapshot::SnapshotFacts;
use berth_model::vm::Nic;
use berth_model::{LayerId, SnapshotId};
use serde::{Deserialize, Serialize};

use crate::disks::{self, Disks};
use crate::durable::{self, FileError};
use crate::fittings::Fittings;
use crate::layout::VmDirs;
use crate::nvram::{self, Contents};

/// The manifest's format; another one is refused.
pub const FORMAT: u32 = 2;
/// What an unfinished snapshot's name starts with.
const UNFINISHED_PREFIX: &str = ".new-";
/// Mode of what is never written again.
pub(crate) const FROZEN_MODE: u32 = 0o440;

/// What a snapshot is of, and how to know that it is unharmed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: u32,
    /// Its id.
    pub snapshot: SnapshotId,
    /// The VM as it was: a restore gives it the same machine.
    pub definition: VmDefinition,
    /// The frozen layers from the one above the image to the newest.
    pub layers: Vec<LayerId>,
    /// The frozen layers of each data disk, from the lowest to the newest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub data: Vec<Vec<LayerId>>,
    /// What its machine was fitted with.
    #[serde(default)]
    pub fittings: Fittings,
    /// BLAKE3 of each file that its machine remembered something in beside its disk, in hexadecimal, by the file's name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub nvram: BTreeMap<String, String>,
    /// Its memory; none when the VM was stopped.
    #[serde(default)]
    pub memory: Option<MemoryManifest>,
    /// What taking it cost.
    pub facts: SnapshotFacts,
    /// The interfaces as the guest in this memory knows them, when those are another VM's: see `snapshot/clone.rs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub borrowed_nics: Option<Vec<Nic>>,
}

impl Manifest {
    /// The frozen layers of all disks.
    pub fn disks(&self) -> Disks {
        Disks::new(self.layers.clone(), self.data.clone())
    }

    /// Puts other layers in their place, which hold the same.
    pub fn set_disks(&mut self, disks: Disks) {
        (self.layers, self.data) = disks.into_parts();
    }
}

/// What is known of a memory image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryManifest {
    /// Length of the guest's memory in bytes.
    pub bytes: u64,
    /// The guest ran: it goes on when it is restored. Otherwise it was held, and is held again.
    pub was_running: bool,
    /// BLAKE3 of `device.bin`, in hexadecimal.
    pub device_blake3: String,
    /// The identity of `pages.idx`, in hexadecimal: it has a hash for each page.
    pub index_blake3: String,
    /// The numbers of the differences that there are beside the full image: none is needed when there are none.
    #[serde(default)]
    pub differences: Vec<u8>,
}

/// A snapshot that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// There is no such snapshot.
    #[error("there is no snapshot {snapshot} on this host")]
    Missing {
        /// Which.
        snapshot: SnapshotId,
    },
    /// It is of another version of Berth, or of another snapshot.
    #[error(
        "the manifest of {snapshot} is of format {format} and of snapshot {named}, expected {FORMAT} and {snapshot}"
    )]
    Foreign {
        /// Which was asked for.
        snapshot: SnapshotId,
        /// What the manifest names.
        named: SnapshotId,
        /// Its format.
        format: u32,
    },
    /// A file is not what it was when the snapshot was taken.
    #[error("{} of {snapshot} is not what it was: {detail}", path.display())]
    Damaged {
        /// Which snapshot.
        snapshot: SnapshotId,
        /// Which file.
        path: PathBuf,
        /// What differs.
        detail: String,
    },
}

/// The files of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotFiles {
    directory: PathBuf,
}

impl SnapshotFiles {
    /// Those of a finished snapshot.
    pub fn of(dirs: &VmDirs, snapshot: &SnapshotId) -> Self {
        Self { directory: dirs.snapshot(snapshot) }
    }

    /// Those of one in the making.
    fn unfinished(dirs: &VmDirs, snapshot: &SnapshotId) -> Self {
        Self { directory: dirs.snapshots().join(format!("{UNFINISHED_PREFIX}{snapshot}")) }
    }

    /// Those in this directory.
    #[cfg(test)]
    pub fn at(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The full memory image.
    pub fn memory(&self) -> PathBuf {
        self.memory_file(0)
    }

    /// A file of the memory image: 0 is the full one, the others are differences.
    pub fn memory_file(&self, number: u8) -> PathBuf {
        match number {
            0 => self.directory.join("memory.raw"),
            number => self.directory.join(format!("memory.{number}.raw")),
        }
    }

    /// Gives `new` this snapshot's full image and these differences, which are never written again.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn link_memory(
        &self,
        new: &Self,
        differences: impl IntoIterator<Item = u8>,
    ) -> Result<(), FileError> {
        for number in std::iter::once(0).chain(differences) {
            let to = new.memory_file(number);
            fs::hard_link(self.memory_file(number), &to).map_err(FileError::io(&to, "linked"))?;
        }
        Ok(())
    }

    /// The device state.
    pub fn device(&self) -> PathBuf {
        self.directory.join("device.bin")
    }

    /// A file that the machine remembered something in beside its disk.
    pub fn nvram(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The page index.
    pub fn index(&self) -> PathBuf {
        self.directory.join("pages.idx")
    }

    /// The manifest.
    pub fn manifest(&self) -> PathBuf {
        self.directory.join("snapshot.json")
    }
}

/// Reads a snapshot's manifest.
///
/// # Errors
/// When there is no such snapshot, or its manifest is not one of it.
pub fn read(dirs: &VmDirs, snapshot: &SnapshotId) -> Result<Manifest, ArchiveError> {
    let found: Option<Manifest> = durable::read_json(&SnapshotFiles::of(dirs, snapshot).manifest())?;
    let manifest = found.ok_or_else(|| ArchiveError::Missing { snapshot: snapshot.clone() })?;
    if manifest.format != FORMAT || manifest.snapshot != *snapshot {
        return Err(ArchiveError::Foreign {
            snapshot: snapshot.clone(),
            named: manifest.snapshot,
            format: manifest.format,
        });
    }
    let (named, expected) = (manifest.disks().count(), disks::count(&manifest.definition));
    if named != expected {
        let (snapshot, path) = (snapshot.clone(), SnapshotFiles::of(dirs, snapshot).manifest());
        let detail = format!("it names layers of {named} disks, and its VM has {expected}");
        return Err(ArchiveError::Damaged { snapshot, path, detail });
    }
    Ok(manifest)
}

/// What the snapshot's machine remembered beside its disk, found unharmed. Blocks.
///
/// # Errors
/// When a file can't be read, or is not what it was.
pub fn remembered(dirs: &VmDirs, manifest: &Manifest) -> Result<Contents, ArchiveError> {
    let files = SnapshotFiles::of(dirs, &manifest.snapshot);
    let mut contents = Contents::new();
    for (name, expected) in &manifest.nvram {
        if !nvram::FILES.contains(&name.as_str()) {
            let (snapshot, path) = (manifest.snapshot.clone(), files.manifest());
            let detail = format!("it names '{name}', which no machine remembers anything in");
            return Err(ArchiveError::Damaged { snapshot, path, detail });
        }
        let path = files.nvram(name);
        let bytes = fs::read(&path).map_err(FileError::io(&path, "read"))?;
        if blake3::hash(&bytes).to_hex().as_str() != expected {
            let (snapshot, detail) = (manifest.snapshot.clone(), "its checksum differs".to_owned());
            return Err(ArchiveError::Damaged { snapshot, path, detail });
        }
        contents.insert(name.clone(), bytes);
    }
    Ok(contents)
}

/// Writes the manifest of a snapshot that is there anew: its layers have other names now, and hold what they held.
///
/// # Errors
/// When the system refuses; the old manifest is then still there.
pub fn rewrite(dirs: &VmDirs, manifest: &Manifest) -> Result<(), FileError> {
    durable::write_json(&SnapshotFiles::of(dirs, &manifest.snapshot).manifest(), manifest)
}

/// The snapshots that a VM has here, unfinished ones not counted.
///
/// # Errors
/// When the directory can't be read.
pub fn list(dirs: &VmDirs) -> Result<Vec<SnapshotId>, FileError> {
    let directory = dirs.snapshots();
    let entries = match fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(FileError::io(&directory, "read")(error)),
    };
    let mut snapshots = Vec::new();
    for entry in entries {
        let name = entry.map_err(FileError::io(&directory, "read"))?.file_name();
        snapshots.extend(name.to_str().and_then(|name| name.parse().ok()));
    }
    snapshots.sort();
    Ok(snapshots)
}

/// Removes what is left of snapshots that were never finished.
///
/// # Errors
/// When the system refuses.
pub fn remove_unfinished(dirs: &VmDirs) -> Result<(), FileError> {
    let directory = dirs.snapshots();
    let Ok(entries) = fs::read_dir(&directory) else { return Ok(()) };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED_PREFIX) {
            durable::remove_tree(&entry.path())?;
        }
    }
    Ok(())
}

/// Removes a snapshot's directory; nothing if there is none. Its layers stay.
///
/// # Errors
/// When the system refuses.
pub fn remove(dirs: &VmDirs, snapshot: &SnapshotId) -> Result<(), FileError> {
    let files = SnapshotFiles::of(dirs, snapshot);
    // Without its manifest it is no snapshot: a removal that stops half way leaves a leftover and not a broken one.
    durable::remove_file(&files.manifest())?;
    durable::remove_tree(files.directory())
}

/// A snapshot in the making; dropped unfinished, it is removed.
#[derive(Debug)]
pub struct Draft {
    files: SnapshotFiles,
    finished: SnapshotFiles,
    reader: Option<u32>,
    done: bool,
}

impl Draft {
    /// Begins one. Leftovers of an earlier try are removed. `reader` is the user and group of the VM's QEMU, which will
    /// map the memory; none: the agent's own.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn begin(dirs: &VmDirs, snapshot: &SnapshotId, reader: Option<u32>) -> Result<Self, FileError> {
        let (files, finished) =
            (SnapshotFiles::unfinished(dirs, snapshot), SnapshotFiles::of(dirs, snapshot));
        durable::remove_tree(files.directory())?;
        // A directory without a manifest, of a removal that stopped half way.
        if !finished.manifest().exists() {
            durable::remove_tree(finished.directory())?;
        }
        enterable(&dirs.snapshots(), reader)?;
        enterable(files.directory(), reader)?;
        Ok(Self { files, finished, reader, done: false })
    }

    /// Where to put the files.
    pub const fn files(&self) -> &SnapshotFiles {
        &self.files
    }

    /// Writes the manifest, makes everything read-only, brings it to the disk and gives it its name.
    ///
    /// # Errors
    /// When the system refuses: there is no snapshot then.
    pub fn finish(mut self, manifest: &Manifest) -> Result<(), FileError> {
        if let Some(memory) = &manifest.memory {
            let files = &self.files;
            // The guest's QEMU opens the full image itself; everything else stays with the agent.
            freeze_new(&files.memory(), self.reader)?;
            let differences = memory.differences.iter().map(|number| files.memory_file(*number));
            for path in differences.chain([files.device(), files.index()]) {
                freeze_new(&path, None)?;
            }
        }
        durable::write_json(&self.files.manifest(), manifest)?;
        durable::sync_parent(&self.files.manifest())?;
        fs::rename(self.files.directory(), self.finished.directory())
            .map_err(FileError::io(self.finished.directory(), "named"))?;
        self.done = true;
        durable::sync_parent(self.finished.directory())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.done
            && let Err(error) = durable::remove_tree(self.files.directory())
        {
            tracing::warn!(%error, "an unfinished snapshot stays behind");
        }
    }
}

/// Makes a new file read-only and brings it to the disk. One that is linked is another snapshot's too: that has been done.
fn freeze_new(path: &Path, group: Option<u32>) -> Result<(), FileError> {
    let finish = || {
        let file = File::open(path)?;
        if file.metadata()?.nlink() > 1 {
            return Ok(());
        }
        freeze(&file, group)?;
        file.sync_all()
    };
    finish().map_err(FileError::io(path, "brought to the disk"))
}

/// Makes a file read-only: for its group, if one is given, and for nobody but root otherwise.
///
/// # Errors
/// When the system refuses.
pub fn freeze(file: &File, group: Option<u32>) -> io::Result<()> {
    if let Some(group) = group {
        fchown(file, None, Some(group))?;
    }
    file.set_permissions(Permissions::from_mode(FROZEN_MODE))
}

/// Makes a directory that a VM's QEMU may pass through and the agent alone may change.
fn enterable(path: &Path, group: Option<u32>) -> Result<(), FileError> {
    match fs::DirBuilder::new().mode(0o710).create(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        Err(error) => return Err(FileError::io(path, "made")(error)),
    }
    if let Some(group) = group {
        std::os::unix::fs::chown(path, None, Some(group)).map_err(FileError::io(path, "given away"))?;
    }
    Ok(())
}

/// BLAKE3 of a file, in hexadecimal. Blocks.
///
/// # Errors
/// When it can't be read.
pub fn blake3_of(path: &Path) -> Result<String, FileError> {
    let mut file = OpenOptions::new().read(true).open(path).map_err(FileError::io(path, "opened"))?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hasher.finalize().to_hex().to_string()),
            Ok(read) => {
                hasher.update(&buffer[..read]);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(FileError::io(path, "read")(error)),
        }
    }
}
