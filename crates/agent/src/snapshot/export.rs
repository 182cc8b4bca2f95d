//! A snapshot into a repository.
//!
//! Everything that the VM needs to stand again where nothing else is left: the image, the frozen layers, memory, device state
//! and manifest, and what the manager knows of it. The files are linked into a staging directory first, so that they stay
//! when the snapshot is deleted or its layers are merged meanwhile; that takes no room and no time. The VM is not held, and
//! this is not in its queue.
//!
//! ```text
//! backup.json                 what the VM was, its image, its snapshot: for the manager
//! image/disk.qcow2 …          the image's parts
//! layers/<layer>.qcow2 …      the frozen layers of all disks
//! hashes/<layer>.b3 …         their hashes, of those that have them already
//! snapshot/snapshot.json      the manifest
//! snapshot/memory.raw …       memory, devices and page index, of a snapshot that has them
//! snapshot/vars.fd …          the firmware's variables and the TPM's state, of a machine that has such
//! ```

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use berth_api::agent::{TaskOutput, TaskSpec};
use berth_api::backup::{CONTENTS_FILE, Work, WorkerReply, WorkerRequest};
use berth_model::repository::BackupContents;
use berth_model::{Problem, ProblemCode, SnapshotId};

use super::archive::{self, Manifest};
use super::clone::Taking;
use crate::backup::{Staging, worker};
use crate::durable::{self, FileError, blocking};
use crate::layout::{PoolDirs, VmDirs, part_file};
use crate::services::Services;
use crate::task::TaskContext;

/// What the directory of the one snapshot is called in a backup: the same in each, so that the next one finds it.
pub(super) const SNAPSHOT_DIRECTORY: &str = "snapshot";
/// What the directory with the hashes of layers is called in a backup.
pub(super) const HASHES_DIRECTORY: &str = "hashes";

/// Puts a snapshot into a repository.
///
/// # Errors
/// When the snapshot is not here or not whole, and when the repository can't be opened or written to: nothing of the backup
/// is listed then.
pub async fn export(services: &Services, task: &TaskContext) -> Result<TaskOutput, Problem> {
    let TaskSpec::ExportSnapshot { vm, pool, snapshot, contents, operation, access } = &task.put().spec
    else {
        return Err(Problem::new(ProblemCode::Internal, "this task exports no snapshot"));
    };
    task.phase("staging");
    let origin = services.layout.vm(vm, pool)?;
    let staged = Staged {
        host: services.host.clone(),
        name: operation.to_string(),
        origin,
        snapshot: snapshot.clone(),
        task: task.clone(),
        contents: (**contents).clone(),
    };
    let (staging, files) = blocking(move || staged.make()).await?;
    let work = Work::Export {
        full_name: contents.vm.clone(),
        vm: vm.clone(),
        snapshot: contents.snapshot.name.to_string(),
        operation: operation.clone(),
        files,
    };
    let request = WorkerRequest { access: (**access).clone(), work };
    let reply = worker::work(services, task, "exporting", &request).await;
    blocking(move || {
        drop(staging);
        Ok(())
    })
    .await?;
    match reply? {
        WorkerReply::Exported { facts } => Ok(TaskOutput::Exported { facts }),
        _ => Err(worker::astray()),
    }
}

/// What is to be staged. Blocks.
struct Staged {
    host: berth_model::HostId,
    name: String,
    origin: VmDirs,
    snapshot: SnapshotId,
    task: TaskContext,
    contents: BackupContents,
}

/// Files, each with its name in the backup.
type Named = Vec<(String, PathBuf)>;

impl Staged {
    fn make(self) -> Result<(Staging, Named), Problem> {
        let mut manifest = archive::read(&self.origin, &self.snapshot)?;
        loop {
            let staging = Staging::begin(&self.origin.pool, &self.host, &self.name)?;
            let Err(problem) = self.fill(&staging, &manifest) else {
                let files = named(&staging, &self.snapshot)?;
                return Ok((staging, files));
            };
            // The layers may have been merged in the middle: then the snapshot lies on others now.
            let now = archive::read(&self.origin, &self.snapshot)?;
            if now.disks() == manifest.disks() {
                return Err(problem);
            }
            manifest = now;
        }
    }

    fn fill(&self, staging: &Staging, manifest: &Manifest) -> Result<(), Problem> {
        let dirs = staging.dirs();
        for directory in [dirs.layers(), dirs.snapshots(), staging.image()] {
            fs::create_dir(&directory).map_err(FileError::io(&directory, "made"))?;
        }
        let taking =
            Taking { origin: self.origin.clone(), dirs: dirs.clone(), share: true, task: self.task.clone() };
        taking.layers(&manifest.disks())?;
        taking.snapshot(&self.snapshot, manifest, None)?;
        link_image(&self.origin.pool, manifest, &staging.image())?;
        // As it was then, not as it is now: what is made of the backup has to be the same machine.
        let then = &manifest.definition;
        let contents =
            BackupContents { spec: then.spec.clone(), image: then.image.clone(), ..self.contents.clone() };
        let text = serde_json::to_vec_pretty(&contents).expect("a record is plain data");
        durable::write(&staging.path().join(CONTENTS_FILE), &text, 0o400)?;
        Ok(())
    }
}

fn link_image(pool: &PoolDirs, manifest: &Manifest, directory: &Path) -> Result<(), Problem> {
    let image = &manifest.definition.image;
    for part in &image.parts {
        let to = directory.join(part_file(part.role, part.format));
        fs::hard_link(pool.part(&image.id, part.role, part.format), &to)
            .map_err(FileError::io(&to, "linked"))?;
    }
    Ok(())
}

fn named(staging: &Staging, snapshot: &SnapshotId) -> Result<Named, Problem> {
    let dirs = staging.dirs();
    let mut files = vec![(CONTENTS_FILE.to_owned(), staging.path().join(CONTENTS_FILE))];
    let directories = [
        ("image", staging.image()),
        ("layers", dirs.layers()),
        (HASHES_DIRECTORY, dirs.hashes()),
        (SNAPSHOT_DIRECTORY, dirs.snapshot(snapshot)),
    ];
    for (name, directory) in directories {
        let entries = match fs::read_dir(&directory) {
            // Layers that nobody has hashed yet have no such directory.
            Err(error) if error.kind() == io::ErrorKind::NotFound && name == HASHES_DIRECTORY => continue,
            entries => entries.map_err(FileError::io(&directory, "read"))?,
        };
        for entry in entries {
            let entry = entry.map_err(FileError::io(&directory, "read"))?;
            let file = entry.file_name();
            let Some(file) = file.to_str().filter(|file| !file.starts_with('.')) else { continue };
            files.push((format!("{name}/{file}"), entry.path()));
        }
    }
    Ok(files)
}
