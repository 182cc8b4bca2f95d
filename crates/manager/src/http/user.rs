//! Users.

use berth_api::manager::{Page, User, UserCreate, UserDelete, UserList, UserShow};
use berth_model::Problem;
use berth_model::access::Action;

use super::list;
use crate::auth::accounts;
use crate::door::target::{TheCluster, TheList, TheUser};
use crate::door::{Answer, Call, Door};
use crate::policy::{Resource, ResourceKind};

/// Mounts the routes of this file.
pub fn mount(door: Door) -> Door {
    door.mount(show_all).mount(create).mount(show).mount(delete)
}

async fn show_all(call: Call<UserList, TheList>) -> Result<Answer<Page<User>>, Problem> {
    let visible = call.ctx.visible(Action::UserView);
    let mut all = call.ctx.cluster().records.list::<User>();
    let me = call.ctx.user()?.id.clone();
    all.retain(|row| {
        row.value.id == me
            || visible.shows(None, || Resource::of_cluster(ResourceKind::User, &row.id, row.name.as_str()))
    });
    all.sort_by(|a, b| a.name.cmp(&b.name));
    let query = &call.input.query;
    let page = list::page(
        &all,
        query.limit,
        query.cursor.as_deref(),
        |row| row.value.name.to_string(),
        |row| row.value.clone(),
    )?;
    Ok(Answer::new(page))
}

async fn show(call: Call<UserShow, TheUser>) -> Result<Answer<User>, Problem> {
    let TheUser(user) = call.target;
    Ok(Answer::new(user.value.clone()).at(user.revision))
}

async fn create(call: Call<UserCreate, TheCluster>) -> Result<Answer<User>, Problem> {
    let (cluster, now) = (call.ctx.cluster(), call.ctx.now());
    let user = accounts::new_user(call.input.body, &*cluster.entropy, now);
    accounts::create_user(&cluster.records, &user).await?;
    Ok(Answer::new(user))
}

async fn delete(call: Call<UserDelete, TheUser>) -> Result<Answer<()>, Problem> {
    let cluster = call.ctx.cluster();
    // Two deletions at once must not take the last two administrators.
    let _deciding = cluster.deciding().await;
    // Deleting somebody takes away; it must not be those who hold more than the caller.
    let policies = &call.ctx.gate().policies;
    policies.may_give(&call.ctx.principal, &policies.worth_of(&call.target.0)?)?;
    accounts::delete_user(&cluster.records, &call.target.0, call.ctx.now()).await?;
    Ok(Answer::new(()))
}
