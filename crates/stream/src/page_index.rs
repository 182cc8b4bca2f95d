//! For each page of a memory image its hash and which of the image's files holds it.
//!
//! An image may be of several files: one full one, and differences that hold what was not in it. A page's *holder* is
//! the number of the file that has it, 0 for the full one. A page of zeros is in no file; but where the full image, which
//! is what a restored guest's memory is mapped from, may have something else at its place, that is marked, because the
//! zeros must then be said.
//!
//! Hashes are 128 bits of keyed BLAKE3. Half of BLAKE3's length halves the index (4 MiB for each GiB of memory), and the
//! key makes up for it: whoever wants two pages with one hash, to have one taken for the other, would have to know
//! the key, which never reaches a guest. Indexes that are to be compared must have the same key, so there is one for a VM.
//!
//! An index lies in memory exactly as in its file: a head (magic, page size, number of pages, key), the hashes, the
//! holders, and a check, so that a damaged index is refused rather than believed. Which index it is, is told by its
//! [identity](PageIndex::identity), BLAKE3 of head and hashes: it says what the memory is, and stays the same when pages
//! move to other files. The check is BLAKE3 of identity and holders, so that an index is hashed once.

use crate::{PAGE_BYTES, Page};

const MAGIC: &[u8; 8] = b"BERTHPI2";
const HASH_BYTES: usize = 16;
const KEY_BYTES: usize = 32;
const CHECK_BYTES: usize = 32;
/// What an index has for a page: a hash and a holder.
const PAGE_RECORD_BYTES: u64 = HASH_BYTES as u64 + 1;
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
#[derive(Clone, PartialEq, Eq)]
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

/// Where a page of an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Holder(u8);

impl Holder {
    /// The image's full file.
    pub const FULL: Self = Self(0);
    /// No file: the page is zero, but the full file may have something else at its place.
    pub const ZERO: Self = Self(0xfe);
    /// No file: the page is zero, and in the full file as well.
    pub const HOLE: Self = Self(0xff);
    /// How many files an image can have.
    pub const FILES_MAX: usize = 0xfe;

    /// The file of this number.
    ///
    /// # Panics
    /// When the number is not below [`Self::FILES_MAX`].
    #[must_use]
    pub const fn file(number: u8) -> Self {
        assert!((number as usize) < Self::FILES_MAX, "an image has fewer files");
        Self(number)
    }

    /// The number of the file; none for a page of zeros.
    #[must_use]
    pub const fn number(self) -> Option<u8> {
        if (self.0 as usize) < Self::FILES_MAX { Some(self.0) } else { None }
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
    identity: blake3::Hash,
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
        let expected = pages.saturating_mul(PAGE_RECORD_BYTES).saturating_add(frame);
        if found != expected {
            return Err(PageIndexError::Length { pages, expected, found });
        }
        let (content, check) = all.split_at(all.len() - CHECK_BYTES);
        let (identity, expected) = identity_and_check(content, pages);
        if expected.as_bytes() != check {
            return Err(PageIndexError::Damaged);
        }
        Ok(Self { bytes, pages, identity })
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
        let (hashes, _) = self.bytes.as_ref()[HEAD_BYTES..self.holders_start()].as_chunks();
        hashes.iter().copied().map(PageHash)
    }

    /// Where each page is, in order.
    pub fn holders(&self) -> impl ExactSizeIterator<Item = Holder> {
        let all = self.bytes.as_ref();
        all[self.holders_start()..all.len() - CHECK_BYTES].iter().copied().map(Holder)
    }

    /// Where a page is, by its number; `None` beyond the end.
    #[must_use]
    pub fn holder(&self, page: u64) -> Option<Holder> {
        if page >= self.pages {
            return None;
        }
        let at = self.holders_start() + usize::try_from(page).ok()?;
        self.bytes.as_ref().get(at).copied().map(Holder)
    }

    /// The page after the last of those, from `page` on, that are where it is: a run that can be read at once. At most `end`.
    #[must_use]
    pub fn end_of_run(&self, page: u64, end: u64) -> u64 {
        let (holder, end) = (self.holder(page), end.min(self.pages));
        (page..end).find(|next| self.holder(*next) != holder).unwrap_or(end)
    }

    /// The first of the pages from `first` on, with this content one after the other, that is not as the index has it.
    /// `hasher` is [`Self::hasher`], made once.
    pub fn first_wrong(&self, hasher: &PageHasher, first: u64, content: &[u8]) -> Option<u64> {
        let (pages, _) = content.as_chunks::<PAGE_BYTES>();
        let mut pages = (first..).zip(pages);
        pages.find(|(page, content)| self.get(*page) != Some(hasher.hash_page(content))).map(|(page, _)| page)
    }

    /// How many pages each file holds, by the files' numbers.
    #[must_use]
    pub fn pages_of_files(&self) -> [u64; Holder::FILES_MAX] {
        let mut counts = [0; Holder::FILES_MAX];
        self.holders().filter_map(Holder::number).for_each(|number| counts[usize::from(number)] += 1);
        counts
    }

    /// What tells this memory from every other: BLAKE3 of all but the holders, in hexadecimal.
    #[must_use]
    pub fn identity(&self) -> String {
        self.identity.to_hex().to_string()
    }

    /// The same memory as it lies in other files: `moved` gives each page's new holder.
    #[must_use]
    pub fn with_holders(&self, mut moved: impl FnMut(u64, Holder) -> Holder) -> PageIndex {
        let start = self.holders_start();
        let all = self.bytes.as_ref();
        let mut bytes = all[..all.len() - CHECK_BYTES].to_vec();
        for (page, holder) in (0..).zip(&mut bytes[start..]) {
            *holder = moved(page, Holder(*holder)).0;
        }
        finished(bytes, self.pages)
    }

    fn holders_start(&self) -> usize {
        holders_start(self.pages)
    }

    /// A hasher whose hashes can be compared with these.
    #[must_use]
    pub fn hasher(&self) -> PageHasher {
        let key = &self.bytes.as_ref()[HEAD_BYTES - KEY_BYTES..HEAD_BYTES];
        PageHasher::new(key.try_into().expect("a key's length"))
    }
}

/// Where the holders begin in an index of so many pages, which is in memory.
fn holders_start(pages: u64) -> usize {
    HEAD_BYTES + pages as usize * HASH_BYTES
}

fn identity_and_check(content: &[u8], pages: u64) -> (blake3::Hash, blake3::Hash) {
    let (memory, holders) = content.split_at(holders_start(pages));
    let identity = blake3::hash(memory);
    let mut check = blake3::Hasher::new();
    check.update(identity.as_bytes()).update(holders);
    (identity, check.finalize())
}

fn finished(mut bytes: Vec<u8>, pages: u64) -> PageIndex {
    let (identity, check) = identity_and_check(&bytes, pages);
    bytes.extend_from_slice(check.as_bytes());
    PageIndex { bytes, pages, identity }
}

/// An index in the making; every page is a hole until set.
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
        let records =
            usize::try_from(pages).ok().and_then(|pages| pages.checked_mul(PAGE_RECORD_BYTES as usize));
        let records = records.expect("an index fits in the address space");
        let mut bytes = Vec::with_capacity(HEAD_BYTES + records + CHECK_BYTES);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&(PAGE_BYTES as u32).to_be_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&pages.to_be_bytes());
        bytes.extend_from_slice(&hasher.key);
        bytes.resize(holders_start(pages), 0);
        bytes.resize(HEAD_BYTES + records, Holder::HOLE.0);
        Self { bytes, pages }
    }

    /// Sets hash and holder of a page, by its number.
    ///
    /// # Panics
    /// When there is no such page.
    #[inline]
    pub fn set(&mut self, page: u64, hash: PageHash, holder: Holder) {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        let start = HEAD_BYTES + page as usize * HASH_BYTES;
        self.bytes[start..start + HASH_BYTES].copy_from_slice(&hash.0);
        self.bytes[holders_start(self.pages) + page as usize] = holder.0;
    }

    /// The holder of a page as it was set last.
    ///
    /// # Panics
    /// When there is no such page.
    #[inline]
    #[must_use]
    pub fn holder(&self, page: u64) -> Holder {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        Holder(self.bytes[holders_start(self.pages) + page as usize])
    }

    /// The hash of a page as it was set last.
    ///
    /// # Panics
    /// When there is no such page.
    #[inline]
    #[must_use]
    pub fn hash(&self, page: u64) -> PageHash {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        let (_, bytes) = self.bytes.split_at(HEAD_BYTES + page as usize * HASH_BYTES);
        let (hash, _) = bytes.split_first_chunk().expect("a page's hash is there");
        PageHash(*hash)
    }

    /// How many pages it has.
    #[must_use]
    pub const fn page_count(&self) -> u64 {
        self.pages
    }

    /// The finished index.
    #[must_use]
    pub fn finish(self) -> PageIndex {
        finished(self.bytes, self.pages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index() -> PageIndex {
        let hasher = PageHasher::new([7; 32]);
        let mut builder = PageIndexBuilder::new(4, &hasher);
        builder.set(1, hasher.hash_page(&[1; PAGE_BYTES]), Holder::file(3));
        builder.set(2, hasher.hash_page(&[0; PAGE_BYTES]), Holder::ZERO);
        builder.set(3, hasher.hash_page(&[2; PAGE_BYTES]), Holder::FULL);
        builder.finish()
    }

    #[test]
    fn an_index_comes_back_from_its_bytes() {
        let opened = PageIndex::open(index().as_bytes().to_vec()).expect("whole");
        let [page_one, page_three] = [1, 2].map(|fill| opened.hasher().hash_page(&[fill; PAGE_BYTES]));
        let hashes = [PageHash::ZERO, page_one, PageHash::ZERO, page_three];
        assert_eq!(opened.iter().collect::<Vec<_>>(), hashes);
        assert_eq!((opened.get(1), opened.get(4)), (Some(page_one), None));
        let holders = [Holder::HOLE, Holder::file(3), Holder::ZERO, Holder::FULL];
        assert_eq!(opened.holders().collect::<Vec<_>>(), holders);
        assert_eq!((opened.holder(1), opened.holder(4)), (Some(Holder::file(3)), None));
        let counts = opened.pages_of_files();
        assert_eq!((counts[0], counts[3], counts.iter().sum()), (1, 1, 2));
        assert_ne!(page_one, PageHash::ZERO);
        assert_ne!(page_one, PageHasher::new([8; 32]).hash_page(&[1; PAGE_BYTES]));
        assert_ne!(page_one, page_three);
    }

    #[test]
    fn what_is_read_at_once_is_where_its_first_page_is_and_is_held_against_all_hashes() {
        let hasher = PageHasher::new([7; 32]);
        let mut builder = PageIndexBuilder::new(6, &hasher);
        for page in 1..4 {
            builder.set(page, hasher.hash_page(&[1; PAGE_BYTES]), Holder::file(3));
        }
        builder.set(4, hasher.hash_page(&[1; PAGE_BYTES]), Holder::FULL);
        let index = builder.finish();
        let ends =
            [(0, 6), (1, 6), (2, 6), (1, 2), (4, 6), (5, 9)].map(|(page, end)| index.end_of_run(page, end));
        assert_eq!(ends, [1, 4, 4, 2, 5, 6]);
        let hasher = index.hasher();
        let mut content = vec![1; 3 * PAGE_BYTES];
        assert_eq!(index.first_wrong(&hasher, 1, &content), None);
        content[2 * PAGE_BYTES] ^= 1;
        assert_eq!(index.first_wrong(&hasher, 1, &content), Some(3));
        assert_eq!(index.first_wrong(&hasher, 4, &[1; 2 * PAGE_BYTES]), Some(5), "a hole is zeros");
        assert_eq!(index.first_wrong(&hasher, 5, &[0; 2 * PAGE_BYTES]), Some(6), "beyond the end");
    }

    #[test]
    fn pages_that_move_to_another_file_are_the_same_memory() {
        let index = index();
        let moved = index.with_holders(|page, holder| if page == 1 { Holder::FULL } else { holder });
        let opened = PageIndex::open(moved.as_bytes().to_vec()).expect("whole");
        assert_eq!(opened.holder(1), Some(Holder::FULL));
        assert_eq!(opened.identity(), index.identity());
        assert!(opened.iter().eq(index.iter()));
        let other = PageIndexBuilder::new(4, &index.hasher()).finish();
        assert_ne!(other.identity(), index.identity());
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
