//! QEMU's migration stream: parse it, split it into memory pages and device state, rebuild it; no I/O.
//!
//! ```text
//!                    ┌─────────┐  pages of one block   ┌──────────┐
//!  bytes of a stream │         │ ────────────────────► │ PageSink │  the memory image
//! ─────────────────► │Splitter │                       └──────────┘
//!                    │ (Parser)│  everything else      ┌──────────┐
//!                    │         │ ────────────────────► │ Write    │  the device file, itself a loadable stream
//!                    └─────────┘                       └──────────┘
//!   device file + memory image ──► Joiner ──► a full stream again
//! ```
//!
//! An image need not hold what an earlier one on the same host holds already: the [`Differ`] stands between splitter and
//! image, lets only pages pass that are new, and notes for each where it is ([`PageIndex`]).
//!
//! The format, as far as it matters here: a head (magic, version, configuration), then sections. Memory is the section
//! named `ram`, sent as one start, any number of parts and an end, each a list of records: a page, a zero page, the
//! list of blocks, the end of the list. Device sections carry no length, so they can't be skipped without knowing
//! each device; but memory comes before all of them, which is why understanding memory alone is enough and the rest
//! is passed through. Records have been the same from QEMU 7.2 to 10.0.
//!
//! What is fed in comes from a QEMU that a guest may have taken over: nothing in it causes a panic, or memory use
//! beyond what the caller said the guest has.

mod error;
mod parser;
mod record;
mod tail;

#[cfg(test)]
mod test_stream;

mod differ;
mod joiner;
mod page_index;
mod splitter;

pub use differ::{Base, BaseFiles, Differ, Digest};
pub use error::{Fault, StreamError};
pub use joiner::{JoinError, Joiner, MemorySource};
pub use page_index::{Holder, PageHash, PageHasher, PageIndex, PageIndexBuilder, PageIndexError};
pub use parser::{BlockId, Item, Parser, RamBlock, RawKind};
pub use record::RecordWriter;
pub use splitter::{PageSink, SplitError, SplitOptions, SplitSummary, Splitter};

/// The size of a page of guest memory in the stream, in bytes; the same for every x86 guest.
pub const PAGE_BYTES: usize = 4096;

/// A page's content.
pub type Page = [u8; PAGE_BYTES];
