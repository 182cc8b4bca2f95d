//! Teams: who is in which, and which is a part of which.
//!
//! Being let into a team is worth all that the team and those above it were granted, so whoever lets somebody in must
//! hold all of that.

use berth_api::manager::{
    CreateTeam, ExternalGroup, Grant, Page, Team, TeamCreate, TeamDelete, TeamList, TeamShow, TeamUpdate,
    UpdateTeam, User,
};
use berth_model::access::Action;
use berth_model::name::Name;
use berth_model::{Problem, ProblemCode, TeamId, UserId};

use super::list;
use crate::auth::accounts;
use crate::cluster::Cluster;
use crate::door::target::{self, TheCluster, TheList, TheTeam};
use crate::door::{Answer, Call, Ctx, Door};
use crate::policy::book::DEPTH_MAX;
use crate::policy::{Resource, ResourceKind};
use crate::records::{Record, Row, Transaction, UniqueName};

/// Most members of one team. More are two teams; and the record stays of a size that a store takes.
const MEMBERS_MAX: usize = 10_000;
/// Most external groups of one team, and the longest name of one, in bytes.
const GROUPS_MAX: usize = 100;
const GROUP_BYTES_MAX: usize = 1024;

/// Mounts the routes of this file.
pub fn mount(door: Door) -> Door {
    door.mount(show_all).mount(create).mount(show).mount(update).mount(delete)
}

async fn show_all(call: Call<TeamList, TheList>) -> Result<Answer<Page<Team>>, Problem> {
    let (ctx, query) = (&call.ctx, &call.input.query);
    let visible = ctx.visible(Action::UserView);
    let own = ctx.gate().policies.teams_of(ctx.user()?);
    let mut teams = ctx.cluster().records.list::<Team>();
    teams.retain(|team| {
        own.contains(&team.value.id)
            || visible.shows(None, || Resource::of_cluster(ResourceKind::Team, &team.id, team.name.as_str()))
    });
    teams.sort_by(|a, b| a.name.cmp(&b.name));
    let key = |row: &_| Row::<Team>::clone(row).name.to_string();
    let page =
        list::page(&teams, query.limit, query.cursor.as_deref(), |row| key(&**row), |row| row.value.clone())?;
    Ok(Answer::new(page))
}

async fn show(call: Call<TeamShow, TheTeam>) -> Result<Answer<Team>, Problem> {
    let TheTeam(team) = call.target;
    Ok(Answer::new(team.value.clone()).at(team.revision))
}

async fn create(call: Call<TeamCreate, TheCluster>) -> Result<Answer<Team>, Problem> {
    let (ctx, wish) = (&call.ctx, &call.input.body);
    let cluster = ctx.cluster();
    let _deciding = cluster.deciding().await;
    let team = new_team(cluster, wish, ctx)?;
    if let Some(parent) = &team.parent {
        ctx.gate().policies.may_give(&ctx.principal, &ctx.gate().policies.worth_of_team(parent)?)?;
        check_depth(cluster, &team.id, parent)?;
    }
    let mut transaction = Transaction::new();
    transaction.create(&team);
    transaction.claim(&UniqueName::in_cluster(Team::NOUN, &team.name), team.id.as_str());
    cluster.records.commit(transaction).await?;
    Ok(Answer::new(team))
}

fn new_team(cluster: &Cluster, wish: &CreateTeam, ctx: &Ctx) -> Result<Team, Problem> {
    let name: Name =
        wish.name.parse().map_err(|error| Problem::field("name", &wish.name, format!("{error}")))?;
    let parent = wish.parent.as_deref().map(|parent| target::access::team(cluster, parent)).transpose()?;
    check_groups("external_groups", &wish.external_groups)?;
    Ok(Team {
        id: TeamId::from_entropy(cluster.entropy.id()),
        name,
        parent: parent.map(|row| row.value.id.clone()),
        members: members(cluster, "members", &wish.members)?,
        external_groups: wish.external_groups.clone(),
        created_at: ctx.now(),
    })
}

fn members(cluster: &Cluster, field: &str, names: &[String]) -> Result<Vec<UserId>, Problem> {
    let mut users = Vec::new();
    for (index, name) in names.iter().enumerate() {
        let user = target::user(cluster, name)
            .map_err(|_| Problem::field(format!("{field}.{index}"), name, "a user"))?;
        users.push(user.value.id.clone());
    }
    users.sort_unstable();
    users.dedup();
    if users.len() > MEMBERS_MAX {
        return Err(Problem::field(field, users.len(), format!("at most {MEMBERS_MAX} members")));
    }
    Ok(users)
}

fn check_groups(field: &str, groups: &[ExternalGroup]) -> Result<(), Problem> {
    let bad = |group: &ExternalGroup| {
        group.provider.is_empty() || group.group.is_empty() || group.group.len() > GROUP_BYTES_MAX
    };
    if groups.len() > GROUPS_MAX || groups.iter().any(bad) {
        let expected = format!(
            "at most {GROUPS_MAX} groups, each with a provider and a name of at most {GROUP_BYTES_MAX} bytes"
        );
        return Err(Problem::field(field, groups.len(), expected));
    }
    Ok(())
}

/// Refuses rings, and chains that nobody sees through.
fn check_depth(cluster: &Cluster, team: &TeamId, parent: &TeamId) -> Result<(), Problem> {
    let all = cluster.records.list::<Team>();
    let above = |id: &TeamId| all.iter().find(|row| row.value.id == *id).and_then(|row| row.parent.clone());
    let (mut next, mut height) = (Some(parent.clone()), 0);
    while let Some(id) = next {
        height += 1;
        if id == *team {
            return Err(Problem::field("parent", &id, "a team that is not inside this one"));
        }
        if height + below(&all, team) > DEPTH_MAX {
            return Err(Problem::field(
                "parent",
                parent,
                format!("at most {DEPTH_MAX} teams inside each other"),
            ));
        }
        next = above(&id);
    }
    Ok(())
}

/// How many levels of teams there are from this one down.
fn below(all: &[std::sync::Arc<Row<Team>>], team: &TeamId) -> usize {
    let mut level = vec![team.clone()];
    let mut levels = 0;
    while !level.is_empty() && levels <= DEPTH_MAX {
        levels += 1;
        let inside =
            all.iter().filter(|row| row.parent.as_ref().is_some_and(|parent| level.contains(parent)));
        level = inside.map(|row| row.value.id.clone()).collect();
    }
    levels
}

async fn update(call: Call<TeamUpdate, TheTeam>) -> Result<Answer<Team>, Problem> {
    let (ctx, wish) = (&call.ctx, &call.input.body);
    let cluster = ctx.cluster();
    let _deciding = cluster.deciding().await;
    // What was found at the door may have changed while this waited its turn.
    let row = cluster.records.require::<Team>(&call.target.0.id)?;
    let changed = changed(ctx, &row, wish)?;
    let gives =
        !wish.add_members.is_empty() || !wish.add_external_groups.is_empty() || changed.parent != row.parent;
    if gives {
        let policies = &ctx.gate().policies;
        let mut worth = policies.worth_of_team(&row.value.id)?;
        if let Some(parent) = changed.parent.as_ref().filter(|parent| Some(*parent) != row.parent.as_ref()) {
            check_depth(cluster, &row.value.id, parent)?;
            worth.extend(policies.worth_of_team(parent)?);
        }
        policies.may_give(&ctx.principal, &worth)?;
    }
    if changed.members != row.members || changed.external_groups != row.external_groups {
        let policies = &ctx.gate().policies;
        policies.may_give(&ctx.principal, &policies.policies_on_team(&row.value.id)?)?;
    }
    let mut transaction = Transaction::new();
    if changed.name != row.name {
        transaction.claim(&UniqueName::in_cluster(Team::NOUN, &changed.name), &row.id);
        transaction.release(&UniqueName::in_cluster(Team::NOUN, &row.name));
    }
    transaction.replace(&row, &changed);
    refuse_without_administrator(cluster, ctx, &changed)?;
    let revision = cluster.records.commit(transaction).await?;
    Ok(Answer::new(changed).at(revision))
}

fn changed(ctx: &Ctx, row: &Row<Team>, wish: &UpdateTeam) -> Result<Team, Problem> {
    let cluster = ctx.cluster();
    let mut team = row.value.clone();
    if let Some(name) = &wish.name {
        team.name = name.clone();
    }
    match wish.parent.as_deref() {
        Some("") => team.parent = None,
        Some(parent) => team.parent = Some(target::access::team(cluster, parent)?.value.id.clone()),
        None => {}
    }
    let out = members(cluster, "remove_members", &wish.remove_members)?;
    team.members.retain(|user| !out.contains(user));
    team.members.extend(members(cluster, "add_members", &wish.add_members)?);
    // Users that are gone since are no members.
    team.members.retain(|user| cluster.records.get::<User>(user.as_str()).is_some());
    team.members.sort_unstable();
    team.members.dedup();
    check_groups("add_external_groups", &wish.add_external_groups)?;
    team.external_groups.retain(|group| !wish.remove_external_groups.contains(group));
    team.external_groups.extend(wish.add_external_groups.iter().cloned());
    team.external_groups.sort();
    team.external_groups.dedup();
    if team.members.len() > MEMBERS_MAX || team.external_groups.len() > GROUPS_MAX {
        let expected = format!("at most {MEMBERS_MAX} members and {GROUPS_MAX} groups");
        return Err(Problem::field("add_members", team.members.len(), expected));
    }
    Ok(team)
}

/// A change that takes the last administrator's rights away helps nobody.
fn refuse_without_administrator(cluster: &Cluster, ctx: &Ctx, changed: &Team) -> Result<(), Problem> {
    let mut teams = accounts::teams(&cluster.records);
    teams.retain(|team| team.id != changed.id);
    teams.push(changed.clone());
    let grants = cluster.records.list::<Grant>();
    if accounts::administrators(&cluster.records, &teams, &grants, ctx.now()).is_empty() {
        return Err(accounts::last_administrator("team", &changed.name));
    }
    Ok(())
}

async fn delete(call: Call<TeamDelete, TheTeam>) -> Result<Answer<()>, Problem> {
    let (cluster, TheTeam(team)) = (call.ctx.cluster(), call.target);
    let _deciding = cluster.deciding().await;
    let needed_by = |what: String| {
        let message = format!("team {} is still needed: {what}", team.name);
        Problem::new(ProblemCode::Protected, message).at(
            "team",
            &team.name,
            "a team without grants and teams",
        )
    };
    let is_its = |grant: &Grant| grant.team.as_ref() == Some(&team.value.id);
    if let Some(grant) = cluster.records.list_where::<Grant>(is_its).first() {
        return Err(needed_by(format!("it has grant {}", grant.id)));
    }
    let is_inside = |other: &Team| other.parent.as_ref() == Some(&team.value.id);
    if let Some(inside) = cluster.records.list_where::<Team>(is_inside).first() {
        return Err(needed_by(format!("team {} is a part of it", inside.name)));
    }
    let mut transaction = Transaction::new();
    transaction.remove(&team);
    transaction.release(&UniqueName::in_cluster(Team::NOUN, &team.name));
    cluster.records.commit(transaction).await?;
    Ok(Answer::new(()))
}
