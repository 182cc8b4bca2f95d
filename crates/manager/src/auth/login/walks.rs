//! The walks that somebody is on: bounded, each from one address, and each in the hands of one step at a time.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use berth_model::{Problem, Timestamp};

use super::{From, Who, no_walk};
use crate::auth::SecretHash;
use crate::auth::lockout::network_of;
use crate::auth::oidc::{DeviceOuting, Outing, Provider};

/// Most walks at once; those of one address make room for its own first.
const WALKS_MAX: usize = 4096;
/// Most walks from one address.
const WALKS_PER_ADDRESS_MAX: usize = 64;
/// How far somebody has got.
pub(super) struct Walk {
    address: IpAddr,
    pub(super) expires_at: Timestamp,
    pub(super) state: State,
}

pub(super) enum State {
    /// The user is known and has to show a code.
    Code { who: Who, wrong: u32 },
    /// The user is known and has to choose a password in place of the one with this hash.
    NewPassword { who: Who, old_hash: String },
    /// The user has to say yes on another device.
    Device { provider: Arc<Provider>, outing: DeviceOuting, ask_from: Timestamp },
    /// A browser is at the provider; the hash is that of the cookie it has to come back with.
    Browser { provider: Arc<Provider>, outing: Outing, cookie: SecretHash },
}

/// All walks, by id.
#[derive(Default)]
pub(super) struct Walks {
    all: Mutex<HashMap<String, Walk>>,
}

impl Walks {
    /// Keeps a walk for so long from now on.
    pub(super) fn put(&self, id: String, from: From, life_ms: u64, state: State) {
        self.put_back(&id, from, from.now.plus_millis(life_ms), state);
    }

    /// Keeps a walk until then.
    pub(super) fn put_back(&self, id: &str, from: From, expires_at: Timestamp, state: State) {
        let address = network_of(from.address);
        let mut walks = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        walks.retain(|_, walk| from.now < walk.expires_at);
        let oldest = |walks: &HashMap<String, Walk>, of: Option<IpAddr>| {
            let mine = walks.iter().filter(|(_, walk)| of.is_none_or(|of| walk.address == of));
            mine.min_by_key(|(_, walk)| walk.expires_at).map(|(id, _)| id.clone())
        };
        let own = walks.values().filter(|walk| walk.address == address).count();
        let first = match (own >= WALKS_PER_ADDRESS_MAX, walks.len() >= WALKS_MAX) {
            (true, _) => oldest(&walks, Some(address)),
            (false, true) => oldest(&walks, None),
            (false, false) => None,
        };
        if let Some(first) = first {
            walks.remove(&first);
        }
        walks.insert(id.to_owned(), Walk { address, expires_at, state });
    }

    /// Takes a walk away from everybody else; it is put back only by what goes on with it.
    pub(super) fn take(&self, id: &str, from: From) -> Result<Walk, Problem> {
        let mut walks = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        walks.retain(|_, walk| from.now < walk.expires_at);
        let is_its_own = walks.get(id).is_some_and(|walk| walk.address == network_of(from.address));
        if !is_its_own {
            return Err(no_walk());
        }
        walks.remove(id).ok_or_else(no_walk)
    }
}

#[cfg(test)]
mod tests {
    use super::super::WALK_MS;
    use super::*;
    use crate::auth::session::Proof;
    use berth_model::UserId;

    #[test]
    fn a_flood_of_walks_takes_no_more_room_than_allowed_and_pushes_out_its_own_first() {
        let walks = Walks::default();
        let now = Timestamp::from_millis(1_800_000_000_000);
        let state = || {
            let proof = Proof { method: "password".to_owned(), second_factor: false };
            State::Code { who: Who { user: UserId::from_entropy([1; 10]), proof }, wrong: 0 }
        };
        let at = |address: [u8; 4]| From { address: address.into(), now };
        walks.put("mine".to_owned(), at([192, 0, 2, 1]), WALK_MS, state());
        for number in 0..10_000 {
            walks.put(format!("flood-{number}"), at([198, 51, 100, 7]), WALK_MS, state());
        }
        assert_eq!(walks.all.lock().expect("no panic").len(), WALKS_PER_ADDRESS_MAX + 1);
        assert!(walks.take("mine", at([192, 0, 2, 1])).is_ok());
        for number in 0..10_000u32 {
            walks.put(format!("many-{number}"), at(number.to_be_bytes()), WALK_MS, state());
        }
        assert!(walks.all.lock().expect("no panic").len() <= WALKS_MAX);
        let later = From { now: now.plus_millis(WALK_MS), ..at([0, 0, 0, 1]) };
        assert!(walks.take("many-1", later).is_err());
        assert_eq!(walks.all.lock().expect("no panic").len(), 0, "what is over is forgotten");
    }
}
