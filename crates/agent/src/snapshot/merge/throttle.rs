//! How fast layers may be merged, by what the VM's own guest feels of it.
//!
//! QEMU counts the guest's requests to its disks and what they took. Before a merge begins the usual time is taken; while
//! it goes on, the time of each moment is held against that. A guest that waits clearly longer halves the pace, one that
//! does not raises it again. There is always a least pace, so that a merge ends, whatever the guest does.

use std::time::Duration;

use berth_qmp::Qmp;
use berth_qmp::commands::{QueryBlockstats, RequestStatistics};

use crate::disk::pace::Pace;
use crate::qemu::is_disk;

/// How often the guest's requests are looked at. Shorter: too few of them for a mean. Longer: a guest is disturbed for
/// longer before it is noticed.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How many looks say what is usual before the merge begins.
const LOOKS_BEFORE: u32 = 4;
/// The pace at the beginning, in bytes a second.
const FIRST_PACE: u64 = 16 << 20;
/// The least pace. Less: a chain may grow faster than it is merged. More: a guest on a slow disk feels it.
const LEAST_PACE: u64 = 2 << 20;
/// The most. More: other VMs of the host feel it, which nobody watches.
const MOST_PACE: u64 = 256 << 20;
/// By how much longer than usual a request may take before that counts, beside half as long again, in microseconds:
/// what a request to a quiet disk takes anyhow.
const TOLERANCE_US: u64 = 1000;

/// What requests took on average between two looks, in microseconds; none when there were none.
fn mean_us(before: &RequestStatistics, now: &RequestStatistics) -> Option<u64> {
    let count = |sums: &RequestStatistics| sums.reads + sums.writes + sums.flushes;
    let time = |sums: &RequestStatistics| sums.read_ns + sums.write_ns + sums.flush_ns;
    let requests = count(now).checked_sub(count(before))?;
    (time(now).saturating_sub(time(before)) / 1000).checked_div(requests)
}

/// The next pace, when requests take `now_us` and usually take `usual_us`.
fn next_pace(pace: u64, usual_us: Option<u64>, now_us: Option<u64>) -> u64 {
    let disturbed = match (usual_us, now_us) {
        (Some(usual), Some(now)) => now > usual + (usual / 2).max(TOLERANCE_US),
        // Nothing to hold it against: what is well is what a quiet disk would take.
        (None, Some(now)) => now > 10 * TOLERANCE_US,
        (_, None) => false,
    };
    let next = if disturbed { pace / 2 } else { pace + pace / 4 };
    next.clamp(LEAST_PACE, MOST_PACE)
}

/// Keeps a merge's pace by what the guest feels.
#[derive(Debug)]
pub struct Throttle {
    qmp: Option<Qmp>,
    usual_us: Option<u64>,
    last: RequestStatistics,
}

impl Throttle {
    /// Takes what is usual; for a VM without a process nothing is, and nobody is disturbed.
    pub async fn learn(qmp: Option<Qmp>) -> Self {
        let mut throttle = Self { qmp, usual_us: None, last: RequestStatistics::default() };
        let Some(first) = throttle.look().await else { return throttle };
        throttle.last = first;
        for _ in 0..LOOKS_BEFORE {
            let mean = throttle.next_mean().await;
            throttle.usual_us = throttle.usual_us.max(mean);
        }
        throttle
    }

    /// The pace to begin with, in bytes a second.
    pub const fn first_pace(&self) -> u64 {
        if self.qmp.is_some() { FIRST_PACE } else { MOST_PACE }
    }

    /// Sets the pace until it is dropped.
    pub async fn run(mut self, pace: &Pace) {
        let mut now = self.first_pace();
        loop {
            let mean = self.next_mean().await;
            let next = next_pace(now, self.usual_us, mean);
            if next < now {
                tracing::debug!(?mean, usual = ?self.usual_us, pace = next, "a merge goes slower for the guest");
            }
            now = next;
            pace.set(now);
        }
    }

    async fn next_mean(&mut self) -> Option<u64> {
        tokio::time::sleep(LOOK_EVERY).await;
        let now = self.look().await?;
        let mean = mean_us(&self.last, &now);
        self.last = now;
        mean
    }

    async fn look(&self) -> Option<RequestStatistics> {
        let drives = self.qmp.as_ref()?.call(QueryBlockstats {}).await.ok()?;
        let ours = |qdev: &str| qdev.split('/').any(is_disk);
        let ours = drives.into_iter().filter(|drive| drive.qdev.as_deref().is_some_and(ours));
        ours.map(|drive| drive.stats).reduce(|sum, one| together(&sum, &one))
    }
}

/// What the guest's requests to two disks come to.
const fn together(one: &RequestStatistics, other: &RequestStatistics) -> RequestStatistics {
    RequestStatistics {
        reads: one.reads + other.reads,
        writes: one.writes + other.writes,
        flushes: one.flushes + other.flushes,
        read_ns: one.read_ns + other.read_ns,
        write_ns: one.write_ns + other.write_ns,
        flush_ns: one.flush_ns + other.flush_ns,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_is_of_what_was_done_in_between() {
        let before = RequestStatistics { reads: 5, read_ns: 5_000_000, ..RequestStatistics::default() };
        let now =
            RequestStatistics { writes: 2, write_ns: 3_000_000, flushes: 1, flush_ns: 6_000_000, ..before };
        assert_eq!(mean_us(&before, &now), Some(3000));
        assert_eq!(mean_us(&now, &now), None);
        assert_eq!(mean_us(&now, &before), None, "another process, which counts anew");
        assert_eq!(mean_us(&together(&before, &before), &together(&now, &before)), Some(3000));
    }

    #[test]
    fn a_guest_that_waits_slows_the_merge_down_and_never_stops_it() {
        let mut pace = FIRST_PACE;
        assert!(next_pace(pace, Some(500), Some(1200)) > pace, "that is nothing yet");
        for _ in 0..20 {
            pace = next_pace(pace, Some(500), Some(5000));
        }
        assert_eq!(pace, LEAST_PACE);
        for _ in 0..60 {
            pace = next_pace(pace, Some(500), None);
        }
        assert_eq!(pace, MOST_PACE);
        assert!(next_pace(pace, Some(20_000), Some(25_000)) >= pace, "a slow disk is as usual");
        assert!(next_pace(pace, Some(20_000), Some(31_000)) < pace);
    }
}
