//! A hash for each page of a memory image: what a target already holds need not be sent to it.
//!
//! Hashes are 128 bits of keyed BLAKE3. Half of BLAKE3's length halves the index (4 MiB for each GiB of memory), and the
//! key makes up for it: whoever wants two pages with one hash, to have one taken for the other, would have to know
//! the key, which never reaches a guest. Indexes that are to be compared must have the same key, so there is one for a VM.
//!
//! An index lies in memory exactly as in its file: a head (magic, page size, number of pages, key), the hashes, and a
//! BLAKE3 hash over all of it, so that a damaged index is refused rather than believed.

use crate::{PAGE_BYTES, Page};

const MAGIC: &[u8; 8] = b"BERTHPI1";
const HASH_BYTES: usize = 16;
const KEY_BYTES: usize = 32;
const CHECK_BYTES: usize = 32;
/// Magic, be32 page size, four unused bytes, be64 number of pages, key.
const HEAD_BYTES: usize = 8 + 4 + 4 + 8 + KEY_BYTES;

/// A page's hash, or the mark of a zero page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageHash([u8; HASH_BYTES]);

impl PageHash {
    /// Stands for a page of zeros, which is never hashed.
    pub const ZERO: Self = Self([0; HASH_BYTES]);

    /// The hash as bytes, to be sent.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; HASH_BYTES] {
        &self.0
    }

    /// A hash that was sent.
    #[must_use]
    pub fn from_bytes(bytes: [u8; HASH_BYTES]) -> Self {
        Self(bytes)
    }
}

/// Hashes pages under one key.
#[derive(Clone)]
pub struct PageHasher {
    key: [u8; KEY_BYTES],
}

impl std::fmt::Debug for PageHasher {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("PageHasher")
    }
}

impl PageHasher {
    /// A hasher with this key, 32 random bytes.
    #[must_use]
    pub fn new(key: [u8; KEY_BYTES]) -> Self {
        Self { key }
    }

    /// A page's hash; [`PageHash::ZERO`] for a page of zeros.
    #[must_use]
    pub fn hash_page(&self, page: &Page) -> PageHash {
        if *page == [0; PAGE_BYTES] {
            return PageHash::ZERO;
        }
        let hash = blake3::keyed_hash(&self.key, page);
        let (short, _) = hash.as_bytes().split_first_chunk().expect("BLAKE3 has 32 bytes");
        PageHash(*short)
    }
}

/// Why bytes are not an index.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PageIndexError {
    /// They do not begin as one.
    #[error("not a page index")]
    Magic,
    /// It is of pages of another size.
    #[error("page size {found}, expected 4096")]
    PageSize {
        /// What it says.
        found: u32,
    },
    /// Its length does not fit the number of pages it speaks of.
    #[error("{found} bytes, expected {expected} for {pages} pages")]
    Length {
        /// The pages it speaks of.
        pages: u64,
        /// The length that would fit; the largest number there is when that is larger still.
        expected: u64,
        /// Its length.
        found: u64,
    },
    /// It was changed or damaged.
    #[error("content does not match its hash")]
    Damaged,
}

/// The hashes of all pages of a memory image. `B` holds the bytes: a vector, or a mapped file.
#[derive(Clone)]
pub struct PageIndex<B = Vec<u8>> {
    bytes: B,
    pages: u64,
}

impl<B: AsRef<[u8]>> std::fmt::Debug for PageIndex<B> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("PageIndex").field("pages", &self.pages).finish_non_exhaustive()
    }
}

impl<B: AsRef<[u8]>> PageIndex<B> {
    /// Takes the bytes of an index, checked to the last.
    ///
    /// # Errors
    /// [`PageIndexError`].
    pub fn open(bytes: B) -> Result<Self, PageIndexError> {
        let all = bytes.as_ref();
        let found = all.len() as u64;
        if all.len() < HEAD_BYTES + CHECK_BYTES || &all[..8] != MAGIC {
            return Err(PageIndexError::Magic);
        }
        let page_size = u32::from_be_bytes(all[8..12].try_into().expect("four bytes"));
        if page_size as usize != PAGE_BYTES {
            return Err(PageIndexError::PageSize { found: page_size });
        }
        let pages = u64::from_be_bytes(all[16..24].try_into().expect("eight bytes"));
        let frame = (HEAD_BYTES + CHECK_BYTES) as u64;
        let expected = pages.saturating_mul(HASH_BYTES as u64).saturating_add(frame);
        if found != expected {
            return Err(PageIndexError::Length { pages, expected, found });
        }
        let (content, check) = all.split_at(all.len() - CHECK_BYTES);
        if blake3::hash(content).as_bytes() != check {
            return Err(PageIndexError::Damaged);
        }
        Ok(Self { bytes, pages })
    }

    /// The bytes, to be kept in a file.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.as_ref()
    }

    /// How many pages it has.
    #[must_use]
    pub fn page_count(&self) -> u64 {
        self.pages
    }

    /// The hash of a page, by its number; `None` beyond the end.
    #[must_use]
    pub fn get(&self, page: u64) -> Option<PageHash> {
        if page >= self.pages {
            return None;
        }
        let start = HEAD_BYTES + usize::try_from(page).ok()? * HASH_BYTES;
        let hash = self.bytes.as_ref().get(start..start + HASH_BYTES)?;
        Some(PageHash(hash.try_into().ok()?))
    }

    /// All hashes, in order.
    pub fn iter(&self) -> impl Iterator<Item = PageHash> {
        let all = self.bytes.as_ref();
        let (hashes, _) = all[HEAD_BYTES..all.len() - CHECK_BYTES].as_chunks();
        hashes.iter().copied().map(PageHash)
    }

    /// A hasher whose hashes can be compared with these.
    #[must_use]
    pub fn hasher(&self) -> PageHasher {
        let key = &self.bytes.as_ref()[HEAD_BYTES - KEY_BYTES..HEAD_BYTES];
        PageHasher::new(key.try_into().expect("a key's length"))
    }
}

/// An index in the making; every page is zero until set.
#[derive(Debug)]
pub struct PageIndexBuilder {
    bytes: Vec<u8>,
    pages: u64,
}

impl PageIndexBuilder {
    /// An index for that many pages.
    ///
    /// # Panics
    /// When so many pages do not fit in the address space.
    #[must_use]
    pub fn new(pages: u64, hasher: &PageHasher) -> Self {
        let hashes = usize::try_from(pages).ok().and_then(|pages| pages.checked_mul(HASH_BYTES));
        let hashes = hashes.expect("an index fits in the address space");
        let mut bytes = Vec::with_capacity(HEAD_BYTES + hashes + CHECK_BYTES);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&(PAGE_BYTES as u32).to_be_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&pages.to_be_bytes());
        bytes.extend_from_slice(&hasher.key);
        bytes.resize(HEAD_BYTES + hashes, 0);
        Self { bytes, pages }
    }

    /// Sets the hash of a page, by its number.
    ///
    /// # Panics
    /// When there is no such page.
    pub fn set(&mut self, page: u64, hash: PageHash) {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        let start = HEAD_BYTES + page as usize * HASH_BYTES;
        self.bytes[start..start + HASH_BYTES].copy_from_slice(&hash.0);
    }

    /// The finished index.
    #[must_use]
    pub fn finish(mut self) -> PageIndex {
        let check = blake3::hash(&self.bytes);
        self.bytes.extend_from_slice(check.as_bytes());
        PageIndex { bytes: self.bytes, pages: self.pages }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index() -> PageIndex {
        let hasher = PageHasher::new([7; 32]);
        let mut builder = PageIndexBuilder::new(3, &hasher);
        builder.set(1, hasher.hash_page(&[1; PAGE_BYTES]));
        builder.set(2, hasher.hash_page(&[0; PAGE_BYTES]));
        builder.finish()
    }

    #[test]
    fn an_index_comes_back_from_its_bytes() {
        let opened = PageIndex::open(index().as_bytes().to_vec()).expect("whole");
        let page_one = opened.hasher().hash_page(&[1; PAGE_BYTES]);
        assert_eq!(opened.iter().collect::<Vec<_>>(), [PageHash::ZERO, page_one, PageHash::ZERO]);
        assert_eq!((opened.get(1), opened.get(3)), (Some(page_one), None));
        assert_ne!(page_one, PageHash::ZERO);
        assert_ne!(page_one, PageHasher::new([8; 32]).hash_page(&[1; PAGE_BYTES]));
        assert_ne!(page_one, opened.hasher().hash_page(&[2; PAGE_BYTES]));
    }

    #[test]
    fn damage_anywhere_is_found() {
        let good = index().as_bytes().to_vec();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            assert!(PageIndex::open(bad).is_err(), "byte {at}");
            assert!(PageIndex::open(&good[..at]).is_err(), "cut at {at}");
        }
        let mut endless = good;
        endless[16..24].copy_from_slice(&u64::MAX.to_be_bytes());
        assert!(matches!(PageIndex::open(endless), Err(PageIndexError::Length { .. })));
    }
}
