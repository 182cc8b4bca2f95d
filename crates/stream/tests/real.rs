//! Splitting and joining against a real QEMU: `BERTH_TEST_QEMU`, else the one in the path.
//!
//! The guest is the firmware alone: it fills tables and finds nothing to boot, which is memory enough to get wrong.

#[path = "real/qemu.rs"]
mod qemu;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use berth_stream::{
    Fault, Holder, Item, Joiner, MemorySource, PageHasher, PageIndexBuilder, PageSink, Parser, SplitError,
    SplitOptions, SplitSummary, Splitter,
};
use qemu::{MEMORY_BYTES, Qemu};
use serde_json::json;

/// A sparse file as a memory image.
struct Image(File);

impl PageSink for Image {
    fn pages(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn zeros(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.0.write_all_at(&vec![0; length as usize], offset)
    }
}

impl MemorySource for Image {
    fn read_at(&mut self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(bytes, offset)
    }
}

fn options() -> SplitOptions {
    SplitOptions { memory_block: "pc.ram".into(), memory_bytes: MEMORY_BYTES, sink_is_zero: true }
}

fn split(stream: &[u8], image: &Path) -> (Vec<u8>, SplitSummary) {
    let file = File::create_new(image).expect("a new file");
    file.set_len(MEMORY_BYTES).expect("room");
    let mut splitter = Splitter::new(options(), Image(file), Vec::new());
    // Cut as a socket would cut it.
    stream.chunks(65_000).for_each(|bytes| splitter.feed(bytes).expect("a good stream"));
    let (_, device, summary) = splitter.finish().expect("a whole stream");
    (device, summary)
}

#[test]
fn a_machine_runs_on_from_its_mapped_image_and_device_file() {
    let directory = tempfile::tempdir().expect("a directory");
    let image = directory.path().join("image");
    let mut source = Qemu::start(None, false);
    source.wait_for_firmware();
    source.call("stop", json!({}));
    let stream = source.migrate_away();
    let memory = source.memory();
    let (device, summary) = split(&stream, &image);
    assert!(summary.pages > 0 && summary.zero_pages > 0, "{summary:?}");
    assert!(device.len() < 1 << 20, "a device file of {} bytes", device.len());

    let mut target = Qemu::start(Some(&image), true);
    target.load(&device);
    assert_eq!(target.run_state(), "paused");
    assert!(target.memory() == memory, "the restored memory differs");
    target.call("cont", json!({}));
    assert_eq!(target.run_state(), "running");
}

#[test]
fn a_machine_that_was_saved_running_runs_at_once() {
    let directory = tempfile::tempdir().expect("a directory");
    let image = directory.path().join("image");
    let mut source = Qemu::start(None, false);
    source.wait_for_firmware();
    let (device, _) = split(&source.migrate_away(), &image);
    let mut target = Qemu::start(Some(&image), true);
    target.load(&device);
    target.wait_for_event("RESUME");
    assert_eq!(target.run_state(), "running");
}

/// Its stream has no end of memory: the devices' state, taken first, simply follows.
#[test]
fn a_background_snapshot_splits_like_any_other() {
    let directory = tempfile::tempdir().expect("a directory");
    let image = directory.path().join("image");
    let mut source = Qemu::start(None, false);
    source.wait_for_firmware();
    let capability = json!({"capabilities": [{"capability": "background-snapshot", "state": true}]});
    if let Err(error) = source.try_call("migrate-set-capabilities", capability) {
        println!("not possible on this host: {error}");
        return;
    }
    let (device, summary) = split(&source.migrate_away(), &image);
    assert!(summary.pages > 0, "{summary:?}");
    let mut target = Qemu::start(Some(&image), true);
    target.load(&device);
    target.wait_for_event("RESUME");
    assert_eq!(target.run_state(), "running");
}

#[test]
fn image_and_device_file_make_a_plain_stream_again() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("image");
    let mut source = Qemu::start(None, false);
    source.wait_for_firmware();
    source.call("stop", json!({}));
    let stream = source.migrate_away();
    let memory = source.memory();
    let (device, _) = split(&stream, &path);
    let image = Image(File::open(&path).expect("the image"));
    let mut joiner = Joiner::new("pc.ram", image, Vec::new());
    joiner.feed(&device).expect("a good device file");
    let full = joiner.finish().expect("a whole device file");

    let mut target = Qemu::start(None, true);
    target.load(&full);
    assert_eq!(target.run_state(), "paused");
    assert!(target.memory() == memory, "the restored memory differs");
}

#[test]
fn an_index_of_a_real_image_finds_what_changed() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("image");
    let mut source = Qemu::start(None, false);
    source.wait_for_firmware();
    split(&source.migrate_away(), &path);
    let mut memory = std::fs::read(&path).expect("the image");
    let hasher = PageHasher::new([5; 32]);
    let index = |memory: &[u8]| {
        let mut builder = PageIndexBuilder::new(MEMORY_BYTES / 4096, &hasher);
        let (pages, _) = memory.as_chunks();
        (0..).zip(pages).for_each(|(number, page)| builder.set(number, hasher.hash_page(page), Holder::FULL));
        builder.finish()
    };
    let before = index(&memory);
    memory[7 * 4096 + 11] ^= 1;
    let after = index(&memory);
    let changed: Vec<_> =
        (0..before.page_count()).filter(|&page| before.get(page) != after.get(page)).collect();
    assert_eq!(changed, [7]);
}

/// A stream with a wrong byte is either refused by name or split within its bounds; it never panics.
#[test]
fn a_real_stream_with_wrong_bytes_is_refused_or_split_but_never_panics() {
    let mut source = Qemu::start(None, false);
    source.wait_for_firmware();
    let stream = source.migrate_away();
    let heads = places_that_matter(&stream);
    // A fixed sequence, so that what fails once fails again.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let (mut refused, mut split) = (0, 0);
    for _ in 0..400 {
        let mut bad = stream.clone();
        for _ in 0..=random() % 3 {
            let at = heads[(random() % heads.len() as u64) as usize];
            bad[at] ^= 1 << (random() % 8);
        }
        bad.truncate(bad.len() - if random() % 4 == 0 { (random() % 100_000) as usize } else { 0 });
        match try_split(&bad) {
            Ok(()) => split += 1,
            Err(error) => {
                assert!(!error.to_string().is_empty());
                refused += 1;
            }
        }
    }
    assert!(refused > 100 && split > 10, "{refused} refused, {split} split");
    let cut = try_split(&stream[..stream.len() - 10]).expect_err("cut short");
    assert!(matches!(cut, SplitError::Stream(error) if matches!(error.fault, Fault::Truncated { .. })));
}

/// All places that are not content of a page.
fn places_that_matter(stream: &[u8]) -> Vec<usize> {
    let mut parser = Parser::new();
    let mut places = Vec::new();
    let mut input = stream;
    let mut before = 0;
    while let Some(item) = parser.next(&mut input).expect("a good stream") {
        let content = if matches!(item, Item::Page { .. }) { 4096 } else { 0 };
        let after = stream.len() - input.len();
        places.extend(before..after - content);
        before = after;
    }
    places
}

struct Bounded;

impl PageSink for Bounded {
    fn pages(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        assert!(offset + bytes.len() as u64 <= MEMORY_BYTES);
        Ok(())
    }

    fn zeros(&mut self, offset: u64, length: u64) -> io::Result<()> {
        assert!(offset + length <= MEMORY_BYTES);
        Ok(())
    }
}

fn try_split(stream: &[u8]) -> Result<(), SplitError> {
    let mut splitter = Splitter::new(options(), Bounded, io::sink());
    splitter.feed(stream)?;
    splitter.finish().map(|_| ())
}
