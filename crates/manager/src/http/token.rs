//! Bearer tokens.

use berth_api::manager::{NewToken, Page, Token, TokenCreate, TokenDelete, TokenList};
use berth_model::Problem;

use super::list;
use crate::auth::accounts::{self, TokenRow};
use crate::door::target::{self, TheCluster, TheToken};
use crate::door::{Answer, Call, Door};
use crate::records::Transaction;

/// Mounts the routes of this file.
pub fn mount(door: Door) -> Door {
    door.mount(show_all).mount(create).mount(delete)
}

async fn show_all(call: Call<TokenList, TheCluster>) -> Result<Answer<Page<Token>>, Problem> {
    let query = &call.input.query;
    let all = call.ctx.cluster().records.list::<TokenRow>();
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
    let (cluster, wish) = (call.ctx.cluster(), &call.input.body);
    // Between the look at the user and the token nobody may delete the user.
    let _deciding = cluster.deciding().await;
    let user = target::user(cluster, &wish.user)?;
    let (row, new) = accounts::new_token(&user.value.id, wish, &*cluster.entropy, call.ctx.now())?;
    let mut transaction = Transaction::new();
    transaction.unchanged(&user);
    transaction.create(&row);
    cluster.records.commit(transaction).await?;
    Ok(Answer::new(new))
}

async fn delete(call: Call<TokenDelete, TheToken>) -> Result<Answer<()>, Problem> {
    let cluster = call.ctx.cluster();
    let _deciding = cluster.deciding().await;
    accounts::revoke_token(&cluster.records, &call.target.0, call.ctx.now()).await?;
    Ok(Answer::new(()))
}
