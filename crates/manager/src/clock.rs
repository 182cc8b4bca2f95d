//! Time and chance as handles: tests decide what the one says and what the other draws.

use std::future::Future;
use std::pin::Pin;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use berth_model::Timestamp;
use berth_model::id::ENTROPY_BYTES;

/// A future without a borrow, so that it can be kept anywhere.
pub type Sleep = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Where the manager reads the time and waits for it.
pub trait Clock: Send + Sync + 'static {
    /// The date and time now. May jump when somebody sets the clock: durations are measured by [`Clock::sleep`].
    fn now(&self) -> Timestamp;

    /// Done once `duration` has passed.
    fn sleep(&self, duration: Duration) -> Sleep;
}

/// The machine's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        // A clock before 1970 is one that was never set.
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Timestamp::from_millis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }

    fn sleep(&self, duration: Duration) -> Sleep {
        Box::pin(tokio::time::sleep(duration))
    }
}

/// Where ids and secrets come from.
pub trait Entropy: Send + Sync + 'static {
    /// Fills `bytes` with what nobody can guess.
    fn fill(&self, bytes: &mut [u8]);

    /// The bytes of a new id.
    fn id(&self) -> [u8; ENTROPY_BYTES] {
        let mut bytes = [0; ENTROPY_BYTES];
        self.fill(&mut bytes);
        bytes
    }
}

/// The system's generator.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemEntropy;

impl Entropy for SystemEntropy {
    fn fill(&self, bytes: &mut [u8]) {
        getrandom::fill(bytes).expect("a Linux that runs guests has getrandom");
    }
}
