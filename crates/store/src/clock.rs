//! Time as a handle, so that tests and simulations decide when a lease is over.
//!
//! It is a duration since some start and not a date: leases must not end because somebody set the clock.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

/// A steady clock that can be waited for.
pub trait Clock: Send + Sync + 'static {
    /// Time since a start that is fixed for this clock; never goes back.
    fn now(&self) -> Duration;

    /// Returns once [`now`](Clock::now) is at least `deadline`, at once if it already is.
    fn wait_until(&self, deadline: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>>;
}

/// The machine's steady clock.
#[derive(Clone, Debug)]
pub struct SystemClock {
    start: Instant,
}

impl SystemClock {
    /// A clock that starts now.
    pub fn new() -> Self {
        Self { start: Instant::now() }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn wait_until(&self, deadline: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(tokio::time::sleep(deadline.saturating_sub(self.now())))
    }
}

/// A clock that stands still until it is advanced. Clones show the same time.
#[derive(Clone, Debug)]
pub struct ManualClock {
    now: Arc<watch::Sender<Duration>>,
}

impl ManualClock {
    /// A clock that shows zero.
    pub fn new() -> Self {
        Self { now: Arc::new(watch::Sender::new(Duration::ZERO)) }
    }

    /// Moves time on by `step` and wakes whoever waited for it.
    pub fn advance(&self, step: Duration) {
        self.now.send_modify(|now| *now += step);
    }
}

impl Default for ManualClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Duration {
        *self.now.borrow()
    }

    fn wait_until(&self, deadline: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        // The waiter keeps the sender, so that a clock nobody holds any more is one that stands still for ever.
        let held = self.clone();
        Box::pin(async move {
            let mut times = held.now.subscribe();
            times.wait_for(|now| *now >= deadline).await.expect("the sender is held right here");
        })
    }
}
