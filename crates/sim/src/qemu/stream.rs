//! A small migration stream, written as QEMU would and read by the crate that reads QEMU's.
//!
//! It is written here byte by byte rather than with `berth-stream`'s own parts, so that the two check each other. The
//! device state stands in the description at the end, where a real stream has JSON too.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use berth_stream::{PAGE_BYTES, PageSink, SplitError, SplitOptions, Splitter};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::guest::{Memory, PAGES};

const MEMORY_BLOCK: &str = "pc.ram";
const FIRMWARE_BLOCK: (&str, u64) = ("pc.bios", PAGE_BYTES as u64);
const RAM_SECTION: u32 = 2;

const FLAG_ZERO: u64 = 0x02;
const FLAG_LIST: u64 = 0x04;
const FLAG_PAGE: u64 = 0x08;
const FLAG_END: u64 = 0x10;
const FLAG_CONTINUE: u64 = 0x20;

/// The answer that ends a return path: type "shut", four bytes, no error.
pub(crate) const SHUT: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 0];

/// A machine's state besides its memory.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct DeviceState {
    guest: Memory,
}

/// Everything up to the first pages.
pub(crate) fn head(memory_bytes: u64) -> Vec<u8> {
    let mut out = b"QEVM\0\0\0\x03\x07\0\0\0\x0cpc-q35-simul".to_vec();
    out.push(0x01);
    out.extend_from_slice(&RAM_SECTION.to_be_bytes());
    out.extend_from_slice(b"\x03ram\0\0\0\0\0\0\0\x04");
    let blocks = [(MEMORY_BLOCK, memory_bytes), FIRMWARE_BLOCK];
    let total: u64 = blocks.iter().map(|(_, length)| length).sum();
    out.extend_from_slice(&(total | FLAG_LIST).to_be_bytes());
    for (name, length) in blocks {
        named(&mut out, name);
        out.extend_from_slice(&length.to_be_bytes());
    }
    end_section(&mut out);
    out
}

/// A pass over memory: the guest's pages, one that is zero, and one of the firmware.
pub(crate) fn part(guest: Memory) -> Vec<u8> {
    let mut out = vec![0x02];
    out.extend_from_slice(&RAM_SECTION.to_be_bytes());
    pages(&mut out, guest);
    out.extend_from_slice(&((PAGES * PAGE_BYTES as u64) | FLAG_ZERO | FLAG_CONTINUE).to_be_bytes());
    out.push(0);
    out.extend_from_slice(&FLAG_PAGE.to_be_bytes());
    named(&mut out, FIRMWARE_BLOCK.0);
    out.extend_from_slice(&[0xea; PAGE_BYTES]);
    end_section(&mut out);
    out
}

/// The last pages and the devices.
pub(crate) fn end(guest: Memory) -> Vec<u8> {
    let mut out = vec![0x03];
    out.extend_from_slice(&RAM_SECTION.to_be_bytes());
    pages(&mut out, guest);
    end_section(&mut out);
    out.extend_from_slice(b"\x04device state of a machine that is none\x00\x06");
    let description = json!({ "sim": DeviceState { guest } }).to_string();
    let length = u32::try_from(description.len()).expect("a few bytes");
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(description.as_bytes());
    out
}

fn pages(out: &mut Vec<u8>, guest: Memory) {
    for page in 0..PAGES {
        let flags = if page == 0 { FLAG_PAGE } else { FLAG_PAGE | FLAG_CONTINUE };
        out.extend_from_slice(&((page * PAGE_BYTES as u64) | flags).to_be_bytes());
        if page == 0 {
            named(out, MEMORY_BLOCK);
        }
        out.extend_from_slice(&guest.to_page());
    }
}

fn named(out: &mut Vec<u8>, name: &str) {
    out.push(u8::try_from(name.len()).expect("a short name"));
    out.extend_from_slice(name.as_bytes());
}

fn end_section(out: &mut Vec<u8>) {
    out.extend_from_slice(&FLAG_END.to_be_bytes());
    out.push(0x7e);
    out.extend_from_slice(&RAM_SECTION.to_be_bytes());
}

/// Why a stream can't be loaded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    #[error("load of migration failed: {0}")]
    Stream(#[from] SplitError),
    #[error("the memory image can't be read: {0}")]
    Image(#[source] io::Error),
    #[error("the device state is none")]
    Device,
    #[error("pages of different instants: {pages}, but the devices are at {devices}")]
    Torn { pages: String, devices: Memory },
}

impl LoadError {
    /// Whether whoever made the stream is at fault, rather than whoever carried it being cut off.
    pub(crate) const fn is_wrong(&self) -> bool {
        matches!(self, Self::Torn { .. } | Self::Device | Self::Image(_))
    }
}

/// Reads a stream as it comes.
pub(crate) struct Loader {
    splitter: Splitter<Pages, Vec<u8>>,
}

impl Loader {
    /// For a machine with this much memory; what the stream leaves out is in `image`, if there is one.
    pub(crate) fn new(memory_bytes: u64, image: Option<&Path>) -> Result<Self, LoadError> {
        let mut pages = Pages::default();
        if let Some(path) = image {
            pages.read(path).map_err(LoadError::Image)?;
        }
        let options =
            SplitOptions { memory_block: MEMORY_BLOCK.to_owned(), memory_bytes, sink_is_zero: false };
        Ok(Self { splitter: Splitter::new(options, pages, Vec::new()) })
    }

    pub(crate) fn feed(&mut self, bytes: &[u8]) -> Result<(), LoadError> {
        Ok(self.splitter.feed(bytes)?)
    }

    /// Whether the stream is whole.
    pub(crate) fn is_whole(&self) -> bool {
        self.splitter.parser().finish().is_ok()
    }

    /// The guest, whose pages and devices must be of one instant.
    pub(crate) fn finish(self) -> Result<Memory, LoadError> {
        let (pages, device, _) = self.splitter.finish()?;
        let devices = device_state(&device).ok_or(LoadError::Device)?.guest;
        if pages.0.iter().all(|page| *page == Some(devices)) {
            return Ok(devices);
        }
        let words =
            pages.0.iter().map(|page| page.map_or_else(|| "nothing".to_owned(), |memory| memory.to_string()));
        Err(LoadError::Torn { pages: words.collect::<Vec<_>>().join(", "), devices })
    }
}

fn device_state(device: &[u8]) -> Option<DeviceState> {
    const MARK: &[u8] = b"{\"sim\":";
    let at = device.windows(MARK.len()).rposition(|window| window == MARK)?;
    let value: serde_json::Value = serde_json::from_slice(&device[at..]).ok()?;
    serde_json::from_value(value["sim"].clone()).ok()
}

/// The guest's pages, as they came last.
#[derive(Debug, Default)]
struct Pages([Option<Memory>; PAGES as usize]);

impl Pages {
    fn read(&mut self, path: &Path) -> io::Result<()> {
        let file = File::open(path)?;
        let mut page = [0; PAGE_BYTES];
        for offset in (0..PAGES).map(|number| number * PAGE_BYTES as u64) {
            file.read_exact_at(&mut page, offset)?;
            self.pages(offset, &page)?;
        }
        Ok(())
    }
}

impl PageSink for Pages {
    fn pages(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let first = usize::try_from(offset).map_err(io::Error::other)? / PAGE_BYTES;
        for (page, bytes) in self.0.iter_mut().skip(first).zip(bytes.chunks_exact(PAGE_BYTES)) {
            *page = Memory::from_bytes(bytes);
        }
        Ok(())
    }

    fn zeros(&mut self, offset: u64, length: u64) -> io::Result<()> {
        let range = |bytes: u64| usize::try_from(bytes / PAGE_BYTES as u64).map_err(io::Error::other);
        let (first, count) = (range(offset)?, range(length)?);
        self.0.iter_mut().skip(first).take(count).for_each(|page| *page = None);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMORY_BYTES: u64 = 32 << 20;

    const fn guest(ticks: u64) -> Memory {
        Memory { token: 77, ticks, ready: true }
    }

    fn stream(passes: &[u64], last: u64) -> Vec<u8> {
        let mut all = head(MEMORY_BYTES);
        passes.iter().for_each(|ticks| all.extend(part(guest(*ticks))));
        all.extend(end(guest(last)));
        all
    }

    #[test]
    fn a_guest_survives_its_stream_cut_anywhere() {
        let all = stream(&[1, 2], 5);
        for piece in [1, 7, 4096, all.len()] {
            let mut loader = Loader::new(MEMORY_BYTES, None).expect("loader");
            for bytes in all.chunks(piece) {
                assert!(!loader.is_whole());
                loader.feed(bytes).expect("fed");
            }
            assert!(loader.is_whole());
            assert_eq!(loader.finish().expect("loaded"), guest(5));
        }
    }

    #[test]
    fn a_stream_that_was_split_loads_from_image_and_device_file() {
        let directory = tempfile::tempdir().expect("directory");
        let image = directory.path().join("memory.raw");
        let file = File::create(&image).expect("file");
        file.set_len(MEMORY_BYTES).expect("length");
        let options = SplitOptions {
            memory_block: MEMORY_BLOCK.into(),
            memory_bytes: MEMORY_BYTES,
            sink_is_zero: true,
        };
        let mut splitter = Splitter::new(options, ToFile(file), Vec::new());
        splitter.feed(&stream(&[1, 2], 9)).expect("split");
        let (_, device, summary) = splitter.finish().expect("whole");
        assert_eq!(summary.pages, 3 * PAGES);
        let mut loader = Loader::new(MEMORY_BYTES, Some(&image)).expect("loader");
        loader.feed(&device).expect("fed");
        assert_eq!(loader.finish().expect("loaded"), guest(9));
        // The image of another instant.
        let mut page = guest(8).to_page().to_vec();
        page.resize(PAGE_BYTES, 0);
        File::options().write(true).open(&image).expect("file").write_all_at(&page, 4096).expect("torn");
        let mut loader = Loader::new(MEMORY_BYTES, Some(&image)).expect("loader");
        loader.feed(&device).expect("fed");
        assert!(matches!(loader.finish(), Err(LoadError::Torn { .. })));
    }

    struct ToFile(File);

    impl PageSink for ToFile {
        fn pages(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
            self.0.write_all_at(bytes, offset)
        }

        fn zeros(&mut self, _: u64, _: u64) -> io::Result<()> {
            Ok(())
        }
    }
}
