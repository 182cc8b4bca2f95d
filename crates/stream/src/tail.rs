//! What comes after memory: device state, passed through unread.
//!
//! Since device sections carry no length, their end cannot be seen; yet a stream that lost its end must not be taken
//! for a whole one. QEMU ends a stream with a zero byte and a description: type, be32 length, JSON text. JSON has no
//! zero bytes, so the last zero byte that is followed by such a head is the real one, and the stream is whole when
//! it ends exactly where that description ends. A post-copy stream has sent its devices before and ends with the
//! zero byte alone.

use crate::record::{DESCRIPTION, END_OF_STREAM};

/// End mark, description's type, its length, its first character.
const MARK_BYTES: usize = 7;

/// Watches the tail go by.
#[derive(Debug, Default)]
pub(crate) struct Tail {
    length: u64,
    /// The last bytes seen, as a shift register.
    recent: u64,
    /// Where the last description that was seen to begin must end.
    described_end: Option<u64>,
}

impl Tail {
    pub(crate) fn pass(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.length += 1;
            self.recent = self.recent << 8 | u64::from(byte);
            if byte == b'{' && self.length >= MARK_BYTES as u64 && self.mark_matches() {
                let described = (self.recent >> 8) & 0xffff_ffff;
                // The first character is part of the description.
                self.described_end = Some(self.length - 1 + described);
            }
        }
    }

    fn mark_matches(&self) -> bool {
        let mark = (self.recent >> 40) & 0xffff;
        mark == u64::from(END_OF_STREAM) << 8 | u64::from(DESCRIPTION)
    }

    /// Whether a stream that ends here is whole.
    pub(crate) fn is_whole(&self) -> bool {
        let last = (self.recent & 0xff) as u8;
        let only_end_mark = self.length == 1 && last == END_OF_STREAM;
        only_end_mark || (self.described_end == Some(self.length) && last == b'}')
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(bytes: &[u8]) -> bool {
        let mut tail = Tail::default();
        bytes.iter().for_each(|byte| tail.pass(std::slice::from_ref(byte)));
        let mut at_once = Tail::default();
        at_once.pass(bytes);
        assert_eq!(tail.is_whole(), at_once.is_whole());
        at_once.is_whole()
    }

    #[test]
    fn only_a_tail_with_its_whole_description_is_whole() {
        let good = b"\x04state\x00\x06\x00\x00\x00\x02\x7bstate\x00\x06\x00\x00\x00\x07{\"a\":1}";
        assert!(whole(good));
        for length in 0..good.len() {
            assert!(!whole(&good[..length]), "cut at {length}");
        }
        assert!(!whole(&[good.as_slice(), b"x"].concat()));
        assert!(whole(b"\x00"));
        assert!(!whole(b"\x00\x00"));
    }
}
