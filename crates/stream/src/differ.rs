//! Only what is new goes into an image; for everything else it says where it is.
//!
//! Each page is compared, as it comes, with what an earlier image of this guest, the *base*, has at the same place. A page
//! that is the same is not stored again: the new image's index names the file that has it. Pages come again and again
//! while a guest runs, so what was stored in one pass may be the base's in the next; it is then taken out again, and the
//! image never holds bytes that its index does not speak of.
//!
//! **What it costs.** A guest that is being captured waits for this in the end, and a hash of a page takes longer than
//! QEMU takes to send it. So pages are compared byte by byte where the base's can be had at once, which they mostly can, and hashed
//! only where not; and what is stored is hashed afterwards ([`Differ::finish`], [`Digest`]), when the guest goes on and no page comes any
//! more.

use std::io;

use crate::page_index::{Holder, PageHash, PageHasher, PageIndex, PageIndexBuilder};
use crate::splitter::PageSink;
use crate::{PAGE_BYTES, Page};

/// How much of a base is read at once.
const BASE_BYTES: usize = 128 << 10;

/// Gives what the files of a base hold.
pub trait BaseFiles {
    /// Fills `bytes` with what a file has at `offset`, as far as that takes no waiting, and says how far that was. What it
    /// gives must be what is there, but it may always give less, or nothing.
    fn read_now(&mut self, file: u8, offset: u64, bytes: &mut [u8]) -> usize;
}

/// An earlier image, as far as a new one may refer to it.
#[derive(Debug)]
pub struct Base<F> {
    index: PageIndex,
    files: F,
    only_full: bool,
    own: u8,
}

impl<F: BaseFiles> Base<F> {
    /// All files of the earlier image may be referred to. `None` when it has as many as an image can have.
    pub fn new(index: PageIndex, files: F) -> Option<Self> {
        let counts = index.pages_of_files();
        let own = (1..).zip(&counts[1..]).find(|(_, pages)| **pages == 0).map(|(number, _)| number)?;
        Some(Self { index, files, only_full: false, own })
    }

    /// Only its full file may: the new image takes over what is in its differences, and has two files again.
    pub const fn only_full(index: PageIndex, files: F) -> Self {
        Self { index, files, only_full: true, own: 1 }
    }

    /// The number for the file that the new image's own pages go to: none of those has it that may be referred to.
    pub const fn own_number(&self) -> u8 {
        self.own
    }

    /// The file that has a page and may be referred to.
    #[inline]
    fn file_of(&self, page: u64) -> Option<u8> {
        let number = self.index.holder(page)?.number()?;
        (number == 0 || !self.only_full).then_some(number)
    }
}

/// Compares pages with a base, and hands on those that are new. The sink is all zero at the start.
#[derive(Debug)]
pub struct Differ<S, F> {
    sink: S,
    base: Option<Base<F>>,
    digest: Digest,
    buffer: Vec<u8>,
}

impl<S: PageSink, F: BaseFiles> Differ<S, F> {
    /// Everything is new: the image is a full one.
    pub fn full(sink: S, memory_bytes: u64, hasher: PageHasher) -> Self {
        let index = PageIndexBuilder::new(memory_bytes / PAGE_BYTES as u64, &hasher);
        let digest = Digest { index, hasher, own: Holder::FULL, holes: None };
        Self { sink, base: None, digest, buffer: Vec::new() }
    }

    /// New is what the base has not, which must be of a memory of the same length.
    pub fn against(base: Base<F>, sink: S) -> Self {
        let own = Holder::file(base.own);
        let hasher = base.index.hasher();
        let mut index = PageIndexBuilder::new(base.index.page_count(), &hasher);
        let holes: Vec<bool> = base.index.holders().map(|holder| holder == Holder::HOLE).collect();
        for (page, is_hole) in (0..).zip(&holes) {
            // A page that never comes is zero.
            if !is_hole {
                index.set(page, PageHash::ZERO, Holder::ZERO);
            }
        }
        let digest = Digest { index, hasher, own, holes: Some(holes) };
        Self { sink, base: Some(base), digest, buffer: vec![0; BASE_BYTES] }
    }

    /// Ends; gives the sink, and what is left to be done for the index.
    pub fn finish(self) -> (S, Digest) {
        (self.sink, self.digest)
    }

    /// Compares pages that one file of the base has (or none); gives how many were treated.
    fn compare(&mut self, first: u64, pages: &[Page], offset: u64) -> io::Result<usize> {
        let Some(base) = &mut self.base else { return self.store(first, pages, offset) };
        let file = base.file_of(first);
        let alike = (first..).zip(pages).take_while(|(page, _)| base.file_of(*page) == file).count();
        let pages = &pages[..alike];
        let Some(file) = file else { return self.store(first, pages, offset) };
        let buffer = &mut self.buffer[..(alike * PAGE_BYTES).min(BASE_BYTES)];
        let read = base.files.read_now(file, offset, buffer);
        let (theirs, _) = buffer[..read].as_chunks::<PAGE_BYTES>();
        let holder = Holder::file(file);
        if theirs.is_empty() {
            // They would have to be waited for. Their hashes are here.
            let pages = &pages[..pages.len().min(BASE_BYTES / PAGE_BYTES)];
            let hashes: Vec<PageHash> = pages.iter().map(|page| self.digest.hasher.hash_page(page)).collect();
            let same = |page: u64, number: usize| base.index.get(page) == Some(hashes[number]);
            return take(&mut self.sink, &mut self.digest, first, pages, |page, number| {
                let hash = hashes[number];
                if same(page, number) { Found::Base(hash, holder) } else { Found::New(hash) }
            });
        }
        let index = &base.index;
        take(&mut self.sink, &mut self.digest, first, &pages[..theirs.len()], |page, number| {
            match index.get(page) {
                Some(hash) if pages[number] == theirs[number] => Found::Base(hash, holder),
                _ => Found::New(PageHash::ZERO),
            }
        })
    }

    fn store(&mut self, first: u64, pages: &[Page], offset: u64) -> io::Result<usize> {
        for page in (first..).take(pages.len()) {
            self.digest.index.set(page, PageHash::ZERO, self.digest.own);
        }
        self.sink.pages(offset, pages.as_flattened())?;
        Ok(pages.len())
    }
}

/// What came of comparing a page.
#[derive(Clone, Copy)]
enum Found {
    /// The base has it.
    Base(PageHash, Holder),
    /// It is new. [`PageHash::ZERO`]: to be hashed later.
    New(PageHash),
}

/// What is to be done with a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// It is stored.
    Own,
    /// It is not stored any more.
    NoLongerOwn,
    /// It was not stored and is not.
    Elsewhere,
}

/// Notes what was found of pages, and hands them on in runs of those that are to be treated alike.
fn take<S: PageSink>(
    sink: &mut S,
    digest: &mut Digest,
    first: u64,
    pages: &[Page],
    found: impl Fn(u64, usize) -> Found,
) -> io::Result<usize> {
    let mut hand_on = |place: Place, from: usize, to: usize| {
        let offset = (first + from as u64) * PAGE_BYTES as u64;
        let bytes = pages[from..to].as_flattened();
        match place {
            Place::Own => sink.pages(offset, bytes),
            Place::NoLongerOwn => sink.zeros(offset, bytes.len() as u64),
            Place::Elsewhere => Ok(()),
        }
    };
    let (mut from, mut place) = (0, Place::Elsewhere);
    for (number, page) in (first..).take(pages.len()).enumerate() {
        let next = digest.note(page, found(page, number));
        if next != place {
            hand_on(place, from, number)?;
            (from, place) = (number, next);
        }
    }
    hand_on(place, from, pages.len())?;
    Ok(pages.len())
}

impl<S: PageSink, F: BaseFiles> PageSink for Differ<S, F> {
    fn pages(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let (mut pages, _) = bytes.as_chunks::<PAGE_BYTES>();
        let mut first = offset / PAGE_BYTES as u64;
        while !pages.is_empty() {
            let done = self.compare(first, pages, first * PAGE_BYTES as u64)?;
            first += done as u64;
            pages = &pages[done..];
        }
        Ok(())
    }

    fn zeros(&mut self, offset: u64, length: u64) -> io::Result<()> {
        // Only what was stored is taken out, and stretches of it at once.
        let mut stored: Option<(u64, u64)> = None;
        for page in offset / PAGE_BYTES as u64..(offset + length) / PAGE_BYTES as u64 {
            let was_own = self.digest.is_own(page);
            self.digest.set_zero(page);
            match &mut stored {
                _ if !was_own => {}
                Some((_, end)) if *end == page => *end += 1,
                _ => {
                    take_out(&mut self.sink, stored)?;
                    stored = Some((page, page + 1));
                }
            }
        }
        take_out(&mut self.sink, stored)
    }
}

fn take_out(sink: &mut impl PageSink, pages: Option<(u64, u64)>) -> io::Result<()> {
    let Some((start, end)) = pages else { return Ok(()) };
    sink.zeros(start * PAGE_BYTES as u64, (end - start) * PAGE_BYTES as u64)
}

/// An index in which pages that were stored may still lack their hash.
#[derive(Debug)]
pub struct Digest {
    index: PageIndexBuilder,
    hasher: PageHasher,
    own: Holder,
    /// The base's pages that are zero in its full file as well; none: there is no base.
    holes: Option<Vec<bool>>,
}

impl Digest {
    /// The number of the file that the new pages went to: 0 for a full image.
    #[must_use]
    pub fn own_number(&self) -> u8 {
        self.own.number().unwrap_or_default()
    }

    /// The next stretch of pages from `from` on that were stored and not hashed yet, as the first and the one after the
    /// last.
    #[must_use]
    pub fn next_unhashed(&self, from: u64) -> Option<(u64, u64)> {
        let is_unhashed = |page: &u64| self.is_own(*page) && self.index.hash(*page) == PageHash::ZERO;
        let start = (from..self.index.page_count()).find(is_unhashed)?;
        let end = (start..self.index.page_count()).find(|page| !is_unhashed(page));
        Some((start, end.unwrap_or(self.index.page_count())))
    }

    /// Hashes a page that was stored. Whether it is to stay: a page of zeros is to be taken out.
    ///
    /// # Panics
    /// When there is no such page.
    #[must_use]
    pub fn hash(&mut self, page: u64, content: &Page) -> bool {
        let hash = self.hasher.hash_page(content);
        if hash == PageHash::ZERO {
            self.set_zero(page);
            return false;
        }
        self.index.set(page, hash, self.own);
        true
    }

    /// The finished index. Every page must have been hashed.
    #[must_use]
    pub fn finish(self) -> PageIndex {
        self.index.finish()
    }

    fn is_own(&self, page: u64) -> bool {
        self.index.holder(page) == self.own
    }

    fn set_zero(&mut self, page: u64) {
        let is_hole = self.holes.as_ref().is_none_or(|holes| holes[page as usize]);
        self.index.set(page, PageHash::ZERO, if is_hole { Holder::HOLE } else { Holder::ZERO });
    }

    #[inline]
    fn note(&mut self, page: u64, found: Found) -> Place {
        let was_own = self.is_own(page);
        match found {
            Found::Base(hash, holder) => {
                self.index.set(page, hash, holder);
                if was_own { Place::NoLongerOwn } else { Place::Elsewhere }
            }
            Found::New(hash) => {
                self.index.set(page, hash, self.own);
                Place::Own
            }
        }
    }
}

#[cfg(test)]
mod tests;
