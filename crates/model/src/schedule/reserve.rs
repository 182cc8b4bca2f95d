//! The reserve of a pool: what has to stay free of it, so that guests can go on writing.
//!
//! A pool below its reserve stops schedules and nothing else: what a person asks for, a person may have. Below twice the
//! reserve it is warned of. When the reserve will be reached is estimated from what the schedule itself added in its last
//! run, less what it freed: a schedule whose rule is full adds little, and one that has just begun a lot.

use serde::{Deserialize, Serialize};

use crate::Timestamp;
use crate::host::PoolReport;
use crate::name::Name;

/// What part of a pool has to stay free when nothing is said, in percent. Less, and a guest that fills its disk meets a
/// full pool before anybody has read the warning. More is room that nobody uses.
pub const RESERVE_PERCENT: u8 = 10;
/// The most that may be asked for: a pool that keeps more is of no use to guests.
pub const RESERVE_PERCENT_MAX: u8 = 90;

/// How far ahead an estimate is worth saying: ten years.
const SEEN_AHEAD_MS: u64 = 10 * 365 * 24 * 60 * 60 * 1000;

/// How far a pool is from its reserve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Room {
    /// More than twice the reserve is free.
    Ample,
    /// Less than that.
    Low,
    /// Less than the reserve: schedules stop.
    Below,
}

/// A pool that a schedule's snapshots are in, on one host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PoolRoom {
    /// The host's name.
    pub host: Name,
    /// The pool.
    pub pool: Name,
    /// How far it is from its reserve.
    pub room: Room,
    /// What is free, in bytes.
    pub free_bytes: u64,
    /// What has to stay free, in bytes.
    pub reserve_bytes: u64,
    /// What is missing to the reserve, in bytes; 0 unless it is below.
    pub missing_bytes: u64,
    /// When the reserve will be reached if the schedule goes on as in its last run; none: not as far as can be seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reached_at: Option<Timestamp>,
}

/// How far a pool is from its reserve.
pub const fn room(pool: &PoolReport) -> Room {
    if pool.free_bytes < pool.reserve_bytes {
        Room::Below
    } else if pool.free_bytes < pool.reserve_bytes.saturating_mul(2) {
        Room::Low
    } else {
        Room::Ample
    }
}

/// What is missing to the reserve, in bytes.
pub const fn missing_bytes(pool: &PoolReport) -> u64 {
    pool.reserve_bytes.saturating_sub(pool.free_bytes)
}

/// When the reserve will be reached if each run adds so much, and runs come at such a pace; none: not within
/// [`SEEN_AHEAD_MS`].
pub fn reached_at(pool: &PoolReport, added_bytes: u64, every_ms: u64, now: Timestamp) -> Option<Timestamp> {
    let left = pool.free_bytes.saturating_sub(pool.reserve_bytes);
    let runs = left.checked_div(added_bytes)?;
    let ahead_ms = runs.saturating_mul(every_ms);
    (ahead_ms <= SEEN_AHEAD_MS).then(|| now.plus_millis(ahead_ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(free_bytes: u64) -> PoolReport {
        PoolReport {
            name: "default".parse().expect("a name"),
            pool_uuid: "one".to_owned(),
            size_bytes: 1000,
            free_bytes,
            reserve_bytes: 100,
        }
    }

    #[test]
    fn a_pool_warns_at_twice_its_reserve_and_stops_below_it() {
        for (free, expected, missing) in [
            (1000, Room::Ample, 0),
            (200, Room::Ample, 0),
            (199, Room::Low, 0),
            (100, Room::Low, 0),
            (99, Room::Below, 1),
            (0, Room::Below, 100),
        ] {
            assert_eq!((room(&pool(free)), missing_bytes(&pool(free))), (expected, missing), "{free} free");
        }
    }

    #[test]
    fn the_end_is_seen_from_what_a_run_adds() {
        let now = Timestamp::from_millis(1000);
        let hour = 3_600_000;
        assert_eq!(reached_at(&pool(600), 50, hour, now), Some(now.plus_millis(10 * hour)));
        assert_eq!(reached_at(&pool(100), 50, hour, now), Some(now));
        assert_eq!(reached_at(&pool(600), 0, hour, now), None);
        assert_eq!(reached_at(&pool(600), 1, 8760 * hour, now), None, "five hundred years ahead");
    }
}
