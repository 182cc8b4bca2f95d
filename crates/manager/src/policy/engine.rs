//! Cedar, as it is used here: reading and checking policies, and asking a set of them.
//!
//! Cedar skips a policy that fails while it is evaluated, and a `forbid` that is skipped forbids nothing. So policies
//! are validated strictly against the schema when they are written, and an error while deciding denies, whatever else
//! was found.
//!
//! Each question is asked with just the policies and entities that it needs, so that a decision costs the same in a
//! cluster of any size. What is handed to Cedar here is made by the manager and fits the schema by construction; a
//! test asks the same questions with Cedar's own checks on.

use std::collections::{BTreeSet, HashMap, HashSet};

use berth_model::access::Action;
use berth_model::{TeamId, Timestamp};
use cedar_policy::{
    ActionConstraint, Authorizer, Context, Decision, Effect, Entities, Entity, EntityId, EntityTypeName,
    EntityUid, Policy, PolicyId, PolicySet, Request, RestrictedExpression, Schema, ValidationMode, Validator,
};

use super::resource::{Attribute, Resource, ResourceKind};
use crate::auth::Principal;

/// The schema, as compiled in.
pub const SCHEMA: &str = include_str!("../../policy/schema.cedarschema");
/// The policies that hold everywhere, as compiled in.
pub const POLICIES: &str = include_str!("../../policy/policies.cedar");

/// Policies that can't be used.
#[derive(Debug, thiserror::Error)]
#[error("the access policies can't be used: {detail}")]
pub struct PolicyError {
    /// What is wrong with them.
    pub detail: String,
}

impl PolicyError {
    pub(super) fn new(detail: impl std::fmt::Display) -> Self {
        Self { detail: detail.to_string() }
    }
}

/// A question, with all that is known of the caller.
pub struct Question<'a> {
    /// Who asks.
    pub principal: &'a Principal,
    /// The teams that it is in, directly or not.
    pub teams: &'a [TeamId],
    /// What it wants to do.
    pub action: Action,
    /// To what.
    pub resource: &'a Resource,
    /// Whether a second person has approved this very request.
    pub approved: bool,
    /// When.
    pub now: Timestamp,
}

/// What a set of policies says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Whether it is allowed.
    pub allowed: bool,
    /// The ids of the policies that decided, in order.
    pub by: Vec<String>,
}

/// Cedar with the schema and what is known of it.
pub struct Engine {
    authorizer: Authorizer,
    schema: Schema,
    types: HashMap<&'static str, EntityTypeName>,
    actions: HashMap<Action, (EntityUid, Vec<Entity>)>,
    /// Principal's type, action, resource's type: what can be asked.
    envs: HashSet<(&'static str, Action, ResourceKind)>,
}

const PRINCIPALS: [&str; 4] = ["User", "Agent", "JoinToken", "Anonymous"];

impl Engine {
    /// With the schema that is compiled in.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn new() -> Result<Self, PolicyError> {
        let (schema, warnings) = Schema::from_cedarschema_str(SCHEMA)
            .map_err(|error| PolicyError { detail: format!("{error:?}") })?;
        if let Some(warning) = warnings.into_iter().next() {
            return Err(PolicyError::new(warning));
        }
        let (types, actions) = (type_names()?, action_entities(&schema)?);
        let envs = envs(&schema);
        Ok(Self { authorizer: Authorizer::new(), schema, types, actions, envs })
    }

    /// The actions of the schema that can be asked for, by name.
    pub fn action_names(&self) -> BTreeSet<String> {
        self.schema.request_envs().map(|env| env.action().id().unescaped().to_owned()).collect()
    }

    /// Whether the schema has this combination at all.
    pub fn can_be_asked(&self, principal: &Principal, action: Action, kind: ResourceKind) -> bool {
        self.envs.contains(&(principal_type(principal), action, kind))
    }

    /// The kinds of things that this can be done to by such a caller.
    pub fn kinds_for(&self, principal: &Principal, action: Action) -> Vec<ResourceKind> {
        let kinds = ResourceKind::ALL.iter().copied();
        kinds.filter(|kind| self.can_be_asked(principal, action, *kind)).collect()
    }

    /// Reads and checks policies: they must fit the schema in every way, and be none that Cedar would warn about.
    ///
    /// # Errors
    /// What is wrong with the first of them that is.
    pub fn read(&self, text: &str) -> Result<Vec<Policy>, PolicyError> {
        let set: PolicySet = text.parse().map_err(|error| PolicyError { detail: format!("{error:?}") })?;
        if let Some(template) = set.templates().next() {
            return Err(PolicyError::new(format_args!("{} is a template: say who and what", template.id())));
        }
        let checked = Validator::new(self.schema.clone()).validate(&set, ValidationMode::Strict);
        let faults: Vec<String> = checked
            .validation_errors()
            .map(ToString::to_string)
            .chain(checked.validation_warnings().map(ToString::to_string))
            .collect();
        if !faults.is_empty() {
            return Err(PolicyError::new(faults.join("; ")));
        }
        let mut policies: Vec<Policy> = set.policies().cloned().collect();
        policies.sort_by(|one, other| one.id().cmp(other.id()));
        Ok(policies)
    }

    /// Asks. None: the schema does not have this combination.
    ///
    /// # Errors
    /// That a policy failed: then nothing is allowed.
    pub fn ask(&self, set: &PolicySet, question: &Question<'_>) -> Result<Option<Verdict>, PolicyError> {
        let Question { principal, action, resource, .. } = question;
        if !self.can_be_asked(principal, *action, resource.kind()) {
            return Ok(None);
        }
        let request = self.request(question, None)?;
        let entities = self.entities(question, None)?;
        let response = self.authorizer.is_authorized(&request, set, &entities);
        let errors: Vec<String> = response.diagnostics().errors().map(ToString::to_string).collect();
        if !errors.is_empty() {
            return Err(PolicyError::new(errors.join("; ")));
        }
        let mut by: Vec<String> =
            response.diagnostics().reason().map(|id| AsRef::<str>::as_ref(id).to_owned()).collect();
        by.sort_unstable();
        Ok(Some(Verdict { allowed: response.decision() == Decision::Allow, by }))
    }

    /// Whether what is handed to Cedar for this question fits the schema, by Cedar's own checks.
    ///
    /// # Errors
    /// Where it does not.
    pub fn check(&self, question: &Question<'_>) -> Result<(), PolicyError> {
        self.request(question, Some(&self.schema))?;
        self.entities(question, Some(&self.schema)).map(drop)
    }

    fn request(&self, question: &Question<'_>, schema: Option<&Schema>) -> Result<Request, PolicyError> {
        let (kind, id) = principal_entity(question.principal);
        let (method, second_factor) = question.principal.method();
        let now_ms = i64::try_from(question.now.as_millis()).unwrap_or(i64::MAX);
        let context = Context::from_pairs([
            ("now_ms".to_owned(), RestrictedExpression::new_long(now_ms)),
            ("approved".to_owned(), RestrictedExpression::new_bool(question.approved)),
            ("method".to_owned(), RestrictedExpression::new_string(method.to_owned())),
            ("second_factor".to_owned(), RestrictedExpression::new_bool(second_factor)),
        ])
        .map_err(PolicyError::new)?;
        let resource = self.uid(question.resource.kind.cedar_type(), &question.resource.id)?;
        let action = self.action(question.action)?.0.clone();
        Request::new(self.uid(kind, id)?, action, resource, context, schema).map_err(PolicyError::new)
    }

    fn action(&self, action: Action) -> Result<&(EntityUid, Vec<Entity>), PolicyError> {
        self.actions
            .get(&action)
            .ok_or_else(|| PolicyError::new(format_args!("no action {}", action.as_str())))
    }

    /// The caller, the thing and the action, each with all that it is in, however far above: so nothing has to be
    /// looked up in between.
    fn entities(&self, question: &Question<'_>, schema: Option<&Schema>) -> Result<Entities, PolicyError> {
        let resource = question.resource;
        let (principal_uid, mut above) = self.principal_entity(question)?;
        let resource_uid = self.uid(resource.kind.cedar_type(), &resource.id)?;
        let mut around = HashSet::new();
        let mut next = resource.parent.as_deref();
        while let Some(thing) = next {
            around.insert(self.uid(thing.kind.cedar_type(), &thing.id)?);
            next = thing.parent.as_deref();
        }
        let attributes = resource.attributes.iter().map(|(name, value)| expression(name, value)).collect();
        let mut entities = Vec::with_capacity(4);
        if principal_uid == resource_uid {
            // Somebody acts on itself: one entity is both.
            around.extend(std::mem::take(&mut above));
        } else {
            entities.push(Entity::new_no_attrs(principal_uid, above));
        }
        entities.push(Entity::new(resource_uid, attributes, around).map_err(PolicyError::new)?);
        if schema.is_none() {
            entities.extend(self.action(question.action)?.1.iter().cloned());
        }
        Entities::from_entities(entities, schema).map_err(PolicyError::new)
    }

    /// The caller, and all that it is in.
    fn principal_entity(
        &self,
        question: &Question<'_>,
    ) -> Result<(EntityUid, HashSet<EntityUid>), PolicyError> {
        let (kind, id) = principal_entity(question.principal);
        let mut above = HashSet::with_capacity(question.teams.len() + 1);
        for team in question.teams {
            above.insert(self.uid("Team", team.as_str())?);
        }
        if let Principal::Host(host) = question.principal {
            above.insert(self.uid("Host", host.as_str())?);
        }
        Ok((self.uid(kind, id)?, above))
    }

    pub(super) fn uid(&self, kind: &str, id: &str) -> Result<EntityUid, PolicyError> {
        let name =
            self.types.get(kind).ok_or_else(|| PolicyError::new(format_args!("no entity type {kind}")))?;
        Ok(EntityUid::from_type_name_and_id(name.clone(), EntityId::new(id)))
    }
}

fn expression(name: &str, value: &Attribute) -> (String, RestrictedExpression) {
    let value = match value {
        Attribute::Flag(flag) => RestrictedExpression::new_bool(*flag),
        Attribute::Text(text) => RestrictedExpression::new_string(text.clone()),
    };
    (name.to_owned(), value)
}

/// A policy under another id, for its place in a set.
pub(super) fn renamed(policy: &Policy, id: &str) -> Policy {
    policy.new_id(PolicyId::new(id))
}

/// The actions that a policy can be about.
pub fn actions_of(policy: &Policy) -> BTreeSet<Action> {
    let named: Vec<EntityUid> = match policy.action_constraint() {
        ActionConstraint::Any => return Action::ALL.iter().copied().collect(),
        ActionConstraint::In(uids) => uids,
        ActionConstraint::Eq(uid) => vec![uid],
    };
    let is_named = |text: &str| named.iter().any(|uid| uid.id().unescaped() == text);
    let all = Action::ALL.iter().copied();
    all.filter(|action| is_named(action.as_str()) || is_named(action.group().as_str())).collect()
}

/// Whether it gives, rather than takes.
pub fn permits(policy: &Policy) -> bool {
    policy.effect() == Effect::Permit
}

const fn principal_type(principal: &Principal) -> &'static str {
    match principal {
        Principal::User(_) => "User",
        Principal::Host(_) => "Agent",
        Principal::JoinToken(_) => "JoinToken",
        Principal::Anonymous => "Anonymous",
    }
}

fn principal_entity(principal: &Principal) -> (&'static str, &str) {
    let id = match principal {
        Principal::User(user) => user.id.as_str(),
        Principal::Host(host) => host.as_str(),
        Principal::JoinToken(_) => "join-token",
        Principal::Anonymous => "anonymous",
    };
    (principal_type(principal), id)
}

fn type_names() -> Result<HashMap<&'static str, EntityTypeName>, PolicyError> {
    let kinds = ResourceKind::ALL.iter().map(|kind| kind.cedar_type());
    kinds
        .chain(PRINCIPALS)
        .map(|name| {
            let parsed: EntityTypeName = name.parse().map_err(PolicyError::new)?;
            Ok((name, parsed))
        })
        .collect()
}

/// Each action with its entity and its group's, so that policies can name groups.
fn action_entities(schema: &Schema) -> Result<HashMap<Action, (EntityUid, Vec<Entity>)>, PolicyError> {
    let all = schema.action_entities().map_err(PolicyError::new)?;
    let find = |name: &str| all.iter().find(|entity| entity.uid().id().unescaped() == name);
    let mut actions = HashMap::new();
    for action in Action::ALL {
        if let (Some(entity), Some(group)) = (find(action.as_str()), find(action.group().as_str())) {
            let above = HashSet::from([group.uid()]);
            actions.insert(*action, (entity.uid(), vec![Entity::new_no_attrs(entity.uid(), above)]));
        }
    }
    Ok(actions)
}

fn envs(schema: &Schema) -> HashSet<(&'static str, Action, ResourceKind)> {
    let principal = |name: &str| PRINCIPALS.into_iter().find(|known| *known == name);
    let kind = |name: &str| ResourceKind::ALL.iter().copied().find(|kind| kind.cedar_type() == name);
    schema
        .request_envs()
        .filter_map(|env| {
            Some((
                principal(&env.principal().to_string())?,
                env.action().id().unescaped().parse().ok()?,
                kind(&env.resource().to_string())?,
            ))
        })
        .collect()
}
