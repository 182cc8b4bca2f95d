//! What a restored guest needs first, remembered beside its snapshot and read ahead at the next restore.
//!
//! A restored guest's memory is a file that is read where it is touched. When the file is not in the host's memory, each
//! first touch waits for the disk, one after the other. But guests that go on from the same instant need much the same:
//! so some seconds after a restore the kernel is asked which pages the process has, and the next restore asks for those
//! ahead, many at once, while QEMU is still coming up. It is a hint and nothing else: without it, or with a wrong one,
//! everything is right and merely slower.
//!
//! The file is a list of ranges, each two numbers of 32 bits, little endian: first page, number of pages.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};

use berth_model::Problem;
use rustix::fs::{Advice, fadvise};

use super::archive::SnapshotFiles;
use crate::durable::{self, FileError, blocking};

const PAGE_BYTES: u64 = 4096;
/// Pages between two ranges that are read with them: one request instead of two.
const GAP_PAGES: u32 = 16;
/// Longest file that is believed, in bytes: 64 Ki ranges.
const FILE_BYTES_MAX: u64 = 512 << 10;
/// The most that is read ahead, in bytes. A guest that touched everything in its first seconds would otherwise have all
/// of its memory read, in competition with itself.
const READ_AHEAD_BYTES_MAX: u64 = 512 << 20;
/// In an entry of the kernel's page map: the page is there.
const PRESENT: u64 = 1 << 63;

/// A range of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    first: u32,
    pages: u32,
}

fn path(files: &SnapshotFiles) -> PathBuf {
    files.directory().join("working-set.bin")
}

/// Begins to read ahead what earlier guests needed first; gives, once it has been asked for, how much that is in bytes.
pub fn read_ahead(files: &SnapshotFiles) -> impl Future<Output = u64> + use<> {
    let (list, memory) = (path(files), files.memory());
    let asked = tokio::task::spawn_blocking(move || ask_ahead(&list, &memory).unwrap_or(0));
    async { asked.await.unwrap_or(0) }
}

fn ask_ahead(list: &Path, memory: &Path) -> std::io::Result<u64> {
    let Ok(mut list) = File::open(list) else { return Ok(0) };
    let mut bytes = Vec::new();
    Read::by_ref(&mut list).take(FILE_BYTES_MAX).read_to_end(&mut bytes)?;
    let memory = File::open(memory)?;
    let mut asked = 0;
    for range in decode(&bytes) {
        let (offset, length) = (u64::from(range.first) * PAGE_BYTES, u64::from(range.pages) * PAGE_BYTES);
        if asked + length > READ_AHEAD_BYTES_MAX {
            break;
        }
        fadvise(&memory, offset, NonZeroU64::new(length), Advice::WillNeed)?;
        asked += length;
    }
    Ok(asked)
}

/// Remembers which pages of its memory image a process has now.
///
/// # Errors
/// When the kernel does not tell, or the file can't be written.
pub async fn remember(pid: i32, files: &SnapshotFiles) -> Result<(), Problem> {
    let (list, memory) = (path(files), files.memory());
    blocking(move || {
        let process = PathBuf::from(format!("/proc/{pid}"));
        let ranges = present(&process, &memory).map_err(FileError::io(&process, "examined"))?;
        Ok(durable::write(&list, &encode(&ranges), 0o600)?)
    })
    .await
}

/// How many pages of its memory image a process has; 0 when the kernel does not tell.
pub async fn pages_present(pid: i32, memory: PathBuf) -> u64 {
    let counted = blocking(move || {
        let process = PathBuf::from(format!("/proc/{pid}"));
        Ok(resident(&process, &memory).map_err(FileError::io(&process, "examined"))?)
    });
    counted.await.unwrap_or(0)
}

/// The pages of `memory` that a process has mapped and touched.
fn present(process: &Path, memory: &Path) -> std::io::Result<Vec<Range>> {
    let mut map = File::open(process.join("pagemap"))?;
    let mut ranges: Vec<Range> = Vec::new();
    for mapping in mappings(process, memory)? {
        map.seek(SeekFrom::Start(mapping.start / PAGE_BYTES * 8))?;
        let pages = (mapping.end - mapping.start) / PAGE_BYTES;
        let mut entries = BufReader::with_capacity(1 << 20, Read::by_ref(&mut map).take(pages * 8));
        let mut entry = [0; 8];
        for page in mapping.offset / PAGE_BYTES..mapping.offset / PAGE_BYTES + pages {
            entries.read_exact(&mut entry)?;
            if u64::from_le_bytes(entry) & PRESENT != 0
                && let Ok(page) = u32::try_from(page)
            {
                add(&mut ranges, page);
            }
        }
    }
    Ok(ranges)
}

fn add(ranges: &mut Vec<Range>, page: u32) {
    match ranges.last_mut() {
        Some(last) if page >= last.first && page - last.first <= last.pages + GAP_PAGES => {
            last.pages = page - last.first + 1;
        }
        _ => ranges.push(Range { first: page, pages: 1 }),
    }
}

/// Where a process has a part of a file, and which.
struct Mapping {
    start: u64,
    end: u64,
    offset: u64,
}

fn mappings(process: &Path, file: &Path) -> std::io::Result<Vec<Mapping>> {
    let mut found = Vec::new();
    for line in BufReader::new(File::open(process.join("maps"))?).lines() {
        found.extend(mapping(&line?, file));
    }
    Ok(found)
}

/// A line such as `7f00-7f80 rw-p 00001000 fd:00 42   /a/memory.raw`, if it is about this file.
fn mapping(line: &str, file: &Path) -> Option<Mapping> {
    let rest = line.strip_suffix(file.to_str()?)?;
    let mut words = rest.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some(Mapping { start: number(start)?, end: number(end)?, offset: number(words.nth(1)?)? })
}

fn resident(process: &Path, memory: &Path) -> std::io::Result<u64> {
    let (mut ours, mut pages) = (false, 0);
    for line in BufReader::new(File::open(process.join("smaps"))?).lines() {
        let line = line?;
        // The head of a mapping begins with its address, everything about it with a capital.
        if line.starts_with(|first: char| first.is_ascii_hexdigit() && !first.is_ascii_uppercase()) {
            ours = mapping(&line, memory).is_some();
        } else if ours && let Some(size) = line.strip_prefix("Rss:") {
            let kib: u64 = size.trim().trim_end_matches(" kB").parse().unwrap_or(0);
            pages += kib * 1024 / PAGE_BYTES;
        }
    }
    Ok(pages)
}

fn encode(ranges: &[Range]) -> Vec<u8> {
    ranges.iter().flat_map(|range| [range.first.to_le_bytes(), range.pages.to_le_bytes()]).flatten().collect()
}

fn decode(bytes: &[u8]) -> impl Iterator<Item = Range> {
    let (entries, _) = bytes.as_chunks::<8>();
    entries.iter().map(|entry| {
        let number = |at: usize| u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]);
        Range { first: number(0), pages: number(4) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_become_one_range_and_read_back() {
        let mut ranges = Vec::new();
        for page in [3, 4, 5, 5 + GAP_PAGES, 1000, 90_000] {
            add(&mut ranges, page);
        }
        let expected = [(3, 3 + GAP_PAGES), (1000, 1), (90_000, 1)];
        let found: Vec<(u32, u32)> = ranges.iter().map(|range| (range.first, range.pages)).collect();
        assert_eq!(found, expected);
        assert_eq!(decode(&encode(&ranges)).collect::<Vec<_>>(), ranges);
    }

    #[test]
    fn a_list_that_is_nonsense_asks_for_nothing_that_could_harm() {
        let directory = tempfile::tempdir().expect("directory");
        let (list, memory) = (directory.path().join("list"), directory.path().join("memory"));
        std::fs::write(&memory, [1; 8192]).expect("memory");
        std::fs::write(&list, [0xff; 100]).expect("list");
        assert_eq!(ask_ahead(&list, &memory).expect("asked"), 0, "more than is ever read ahead");
        std::fs::write(&list, encode(&[Range { first: 1, pages: 1 }])).expect("list");
        assert_eq!(ask_ahead(&list, &memory).expect("asked"), 4096);
        std::fs::remove_file(&list).expect("removed");
        assert_eq!(ask_ahead(&list, &memory).expect("asked"), 0);
    }

    #[test]
    fn what_this_process_has_touched_of_a_file_is_found() {
        let line = "7f0000000000-7f0000004000 rw-p 00002000 fd:00 42     /a b/memory.raw";
        let found = mapping(line, Path::new("/a b/memory.raw")).expect("it is of this file");
        assert_eq!((found.end - found.start, found.offset), (0x4000, 0x2000));
        assert!(mapping(line, Path::new("/other/memory.raw")).is_none());
        let binary = std::fs::read_link("/proc/self/exe").expect("binary");
        let process = Path::new("/proc/self");
        assert!(resident(process, &binary).expect("read") > 0);
        assert!(!present(process, &binary).expect("read").is_empty(), "this program runs");
    }
}
