//! Files into a repository, as one backup.
//!
//! The files don't change meanwhile: that is for the caller to see to. Which of them need no reading is told by name, inode,
//! length and time of the last change, compared with the VM's last backup. Frozen files keep all of these, also as links
//! elsewhere.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use berth_model::repository::ExportFacts;
use rustic_core::jiff::Timestamp;
use rustic_core::repofile::{Metadata, Node, NodeType, SnapshotFile};
use rustic_core::{
    BackupOptions, ErrorKind, ParentOptions, ReadSource, ReadSourceEntry, ReadSourceOpen, RusticError,
    RusticResult, SnapshotOptions, StringList,
};

use crate::repository::{Label, id_of, is_of_operation};
use crate::{BackupError, Repository, Watch};

/// A file that is to be in the backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceFile {
    /// What it is called there: plain names, joined by `/`.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
}

impl Repository {
    /// Puts files in as one backup. An operation that has made its backup already gets that one.
    ///
    /// # Errors
    /// When a file can't be read, or the place can't be written to: there is no backup then. What was stored for it is
    /// found again by the next one, or removed by `restic prune`.
    pub fn export(&self, label: &Label, files: &[SourceFile]) -> Result<ExportFacts, BackupError> {
        let (begun, watch) = (Instant::now(), &self.watch);
        let _lock = self.lock()?;
        let known = self.snapshots()?;
        if let Some(done) = known.iter().find(|snapshot| is_of_operation(snapshot, &label.operation)) {
            return Ok(facts(done, files.len(), 0, begun));
        }
        let source = Source::new(label, files, watch)?;
        watch.total_bytes.store(source.bytes(), Ordering::Relaxed);
        let trouble = Arc::clone(&source.trouble);
        let (read, parent) = (Arc::clone(&source.read_bytes), newest(&known, label));
        // What was refused before this is told already.
        drop(self.backend.take_refusal());
        let made = self.archive(label, &source, parent);
        let trouble = trouble.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(trouble) = trouble.or_else(|| self.backend.take_refusal().map(Into::into)) {
            if let Ok(snapshot) = &made {
                self.forget(snapshot)?;
            }
            return Err(if watch.cancelled.load(Ordering::Relaxed) {
                BackupError::Cancelled
            } else {
                trouble
            });
        }
        let snapshot = made?;
        if let Err(error) = self.compare(&snapshot, label, &source) {
            self.forget(&snapshot)?;
            return Err(error);
        }
        Ok(facts(&snapshot, files.len(), read.load(Ordering::Relaxed), begun))
    }

    fn archive(
        &self,
        label: &Label,
        source: &Source,
        parent: Option<&SnapshotFile>,
    ) -> Result<SnapshotFile, BackupError> {
        let explain = |error: Box<RusticError>| self.explain(&error);
        let core = self.reopen()?.to_indexed_ids().map_err(explain)?;
        let mut options = SnapshotOptions::default().host(label.vm.clone());
        options.tags =
            label.tags().iter().map(|tag| tag.parse::<StringList>()).collect::<Result<_, _>>().map_err(
                |error| BackupError::Foreign {
                    backup: label.vm.clone(),
                    detail: format!("a tag is refused: {error}"),
                },
            )?;
        let snapshot = options.to_snapshot().map_err(explain)?;
        let parents = match parent {
            Some(parent) => ParentOptions::default().parents(vec![id_of(parent)]),
            None => ParentOptions::default().force(true),
        };
        let how = BackupOptions::default().parent_opts(parents.ignore_ctime(true));
        core.archive(&how, source, snapshot, &[PathBuf::from(label.path())]).map_err(explain)
    }

    fn forget(&self, snapshot: &SnapshotFile) -> Result<(), BackupError> {
        self.core.delete_snapshots(&[snapshot.id]).map_err(|error| self.explain(&error))
    }

    /// That each file is in the backup, and with all of its length: the library leaves out what it can't read.
    fn compare(&self, snapshot: &SnapshotFile, label: &Label, source: &Source) -> Result<(), BackupError> {
        let core = self.reopen()?.to_indexed_ids().map_err(|error| self.explain(&error))?;
        let stored = self.files(&core, snapshot)?;
        let length = snapshot.summary.as_ref().map_or(0, |summary| summary.total_bytes_processed);
        if stored.len() == source.entries.len() && length == source.bytes() {
            return Ok(());
        }
        let detail = format!(
            "{} files of {} with {} bytes were to get there, {} with {length} did",
            source.entries.len(),
            label.vm,
            source.bytes(),
            stored.len()
        );
        Err(BackupError::Damaged { place: self.place.clone(), detail })
    }
}

/// The VM's last backup.
fn newest<'a>(known: &'a [SnapshotFile], label: &Label) -> Option<&'a SnapshotFile> {
    let path = label.path();
    let own = known.iter().filter(|snapshot| snapshot.paths.iter().any(|found| *found == path));
    own.max_by(|one, other| one.time.cmp(&other.time))
}

fn facts(snapshot: &SnapshotFile, files: usize, read_bytes: u64, begun: Instant) -> ExportFacts {
    let summary = snapshot.summary.as_ref();
    ExportFacts {
        backup: id_of(snapshot),
        files: files as u64,
        bytes: summary.map_or(0, |summary| summary.total_bytes_processed),
        read_bytes,
        added_bytes: summary.map_or(0, |summary| summary.data_added_packed),
        total_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
    }
}

/// The files, as the library wants them: in the order of their paths' parts, with what is known of each.
struct Source {
    entries: Vec<(PathBuf, Node, Open)>,
    trouble: Arc<Mutex<Option<BackupError>>>,
    read_bytes: Arc<AtomicU64>,
}

/// How to open one of them.
#[derive(Clone)]
struct Open {
    path: PathBuf,
    watch: Arc<Watch>,
    trouble: Arc<Mutex<Option<BackupError>>>,
    read_bytes: Arc<AtomicU64>,
}

impl Source {
    fn new(label: &Label, files: &[SourceFile], watch: &Arc<Watch>) -> Result<Self, BackupError> {
        let (trouble, read_bytes) = (Arc::default(), Arc::default());
        let mut entries = Vec::new();
        for file in files {
            let metadata = fs::metadata(&file.path).map_err(BackupError::file(&file.path, "examined"))?;
            let path = PathBuf::from(label.path()).join(&file.name);
            let name = path.file_name().unwrap_or_default().to_owned();
            let node = Node::new_node(&name, NodeType::File, node_metadata(&metadata));
            let open = Open {
                path: file.path.clone(),
                watch: Arc::clone(watch),
                trouble: Arc::clone(&trouble),
                read_bytes: Arc::clone(&read_bytes),
            };
            entries.push((path, node, open));
        }
        // By parts, as `Path` compares: a directory's files follow one another, by name.
        entries.sort_by(|one, other| one.0.cmp(&other.0));
        Ok(Self { entries, trouble, read_bytes })
    }

    fn bytes(&self) -> u64 {
        self.entries.iter().map(|(_, node, _)| node.meta.size).sum()
    }
}

fn node_metadata(metadata: &fs::Metadata) -> Metadata {
    let nanoseconds = i32::try_from(metadata.mtime_nsec()).unwrap_or_default();
    let changed = Timestamp::new(metadata.mtime(), nanoseconds).ok();
    Metadata {
        mode: Some(0o440),
        mtime: changed,
        atime: changed,
        ctime: changed,
        inode: metadata.ino(),
        device_id: metadata.dev(),
        size: metadata.len(),
        links: 1,
        ..Metadata::default()
    }
}

impl ReadSource for Source {
    type Open = Open;
    type Iter = std::vec::IntoIter<RusticResult<ReadSourceEntry<Open>>>;

    fn size(&self) -> RusticResult<Option<u64>> {
        Ok(Some(self.bytes()))
    }

    fn entries(&self) -> Self::Iter {
        let entry = |(path, node, open): &(PathBuf, Node, Open)| {
            Ok(ReadSourceEntry { path: path.clone(), node: node.clone(), open: Some(open.clone()) })
        };
        self.entries.iter().map(entry).collect::<Vec<_>>().into_iter()
    }
}

impl Open {
    fn note(&self, error: io::Error) -> io::Error {
        let told = io::Error::new(error.kind(), error.to_string());
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        trouble.get_or_insert_with(|| BackupError::file(&self.path, "read")(error));
        told
    }
}

impl ReadSourceOpen for Open {
    type Reader = Reader;
    fn open(self) -> RusticResult<Reader> {
        match File::open(&self.path) {
            Ok(file) => Ok(Reader { file, open: self }),
            Err(error) => Err(RusticError::new(ErrorKind::InputOutput, self.note(error).to_string())),
        }
    }
}

/// A file being read: what goes wrong is kept, for the library would only log it.
struct Reader {
    file: File,
    open: Open,
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.open.watch.check().and_then(|()| self.file.read(buffer));
        let read = read.map_err(|error| self.open.note(error))?;
        self.open.read_bytes.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }
}
