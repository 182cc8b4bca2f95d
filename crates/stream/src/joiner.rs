//! A full stream again, from a device file and a memory image: for export, and for a restore where memory cannot be
//! mapped.
//!
//! The device file is read and written through; behind the start of memory a part is put in that has the pages that the
//! source gives: all of them, or those in which a guest's memory differs from what its process has mapped already. Zero
//! pages are sent too: a record of nine bytes each says that the target's page is to be zero, whatever is there.

use std::io;

use crate::error::StreamError;
use crate::parser::{BlockId, Item, Parser, RamBlock, RawKind};
use crate::record::{RecordWriter, part_end, part_head};
use crate::{PAGE_BYTES, Page};

/// How much of the image is read at a time, and about how much is written at a time.
const CHUNK_BYTES: usize = 256 << 10;

const ZERO_PAGE: Page = [0; PAGE_BYTES];

/// Gives a guest's memory, such as an image file does. Offsets are of whole pages, as are lengths.
pub trait MemorySource {
    /// The next range to be sent that does not begin before `from`, as its start and its end; `length` is that of the
    /// memory. Everything, unless the source knows better.
    fn next_range(&mut self, from: u64, length: u64) -> Option<(u64, u64)> {
        (from < length).then_some((from, length))
    }

    /// Fills `bytes` with what lies at `offset`.
    ///
    /// # Errors
    /// Whatever stops the source, an end before that too.
    fn read_at(&mut self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;
}

/// Why a stream could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The device file is not what it should be.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The device file knows no such block.
    #[error("no memory block {expected:?} in the device state")]
    MemoryBlockMissing {
        /// The block that was asked for.
        expected: String,
    },
    /// The image could not be read.
    #[error("cannot read the memory image at {offset:#x}")]
    Memory {
        /// Where.
        offset: u64,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// The stream could not be written.
    #[error("cannot write the stream")]
    Output(#[source] io::Error),
}

/// Puts a stream together.
#[derive(Debug)]
pub struct Joiner<M, W> {
    parser: Parser,
    memory_block: String,
    memory: M,
    output: W,
    records: RecordWriter,
    blocks: Vec<RamBlock>,
    memory_sent: bool,
}

impl<M: MemorySource, W: io::Write> Joiner<M, W> {
    /// A joiner that puts `memory` in as the block `memory_block`. `output` gets large and small writes: buffer it.
    pub fn new(memory_block: impl Into<String>, memory: M, output: W) -> Self {
        Self {
            parser: Parser::new(),
            memory_block: memory_block.into(),
            memory,
            output,
            records: RecordWriter::new(),
            blocks: Vec::new(),
            memory_sent: false,
        }
    }

    /// Takes the next bytes of the device file, cut anywhere.
    ///
    /// # Errors
    /// [`JoinError`]; the joiner is then of no more use.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), JoinError> {
        let mut input = bytes;
        loop {
            let Some(item) = self.parser.next(&mut input)? else { return Ok(()) };
            let mut start_has_ended = false;
            let written = match item {
                Item::Raw { kind, bytes } => {
                    start_has_ended = kind == RawKind::Footer && !self.memory_sent;
                    self.output.write_all(bytes)
                }
                Item::Passthrough(bytes) => self.output.write_all(bytes),
                Item::Page { block, offset, data } => {
                    let head = self.records.page_head(block, &self.blocks[block.index()].name, offset);
                    self.output.write_all(head).and_then(|()| self.output.write_all(data))
                }
                Item::Zero { block, offset } => {
                    let record = self.records.zero(block, &self.blocks[block.index()].name, offset);
                    self.output.write_all(record)
                }
                Item::Blocks(blocks) => {
                    self.blocks = blocks.to_vec();
                    Ok(())
                }
                Item::RamEnd => Ok(()),
            };
            written.map_err(JoinError::Output)?;
            if start_has_ended {
                self.send_memory()?;
            }
        }
    }

    /// Ends; gives the output back, flushed.
    ///
    /// # Errors
    /// When the device file is not whole, or the output fails.
    pub fn finish(mut self) -> Result<W, JoinError> {
        self.parser.finish()?;
        self.output.flush().map_err(JoinError::Output)?;
        Ok(self.output)
    }

    fn send_memory(&mut self) -> Result<(), JoinError> {
        let missing = || JoinError::MemoryBlockMissing { expected: self.memory_block.clone() };
        let at = self.blocks.iter().position(|block| block.name == self.memory_block).ok_or_else(missing)?;
        let block = BlockId(u16::try_from(at).expect("the parser bounds the number of blocks"));
        let length = self.blocks[at].length;
        let section_id = self.parser.ram_section_id().expect("a footer of memory was read");
        self.memory_sent = true;
        self.output.write_all(&part_head(section_id)).map_err(JoinError::Output)?;
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut encoded = Vec::with_capacity(2 * CHUNK_BYTES + CHUNK_BYTES / 8);
        let mut next = 0;
        while let Some((mut offset, end)) = self.memory.next_range(next, length) {
            while offset < end {
                let bytes =
                    &mut chunk[..usize::try_from(end - offset).unwrap_or(usize::MAX).min(CHUNK_BYTES)];
                self.memory.read_at(offset, bytes).map_err(|source| JoinError::Memory { offset, source })?;
                self.encode(block, offset, bytes, &mut encoded);
                offset += bytes.len() as u64;
                // Ranges may be of a page each: they are gathered.
                if encoded.len() >= CHUNK_BYTES {
                    self.output.write_all(&encoded).map_err(JoinError::Output)?;
                    encoded.clear();
                }
            }
            next = end;
        }
        encoded.extend_from_slice(&part_end(section_id));
        self.output.write_all(&encoded).map_err(JoinError::Output)
    }

    fn encode(&mut self, block: BlockId, offset: u64, bytes: &[u8], encoded: &mut Vec<u8>) {
        let (pages, _) = bytes.as_chunks::<PAGE_BYTES>();
        for (page, offset) in pages.iter().zip((offset..).step_by(PAGE_BYTES)) {
            if *page == ZERO_PAGE {
                encoded.extend_from_slice(self.records.zero(block, &self.memory_block, offset));
            } else {
                self.records.page_into(block, &self.memory_block, offset, page, encoded);
            }
        }
    }
}

#[cfg(test)]
mod tests;
