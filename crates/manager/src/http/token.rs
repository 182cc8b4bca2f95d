//! Bearer tokens.

use std::sync::Arc;

use berth_api::manager::{
    CreateToken, NewToken, Page, Scope, Token, TokenCreate, TokenDelete, TokenKind, TokenList, User,
};
use berth_model::access::Action;
use berth_model::{Problem, ProblemCode};

use super::list;
use crate::auth::accounts::{self, TokenRow};
use crate::door::target::{self, TheCluster, TheList, TheToken};
use crate::door::{Answer, Call, Ctx, Door};
use crate::policy::{Resource, ResourceKind};
use crate::records::{Row, Transaction};

/// Most tokens of one user. Everybody may make tokens, and each is kept until it is revoked.
pub(crate) const TOKENS_MAX: usize = 500;

/// Mounts the routes of this file.
pub fn mount(door: Door) -> Door {
    door.mount(show_all).mount(create).mount(delete)
}

async fn show_all(call: Call<TokenList, TheList>) -> Result<Answer<Page<Token>>, Problem> {
    let (ctx, query) = (&call.ctx, &call.input.query);
    let me = ctx.user()?.id.clone();
    let visible = ctx.visible(Action::UserView);
    let mut all = ctx.cluster().records.list::<TokenRow>();
    all.retain(|row| {
        let resource = || target::token_resource(&row.token);
        visible.shows(None, resource) || (row.token.user == me && visible.asks_about(&resource()))
    });
    let page = list::page(
        &all,
        query.limit,
        query.cursor.as_deref(),
        |row| row.id.clone(),
        |row| row.value.token.clone(),
    )?;
    Ok(Answer::new(page))
}

async fn create(call: Call<TokenCreate, TheCluster>) -> Result<Answer<NewToken>, Problem> {
    let (ctx, wish) = (&call.ctx, &call.input.body);
    let cluster = ctx.cluster();
    // Between the look at the user and the token nobody may delete the user.
    let _deciding = cluster.deciding().await;
    let user = owner(ctx, wish)?;
    let scope = scope_of(ctx, wish)?;
    let known = cluster.records.list_where::<TokenRow>(|row| row.token.user == user.value.id).len();
    if known >= TOKENS_MAX {
        let message = format!("{} has {known} tokens already: revoke some first", user.name);
        return Err(Problem::new(ProblemCode::Busy, message).at(
            "user",
            &user.name,
            "a user with fewer tokens",
        ));
    }
    let (row, new) =
        accounts::new_token(&user.value.id, TokenKind::Token, scope, wish, &*cluster.entropy, ctx.now())?;
    let mut transaction = Transaction::new();
    transaction.unchanged(&user);
    transaction.create(&row);
    cluster.records.commit(transaction).await?;
    Ok(Answer::new(new))
}

/// Whose token it is to be: the caller's own, or that of somebody whom the caller manages and who has no more rights.
fn owner(ctx: &Ctx, wish: &CreateToken) -> Result<Arc<Row<User>>, Problem> {
    let (cluster, me) = (ctx.cluster(), ctx.user()?);
    let Some(name) = &wish.user else { return cluster.records.require::<User>(me.id.as_str()) };
    let found = target::user(cluster, name);
    if let Ok(user) = &found
        && user.value.id == me.id
    {
        return found;
    }
    let resource = match &found {
        Ok(user) => Resource::of_cluster(ResourceKind::User, &user.id, user.name.as_str()),
        Err(_) => Resource::absent(ResourceKind::User, name),
    };
    ctx.require(Action::UserManage, &resource)?;
    let user = found?;
    let policies = &ctx.gate().policies;
    policies.may_give(&ctx.principal, &policies.worth_of(&user)?)?;
    Ok(user)
}

fn scope_of(ctx: &Ctx, wish: &CreateToken) -> Result<Option<Scope>, Problem> {
    let segment = wish.segment.as_deref().map(|name| ctx.segment(name, Action::SegmentView)).transpose()?;
    let segment = segment.map(|found| found.0.value.id.clone());
    if wish.actions.is_none() && segment.is_none() {
        return Ok(None);
    }
    let mut actions = match &wish.actions {
        Some(actions) => actions.clone(),
        None => Action::ALL.iter().copied().filter(|action| action.is_grantable()).collect(),
    };
    if let Some(action) = actions.iter().find(|action| !action.is_grantable()) {
        return Err(Problem::field("actions", action.as_str(), "actions that can be granted"));
    }
    actions.sort_unstable();
    actions.dedup();
    Ok(Some(Scope { actions, segment }))
}

async fn delete(call: Call<TokenDelete, TheToken>) -> Result<Answer<()>, Problem> {
    let cluster = call.ctx.cluster();
    let _deciding = cluster.deciding().await;
    accounts::revoke_token(&cluster.records, &call.target.0, call.ctx.now()).await?;
    Ok(Answer::new(()))
}
