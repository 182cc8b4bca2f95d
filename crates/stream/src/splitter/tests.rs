use super::*;
use crate::error::Fault;
use crate::record::*;
use crate::test_stream::{RAM_ID, Writer, usual};

/// A memory that checks what it is given, and counts how often.
struct Memory {
    bytes: Vec<u8>,
    calls: Vec<(char, u64, u64)>,
    full: bool,
}

impl Memory {
    fn new(length: usize) -> Self {
        Self { bytes: vec![0; length], calls: Vec::new(), full: false }
    }
}

impl PageSink for Memory {
    fn pages(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if self.full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.calls.push(('p', offset, bytes.len() as u64));
        self.bytes[offset as usize..offset as usize + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn zeros(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.calls.push(('z', offset, length));
        self.bytes[offset as usize..(offset + length) as usize].fill(0);
        Ok(())
    }
}

fn options(memory_bytes: u64, sink_is_zero: bool) -> SplitOptions {
    SplitOptions { memory_block: "pc.ram".into(), memory_bytes, sink_is_zero }
}

fn split(
    stream: &[u8],
    piece: usize,
    options: SplitOptions,
) -> Result<(Memory, Vec<u8>, SplitSummary), SplitError> {
    let memory = Memory::new(options.memory_bytes as usize);
    let mut splitter = Splitter::new(options, memory, Vec::new());
    for input in stream.chunks(piece) {
        splitter.feed(input)?;
    }
    splitter.finish()
}

/// A stream whose only part has these records of `pc.ram`: a page's number, and its content or zero.
fn records(memory_bytes: u64, pages: impl IntoIterator<Item = (u64, u8)>) -> Vec<u8> {
    let mut writer = Writer::head();
    writer.start().list(&[("pc.ram", memory_bytes)]).end_section().put(&part_head(RAM_ID));
    for (number, content) in pages {
        let offset = number * PAGE_BYTES as u64;
        match content {
            0 => writer.record(offset | FLAG_ZERO, "pc.ram").put(&[0]),
            content => writer.record(offset | FLAG_PAGE, "pc.ram").put(&[content; PAGE_BYTES]),
        };
    }
    writer.end_section().devices();
    writer.0
}

#[test]
fn memory_goes_to_the_image_and_the_rest_is_a_stream_of_its_own() {
    for piece in [1, 4095, usize::MAX] {
        let (memory, device, summary) = split(&usual(), piece, options(0x4000, true)).expect("split");
        let page = |number: usize| memory.bytes[number * PAGE_BYTES];
        assert_eq!([page(0), page(1), page(2), page(3)], [0, 1, 0, 3]);
        assert_eq!((summary.pages, summary.zero_pages), (2, 1));
        assert_eq!((summary.device_bytes, summary.stream_bytes), (device.len() as u64, usual().len() as u64));
        // The rest has no page of memory any more, still has the firmware's, and splits into itself.
        let (rest, again, summary) = split(&device, piece, options(0x4000, true)).expect("a stream");
        assert_eq!((summary.pages, summary.zero_pages, rest.calls.len()), (0, 0, 0));
        assert!(again == device && device.windows(PAGE_BYTES).any(|page| page == [2; PAGE_BYTES]));
    }
}

#[test]
fn pages_that_follow_each_other_arrive_as_one() {
    let run_pages = (RUN_BYTES_MAX / PAGE_BYTES) as u64;
    let count = 2 * run_pages + 3;
    let stream = records(count * 4096, (0..count).map(|number| (number, 1)));
    let (memory, ..) = split(&stream, 10_000, options(count * 4096, true)).expect("split");
    let run = RUN_BYTES_MAX as u64;
    assert_eq!(memory.calls, [('p', 0, run), ('p', run, run), ('p', 2 * run, 3 * 4096)]);
}

#[test]
fn the_last_word_on_a_page_counts() {
    let order = [(0, 1), (1, 1), (1, 2), (2, 5), (0, 0), (1, 0), (3, 0), (1, 7), (2, 0), (2, 0)];
    for sink_is_zero in [true, false] {
        let stream = records(0x4000, order);
        let (memory, ..) = split(&stream, 4096, options(0x4000, sink_is_zero)).expect("split");
        let firsts: Vec<_> = memory.bytes.chunks(PAGE_BYTES).map(|page| page[0]).collect();
        assert_eq!(firsts, [0, 7, 0, 0]);
    }
}

#[test]
fn zeros_are_handed_on_only_where_they_matter() {
    let order = [(0, 0), (1, 0), (2, 3), (2, 0), (3, 0)];
    let (fresh, ..) = split(&records(0x4000, order), 4096, options(0x4000, true)).expect("split");
    assert_eq!(fresh.calls, [('p', 0x2000, 0x1000), ('z', 0x2000, 0x1000)]);
    let (used, ..) = split(&records(0x4000, order), 4096, options(0x4000, false)).expect("split");
    assert_eq!(used.calls, [('z', 0, 0x2000), ('p', 0x2000, 0x1000), ('z', 0x2000, 0x2000)]);
}

#[test]
fn another_machines_memory_is_refused_before_anything_is_written() {
    let missing = split(&usual(), 4096, SplitOptions { memory_block: "mem".into(), ..options(0x4000, true) });
    assert!(
        matches!(&missing, Err(SplitError::MemoryBlockMissing { found, .. }) if found == &["pc.ram", "pc.bios"])
    );
    let longer = split(&usual(), 4096, options(0x8000, true));
    assert!(matches!(longer, Err(SplitError::MemoryLength { expected: 0x8000, found: 0x4000, .. })));
}

#[test]
fn a_full_disk_and_a_lost_end_are_told_apart() {
    let mut memory = Memory::new(0x4000);
    memory.full = true;
    let mut splitter = Splitter::new(options(0x4000, true), &mut memory, Vec::new());
    assert!(
        matches!(splitter.feed(&usual()), Err(SplitError::Pages(error)) if error.kind() == io::ErrorKind::StorageFull)
    );
    let cut = split(&usual()[..usual().len() - 1], 4096, options(0x4000, true));
    let within = "the devices' state";
    assert!(
        matches!(cut, Err(SplitError::Stream(StreamError { fault: Fault::Truncated { within: w }, .. })) if w == within)
    );
}
