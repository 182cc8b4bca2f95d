//! Live migration: its phases, how they may follow each other, and what is measured.
//!
//! ```mermaid
//! stateDiagram-v2
//!     preparing --> storage: target-ready
//!     preparing --> warm-up: nothing-to-copy
//!     storage --> warm-up: layers-there
//!     warm-up --> stop-and-copy: guest-stopped
//!     stop-and-copy --> handed-over: state-loaded
//!     handed-over --> completed: guest-running
//!     preparing --> undone: gave-up
//!     storage --> undone: gave-up
//!     warm-up --> undone: gave-up
//!     stop-and-copy --> undone: gave-up
//! ```
//!
//! **The point of no return is `handed-over`.** Before it the source owns the VM: whatever fails, the source's guest
//! goes on and the target's process is removed. The target loads everything but does not run (`-S`). Only when it has
//! said that the state is loaded does the source write down, durably, that it gives the VM away, and from then on the
//! source never runs it again unless the manager, having made sure that the target has thrown away what it had, gives it back.
//! So at each instant at most one of the two may run the guest, and it can be told which from what is on disk.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::HostId;

/// A phase of a migration.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationPhase {
    /// The target makes a process that waits.
    Preparing,
    /// Frozen layers and snapshots that the target lacks are copied.
    Storage,
    /// Memory is copied in rounds while the guest runs.
    WarmUp,
    /// The guest is stopped; what is left and the device state are copied.
    StopAndCopy,
    /// The source has given the VM away; the target lets it run.
    HandedOver,
    /// The guest runs on the target.
    Completed,
    /// It did not work, or was cancelled: the guest runs on the source as if nothing had been.
    Undone,
}

/// Something that moves a migration's phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationEvent {
    /// The target's process waits, and layers are missing there.
    TargetReady,
    /// The target's process waits, and nothing is missing there.
    NothingToCopy,
    /// All frozen layers are on the target.
    LayersThere,
    /// QEMU has stopped the guest on the source.
    GuestStopped,
    /// The target has loaded all state.
    StateLoaded,
    /// The guest runs on the target.
    GuestRunning,
    /// A failure or a cancel.
    GaveUp,
}

impl MigrationPhase {
    /// Every phase.
    pub const ALL: [Self; 7] = [
        Self::Preparing,
        Self::Storage,
        Self::WarmUp,
        Self::StopAndCopy,
        Self::HandedOver,
        Self::Completed,
        Self::Undone,
    ];

    /// The phase's name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Storage => "storage",
            Self::WarmUp => "warm-up",
            Self::StopAndCopy => "stop-and-copy",
            Self::HandedOver => "handed-over",
            Self::Completed => "completed",
            Self::Undone => "undone",
        }
    }
}

impl fmt::Display for MigrationPhase {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

impl MigrationEvent {
    /// Every event.
    pub const ALL: [Self; 7] = [
        Self::TargetReady,
        Self::NothingToCopy,
        Self::LayersThere,
        Self::GuestStopped,
        Self::StateLoaded,
        Self::GuestRunning,
        Self::GaveUp,
    ];

    /// The event's name, as in the diagram.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::TargetReady => "target-ready",
            Self::NothingToCopy => "nothing-to-copy",
            Self::LayersThere => "layers-there",
            Self::GuestStopped => "guest-stopped",
            Self::StateLoaded => "state-loaded",
            Self::GuestRunning => "guest-running",
            Self::GaveUp => "gave-up",
        }
    }
}

/// A pair of phase and event that the diagram does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a migration in {phase} can't take '{}'", event.as_str())]
pub struct MigrationStepError {
    /// The phase it was in.
    pub phase: MigrationPhase,
    /// What happened.
    pub event: MigrationEvent,
}

/// The one place where a migration's phase moves.
///
/// # Errors
/// The pair, when the diagram above does not have it.
pub const fn step(
    phase: MigrationPhase,
    event: MigrationEvent,
) -> Result<MigrationPhase, MigrationStepError> {
    use MigrationEvent as E;
    use MigrationPhase as P;
    match (phase, event) {
        (P::Preparing, E::TargetReady) => Ok(P::Storage),
        (P::Preparing, E::NothingToCopy) | (P::Storage, E::LayersThere) => Ok(P::WarmUp),
        (P::WarmUp, E::GuestStopped) => Ok(P::StopAndCopy),
        (P::StopAndCopy, E::StateLoaded) => Ok(P::HandedOver),
        (P::HandedOver, E::GuestRunning) => Ok(P::Completed),
        (P::Preparing | P::Storage | P::WarmUp | P::StopAndCopy, E::GaveUp) => Ok(P::Undone),
        (
            P::Preparing | P::Storage | P::WarmUp | P::StopAndCopy | P::HandedOver | P::Completed | P::Undone,
            E::TargetReady
            | E::NothingToCopy
            | E::LayersThere
            | E::GuestStopped
            | E::StateLoaded
            | E::GuestRunning
            | E::GaveUp,
        ) => Err(MigrationStepError { phase, event }),
    }
}

/// A phase that is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PhaseTiming {
    /// Which.
    pub phase: MigrationPhase,
    /// How long it took, in microseconds.
    pub took_us: u64,
}

/// What a finished migration measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct MigrationReport {
    /// Where the guest ran.
    pub source: HostId,
    /// Where it runs now.
    pub target: HostId,
    /// The phases in order.
    pub phases: Vec<PhaseTiming>,
    /// From the command's arrival at the source's agent to the guest running on the target, in milliseconds.
    pub total_ms: u64,
    /// The time in which the guest did not run: the source's STOP to the target's RESUME event, in microseconds.
    pub blackout_us: u64,
    /// Bytes of memory stream and device state between the agents, before TLS.
    pub memory_bytes: u64,
    /// Bytes of layers and snapshots between the agents.
    pub storage_bytes: u64,
    /// Passes over memory.
    pub rounds: u64,
    /// How far the two hosts' clocks were apart, as measured over the agents' connection, in microseconds (target
    /// minus source); already taken out of `blackout_us`.
    pub clock_offset_us: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_diagram_and_the_code_are_one() {
        let mut from_code = Vec::new();
        for phase in MigrationPhase::ALL {
            for event in MigrationEvent::ALL {
                match step(phase, event) {
                    Ok(next) => from_code.push(format!("{phase} --> {next}: {}", event.as_str())),
                    Err(error) => assert_eq!((error.phase, error.event), (phase, event)),
                }
            }
        }
        crate::diagram::check(include_str!("migration.rs"), from_code);
    }

    #[test]
    fn nothing_gives_up_after_the_point_of_no_return() {
        for phase in [MigrationPhase::HandedOver, MigrationPhase::Completed] {
            assert!(step(phase, MigrationEvent::GaveUp).is_err());
        }
    }
}
