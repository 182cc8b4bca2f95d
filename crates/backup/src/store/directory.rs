//! A repository in a directory of this host, which may be mounted from elsewhere.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::{Store, StoreError};

/// What a file that is being written ends in.
const UNFINISHED: &str = ".unfinished";

pub(super) struct Directory {
    root: PathBuf,
    place: String,
}

impl Directory {
    pub(super) fn new(root: &Path) -> Self {
        Self { root: root.to_owned(), place: root.display().to_string() }
    }

    fn failed(&self, what: &str, path: &str) -> impl FnOnce(io::Error) -> StoreError {
        StoreError::io(&self.place, format!("{what} {path}"))
    }
}

impl Store for Directory {
    fn place(&self) -> &str {
        &self.place
    }

    fn create(&self) -> Result<(), StoreError> {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.root);
        made.map_err(self.failed("making", "the directory"))
    }

    fn list(&self, directory: &str) -> Result<Vec<(String, u64)>, StoreError> {
        let mut found = Vec::new();
        let listed = list_into(&self.root.join(directory), &mut found);
        listed.map_err(self.failed("listing", directory))?;
        Ok(found)
    }

    fn length(&self, path: &str) -> Result<Option<u64>, StoreError> {
        match fs::metadata(self.root.join(path)) {
            Ok(metadata) => Ok(Some(metadata.len())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.failed("looking at", path)(error)),
        }
    }

    fn read(&self, path: &str, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        let full = self.root.join(path);
        let read = match range {
            None => fs::read(&full),
            Some(range) => read_part(&full, range),
        };
        read.map(Bytes::from).map_err(self.failed("reading", path))
    }

    fn write(&self, path: &str, parts: &[Bytes]) -> Result<(), StoreError> {
        let full = self.root.join(path);
        write_whole(&full, parts).map_err(self.failed("writing", path))
    }

    fn remove(&self, path: &str) -> Result<(), StoreError> {
        match fs::remove_file(self.root.join(path)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(self.failed("removing", path)(error))
            }
            _ => Ok(()),
        }
    }
}

fn list_into(directory: &Path, found: &mut Vec<(String, u64)>) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            list_into(&entry.path(), found)?;
        } else if kind.is_file()
            && let Ok(name) = entry.file_name().into_string()
            && !name.ends_with(UNFINISHED)
        {
            match entry.metadata() {
                Ok(metadata) => found.push((name, metadata.len())),
                // Another program removed it meanwhile: it is not there.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

fn read_part(path: &Path, range: Range<u64>) -> io::Result<Vec<u8>> {
    let length = usize::try_from(range.end.saturating_sub(range.start)).map_err(io::Error::other)?;
    let mut part = vec![0; length];
    File::open(path)?.read_exact_at(&mut part, range.start)?;
    Ok(part)
}

fn write_whole(path: &Path, parts: &[Bytes]) -> io::Result<()> {
    let directory = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let mut name = path.as_os_str().to_owned();
    name.push(UNFINISHED);
    let unfinished = PathBuf::from(name);
    let written = write_synced(&unfinished, parts).and_then(|()| fs::rename(&unfinished, path));
    if let Err(error) = written {
        // What can't be removed is written over by the next try.
        let _ = fs::remove_file(&unfinished);
        return Err(error);
    }
    File::open(directory)?.sync_all()
}

fn write_synced(path: &Path, parts: &[Bytes]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    for part in parts {
        file.write_all(part)?;
    }
    file.sync_all()
}
