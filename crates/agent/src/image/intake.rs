//! One part on its way into a pool.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use berth_model::image::{PartFormat, PartRole};
use berth_model::{HostId, ImageId, Problem, ProblemCode};
use futures_util::StreamExt;
use sha2::{Digest, Sha256};

use super::{Chunks, Expected, ImageRecord, PartRecord, open_directory};
use crate::disk::{FROZEN_MODE, no_space};
use crate::durable::{self, FileError, blocking};
use crate::layout::PoolDirs;
use crate::qcow2;
use crate::room::Room;
use crate::services::Services;

/// How many bytes are gathered before they are hashed and written, which is done on another thread. Less: more
/// switching between threads. More: memory for each upload.
const GATHERED_BYTES: usize = 256 * 1024;
const PREFIX: &str = ".part-";
const SECTOR_BYTES: u64 = 512;

/// Tells the files of one agent's run apart.
static NUMBER: AtomicU64 = AtomicU64::new(0);

/// Whether a file is the unfinished part of an agent of this host.
pub fn is_of(name: &OsStr, host: &HostId) -> bool {
    name.to_str()
        .and_then(|name| name.strip_prefix(PREFIX))
        .is_some_and(|rest| rest.starts_with(host.as_str()))
}

/// A part on its way. Dropped before it is kept, it leaves nothing behind.
pub struct Intake {
    pool: PoolDirs,
    image: ImageId,
    expected: Expected,
    path: PathBuf,
    sink: Option<Sink>,
}

struct Sink {
    file: File,
    room: Room,
    hash: Sha256,
    length: u64,
}

impl Drop for Intake {
    fn drop(&mut self) {
        // Kept parts have another name by now; what can't be removed is removed at the next start.
        let _ = fs::remove_file(&self.path);
        let _ = fs::remove_dir(self.pool.image(&self.image));
    }
}

impl Intake {
    /// Makes the file, if there is room for it.
    ///
    /// # Errors
    /// When there is none, or it can't be made.
    pub async fn begin(
        services: &Services,
        pool: &PoolDirs,
        image: &ImageId,
        expected: &Expected,
    ) -> Result<Self, Problem> {
        let directory = pool.image(image);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = directory.join(format!("{PREFIX}{}-{number}", services.host));
        let mut intake =
            Self { pool: pool.clone(), image: image.clone(), expected: expected.clone(), path, sink: None };
        let (path, size_bytes) = (intake.path.clone(), expected.size_bytes);
        let file = blocking(move || {
            let file = make_file(&directory, &path)?;
            match Room::default().take(&file, size_bytes) {
                Ok(()) => Ok(file),
                Err(error) if durable::is_no_space(&error) => Err(no_space(&directory)),
                Err(error) => Err(FileError::io(&directory, "looked at")(error).into()),
            }
        })
        .await?;
        intake.sink = Some(Sink { file, room: Room::default(), hash: Sha256::new(), length: 0 });
        Ok(intake)
    }

    /// Takes the bytes in and compares their number and hash with what was expected.
    ///
    /// # Errors
    /// When they differ, the bytes stop coming, or there is no room.
    pub async fn fill(&mut self, bytes: &mut Chunks) -> Result<(), Problem> {
        let mut gathered = Vec::new();
        let mut length = 0u64;
        while let Some(chunk) = bytes.next().await {
            let chunk = chunk.map_err(|error| {
                Problem::new(ProblemCode::BadImage, format!("the bytes stopped coming: {error}"))
            })?;
            length += chunk.len() as u64;
            if length > self.expected.size_bytes {
                return Err(self.wrong_length(&format!("more than {}", self.expected.size_bytes)));
            }
            gathered.extend_from_slice(&chunk);
            if gathered.len() >= GATHERED_BYTES {
                self.write(std::mem::take(&mut gathered)).await?;
            }
        }
        self.write(gathered).await?;
        self.finish(length).await
    }

    async fn write(&mut self, bytes: Vec<u8>) -> Result<(), Problem> {
        let Some(mut sink) = self.sink.take() else { return Err(broken()) };
        let path = self.path.clone();
        let sink = blocking(move || {
            sink.hash.update(&bytes);
            sink.length += bytes.len() as u64;
            let taken = sink.room.take(&sink.file, bytes.len() as u64);
            match taken.and_then(|()| sink.file.write_all(&bytes)) {
                Ok(()) => Ok(sink),
                Err(error) if durable::is_no_space(&error) => Err(no_space(path.parent().unwrap_or(&path))),
                Err(error) => Err(FileError::io(&path, "written")(error).into()),
            }
        })
        .await?;
        self.sink = Some(sink);
        Ok(())
    }

    async fn finish(&mut self, length: u64) -> Result<(), Problem> {
        if length != self.expected.size_bytes {
            return Err(self.wrong_length(&length.to_string()));
        }
        let Some(sink) = self.sink.take() else { return Err(broken()) };
        let found: String = sink.hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        if found != self.expected.sha256 {
            let message = format!("the bytes have the SHA-256 {found}");
            return Err(Problem::new(ProblemCode::BadImage, message).at(
                "sha256",
                found,
                &self.expected.sha256,
            ));
        }
        let path = self.path.clone();
        let file = sink.file;
        blocking(move || {
            let mode = fs::Permissions::from_mode(FROZEN_MODE);
            let synced = file.set_permissions(mode).and_then(|()| file.sync_all());
            Ok(synced.map_err(FileError::io(&path, "synced"))?)
        })
        .await
    }

    fn wrong_length(&self, found: &str) -> Problem {
        let message = format!("{found} bytes came: expected {}", self.expected.size_bytes);
        Problem::new(ProblemCode::BadImage, message).at(
            "size_bytes",
            found,
            self.expected.size_bytes.to_string(),
        )
    }

    /// Looks at what came; gives the size that a guest sees, in bytes.
    ///
    /// # Errors
    /// When it is not what its format says.
    pub async fn check(&self, services: &Services) -> Result<u64, Problem> {
        let size = self.expected.size_bytes;
        match (self.expected.role, self.expected.format) {
            (PartRole::Kernel | PartRole::Initrd, _) => Ok(size),
            (PartRole::Disk, PartFormat::Raw) => Ok(size.next_multiple_of(SECTOR_BYTES)),
            (PartRole::Disk, PartFormat::Qcow2) => {
                let path = self.path.clone();
                let head = blocking(move || Ok(read_head(&path)?)).await?;
                let head = qcow2::check(&head, size).map_err(|fault| {
                    let message = format!("the image is refused: {fault}");
                    Problem::new(ProblemCode::BadImage, message)
                })?;
                services.images.check_qcow2(&self.path).await?;
                Ok(head.virtual_size_bytes)
            }
        }
    }

    /// Gives the part its name, and writes down that it is there.
    ///
    /// # Errors
    /// When the system refuses; the part is then not there.
    pub async fn keep(&self, part: PartRecord) -> Result<(), Problem> {
        let (from, to) = (self.path.clone(), self.pool.part(&self.image, self.expected.role, part.format));
        let record_path = self.pool.image_record(&self.image);
        let role = self.expected.role;
        blocking(move || {
            fs::rename(&from, &to).map_err(FileError::io(&to, "named"))?;
            durable::sync_parent(&to)?;
            let mut record: ImageRecord = durable::read_json(&record_path)?.unwrap_or_default();
            record.parts.insert(role, part);
            if let Err(error) = durable::write_json(&record_path, &record) {
                durable::remove_file(&to)?;
                return Err(error.into());
            }
            Ok(())
        })
        .await
    }
}

fn make_file(directory: &Path, path: &Path) -> Result<File, FileError> {
    let make = || {
        open_directory(directory)?;
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        file.map_err(FileError::io(path, "made"))
    };
    // Another part of the same image that was refused may have taken the empty directory away in between.
    make().or_else(|_| make())
}

fn read_head(path: &Path) -> Result<Vec<u8>, FileError> {
    let mut head = Vec::new();
    let read = File::open(path).and_then(|file| file.take(qcow2::HEAD_BYTES as u64).read_to_end(&mut head));
    read.map_err(FileError::io(path, "read"))?;
    Ok(head)
}

fn broken() -> Problem {
    Problem::new(ProblemCode::Internal, "taking the part in broke before")
}
