//! Empty overlays: new writable layers, written by ourselves.
//!
//! An empty qcow2 file is a header and three tables of nearly nothing. To run `qemu-img` for it would cost a process on
//! the way back from a restore, which is more than all of the file's writing. Only what is needed is written: version 3
//! without any optional feature, clusters of 64 KiB, the name and format of the file below.
//!
//! ```text
//! cluster 0   header, its extension (format of the file below), name of the file below
//! cluster 1   table of reference counts: one entry, to cluster 2
//! cluster 2   reference counts (16 bits each) of the first 32,768 clusters, those here taken
//! cluster 3…  first table of addresses: all zero, nothing is allocated
//! ```

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, fchown};
use std::path::Path;

const CLUSTER_BYTES: u64 = 1 << 16;
/// What one entry of the first table stands for: a second table of 8,192 clusters.
const FIRST_TABLE_STEP_BYTES: u64 = CLUSTER_BYTES * (CLUSTER_BYTES / 8);
/// The largest disk, in bytes: its first table is one cluster. Larger ones would need more of the same and nobody
/// has one.
pub const SIZE_BYTES_MAX: u64 = FIRST_TABLE_STEP_BYTES * (CLUSTER_BYTES / 8);
const HEADER_BYTES: u32 = 104;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const CLUSTER_BITS: u32 = 16;
/// Reference counts are two to the power of this many bits.
const REFCOUNT_ORDER: u32 = 4;
/// Longest name of the file below, in bytes: the format's own limit.
const BACKING_NAME_BYTES_MAX: usize = 1023;

/// The layer below a new one.
#[derive(Debug, Clone, Copy)]
pub struct Below<'a> {
    /// Its path, relative to the new file's directory.
    pub path: &'a str,
    /// `qcow2` or `raw`.
    pub format: &'a str,
}

/// Writes an empty overlay of a disk of `size_bytes`, readable and writable by its owner alone, who is `owner` (user
/// and group) where one is given. A file that was there before is replaced. Bringing it to the
/// disk is left to the caller, who may have something more urgent to do first.
///
/// # Errors
/// When the system refuses, the size is no multiple of 512 or too large, or the name too long.
pub fn create(path: &Path, size_bytes: u64, below: Below<'_>, owner: Option<u32>) -> io::Result<()> {
    let content = content(size_bytes, Some(below))?;
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(&content)?;
    if let Some(owner) = owner {
        fchown(&file, Some(owner), Some(owner))?;
    }
    Ok(())
}

/// The beginning of a layer that has nothing yet, of a disk of `size_bytes` on `below`: its four clusters.
///
/// # Errors
/// When the size or the name can't be.
pub(crate) fn content(size_bytes: u64, below: Option<Below<'_>>) -> io::Result<Vec<u8>> {
    let wrong = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, what.to_owned()));
    if size_bytes == 0 || !size_bytes.is_multiple_of(512) || size_bytes > SIZE_BYTES_MAX {
        return wrong("a disk's size must be a multiple of 512 and at most 4 TiB");
    }
    if below.is_some_and(|below| below.path.len() > BACKING_NAME_BYTES_MAX || below.format.len() > 16) {
        return wrong("the name of the layer below is too long");
    }
    let clusters = 4_u64;
    let mut bytes = vec![0; usize::try_from(clusters * CLUSTER_BYTES).expect("a quarter of a MiB")];
    header(size_bytes, below, &mut bytes);
    let mut put = |at: u64, value: &[u8]| {
        let at = usize::try_from(at).expect("within the clusters");
        bytes[at..at + value.len()].copy_from_slice(value);
    };
    put(CLUSTER_BYTES, &(2 * CLUSTER_BYTES).to_be_bytes());
    for cluster in 0..clusters {
        put(2 * CLUSTER_BYTES + cluster * 2, &1_u16.to_be_bytes());
    }
    Ok(bytes)
}

fn header(size_bytes: u64, below: Option<Below<'_>>, bytes: &mut [u8]) {
    let mut header = Vec::with_capacity(1024);
    let format_padded = below.map_or(0, |below| below.format.len().next_multiple_of(8));
    let name_offset = below.map_or(0, |_| u64::from(HEADER_BYTES) + 8 + format_padded as u64 + 8);
    let name_bytes = below.map_or(0, |below| u32::try_from(below.path.len()).expect("checked before"));
    let entries = u32::try_from(size_bytes.div_ceil(FIRST_TABLE_STEP_BYTES)).expect("at most a cluster's");
    header.extend_from_slice(b"QFI\xfb");
    header.extend_from_slice(&3_u32.to_be_bytes());
    header.extend_from_slice(&name_offset.to_be_bytes());
    header.extend_from_slice(&name_bytes.to_be_bytes());
    header.extend_from_slice(&CLUSTER_BITS.to_be_bytes());
    header.extend_from_slice(&size_bytes.to_be_bytes());
    header.extend_from_slice(&0_u32.to_be_bytes()); // no encryption
    header.extend_from_slice(&entries.to_be_bytes());
    header.extend_from_slice(&(3 * CLUSTER_BYTES).to_be_bytes());
    header.extend_from_slice(&CLUSTER_BYTES.to_be_bytes());
    header.extend_from_slice(&1_u32.to_be_bytes()); // clusters of the table of reference counts
    header.extend_from_slice(&[0; 12]); // no internal snapshots
    header.extend_from_slice(&[0; 24]); // no incompatible, compatible or self-clearing feature
    header.extend_from_slice(&REFCOUNT_ORDER.to_be_bytes());
    header.extend_from_slice(&HEADER_BYTES.to_be_bytes());
    if let Some(below) = below {
        header.extend_from_slice(&EXTENSION_BACKING_FORMAT.to_be_bytes());
        header.extend_from_slice(&u32::try_from(below.format.len()).expect("checked before").to_be_bytes());
        header.extend_from_slice(below.format.as_bytes());
        header.resize(header.len() + format_padded - below.format.len(), 0);
        header.extend_from_slice(&[0; 8]); // end of the extensions
        header.extend_from_slice(below.path.as_bytes());
    }
    bytes[..header.len()].copy_from_slice(&header);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn qemu_img(arguments: &[&str]) -> String {
        let output = Command::new("qemu-img").args(arguments).output().expect("qemu-img");
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    }

    #[test]
    fn qemu_finds_an_overlay_sound_and_of_the_right_size() {
        let directory = tempfile::tempdir().expect("directory");
        let below = directory.path().join("below.raw");
        std::fs::File::create(&below).expect("below").set_len(1 << 20).expect("length");
        for size in [1_u64 << 20, (1 << 29) + 512, 40 << 30, SIZE_BYTES_MAX] {
            let path = directory.path().join("top.qcow2");
            create(&path, size, Below { path: "below.raw", format: "raw" }, None).expect("create");
            let path = path.to_str().expect("path");
            qemu_img(&["check", "-f", "qcow2", path]);
            let info: serde_json::Value =
                serde_json::from_str(&qemu_img(&["info", "--output=json", path])).expect("JSON");
            assert_eq!(info["virtual-size"], size);
            assert_eq!(info["backing-filename"], "below.raw");
            assert_eq!(info["backing-filename-format"], "raw");
        }
    }

    #[test]
    fn sizes_and_names_that_can_not_be_are_refused() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("top.qcow2");
        let long = "x".repeat(2000);
        for (size, name) in [(0, "a"), (513, "a"), (SIZE_BYTES_MAX + 512, "a"), (512, long.as_str())] {
            assert!(create(&path, size, Below { path: name, format: "raw" }, None).is_err(), "{size}");
        }
        assert!(!path.exists());
    }
}
