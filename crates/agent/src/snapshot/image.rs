//! A guest's memory in the files of a snapshot: a full image, and differences that hold what was not in it.
//!
//! ```text
//! memory.raw      a full image, mapped by a restored guest's process     } hard links: what one snapshot made and others
//! memory.1.raw    pages that an earlier snapshot found changed           } refer to is one file, which the file system
//! memory.2.raw    pages that this one found changed, the rest holes      } removes with the last of them
//! pages.idx       for each page its hash, and which of the files has it
//! ```
//!
//! So a snapshot's directory has all that the snapshot needs and nothing else, and any may be removed without a thought for
//! the others. Each file is as long as the memory, with each page at its address. What is in none of the files is zero.
//!
//! Reading checks: an index must be the one that the manifest names, and a page must have the hash that the index has for it,
//! or the file and the place in it are named.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use berth_model::SnapshotId;
use berth_stream::{
    BaseFiles, Holder, JoinError, Joiner, MemorySource, PAGE_BYTES, Page, PageHasher, PageIndex,
};
use rustix::io::{Errno, ReadWriteFlags};

use super::archive::{ArchiveError, MemoryManifest, SnapshotFiles};
use super::memory::{self, Collected, MEMORY_BLOCK};
use crate::durable::{self, FileError, with_causes};

/// How much of a stream to QEMU is gathered at least.
const STREAM_BYTES: usize = 64 << 10;

/// A snapshot's memory, to be read.
#[derive(Debug)]
pub struct MemoryImage {
    snapshot: SnapshotId,
    paths: SnapshotFiles,
    /// By their numbers; none where the index names no such file.
    files: Vec<Option<File>>,
    index: PageIndex,
    hasher: PageHasher,
}

impl MemoryImage {
    /// Opens the files of a snapshot with memory, index and lengths found right. Blocks; reads the index alone, some
    /// 4 MiB for each GiB of memory.
    ///
    /// # Errors
    /// When a file is missing or is not what it was.
    pub fn open(
        paths: &SnapshotFiles,
        snapshot: &SnapshotId,
        memory: &MemoryManifest,
    ) -> Result<Self, ArchiveError> {
        let damaged = |path: PathBuf, detail: String| {
            let snapshot = snapshot.clone();
            ArchiveError::Damaged { snapshot, path, detail }
        };
        let path = paths.index();
        let bytes = std::fs::read(&path).map_err(FileError::io(&path, "read"))?;
        let index = PageIndex::open(bytes).map_err(|error| damaged(path.clone(), error.to_string()))?;
        if index.identity() != memory.index_blake3 {
            return Err(damaged(path, "it is of another memory than the manifest names".into()));
        }
        if index.page_count() != memory.bytes / PAGE_BYTES as u64 {
            return Err(damaged(path, format!("{} pages, of {} bytes", index.page_count(), memory.bytes)));
        }
        let used = index.pages_of_files();
        let mut files = Vec::new();
        for (number, pages) in (0..).zip(&used) {
            // The full image is mapped whether a page of it is still used or not.
            if number > 0 && *pages == 0 {
                files.push(None);
                continue;
            }
            let path = paths.memory_file(number);
            let file = File::open(&path).map_err(FileError::io(&path, "opened"))?;
            let length = file.metadata().map_err(FileError::io(&path, "examined"))?.len();
            if length != memory.bytes {
                return Err(damaged(path, format!("{length} bytes, expected {}", memory.bytes)));
            }
            files.push(Some(file));
        }
        let hasher = index.hasher();
        Ok(Self { snapshot: snapshot.clone(), paths: paths.clone(), files, index, hasher })
    }

    /// The snapshot's files.
    pub const fn paths(&self) -> &SnapshotFiles {
        &self.paths
    }

    /// Where each page is, and its hash.
    pub const fn index(&self) -> &PageIndex {
        &self.index
    }

    /// The file of this number, if there is one.
    pub fn file(&self, number: u8) -> Option<&File> {
        self.files.get(usize::from(number)).and_then(Option::as_ref)
    }

    /// What a restore has to send to the process that has mapped the full image, in bytes.
    pub fn sent_bytes(&self) -> u64 {
        sent_bytes(&self.index)
    }

    /// The numbers of the files that there are, 0 first.
    pub fn numbers(&self) -> impl Iterator<Item = u8> {
        (0..).zip(&self.files).filter(|(_, file)| file.is_some()).map(|(number, _)| number)
    }

    /// Reads pages that one file has, and checks them.
    ///
    /// # Errors
    /// When they can't be read, or are not what they were: [`ArchiveError::Damaged`] with the file and the place.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), ArchiveError> {
        let first = offset / PAGE_BYTES as u64;
        let holder = self.index.holder(first).unwrap_or(Holder::HOLE);
        let Some(number) = holder.number() else {
            bytes.fill(0);
            return Ok(());
        };
        let path = || self.paths.memory_file(number);
        let file = self.files.get(usize::from(number)).and_then(Option::as_ref);
        let file = file.ok_or_else(|| FileError::io(&path(), "found")(io::ErrorKind::NotFound.into()))?;
        file.read_exact_at(bytes, offset).map_err(FileError::io(&path(), "read"))?;
        match self.index.first_wrong(&self.hasher, first, bytes) {
            Some(wrong) => {
                let (snapshot, detail) = (self.snapshot.clone(), another_hash(wrong));
                Err(ArchiveError::Damaged { snapshot, path: path(), detail })
            }
            None => Ok(()),
        }
    }

    /// Compares some pages of the full image with the index: enough to tell an image from another, and no more, for a
    /// restore does not wait until all has been read.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn sample(&self, count: u64) -> Result<(), ArchiveError> {
        let pages = self.index.page_count();
        let mut page: Page = [0; PAGE_BYTES];
        for number in 0..count {
            // The first page of each part that the full image has.
            let (from, to) = (pages * number / count, pages * (number + 1) / count);
            let held = (from..to).find(|page| self.index.holder(*page) == Some(Holder::FULL));
            if let Some(held) = held {
                self.read(held * PAGE_BYTES as u64, &mut page)?;
            }
        }
        Ok(())
    }
}

/// What a finished image consists of.
#[derive(Debug)]
pub struct Completed {
    /// The index's identity.
    pub identity: String,
    /// The numbers of the differences.
    pub differences: Vec<u8>,
    /// What the file occupies that was made for it.
    pub own_bytes: u64,
    /// What those occupy that are an earlier snapshot's too.
    pub shared_bytes: u64,
}

/// Makes an image of what was collected: hashes what was stored, links what the earlier snapshot has, and writes the
/// index. One of which a restore would have to send more than `sent_bytes_max` is made a full image. Blocks.
///
/// # Errors
/// When the system refuses, or a page that has to be taken over is not what it was.
pub fn complete(
    collected: Collected,
    paths: &SnapshotFiles,
    mut earlier: Option<&SnapshotFiles>,
    sent_bytes_max: u64,
) -> Result<Completed, FileError> {
    let Collected { memory: stored, digest, .. } = collected;
    let mut own = digest.own_number();
    let mut path = paths.memory_file(own);
    let mut index = memory::hash_stored(&stored, digest).map_err(FileError::io(&path, "read"))?;
    if let Some(earlier) = earlier.take_if(|_| sent_bytes(&index) > sent_bytes_max) {
        index = fold::fold(&index, own, &stored, paths, earlier)?;
        own = 0;
        path = paths.memory();
    }
    let own_bytes = memory::stored_bytes(&stored).map_err(FileError::io(&path, "examined"))?;
    let used = index.pages_of_files();
    let mut differences: Vec<u8> =
        (1..).zip(&used[1..]).filter(|(_, pages)| **pages > 0).map(|(n, _)| n).collect();
    let mut shared_bytes = 0;
    if let Some(earlier) = earlier {
        earlier.link_memory(paths, differences.iter().copied().filter(|number| *number != own))?;
        for number in std::iter::once(0).chain(differences.iter().copied().filter(|number| *number != own)) {
            let path = paths.memory_file(number);
            let metadata = std::fs::metadata(&path).map_err(FileError::io(&path, "examined"))?;
            shared_bytes += metadata.blocks() * 512;
        }
    }
    // Nothing was new: a file of holes is nothing to keep.
    if own != 0 && !differences.contains(&own) {
        durable::remove_file(&path)?;
    }
    differences.sort_unstable();
    let path = paths.index();
    let written = std::fs::write(&path, index.as_bytes()).map_err(FileError::io(&path, "written"));
    written?;
    Ok(Completed { identity: index.identity(), differences, own_bytes, shared_bytes })
}

/// What a restore of this memory has to send, in bytes.
fn sent_bytes(index: &PageIndex) -> u64 {
    index.holders().filter(is_sent).count() as u64 * PAGE_BYTES as u64
}

/// Whether a page has to be sent to a process that has mapped the full image.
fn is_sent(holder: &Holder) -> bool {
    *holder != Holder::FULL && *holder != Holder::HOLE
}

/// As the base of a new image: what is in the page cache is there at once.
impl BaseFiles for MemoryImage {
    fn read_now(&mut self, file: u8, offset: u64, bytes: &mut [u8]) -> usize {
        let Some(Some(file)) = self.files.get(usize::from(file)) else { return 0 };
        let mut buffers = [io::IoSliceMut::new(bytes)];
        match rustix::io::preadv2(file, &mut buffers, offset, ReadWriteFlags::NOWAIT) {
            // A file system that can't say whether it would wait is in memory, or reads ahead.
            Err(Errno::OPNOTSUPP) => file.read_at(bytes, offset).unwrap_or(0),
            read => read.unwrap_or(0),
        }
    }
}

/// Writes device state to a process that has mapped the full image, and before it the pages that differ from that. Blocks.
///
/// # Errors
/// When a page can't be read or is not what it was: the stream is then cut before it. That QEMU does not want to read on
/// is no error: what it says is the one to tell.
pub fn feed(mut stream: UnixStream, device: &[u8], image: MemoryImage) -> Result<(), ArchiveError> {
    if image.sent_bytes() == 0 {
        let _ = stream.write_all(device);
        return Ok(());
    }
    let snapshot = image.snapshot.clone();
    let path = image.paths.device();
    let mut differences = Differences { image, fault: None };
    let stream = io::BufWriter::with_capacity(STREAM_BYTES, stream);
    let mut joiner = Joiner::new(MEMORY_BLOCK, &mut differences, stream);
    let joined = joiner.feed(device).and_then(|()| joiner.finish().map(drop));
    match (joined, differences.fault) {
        (_, Some(fault)) => Err(fault),
        (Ok(()) | Err(JoinError::Output(_)), None) => Ok(()),
        (Err(error), None) => Err(ArchiveError::Damaged { snapshot, path, detail: with_causes(&error) }),
    }
}

/// What is wrong with a page that is not what it was.
fn another_hash(page: u64) -> String {
    format!("the page at {:#x} has another hash", page * PAGE_BYTES as u64)
}

/// The pages that a process that has mapped the full image does not have.
struct Differences {
    image: MemoryImage,
    /// Why reading broke off: only that it did passes through the joiner.
    fault: Option<ArchiveError>,
}

impl MemorySource for &mut Differences {
    fn next_range(&mut self, from: u64, length: u64) -> Option<(u64, u64)> {
        let index = &self.image.index;
        let pages = from / PAGE_BYTES as u64..length / PAGE_BYTES as u64;
        let start = pages.clone().find(|page| index.holder(*page).is_some_and(|holder| is_sent(&holder)))?;
        let end = index.end_of_run(start, pages.end);
        Some((start * PAGE_BYTES as u64, end * PAGE_BYTES as u64))
    }

    fn read_at(&mut self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.image.read(offset, bytes).map_err(|error| {
            self.fault = Some(error);
            io::Error::from(io::ErrorKind::InvalidData)
        })
    }
}

mod fold;
#[cfg(test)]
mod tests;
