//! The records of the section `ram`: be64 of address and flags, a block's name unless it is the block of the record
//! before, then the content. Addresses are of whole pages, which leaves the low twelve bits for the flags.

use crate::Page;
use crate::parser::BlockId;

pub(crate) const SECTION_START: u8 = 0x01;
pub(crate) const SECTION_PART: u8 = 0x02;
pub(crate) const SECTION_END: u8 = 0x03;
pub(crate) const SECTION_FULL: u8 = 0x04;
pub(crate) const SUBSECTION: u8 = 0x05;
pub(crate) const DESCRIPTION: u8 = 0x06;
pub(crate) const CONFIGURATION: u8 = 0x07;
pub(crate) const COMMAND: u8 = 0x08;
pub(crate) const FOOTER: u8 = 0x7e;
pub(crate) const END_OF_STREAM: u8 = 0x00;

pub(crate) const COMMAND_PACKAGED: u16 = 7;

pub(crate) const FLAGS_MASK: u64 = 0xfff;
pub(crate) const FLAG_FULL: u64 = 0x01;
pub(crate) const FLAG_ZERO: u64 = 0x02;
pub(crate) const FLAG_BLOCK_LIST: u64 = 0x04;
pub(crate) const FLAG_PAGE: u64 = 0x08;
pub(crate) const FLAG_END: u64 = 0x10;
pub(crate) const FLAG_CONTINUE: u64 = 0x20;
pub(crate) const FLAG_XBZRLE: u64 = 0x40;
pub(crate) const FLAG_HOOK: u64 = 0x80;
pub(crate) const FLAG_COMPRESSED: u64 = 0x100;
pub(crate) const FLAG_MULTIFD_FLUSH: u64 = 0x200;

/// The longest name of a block, as its length is one byte.
pub(crate) const NAME_BYTES_MAX: usize = 255;

/// A record's beginning, at its longest: address, length of the name, name.
const HEAD_BYTES_MAX: usize = 8 + 1 + NAME_BYTES_MAX;

/// Writes records, and remembers which block the reader will take for the last one: leaving records out or putting
/// some in breaks what the original records say of that, so whoever changes a stream writes all records anew.
#[derive(Debug, Clone, Default)]
pub struct RecordWriter {
    last: Option<BlockId>,
    head: Vec<u8>,
}

impl RecordWriter {
    /// A writer for a stream in which no record was written yet.
    #[must_use]
    pub fn new() -> Self {
        Self { last: None, head: Vec::with_capacity(HEAD_BYTES_MAX) }
    }

    /// What comes before a page's content.
    ///
    /// # Panics
    /// When the name is longer than 255 bytes or the offset is not of a whole page, which no parsed block or page is.
    pub fn page_head(&mut self, block: BlockId, name: &str, offset: u64) -> &[u8] {
        self.record_head(block, name, offset | FLAG_PAGE)
    }

    /// A whole zero page.
    ///
    /// # Panics
    /// As [`Self::page_head`].
    pub fn zero(&mut self, block: BlockId, name: &str, offset: u64) -> &[u8] {
        self.record_head(block, name, offset | FLAG_ZERO);
        self.head.push(0);
        &self.head
    }

    /// A page, into `out`.
    ///
    /// # Panics
    /// As [`Self::page_head`].
    pub fn page_into(&mut self, block: BlockId, name: &str, offset: u64, data: &Page, out: &mut Vec<u8>) {
        out.extend_from_slice(self.page_head(block, name, offset));
        out.extend_from_slice(data);
    }

    fn record_head(&mut self, block: BlockId, name: &str, address_and_flags: u64) -> &[u8] {
        assert!((address_and_flags & FLAGS_MASK).count_ones() == 1, "offsets are of whole pages");
        let continues = self.last == Some(block);
        let flags = if continues { FLAG_CONTINUE } else { 0 };
        self.head.clear();
        self.head.extend_from_slice(&(address_and_flags | flags).to_be_bytes());
        if !continues {
            self.head.push(u8::try_from(name.len()).expect("names are of at most 255 bytes"));
            self.head.extend_from_slice(name.as_bytes());
            self.last = Some(block);
        }
        &self.head
    }
}

/// The beginning of a part of the section `ram`.
pub(crate) fn part_head(section_id: u32) -> [u8; 5] {
    tagged(SECTION_PART, section_id)
}

/// The end of a section: the record that ends its list, and its footer.
pub(crate) fn part_end(section_id: u32) -> [u8; 13] {
    let mut end = [0; 13];
    end[..8].copy_from_slice(&FLAG_END.to_be_bytes());
    end[8..].copy_from_slice(&tagged(FOOTER, section_id));
    end
}

fn tagged(tag: u8, section_id: u32) -> [u8; 5] {
    let mut bytes = [tag, 0, 0, 0, 0];
    bytes[1..].copy_from_slice(&section_id.to_be_bytes());
    bytes
}
