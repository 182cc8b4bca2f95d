//! Approvals: what waits for a second person, and deciding on it.

use berth_api::manager::{Approval, ApprovalApprove, ApprovalDeny, ApprovalList, ApprovalState, Page};
use berth_model::access::Action;
use berth_model::{Problem, ProblemCode};

use super::{grant, list};
use crate::door::target::access::approval_resource;
use crate::door::target::{TheApproval, TheCluster};
use crate::door::{Answer, Call, Ctx, Door};
use crate::records::{RecordsError, Row, Transaction};

/// Mounts the routes of this file.
pub fn mount(door: Door) -> Door {
    door.mount(show_all).mount(approve).mount(deny)
}

async fn show_all(call: Call<ApprovalList, TheCluster>) -> Result<Answer<Page<Approval>>, Problem> {
    let (ctx, query) = (&call.ctx, &call.input.query);
    let (cluster, me) = (ctx.cluster(), ctx.user()?);
    let visible = ctx.visible(Action::ApprovalDecide);
    let mut approvals = cluster.records.list::<Approval>();
    approvals.retain(|row| {
        row.requested_by == me.id || visible.shows(row.segment.as_ref(), || approval_resource(cluster, row))
    });
    let key = |row: &std::sync::Arc<Row<Approval>>| format!("{:020} {}", row.created_at.as_millis(), row.id);
    approvals.sort_by_key(|row| std::cmp::Reverse(key(row)));
    let page = list::page_descending(&approvals, query.limit, query.cursor.as_deref(), key, |row| {
        row.value.clone()
    })?;
    Ok(Answer::new(page))
}

async fn approve(call: Call<ApprovalApprove, TheApproval>) -> Result<Answer<Approval>, Problem> {
    let ctx = &call.ctx;
    // A grant may come of it: what its role has, and that its segment is there, must stay so until it is written down.
    let _deciding = ctx.cluster().deciding().await;
    let row = undecided(ctx, &call.target.0)?;
    let mut transaction = Transaction::new();
    let mut decided = decided(ctx, &row, ApprovalState::Approved)?;
    if let Some(wish) = &row.grant {
        let grant = grant::granted(ctx, &row, wish)?;
        transaction.create(&grant);
        decided.state = ApprovalState::Used;
    }
    commit(ctx, transaction, &row, decided).await
}

async fn deny(call: Call<ApprovalDeny, TheApproval>) -> Result<Answer<Approval>, Problem> {
    let ctx = &call.ctx;
    let row = undecided(ctx, &call.target.0)?;
    let decided = decided(ctx, &row, ApprovalState::Denied)?;
    commit(ctx, Transaction::new(), &row, decided).await
}

/// The approval as it is now, if there is still something to decide, by somebody other than who asked.
fn undecided(ctx: &Ctx, row: &Row<Approval>) -> Result<std::sync::Arc<Row<Approval>>, Problem> {
    let row = ctx.cluster().records.require::<Approval>(&row.id)?;
    if row.state != ApprovalState::Pending {
        let state = serde_json::to_value(row.state).unwrap_or_default();
        let message = format!("{} is {} already", row.id, state.as_str().unwrap_or_default());
        return Err(Problem::new(ProblemCode::WrongState, message).at("approval", &row.id, "one that waits"));
    }
    if row.expires_at <= ctx.now() {
        let message = format!("{} expired at {}: it has to be asked for again", row.id, row.expires_at);
        return Err(Problem::new(ProblemCode::WrongState, message).at("approval", &row.id, "one that waits"));
    }
    if ctx.user()?.id == row.requested_by {
        let message = format!("{} is your own request: somebody else has to decide", row.id);
        return Err(Problem::new(ProblemCode::NotAllowed, message));
    }
    Ok(row)
}

fn decided(ctx: &Ctx, row: &Row<Approval>, state: ApprovalState) -> Result<Approval, Problem> {
    let mut approval = row.value.clone();
    approval.state = state;
    approval.decided_by = Some(ctx.user()?.name.clone());
    approval.approver = Some(ctx.user()?.id.clone()).filter(|_| state == ApprovalState::Approved);
    Ok(approval)
}

async fn commit(
    ctx: &Ctx,
    mut transaction: Transaction,
    row: &Row<Approval>,
    decided: Approval,
) -> Result<Answer<Approval>, Problem> {
    transaction.replace(row, &decided);
    match ctx.cluster().records.commit(transaction).await {
        Ok(revision) => Ok(Answer::new(decided).at(revision)),
        Err(RecordsError::Conflict { .. }) => {
            let message = format!("somebody else decided on {} at the same moment", row.id);
            Err(Problem::new(ProblemCode::Busy, message))
        }
        Err(error) => Err(error.into()),
    }
}
