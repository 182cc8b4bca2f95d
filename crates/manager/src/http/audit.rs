//! Reading the audit.

use berth_api::manager::{AuditList, AuditRecord, Page};
use berth_model::{Problem, ProblemCode};

use super::list;
use crate::door::target::TheCluster;
use crate::door::{Answer, Call, Door};

/// Mounts the routes of this file.
pub fn mount(door: Door) -> Door {
    door.mount(show_all)
}

async fn show_all(call: Call<AuditList, TheCluster>) -> Result<Answer<Page<AuditRecord>>, Problem> {
    let query = &call.input.query;
    let limit = list::limit_of(query.limit)?;
    let before = query.cursor.as_deref().map(before_of).transpose()?;
    let (items, more) = call.ctx.gate().audit.newest(before, limit).await.map_err(|error| {
        let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
        Problem::new(ProblemCode::Internal, format!("the audit can't be read{cause}"))
    })?;
    let last = items.last().map(|record| record.sequence);
    let next_cursor = last.filter(|_| more).map(|sequence| list::make_cursor(&sequence.to_string()));
    Ok(Answer::new(Page { items, next_cursor }))
}

fn before_of(cursor: &str) -> Result<u64, Problem> {
    let wrong = || Problem::field("cursor", cursor, "the next_cursor of an earlier page");
    list::open_cursor(cursor)?.parse().map_err(|_| wrong())
}
