//! How a tree's hashes are kept: in tiles of 256, so that a proof needs a few of them and not the log.
//!
//! A tile of level 0 holds 256 leaf hashes; a tile of level 1 the roots of 256 tiles of level 0; and so on. All that
//! lies between is computed from them. Only the last tile of each level is not full; a full one never changes again.

use std::collections::BTreeSet;

use crate::hash::Hash;
use crate::range::{Node, Range};

/// How many levels of the tree one level of tiles spans.
pub const TILE_HEIGHT: u32 = 8;
/// How many hashes a full tile has.
pub const TILE_WIDTH: usize = 1 << TILE_HEIGHT;
/// The same, for counting leaves.
pub const TILE_LEAVES: u64 = 1 << TILE_HEIGHT;
/// How many bytes a full tile's hashes have.
pub const HASH_TILE_BYTES: usize = TILE_WIDTH * crate::hash::HASH_BYTES;

/// Names a tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TileId {
    /// 0: of leaves.
    pub level: u32,
    /// Which of its level, from 0.
    pub index: u64,
}

impl TileId {
    /// The tile from which a perfect subtree's root can be computed.
    pub const fn of(node: Node) -> Self {
        let level = node.level / TILE_HEIGHT;
        let above = node.level % TILE_HEIGHT;
        Self { level, index: (node.index << above) >> TILE_HEIGHT }
    }
}

/// The tiles that these ranges' hashes are computed from.
pub fn needed(ranges: &[Range]) -> BTreeSet<TileId> {
    ranges.iter().flat_map(|range| range.nodes()).map(TileId::of).collect()
}

/// The hash of a perfect subtree, out of the tile that [`TileId::of`] names; none when the tile is too short for it.
pub fn node_of(tile: &[Hash], node: Node) -> Option<Hash> {
    let above = node.level % TILE_HEIGHT;
    let start = usize::try_from((node.index << above) & (TILE_LEAVES - 1)).ok()?;
    Some(root(tile.get(start..start + (1 << above))?))
}

/// The root of a perfect subtree, of its `2^n` hashes.
pub fn root(hashes: &[Hash]) -> Hash {
    let mut row = hashes.to_vec();
    while row.len() > 1 {
        row = row.chunks_exact(2).map(|pair| Hash::node(&pair[0], &pair[1])).collect();
    }
    row.first().copied().unwrap_or_else(Hash::empty_root)
}
