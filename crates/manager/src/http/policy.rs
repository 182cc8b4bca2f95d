//! Policies that an operator writes, in Cedar: checked strictly, tried in shadow, then let count by two people.

use berth_api::manager::{
    Page, Policy, PolicyActivate, PolicyCreate, PolicyDeactivate, PolicyDelete, PolicyList, PolicyReport,
    PolicyShow,
};
use berth_model::access::Action;
use berth_model::{PolicyId, Problem, ProblemCode};

use super::list;
use crate::door::target::access::policy_resource;
use crate::door::target::{TheCluster, ThePolicy};
use crate::door::{Answer, Call, Ctx, Door};
use crate::policy::PolicyError;
use crate::policy::engine::{actions_of, permits};
use crate::policy::escalation::Gift;
use crate::records::{Record, Row, Transaction, UniqueName};

/// Longest text of one record, in bytes.
const TEXT_BYTES_MAX: usize = 64 * 1024;
/// Most records. Each counts in every decision.
const POLICIES_MAX: usize = 100;

/// Mounts the routes of this file.
pub fn mount(door: Door) -> Door {
    door.mount(show_all).mount(create).mount(show).mount(activate).mount(deactivate).mount(delete)
}

async fn show_all(call: Call<PolicyList, TheCluster>) -> Result<Answer<Page<Policy>>, Problem> {
    let query = &call.input.query;
    let visible = call.ctx.visible(Action::PolicyView);
    let mut all = call.ctx.cluster().records.list::<Policy>();
    all.retain(|row| visible.shows(None, || policy_resource(row)));
    let page = list::page(
        &all,
        query.limit,
        query.cursor.as_deref(),
        |row| row.id.clone(),
        |row| row.value.clone(),
    )?;
    Ok(Answer::new(page))
}

async fn create(call: Call<PolicyCreate, TheCluster>) -> Result<Answer<PolicyReport>, Problem> {
    let (ctx, wish) = (&call.ctx, &call.input.body);
    let cluster = ctx.cluster();
    let _deciding = cluster.deciding().await;
    if wish.text.len() > TEXT_BYTES_MAX {
        return Err(Problem::field("text", wish.text.len(), format!("at most {TEXT_BYTES_MAX} bytes")));
    }
    if cluster.records.list::<Policy>().len() >= POLICIES_MAX {
        return Err(Problem::field("name", &wish.name, format!("at most {POLICIES_MAX} policies")));
    }
    let policy = Policy {
        id: PolicyId::from_entropy(cluster.entropy.id()),
        name: wish.name.clone(),
        text: wish.text.clone(),
        active: false,
        written_by: ctx.actor(),
        created_at: ctx.now(),
    };
    let report = check(ctx, &policy)?;
    let mut transaction = Transaction::new();
    transaction.create(&policy);
    transaction.claim(&UniqueName::in_cluster(Policy::NOUN, &policy.name), policy.id.as_str());
    cluster.records.commit(transaction).await?;
    Ok(Answer::new(report))
}

/// Reads a policy as strictly as can be, and sees that it gives nothing that the caller does not have.
fn check(ctx: &Ctx, policy: &Policy) -> Result<PolicyReport, Problem> {
    let policies = &ctx.gate().policies;
    let unfit = |error: PolicyError| {
        Problem::field("text", &policy.name, format!("Cedar policies that fit the schema: {}", error.detail))
    };
    let parts = policies.engine().read(&policy.text).map_err(unfit)?;
    if parts.is_empty() {
        return Err(Problem::field("text", "", "at least one Cedar policy"));
    }
    let given = parts.iter().filter(|part| permits(part)).flat_map(actions_of);
    let actions: Vec<Action> = given.filter(|action| action.is_grantable()).collect();
    if !actions.is_empty() {
        policies.may_give(&ctx.principal, &[Gift { actions, segment: None, until: None }])?;
    }
    policies.report(policy).map_err(unfit)
}

async fn show(call: Call<PolicyShow, ThePolicy>) -> Result<Answer<PolicyReport>, Problem> {
    let report = report(&call.ctx, &call.target.0)?;
    Ok(Answer::new(report).at(call.target.0.revision))
}

fn report(ctx: &Ctx, policy: &Policy) -> Result<PolicyReport, Problem> {
    let failed = |error: PolicyError| Problem::new(ProblemCode::Internal, error.to_string());
    ctx.gate().policies.report(policy).map_err(failed)
}

async fn activate(call: Call<PolicyActivate, ThePolicy>) -> Result<Answer<PolicyReport>, Problem> {
    // Whoever lets it count must have what it gives, as whoever wrote it had then.
    check(&call.ctx, &call.target.0)?;
    set_active(&call.ctx, &call.target.0, true).await
}

async fn deactivate(call: Call<PolicyDeactivate, ThePolicy>) -> Result<Answer<PolicyReport>, Problem> {
    set_active(&call.ctx, &call.target.0, false).await
}

/// Exactly the text that was looked at, and approved, or nothing.
async fn set_active(ctx: &Ctx, row: &Row<Policy>, active: bool) -> Result<Answer<PolicyReport>, Problem> {
    let mut policy = row.value.clone();
    policy.active = active;
    let mut transaction = Transaction::new();
    transaction.replace(row, &policy);
    let revision = ctx.cluster().records.commit(transaction).await?;
    Ok(Answer::new(report(ctx, &policy)?).at(revision))
}

async fn delete(call: Call<PolicyDelete, ThePolicy>) -> Result<Answer<()>, Problem> {
    let (cluster, ThePolicy(policy)) = (call.ctx.cluster(), call.target);
    let mut transaction = Transaction::new();
    transaction.remove(&policy);
    transaction.release(&UniqueName::in_cluster(Policy::NOUN, &policy.name));
    cluster.records.commit(transaction).await?;
    Ok(Answer::new(()))
}
