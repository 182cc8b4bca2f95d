//! A VM's files on their way to a host that does not see its pool.
//!
//! Nearly all of a VM's disk is in frozen layers and snapshots, which never change and so are copied as plain files while
//! the guest runs, those left out that the target has already. What the guest is still writing, its disks' top layers, is copied
//! over and over: each pass sends the chunks that differ from what was sent before, and the last pass, in the pause,
//! sends what changed since the one before, which is little. See `docs/decisions/0002-storage-of-a-migration.md`.
//!
//! Files are compared and sent in chunks of 64 KiB; chunks that are zero are not sent, so that holes stay holes.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use berth_model::{LayerId, Problem};

use super::wire::{CHUNK_BYTES, FileName, FileOffer, SnapshotPart};
use crate::disks::Disks;
use crate::durable::FileError;
use crate::layout::VmDirs;
use crate::nvram;
use crate::snapshot::archive::{self, SnapshotFiles};
use crate::snapshot::{layers_present, memory};

pub(super) mod copying;
pub mod receiving;
pub mod sending;

impl FileName {
    /// Where it is on this host.
    pub fn path(&self, dirs: &VmDirs) -> PathBuf {
        match self {
            Self::Layer { layer } => dirs.layer(layer),
            Self::Seed => dirs.seed(),
            Self::Snapshot { snapshot, part } => {
                let files = SnapshotFiles::of(dirs, snapshot);
                match part {
                    SnapshotPart::Memory => files.memory(),
                    SnapshotPart::Difference { number } => files.memory_file(*number),
                    SnapshotPart::Device => files.device(),
                    SnapshotPart::Index => files.index(),
                    SnapshotPart::Variables => files.nvram(nvram::VARIABLES),
                    SnapshotPart::Tpm => files.nvram(nvram::TPM_STATE),
                    SnapshotPart::Manifest => files.manifest(),
                }
            }
        }
    }
}

/// Everything of a VM that does not change, in the order in which it is to be sent. Blocks.
///
/// # Errors
/// When a directory or a manifest can't be read.
pub fn unchanging(dirs: &VmDirs, writable: &Disks) -> Result<Vec<FileOffer>, Problem> {
    let mut names = vec![FileName::Seed];
    let is_writable = |layer: &LayerId| writable.tops().any(|top| top == layer);
    let layers = layers_present(dirs)?.into_iter().filter(|layer| !is_writable(layer));
    names.extend(layers.map(|layer| FileName::Layer { layer }));
    for snapshot in archive::list(dirs)? {
        let manifest = match archive::read(dirs, &snapshot) {
            Ok(manifest) => manifest,
            // What is left of a removal is no snapshot.
            Err(archive::ArchiveError::Missing { .. }) => continue,
            Err(error) => return Err(error.into()),
        };
        let mut parts = Vec::new();
        if let Some(memory) = &manifest.memory {
            parts.push(SnapshotPart::Memory);
            parts
                .extend(memory.differences.iter().map(|number| SnapshotPart::Difference { number: *number }));
            parts.extend([SnapshotPart::Device, SnapshotPart::Index]);
        }
        let remembered = [(nvram::VARIABLES, SnapshotPart::Variables), (nvram::TPM_STATE, SnapshotPart::Tpm)];
        parts.extend(
            remembered
                .into_iter()
                .filter(|(name, _)| manifest.nvram.contains_key(*name))
                .map(|(_, part)| part),
        );
        parts.push(SnapshotPart::Manifest);
        names.extend(parts.into_iter().map(|part| FileName::Snapshot { snapshot: snapshot.clone(), part }));
    }
    let mut offers = Vec::with_capacity(names.len());
    // Snapshots share files: each is sent once, and keeps its names.
    let mut seen = HashMap::new();
    for name in names {
        let path = name.path(dirs);
        match std::fs::metadata(&path) {
            Ok(metadata) => {
                let number = u32::try_from(offers.len()).unwrap_or(u32::MAX);
                let first = *seen.entry((metadata.dev(), metadata.ino())).or_insert(number);
                let link_to = (first != number).then_some(first);
                offers.push(FileOffer { name, length_bytes: metadata.len(), link_to });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound && name == FileName::Seed => {}
            Err(error) => return Err(FileError::io(&path, "examined")(error).into()),
        }
    }
    Ok(offers)
}

/// Calls `visit` with each chunk of a file that is not zero.
///
/// # Errors
/// When the file can't be read, or `visit` stops it.
pub fn each_chunk(
    file: &File,
    length: u64,
    mut visit: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let chunk = CHUNK_BYTES as u64;
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut next = 0;
    memory::each_extent(file, length, |start, end| {
        // Two extents may share a chunk: it is visited with the first.
        let mut offset = (start - start % chunk).max(next);
        while offset < end {
            let bytes = usize::try_from((length - offset).min(chunk)).expect("at most a chunk");
            let bytes = &mut buffer[..bytes];
            file.read_exact_at(bytes, offset)?;
            if !is_zero(bytes) {
                visit(offset, bytes)?;
            }
            offset += chunk;
        }
        next = next.max(offset);
        Ok(())
    })
}

/// Whether there is nothing but zeros.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (blocks, rest) = bytes.as_chunks::<64>();
    blocks.iter().all(|block| *block == [0; 64]) && rest.iter().all(|byte| *byte == 0)
}

/// A checksum of what is in a file: of its length and its chunks that are not zero, so that both sides can make it of
/// what they send and receive.
#[derive(Debug, Clone, Default)]
pub struct Checksum(blake3::Hasher);

impl Checksum {
    /// The next chunk.
    pub fn chunk(&mut self, offset: u64, bytes: &[u8]) {
        self.0.update(&offset.to_be_bytes());
        self.0.update(bytes);
    }

    /// The checksum of a file of this length, in hexadecimal.
    pub fn finish(mut self, length: u64) -> String {
        self.0.update(b"length");
        self.0.update(&length.to_be_bytes());
        self.0.finalize().to_hex().to_string()
    }
}

/// The checksum of a file. Blocks.
///
/// # Errors
/// When it can't be read.
pub fn checksum(path: &Path) -> Result<String, FileError> {
    let read = || {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        let mut checksum = Checksum::default();
        each_chunk(&file, length, |offset, bytes| {
            checksum.chunk(offset, bytes);
            Ok(())
        })?;
        Ok(checksum.finish(length))
    };
    read().map_err(FileError::io(path, "read"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_and_zeros_are_one_and_everything_else_counts() {
        let directory = tempfile::tempdir().expect("directory");
        let make = |name: &str, length: u64, data: &[(u64, &[u8])]| {
            let path = directory.path().join(name);
            let file = File::create(&path).expect("file");
            file.set_len(length).expect("length");
            data.iter().for_each(|(offset, bytes)| file.write_all_at(bytes, *offset).expect("write"));
            checksum(&path).expect("checksum")
        };
        let length = 10 * CHUNK_BYTES as u64 + 100;
        let zeros = vec![0; 3 * CHUNK_BYTES];
        let base = make("a", length, &[(70_000, b"hello"), (length - 1, b"x")]);
        assert_eq!(make("b", length, &[(0, &zeros), (70_000, b"hello"), (length - 1, b"x")]), base);
        assert_ne!(make("c", length, &[(70_001, b"hello"), (length - 1, b"x")]), base);
        assert_ne!(make("d", length + 1, &[(70_000, b"hello"), (length - 1, b"x")]), base);
        assert_ne!(make("e", length, &[(70_000 + CHUNK_BYTES as u64, b"hello"), (length - 1, b"x")]), base);
    }

    #[test]
    fn each_chunk_with_content_is_visited_once() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("a");
        let file =
            File::options().read(true).write(true).create(true).truncate(true).open(&path).expect("file");
        let length = 8 * CHUNK_BYTES as u64;
        file.set_len(length).expect("length");
        // Two extents within one chunk, a hole between them.
        file.write_all_at(b"a", 0).expect("write");
        file.write_all_at(b"b", 40_000).expect("write");
        file.write_all_at(b"c", length - 1).expect("write");
        let mut seen = Vec::new();
        each_chunk(&file, length, |offset, bytes| {
            seen.push((offset, bytes.len()));
            Ok(())
        })
        .expect("chunks");
        assert_eq!(seen, [(0, CHUNK_BYTES), (length - CHUNK_BYTES as u64, CHUNK_BYTES)]);
    }
}
