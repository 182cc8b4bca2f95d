//! An export: a log, or a stretch of it, as lines of JSON that can be checked offline.
//!
//! ```text
//! {"log":"ORIGIN","version":1,"first":0,"end":300,"peaks":[]}          what this is
//! {"sequence":0,…}                                                      a record: the line is the leaf's bytes
//! …                                                                     255 more of them
//! {"tile":0,"hashes":"BASE64","checkpoint":"SIGNED NOTE of size 256"}   their leaf hashes
//! {"sequence":256,…}
//! …
//! {"tile":1,"hashes":"BASE64"}                                          the last tile is not full
//! {"checkpoint":"SIGNED NOTE of size 300"}                              the whole log
//! ```
//!
//! A record's line, without its line break, is what was hashed, to the byte. The rest is there to say *which* record
//! is wrong: the root alone only says that one is. Each full tile comes with the checkpoint that was signed when the
//! log had just that size, so a tile can't be changed with its hashes unless one has the key; and within a tile whose
//! hashes lead to the signed root, each line is held against its own.
//!
//! A stretch begins within a tile and ends within one: `first` and `end` say which records are there, the hashes
//! stand for those that are not, and `peaks` for all the tiles before.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use crate::frontier::Frontier;
use crate::hash::{self, Hash};
use crate::tile::TILE_LEAVES;

mod section;
mod verify;

pub use verify::{Fault, Question, Verified, verify};

/// The version of the format that is written.
const VERSION: u32 = 1;
/// Longest line that is read. Records are some hundred bytes, a tile's line is 11 KiB.
const LINE_BYTES_MAX: u64 = 1 << 20;

const TILE_PREFIX: &[u8] = b"{\"tile\":";
const CHECKPOINT_PREFIX: &[u8] = b"{\"checkpoint\":";
/// What a record's line should begin with, for saying which record it claims to be.
const RECORD_PREFIX: &[u8] = b"{\"sequence\":";

#[derive(Debug, Serialize, Deserialize)]
struct Header {
    log: String,
    version: u32,
    first: u64,
    end: u64,
    peaks: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct TileLine<'a> {
    tile: u64,
    #[serde(borrow)]
    hashes: std::borrow::Cow<'a, str>,
    #[serde(default, borrow, skip_serializing_if = "Option::is_none")]
    checkpoint: Option<std::borrow::Cow<'a, str>>,
}

#[derive(Debug, Serialize, Deserialize)]
struct CheckpointLine<'a> {
    #[serde(borrow)]
    checkpoint: std::borrow::Cow<'a, str>,
}

/// The first line of an export of the records from `first` up to but without `end`; `before` is the frontier of all
/// tiles before the one that `first` is in.
pub fn header_line(origin: &str, first: u64, end: u64, before: &Frontier) -> String {
    let peaks = before.peaks().iter().map(Hash::to_string).collect();
    to_line(&Header { log: origin.to_owned(), version: VERSION, first, end, peaks })
}

/// The line behind the records of a tile; `checkpoint` is the note that was signed when the tile was full.
pub fn tile_line(index: u64, hashes: &[Hash], checkpoint: Option<&str>) -> String {
    let hashes = STANDARD.encode(hash::join(hashes)).into();
    to_line(&TileLine { tile: index, hashes, checkpoint: checkpoint.map(Into::into) })
}

/// The last line.
pub fn checkpoint_line(note: &str) -> String {
    to_line(&CheckpointLine { checkpoint: note.into() })
}

fn to_line<T: Serialize>(line: &T) -> String {
    let mut text = serde_json::to_string(line).expect("plain data");
    text.push('\n');
    text
}

/// Where the tile begins that this record is in.
pub const fn tile_start(sequence: u64) -> u64 {
    sequence - sequence % TILE_LEAVES
}

/// Writes a whole log as an export: for tests and benches, which have all of it in memory.
pub fn write(origin: &str, records: &[Vec<u8>], key: &crate::SigningKey) -> Vec<u8> {
    let size = records.len() as u64;
    let mut frontier = Frontier::new();
    let mut out = header_line(origin, 0, size, &frontier).into_bytes();
    let sign = |frontier: &Frontier| {
        let (size, root) = (frontier.size(), frontier.root());
        crate::Checkpoint { origin: origin.to_owned(), size, root }.sign(key)
    };
    for (index, chunk) in records.chunks(crate::tile::TILE_WIDTH).enumerate() {
        let mut hashes = Vec::with_capacity(chunk.len());
        for record in chunk {
            out.extend(record);
            out.push(b'\n');
            hashes.push(Hash::leaf(record));
            frontier.push(hashes[hashes.len() - 1]);
        }
        let note = (chunk.len() == crate::tile::TILE_WIDTH).then(|| sign(&frontier));
        out.extend(tile_line(index as u64, &hashes, note.as_deref()).bytes());
    }
    out.extend(checkpoint_line(&sign(&frontier)).bytes());
    out
}
