//! Roles: the built-in ones, which can be copied, and those that somebody made.

use berth_api::manager::{CreateRole, Grant, Page, Role, RoleCreate, RoleDelete, RoleList, RoleUpdate};
use berth_model::access::{Action, BUILT_IN_ROLES, BuiltInRole, built_in_role};
use berth_model::name::Name;
use berth_model::{Problem, ProblemCode, RoleId};

use super::list;
use crate::cluster::Cluster;
use crate::door::target::{TheCluster, TheRole};
use crate::door::{Answer, Call, Door};
use crate::policy::escalation::Gift;
use crate::records::{Record, Transaction, UniqueName};

/// Longest summary of a role, in characters.
const SUMMARY_CHARS_MAX: usize = 200;

/// Mounts the routes of this file.
pub fn mount(door: Door) -> Door {
    door.mount(show_all).mount(create).mount(update).mount(delete)
}

fn shown(role: &BuiltInRole) -> Role {
    let name: Name = role.name.parse().expect("built-in names keep the rule");
    Role { id: None, name, summary: role.summary.to_owned(), actions: role.actions().collect() }
}

async fn show_all(call: Call<RoleList, TheCluster>) -> Result<Answer<Page<Role>>, Problem> {
    let query = &call.input.query;
    let mut roles: Vec<Role> = BUILT_IN_ROLES.iter().map(shown).collect();
    roles.extend(call.ctx.cluster().records.list::<Role>().iter().map(|row| row.value.clone()));
    roles.sort_by_key(|role| (role.id.is_some(), role.name.to_string()));
    let key = |role: &Role| format!("{} {}", u8::from(role.id.is_some()), role.name);
    Ok(Answer::new(list::page(&roles, query.limit, query.cursor.as_deref(), key, Role::clone)?))
}

/// What a role of this name allows.
pub(super) fn actions_of(cluster: &Cluster, name: &Name) -> Option<Vec<Action>> {
    if let Some(role) = built_in_role(name.as_str()) {
        return Some(role.actions().collect());
    }
    let id = cluster.records.id_of(&UniqueName::in_cluster(Role::NOUN, name))?;
    cluster.records.get::<Role>(&id).map(|row| row.actions.clone())
}

async fn create(call: Call<RoleCreate, TheCluster>) -> Result<Answer<Role>, Problem> {
    let (cluster, wish) = (call.ctx.cluster(), call.input.body);
    let _deciding = cluster.deciding().await;
    if built_in_role(wish.name.as_str()).is_some() {
        let message = format!("{} is a built-in role: give the copy another name", wish.name);
        return Err(Problem::new(ProblemCode::AlreadyExists, message).at("name", &wish.name, "another name"));
    }
    let role = new_role(cluster, wish)?;
    let mut transaction = Transaction::new();
    transaction.create(&role);
    let id = role.record_id();
    transaction.claim(&UniqueName::in_cluster(Role::NOUN, &role.name), &id);
    cluster.records.commit(transaction).await?;
    Ok(Answer::new(role))
}

fn new_role(cluster: &Cluster, wish: CreateRole) -> Result<Role, Problem> {
    check_summary(&wish.summary)?;
    let mut actions = match &wish.copy_of {
        Some(copied) => actions_of(cluster, copied)
            .ok_or_else(|| Problem::field("copy_of", copied, "a role; 'berth role list' shows them"))?,
        None => Vec::new(),
    };
    actions.extend(wish.actions);
    actions.retain(|action| !wish.without.contains(action));
    Ok(Role {
        id: Some(RoleId::from_entropy(cluster.entropy.id())),
        name: wish.name,
        summary: wish.summary,
        actions: sorted("actions", actions)?,
    })
}

fn sorted(field: &str, mut actions: Vec<Action>) -> Result<Vec<Action>, Problem> {
    if let Some(action) = actions.iter().find(|action| !action.is_grantable()) {
        return Err(Problem::field(field, action.as_str(), "an action that can be granted"));
    }
    actions.sort_unstable();
    actions.dedup();
    Ok(actions)
}

fn check_summary(text: &str) -> Result<(), Problem> {
    if text.chars().count() > SUMMARY_CHARS_MAX {
        return Err(Problem::field("summary", text, format!("at most {SUMMARY_CHARS_MAX} characters")));
    }
    Ok(())
}

async fn update(call: Call<RoleUpdate, TheRole>) -> Result<Answer<Role>, Problem> {
    let (ctx, wish) = (&call.ctx, &call.input.body);
    let cluster = ctx.cluster();
    let _deciding = cluster.deciding().await;
    let row = cluster.records.require::<Role>(&call.target.0.id)?;
    let mut role = row.value.clone();
    if let Some(summary) = &wish.summary {
        check_summary(summary)?;
        role.summary.clone_from(summary);
    }
    role.actions.retain(|action| !wish.remove_actions.contains(action));
    role.actions.extend(&wish.add_actions);
    role.actions = sorted("add_actions", role.actions)?;
    // Whoever has the role gets what comes in: that must be the caller's to give, wherever it is granted.
    let new: Vec<Action> =
        role.actions.iter().copied().filter(|action| !row.actions.contains(action)).collect();
    let granted = cluster.records.list_where::<Grant>(|grant| grant.role == role.name);
    let gifts: Vec<Gift> = granted
        .iter()
        .map(|grant| Gift { actions: new.clone(), segment: grant.segment.clone(), until: grant.until })
        .collect();
    ctx.gate().policies.may_give(&ctx.principal, &gifts)?;
    let mut transaction = Transaction::new();
    transaction.replace(&row, &role);
    let revision = cluster.records.commit(transaction).await?;
    Ok(Answer::new(role).at(revision))
}

async fn delete(call: Call<RoleDelete, TheRole>) -> Result<Answer<()>, Problem> {
    let (cluster, TheRole(role)) = (call.ctx.cluster(), call.target);
    let _deciding = cluster.deciding().await;
    if let Some(grant) = cluster.records.list_where::<Grant>(|grant| grant.role == role.name).first() {
        let message = format!("role {} is still granted: {}", role.name, grant.id);
        return Err(Problem::new(ProblemCode::Protected, message).at(
            "role",
            &role.name,
            "a role without grants",
        ));
    }
    let mut transaction = Transaction::new();
    transaction.remove(&role);
    transaction.release(&UniqueName::in_cluster(Role::NOUN, &role.name));
    cluster.records.commit(transaction).await?;
    Ok(Answer::new(()))
}
