//! What is on a guest's disk, read from outside: nothing is mounted, no kernel of ours parses what a guest wrote, and
//! nothing is ever written.
//!
//! ```text
//! layers (qcow2, raw) ──► Disk ──► Volume (the whole disk, or a partition) ──► file system ──► changes between two
//! ```
//!
//! Everything here comes from a guest that somebody may have taken over. So each number that is read is checked before it
//! is used, tables are held within bounds, walks end after a number of entries, and a fault is an error that names the
//! place. Frozen layers are read while a QEMU has them open too, which is safe because nobody writes to them.

pub mod qcow2;

pub mod disk;

pub mod volume;

pub mod compare;
mod tree;

pub use compare::{Comparison, FileSystemChanges, compare};
pub use disk::{Disk, DiskError, LayerFile, LayerFormat};
pub use tree::{Aspect, FileChange, FileChangeKind, Options};
