//! The protocol between two agents that move a VM, over one connection (mutual TLS, upgraded from the route
//! `PeerMigrationOpen`).
//!
//! ```text
//!  source                                                     target
//!    │ Begin {version, chain, shared pool} ─────────────────────► │ is it admitted, from this host?
//!    │ ◄──────────────────────────────────────────────── Welcome │
//!    │ Ping ×8 ◄────────────────────────────────────────► Pong ×8 │ how far the clocks are apart
//!    │                                                            │
//!    │ Offer {files}   ───── local pools only ──────────────────► │ what of it is there?
//!    │ ◄──────────────────────────────────────── Have {checksums} │
//!    │ data, …, file end {checksum} for each that differs ──────► │ verified, brought to the disk, named
//!    │ (file end alone for one that is another of the offer)      │ linked
//!    │ Sync ────────────────────────────────────────────────────► │
//!    │ ◄───────────────────────────────────────────────── Synced │
//!    │                                                            │
//!    │ Launch {chain, data} ────────────────────────────────────► │ a process that waits, guest not running
//!    │ ◄──────────────────────────────────────────────── Waiting │
//!    │ data, hole, … of the writable tops, again and again ─────► │ into the tops' files (local pools)
//!    │ stream, stream, … ───────────────────────────────────────► │ to QEMU, as it comes
//!    │ ◄─────────────────────────────────────── answer, answer, … │ from QEMU
//!    │ STOP; data of the tops that changed; Sync ───────────────► │
//!    │ stream …, stream end ────────────────────────────────────► │ QEMU has loaded it; the tops are on the disk
//!    │ ◄───────────────────────────────────────────────── Loaded │
//!    │ writes down that it gives the VM away                      │
//!    │ Commit ──────────────────────────────────────────────────► │ cont
//!    │ ◄────────────────────────────────────────── Running {when} │
//! ```
//!
//! A VM that is put back to a snapshot on the target, as the manager has told both, has no stream:
//!
//! ```text
//!    │ PutBack ─────────────────────────────────────────────────► │ the machine of the snapshot, loaded and standing still
//!    │ ◄──────────────────────────────────────────────── Waiting │
//!    │ STOP; writes down that it gives the VM away                │
//!    │ Commit ──────────────────────────────────────────────────► │ cont
//!    │ ◄────────────────────────────────────────── Running {when} │
//! ```
//!
//! Either side may say `Failed` with the reason and hang up, at any time before `Commit`; a connection that ends means
//! the same. A target that has said `Loaded` and loses the connection does nothing more by itself: whether `Commit`
//! was on its way only the manager can find out.
//!
//! A frame is a byte for its kind, a length (be32), and a body. What is received is not trusted: every length has a
//! bound, files are named by ids and never by paths, and a frame in the wrong place ends the migration.
//!
//! The version is of the whole protocol. A target that does not know the source's says so and names its own.

use berth_model::{LayerId, Problem, SnapshotId};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::disks::DISKS_MAX;
use crate::fittings::Fittings;
use crate::nvram::Encoded;

/// The name in the connection's `Upgrade` header.
pub const UPGRADE: &str = "berth-migration";
/// The protocol's version.
pub const VERSION: u32 = 4;
/// Bytes of a file in one frame, aligned to the same: what is compared, hashed and sent as one.
pub const CHUNK_BYTES: usize = 64 << 10;
/// Most bytes of QEMU's stream in one frame. More: what is urgent waits behind it; less: more work for each byte.
pub const STREAM_FRAME_BYTES_MAX: usize = 64 << 10;
/// Longest control message. The longest in use is an offer of some thousand snapshots.
const CONTROL_BYTES_MAX: usize = 4 << 20;

const HEAD_BYTES: usize = 5;
const PLACE_BYTES: usize = 12;
/// Length of a file's checksum in hexadecimal.
const CHECKSUM_CHARS: usize = 64;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    Control = 1,
    Data = 2,
    Hole = 3,
    Stream = 4,
    StreamEnd = 5,
    Answer = 6,
    FileEnd = 7,
}

impl Kind {
    fn of(byte: u8) -> Option<Self> {
        [Self::Control, Self::Data, Self::Hole, Self::Stream, Self::StreamEnd, Self::Answer, Self::FileEnd]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }

    const fn bytes_max(self) -> usize {
        match self {
            Self::Control => CONTROL_BYTES_MAX,
            Self::Data => PLACE_BYTES + CHUNK_BYTES,
            Self::Hole => PLACE_BYTES + 8,
            Self::Stream | Self::Answer => STREAM_FRAME_BYTES_MAX,
            Self::StreamEnd => 0,
            Self::FileEnd => 4 + CHECKSUM_CHARS,
        }
    }
}

/// A frame that was received.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// JSON of [`FromSource`] or [`FromTarget`].
    Control(&'a [u8]),
    /// Bytes of a file; whole chunks but at its end.
    Data {
        /// The file's number in the last offer; [`top_file`] for a writable top.
        file: u32,
        /// Where in the file.
        offset: u64,
        /// The bytes.
        bytes: &'a [u8],
    },
    /// A range of a file that is zero.
    Hole {
        /// As in [`Frame::Data`].
        file: u32,
        /// Where in the file.
        offset: u64,
        /// How long.
        length: u64,
    },
    /// A file is complete.
    FileEnd {
        /// Its number in the last offer.
        file: u32,
        /// Its checksum, in hexadecimal.
        checksum: &'a str,
    },
    /// Bytes of QEMU's stream.
    Stream(&'a [u8]),
    /// QEMU has closed its stream.
    StreamEnd,
    /// Bytes that the target's QEMU answers.
    Answer(&'a [u8]),
}

/// The number that stands for the root disk's writable top in data frames. Those of the other disks' lie below it.
const ROOT_TOP_FILE: u32 = u32::MAX;

/// The number that stands for a disk's writable top in data frames.
pub fn top_file(disk: usize) -> u32 {
    ROOT_TOP_FILE.saturating_sub(u32::try_from(disk).unwrap_or(u32::MAX))
}

/// The disk whose writable top a number stands for; none if it is the number of an offered file.
pub fn disk_of_top(file: u32) -> Option<usize> {
    usize::try_from(ROOT_TOP_FILE - file).ok().filter(|disk| *disk < DISKS_MAX)
}

/// A file that belongs to a VM, by what it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "file", rename_all = "kebab-case")]
pub enum FileName {
    /// A frozen layer.
    Layer {
        /// Which.
        layer: LayerId,
    },
    /// The cloud-init seed.
    Seed,
    /// A part of a snapshot.
    Snapshot {
        /// Which.
        snapshot: SnapshotId,
        /// Which part.
        part: SnapshotPart,
    },
}

/// A part of a snapshot. The manifest comes last: with it the snapshot is whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SnapshotPart {
    /// The full memory image.
    Memory,
    /// A difference from it.
    Difference {
        /// Its number, from 1.
        number: u8,
    },
    /// The device state.
    Device,
    /// The page index.
    Index,
    /// The firmware's variables.
    Variables,
    /// The TPM's state.
    Tpm,
    /// The manifest.
    Manifest,
}

/// A file that the target should have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileOffer {
    /// Which.
    pub name: FileName,
    /// Its length in bytes.
    pub length_bytes: u64,
    /// It is the same file as an earlier one of the offer, by another name: which. It is never sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_to: Option<u32>,
}

/// What the source says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "kebab-case")]
#[allow(missing_docs, reason = "the diagram above says what each is for")]
pub enum FromSource {
    Begin {
        version: u32,
        shared_pool: bool,
        pool_uuid: String,
    },
    Ping {
        number: u32,
    },
    Offer {
        files: Vec<FileOffer>,
    },
    Sync {
        top_lengths_bytes: Vec<u64>,
    },
    Launch {
        chain: Vec<LayerId>,
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        data: Vec<Vec<LayerId>>,
        #[serde(default)]
        fittings: Fittings,
        #[serde(default, skip_serializing_if = "Encoded::is_empty")]
        nvram: Encoded,
    },
    PutBack,
    Commit,
    Failed {
        problem: Problem,
    },
}

/// What the target says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "kebab-case")]
#[allow(missing_docs, reason = "the diagram above says what each is for")]
pub enum FromTarget {
    Welcome { version: u32 },
    Pong { number: u32, at_us: u64 },
    Have { checksums: Vec<Option<String>> },
    Synced,
    Waiting,
    Loaded,
    Running { at_us: u64 },
    Failed { problem: Problem },
}

/// What is wrong with a connection.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// It broke.
    #[error("the connection between the hosts broke")]
    Broken(#[source] std::io::Error),
    /// The other side closed it.
    #[error("the other host closed the connection")]
    Closed,
    /// A frame of no known kind.
    #[error("a frame of unknown kind {kind}")]
    UnknownKind {
        /// The kind.
        kind: u8,
    },
    /// A frame with a length that its kind can't have.
    #[error("a frame of kind {kind} with {length} bytes")]
    Length {
        /// The kind.
        kind: u8,
        /// The length.
        length: usize,
    },
    /// A control message that is none.
    #[error("a message that can't be read")]
    Message(#[source] serde_json::Error),
    /// Something that has no place here.
    #[error("{what} came when {expected} was expected")]
    Unexpected {
        /// What came.
        what: String,
        /// What should have.
        expected: &'static str,
    },
}

impl WireError {
    /// Whether nothing is wrong with what was said, but nothing more can be.
    pub const fn is_loss(&self) -> bool {
        matches!(self, Self::Broken(_) | Self::Closed)
    }
}

/// Reads frames.
#[derive(Debug)]
pub struct FrameReader<R> {
    inner: R,
    body: Vec<u8>,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// At the beginning of a connection.
    pub const fn new(inner: R) -> Self {
        Self { inner, body: Vec::new() }
    }

    /// The next frame. Not to be dropped half way.
    ///
    /// # Errors
    /// When the connection is over, or what comes is no frame.
    pub async fn next(&mut self) -> Result<Frame<'_>, WireError> {
        let mut head = [0; HEAD_BYTES];
        self.fill(&mut head, true).await?;
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        let kind = Kind::of(head[0]).ok_or(WireError::UnknownKind { kind: head[0] })?;
        let wrong = WireError::Length { kind: head[0], length };
        if length > kind.bytes_max() {
            return Err(wrong);
        }
        let mut body = std::mem::take(&mut self.body);
        body.resize(length, 0);
        let filled = self.fill(&mut body, false).await;
        self.body = body;
        filled?;
        frame(kind, &self.body).ok_or(wrong)
    }

    async fn fill(&mut self, bytes: &mut [u8], may_end: bool) -> Result<(), WireError> {
        let mut filled = 0;
        while filled < bytes.len() {
            match self.inner.read(&mut bytes[filled..]).await {
                Ok(0) if filled == 0 && may_end => return Err(WireError::Closed),
                Ok(0) => return Err(WireError::Broken(std::io::ErrorKind::UnexpectedEof.into())),
                Ok(read) => filled += read,
                // TLS minds that it was not said good-bye to; what counts is whether a frame was cut.
                Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                    let whole = filled == 0 && may_end;
                    let cut = || WireError::Broken(std::io::ErrorKind::UnexpectedEof.into());
                    return Err(if whole { WireError::Closed } else { cut() });
                }
                Err(error) => return Err(WireError::Broken(error)),
            }
        }
        Ok(())
    }
}

fn frame(kind: Kind, body: &[u8]) -> Option<Frame<'_>> {
    Some(match kind {
        Kind::Control => Frame::Control(body),
        Kind::Data => {
            let (file, offset, bytes) = place(body)?;
            let aligned = offset.is_multiple_of(CHUNK_BYTES as u64);
            (aligned && !bytes.is_empty()).then_some(Frame::Data { file, offset, bytes })?
        }
        Kind::Hole => {
            let (file, offset, rest) = place(body)?;
            Frame::Hole { file, offset, length: u64::from_be_bytes(rest.try_into().ok()?) }
        }
        Kind::Stream => Frame::Stream(body),
        Kind::StreamEnd => Frame::StreamEnd,
        Kind::Answer => Frame::Answer(body),
        Kind::FileEnd => {
            let (file, checksum) = body.split_first_chunk()?;
            let checksum = std::str::from_utf8(checksum).ok().filter(|text| text.len() == CHECKSUM_CHARS)?;
            Frame::FileEnd { file: u32::from_be_bytes(*file), checksum }
        }
    })
}

fn place(body: &[u8]) -> Option<(u32, u64, &[u8])> {
    let (file, rest) = body.split_first_chunk()?;
    let (offset, rest) = rest.split_first_chunk()?;
    Some((u32::from_be_bytes(*file), u64::from_be_bytes(*offset), rest))
}

/// Writes frames. Each is handed to the network at once.
#[derive(Debug)]
pub struct FrameWriter<W> {
    inner: W,
    buffer: Vec<u8>,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    /// At the beginning of a connection.
    pub const fn new(inner: W) -> Self {
        Self { inner, buffer: Vec::new() }
    }

    /// A message.
    ///
    /// # Errors
    /// When the connection is over.
    pub async fn control<T: Serialize>(&mut self, message: &T) -> Result<(), WireError> {
        let json = serde_json::to_vec(message).map_err(WireError::Message)?;
        self.frame(Kind::Control, &[&json]).await
    }

    /// Bytes of a file, at most [`CHUNK_BYTES`].
    ///
    /// # Errors
    /// When the connection is over.
    pub async fn data(&mut self, file: u32, offset: u64, bytes: &[u8]) -> Result<(), WireError> {
        self.frame(Kind::Data, &[&file.to_be_bytes(), &offset.to_be_bytes(), bytes]).await
    }

    /// A range of a file that is zero.
    ///
    /// # Errors
    /// When the connection is over.
    pub async fn hole(&mut self, file: u32, offset: u64, length: u64) -> Result<(), WireError> {
        let parts: [&[u8]; 3] = [&file.to_be_bytes(), &offset.to_be_bytes(), &length.to_be_bytes()];
        self.frame(Kind::Hole, &parts).await
    }

    /// A file is complete.
    ///
    /// # Errors
    /// When the connection is over.
    pub async fn file_end(&mut self, file: u32, checksum: &str) -> Result<(), WireError> {
        self.frame(Kind::FileEnd, &[&file.to_be_bytes(), checksum.as_bytes()]).await
    }

    /// Bytes of QEMU's stream, at most [`STREAM_FRAME_BYTES_MAX`].
    ///
    /// # Errors
    /// When the connection is over.
    pub async fn stream(&mut self, bytes: &[u8]) -> Result<(), WireError> {
        self.frame(Kind::Stream, &[bytes]).await
    }

    /// QEMU has closed its stream.
    ///
    /// # Errors
    /// When the connection is over.
    pub async fn stream_end(&mut self) -> Result<(), WireError> {
        self.frame(Kind::StreamEnd, &[]).await
    }

    /// Bytes that QEMU answers, at most [`STREAM_FRAME_BYTES_MAX`].
    ///
    /// # Errors
    /// When the connection is over.
    pub async fn answer(&mut self, bytes: &[u8]) -> Result<(), WireError> {
        self.frame(Kind::Answer, &[bytes]).await
    }

    /// Says that nothing more will come.
    pub async fn close(&mut self) {
        // The other side may have closed it first.
        let _ = self.inner.shutdown().await;
    }

    async fn frame(&mut self, kind: Kind, parts: &[&[u8]]) -> Result<(), WireError> {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        debug_assert!(length <= kind.bytes_max(), "{kind:?} of {length} bytes");
        let wire_length = u32::try_from(length).expect("frames have bounds far below 4 GiB");
        self.buffer.clear();
        self.buffer.push(kind as u8);
        self.buffer.extend_from_slice(&wire_length.to_be_bytes());
        parts.iter().for_each(|part| self.buffer.extend_from_slice(part));
        self.inner.write_all(&self.buffer).await.map_err(WireError::Broken)?;
        self.inner.flush().await.map_err(WireError::Broken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tops_have_numbers_that_no_offered_file_has() {
        for disk in 0..DISKS_MAX {
            assert_eq!(disk_of_top(top_file(disk)), Some(disk));
        }
        assert_eq!(disk_of_top(top_file(DISKS_MAX)), None);
        assert_eq!(disk_of_top(65_535), None);
    }

    #[tokio::test]
    async fn frames_come_out_as_they_went_in() {
        let mut writer = FrameWriter::new(Vec::new());
        writer.control(&FromSource::Commit).await.expect("control");
        writer.data(3, CHUNK_BYTES as u64, b"abc").await.expect("data");
        writer.hole(top_file(1), 0, 9).await.expect("hole");
        writer.stream(b"QEVM").await.expect("stream");
        writer.stream_end().await.expect("end");
        writer.answer(b"x").await.expect("answer");
        let mut reader = FrameReader::new(writer.inner.as_slice());
        let Frame::Control(json) = reader.next().await.expect("frame") else { panic!("control") };
        assert_eq!(serde_json::from_slice::<FromSource>(json).expect("message"), FromSource::Commit);
        let data = Frame::Data { file: 3, offset: CHUNK_BYTES as u64, bytes: b"abc" };
        assert_eq!(reader.next().await.expect("frame"), data);
        let hole = Frame::Hole { file: top_file(1), offset: 0, length: 9 };
        assert_eq!(reader.next().await.expect("frame"), hole);
        assert_eq!(reader.next().await.expect("frame"), Frame::Stream(b"QEVM"));
        assert_eq!(reader.next().await.expect("frame"), Frame::StreamEnd);
        assert_eq!(reader.next().await.expect("frame"), Frame::Answer(b"x"));
        assert!(matches!(reader.next().await, Err(WireError::Closed)));
    }

    #[tokio::test]
    async fn nonsense_is_refused_before_it_takes_memory() {
        for bad in [
            &[0, 0, 0, 0, 0][..],
            &[9, 0, 0, 0, 1, 7],
            &[1, 0xff, 0xff, 0xff, 0xff],
            &[4, 0x7f, 0xff, 0xff, 0xff],
            &[5, 0, 0, 0, 1, 0],
            &[2, 0, 0, 0, 3, 1, 2, 3],
            &[3, 0, 0, 0, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[2, 0, 0, 0, 13, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5, 1],
        ] {
            let mut reader = FrameReader::new(bad);
            let error = reader.next().await.expect_err("nonsense");
            assert!(!error.is_loss(), "{bad:?}: {error}");
            assert!(reader.body.capacity() <= 1 << 16);
        }
    }

    #[tokio::test]
    async fn a_connection_that_ends_within_a_frame_is_broken_and_not_closed() {
        let mut writer = FrameWriter::new(Vec::new());
        writer.stream(b"QEVM").await.expect("stream");
        for length in 1..writer.inner.len() {
            let mut reader = FrameReader::new(&writer.inner[..length]);
            assert!(matches!(reader.next().await, Err(WireError::Broken(_))), "{length}");
        }
    }
}
