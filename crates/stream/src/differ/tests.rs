use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const PAGES: u64 = 12;
const MEMORY_BYTES: u64 = PAGES * PAGE_BYTES as u64;

/// A sparse file: the pages that it holds.
#[derive(Debug, Clone, Default, PartialEq)]
struct Sparse(BTreeMap<u64, u8>);

impl PageSink for &mut Sparse {
    fn pages(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let (pages, rest) = bytes.as_chunks::<PAGE_BYTES>();
        assert!(rest.is_empty());
        for (page, content) in (offset / PAGE_BYTES as u64..).zip(pages) {
            self.0.insert(page, content[0]);
        }
        Ok(())
    }

    fn zeros(&mut self, offset: u64, length: u64) -> io::Result<()> {
        for page in offset / PAGE_BYTES as u64..(offset + length) / PAGE_BYTES as u64 {
            assert!(self.0.remove(&page).is_some(), "only what was stored is taken out");
        }
        Ok(())
    }
}

/// An image: its files by number, and its index.
#[derive(Debug, Clone)]
struct Image {
    files: BTreeMap<u8, Sparse>,
    index: PageIndex,
    /// The file that was made with it.
    own: u8,
}

/// A base's files, of which only every so many pages are to be had at once; 0: none.
struct Reader<'a>(&'a Image, u64);

impl BaseFiles for Reader<'_> {
    fn read_now(&mut self, file: u8, offset: u64, bytes: &mut [u8]) -> usize {
        let first = offset / PAGE_BYTES as u64;
        let (pages, _) = bytes.as_chunks_mut::<PAGE_BYTES>();
        let mut read = 0;
        for (page, bytes) in (first..).zip(pages) {
            if self.1 == 0 || page % self.1 == self.1 - 1 {
                break;
            }
            bytes.fill(self.0.files[&file].0.get(&page).copied().unwrap_or(0));
            read += PAGE_BYTES;
        }
        // A part of a page is of no use, and does no harm.
        read + usize::from(read < bytes.len())
    }
}

/// What comes in one go: where, and the pages' fill; only zeros are sent as such.
type Arrival = (u64, Vec<u8>);

#[derive(Debug, Clone, Copy)]
struct How {
    only_full: bool,
    at_hand: u64,
}

const WARM: How = How { only_full: false, at_hand: u64::MAX };

fn take_image(base: Option<(&Image, How)>, arrivals: &[Arrival]) -> Image {
    let mut own = Sparse::default();
    let mut differ = match base {
        None => Differ::full(&mut own, MEMORY_BYTES, PageHasher::new([3; 32])),
        Some((image, how)) => {
            let (index, files) = (image.index.clone(), Reader(image, how.at_hand));
            let base =
                if how.only_full { Some(Base::only_full(index, files)) } else { Base::new(index, files) };
            Differ::against(base.expect("a free number"), &mut own)
        }
    };
    for (first, fills) in arrivals {
        let fills = &fills[..fills.len().min((PAGES - first) as usize)];
        let offset = first * PAGE_BYTES as u64;
        if fills.iter().all(|fill| *fill == 0) {
            differ.zeros(offset, (fills.len() * PAGE_BYTES) as u64).expect("zeros");
        } else {
            let bytes: Vec<u8> = fills.iter().flat_map(|fill| [*fill; PAGE_BYTES]).collect();
            differ.pages(offset, &bytes).expect("pages");
        }
    }
    let (own, mut digest) = differ.finish();
    let mut from = 0;
    while let Some((start, end)) = digest.next_unhashed(from) {
        for page in start..end {
            if !digest.hash(page, &[own.0[&page]; PAGE_BYTES]) {
                own.0.remove(&page);
            }
        }
        from = end;
    }
    let (own, number) = (own.clone(), digest.own_number());
    let index = digest.finish();
    let used = index.pages_of_files();
    let mut files = base.map(|(image, _)| image.files.clone()).unwrap_or_default();
    let only_full = base.is_some_and(|(_, how)| how.only_full);
    // What holds nothing is not linked, but the full file is mapped in any case.
    let is_held = |held: &u8| !only_full && *held != number && used[usize::from(*held)] > 0;
    files.retain(|number, _| *number == 0 || is_held(number));
    assert!(base.is_none() || number != 0, "a full file is the base's");
    files.insert(number, own);
    Image { files, index, own: number }
}

/// A guest's memory as a restore makes it: the full file mapped, the rest sent.
fn restored(image: &Image) -> Vec<u8> {
    let full = &image.files[&0];
    let page = |(page, holder): (u64, Holder)| match holder.number() {
        None if holder == Holder::ZERO => 0,
        None => {
            assert!(!full.0.contains_key(&page), "a hole is one in the full file too");
            0
        }
        Some(number) => image.files[&number].0[&page],
    };
    (0..).zip(image.index.holders()).map(page).collect()
}

fn check(image: &Image, expected: &[u8]) {
    assert_eq!(restored(image), expected);
    let hasher = image.index.hasher();
    let hashes: Vec<PageHash> = expected.iter().map(|fill| hasher.hash_page(&[*fill; PAGE_BYTES])).collect();
    assert!(image.index.iter().eq(hashes));
    // The new file holds what its index says, and not a page more.
    let held = (0..).zip(image.index.holders()).filter(|(_, holder)| holder.number() == Some(image.own));
    assert!(image.files[&image.own].0.keys().copied().eq(held.map(|(page, _)| page)));
}

fn arrivals() -> impl Strategy<Value = Vec<Arrival>> {
    let fills = prop_oneof![
        prop::collection::vec(0_u8..4, 1..6),
        // Zeros come as zeros.
        (1_usize..6).prop_map(|length| vec![0; length]),
    ];
    prop::collection::vec((0..PAGES, fills), 0..12)
}

fn how() -> impl Strategy<Value = How> {
    let at_hand = prop_oneof![Just(0), 2_u64..6, Just(u64::MAX)];
    (any::<bool>(), at_hand).prop_map(|(only_full, at_hand)| How { only_full, at_hand })
}

proptest! {
    #[test]
    fn a_chain_of_images_reads_back_as_the_guest_was(
        rounds in prop::collection::vec((arrivals(), how()), 1..8),
    ) {
        let mut memory = vec![0_u8; PAGES as usize];
        let mut image: Option<Image> = None;
        for (changes, how) in rounds {
            // QEMU sends all of memory, and then again what changed.
            let mut sent: Vec<Arrival> = (0..PAGES).map(|page| (page, vec![memory[page as usize]])).collect();
            sent.extend(changes);
            for (first, fills) in &sent {
                for (page, fill) in (*first..PAGES).zip(fills) {
                    memory[page as usize] = *fill;
                }
            }
            let next = take_image(image.as_ref().map(|image| (image, how)), &sent);
            check(&next, &memory);
            image = Some(next);
        }
    }
}

#[test]
fn only_what_is_new_is_stored() {
    let full = take_image(None, &[(0, vec![1, 2, 3, 0, 5])]);
    assert_eq!(full.files[&0].0.len(), 4);
    for at_hand in [0, 3, u64::MAX] {
        let how = How { at_hand, ..WARM };
        let next = take_image(Some((&full, how)), &[(0, vec![1, 9, 3, 7, 5])]);
        assert_eq!(next.files[&1], Sparse(BTreeMap::from([(1, 9), (3, 7)])));
        // What has come to be as it was is not stored a second time, nor are zeros.
        let arrivals = [(0, vec![1, 2, 3, 8, 5]), (3, vec![7]), (4, vec![0])];
        let again = take_image(Some((&next, how)), &arrivals);
        assert_eq!(again.files[&2], Sparse(BTreeMap::from([(1, 2)])));
        assert_eq!(restored(&again)[..5], [1, 2, 3, 7, 0]);
        assert_eq!(again.index.holder(4), Some(Holder::ZERO));
        // Against the full file alone, the differences are taken over.
        let how = How { only_full: true, at_hand };
        let short = take_image(Some((&again, how)), &[(0, vec![1, 2, 3, 7, 0])]);
        assert_eq!(short.files.keys().copied().collect::<Vec<_>>(), [0, 1]);
        assert_eq!(short.files[&1], Sparse(BTreeMap::from([(1, 2), (3, 7)])));
    }
}
