//! How fast a stream is split on this machine, without any disk or socket in it.
//!
//! A stream of 1 GiB of memory is made, a third of it zero as in a usual guest, and fed in pieces of a socket's size:
//! into a sink that only counts (what the splitter itself costs), into memory (with the copy that a file in the page cache
//! would make too), and through a differ whose base has it all, at hand or not. Run it with `--release`.

use std::hint::black_box;
use std::io;
use std::time::Instant;

use berth_stream::{
    Base, BaseFiles, Differ, Item, PAGE_BYTES, PageHasher, PageIndex, PageSink, Parser, SplitOptions,
    Splitter,
};

const MEMORY_BYTES: u64 = 1 << 30;
const PIECE_BYTES: usize = 256 << 10;
const ROUNDS: usize = 5;

struct Count(u64);

impl PageSink for Count {
    fn pages(&mut self, _offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0 += black_box(bytes).len() as u64;
        Ok(())
    }

    fn zeros(&mut self, _offset: u64, length: u64) -> io::Result<()> {
        self.0 += length;
        Ok(())
    }
}

struct Memory(Vec<u8>);

impl PageSink for Memory {
    fn pages(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn zeros(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.0[offset as usize..][..length as usize].fill(0);
        Ok(())
    }
}

/// A base's only file, to be had at once or not at all.
struct Warm<'a>(Option<&'a [u8]>);

impl BaseFiles for Warm<'_> {
    fn read_now(&mut self, _file: u8, offset: u64, bytes: &mut [u8]) -> usize {
        let Some(file) = self.0 else { return 0 };
        bytes.copy_from_slice(&file[offset as usize..][..bytes.len()]);
        bytes.len()
    }
}

fn main() {
    let stream = stream();
    println!("stream of {} MB, best of {ROUNDS}", stream.len() / 1_000_000);
    report("parse only", stream.len(), || {
        let mut parser = Parser::new();
        for mut input in stream.chunks(PIECE_BYTES) {
            while let Some(item) = parser.next(&mut input).expect("a good stream") {
                if let Item::Page { data, .. } = item {
                    black_box(data);
                }
            }
        }
    });
    report("split, sink counts", stream.len(), || _ = split(&stream, Count(0)));
    let mut memory = Memory(vec![1; MEMORY_BYTES as usize]);
    report("split, sink copies", stream.len(), || _ = split(&stream, &mut memory));
    let hasher = PageHasher::new([1; 32]);
    let index = full_index(&stream, &hasher);
    let base = |files| Base::new(index.clone(), files).expect("a free number");
    let against = |files| Differ::against(base(files), Count(0));
    report("split, compared", stream.len(), || _ = split(&stream, against(Warm(Some(&memory.0)))));
    report("split, base cold", stream.len(), || _ = split(&stream, against(Warm(None))));
    let (pages, _) = memory.0.as_chunks::<PAGE_BYTES>();
    report("hash pages", memory.0.len(), || {
        pages.iter().for_each(|page| _ = black_box(hasher.hash_page(page)))
    });
}

fn split<S: PageSink>(stream: &[u8], sink: S) -> S {
    let options =
        SplitOptions { memory_block: "pc.ram".into(), memory_bytes: MEMORY_BYTES, sink_is_zero: true };
    let mut splitter = Splitter::new(options, sink, Vec::new());
    stream.chunks(PIECE_BYTES).for_each(|bytes| splitter.feed(bytes).expect("a good stream"));
    splitter.finish().expect("a whole stream").0
}

/// The index of a full image of what the stream has.
fn full_index(stream: &[u8], hasher: &PageHasher) -> PageIndex {
    let mut memory = Memory(vec![0; MEMORY_BYTES as usize]);
    let differ: Differ<_, Warm<'_>> = Differ::full(&mut memory, MEMORY_BYTES, hasher.clone());
    let (memory, mut digest) = split(stream, differ).finish();
    let mut from = 0;
    while let Some((start, end)) = digest.next_unhashed(from) {
        let (pages, _) = memory.0.as_chunks();
        (start..end).for_each(|page| assert!(digest.hash(page, &pages[page as usize])));
        from = end;
    }
    digest.finish()
}

fn report(name: &str, bytes: usize, mut work: impl FnMut()) {
    let rounds = (0..ROUNDS).map(|_| {
        let start = Instant::now();
        work();
        start.elapsed().as_secs_f64()
    });
    let best = rounds.fold(f64::INFINITY, f64::min);
    println!("{name:<20} {:>6.0} MB/s", bytes as f64 / best / 1e6);
}

/// A stream as QEMU writes it: zero pages and others in stretches.
fn stream() -> Vec<u8> {
    let mut bytes = Vec::with_capacity(MEMORY_BYTES as usize);
    bytes.extend_from_slice(b"QEVM\0\0\0\x03\x07\0\0\0\x0apc-q35-7.2\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
    bytes.extend_from_slice(&(MEMORY_BYTES | 0x04).to_be_bytes());
    bytes.extend_from_slice(b"\x06pc.ram");
    bytes.extend_from_slice(&MEMORY_BYTES.to_be_bytes());
    let mut page = [1_u8; PAGE_BYTES];
    for (number, offset) in (0..MEMORY_BYTES).step_by(PAGE_BYTES).enumerate() {
        let (zero, first) = (number / 100 % 3 == 0, number == 0);
        let flags = if zero { 0x02 } else { 0x08 } | if first { 0 } else { 0x20 };
        bytes.extend_from_slice(&(offset | flags).to_be_bytes());
        if first {
            bytes.extend_from_slice(b"\x06pc.ram");
        }
        if zero {
            bytes.push(0);
        } else {
            page[..8].copy_from_slice(&offset.to_be_bytes());
            bytes.extend_from_slice(&page);
        }
    }
    bytes.extend_from_slice(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02\x04\0\x06\0\0\0\x02{}");
    bytes
}
