//! Room that whatever fills a pool leaves to the guests.
//!
//! In a pool that is full to the brim, every guest that writes is held until somebody makes room. So what writes much and
//! can be given up (a snapshot's memory, an image or a disk that comes) stops a little earlier.

use std::io;
use std::os::fd::AsFd;

/// What is left. Less: a guest that writes fast is held before what does not fit is given up. More: less of a pool can
/// be used.
const LEFT_FREE_BYTES: u64 = 32 << 20;
/// How much is written between two looks.
const LOOK_EVERY_BYTES: u64 = 1 << 20;

/// How much one writer may still write before it looks again.
#[derive(Debug, Default)]
pub struct Room {
    unseen_bytes: u64,
}

impl Room {
    /// Takes room for so many bytes in the file system that this file is in. Blocks now and then.
    ///
    /// # Errors
    /// [`io::ErrorKind::StorageFull`] when less than [`LEFT_FREE_BYTES`] would be left.
    pub fn take(&mut self, file: impl AsFd, bytes: u64) -> io::Result<()> {
        if bytes <= self.unseen_bytes {
            self.unseen_bytes -= bytes;
            return Ok(());
        }
        let found = rustix::fs::fstatvfs(file)?;
        if found.f_bavail.saturating_mul(found.f_frsize) < LEFT_FREE_BYTES.saturating_add(bytes) {
            let kept_mib = LEFT_FREE_BYTES >> 20;
            let text = format!("less than {kept_mib} MiB would be left for the guests' own disks");
            return Err(io::Error::new(io::ErrorKind::StorageFull, text));
        }
        self.unseen_bytes = LOOK_EVERY_BYTES;
        Ok(())
    }
}
