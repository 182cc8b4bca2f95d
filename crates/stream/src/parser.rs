//! Bytes in, items out.
//!
//! The parser is pushed: it is given whatever has arrived, cut anywhere, and gives items until it needs more. Pages
//! are handed out as they lie in the input; only one that is cut by the input's end is put together in a buffer
//! of the parser's own. Everything that the parser must understand has a small, known length at each step, so
//! that buffer has the size of a page and never grows.

use crate::error::{Fault, StreamError};
use crate::record::*;
use crate::tail::Tail;
use crate::{PAGE_BYTES, Page};

mod configuration;
mod machine;

use machine::{Emit, Machine, Pending};

/// A block of guest memory, by its place in the stream's list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub(crate) u16);

impl BlockId {
    /// Its place in [`Parser::blocks`].
    #[must_use]
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// A block of guest memory: main memory, or one of the small ones such as firmware and tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBlock {
    /// Its name, such as `pc.ram`.
    pub name: String,
    /// Its length in bytes, whole pages.
    pub length: u64,
}

/// What bytes that are kept as they are belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RawKind {
    /// Magic, version, configuration.
    Head,
    /// A command to the reader, of post-copy mostly.
    Command,
    /// The beginning of a start, part or end of memory.
    SectionHead,
    /// The list of memory blocks.
    BlockList,
    /// The end of a section's records.
    RecordsEnd,
    /// A section's footer; now is a good time to flush.
    Footer,
}

/// A piece of the stream, in order. The bytes of `Raw` and `Passthrough`, with the records for `Page` and `Zero`,
/// are the whole stream.
#[derive(Debug, PartialEq, Eq)]
pub enum Item<'a> {
    /// Bytes that have no more meaning to the reader than their kind.
    Raw {
        /// What they belong to.
        kind: RawKind,
        /// The bytes, a piece of it perhaps.
        bytes: &'a [u8],
    },
    /// The list of blocks has been read; it came as `Raw` before.
    Blocks(&'a [RamBlock]),
    /// A page of zeros.
    Zero {
        /// Which block.
        block: BlockId,
        /// Where in the block, in bytes.
        offset: u64,
    },
    /// A page.
    Page {
        /// Which block.
        block: BlockId,
        /// Where in the block, in bytes.
        offset: u64,
        /// Its content.
        data: &'a Page,
    },
    /// All of memory has been sent, as far as this stream sends it; it came as `Raw` before. From here on
    /// everything is latency for the guest.
    RamEnd,
    /// Device state and all that follows.
    Passthrough(&'a [u8]),
}

/// Reads a migration stream.
#[derive(Debug)]
pub struct Parser {
    machine: Machine,
    carry: Carry,
}

impl Default for Parser {
    fn default() -> Self {
        Self::new()
    }
}

impl Parser {
    /// A parser at the beginning of a stream.
    #[must_use]
    pub fn new() -> Self {
        Self { machine: Machine::new(), carry: Carry { bytes: Box::new([0; PAGE_BYTES]), filled: 0 } }
    }

    /// A parser for the stream that goes on after a post-copy lost its link: it has no head and no list of blocks, so
    /// both are taken from the parser of the stream that broke. `None` when that one had not come to memory.
    #[must_use]
    pub fn resumed(broken: &Self) -> Option<Self> {
        let machine = broken.machine.resumed()?;
        Some(Self { machine, carry: Carry { bytes: Box::new([0; PAGE_BYTES]), filled: 0 } })
    }

    /// The next item of `input`, which is moved on past it. `None`: all of it is used up, feed more.
    ///
    /// # Errors
    /// [`StreamError`]; the parser is then of no more use.
    #[inline]
    pub fn next<'p, 'i: 'p>(&'p mut self, input: &mut &'i [u8]) -> Result<Option<Item<'p>>, StreamError> {
        loop {
            if let Some(pending) = self.machine.take_pending() {
                return Ok(Some(match pending {
                    Pending::Blocks => Item::Blocks(self.machine.blocks()),
                    Pending::RamEnd | Pending::RamEndBeforeDevices => Item::RamEnd,
                    Pending::FirstOfDevices => Item::Passthrough(&[SECTION_FULL]),
                }));
            }
            if let Some(room) = self.machine.streaming() {
                return Ok(self.stream_some(input, room));
            }
            let need = self.machine.need();
            if self.carry.filled == 0 && input.len() >= need {
                let (bytes, rest) = input.split_at(need);
                *input = rest;
                match self.machine.accept(bytes)? {
                    Emit::Nothing => {}
                    emit => return Ok(Some(item(emit, bytes))),
                }
            } else {
                if !self.carry.fill(input, need) {
                    return Ok(None);
                }
                self.carry.filled = 0;
                match self.machine.accept(&self.carry.bytes[..need])? {
                    Emit::Nothing => {}
                    emit => return Ok(Some(item(emit, &self.carry.bytes[..need]))),
                }
            }
        }
    }

    /// The blocks of memory; empty until their list has been read.
    #[must_use]
    pub fn blocks(&self) -> &[RamBlock] {
        self.machine.blocks()
    }

    /// The id of the section `ram`, once it has started.
    #[must_use]
    pub fn ram_section_id(&self) -> Option<u32> {
        self.machine.ram_section_id()
    }

    /// How many bytes have been taken in.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.machine.offset() + self.carry.filled as u64
    }

    /// Says that the input has ended.
    ///
    /// # Errors
    /// [`Fault::Truncated`] when the stream is not whole.
    pub fn finish(&self) -> Result<(), StreamError> {
        let whole = self.carry.filled == 0 && self.machine.tail().is_some_and(Tail::is_whole);
        if whole {
            return Ok(());
        }
        let fault = Fault::Truncated { within: self.machine.within() };
        Err(StreamError { offset: self.offset(), fault })
    }

    fn stream_some<'i>(&mut self, input: &mut &'i [u8], room: u64) -> Option<Item<'i>> {
        if input.is_empty() {
            return None;
        }
        let length = usize::try_from(room).map_or(input.len(), |room| room.min(input.len()));
        let (bytes, rest) = input.split_at(length);
        *input = rest;
        Some(item(self.machine.streamed(bytes), bytes))
    }
}

#[inline]
fn item(emit: Emit, bytes: &[u8]) -> Item<'_> {
    match emit {
        Emit::Page { block, offset } => {
            let data = bytes.try_into().expect("a page's unit has a page's length");
            Item::Page { block, offset, data }
        }
        Emit::Zero { block, offset } => Item::Zero { block, offset },
        Emit::Raw(kind) => Item::Raw { kind, bytes },
        Emit::Passthrough => Item::Passthrough(bytes),
        Emit::Nothing => unreachable!("nothing makes no item"),
    }
}

/// The beginning of a unit that the input's end has cut.
#[derive(Debug)]
struct Carry {
    bytes: Box<Page>,
    filled: usize,
}

impl Carry {
    /// Moves bytes in until there are `need` of them; says whether there are.
    fn fill(&mut self, input: &mut &[u8], need: usize) -> bool {
        let length = (need - self.filled).min(input.len());
        let (bytes, rest) = input.split_at(length);
        *input = rest;
        self.bytes[self.filled..self.filled + length].copy_from_slice(bytes);
        self.filled += length;
        self.filled == need
    }
}

#[cfg(test)]
mod tests;
