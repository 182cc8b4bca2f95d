//! Grants: who has which role where, and until when.

use berth_api::manager::{
    Approval, ApprovalState, CreateGrant, Grant, GrantCreate, GrantDelete, GrantList, GrantRequest, Page,
    RequestGrant, Segment, User,
};
use berth_model::access::Action;
use berth_model::name::Name;
use berth_model::{ApprovalId, GrantId, Problem, SegmentId, Timestamp, UserId};

use super::{list, role};
use crate::auth::accounts;
use crate::cluster::Cluster;
use crate::digest::sha256_hex;
use crate::door::second_person::{self, APPROVAL_KEPT_MS};
use crate::door::target::access::grant_resource;
use crate::door::target::{self, GrantedIn, TheCluster, TheGrant, TheList};
use crate::door::{Answer, Call, Ctx, Door};
use crate::policy::escalation::Gift;
use crate::records::Transaction;

/// Longest time that one can ask to have a role for, in seconds: a week. Longer is a grant that somebody should make.
const REQUEST_S_MAX: u64 = 7 * 24 * 3600;
/// Longest note or reason, in characters.
const NOTE_CHARS_MAX: usize = 500;

/// Mounts the routes of this file.
pub fn mount(door: Door) -> Door {
    door.mount(show_all).mount(create).mount(delete).mount(request)
}

async fn show_all(call: Call<GrantList, TheList>) -> Result<Answer<Page<Grant>>, Problem> {
    let (ctx, query) = (&call.ctx, &call.input.query);
    let cluster = ctx.cluster();
    let segment = query.segment.as_deref().map(|name| ctx.segment(name, Action::SegmentView)).transpose()?;
    let visible = ctx.visible(Action::GrantView);
    let me = ctx.user()?;
    let own = ctx.gate().policies.teams_of(me);
    let mut grants = cluster.records.list::<Grant>();
    grants.retain(|grant| {
        let is_own =
            grant.user.as_ref() == Some(&me.id) || grant.team.as_ref().is_some_and(|team| own.contains(team));
        let is_wanted = segment.as_ref().is_none_or(|only| grant.segment.as_ref() == Some(&only.0.value.id));
        is_wanted && (is_own || visible.shows(grant.segment.as_ref(), || grant_resource(cluster, grant)))
    });
    // Whoever is named is looked for among what may be seen: another name finds nothing, whether it is there or not.
    if let Some(name) = &query.team {
        let team = target::access::team(cluster, name).ok().map(|row| row.value.id.clone());
        grants.retain(|grant| team.is_some() && grant.team == team);
    }
    if let Some(name) = &query.user {
        let user = target::user(cluster, name).ok().map(|row| row.value.id.clone());
        grants.retain(|grant| user.is_some() && grant.user == user);
    }
    let page = list::page(
        &grants,
        query.limit,
        query.cursor.as_deref(),
        |row| row.id.clone(),
        |row| row.value.clone(),
    )?;
    Ok(Answer::new(page))
}

async fn create(call: Call<GrantCreate, GrantedIn>) -> Result<Answer<Grant>, Problem> {
    let (ctx, wish) = (&call.ctx, &call.input.body);
    let cluster = ctx.cluster();
    let _deciding = cluster.deciding().await;
    let segment = call.target.0.as_ref().map(|row| row.value.id.clone());
    let (team, user) = receiver(cluster, wish)?;
    let role = role_of(cluster, &wish.role)?;
    if wish.until.is_some_and(|until| until <= ctx.now()) {
        let until = wish.until.map(|until| until.to_string()).unwrap_or_default();
        return Err(Problem::field("until", until, "a time to come"));
    }
    check_note("note", &wish.note)?;
    may_give(ctx, &role, segment.clone(), wish.until)?;
    let grant = Grant {
        id: GrantId::from_entropy(cluster.entropy.id()),
        team,
        user,
        role,
        segment,
        until: wish.until,
        note: wish.note.clone(),
        granted_by: ctx.actor(),
        created_at: ctx.now(),
    };
    let mut transaction = Transaction::new();
    transaction.create(&grant);
    if let Some(segment) = &call.target.0 {
        transaction.unchanged(segment);
    }
    cluster.records.commit(transaction).await?;
    Ok(Answer::new(grant))
}

fn receiver(
    cluster: &Cluster,
    wish: &CreateGrant,
) -> Result<(Option<berth_model::TeamId>, Option<UserId>), Problem> {
    match (&wish.team, &wish.user) {
        (Some(team), None) => Ok((Some(target::access::team(cluster, team)?.value.id.clone()), None)),
        (None, Some(user)) => Ok((None, Some(target::user(cluster, user)?.value.id.clone()))),
        (Some(_), Some(user)) => Err(Problem::field("user", user, "either a team or a user, not both")),
        (None, None) => Err(Problem::field("team", "", "the team, or the user, that is to have the role")),
    }
}

fn role_of(cluster: &Cluster, text: &str) -> Result<Name, Problem> {
    let wrong = || Problem::field("role", text, "a role; 'berth role list' shows them");
    let name: Name = text.parse().map_err(|_| wrong())?;
    role::actions_of(cluster, &name).map(|_| name).ok_or_else(wrong)
}

fn check_note(field: &str, text: &str) -> Result<(), Problem> {
    if text.chars().count() > NOTE_CHARS_MAX {
        return Err(Problem::field(field, text, format!("at most {NOTE_CHARS_MAX} characters")));
    }
    Ok(())
}

fn may_give(
    ctx: &Ctx,
    role: &Name,
    segment: Option<SegmentId>,
    until: Option<Timestamp>,
) -> Result<(), Problem> {
    let actions = role::actions_of(ctx.cluster(), role).unwrap_or_default();
    ctx.gate().policies.may_give(&ctx.principal, &[Gift { actions, segment, until }])
}

async fn delete(call: Call<GrantDelete, TheGrant>) -> Result<Answer<()>, Problem> {
    let (cluster, TheGrant(grant)) = (call.ctx.cluster(), call.target);
    let _deciding = cluster.deciding().await;
    let others = cluster.records.list_where::<Grant>(|other| other.id != grant.value.id);
    let teams = accounts::teams(&cluster.records);
    if accounts::administrators(&cluster.records, &teams, &others, call.ctx.now()).is_empty() {
        return Err(accounts::last_administrator("grant", &grant.value.id));
    }
    let mut transaction = Transaction::new();
    transaction.remove(&grant);
    cluster.records.commit(transaction).await?;
    Ok(Answer::new(()))
}

/// A wish waits as an approval does; whoever approves makes the grant.
async fn request(call: Call<GrantRequest, TheCluster>) -> Result<Answer<Approval>, Problem> {
    let (ctx, wish) = (&call.ctx, call.input.body.clone());
    let cluster = ctx.cluster();
    let user = ctx.user()?;
    let role = role_of(cluster, &wish.role)?;
    if wish.for_s == 0 || wish.for_s > REQUEST_S_MAX {
        return Err(Problem::field("for_s", wish.for_s, format!("1 to {REQUEST_S_MAX} seconds")));
    }
    check_note("reason", &wish.reason)?;
    // Only where one sees something already: the answer must not tell which other segments there are.
    let segment = wish.segment.as_deref().map(|name| ctx.segment(name, Action::SegmentView)).transpose()?;
    let place = segment.as_ref().map_or("cluster".to_owned(), |found| found.0.name.to_string());
    let segment = segment.map(|found| found.0.value.id.clone());
    let resolved = RequestGrant { segment: segment.as_ref().map(ToString::to_string), ..wish.clone() };
    let now = ctx.now();
    let hashed = serde_json::to_vec(&(user.id.as_str(), &resolved)).expect("plain data");
    let approval = Approval {
        id: ApprovalId::from_entropy(cluster.entropy.id()),
        requested_by: user.id.clone(),
        requester: user.name.clone(),
        action: Action::GrantRequest,
        resource: segment.as_ref().map_or("cluster".to_owned(), |_| format!("segment:{place}")),
        segment,
        request: format!("role {role} for {} s in {place}", wish.for_s),
        request_sha256: sha256_hex(&hashed),
        reason: wish.reason,
        grant: Some(resolved),
        state: ApprovalState::Pending,
        decided_by: None,
        approver: None,
        created_at: now,
        expires_at: now.plus_millis(APPROVAL_KEPT_MS),
    };
    let _deciding = cluster.deciding().await;
    if let Some(known) = second_person::waiting(cluster, user, now, |one| {
        one.grant.is_some() && one.request_sha256 == approval.request_sha256
    })? {
        return Ok(Answer::new(known.value.clone()).at(known.revision));
    }
    let mut transaction = Transaction::new();
    transaction.create(&approval);
    cluster.records.commit(transaction).await?;
    Ok(Answer::new(approval))
}

/// The grant that an approved wish comes to, if the one who approves may give it.
pub(super) fn granted(ctx: &Ctx, approval: &Approval, wish: &RequestGrant) -> Result<Grant, Problem> {
    let (cluster, now) = (ctx.cluster(), ctx.now());
    let role = role_of(cluster, &wish.role)?;
    let until = Some(now.plus_millis(wish.for_s * 1000));
    if let Some(gone) =
        approval.segment.as_ref().filter(|id| cluster.records.get::<Segment>(id.as_str()).is_none())
    {
        return Err(Problem::not_found("segment", gone));
    }
    if cluster.records.get::<User>(approval.requested_by.as_str()).is_none() {
        return Err(Problem::not_found("user", &approval.requester));
    }
    may_give(ctx, &role, approval.segment.clone(), until)?;
    Ok(Grant {
        id: GrantId::from_entropy(cluster.entropy.id()),
        team: None,
        user: Some(approval.requested_by.clone()),
        role,
        segment: approval.segment.clone(),
        until,
        note: format!("asked for by {} ({}): {}", approval.requester, approval.id, approval.reason),
        granted_by: ctx.actor(),
        created_at: now,
    })
}
