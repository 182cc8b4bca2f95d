//! A stretch of an export's lines, read and worked on by itself, so that several can be at once.

use std::io::{self, BufRead, Read};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::{CHECKPOINT_PREFIX, CheckpointLine, LINE_BYTES_MAX, RECORD_PREFIX, TILE_PREFIX, TileLine};
use crate::checkpoint::Checkpoint;
use crate::hash::{self, Hash};
use crate::note::{NoteError, VerifyingKey};
use crate::tile::TILE_WIDTH;

/// Most lines of records in a section. A tile has 256; more of them are wrong anyway, and must not fill the memory.
const LINES_MAX: usize = 2 * TILE_WIDTH;

/// Records up to and with the line that closes them.
pub(super) struct Section {
    bytes: Vec<u8>,
    /// Where each record's line ends, without its line break.
    ends: Vec<usize>,
    /// The number of the first line, from 1.
    pub line: u64,
    close: Close,
}

enum Close {
    Tile(Vec<u8>),
    Checkpoint(Vec<u8>),
    /// The file ended, or went on with more records than a tile has.
    Nothing,
}

/// What a section says.
pub(super) struct Claim {
    /// The number of the first line, from 1.
    pub line: u64,
    /// The hashes of the records' lines.
    pub lines: Vec<Hash>,
    /// Which record each line says that it is.
    pub says: Vec<Option<u64>>,
    pub close: Closing,
}

pub(super) enum Closing {
    Tile {
        index: u64,
        hashes: Vec<Hash>,
        checkpoint: Option<Result<(Checkpoint, String), NoteError>>,
    },
    Checkpoint(Result<(Checkpoint, String), NoteError>),
    /// A closing line that can't be read.
    Unreadable,
    Nothing,
}

impl Section {
    /// Reads the next one; none at the end.
    pub fn read(reader: &mut impl BufRead, line: u64) -> io::Result<Option<Self>> {
        let mut section = Self { bytes: Vec::new(), ends: Vec::new(), line, close: Close::Nothing };
        while section.ends.len() <= LINES_MAX {
            let start = section.bytes.len();
            if reader.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut section.bytes)? == 0 {
                return Ok((!section.ends.is_empty()).then_some(section));
            }
            let read = &section.bytes[start..];
            let text = read.strip_suffix(b"\n").unwrap_or(read);
            if text.starts_with(TILE_PREFIX) {
                section.close = Close::Tile(text.to_vec());
                return Ok(Some(section));
            }
            if text.starts_with(CHECKPOINT_PREFIX) {
                section.close = Close::Checkpoint(text.to_vec());
                return Ok(Some(section));
            }
            section.ends.push(start + text.len());
        }
        Ok(Some(section))
    }

    /// How many lines it has, with the one that closes it.
    pub fn line_count(&self) -> u64 {
        let closing = !matches!(self.close, Close::Nothing);
        self.ends.len() as u64 + u64::from(closing)
    }

    /// Hashes its records, and reads the line that closes it.
    pub fn claim(&self, keys: &[VerifyingKey]) -> Claim {
        let (mut lines, mut says, mut start) = (Vec::new(), Vec::new(), 0);
        for &end in &self.ends {
            let record = &self.bytes[start..end];
            lines.push(Hash::leaf(record));
            says.push(sequence_of(record));
            start = end + 1;
        }
        let close = match &self.close {
            Close::Tile(text) => tile(text, keys).unwrap_or(Closing::Unreadable),
            Close::Checkpoint(text) => match serde_json::from_slice::<CheckpointLine<'_>>(text) {
                Ok(line) => Closing::Checkpoint(opened(&line.checkpoint, keys)),
                Err(_) => Closing::Unreadable,
            },
            Close::Nothing => Closing::Nothing,
        };
        Claim { line: self.line, lines, says, close }
    }
}

fn tile(text: &[u8], keys: &[VerifyingKey]) -> Option<Closing> {
    let line: TileLine<'_> = serde_json::from_slice(text).ok()?;
    let hashes = hash::split(&STANDARD.decode(line.hashes.as_bytes()).ok()?)?;
    let fits = !hashes.is_empty() && hashes.len() <= TILE_WIDTH;
    let checkpoint = line.checkpoint.map(|note| opened(&note, keys));
    fits.then_some(Closing::Tile { index: line.tile, hashes, checkpoint })
}

fn opened(note: &str, keys: &[VerifyingKey]) -> Result<(Checkpoint, String), NoteError> {
    Ok((Checkpoint::open(note, keys)?, note.to_owned()))
}

/// Which record a line says that it is, without parsing the rest of it.
fn sequence_of(record: &[u8]) -> Option<u64> {
    let rest = record.strip_prefix(RECORD_PREFIX)?;
    let digits = rest.iter().position(|byte| !byte.is_ascii_digit())?;
    std::str::from_utf8(&rest[..digits]).ok()?.parse().ok()
}
