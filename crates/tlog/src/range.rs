//! Which subtrees a log has, and which of them make up a range of leaves.
//!
//! The tree over leaves `low..high` is split at the largest power of two below its length (RFC 6962, section 2.1), so
//! every subtree that a proof needs is either *perfect* (a power of two of leaves, aligned) or lies at the right edge
//! and is made of perfect ones.

use crate::hash::Hash;

/// A perfect subtree: `level` 0 is a leaf, and node `index` of a level covers `2^level` leaves from `index * 2^level`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Node {
    /// Height above the leaves.
    pub level: u32,
    /// Which of its level, from the left, from 0.
    pub index: u64,
}

/// The leaves from `low` up to but without `high`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The first.
    pub low: u64,
    /// The first that is not in it.
    pub high: u64,
}

impl Range {
    /// The perfect subtrees that it is made of, from the left: the largest first.
    ///
    /// The range must be one of a log's own subtrees (it begins at a multiple of the next power of two).
    pub fn nodes(self) -> Vec<Node> {
        let mut nodes = Vec::new();
        let mut at = self.low;
        while at < self.high {
            let fits = u64::BITS - 1 - (self.high - at).leading_zeros();
            let level = fits.min(at.trailing_zeros());
            nodes.push(Node { level, index: at >> level });
            at += 1 << level;
        }
        nodes
    }

    /// Its hash, of the hashes of its perfect subtrees; none when one of them is not to be had.
    pub fn hash(self, mut of: impl FnMut(Node) -> Option<Hash>) -> Option<Hash> {
        if self.low >= self.high {
            return Some(Hash::empty_root());
        }
        let mut hashes = Vec::new();
        for node in self.nodes() {
            hashes.push(of(node)?);
        }
        fold(&hashes)
    }
}

/// The root over perfect subtrees that stand beside each other, the largest on the left; none of none.
pub fn fold(peaks: &[Hash]) -> Option<Hash> {
    let (last, rest) = peaks.split_last()?;
    Some(rest.iter().rev().fold(*last, |right, left| Hash::node(left, &right)))
}

/// Where the tree over `length` leaves (at least 2) is split: the largest power of two below `length`.
pub(crate) fn split_at(length: u64) -> u64 {
    1 << (u64::BITS - 1 - (length - 1).leading_zeros())
}
