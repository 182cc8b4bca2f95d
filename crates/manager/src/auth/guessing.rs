//! Callers that show bad credentials again and again.
//!
//! The secrets can't be guessed, so this is not what keeps anybody out. It keeps a caller that hammers at the door
//! from filling the audit and wearing out the disk: after so many failures in a minute from one address, further ones
//! are refused without a record of their own. A good credential is never held back, so nobody can lock out another.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

use berth_model::Timestamp;

/// Failures from one address that are each written down, in one window. Lower, and an honest mistake in a script
/// leaves gaps in the audit; higher, and a hammering caller writes that many records a minute.
pub const FAILURES_MAX: u32 = 60;
/// How long a window is, in milliseconds.
const WINDOW_MS: u64 = 60_000;
/// Most addresses that are remembered; past it the old windows are forgotten.
const ADDRESSES_MAX: usize = 4096;

/// Counts failures by address.
#[derive(Default)]
pub struct Guessing {
    windows: Mutex<HashMap<IpAddr, Window>>,
}

struct Window {
    began_at: Timestamp,
    failures: u32,
}

impl Guessing {
    /// Counts a failure, and says whether it is still to be written down.
    pub fn failed(&self, address: IpAddr, now: Timestamp) -> bool {
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        if windows.len() >= ADDRESSES_MAX && !windows.contains_key(&address) {
            windows.retain(|_, window| now.millis_since(window.began_at) < WINDOW_MS);
            if windows.len() >= ADDRESSES_MAX {
                return false;
            }
        }
        let window = windows.entry(address).or_insert(Window { began_at: now, failures: 0 });
        if now.millis_since(window.began_at) >= WINDOW_MS {
            *window = Window { began_at: now, failures: 0 };
        }
        window.failures = window.failures.saturating_add(1);
        window.failures <= FAILURES_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_is_quiet_after_so_many_failures_and_others_are_not() {
        let guessing = Guessing::default();
        let (now, one, other) = (Timestamp::from_millis(1_000), [10, 0, 0, 1].into(), [10, 0, 0, 2].into());
        for _ in 0..FAILURES_MAX {
            assert!(guessing.failed(one, now));
        }
        assert!(!guessing.failed(one, now));
        assert!(guessing.failed(other, now));
        assert!(guessing.failed(one, now.plus_millis(WINDOW_MS)), "a new minute");
    }

    #[test]
    fn a_flood_of_addresses_takes_no_more_room_than_allowed() {
        let guessing = Guessing::default();
        for number in 0..10_000u32 {
            guessing.failed(IpAddr::from(number.to_be_bytes()), Timestamp::from_millis(5));
        }
        assert!(guessing.windows.lock().expect("no panic").len() <= ADDRESSES_MAX);
    }
}
