//! Measures from outside for how long a guest did not answer.
//!
//! The meter asks for the tick every few milliseconds and notes when answers come. A gap is the time between two
//! answers that follow each other, so the figure includes one asking interval, and includes everything that a
//! user of the guest would feel: the pause itself, the network finding its way, the guest warming up.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::client::socket_for;

/// One answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heard {
    /// When it came.
    pub at: Instant,
    /// Which start of the guest gave it.
    pub nonce: String,
    /// What it counted.
    pub tick: u64,
}

/// The longest time without an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// When the last answer before it came, or the time from which was asked.
    pub from: Instant,
    /// How long it was.
    pub length: Duration,
}

/// A meter that runs until it is dropped.
#[derive(Debug)]
pub struct GapMeter {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    targets: Mutex<Vec<SocketAddr>>,
    heard: Mutex<Vec<Heard>>,
    stop: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl GapMeter {
    /// Starts asking the guest at these addresses, each once an interval. Several addresses of one guest make
    /// sense where a move changes its address, as with user-mode networking.
    ///
    /// # Errors
    /// When there is no address, or the system has no socket or thread to give.
    pub fn start(targets: &[SocketAddr], interval: Duration) -> io::Result<Self> {
        let Some(first) = targets.first() else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a gap meter needs an address to ask"));
        };
        let socket = socket_for(*first)?;
        let shared = Arc::new(Shared {
            targets: Mutex::new(targets.to_vec()),
            heard: Mutex::default(),
            stop: AtomicBool::new(false),
        });
        let own = Arc::clone(&shared);
        let work = move || own.work(&socket, interval);
        let thread = thread::Builder::new().name("gap-meter".into()).spawn(work)?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Asks at these addresses from now on.
    pub fn retarget(&self, targets: &[SocketAddr]) {
        *lock(&self.shared.targets) = targets.to_vec();
    }

    /// All answers so far.
    pub fn heard(&self) -> Vec<Heard> {
        lock(&self.shared.heard).clone()
    }

    /// The longest gap since an instant, which counts as an answer; so does now.
    pub fn longest_gap_since(&self, since: Instant) -> Gap {
        longest_gap(&lock(&self.shared.heard), since, Instant::now())
    }

    /// The first answer that came after an instant.
    pub fn first_answer_after(&self, instant: Instant) -> Option<Heard> {
        lock(&self.shared.heard).iter().find(|heard| heard.at > instant).cloned()
    }

    /// Waits for the first answer after an instant, at most so long from now.
    pub fn wait_for_answer_after(&self, instant: Instant, within: Duration) -> Option<Heard> {
        let end = Instant::now() + within;
        loop {
            let found = self.first_answer_after(instant);
            if found.is_some() || Instant::now() >= end {
                return found;
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for GapMeter {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        if let Some(thread) = self.thread.take() {
            // It can't panic; and if it did, the figures taken before it stand.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn work(&self, socket: &UdpSocket, interval: Duration) {
        let mut next = Instant::now();
        let mut asked = 0_u64;
        while !self.stop.load(SeqCst) {
            for target in lock(&self.targets).iter() {
                // An address that can't be reached now is asked again in a moment.
                let _ = socket.send_to(format!("tick gap-{asked}").as_bytes(), target);
            }
            asked += 1;
            next = (next + interval).max(Instant::now());
            self.listen(socket, next);
        }
    }

    fn listen(&self, socket: &UdpSocket, until: Instant) {
        let mut buffer = [0; 2048];
        while let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            if socket.set_read_timeout(Some(left)).is_err() {
                return;
            }
            let Ok(length) = socket.recv(&mut buffer) else { continue };
            let at = Instant::now();
            let reply: Value = serde_json::from_slice(&buffer[..length]).unwrap_or_default();
            if let (Some(nonce), Some(tick)) = (reply["nonce"].as_str(), reply["tick"].as_u64()) {
                lock(&self.heard).push(Heard { at, nonce: nonce.to_owned(), tick });
            }
        }
    }
}

fn longest_gap(heard: &[Heard], since: Instant, now: Instant) -> Gap {
    let mut longest = Gap { from: since, length: Duration::ZERO };
    let mut last = since;
    let answers = heard.iter().map(|heard| heard.at).filter(|at| *at > since);
    for at in answers.chain([now]) {
        let length = at.saturating_duration_since(last);
        if length > longest.length {
            longest = Gap { from: last, length };
        }
        last = at;
    }
    longest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_gap_is_found_also_when_it_is_still_open() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let heard: Vec<Heard> = [5, 10, 110, 115]
            .into_iter()
            .map(|ms| Heard { at: at(ms), nonce: String::new(), tick: ms })
            .collect();
        let closed = Gap { from: at(10), length: Duration::from_millis(100) };
        assert_eq!(longest_gap(&heard, start, at(120)), closed);
        let open = Gap { from: at(115), length: Duration::from_millis(885) };
        assert_eq!(longest_gap(&heard, start, at(1000)), open);
        let later = Gap { from: at(50), length: Duration::from_millis(60) };
        assert_eq!(longest_gap(&heard, at(50), at(120)), later);
        assert_eq!(longest_gap(&[], start, at(7)).length, Duration::from_millis(7));
    }
}
