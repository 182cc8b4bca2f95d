//! The memory area: filled once, then rewritten at a set rate, and verifiable at any moment.
//!
//! The area is cut into stripes of one MiB, each behind its own lock together with the generations that its
//! pages are expected to have, so verifying never stops the writer for longer than one stripe takes. One worker
//! owns all writing. Its pace is absolute: what is due follows from the time since the rate was set and not from
//! how long it slept, so that a busy guest dirties as much as it was told to; only a backlog of more than a
//! second is forgiven, because a guest that stood still must not burst afterwards.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use crate::pattern::{self, Expected, Page, PageId, Verdict};

/// Pages in a stripe; a stripe is one MiB.
pub const STRIPE_PAGES: usize = 256;

/// Memory in MiB that must stay available to the rest of the guest when the area grows.
const HEADROOM_MIB: u64 = 32;

/// How the worker rewrites a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rewrite {
    /// One word of the page.
    Word,
    /// All of the page, with pseudo-random content.
    Whole,
}

impl Rewrite {
    /// The word for it in requests and replies.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Word => "word",
            Self::Whole => "whole",
        }
    }
}

/// What the worker is told to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Size of the area in MiB.
    pub memory_mib: u32,
    /// How much is dirtied a second, in MiB of pages touched; 0 means that the area is filled and left alone.
    pub rate_mib_s: u32,
    /// Size in MiB of the first part of the area, to which rewriting is confined; 0 means all of it.
    pub hot_mib: u32,
    /// How pages are rewritten.
    pub rewrite: Rewrite,
}

impl Default for Settings {
    fn default() -> Self {
        Self { memory_mib: 16, rate_mib_s: 0, hot_mib: 0, rewrite: Rewrite::Word }
    }
}

/// What verifying every page found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PagesReport {
    /// Pages looked at.
    pub pages: u64,
    /// Pages that are not as expected, for whatever reason.
    pub wrong: u64,
    /// Of these: intact, of another generation.
    pub stale: u64,
    /// Of these: all zeros.
    pub lost: u64,
    /// Number of the first page that is not as expected.
    pub first_wrong: Option<u64>,
}

impl PagesReport {
    fn count(&mut self, number: u64, verdict: Verdict) {
        self.pages += 1;
        if verdict == Verdict::Right {
            return;
        }
        self.wrong += 1;
        self.first_wrong.get_or_insert(number);
        match verdict {
            Verdict::Stale => self.stale += 1,
            Verdict::Lost => self.lost += 1,
            Verdict::Right | Verdict::Wrong => {}
        }
    }
}

/// One MiB of pages with what they are expected to hold.
struct Stripe {
    pages: Vec<Page>,
    expected: Vec<Expected>,
}

impl Stripe {
    /// A filled stripe, or nothing when the memory can't be had.
    fn filled(seed: u64, first: u64) -> Option<Self> {
        let (mut pages, mut expected) = (Vec::new(), Vec::new());
        pages.try_reserve_exact(STRIPE_PAGES).ok()?;
        expected.try_reserve_exact(STRIPE_PAGES).ok()?;
        pages.resize(STRIPE_PAGES, Page::ZERO);
        for (page, number) in pages.iter_mut().zip(first..) {
            expected.push(pattern::write_whole(page, PageId { seed, number }, 1));
        }
        Some(Self { pages, expected })
    }

    fn rewrite(&mut self, id: PageId, index: usize, rewrite: Rewrite) {
        let old = self.expected[index];
        let generation = old.generation.wrapping_add(1);
        let page = &mut self.pages[index];
        self.expected[index] = match rewrite {
            Rewrite::Word => pattern::write_word(page, id, generation, old.base),
            Rewrite::Whole => pattern::write_whole(page, id, generation),
        };
    }
}

/// Says how many pages are due; see the module's head for its manners.
#[derive(Debug)]
struct Pacer {
    pages_a_second: u64,
    since: Instant,
    done: u64,
}

impl Pacer {
    fn new(rate_mib_s: u32, now: Instant) -> Self {
        Self { pages_a_second: u64::from(rate_mib_s) * STRIPE_PAGES as u64, since: now, done: 0 }
    }

    fn due(&mut self, now: Instant) -> u64 {
        let elapsed_us = now.duration_since(self.since).as_micros();
        let wanted = (elapsed_us * u128::from(self.pages_a_second) / 1_000_000) as u64;
        let due = wanted.saturating_sub(self.done);
        if due > self.pages_a_second {
            (self.since, self.done) = (now, 0);
            return 0;
        }
        due
    }
}

/// The area and its worker.
pub struct Memory {
    seed: u64,
    settings: Mutex<Settings>,
    changed: Condvar,
    stripes: RwLock<Vec<Arc<Mutex<Stripe>>>>,
    dirtied_pages: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Memory {
    /// An empty area; [`Memory::start`] gives it its worker.
    pub fn new(seed: u64, settings: Settings) -> Arc<Self> {
        Arc::new(Self {
            seed,
            settings: Mutex::new(settings),
            changed: Condvar::new(),
            stripes: RwLock::new(Vec::new()),
            dirtied_pages: AtomicU64::new(0),
        })
    }

    /// Starts the worker, which lives as long as the process.
    ///
    /// # Errors
    /// When the system has no room for a thread.
    pub fn start(self: &Arc<Self>) -> std::io::Result<()> {
        let memory = Arc::clone(self);
        thread::Builder::new().name("memory".into()).spawn(move || memory.work()).map(drop)
    }

    /// What the worker is told to do now.
    pub fn settings(&self) -> Settings {
        *lock(&self.settings)
    }

    /// Tells the worker to do something else. Growing keeps the pages that there are.
    ///
    /// # Errors
    /// When the guest has not as much memory as asked for, with the number of MiB that it could give.
    pub fn set(&self, settings: Settings) -> Result<(), u64> {
        let held_mib = self.pages() / STRIPE_PAGES as u64;
        if let Some(available_mib) = available_mib() {
            let most_mib = held_mib + available_mib.saturating_sub(HEADROOM_MIB);
            if u64::from(settings.memory_mib) > held_mib.max(most_mib) {
                return Err(most_mib);
            }
        }
        *lock(&self.settings) = settings;
        self.changed.notify_all();
        Ok(())
    }

    /// Number of pages that are filled now.
    pub fn pages(&self) -> u64 {
        (self.read_stripes().len() * STRIPE_PAGES) as u64
    }

    /// Whether the area has not yet the size that was set.
    pub fn filling(&self) -> bool {
        self.read_stripes().len() != self.settings().memory_mib as usize
    }

    /// Number of pages rewritten since the start; filling does not count.
    pub fn dirtied_pages(&self) -> u64 {
        self.dirtied_pages.load(Relaxed)
    }

    /// Looks at every page while the worker goes on.
    pub fn verify(&self) -> PagesReport {
        let mut report = PagesReport::default();
        let stripes = self.read_stripes().clone();
        for (index, stripe) in stripes.iter().enumerate() {
            let stripe = lock(stripe);
            let first = (index * STRIPE_PAGES) as u64;
            for ((page, expected), number) in stripe.pages.iter().zip(&stripe.expected).zip(first..) {
                let id = PageId { seed: self.seed, number };
                report.count(number, pattern::judge(page, id, *expected));
            }
        }
        report
    }

    fn read_stripes(&self) -> std::sync::RwLockReadGuard<'_, Vec<Arc<Mutex<Stripe>>>> {
        self.stripes.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_stripes(&self) -> std::sync::RwLockWriteGuard<'_, Vec<Arc<Mutex<Stripe>>>> {
        self.stripes.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut settings = self.settings();
        let mut pacer = Pacer::new(settings.rate_mib_s, Instant::now());
        let mut cursor = 0;
        loop {
            let wanted = self.settings();
            if wanted != settings {
                settings = wanted;
                pacer = Pacer::new(settings.rate_mib_s, Instant::now());
            }
            if self.resize_step(settings.memory_mib as usize) {
                pacer = Pacer::new(settings.rate_mib_s, Instant::now());
                continue;
            }
            let due = pacer.due(Instant::now());
            pacer.done += due;
            self.rewrite(settings, &mut cursor, due);
            self.rest(settings);
        }
    }

    /// Brings the area one step nearer to its size and says whether there was anything to do.
    fn resize_step(&self, wanted: usize) -> bool {
        let count = self.read_stripes().len();
        if count > wanted {
            self.write_stripes().truncate(wanted);
            return true;
        }
        if count == wanted {
            return false;
        }
        match Stripe::filled(self.seed, (count * STRIPE_PAGES) as u64) {
            Some(stripe) => self.write_stripes().push(Arc::new(Mutex::new(stripe))),
            None => lock(&self.settings).memory_mib = count as u32,
        }
        true
    }

    fn rewrite(&self, settings: Settings, cursor: &mut usize, due: u64) {
        let stripes = self.read_stripes().clone();
        let hot = match settings.hot_mib as usize {
            0 => stripes.len(),
            hot => hot.min(stripes.len()),
        };
        if hot == 0 {
            return;
        }
        let mut left = due as usize;
        while left > 0 {
            *cursor %= hot * STRIPE_PAGES;
            let (index, first) = (*cursor / STRIPE_PAGES, *cursor % STRIPE_PAGES);
            let run = left.min(STRIPE_PAGES - first);
            let mut stripe = lock(&stripes[index]);
            for page in first..first + run {
                let id = PageId { seed: self.seed, number: (index * STRIPE_PAGES + page) as u64 };
                stripe.rewrite(id, page, settings.rewrite);
            }
            *cursor += run;
            left -= run;
            self.dirtied_pages.fetch_add(run as u64, Relaxed);
        }
    }

    /// Sleeps until the next pages are due or the settings change.
    fn rest(&self, settings: Settings) {
        let guard = lock(&self.settings);
        if *guard != settings {
            return;
        }
        if settings.rate_mib_s == 0 || settings.memory_mib == 0 {
            drop(self.changed.wait(guard));
        } else {
            drop(self.changed.wait_timeout(guard, Duration::from_millis(10)));
        }
    }
}

/// What the kernel thinks could be allocated, in MiB; nothing when it does not say.
fn available_mib() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(mib: u32) -> Arc<Memory> {
        let memory = Memory::new(99, Settings { memory_mib: mib, rate_mib_s: 0, ..Settings::default() });
        while memory.resize_step(mib as usize) {}
        memory
    }

    fn flip(memory: &Memory, stripe: usize, page: usize, word: usize) {
        lock(&memory.read_stripes()[stripe]).pages[page].0[word] ^= 0xff00;
    }

    #[test]
    fn a_flipped_byte_makes_exactly_one_page_wrong() {
        let memory = filled(2);
        assert_eq!(memory.verify(), PagesReport { pages: 512, ..PagesReport::default() });
        flip(&memory, 1, 5, 300);
        let report = memory.verify();
        assert_eq!((report.pages, report.wrong, report.first_wrong), (512, 1, Some(261)));
    }

    #[test]
    fn pages_set_back_or_zeroed_or_swapped_are_all_noticed() {
        let memory = filled(1);
        let old = lock(&memory.read_stripes()[0]).pages.clone();
        let settings = Settings { rewrite: Rewrite::Word, ..memory.settings() };
        memory.rewrite(settings, &mut 0, 256);
        {
            let stripes = memory.read_stripes();
            let mut stripe = lock(&stripes[0]);
            stripe.pages[3] = old[3].clone();
            stripe.pages[4] = Page::ZERO;
            stripe.pages.swap(10, 11);
        }
        let report = memory.verify();
        assert_eq!((report.wrong, report.stale, report.lost, report.first_wrong), (4, 1, 1, Some(3)));
    }

    #[test]
    fn rewriting_stays_in_the_hot_part_and_keeps_every_page_right() {
        let memory = filled(3);
        for rewrite in [Rewrite::Whole, Rewrite::Word, Rewrite::Whole] {
            let settings = Settings { hot_mib: 1, rewrite, ..memory.settings() };
            memory.rewrite(settings, &mut 200, 700);
        }
        assert_eq!(memory.verify().wrong, 0);
        assert_eq!(memory.dirtied_pages(), 2100);
        let stripes = memory.read_stripes();
        assert!(lock(&stripes[0]).expected.iter().all(|page| page.generation > 1));
        assert!(lock(&stripes[1]).expected.iter().all(|page| page.generation == 1));
    }

    #[test]
    fn the_area_grows_and_shrinks_without_touching_what_stays() {
        let memory = filled(2);
        flip(&memory, 0, 0, 9);
        while memory.resize_step(4) {}
        assert_eq!(memory.verify().wrong, 1);
        while memory.resize_step(0) {}
        assert_eq!(memory.verify(), PagesReport::default());
    }

    #[test]
    fn more_memory_than_there_is_is_refused() {
        let memory = filled(1);
        let before = memory.settings();
        let refused = memory.set(Settings { memory_mib: u32::MAX, ..before });
        assert!(refused.is_err());
        assert_eq!(memory.settings(), before);
    }

    #[test]
    fn the_pace_is_absolute_and_a_long_stop_is_not_made_up_for() {
        let start = Instant::now();
        let mut pacer = Pacer::new(20, start);
        let mut pages = 0;
        for step in [3, 50, 51, 400, 990, 1000] {
            let due = pacer.due(start + Duration::from_millis(step));
            pacer.done += due;
            pages += due;
        }
        assert_eq!(pages, 20 * 256);
        assert_eq!(pacer.due(start + Duration::from_secs(60)), 0);
        assert_eq!(pacer.due(start + Duration::from_millis(60_100)), 512);
    }
}
