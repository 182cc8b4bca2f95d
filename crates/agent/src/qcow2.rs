//! Reads the head of a qcow2 file that somebody brought, before any program is let near it: pure, and refuses whatever
//! it does not know.
//!
//! A qcow2 can name other files (backing file, data file). Whoever opens such an image on a host reads that host's files
//! for the image's author, so an image that names one is no image. What only wastes or breaks (absurd tables, a tail
//! that is missing) is refused here too, so that the error says it in words.

/// How much of a file's beginning has to be read, in bytes: the largest head that is accepted.
pub const HEAD_BYTES: usize = 64 * 1024;

const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Largest disk that is accepted, in bytes (64 TiB). More is a mistake or an attempt to eat memory with tables.
const VIRTUAL_SIZE_MAX: u64 = 64 << 40;
/// Largest first-level table, in entries: what QEMU itself takes.
const LEVEL1_ENTRIES_MAX: u64 = 4 * 1024 * 1024;
/// Largest table of reference counts, in bytes: what QEMU itself takes.
const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 * 1024 * 1024;

const INCOMPATIBLE_DIRTY: u64 = 1;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;
const INCOMPATIBLE_KNOWN: u64 = INCOMPATIBLE_DIRTY
    | INCOMPATIBLE_CORRUPT
    | INCOMPATIBLE_DATA_FILE
    | INCOMPATIBLE_COMPRESSION
    | INCOMPATIBLE_EXTENDED_L2;

const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_ENCRYPTION: u32 = 0x0537_be77;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;

const LENGTH_V2: usize = 72;
const LENGTH_V3: usize = 104;

/// What an image's head says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// The size that a guest sees, in bytes.
    pub virtual_size_bytes: u64,
    /// Version 2 or 3.
    pub version: u32,
}

/// Why a file is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The first bytes are not qcow2's.
    #[error("it is not a qcow2 image")]
    NotQcow2,
    /// A version that is not known.
    #[error("it is qcow2 of version {0}: expected 2 or 3")]
    Version(u32),
    /// Less there than the head says.
    #[error("it is truncated: {what} would end at byte {end}, and the file at {length}")]
    Truncated {
        /// What is missing.
        what: &'static str,
        /// Where it would end.
        end: u64,
        /// Where the file ends.
        length: u64,
    },
    /// It lies on another file.
    #[error("it names a backing file")]
    BackingFile,
    /// It lies on a file that no layer lies on.
    #[error("it names a backing file that is no layer and not the image")]
    OtherBackingFile,
    /// Its data is in another file.
    #[error("it names a data file")]
    DataFile,
    /// It can't be read without a key.
    #[error("it is encrypted")]
    Encrypted,
    /// It was not closed properly.
    #[error("it was not closed properly: repair it with qemu-img first")]
    Dirty,
    /// It says of itself that it is corrupt.
    #[error("it is marked as corrupt")]
    Corrupt,
    /// Features that nobody here knows.
    #[error("it needs features that are not known ({0:#x})")]
    UnknownFeatures(u64),
    /// It has snapshots inside.
    #[error("it has internal snapshots: remove them first")]
    InternalSnapshots,
    /// A number that can't be.
    #[error("{field} is {value}: expected {expected}")]
    OutOfRange {
        /// Which.
        field: &'static str,
        /// What it is.
        value: u64,
        /// What it could be.
        expected: &'static str,
    },
}

/// Checks the head of a file of `length` bytes, of which `head` is the beginning ([`HEAD_BYTES`], or all of it).
///
/// # Errors
/// The first thing that is wrong with it.
pub fn check(head: &[u8], length: u64) -> Result<Head, Fault> {
    check_as(head, length, None)
}

/// The same of a layer, which may name the file that it lies on if `may_lie_on` takes the name.
///
/// # Errors
/// The first thing that is wrong with it.
pub fn check_layer(head: &[u8], length: u64, may_lie_on: &dyn Fn(&str) -> bool) -> Result<Head, Fault> {
    check_as(head, length, Some(may_lie_on))
}

/// Whether a file may lie on one of this name.
type Below<'a> = Option<&'a dyn Fn(&str) -> bool>;

fn check_as(head: &[u8], length: u64, below: Below<'_>) -> Result<Head, Fault> {
    if head.get(..4) != Some(&MAGIC) {
        return Err(Fault::NotQcow2);
    }
    let fields = Fields { head, length };
    let version = fields.u32(4)?;
    if !(2..=3).contains(&version) {
        return Err(Fault::Version(version));
    }
    check_below(&fields, below)?;
    if fields.u32(32)? != 0 {
        return Err(Fault::Encrypted);
    }
    let cluster_bits = fields.u32(20)?;
    if !(9..=21).contains(&cluster_bits) {
        return Err(out_of_range("the cluster size's exponent", cluster_bits.into(), "9 to 21"));
    }
    let head_length = match version {
        2 => LENGTH_V2,
        _ => check_version_3(&fields)?,
    };
    let virtual_size_bytes = check_tables(&fields, cluster_bits)?;
    if fields.u32(60)? != 0 {
        return Err(Fault::InternalSnapshots);
    }
    check_extensions(&fields, head_length, 1 << cluster_bits, below.is_some())?;
    Ok(Head { virtual_size_bytes, version })
}

fn check_below(fields: &Fields<'_>, below: Below<'_>) -> Result<(), Fault> {
    let (offset, length) = (fields.u64(8)?, fields.u32(16)?);
    if offset == 0 && length == 0 {
        return Ok(());
    }
    let Some(may_lie_on) = below else { return Err(Fault::BackingFile) };
    let from = usize::try_from(offset).unwrap_or(usize::MAX);
    let to = from.saturating_add(usize::try_from(length).unwrap_or(usize::MAX));
    match fields.head.get(from..to).map(str::from_utf8) {
        Some(Ok(name)) if may_lie_on(name) => Ok(()),
        _ => Err(Fault::OtherBackingFile),
    }
}

fn check_version_3(fields: &Fields<'_>) -> Result<usize, Fault> {
    let features = fields.u64(72)?;
    let unknown = features & !INCOMPATIBLE_KNOWN;
    if unknown != 0 {
        return Err(Fault::UnknownFeatures(unknown));
    }
    if features & INCOMPATIBLE_DATA_FILE != 0 {
        return Err(Fault::DataFile);
    }
    if features & INCOMPATIBLE_CORRUPT != 0 {
        return Err(Fault::Corrupt);
    }
    if features & INCOMPATIBLE_DIRTY != 0 {
        return Err(Fault::Dirty);
    }
    let order = fields.u32(96)?;
    if order > 6 {
        return Err(out_of_range("the reference counts' exponent", order.into(), "0 to 6"));
    }
    let length = fields.u32(100)? as usize;
    if length < LENGTH_V3 || !length.is_multiple_of(8) || length > HEAD_BYTES {
        return Err(out_of_range("the head's length", length as u64, "104 or a little more, in steps of 8"));
    }
    let compression = if length > LENGTH_V3 { fields.byte(104)? } else { 0 };
    if compression > 1 || (compression == 1) != (features & INCOMPATIBLE_COMPRESSION != 0) {
        return Err(out_of_range(
            "the compression",
            compression.into(),
            "0 (zlib) or 1 (zstd, with its feature)",
        ));
    }
    Ok(length)
}

fn check_tables(fields: &Fields<'_>, cluster_bits: u32) -> Result<u64, Fault> {
    let virtual_size = fields.u64(24)?;
    if virtual_size == 0 || virtual_size > VIRTUAL_SIZE_MAX {
        return Err(out_of_range("the virtual size", virtual_size, "1 byte to 64 TiB"));
    }
    let cluster = 1u64 << cluster_bits;
    let entries = u64::from(fields.u32(36)?);
    // One entry of the first level stands for a table of one cluster, whose entries have 8 or 16 bytes.
    let needed = virtual_size.div_ceil(cluster * (cluster / 8));
    if entries < needed || entries > LEVEL1_ENTRIES_MAX {
        return Err(out_of_range(
            "the first-level table",
            entries,
            "as many entries as the disk's size needs",
        ));
    }
    fields.inside("the first-level table", fields.u64(40)?, entries * 8, cluster)?;
    let refcount_bytes = u64::from(fields.u32(56)?) * cluster;
    if refcount_bytes == 0 || refcount_bytes > REFCOUNT_TABLE_BYTES_MAX {
        return Err(out_of_range("the table of reference counts", refcount_bytes, "1 cluster to 8 MiB"));
    }
    fields.inside("the table of reference counts", fields.u64(48)?, refcount_bytes, cluster)?;
    Ok(virtual_size)
}

fn check_extensions(
    fields: &Fields<'_>,
    from: usize,
    cluster: usize,
    may_have_backing: bool,
) -> Result<(), Fault> {
    let end = cluster.min(HEAD_BYTES);
    let mut at = from;
    // A head of version 2 with nothing after it, in a cluster of its own, ends in zeros: that is an end too.
    while at + 8 <= end {
        let kind = fields.u32(at)?;
        let length = fields.u32(at + 4)? as usize;
        match kind {
            EXTENSION_END => return Ok(()),
            EXTENSION_ENCRYPTION => return Err(Fault::Encrypted),
            EXTENSION_DATA_FILE => return Err(Fault::DataFile),
            EXTENSION_BACKING_FORMAT if !may_have_backing => return Err(Fault::BackingFile),
            _ => {}
        }
        at = match at.checked_add(8).and_then(|at| at.checked_add(length.checked_next_multiple_of(8)?)) {
            Some(next) if next <= end => next,
            _ => {
                return Err(out_of_range(
                    "an extension's length",
                    length as u64,
                    "no more than the head has room for",
                ));
            }
        };
    }
    Ok(())
}

fn out_of_range(field: &'static str, value: u64, expected: &'static str) -> Fault {
    Fault::OutOfRange { field, value, expected }
}

struct Fields<'a> {
    head: &'a [u8],
    length: u64,
}

impl Fields<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> Result<[u8; N], Fault> {
        let found = self.head.get(at..at + N).and_then(|bytes| bytes.try_into().ok());
        found.ok_or(Fault::Truncated { what: "the head", end: (at + N) as u64, length: self.length })
    }

    fn byte(&self, at: usize) -> Result<u8, Fault> {
        Ok(u8::from_be_bytes(self.bytes(at)?))
    }

    fn u32(&self, at: usize) -> Result<u32, Fault> {
        Ok(u32::from_be_bytes(self.bytes(at)?))
    }

    fn u64(&self, at: usize) -> Result<u64, Fault> {
        Ok(u64::from_be_bytes(self.bytes(at)?))
    }

    /// A table must begin at a cluster, after the head, and end within the file.
    fn inside(&self, what: &'static str, offset: u64, bytes: u64, cluster: u64) -> Result<(), Fault> {
        if offset == 0 || !offset.is_multiple_of(cluster) {
            return Err(out_of_range(
                what,
                offset,
                "an offset that is a multiple of the cluster size, not 0",
            ));
        }
        match offset.checked_add(bytes) {
            Some(end) if end <= self.length => Ok(()),
            end => Err(Fault::Truncated { what, end: end.unwrap_or(u64::MAX), length: self.length }),
        }
    }
}

#[cfg(test)]
mod tests;
