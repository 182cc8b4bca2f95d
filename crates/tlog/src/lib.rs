//! A log that can only grow, and that can be checked by those who don't trust its keeper.
//!
//! Records are the leaves of a Merkle tree, hashed as RFC 6962 has it. The tree's root says all of them in 32 bytes;
//! signed, with origin and size, it is a *checkpoint* (C2SP tlog-checkpoint). From then on no record below that size
//! can be changed, removed, inserted or moved without another root. Who holds an old checkpoint can be shown that the
//! log has only grown since (a consistency proof); who holds a record can be shown that it is in the log (an
//! inclusion proof); and who holds an *export*, a file with the records' own bytes, can check all of it with the
//! public key alone, without the program that wrote it.
//!
//! This crate knows nothing of what the records say, of files, of clocks or of the network.
//!
//! Read in this order: [`hash`], [`range`] (which subtrees there are), [`frontier`] (growing), [`tile`] (how hashes
//! are kept), [`proof`], [`note`] (signatures), [`checkpoint`], and [`export`] (the file, and checking it).

pub mod hash;
pub mod range;

pub mod frontier;
pub mod tile;

pub mod proof;

pub mod checkpoint;
pub mod note;

pub mod export;

pub use checkpoint::Checkpoint;
pub use frontier::Frontier;
pub use hash::Hash;
pub use note::{SigningKey, VerifyingKey};
