use proptest::prelude::*;

use super::*;
use crate::test_stream::{RAM_ID, Writer, usual};

/// A few words for each item, pieces of one kind put together; what the items say must be all of the stream.
fn told(bytes: &[u8], piece: usize) -> Result<Vec<String>, StreamError> {
    let mut parser = Parser::new();
    let mut told: Vec<String> = Vec::new();
    let mut rebuilt = Vec::new();
    let mut records = RecordWriter::new();
    let mut names = Vec::new();
    for mut input in bytes.chunks(piece) {
        while let Some(item) = parser.next(&mut input)? {
            let words = match item {
                Item::Raw { kind, bytes } => {
                    rebuilt.extend_from_slice(bytes);
                    format!("{kind:?}")
                }
                Item::Passthrough(bytes) => {
                    rebuilt.extend_from_slice(bytes);
                    "Devices".to_owned()
                }
                Item::Blocks(blocks) => {
                    names = blocks.iter().map(|block| block.name.clone()).collect();
                    format!("{} blocks", blocks.len())
                }
                Item::Zero { block, offset } => {
                    rebuilt.extend_from_slice(records.zero(block, &names[block.index()], offset));
                    format!("zero {} {offset:#x}", block.index())
                }
                Item::Page { block, offset, data } => {
                    records.page_into(block, &names[block.index()], offset, data, &mut rebuilt);
                    format!("page {} {offset:#x} {}", block.index(), data[4095])
                }
                Item::RamEnd => "RamEnd".to_owned(),
            };
            if told.last() != Some(&words) {
                told.push(words);
            }
        }
        assert!(input.is_empty(), "all input is taken in");
    }
    assert_eq!(parser.offset(), bytes.len() as u64);
    parser.finish()?;
    assert!(rebuilt == bytes, "something was lost or changed");
    Ok(told)
}

fn fault(bytes: &[u8]) -> Fault {
    told(bytes, usize::MAX).expect_err("a fault").fault
}

#[test]
fn a_stream_gives_its_items_wherever_it_is_cut() {
    let expected = [
        "Head",
        "Command",
        "SectionHead",
        "BlockList",
        "2 blocks",
        "RecordsEnd",
        "Footer",
        "SectionHead",
        "zero 0 0x0",
        "page 0 0x1000 1",
        "page 1 0x0 2",
        "RecordsEnd",
        "Footer",
        "SectionHead",
        "page 0 0x3000 3",
        "RecordsEnd",
        "Footer",
        "RamEnd",
        "Devices",
    ];
    for piece in [1, 2, 3, 7, 8, 100, 4095, 4096, 4097, usize::MAX] {
        assert_eq!(told(&usual(), piece).expect("a good stream"), expected, "in pieces of {piece}");
    }
}

#[test]
fn a_stream_cut_short_anywhere_is_not_whole() {
    let whole = usual();
    for length in 0..whole.len() {
        let error = told(&whole[..length.max(1)], usize::MAX).expect_err("cut short");
        assert!(matches!(error.fault, Fault::Truncated { .. }), "cut at {length}: {error}");
    }
}

#[test]
fn a_background_snapshot_ends_memory_with_its_first_device() {
    let mut writer = Writer::head();
    writer.start().list(&[("pc.ram", 0x1000)]).end_section().devices();
    let told = told(&writer.0, 5).expect("a good stream");
    assert_eq!(told[told.len() - 2..], ["RamEnd", "Devices"]);
}

#[test]
fn a_package_is_passed_and_memory_goes_on_behind_it() {
    let mut writer = Writer::head();
    writer.start().list(&[("pc.ram", 0x1000)]).end_section();
    writer.put(b"\x08\0\x07\0\x04\0\0\0\x06\x04devic");
    writer
        .put(b"\x03")
        .put(&RAM_ID.to_be_bytes())
        .record(FLAG_ZERO, "pc.ram")
        .put(&[0])
        .end_section()
        .put(&[0]);
    let told = told(&writer.0, 4).expect("a good stream");
    assert_eq!(
        told[6..],
        ["Command", "SectionHead", "zero 0 0x0", "RecordsEnd", "Footer", "RamEnd", "Devices"]
    );
}

#[test]
fn a_broken_post_copy_goes_on_without_a_head() {
    let mut writer = Writer::head();
    writer.start().list(&[("pc.ram", 0x2000)]).end_section();
    let mut parser = Parser::new();
    assert!(Parser::resumed(&parser).is_none());
    let mut input = writer.0.as_slice();
    while parser.next(&mut input).expect("good").is_some() {}
    let mut resumed = Parser::resumed(&parser).expect("memory was reached");
    let mut writer = Writer(Vec::new());
    writer.put(b"\x08\0\x09\0\0").put(&part_head(RAM_ID)).record(0x1000 | FLAG_ZERO, "pc.ram").put(&[0]);
    let mut input = writer.0.as_slice();
    let mut zeros = 0;
    while let Some(item) = resumed.next(&mut input).expect("good") {
        zeros += usize::from(matches!(item, Item::Zero { offset: 0x1000, .. }));
    }
    assert_eq!(zeros, 1);
}

#[test]
fn what_is_no_stream_is_refused_by_name_and_value() {
    assert_eq!(fault(b"GET / HTTP/1.1\r\n"), Fault::Magic { found: 0x4745_5420 });
    assert_eq!(fault(b"QEVM\0\0\0\x02"), Fault::Version { found: 2 });
    assert_eq!(fault(b"QEVM\0\0\0\x03\x09"), Fault::SectionType { found: 9 });
    let length = u32::MAX;
    assert_eq!(fault(b"QEVM\0\0\0\x03\x07\xff\xff\xff\xff"), Fault::MachineTypeLength { length, max: 256 });
    let part = |bytes: &[u8]| fault(Writer::head().put(bytes).0.as_slice());
    assert_eq!(part(b"\x05\x02xx\0\0\0\x01"), Fault::ConfigurationPart { name: "xx".into() });
    let capability = b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0amapped-ram";
    assert_eq!(part(capability), Fault::Capability { name: "mapped-ram".into() });
    let device = b"\x04\0\0\0\x05\x05timer\0\0\0\0\0\0\0\x02";
    assert_eq!(part(device), Fault::SectionBeforeMemory { name: "timer".into() });
    assert_eq!(part(b"\x01\0\0\0\x05\x03ram\0\0\0\0\0\0\0\x05"), Fault::MemoryVersion { found: 5 });
    assert_eq!(part(b"\x02\0\0\0\x05"), Fault::SectionType { found: 2 });
    assert_eq!(part(b"\x08\0\x07\0\x05"), Fault::PackageLength { found: 5 });
}

#[test]
fn wrong_memory_is_refused_by_name_and_value() {
    let list = |blocks: &[(&str, u64)]| fault(&Writer::head().start().list(blocks).end_section().0);
    assert_eq!(list(&[("", 0x1000)]), Fault::BlockName { name: String::new() });
    assert_eq!(list(&[("a", 0x1000), ("a", 0x1000)]), Fault::BlockName { name: "a".into() });
    let many: Vec<_> = (0..5000).map(|number| format!("{number}")).collect();
    let many: Vec<_> = many.iter().map(|name| (name.as_str(), 0x1000)).collect();
    assert_eq!(list(&many), Fault::TooManyBlocks { max: 4096 });
    let record = |word: u64, name: &str| {
        let mut writer = Writer::head();
        writer.start().list(&[("pc.ram", 0x2000)]).record(word, name).put(&[5]);
        told(&writer.0, usize::MAX).expect_err("a fault")
    };
    let outside = Fault::PageOutside { block: "pc.ram".into(), offset: 0x2000, length: 0x2000 };
    assert_eq!(record(0x2000 | FLAG_PAGE, "pc.ram").fault, outside);
    assert_eq!(record(FLAG_PAGE, "vram").fault, Fault::UnknownBlock { name: "vram".into() });
    assert_eq!(record(FLAG_PAGE, "").fault, Fault::UnknownBlock { name: String::new() });
    assert_eq!(record(FLAG_PAGE | FLAG_CONTINUE, "").fault, Fault::NothingToContinue);
    assert_eq!(record(FLAG_ZERO, "pc.ram").fault, Fault::ZeroFill { found: 5 });
    assert_eq!(record(FLAG_BLOCK_LIST | 0x1000, "").fault, Fault::UnexpectedBlockList);
    for (flags, what) in [(0x40, "xbzrle"), (0x80, "rdma"), (0x100, "compression"), (0x200, "multifd")] {
        assert_eq!(record(flags | 0x1000, "pc.ram").fault, Fault::UnsupportedRecord { flags, what });
    }
    for flags in [0x800, FLAG_PAGE | FLAG_ZERO, FLAG_END | FLAG_CONTINUE, 0] {
        let error = record(flags | 0x1000, "pc.ram");
        assert_eq!(error.fault, Fault::UnknownRecord { flags });
        assert_eq!(
            error.to_string(),
            format!("migration stream, byte 63: memory record with unknown flags {flags:#x}")
        );
    }
}

#[test]
fn wrong_frames_are_refused() {
    let after_start = |bytes: &[u8]| {
        let mut writer = Writer::head();
        writer.start().list(&[("pc.ram", 0x1000)]).put(bytes);
        told(&writer.0, usize::MAX).expect_err("a fault").fault
    };
    let end = FLAG_END.to_be_bytes();
    assert_eq!(after_start(&[&end[..], b"\x7d\0\0\0\x02"].concat()), Fault::FooterMissing { found: 0x7d });
    let other = Fault::SectionId { expected: RAM_ID, found: 3 };
    assert_eq!(after_start(&[&end[..], b"\x7e\0\0\0\x03"].concat()), other);
    assert_eq!(after_start(&[&part_end(RAM_ID)[..], b"\x02\0\0\0\x03"].concat()), other);
    let again = [&part_end(RAM_ID)[..], b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04"].concat();
    assert_eq!(after_start(&again), Fault::SecondStart);
    let short = [0, 0, 0, 0, 0, 0, 0x10, 0x04, 1, b'a', 0, 0, 0, 0, 0, 0, 0x20, 0];
    let fault = fault(Writer::head().start().put(&short).0.as_slice());
    assert_eq!(fault, Fault::BlockLength { name: "a".into(), length: 0x2000, left: 0x1000 });
}

/// A change to a stream.
#[derive(Debug, Clone)]
enum Change {
    Set(usize, u8),
    Cut(usize),
    Remove(usize, usize),
    Repeat(usize, usize),
}

fn change() -> impl Strategy<Value = Change> {
    let at = any::<prop::sample::Index>().prop_map(|index| index.index(1 << 16));
    // Most of a stream is pages, in which changes do nothing: half of the places are in its beginning.
    let at = prop_oneof![at.clone(), at.prop_map(|at| at % 256)];
    prop_oneof![
        (at.clone(), any::<u8>()).prop_map(|(at, byte)| Change::Set(at, byte)),
        at.clone().prop_map(Change::Cut),
        (at.clone(), 1..64usize).prop_map(|(at, length)| Change::Remove(at, length)),
        (at, 1..64usize).prop_map(|(at, length)| Change::Repeat(at, length)),
    ]
}

fn changed(mut bytes: Vec<u8>, changes: &[Change]) -> Vec<u8> {
    for change in changes {
        let length = bytes.len().max(1);
        match *change {
            Change::Set(at, byte) => bytes.iter_mut().skip(at % length).take(1).for_each(|old| *old = byte),
            Change::Cut(at) => bytes.truncate(at % length),
            Change::Remove(at, count) => {
                drop(bytes.drain(at % length..(at % length + count).min(bytes.len())))
            }
            Change::Repeat(at, count) => {
                let piece = bytes[at % length..(at % length + count).min(bytes.len())].to_vec();
                bytes.splice(at % length..at % length, piece);
            }
        }
        if bytes.is_empty() {
            break;
        }
    }
    bytes
}

/// What a parser makes of bytes: items in short and how it ended.
fn outcome(bytes: &[u8], piece: usize) -> (Vec<(BlockId, u64)>, Result<(), StreamError>) {
    let mut parser = Parser::new();
    let mut places = Vec::new();
    for mut input in bytes.chunks(piece) {
        loop {
            match parser.next(&mut input) {
                Ok(Some(Item::Page { block, offset, .. } | Item::Zero { block, offset })) => {
                    places.push((block, offset))
                }
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(error) => return (places, Err(error)),
            }
        }
    }
    for &(block, offset) in &places {
        assert!(offset < parser.blocks()[block.index()].length);
    }
    (places, parser.finish())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_changed_stream_means_the_same_wherever_it_is_cut_and_never_panics(
        changes in prop::collection::vec(change(), 1..4), piece in 1..5000usize
    ) {
        let bytes = changed(usual(), &changes);
        prop_assert_eq!(outcome(&bytes, piece), outcome(&bytes, usize::MAX));
    }

    #[test]
    fn noise_never_panics(noise in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut bytes = usual();
        bytes.truncate(100);
        bytes.extend_from_slice(&noise);
        prop_assert!(outcome(&bytes, usize::MAX).1.is_err());
        prop_assert!(outcome(&noise, 3).1.is_err());
    }
}
