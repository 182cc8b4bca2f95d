//! Events to those who listen.
//!
//! A subscription loses nothing from the moment it exists: each has its own queue. A queue has a bound, because
//! a guest can make its QEMU emit events without end and a listener can be stuck; a listener that falls behind that
//! far is cut off and told so, rather than silently robbed of an event in the middle.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use crate::event::{Event, EventKind};

/// Events that may wait for one listener, some 10 MB. Lower: a listener that is busy for seconds during many block
/// jobs is cut off; higher: one stuck listener costs more memory.
const QUEUE_EVENTS_MAX: usize = 65_536;

/// The events of one QEMU from the moment of subscription on.
#[derive(Debug)]
pub struct Events {
    queue: mpsc::Receiver<Event>,
    lagged: Arc<AtomicBool>,
}

impl Events {
    /// The next event. `None`: the connection is closed and everything it brought was given out, or this listener
    /// has [`Self::lagged`]. May be dropped and called again without losing an event.
    pub async fn recv(&mut self) -> Option<Event> {
        self.queue.recv().await
    }

    /// An event that has arrived already, without waiting.
    pub fn try_recv(&mut self) -> Option<Event> {
        self.queue.try_recv().ok()
    }

    /// Waits for the first event that `wanted` accepts; earlier ones are thrown away. `None` as in [`Self::recv`].
    pub async fn wait_for(&mut self, mut wanted: impl FnMut(&EventKind) -> bool) -> Option<Event> {
        loop {
            let event = self.recv().await?;
            if wanted(&event.kind) {
                return Some(event);
            }
        }
    }

    /// Whether this listener was cut off because too many events waited for it. Subscribe again and ask QEMU for
    /// its state.
    #[must_use]
    pub fn lagged(&self) -> bool {
        self.lagged.load(Ordering::Acquire)
    }
}

/// All listeners of one connection.
#[derive(Debug, Default)]
pub(crate) struct Subscribers {
    /// `None` once the connection is closed: later subscriptions end at once.
    list: Mutex<Option<Vec<Subscriber>>>,
}

#[derive(Debug)]
struct Subscriber {
    queue: mpsc::Sender<Event>,
    lagged: Arc<AtomicBool>,
}

impl Subscribers {
    pub(crate) fn new() -> Self {
        Self { list: Mutex::new(Some(Vec::new())) }
    }

    pub(crate) fn subscribe(&self) -> Events {
        let (sender, queue) = mpsc::channel(QUEUE_EVENTS_MAX);
        let lagged = Arc::new(AtomicBool::new(false));
        if let Some(list) = self.list.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            list.push(Subscriber { queue: sender, lagged: Arc::clone(&lagged) });
        }
        Events { queue, lagged }
    }

    pub(crate) fn publish(&self, event: &Event) {
        let mut guard = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(list) = guard.as_mut() {
            list.retain(|subscriber| match subscriber.queue.try_send(event.clone()) {
                Ok(()) => true,
                Err(TrySendError::Closed(_)) => false,
                Err(TrySendError::Full(_)) => {
                    subscriber.lagged.store(true, Ordering::Release);
                    false
                }
            });
        }
    }

    pub(crate) fn close(&self) {
        *self.list.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::HostTime;

    fn pass(number: u64) -> Event {
        Event { at: HostTime::UNKNOWN, kind: EventKind::MigrationPass(number) }
    }

    #[tokio::test]
    async fn a_listener_that_falls_behind_gets_what_waited_and_is_told() {
        let subscribers = Subscribers::new();
        let mut slow = subscribers.subscribe();
        for number in 0..=QUEUE_EVENTS_MAX as u64 {
            subscribers.publish(&pass(number));
        }
        for number in 0..QUEUE_EVENTS_MAX as u64 {
            assert_eq!(slow.recv().await, Some(pass(number)));
        }
        assert_eq!(slow.recv().await, None);
        assert!(slow.lagged());
    }

    #[tokio::test]
    async fn closing_ends_listeners_after_their_last_event() {
        let subscribers = Subscribers::new();
        let mut early = subscribers.subscribe();
        subscribers.publish(&pass(1));
        subscribers.close();
        assert_eq!(early.recv().await, Some(pass(1)));
        assert_eq!(early.recv().await, None);
        assert!(!early.lagged());
        assert_eq!(subscribers.subscribe().recv().await, None);
    }
}
