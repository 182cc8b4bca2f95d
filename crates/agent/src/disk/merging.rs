//! Several layers that lie on each other, made into one.
//!
//! ```text
//!   layer c   . . C . Z         merged   A B C . Z      each cluster is that of the uppermost layer that has it;
//!   layer b   . B . . B                                 what none has comes from what is below them all
//!   layer a   A A . . A
//! ```
//!
//! The layers are only read. The new one is written under a name that says that it is not finished, from beginning to end:
//! tables and data in the order of the disk, so that it is as compact as can be, and clusters of zeros take no room. It is
//! brought to the disk now and then, so that a guest that flushes does not wait for all of it at once.
//!
//! We do this and not QEMU's `block-commit` or `block-stream`, nor `qemu-img`: those write into a layer that is there, and
//! frozen layers are never written again, for snapshots and clones lie on them. See
//! `docs/decisions/0011-merging-layers.md`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use berth_model::{Problem, ProblemCode};

use super::clusters::{
    CLUSTER_BYTES, Cluster, ENTRY_COPIED, ENTRY_ZERO, LayerError, LayerFile, TABLE_ENTRIES, Table,
};
use super::pace::{BrokenOff, Pace};
use super::{BackingFile, FROZEN_MODE};
use crate::durable::{self, FileError};
use crate::migration::storage::is_zero;
use crate::room::Room;
use crate::snapshot::overlay::{self, Below};

/// After how much the new layer is brought to the disk. Less: the disk is kept busy with waiting. More: a guest that
/// flushes meanwhile waits for more of ours.
const SYNC_EVERY_BYTES: u64 = 8 << 20;
/// What one cluster of reference counts stands for, in clusters.
const REFCOUNT_STEP: u64 = CLUSTER_BYTES / 2;
/// Where the table of reference counts is, in clusters; the first of the reference counts is behind it, and the first
/// table of addresses behind that.
const REFCOUNT_TABLE: u64 = 1;
const FIRST_TABLE: u64 = 3;

/// Which layers are to become one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Merging {
    /// Their files, from the lowest to the uppermost.
    pub from: Vec<PathBuf>,
    /// The new layer's file; one that is there is replaced.
    pub to: PathBuf,
    /// What the new layer lies on.
    pub backing: Option<BackingFile>,
}

/// Why layers could not be merged.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// One of them can't be read.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// The new one can't be written.
    #[error(transparent)]
    File(#[from] FileError),
    /// They are of disks of different sizes.
    #[error("the layers are of disks of {0} and {1} bytes: they can't be merged")]
    Sizes(u64, u64),
    /// Somebody broke it off.
    #[error(transparent)]
    BrokenOff(#[from] BrokenOff),
}

impl From<MergeError> for Problem {
    fn from(error: MergeError) -> Self {
        let code = match error {
            MergeError::File(error) | MergeError::Layer(LayerError::File(error)) => return error.into(),
            MergeError::Layer(LayerError::Unfit { .. }) | MergeError::Sizes(..) => ProblemCode::BadImage,
            MergeError::BrokenOff(_) => ProblemCode::Cancelled,
        };
        Problem::new(code, durable::with_causes(&error))
    }
}

/// Merges. The new file is whole, read-only and on the disk afterwards; its name is not yet. Blocks.
///
/// # Errors
/// When a layer can't be read, there is no room, or it is broken off: what was written is then removed.
pub fn merge(work: &Merging, pace: &Pace) -> Result<(), MergeError> {
    let written = write(work, pace);
    if written.is_err() {
        // The error that counts is the first one.
        let _ = durable::remove_file(&work.to);
    }
    written
}

fn write(work: &Merging, pace: &Pace) -> Result<(), MergeError> {
    let layers = open(&work.from)?;
    let mut keeper = pace.keep();
    let mut new = NewLayerFile::create(work, &layers)?;
    let mut buffer = vec![0; CLUSTER_BYTES as usize];
    for index in 0..layers.first().map_or(0, LayerFile::tables) {
        let mut merged = vec![0; CLUSTER_BYTES as usize].into_boxed_slice();
        let mut any = false;
        each_cluster(&layers, index, |at, layer, cluster| {
            let entry = match cluster {
                Cluster::Data(offset) => {
                    keeper.spend(CLUSTER_BYTES)?;
                    layer.read_cluster(&mut buffer, offset)?;
                    if is_zero(&buffer) { ENTRY_ZERO } else { new.append(&buffer)? | ENTRY_COPIED }
                }
                Cluster::Zero | Cluster::Absent => ENTRY_ZERO,
            };
            merged[at * 8..at * 8 + 8].copy_from_slice(&entry.to_be_bytes());
            any = true;
            Ok(())
        })?;
        if any {
            new.put_table(index, &merged)?;
        }
    }
    new.finish()
}

/// How much data the layers would have in common if they were one, in bytes. Reads their tables alone. Blocks.
///
/// # Errors
/// When a layer can't be read.
pub fn measure(from: &[PathBuf]) -> Result<u64, MergeError> {
    let layers = open(from)?;
    let mut clusters = 0;
    for index in 0..layers.first().map_or(0, LayerFile::tables) {
        each_cluster(&layers, index, |_, _, cluster| {
            clusters += u64::from(matches!(cluster, Cluster::Data(_)));
            Ok(())
        })?;
    }
    Ok(clusters * CLUSTER_BYTES)
}

fn open(paths: &[PathBuf]) -> Result<Vec<LayerFile>, MergeError> {
    let layers = paths.iter().map(|path| LayerFile::open(path)).collect::<Result<Vec<_>, _>>()?;
    for pair in layers.windows(2) {
        if pair[0].size_bytes() != pair[1].size_bytes() {
            return Err(MergeError::Sizes(pair[0].size_bytes(), pair[1].size_bytes()));
        }
    }
    Ok(layers)
}

/// Visits each cluster that any layer has, of what one second table stands for, with the uppermost layer that has it.
fn each_cluster(
    layers: &[LayerFile],
    index: usize,
    mut visit: impl FnMut(usize, &LayerFile, Cluster) -> Result<(), MergeError>,
) -> Result<(), MergeError> {
    let mut tables: Vec<(&LayerFile, Table)> = Vec::new();
    for layer in layers.iter().rev() {
        tables.extend(layer.table(index)?.map(|table| (layer, table)));
    }
    if tables.is_empty() {
        return Ok(());
    }
    for at in 0..TABLE_ENTRIES {
        for (layer, table) in &tables {
            match layer.cluster(table, at)? {
                Cluster::Absent => {}
                found => {
                    visit(at, layer, found)?;
                    break;
                }
            }
        }
    }
    Ok(())
}

struct NewLayerFile<'a> {
    path: &'a Path,
    file: File,
    room: Room,
    first: Vec<u64>,
    refcount_blocks: u64,
    next: u64,
    synced: u64,
}

impl<'a> NewLayerFile<'a> {
    fn create(work: &'a Merging, layers: &[LayerFile]) -> Result<Self, MergeError> {
        let path = work.to.as_path();
        let size_bytes = layers.first().map_or(0, LayerFile::size_bytes);
        let backing = work.backing.as_ref().map(|backing| backing.relative_path.display().to_string());
        let below = backing.as_deref().zip(work.backing.as_ref());
        let below = below.map(|(path, backing)| Below { path, format: backing.format.as_str() });
        let head = overlay::content(size_bytes, below).map_err(FileError::io(path, "made"))?;
        durable::remove_file(path)?;
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        let file = file.map_err(FileError::io(path, "made"))?;
        file.write_all_at(&head, 0).map_err(FileError::io(path, "written"))?;
        // No more clusters than all layers have together can be needed, and the counts' own.
        let most: u64 = layers.iter().map(|layer| layer.length().div_ceil(CLUSTER_BYTES)).sum();
        let most = most + layers.first().map_or(0, LayerFile::tables) as u64 + FIRST_TABLE + 1;
        let refcount_blocks = most.div_ceil(REFCOUNT_STEP - 1);
        Ok(Self {
            path,
            file,
            room: Room::default(),
            first: vec![0; layers.first().map_or(0, LayerFile::tables)],
            refcount_blocks,
            next: FIRST_TABLE + refcount_blocks,
            synced: 0,
        })
    }

    /// Writes the next cluster and gives its offset.
    fn append(&mut self, bytes: &[u8]) -> Result<u64, MergeError> {
        let offset = self.next * CLUSTER_BYTES;
        self.next += 1;
        let written = self
            .room
            .take(&self.file, bytes.len() as u64)
            .and_then(|()| self.file.write_all_at(bytes, offset))
            .and_then(|()| self.sync_now_and_then(offset));
        written.map_err(FileError::io(self.path, "written"))?;
        Ok(offset)
    }

    fn sync_now_and_then(&mut self, offset: u64) -> io::Result<()> {
        if offset < self.synced + SYNC_EVERY_BYTES {
            return Ok(());
        }
        self.synced = offset;
        self.file.sync_data()
    }

    fn put_table(&mut self, index: usize, table: &[u8]) -> Result<(), MergeError> {
        self.first[index] = self.append(table)? | ENTRY_COPIED;
        Ok(())
    }

    fn finish(self) -> Result<(), MergeError> {
        let finish = || {
            let first: Vec<u8> = self.first.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            self.file.write_all_at(&first, FIRST_TABLE * CLUSTER_BYTES)?;
            // The first of the counts is where an empty layer has it, the others are behind the first table.
            let blocks = (0..self.refcount_blocks).map(|block| match block {
                0 => REFCOUNT_TABLE + 1,
                later => FIRST_TABLE + later,
            });
            for (block, cluster) in (0..).zip(blocks) {
                let used = self.next.saturating_sub(block * REFCOUNT_STEP).min(REFCOUNT_STEP);
                let mut counts = vec![0; CLUSTER_BYTES as usize];
                counts.chunks_exact_mut(2).take(used as usize).for_each(|count| count[1] = 1);
                self.file.write_all_at(&counts, cluster * CLUSTER_BYTES)?;
                let entry = (cluster * CLUSTER_BYTES).to_be_bytes();
                self.file.write_all_at(&entry, REFCOUNT_TABLE * CLUSTER_BYTES + block * 8)?;
            }
            self.file.set_len(self.next * CLUSTER_BYTES)?;
            self.file.set_permissions(std::fs::Permissions::from_mode(FROZEN_MODE))?;
            self.file.sync_all()
        };
        finish().map_err(FileError::io(self.path, "written"))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
