//! The guest: a token that is drawn when it boots, and a count that rises while it runs. That is all of its memory, and
//! enough to tell a guest that went on from one that was started anew or put back.
//!
//! It lies in a few pages, each with the same content, so that pages of different instants are found out.

use std::fmt;
use std::time::Instant;

use berth_stream::{PAGE_BYTES, Page};
use serde::{Deserialize, Serialize};

/// How many pages hold it.
pub const PAGES: u64 = 4;

const MARK: &[u8; 8] = b"sim-page";

/// What a guest remembers.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Memory {
    /// Drawn at its boot.
    pub token: u64,
    /// Rises while it runs.
    pub ticks: u64,
    /// It has come up.
    pub ready: bool,
}

/// Whether a guest has come up is told by others too, and changes while it stands still: it says nothing of who it is.
impl PartialEq for Memory {
    fn eq(&self, other: &Self) -> bool {
        (self.token, self.ticks) == (other.token, other.ticks)
    }
}

impl Eq for Memory {}

impl fmt::Display for Memory {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:04x}+{}", self.token & 0xffff, self.ticks)
    }
}

impl Memory {
    /// Length of a memory as bytes.
    pub const BYTES: usize = 25;

    /// As bytes, marked.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(MARK);
        bytes[8..16].copy_from_slice(&self.token.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.ticks.to_le_bytes());
        bytes[24] = u8::from(self.ready);
        bytes
    }

    /// From bytes; none when they are no memory.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let number = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        let (token, ticks) = (number(8)?, number(16)?);
        bytes.starts_with(MARK).then_some(Self { token, ticks, ready: *bytes.get(24)? == 1 })
    }

    /// The content of each of its pages.
    pub fn to_page(self) -> Page {
        let mut page = [0; PAGE_BYTES];
        page[..Self::BYTES].copy_from_slice(&self.to_bytes());
        page
    }
}

/// A guest that runs or stands still.
#[derive(Debug, Clone)]
pub(crate) struct Guest {
    memory: Memory,
    since: Option<Instant>,
}

impl Guest {
    pub(crate) const fn new(memory: Memory) -> Self {
        Self { memory, since: None }
    }

    pub(crate) const fn runs(&self) -> bool {
        self.since.is_some()
    }

    /// What it remembers now: a tick for each millisecond that it has run.
    pub(crate) fn memory(&self) -> Memory {
        let ran_ms = self.since.map_or(0, |since| u64::try_from(since.elapsed().as_millis()).unwrap_or(0));
        Memory { ticks: self.memory.ticks + ran_ms, ..self.memory }
    }

    pub(crate) fn resume(&mut self) {
        self.since.get_or_insert_with(Instant::now);
    }

    /// It stands still, having ticked at least once since it went on.
    pub(crate) fn pause(&mut self) -> Memory {
        if self.since.is_some() {
            let memory = self.memory();
            self.memory = Memory { ticks: memory.ticks + 1, ..memory };
            self.since = None;
        }
        self.memory
    }

    pub(crate) const fn set_ready(&mut self) {
        self.memory.ready = true;
    }

    /// Another memory in its place, running or not as before.
    pub(crate) fn replace(&mut self, memory: Memory) {
        self.memory = memory;
        self.since = self.since.map(|_| Instant::now());
    }
}
