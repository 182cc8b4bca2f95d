//! The target's side: a thread of its own that writes what arrives, so that a slow disk slows the sender down and nothing
//! else.
//!
//! A file arrives under a name that says that it is not whole, is compared with the source's checksum, brought to the
//! disk, made read-only, and given its name. The writable tops are written in place, under the QEMU that will use it, which
//! does not look at it before it is told to run.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use berth_model::{Problem, ProblemCode};
use tokio::sync::{mpsc, oneshot};

use super::{Checksum, checksum};
use crate::disk::FROZEN_MODE;
use crate::durable::{self, FileError, UNFINISHED_SUFFIX};
use crate::layout::VmDirs;
use crate::migration::link::FileTaker;
use crate::migration::wire::{CHUNK_BYTES, FileName, FileOffer, SnapshotPart, WireError, disk_of_top};
use crate::room::Room;
use crate::snapshot::memory;
use crate::vm::files;

/// Pieces of work that may wait: 2 MiB of data.
const QUEUE_MAX: usize = 32;
/// Most files in one offer, so that a peer gone mad can't eat memory.
const FILES_MAX: usize = 65_536;
/// Longest file, in bytes.
const LENGTH_MAX: u64 = 1 << 46;

enum Work {
    Offer(Vec<FileOffer>, oneshot::Sender<Result<Vec<Option<String>>, Problem>>),
    Data { file: u32, offset: u64, bytes: Vec<u8> },
    Hole { file: u32, offset: u64, length: u64 },
    Done { file: u32, checksum: String },
    Tops(Vec<PathBuf>),
    Sync { top_lengths_bytes: Vec<u64>, reply: oneshot::Sender<Result<(), Problem>> },
}

/// To the thread that writes.
#[derive(Clone)]
pub struct Files {
    queue: mpsc::Sender<Work>,
}

impl Files {
    /// Starts the thread. It ends when the last handle is dropped. `group` is that of the VM's QEMU.
    pub fn start(dirs: VmDirs, group: Option<u32>) -> Self {
        let (queue, mut work) = mpsc::channel(QUEUE_MAX);
        tokio::task::spawn_blocking(move || {
            let mut disk =
                Disk { dirs, group, offers: Vec::new(), open: None, tops: Vec::new(), fault: None };
            while let Some(work) = work.blocking_recv() {
                disk.work(work);
            }
        });
        Self { queue }
    }

    /// What is there of these files: a checksum for each that has the right length.
    ///
    /// # Errors
    /// When the offer can't be or a file can't be read.
    pub async fn offer(&self, files: Vec<FileOffer>) -> Result<Vec<Option<String>>, Problem> {
        let (reply, answer) = oneshot::channel();
        self.put(Work::Offer(files, reply)).await?;
        answer.await.unwrap_or_else(|_| Err(ended()))
    }

    /// From now on data may come for the disks' writable tops, which are there.
    ///
    /// # Errors
    /// When the thread has ended.
    pub async fn expect_tops(&self, paths: Vec<PathBuf>) -> Result<(), Problem> {
        self.put(Work::Tops(paths)).await
    }

    /// Waits until all that came before is on the disk and was right; the tops are given their lengths, if there are any.
    ///
    /// # Errors
    /// The first thing that went wrong.
    pub async fn sync(&self, top_lengths_bytes: Vec<u64>) -> Result<(), Problem> {
        let (reply, answer) = oneshot::channel();
        self.put(Work::Sync { top_lengths_bytes, reply }).await?;
        answer.await.unwrap_or_else(|_| Err(ended()))
    }

    async fn put(&self, work: Work) -> Result<(), Problem> {
        self.queue.send(work).await.map_err(|_| ended())
    }
}

impl FileTaker for Files {
    async fn data(&mut self, file: u32, offset: u64, bytes: &[u8]) -> Result<(), WireError> {
        let work = Work::Data { file, offset, bytes: bytes.to_vec() };
        self.queue.send(work).await.map_err(|_| WireError::Closed)
    }

    async fn hole(&mut self, file: u32, offset: u64, length: u64) -> Result<(), WireError> {
        self.queue.send(Work::Hole { file, offset, length }).await.map_err(|_| WireError::Closed)
    }

    async fn end(&mut self, file: u32, checksum: &str) -> Result<(), WireError> {
        let work = Work::Done { file, checksum: checksum.to_owned() };
        self.queue.send(work).await.map_err(|_| WireError::Closed)
    }
}

fn ended() -> Problem {
    Problem::new(ProblemCode::Internal, "the thread that writes a migration's files has ended")
}

/// A file that is arriving.
struct Arriving {
    number: u32,
    file: File,
    path: PathBuf,
    next_offset: u64,
    room: Room,
    checksum: Checksum,
}

/// A writable top that is written under the QEMU that will use it.
struct Top {
    file: File,
    path: PathBuf,
    room: Room,
}

struct Disk {
    dirs: VmDirs,
    group: Option<u32>,
    offers: Vec<FileOffer>,
    open: Option<Arriving>,
    tops: Vec<Top>,
    /// The first thing that went wrong; what comes after it is thrown away.
    fault: Option<Problem>,
}

impl Disk {
    fn work(&mut self, work: Work) {
        let result = match work {
            Work::Offer(files, reply) => {
                // Whoever asked may have given up.
                let _ = reply.send(self.offer(files));
                return;
            }
            Work::Sync { top_lengths_bytes, reply } => {
                let result = match &self.fault {
                    Some(problem) => Err(problem.clone()),
                    None => self.sync(&top_lengths_bytes),
                };
                let _ = reply.send(result);
                return;
            }
            _ if self.fault.is_some() => return,
            Work::Data { file, offset, bytes } => self.data(file, offset, &bytes),
            Work::Hole { file, offset, length } => self.hole(file, offset, length),
            Work::Done { file, checksum } => self.done(file, &checksum),
            Work::Tops(paths) => self.expect_tops(paths),
        };
        self.fault = result.err();
    }

    fn offer(&mut self, files: Vec<FileOffer>) -> Result<Vec<Option<String>>, Problem> {
        if files.len() > FILES_MAX || files.iter().any(|file| file.length_bytes > LENGTH_MAX) {
            return Err(nonsense("an offer of too many or too long files"));
        }
        let have = (0..).zip(&files).map(|(number, offer)| {
            let path = offer.name.path(&self.dirs);
            if let Some(first) = offer.link_to {
                let first = files.get(first as usize).filter(|one| first < number && one.link_to.is_none());
                let first = first.ok_or_else(|| nonsense("a link to a file that was not offered before"))?;
                return Ok(is_same_file(&path, &first.name.path(&self.dirs)).then(String::new));
            }
            match fs::metadata(&path) {
                Ok(there) if there.len() == offer.length_bytes => Ok(Some(checksum(&path)?)),
                Ok(_) => Ok(None),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(FileError::io(&path, "examined")(error).into()),
            }
        });
        let have: Result<Vec<_>, Problem> = have.collect();
        self.offers = files;
        have
    }

    fn data(&mut self, number: u32, offset: u64, bytes: &[u8]) -> Result<(), Problem> {
        if let Some(disk) = disk_of_top(number) {
            let top =
                self.tops.get_mut(disk).ok_or_else(|| nonsense("data of a top that is not expected"))?;
            if offset > LENGTH_MAX {
                return Err(nonsense("data far beyond any disk"));
            }
            return write(&mut top.room, &top.file, &top.path, offset, bytes);
        }
        let length = self.offered(number)?.length_bytes;
        let whole = bytes.len() == CHUNK_BYTES || offset + bytes.len() as u64 == length;
        let arriving = self.arriving(number)?;
        if offset < arriving.next_offset || offset.saturating_add(bytes.len() as u64) > length || !whole {
            return Err(nonsense("data outside its file or out of order"));
        }
        arriving.next_offset = offset + bytes.len() as u64;
        arriving.checksum.chunk(offset, bytes);
        write(&mut arriving.room, &arriving.file, &arriving.path, offset, bytes)
    }

    fn hole(&mut self, number: u32, offset: u64, length: u64) -> Result<(), Problem> {
        // Only tops change, so only in them does something become zero.
        let Some(Top { file, path, .. }) = disk_of_top(number).and_then(|disk| self.tops.get(disk)) else {
            return Err(nonsense("a hole in a file that does not change"));
        };
        if length > CHUNK_BYTES as u64 || offset > LENGTH_MAX {
            return Err(nonsense("a hole longer than a chunk"));
        }
        Ok(memory::punch(file, offset, length).map_err(FileError::io(path, "written"))?)
    }

    fn done(&mut self, number: u32, expected: &str) -> Result<(), Problem> {
        let offer = self.offered(number)?.clone();
        if let Some(first) = offer.link_to {
            return self.link(&offer, first);
        }
        // A file of zeros has no data.
        self.arriving(number)?;
        let Some(arriving) = self.open.take() else { return Err(nonsense("the end of no file")) };
        let found = arriving.checksum.finish(offer.length_bytes);
        if found != expected {
            let message = format!("{} did not arrive as it was sent", arriving.path.display());
            return Err(Problem::new(ProblemCode::Internal, message).at("checksum", found, expected));
        }
        let path = offer.name.path(&self.dirs);
        let finish = || {
            arriving.file.set_permissions(Permissions::from_mode(mode(&offer.name)))?;
            arriving.file.sync_all()?;
            fs::rename(&arriving.path, &path)
        };
        finish().map_err(FileError::io(&path, "written"))?;
        files::give_group(&path, self.group.filter(|_| is_for_qemu(&offer.name)))?;
        Ok(durable::sync_parent(&path)?)
    }

    /// Gives a file that is there another name.
    fn link(&self, offer: &FileOffer, first: u32) -> Result<(), Problem> {
        let first = self.offered(first)?.name.path(&self.dirs);
        let (path, unfinished) = (offer.name.path(&self.dirs), self.make_place(offer)?);
        durable::remove_file(&unfinished)?;
        let finish = || {
            fs::hard_link(&first, &unfinished)?;
            fs::rename(&unfinished, &path)
        };
        finish().map_err(FileError::io(&path, "linked"))?;
        Ok(durable::sync_parent(&path)?)
    }

    fn expect_tops(&mut self, paths: Vec<PathBuf>) -> Result<(), Problem> {
        for path in paths {
            let file = OpenOptions::new().write(true).open(&path).map_err(FileError::io(&path, "opened"))?;
            self.tops.push(Top { file, path, room: Room::default() });
        }
        Ok(())
    }

    fn sync(&mut self, top_lengths_bytes: &[u64]) -> Result<(), Problem> {
        if self.tops.len() != top_lengths_bytes.len() {
            return Err(nonsense("the lengths of other disks than there are"));
        }
        for (Top { file, path, .. }, length) in self.tops.iter().zip(top_lengths_bytes) {
            if *length > LENGTH_MAX {
                return Err(nonsense("a length far beyond any disk"));
            }
            let finish = || {
                file.set_len(*length)?;
                file.sync_all()
            };
            finish().map_err(FileError::io(path, "brought to the disk"))?;
        }
        Ok(())
    }

    fn offered(&self, number: u32) -> Result<&FileOffer, Problem> {
        let offer = usize::try_from(number).ok().and_then(|number| self.offers.get(number));
        offer.ok_or_else(|| nonsense("data of a file that was not offered"))
    }

    /// The file that is arriving, opened when its first bytes come.
    fn arriving(&mut self, number: u32) -> Result<&mut Arriving, Problem> {
        if self.open.as_ref().is_none_or(|open| open.number != number) {
            if self.open.is_some() {
                return Err(nonsense("data of two files at once"));
            }
            let offer = self.offered(number)?.clone();
            let path = self.make_place(&offer)?;
            let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path);
            let file = file.map_err(FileError::io(&path, "made"))?;
            file.set_len(offer.length_bytes).map_err(FileError::io(&path, "made"))?;
            self.open = Some(Arriving {
                number,
                file,
                path,
                next_offset: 0,
                room: Room::default(),
                checksum: Checksum::default(),
            });
        }
        self.open.as_mut().ok_or_else(|| nonsense("data of no file"))
    }

    fn make_place(&self, offer: &FileOffer) -> Result<PathBuf, Problem> {
        if let FileName::Snapshot { snapshot, .. } = &offer.name {
            files::make_directory(&self.dirs.snapshot(snapshot), self.group)?;
        }
        let mut path = offer.name.path(&self.dirs).into_os_string();
        path.push(UNFINISHED_SUFFIX);
        Ok(path.into())
    }
}

fn write(room: &mut Room, file: &File, path: &Path, offset: u64, bytes: &[u8]) -> Result<(), Problem> {
    let written = room.take(file, bytes.len() as u64).and_then(|()| file.write_all_at(bytes, offset));
    Ok(written.map_err(FileError::io(path, "written"))?)
}

/// Whether two names are of one file.
fn is_same_file(one: &Path, other: &Path) -> bool {
    let id = |path: &Path| fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino())).ok();
    id(one).is_some_and(|one| Some(one) == id(other))
}

/// Whether the VM's QEMU opens the file itself.
const fn is_for_qemu(name: &FileName) -> bool {
    matches!(name, FileName::Seed | FileName::Snapshot { part: SnapshotPart::Memory, .. })
}

const fn mode(name: &FileName) -> u32 {
    match name {
        FileName::Layer { .. } => FROZEN_MODE,
        FileName::Seed => 0o440,
        FileName::Snapshot { part: SnapshotPart::Manifest, .. } => 0o600,
        FileName::Snapshot { .. } => 0o440,
    }
}

fn nonsense(what: &str) -> Problem {
    Problem::new(ProblemCode::InvalidInput, format!("the other host sent {what}"))
}

/// Removes what arrived of files that never became whole. Blocks.
///
/// # Errors
/// When the system refuses.
pub fn remove_unfinished(directory: &Path) -> Result<(), FileError> {
    let Ok(entries) = fs::read_dir(directory) else { return Ok(()) };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().ends_with(UNFINISHED_SUFFIX) {
            durable::remove_file(&entry.path())?;
        }
    }
    Ok(())
}
