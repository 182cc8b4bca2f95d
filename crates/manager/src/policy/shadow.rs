//! What a policy would have changed: recent decisions, made again with it and without it.
//!
//! The last decisions are kept in memory, as questions that can be asked again: one of each kind, with how often it
//! came. They are about how things were when they came (a VM's class, its segment); who asked is looked up as it is now.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use berth_api::manager::{Policy, PolicyReport, ShadowDifference};
use berth_model::access::Action;

use super::book::custom_parts;
use super::engine::Question;
use super::{Policies, PolicyError, Resource};
use crate::audit::{ALLOW, DENY};
use crate::auth::Principal;

/// How many different questions are kept.
const KEPT_MAX: usize = 10_000;
/// Most differences in a report: a person reads them.
const DIFFERENCES_MAX: usize = 500;

#[derive(Clone)]
struct Asked {
    principal: Principal,
    action: Action,
    resource: Resource,
    approved: bool,
    times: u64,
}

#[derive(Default)]
struct Kept {
    questions: HashMap<String, Asked>,
    order: VecDeque<String>,
}

/// What was decided of late.
#[derive(Default)]
pub struct Recent {
    kept: Mutex<Kept>,
}

impl Recent {
    pub(super) fn keep(
        &self,
        principal: &Principal,
        action: Action,
        resource: &Resource,
        approved: bool,
        allowed: bool,
    ) {
        let who = match principal {
            Principal::User(user) => user.token.as_str().to_owned(),
            other => other.actor(),
        };
        let key = format!("{who} {} {} {approved} {allowed}", action.as_str(), resource.id());
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = kept.questions.get_mut(&key) {
            known.times += 1;
            return;
        }
        if kept.order.len() >= KEPT_MAX
            && let Some(oldest) = kept.order.pop_front()
        {
            kept.questions.remove(&oldest);
        }
        let (principal, resource) = (principal.clone(), resource.clone());
        kept.order.push_back(key.clone());
        kept.questions.insert(key, Asked { principal, action, resource, approved, times: 1 });
    }

    fn all(&self) -> Vec<Asked> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.order.iter().filter_map(|key| kept.questions.get(key).cloned()).collect()
    }
}

impl Policies {
    /// What a policy changes, or would change, among recent decisions.
    ///
    /// # Errors
    /// When it does not fit the schema.
    pub fn report(&self, policy: &Policy) -> Result<PolicyReport, PolicyError> {
        let book = self.book()?;
        let (parts, now) = (custom_parts(&self.engine, policy)?, self.now());
        let (mut differences, mut errors, mut decisions) = (Vec::new(), Vec::new(), 0);
        let mut sets = HashMap::new();
        for asked in self.recent.all() {
            decisions += asked.times;
            let slice = self.slice(&book, &asked.principal);
            let key = match &asked.principal {
                Principal::User(user) => (user.id.to_string(), asked.action),
                _ => (String::new(), asked.action),
            };
            let (with, without) = match sets.entry(key) {
                std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
                std::collections::hash_map::Entry::Vacant(free) => free.insert((
                    book.set_with(slice.as_deref(), asked.action, policy.id.as_str(), &parts)?,
                    book.set_with(slice.as_deref(), asked.action, policy.id.as_str(), &[])?,
                )),
            };
            let question = Question {
                principal: &asked.principal,
                teams: slice.as_ref().map(|slice| slice.teams.as_slice()).unwrap_or_default(),
                action: asked.action,
                resource: &asked.resource,
                approved: asked.approved,
                now,
            };
            let was =
                self.engine.ask(without, &question).ok().flatten().is_some_and(|verdict| verdict.allowed);
            let would_be = match self.engine.ask(with, &question) {
                Ok(verdict) => verdict.is_some_and(|verdict| verdict.allowed),
                Err(error) => {
                    errors.push(error.detail);
                    false
                }
            };
            if was != would_be {
                differences.push(difference(&asked, was, would_be));
            }
        }
        differences.truncate(DIFFERENCES_MAX);
        errors.sort_unstable();
        errors.dedup();
        Ok(PolicyReport { policy: policy.clone(), decisions, differences, errors })
    }
}

fn difference(asked: &Asked, was: bool, would_be: bool) -> ShadowDifference {
    let word = |allowed: bool| if allowed { ALLOW } else { DENY }.to_owned();
    ShadowDifference {
        actor: asked.principal.actor(),
        action: asked.action,
        resource: asked.resource.label().to_owned(),
        was: word(was),
        would_be: word(would_be),
        times: asked.times,
    }
}
