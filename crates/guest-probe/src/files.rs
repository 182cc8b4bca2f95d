//! Files on the guest's disks that must still be there, unchanged, whatever happened to the guest.
//!
//! A file counts from the moment in which it and its directory were fsynced; then its length and checksum stand
//! in memory, apart from the disk. Verifying drops the kernel's caches first, so that it reads the disk and not
//! a copy in memory. A file also carries its own checksum: a probe that starts on a disk with files adopts those
//! that are intact and counts the others as wrong, so nothing that was acknowledged before a crash goes missing unnoticed.
//!
//! With several directories, one on each disk, they take turns: the files with the numbers from one to the newest are
//! always there, so that disks of two instants show as a gap.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::pattern::{Stream, mix};

const MAGIC: &[u8; 8] = b"berthfil";
const HEAD_BYTES: usize = 32;

/// Most KiB that one file may have.
pub const MOST_FILE_KIB: u32 = 4096;

/// What is known of a file that was acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Acknowledged {
    length: u64,
    checksum: u64,
}

/// What verifying the files found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FilesReport {
    /// Files that must be there.
    pub files: u64,
    /// Files that are missing, cannot be read, or differ.
    pub wrong: u64,
    /// Number of the first of these.
    pub first_wrong: Option<u64>,
}

/// The files of one directory, or of several that take turns.
#[derive(Debug)]
pub struct Files {
    directories: Vec<PathBuf>,
    seed: u64,
    own_kernel: bool,
    acknowledged: BTreeMap<u64, Acknowledged>,
    adopted: u64,
}

/// Checksum of some bytes; it finds accidents, and need not withstand an attacker.
pub fn checksum(bytes: &[u8]) -> u64 {
    let mut sum = mix(bytes.len() as u64);
    for chunk in bytes.chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        sum = mix(sum ^ u64::from_le_bytes(word)).wrapping_add(0x9e37_79b9_7f4a_7c15);
    }
    sum
}

impl Files {
    /// Opens the directories, one at least, makes them when they are missing, and adopts the files that are in them. With `own_kernel`
    /// the probe may tell the kernel to drop its caches, which it must not do to anything but its own guest.
    ///
    /// # Errors
    /// When a directory can't be made or read, or there is none.
    pub fn open(directories: &[PathBuf], seed: u64, own_kernel: bool) -> io::Result<Self> {
        if directories.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "no directory for files"));
        }
        let mut found = Vec::new();
        for directory in directories {
            fs::create_dir_all(directory)?;
            for entry in fs::read_dir(directory)? {
                found.extend(entry?.file_name().to_str().and_then(number_of));
            }
        }
        let (directories, acknowledged) = (directories.to_vec(), BTreeMap::new());
        let mut files = Self { directories, seed, own_kernel, acknowledged, adopted: 0 };
        for number in found {
            // A file that is not intact gets an entry that nothing can match: it stays wrong.
            let found = files.read(number).ok().and_then(|bytes| intact(&bytes, number));
            files
                .acknowledged
                .insert(number, found.unwrap_or(Acknowledged { length: u64::MAX, checksum: 0 }));
            files.adopted += 1;
        }
        Ok(files)
    }

    /// Number of files that must be there.
    pub fn count(&self) -> u64 {
        self.acknowledged.len() as u64
    }

    /// Number of files that were there when the directory was opened.
    pub fn adopted(&self) -> u64 {
        self.adopted
    }

    /// Writes so many new files of so many KiB, each durable before the next begins.
    ///
    /// # Errors
    /// When the disk refuses; the files written before stay acknowledged.
    pub fn write(&mut self, count: u32, kib: u32) -> io::Result<()> {
        for _ in 0..count {
            let number = self.acknowledged.last_key_value().map_or(1, |(number, _)| number + 1);
            let bytes = content(self.seed, number, kib as usize * 1024);
            let known = Acknowledged { length: bytes.len() as u64, checksum: checksum(&bytes) };
            self.write_durably(number, &bytes)?;
            self.acknowledged.insert(number, known);
        }
        Ok(())
    }

    /// Reads every file from the disk and compares.
    pub fn verify(&self) -> FilesReport {
        if self.own_kernel {
            // Where the kernel refuses, comparing with its cached copy is all that can be had.
            let _ = fs::write("/proc/sys/vm/drop_caches", "1");
        }
        let mut report = FilesReport { files: self.count(), ..FilesReport::default() };
        for (number, known) in &self.acknowledged {
            let right = self
                .read(*number)
                .is_ok_and(|bytes| bytes.len() as u64 == known.length && checksum(&bytes) == known.checksum);
            if !right {
                report.wrong += 1;
                report.first_wrong.get_or_insert(*number);
            }
        }
        report
    }

    /// Deletes the directories with all that is in them, durably, and goes on expecting the files.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn destroy(&self) -> io::Result<()> {
        self.directories.iter().try_for_each(|directory| {
            fs::remove_dir_all(directory)?;
            directory.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
        })
    }

    /// The directory whose turn it is.
    fn directory(&self, number: u64) -> &Path {
        let turn = number % self.directories.len() as u64;
        &self.directories[usize::try_from(turn).unwrap_or_default()]
    }

    fn path(&self, number: u64) -> PathBuf {
        self.directory(number).join(format!("file-{number:08}"))
    }

    fn read(&self, number: u64) -> io::Result<Vec<u8>> {
        fs::read(self.path(number))
    }

    fn write_durably(&self, number: u64, bytes: &[u8]) -> io::Result<()> {
        let unfinished = self.directory(number).join("unfinished");
        let mut file = File::create(&unfinished)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&unfinished, self.path(number))?;
        File::open(self.directory(number))?.sync_all()
    }
}

fn number_of(name: &str) -> Option<u64> {
    name.strip_prefix("file-")?.parse().ok()
}

/// A file's bytes: magic, number, length and checksum of the body, then the body.
fn content(seed: u64, number: u64, body_bytes: usize) -> Vec<u8> {
    let mut stream = Stream::new(seed, number, 0);
    let mut bytes = vec![0; HEAD_BYTES];
    while bytes.len() < HEAD_BYTES + body_bytes {
        bytes.extend_from_slice(&stream.next_word().to_le_bytes());
    }
    bytes.truncate(HEAD_BYTES + body_bytes);
    let sum = checksum(&bytes[HEAD_BYTES..]);
    bytes[..8].copy_from_slice(MAGIC);
    for (index, word) in [number, body_bytes as u64, sum].into_iter().enumerate() {
        bytes[8 + index * 8..16 + index * 8].copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

fn intact(bytes: &[u8], number: u64) -> Option<Acknowledged> {
    let (head, body) = bytes.split_at_checked(HEAD_BYTES)?;
    let word = |at: usize| head[at..at + 8].try_into().map(u64::from_le_bytes).ok();
    let right = head.starts_with(MAGIC)
        && word(8)? == number
        && word(16)? == body.len() as u64
        && word(24)? == checksum(body);
    right.then(|| Acknowledged { length: bytes.len() as u64, checksum: checksum(bytes) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened() -> (tempfile::TempDir, Files) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut files = Files::open(&[dir.path().join("files")], 5, false).expect("an empty directory opens");
        files.write(3, 2).expect("writing works");
        (dir, files)
    }

    #[test]
    fn a_changed_a_shortened_and_a_missing_file_are_each_wrong() {
        let (_dir, files) = opened();
        assert_eq!(files.verify(), FilesReport { files: 3, wrong: 0, first_wrong: None });
        let mut bytes = files.read(2).unwrap();
        bytes[1000] ^= 1;
        fs::write(files.path(2), &bytes).unwrap();
        assert_eq!(files.verify(), FilesReport { files: 3, wrong: 1, first_wrong: Some(2) });
        File::options().write(true).open(files.path(3)).unwrap().set_len(100).unwrap();
        assert_eq!(files.verify().wrong, 2);
        fs::remove_file(files.path(1)).unwrap();
        assert_eq!(files.verify(), FilesReport { files: 3, wrong: 3, first_wrong: Some(1) });
    }

    #[test]
    fn a_destroyed_directory_makes_every_file_wrong_and_refuses_new_ones() {
        let (_dir, mut files) = opened();
        files.destroy().unwrap();
        assert_eq!(files.verify().wrong, 3);
        assert!(files.write(1, 1).is_err());
        assert_eq!(files.count(), 3);
        assert!(files.destroy().is_err());
    }

    #[test]
    fn directories_take_turns_and_a_file_that_is_missing_in_either_is_wrong() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let both = [dir.path().join("one"), dir.path().join("other")];
        let mut files = Files::open(&both, 5, false).expect("empty directories open");
        files.write(5, 1).expect("writing works");
        let count = |directory: &PathBuf| fs::read_dir(directory).unwrap().count();
        assert_eq!((count(&both[0]), count(&both[1])), (2, 3));
        assert_eq!(Files::open(&both, 6, false).unwrap().adopted(), 5);
        fs::remove_file(both[1].join("file-00000003")).unwrap();
        assert_eq!(files.verify(), FilesReport { files: 5, wrong: 1, first_wrong: Some(3) });
        files.destroy().unwrap();
        assert_eq!(files.verify().wrong, 5);
        assert!(Files::open(&[], 5, false).is_err());
    }

    #[test]
    fn a_new_start_adopts_what_is_intact_and_condemns_the_rest() {
        let (dir, files) = opened();
        fs::write(files.path(2), b"short").unwrap();
        fs::write(dir.path().join("files/file-nonsense"), b"not ours").unwrap();
        fs::write(dir.path().join("files/unfinished"), b"never acknowledged").unwrap();
        let mut again = Files::open(&[dir.path().join("files")], 6, false).unwrap();
        assert_eq!((again.count(), again.adopted()), (3, 3));
        again.write(1, 1).unwrap();
        assert_eq!(again.verify(), FilesReport { files: 4, wrong: 1, first_wrong: Some(2) });
    }
}
