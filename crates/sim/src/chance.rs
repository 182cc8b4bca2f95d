//! Chance with a seed: the same seed draws the same numbers, so that a story that went wrong can be told again.
//!
//! What is not drawn here is not repeated: threads, the machine's clock and its load have their say in each run. A seed
//! repeats what is done and which delays are wished for, not when exactly each of it happens.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// A source of numbers.
#[derive(Debug)]
pub struct Chance {
    state: Mutex<u64>,
}

impl Chance {
    /// The source that belongs to a seed.
    pub const fn new(seed: u64) -> Self {
        Self { state: Mutex::new(seed) }
    }

    /// The next number: a step of a counter, mixed so that neighbours have nothing in common.
    pub fn next(&self) -> u64 {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = *state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`; 0 when that is 0.
    pub fn below(&self, bound: u64) -> u64 {
        self.next().checked_rem(bound).unwrap_or(0)
    }

    /// Whether something happens that happens once in `times`.
    pub fn one_in(&self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// One of these.
    ///
    /// # Panics
    /// When there are none.
    pub fn pick<'a, T>(&self, all: &'a [T]) -> &'a T {
        let at = usize::try_from(self.below(all.len() as u64)).expect("an index");
        &all[at]
    }

    /// A time up to `longest`.
    pub fn up_to(&self, longest: Duration) -> Duration {
        let longest_us = u64::try_from(longest.as_micros()).unwrap_or(u64::MAX);
        Duration::from_micros(self.below(longest_us.saturating_add(1)))
    }

    /// Fills bytes.
    pub fn fill(&self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let number = self.next().to_le_bytes();
            chunk.copy_from_slice(&number[..chunk.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_draws_the_same_numbers_again() {
        let draw = |seed| {
            let chance = Chance::new(seed);
            (0..10).map(|_| chance.below(1000)).collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }
}
