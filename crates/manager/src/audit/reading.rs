//! Finding records: newest first, tile by tile.

use berth_api::manager::AuditRecord;
use berth_model::Timestamp;
use berth_tlog::tile::TILE_LEAVES;
use bytes::Bytes;

use super::{Audit, AuditError, layout};

/// Most records that one question looks at. A page that comes out short says where to go on.
const LOOKED_AT_MAX: u64 = 100_000;

/// Which records.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Of this actor: name or id.
    pub actor: Option<String>,
    /// Of this action, or of all actions of this noun.
    pub action: Option<String>,
    /// About this, with or without its noun in front.
    pub resource: Option<String>,
    /// Decided so.
    pub decision: Option<String>,
    /// Ended then or later.
    pub since: Option<Timestamp>,
    /// Ended before.
    pub until: Option<Timestamp>,
}

impl Filter {
    /// Whether this is one of them.
    pub fn takes(&self, record: &AuditRecord) -> bool {
        let is = |wanted: &Option<String>, found: &[&str]| {
            wanted.as_ref().is_none_or(|wanted| found.contains(&wanted.as_str()))
        };
        let noun = record.action.split('.').next().unwrap_or_default();
        let about = |wanted: &String| {
            record
                .resources
                .iter()
                .any(|label| label == wanted || label.split_once(':').is_some_and(|(_, name)| name == wanted))
        };
        let at = time_of(record);
        is(&self.actor, &[&record.actor, &record.actor_id])
            && is(&self.action, &[&record.action, noun])
            && is(&self.decision, &[&record.decision])
            && self.resource.as_ref().is_none_or(about)
            && self.since.is_none_or(|since| at >= since)
            && self.until.is_none_or(|until| at < until)
    }
}

/// When a record came into the log, as far as it says so.
pub(super) fn time_of(record: &AuditRecord) -> Timestamp {
    record.finished_at.unwrap_or(record.started_at)
}

/// Some records, newest first.
#[derive(Debug, Default)]
pub struct Found {
    /// The records.
    pub records: Vec<AuditRecord>,
    /// Where there may be more: below this number.
    pub more_below: Option<u64>,
}

impl Audit {
    /// Records with numbers below `before` (the newest ones, if none is given) that the filter takes, newest first.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn newest(
        &self,
        filter: &Filter,
        before: Option<u64>,
        limit: usize,
    ) -> Result<Found, AuditError> {
        let mut below = before.unwrap_or(u64::MAX).min(self.size());
        let give_up = below.saturating_sub(LOOKED_AT_MAX);
        let mut records = Vec::new();
        while below > give_up {
            let tile = (below - 1) / TILE_LEAVES;
            let lines = layout::lines_of(&**self.store(), tile).await?;
            let mut is_too_old = filter.since.is_some();
            for sequence in (tile * TILE_LEAVES..below).rev() {
                if records.len() == limit {
                    return Ok(Found { records, more_below: Some(sequence + 1) });
                }
                let offset = usize::try_from(sequence % TILE_LEAVES).unwrap_or(usize::MAX);
                let line = lines.get(offset).ok_or_else(|| layout::damaged(&format!("record {sequence}")))?;
                let record = layout::record_of(line)?;
                is_too_old &= filter.since.is_some_and(|since| time_of(&record) < since);
                if filter.takes(&record) {
                    records.push(record);
                }
            }
            below = tile * TILE_LEAVES;
            // Clocks are set back now and then, but not over a whole tile of records.
            if is_too_old {
                return Ok(Found { records, more_below: None });
            }
        }
        Ok(Found { records, more_below: (below > 0).then_some(below) })
    }

    /// The lines of the records of one tile, from `first` on, as far as there are any: up to 256.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn lines_from(&self, first: u64) -> Result<Vec<Bytes>, AuditError> {
        let size = self.size();
        let mut lines = layout::lines_of(&**self.store(), first / TILE_LEAVES).await?;
        let start = usize::try_from(first % TILE_LEAVES).unwrap_or(usize::MAX);
        let known = usize::try_from(size.saturating_sub(first - first % TILE_LEAVES)).unwrap_or(usize::MAX);
        lines.truncate(known);
        Ok(if start >= lines.len() { Vec::new() } else { lines.split_off(start) })
    }

    /// The first record of the first tile in which something ended at or after this time.
    pub(super) async fn first_since(&self, since: Timestamp, size: u64) -> Result<u64, AuditError> {
        let (mut low, mut high) = (0, size.div_ceil(TILE_LEAVES));
        while low < high {
            let middle = low.midpoint(high);
            let lines = layout::lines_of(&**self.store(), middle).await?;
            let last = lines.last().map(|line| layout::record_of(line)).transpose()?;
            if last.is_some_and(|record| time_of(&record) < since) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        Ok((low * TILE_LEAVES).min(size))
    }
}
