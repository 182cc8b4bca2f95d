//! A disk: a chain of layers, read from the top down.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::qcow2::{Mapping, Qcow2, Qcow2Error};

/// How a layer's file is to be read: always said, never guessed from what a guest wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerFormat {
    /// QEMU's.
    Qcow2,
    /// The disk as it is.
    Raw,
}

/// A layer's file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerFile {
    /// Where it is.
    pub path: PathBuf,
    /// How to read it.
    pub format: LayerFormat,
}

/// A disk that can't be read.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// A file can't be opened.
    #[error("layer {} can't be opened", path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A layer is not what it should be.
    #[error("layer {} is not sound", path.display())]
    Layer {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: Qcow2Error,
    },
    /// There is no layer.
    #[error("a disk without layers")]
    Empty,
    /// What was asked for lies beyond its end.
    #[error("byte {offset} lies beyond the disk's end at {end}")]
    End {
        /// What was asked for.
        offset: u64,
        /// The end.
        end: u64,
    },
}

#[derive(Debug)]
enum Content {
    Qcow2(Box<Qcow2>),
    Raw { file: File, length: u64 },
}

#[derive(Debug)]
struct Layer {
    path: PathBuf,
    /// Device and inode: two names of one file are one layer.
    identity: (u64, u64),
    content: Content,
}

/// A disk, read only.
#[derive(Debug)]
pub struct Disk {
    /// From the top down.
    layers: Vec<Layer>,
    size_bytes: u64,
    /// The compressed cluster that was read last: layer, number, content.
    unpacked: Option<(usize, u64, Vec<u8>)>,
}

/// What a place on a disk holds, as far as a layer says.
enum Found {
    Absent,
    Zero,
    Raw { offset: u64 },
    Data { offset: u64 },
    Compressed { cluster: u64, offset: u64, bytes: u64, within: u64 },
}

impl Disk {
    /// Opens a chain; `layers` from the bottom (an image, perhaps) to the top.
    ///
    /// # Errors
    /// When a file can't be opened or is not what it should be.
    pub fn open(layers: &[LayerFile]) -> Result<Self, DiskError> {
        let opened: Result<Vec<Layer>, DiskError> = layers.iter().rev().map(Layer::open).collect();
        let layers = opened?;
        let size_bytes = layers.first().map(Layer::size_bytes).ok_or(DiskError::Empty)?;
        Ok(Self { layers, size_bytes, unpacked: None })
    }

    /// Its size, in bytes.
    pub const fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Reads; what no layer has is zeros.
    ///
    /// # Errors
    /// When it goes beyond the end, or a layer can't be read.
    pub fn read_at(&mut self, mut offset: u64, mut bytes: &mut [u8]) -> Result<(), DiskError> {
        let end = offset.saturating_add(bytes.len() as u64);
        if end > self.size_bytes {
            return Err(DiskError::End { offset: end, end: self.size_bytes });
        }
        while !bytes.is_empty() {
            let (found, layer, most) = self.find(offset)?;
            let now = usize::try_from(most.min(bytes.len() as u64)).expect("at most the buffer");
            let (part, rest) = bytes.split_at_mut(now);
            self.fill(&found, layer, part)?;
            bytes = rest;
            offset += now as u64;
        }
        Ok(())
    }

    /// Which layer has a place, and for how many bytes that holds at least.
    fn find(&mut self, offset: u64) -> Result<(Found, usize, u64), DiskError> {
        let mut most = u64::MAX;
        for number in 0..self.layers.len() {
            let layer = &mut self.layers[number];
            let (found, length) = layer.find(offset)?;
            most = most.min(length);
            if !matches!(found, Found::Absent) {
                return Ok((found, number, most));
            }
        }
        Ok((Found::Zero, 0, most))
    }

    fn fill(&mut self, found: &Found, number: usize, bytes: &mut [u8]) -> Result<(), DiskError> {
        let layer = &self.layers[number];
        match (found, &layer.content) {
            (Found::Raw { offset }, Content::Raw { file, .. }) => file
                .read_exact_at(bytes, *offset)
                .map_err(|source| layer.fault(Qcow2Error::Read { offset: *offset, source })),
            (Found::Data { offset }, Content::Qcow2(qcow2)) => {
                qcow2.read_data(*offset, bytes).map_err(|source| layer.fault(source))
            }
            (Found::Compressed { cluster, offset, bytes: packed, within }, Content::Qcow2(qcow2)) => {
                let kept = matches!(&self.unpacked, Some((at, one, _)) if *at == number && one == cluster);
                if !kept {
                    let content =
                        qcow2.read_compressed(*offset, *packed).map_err(|source| layer.fault(source))?;
                    self.unpacked = Some((number, *cluster, content));
                }
                let content = self.unpacked.as_ref().map_or(&[][..], |(_, _, content)| content);
                let from = usize::try_from(*within).expect("within a cluster");
                bytes.copy_from_slice(&content[from..from + bytes.len()]);
                Ok(())
            }
            _ => {
                bytes.fill(0);
                Ok(())
            }
        }
    }
}

impl Layer {
    fn open(file: &LayerFile) -> Result<Self, DiskError> {
        let path = file.path.clone();
        let open = |path: &Path| -> std::io::Result<(File, std::fs::Metadata)> {
            let file = File::open(path)?;
            let metadata = file.metadata()?;
            Ok((file, metadata))
        };
        let (opened, metadata) =
            open(&path).map_err(|source| DiskError::Open { path: path.clone(), source })?;
        let content = match file.format {
            LayerFormat::Raw => Content::Raw { file: opened, length: metadata.len() },
            LayerFormat::Qcow2 => {
                let qcow2 =
                    Qcow2::open(opened).map_err(|source| DiskError::Layer { path: path.clone(), source })?;
                Content::Qcow2(Box::new(qcow2))
            }
        };
        Ok(Self { path, identity: (metadata.dev(), metadata.ino()), content })
    }

    fn size_bytes(&self) -> u64 {
        match &self.content {
            Content::Qcow2(qcow2) => qcow2.virtual_size_bytes(),
            Content::Raw { length, .. } => *length,
        }
    }

    fn fault(&self, source: Qcow2Error) -> DiskError {
        DiskError::Layer { path: self.path.clone(), source }
    }

    /// What this layer says of a place, and for how many bytes.
    fn find(&mut self, offset: u64) -> Result<(Found, u64), DiskError> {
        let size = self.size_bytes();
        // A layer may be shorter than the one above it.
        if offset >= size {
            return Ok((Found::Zero, u64::MAX));
        }
        let path = &self.path;
        match &mut self.content {
            Content::Raw { length, .. } => Ok((Found::Raw { offset }, *length - offset)),
            Content::Qcow2(qcow2) => {
                let cluster_bytes = qcow2.cluster_bytes();
                let (cluster, within) = (offset / cluster_bytes, offset % cluster_bytes);
                let mapping = qcow2
                    .mapping(cluster)
                    .map_err(|source| DiskError::Layer { path: path.clone(), source })?;
                let found = match mapping {
                    Mapping::Absent => Found::Absent,
                    Mapping::Zero => Found::Zero,
                    Mapping::Data { offset } => Found::Data { offset: offset + within },
                    Mapping::Compressed { offset, bytes } => {
                        Found::Compressed { cluster, offset, bytes, within }
                    }
                };
                Ok((found, (cluster_bytes - within).min(size - offset)))
            }
        }
    }
}

/// How many bytes of two disks may differ: those that were written to a layer that only one of them stands on. What was
/// written anew with the same content counts too.
///
/// # Errors
/// When a layer can't be read.
pub fn written_apart_bytes(one: &mut Disk, other: &mut Disk) -> Result<u64, DiskError> {
    let shared = one
        .layers
        .iter()
        .rev()
        .zip(other.layers.iter().rev())
        .take_while(|(one, other)| one.identity == other.identity)
        .count();
    let mut written: Vec<(u64, u64)> = Vec::new();
    for disk in [one, other] {
        let own = disk.layers.len() - shared;
        for layer in &mut disk.layers[..own] {
            let path = layer.path.clone();
            match &mut layer.content {
                Content::Raw { length, .. } => {
                    written.push((0, *length));
                }
                Content::Qcow2(qcow2) => {
                    let bytes = qcow2.cluster_bytes();
                    qcow2
                        .each_present(|cluster| {
                            written.push((cluster * bytes, bytes));
                        })
                        .map_err(|source| DiskError::Layer { path, source })?;
                }
            }
        }
    }
    written.sort_unstable();
    let (mut total, mut done) = (0, 0);
    for (start, length) in written {
        let end = start + length;
        total += end.saturating_sub(start.max(done));
        done = done.max(end);
    }
    Ok(total)
}
