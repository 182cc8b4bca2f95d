//! Who may do what: teams, roles, grants, policies, approvals, quotas.

use berth_model::access::Action;
use berth_model::name::Name;
use berth_model::{ApprovalId, GrantId, PolicyId, RoleId, SegmentId, TeamId, Timestamp, UserId};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Where an external group comes from, and what it is called there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
pub struct ExternalGroup {
    /// The login provider's name in the manager's login configuration.
    pub provider: String,
    /// The group as the provider calls it: compared letter by letter, and none has a meaning of its own.
    pub group: String,
}

/// People who have something in common.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Team {
    /// Its id.
    pub id: TeamId,
    /// Its name, unique in the cluster.
    pub name: Name,
    /// The team that it is a part of: what is granted to that one, its members have as well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<TeamId>,
    /// Its members.
    pub members: Vec<UserId>,
    /// Groups of login providers whose members are members.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub external_groups: Vec<ExternalGroup>,
    /// When it was made.
    pub created_at: Timestamp,
}

/// Wish for a team.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
pub struct CreateTeam {
    /// Its name.
    pub name: String,
    /// The team that it is to be a part of (id or name).
    #[serde(default)]
    pub parent: Option<String>,
    /// Its members (ids or names).
    #[serde(default)]
    pub members: Vec<String>,
    /// Groups of login providers whose members are to be members.
    #[serde(default)]
    pub external_groups: Vec<ExternalGroup>,
}

/// A change of a team; what is absent stays.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
pub struct UpdateTeam {
    /// Another name.
    #[serde(default)]
    pub name: Option<Name>,
    /// The team that it is to be a part of (id or name); empty: of none.
    #[serde(default)]
    pub parent: Option<String>,
    /// Who comes in (ids or names).
    #[serde(default)]
    pub add_members: Vec<String>,
    /// Who goes out (ids or names).
    #[serde(default)]
    pub remove_members: Vec<String>,
    /// Groups of login providers that come in.
    #[serde(default)]
    pub add_external_groups: Vec<ExternalGroup>,
    /// Groups of login providers that go out.
    #[serde(default)]
    pub remove_external_groups: Vec<ExternalGroup>,
}

/// A set of actions that can be granted together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Role {
    /// Its id; none for the built-in ones, which are the same everywhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<RoleId>,
    /// Its name, unique in the cluster.
    pub name: Name,
    /// What it is for.
    #[serde(default)]
    pub summary: String,
    /// What it allows.
    pub actions: Vec<Action>,
}

/// Wish for a role.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct CreateRole {
    /// Its name.
    pub name: Name,
    /// What it is for.
    #[serde(default)]
    pub summary: String,
    /// A role whose actions it begins with.
    #[serde(default)]
    pub copy_of: Option<Name>,
    /// Actions that it has as well.
    #[serde(default)]
    pub actions: Vec<Action>,
    /// Actions of the copied role that it does not have.
    #[serde(default)]
    pub without: Vec<Action>,
}

/// A change of a role's actions; what is absent stays.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
pub struct UpdateRole {
    /// What it is for.
    #[serde(default)]
    pub summary: Option<String>,
    /// Actions that come in.
    #[serde(default)]
    pub add_actions: Vec<Action>,
    /// Actions that go out.
    #[serde(default)]
    pub remove_actions: Vec<Action>,
}

/// That a team, or a user, has a role in a segment and those inside it, or everywhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Grant {
    /// Its id.
    pub id: GrantId,
    /// The team that has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub team: Option<TeamId>,
    /// The user that has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<UserId>,
    /// The role's name: a built-in one, or one that somebody made.
    pub role: Name,
    /// The segment; none: the whole cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub segment: Option<SegmentId>,
    /// Until when; none: until it is taken away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Timestamp>,
    /// A word about it.
    #[serde(default)]
    pub note: String,
    /// Who made it.
    pub granted_by: String,
    /// When it was made.
    pub created_at: Timestamp,
}

/// Wish for a grant, or, as a request, for somebody else to make it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CreateGrant {
    /// To which team (id or name).
    #[serde(default)]
    pub team: Option<String>,
    /// To which user (id or name).
    #[serde(default)]
    pub user: Option<String>,
    /// Which role.
    pub role: String,
    /// In which segment (id or name); none: everywhere.
    #[serde(default)]
    pub segment: Option<String>,
    /// Until when; none: until it is taken away.
    #[serde(default)]
    pub until: Option<Timestamp>,
    /// A word about it.
    #[serde(default)]
    pub note: String,
}

/// A user's wish to have a role for some time.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RequestGrant {
    /// Which role.
    pub role: String,
    /// In which segment (id or name); none: everywhere.
    #[serde(default)]
    pub segment: Option<String>,
    /// For how long from the approval on, in seconds.
    pub for_s: u64,
    /// Why.
    #[serde(default)]
    pub reason: String,
}

/// Which grants.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct GrantListQuery {
    /// Only those of this team (id or name).
    #[serde(default)]
    pub team: Option<String>,
    /// Only those of this user (id or name), teams not counted.
    #[serde(default)]
    pub user: Option<String>,
    /// Only those in this segment (id or name).
    #[serde(default)]
    pub segment: Option<String>,
    /// Most items in the answer.
    #[serde(default)]
    pub limit: Option<u32>,
    /// Where the last page ended: its `next_cursor`.
    #[serde(default)]
    pub cursor: Option<String>,
}

/// A policy that somebody wrote, in Cedar.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Policy {
    /// Its id.
    pub id: PolicyId,
    /// Its name, unique in the cluster.
    pub name: Name,
    /// One or more Cedar policies.
    pub text: String,
    /// Whether it counts. One that does not is in shadow: what it would change is shown.
    pub active: bool,
    /// Who wrote it.
    pub written_by: String,
    /// When it was made.
    pub created_at: Timestamp,
}

/// Wish for a policy; it begins in shadow.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct CreatePolicy {
    /// Its name.
    pub name: Name,
    /// One or more Cedar policies.
    pub text: String,
}

/// A recent decision that a policy would have changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ShadowDifference {
    /// Who asked.
    pub actor: String,
    /// The action.
    pub action: Action,
    /// What it was about.
    pub resource: String,
    /// What was decided: `allow` or `deny`.
    pub was: String,
    /// What would have been.
    pub would_be: String,
    /// How often.
    pub times: u64,
}

/// A policy, and what it changes or would change among recent decisions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PolicyReport {
    /// The policy.
    pub policy: Policy,
    /// How many recent decisions were looked at.
    pub decisions: u64,
    /// Those that differ with and without it.
    pub differences: Vec<ShadowDifference>,
    /// Those at which it failed, which would be denied.
    pub errors: Vec<String>,
}

/// How an approval stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ApprovalState {
    /// Nobody has decided yet.
    Pending,
    /// Approved; the request may be made again, once.
    Approved,
    /// Denied.
    Denied,
    /// The request was made, or the grant, and that was that.
    Used,
}

/// Something that waits for a second person.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Approval {
    /// Its id.
    pub id: ApprovalId,
    /// Who asked.
    pub requested_by: UserId,
    /// Who asked, by name.
    pub requester: Name,
    /// What is to be done.
    pub action: Action,
    /// To what.
    pub resource: String,
    /// The segment that it is in; none: it is about the cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub segment: Option<SegmentId>,
    /// Method, path and query of the request; for a wished grant, what is wished for.
    pub request: String,
    /// SHA-256 of the very request, in hexadecimal: another request is not approved by this.
    pub request_sha256: String,
    /// Why a second person is needed, or why the grant is wished for.
    pub reason: String,
    /// The grant that is wished for, if that is what it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grant: Option<RequestGrant>,
    /// How it stands.
    pub state: ApprovalState,
    /// Who decided.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decided_by: Option<Name>,
    /// Who approved, by id: the approval is good as long as that user may decide.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approver: Option<UserId>,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// Until when it can be approved and used.
    pub expires_at: Timestamp,
}

/// Who can do something, and by what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Holder {
    /// The user.
    pub user: Name,
    /// By what: a grant with its team and role, or a policy.
    pub by: String,
    /// Until when; none: until it is taken away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Timestamp>,
}

/// What is asked about whom.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct WhatCanQuery {
    /// The user (id or name); none: the caller.
    #[serde(default)]
    pub user: Option<String>,
}

/// What somebody can do somewhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Holding {
    /// Where: a segment's name, or `cluster`.
    pub scope: String,
    /// The role.
    pub role: Name,
    /// The grant.
    pub grant: GrantId,
    /// The team that has it; none: the user itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub team: Option<Name>,
    /// The actions.
    pub actions: Vec<Action>,
    /// Until when; none: until it is taken away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Timestamp>,
}

/// The most that the VMs of a segment, with those of the segments inside it, may be and take together; what is absent
/// is not bounded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Quota {
    /// VMs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vms: Option<u64>,
    /// Virtual CPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u64>,
    /// Memory in MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u64>,
    /// Disks in MiB, at their full sizes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_mib: Option<u64>,
    /// Snapshots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshots: Option<u64>,
    /// What snapshots occupy, in MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_mib: Option<u64>,
}

/// What a segment has used up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Usage {
    /// VMs.
    pub vms: u64,
    /// Virtual CPUs.
    pub vcpus: u64,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Disks in MiB, at their full sizes.
    pub disk_mib: u64,
    /// Snapshots.
    pub snapshots: u64,
    /// What snapshots occupy, in MiB.
    pub snapshot_mib: u64,
}

/// A segment with what is used of its quota.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SegmentReport {
    /// The segment.
    pub segment: super::Segment,
    /// What is used, segments inside it counted.
    pub usage: Usage,
}

/// A change of a segment; what is absent stays.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
pub struct UpdateSegment {
    /// Another name. VMs are named after it from then on.
    #[serde(default)]
    pub name: Option<Name>,
    /// Another quota, as a whole.
    #[serde(default)]
    pub quota: Option<Quota>,
}

/// A part of somebody's rights: what a token may be used for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Scope {
    /// The actions.
    pub actions: Vec<Action>,
    /// The segment, with those inside it; none: everywhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub segment: Option<SegmentId>,
}
