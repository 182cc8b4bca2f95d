//! When to allow the guest a longer pause.
//!
//! QEMU stops the guest when what is left can be sent within the downtime limit, and then uses all of it. So the limit
//! starts small and is raised only when passes over memory no longer shrink what is left: each pass leaves what the
//! guest rewrote during it, so after a few passes the rest is as small as it will get. The rule is a function of
//! passes and time, without I/O, and serves snapshots and migrations with different numbers.
//!
//! A guest that the highest limit does not catch is slowed down, so that it is caught at all: first so far that its users
//! see it answer late but steadily, then almost to a stand; only one that even that does not help with is given up.

use std::time::Duration;

/// How long a pause may get, and how patiently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PauseBudget {
    /// The limit to begin with, in milliseconds.
    pub start_ms: u64,
    /// By how much it is raised, in milliseconds.
    pub step_ms: u64,
    /// The highest it may become, in milliseconds.
    pub max_ms: u64,
    /// Passes that are waited for before each step. Fewer: pauses grow that a little patience would have spared;
    /// more: the guest's memory is sent over and over.
    pub patience_passes: u64,
    /// Time that is waited for before each step: a pass over a large memory on a slow link takes long.
    pub patience: Duration,
    /// How long to try at the highest limit with the guest slowed down, before it is slowed down more or given up.
    pub last_patience: Duration,
}

impl PauseBudget {
    /// For a snapshot: its bar is 40 ms, and the agent on the same host takes memory about as fast as QEMU gives it.
    pub const SNAPSHOT: Self = Self {
        start_ms: 12,
        step_ms: 8,
        max_ms: 28,
        patience_passes: 6,
        patience: Duration::from_millis(500),
        last_patience: Duration::from_secs(10),
    };

    /// For a migration: its bar is 60 ms, of which loading and starting on the target take some.
    pub const MIGRATION: Self = Self {
        start_ms: 18,
        step_ms: 8,
        max_ms: 42,
        patience_passes: 3,
        patience: Duration::from_millis(300),
        last_patience: Duration::from_secs(60),
    };
}

/// How far a guest is slowed down, in percent of its time that it is kept from running, one after the other. QEMU lets a
/// CPU run for 10 ms and then holds it: for 90 ms at the first, which users take for a slow machine, and for a second
/// at the last, which they take for a broken one.
const SLOWNESS_PERCENT: [u32; 2] = [90, 99];

/// What to do after a look at the migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advice {
    /// Wait on.
    Wait,
    /// Set the downtime limit to this, in milliseconds.
    Raise(u64),
    /// Slow the guest down, by up to this share of its time in percent.
    SlowDown(u32),
    /// The guest rewrites its memory faster than it can be sent.
    GiveUp,
}

/// Watches one migration.
#[derive(Debug, Clone)]
pub struct Convergence {
    budget: PauseBudget,
    limit_ms: u64,
    raised_pass: u64,
    raised_at: Duration,
    /// How many of [`SLOWNESS_PERCENT`] are behind it.
    slowed_down: usize,
}

impl Convergence {
    /// At the start of a migration.
    pub const fn new(budget: PauseBudget) -> Self {
        Self { budget, limit_ms: budget.start_ms, raised_pass: 1, raised_at: Duration::ZERO, slowed_down: 0 }
    }

    /// The limit as it stands, in milliseconds.
    pub const fn limit_ms(&self) -> u64 {
        self.limit_ms
    }

    /// What to do when `pass` is being made and `elapsed` has gone by since the start.
    pub fn look(&mut self, pass: u64, elapsed: Duration) -> Advice {
        // The first pass is all of memory: how long it takes says nothing about the guest.
        if pass <= 1 {
            self.raised_at = elapsed;
            return Advice::Wait;
        }
        let waited = elapsed.saturating_sub(self.raised_at);
        if self.slowed_down > 0 {
            return if waited >= self.budget.last_patience { self.slow_down(elapsed) } else { Advice::Wait };
        }
        let passes = pass.saturating_sub(self.raised_pass);
        if passes < self.budget.patience_passes || waited < self.budget.patience {
            return Advice::Wait;
        }
        if self.limit_ms >= self.budget.max_ms {
            return self.slow_down(elapsed);
        }
        self.raised_pass = pass;
        self.raised_at = elapsed;
        self.limit_ms = (self.limit_ms + self.budget.step_ms).min(self.budget.max_ms);
        Advice::Raise(self.limit_ms)
    }

    fn slow_down(&mut self, elapsed: Duration) -> Advice {
        let Some(percent) = SLOWNESS_PERCENT.get(self.slowed_down) else { return Advice::GiveUp };
        self.slowed_down += 1;
        self.raised_at = elapsed;
        Advice::SlowDown(*percent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: PauseBudget = PauseBudget {
        start_ms: 10,
        step_ms: 15,
        max_ms: 30,
        patience_passes: 3,
        patience: Duration::from_secs(1),
        last_patience: Duration::from_secs(5),
    };

    #[test]
    fn the_limit_rises_in_steps_to_the_budget_and_never_beyond() {
        let mut convergence = Convergence::new(BUDGET);
        let mut limits = Vec::new();
        for second in 0..60 {
            match convergence.look(1 + second * 3, Duration::from_secs(second)) {
                Advice::Raise(limit) => limits.push(limit),
                Advice::SlowDown(percent) => limits.push(u64::from(percent)),
                Advice::Wait => {}
                Advice::GiveUp => break,
            }
        }
        assert_eq!(limits, [25, 30, 90, 99], "and then it is slowed down, step by step");
        assert_eq!(convergence.limit_ms(), 30);
    }

    #[test]
    fn a_long_first_pass_costs_no_patience() {
        let mut convergence = Convergence::new(BUDGET);
        assert_eq!(convergence.look(1, Duration::from_secs(3600)), Advice::Wait);
        assert_eq!(convergence.look(2, Duration::from_secs(3601)), Advice::Wait);
        assert_eq!(convergence.look(9, Duration::from_secs(3602)), Advice::Raise(25));
    }

    #[test]
    fn neither_many_quick_passes_nor_one_slow_pass_raise_it_alone() {
        let mut convergence = Convergence::new(BUDGET);
        assert_eq!(convergence.look(50, Duration::from_millis(500)), Advice::Wait);
        assert_eq!(convergence.look(2, Duration::from_secs(50)), Advice::Wait);
    }
}
