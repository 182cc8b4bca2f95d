//! SFTP's packets, version 3: what the servers of OpenSSH and everybody else speak.

use std::io::{self, Read, Write};

/// Longest packet that is taken. The protocol asks servers for 34000 bytes at most.
const PACKET_BYTES_MAX: usize = 256 * 1024;

pub(super) const INIT: u8 = 1;
pub(super) const VERSION: u8 = 2;
pub(super) const OPEN: u8 = 3;
pub(super) const CLOSE: u8 = 4;
pub(super) const READ: u8 = 5;
pub(super) const WRITE: u8 = 6;
pub(super) const OPENDIR: u8 = 11;
pub(super) const READDIR: u8 = 12;
pub(super) const REMOVE: u8 = 13;
pub(super) const MKDIR: u8 = 14;
pub(super) const STAT: u8 = 17;
pub(super) const RENAME: u8 = 18;
pub(super) const EXTENDED: u8 = 200;
pub(super) const STATUS: u8 = 101;
pub(super) const HANDLE: u8 = 102;
pub(super) const DATA: u8 = 103;
pub(super) const NAME: u8 = 104;
pub(super) const ATTRS: u8 = 105;

pub(super) const STATUS_OK: u32 = 0;
pub(super) const STATUS_EOF: u32 = 1;
pub(super) const STATUS_NO_SUCH_FILE: u32 = 2;

const ATTR_SIZE: u32 = 1;
const ATTR_OWNER: u32 = 2;
const ATTR_PERMISSIONS: u32 = 4;
const ATTR_TIMES: u32 = 8;
const ATTR_EXTENDED: u32 = 0x8000_0000;
const TYPE_MASK: u32 = 0o170_000;
const TYPE_DIRECTORY: u32 = 0o040_000;
const TYPE_FILE: u32 = 0o100_000;

/// A packet being put together, with its length and kind in front.
pub(super) struct Packet(Vec<u8>);

impl Packet {
    pub(super) fn new(kind: u8) -> Self {
        Self(vec![0, 0, 0, 0, kind])
    }

    pub(super) fn number(mut self, number: u32) -> Self {
        self.0.extend(number.to_be_bytes());
        self
    }

    pub(super) fn long(mut self, number: u64) -> Self {
        self.0.extend(number.to_be_bytes());
        self
    }

    pub(super) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes());
        self.0.extend(bytes);
        self
    }

    pub(super) fn send(mut self, to: &mut impl Write) -> io::Result<()> {
        let length = u32::try_from(self.0.len() - 4).map_err(io::Error::other)?;
        self.0[..4].copy_from_slice(&length.to_be_bytes());
        to.write_all(&self.0)
    }
}

/// A packet that came: its kind, and what is left to be read of it.
pub(super) struct Answer {
    pub(super) kind: u8,
    body: Vec<u8>,
    at: usize,
}

/// What a file is, as far as it is said.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) bytes: Option<u64>,
    permissions: Option<u32>,
}

impl Attributes {
    pub(super) fn is_directory(self) -> bool {
        self.permissions.is_some_and(|mode| mode & TYPE_MASK == TYPE_DIRECTORY)
    }

    pub(super) fn is_file(self) -> bool {
        self.permissions.is_some_and(|mode| mode & TYPE_MASK == TYPE_FILE)
    }
}

impl Answer {
    pub(super) fn receive(from: &mut impl Read) -> io::Result<Self> {
        let mut length = [0; 4];
        from.read_exact(&mut length)?;
        let length = usize::try_from(u32::from_be_bytes(length)).map_err(io::Error::other)?;
        if length == 0 || length > PACKET_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the answer is none of SFTP's"));
        }
        let mut body = vec![0; length];
        from.read_exact(&mut body)?;
        Ok(Self { kind: body[0], body, at: 1 })
    }

    fn take(&mut self, count: usize) -> io::Result<&[u8]> {
        let end = self.at.checked_add(count).filter(|end| *end <= self.body.len());
        let end =
            end.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "an answer ends too early"))?;
        let taken = &self.body[self.at..end];
        self.at = end;
        Ok(taken)
    }

    pub(super) fn is_at_end(&self) -> bool {
        self.at == self.body.len()
    }

    pub(super) fn number(&mut self) -> io::Result<u32> {
        Ok(u32::from_be_bytes(self.take(4)?.try_into().map_err(io::Error::other)?))
    }

    fn long(&mut self) -> io::Result<u64> {
        Ok(u64::from_be_bytes(self.take(8)?.try_into().map_err(io::Error::other)?))
    }

    pub(super) fn bytes(&mut self) -> io::Result<&[u8]> {
        let count = self.number()?;
        self.take(usize::try_from(count).map_err(io::Error::other)?)
    }

    pub(super) fn text(&mut self) -> io::Result<String> {
        Ok(String::from_utf8_lossy(self.bytes()?).into_owned())
    }

    pub(super) fn attributes(&mut self) -> io::Result<Attributes> {
        let flags = self.number()?;
        let mut found = Attributes::default();
        if flags & ATTR_SIZE != 0 {
            found.bytes = Some(self.long()?);
        }
        if flags & ATTR_OWNER != 0 {
            self.take(8)?;
        }
        if flags & ATTR_PERMISSIONS != 0 {
            found.permissions = Some(self.number()?);
        }
        if flags & ATTR_TIMES != 0 {
            self.take(8)?;
        }
        if flags & ATTR_EXTENDED != 0 {
            for _ in 0..self.number()? {
                self.bytes()?;
                self.bytes()?;
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_is_read_as_it_was_written_and_a_cut_one_is_refused() {
        let mut sent = Vec::new();
        Packet::new(NAME)
            .number(7)
            .bytes(b"name")
            .number(ATTR_SIZE | ATTR_PERMISSIONS)
            .long(5)
            .number(0o100_640)
            .send(&mut sent)
            .expect("sent");
        let mut answer = Answer::receive(&mut sent.as_slice()).expect("received");
        assert_eq!((answer.kind, answer.number().expect("id")), (NAME, 7));
        assert_eq!(answer.text().expect("name"), "name");
        let attributes = answer.attributes().expect("attributes");
        assert_eq!(
            (attributes.bytes, attributes.is_file(), attributes.is_directory()),
            (Some(5), true, false)
        );
        assert!(answer.is_at_end() && answer.number().is_err());
        assert!(Answer::receive(&mut &sent[..sent.len() - 1]).is_err());
        assert!(Answer::receive(&mut [0xff; 8].as_slice()).is_err(), "too long");
    }
}
