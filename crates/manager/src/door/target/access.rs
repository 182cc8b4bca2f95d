//! Teams, roles, grants, policies and approvals, as routes name them.

use std::sync::Arc;

use berth_api::endpoint::Endpoint;
use berth_api::manager::{
    Approval, ApprovalPath, Grant, GrantCreate, GrantPath, Policy, PolicyPath, Role, RolePath, Segment, Team,
    TeamPath,
};
use berth_model::name::Name;
use berth_model::{PolicyId, Problem, RoleId, TeamId};

use super::{Located, Target, segment_or_cluster, segment_resource};
use crate::auth::Principal;
use crate::cluster::Cluster;
use crate::door::Input;
use crate::policy::{Attribute, Resource, ResourceKind};
use crate::records::{Record, Row, UniqueName};

/// A team that the path names.
pub struct TheTeam(pub Arc<Row<Team>>);

impl<E: Endpoint<Path = TeamPath>> Target<E> for TheTeam {
    const KIND: ResourceKind = ResourceKind::Team;
    fn find(cluster: &Cluster, _: &Principal, input: &Input<E>) -> Result<Located<Self>, Problem> {
        let team = team(cluster, &input.path.team)?;
        let resource = Resource::of_cluster(ResourceKind::Team, &team.id, team.name.as_str());
        Ok(Located { resource, target: Self(team) })
    }
}

/// A role that somebody made, and that the path names.
pub struct TheRole(pub Arc<Row<Role>>);

impl<E: Endpoint<Path = RolePath>> Target<E> for TheRole {
    const KIND: ResourceKind = ResourceKind::Role;
    fn find(cluster: &Cluster, _: &Principal, input: &Input<E>) -> Result<Located<Self>, Problem> {
        let role = named::<Role, RoleId>(cluster, &input.path.role_name)?;
        let resource = Resource::of_cluster(ResourceKind::Role, &role.id, role.name.as_str());
        Ok(Located { resource, target: Self(role) })
    }
}

/// A grant that the path names.
pub struct TheGrant(pub Arc<Row<Grant>>);

impl<E: Endpoint<Path = GrantPath>> Target<E> for TheGrant {
    const KIND: ResourceKind = ResourceKind::Grant;
    fn find(cluster: &Cluster, _: &Principal, input: &Input<E>) -> Result<Located<Self>, Problem> {
        let grant = cluster.records.require::<Grant>(input.path.grant.as_str())?;
        Ok(Located { resource: grant_resource(cluster, &grant), target: Self(grant) })
    }
}

/// A grant in its segment, or in the cluster.
pub fn grant_resource(cluster: &Cluster, grant: &Grant) -> Resource {
    let parent = match &grant.segment {
        Some(segment) => segment_resource(cluster, segment),
        None => Resource::cluster(),
    };
    Resource::inside(parent, ResourceKind::Grant, grant.id.as_str(), grant.id.as_str())
}

/// Where a grant is to be: a segment, or the cluster.
pub struct GrantedIn(pub Option<Arc<Row<Segment>>>);

impl Target<GrantCreate> for GrantedIn {
    const KIND: ResourceKind = ResourceKind::Segment;
    fn find(cluster: &Cluster, _: &Principal, input: &Input<GrantCreate>) -> Result<Located<Self>, Problem> {
        let found = segment_or_cluster(cluster, input.body.segment.as_deref())?;
        Ok(Located { resource: found.resource, target: Self(found.target) })
    }
}

/// A policy that the path names.
pub struct ThePolicy(pub Arc<Row<Policy>>);

impl<E: Endpoint<Path = PolicyPath>> Target<E> for ThePolicy {
    const KIND: ResourceKind = ResourceKind::Policy;
    fn find(cluster: &Cluster, _: &Principal, input: &Input<E>) -> Result<Located<Self>, Problem> {
        let policy = named::<Policy, PolicyId>(cluster, &input.path.policy)?;
        Ok(Located { resource: policy_resource(&policy), target: Self(policy) })
    }
}

/// A policy in the cluster.
pub fn policy_resource(policy: &Policy) -> Resource {
    Resource::of_cluster(ResourceKind::Policy, policy.id.as_str(), policy.name.as_str())
        .with("active", Attribute::Flag(policy.active))
}

/// An approval that the path names.
pub struct TheApproval(pub Arc<Row<Approval>>);

impl<E: Endpoint<Path = ApprovalPath>> Target<E> for TheApproval {
    const KIND: ResourceKind = ResourceKind::Approval;
    fn find(cluster: &Cluster, _: &Principal, input: &Input<E>) -> Result<Located<Self>, Problem> {
        let approval = cluster.records.require::<Approval>(input.path.approval.as_str())?;
        Ok(Located { resource: approval_resource(cluster, &approval), target: Self(approval) })
    }
}

/// An approval in the segment that it is about, or in the cluster.
pub fn approval_resource(cluster: &Cluster, approval: &Approval) -> Resource {
    let parent = match &approval.segment {
        Some(segment) => segment_resource(cluster, segment),
        None => Resource::cluster(),
    };
    Resource::inside(parent, ResourceKind::Approval, approval.id.as_str(), approval.id.as_str())
}

/// A team by id or name.
///
/// # Errors
/// That there is none.
pub fn team(cluster: &Cluster, text: &str) -> Result<Arc<Row<Team>>, Problem> {
    named::<Team, TeamId>(cluster, text)
}

/// A record by its id, or by its name, which is unique in the cluster.
pub(super) fn named<T: Record, I: std::str::FromStr>(
    cluster: &Cluster,
    text: &str,
) -> Result<Arc<Row<T>>, Problem> {
    let missing = || Problem::not_found(T::NOUN, text);
    if text.parse::<I>().is_ok()
        && let Some(row) = cluster.records.get(text)
    {
        return Ok(row);
    }
    let name: Name = text.parse().map_err(|_| missing())?;
    let id = cluster.records.id_of(&UniqueName::in_cluster(T::NOUN, &name)).ok_or_else(missing)?;
    cluster.records.get(&id).ok_or_else(missing)
}
