//! Strangers that come again and again.
//!
//! The secrets can't be guessed, so this is not what keeps anybody out. It keeps a caller that hammers at the door
//! from filling the audit and wearing out the disk: after so many requests in a minute from one address without a good
//! credential, further ones are answered without a record of their own. Who shows a good credential is always written
//! down and never held back, so nobody can lock out another.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

use berth_model::Timestamp;

/// Requests of strangers from one address that are each written down, in one window. Lower, and a health check each
/// second is not all there; higher, and a hammering caller writes that many records a minute.
pub const WRITTEN_MAX: u32 = 60;
/// Steps of logins from one address in one window. Each is written down, so further ones are not taken: a login without
/// a record would be one that nobody can find. Devices that wait for their users ask every few seconds.
pub const LOGIN_STEPS_MAX: u32 = 600;
/// How long a window is, in milliseconds.
const WINDOW_MS: u64 = 60_000;
/// Most addresses that are remembered; past it the old windows are forgotten.
const ADDRESSES_MAX: usize = 4096;

/// Counts the requests of strangers by address.
#[derive(Default)]
pub struct Strangers {
    windows: Mutex<HashMap<IpAddr, Window>>,
}

struct Window {
    began_at: Timestamp,
    requests: u32,
}

impl Strangers {
    /// Counts a request, and says whether it is still to be written down.
    pub fn came(&self, address: IpAddr, now: Timestamp) -> bool {
        self.came_at_most(address, now, WRITTEN_MAX)
    }

    /// Counts a request, and says whether it is among the first so many in its window.
    pub fn came_at_most(&self, address: IpAddr, now: Timestamp, most: u32) -> bool {
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        if windows.len() >= ADDRESSES_MAX && !windows.contains_key(&address) {
            windows.retain(|_, window| now.millis_since(window.began_at) < WINDOW_MS);
            if windows.len() >= ADDRESSES_MAX {
                return false;
            }
        }
        let window = windows.entry(address).or_insert(Window { began_at: now, requests: 0 });
        if now.millis_since(window.began_at) >= WINDOW_MS {
            *window = Window { began_at: now, requests: 0 };
        }
        window.requests = window.requests.saturating_add(1);
        window.requests <= most
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_is_quiet_after_so_many_requests_and_others_are_not() {
        let strangers = Strangers::default();
        let (now, one, other) = (Timestamp::from_millis(1_000), [10, 0, 0, 1].into(), [10, 0, 0, 2].into());
        for _ in 0..WRITTEN_MAX {
            assert!(strangers.came(one, now));
        }
        assert!(!strangers.came(one, now));
        assert!(strangers.came(other, now));
        assert!(strangers.came(one, now.plus_millis(WINDOW_MS)), "a new minute");
    }

    #[test]
    fn a_flood_of_addresses_takes_no_more_room_than_allowed() {
        let strangers = Strangers::default();
        for number in 0..10_000u32 {
            strangers.came(IpAddr::from(number.to_be_bytes()), Timestamp::from_millis(5));
        }
        assert!(strangers.windows.lock().expect("no panic").len() <= ADDRESSES_MAX);
    }
}
