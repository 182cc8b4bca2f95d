//! Files out of a repository.
//!
//! Whoever has the repository's password can have put anything into it. So nothing in it says where something is written:
//! only regular files of plain names are taken, into a directory that was empty, no deeper than ours are, no more and no
//! longer than the caller allows. Whatever else there is makes the backup a foreign one, which is refused before anything is
//! written.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use berth_model::repository::ImportFacts;
use rustic_core::repofile::{Node, SnapshotFile};
use rustic_core::{IndexedFull, IndexedTree};

use crate::repository::{Listed, id_of, listed};
use crate::{BackupError, Repository, Watch};

/// Most files in a backup. A VM has at most a few dozen.
const FILES_MAX: usize = 4096;
/// How deep files lie below a backup's path.
const DEPTH_MAX: usize = 2;
/// Longest name of a file, in bytes.
const NAME_BYTES_MAX: usize = 100;
/// Zeros of this length are not written.
const BLOCK_BYTES: usize = 4096;

/// A file of a backup.
pub(crate) struct Found {
    /// Plain names, joined by `/`.
    pub(crate) name: String,
    node: Node,
}

impl Repository {
    /// The backup whose id begins so, or that a VM's newest is, and one of its files, which must not be longer than this.
    ///
    /// # Errors
    /// When there is no such backup or file, or it is none of ours.
    pub fn look(&self, id: &str, name: &str, bytes_max: u64) -> Result<(Listed, Vec<u8>), BackupError> {
        let snapshot = self.find(id)?;
        let core = self.reopen()?.to_indexed().map_err(|error| self.explain(&error))?;
        let files = self.files(&core, &snapshot)?;
        let foreign = |detail: String| BackupError::Foreign { backup: id_of(&snapshot), detail };
        let file = files.iter().find(|file| file.name == name);
        let file = file.ok_or_else(|| foreign(format!("it has no {name}")))?;
        let length = length(&core, &file.node).ok_or_else(|| self.lacks_data(&snapshot, file))?;
        if length > bytes_max {
            return Err(foreign(format!("its {name} has {length} bytes, at most {bytes_max} are taken")));
        }
        let mut bytes = Vec::new();
        core.dump(&file.node, &mut bytes).map_err(|error| self.explain(&error))?;
        Ok((listed(&snapshot), bytes))
    }

    /// Writes all files of a backup into an empty directory, each brought to the disk.
    ///
    /// # Errors
    /// When the backup is none of ours, is longer than `bytes_max`, or is damaged, and when the disk is full. What was written
    /// by then is left for the caller to remove.
    pub fn import(&self, id: &str, directory: &Path, bytes_max: u64) -> Result<ImportFacts, BackupError> {
        let (begun, watch) = (Instant::now(), &self.watch);
        let _lock = self.lock()?;
        let snapshot = self.find(id)?;
        let core = self.reopen()?.to_indexed().map_err(|error| self.explain(&error))?;
        let files = self.files(&core, &snapshot)?;
        let mut bytes = 0u64;
        for file in &files {
            let length = length(&core, &file.node).ok_or_else(|| self.lacks_data(&snapshot, file))?;
            bytes = bytes.saturating_add(length);
        }
        if bytes > bytes_max {
            let detail = format!("its files are {bytes} bytes long, at most {bytes_max} are taken");
            return Err(BackupError::Foreign { backup: id_of(&snapshot), detail });
        }
        watch.total_bytes.store(bytes, Ordering::Relaxed);
        let mut written_bytes = 0;
        for file in &files {
            written_bytes += self.write_out(&core, file, directory, watch)?;
        }
        let total_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        Ok(ImportFacts { bytes, written_bytes, total_ms })
    }

    fn write_out(
        &self,
        core: &rustic_core::Repository<impl IndexedFull>,
        file: &Found,
        directory: &Path,
        watch: &Arc<Watch>,
    ) -> Result<u64, BackupError> {
        let path = directory.join(&file.name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(BackupError::file(parent, "made"))?;
        }
        let mut sink = Sink::create(&path, watch).map_err(BackupError::file(&path, "made"))?;
        let dumped = core.dump(&file.node, &mut sink);
        if let Some(error) = sink.trouble.take() {
            let cancelled = watch.cancelled.load(Ordering::Relaxed);
            return Err(if cancelled {
                BackupError::Cancelled
            } else {
                BackupError::file(&path, "written")(error)
            });
        }
        dumped.map_err(|error| self.explain(&error))?;
        sink.finish().map_err(BackupError::file(&path, "brought to the disk"))
    }

    fn lacks_data(&self, snapshot: &SnapshotFile, file: &Found) -> BackupError {
        let detail = format!("data of {} of backup {} is not there", file.name, id_of(snapshot));
        BackupError::Damaged { place: self.place.clone(), detail }
    }

    /// The files of a backup, below its one path.
    pub(crate) fn files(
        &self,
        core: &rustic_core::Repository<impl IndexedTree>,
        snapshot: &SnapshotFile,
    ) -> Result<Vec<Found>, BackupError> {
        let foreign = |detail: String| BackupError::Foreign { backup: id_of(snapshot), detail };
        let Some(path) = snapshot.paths.iter().next() else {
            return Err(foreign("it has no path".to_owned()));
        };
        let top =
            core.node_from_path(snapshot.tree, Path::new(path)).map_err(|error| self.explain(&error))?;
        let mut found = Vec::new();
        let mut open = vec![(String::new(), top, 0)];
        while let Some((prefix, node, depth)) = open.pop() {
            let Some(tree) = node.subtree else { return Err(foreign(format!("'{prefix}' is no directory"))) };
            for node in core.get_tree(&tree).map_err(|error| self.explain(&error))?.nodes {
                // Our names need no escaping, so one that has any is none of ours.
                if !is_plain(&node.name) {
                    let name: String = node.name.chars().take(NAME_BYTES_MAX).collect();
                    return Err(foreign(format!(
                        "the name {name:?} in it is not of letters, digits, '.', '-' and '_'"
                    )));
                }
                let name =
                    if prefix.is_empty() { node.name.clone() } else { format!("{prefix}/{}", node.name) };
                if node.is_dir() && depth + 1 < DEPTH_MAX {
                    open.push((name, node, depth + 1));
                } else if node.is_file() {
                    found.push(Found { name, node });
                } else {
                    return Err(foreign(format!("{name} is a {} {depth} deep", node.node_type)));
                }
            }
            if found.len() + open.len() > FILES_MAX {
                return Err(foreign(format!("it has more than {FILES_MAX} files")));
            }
        }
        found.sort_by(|one, other| one.name.cmp(&other.name));
        if found.windows(2).any(|pair| pair[0].name == pair[1].name) {
            return Err(foreign("a name stands in it twice".to_owned()));
        }
        Ok(found)
    }
}

fn is_plain(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && !name.starts_with('.')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'))
}

/// How long a file is by what the repository has of it; none: some of that is not there.
fn length(core: &rustic_core::Repository<impl IndexedFull>, node: &Node) -> Option<u64> {
    let mut bytes = 0u64;
    for id in node.content.iter().flatten() {
        bytes = bytes.saturating_add(u64::from(core.get_index_entry(id).ok()?.data_length()));
    }
    Some(bytes)
}

/// A new file that leaves holes where zeros come.
struct Sink {
    file: File,
    watch: Arc<Watch>,
    at: u64,
    written: u64,
    trouble: Option<io::Error>,
}

impl Sink {
    fn create(path: &PathBuf, watch: &Arc<Watch>) -> io::Result<Self> {
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        Ok(Self { file, watch: Arc::clone(watch), at: 0, written: 0, trouble: None })
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.watch.check()?;
        let mut rest = bytes;
        while !rest.is_empty() {
            // As far as the next border of a block, so that a block of zeros is seen as one.
            let to_border = BLOCK_BYTES - usize::try_from(self.at % BLOCK_BYTES as u64).unwrap_or_default();
            let (block, after) = rest.split_at(to_border.min(rest.len()));
            if block.iter().any(|byte| *byte != 0) {
                self.file.write_all_at(block, self.at)?;
                self.written += block.len() as u64;
            }
            self.at += block.len() as u64;
            rest = after;
        }
        self.watch.done_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn finish(self) -> io::Result<u64> {
        self.file.set_len(self.at)?;
        self.file.sync_all()?;
        Ok(self.written)
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.put(bytes) {
            Ok(()) => Ok(bytes.len()),
            Err(error) => {
                let told = io::Error::new(error.kind(), error.to_string());
                self.trouble.get_or_insert(error);
                Err(told)
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
