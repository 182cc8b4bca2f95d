//! Who can do what, the other way round: who may do something, and all that somebody may do.

use std::sync::Arc;

use berth_api::manager::{Holder, Holding, Page, Team, User, WhatCan, WhoCan};
use berth_model::access::Action;
use berth_model::name::Name;
use berth_model::{Problem, ProblemCode};

use crate::auth::Principal;
use crate::door::target::{TheCluster, TheNamed, user};
use crate::door::{Answer, Call, Ctx, Door};
use crate::policy::book::{Book, Held, Slice};
use crate::policy::{PolicyError, Resource, ResourceKind};
use crate::records::Row;

/// Mounts the routes of this file.
pub fn mount(door: Door) -> Door {
    door.mount(who_can).mount(what_can)
}

fn failed(error: PolicyError) -> Problem {
    Problem::new(ProblemCode::Internal, error.to_string())
}

/// An action's name in a query.
pub(super) fn action_of(text: &str) -> Result<Action, Problem> {
    let expected = "an action of the API, like vm.migrate; see /v1/openapi.json";
    text.parse().map_err(|_| Problem::field("action", text, expected))
}

/// Each user is asked about as if it had come itself, with a session: what policies say of the way somebody comes in
/// is not foreseen here.
async fn who_can(call: Call<WhoCan, TheNamed>) -> Result<Answer<Page<Holder>>, Problem> {
    let (ctx, TheNamed(resource)) = (&call.ctx, &call.target);
    let action = action_of(&call.input.query.action)?;
    let policies = &ctx.gate().policies;
    let book = policies.book().map_err(failed)?;
    let mut items = Vec::new();
    for row in ctx.cluster().records.list::<User>().into_iter().filter(|row| !row.disabled) {
        let decision = policies.look(&Principal::as_if(&row), action, resource, true);
        if decision.allowed {
            let until = decision.by.iter().map(|id| book.grant(id).and_then(|held| held.grant.until));
            // It lasts as long as what lasts longest; what has no end is above all that has one.
            let until = until.reduce(|one, other| one.zip(other).map(|(one, other)| one.max(other)));
            items.push(Holder { user: row.name.clone(), by: decision.reason, until: until.flatten() });
        }
    }
    items.sort_by(|a, b| a.user.cmp(&b.user));
    Ok(Answer::new(Page { items, next_cursor: None }))
}

async fn what_can(call: Call<WhatCan, TheCluster>) -> Result<Answer<Page<Holding>>, Problem> {
    let ctx = &call.ctx;
    let row = asked_about(ctx, call.input.query.user.as_deref())?;
    let policies = &ctx.gate().policies;
    let book = policies.book().map_err(failed)?;
    let slice = book.slice(&row);
    let items = holdings(ctx, &book, &slice);
    Ok(Answer::new(Page { items, next_cursor: None }))
}

fn asked_about(ctx: &Ctx, name: Option<&str>) -> Result<Arc<Row<User>>, Problem> {
    let me = ctx.user()?;
    let Some(name) = name else { return ctx.cluster().records.require::<User>(me.id.as_str()) };
    let found = user(ctx.cluster(), name);
    if let Ok(row) = &found
        && row.value.id == me.id
    {
        return found;
    }
    let resource = match &found {
        Ok(row) => Resource::of_cluster(ResourceKind::User, &row.id, row.name.as_str()),
        Err(_) => Resource::absent(ResourceKind::User, name),
    };
    ctx.require(Action::UserView, &resource)?;
    ctx.require(Action::GrantView, &Resource::cluster())?;
    found
}

fn holdings(ctx: &Ctx, book: &Book, slice: &Slice) -> Vec<Holding> {
    let now = ctx.now();
    let live = slice.grants.iter().filter(|held| held.is_live(now));
    let mut items: Vec<Holding> = live.map(|held| holding(ctx, book, held)).collect();
    items.sort_by(|a, b| (&a.scope, &a.role).cmp(&(&b.scope, &b.role)));
    items
}

fn holding(ctx: &Ctx, book: &Book, held: &Held) -> Holding {
    let grant = &held.grant.value;
    let team = grant.team.as_ref().and_then(|id| ctx.cluster().records.get::<Team>(id.as_str()));
    let team: Option<Name> = team.map(|row| row.name.clone());
    Holding {
        scope: grant.segment.as_ref().map_or_else(|| "cluster".to_owned(), |id| book.segment_name(id)),
        role: grant.role.clone(),
        grant: grant.id.clone(),
        team,
        actions: held.actions.clone(),
        until: grant.until,
    }
}
