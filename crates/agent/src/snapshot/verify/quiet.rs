//! Reading much without being in anybody's way: on a thread of the lowest priority, at a pace that is set from outside,
//! and without pushing out of the host's cache what guests have there.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use berth_model::{Problem, ProblemCode};
use rustix::fs::{Advice, fadvise};
use rustix::io::ReadWriteFlags;
use tokio_util::sync::CancellationToken;

use crate::disk::pace::{BrokenOff, Keeper, Pace};
use crate::snapshot::hashes::CHUNK_BYTES;
use crate::task::cancelled;

/// The lowest priority that there is. The system's schedulers of disks go by it as well.
const NICE: i32 = 19;

/// Why reading ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// Nobody wants it any more.
    #[error(transparent)]
    Off(#[from] BrokenOff),
    /// The system refused.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Does something that takes long on a thread of its own with the lowest priority.
///
/// # Errors
/// What the work says; work that panics is a fault of ours.
pub async fn quietly<T, F>(work: F) -> Result<T, Problem>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, Problem> + Send + 'static,
{
    let (tell, told) = tokio::sync::oneshot::channel();
    let broke =
        |text: String| Problem::new(ProblemCode::Internal, format!("reading in the background {text}"));
    let started = std::thread::Builder::new().name("quiet-reader".into()).spawn(move || {
        // On Linux it is of this thread alone. That it can't be lowered is no reason not to work.
        let _ = rustix::process::nice(NICE);
        // Whoever asked may have gone.
        let _ = tell.send(work());
    });
    started.map_err(|error| broke(format!("can't begin: {error}")))?;
    told.await.unwrap_or_else(|_| Err(broke("broke off; the agent's log says where".into())))
}

/// Reads files so.
pub struct Reader<'a> {
    keeper: Keeper,
    cancel: &'a CancellationToken,
    buffer: Vec<u8>,
    read_bytes: u64,
}

impl<'a> Reader<'a> {
    /// One that keeps this pace, until it is cancelled.
    pub fn new(pace: &Pace, cancel: &'a CancellationToken) -> Self {
        Self { keeper: pace.keep(), cancel, buffer: vec![0; CHUNK_BYTES], read_bytes: 0 }
    }

    /// What was read so far, in bytes.
    pub const fn read_bytes(&self) -> u64 {
        self.read_bytes
    }

    /// Waits until so much may be read.
    ///
    /// # Errors
    /// When it is to be broken off.
    pub fn step(&mut self, bytes: usize) -> Result<(), BrokenOff> {
        if self.cancel.is_cancelled() {
            return Err(BrokenOff);
        }
        self.read_bytes += bytes as u64;
        self.keeper.spend(bytes as u64)
    }

    /// Calls `visit` with each chunk of a file up to `length`, until it answers that this is enough. Blocks.
    ///
    /// # Errors
    /// When the system refuses, the file is shorter, or it is to be broken off.
    pub fn each_chunk(
        &mut self,
        file: &File,
        length: u64,
        mut visit: impl FnMut(u64, &[u8]) -> bool,
    ) -> Result<(), Broken> {
        let mut offset = 0;
        while offset < length {
            let count = usize::try_from(length - offset).map_or(CHUNK_BYTES, |left| left.min(CHUNK_BYTES));
            self.step(count)?;
            let footprint = Footprint::before(file, offset, count);
            file.read_exact_at(&mut self.buffer[..count], offset)?;
            footprint.remove(file);
            if !visit(offset, &self.buffer[..count]) {
                break;
            }
            offset += count as u64;
        }
        Ok(())
    }
}

/// A part of a file that is about to be read, and whether it was in the host's cache before.
#[derive(Debug, Clone, Copy)]
pub struct Footprint {
    offset: u64,
    length: u64,
    was_cached: bool,
}

impl Footprint {
    /// Looks before it is read.
    pub fn before(file: &File, offset: u64, count: usize) -> Self {
        let length = count as u64;
        let is_there = |at| {
            let mut byte = [0];
            let mut buffers = [io::IoSliceMut::new(&mut byte)];
            // What can't be said counts as there: it stays.
            match rustix::io::preadv2(file, &mut buffers, at, ReadWriteFlags::NOWAIT) {
                Err(rustix::io::Errno::AGAIN) => false,
                Ok(_) | Err(_) => true,
            }
        };
        let was_cached = is_there(offset) || is_there(offset + length.saturating_sub(1));
        Self { offset, length, was_cached }
    }

    /// Leaves the cache as it was.
    pub fn remove(self, file: &File) {
        if let (false, Some(length)) = (self.was_cached, std::num::NonZeroU64::new(self.length)) {
            // A hint, and no more.
            let _ = fadvise(file, self.offset, Some(length), Advice::DontNeed);
        }
    }
}

impl Broken {
    /// As what a task fails with, unless it is for whoever read to say what it means.
    ///
    /// # Errors
    /// That it was broken off.
    pub fn into_io(self) -> Result<io::Error, Problem> {
        match self {
            Self::Off(_) => Err(cancelled()),
            Self::Io(error) => Ok(error),
        }
    }
}
