//! Checkpoints (C2SP tlog-checkpoint): origin, size and root of a log, each on a line, as a signed note.

use crate::hash::Hash;
use crate::note::{self, NoteError, SigningKey, VerifyingKey};

/// What a log was at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Which log.
    pub origin: String,
    /// How many records it had.
    pub size: u64,
    /// The root over them.
    pub root: Hash,
}

impl Checkpoint {
    /// The text that is signed.
    pub fn text(&self) -> String {
        format!("{}\n{}\n{}\n", self.origin, self.size, self.root)
    }

    /// The signed note.
    pub fn sign(&self, key: &SigningKey) -> String {
        key.sign(&self.text())
    }

    /// Reads a note that one of `keys` signed.
    ///
    /// # Errors
    /// When none of them did, or it is not a checkpoint.
    pub fn open(note: &str, keys: &[VerifyingKey]) -> Result<Self, NoteError> {
        Self::parse(note::open(note, keys)?).ok_or(NoteError::Malformed { detail: "not a checkpoint" })
    }

    /// Reads the text of a checkpoint, signed or not: nothing is said of whether it can be believed.
    pub fn parse(text: &str) -> Option<Self> {
        let mut lines = text.split('\n');
        let (origin, size, root) = (lines.next()?, lines.next()?, lines.next()?);
        // One way to write a number: others would be the same size under another signature.
        let canonical =
            size == "0" || (size.as_bytes().first()? != &b'0' && size.bytes().all(|b| b.is_ascii_digit()));
        if origin.is_empty() || !canonical {
            return None;
        }
        Some(Self { origin: origin.to_owned(), size: size.parse().ok()?, root: root.parse().ok()? })
    }
}
