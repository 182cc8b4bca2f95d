use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread;

use berth_model::LayerId;
use berth_model::snapshot::SnapshotFacts;
use berth_stream::{PageSink, SplitOptions, Splitter};

use super::*;
use crate::fittings::Fittings;
use crate::layout::{PoolDirs, VmDirs};
use crate::snapshot::archive::{self, Manifest};
use crate::snapshot::base;
use crate::testing::definition;

const PAGES: u64 = 24;
const MEMORY_BYTES: u64 = PAGES * PAGE_BYTES as u64;

/// A guest's memory: each page's fill.
type Memory = [u8; PAGES as usize];

fn dirs(root: &Path) -> VmDirs {
    let pool = PoolDirs { name: "local".parse().expect("name"), path: root.to_owned() };
    let dirs = VmDirs { disk: root.join("vm"), state: root.join("state"), run: root.join("run"), pool };
    fs::create_dir_all(&dirs.disk).expect("directory");
    dirs
}

/// A stream as QEMU writes it, that sends all of `before` and then what `after` has different.
fn stream(before: &Memory, after: &Memory) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(b"QEVM\0\0\0\x03\x07\0\0\0\x0apc-q35-7.2\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
    bytes.extend_from_slice(&(MEMORY_BYTES | 0x04).to_be_bytes());
    bytes.extend_from_slice(b"\x06pc.ram");
    bytes.extend_from_slice(&MEMORY_BYTES.to_be_bytes());
    bytes.extend_from_slice(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02\x03\0\0\0\x02");
    let first = (0..).zip(before);
    let second = (0..).zip(after.iter().zip(before)).filter(|(_, (after, before))| after != before);
    for (page, fill) in first.chain(second.map(|(page, (after, _))| (page, after))) {
        let address = page * PAGE_BYTES as u64;
        let flags = if *fill == 0 { 0x02_u64 } else { 0x08 };
        bytes.extend_from_slice(&(address | flags).to_be_bytes());
        bytes.extend_from_slice(b"\x06pc.ram");
        bytes.resize(bytes.len() + if *fill == 0 { 1 } else { PAGE_BYTES }, *fill);
    }
    bytes.extend_from_slice(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02\x04\0\x06\0\0\0\x02{}");
    bytes
}

/// Takes a snapshot of a guest whose memory changes from `before` to `after` meanwhile.
fn take(dirs: &VmDirs, number: u8, before: &Memory, after: &Memory) -> (SnapshotId, Completed) {
    take_bounded(dirs, number, [before, after], base::SENT_BYTES_MAX)
}

/// The same with another bound for what a restore may have to send.
fn take_bounded(
    dirs: &VmDirs,
    number: u8,
    [before, after]: [&Memory; 2],
    sent_bytes_max: u64,
) -> (SnapshotId, Completed) {
    let snapshot = SnapshotId::from_entropy([number; 10]);
    let draft = archive::Draft::begin(dirs, &snapshot, None).expect("begun");
    let layers = [LayerId::from_entropy([number; 10])];
    let earlier = base::choose(dirs, &layers, MEMORY_BYTES);
    let (linked, base) = earlier.map(|earlier| (earlier.paths, earlier.base)).unzip();
    let (ours, mut theirs) = UnixStream::pair().expect("pair");
    let sent = stream(before, after);
    let sending = thread::spawn(move || theirs.write_all(&sent).expect("sent"));
    let collected = memory::collect(ours, draft.files(), MEMORY_BYTES, base, None).expect("collected");
    sending.join().expect("sent");
    let completed = complete(collected, draft.files(), linked.as_ref(), sent_bytes_max).expect("complete");
    let memory = MemoryManifest {
        bytes: MEMORY_BYTES,
        was_running: true,
        device_blake3: archive::blake3_of(&draft.files().device()).expect("device"),
        index_blake3: completed.identity.clone(),
        differences: completed.differences.clone(),
    };
    let manifest = Manifest {
        format: archive::FORMAT,
        snapshot: snapshot.clone(),
        definition: definition(1),
        layers: layers.to_vec(),
        data: Vec::new(),
        fittings: Fittings::default(),
        nvram: BTreeMap::new(),
        memory: Some(memory),
        facts: SnapshotFacts::default(),
        borrowed_nics: None,
    };
    draft.finish(&manifest).expect("finished");
    (snapshot, completed)
}

fn open(dirs: &VmDirs, snapshot: &SnapshotId) -> Result<MemoryImage, ArchiveError> {
    let memory = archive::read(dirs, snapshot)?.memory.expect("with memory");
    MemoryImage::open(&SnapshotFiles::of(dirs, snapshot), snapshot, &memory)
}

/// A process's memory: mapped privately, and then written to.
struct Mapped(Vec<u8>);

impl PageSink for &mut Mapped {
    fn pages(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn zeros(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.0[offset as usize..][..length as usize].fill(0);
        Ok(())
    }
}

/// Restores as QEMU would: the full image mapped, the stream loaded over it.
fn restore(dirs: &VmDirs, snapshot: &SnapshotId) -> Result<Memory, ArchiveError> {
    let image = open(dirs, snapshot)?;
    image.sample(4)?;
    let mut mapped = Mapped(fs::read(image.paths().memory()).expect("full image"));
    let device = fs::read(image.paths().device()).expect("device");
    let (ours, mut theirs) = UnixStream::pair().expect("pair");
    let loading = thread::spawn(move || {
        let options = SplitOptions {
            memory_block: MEMORY_BLOCK.into(),
            memory_bytes: MEMORY_BYTES,
            sink_is_zero: false,
        };
        let mut splitter = Splitter::new(options, &mut mapped, Vec::new());
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut theirs, &mut bytes).expect("read");
        splitter.feed(&bytes).map(drop).expect("a stream, as far as it goes");
        drop(splitter);
        mapped
    });
    let fed = feed(ours, &device, image);
    let mapped = loading.join().expect("loaded");
    fed?;
    let (pages, _) = mapped.0.as_chunks::<PAGE_BYTES>();
    let mut memory = [0; PAGES as usize];
    for (fill, page) in memory.iter_mut().zip(pages) {
        assert!(page.iter().all(|byte| *byte == page[0]));
        *fill = page[0];
    }
    Ok(memory)
}

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

#[test]
fn what_is_deleted_is_missing_to_nobody_and_leaves_nothing() {
    for seed in 1..=5_u64 {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let directory = tempfile::tempdir().expect("directory");
        let dirs = dirs(directory.path());
        let (mut memory, mut kept) = ([1; PAGES as usize], BTreeMap::new());
        for number in 0..16 {
            let before = memory;
            for _ in 0..random(&mut state) % 6 {
                memory[(random(&mut state) % PAGES) as usize] = (random(&mut state) % 5) as u8;
            }
            let sent_bytes_max = random(&mut state) % 12 * PAGE_BYTES as u64;
            let (snapshot, _) = take_bounded(&dirs, number, [&before, &memory], sent_bytes_max);
            kept.insert(snapshot, memory);
            // A restore to any of them is where the next one starts.
            if random(&mut state).is_multiple_of(3) {
                let at = (random(&mut state) % kept.len() as u64) as usize;
                memory = *kept.values().nth(at).expect("one of them");
            }
            if random(&mut state).is_multiple_of(2) {
                let at = (random(&mut state) % kept.len() as u64) as usize;
                let gone = kept.keys().nth(at).expect("one of them").clone();
                kept.remove(&gone);
                archive::remove(&dirs, &gone).expect("removed");
            }
            for (snapshot, expected) in &kept {
                assert_eq!(&restore(&dirs, snapshot).expect("whole"), expected, "seed {seed}");
            }
        }
        kept.keys().for_each(|snapshot| archive::remove(&dirs, snapshot).expect("removed"));
        assert_eq!(fs::read_dir(dirs.snapshots()).expect("directory").count(), 0);
    }
}

#[test]
fn a_second_snapshot_holds_only_what_changed() {
    let directory = tempfile::tempdir().expect("directory");
    let dirs = dirs(directory.path());
    let mut memory = [7; PAGES as usize];
    let (_, first) = take(&dirs, 1, &memory, &memory);
    assert_eq!((first.own_bytes, first.shared_bytes), (MEMORY_BYTES, 0));
    // Nothing new: no file of its own.
    let (same, second) = take(&dirs, 2, &memory, &memory);
    assert_eq!((second.own_bytes, second.shared_bytes), (0, MEMORY_BYTES));
    assert!(second.differences.is_empty() && !SnapshotFiles::of(&dirs, &same).memory_file(1).exists());
    memory[3] = 9;
    // A page that came to be as it was leaves nothing behind.
    let mut before = memory;
    before[10] = 8;
    let (_, third) = take(&dirs, 3, &before, &memory);
    assert_eq!((third.own_bytes, third.differences), (PAGE_BYTES as u64, vec![1]));
}

#[test]
fn a_difference_that_a_restore_would_have_to_send_much_of_is_made_a_full_image() {
    let directory = tempfile::tempdir().expect("directory");
    let dirs = dirs(directory.path());
    let two_pages = 2 * PAGE_BYTES as u64;
    let mut memory = [7; PAGES as usize];
    memory[20..].fill(0);
    take(&dirs, 1, &memory, &memory);
    // Two pages new and one that has become zero: one more than is sent.
    memory[3] = 9;
    memory[21] = 9;
    memory[4] = 0;
    let (folded, full) = take_bounded(&dirs, 2, [&memory, &memory], two_pages);
    assert_eq!((full.shared_bytes, full.differences), (0, vec![]));
    assert_eq!(full.own_bytes, 20 * PAGE_BYTES as u64);
    assert_eq!(open(&dirs, &folded).expect("whole").sent_bytes(), 0);
    assert_eq!(restore(&dirs, &folded).expect("whole"), memory);
    memory[5] = 9;
    let (after, next) = take_bounded(&dirs, 3, [&memory, &memory], two_pages);
    assert_eq!((next.own_bytes, next.differences), (PAGE_BYTES as u64, vec![1]));
    assert_eq!(restore(&dirs, &after).expect("whole"), memory);
}

/// Does something to a file of a snapshot that is read-only.
fn harm(path: &Path, how: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).expect("file");
    how(&mut bytes);
    fs::set_permissions(path, Permissions::from_mode(0o600)).expect("mode");
    fs::write(path, bytes).expect("written");
}

#[test]
fn harmed_files_are_refused_with_file_and_place() {
    let page = PAGE_BYTES;
    let after = |fill: u8| {
        let mut memory = [7; PAGES as usize];
        memory[5] = fill;
        memory
    };
    type Harm = fn(&mut Vec<u8>);
    let cut: Harm = |bytes| bytes.truncate(bytes.len() / 2);
    let flip: Harm = |bytes| bytes[5 * PAGE_BYTES + 17] ^= 1;
    let flip_first: Harm = |bytes| bytes[0] ^= 1;
    let place = format!("{:#x}", 5 * page);
    let cases: [(&str, Harm, &str); 6] = [
        ("memory.raw", cut, "expected 98304"),
        ("memory.1.raw", cut, "expected 98304"),
        ("memory.1.raw", flip, &place),
        ("memory.raw", flip_first, "0x0"),
        ("pages.idx", cut, ""),
        ("pages.idx", |bytes| bytes[100] ^= 1, "hash"),
    ];
    for (file, how, named) in cases {
        let directory = tempfile::tempdir().expect("directory");
        let dirs = dirs(directory.path());
        take(&dirs, 1, &after(7), &after(7));
        let (second, _) = take(&dirs, 2, &after(9), &after(9));
        assert_eq!(restore(&dirs, &second).expect("whole"), after(9));
        harm(&dirs.snapshot(&second).join(file), how);
        let words = with_causes(&restore(&dirs, &second).expect_err("harmed"));
        assert!(words.contains(file) && words.contains(named), "{file}: {words}");
    }
    // Another snapshot's files are none of this one's.
    for file in ["memory.raw", "memory.1.raw", "pages.idx"] {
        let directory = tempfile::tempdir().expect("directory");
        let dirs = dirs(directory.path());
        take(&dirs, 1, &after(7), &after(7));
        let (second, _) = take(&dirs, 2, &after(9), &after(9));
        let other = tempfile::tempdir().expect("directory");
        let others = self::dirs(other.path());
        take(&others, 1, &[6; PAGES as usize], &[6; PAGES as usize]);
        let mut memory = [6; PAGES as usize];
        memory[5] = 10;
        let (third, _) = take(&others, 2, &memory, &memory);
        let (from, to) = (others.snapshot(&third).join(file), dirs.snapshot(&second).join(file));
        fs::rename(&from, &to).expect("swapped");
        let words = with_causes(&restore(&dirs, &second).expect_err("swapped"));
        assert!(words.contains(file), "{file}: {words}");
    }
}

#[test]
fn a_manifest_of_more_or_fewer_disks_than_its_vm_has_is_refused() {
    let root = tempfile::tempdir().expect("directory");
    let dirs = dirs(root.path());
    let (snapshot, _) = take(&dirs, 1, &[1; PAGES as usize], &[1; PAGES as usize]);
    let whole = archive::read(&dirs, &snapshot).expect("whole");
    let mut more = whole.clone();
    more.data.push(vec![LayerId::from_entropy([9; 10])]);
    let mut fewer = whole;
    fewer.definition.spec.data_disks_mib.push(64);
    for wrong in [more, fewer] {
        archive::rewrite(&dirs, &wrong).expect("rewritten");
        let found = archive::read(&dirs, &snapshot);
        assert!(matches!(found, Err(ArchiveError::Damaged { .. })), "{found:?}");
    }
}
