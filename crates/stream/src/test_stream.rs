//! Streams for the tests: right ones, and the parts to make wrong ones of.

use crate::PAGE_BYTES;
use crate::record::*;

/// Writes streams, right and wrong ones.
pub(crate) struct Writer(pub(crate) Vec<u8>);

pub(crate) const RAM_ID: u32 = 2;

impl Writer {
    pub(crate) fn head() -> Self {
        let mut writer = Self(Vec::new());
        writer.put(b"QEVM\0\0\0\x03\x07\0\0\0\x0apc-q35-7.2");
        writer
    }

    pub(crate) fn put(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(crate) fn start(&mut self) -> &mut Self {
        self.put(&[SECTION_START]).put(&RAM_ID.to_be_bytes()).put(b"\x03ram\0\0\0\0\0\0\0\x04")
    }

    pub(crate) fn list(&mut self, blocks: &[(&str, u64)]) -> &mut Self {
        let total: u64 = blocks.iter().map(|(_, length)| length).sum();
        self.put(&(total | FLAG_BLOCK_LIST).to_be_bytes());
        for (name, length) in blocks {
            self.put(&[name.len() as u8]).put(name.as_bytes()).put(&length.to_be_bytes());
        }
        self
    }

    pub(crate) fn record(&mut self, word: u64, name: &str) -> &mut Self {
        self.put(&word.to_be_bytes());
        if word & FLAG_CONTINUE == 0 {
            self.put(&[name.len() as u8]).put(name.as_bytes());
        }
        self
    }

    pub(crate) fn end_section(&mut self) -> &mut Self {
        self.put(&part_end(RAM_ID))
    }

    pub(crate) fn devices(&mut self) -> &mut Self {
        self.put(b"\x04device\x00\x06\0\0\0\x02{}")
    }
}

/// A stream with everything that a usual one has.
pub(crate) fn usual() -> Vec<u8> {
    let mut writer = Writer::head();
    writer.put(b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0dvalidate-uuid");
    writer.put(b"\x08\0\x01\0\0").put(b"\x08\0\x03\0\x10").put(&[9; 16]);
    writer.start().list(&[("pc.ram", 0x4000), ("pc.bios", 0x2000)]).end_section();
    writer.put(&part_head(RAM_ID)).record(FLAG_ZERO, "pc.ram").put(&[0]);
    writer.record(0x1000 | FLAG_PAGE | FLAG_CONTINUE, "").put(&[1; PAGE_BYTES]);
    writer.record(FLAG_PAGE, "pc.bios").put(&[2; PAGE_BYTES]).end_section();
    writer.put(b"\x03").put(&RAM_ID.to_be_bytes()).record(0x3000 | FLAG_PAGE, "pc.ram").put(&[3; PAGE_BYTES]);
    writer.end_section().devices();
    std::mem::take(&mut writer.0)
}
