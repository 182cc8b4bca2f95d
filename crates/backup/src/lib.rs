//! Backups off the host, in restic's repository format.
//!
//! A backup is one restic snapshot with a handful of files in it: what they are is for the agent to say. Here is how they
//! get into a repository and out of it, whoever has written the repository meanwhile:
//!
//! - [`Repository`] opens or makes one, and lists what is in it;
//! - [`export`] puts files in: cut by content, compressed, encrypted, and stored once, however often they come. What the
//!   VM's last backup has is not even read;
//! - [`import`] takes them out, into files of names that are known beforehand, with their holes.
//!
//! `rustic_core` does the format. What it is not trusted with: it goes on where a file can't be read, so what was written is
//! compared with what was to be written; it takes no part in restic's locks, so these are kept here ([`lock`]); and
//! restoring with it would follow whatever paths are in the repository. Where a repository lies is [`store`]'s: a directory,
//! a machine with SSH, or a bucket.
//!
//! All of this blocks, and works for minutes. It belongs into a process of its own.

mod error;
pub mod export;
pub mod import;
mod lock;
mod repository;
mod store;
mod watch;

pub use error::BackupError;
pub use lock::Lock;
pub use repository::{Label, Listed, Repository};
pub use store::StoreError;
pub use watch::Watch;
