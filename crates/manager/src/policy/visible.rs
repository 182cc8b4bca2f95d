//! Which things somebody may see, for lists: worked out once for a request, then asked for each thing.
//!
//! Partial evaluation by hand: with the caller and the action known and the thing open, each grant comes down to "the
//! thing is in this segment, or anywhere". So the answer is a set of segments, which costs a look into a table for
//! each thing. Only when a policy that somebody wrote could change the answer, each thing that is left is asked about
//! one by one. A property test holds this against asking about every single thing.

use std::collections::HashSet;
use std::sync::Arc;

use berth_api::manager::Scope;
use berth_model::SegmentId;
use berth_model::access::Action;

use super::{Policies, PolicyError, Resource};
use crate::auth::{Principal, UserPrincipal};
use crate::door::Gate;

/// Where somebody may do something by what was granted.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Reach {
    Everywhere,
    Segments(HashSet<SegmentId>),
}

/// What somebody may see.
pub struct Visible {
    gate: Arc<Gate>,
    principal: Principal,
    action: Action,
    reach: Reach,
    /// Everything has to be asked about one by one.
    is_touched: bool,
}

impl Visible {
    /// What `principal` may see by `action`.
    pub fn new(gate: Arc<Gate>, principal: &Principal, action: Action) -> Self {
        let (reach, is_touched) = gate.policies.reach(principal, action).unwrap_or_else(|error| {
            tracing::error!(
                detail = error.detail,
                alarm = "policy-failed",
                "a list could not be filtered and is empty"
            );
            (Reach::Segments(HashSet::new()), false)
        });
        Self { gate, principal: principal.clone(), action, reach, is_touched }
    }

    /// Whether a thing that is in this segment is worth a further look: quick, for use under a lock.
    pub fn may_show(&self, segment: Option<&SegmentId>) -> bool {
        self.is_touched || self.reaches(segment)
    }

    fn reaches(&self, segment: Option<&SegmentId>) -> bool {
        match (&self.reach, segment) {
            (Reach::Everywhere, _) => true,
            (Reach::Segments(segments), Some(segment)) => segments.contains(segment),
            (Reach::Segments(_), None) => false,
        }
    }

    /// Whether it may see a thing that is in this segment (none: in the cluster, in no segment).
    pub fn shows(&self, segment: Option<&SegmentId>, resource: impl FnOnce() -> Resource) -> bool {
        if self.is_touched {
            return self.gate.policies.look(&self.principal, self.action, &resource(), false).allowed;
        }
        self.reaches(segment)
    }

    /// Whether it may see this very thing, by whatever permits it: for what fixed policies permit besides grants, like
    /// one's own tokens.
    pub fn asks_about(&self, resource: &Resource) -> bool {
        self.gate.policies.look(&self.principal, self.action, resource, false).allowed
    }
}

impl Policies {
    fn reach(&self, principal: &Principal, action: Action) -> Result<(Reach, bool), PolicyError> {
        let book = self.book()?;
        let nothing = Reach::Segments(HashSet::new());
        let Some(slice) = self.slice(&book, principal) else { return Ok((nothing, false)) };
        let scope = match principal {
            Principal::User(UserPrincipal { scope, .. }) => scope.as_ref(),
            _ => None,
        };
        if scope.is_some_and(|scope| !scope.actions.contains(&action)) {
            return Ok((nothing, false));
        }
        let now = self.now();
        let mut reach = Reach::Segments(HashSet::new());
        for held in slice.grants.iter().filter(|held| held.is_live(now) && held.actions.contains(&action)) {
            match (&mut reach, &held.grant.segment) {
                (Reach::Segments(segments), Some(segment)) => segments.extend(book.segments_within(segment)),
                _ => reach = Reach::Everywhere,
            }
        }
        if let Some(Scope { segment: Some(only), .. }) = scope {
            let within = book.segments_within(only);
            reach = match reach {
                Reach::Everywhere => Reach::Segments(within),
                Reach::Segments(segments) => Reach::Segments(&segments & &within),
            };
        }
        Ok((reach, book.is_touched(action)))
    }
}
