//! Who may do what: the Cedar policies, and asking them.
//!
//! The policies and their schema are files beside this crate, compiled in; there is nothing to configure yet. They
//! are read and validated strictly at start: a policy that does not fit the schema stops the manager, because Cedar
//! skips policies that fail, and a `forbid` that is skipped forbids nothing. For the same reason an error while
//! deciding denies, whatever else was found, and is logged.
//!
//! Each question is asked with just the entities that it needs (who asks with its roles, and the thing with what it
//! is in), so that a decision costs the same in a cluster of any size.

use std::collections::HashMap;

use berth_model::HostId;
use berth_model::access::Action;
use cedar_policy::{
    Authorizer, Context, Decision as CedarDecision, Entities, Entity, EntityId, EntityTypeName, EntityUid,
    PolicySet, Request, Schema, ValidationMode, Validator,
};

use crate::auth::Principal;

/// The schema, as compiled in.
pub const SCHEMA: &str = include_str!("../policy/schema.cedarschema");
/// The policies, as compiled in.
pub const POLICIES: &str = include_str!("../policy/policies.cedar");

/// The roles that a user can have. "None" is to have none of them.
pub const ROLES: [&str; 1] = ["admin"];

/// The one cluster's id in policies.
const CLUSTER_ID: &str = "cluster";
/// The id of what was asked for and is not there.
const ABSENT_ID: &str = "absent";

/// Policies that can't be used.
#[derive(Debug, thiserror::Error)]
#[error("the access policies can't be used: {detail}")]
pub struct PolicyError {
    /// What is wrong with them.
    pub detail: String,
}

/// What kind of thing something is done to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ResourceKind {
    /// The cluster as a whole.
    Cluster,
    /// A segment.
    Segment,
    /// A host.
    Host,
    /// An image.
    Image,
    /// A VM.
    Vm,
    /// A snapshot of a VM.
    Snapshot,
    /// An operation.
    Operation,
    /// A user.
    User,
    /// A token.
    Token,
}

impl ResourceKind {
    /// Every kind.
    pub const ALL: [Self; 9] = [
        Self::Cluster,
        Self::Segment,
        Self::Host,
        Self::Image,
        Self::Vm,
        Self::Snapshot,
        Self::Operation,
        Self::User,
        Self::Token,
    ];

    /// The noun, as in the audit (`vm:default/books`).
    pub const fn noun(self) -> &'static str {
        match self {
            Self::Cluster => "cluster",
            Self::Segment => "segment",
            Self::Host => "host",
            Self::Image => "image",
            Self::Vm => "vm",
            Self::Snapshot => "snapshot",
            Self::Operation => "operation",
            Self::User => "user",
            Self::Token => "token",
        }
    }

    const fn cedar_type(self) -> &'static str {
        match self {
            Self::Cluster => "Cluster",
            Self::Segment => "Segment",
            Self::Host => "Host",
            Self::Image => "Image",
            Self::Vm => "Vm",
            Self::Snapshot => "Snapshot",
            Self::Operation => "Operation",
            Self::User => "User",
            Self::Token => "Token",
        }
    }
}

/// Something that an action is about, with what it is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    kind: ResourceKind,
    id: String,
    label: String,
    parent: Option<Box<Self>>,
}

impl Resource {
    /// The cluster.
    pub fn cluster() -> Self {
        Self { kind: ResourceKind::Cluster, id: CLUSTER_ID.into(), label: "cluster".into(), parent: None }
    }

    /// A thing that is in another, called so by people.
    pub fn inside(parent: Self, kind: ResourceKind, id: &str, name: &str) -> Self {
        let label = format!("{}:{name}", kind.noun());
        Self { kind, id: id.to_owned(), label, parent: Some(Box::new(parent)) }
    }

    /// A thing that is directly in the cluster.
    pub fn of_cluster(kind: ResourceKind, id: &str, name: &str) -> Self {
        Self::inside(Self::cluster(), kind, id, name)
    }

    /// What stands for a thing of this kind that is not there: who may do the action to it may do it anywhere, and
    /// may be told that it is not there. Everybody else gets the answer that they get for what they may not touch.
    pub fn absent(kind: ResourceKind, name: &str) -> Self {
        let parent = match kind {
            ResourceKind::Cluster => return Self::cluster(),
            ResourceKind::Vm => Self::absent(ResourceKind::Segment, name),
            ResourceKind::Snapshot => Self::absent(ResourceKind::Vm, name),
            ResourceKind::Segment
            | ResourceKind::Host
            | ResourceKind::Image
            | ResourceKind::Operation
            | ResourceKind::User
            | ResourceKind::Token => Self::cluster(),
        };
        let mut absent = Self::inside(parent, kind, ABSENT_ID, name);
        if name.is_empty() {
            kind.noun().clone_into(&mut absent.label);
        }
        absent
    }

    /// `vm:default/books`, for the audit.
    pub fn label(&self) -> &str {
        &self.label
    }
}

/// What the policies say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// Whether it is allowed.
    pub allowed: bool,
    /// Why, in a sentence.
    pub reason: String,
}

/// The policies, ready to be asked.
pub struct Policies {
    authorizer: Authorizer,
    policies: PolicySet,
    schema: Schema,
    types: HashMap<&'static str, EntityTypeName>,
}

impl Policies {
    /// Those that are compiled in.
    ///
    /// # Errors
    /// When they don't pass strict validation.
    pub fn built_in() -> Result<Self, PolicyError> {
        Self::from_text(SCHEMA, POLICIES)
    }

    fn from_text(schema: &str, policies: &str) -> Result<Self, PolicyError> {
        let wrong = |detail: String| PolicyError { detail };
        let (schema, warnings) =
            Schema::from_cedarschema_str(schema).map_err(|error| wrong(format!("{error:?}")))?;
        let warnings: Vec<String> = warnings.map(|warning| warning.to_string()).collect();
        let policies: PolicySet = policies.parse().map_err(|error| wrong(format!("{error:?}")))?;
        let checked = Validator::new(schema.clone()).validate(&policies, ValidationMode::Strict);
        let faults: Vec<String> = checked
            .validation_errors()
            .map(ToString::to_string)
            .chain(checked.validation_warnings().map(ToString::to_string))
            .chain(warnings)
            .collect();
        if !faults.is_empty() {
            return Err(wrong(faults.join("; ")));
        }
        if let Some(unnamed) = policies.policies().find(|policy| policy.annotation("id").is_none()) {
            return Err(wrong(format!("{} has no @id", unnamed.id())));
        }
        Ok(Self { authorizer: Authorizer::new(), policies, schema, types: type_names()? })
    }

    /// Asks whether `principal` may do `action` to `resource`.
    pub fn decide(&self, principal: &Principal, action: Action, resource: &Resource) -> Decision {
        self.try_decide(principal, action, resource).unwrap_or_else(|error| {
            tracing::error!(
                action = action.as_str(),
                resource = resource.label(),
                detail = error.detail,
                "an access decision failed and was taken as a denial"
            );
            Decision { allowed: false, reason: "the access policies could not be evaluated".to_owned() }
        })
    }

    /// Whether the schema has this combination at all.
    pub fn can_be_asked(&self, principal: &Principal, action: Action, kind: ResourceKind) -> bool {
        self.request(principal, action, &Resource::absent(kind, ABSENT_ID)).is_ok_and(|asked| asked.is_some())
    }

    fn try_decide(
        &self,
        principal: &Principal,
        action: Action,
        resource: &Resource,
    ) -> Result<Decision, PolicyError> {
        let Some(request) = self.request(principal, action, resource)? else {
            let about_others =
                ResourceKind::ALL.iter().any(|kind| self.can_be_asked(principal, action, *kind));
            let reason = if about_others {
                format!("'{}' is not done to a {}: say to what", action.as_str(), resource.kind.noun())
            } else {
                format!("'{}' is not for {}", action.as_str(), principal.kind_text())
            };
            return Ok(Decision { allowed: false, reason });
        };
        let entities = self.entities(principal, resource)?;
        let response = self.authorizer.is_authorized(&request, &self.policies, &entities);
        let errors: Vec<String> = response.diagnostics().errors().map(ToString::to_string).collect();
        if !errors.is_empty() {
            return Err(PolicyError { detail: errors.join("; ") });
        }
        let named = response.diagnostics().reason().next().and_then(|id| self.policies.annotation(id, "id"));
        Ok(match (response.decision(), named) {
            (CedarDecision::Allow, named) => {
                Decision { allowed: true, reason: format!("policy '{}' permits it", named.unwrap_or("?")) }
            }
            (CedarDecision::Deny, Some(named)) => {
                Decision { allowed: false, reason: format!("policy '{named}' forbids it") }
            }
            (CedarDecision::Deny, None) => {
                Decision { allowed: false, reason: "no policy permits it".to_owned() }
            }
        })
    }

    /// The question, or none when the schema does not have it.
    fn request(
        &self,
        principal: &Principal,
        action: Action,
        resource: &Resource,
    ) -> Result<Option<Request>, PolicyError> {
        let (kind, id, _) = principal_entity(principal);
        let asked = Request::new(
            self.uid(kind, id)?,
            self.uid("Action", action.as_str())?,
            self.uid(resource.kind.cedar_type(), &resource.id)?,
            Context::empty(),
            Some(&self.schema),
        );
        Ok(asked.ok())
    }

    fn entities(&self, principal: &Principal, resource: &Resource) -> Result<Entities, PolicyError> {
        let (kind, id, roles) = principal_entity(principal);
        let mut parents: HashMap<EntityUid, Vec<EntityUid>> = HashMap::new();
        let mut held = Vec::new();
        for role in roles {
            let role = self.uid("Role", role)?;
            parents.entry(role.clone()).or_default();
            held.push(role);
        }
        parents.insert(self.uid(kind, id)?, held);
        let mut next = Some(resource);
        while let Some(thing) = next {
            let above = thing.parent.as_deref();
            let uid = self.uid(thing.kind.cedar_type(), &thing.id)?;
            let above_uid = above.map(|above| self.uid(above.kind.cedar_type(), &above.id)).transpose()?;
            parents.entry(uid).or_default().extend(above_uid);
            next = above;
        }
        let entities: Vec<Entity> = parents
            .into_iter()
            .map(|(uid, parents)| Entity::new_no_attrs(uid, parents.into_iter().collect()))
            .collect();
        Entities::from_entities(entities, Some(&self.schema))
            .map_err(|error| PolicyError { detail: error.to_string() })
    }

    fn uid(&self, kind: &str, id: &str) -> Result<EntityUid, PolicyError> {
        let name =
            self.types.get(kind).ok_or_else(|| PolicyError { detail: format!("no entity type {kind}") })?;
        Ok(EntityUid::from_type_name_and_id(name.clone(), EntityId::new(id)))
    }
}

fn principal_entity(principal: &Principal) -> (&'static str, &str, &[String]) {
    match principal {
        Principal::User(user) => ("User", user.id.as_str(), &user.roles),
        Principal::Host(host) => ("Host", host.as_str(), &[]),
        Principal::JoinToken(_) => ("JoinToken", "join-token", &[]),
        Principal::Anonymous => ("Anonymous", "anonymous", &[]),
    }
}

fn type_names() -> Result<HashMap<&'static str, EntityTypeName>, PolicyError> {
    let others = ["Role", "JoinToken", "Anonymous", "Action"];
    let all = ResourceKind::ALL.iter().map(|kind| kind.cedar_type()).chain(others);
    all.map(|name| {
        let parsed: EntityTypeName =
            name.parse().map_err(|error| PolicyError { detail: format!("{name}: {error}") })?;
        Ok((name, parsed))
    })
    .collect()
}

/// A host as something that an action is about.
pub fn host_resource(id: &HostId, name: &str) -> Resource {
    Resource::of_cluster(ResourceKind::Host, id.as_str(), name)
}

#[cfg(test)]
mod tests;
