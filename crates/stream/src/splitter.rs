//! A stream in two: the pages of guest memory, and everything else.
//!
//! Everything else is a stream of its own, some 0.3 MB, in which the pages of one block are simply missing. QEMU loads
//! it without complaint, so a machine whose memory is mapped from the image needs to load nothing more.
//!
//! Pages lie in the stream each behind its own record, so runs of them are gathered in a buffer and handed on as
//! one: a copy within the processor's cache costs a twentieth of what a system call for each page would.

use std::io;

use crate::error::StreamError;
use crate::parser::{BlockId, Item, Parser, RamBlock};
use crate::record::RecordWriter;
use crate::{PAGE_BYTES, Page};

/// How much is gathered before it is handed on. Less: more calls; more: it falls out of the processor's cache.
const RUN_BYTES_MAX: usize = 256 << 10;

/// Takes a guest's memory. Offsets and lengths are in bytes, of whole pages, and inside the memory. What comes later
/// replaces what came earlier.
pub trait PageSink {
    /// Pages that follow each other.
    ///
    /// # Errors
    /// Whatever stops the sink; the splitter gives up and passes it on.
    fn pages(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// A range that is zero.
    ///
    /// # Errors
    /// As [`Self::pages`].
    fn zeros(&mut self, offset: u64, length: u64) -> io::Result<()>;
}

impl<S: PageSink + ?Sized> PageSink for &mut S {
    fn pages(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        (**self).pages(offset, bytes)
    }

    fn zeros(&mut self, offset: u64, length: u64) -> io::Result<()> {
        (**self).zeros(offset, length)
    }
}

/// What to split off.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SplitOptions {
    /// The block whose pages are split off, such as `pc.ram`.
    pub memory_block: String,
    /// Its length. A stream that says otherwise is refused, so that it has no say in how much is written.
    pub memory_bytes: u64,
    /// Whether the sink is all zero at the start, as a new sparse file is. Then only zeros that replace a page are
    /// handed on.
    pub sink_is_zero: bool,
}

/// What went where.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SplitSummary {
    /// Pages of guest memory with content; a page that was sent twice counts twice.
    pub pages: u64,
    /// Pages of guest memory that were sent as zero.
    pub zero_pages: u64,
    /// Length of the device file.
    pub device_bytes: u64,
    /// Length of the stream.
    pub stream_bytes: u64,
}

/// Why a stream could not be split.
#[derive(Debug, thiserror::Error)]
pub enum SplitError {
    /// The stream is not what it should be.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The stream has no such block.
    #[error("no memory block {expected:?}, only {found:?}")]
    MemoryBlockMissing {
        /// The block that was asked for.
        expected: String,
        /// Those that there are.
        found: Vec<String>,
    },
    /// The block has another length.
    #[error("memory block {name:?} of {found} bytes, expected {expected}")]
    MemoryLength {
        /// The block.
        name: String,
        /// What was asked for.
        expected: u64,
        /// What the stream says.
        found: u64,
    },
    /// Pages could not be written.
    #[error("cannot write memory pages")]
    Pages(#[source] io::Error),
    /// The device file could not be written.
    #[error("cannot write the device state")]
    Device(#[source] io::Error),
}

/// Splits a stream as it arrives.
#[derive(Debug)]
pub struct Splitter<P, D> {
    parser: Parser,
    output: Output<P, D>,
}

impl<P: PageSink, D: io::Write> Splitter<P, D> {
    /// A splitter at the beginning of a stream. `device` gets many small writes: buffer it.
    ///
    /// # Panics
    /// When the options' length of memory is not of whole pages.
    pub fn new(options: SplitOptions, pages: P, device: D) -> Self {
        assert!(options.memory_bytes.is_multiple_of(PAGE_BYTES as u64), "memory is of whole pages");
        let written = if options.sink_is_zero { PageSet::none(options.memory_bytes) } else { PageSet::all() };
        let output = Output {
            options,
            pages,
            device,
            memory: None,
            names: Vec::new(),
            records: RecordWriter::new(),
            run: Vec::with_capacity(RUN_BYTES_MAX),
            run_offset: 0,
            zero_offset: 0,
            zero_bytes: 0,
            written,
            summary: SplitSummary::default(),
        };
        Self { parser: Parser::new(), output }
    }

    /// Takes the next bytes, cut anywhere.
    ///
    /// # Errors
    /// [`SplitError`]; the splitter is then of no more use.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), SplitError> {
        let mut input = bytes;
        while let Some(item) = self.parser.next(&mut input)? {
            self.output.take(item)?;
        }
        Ok(())
    }

    /// Ends: hands on what was gathered and gives the sinks back, the device file flushed.
    ///
    /// # Errors
    /// When the stream is not whole, or a sink fails.
    pub fn finish(mut self) -> Result<(P, D, SplitSummary), SplitError> {
        self.parser.finish()?;
        self.output.flush_run()?;
        self.output.flush_zeros()?;
        self.output.device.flush().map_err(SplitError::Device)?;
        let summary = SplitSummary { stream_bytes: self.parser.offset(), ..self.output.summary };
        Ok((self.output.pages, self.output.device, summary))
    }

    /// What went where so far.
    #[must_use]
    pub fn progress(&self) -> SplitSummary {
        SplitSummary { stream_bytes: self.parser.offset(), ..self.output.summary }
    }

    /// The parser, for what it knows of the stream.
    #[must_use]
    pub fn parser(&self) -> &Parser {
        &self.parser
    }
}

#[derive(Debug)]
struct Output<P, D> {
    options: SplitOptions,
    pages: P,
    device: D,
    memory: Option<BlockId>,
    names: Vec<String>,
    records: RecordWriter,
    /// Pages gathered, and where the first of them belongs.
    run: Vec<u8>,
    run_offset: u64,
    /// Zeros gathered. Only one of the two is ever in use, which keeps the order.
    zero_offset: u64,
    zero_bytes: u64,
    written: PageSet,
    summary: SplitSummary,
}

impl<P: PageSink, D: io::Write> Output<P, D> {
    #[inline]
    fn take(&mut self, item: Item<'_>) -> Result<(), SplitError> {
        match item {
            Item::Page { block, offset, data } if Some(block) == self.memory => {
                self.memory_page(offset, data)
            }
            Item::Zero { block, offset } if Some(block) == self.memory => self.memory_zero(offset),
            Item::Page { block, offset, data } => {
                let head = self.records.page_head(block, &self.names[block.index()], offset);
                self.summary.device_bytes += (head.len() + data.len()) as u64;
                let written = self.device.write_all(head).and_then(|()| self.device.write_all(data));
                written.map_err(SplitError::Device)
            }
            Item::Zero { block, offset } => {
                let record = self.records.zero(block, &self.names[block.index()], offset);
                self.summary.device_bytes += record.len() as u64;
                self.device.write_all(record).map_err(SplitError::Device)
            }
            Item::Raw { bytes, .. } | Item::Passthrough(bytes) => {
                self.summary.device_bytes += bytes.len() as u64;
                self.device.write_all(bytes).map_err(SplitError::Device)
            }
            Item::Blocks(blocks) => self.find_memory(blocks),
            Item::RamEnd => {
                self.flush_run()?;
                self.flush_zeros()
            }
        }
    }

    fn find_memory(&mut self, blocks: &[RamBlock]) -> Result<(), SplitError> {
        self.names = blocks.iter().map(|block| block.name.clone()).collect();
        let SplitOptions { memory_block, memory_bytes, .. } = &self.options;
        let Some(at) = self.names.iter().position(|name| name == memory_block) else {
            return Err(SplitError::MemoryBlockMissing {
                expected: memory_block.clone(),
                found: std::mem::take(&mut self.names),
            });
        };
        if blocks[at].length != *memory_bytes {
            let (name, expected, found) = (memory_block.clone(), *memory_bytes, blocks[at].length);
            return Err(SplitError::MemoryLength { name, expected, found });
        }
        self.memory = Some(BlockId(u16::try_from(at).expect("the parser bounds the number of blocks")));
        Ok(())
    }

    #[inline]
    fn memory_page(&mut self, offset: u64, data: &Page) -> Result<(), SplitError> {
        self.summary.pages += 1;
        self.flush_zeros()?;
        let continues = offset == self.run_offset + self.run.len() as u64 && self.run.len() < RUN_BYTES_MAX;
        if !continues {
            self.flush_run()?;
            self.run_offset = offset;
        }
        self.run.extend_from_slice(data);
        self.written.insert(offset);
        Ok(())
    }

    #[inline]
    fn memory_zero(&mut self, offset: u64) -> Result<(), SplitError> {
        self.summary.zero_pages += 1;
        if !self.written.contains(offset) {
            return Ok(());
        }
        self.flush_run()?;
        if offset != self.zero_offset + self.zero_bytes {
            self.flush_zeros()?;
            self.zero_offset = offset;
        }
        self.zero_bytes += PAGE_BYTES as u64;
        Ok(())
    }

    fn flush_run(&mut self) -> Result<(), SplitError> {
        if !self.run.is_empty() {
            self.pages.pages(self.run_offset, &self.run).map_err(SplitError::Pages)?;
            self.run.clear();
        }
        Ok(())
    }

    #[inline]
    fn flush_zeros(&mut self) -> Result<(), SplitError> {
        if self.zero_bytes > 0 {
            self.pages.zeros(self.zero_offset, self.zero_bytes).map_err(SplitError::Pages)?;
            self.zero_bytes = 0;
        }
        Ok(())
    }
}

/// The pages that the sink holds content of: a bit a page, 32 KiB for each GiB.
#[derive(Debug)]
enum PageSet {
    /// Any may have content.
    All,
    /// Those whose bit is set have.
    Bits(Vec<u64>),
}

impl PageSet {
    fn all() -> Self {
        Self::All
    }

    fn none(memory_bytes: u64) -> Self {
        let pages = memory_bytes / PAGE_BYTES as u64;
        Self::Bits(vec![0; usize::try_from(pages.div_ceil(64)).expect("memory fits in the address space")])
    }

    #[inline]
    fn insert(&mut self, offset: u64) {
        if let Self::Bits(words) = self {
            let (word, bit) = place(offset);
            words[word] |= bit;
        }
    }

    #[inline]
    fn contains(&self, offset: u64) -> bool {
        match self {
            Self::All => true,
            Self::Bits(words) => {
                let (word, bit) = place(offset);
                words[word] & bit != 0
            }
        }
    }
}

#[inline]
fn place(offset: u64) -> (usize, u64) {
    let page = offset / PAGE_BYTES as u64;
    ((page / 64) as usize, 1 << (page % 64))
}

#[cfg(test)]
mod tests;
