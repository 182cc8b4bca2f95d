//! One qcow2 file: where each of its clusters lies. Read only, after QEMU's own description (docs/interop/qcow2.rst).
//!
//! Tables of the second level are read when they are needed, and a few are kept. Names of files below are not followed:
//! what lies below a layer is said by whoever opens the chain.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

const MAGIC: u32 = 0x5146_49fb;
const HEAD_BYTES: usize = 104;
/// Largest disk, in bytes (64 TiB).
const VIRTUAL_SIZE_MAX: u64 = 64 << 40;
/// Most entries of a first-level table: what QEMU takes.
const LEVEL1_ENTRIES_MAX: u32 = 4 << 20;
/// Tables of the second level that are kept, of at most 2 MiB each; mostly they have 64 KiB.
const TABLES_KEPT: usize = 16;
/// The bits of an entry that hold an offset.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;

/// Features that change what an entry means, or that something else must be read too.
const DIRTY: u64 = 1;
const COMPRESSION_TYPE: u64 = 1 << 3;

/// Where a cluster is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mapping {
    /// Not here: what lies below counts.
    Absent,
    /// It is zeros, whatever lies below.
    Zero,
    /// In the file, as it is.
    Data {
        /// Where.
        offset: u64,
    },
    /// In the file, compressed.
    Compressed {
        /// Where.
        offset: u64,
        /// At most so many bytes.
        bytes: u64,
    },
}

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
pub enum Qcow2Error {
    /// It can't be read.
    #[error("it can't be read at byte {offset}")]
    Read {
        /// Where.
        offset: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is something else.
    #[error("it is not qcow2 of version 2 or 3")]
    Other,
    /// It needs what is not known here.
    #[error("it needs features that can't be read here ({0:#x})")]
    Features(u64),
    /// A number that can't be.
    #[error("{what} is {value:#x}: that can't be")]
    Number {
        /// Which.
        what: &'static str,
        /// What it is.
        value: u64,
    },
    /// A compressed cluster that does not give a cluster.
    #[error("the compressed cluster at byte {offset} is damaged")]
    Compressed {
        /// Where.
        offset: u64,
    },
}

/// A qcow2 file, open.
#[derive(Debug)]
pub struct Qcow2 {
    file: File,
    length: u64,
    cluster_bits: u32,
    virtual_size_bytes: u64,
    level1: Vec<u64>,
    tables: HashMap<u64, Vec<u64>>,
    order: VecDeque<u64>,
}

impl Qcow2 {
    /// Reads the head and the first table.
    ///
    /// # Errors
    /// [`Qcow2Error`].
    pub fn open(file: File) -> Result<Self, Qcow2Error> {
        let length = file.metadata().map_err(|source| Qcow2Error::Read { offset: 0, source })?.len();
        let mut head = [0; HEAD_BYTES];
        read(&file, 0, &mut head[..72])?;
        let version = be32(&head, 4);
        if be32(&head, 0) != MAGIC || !(2..=3).contains(&version) {
            return Err(Qcow2Error::Other);
        }
        if version == 3 {
            read(&file, 0, &mut head)?;
            // One that was not closed has all its data where its tables say: only its reference counts may be wrong.
            let features = be64(&head, 72) & !DIRTY;
            if features != 0 {
                let what = if features == COMPRESSION_TYPE { COMPRESSION_TYPE } else { features };
                return Err(Qcow2Error::Features(what));
            }
        }
        if be32(&head, 32) != 0 {
            return Err(Qcow2Error::Number { what: "the encryption", value: be32(&head, 32).into() });
        }
        let cluster_bits = be32(&head, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(Qcow2Error::Number {
                what: "the cluster size's exponent",
                value: cluster_bits.into(),
            });
        }
        let virtual_size_bytes = be64(&head, 24);
        if virtual_size_bytes == 0 || virtual_size_bytes > VIRTUAL_SIZE_MAX {
            return Err(Qcow2Error::Number { what: "the disk's size", value: virtual_size_bytes });
        }
        let (entries, offset) = (be32(&head, 36), be64(&head, 40));
        let needed = virtual_size_bytes.div_ceil(1 << (2 * cluster_bits - 3));
        if entries > LEVEL1_ENTRIES_MAX || u64::from(entries) < needed {
            return Err(Qcow2Error::Number { what: "the first table's length", value: entries.into() });
        }
        let level1 = read_table(&file, length, offset, entries as usize)?;
        Ok(Self {
            file,
            length,
            cluster_bits,
            virtual_size_bytes,
            level1,
            tables: HashMap::new(),
            order: VecDeque::new(),
        })
    }

    /// The size that a guest sees, in bytes.
    pub const fn virtual_size_bytes(&self) -> u64 {
        self.virtual_size_bytes
    }

    /// The size of a cluster, in bytes.
    pub const fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Where the cluster of this number is.
    ///
    /// # Errors
    /// When a table can't be read or names what can't be.
    pub fn mapping(&mut self, cluster: u64) -> Result<Mapping, Qcow2Error> {
        let per_table = self.cluster_bytes() / 8;
        let first = cluster / per_table;
        let table = self.level1.get(usize::try_from(first).unwrap_or(usize::MAX)).copied().unwrap_or(0);
        if table & OFFSET_MASK == 0 {
            return Ok(Mapping::Absent);
        }
        let entry =
            self.table(first, table & OFFSET_MASK)?[usize::try_from(cluster % per_table).expect("fits")];
        self.decode(entry)
    }

    /// Calls `visit` with the number of each cluster that is in this file, in rising order.
    ///
    /// # Errors
    /// When a table can't be read.
    pub fn each_present(&mut self, mut visit: impl FnMut(u64)) -> Result<(), Qcow2Error> {
        let per_table = self.cluster_bytes() / 8;
        for first in 0..self.level1.len() as u64 {
            let offset = self.level1[usize::try_from(first).expect("fits")] & OFFSET_MASK;
            if offset == 0 {
                continue;
            }
            let table = self.table(first, offset)?;
            let present = table.iter().enumerate().filter(|(_, entry)| **entry & !(1 << 63) != 0);
            for (number, _) in present {
                visit(first * per_table + number as u64);
            }
        }
        Ok(())
    }

    /// Reads a part of a cluster that is in the file as it is.
    ///
    /// # Errors
    /// When the file is shorter than its tables say, or the system refuses.
    pub fn read_data(&self, offset: u64, bytes: &mut [u8]) -> Result<(), Qcow2Error> {
        // A cluster at the end of the file need not be whole: the rest of it is zeros.
        let there = self.length.saturating_sub(offset).min(bytes.len() as u64);
        let (there, rest) = bytes.split_at_mut(usize::try_from(there).expect("at most the buffer"));
        rest.fill(0);
        read(&self.file, offset, there)
    }

    /// Reads a whole compressed cluster.
    ///
    /// # Errors
    /// When it is damaged or can't be read.
    pub fn read_compressed(&self, offset: u64, bytes: u64) -> Result<Vec<u8>, Qcow2Error> {
        let damaged = || Qcow2Error::Compressed { offset };
        let there = bytes.min(self.length.saturating_sub(offset));
        let mut packed = vec![0; usize::try_from(there).map_err(|_| damaged())?];
        read(&self.file, offset, &mut packed)?;
        let most = usize::try_from(self.cluster_bytes()).expect("at most 2 MiB");
        // What follows the stream within its last sector is none of its business, so its end is not looked for.
        let mut unpacked = vec![0; most];
        let mut inflater = miniz_oxide::inflate::core::DecompressorOxide::new();
        let flags = miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
        let (_, _, written) =
            miniz_oxide::inflate::core::decompress(&mut inflater, &packed, &mut unpacked, 0, flags);
        if written == most { Ok(unpacked) } else { Err(damaged()) }
    }

    fn decode(&self, entry: u64) -> Result<Mapping, Qcow2Error> {
        if entry & COMPRESSED != 0 {
            let offset_bits = 62 - (self.cluster_bits - 8);
            let offset = entry & ((1 << offset_bits) - 1);
            let sectors = ((entry & !(3 << 62)) >> offset_bits) + 1;
            return Ok(Mapping::Compressed { offset, bytes: sectors * 512 - offset % 512 });
        }
        let offset = entry & OFFSET_MASK;
        if entry & ZERO != 0 {
            return Ok(Mapping::Zero);
        }
        match offset {
            0 => Ok(Mapping::Absent),
            offset if offset.is_multiple_of(self.cluster_bytes()) => Ok(Mapping::Data { offset }),
            offset => Err(Qcow2Error::Number { what: "a cluster's place", value: offset }),
        }
    }

    fn table(&mut self, number: u64, offset: u64) -> Result<&[u64], Qcow2Error> {
        if !self.tables.contains_key(&number) {
            let entries = usize::try_from(self.cluster_bytes() / 8).expect("at most 256 Ki");
            let table = read_table(&self.file, self.length, offset, entries)?;
            if self.order.len() >= TABLES_KEPT
                && let Some(oldest) = self.order.pop_front()
            {
                self.tables.remove(&oldest);
            }
            self.order.push_back(number);
            self.tables.insert(number, table);
        }
        Ok(&self.tables[&number])
    }
}

fn read_table(file: &File, length: u64, offset: u64, entries: usize) -> Result<Vec<u64>, Qcow2Error> {
    let end = offset.checked_add(entries as u64 * 8);
    if end.is_none_or(|end| end > length) {
        return Err(Qcow2Error::Number { what: "a table's place", value: offset });
    }
    let mut bytes = vec![0; entries * 8];
    read(file, offset, &mut bytes)?;
    let (entries, _) = bytes.as_chunks::<8>();
    Ok(entries.iter().map(|entry| u64::from_be_bytes(*entry)).collect())
}

fn read(file: &File, offset: u64, bytes: &mut [u8]) -> Result<(), Qcow2Error> {
    file.read_exact_at(bytes, offset).map_err(|source| Qcow2Error::Read { offset, source })
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
