//! The log's tree in memory: its right edge, and the tiles that are not full yet.
//!
//! A few kilobytes, whatever the log's size; the full tiles are in the store.

use std::collections::BTreeMap;

use berth_store::{Revision, Store};
use berth_tlog::tile::{self, TILE_HEIGHT, TILE_LEAVES, TILE_WIDTH, TileId};
use berth_tlog::{Checkpoint, Frontier, Hash, SigningKey};

use super::layout::{self, HEAD_KEY, Head, damaged};
use super::{AuditError, OtherKey};

/// A tree, with the checkpoint that is signed for it.
#[derive(Debug, Clone)]
pub(crate) struct Tree {
    frontier: Frontier,
    /// For each level of tiles the one that is not full.
    partial: Vec<Vec<Hash>>,
    note: String,
}

/// Tiles that were changed, with the checkpoint of those leaves' tiles that became full.
pub(super) type Changed = BTreeMap<TileId, (Vec<Hash>, Option<String>)>;

impl Tree {
    /// Of a log without records.
    pub fn empty(key: &SigningKey) -> Self {
        let mut tree = Self { frontier: Frontier::new(), partial: vec![Vec::new()], note: String::new() };
        tree.sign(key);
        tree
    }

    /// Reads it, and checks that it is what was signed.
    pub async fn load(
        store: &dyn Store,
        key: &SigningKey,
        other_key: OtherKey,
    ) -> Result<(Self, Revision), AuditError> {
        let Some(entry) = store.get(HEAD_KEY).await? else {
            return Ok((Self::empty(key), Revision::ABSENT));
        };
        let head: Head = layout::decode(HEAD_KEY, &entry.value)?;
        let lines = layout::lines_of(store, head.size / TILE_LEAVES).await?;
        let mut partial = vec![lines.iter().map(|line| Hash::leaf(line)).collect::<Vec<_>>()];
        let mut above = head.size >> TILE_HEIGHT;
        while above > 0 {
            let id = TileId {
                level: u32::try_from(partial.len()).unwrap_or(u32::MAX),
                index: above >> TILE_HEIGHT,
            };
            let hashes = match above % TILE_LEAVES {
                0 => Vec::new(),
                _ => layout::upper_tile(store, id).await?,
            };
            partial.push(hashes);
            above >>= TILE_HEIGHT;
        }
        for (level, hashes) in partial.iter().enumerate() {
            let wanted = (head.size >> (TILE_HEIGHT as usize * level)) % TILE_LEAVES;
            if hashes.len() as u64 != wanted {
                return Err(damaged(&format!("the last tile of level {level}")));
            }
        }
        let tree = Self {
            frontier: edge(head.size, &partial).ok_or_else(|| damaged(HEAD_KEY))?,
            partial,
            note: head.note,
        };
        tree.check(key, other_key)?;
        Ok((tree, entry.mod_revision))
    }

    /// What was signed is what is there. A note of another key than today's is one of a key that was replaced, or of
    /// somebody who could write the store and not read the key; which of them, nobody here can tell.
    fn check(&self, key: &SigningKey, other_key: OtherKey) -> Result<(), AuditError> {
        use berth_tlog::note::NoteError;
        let signed = match Checkpoint::open(&self.note, std::slice::from_ref(key.public())) {
            Err(NoteError::UnknownKey) if other_key == OtherKey::Refused => {
                let detail = "its last checkpoint was not signed with pki/audit.key: put that file back from a backup; \
                              if it is lost, set accept_new_key under [audit] for one start";
                return Err(AuditError::Damaged { detail: detail.to_owned() });
            }
            Err(NoteError::UnknownKey) => {
                tracing::warn!("the audit's key is not the one that its last checkpoint was signed with");
                Checkpoint::parse(&self.note).ok_or_else(|| damaged(HEAD_KEY))?
            }
            Err(error) => return Err(AuditError::Damaged { detail: error.to_string() }),
            Ok(signed) => signed,
        };
        if (signed.size, signed.root) == (self.size(), self.frontier.root()) {
            return Ok(());
        }
        let detail = format!("its {} records do not lead to the root that was signed", self.size());
        Err(AuditError::Damaged { detail })
    }

    pub const fn size(&self) -> u64 {
        self.frontier.size()
    }

    /// The signed checkpoint.
    pub fn note(&self) -> &str {
        &self.note
    }

    pub fn root(&self) -> Hash {
        self.frontier.root()
    }

    /// The tile that is not full yet, if it is this one.
    pub fn partial(&self, id: TileId) -> Option<&[Hash]> {
        let filled = self.size() >> (TILE_HEIGHT * (id.level + 1)).min(u64::BITS - 1);
        let level = usize::try_from(id.level).ok()?;
        (id.index == filled).then(|| self.partial.get(level).map(Vec::as_slice).unwrap_or_default())
    }

    /// Adds a leaf, and notes which tiles it changes. The checkpoint is as old as before until [`Self::sign`].
    pub fn push(&mut self, leaf: Hash, key: &SigningKey, changed: &mut Changed) {
        self.frontier.push(leaf);
        let (mut hash, mut level) = (leaf, 0u32);
        loop {
            let position = usize::try_from(level).expect("levels are few");
            if self.partial.len() <= position {
                self.partial.push(Vec::new());
            }
            let row = &mut self.partial[position];
            row.push(hash);
            let index = ((self.frontier.size() >> (TILE_HEIGHT * level)) - 1) >> TILE_HEIGHT;
            let id = TileId { level, index };
            if row.len() < TILE_WIDTH {
                if level > 0 {
                    changed.insert(id, (row.clone(), None));
                }
                return;
            }
            let full = std::mem::take(row);
            hash = tile::root(&full);
            let note = (level == 0).then(|| {
                self.sign(key);
                self.note.clone()
            });
            changed.insert(id, (full, note));
            level += 1;
        }
    }

    /// Signs what it is now.
    pub fn sign(&mut self, key: &SigningKey) {
        let origin = key.public().name().to_owned();
        self.note = Checkpoint { origin, size: self.size(), root: self.root() }.sign(key);
    }
}

/// The right edge, out of the tiles that are not full.
fn edge(size: u64, partial: &[Vec<Hash>]) -> Option<Frontier> {
    let mut peaks = Vec::new();
    for node in Frontier::nodes(size) {
        let row = partial.get(usize::try_from(node.level / TILE_HEIGHT).ok()?)?;
        peaks.push(tile::node_of(row, node)?);
    }
    Frontier::from_peaks(size, peaks)
}
