//! Who may do what, why, and what somebody may see.
//!
//! Three things decide, and only together: fixed policies that hold in every cluster (a file beside this crate), grants
//! (who has which role where), and policies that an operator wrote. All of them are Cedar; whatever none of them
//! permits is denied, and whatever one of them forbids stays forbidden. A token narrows its owner's rights further.
//!
//! - [`resource`]: what an action is about, as it is to the policies;
//! - [`engine`]: Cedar itself;
//! - [`book`]: teams, segments, grants and written policies, read from the records and ready to be asked;
//! - [`visible`]: which segments' things somebody may see, for lists;
//! - [`escalation`]: that nobody gives what it does not have;
//! - [`shadow`]: what a policy would have changed among recent decisions.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use berth_api::manager::{Scope, User};
use berth_model::access::{Action, BUILT_IN_ROLES};
use berth_model::{TeamId, Timestamp};

use crate::auth::{Principal, UserPrincipal};
use crate::cluster::Cluster;

pub mod book;
pub mod engine;
pub mod escalation;
pub mod resource;
pub mod shadow;
pub mod visible;

use book::{Book, Slice};
use engine::{Engine, Question, Verdict};
use shadow::Recent;

pub use engine::PolicyError;
pub use resource::{Attribute, Resource, ResourceKind};

/// What is said when the policies can't be asked.
const FAILED: &str = "the access policies could not be evaluated";
/// What is said when nothing permits it.
const NOTHING_PERMITS: &str = "no grant or policy permits it";

/// What the policies say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Decision {
    /// Whether it is allowed.
    pub allowed: bool,
    /// Why, in a sentence.
    pub reason: String,
    /// The ids of the policies and grants that decided.
    pub by: Vec<String>,
    /// SHA-256 of all that could have decided, in hexadecimal.
    pub policy_hash: String,
    /// A policy failed: that is why it is not allowed, and somebody has to look.
    pub failed: bool,
    /// It would be allowed if a second person approved: what that is about.
    pub needs_approval: Option<String>,
}

impl Decision {
    /// A no of the door's own, without a look at the policies.
    pub fn denied(reason: &str) -> Self {
        Self { reason: reason.to_owned(), ..Self::default() }
    }
}

/// The policies, ready to be asked.
pub struct Policies {
    engine: Engine,
    cluster: Arc<Cluster>,
    book: RwLock<Arc<Book>>,
    recent: Recent,
    latest_ms: AtomicU64,
}

impl Policies {
    /// Those of a cluster.
    ///
    /// # Errors
    /// When one does not pass strict validation.
    pub fn open(cluster: Arc<Cluster>) -> Result<Self, PolicyError> {
        let engine = Engine::new()?;
        let book = RwLock::new(Arc::new(Book::read(&engine, &cluster.records, None)?));
        Ok(Self { engine, cluster, book, recent: Recent::default(), latest_ms: AtomicU64::new(0) })
    }

    /// What time it is for rights that end: the clock's, and never earlier than it was before. Somebody who sets the
    /// clock back does not bring back what has ended, as long as this manager runs.
    pub fn now(&self) -> Timestamp {
        let now_ms = self.cluster.clock.now().as_millis();
        Timestamp::from_millis(self.latest_ms.fetch_max(now_ms, Ordering::SeqCst).max(now_ms))
    }

    /// Cedar, with the schema.
    pub const fn engine(&self) -> &Engine {
        &self.engine
    }

    /// What was decided of late.
    pub const fn recent(&self) -> &Recent {
        &self.recent
    }

    /// The book as the records are now.
    ///
    /// # Errors
    /// When what is recorded does not fit: then nothing may be decided by what was there before, either.
    pub fn book(&self) -> Result<Arc<Book>, PolicyError> {
        let known = Arc::clone(&self.book.read().unwrap_or_else(PoisonError::into_inner));
        if known.stamp == book::stamp(&self.cluster.records) {
            return Ok(known);
        }
        let fresh = Arc::new(Book::read(&self.engine, &self.cluster.records, Some(&known))?);
        *self.book.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&fresh);
        Ok(fresh)
    }

    /// Asks whether `principal` may do `action` to `resource`, and keeps the answer for comparisons.
    pub fn decide(
        &self,
        principal: &Principal,
        action: Action,
        resource: &Resource,
        approved: bool,
    ) -> Decision {
        let decision = self.look(principal, action, resource, approved);
        self.recent.keep(principal, action, resource, approved, decision.allowed);
        decision
    }

    /// The same as a mere question, which leaves no trace.
    pub fn look(
        &self,
        principal: &Principal,
        action: Action,
        resource: &Resource,
        approved: bool,
    ) -> Decision {
        self.try_look(principal, action, resource, approved).unwrap_or_else(|error| {
            tracing::error!(
                action = action.as_str(),
                resource = resource.label(),
                detail = error.detail,
                alarm = "policy-failed",
                "an access decision failed and was taken as a denial"
            );
            Decision { failed: true, ..Decision::denied(FAILED) }
        })
    }

    fn try_look(
        &self,
        principal: &Principal,
        action: Action,
        resource: &Resource,
        approved: bool,
    ) -> Result<Decision, PolicyError> {
        let book = self.book()?;
        let policy_hash = book.hash.clone();
        if let Some(reason) = self.outside_scope(&book, principal, action, resource) {
            return Ok(Decision { policy_hash, ..Decision::denied(&reason) });
        }
        let (slice, now) = (self.slice(&book, principal), self.now());
        let teams = slice.as_ref().map(|slice| slice.teams.as_slice()).unwrap_or_default();
        let set = book.set_for(slice.as_deref(), action)?;
        let mut question = Question { principal, teams, action, resource, approved, now };
        let Some(verdict) = self.engine.ask(&set, &question)? else {
            return Ok(Decision {
                policy_hash,
                ..Decision::denied(&self.misasked(principal, action, resource))
            });
        };
        let needs_approval = match (verdict.allowed, approved) {
            (false, false) if verdict.by.iter().any(|id| approval_text(&book, id).is_some()) => {
                question.approved = true;
                let then = self.engine.ask(&set, &question)?;
                let texts = verdict.by.iter().filter_map(|id| approval_text(&book, id));
                then.is_some_and(|then| then.allowed).then(|| texts.collect::<Vec<_>>().join("; "))
            }
            _ => None,
        };
        let reason = self.reason(&book, &verdict);
        Ok(Decision {
            allowed: verdict.allowed,
            reason,
            by: verdict.by,
            policy_hash,
            failed: false,
            needs_approval,
        })
    }

    /// The caller's slice of the book; none for who is no user.
    pub fn slice(&self, book: &Book, principal: &Principal) -> Option<Arc<Slice>> {
        let Principal::User(user) = principal else { return None };
        self.cluster.records.get::<User>(user.id.as_str()).map(|row| book.slice(&row))
    }

    /// The teams that a user is in, directly or not.
    pub fn teams_of(&self, user: &UserPrincipal) -> Vec<TeamId> {
        let Ok(book) = self.book() else { return Vec::new() };
        let row = self.cluster.records.get::<User>(user.id.as_str());
        row.map(|row| book.slice(&row).teams.clone()).unwrap_or_default()
    }

    /// What would allow something, in a sentence, for who may know that the thing is there.
    pub fn what_would_allow(
        &self,
        principal: &Principal,
        action: Action,
        resource: &Resource,
    ) -> Option<String> {
        let Principal::User(_) = principal else { return None };
        let sees = resource.kind() == ResourceKind::Cluster
            || self.look(principal, seeing(resource.kind())?, resource, false).allowed;
        if !sees || resource.id() == resource::ABSENT_ID {
            return None;
        }
        let decision = self.look(principal, action, resource, false);
        if !decision.by.is_empty() || decision.reason != NOTHING_PERMITS {
            return Some(decision.reason);
        }
        if !action.is_grantable() {
            return None;
        }
        let roles: Vec<&str> =
            BUILT_IN_ROLES.iter().filter(|role| role.has(action)).map(|role| role.name).collect();
        let book = self.book().ok()?;
        let place = resource.segment().map_or_else(
            || "for the cluster".to_owned(),
            |segment| format!("in segment {}", book.segment_name(&segment)),
        );
        Some(format!("a grant {place} of a role that has it would allow it ({})", roles.join(", ")))
    }

    /// Why a token can't be used for this, whatever its owner may do.
    fn outside_scope(
        &self,
        book: &Book,
        principal: &Principal,
        action: Action,
        resource: &Resource,
    ) -> Option<String> {
        let Principal::User(UserPrincipal { scope: Some(Scope { actions, segment }), .. }) = principal else {
            return None;
        };
        let is_lasting = matches!(action, Action::SelfView | Action::Public);
        // What can't be granted is in no scope either, whatever a record says.
        let has = action.is_grantable() && actions.contains(&action);
        if !(is_lasting || has) {
            return Some(format!("the token is not for '{}'", action.as_str()));
        }
        let segment = segment.as_ref()?;
        // Lists are filtered; and what is for all segments is for this one as well.
        let is_everywhere = resource.kind() == ResourceKind::Listing
            || (action == Action::ImageView && resource.is_for_all());
        (!is_lasting && !is_everywhere && !resource.is_within(segment))
            .then(|| format!("the token is for segment {} only", book.segment_name(segment)))
    }

    /// What is said of a question that the schema does not have.
    fn misasked(&self, principal: &Principal, action: Action, resource: &Resource) -> String {
        if self.engine.kinds_for(principal, action).is_empty() {
            return format!("'{}' is not for {}", action.as_str(), principal.kind_text());
        }
        format!("'{}' is not done to a {}: say to what", action.as_str(), resource.kind().noun())
    }

    fn reason(&self, book: &Book, verdict: &Verdict) -> String {
        let Some(first) = verdict.by.iter().max_by_key(|id| self.lasts(book, id)) else {
            return NOTHING_PERMITS.to_owned();
        };
        match (verdict.allowed, book.grant(first)) {
            (true, Some(_)) => self.grant_text(book, first),
            (true, None) => format!("policy '{}' permits it", policy_name(book, first)),
            (false, _) => format!("policy '{}' forbids it", policy_name(book, first)),
        }
    }

    /// How long something decides, to name what lasts.
    fn lasts(&self, book: &Book, id: &str) -> Timestamp {
        let until = book.grant(id).and_then(|held| held.grant.until);
        until.unwrap_or(Timestamp::from_millis(u64::MAX))
    }

    /// `grant g-… (team ledger, role operator, segment accounting), until …`.
    fn grant_text(&self, book: &Book, id: &str) -> String {
        let Some(held) = book.grant(id) else { return format!("grant {id}") };
        let grant = &held.grant.value;
        let who = match (&grant.team, &grant.user) {
            (Some(team), _) => format!("team {}", book.team_name(team)),
            (None, Some(user)) => {
                let row = self.cluster.records.get::<User>(user.as_str());
                format!("user {}", row.map_or_else(|| user.to_string(), |row| row.name.to_string()))
            }
            (None, None) => "nobody".to_owned(),
        };
        let place = match &grant.segment {
            Some(segment) => format!("segment {}", book.segment_name(segment)),
            None => "cluster".to_owned(),
        };
        let until = grant.until.map(|until| format!(", until {until}")).unwrap_or_default();
        format!("grant {id} ({who}, role {}, {place}){until}", grant.role)
    }
}

/// The action by which a thing of this kind is seen.
const fn seeing(kind: ResourceKind) -> Option<Action> {
    Some(match kind {
        ResourceKind::Segment => Action::SegmentView,
        ResourceKind::Host => Action::HostView,
        ResourceKind::Image => Action::ImageView,
        ResourceKind::Vm => Action::VmView,
        ResourceKind::Snapshot => Action::SnapshotView,
        ResourceKind::Schedule => Action::ScheduleView,
        ResourceKind::Repository => Action::RepositoryView,
        ResourceKind::Operation => Action::OperationView,
        ResourceKind::User | ResourceKind::Token | ResourceKind::Team => Action::UserView,
        ResourceKind::Role | ResourceKind::Grant => Action::GrantView,
        ResourceKind::Policy => Action::PolicyView,
        ResourceKind::Approval => Action::ApprovalDecide,
        ResourceKind::Cluster | ResourceKind::Listing => return None,
    })
}

/// What an approval would be about, if this policy is a guard that one lifts.
fn approval_text(book: &Book, id: &str) -> Option<String> {
    if let Some(policy) = book.fixed_policy(id) {
        return policy.annotation("approval").map(str::to_owned);
    }
    let parts = book.customs().iter().flat_map(|custom| &custom.parts);
    let policy = parts.into_iter().find(|policy| policy.id().to_string() == id)?;
    policy.annotation("approval").map(str::to_owned)
}

/// What a policy is called: fixed ones by their id, written ones by their record's name.
fn policy_name(book: &Book, id: &str) -> String {
    let record = id.split_once('/').map_or(id, |(record, _)| record);
    let custom = book.customs().iter().find(|custom| custom.record.id == record);
    custom.map_or_else(|| id.to_owned(), |custom| custom.record.name.to_string())
}

#[cfg(test)]
mod tests;
