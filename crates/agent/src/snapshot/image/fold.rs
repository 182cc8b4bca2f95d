//! Making a difference a full image.
//!
//! What a difference holds has to be sent by a restore, with the guest waiting. One that holds much, of a guest that has
//! changed most of its memory since the snapshot before, is worth more as a full image: it takes over what the earlier
//! files have, restores map it, and the snapshots after it are small again. What is copied is at most what the
//! difference does not have, and the guest runs meanwhile.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use berth_stream::{Holder, PAGE_BYTES, PageIndex};

use crate::durable::FileError;
use crate::room::Room;
use crate::snapshot::archive::SnapshotFiles;
use crate::snapshot::image::another_hash;

/// How much is copied at once.
const COPY_BYTES: usize = 1 << 20;

/// Makes the file `own` of an image under way, as `memory` open, its full one: it takes over all pages that the index has
/// in files of `earlier`, checked against their hashes. Returns the index as it is then. Blocks.
///
/// # Errors
/// When the system refuses, or an earlier page is not what it was.
pub fn fold(
    index: &PageIndex,
    own: u8,
    memory: &File,
    paths: &SnapshotFiles,
    earlier: &SnapshotFiles,
) -> Result<PageIndex, FileError> {
    let mut room = Room::default();
    let mut buffer = vec![0; COPY_BYTES];
    let mut open: Option<(u8, File)> = None;
    let hasher = index.hasher();
    let mut page = 0;
    while let Some((number, start, end)) = next_run(index, own, page) {
        let path = earlier.memory_file(number);
        let file = match &open {
            Some((held, file)) if *held == number => file,
            _ => {
                let file = File::open(&path).map_err(FileError::io(&path, "opened"))?;
                &open.insert((number, file)).1
            }
        };
        let bytes = &mut buffer[..usize::try_from(end - start).unwrap_or(0) * PAGE_BYTES];
        let offset = start * PAGE_BYTES as u64;
        file.read_exact_at(bytes, offset).map_err(FileError::io(&path, "read"))?;
        if let Some(wrong) = index.first_wrong(&hasher, start, bytes) {
            let fault = io::Error::new(io::ErrorKind::InvalidData, another_hash(wrong));
            return Err(FileError::io(&path, "taken over")(fault));
        }
        let copied = room.take(memory, bytes.len() as u64).and_then(|()| memory.write_all_at(bytes, offset));
        copied.map_err(FileError::io(&paths.memory_file(own), "written"))?;
        page = end;
    }
    let (from, to) = (paths.memory_file(own), paths.memory());
    // The directory is made durable with everything else of the image.
    std::fs::rename(&from, &to).map_err(FileError::io(&to, "named"))?;
    Ok(index.with_holders(|_, holder| if holder.number().is_some() { Holder::FULL } else { Holder::HOLE }))
}

/// The next pages from `from` on that another file than `own` has: its number, the first and the one after the last.
fn next_run(index: &PageIndex, own: u8, from: u64) -> Option<(u8, u64, u64)> {
    let held = |page: u64| index.holder(page).and_then(Holder::number).filter(|number| *number != own);
    let (start, number) = (from..index.page_count()).find_map(|page| Some((page, held(page)?)))?;
    let end = index.end_of_run(start, start + (COPY_BYTES / PAGE_BYTES) as u64);
    Some((number, start, end))
}
