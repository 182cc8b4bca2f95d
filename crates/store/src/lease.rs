//! When leases end. Which keys they hold is each driver's affair; what is kept here is the time.
//!
//! Deadlines live in memory only: a keep-alive costs no write, and a store that was down has no idea how long, so
//! every lease starts afresh with it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::clock::Clock;
use crate::store::{Lease, LeaseId, Pending};

/// How long leases that are over are left alone after the storage refused to end them: the disk may be full for long.
const EXPIRY_RETRY: Duration = Duration::from_secs(1);

/// The living leases and their deadlines on the store's clock.
pub(crate) struct Leases {
    live: BTreeMap<LeaseId, Live>,
    next: watch::Sender<Option<Duration>>,
}

struct Live {
    ttl: Duration,
    deadline: Duration,
}

impl Leases {
    pub(crate) fn new() -> Self {
        Self { live: BTreeMap::new(), next: watch::Sender::new(None) }
    }

    /// Shows when the next lease is due; closed when the store is.
    pub(crate) fn next_deadline(&self) -> watch::Receiver<Option<Duration>> {
        self.next.subscribe()
    }

    /// Starts a lease's time, for the first time or again.
    pub(crate) fn start(&mut self, lease: Lease, now: Duration) {
        self.live.insert(lease.id, Live { ttl: lease.ttl, deadline: now.saturating_add(lease.ttl) });
        self.announce();
    }

    pub(crate) fn get(&self, id: LeaseId) -> Option<Lease> {
        self.live.get(&id).map(|live| Lease { id, ttl: live.ttl })
    }

    pub(crate) fn end(&mut self, id: LeaseId) {
        self.live.remove(&id);
        self.announce();
    }

    pub(crate) fn due(&self, now: Duration) -> Vec<LeaseId> {
        self.live.iter().filter(|(_, live)| live.deadline <= now).map(|(id, _)| *id).collect()
    }

    fn announce(&self) {
        let next = self.live.values().map(|live| live.deadline).min();
        self.next.send_if_modified(|announced| std::mem::replace(announced, next) != next);
    }
}

/// Calls `expire` each time a deadline has passed, until the store is closed.
pub(crate) fn spawn_expiry(
    clock: Arc<dyn Clock>,
    mut next: watch::Receiver<Option<Duration>>,
    expire: impl Fn() -> Pending<'static, ()> + Send + 'static,
) {
    tokio::spawn(async move {
        let mut not_before = Duration::ZERO;
        loop {
            let deadline = *next.borrow_and_update();
            let wait = async {
                match deadline {
                    Some(deadline) => clock.wait_until(deadline.max(not_before)).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                changed = next.changed() => if changed.is_err() { return },
                () = wait => if let Err(error) = expire().await {
                    tracing::debug!(%error, "leases could not be ended yet");
                    not_before = clock.now().saturating_add(EXPIRY_RETRY);
                },
            }
        }
    });
}
