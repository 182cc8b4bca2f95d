//! Proofs that a record is in a log, and that a log has only grown (RFC 6962, sections 2.1.1 and 2.1.2).
//!
//! A proof is made in two steps: here it is said which ranges of leaves it consists of, the caller brings their hashes
//! from wherever they are kept. Checking follows RFC 9162, sections 2.1.3.2 and 2.1.4.2.

use crate::hash::Hash;
use crate::range::{Range, split_at};

/// A question about a log that it can't answer: a record beyond its size, or an older log that is larger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{asked} is not within a log of {size}")]
pub struct OutOfLog {
    /// What was asked about.
    pub asked: u64,
    /// The log's size.
    pub size: u64,
}

/// A proof that does not prove it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the proof does not lead to the log's root")]
pub struct NotProven;

/// What the proof that record `index` is among the first `size` consists of, from the leaf upwards.
///
/// # Errors
/// When it is not one of them.
pub fn inclusion(index: u64, size: u64) -> Result<Vec<Range>, OutOfLog> {
    if index >= size {
        return Err(OutOfLog { asked: index, size });
    }
    let mut ranges = Vec::new();
    let (mut low, mut high) = (0, size);
    while high - low > 1 {
        let middle = low + split_at(high - low);
        if index < middle {
            ranges.push(Range { low: middle, high });
            high = middle;
        } else {
            ranges.push(Range { low, high: middle });
            low = middle;
        }
    }
    ranges.reverse();
    Ok(ranges)
}

/// What the proof that the first `from` of `to` records were the whole log once consists of.
///
/// # Errors
/// When `from` is 0 (of which there is nothing to prove) or more than `to`.
pub fn consistency(from: u64, to: u64) -> Result<Vec<Range>, OutOfLog> {
    if from == 0 || from > to {
        return Err(OutOfLog { asked: from, size: to });
    }
    let mut ranges = Vec::new();
    let (mut low, mut high, mut is_whole) = (0, to, true);
    while high != from {
        let middle = low + split_at(high - low);
        if from <= middle {
            ranges.push(Range { low: middle, high });
            high = middle;
        } else {
            ranges.push(Range { low, high: middle });
            (low, is_whole) = (middle, false);
        }
    }
    if !is_whole {
        ranges.push(Range { low, high });
    }
    ranges.reverse();
    Ok(ranges)
}

/// Checks that the record with this leaf hash is record `index` of the log of this size and root.
///
/// # Errors
/// When the proof does not lead there.
pub fn verify_inclusion(
    leaf: &Hash,
    index: u64,
    size: u64,
    root: &Hash,
    proof: &[Hash],
) -> Result<(), NotProven> {
    if index >= size {
        return Err(NotProven);
    }
    let (mut node, mut last, mut hash) = (index, size - 1, *leaf);
    for step in proof {
        if last == 0 {
            return Err(NotProven);
        }
        if node & 1 == 1 || node == last {
            hash = Hash::node(step, &hash);
            while node & 1 == 0 && node != 0 {
                node >>= 1;
                last >>= 1;
            }
        } else {
            hash = Hash::node(&hash, step);
        }
        node >>= 1;
        last >>= 1;
    }
    if last == 0 && hash == *root { Ok(()) } else { Err(NotProven) }
}

/// Checks that the log of size `from` is the beginning of the log of size `to`.
///
/// # Errors
/// When the proof does not lead to both roots.
pub fn verify_consistency(
    from: u64,
    to: u64,
    from_root: &Hash,
    to_root: &Hash,
    proof: &[Hash],
) -> Result<(), NotProven> {
    if from == to {
        return if proof.is_empty() && from_root == to_root { Ok(()) } else { Err(NotProven) };
    }
    if from > to {
        return Err(NotProven);
    }
    if from == 0 {
        // Every log begins with nothing.
        return if proof.is_empty() && *from_root == Hash::empty_root() { Ok(()) } else { Err(NotProven) };
    }
    let (mut node, mut last) = (from - 1, to - 1);
    while node & 1 == 1 {
        node >>= 1;
        last >>= 1;
    }
    let mut steps = proof.iter();
    // A power of two is a subtree of the larger log as it is.
    let start = if from.is_power_of_two() { from_root } else { steps.next().ok_or(NotProven)? };
    let (mut old, mut new) = (*start, *start);
    for step in steps {
        if last == 0 {
            return Err(NotProven);
        }
        if node & 1 == 1 || node == last {
            old = Hash::node(step, &old);
            new = Hash::node(step, &new);
            while node & 1 == 0 && node != 0 {
                node >>= 1;
                last >>= 1;
            }
        } else {
            new = Hash::node(&new, step);
        }
        node >>= 1;
        last >>= 1;
    }
    if last == 0 && old == *from_root && new == *to_root { Ok(()) } else { Err(NotProven) }
}
