//! Verifying a snapshot: everything that it consists of is read and held against what was written down when it was taken.
//!
//! | file | is held against |
//! |---|---|
//! | the layers | their hashes, a chunk at a time ([`super::hashes`]); their tables must point into their files |
//! | the image's parts | the SHA-256 that the image has |
//! | `device.bin`, the firmware's variables and the TPM's state | its BLAKE3 in the manifest |
//! | `pages.idx` | itself, and the identity that the manifest names |
//! | the memory image | the index, page by page; where the index has zeros and nobody says them, the full image must have a hole |
//!
//! Of each file the first bad block is named. That is done beside the VM's work, one snapshot at a time on a host, so
//! slowly that guests don't feel it ([`quiet`], and the throttle of merges). Nothing is held meanwhile: layers may be
//! merged, and the snapshot deleted, in the middle. A layer that is gone has the manifest looked at again.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use berth_api::agent::TaskOutput;
use berth_model::operation::Progress;
use berth_model::verification::{SnapshotFault, VerificationFacts};
use berth_model::{LayerId, Problem, SnapshotId};
use berth_qmp::Qmp;
use berth_stream::{Holder, PAGE_BYTES};
use rustix::fs::SeekFrom;
use sha2::{Digest, Sha256};
use tokio::sync::{Semaphore, oneshot};
use tokio_util::sync::CancellationToken;

use super::archive::{self, ArchiveError, Manifest, MemoryManifest, SnapshotFiles};
use super::hashes::{self, CHUNK_BYTES, FileState, HashesError, LayerHashes};
use super::image::MemoryImage;
use super::merge::throttle::Throttle;
use crate::disk::clusters::LayerError;
use crate::disk::merging::{self, MergeError};
use crate::disk::pace::{BrokenOff, Pace};
use crate::durable::{FileError, with_causes};
use crate::layout::VmDirs;
use crate::migration::storage::is_zero;
use crate::services::Services;
use crate::task::{TaskContext, cancelled};
use crate::vm::VmRuntime;

pub mod quiet;

use quiet::{Footprint, Reader, quietly};

/// For how long a file that was read whole and found right is not read again for another snapshot. Longer: a fault is
/// found later. Shorter: whoever verifies all snapshots of a VM has what they share read once for each.
const SPARED_FOR: Duration = Duration::from_secs(600);
/// How often it is told how far it is.
const TELL_EVERY: Duration = Duration::from_millis(500);

/// What all verifications of a host share.
#[derive(Debug)]
pub struct Reading {
    /// One reads at a time.
    place: Arc<Semaphore>,
    recent: Recent,
}

impl Default for Reading {
    fn default() -> Self {
        Self { place: Arc::new(Semaphore::new(1)), recent: Recent::default() }
    }
}

impl Reading {
    /// The one place among those who read in the background.
    pub fn place(&self) -> Arc<Semaphore> {
        Arc::clone(&self.place)
    }
}

/// Files that were read whole a moment ago and were right, with what they were held against.
#[derive(Debug, Default)]
struct Recent(Mutex<HashMap<(FileState, String), Instant>>);

impl Recent {
    fn has(&self, state: FileState, against: &str) -> bool {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(&(state, against.to_owned())).is_some_and(|at| at.elapsed() < SPARED_FOR)
    }

    fn remember(&self, state: FileState, against: &str) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|_, at| at.elapsed() < SPARED_FOR);
        known.insert((state, against.to_owned()), Instant::now());
    }
}

/// What reading in the background needs to know of a VM.
#[derive(Clone)]
pub struct Ground {
    pub(super) dirs: VmDirs,
    pub(super) services: Arc<Services>,
    pub(super) qmp: Option<Qmp>,
    pub(super) pace: Pace,
}

impl Ground {
    /// What there is now. `pace` is the VM's own: its owner holds it while there is other work.
    ///
    /// # Errors
    /// When this host has nothing of the VM.
    pub fn of(vm: &VmRuntime, pace: &Pace) -> Result<Self, Problem> {
        let (services, qmp) = (Arc::clone(vm.services()), vm.qmp().ok().cloned());
        Ok(Self { dirs: vm.dirs()?.clone(), services, qmp, pace: pace.clone() })
    }

    /// Has something read at the pace that the guest bears.
    ///
    /// # Errors
    /// What the work says.
    pub(super) async fn read<T, F>(&self, work: F) -> Result<T, Problem>
    where
        T: Send + 'static,
        F: FnOnce() -> Result<T, Problem> + Send + 'static,
    {
        let throttle = Throttle::learn(self.qmp.clone()).await;
        self.pace.set(throttle.first_pace());
        tokio::select! {
            result = quietly(work) => result,
            () = throttle.run(&self.pace) => Err(cancelled()),
        }
    }
}

/// Begins to verify a snapshot past the VM's queue; its end is told by `reply`.
pub fn begin(
    ground: Result<Ground, Problem>,
    task: TaskContext,
    snapshot: SnapshotId,
    reply: oneshot::Sender<Result<TaskOutput, Problem>>,
) {
    tokio::spawn(async move {
        let verified = match ground {
            Ok(ground) => verify(&ground, &task, snapshot).await,
            Err(problem) => Err(problem),
        };
        // Whoever waited may have given up.
        let _ = reply.send(verified.map(|facts| TaskOutput::Verified { facts }));
    });
}

async fn verify(
    ground: &Ground,
    task: &TaskContext,
    snapshot: SnapshotId,
) -> Result<VerificationFacts, Problem> {
    task.phase("waiting for the host to have read another");
    let place = task.unless_cancelled(ground.services.reading.place().acquire_owned()).await?;
    let _place = place.map_err(|_| cancelled())?;
    let (began, before) = (Instant::now(), ground.pace.done_bytes());
    // Nobody waits for the thread if this ends first: it hears of it at its next step.
    let cancel = task.cancel().child_token();
    let _ends = cancel.clone().drop_guard();
    let (dirs, services, pace) = (ground.dirs.clone(), Arc::clone(&ground.services), ground.pace.clone());
    let whole = total_bytes(&ground.dirs, &snapshot);
    let reading = ground.read(move || {
        let reader = Reader::new(&pace, &cancel);
        let mut look = Look::new(&dirs, &snapshot, reader, &services.reading.recent);
        look.at_everything()?;
        Ok(look.facts())
    });
    let telling = async {
        loop {
            let done_bytes = ground.pace.done_bytes() - before;
            let took = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX).max(1);
            task.progress(Progress {
                phase: "reading".to_owned(),
                done_bytes,
                total_bytes: whole.max(done_bytes),
                bytes_per_second: done_bytes.saturating_mul(1000) / took,
                ..Progress::default()
            });
            tokio::time::sleep(TELL_EVERY).await;
        }
    };
    let mut facts = tokio::select! {
        facts = task.unless_cancelled(reading) => facts??,
        () = telling => return Err(cancelled()),
    };
    facts.total_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    Ok(facts)
}

/// What there is to be read, as far as can be said before; only for showing how far it is.
fn total_bytes(dirs: &VmDirs, snapshot: &SnapshotId) -> u64 {
    let stored = |path: PathBuf| path.metadata().map_or(0, |file| file.blocks() * 512);
    let own = std::fs::read_dir(dirs.snapshot(snapshot)).into_iter().flatten().flatten();
    let own: u64 = own.map(|entry| stored(entry.path())).sum();
    let Ok(manifest) = archive::read(dirs, snapshot) else { return own };
    let image = &manifest.definition.image;
    let parts = image.parts.iter().map(|part| stored(dirs.pool.part(&image.id, part.role, part.format)));
    own + parts.chain(manifest.disks().layers().map(|layer| stored(dirs.layer(layer)))).sum::<u64>()
}

/// Reads all of a snapshot that came from elsewhere, but for its image, at once and not slowly: a VM is waited for. Its
/// layers have their hashes then. Blocks.
///
/// # Errors
/// When something can't be read for a reason that says nothing of the snapshot, or it is cancelled.
pub(super) fn look_at_arrived(
    dirs: &VmDirs,
    snapshot: &SnapshotId,
    cancel: &CancellationToken,
) -> Result<VerificationFacts, Problem> {
    let (pace, recent) = (Pace::new(u64::MAX), Recent::default());
    let mut look = Look::new(dirs, snapshot, Reader::new(&pace, cancel), &recent);
    if let Some(manifest) = look.manifest()? {
        look.at_own_files(&manifest)?;
    }
    Ok(look.facts())
}

/// One look at all of a snapshot. Blocks.
struct Look<'a> {
    dirs: &'a VmDirs,
    snapshot: &'a SnapshotId,
    files: SnapshotFiles,
    reader: Reader<'a>,
    recent: &'a Recent,
    facts: VerificationFacts,
}

impl<'a> Look<'a> {
    fn new(dirs: &'a VmDirs, snapshot: &'a SnapshotId, reader: Reader<'a>, recent: &'a Recent) -> Self {
        let files = SnapshotFiles::of(dirs, snapshot);
        Self { dirs, snapshot, files, reader, recent, facts: VerificationFacts::default() }
    }

    fn facts(self) -> VerificationFacts {
        VerificationFacts { read_bytes: self.reader.read_bytes(), ..self.facts }
    }

    fn at_everything(&mut self) -> Result<(), Problem> {
        let Some(manifest) = self.manifest()? else { return Ok(()) };
        self.at_own_files(&manifest)?;
        self.image(&manifest)
    }

    /// All but the image.
    fn at_own_files(&mut self, manifest: &Manifest) -> Result<(), Problem> {
        self.layers()?;
        if let Err(error) = archive::remembered(self.dirs, manifest) {
            self.archive_fault(error)?;
        }
        match &manifest.memory {
            Some(memory) => self.memory(memory),
            None => Ok(()),
        }
    }

    /// The manifest; none when it is at fault itself.
    fn manifest(&mut self) -> Result<Option<Manifest>, Problem> {
        let path = self.files.manifest();
        match archive::read(self.dirs, self.snapshot) {
            Ok(manifest) => return Ok(Some(manifest)),
            Err(missing @ ArchiveError::Missing { .. }) => return Err(missing.into()),
            Err(ArchiveError::File(error)) => self.file_fault(error)?,
            Err(error) => self.fault(&path, None, with_causes(&error)),
        }
        Ok(None)
    }

    fn layers(&mut self) -> Result<(), Problem> {
        let mut seen: BTreeSet<LayerId> = BTreeSet::new();
        loop {
            let Some(manifest) = self.manifest()? else { return Ok(()) };
            let disks = manifest.disks();
            let Some(next) = disks.layers().find(|layer| !seen.contains(layer)) else {
                match self.tables(&manifest)? {
                    Tables::Read => return Ok(()),
                    Tables::Moved => continue,
                }
            };
            match hashes::open(&self.dirs.layer(next)) {
                Ok((file, metadata)) => self.layer(next, &file, &metadata)?,
                // Merged meanwhile: what it held is in another one now, which the manifest names.
                Err(_) if self.has_moved(&manifest) => continue,
                Err(error) => self.file_fault(error)?,
            }
            seen.insert(next.clone());
        }
    }

    fn has_moved(&self, manifest: &Manifest) -> bool {
        archive::read(self.dirs, self.snapshot).is_ok_and(|now| now.disks() != manifest.disks())
    }

    fn layer(&mut self, layer: &LayerId, file: &File, metadata: &std::fs::Metadata) -> Result<(), Problem> {
        let path = self.dirs.layer(layer);
        let known = match hashes::read(self.dirs, layer)? {
            Some(Ok(known)) => Some(known),
            Some(Err(error)) => {
                let path = self.dirs.layer_hashes(layer);
                self.fault(&path, None, hashes_fault(error));
                return Ok(());
            }
            None => None,
        };
        let state = FileState::of(metadata);
        if known.is_some() && self.is_spared(state, layer.as_str()) {
            return Ok(());
        }
        let found = match &known {
            Some(known) => known.check(&mut self.reader, file),
            None => self.hash_first(layer, file, metadata).map(|()| None),
        };
        match found {
            Ok(None) => self.recent.remember(state, layer.as_str()),
            Ok(Some(differs)) => self.fault(&path, Some(differs.offset), differs.detail),
            Err(broken) => self.io_fault(&path, broken.into_io()?)?,
        }
        Ok(())
    }

    /// A layer that nobody has hashed yet: from now on it is known what it is.
    fn hash_first(
        &mut self,
        layer: &LayerId,
        file: &File,
        metadata: &std::fs::Metadata,
    ) -> Result<(), quiet::Broken> {
        let made = LayerHashes::make(layer, &mut self.reader, file)?;
        self.facts.first_hashed += 1;
        if hashes::is_frozen(metadata)
            && let Err(error) = hashes::write(self.dirs, &made)
        {
            tracing::warn!(%layer, error = with_causes(&error), "a layer's hashes can't be written down");
        }
        Ok(())
    }

    /// What the layers' tables say must lie within their files; those of a disk are of one size. Where bytes are wrong already,
    /// that has been said.
    fn tables(&mut self, manifest: &Manifest) -> Result<Tables, Problem> {
        if !self.facts.faults.is_empty() {
            return Ok(Tables::Read);
        }
        let of_disk = |chain: &[LayerId]| -> Vec<PathBuf> {
            chain.iter().map(|layer| self.dirs.layer(layer)).collect()
        };
        let disks: Vec<Vec<PathBuf>> = manifest.disks().each().map(of_disk).collect();
        match disks.iter().try_for_each(|paths| merging::measure(paths).map(drop)) {
            Ok(()) => {}
            Err(_) if self.has_moved(manifest) => return Ok(Tables::Moved),
            Err(MergeError::File(error) | MergeError::Layer(LayerError::File(error))) => {
                self.file_fault(error)?;
            }
            Err(MergeError::Layer(LayerError::Unfit { path, detail })) => self.fault(&path, None, detail),
            Err(error @ MergeError::Sizes(..)) => {
                let path = self.dirs.layers();
                self.fault(&path, None, error.to_string());
            }
            Err(MergeError::BrokenOff(_)) => return Err(cancelled()),
        }
        Ok(Tables::Read)
    }

    fn image(&mut self, manifest: &Manifest) -> Result<(), Problem> {
        let image = &manifest.definition.image;
        for part in &image.parts {
            let path = self.dirs.pool.part(&image.id, part.role, part.format);
            let (file, metadata) = match hashes::open(&path) {
                Ok(opened) => opened,
                Err(error) => {
                    self.file_fault(error)?;
                    continue;
                }
            };
            let (state, wanted) = (FileState::of(&metadata), part.sha256.to_ascii_lowercase());
            if self.is_spared(state, &wanted) {
                continue;
            }
            let mut hasher = Sha256::new();
            let read = self.reader.each_chunk(&file, metadata.len(), |_, bytes| {
                hasher.update(bytes);
                true
            });
            let found: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
            match read {
                Ok(()) if found == wanted => self.recent.remember(state, &wanted),
                Ok(()) => self.fault(&path, None, format!("its SHA-256 is {found}, expected {wanted}")),
                Err(broken) => self.io_fault(&path, broken.into_io()?)?,
            }
        }
        Ok(())
    }

    fn memory(&mut self, memory: &MemoryManifest) -> Result<(), Problem> {
        self.device(memory)?;
        let image = match MemoryImage::open(&self.files, self.snapshot, memory) {
            Ok(image) => image,
            Err(error) => return self.archive_fault(error),
        };
        let count = image.index().page_count();
        let mut buffer = vec![0; CHUNK_BYTES];
        let mut bad: BTreeSet<u8> = BTreeSet::new();
        let mut page = 0;
        while page < count {
            let held = image.index().holder(page).unwrap_or(Holder::HOLE);
            let end = image.index().end_of_run(page, page + (CHUNK_BYTES / PAGE_BYTES) as u64);
            let (offset, pages) = (page * PAGE_BYTES as u64, usize::try_from(end - page).unwrap_or(0));
            let bytes = &mut buffer[..pages * PAGE_BYTES];
            page = end;
            // What is zero by the index's word alone is never read from a file.
            let number = if held == Holder::HOLE { Some(0) } else { held.number() };
            let Some(number) = number.filter(|number| !bad.contains(number)) else { continue };
            let found = match held {
                Holder::HOLE => self.hole(&image, offset, bytes),
                _ => self.pages(&image, number, offset, bytes),
            };
            if let Some((at, detail)) = found? {
                bad.insert(number);
                self.fault(&self.files.memory_file(number).clone(), Some(at), detail);
            }
        }
        Ok(())
    }

    fn device(&mut self, memory: &MemoryManifest) -> Result<(), Problem> {
        let path = self.files.device();
        match archive::blake3_of(&path) {
            Ok(found) if found == memory.device_blake3 => Ok(()),
            Ok(_) => {
                self.fault(&path, None, "it has another hash than the manifest names".to_owned());
                Ok(())
            }
            Err(error) => self.file_fault(error),
        }
    }

    /// Reads pages that one file has; the first that is wrong.
    fn pages(
        &mut self,
        image: &MemoryImage,
        number: u8,
        offset: u64,
        bytes: &mut [u8],
    ) -> Result<Option<(u64, String)>, Problem> {
        self.reader.step(bytes.len()).map_err(broken_off)?;
        let footprint = image.file(number).map(|file| (Footprint::before(file, offset, bytes.len()), file));
        let read = image.read(offset, bytes);
        if let Some((footprint, file)) = footprint {
            footprint.remove(file);
        }
        if read.is_ok() {
            return Ok(None);
        }
        for (at, page) in (offset..).step_by(PAGE_BYTES).zip(bytes.chunks_mut(PAGE_BYTES)) {
            match image.read(at, page) {
                Ok(()) => {}
                Err(ArchiveError::File(FileError::Io { source, path, .. })) if !is_fault(&source) => {
                    return Err(FileError::io(&path, "read")(source).into());
                }
                Err(ArchiveError::Damaged { .. }) => {
                    return Ok(Some((at, "the page has another hash than the index names".to_owned())));
                }
                Err(error) => return Ok(Some((at, with_causes(&error)))),
            }
        }
        // It was wrong a moment ago and is right now: nobody writes there, so the disk is not to be trusted.
        Ok(Some((offset, "it read differently at two times".to_owned())))
    }

    /// Makes sure that the full image has nothing where it is to have a hole, for that is mapped as it is.
    fn hole(
        &mut self,
        image: &MemoryImage,
        offset: u64,
        bytes: &mut [u8],
    ) -> Result<Option<(u64, String)>, Problem> {
        let Some(file) = image.file(0) else { return Ok(None) };
        let data = rustix::fs::seek(file, SeekFrom::Data(offset));
        if !data.is_ok_and(|data| data < offset + bytes.len() as u64) {
            return Ok(None);
        }
        self.reader.step(bytes.len()).map_err(broken_off)?;
        let path = self.files.memory();
        if let Err(error) = file.read_exact_at(bytes, offset) {
            return match is_fault(&error) {
                true => Ok(Some((offset, format!("it can't be read: {error}")))),
                false => Err(FileError::io(&path, "read")(error).into()),
            };
        }
        let mut pages = (offset..).step_by(PAGE_BYTES).zip(bytes.chunks(PAGE_BYTES));
        let wrong = pages.find(|(_, page)| !is_zero(page));
        Ok(wrong.map(|(at, _)| (at, "the page is not zero, as the index says that it is".to_owned())))
    }

    fn is_spared(&mut self, state: FileState, against: &str) -> bool {
        let spared = self.recent.has(state, against);
        if spared {
            self.facts.spared_bytes += state.length();
        }
        spared
    }

    fn fault(&mut self, path: &Path, offset: Option<u64>, detail: String) {
        let inside = path.strip_prefix(&self.dirs.disk).or_else(|_| path.strip_prefix(&self.dirs.pool.path));
        let file = inside.unwrap_or(path).display().to_string();
        self.facts.faults.push(SnapshotFault { file, offset, detail });
    }

    fn archive_fault(&mut self, error: ArchiveError) -> Result<(), Problem> {
        match error {
            ArchiveError::File(error) => self.file_fault(error),
            ArchiveError::Damaged { path, detail, .. } => {
                self.fault(&path, None, detail);
                Ok(())
            }
            error @ (ArchiveError::Missing { .. } | ArchiveError::Foreign { .. }) => Err(error.into()),
        }
    }

    fn file_fault(&mut self, error: FileError) -> Result<(), Problem> {
        match error {
            FileError::Io { path, source, .. } => self.io_fault(&path, source),
            FileError::Content { path, source } => {
                self.fault(&path, None, format!("it is not what it should be: {source}"));
                Ok(())
            }
        }
    }

    /// What the system refused is the snapshot's fault if it says that something of it is not there or can't be read from the
    /// disk. Anything else says nothing of the snapshot.
    fn io_fault(&mut self, path: &Path, error: io::Error) -> Result<(), Problem> {
        if !is_fault(&error) {
            return Err(FileError::io(path, "read")(error).into());
        }
        // Perhaps it is only that the snapshot was deleted.
        if let Err(missing @ ArchiveError::Missing { .. }) = archive::read(self.dirs, self.snapshot) {
            return Err(missing.into());
        }
        let detail = match error.kind() {
            io::ErrorKind::NotFound => "it is missing".to_owned(),
            io::ErrorKind::UnexpectedEof => "it is truncated".to_owned(),
            _ => format!("it can't be read: {error}"),
        };
        self.fault(path, None, detail);
        Ok(())
    }
}

enum Tables {
    Read,
    /// The layers are others now.
    Moved,
}

fn is_fault(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof)
        || error.raw_os_error() == Some(libc::EIO)
}

fn broken_off(_: BrokenOff) -> Problem {
    cancelled()
}

fn hashes_fault(error: HashesError) -> String {
    format!("{error}: whether the layer is what it was can't be said")
}

#[cfg(test)]
mod tests;
