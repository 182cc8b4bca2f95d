//! The source's side: reading files and sending what the target lacks.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use berth_model::Problem;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{Checksum, each_chunk};
use crate::durable::{FileError, blocking};
use crate::migration::link::Sender;
use crate::migration::wire::{CHUNK_BYTES, top_file};
use crate::task::cancelled;

/// Chunks read ahead of the network: a MiB.
const READ_AHEAD: usize = 16;

/// Keeps the sending of files within a limit.
#[derive(Debug)]
pub struct Pace {
    bytes_per_second: Option<u64>,
    started: Instant,
    sent: u64,
}

impl Pace {
    /// From now on; none: as fast as it goes.
    pub fn new(bytes_per_second: Option<u64>) -> Self {
        Self { bytes_per_second, started: Instant::now(), sent: 0 }
    }

    async fn spend(&mut self, bytes: u64) {
        self.sent += bytes;
        let Some(rate) = self.bytes_per_second else { return };
        let due = Duration::from_secs_f64(self.sent as f64 / rate.max(1) as f64);
        tokio::time::sleep_until((self.started + due).into()).await;
    }
}

/// Sends a file that does not change, and gives its checksum.
///
/// # Errors
/// When it can't be read, the connection is over, or somebody cancels.
pub async fn send_file(
    sender: &Sender,
    number: u32,
    path: &Path,
    pace: &mut Pace,
    cancel: &CancellationToken,
    mut sent: impl FnMut(u64),
) -> Result<String, Problem> {
    let (chunks, mut ready) = mpsc::channel::<(u64, Vec<u8>)>(READ_AHEAD);
    let path = path.to_owned();
    let reading = tokio::spawn(blocking(move || {
        let read = || {
            let file = File::open(&path)?;
            let length = file.metadata()?.len();
            let mut checksum = Checksum::default();
            each_chunk(&file, length, |offset, bytes| {
                checksum.chunk(offset, bytes);
                chunks.blocking_send((offset, bytes.to_vec())).map_err(|_| io::ErrorKind::Interrupted.into())
            })?;
            Ok(checksum.finish(length))
        };
        Ok(read().map_err(FileError::io(&path, "read"))?)
    }));
    while let Some((offset, bytes)) = ready.recv().await {
        if cancel.is_cancelled() {
            return Err(cancelled());
        }
        sender.data(number, offset, &bytes).await?;
        sent(bytes.len() as u64);
        pace.spend(bytes.len() as u64).await;
    }
    reading.await.unwrap_or_else(|_| Err(cancelled()))
}

/// The writable tops of a VM's disks.
#[derive(Debug)]
pub struct Tops(Vec<Top>);

impl Tops {
    /// Those in these files, one for each disk. Nothing of them was sent yet.
    pub fn new(paths: Vec<PathBuf>) -> Self {
        let top = |(disk, path)| Top { number: top_file(disk), path, sent: Vec::new() };
        Self(paths.into_iter().enumerate().map(top).collect())
    }

    /// Sends what differs from what was sent before; gives the files' lengths as this began, in bytes.
    ///
    /// # Errors
    /// When one can't be read or the connection is over.
    pub async fn pass(&mut self, sender: &Sender) -> Result<Vec<u64>, Problem> {
        let mut lengths = Vec::with_capacity(self.0.len());
        for top in &mut self.0 {
            lengths.push(top.pass(sender).await?);
        }
        Ok(lengths)
    }
}

/// A writable top, and what of it was sent.
#[derive(Debug)]
struct Top {
    /// What it is called in frames.
    number: u32,
    path: PathBuf,
    /// A hash for each chunk as it was sent last; none: it was never sent, or as zero.
    sent: Vec<Option<[u8; 16]>>,
}

enum Change {
    Chunk(u64, Vec<u8>),
    Zero(u64, u64),
}

impl Top {
    async fn pass(&mut self, sender: &Sender) -> Result<u64, Problem> {
        let (changes, mut found) = mpsc::channel::<Change>(READ_AHEAD);
        let (path, before) = (self.path.clone(), std::mem::take(&mut self.sent));
        let looking = tokio::spawn(blocking(move || {
            let look = || {
                let file = File::open(&path)?;
                find_changes(&file, before, &changes)
            };
            Ok(look().map_err(FileError::io(&path, "read"))?)
        }));
        while let Some(change) = found.recv().await {
            match change {
                Change::Chunk(offset, bytes) => sender.data(self.number, offset, &bytes).await?,
                Change::Zero(offset, length) => sender.hole(self.number, offset, length).await?,
            }
        }
        let (length_bytes, sent) = looking.await.unwrap_or_else(|_| Err(cancelled()))?;
        self.sent = sent;
        Ok(length_bytes)
    }
}

type Hashes = Vec<Option<[u8; 16]>>;

fn find_changes(file: &File, before: Hashes, changes: &mpsc::Sender<Change>) -> io::Result<(u64, Hashes)> {
    let gone = |_| io::Error::from(io::ErrorKind::Interrupted);
    let length = file.metadata()?.len();
    let chunks =
        usize::try_from(length.div_ceil(CHUNK_BYTES as u64)).expect("files fit in the address space");
    let mut now: Hashes = vec![None; chunks];
    each_chunk(file, length, |offset, bytes| {
        let number = usize::try_from(offset).expect("within the file") / CHUNK_BYTES;
        let (hash, _) =
            blake3::hash(bytes).as_bytes().split_first_chunk().map(|(a, b)| (*a, b.len())).expect("32 bytes");
        now[number] = Some(hash);
        if before.get(number).copied().flatten() != Some(hash) {
            changes.blocking_send(Change::Chunk(offset, bytes.to_vec())).map_err(gone)?;
        }
        Ok(())
    })?;
    for (number, hash) in before.iter().enumerate().take(chunks) {
        if hash.is_some() && now[number].is_none() {
            let offset = (number * CHUNK_BYTES) as u64;
            let zero = Change::Zero(offset, (length - offset).min(CHUNK_BYTES as u64));
            changes.blocking_send(zero).map_err(gone)?;
        }
    }
    Ok((length, now))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn changes(file: &File, before: Hashes) -> (Vec<(u64, usize, bool)>, Hashes) {
        let (sender, mut receiver) = mpsc::channel(100);
        let (_, now) = find_changes(file, before, &sender).expect("changes");
        drop(sender);
        let mut seen = Vec::new();
        while let Ok(change) = receiver.try_recv() {
            seen.push(match change {
                Change::Chunk(offset, bytes) => (offset, bytes.len(), true),
                Change::Zero(offset, length) => (offset, usize::try_from(length).expect("small"), false),
            });
        }
        (seen, now)
    }

    #[test]
    fn a_pass_finds_what_changed_grew_and_became_zero_and_no_more() {
        let file = tempfile::tempfile().expect("file");
        let chunk = CHUNK_BYTES as u64;
        file.set_len(4 * chunk).expect("length");
        file.write_all_at(b"a", 0).expect("write");
        file.write_all_at(b"b", 2 * chunk).expect("write");
        let (seen, first) = changes(&file, Vec::new());
        assert_eq!(seen, [(0, CHUNK_BYTES, true), (2 * chunk, CHUNK_BYTES, true)]);
        let (seen, second) = changes(&file, first);
        assert_eq!(seen, []);
        file.write_all_at(b"\0", 0).expect("write");
        file.write_all_at(b"c", 2 * chunk + 5).expect("write");
        file.write_all_at(b"d", 4 * chunk + 9).expect("write");
        let (seen, _) = changes(&file, second);
        assert_eq!(seen, [(2 * chunk, CHUNK_BYTES, true), (4 * chunk, 10, true), (0, CHUNK_BYTES, false)]);
    }
}
