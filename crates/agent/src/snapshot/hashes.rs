//! Hashes of frozen layers: what a layer's file was when it was frozen.
//!
//! ```text
//! layers/<layer>.qcow2    frozen, never written again
//! hashes/<layer>.b3       magic, be32 format, be32 bytes a chunk, be64 length of the layer's file, length of its id and the id,
//!                         BLAKE3 of each chunk of the file, BLAKE3 of all before
//! ```
//!
//! They are made in the background after the layer was frozen ([`worker`]): no snapshot and no guest waits for them. A
//! layer that has none yet, because the agent died or the layer is older than hashes are, gets them from whoever reads
//! it first.
//!
//! The layer's id is part of what is hashed: a layer with its hashes in another one's place is found out, too. Hashes go
//! with their layer (`remove_unneeded_layers`), and clones link them as they link layers.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::Path;

use berth_model::LayerId;

use super::verify::quiet::{Broken, Reader};
use crate::disk::FROZEN_MODE;
use crate::durable::{self, FileError};
use crate::layout::VmDirs;

pub mod worker;

/// How much of a file has a hash of its own, in bytes. More: a fault is less well placed. Less: 32 bytes more for each.
pub const CHUNK_BYTES: usize = 1 << 20;

const MAGIC: &[u8; 8] = b"BERTHLH1";
const FORMAT: u32 = 1;
const HASH_BYTES: usize = 32;
/// Mode of the file: nobody but the agent reads it.
pub(super) const MODE: u32 = 0o400;

/// The hashes of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerHashes {
    layer: LayerId,
    length: u64,
    chunks: Vec<[u8; HASH_BYTES]>,
}

/// Hashes that can't be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HashesError {
    /// It is not what was written.
    #[error("the layer's hashes are damaged")]
    Damaged,
    /// They are of something else.
    #[error("they are the hashes of another layer")]
    Foreign,
}

/// What a layer's file has otherwise than its hashes say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Differs {
    /// Where the first difference is, in bytes.
    pub offset: u64,
    /// What it is.
    pub detail: String,
}

impl LayerHashes {
    /// Reads a layer and hashes it. Blocks.
    ///
    /// # Errors
    /// When it can't be read, or it is broken off.
    pub fn make(layer: &LayerId, reader: &mut Reader<'_>, file: &File) -> Result<Self, Broken> {
        let length = file.metadata()?.len();
        let mut chunks = Vec::new();
        reader.each_chunk(file, length, |_, bytes| {
            chunks.push(*blake3::hash(bytes).as_bytes());
            true
        })?;
        Ok(Self { layer: layer.clone(), length, chunks })
    }

    /// Reads a layer and holds it against these hashes: the first difference, if there is one. Blocks.
    ///
    /// # Errors
    /// When it can't be read, or it is broken off.
    pub fn check(&self, reader: &mut Reader<'_>, file: &File) -> Result<Option<Differs>, Broken> {
        let length = file.metadata()?.len();
        let mut known = self.chunks.iter();
        let mut differs = None;
        reader.each_chunk(file, length.min(self.length), |offset, bytes| {
            let agrees = known.next().is_some_and(|hash| hash == blake3::hash(bytes).as_bytes());
            if !agrees {
                differs = Some(offset);
            }
            agrees
        })?;
        if length != self.length {
            let offset = length.min(self.length);
            let detail = format!("the file ends at byte {length}, expected {}", self.length);
            return Ok(Some(Differs { offset, detail }));
        }
        let detail = |offset| Differs {
            offset,
            detail: format!("the {} bytes from here have another hash", CHUNK_BYTES as u64),
        };
        Ok(differs.map(detail))
    }

    fn to_bytes(&self) -> Vec<u8> {
        let id = self.layer.as_str().as_bytes();
        let mut bytes = Vec::with_capacity(64 + id.len() + self.chunks.len() * HASH_BYTES);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&FORMAT.to_be_bytes());
        bytes.extend_from_slice(&u32::try_from(CHUNK_BYTES).unwrap_or(u32::MAX).to_be_bytes());
        bytes.extend_from_slice(&self.length.to_be_bytes());
        bytes.push(u8::try_from(id.len()).unwrap_or(u8::MAX));
        bytes.extend_from_slice(id);
        bytes.extend(self.chunks.iter().flatten());
        let check = blake3::hash(&bytes);
        bytes.extend_from_slice(check.as_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8], layer: &LayerId) -> Result<Self, HashesError> {
        let damaged = HashesError::Damaged;
        let (body, check) = bytes.split_last_chunk::<HASH_BYTES>().ok_or(damaged)?;
        if blake3::hash(body).as_bytes() != check {
            return Err(damaged);
        }
        let rest = body.strip_prefix(MAGIC).ok_or(damaged)?;
        let (format, rest) = rest.split_first_chunk::<4>().ok_or(damaged)?;
        let (chunk, rest) = rest.split_first_chunk::<4>().ok_or(damaged)?;
        let (length, rest) = rest.split_first_chunk::<8>().ok_or(damaged)?;
        let (id_length, rest) = rest.split_first().ok_or(damaged)?;
        let (id, rest) = rest.split_at_checked(usize::from(*id_length)).ok_or(damaged)?;
        if id != layer.as_str().as_bytes() {
            return Err(HashesError::Foreign);
        }
        let (chunks, left) = rest.as_chunks::<HASH_BYTES>();
        let length = u64::from_be_bytes(*length);
        let is_whole = u32::from_be_bytes(*format) == FORMAT
            && u32::from_be_bytes(*chunk) as usize == CHUNK_BYTES
            && chunks.len() as u64 == length.div_ceil(CHUNK_BYTES as u64)
            && left.is_empty();
        if !is_whole {
            return Err(damaged);
        }
        Ok(Self { layer: layer.clone(), length, chunks: chunks.to_vec() })
    }
}

/// The hashes of a layer; none if it has none yet.
///
/// # Errors
/// When the file can't be read. The inner one: when it is not what was written.
pub fn read(dirs: &VmDirs, layer: &LayerId) -> Result<Option<Result<LayerHashes, HashesError>>, FileError> {
    let path = dirs.layer_hashes(layer);
    match fs::read(&path) {
        Ok(bytes) => Ok(Some(LayerHashes::from_bytes(&bytes, layer))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(FileError::io(&path, "read")(error)),
    }
}

/// Writes the hashes of a layer down, durably; those of a layer that is gone by then are not kept.
///
/// # Errors
/// When the system refuses.
pub fn write(dirs: &VmDirs, hashes: &LayerHashes) -> Result<(), FileError> {
    if make_directory(dirs)? {
        durable::sync_parent(&dirs.hashes())?;
    }
    let path = dirs.layer_hashes(&hashes.layer);
    durable::write(&path, &hashes.to_bytes(), MODE)?;
    if dirs.layer(&hashes.layer).exists() { Ok(()) } else { durable::remove_file(&path) }
}

/// Says whether it is new.
fn make_directory(dirs: &VmDirs) -> Result<bool, FileError> {
    let directory = dirs.hashes();
    match fs::DirBuilder::new().mode(0o700).create(&directory) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(FileError::io(&directory, "made")(error)),
    }
}

/// Whether a layer is frozen: nobody writes to it again.
pub fn is_frozen(file: &fs::Metadata) -> bool {
    file.permissions().mode() & 0o777 == FROZEN_MODE
}

/// Removes hashes of layers that are not there.
///
/// # Errors
/// When the system refuses.
pub fn remove_strays(dirs: &VmDirs) -> Result<(), FileError> {
    let directory = dirs.hashes();
    let Ok(entries) = fs::read_dir(&directory) else { return Ok(()) };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let layer = name.to_str().and_then(|name| name.strip_suffix(".b3")).and_then(|id| id.parse().ok());
        if layer.is_none_or(|layer: LayerId| !dirs.layer(&layer).exists()) {
            durable::remove_file(&entry.path())?;
        }
    }
    Ok(())
}

/// Gives a clone the hashes of a layer that it shares, as a link. That is not waited for to be on the disk, since a clone is
/// waited for: what is lost is made anew.
///
/// # Errors
/// When the system refuses.
pub fn link(from: &VmDirs, to: &VmDirs, layer: &LayerId) -> Result<(), FileError> {
    make_directory(to)?;
    let path = to.layer_hashes(layer);
    match fs::hard_link(from.layer_hashes(layer), &path) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists) => {
            Ok(())
        }
        linked => linked.map_err(FileError::io(&path, "linked")),
    }
}

/// What tells one state of a file from another, as far as the system says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileState {
    device: u64,
    inode: u64,
    length: u64,
    changed: (i64, i64),
}

impl FileState {
    /// That of a file.
    pub fn of(file: &fs::Metadata) -> Self {
        let (device, inode, length) = (file.dev(), file.ino(), file.len());
        Self { device, inode, length, changed: (file.ctime(), file.ctime_nsec()) }
    }

    /// The file's length in bytes.
    pub const fn length(&self) -> u64 {
        self.length
    }
}

/// Opens a layer and says how it is.
///
/// # Errors
/// When the system refuses.
pub fn open(path: &Path) -> Result<(File, fs::Metadata), FileError> {
    let file = File::open(path).map_err(FileError::io(path, "opened"))?;
    let metadata = file.metadata().map_err(FileError::io(path, "examined"))?;
    Ok((file, metadata))
}

#[cfg(test)]
mod tests;
