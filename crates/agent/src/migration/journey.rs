//! What is measured on the way of a migration: how long each phase took, and for how long the guest stood still.

use std::time::Instant;

use berth_model::migration::{MigrationEvent, MigrationPhase, MigrationReport, PhaseTiming, step};

use super::link::Sender;
use super::source::Order;
use crate::vm::VmRuntime;

/// What is measured on the way.
pub struct Journey {
    started: Instant,
    phase: MigrationPhase,
    entered: Instant,
    phases: Vec<PhaseTiming>,
    /// How far the target's clock is ahead of ours, in microseconds.
    pub clock_offset_us: i64,
}

impl Journey {
    /// At the beginning.
    pub fn new() -> Self {
        let now = Instant::now();
        Self {
            started: now,
            phase: MigrationPhase::Preparing,
            entered: now,
            phases: Vec::new(),
            clock_offset_us: 0,
        }
    }

    /// Goes on to the next phase.
    pub fn step(&mut self, event: MigrationEvent) {
        match step(self.phase, event) {
            Ok(next) => {
                let took_us = u64::try_from(self.entered.elapsed().as_micros()).unwrap_or(u64::MAX);
                self.phases.push(PhaseTiming { phase: self.phase, took_us });
                self.phase = next;
                self.entered = Instant::now();
            }
            Err(error) => tracing::error!(%error, "a step that is not in the model"),
        }
    }

    /// A report without what was measured on the way.
    pub fn empty_report(&mut self, vm: &VmRuntime, order: &Order) -> MigrationReport {
        MigrationReport {
            source: vm.services().host.clone(),
            target: order.target.clone(),
            phases: std::mem::take(&mut self.phases),
            total_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            blackout_us: 0,
            memory_bytes: 0,
            storage_bytes: 0,
            rounds: 0,
            clock_offset_us: self.clock_offset_us,
        }
    }

    /// What was measured, without passes. `stopped_us` is by our clock, `running_at_us` by the target's; none: it did not
    /// run here, or it is not known whether it runs there.
    pub fn report(
        &mut self,
        vm: &VmRuntime,
        order: &Order,
        sender: &Sender,
        stopped_us: Option<u64>,
        running_at_us: Option<u64>,
    ) -> MigrationReport {
        let blackout_us = running_at_us.zip(stopped_us).map_or(0, |(running, stopped)| {
            let there = running.cast_signed() - self.clock_offset_us;
            u64::try_from(there - stopped.cast_signed()).unwrap_or(0)
        });
        MigrationReport {
            blackout_us,
            memory_bytes: sender.stream_bytes(),
            storage_bytes: sender.storage_bytes(),
            ..self.empty_report(vm, order)
        }
    }
}
