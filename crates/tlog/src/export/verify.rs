//! Checking an export, and saying which record is wrong.

use std::io::{self, BufRead, Read};

use super::section::{Claim, Closing, Section};
use super::{Header, LINE_BYTES_MAX, VERSION, tile_start};
use crate::checkpoint::Checkpoint;
use crate::frontier::Frontier;
use crate::hash::Hash;
use crate::note::{NoteError, VerifyingKey};
use crate::tile::{TILE_LEAVES, TILE_WIDTH, root};

/// How many sections one thread is given at once: some 7 MiB of records.
const SECTIONS_PER_THREAD: usize = 64;
/// Most threads. Reading the file is what more of them would wait for.
const THREADS_MAX: usize = 8;

/// What is to be believed, and what is known already.
#[derive(Debug, Clone, Default)]
pub struct Question {
    /// The keys that are trusted: several when the log's key was replaced once.
    pub keys: Vec<VerifyingKey>,
    /// A checkpoint of the same log that was seen earlier and believed: the export must contain that log.
    pub known: Option<Checkpoint>,
}

/// What was found to be true.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// The first record that is in the file.
    pub first: u64,
    /// The first that is not, behind it.
    pub end: u64,
    /// What all of it leads to.
    pub checkpoint: Checkpoint,
    /// The checkpoint's signed note.
    pub note: String,
    /// Whether the known checkpoint was one of this log; none when there was none, or it lies before the stretch.
    pub contains_known: Option<bool>,
}

impl Verified {
    /// Whether the file holds the whole log, up to its checkpoint.
    pub const fn is_whole(&self) -> bool {
        self.first == 0 && self.end == self.checkpoint.size
    }
}

/// The first thing that is wrong with an export. Lines are counted from 1.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The file can't be read.
    #[error("the export can't be read")]
    Io(#[from] io::Error),
    /// Not a line of an export.
    #[error("line {line} is not that of an export: expected {expected}")]
    Format {
        /// Which line.
        line: u64,
        /// What should stand there.
        expected: String,
    },
    /// A checkpoint that can't be believed.
    #[error("the checkpoint at line {line} can't be believed")]
    Note {
        /// Which line.
        line: u64,
        /// Why not.
        #[source]
        source: NoteError,
    },
    /// A checkpoint of another log, or of another size than the records before it.
    #[error(
        "line {line} has the checkpoint of '{origin}' with {size} records, where {expected} was expected"
    )]
    OtherCheckpoint {
        /// Which line.
        line: u64,
        /// Its log.
        origin: String,
        /// Its size.
        size: u64,
        /// What should stand there.
        expected: String,
    },
    /// A record that was changed, or forged in another's place.
    #[error("record {sequence} (line {line}) is not what was logged: it was changed or forged")]
    Altered {
        /// Which record.
        sequence: u64,
        /// Which line.
        line: u64,
    },
    /// A record that is not there.
    #[error("record {sequence} was removed: it should stand at line {line}")]
    Removed {
        /// Which record.
        sequence: u64,
        /// Where it should be.
        line: u64,
    },
    /// A record that was never logged, between others.
    #[error("line {line} has a record that was never logged, where record {sequence} should stand")]
    Inserted {
        /// Whose place it is in.
        sequence: u64,
        /// Which line.
        line: u64,
    },
    /// A record in another's place.
    #[error("record {found} stands at line {line}, where record {sequence} should")]
    Moved {
        /// Whose place it is.
        sequence: u64,
        /// Which line.
        line: u64,
        /// Which stands there.
        found: u64,
    },
    /// The list of hashes was changed; the records themselves were not.
    #[error(
        "the hashes at line {line} were changed; the records {first} to {last} before them are as logged"
    )]
    Hashes {
        /// Which line.
        line: u64,
        /// The first of the records.
        first: u64,
        /// The last of them.
        last: u64,
    },
    /// Records that were changed together with their hashes, by somebody who has not the key.
    #[error(
        "one or more of the records {first} to {last} (from line {line}) are not what was logged, and their hashes were changed with them"
    )]
    Among {
        /// The line of the first.
        line: u64,
        /// The first of them.
        first: u64,
        /// The last of them.
        last: u64,
    },
    /// The file ends too soon.
    #[error(
        "the export ends at line {line}, behind record {sequence}, without its checkpoint: it was cut off"
    )]
    CutOff {
        /// The last line.
        line: u64,
        /// How many records were found good.
        sequence: u64,
    },
    /// An earlier checkpoint is of a longer log.
    #[error("the log has {size} records, and had {known} when it was last seen: it was cut off")]
    Shrunk {
        /// How many now.
        size: u64,
        /// How many then.
        known: u64,
    },
    /// An earlier checkpoint is of another history.
    #[error(
        "the first {known} records are not those of the checkpoint that was last seen: history was rewritten"
    )]
    Rewritten {
        /// How many then.
        known: u64,
    },
}

/// Checks an export; what it holds is not kept in memory.
///
/// # Errors
/// The first thing that is wrong with it.
pub fn verify(mut reader: impl BufRead, question: &Question) -> Result<Verified, Fault> {
    let mut walk = Walk::begin(&mut reader, question)?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
    let mut line = 2;
    loop {
        let mut sections = Vec::new();
        while sections.len() < threads * SECTIONS_PER_THREAD {
            let Some(section) = Section::read(&mut reader, line)? else { break };
            line += section.line_count();
            sections.push(section);
        }
        if sections.is_empty() {
            return walk.finish(line - 1);
        }
        for claim in claims(&sections, &question.keys, threads) {
            walk.step(claim)?;
        }
    }
}

/// What the sections say, worked out by several threads.
fn claims(sections: &[Section], keys: &[VerifyingKey], threads: usize) -> Vec<Claim> {
    let share = sections.len().div_ceil(threads);
    std::thread::scope(|scope| {
        let workers: Vec<_> = sections
            .chunks(share)
            .map(|part| {
                scope.spawn(move || part.iter().map(|section| section.claim(keys)).collect::<Vec<_>>())
            })
            .collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("hashing does not panic")).collect()
    })
}

/// How far the export has been followed.
struct Walk<'a> {
    question: &'a Question,
    header: Header,
    /// Everything before the section that comes next; what stands here was found good.
    frontier: Frontier,
    /// The last tile is not full and waits for the checkpoint that closes the file.
    last: Option<Tile>,
    end: Option<(Checkpoint, String)>,
    contains_known: Option<bool>,
}

/// A tile with the lines of its records.
struct Tile {
    claim_line: u64,
    closing_line: u64,
    lines: Vec<Hash>,
    says: Vec<Option<u64>>,
    hashes: Vec<Hash>,
}

impl<'a> Walk<'a> {
    fn begin(reader: &mut impl BufRead, question: &'a Question) -> Result<Self, Fault> {
        let mut line = Vec::new();
        reader.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line)?;
        let wrong = || Fault::Format { line: 1, expected: "the head of an export (jsonl)".to_owned() };
        let header: Header = serde_json::from_slice(&line).map_err(|_| wrong())?;
        if header.version != VERSION || header.first > header.end {
            return Err(wrong());
        }
        let peaks: Result<Vec<Hash>, _> = header.peaks.iter().map(|peak| peak.parse()).collect();
        let frontier = Frontier::from_peaks(tile_start(header.first), peaks.map_err(|_| wrong())?);
        let frontier = frontier.ok_or_else(wrong)?;
        let mut walk = Self { question, header, frontier, last: None, end: None, contains_known: None };
        if let Some(known) = question.known.as_ref().filter(|known| known.size == walk.frontier.size()) {
            walk.compare(known)?;
        }
        Ok(walk)
    }

    fn step(&mut self, claim: Claim) -> Result<(), Fault> {
        let closing_line = claim.line + claim.lines.len() as u64;
        if self.end.is_some() {
            return Err(Fault::Format { line: claim.line, expected: "the end".to_owned() });
        }
        match claim.close {
            Closing::Tile { index, hashes, checkpoint } => {
                let tile = Tile {
                    claim_line: claim.line,
                    closing_line,
                    lines: claim.lines,
                    says: claim.says,
                    hashes,
                };
                if self.last.is_some() || index != self.frontier.size() / TILE_LEAVES {
                    return Err(self.out_of_step(&tile));
                }
                match checkpoint {
                    None => self.last = Some(tile),
                    Some(opened) => {
                        let (checkpoint, _) = opened.map_err(|source| self.doubt(&tile, source))?;
                        self.judge(&tile, closing_line, &checkpoint)?;
                    }
                }
                Ok(())
            }
            Closing::Checkpoint(opened) => {
                if !claim.lines.is_empty() {
                    let (sequence, line) = (self.frontier.size().max(self.header.first), claim.line);
                    return Err(Fault::Inserted { sequence, line });
                }
                let last = self.last.take();
                let opened = opened.map_err(|source| match &last {
                    Some(tile) => self.doubt(tile, source),
                    None => Fault::Note { line: closing_line, source },
                })?;
                match last {
                    Some(tile) => self.judge(&tile, closing_line, &opened.0)?,
                    None => self.agree(closing_line, &opened.0)?,
                }
                self.end = Some(opened);
                Ok(())
            }
            Closing::Unreadable => {
                Err(Fault::Format { line: closing_line, expected: "hashes, or a checkpoint".to_owned() })
            }
            Closing::Nothing => Err(self.cut_off(&claim.lines, &claim.says, claim.line)),
        }
    }

    /// The records of a tile that starts where the walk stands: from which, and how many of them are in the file.
    fn stretch(&self, hashes: usize) -> (u64, usize, usize) {
        let start = self.frontier.size();
        let length = hashes as u64;
        let low = self.header.first.clamp(start, start + length) - start;
        let high = self.header.end.clamp(start, start + length) - start;
        let within = |offset| usize::try_from(offset).unwrap_or(TILE_WIDTH);
        (start + low, within(low), within(high))
    }

    /// Holds a tile against the checkpoint that was signed behind it, and goes on.
    fn judge(&mut self, tile: &Tile, note_line: u64, checkpoint: &Checkpoint) -> Result<(), Fault> {
        let (first, low, high) = self.stretch(tile.hashes.len());
        let expected = tile.hashes.get(low..high).unwrap_or_default();
        let after = self.with(&tile.hashes);
        let is_right_size = checkpoint.size == after.size() && checkpoint.origin == self.header.log;
        if is_right_size && after.root() == checkpoint.root {
            if expected != tile.lines {
                return Err(locate(first, expected, tile));
            }
            self.look_back(&tile.hashes)?;
            self.frontier = after;
            return Ok(());
        }
        if !is_right_size {
            self.agree_on_size(note_line, after.size(), checkpoint)?;
        }
        // The hashes are not those that were signed. Are the records?
        let mut own = tile.hashes.clone();
        if expected.len() == tile.lines.len() {
            own[low..high].copy_from_slice(&tile.lines);
        }
        let last = (first + expected.len() as u64).saturating_sub(1);
        if expected != tile.lines && self.with(&own).root() == checkpoint.root {
            return Err(Fault::Hashes { line: tile.closing_line, first, last });
        }
        if expected != tile.lines {
            return Err(locate(first, expected, tile));
        }
        match wrong_number(first, tile) {
            Some(fault) => Err(fault),
            None => Err(Fault::Among { line: tile.claim_line, first, last }),
        }
    }

    fn with(&self, hashes: &[Hash]) -> Frontier {
        let mut after = self.frontier.clone();
        if hashes.len() == TILE_WIDTH {
            after.push_subtree(crate::tile::TILE_HEIGHT, root(hashes));
        } else {
            hashes.iter().for_each(|hash| after.push(*hash));
        }
        after
    }

    /// Compares with what was seen earlier, if that lies within these leaves.
    fn look_back(&mut self, hashes: &[Hash]) -> Result<(), Fault> {
        let Some(known) = &self.question.known else { return Ok(()) };
        let start = self.frontier.size();
        if known.size <= start || known.size > start + hashes.len() as u64 {
            return Ok(());
        }
        let mut then = self.frontier.clone();
        for hash in hashes.iter().take(usize::try_from(known.size - start).unwrap_or(TILE_WIDTH)) {
            then.push(*hash);
        }
        if then.root() != known.root {
            return Err(Fault::Rewritten { known: known.size });
        }
        self.contains_known = Some(true);
        Ok(())
    }

    fn compare(&mut self, known: &Checkpoint) -> Result<(), Fault> {
        if self.frontier.root() != known.root {
            return Err(Fault::Rewritten { known: known.size });
        }
        self.contains_known = Some(true);
        Ok(())
    }

    fn agree(&self, line: u64, checkpoint: &Checkpoint) -> Result<(), Fault> {
        self.agree_on_size(line, self.frontier.size(), checkpoint)?;
        if checkpoint.root == self.frontier.root() {
            return Ok(());
        }
        let last = self.frontier.size().saturating_sub(1);
        Err(Fault::Among { line: 1, first: self.header.first, last })
    }

    fn agree_on_size(&self, line: u64, size: u64, checkpoint: &Checkpoint) -> Result<(), Fault> {
        let Checkpoint { origin, size: found, .. } = checkpoint.clone();
        if found == size && origin == self.header.log {
            return Ok(());
        }
        let expected = format!("that of '{}' with {size}", self.header.log);
        Err(Fault::OtherCheckpoint { line, origin, size: found, expected })
    }

    /// A signature that is not good: a record that differs from its hash is worth more to be told of.
    fn doubt(&self, tile: &Tile, source: NoteError) -> Fault {
        let (first, low, high) = self.stretch(tile.hashes.len());
        match tile.hashes.get(low..high) {
            Some(expected) if expected != tile.lines => locate(first, expected, tile),
            _ => Fault::Note { line: tile.closing_line, source },
        }
    }

    /// A tile where another one should be: the line that closes the one before, or a whole tile, is not there.
    fn out_of_step(&self, tile: &Tile) -> Fault {
        let first = self.frontier.size().max(self.header.first);
        wrong_number(first, tile).unwrap_or_else(|| Fault::Format {
            line: tile.claim_line + tile.lines.len().min(TILE_WIDTH) as u64,
            expected: format!("the hashes of tile {}", self.frontier.size() / TILE_LEAVES),
        })
    }

    fn cut_off(&self, lines: &[Hash], says: &[Option<u64>], line: u64) -> Fault {
        let sequence = self.frontier.size();
        if lines.len() > TILE_WIDTH {
            let wrong =
                says.iter().zip(sequence.max(self.header.first)..).position(|(says, own)| *says != Some(own));
            let line = line + wrong.unwrap_or(TILE_WIDTH) as u64;
            return Fault::Format {
                line,
                expected: "the next record, or the hashes of those before".to_owned(),
            };
        }
        Fault::CutOff { line: line + (lines.len() as u64).saturating_sub(1), sequence }
    }

    fn finish(self, line: u64) -> Result<Verified, Fault> {
        let size = self.frontier.size();
        let Some((checkpoint, note)) = self.end else { return Err(Fault::CutOff { line, sequence: size }) };
        if self.header.end > size {
            return Err(Fault::CutOff { line, sequence: size });
        }
        if let Some(known) = self.question.known.as_ref().filter(|known| known.size > size) {
            return Err(Fault::Shrunk { size, known: known.size });
        }
        let Header { first, end, .. } = self.header;
        Ok(Verified { first, end, checkpoint, note, contains_known: self.contains_known })
    }
}

/// Which of the lines is the first that is not what its hash says, and what became of it.
fn locate(first: u64, expected: &[Hash], tile: &Tile) -> Fault {
    let lines = &tile.lines;
    let at = lines.iter().zip(expected).take_while(|(line, expected)| line == expected).count();
    let (sequence, line) = (first + at as u64, tile.claim_line + at as u64);
    let Some(here) = lines.get(at) else { return Fault::Removed { sequence, line } };
    let Some(wanted) = expected.get(at) else { return Fault::Inserted { sequence, line } };
    let known_as = expected.iter().position(|hash| hash == here).map(|index| first + index as u64);
    let comes_later = lines[at..].contains(wanted);
    match (known_as, comes_later) {
        (Some(found), true) => Fault::Moved { sequence, line, found },
        (Some(_), false) => Fault::Removed { sequence, line },
        (None, true) => Fault::Inserted { sequence, line },
        (None, false) => match tile.says[at] {
            Some(found) if found != sequence => Fault::Moved { sequence, line, found },
            _ => Fault::Altered { sequence, line },
        },
    }
}

/// The first record that says it is another one than should stand there.
fn wrong_number(first: u64, tile: &Tile) -> Option<Fault> {
    let numbered = tile.says.iter().enumerate().zip(first..);
    numbered.into_iter().find_map(|((offset, says), sequence)| {
        let found = says.filter(|found| *found != sequence)?;
        Some(Fault::Moved { sequence, line: tile.claim_line + offset as u64, found })
    })
}
