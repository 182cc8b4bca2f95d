//! Which of a schedule's snapshots are kept, as a function of what there is.
//!
//! `hourly=24` keeps, of each of the last 24 hours *in which there are snapshots*, the newest one; `daily`, `weekly` and
//! `monthly` likewise, by the clock and calendar of the schedule's time zone, weeks beginning on Mondays; `last=3` keeps
//! the three newest. A snapshot that any of them keeps is kept. So a VM that stood still for a month loses nothing.
//!
//! Whatever the rule says:
//!
//! - what another schedule or a person made is no business of this one;
//! - a pinned snapshot stays, and so does one that something uses now;
//! - the newest good one stays;
//! - one that failed its verification fills nobody's place. As long as a good one is kept it is deleted; when there is none,
//!   nothing is deleted, because what is broken may be all that is left;
//! - what was taken at a time that has not come is left alone: then it is the clock that is wrong.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Zone;
use crate::{ScheduleId, SnapshotId, Timestamp};

/// What a rule must look like, for error texts.
pub const KEEP_RULE: &str =
    "a list like 'hourly=24,daily=7,weekly=4,monthly=12,last=3' in which at least one number is not 0";
/// Most snapshots that one part of a rule can keep: more layers than that help nobody.
pub const KEEP_MAX: u32 = 10_000;

/// How many snapshots are kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Keep {
    /// The newest ones.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub last: u32,
    /// One of each hour.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub hourly: u32,
    /// One of each day.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub daily: u32,
    /// One of each week.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub weekly: u32,
    /// One of each month.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub monthly: u32,
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// Text that is no rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is no rule for what to keep: expected {KEEP_RULE}")]
pub struct KeepError {
    /// What was given, cut to 80 characters.
    pub text: String,
}

impl Keep {
    /// Its parts with their names, in the order in which they are written.
    pub const fn parts(&self) -> [(&'static str, u32); 5] {
        [
            ("last", self.last),
            ("hourly", self.hourly),
            ("daily", self.daily),
            ("weekly", self.weekly),
            ("monthly", self.monthly),
        ]
    }

    /// Whether it can be used: it keeps something, and not more than can be.
    pub fn is_sound(&self) -> bool {
        let numbers = self.parts().map(|(_, number)| number);
        numbers.iter().any(|number| *number > 0) && numbers.iter().all(|number| *number <= KEEP_MAX)
    }

    fn part(&mut self, name: &str) -> Option<&mut u32> {
        match name {
            "last" => Some(&mut self.last),
            "hourly" => Some(&mut self.hourly),
            "daily" => Some(&mut self.daily),
            "weekly" => Some(&mut self.weekly),
            "monthly" => Some(&mut self.monthly),
            _ => None,
        }
    }
}

impl FromStr for Keep {
    type Err = KeepError;
    fn from_str(text: &str) -> Result<Self, KeepError> {
        let wrong = || KeepError { text: text.chars().take(80).collect() };
        let mut keep = Self::default();
        let mut named = Vec::new();
        for word in text.split(',') {
            let (name, number) = word.split_once('=').ok_or_else(wrong)?;
            *keep.part(name).ok_or_else(wrong)? = number.parse().map_err(|_| wrong())?;
            if named.contains(&name) {
                return Err(wrong());
            }
            named.push(name);
        }
        if keep.is_sound() { Ok(keep) } else { Err(wrong()) }
    }
}

impl fmt::Display for Keep {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = self.parts().into_iter().filter(|(_, number)| *number > 0);
        let words: Vec<String> = parts.map(|(name, number)| format!("{name}={number}")).collect();
        formatter.write_str(&words.join(","))
    }
}

/// What a look at a snapshot's bytes, or a start of it, has shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nobody has looked, or it was found whole.
    Good,
    /// It was found broken.
    Broken,
}

/// A snapshot of one VM, as far as retention looks at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Its id.
    pub id: SnapshotId,
    /// The schedule that took it; none: another reason.
    pub schedule: Option<ScheduleId>,
    /// When it was taken.
    pub taken_at: Timestamp,
    /// Held against deletion, or the baseline.
    pub is_held: bool,
    /// A plan or an operation needs it now.
    pub is_used: bool,
    /// Whether it is whole.
    pub verdict: Verdict,
}

/// Which of the snapshots of one VM a schedule deletes, oldest first.
pub fn to_delete(
    schedule: &ScheduleId,
    keep: &Keep,
    zone: &Zone,
    snapshots: &[Candidate],
    now: Timestamp,
) -> Vec<SnapshotId> {
    let is_own = |one: &&Candidate| one.schedule.as_ref() == Some(schedule) && one.taken_at <= now;
    let mut own: Vec<&Candidate> = snapshots.iter().filter(is_own).collect();
    own.sort_by(|a, b| (b.taken_at, &b.id).cmp(&(a.taken_at, &a.id)));
    let mut places = Places::new(keep);
    // Every place is offered to each, also when it is kept already: a day's newest snapshot is that of its week, too.
    let good = own.iter().filter(|one| one.verdict == Verdict::Good);
    let kept: Vec<&SnapshotId> =
        good.filter(|one| places.take(zone, one.taken_at)).map(|one| &one.id).collect();
    if kept.is_empty() {
        return Vec::new();
    }
    let goes = |one: &&&Candidate| !kept.contains(&&one.id) && !one.is_held && !one.is_used;
    own.iter().rev().filter(goes).map(|one| one.id.clone()).collect()
}

/// The places that a rule has, and what has been put into them, from the newest snapshot on.
struct Places {
    is_first: bool,
    left: BTreeMap<&'static str, u32>,
    /// The period that each part gave its last place to.
    filled: BTreeMap<&'static str, Period>,
}

/// A time that a place is for: which hour, day, week or month. The offset tells the two hours apart that are called
/// the same when clocks go back.
type Period = (i32, i32, i32);

impl Places {
    fn new(keep: &Keep) -> Self {
        Self { is_first: true, left: keep.parts().into_iter().collect(), filled: BTreeMap::new() }
    }

    /// Whether there is a place for the next older snapshot.
    fn take(&mut self, zone: &Zone, taken_at: Timestamp) -> bool {
        // The newest good one stays, whatever the rule says.
        let mut found = std::mem::take(&mut self.is_first);
        for (name, left) in &mut self.left {
            let period = period(name, zone, taken_at);
            let is_new = period.is_none() || self.filled.get(name) != period.as_ref();
            if *left > 0 && is_new {
                *left -= 1;
                found = true;
                if let Some(period) = period {
                    self.filled.insert(name, period);
                }
            }
        }
        found
    }
}

/// Which hour, day, week or month an instant is in; none for a part that has no periods.
fn period(name: &str, zone: &Zone, taken_at: Timestamp) -> Option<Period> {
    let at = zone.at(taken_at);
    let day = (i32::from(at.year()), i32::from(at.day_of_year()));
    match name {
        "hourly" => Some((day.0, day.1, i32::from(at.hour()) * 1_000_000 + at.offset().seconds())),
        "daily" => Some((day.0, day.1, 0)),
        "weekly" => {
            let week = at.date().iso_week_date();
            Some((i32::from(week.year()), i32::from(week.week()), 0))
        }
        "monthly" => Some((day.0, i32::from(at.month()), 0)),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
