//! What a page of the probe's memory must hold.
//!
//! A page starts with four words that say whose it is (number, seed), from which generation its body is (base)
//! and which generation it has reached (stamp: the generation and a check of it). The body is a pseudo-random
//! stream of (seed, number, base), so nothing in it can be guessed from a neighbour or from an older version.
//! Rewriting a page *wholly* renews everything; rewriting a *word* renews the stamp alone, as a guest does that
//! updates counters. A page can therefore be judged from its own bytes and the expected generation alone, and
//! a page that is intact but old is told from one that is damaged.

/// Size of a page in bytes.
pub const PAGE_BYTES: usize = 4096;

/// Number of 64-bit words in a page.
pub const PAGE_WORDS: usize = PAGE_BYTES / 8;

const NUMBER: usize = 0;
const SEED: usize = 1;
const BASE: usize = 2;
const STAMP: usize = 3;
const BODY: usize = 4;

/// Keeps a page of number 0 from starting with a zero word.
const MAGIC: u64 = 0xbe27_4000_0000_0000;

/// One page of memory, aligned as the machine's pages are, so that writing it dirties one page and not two.
#[derive(Clone)]
#[repr(C, align(4096))]
pub struct Page(pub [u64; PAGE_WORDS]);

impl Page {
    /// A page as the kernel hands it out.
    pub const ZERO: Self = Self([0; PAGE_WORDS]);
}

/// Which page this is: the probe's seed and the page's number in the area.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageId {
    /// Seed of the whole area.
    pub seed: u64,
    /// Number of the page, from 0.
    pub number: u64,
}

/// Which content a page is expected to have; kept apart from the page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// How often the page was written, 1 after the first fill.
    pub generation: u32,
    /// Generation in which the whole page was last rewritten.
    pub base: u32,
}

/// What a look at a page found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Exactly the expected content.
    Right,
    /// Intact content of another generation than the expected one.
    Stale,
    /// Nothing but zeros.
    Lost,
    /// Anything else.
    Wrong,
}

/// Mixes a word so that neighbouring inputs give unrelated outputs.
pub fn mix(mut word: u64) -> u64 {
    word ^= word >> 32;
    word = word.wrapping_mul(0xd6e8_feb8_6659_fd93);
    word ^= word >> 32;
    word = word.wrapping_mul(0xd6e8_feb8_6659_fd93);
    word ^ (word >> 32)
}

/// A cheap pseudo-random stream: it has to be fast under emulation and look random to a compressor.
#[derive(Debug, Clone)]
pub struct Stream(u64);

impl Stream {
    /// The stream that belongs to three numbers.
    pub fn new(seed: u64, number: u64, generation: u64) -> Self {
        Self(mix(seed ^ mix(number ^ mix(generation.wrapping_add(1)))))
    }

    /// The next word.
    #[inline]
    pub fn next_word(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        self.0 ^ (self.0 >> 29)
    }
}

fn stamp(id: PageId, generation: u32) -> u64 {
    let check = mix(id.seed ^ mix(id.number ^ (u64::from(generation) << 32))) & 0xffff_ffff;
    (u64::from(generation) << 32) | check
}

/// Writes the whole page anew with the content of `generation`.
pub fn write_whole(page: &mut Page, id: PageId, generation: u32) -> Expected {
    let mut stream = Stream::new(id.seed, id.number, u64::from(generation));
    for word in &mut page.0[BODY..] {
        *word = stream.next_word();
    }
    page.0[NUMBER] = id.number ^ MAGIC;
    page.0[SEED] = id.seed;
    page.0[BASE] = u64::from(generation);
    page.0[STAMP] = stamp(id, generation);
    Expected { generation, base: generation }
}

/// Writes one word of the page, its stamp, and leaves the body of the generation `base` as it is.
pub fn write_word(page: &mut Page, id: PageId, generation: u32, base: u32) -> Expected {
    page.0[STAMP] = stamp(id, generation);
    Expected { generation, base }
}

/// Judges a page.
pub fn judge(page: &Page, id: PageId, expected: Expected) -> Verdict {
    if holds(page, id, expected) {
        return Verdict::Right;
    }
    if page.0.iter().all(|word| *word == 0) {
        return Verdict::Lost;
    }
    let generation = (page.0[STAMP] >> 32) as u32;
    let found = Expected { generation, base: page.0[BASE] as u32 };
    if holds(page, id, found) { Verdict::Stale } else { Verdict::Wrong }
}

fn holds(page: &Page, id: PageId, expected: Expected) -> bool {
    if page.0[NUMBER] != id.number ^ MAGIC
        || page.0[SEED] != id.seed
        || page.0[BASE] != u64::from(expected.base)
        || page.0[STAMP] != stamp(id, expected.generation)
    {
        return false;
    }
    let mut stream = Stream::new(id.seed, id.number, u64::from(expected.base));
    page.0[BODY..].iter().all(|word| *word == stream.next_word())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: PageId = PageId { seed: 0x1234_5678, number: 7 };

    fn filled() -> (Page, Expected) {
        let mut page = Page::ZERO;
        let expected = write_whole(&mut page, ID, 1);
        (page, expected)
    }

    #[test]
    fn what_was_written_is_right_in_both_patterns() {
        let (mut page, expected) = filled();
        assert_eq!(judge(&page, ID, expected), Verdict::Right);
        let expected = write_word(&mut page, ID, 2, expected.base);
        assert_eq!(judge(&page, ID, expected), Verdict::Right);
        let expected = write_whole(&mut page, ID, 3);
        assert_eq!(judge(&page, ID, expected), Verdict::Right);
    }

    #[test]
    fn any_single_flipped_bit_makes_a_page_wrong() {
        let (page, expected) = filled();
        for bit in (0..PAGE_BYTES * 8).step_by(61) {
            let mut damaged = page.clone();
            damaged.0[bit / 64] ^= 1 << (bit % 64);
            assert_ne!(judge(&damaged, ID, expected), Verdict::Right, "bit {bit}");
        }
    }

    #[test]
    fn old_lost_and_foreign_pages_are_told_apart() {
        let (old, expected) = filled();
        let mut page = old.clone();
        let by_word = write_word(&mut page, ID, 2, expected.base);
        let by_word_page = page.clone();
        let whole = write_whole(&mut page, ID, 3);
        assert_eq!(judge(&old, ID, by_word), Verdict::Stale);
        assert_eq!(judge(&by_word_page, ID, whole), Verdict::Stale);
        assert_eq!(judge(&Page::ZERO, ID, whole), Verdict::Lost);
        let mut foreign = Page::ZERO;
        write_whole(&mut foreign, PageId { number: 8, ..ID }, 3);
        assert_eq!(judge(&foreign, ID, whole), Verdict::Wrong);
        write_whole(&mut foreign, PageId { seed: 1, ..ID }, 3);
        assert_eq!(judge(&foreign, ID, whole), Verdict::Wrong);
    }

    #[test]
    fn a_torn_page_of_two_generations_is_wrong() {
        let (old, _) = filled();
        let mut page = Page::ZERO;
        let expected = write_whole(&mut page, ID, 2);
        page.0[256..].copy_from_slice(&old.0[256..]);
        assert_eq!(judge(&page, ID, expected), Verdict::Wrong);
    }
}
