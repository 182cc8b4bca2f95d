//! Time as a handle, so that a simulated cluster can have its own.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use berth_api::transport::BoxFuture;
use berth_model::Timestamp;

/// What tells the time and waits for it.
pub trait Clock: Send + Sync {
    /// The instant now.
    fn now(&self) -> Timestamp;

    /// Waits until the clock shows `instant`.
    fn sleep_until(&self, instant: Timestamp) -> BoxFuture<'static, ()>;
}

/// The machine's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        let passed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Timestamp::from_millis(u64::try_from(passed.as_millis()).unwrap_or(u64::MAX))
    }

    fn sleep_until(&self, instant: Timestamp) -> BoxFuture<'static, ()> {
        // The wait is measured on the monotonic clock: somebody who sets the machine's clock must not stop it.
        let wait = Duration::from_millis(instant.millis_since(self.now()));
        Box::pin(tokio::time::sleep(wait))
    }
}
