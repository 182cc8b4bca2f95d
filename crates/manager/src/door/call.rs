//! What a handler is given.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::body::Body;
use berth_api::endpoint::Endpoint;
use berth_model::access::Action;
use berth_model::{Problem, ProblemCode, SegmentId, Timestamp};
use berth_store::Revision;
use http::HeaderMap;
use http::header::IF_MATCH;
use http::request::Parts;

use super::target::{self, Located, TheHost, TheImage, TheRepository, TheSegment, TheSnapshot, TheVm};
use super::{Arrival, Gate, Input};
use crate::audit::Named;
use crate::auth::{Principal, UserPrincipal};
use crate::cluster::Cluster;
use crate::policy::visible::Visible;
use crate::policy::{Decision, Resource};

/// A request that was let through.
pub struct Call<E: Endpoint, T> {
    /// Who asks, and the cluster.
    pub ctx: Ctx,
    /// What it is about.
    pub target: T,
    /// Path, query and body.
    pub input: Input<E>,
    /// The request's head, for handlers that take the connection over.
    pub parts: Parts,
    /// The body of an upload; empty for other routes, whose body is in `input`.
    pub body: Body,
}

impl<E: Endpoint, T> Call<E, T> {
    /// The revision that the caller wants to change, and no other.
    ///
    /// # Errors
    /// When the header is there and is not an entity tag of ours.
    pub fn if_match(&self) -> Result<Option<Revision>, Problem> {
        if_match(&self.parts.headers)
    }
}

fn if_match(headers: &HeaderMap) -> Result<Option<Revision>, Problem> {
    let Some(value) = headers.get(IF_MATCH) else { return Ok(None) };
    let text = value.to_str().unwrap_or_default().trim();
    if text == "*" {
        return Ok(None);
    }
    let number = text.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
    let revision = number.and_then(|number| number.parse().ok()).map(Revision);
    let wrong = || Problem::field("If-Match", text, "the ETag of an earlier answer, like \"42\", or *");
    revision.map(Some).ok_or_else(wrong)
}

/// Who asks, and what a handler may use to answer.
#[derive(Clone)]
pub struct Ctx {
    gate: Arc<Gate>,
    /// Who asks.
    pub principal: Principal,
    /// The request's id.
    pub request_id: String,
    /// From where.
    pub remote: SocketAddr,
    /// A second person has approved this very request.
    pub approved: bool,
    named: Named,
}

impl Ctx {
    pub(super) fn new(gate: Arc<Gate>, principal: Principal, arrival: &Arrival, approved: bool) -> Self {
        let (request_id, remote) = (arrival.request_id.clone(), arrival.caller.remote);
        Self { gate, principal, request_id, remote, approved, named: arrival.named.clone() }
    }

    /// Notes in the record that the request is about this as well (`user:ada`).
    pub fn about(&self, label: &str) {
        self.named.add(label);
    }

    /// The cluster.
    pub fn cluster(&self) -> &Arc<Cluster> {
        &self.gate.cluster
    }

    /// The door's own parts: policies, audit, metrics.
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// Who asks, for operations and records.
    pub fn actor(&self) -> String {
        self.principal.actor()
    }

    /// What time it is.
    pub fn now(&self) -> Timestamp {
        self.gate.cluster.clock.now()
    }

    /// What the policies say about another action of the same caller.
    pub fn decide(&self, action: Action, resource: &Resource) -> Decision {
        self.gate.policies.decide(&self.principal, action, resource, false)
    }

    /// What the caller may see by this action, for lists.
    pub fn visible(&self, action: Action) -> Visible {
        Visible::new(Arc::clone(&self.gate), &self.principal, action)
    }

    /// The caller, which is a user.
    ///
    /// # Errors
    /// When it is none.
    pub fn user(&self) -> Result<&UserPrincipal, Problem> {
        match &self.principal {
            Principal::User(user) => Ok(user),
            _ => Err(Problem::new(ProblemCode::NotAllowed, "this is for users")),
        }
    }

    /// Refuses unless the caller may do this to the thing.
    ///
    /// # Errors
    /// [`ProblemCode::NotAllowed`].
    pub fn require(&self, action: Action, resource: &Resource) -> Result<(), Problem> {
        if self.decide(action, resource).allowed {
            return Ok(());
        }
        Err(self.gate.not_allowed(action, &self.principal, resource))
    }

    /// A further VM that the request names, if the caller may do this to it.
    ///
    /// # Errors
    /// That it is not there, or that the caller may not: told apart only for who could touch it if it were there.
    pub fn vm(&self, name: &str, action: Action) -> Result<TheVm, Problem> {
        self.checked(target::vm(self.cluster(), name), action, &target::absent_vm(name))
    }

    /// A further snapshot of a VM that the request names.
    ///
    /// # Errors
    /// As [`Self::vm`].
    pub fn snapshot(&self, vm: &str, name: &str, action: Action) -> Result<TheSnapshot, Problem> {
        let found = target::named_snapshot(self.cluster(), vm, name);
        self.checked(found, action, &target::absent_vm(vm))
    }

    /// A further host that the request names.
    ///
    /// # Errors
    /// As [`Self::vm`].
    pub fn host(&self, name: &str, action: Action) -> Result<TheHost, Problem> {
        self.checked(target::host(self.cluster(), name), action, &target::absent_host(name))
    }

    /// A further image that the request names for use in a segment: one of the segment's own goes first.
    ///
    /// # Errors
    /// As [`Self::vm`].
    pub fn image_for(&self, segment: &SegmentId, name: &str, action: Action) -> Result<TheImage, Problem> {
        let found = target::image_for(self.cluster(), segment, name);
        self.checked(found, action, &target::absent_image(name))
    }

    /// A further repository that the request names.
    ///
    /// # Errors
    /// As [`Self::vm`].
    pub fn repository(&self, name: &str, action: Action) -> Result<TheRepository, Problem> {
        let found = target::repository(self.cluster(), name);
        self.checked(found, action, &target::absent_repository(name))
    }

    /// A further segment that the request names.
    ///
    /// # Errors
    /// As [`Self::vm`].
    pub fn segment(&self, name: &str, action: Action) -> Result<TheSegment, Problem> {
        self.checked(target::segment(self.cluster(), name), action, &target::absent_segment(name))
    }

    fn checked<T>(
        &self,
        found: Result<Located<T>, Problem>,
        action: Action,
        absent: &Resource,
    ) -> Result<T, Problem> {
        let resource = found.as_ref().map_or(absent, |located| &located.resource);
        self.named.add(resource.label());
        if self.decide(action, resource).allowed {
            Ok(found?.target)
        } else {
            Err(self.gate.not_allowed(action, &self.principal, resource))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn if_match_takes_our_tags_and_nothing_else() {
        let read = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(IF_MATCH, text.parse().expect("a header"));
            if_match(&headers)
        };
        assert_eq!(read("\"42\"").expect("a tag"), Some(Revision(42)));
        assert_eq!(read("*").expect("any"), None);
        for bad in ["42", "W/\"42\"", "\"\"", "\"x\"", "\"1\", \"2\""] {
            assert!(read(bad).is_err(), "{bad}");
        }
        assert_eq!(if_match(&HeaderMap::new()).expect("none"), None);
    }
}
