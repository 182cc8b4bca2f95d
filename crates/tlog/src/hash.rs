//! Hashes of leaves and nodes: SHA-256 with a byte in front that tells the two apart (RFC 6962, section 2.1).
//!
//! Without that byte a node's two hashes could be passed off as a leaf, and a log be shown with another shape.

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::digest::{Context, SHA256, digest};

/// How many bytes a hash has.
pub const HASH_BYTES: usize = 32;

const LEAF: [u8; 1] = [0];
const NODE: [u8; 1] = [1];

/// A hash of a leaf or of a subtree. Its text is base64.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hash(pub [u8; HASH_BYTES]);

/// Text that is not the base64 of 32 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a hash: expected base64 of 32 bytes")]
pub struct NotAHash;

impl Hash {
    /// The root of a log without records: SHA-256 of nothing.
    pub fn empty_root() -> Self {
        Self::of_digest(&digest(&SHA256, b""))
    }

    /// The hash of a record's bytes.
    pub fn leaf(record: &[u8]) -> Self {
        let mut context = Context::new(&SHA256);
        context.update(&LEAF);
        context.update(record);
        Self::of_digest(&context.finish())
    }

    /// The hash of a node, of the hashes of its two halves.
    pub fn node(left: &Self, right: &Self) -> Self {
        let mut bytes = [0; 1 + 2 * HASH_BYTES];
        bytes[..1].copy_from_slice(&NODE);
        bytes[1..=HASH_BYTES].copy_from_slice(&left.0);
        bytes[1 + HASH_BYTES..].copy_from_slice(&right.0);
        Self::of_digest(&digest(&SHA256, &bytes))
    }

    fn of_digest(digest: &ring::digest::Digest) -> Self {
        let mut bytes = [0; HASH_BYTES];
        bytes.copy_from_slice(digest.as_ref());
        Self(bytes)
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

impl FromStr for Hash {
    type Err = NotAHash;
    fn from_str(text: &str) -> Result<Self, NotAHash> {
        let bytes = STANDARD.decode(text).map_err(|_| NotAHash)?;
        Ok(Self(bytes.try_into().map_err(|_| NotAHash)?))
    }
}

/// Many hashes, one after the other, as bytes.
pub fn join(hashes: &[Hash]) -> Vec<u8> {
    hashes.iter().flat_map(|hash| hash.0).collect()
}

/// Takes bytes apart that [`join`] put together; none when they are not whole hashes.
pub fn split(bytes: &[u8]) -> Option<Vec<Hash>> {
    let chunks = bytes.chunks_exact(HASH_BYTES);
    if !chunks.remainder().is_empty() {
        return None;
    }
    chunks.map(|chunk| chunk.try_into().ok().map(Hash)).collect()
}
