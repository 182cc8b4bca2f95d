//! Reading the audit, and having it prove itself.

use axum::body::Body;
use berth_api::manager::{
    AuditCheckpoint, AuditCheckpointShow, AuditConsistencyShow, AuditExport, AuditInclusionShow, AuditKey,
    AuditKeyShow, AuditList, AuditListQuery, AuditRecord, ConsistencyProof, InclusionProof, Page,
};
use berth_model::{Problem, ProblemCode};
use http::Response;
use http::header::{CONTENT_DISPOSITION, CONTENT_TYPE, HeaderValue};

use super::list;
use crate::audit::format::Format;
use crate::audit::{ALLOW, AuditError, DENY, Filter};
use crate::door::target::TheCluster;
use crate::door::{Answer, Call, Done, Door};

/// Mounts the routes of this file.
pub fn mount(door: Door) -> Door {
    door.mount(show_all).mount(checkpoint).mount(key).mount(inclusion).mount(consistency).mount_raw(export)
}

async fn show_all(call: Call<AuditList, TheCluster>) -> Result<Answer<Page<AuditRecord>>, Problem> {
    let query = &call.input.query;
    let limit = list::limit_of(query.limit)?;
    let before = query.cursor.as_deref().map(before_of).transpose()?;
    let (audit, filter) = (&call.ctx.gate().audit, filter_of(query)?);
    if query.open == Some(true) {
        let mut items: Vec<AuditRecord> =
            audit.under_way().into_iter().rev().filter(|record| filter.takes(record)).collect();
        items.truncate(limit);
        return Ok(Answer::new(Page { items, next_cursor: None }));
    }
    let found = audit.newest(&filter, before, limit).await.map_err(|error| unreadable(&error))?;
    let next_cursor = found.more_below.map(|sequence| list::make_cursor(&sequence.to_string()));
    Ok(Answer::new(Page { items: found.records, next_cursor }))
}

fn filter_of(query: &AuditListQuery) -> Result<Filter, Problem> {
    let decision = query.decision.clone();
    if let Some(wrong) = decision.as_deref().filter(|decision| ![ALLOW, DENY].contains(decision)) {
        return Err(Problem::field("decision", wrong, "'allow' or 'deny'"));
    }
    Ok(Filter {
        actor: query.actor.clone(),
        action: query.action.clone(),
        resource: query.resource.clone(),
        decision,
        since: query.since,
        until: query.until,
    })
}

async fn checkpoint(call: Call<AuditCheckpointShow, TheCluster>) -> Result<Answer<AuditCheckpoint>, Problem> {
    Ok(Answer::new(call.ctx.gate().audit.checkpoint()))
}

async fn key(call: Call<AuditKeyShow, TheCluster>) -> Result<Answer<AuditKey>, Problem> {
    Ok(Answer::new(call.ctx.gate().audit.key()))
}

async fn inclusion(call: Call<AuditInclusionShow, TheCluster>) -> Result<Answer<InclusionProof>, Problem> {
    let query = &call.input.query;
    let sequence = query.sequence.ok_or_else(|| Problem::field("sequence", "", "a record's number"))?;
    let audit = &call.ctx.gate().audit;
    let size = audit.size();
    let wanted = query.size.unwrap_or(size);
    if wanted > size {
        return Err(Problem::field("size", wanted, format!("at most {size}, the log's size")));
    }
    if sequence >= wanted {
        return Err(Problem::field("sequence", sequence, format!("a number below {wanted}")));
    }
    let proof = audit.inclusion(sequence, Some(wanted)).await;
    Ok(Answer::new(proof.map_err(|error| unreadable(&error))?))
}

async fn consistency(
    call: Call<AuditConsistencyShow, TheCluster>,
) -> Result<Answer<ConsistencyProof>, Problem> {
    let query = &call.input.query;
    let audit = &call.ctx.gate().audit;
    let size = audit.size();
    let to = query.to.unwrap_or(size);
    if to > size {
        return Err(Problem::field("to", to, format!("at most {size}, the log's size")));
    }
    let from = query.from.ok_or_else(|| Problem::field("from", "", "the size of an older log"))?;
    if from == 0 || from > to {
        return Err(Problem::field("from", from, format!("1 to {to}")));
    }
    let proof = audit.consistency(from, Some(to)).await;
    Ok(Answer::new(proof.map_err(|error| unreadable(&error))?))
}

async fn export(call: Call<AuditExport, TheCluster>) -> Result<Done, Problem> {
    let query = &call.input.query;
    let name = query.format.as_deref().unwrap_or("jsonl");
    let format =
        Format::named(name).ok_or_else(|| Problem::field("format", name, "'jsonl', 'ocsf' or 'cef'"))?;
    let stream = call.ctx.gate().audit.export(format, query.since, query.until).await;
    let mut response = Response::new(Body::from_stream(stream.map_err(|error| unreadable(&error))?));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(format.content_type()));
    headers.insert(CONTENT_DISPOSITION, HeaderValue::from_static("attachment"));
    Ok(Done::streaming(response))
}

fn unreadable(error: &AuditError) -> Problem {
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
    let what = match error {
        AuditError::Store(_) => "the audit can't be read".to_owned(),
        other => other.to_string(),
    };
    Problem::new(ProblemCode::Internal, format!("{what}{cause}"))
}

fn before_of(cursor: &str) -> Result<u64, Problem> {
    let wrong = || Problem::field("cursor", cursor, "the next_cursor of an earlier page");
    list::open_cursor(cursor)?.parse().map_err(|_| wrong())
}
