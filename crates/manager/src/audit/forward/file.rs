//! A file that lines are added to, each batch durable before it counts as delivered.
//!
//! It is opened for each batch, so that a log rotation that renames it needs no signal.

use std::fs::OpenOptions;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::{Format, Parcel, SendError};

pub(super) struct File {
    path: PathBuf,
    format: Format,
}

impl File {
    pub const fn new(path: PathBuf, format: Format) -> Self {
        Self { path, format }
    }

    pub async fn send(&self, parcels: &[Parcel]) -> Result<(), SendError> {
        let mut bytes = Vec::new();
        for parcel in parcels {
            bytes.extend_from_slice(&parcel.text(self.format));
            bytes.push(b'\n');
        }
        let path = self.path.clone();
        let written = tokio::task::spawn_blocking(move || append(&path, &bytes)).await;
        let written = written.map_err(|error| SendError::Refused(error.to_string()))?;
        written.map_err(|source| SendError::Io { doing: "its file can't be written", source })
    }
}

fn append(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?;
    let before = file.seek(SeekFrom::End(0))?;
    let mut write = || {
        if before > 0 && !ends_a_line(&mut file, before)? {
            // What a manager that was killed left half written: its record comes again, whole.
            file.write_all(b"\n")?;
        }
        file.write_all(bytes)?;
        file.sync_data()
    };
    write().inspect_err(|_| {
        // Full, most likely: half a batch would be in it twice. If this fails too, it will be.
        let _ = OpenOptions::new().write(true).open(path).and_then(|file| file.set_len(before));
    })
}

fn ends_a_line(file: &mut std::fs::File, length: u64) -> io::Result<bool> {
    let mut last = [0];
    file.seek(SeekFrom::Start(length - 1))?;
    file.read_exact(&mut last)?;
    Ok(last == *b"\n")
}
