//! A guest's memory in a file: each page at its address, holes for zeros.
//!
//! The file is what a restored guest's memory is mapped from, so it is as long as the memory, and once finished it is
//! never written again: a mapping would show the change to pages that its guest has not touched yet.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;

use berth_stream::{
    PAGE_BYTES, Page, PageHasher, PageIndexBuilder, PageSink, SplitError, SplitOptions, SplitSummary,
    Splitter,
};
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use crate::room::Room;

/// The memory block that is split off: every VM's main memory has this name.
pub const MEMORY_BLOCK: &str = "pc.ram";
/// How much is read from QEMU at once. Larger than its socket's buffer, so that one call empties it.
const READ_BYTES: usize = 512 << 10;
/// How much of an image is hashed between two looks at whether it is still wanted.
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
    /// The memory image, not yet on the disk.
    pub memory: File,
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

/// Reads a stream to its end and puts memory and device state into new files. Blocks. Returns as soon as the stream is
/// whole, and closes its end then, even if QEMU would wait for an answer.
///
/// # Errors
/// When the stream breaks off or the files can't be written; QEMU then sees its stream closed.
pub fn collect(
    mut stream: UnixStream,
    memory_path: &Path,
    device_path: &Path,
    memory_bytes: u64,
) -> Result<Collected, CollectError> {
    let memory = create(memory_path).map_err(CollectError::Create)?;
    memory.set_len(memory_bytes).map_err(CollectError::Create)?;
    let device = create(device_path).map_err(CollectError::Create)?;
    let options = SplitOptions { memory_block: MEMORY_BLOCK.into(), memory_bytes, sink_is_zero: true };
    let mut splitter = Splitter::new(options, ImageFile::new(memory), io::BufWriter::new(device));
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let read = match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(CollectError::Read(error)),
        };
        splitter.feed(&buffer[..read])?;
        if read < buffer.len() && splitter.parser().finish().is_ok() {
            break;
        }
    }
    let (memory, device, summary) = splitter.finish()?;
    let device = device.into_inner().map_err(|error| SplitError::Device(error.into_error()))?;
    Ok(Collected { memory: memory.file, device, summary })
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

/// Hashes each page of an image, holes not read, and writes the index to a new file. Blocks.
///
/// # Errors
/// When the system refuses.
pub fn write_index(memory: &File, path: &Path, key: [u8; 32]) -> io::Result<()> {
    let length = memory.metadata()?.len();
    let hasher = PageHasher::new(key);
    let mut builder = PageIndexBuilder::new(length / PAGE_BYTES as u64, &hasher);
    let mut buffer = vec![0; HASH_BYTES];
    each_extent(memory, length, |start, end| {
        let mut offset = start - start % PAGE_BYTES as u64;
        while offset < end {
            let want = (end - offset).min(HASH_BYTES as u64).next_multiple_of(PAGE_BYTES as u64);
            let want = usize::try_from(want.min(length - offset)).expect("at most a MiB");
            memory.read_exact_at(&mut buffer[..want], offset)?;
            let (pages, _) = buffer[..want].as_chunks::<PAGE_BYTES>();
            for (number, page) in pages.iter().enumerate() {
                let page: &Page = page;
                builder.set(offset / PAGE_BYTES as u64 + number as u64, hasher.hash_page(page));
            }
            offset += want as u64;
        }
        Ok(())
    })?;
    let mut file = create(path)?;
    file.write_all(builder.finish().as_bytes())?;
    file.sync_all()
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
    use super::*;
    use berth_stream::{PageHash, PageIndex};

    #[test]
    fn an_index_has_the_pages_and_leaves_out_the_holes() {
        let directory = tempfile::tempdir().expect("directory");
        let memory = create(&directory.path().join("memory")).expect("file");
        memory.set_len(64 << 20).expect("length");
        memory.write_all_at(&[7; PAGE_BYTES], 5 * PAGE_BYTES as u64).expect("page");
        memory.write_all_at(&[8; 3 * PAGE_BYTES], (64 << 20) - 3 * PAGE_BYTES as u64).expect("pages");
        let path = directory.path().join("index");
        write_index(&memory, &path, [1; 32]).expect("index");
        let index = PageIndex::open(std::fs::read(&path).expect("read")).expect("whole");
        let found: Vec<usize> = index
            .iter()
            .enumerate()
            .filter(|(_, hash)| *hash != PageHash::ZERO)
            .map(|(page, _)| page)
            .collect();
        assert_eq!(found, [5, 16381, 16382, 16383]);
        assert_eq!(index.get(5), Some(index.hasher().hash_page(&[7; PAGE_BYTES])));
    }

    #[test]
    fn a_stream_that_breaks_off_is_an_error_and_not_a_snapshot() {
        let directory = tempfile::tempdir().expect("directory");
        let (mut theirs, ours) = UnixStream::pair().expect("pair");
        theirs.write_all(b"QEVM\0\0\0\x03").expect("head");
        drop(theirs);
        let result =
            collect(ours, &directory.path().join("memory"), &directory.path().join("device"), 1 << 20);
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
