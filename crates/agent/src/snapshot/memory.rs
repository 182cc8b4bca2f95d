//! A guest's memory in a file: each page at its address, holes for zeros and for what an earlier snapshot has.
//!
//! A full image is what a restored guest's memory is mapped from, so it is as long as the memory, and once finished it is
//! never written again: a mapping would show the change to pages that its guest has not touched yet.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;

use berth_stream::{
    Base, Differ, Digest, PAGE_BYTES, PageHasher, PageIndex, PageSink, SplitError, SplitOptions,
    SplitSummary, Splitter,
};
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;
use tokio::sync::oneshot;

use super::archive::SnapshotFiles;
use super::image::MemoryImage;
use crate::room::Room;

/// The memory block that is split off: every VM's main memory has this name.
pub const MEMORY_BLOCK: &str = "pc.ram";
/// How much is read from QEMU at once. Larger than its socket's buffer, so that one call empties it.
const READ_BYTES: usize = 512 << 10;
/// How much of an image is read at once to be hashed.
const HASH_BYTES: usize = 1 << 20;

/// Writes pages to a file, as long as there is room for others too.
#[derive(Debug)]
struct ImageFile {
    file: File,
    room: Room,
}

impl ImageFile {
    fn new(file: File) -> Self {
        Self { file, room: Room::default() }
    }
}

impl PageSink for ImageFile {
    fn pages(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.room.take(&self.file, bytes.len() as u64)?;
        self.file.write_all_at(bytes, offset)
    }

    fn zeros(&mut self, offset: u64, length: u64) -> io::Result<()> {
        punch(&self.file, offset, length)
    }
}

/// Makes a range of a file zero, without taking room where the file system can.
///
/// # Errors
/// When the system refuses.
pub fn punch(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(file, flags, offset, length) {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP) => write_zeros(file, offset, length),
        Err(error) => Err(error.into()),
    }
}

fn write_zeros(file: &File, mut offset: u64, length: u64) -> io::Result<()> {
    let zeros = [0; 1 << 16];
    let end = offset + length;
    while offset < end {
        let now = (end - offset).min(zeros.len() as u64);
        file.write_all_at(&zeros[..usize::try_from(now).expect("at most 64 KiB")], offset)?;
        offset += now;
    }
    Ok(())
}

/// What was collected.
#[derive(Debug)]
pub struct Collected {
    /// The pages that no earlier snapshot has, not yet on the disk.
    pub memory: File,
    /// What is known of all pages, those in the file not hashed yet.
    pub digest: Digest,
    /// The device state, not yet on the disk.
    pub device: File,
    /// What went where.
    pub summary: SplitSummary,
}

/// Why nothing was collected.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// A file could not be made.
    #[error("the snapshot's files can't be made")]
    Create(#[source] io::Error),
    /// QEMU's end could not be read.
    #[error("QEMU's stream can't be read")]
    Read(#[source] io::Error),
    /// It is not a stream, is not whole, or can't be written.
    #[error(transparent)]
    Split(#[from] SplitError),
}

impl CollectError {
    /// Whether the disk is full.
    pub fn is_no_space(&self) -> bool {
        match self {
            Self::Create(error) | Self::Split(SplitError::Pages(error) | SplitError::Device(error)) => {
                crate::durable::is_no_space(error)
            }
            Self::Read(_) | Self::Split(_) => false,
        }
    }
}

/// Reads a stream to its end and puts memory and device state into new files, the memory as far as the base has it not.
/// Blocks. Returns as soon as the stream is whole, and closes its end then, even if QEMU would wait for an answer.
/// `first_page` is told when the first page of the guest's memory has arrived.
///
/// # Errors
/// When the stream breaks off or the files can't be written; QEMU then sees its stream closed.
pub fn collect(
    mut stream: UnixStream,
    files: &SnapshotFiles,
    memory_bytes: u64,
    base: Option<Base<MemoryImage>>,
    mut first_page: Option<oneshot::Sender<()>>,
) -> Result<Collected, CollectError> {
    let number = base.as_ref().map_or(0, Base::own_number);
    let memory = create(&files.memory_file(number)).map_err(CollectError::Create)?;
    memory.set_len(memory_bytes).map_err(CollectError::Create)?;
    let device = create(&files.device()).map_err(CollectError::Create)?;
    let options = SplitOptions { memory_block: MEMORY_BLOCK.into(), memory_bytes, sink_is_zero: true };
    let sink = ImageFile::new(memory);
    let differ = match base {
        Some(base) => Differ::against(base, sink),
        None => Differ::full(sink, memory_bytes, PageHasher::new(key().map_err(CollectError::Create)?)),
    };
    let mut splitter = Splitter::new(options, differ, io::BufWriter::new(device));
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let read = match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(CollectError::Read(error)),
        };
        splitter.feed(&buffer[..read])?;
        let summary = splitter.progress();
        if summary.pages + summary.zero_pages > 0
            && let Some(first_page) = first_page.take()
        {
            // Whoever waited for it may have given up.
            let _ = first_page.send(());
        }
        if read < buffer.len() && splitter.parser().finish().is_ok() {
            break;
        }
    }
    let (differ, device, summary) = splitter.finish()?;
    let device = device.into_inner().map_err(|error| SplitError::Device(error.into_error()))?;
    let (memory, digest) = differ.finish();
    Ok(Collected { memory: memory.file, digest, device, summary })
}

fn key() -> io::Result<[u8; 32]> {
    let mut key = [0; 32];
    getrandom::fill(&mut key).map_err(io::Error::other)?;
    Ok(key)
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
}

/// How many bytes a file occupies.
///
/// # Errors
/// When the system refuses.
pub fn stored_bytes(file: &File) -> io::Result<u64> {
    Ok(file.metadata()?.blocks() * 512)
}

/// Hashes the pages that were stored in an image; what turns out to be zero is taken out. Blocks.
///
/// # Errors
/// When the system refuses.
pub fn hash_stored(memory: &File, mut digest: Digest) -> io::Result<PageIndex> {
    let mut buffer = vec![0; HASH_BYTES];
    let mut from = 0;
    while let Some((start, end)) = digest.next_unhashed(from) {
        let count = (end - start).min((HASH_BYTES / PAGE_BYTES) as u64);
        let bytes = &mut buffer[..usize::try_from(count).expect("at most a MiB") * PAGE_BYTES];
        memory.read_exact_at(bytes, start * PAGE_BYTES as u64)?;
        let (pages, _) = bytes.as_chunks::<PAGE_BYTES>();
        for (page, content) in (start..).zip(pages) {
            if !digest.hash(page, content) {
                punch(memory, page * PAGE_BYTES as u64, PAGE_BYTES as u64)?;
            }
        }
        from = start + count;
    }
    Ok(digest.finish())
}

/// Calls `visit` with start and end of each range of a file that is not a hole, up to `length`.
///
/// # Errors
/// When the system refuses, or `visit` does.
pub fn each_extent(
    file: &File,
    length: u64,
    mut visit: impl FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut offset = 0;
    while offset < length {
        let start = match rustix::fs::seek(file, SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(()),
            // A file system without holes: everything is data.
            Err(Errno::INVAL) => offset,
            Err(error) => return Err(error.into()),
        };
        if start >= length {
            return Ok(());
        }
        let end = match rustix::fs::seek(file, SeekFrom::Hole(start)) {
            Ok(end) => end.min(length),
            Err(Errno::INVAL) => length,
            Err(error) => return Err(error.into()),
        };
        visit(start, end)?;
        offset = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    #[test]
    fn a_stream_that_breaks_off_is_an_error_and_not_a_snapshot() {
        let directory = tempfile::tempdir().expect("directory");
        let (mut theirs, ours) = UnixStream::pair().expect("pair");
        theirs.write_all(b"QEVM\0\0\0\x03").expect("head");
        drop(theirs);
        let result = collect(ours, &SnapshotFiles::at(directory.path()), 1 << 20, None, None);
        assert!(matches!(result, Err(CollectError::Split(SplitError::Stream(_)))), "{result:?}");
    }

    #[test]
    fn a_punched_range_takes_no_room_and_reads_as_zero() {
        let directory = tempfile::tempdir().expect("directory");
        let file = create(&directory.path().join("memory")).expect("file");
        file.write_all_at(&vec![9; 1 << 20], 0).expect("write");
        let before = stored_bytes(&file).expect("stored");
        punch(&file, 0, 512 << 10).expect("punch");
        assert!(stored_bytes(&file).expect("stored") < before);
        let mut page = [1; PAGE_BYTES];
        file.read_exact_at(&mut page, 0).expect("read");
        assert_eq!(page, [0; PAGE_BYTES]);
    }
}
