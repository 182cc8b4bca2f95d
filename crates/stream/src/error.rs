//! What can be wrong with a stream, and where.

/// A fault and the place where it was met.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("migration stream, byte {offset}: {fault}")]
pub struct StreamError {
    /// How many bytes of the stream come before the part that is at fault.
    pub offset: u64,
    /// What is wrong with it.
    pub fault: Fault,
}

/// What is wrong with a stream.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are the values that the messages name")]
pub enum Fault {
    /// It does not begin as one.
    #[error("starts with {found:#010x}, expected 0x5145564d (\"QEVM\")")]
    Magic { found: u32 },
    /// Its format is another one.
    #[error("format version {found}, expected 3")]
    Version { found: u32 },
    /// The machine type's name is too long to be one.
    #[error("machine type of {length} bytes, expected at most {max}")]
    MachineTypeLength { length: u32, max: u32 },
    /// The configuration has a part that is not known.
    #[error("unknown part {name:?} of the configuration")]
    ConfigurationPart { name: String },
    /// The stream was written with a capability that changes its form.
    #[error("written with capability {name:?}, which cannot be read")]
    Capability { name: String },
    /// A section begins with a byte that starts none.
    #[error("section type {found:#04x}")]
    SectionType { found: u8 },
    /// A section comes before memory's end and is not memory.
    #[error("section {name:?} before the end of memory")]
    SectionBeforeMemory { name: String },
    /// Memory starts a second time.
    #[error("a second start of section \"ram\"")]
    SecondStart,
    /// Memory's form is another one.
    #[error("section \"ram\" of version {found}, expected 4")]
    MemoryVersion { found: u32 },
    /// A section's continuation or footer is of another section.
    #[error("section id {found}, expected {expected}")]
    SectionId { expected: u32, found: u32 },
    /// A section has no footer.
    #[error("{found:#04x} where a section's footer (0x7e) should be")]
    FooterMissing { found: u8 },
    /// A packaged command does not say its length.
    #[error("packaged command with {found} bytes of length, expected 4")]
    PackageLength { found: u16 },
    /// A record that QEMU writes only with capabilities that are not used here.
    #[error("memory record with flags {flags:#x}: {what} is not supported")]
    UnsupportedRecord { flags: u64, what: &'static str },
    /// A record that means nothing.
    #[error("memory record with unknown flags {flags:#x}")]
    UnknownRecord { flags: u64 },
    /// A list of blocks where there can be none, or a second one.
    #[error("an unexpected list of memory blocks")]
    UnexpectedBlockList,
    /// Too many blocks for any machine.
    #[error("more than {max} memory blocks")]
    TooManyBlocks { max: usize },
    /// A block without a name, or one that was listed already.
    #[error("memory block name {name:?} is empty or taken")]
    BlockName { name: String },
    /// A block's length cannot be.
    #[error("memory block {name:?} of {length} bytes, expected whole pages, {left} bytes at most")]
    BlockLength { name: String, length: u64, left: u64 },
    /// A record without a block's name before any block was named.
    #[error("memory record that continues no block")]
    NothingToContinue,
    /// A record for a block that was not listed.
    #[error("memory record for unknown block {name:?}")]
    UnknownBlock { name: String },
    /// A page outside its block.
    #[error("page at {offset:#x} outside block {block:?} of {length} bytes")]
    PageOutside { block: String, offset: u64, length: u64 },
    /// A page filled with something else than zero; no QEMU has written one for years.
    #[error("zero page filled with {found:#04x}")]
    ZeroFill { found: u8 },
    /// The stream ends too early.
    #[error("ends within {within}")]
    Truncated { within: &'static str },
}
