//! How far an export or an import is, and whether it is still wanted.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustic_core::{HiddenProgress, Progress, ProgressBars, ProgressType, RusticProgress};

/// For whoever asks; and to have it stop.
#[derive(Debug, Default)]
pub struct Watch {
    /// What is done of it, in bytes.
    pub done_bytes: AtomicU64,
    /// What there is in all, in bytes.
    pub total_bytes: AtomicU64,
    /// Set to have it stop.
    pub cancelled: AtomicBool,
}

impl Watch {
    pub(crate) fn check(&self) -> io::Result<()> {
        if self.cancelled.load(Ordering::Relaxed) {
            Err(io::Error::other("it was cancelled"))
        } else {
            Ok(())
        }
    }
}

/// Tells a watch what the library does: of that only bytes of files are of use.
#[derive(Debug)]
pub(crate) struct Teller(pub(crate) Arc<Watch>);

impl ProgressBars for Teller {
    fn progress(&self, kind: ProgressType, _: &str) -> Progress {
        match kind {
            ProgressType::Bytes => Progress::new(Bytes(Arc::clone(&self.0))),
            ProgressType::Spinner | ProgressType::Counter => Progress::new(HiddenProgress),
        }
    }
}

#[derive(Debug)]
struct Bytes(Arc<Watch>);

impl RusticProgress for Bytes {
    fn is_hidden(&self) -> bool {
        false
    }
    fn set_length(&self, length: u64) {
        self.0.total_bytes.store(length, Ordering::Relaxed);
    }
    fn set_title(&self, _: &str) {}
    fn inc(&self, bytes: u64) {
        self.0.done_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
    fn finish(&self) {}
}
