//! Schedules: snapshots that are taken by the clock, and what is kept of them.
//!
//! A schedule is about one VM or about all VMs of a segment, those of the segments inside it counted, whenever they came
//! there. When its cron says so ([`cron`]) there is a *run*: one snapshot of each of these VMs, after which the snapshots
//! that the schedule's rule keeps no longer are deleted ([`retention`]).
//!
//! A run is written down before anything of it is done, and each VM's part when it is over. Runs that were missed while
//! nobody was there are made up for by one, not by as many as were missed; those that came due while the last run still
//! went, or while the schedule was paused, are not.

pub mod cron;
pub mod reserve;
pub mod retention;

use serde::{Deserialize, Serialize};

use crate::name::{NAME_CHARS_MAX, Name};
use crate::snapshot::SnapshotExtent;
use crate::{OperationId, ScheduleId, SegmentId, SnapshotId, Timestamp, UserId, VmId};

pub use cron::{Cron, Zone};
pub use retention::Keep;

use cron::occasions_between;

/// A schedule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Schedule {
    /// Its id.
    pub id: ScheduleId,
    /// The segment that it is in.
    pub segment: SegmentId,
    /// Its name, unique in its segment.
    pub name: Name,
    /// The VM that it is about; none: all of the segment, and of those inside it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmId>,
    /// When it runs.
    pub cron: Cron,
    /// By which clock.
    pub timezone: Zone,
    /// What is kept of the snapshots that it takes.
    pub keep: Keep,
    /// How much of a VM they hold.
    #[serde(default)]
    pub extent: SnapshotExtent,
    /// It does nothing.
    pub paused: bool,
    /// Who answers for it: whoever made or changed it last. It does what this user may do at the time of a run.
    pub owner: UserId,
    /// When it was made.
    pub created_at: Timestamp,
    /// How it goes.
    pub status: ScheduleStatus,
}

/// How a schedule goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ScheduleStatus {
    /// What came due up to then has been seen to.
    pub seen_until: Timestamp,
    /// The run that goes, or the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<ScheduleRun>,
    /// How many runs there were.
    #[serde(default)]
    pub runs: u64,
    /// How many times it was due and did not run.
    #[serde(default)]
    pub missed: u64,
}

/// One run of a schedule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ScheduleRun {
    /// When it was due; also what it is told apart by.
    pub due_at: Timestamp,
    /// When it began.
    pub begun_at: Timestamp,
    /// When it was over; none: it goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Timestamp>,
    /// Who asked for it; none: the clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asked_by: Option<String>,
    /// How many earlier ones it makes up for.
    #[serde(default)]
    pub missed: u64,
    /// What came of it, once it is over.
    #[serde(default)]
    pub tally: Tally,
}

/// What came of a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Tally {
    /// VMs of which a snapshot was taken.
    pub taken: u64,
    /// VMs that could not have one taken: stopped, away, busy.
    pub skipped: u64,
    /// VMs of which it failed.
    pub failed: u64,
    /// Older snapshots that were deleted.
    pub deleted: u64,
}

/// What came of a VM's part in a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// A snapshot was taken.
    Taken,
    /// The VM was in no state to have one taken: nobody has to do anything.
    Skipped,
    /// It failed: somebody has to look.
    Failed,
}

impl Outcome {
    /// Every outcome.
    pub const ALL: [Self; 3] = [Self::Taken, Self::Skipped, Self::Failed];

    /// The outcome's name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Taken => "taken",
            Self::Skipped => "skipped",
            Self::Failed => "failed",
        }
    }
}

/// A VM's part in a schedule's last run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Part {
    /// The schedule.
    pub schedule: ScheduleId,
    /// The VM.
    pub vm: VmId,
    /// Which run.
    pub due_at: Timestamp,
    /// When it was over.
    pub at: Timestamp,
    /// What came of it.
    pub outcome: Outcome,
    /// Why it was skipped or failed, or why something could not be deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// The snapshot that was taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotId>,
    /// The last operation that was begun for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<OperationId>,
    /// How many older snapshots were deleted.
    #[serde(default)]
    pub deleted: u64,
    /// What the new snapshot occupies, in bytes.
    #[serde(default)]
    pub stored_bytes: u64,
    /// What the deleted ones occupied by themselves, in bytes.
    #[serde(default)]
    pub freed_bytes: u64,
    /// How many runs in a row it was not taken in, this one counted.
    #[serde(default)]
    pub in_a_row: u64,
}

/// The run of a schedule that a snapshot was taken in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Occasion {
    /// The schedule.
    pub schedule: ScheduleId,
    /// When the run was due.
    pub due_at: Timestamp,
}

/// What a schedule has to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Due {
    /// Nothing before then; none: never.
    Wait(Option<Timestamp>),
    /// Go on with the run that was begun.
    GoOn,
    /// Begin this run.
    Begin(ScheduleRun),
}

impl Schedule {
    /// What it has to do now.
    ///
    /// A clock that was set back does not silence it: what was seen to in a future that has not come is forgotten.
    pub fn due(&self, now: Timestamp) -> Due {
        if self.status.running().is_some() {
            return Due::GoOn;
        }
        if self.paused {
            return Due::Wait(None);
        }
        let passed = occasions_between(&self.cron, &self.timezone, self.status.seen_until.min(now), now);
        match passed.latest {
            Some(due_at) => Due::Begin(ScheduleRun {
                due_at,
                begun_at: now,
                finished_at: None,
                asked_by: None,
                missed: passed.count.saturating_sub(1),
                tally: Tally::default(),
            }),
            None => Due::Wait(self.cron.next_after(&self.timezone, now)),
        }
    }

    /// The run that somebody asks for now.
    pub fn asked(&self, by: String, now: Timestamp) -> ScheduleRun {
        ScheduleRun {
            due_at: now,
            begun_at: now,
            finished_at: None,
            asked_by: Some(by),
            missed: 0,
            tally: Tally::default(),
        }
    }

    /// Begins a run.
    ///
    /// # Errors
    /// The run that goes already.
    pub fn begin(&mut self, run: ScheduleRun) -> Result<(), ScheduleRun> {
        if let Some(going) = self.status.running() {
            return Err(going.clone());
        }
        self.status.runs += 1;
        self.status.missed += run.missed;
        if run.asked_by.is_none() {
            self.status.seen_until = run.due_at;
        }
        self.status.run = Some(run);
        Ok(())
    }

    /// Ends the run that goes; nothing if none does, or another one. What came due while it went is not made up for: a
    /// schedule that takes longer than it has would never rest.
    pub fn finish(&mut self, due_at: Timestamp, tally: Tally, now: Timestamp) {
        let Some(run) = self.status.run.as_mut().filter(|run| run.due_at == due_at && !run.is_over()) else {
            return;
        };
        run.finished_at = Some(now);
        run.tally = tally;
        let passed = occasions_between(&self.cron, &self.timezone, self.status.seen_until.min(now), now);
        self.status.missed += passed.count;
        self.status.seen_until = now;
    }
}

impl ScheduleRun {
    /// Whether it is over.
    pub const fn is_over(&self) -> bool {
        self.finished_at.is_some()
    }
}

impl ScheduleStatus {
    /// Of a schedule that is made now: what would have come due before does not count.
    pub const fn new(now: Timestamp) -> Self {
        Self { seen_until: now, run: None, runs: 0, missed: 0 }
    }

    /// The run that goes.
    pub fn running(&self) -> Option<&ScheduleRun> {
        self.run.as_ref().filter(|run| !run.is_over())
    }
}

impl Tally {
    /// The sum of the parts in one run.
    pub fn of<'a>(parts: impl IntoIterator<Item = &'a Part>) -> Self {
        parts.into_iter().fold(Self::default(), |mut sum, part| {
            match part.outcome {
                Outcome::Taken => sum.taken += 1,
                Outcome::Skipped => sum.skipped += 1,
                Outcome::Failed => sum.failed += 1,
            }
            sum.deleted += part.deleted;
            sum
        })
    }
}

/// What a snapshot is called that a schedule takes: `nightly-2026-11-28-0200`, in the schedule's own time. The same time
/// comes twice when clocks go back, and in a minute in which somebody asks for a run: then another name has to do.
pub fn snapshot_name(schedule: &Name, zone: &Zone, due_at: Timestamp) -> Option<Name> {
    let time = zone.civil(due_at).strftime("%Y-%m-%d-%H%M").to_string();
    let room = NAME_CHARS_MAX.saturating_sub(time.len() + 1);
    let head: String = schedule.as_str().chars().take(room).collect();
    format!("{}-{time}", head.trim_end_matches('-')).parse().ok()
}

#[cfg(test)]
mod tests;
