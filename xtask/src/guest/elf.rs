//! Reads from ELF files what the image needs to know: which libraries a program needs, what a module depends on.
//!
//! Only 64-bit little-endian files with section headers are understood, which is what distributions ship for the
//! test guest's machine. Everything else, and everything damaged, gives nothing.

/// The bytes of an ELF file.
#[derive(Debug, Clone, Copy)]
pub struct Elf<'a>(&'a [u8]);

const DT_NULL: u64 = 0;
const DT_NEEDED: u64 = 1;

impl<'a> Elf<'a> {
    /// The file, when it is one.
    pub fn new(bytes: &'a [u8]) -> Option<Self> {
        bytes.starts_with(b"\x7fELF\x02\x01").then_some(Self(bytes))
    }

    /// Names of the libraries that the file needs, in its own order.
    pub fn needed(self) -> Vec<&'a str> {
        let (Some(dynamic), Some(strings)) = (self.section(".dynamic"), self.section(".dynstr")) else {
            return Vec::new();
        };
        dynamic
            .chunks_exact(16)
            .map(|entry| (word64(entry, 0).unwrap_or(DT_NULL), word64(entry, 8).unwrap_or(0)))
            .take_while(|(tag, _)| *tag != DT_NULL)
            .filter(|(tag, _)| *tag == DT_NEEDED)
            .filter_map(|(_, at)| text(strings, usize::try_from(at).ok()?))
            .collect()
    }

    /// The program that loads this one, when it is not static.
    pub fn interpreter(self) -> Option<&'a str> {
        text(self.section(".interp")?, 0)
    }

    /// Values of one key in a kernel module's description.
    pub fn module_info(self, key: &str) -> Vec<&'a str> {
        let Some(info) = self.section(".modinfo") else { return Vec::new() };
        info.split(|byte| *byte == 0)
            .filter_map(|entry| std::str::from_utf8(entry).ok()?.split_once('='))
            .filter(|(found, _)| *found == key)
            .map(|(_, value)| value)
            .collect()
    }

    fn section(self, name: &str) -> Option<&'a [u8]> {
        let names = self.section_bytes(usize::from(word16(self.0, 62)?))?;
        (0..usize::from(word16(self.0, 60)?)).find_map(|index| {
            let at = word32(self.header(index)?, 0)? as usize;
            if text(names, at)? == name { self.section_bytes(index) } else { None }
        })
    }

    fn header(self, index: usize) -> Option<&'a [u8]> {
        let size = usize::from(word16(self.0, 58)?);
        let start = usize::try_from(word64(self.0, 40)?).ok()?.checked_add(index.checked_mul(size)?)?;
        self.0.get(start..start.checked_add(size)?)
    }

    fn section_bytes(self, index: usize) -> Option<&'a [u8]> {
        let header = self.header(index)?;
        let start = usize::try_from(word64(header, 24)?).ok()?;
        let length = usize::try_from(word64(header, 32)?).ok()?;
        self.0.get(start..start.checked_add(length)?)
    }
}

fn text(bytes: &[u8], at: usize) -> Option<&str> {
    let rest = bytes.get(at..)?;
    let end = rest.iter().position(|byte| *byte == 0)?;
    std::str::from_utf8(&rest[..end]).ok()
}

fn word16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn word32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn word64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with the given sections and nothing else.
    fn file(sections: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let mut names = vec![0];
        let mut body = vec![0_u8; 64];
        let mut headers = Vec::new();
        let mut add = |body: &mut Vec<u8>, name: usize, content: &[u8]| {
            let mut header = [0; 64];
            header[..4].copy_from_slice(&(name as u32).to_le_bytes());
            header[24..32].copy_from_slice(&(body.len() as u64).to_le_bytes());
            header[32..40].copy_from_slice(&(content.len() as u64).to_le_bytes());
            body.extend_from_slice(content);
            headers.extend_from_slice(&header);
        };
        for (name, content) in sections {
            let at = names.len();
            names.extend_from_slice(name.as_bytes());
            names.push(0);
            add(&mut body, at, content);
        }
        add(&mut body, 0, &names);
        let start = body.len() as u64;
        body.extend_from_slice(&headers);
        body[..6].copy_from_slice(b"\x7fELF\x02\x01");
        body[40..48].copy_from_slice(&start.to_le_bytes());
        body[58..60].copy_from_slice(&64_u16.to_le_bytes());
        body[60..62].copy_from_slice(&(sections.len() as u16 + 1).to_le_bytes());
        body[62..64].copy_from_slice(&(sections.len() as u16).to_le_bytes());
        body
    }

    fn program() -> Vec<u8> {
        let dynamic: Vec<u8> =
            [1_u64, 1, 14, 1, 1, 9, 0, 0, 1, 1].into_iter().flat_map(u64::to_le_bytes).collect();
        file(&[
            (".interp", b"/lib64/ld.so\0".to_vec()),
            (".dynstr", b"\0liba.so\0libb.so\0".to_vec()),
            (".dynamic", dynamic),
        ])
    }

    #[test]
    fn needed_libraries_and_the_interpreter_are_read() {
        let bytes = program();
        let elf = Elf::new(&bytes).expect("an ELF file");
        assert_eq!(elf.needed(), ["liba.so", "libb.so"]);
        assert_eq!(elf.interpreter(), Some("/lib64/ld.so"));
    }

    #[test]
    fn a_modules_dependencies_are_read() {
        let info = b"depends=virtio,virtio_ring\0softdep=pre: crc32c\0xdepends=no\0garbage\0".to_vec();
        let bytes = file(&[(".modinfo", info)]);
        let elf = Elf::new(&bytes).expect("an ELF file");
        assert_eq!(elf.module_info("depends"), ["virtio,virtio_ring"]);
        assert_eq!(elf.module_info("softdep"), ["pre: crc32c"]);
        assert!(elf.needed().is_empty());
    }

    #[test]
    fn damaged_files_give_nothing_and_never_panic() {
        let whole = program();
        for length in 0..whole.len() {
            if let Some(elf) = Elf::new(&whole[..length]) {
                let _ = (elf.needed(), elf.interpreter(), elf.module_info("depends"));
            }
        }
        for at in 6..whole.len() {
            for value in [0, 0x7f, 0xff] {
                let mut damaged = whole.clone();
                damaged[at] = value;
                let elf = Elf::new(&damaged).expect("its magic is whole");
                let _ = (elf.needed(), elf.interpreter(), elf.module_info("depends"));
            }
        }
    }
}
