//! What differs between two states of a disk: how much was written, and which files it is.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use ext4_view::{Ext4, Ext4Error};

use crate::disk::{Disk, DiskError, LayerFile, written_apart_bytes};
use crate::tree::{self, Options, TreeChanges};
use crate::volume::{self, SharedDisk, Volume, VolumeContent, VolumeReader};

/// What differs between two states of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Comparison {
    /// How many bytes of the disk were written in one state and not in the other.
    pub written_bytes: u64,
    /// The file systems that both have.
    pub file_systems: Vec<FileSystemChanges>,
    /// What is not in the list of changes because it could not be read, in words: it may differ too.
    pub unread: Vec<String>,
}

/// What differs on one file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSystemChanges {
    /// Where it is: `disk`, or `p1`, `p2` and so on.
    pub volume: String,
    /// What differs.
    pub changes: TreeChanges,
}

/// Compares two states of a disk, `before` and `after`, each given by its layers from the bottom up. Blocks; reads the
/// file systems' directories, and with [`Options::content`] all files.
///
/// # Errors
/// When a layer can't be read. A file system that can't be read is no error, but named in [`Comparison::unread`].
pub fn compare(before: &[LayerFile], after: &[LayerFile], options: Options) -> Result<Comparison, DiskError> {
    let (mut before, mut after) = (Disk::open(before)?, Disk::open(after)?);
    let written_bytes = written_apart_bytes(&mut before, &mut after)?;
    let mut comparison = Comparison { written_bytes, file_systems: Vec::new(), unread: Vec::new() };
    if written_bytes == 0 {
        return Ok(comparison);
    }
    let (before, after) = (Rc::new(RefCell::new(before)), Rc::new(RefCell::new(after)));
    let old = by_name(volume::volumes(&before)?);
    let mut new = by_name(volume::volumes(&after)?);
    let mut left = options;
    for (name, was) in old {
        let Some(is) = new.remove(&name) else {
            comparison.unread.push(format!("{name}: it is gone"));
            continue;
        };
        match (was.content, is.content) {
            (VolumeContent::Ext, VolumeContent::Ext) => match of_ext((&before, &was), (&after, &is), left) {
                Ok(changes) => {
                    left.list_max = left.list_max.saturating_sub(changes.list.len());
                    comparison.file_systems.push(FileSystemChanges { volume: name, changes });
                }
                Err(reason) => comparison.unread.push(format!("{name}: {reason}")),
            },
            (VolumeContent::Empty, VolumeContent::Empty) => {}
            (one, other) if one == other => {
                comparison.unread.push(format!("{name}: no ext2, ext3 or ext4 file system"));
            }
            _ => comparison.unread.push(format!("{name}: another kind of file system than before")),
        }
    }
    comparison.unread.extend(new.into_keys().map(|name| format!("{name}: it is new")));
    Ok(comparison)
}

fn by_name(volumes: Vec<Volume>) -> BTreeMap<String, Volume> {
    volumes.into_iter().map(|volume| (volume.name.clone(), volume)).collect()
}

fn of_ext(
    before: (&SharedDisk, &Volume),
    after: (&SharedDisk, &Volume),
    options: Options,
) -> Result<TreeChanges, String> {
    let load = |(disk, volume): (&SharedDisk, &Volume)| -> Result<Ext4, Ext4Error> {
        let disk = Rc::clone(disk);
        Ext4::load(Box::new(VolumeReader { disk, start: volume.start, length: volume.length }))
    };
    let (before, after) = (load(before).map_err(in_words)?, load(after).map_err(in_words)?);
    tree::changes(&before, &after, options).map_err(in_words)
}

fn in_words(error: impl std::error::Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(one) = cause {
        words.push_str(": ");
        words.push_str(&one.to_string());
        cause = one.source();
    }
    words
}
