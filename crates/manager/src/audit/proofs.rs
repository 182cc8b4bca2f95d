//! Proofs out of the stored tiles: a few reads for a log of any size.

use std::collections::HashMap;

use berth_api::manager::{AuditCheckpoint, AuditKey, ConsistencyProof, InclusionProof};
use berth_tlog::proof::{self, OutOfLog};
use berth_tlog::range::Range;
use berth_tlog::tile::{self, TILE_LEAVES, TileId};
use berth_tlog::{Frontier, Hash};

use super::tree::Tree;
use super::{Audit, AuditError, layout};

impl Audit {
    /// What the log is now, signed.
    pub fn checkpoint(&self) -> AuditCheckpoint {
        let tree = self.tree.borrow();
        AuditCheckpoint {
            origin: self.key.public().name().to_owned(),
            size: tree.size(),
            root: tree.root().to_string(),
            note: tree.note().to_owned(),
        }
    }

    /// The public key that checkpoints are signed with.
    pub fn key(&self) -> AuditKey {
        let public = self.key.public();
        AuditKey {
            origin: public.name().to_owned(),
            algorithm: "ed25519".to_owned(),
            key: public.to_string(),
        }
    }

    /// Proves that a record is in the log of that size; none: the log as it is now.
    ///
    /// # Errors
    /// When it is not, or the store fails.
    pub async fn inclusion(&self, sequence: u64, size: Option<u64>) -> Result<InclusionProof, AuditError> {
        let tree = Tree::clone(&self.tree.borrow());
        let size = within(size, &tree)?;
        let steps = self.hashes(&tree, &proof::inclusion(sequence, size)?).await?;
        let lines = layout::lines_of(&**self.store(), sequence / TILE_LEAVES).await?;
        let offset = usize::try_from(sequence % TILE_LEAVES).unwrap_or(usize::MAX);
        let leaf = lines.get(offset).ok_or_else(|| layout::damaged(&format!("record {sequence}")))?;
        Ok(InclusionProof {
            sequence,
            size,
            root: self.root(&tree, size).await?.to_string(),
            leaf: String::from_utf8_lossy(leaf).into_owned(),
            proof: texts(&steps),
            checkpoint: tree.note().to_owned(),
        })
    }

    /// Proves that the log of the one size is the beginning of the log of the other; none: the log as it is now.
    ///
    /// # Errors
    /// When there were no such logs, or the store fails.
    pub async fn consistency(&self, from: u64, to: Option<u64>) -> Result<ConsistencyProof, AuditError> {
        let tree = Tree::clone(&self.tree.borrow());
        let to = within(to, &tree)?;
        let steps = self.hashes(&tree, &proof::consistency(from, to)?).await?;
        Ok(ConsistencyProof {
            from,
            to,
            root: self.root(&tree, to).await?.to_string(),
            proof: texts(&steps),
            checkpoint: tree.note().to_owned(),
        })
    }

    async fn root(&self, tree: &Tree, size: u64) -> Result<Hash, AuditError> {
        if size == tree.size() {
            return Ok(tree.root());
        }
        let hashes = self.hashes(tree, &[Range { low: 0, high: size }]).await?;
        Ok(hashes[0])
    }

    /// The right edge of the log as it was at that size.
    pub(super) async fn frontier(&self, tree: &Tree, size: u64) -> Result<Frontier, AuditError> {
        let nodes = Frontier::nodes(size);
        let ranges: Vec<Range> = nodes
            .iter()
            .map(|node| Range { low: node.index << node.level, high: (node.index + 1) << node.level })
            .collect();
        let peaks = self.hashes(tree, &ranges).await?;
        Frontier::from_peaks(size, peaks).ok_or_else(|| layout::damaged("the log's tiles"))
    }

    /// The hashes of these ranges.
    async fn hashes(&self, tree: &Tree, ranges: &[Range]) -> Result<Vec<Hash>, AuditError> {
        let mut tiles: HashMap<TileId, Vec<Hash>> = HashMap::new();
        for id in tile::needed(ranges) {
            let hashes = match tree.partial(id) {
                Some(partial) => partial.to_vec(),
                None if id.level == 0 => layout::full_tile(&**self.store(), id.index).await?.0,
                None => layout::upper_tile(&**self.store(), id).await?,
            };
            tiles.insert(id, hashes);
        }
        let hash = |range: &Range| range.hash(|node| tile::node_of(tiles.get(&TileId::of(node))?, node));
        let hashes: Option<Vec<Hash>> = ranges.iter().map(hash).collect();
        hashes.ok_or_else(|| layout::damaged("a tile of the log"))
    }
}

fn within(size: Option<u64>, tree: &Tree) -> Result<u64, OutOfLog> {
    let size = size.unwrap_or(tree.size());
    if size > tree.size() { Err(OutOfLog { asked: size, size: tree.size() }) } else { Ok(size) }
}

fn texts(hashes: &[Hash]) -> Vec<String> {
    hashes.iter().map(Hash::to_string).collect()
}
