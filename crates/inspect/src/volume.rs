//! Where file systems lie on a disk: on all of it, or in the partitions of a GUID or an old-style partition table.
//!
//! Only the main table is read. A table that is damaged names no partition, rather than being guessed at: what
//! can't be read is said to be unread, and never taken for unchanged.

use std::cell::RefCell;
use std::rc::Rc;

use crate::disk::{Disk, DiskError};

const SECTOR_BYTES: u64 = 512;
/// Most partitions that are looked at: the usual table has room for so many.
const PARTITIONS_MAX: u32 = 128;
/// Where an ext2, ext3 or ext4 file system has its mark.
const EXT_MARK_AT: u64 = 1024 + 56;
const EXT_MARK: [u8; 2] = 0xef53_u16.to_le_bytes();
/// Old-style tables say with this that the real one is a GUID partition table.
const PROTECTIVE: u8 = 0xee;
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];

/// A stretch of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// `disk`, or `p1`, `p2` and so on, as Linux counts.
    pub name: String,
    /// Where it begins, in bytes.
    pub start: u64,
    /// How long it is, in bytes.
    pub length: u64,
    /// What is on it.
    pub content: VolumeContent,
}

/// What is on a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VolumeContent {
    /// ext2, ext3 or ext4.
    Ext,
    /// Nothing but zeros where a file system begins.
    Empty,
    /// Something else.
    Unknown,
}

/// A disk that several readers look at, one after the other.
pub type SharedDisk = Rc<RefCell<Disk>>;

/// The volumes of a disk.
///
/// # Errors
/// When the disk can't be read.
pub fn volumes(disk: &SharedDisk) -> Result<Vec<Volume>, DiskError> {
    let size = disk.borrow().size_bytes();
    let whole = volume(disk, "disk".to_owned(), 0, size)?;
    if whole.content == VolumeContent::Ext {
        return Ok(vec![whole]);
    }
    let partitions = partitions(disk, size)?;
    if partitions.is_empty() {
        return Ok(vec![whole]);
    }
    let named = |(number, start, length)| volume(disk, format!("p{number}"), start, length);
    partitions.into_iter().map(named).collect()
}

fn volume(disk: &SharedDisk, name: String, start: u64, length: u64) -> Result<Volume, DiskError> {
    let mut head = [0; 2048];
    let there = usize::try_from(length.min(head.len() as u64)).expect("at most 2 KiB");
    disk.borrow_mut().read_at(start, &mut head[..there])?;
    let mark = usize::try_from(EXT_MARK_AT).expect("small");
    let content = if head[mark..mark + 2] == EXT_MARK {
        VolumeContent::Ext
    } else if head == [0; 2048] {
        VolumeContent::Empty
    } else {
        VolumeContent::Unknown
    };
    Ok(Volume { name, start, length, content })
}

/// Number, start and length of each partition that lies on the disk.
fn partitions(disk: &SharedDisk, size: u64) -> Result<Vec<(u32, u64, u64)>, DiskError> {
    if size < 2 * SECTOR_BYTES {
        return Ok(Vec::new());
    }
    let mut sectors = [0; 1024];
    disk.borrow_mut().read_at(0, &mut sectors)?;
    let (old, head) = sectors.split_at(512);
    if old[510..] != [0x55, 0xaa] {
        return Ok(Vec::new());
    }
    let entries = || old[446..510].as_chunks::<16>().0.iter();
    let found = if entries().any(|entry| entry[4] == PROTECTIVE) {
        guid_partitions(disk, head, size)?
    } else {
        (1..).zip(entries()).filter_map(|(number, entry)| old_partition(number, entry)).collect()
    };
    let fits = |(_, start, length): &(u32, u64, u64)| {
        *length >= 2048 && start.checked_add(*length).is_some_and(|end| end <= size)
    };
    Ok(found.into_iter().filter(fits).collect())
}

fn old_partition(number: u32, entry: &[u8; 16]) -> Option<(u32, u64, u64)> {
    // Logical partitions inside an extended one are a chain of tables that nobody makes any more.
    if entry[4] == 0 || EXTENDED.contains(&entry[4]) {
        return None;
    }
    Some((number, u64::from(le32(entry, 8)) * SECTOR_BYTES, u64::from(le32(entry, 12)) * SECTOR_BYTES))
}

fn guid_partitions(disk: &SharedDisk, head: &[u8], size: u64) -> Result<Vec<(u32, u64, u64)>, DiskError> {
    let (at, count, entry_bytes) = (le64(head, 72), le32(head, 80).min(PARTITIONS_MAX), le32(head, 84));
    let start = at.checked_mul(SECTOR_BYTES);
    if &head[..8] != b"EFI PART" || !(128..=4096).contains(&entry_bytes) {
        return Ok(Vec::new());
    }
    let length = u64::from(count) * u64::from(entry_bytes);
    let Some(start) = start.filter(|start| start.checked_add(length).is_some_and(|end| end <= size)) else {
        return Ok(Vec::new());
    };
    let mut table = vec![0; usize::try_from(length).expect("at most half a MiB")];
    disk.borrow_mut().read_at(start, &mut table)?;
    let entries = (1..).zip(table.chunks_exact(entry_bytes as usize));
    let used = entries.filter(|(_, entry)| entry[..16] != [0; 16]);
    let placed = used.filter_map(|(number, entry)| {
        let (first, last) = (le64(entry, 32), le64(entry, 40));
        let sectors = last.checked_sub(first)?.checked_add(1)?;
        Some((number, first.checked_mul(SECTOR_BYTES)?, sectors.checked_mul(SECTOR_BYTES)?))
    });
    Ok(placed.collect())
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// A volume as the reader of a file system sees it.
pub(crate) struct VolumeReader {
    pub(crate) disk: SharedDisk,
    pub(crate) start: u64,
    pub(crate) length: u64,
}

impl ext4_view::Ext4Read for VolumeReader {
    fn read(
        &mut self,
        start_byte: u64,
        target: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        let end = start_byte.saturating_add(target.len() as u64);
        if end > self.length {
            return Err(Box::new(DiskError::End { offset: end, end: self.length }));
        }
        Ok(self.disk.borrow_mut().read_at(self.start + start_byte, target)?)
    }
}
