//! Reads which parts of a disk a layer of ours holds: the tables of a qcow2 file, and nothing else of it.
//!
//! Layers are written by QEMU and by ourselves, version 3 without optional features, clusters of 64 KiB. A layer that is
//! anything else is refused: what is not known can't be merged. The tables are a stranger's word all the same (a QEMU
//! that its guest took over writes them), so nothing in them is believed that does not lie within the file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::durable::FileError;

/// Length of a cluster in bytes.
pub const CLUSTER_BYTES: u64 = 1 << CLUSTER_BITS;
const CLUSTER_BITS: u32 = 16;
/// Entries of a second table, each for one cluster of the disk.
pub const TABLE_ENTRIES: usize = (CLUSTER_BYTES / 8) as usize;
/// What one second table stands for, in bytes.
pub const TABLE_STEP_BYTES: u64 = CLUSTER_BYTES * TABLE_ENTRIES as u64;
/// In a table's entry: what it points to belongs to this file alone.
pub const ENTRY_COPIED: u64 = 1 << 63;
/// In a second table's entry: the cluster reads as zeros.
pub const ENTRY_ZERO: u64 = 1;

const MAGIC: [u8; 4] = *b"QFI\xfb";
const VERSION: u32 = 3;
const HEADER_BYTES: usize = 104;
const ENTRY_COMPRESSED: u64 = 1 << 62;
const ENTRY_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// A layer that can't be read.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// It is not as our layers are.
    #[error("layer {} can't be merged: {detail}", path.display())]
    Unfit {
        /// Which file.
        path: PathBuf,
        /// What about it.
        detail: String,
    },
}

/// What a layer has for one cluster of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cluster {
    /// Nothing: what is below counts.
    Absent,
    /// It reads as zeros.
    Zero,
    /// It is at this offset in the file.
    Data(u64),
}

/// A second table, as it is in the file.
pub type Table = Box<[u8]>;

/// A layer, open for reading.
#[derive(Debug)]
pub struct LayerFile {
    path: PathBuf,
    file: File,
    length: u64,
    size_bytes: u64,
    first: Vec<u64>,
}

impl LayerFile {
    /// Opens a layer and reads its first table.
    ///
    /// # Errors
    /// When the system refuses, or it is not as our layers are.
    pub fn open(path: &Path) -> Result<Self, LayerError> {
        let file = File::open(path).map_err(FileError::io(path, "opened"))?;
        let length = file.metadata().map_err(FileError::io(path, "examined"))?.len();
        let mut layer = Self { path: path.to_owned(), file, length, size_bytes: 0, first: Vec::new() };
        let mut head = [0; HEADER_BYTES];
        layer.read(&mut head, 0)?;
        layer.read_head(&head)?;
        Ok(layer)
    }

    /// The size that the guest sees, in bytes.
    pub const fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The file's length in bytes.
    pub const fn length(&self) -> u64 {
        self.length
    }

    /// How many second tables the disk has, whether they are there or not.
    pub const fn tables(&self) -> usize {
        self.first.len()
    }

    /// A second table; none when this layer has nothing of what it stands for.
    ///
    /// # Errors
    /// When it can't be read or lies outside the file.
    pub fn table(&self, index: usize) -> Result<Option<Table>, LayerError> {
        let offset = self.first.get(index).copied().unwrap_or(0) & ENTRY_OFFSET;
        if offset == 0 {
            return Ok(None);
        }
        self.check_place("a second table", offset, CLUSTER_BYTES)?;
        let mut table = vec![0; CLUSTER_BYTES as usize].into_boxed_slice();
        self.read(&mut table, offset)?;
        Ok(Some(table))
    }

    /// What an entry of one of its tables says.
    ///
    /// # Errors
    /// When it says something that can't be.
    pub fn cluster(&self, table: &Table, index: usize) -> Result<Cluster, LayerError> {
        let entry = be_u64(table, index * 8);
        let offset = entry & ENTRY_OFFSET;
        if entry & ENTRY_COMPRESSED != 0 {
            return Err(self.unfit("it has compressed clusters"));
        }
        if entry & ENTRY_ZERO != 0 {
            return Ok(Cluster::Zero);
        }
        if offset == 0 {
            return Ok(Cluster::Absent);
        }
        self.check_place("a cluster", offset, 1)?;
        Ok(Cluster::Data(offset))
    }

    /// Reads a cluster. What the file's end cuts off is zero.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn read_cluster(&self, buffer: &mut [u8], offset: u64) -> Result<(), LayerError> {
        let there = usize::try_from(self.length.saturating_sub(offset)).unwrap_or(usize::MAX);
        let there = there.min(buffer.len());
        self.read(&mut buffer[..there], offset)?;
        buffer[there..].fill(0);
        Ok(())
    }

    fn read_head(&mut self, head: &[u8; HEADER_BYTES]) -> Result<(), LayerError> {
        let expect = |right: bool, what: &str| if right { Ok(()) } else { Err(self.unfit(what)) };
        expect(head[..4] == MAGIC, "it is not qcow2")?;
        expect(be_u32(head, 4) == VERSION, "it is not of version 3")?;
        expect(be_u32(head, 20) == CLUSTER_BITS, "its clusters are not of 64 KiB")?;
        expect(be_u32(head, 32) == 0, "it is encrypted")?;
        expect(be_u32(head, 60) == 0, "it has internal snapshots")?;
        expect(be_u64(head, 72) == 0, "it needs features that ours don't have, or was not closed properly")?;
        let size_bytes = be_u64(head, 24);
        let entries = u64::from(be_u32(head, 36));
        let needed = size_bytes.div_ceil(TABLE_STEP_BYTES);
        expect(size_bytes > 0 && entries >= needed, "its first table is too short")?;
        let needed = usize::try_from(needed).ok().filter(|needed| *needed <= TABLE_ENTRIES);
        let needed = needed.ok_or_else(|| self.unfit("its disk is larger than any of ours"))?;
        let offset = be_u64(head, 40);
        self.check_place("the first table", offset, needed as u64 * 8)?;
        let mut table = vec![0; needed * 8];
        self.read(&mut table, offset)?;
        self.size_bytes = size_bytes;
        self.first = (0..needed).map(|index| be_u64(&table, index * 8)).collect();
        Ok(())
    }

    fn check_place(&self, what: &str, offset: u64, bytes: u64) -> Result<(), LayerError> {
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= self.length);
        if inside && offset != 0 && offset.is_multiple_of(CLUSTER_BYTES) {
            return Ok(());
        }
        Err(self.unfit(&format!("{what} of it is said to be at byte {offset}, of {}", self.length)))
    }

    fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), LayerError> {
        match self.file.read_exact_at(buffer, offset) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(self.unfit("it is truncated")),
            Err(error) => Err(FileError::io(&self.path, "read")(error).into()),
        }
    }

    fn unfit(&self, detail: &str) -> LayerError {
        LayerError::Unfit { path: self.path.clone(), detail: detail.to_owned() }
    }
}

fn be_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn be_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
