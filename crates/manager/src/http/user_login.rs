//! What administrators change about how users log in.
//!
//! Whoever can give a user a password can log in as that user. So each of these that opens a way in asks first whether
//! the caller has itself all that the user has.

use std::sync::Arc;

use berth_api::manager::{
    Identity, NewPassword, User, UserDisable, UserEnable, UserIdentityLink, UserIdentityUnlink, UserLogin,
    UserLoginShow, UserPasswordReset, UserTotpReset,
};
use berth_model::Problem;

use crate::auth::accounts;
use crate::auth::credential::{self, IdentityRow};
use crate::auth::external::External;
use crate::auth::login;
use crate::auth::password::Password;
use crate::auth::session;
use crate::door::target::TheUser;
use crate::door::{Answer, Call, Ctx, Door};
use crate::records::{Row, Transaction};

/// Mounts the routes of this file.
pub fn mount(door: Door) -> Door {
    let door = door.mount(show).mount(disable).mount(enable).mount(reset_password);
    door.mount(reset_totp).mount(link).mount(unlink)
}

/// Refuses who does not have all that the user has.
fn may_become(ctx: &Ctx, user: &Row<User>) -> Result<(), Problem> {
    let policies = &ctx.gate().policies;
    policies.may_give(&ctx.principal, &policies.worth_of(user)?)
}

async fn show(call: Call<UserLoginShow, TheUser>) -> Result<Answer<UserLogin>, Problem> {
    let (cluster, user) = (call.ctx.cluster(), &call.target.0.value);
    let open = cluster.logins.sessions.list(&cluster.records, user, None, call.ctx.now()).len();
    Ok(Answer::new(credential::shown(&cluster.records, user, open as u64)))
}

async fn disable(call: Call<UserDisable, TheUser>) -> Result<Answer<User>, Problem> {
    let (cluster, user) = (call.ctx.cluster(), &call.target.0);
    // Two at once must not shut out the last two administrators.
    let _deciding = cluster.deciding().await;
    accounts::require_another_way_in(&cluster.records, user, call.ctx.now())?;
    set_disabled(&call.ctx, user, true).await
}

async fn enable(call: Call<UserEnable, TheUser>) -> Result<Answer<User>, Problem> {
    may_become(&call.ctx, &call.target.0)?;
    set_disabled(&call.ctx, &call.target.0, false).await
}

/// Sessions end with it: who is enabled again logs in again. Tokens are good again.
async fn set_disabled(ctx: &Ctx, user: &Arc<Row<User>>, disabled: bool) -> Result<Answer<User>, Problem> {
    let records = &ctx.cluster().records;
    let changed = User { disabled, ..user.value.clone() };
    let mut transaction = Transaction::new();
    transaction.replace(user, &changed);
    session::forget_others(records, &mut transaction, &user.value.id, None);
    records.commit(transaction).await?;
    Ok(Answer::new(changed))
}

async fn reset_password(call: Call<UserPasswordReset, TheUser>) -> Result<Answer<NewPassword>, Problem> {
    let (cluster, user, now) = (call.ctx.cluster(), &call.target.0, call.ctx.now());
    may_become(&call.ctx, user)?;
    let given = call.input.body.password.as_deref();
    let password = match given {
        Some(text) => Password::chosen(text, user.name.as_str(), "password")?,
        None => Password::generate(&*cluster.entropy),
    };
    let hash = cluster.logins.passwords.hash(&password, &*cluster.entropy).await?;
    credential::change(&cluster.records, &user.value.id, now, |row| {
        row.password = Some(hash.clone());
        row.must_change = true;
        row.changed_at = now;
        Ok(())
    })
    .await?;
    let mut transaction = Transaction::new();
    session::forget_others(&cluster.records, &mut transaction, &user.value.id, None);
    cluster.records.commit(transaction).await?;
    cluster.logins.lockout.forgive(&user.value.id);
    login::save_lock(cluster, &user.value.id);
    let password = given.is_none().then(|| password.reveal().to_owned());
    Ok(Answer::new(NewPassword { password }))
}

async fn reset_totp(call: Call<UserTotpReset, TheUser>) -> Result<Answer<()>, Problem> {
    let (cluster, user) = (call.ctx.cluster(), &call.target.0);
    may_become(&call.ctx, user)?;
    credential::change(&cluster.records, &user.value.id, call.ctx.now(), |row| {
        row.totp = None;
        Ok(())
    })
    .await?;
    let mut transaction = Transaction::new();
    session::forget_others(&cluster.records, &mut transaction, &user.value.id, None);
    cluster.records.commit(transaction).await?;
    Ok(Answer::new(()))
}

async fn link(call: Call<UserIdentityLink, TheUser>) -> Result<Answer<Identity>, Problem> {
    let (cluster, user, body) = (call.ctx.cluster(), &call.target.0, &call.input.body);
    may_become(&call.ctx, user)?;
    let (source, issuer) = cluster.logins.issuer_of(&body.source)?;
    let subject = credential::subject(&body.subject)?;
    let external = External { source, issuer, subject, name: None, groups: Vec::new() };
    let row = IdentityRow::of(&external, user.value.id.clone(), call.ctx.now());
    let known = cluster.records.get::<IdentityRow>(&row.id);
    let mut transaction = Transaction::new();
    transaction.unchanged(user);
    match known {
        None => transaction.create(&row),
        Some(known) if known.user == row.user => return Ok(Answer::new(known.shown())),
        // One whose user is gone is nobody's.
        Some(known) if cluster.records.get::<User>(known.user.as_str()).is_none() => {
            transaction.replace(&known, &row);
        }
        Some(_) => {
            let problem = Problem::new(
                berth_model::ProblemCode::AlreadyExists,
                "this identity is another user's: unlink it there first",
            );
            return Err(problem.at("subject", &body.subject, "an identity that nobody has"));
        }
    }
    cluster.records.commit(transaction).await?;
    Ok(Answer::new(row.shown()))
}

async fn unlink(call: Call<UserIdentityUnlink, TheUser>) -> Result<Answer<()>, Problem> {
    let (cluster, user, id) = (call.ctx.cluster(), &call.target.0, &call.input.query.identity);
    let row = cluster.records.get::<IdentityRow>(id).filter(|row| row.user == user.value.id);
    let row = row.ok_or_else(|| Problem::not_found("identity", id))?;
    let gone = row.source.to_string();
    let changed = User {
        external_groups: user
            .external_groups
            .iter()
            .filter(|group| group.provider != gone)
            .cloned()
            .collect(),
        ..user.value.clone()
    };
    let mut transaction = Transaction::new();
    transaction.remove(&row);
    transaction.replace(user, &changed);
    session::forget_others(&cluster.records, &mut transaction, &user.value.id, None);
    cluster.records.commit(transaction).await?;
    Ok(Answer::new(()))
}
