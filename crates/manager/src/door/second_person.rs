//! Four eyes: requests that a guard holds until another person has approved that very request.
//!
//! The first time such a request comes, it is refused, and what was asked for is written down as an approval that
//! waits. Another user who may decide approves it; then the same user may make the same request again, once, before
//! it expires. "The same" is a hash over who asks, the route, what it is about by id, and all that it says: another
//! snapshot, another VM of the same name or another user is another request.

use std::sync::Arc;

use berth_api::endpoint::Endpoint;
use berth_api::manager::{Approval, ApprovalState, User};
use berth_model::access::Action;
use berth_model::{ApprovalId, Problem, ProblemCode, Timestamp};
use serde::Serialize;

use super::target::access::approval_resource;
use super::{Gate, Input};
use crate::auth::{Principal, UserPrincipal};
use crate::cluster::Cluster;
use crate::digest::sha256_hex;
use crate::policy::Resource;
use crate::records::{Row, Transaction};

/// How long an approval waits and, once given, can be used, in milliseconds: a day. Longer, and what was approved is
/// about a cluster that has changed since.
pub const APPROVAL_KEPT_MS: u64 = 24 * 3600 * 1000;
/// Most approvals that one user may have waiting: a person has to read them.
pub(crate) const WAITING_MAX: usize = 50;
/// What is shown of a query, at most, in characters.
const REQUEST_CHARS_MAX: usize = 500;

/// A request that needs a second person.
pub struct Wanted<'a> {
    /// Who asks.
    pub user: &'a UserPrincipal,
    /// What for.
    pub action: Action,
    /// About what.
    pub resource: &'a Resource,
    /// Method, path and query.
    pub request: String,
    /// The request's hash.
    pub sha256: String,
    /// Why it needs a second person.
    pub about: &'a str,
    /// Whether it only tries.
    pub dry_run: bool,
}

#[derive(Serialize)]
struct Hashed<'a, P, Q, B> {
    user: &'a str,
    endpoint: &'a str,
    kind: &'a str,
    id: &'a str,
    path: &'a P,
    query: &'a Q,
    body: &'a B,
}

/// SHA-256 over all that a request is, in hexadecimal.
pub fn hash_of<E: Endpoint>(user: &UserPrincipal, resource: &Resource, input: &Input<E>) -> String {
    let hashed = Hashed {
        user: user.id.as_str(),
        endpoint: E::NAME,
        kind: resource.kind().noun(),
        id: resource.id(),
        path: &input.path,
        query: &input.query,
        body: &input.body,
    };
    sha256_hex(&serde_json::to_vec(&hashed).expect("parts of the contract are plain data"))
}

/// Uses up the approval of this request, if there is one; else the request waits for one.
///
/// # Errors
/// [`ProblemCode::ApprovalNeeded`], naming the approval that it waits for.
pub async fn pass(gate: &Gate, wanted: &Wanted<'_>) -> Result<ApprovalId, Problem> {
    let (cluster, now) = (&*gate.cluster, gate.policies.now());
    if !wanted.dry_run
        && let Some(id) = use_up(gate, wanted, now).await?
    {
        return Ok(id);
    }
    let id = if wanted.dry_run { None } else { Some(wait_for(cluster, wanted, now).await?) };
    Err(needed(wanted, id.as_ref()))
}

fn is_this(approval: &Approval, wanted: &Wanted<'_>, now: Timestamp) -> bool {
    approval.requested_by == wanted.user.id
        && approval.request_sha256 == wanted.sha256
        && approval.grant.is_none()
        && now < approval.expires_at
}

/// Whether who approved could still do so: one who has lost that right may have lost it for a reason.
fn still_decides(gate: &Gate, approval: &Approval) -> bool {
    let approver = approval.approver.as_ref().and_then(|id| gate.cluster.records.get::<User>(id.as_str()));
    approver.filter(|user| !user.disabled).is_some_and(|user| {
        let resource = approval_resource(&gate.cluster, approval);
        gate.policies.look(&Principal::as_if(&user), Action::ApprovalDecide, &resource, false).allowed
    })
}

async fn use_up(gate: &Gate, wanted: &Wanted<'_>, now: Timestamp) -> Result<Option<ApprovalId>, Problem> {
    let good = |one: &Approval| one.state == ApprovalState::Approved && is_this(one, wanted, now);
    let approved = gate.cluster.records.list_where::<Approval>(good);
    let Some(row) = approved.into_iter().find(|row| still_decides(gate, row)) else { return Ok(None) };
    let used = gate.cluster.records.update::<Approval, Problem>(&row.id, |approval| {
        if !good(approval) {
            return Err(needed(wanted, None));
        }
        approval.state = ApprovalState::Used;
        Ok(())
    });
    Ok(Some(used.await?.value.id.clone()))
}

async fn wait_for(cluster: &Cluster, wanted: &Wanted<'_>, now: Timestamp) -> Result<ApprovalId, Problem> {
    // Two of the same request at once must wait for one approval.
    let _deciding = cluster.deciding().await;
    if let Some(known) = waiting(cluster, wanted.user, now, |one| is_this(one, wanted, now))? {
        return Ok(known.value.id.clone());
    }
    let approval = Approval {
        id: ApprovalId::from_entropy(cluster.entropy.id()),
        requested_by: wanted.user.id.clone(),
        requester: wanted.user.name.clone(),
        action: wanted.action,
        resource: wanted.resource.label().to_owned(),
        segment: wanted.resource.segment(),
        request: wanted.request.chars().take(REQUEST_CHARS_MAX).collect(),
        request_sha256: wanted.sha256.clone(),
        reason: wanted.about.to_owned(),
        grant: None,
        state: ApprovalState::Pending,
        decided_by: None,
        approver: None,
        created_at: now,
        expires_at: now.plus_millis(APPROVAL_KEPT_MS),
    };
    let mut transaction = Transaction::new();
    transaction.create(&approval);
    cluster.records.commit(transaction).await?;
    Ok(approval.id)
}

/// The user's request that waits already and is the one meant; none: there is room for another.
///
/// # Errors
/// [`ProblemCode::Busy`] when there is no room.
pub(crate) fn waiting(
    cluster: &Cluster,
    user: &UserPrincipal,
    now: Timestamp,
    is_meant: impl Fn(&Approval) -> bool,
) -> Result<Option<Arc<Row<Approval>>>, Problem> {
    let waits = |one: &Approval| one.state == ApprovalState::Pending && now < one.expires_at;
    let mine = cluster.records.list_where::<Approval>(|one| one.requested_by == user.id && waits(one));
    let count = mine.len();
    let known = mine.into_iter().find(|row| is_meant(row));
    if known.is_none() && count >= WAITING_MAX {
        let message = format!("{WAITING_MAX} requests of {} wait for approval already", user.name);
        return Err(Problem::new(ProblemCode::Busy, message));
    }
    Ok(known)
}

fn needed(wanted: &Wanted<'_>, id: Option<&ApprovalId>) -> Problem {
    let how = match id {
        Some(id) => format!(
            "ask somebody else who may decide for 'berth approval approve {id}', then make the same request again"
        ),
        None => "the request has to be made for real to be put up for approval".to_owned(),
    };
    let message = format!("{} needs a second person: {how}", wanted.about);
    let problem = Problem::new(ProblemCode::ApprovalNeeded, message);
    match id {
        Some(id) => problem.at("approval", id, "approved by another user"),
        None => problem,
    }
}
