//! Which earlier snapshot a new one stores its memory's differences from.
//!
//! Any of the same VM will do, since pages are compared by what is in them; the best is the one that the guest came from
//! last, which is the one that has most of its layers below it, and of those the newest.
//!
//! **Bounds.** A restore maps the full image, whatever its size, and sends the rest at about a GB/s, with the guest waiting.
//! So a snapshot whose base sends much already is stored in full, and one that turns out to need much sent itself is made a
//! full image when it is put away. And an image of many files takes as many open ones: at
//! [`FILES_MAX`] the new snapshot refers to the full image alone and takes over what the differences held, which is
//! bounded too. See `docs/decisions/0010-memory-images-by-difference.md`.

use std::time::SystemTime;

use berth_model::LayerId;
use berth_stream::Base;

use super::archive::{self, SnapshotFiles};
use super::image::MemoryImage;
use crate::layout::VmDirs;

/// Most files of an image. More: as many files open at once while it is read.
const FILES_MAX: usize = 8;
/// A base that makes a restore send this much is not built on, and a difference that would is not left one. More: a restore
/// takes longer, by a second for each GB; less: snapshots of a guest that changes much are stored in full more often.
pub const SENT_BYTES_MAX: u64 = 256 << 20;

/// An earlier snapshot's memory, to be referred to.
#[derive(Debug)]
pub struct Earlier {
    /// Its files.
    pub paths: SnapshotFiles,
    /// Its image.
    pub base: Base<MemoryImage>,
}

/// Chooses an earlier snapshot; none: the new one is to be a full image. What can't be read is passed over. Blocks.
pub fn choose(dirs: &VmDirs, layers: &[LayerId], memory_bytes: u64) -> Option<Earlier> {
    let mut found = Vec::new();
    for snapshot in archive::list(dirs).unwrap_or_default() {
        let paths = SnapshotFiles::of(dirs, &snapshot);
        let Ok(manifest) = archive::read(dirs, &snapshot) else { continue };
        let Some(memory) = manifest.memory.filter(|memory| memory.bytes == memory_bytes) else { continue };
        let below = layers.iter().zip(&manifest.layers).take_while(|(one, other)| one == other).count();
        let taken = paths.manifest().metadata().and_then(|metadata| metadata.modified());
        found.push((below, taken.unwrap_or(SystemTime::UNIX_EPOCH), snapshot, paths, memory));
    }
    found.sort_by_key(|(below, taken, ..)| (*below, *taken));
    while let Some((.., snapshot, paths, memory)) = found.pop() {
        match MemoryImage::open(&paths, &snapshot, &memory) {
            Ok(image) => return bounded(paths, image),
            Err(error) => {
                let error = crate::durable::with_causes(&error);
                tracing::warn!(%snapshot, error, "a new snapshot can't refer to the memory of an earlier one");
            }
        }
    }
    None
}

fn bounded(paths: SnapshotFiles, image: MemoryImage) -> Option<Earlier> {
    if image.sent_bytes() > SENT_BYTES_MAX {
        return None;
    }
    let is_long = image.numbers().count() >= FILES_MAX;
    let index = image.index().clone();
    let base = if is_long { Some(Base::only_full(index, image)) } else { Base::new(index, image) };
    Some(Earlier { paths, base: base? })
}
