//! Writes cpio archives in the "newc" form, which is what the kernel unpacks as its initial ramdisk.
//!
//! The archive is left uncompressed: handing it to the guest costs nothing, unpacking it under emulation would.
//! Times and inode numbers are fixed, so that the same content is the same archive.

/// An archive that grows in memory.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

impl Archive {
    /// Adds a directory; its parents must be there before it.
    pub fn directory(&mut self, path: &str) {
        self.entry(path, DIRECTORY | 0o755, 2, (0, 0), &[]);
    }

    /// Adds a file that everyone may run.
    pub fn program(&mut self, path: &str, content: &[u8]) {
        self.entry(path, REGULAR | 0o755, 1, (0, 0), content);
    }

    /// Adds a file that everyone may read.
    pub fn file(&mut self, path: &str, content: &[u8]) {
        self.entry(path, REGULAR | 0o644, 1, (0, 0), content);
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: &str, to: &str) {
        self.entry(path, SYMLINK | 0o777, 1, (0, 0), to.as_bytes());
    }

    /// Adds a character device.
    pub fn character_device(&mut self, path: &str, major: u32, minor: u32) {
        self.entry(path, CHARACTER | 0o600, 1, (major, minor), &[]);
    }

    /// The finished archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entries = 0;
        self.entry("TRAILER!!!", 0, 1, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, links: u32, device: (u32, u32), content: &[u8]) {
        let length = u32::try_from(content.len()).expect("nothing in a test guest has 4 GiB");
        let name_length = path.len() as u32 + 1;
        let (user, group, time, checksum) = (0, 0, 0, 0);
        let fields = [
            self.entries,
            mode,
            user,
            group,
            links,
            time,
            length,
            0,
            0,
            device.0,
            device.1,
            name_length,
            checksum,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        self.entries += 1;
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads an archive back: path, mode, content.
    fn read(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut found = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |index: usize| {
                let at = 6 + index * 8;
                u32::from_str_radix(std::str::from_utf8(&bytes[at..at + 8]).unwrap(), 16).unwrap()
            };
            let (mode, length, name) = (field(1), field(6) as usize, field(11) as usize);
            let start = (110 + name).next_multiple_of(4);
            let path = String::from_utf8(bytes[110..110 + name - 1].to_vec()).unwrap();
            assert_eq!(bytes[110 + name - 1], 0);
            if path == "TRAILER!!!" {
                assert_eq!(bytes.len(), start);
                return found;
            }
            found.push((path, mode, bytes[start..start + length].to_vec()));
            bytes = &bytes[(start + length).next_multiple_of(4)..];
        }
    }

    #[test]
    fn what_is_written_can_be_read_back_at_every_alignment() {
        let mut archive = Archive::default();
        archive.directory("bin");
        for length in 0..9 {
            archive.program(&format!("bin/{}", "x".repeat(length + 1)), &vec![7; length]);
        }
        archive.symlink("bin/sh", "busybox");
        archive.character_device("console", 5, 1);
        let entries = read(&archive.finish());
        assert_eq!(entries.len(), 12);
        assert_eq!(entries[0], ("bin".into(), 0o040_755, vec![]));
        for (length, entry) in entries[1..10].iter().enumerate() {
            assert_eq!(*entry, (format!("bin/{}", "x".repeat(length + 1)), 0o100_755, vec![7; length]));
        }
        assert_eq!(entries[10], ("bin/sh".into(), 0o120_777, b"busybox".to_vec()));
        assert_eq!(entries[11].1, 0o020_600);
    }

    #[test]
    fn the_same_content_is_the_same_archive() {
        let make = || {
            let mut archive = Archive::default();
            archive.file("etc", b"text");
            archive.finish()
        };
        assert_eq!(make(), make());
    }
}
