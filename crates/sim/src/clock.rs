//! The manager's clock, which a test can set forward: who sleeps until then wakes at once.

use std::time::Duration;

use berth_manager::clock::{Clock, Sleep, SystemClock};
use berth_model::Timestamp;
use tokio::sync::watch;

/// The machine's clock, and how far it was set forward.
pub struct SimClock {
    ahead_ms: watch::Sender<u64>,
}

impl SimClock {
    pub(crate) fn new() -> Self {
        Self { ahead_ms: watch::Sender::new(0) }
    }

    /// Lets time pass at once.
    pub fn advance(&self, by: Duration) {
        let millis = u64::try_from(by.as_millis()).unwrap_or(u64::MAX);
        self.ahead_ms.send_modify(|ahead| *ahead = ahead.saturating_add(millis));
    }
}

impl Clock for SimClock {
    fn now(&self) -> Timestamp {
        SystemClock.now().plus_millis(*self.ahead_ms.borrow())
    }

    fn sleep(&self, duration: Duration) -> Sleep {
        let mut ahead = self.ahead_ms.subscribe();
        let millis = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let until = self.now().plus_millis(millis);
        Box::pin(async move {
            loop {
                let now = SystemClock.now().plus_millis(*ahead.borrow_and_update());
                let left = Duration::from_millis(until.millis_since(now));
                if left.is_zero() {
                    return;
                }
                tokio::select! {
                    () = tokio::time::sleep(left) => {}
                    // A cluster that is gone sets its clock no more: what is left is waited for.
                    changed = ahead.changed() => if changed.is_err() { return tokio::time::sleep(left).await },
                }
            }
        })
    }
}
