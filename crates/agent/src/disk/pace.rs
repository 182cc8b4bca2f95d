//! How fast work on a disk may go, told to a thread that does it from outside, at any time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long the work sleeps at most before it looks at its pace again.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// What is behind by less is not slept for: timers are no finer.
const GRAIN: Duration = Duration::from_millis(2);

/// A pace, shared by who sets it and who keeps it.
#[derive(Debug, Clone, Default)]
pub struct Pace {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    bytes_per_second: AtomicU64,
    done_bytes: AtomicU64,
    held: AtomicBool,
    broken_off: AtomicBool,
}

/// The work was broken off.
#[derive(Debug, thiserror::Error)]
#[error("it was broken off")]
pub struct BrokenOff;

impl Pace {
    /// A pace of so many bytes a second; 0 is to stand still.
    pub fn new(bytes_per_second: u64) -> Self {
        let pace = Self::default();
        pace.set(bytes_per_second);
        pace
    }

    /// Changes it.
    pub fn set(&self, bytes_per_second: u64) {
        self.shared.bytes_per_second.store(bytes_per_second, Ordering::Relaxed);
    }

    /// Has the work stand still, whatever its pace, until it is let go on.
    pub fn hold(&self, held: bool) {
        self.shared.held.store(held, Ordering::Relaxed);
    }

    /// What was done so far, in bytes.
    pub fn done_bytes(&self) -> u64 {
        self.shared.done_bytes.load(Ordering::Relaxed)
    }

    /// Has the work end at its next step.
    pub fn break_off(&self) {
        self.shared.broken_off.store(true, Ordering::Relaxed);
    }

    /// Keeps the pace, for one who works.
    pub fn keep(&self) -> Keeper {
        Keeper { shared: Arc::clone(&self.shared), due: Instant::now() }
    }
}

/// Keeps a [`Pace`]: asked before each step of the work.
#[derive(Debug)]
pub struct Keeper {
    shared: Arc<Shared>,
    due: Instant,
}

impl Keeper {
    /// Sleeps until so many more bytes may be done. Blocks.
    ///
    /// # Errors
    /// When the work is to be broken off.
    pub fn spend(&mut self, bytes: u64) -> Result<(), BrokenOff> {
        loop {
            if self.shared.broken_off.load(Ordering::Relaxed) {
                return Err(BrokenOff);
            }
            let held = self.shared.held.load(Ordering::Relaxed);
            let rate = if held { 0 } else { self.shared.bytes_per_second.load(Ordering::Relaxed) };
            let now = Instant::now();
            if rate > 0 && self.due <= now + GRAIN {
                // What was not used up while the work waited for the disk is not caught up with.
                self.due = self.due.max(now) + Duration::from_secs_f64(bytes as f64 / rate as f64);
                self.shared.done_bytes.fetch_add(bytes, Ordering::Relaxed);
                return Ok(());
            }
            let wait = if rate == 0 { LOOK_AGAIN } else { self.due.duration_since(now).min(LOOK_AGAIN) };
            std::thread::sleep(wait);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pace_is_kept_and_can_be_changed_and_broken_off_from_outside() {
        let pace = Pace::new(1 << 20);
        let mut keeper = pace.keep();
        let began = Instant::now();
        for _ in 0..4 {
            keeper.spend(64 << 10).expect("goes on");
        }
        let took = began.elapsed();
        assert!(took >= Duration::from_millis(150), "three waits of a sixteenth of a second: {took:?}");
        assert_eq!(pace.done_bytes(), 256 << 10);
        pace.set(0);
        let stopper = pace.clone();
        let waiting = std::thread::spawn(move || keeper.spend(1).is_err());
        stopper.break_off();
        assert!(waiting.join().expect("joined"), "one who stands still hears it too");
    }
}
