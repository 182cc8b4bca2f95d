//! Growing a tree without keeping it: the roots of its perfect subtrees, at most one of each size.
//!
//! That is all that is needed to add a leaf and to say the root: a few hundred bytes for any number of leaves.

use crate::hash::Hash;
use crate::range::{Range, fold};

/// The right edge of a tree.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Frontier {
    size: u64,
    /// The roots of its perfect subtrees, the largest first: one for each bit of the size.
    peaks: Vec<Hash>,
}

impl Frontier {
    /// Of a log without records.
    pub const fn new() -> Self {
        Self { size: 0, peaks: Vec::new() }
    }

    /// Of `size` leaves, whose perfect subtrees have these roots; none when there are not as many as there must be.
    pub fn from_peaks(size: u64, peaks: Vec<Hash>) -> Option<Self> {
        (peaks.len() == size.count_ones() as usize).then_some(Self { size, peaks })
    }

    /// How many leaves there are.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// The roots of its perfect subtrees, the largest first.
    pub fn peaks(&self) -> &[Hash] {
        &self.peaks
    }

    /// Adds a leaf.
    pub fn push(&mut self, leaf: Hash) {
        self.push_subtree(0, leaf);
    }

    /// Adds a perfect subtree of `2^level` leaves; the size must be a multiple of that.
    ///
    /// # Panics
    /// When it is not: the tree would have another shape than its size says.
    pub fn push_subtree(&mut self, level: u32, root: Hash) {
        let leaves = 1u64 << level;
        assert!(self.size.is_multiple_of(leaves), "{leaves} leaves can't stand behind {}", self.size);
        let mut hash = root;
        let mut carry = self.size >> level;
        while carry & 1 == 1 {
            let left = self.peaks.pop().expect("there is a peak for each bit of the size");
            hash = Hash::node(&left, &hash);
            carry >>= 1;
        }
        self.peaks.push(hash);
        self.size += leaves;
    }

    /// The root over all leaves.
    pub fn root(&self) -> Hash {
        fold(&self.peaks).unwrap_or_else(Hash::empty_root)
    }

    /// The perfect subtrees that the first `size` leaves are made of, whose roots [`Self::from_peaks`] takes.
    pub fn nodes(size: u64) -> Vec<crate::range::Node> {
        Range { low: 0, high: size }.nodes()
    }
}
