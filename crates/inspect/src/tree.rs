//! What differs between two file systems of one kind: a walk over both at once.

use std::collections::BTreeMap;

use ext4_view::{DirEntry, Ext4, Ext4Error, FileType, Metadata, PathBuf};

/// Deepest directory that is entered. Deeper ones are not made by people.
const DEPTH_MAX: usize = 256;
/// Most entries that are looked at, of both sides together: a file system that says it has more is damaged, or
/// somebody wants us to be busy.
const ENTRIES_MAX: u64 = 20_000_000;
/// How much of two files is compared at a time.
const CHUNK_BYTES: usize = 256 << 10;

/// How to compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Read each file whose size and times agree, too: times can be set back by whoever owns the guest.
    pub content: bool,
    /// How many changes to list; all are counted.
    pub list_max: usize,
}

/// What became of a file or directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FileChangeKind {
    /// It is new.
    Added,
    /// It is gone.
    Removed,
    /// It is another now.
    Modified,
}

/// What of it is another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Aspect {
    /// Another type: a file became a directory, say.
    Type,
    /// Another length, or other bytes.
    Content,
    /// Other permissions.
    Mode,
    /// Another owner or group.
    Owner,
    /// Written at another time.
    Time,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileChange {
    /// Its path from the file system's root; bytes that are not text are shown as such.
    pub path: String,
    /// What became of it.
    pub kind: FileChangeKind,
    /// What of it is another; nothing for what was added or removed.
    pub aspects: Vec<Aspect>,
}

/// All changes of a file system.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TreeChanges {
    /// How many were added.
    pub added: u64,
    /// How many were removed.
    pub removed: u64,
    /// How many are others now.
    pub modified: u64,
    /// The first of them, in the order of the walk.
    pub list: Vec<FileChange>,
}

/// A file system that can't be compared.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// It is damaged, or of a kind that can't be read.
    #[error("{path} can't be read")]
    Read {
        /// Where.
        path: String,
        /// Why.
        #[source]
        source: Ext4Error,
    },
    /// It is deeper or larger than anything real.
    #[error("it has directories deeper than {DEPTH_MAX} or more than {ENTRIES_MAX} entries: it is damaged")]
    Endless,
}

/// Compares two file systems, `before` and `after`.
///
/// # Errors
/// When one of them can't be read.
pub fn changes(before: &Ext4, after: &Ext4, options: Options) -> Result<TreeChanges, TreeError> {
    let mut walk = Walk { before, after, options, seen: 0, changes: TreeChanges::default() };
    walk.both(&PathBuf::new("/"), 0)?;
    Ok(walk.changes)
}

struct Walk<'a> {
    before: &'a Ext4,
    after: &'a Ext4,
    options: Options,
    seen: u64,
    changes: TreeChanges,
}

type Entries = BTreeMap<Vec<u8>, DirEntry>;

impl Walk<'_> {
    /// A directory that both have.
    fn both(&mut self, path: &PathBuf, depth: usize) -> Result<(), TreeError> {
        let before = self.entries(self.before, path, depth)?;
        let mut after = self.entries(self.after, path, depth)?;
        for (name, old) in before {
            match after.remove(&name) {
                None => self.only(self.before, &old, FileChangeKind::Removed, depth)?,
                Some(new) => self.pair(&old, &new, depth)?,
            }
        }
        for new in after.values() {
            self.only(self.after, new, FileChangeKind::Added, depth)?;
        }
        Ok(())
    }

    /// An entry that both have.
    fn pair(&mut self, old: &DirEntry, new: &DirEntry, depth: usize) -> Result<(), TreeError> {
        let path = new.path();
        let (was, is) = (metadata(old)?, metadata(new)?);
        let mut aspects = aspects(&was, &is);
        if is.file_type() == was.file_type() {
            let same_so_far = !aspects.contains(&Aspect::Content);
            let differs = match is.file_type() {
                FileType::Symlink => self.target(self.before, &path)? != self.target(self.after, &path)?,
                FileType::Regular if same_so_far && (self.options.content || !aspects.is_empty()) => {
                    self.content_differs(&path)?
                }
                _ => false,
            };
            if differs && same_so_far {
                aspects.insert(0, Aspect::Content);
            }
        }
        // A directory's size and time follow from what is in it, which is told by itself.
        if is.is_dir() && was.is_dir() {
            aspects.retain(|aspect| matches!(aspect, Aspect::Mode | Aspect::Owner));
        }
        if !aspects.is_empty() {
            self.note(&path, FileChangeKind::Modified, aspects);
        }
        match (was.is_dir(), is.is_dir()) {
            (true, true) => self.both(&path, depth + 1),
            (true, false) => self.below(self.before, &path, FileChangeKind::Removed, depth + 1),
            (false, true) => self.below(self.after, &path, FileChangeKind::Added, depth + 1),
            (false, false) => Ok(()),
        }
    }

    /// An entry that one of them has, with all below it.
    fn only(
        &mut self,
        side: &Ext4,
        entry: &DirEntry,
        kind: FileChangeKind,
        depth: usize,
    ) -> Result<(), TreeError> {
        let path = entry.path();
        self.note(&path, kind, Vec::new());
        if metadata(entry)?.is_dir() { self.below(side, &path, kind, depth + 1) } else { Ok(()) }
    }

    fn below(
        &mut self,
        side: &Ext4,
        path: &PathBuf,
        kind: FileChangeKind,
        depth: usize,
    ) -> Result<(), TreeError> {
        for entry in self.entries(side, path, depth)?.values() {
            self.only(side, entry, kind, depth)?;
        }
        Ok(())
    }

    fn entries(&mut self, side: &Ext4, path: &PathBuf, depth: usize) -> Result<Entries, TreeError> {
        let fault = |source| TreeError::Read { path: path.display().to_string(), source };
        if depth > DEPTH_MAX {
            return Err(TreeError::Endless);
        }
        let mut entries = Entries::new();
        for entry in side.read_dir(path).map_err(fault)? {
            let entry = entry.map_err(fault)?;
            self.seen += 1;
            if self.seen > ENTRIES_MAX {
                return Err(TreeError::Endless);
            }
            let name = entry.file_name().as_ref().to_vec();
            if name != b"." && name != b".." {
                entries.insert(name, entry);
            }
        }
        Ok(entries)
    }

    fn target(&self, side: &Ext4, path: &PathBuf) -> Result<PathBuf, TreeError> {
        side.read_link(path).map_err(|source| TreeError::Read { path: path.display().to_string(), source })
    }

    /// Whether two files of one length hold other bytes.
    fn content_differs(&self, path: &PathBuf) -> Result<bool, TreeError> {
        let fault = |source| TreeError::Read { path: path.display().to_string(), source };
        let mut old = self.before.open(path).map_err(fault)?;
        let mut new = self.after.open(path).map_err(fault)?;
        let (mut left, mut right) = (vec![0; CHUNK_BYTES], vec![0; CHUNK_BYTES]);
        loop {
            let was = fill(&mut old, &mut left).map_err(fault)?;
            let is = fill(&mut new, &mut right).map_err(fault)?;
            if left[..was] != right[..is] {
                return Ok(true);
            }
            if was == 0 {
                return Ok(false);
            }
        }
    }

    fn note(&mut self, path: &PathBuf, kind: FileChangeKind, aspects: Vec<Aspect>) {
        match kind {
            FileChangeKind::Added => self.changes.added += 1,
            FileChangeKind::Removed => self.changes.removed += 1,
            FileChangeKind::Modified => self.changes.modified += 1,
        }
        if self.changes.list.len() < self.options.list_max {
            self.changes.list.push(FileChange { path: path.display().to_string(), kind, aspects });
        }
    }
}

fn fill(file: &mut ext4_view::File, bytes: &mut [u8]) -> Result<usize, Ext4Error> {
    let mut filled = 0;
    while filled < bytes.len() {
        match file.read_bytes(&mut bytes[filled..])? {
            0 => break,
            read => filled += read,
        }
    }
    Ok(filled)
}

fn metadata(entry: &DirEntry) -> Result<Metadata, TreeError> {
    entry.metadata().map_err(|source| TreeError::Read { path: entry.path().display().to_string(), source })
}

fn aspects(was: &Metadata, is: &Metadata) -> Vec<Aspect> {
    let checks = [
        (Aspect::Type, was.file_type() != is.file_type()),
        (Aspect::Content, was.file_type() == is.file_type() && was.len() != is.len()),
        (Aspect::Mode, was.mode() != is.mode()),
        (Aspect::Owner, (was.uid(), was.gid()) != (is.uid(), is.gid())),
        (Aspect::Time, was.modified() != is.modified()),
    ];
    checks.into_iter().filter_map(|(aspect, differs)| differs.then_some(aspect)).collect()
}
