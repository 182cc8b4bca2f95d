//! What is written down of a request before it runs. No secret is among it: of the request only method and path.

use berth_api::manager::AuditRecord;

use super::arrival::Arrival;
use crate::audit::{ALLOW, DENY};
use crate::auth::Principal;
use crate::policy::{Decision, Resource};

/// The record of a request, as it is when it begins.
pub(super) fn record(
    arrival: &Arrival,
    principal: &Principal,
    resource: &Resource,
    decision: &Decision,
) -> AuditRecord {
    AuditRecord {
        request_id: arrival.request_id.clone(),
        actor: principal.actor(),
        actor_id: id_of(principal),
        method: principal.method().0.to_owned(),
        address: arrival.caller.remote.to_string(),
        action: arrival.action.as_str().to_owned(),
        request: arrival.request.clone(),
        resources: vec![resource.label().to_owned()],
        decision: if decision.allowed { ALLOW } else { DENY }.to_owned(),
        reason: decision.reason.clone(),
        policies: decision.by.clone(),
        policy_hash: decision.policy_hash.clone(),
        started_at: arrival.started_at,
        ..AuditRecord::default()
    }
}

/// The id that is never used again. A join token has only the hash it is kept under, which is nobody's business.
fn id_of(principal: &Principal) -> String {
    match principal {
        Principal::User(user) => user.id.to_string(),
        Principal::Host(host) => host.to_string(),
        Principal::JoinToken(_) | Principal::Anonymous => String::new(),
    }
}
