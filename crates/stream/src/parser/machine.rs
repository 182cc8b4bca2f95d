//! The parser's state machine: which bytes come next, and what they mean.
//!
//! Each state knows how many bytes it [`needs`](Machine::need); [`Machine::accept`] is given exactly these. Bytes
//! whose number may be large are [streamed](Machine::streaming) through instead.

use super::configuration::{self, MACHINE_TYPE_BYTES_MAX, Part};
use super::{BlockId, RamBlock, RawKind};
use crate::PAGE_BYTES;
use crate::error::{Fault, StreamError};
use crate::record::*;
use crate::tail::Tail;

const MAGIC: u32 = 0x5145_564d;
const VERSION: u32 = 3;
const RAM_VERSION: u32 = 4;

/// More blocks than a machine with every slot filled has; without a bound a bad stream could fill memory with names.
const BLOCKS_MAX: usize = 4096;

/// What accepted bytes become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Emit {
    Nothing,
    Raw(RawKind),
    Zero { block: BlockId, offset: u64 },
    Page { block: BlockId, offset: u64 },
    Passthrough,
}

/// An item without bytes that follows the one just given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pending {
    Blocks,
    RamEnd,
    /// The end of memory shows only by the first device section, whose type byte follows.
    RamEndBeforeDevices,
    /// That byte.
    FirstOfDevices,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Magic,
    SectionType,
    MachineTypeLength,
    MachineType {
        length: usize,
    },
    PartNameLength,
    PartName {
        length: usize,
    },
    PartContent {
        length: usize,
    },
    CapabilityCount,
    CapabilityNameLength {
        left: u32,
    },
    CapabilityName {
        length: usize,
        left: u32,
    },
    Command,
    PackageLength,
    /// Command or package content.
    CommandContent {
        left: u64,
    },
    /// Section id and length of the name.
    StartHead {
        full: bool,
    },
    /// Name, instance and version.
    StartName {
        length: usize,
        id: u32,
        full: bool,
    },
    ContinuedHead {
        end: bool,
    },
    Record,
    RecordNameLength {
        address: u64,
        flags: u64,
    },
    RecordName {
        length: usize,
        address: u64,
        flags: u64,
    },
    ZeroFill {
        offset: u64,
    },
    PageContent {
        offset: u64,
    },
    BlockNameLength {
        left: u64,
    },
    BlockName {
        length: usize,
        left: u64,
    },
    BlockLength {
        left: u64,
    },
    Footer,
    Tail,
}

#[derive(Debug)]
pub(super) struct Machine {
    state: State,
    pending: Option<Pending>,
    offset: u64,
    blocks: Vec<RamBlock>,
    /// The block whose name was last seen.
    current: Option<BlockId>,
    ram_section_id: Option<u32>,
    /// Whether the section being read is memory's end.
    ending: bool,
    tail: Tail,
}

impl Machine {
    pub(super) fn new() -> Self {
        Self {
            state: State::Magic,
            pending: None,
            offset: 0,
            blocks: Vec::new(),
            current: None,
            ram_section_id: None,
            ending: false,
            tail: Tail::default(),
        }
    }

    pub(super) fn resumed(&self) -> Option<Self> {
        self.ram_section_id?;
        Some(Self {
            state: State::SectionType,
            blocks: self.blocks.clone(),
            current: self.current,
            ram_section_id: self.ram_section_id,
            ..Self::new()
        })
    }

    pub(super) fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    pub(super) fn ram_section_id(&self) -> Option<u32> {
        self.ram_section_id
    }

    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    #[inline]
    pub(super) fn take_pending(&mut self) -> Option<Pending> {
        let pending = self.pending.take();
        if pending == Some(Pending::RamEndBeforeDevices) {
            self.pending = Some(Pending::FirstOfDevices);
        }
        pending
    }

    /// The tail, when it has been reached.
    pub(super) fn tail(&self) -> Option<&Tail> {
        (self.state == State::Tail).then_some(&self.tail)
    }

    /// How many bytes may go straight through; `None` when they must be understood.
    #[inline]
    pub(super) fn streaming(&self) -> Option<u64> {
        match self.state {
            State::CommandContent { left } => Some(left),
            State::Tail => Some(u64::MAX),
            _ => None,
        }
    }

    /// Takes note of bytes that go straight through.
    pub(super) fn streamed(&mut self, bytes: &[u8]) -> Emit {
        self.offset += bytes.len() as u64;
        if let State::CommandContent { left } = self.state {
            self.state = command_content(left - bytes.len() as u64);
            return Emit::Raw(RawKind::Command);
        }
        self.tail.pass(bytes);
        Emit::Passthrough
    }

    /// How many bytes [`Self::accept`] must be given.
    #[inline]
    pub(super) fn need(&self) -> usize {
        match self.state {
            State::PageContent { .. } => PAGE_BYTES,
            State::Magic | State::Record | State::BlockLength { .. } => 8,
            State::SectionType
            | State::PartNameLength
            | State::CapabilityNameLength { .. }
            | State::RecordNameLength { .. }
            | State::ZeroFill { .. }
            | State::BlockNameLength { .. } => 1,
            State::MachineTypeLength
            | State::CapabilityCount
            | State::Command
            | State::PackageLength
            | State::ContinuedHead { .. } => 4,
            State::StartHead { .. } | State::Footer => 5,
            State::MachineType { length }
            | State::PartContent { length }
            | State::CapabilityName { length, .. }
            | State::RecordName { length, .. }
            | State::BlockName { length, .. } => length,
            // Its version follows.
            State::PartName { length } => length + 4,
            // Instance and version follow.
            State::StartName { length, .. } => length + 8,
            State::CommandContent { .. } | State::Tail => 1,
        }
    }

    /// Takes the next bytes, as many as [`Self::need`] says.
    #[inline]
    pub(super) fn accept(&mut self, bytes: &[u8]) -> Result<Emit, StreamError> {
        let offset = self.offset;
        let emit = self.step(bytes).map_err(|fault| StreamError { offset, fault })?;
        self.offset += bytes.len() as u64;
        Ok(emit)
    }

    #[inline]
    fn step(&mut self, bytes: &[u8]) -> Result<Emit, Fault> {
        match self.state {
            State::Record => self.record(be64(bytes)),
            State::PageContent { offset } => {
                self.state = State::Record;
                Ok(Emit::Page { block: self.current.ok_or(Fault::NothingToContinue)?, offset })
            }
            State::ZeroFill { offset } => {
                if bytes[0] != 0 {
                    return Err(Fault::ZeroFill { found: bytes[0] });
                }
                self.state = State::Record;
                Ok(Emit::Zero { block: self.current.ok_or(Fault::NothingToContinue)?, offset })
            }
            _ => self.step_rarely(bytes),
        }
    }

    fn step_rarely(&mut self, bytes: &[u8]) -> Result<Emit, Fault> {
        match self.state {
            State::SectionType => self.section_type(bytes[0]),
            State::StartHead { full } => {
                self.state = State::StartName { length: usize::from(bytes[4]), id: be32(bytes), full };
                Ok(Emit::Raw(RawKind::SectionHead))
            }
            State::StartName { length, id, full } => {
                self.start(&bytes[..length], be32(&bytes[length + 4..]), id, full)
            }
            State::ContinuedHead { end } => {
                self.expect_section(be32(bytes))?;
                self.ending = end;
                self.state = State::Record;
                Ok(Emit::Raw(RawKind::SectionHead))
            }
            State::RecordNameLength { address, flags } => {
                self.state = State::RecordName { length: usize::from(bytes[0]), address, flags };
                Ok(Emit::Nothing)
            }
            State::RecordName { address, flags, .. } => {
                self.current = Some(self.block_named(bytes)?);
                self.content(address, flags)
            }
            State::BlockNameLength { .. } | State::BlockName { .. } | State::BlockLength { .. } => {
                self.block_list(bytes)?;
                Ok(Emit::Raw(RawKind::BlockList))
            }
            State::Footer => self.footer(bytes),
            State::Command | State::PackageLength => {
                self.command(bytes)?;
                Ok(Emit::Raw(RawKind::Command))
            }
            _ => {
                self.head(bytes)?;
                Ok(Emit::Raw(RawKind::Head))
            }
        }
    }

    fn head(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        self.state = match self.state {
            State::Magic => match (be32(bytes), be32(&bytes[4..])) {
                (MAGIC, VERSION) => State::SectionType,
                (MAGIC, found) => return Err(Fault::Version { found }),
                (found, _) => return Err(Fault::Magic { found }),
            },
            State::MachineTypeLength => match be32(bytes) {
                0 => State::SectionType,
                length if length <= MACHINE_TYPE_BYTES_MAX => State::MachineType { length: length as usize },
                length => return Err(Fault::MachineTypeLength { length, max: MACHINE_TYPE_BYTES_MAX }),
            },
            State::PartNameLength => State::PartName { length: usize::from(bytes[0]) },
            State::PartName { length } => match configuration::part(&text(&bytes[..length]))? {
                Part::Plain(length) => State::PartContent { length },
                Part::Capabilities => State::CapabilityCount,
            },
            State::CapabilityCount => next_capability(be32(bytes)),
            State::CapabilityNameLength { left } if bytes[0] == 0 => next_capability(left),
            State::CapabilityNameLength { left } => {
                State::CapabilityName { length: usize::from(bytes[0]), left }
            }
            State::CapabilityName { left, .. } => {
                configuration::check_capability(&text(bytes))?;
                next_capability(left)
            }
            // What remains is content without interest.
            _ => State::SectionType,
        };
        Ok(())
    }

    fn section_type(&mut self, found: u8) -> Result<Emit, Fault> {
        let memory_started = self.ram_section_id.is_some();
        let (state, kind) = match found {
            CONFIGURATION if !memory_started => (State::MachineTypeLength, RawKind::Head),
            SUBSECTION if !memory_started => (State::PartNameLength, RawKind::Head),
            COMMAND => (State::Command, RawKind::Command),
            SECTION_START => (State::StartHead { full: false }, RawKind::SectionHead),
            // A background snapshot has no end of memory: its devices simply begin.
            SECTION_FULL if memory_started => {
                self.pending = Some(Pending::RamEndBeforeDevices);
                self.tail.pass(&[found]);
                self.state = State::Tail;
                return Ok(Emit::Nothing);
            }
            SECTION_FULL => (State::StartHead { full: true }, RawKind::SectionHead),
            SECTION_PART if memory_started => (State::ContinuedHead { end: false }, RawKind::SectionHead),
            SECTION_END if memory_started => (State::ContinuedHead { end: true }, RawKind::SectionHead),
            _ => return Err(Fault::SectionType { found }),
        };
        self.state = state;
        Ok(Emit::Raw(kind))
    }

    fn start(&mut self, name: &[u8], version: u32, id: u32, full: bool) -> Result<Emit, Fault> {
        if name != b"ram" || full {
            return Err(Fault::SectionBeforeMemory { name: text(name) });
        }
        if self.ram_section_id.is_some() {
            return Err(Fault::SecondStart);
        }
        if version != RAM_VERSION {
            return Err(Fault::MemoryVersion { found: version });
        }
        self.ram_section_id = Some(id);
        self.state = State::Record;
        Ok(Emit::Raw(RawKind::SectionHead))
    }

    #[inline]
    fn record(&mut self, word: u64) -> Result<Emit, Fault> {
        let (address, flags) = (word & !FLAGS_MASK, word & FLAGS_MASK);
        match flags & !FLAG_CONTINUE {
            FLAG_PAGE | FLAG_ZERO if flags & FLAG_CONTINUE != 0 => self.content(address, flags),
            FLAG_PAGE | FLAG_ZERO => {
                self.state = State::RecordNameLength { address, flags };
                Ok(Emit::Nothing)
            }
            FLAG_END if flags == FLAG_END && address == 0 => {
                self.state = State::Footer;
                Ok(Emit::Raw(RawKind::RecordsEnd))
            }
            FLAG_BLOCK_LIST if flags == FLAG_BLOCK_LIST => {
                if !self.blocks.is_empty() {
                    return Err(Fault::UnexpectedBlockList);
                }
                self.next_block(address);
                Ok(Emit::Raw(RawKind::BlockList))
            }
            _ => Err(refusal(flags)),
        }
    }

    /// A page's or zero page's place is known; its content follows.
    #[inline]
    fn content(&mut self, offset: u64, flags: u64) -> Result<Emit, Fault> {
        let block = &self.blocks[self.current.ok_or(Fault::NothingToContinue)?.index()];
        // Both are of whole pages, so a page that begins inside ends inside.
        if offset >= block.length {
            return Err(Fault::PageOutside { block: block.name.clone(), offset, length: block.length });
        }
        self.state =
            if flags & FLAG_PAGE != 0 { State::PageContent { offset } } else { State::ZeroFill { offset } };
        Ok(Emit::Nothing)
    }

    fn block_named(&self, name: &[u8]) -> Result<BlockId, Fault> {
        let at = self.blocks.iter().position(|block| block.name.as_bytes() == name);
        at.map(block_id).ok_or_else(|| Fault::UnknownBlock { name: text(name) })
    }

    fn block_list(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        match self.state {
            State::BlockNameLength { left } => match usize::from(bytes[0]) {
                0 => return Err(Fault::BlockName { name: String::new() }),
                length => self.state = State::BlockName { length, left },
            },
            State::BlockName { left, .. } => {
                let name = text(bytes);
                if self.blocks.len() == BLOCKS_MAX {
                    return Err(Fault::TooManyBlocks { max: BLOCKS_MAX });
                }
                // A name that is not text would not be found again.
                if name.as_bytes() != bytes || self.block_named(bytes).is_ok() {
                    return Err(Fault::BlockName { name });
                }
                self.blocks.push(RamBlock { name, length: 0 });
                self.state = State::BlockLength { left };
            }
            State::BlockLength { left } => {
                let length = be64(bytes);
                let block = self.blocks.last_mut().ok_or(Fault::UnexpectedBlockList)?;
                if length == 0 || length > left || !length.is_multiple_of(PAGE_BYTES as u64) {
                    return Err(Fault::BlockLength { name: block.name.clone(), length, left });
                }
                block.length = length;
                self.next_block(left - length);
            }
            _ => return Err(Fault::UnexpectedBlockList),
        }
        Ok(())
    }

    /// Goes on to the next block of the list, which ends when all of the total is accounted for.
    fn next_block(&mut self, left: u64) {
        if left > 0 {
            self.state = State::BlockNameLength { left };
        } else {
            self.state = State::Record;
            self.pending = Some(Pending::Blocks);
        }
    }

    fn footer(&mut self, bytes: &[u8]) -> Result<Emit, Fault> {
        if bytes[0] != FOOTER {
            return Err(Fault::FooterMissing { found: bytes[0] });
        }
        self.expect_section(be32(&bytes[1..]))?;
        if self.ending {
            self.state = State::Tail;
            self.pending = Some(Pending::RamEnd);
        } else {
            self.state = State::SectionType;
        }
        Ok(Emit::Raw(RawKind::Footer))
    }

    fn expect_section(&self, found: u32) -> Result<(), Fault> {
        match self.ram_section_id {
            Some(expected) if expected != found => Err(Fault::SectionId { expected, found }),
            _ => Ok(()),
        }
    }

    fn command(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        self.state = match self.state {
            State::PackageLength => command_content(u64::from(be32(bytes))),
            _ => {
                let (code, length) = ((be32(bytes) >> 16) as u16, be32(bytes) as u16);
                match (code, length) {
                    (COMMAND_PACKAGED, 4) => State::PackageLength,
                    (COMMAND_PACKAGED, found) => return Err(Fault::PackageLength { found }),
                    (_, length) => command_content(u64::from(length)),
                }
            }
        };
        Ok(())
    }

    /// What the parser is in the middle of, for the message about a stream that ends too early.
    pub(super) fn within(&self) -> &'static str {
        match self.state {
            State::Magic
            | State::MachineTypeLength
            | State::MachineType { .. }
            | State::PartNameLength
            | State::PartName { .. }
            | State::PartContent { .. }
            | State::CapabilityCount
            | State::CapabilityNameLength { .. }
            | State::CapabilityName { .. } => "the head",
            State::Command | State::PackageLength | State::CommandContent { .. } => "a command",
            State::BlockNameLength { .. } | State::BlockName { .. } | State::BlockLength { .. } => {
                "the list of memory blocks"
            }
            State::SectionType if self.ram_section_id.is_none() => "the head",
            State::Tail => "the devices' state",
            _ => "memory",
        }
    }
}

fn refusal(flags: u64) -> Fault {
    let supported = FLAG_ZERO | FLAG_BLOCK_LIST | FLAG_PAGE | FLAG_END | FLAG_CONTINUE;
    match flags & !supported {
        FLAG_XBZRLE => Fault::UnsupportedRecord { flags, what: "xbzrle" },
        FLAG_HOOK => Fault::UnsupportedRecord { flags, what: "rdma" },
        FLAG_COMPRESSED => Fault::UnsupportedRecord { flags, what: "compression" },
        FLAG_MULTIFD_FLUSH => Fault::UnsupportedRecord { flags, what: "multifd" },
        FLAG_FULL => Fault::UnsupportedRecord { flags, what: "the obsolete flag for a full page" },
        _ => Fault::UnknownRecord { flags },
    }
}

fn command_content(left: u64) -> State {
    if left == 0 { State::SectionType } else { State::CommandContent { left } }
}

fn next_capability(left: u32) -> State {
    match left.checked_sub(1) {
        Some(left) => State::CapabilityNameLength { left },
        None => State::SectionType,
    }
}

fn block_id(index: usize) -> BlockId {
    BlockId(u16::try_from(index).expect("there are at most BLOCKS_MAX blocks"))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[inline]
fn be64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes[..8].try_into().expect("eight bytes"))
}

#[inline]
fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().expect("four bytes"))
}
