//! When a schedule runs: five fields of cron, read by the clock of a time zone.
//!
//! Where clocks are set forward or back, cron has to say what it means, and this is what it means here:
//!
//! - A schedule for one time of a day (`30 2 * * *`) runs once each day. A time that does not exist on the day on which
//!   clocks go forward is made up for at the first moment after the gap; of a time that comes twice on the day on which
//!   they go back, the first counts.
//! - A schedule that repeats (`*/15 * * * *`, `0 * * * *`) keeps its pace in real time: it runs in both of the hours that
//!   are called the same, and not in the one that is not there.
//! - Fields are those of Vixie cron: when both days are restricted, either suffices. `L`, `W` and `#` may be used for days,
//!   and `@daily` and its like for all five.
//!
//! The evaluation is `croner`'s; the table in the tests holds it to these rules. The time zones are those of the IANA
//! database as this program was built with, so that the manager, the command line and a test never disagree; the
//! price is that a country's change of mind needs an update of Berth.

use std::fmt;
use std::str::FromStr;
use std::sync::LazyLock;

use croner::parser::{CronParser, Seconds, Year};
use jiff::Zoned;
use jiff::tz::{TimeZone, TimeZoneDatabase};
use serde::{Deserialize, Serialize};

use crate::Timestamp;

/// What a cron expression must look like, for error texts.
pub const CRON_RULE: &str = "five fields of cron, like '0 2 * * *' (minute, hour, day, month, weekday)";
/// What a time zone must look like, for error texts.
pub const ZONE_RULE: &str = "a name of the IANA time zone database, like 'Europe/Berlin', or 'UTC'";
/// Longest expression, in characters: each field may be a list, and nobody reads longer ones.
const CRON_CHARS_MAX: usize = 200;
/// How far missed runs are counted. More are as many.
const COUNT_MAX: u64 = 1000;

/// Text that is no cron expression, or one that never comes due.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not a cron expression ({detail}): expected {CRON_RULE}")]
pub struct CronError {
    /// What was given, cut to 80 characters.
    pub text: String,
    /// What is wrong with it.
    pub detail: String,
}

/// Text that is no time zone.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not a time zone: expected {ZONE_RULE}")]
pub struct ZoneError {
    /// What was given, cut to 80 characters.
    pub text: String,
}

/// When something is due.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String)]
pub struct Cron(Box<Parsed>);

#[derive(Clone, PartialEq, Eq)]
struct Parsed {
    text: String,
    fields: croner::Cron,
}

/// By which clock.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String)]
pub struct Zone(TimeZone);

static ZONES: LazyLock<TimeZoneDatabase> = LazyLock::new(TimeZoneDatabase::bundled);

impl Cron {
    /// The expression as it was given.
    pub fn as_str(&self) -> &str {
        &self.0.text
    }

    /// When it is due next, after this instant; none: never.
    pub fn next_after(&self, zone: &Zone, after: Timestamp) -> Option<Timestamp> {
        instant(&self.0.fields.find_next_occurrence(&zone.at(after), false).ok()?)
    }

    /// The next instants at which it is due.
    pub fn next(&self, zone: &Zone, after: Timestamp, count: usize) -> Vec<Timestamp> {
        std::iter::successors(self.next_after(zone, after), |last| self.next_after(zone, *last))
            .take(count)
            .collect()
    }

    /// When it was due last, up to and with this instant.
    fn latest_until(&self, zone: &Zone, until: Timestamp) -> Option<Timestamp> {
        instant(&self.0.fields.find_previous_occurrence(&zone.at(until), true).ok()?)
    }
}

impl Zone {
    /// Universal time.
    pub const UTC: Self = Self(TimeZone::UTC);

    /// Its name in the IANA database.
    pub fn as_str(&self) -> &str {
        self.0.iana_name().unwrap_or("UTC")
    }

    /// What its clock shows at this instant.
    pub(super) fn civil(&self, at: Timestamp) -> jiff::civil::DateTime {
        self.at(at).datetime()
    }

    /// This instant by its clock, to the second.
    pub(super) fn at(&self, at: Timestamp) -> Zoned {
        let second = i64::try_from(at.as_millis() / 1000).unwrap_or(i64::MAX);
        let at = jiff::Timestamp::from_second(second).unwrap_or(jiff::Timestamp::MAX);
        at.to_zoned(self.0.clone())
    }
}

fn instant(zoned: &Zoned) -> Option<Timestamp> {
    u64::try_from(zoned.timestamp().as_millisecond()).ok().map(Timestamp::from_millis)
}

/// What came due in some time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Passed {
    /// The latest of it.
    pub latest: Option<Timestamp>,
    /// How often it came due; counted no further than 1000.
    pub count: u64,
}

/// What came due after one instant, up to and with another.
pub(super) fn occasions_between(cron: &Cron, zone: &Zone, after: Timestamp, until: Timestamp) -> Passed {
    let latest = cron.latest_until(zone, until).filter(|latest| *latest > after);
    let mut count = 0;
    let mut next = latest.and_then(|_| cron.next_after(zone, after));
    while let Some(at) = next.filter(|at| *at <= until && count < COUNT_MAX) {
        count += 1;
        next = cron.next_after(zone, at);
    }
    Passed { latest, count }
}

impl FromStr for Cron {
    type Err = CronError;
    fn from_str(text: &str) -> Result<Self, CronError> {
        let wrong =
            |detail: &str| CronError { text: text.chars().take(80).collect(), detail: detail.to_owned() };
        if text.chars().count() > CRON_CHARS_MAX {
            return Err(wrong("it is too long"));
        }
        let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
        let fields = parser.parse(text).map_err(|error| wrong(&error.to_string()))?;
        let cron = Self(Box::new(Parsed { text: text.to_owned(), fields }));
        // The thirtieth of February: asked of a day on which leap years are near.
        let some_day = Timestamp::from_millis(1_700_000_000_000);
        if cron.next_after(&Zone::UTC, some_day).is_none() {
            return Err(wrong("it never comes due"));
        }
        Ok(cron)
    }
}

impl FromStr for Zone {
    type Err = ZoneError;
    fn from_str(text: &str) -> Result<Self, ZoneError> {
        let wrong = || ZoneError { text: text.chars().take(80).collect() };
        if text == "UTC" {
            return Ok(Self::UTC);
        }
        ZONES.get(text).map(Self).map_err(|_| wrong())
    }
}

impl TryFrom<String> for Cron {
    type Error = CronError;
    fn try_from(text: String) -> Result<Self, CronError> {
        text.parse()
    }
}

impl TryFrom<String> for Zone {
    type Error = ZoneError;
    fn try_from(text: String) -> Result<Self, ZoneError> {
        text.parse()
    }
}

impl From<Cron> for String {
    fn from(cron: Cron) -> String {
        cron.0.text
    }
}

impl From<Zone> for String {
    fn from(zone: Zone) -> String {
        zone.as_str().to_owned()
    }
}

impl fmt::Display for Cron {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

impl fmt::Debug for Cron {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

impl fmt::Display for Zone {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

impl fmt::Debug for Zone {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests;
