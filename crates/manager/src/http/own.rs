//! What users change about themselves: password, second factor, sessions.
//!
//! Only a session may: a token is for programs, and must not become a way to take an account over.

use std::sync::Arc;

use berth_api::manager::{
    OwnPasswordChange, OwnSessionDelete, OwnSessionList, OwnTotpConfirm, OwnTotpEnrol, OwnTotpRemove, Page,
    RecoveryCodes, Session, TokenKind, TotpOffer, User,
};
use berth_model::{Problem, ProblemCode};

use super::list;
use crate::auth::accounts::TokenRow;
use crate::auth::credential::{self, CredentialRow};
use crate::auth::lockout::Attempt;
use crate::auth::login::{self, take_code};
use crate::auth::password::{Password, Verdict};
use crate::auth::session::{self, FRESH_MS, SessionRow};
use crate::auth::totp::Totp;
use crate::auth::{Principal, UserPrincipal};
use crate::cluster::Cluster;
use crate::door::target::TheCluster;
use crate::door::{Answer, Call, Ctx, Door};
use crate::records::{Row, Transaction};

/// Mounts the routes of this file.
pub fn mount(door: Door) -> Door {
    let door = door.mount(change_password).mount(enrol_totp).mount(confirm_totp).mount(remove_totp);
    door.mount(show_sessions).mount(end_session)
}

/// Who asks, with a session.
fn by_session(ctx: &Ctx) -> Result<(&UserPrincipal, Arc<Row<User>>), Problem> {
    let refused = || {
        let message = "this needs a login with a password, a provider or a directory; a token is not enough";
        Problem::new(ProblemCode::NotAllowed, message)
    };
    let Principal::User(user) = &ctx.principal else { return Err(refused()) };
    if user.kind != TokenKind::Session {
        return Err(refused());
    }
    Ok((user, ctx.cluster().records.require::<User>(user.id.as_str())?))
}

/// The user's password, if this is it: counted like a login, because it is as good for guessing.
async fn own_password(ctx: &Ctx, user: &User, typed: &str) -> Result<Arc<Row<CredentialRow>>, Problem> {
    let cluster = ctx.cluster();
    let wrong = || Problem::new(ProblemCode::Unauthenticated, "the present password is wrong");
    let attempt =
        cluster.logins.lockout.attempt(&cluster.records, Some(&user.id), ctx.remote.ip(), ctx.now());
    login::save_lock(cluster, &user.id);
    let row = cluster.records.get::<CredentialRow>(user.id.as_str());
    let stored = row.as_ref().and_then(|row| row.password.as_deref());
    let password = Password::typed(typed).ok_or_else(wrong)?;
    let verdict = cluster.logins.passwords.verify(stored, &password).await?;
    if verdict == Verdict::Wrong || attempt != Attempt::Counted {
        return Err(wrong());
    }
    cluster.logins.lockout.succeeded(&cluster.records, &user.id, ctx.remote.ip(), ctx.now());
    login::save_lock(cluster, &user.id);
    row.ok_or_else(wrong)
}

async fn change_password(call: Call<OwnPasswordChange, TheCluster>) -> Result<Answer<()>, Problem> {
    let (principal, user) = by_session(&call.ctx)?;
    let (cluster, body) = (call.ctx.cluster(), &call.input.body);
    let row = own_password(&call.ctx, &user.value, &body.old_password).await?;
    let new = Password::chosen(&body.new_password, user.name.as_str(), "new_password")?;
    if cluster.logins.passwords.verify(row.password.as_deref(), &new).await? != Verdict::Wrong {
        return Err(login::not_the_old_one());
    }
    let hash = cluster.logins.passwords.hash(&new, &*cluster.entropy).await?;
    let mut changed = row.value.clone();
    changed.password = Some(hash);
    changed.must_change = false;
    changed.changed_at = call.ctx.now();
    let mut transaction = Transaction::new();
    transaction.replace(&row, &changed);
    session::forget_others(&cluster.records, &mut transaction, &user.value.id, Some(&principal.token));
    cluster.records.commit(transaction).await?;
    Ok(Answer::new(()))
}

async fn enrol_totp(call: Call<OwnTotpEnrol, TheCluster>) -> Result<Answer<TotpOffer>, Problem> {
    let (principal, user) = by_session(&call.ctx)?;
    let cluster = call.ctx.cluster();
    prove_again(&call.ctx, principal, &user.value, call.input.body.password.as_deref()).await?;
    let new = Totp::new(&*cluster.entropy);
    credential::change(&cluster.records, &user.value.id, call.ctx.now(), |row| {
        if row.asks_for_codes() {
            let message = "there is a second factor already: remove it with a code of it first";
            return Err(Problem::new(ProblemCode::WrongState, message));
        }
        row.totp = Some(new.clone());
        Ok(())
    })
    .await?;
    let offer = TotpOffer { uri: new.uri(user.name.as_str()), secret: new.secret_text().to_owned() };
    Ok(Answer::new(offer))
}

/// Either the login was a moment ago, or the password is given: a session that somebody left open is not enough.
async fn prove_again(
    ctx: &Ctx,
    principal: &UserPrincipal,
    user: &User,
    password: Option<&str>,
) -> Result<(), Problem> {
    if let Some(password) = password {
        return own_password(ctx, user, password).await.map(drop);
    }
    let token = ctx.cluster().records.require::<TokenRow>(principal.token.as_str())?;
    if ctx.now().millis_since(token.token.created_at) < FRESH_MS {
        return Ok(());
    }
    let expected = "the present password, or a login a moment ago";
    let message = format!("this needs {expected}");
    Err(Problem::new(ProblemCode::Unauthenticated, message).at("password", "", expected))
}

async fn confirm_totp(call: Call<OwnTotpConfirm, TheCluster>) -> Result<Answer<RecoveryCodes>, Problem> {
    let (_, user) = by_session(&call.ctx)?;
    let (cluster, now) = (call.ctx.cluster(), call.ctx.now());
    let mut recovery_codes = Vec::new();
    credential::change(&cluster.records, &user.value.id, now, |row| {
        let nothing = || {
            let message = "there is no second factor to confirm: 'berth user totp enrol' makes one";
            Problem::new(ProblemCode::WrongState, message)
        };
        let totp = row.totp.as_mut().filter(|totp| !totp.is_confirmed()).ok_or_else(nothing)?;
        if !totp.take(&call.input.body.code, now) {
            let expected = "the code that the app shows now; is its clock right?";
            let message = format!("code can't be taken: expected {expected}");
            return Err(Problem::new(ProblemCode::InvalidInput, message).at("code", "", expected));
        }
        recovery_codes = totp.renew_recovery(&*cluster.entropy);
        Ok(())
    })
    .await?;
    Ok(Answer::new(RecoveryCodes { recovery_codes }))
}

async fn remove_totp(call: Call<OwnTotpRemove, TheCluster>) -> Result<Answer<()>, Problem> {
    let (_, user) = by_session(&call.ctx)?;
    let (cluster, now, code) = (call.ctx.cluster(), call.ctx.now(), call.input.body.code.as_str());
    let id = &user.value.id;
    let attempt = cluster.logins.lockout.attempt(&cluster.records, Some(id), call.ctx.remote.ip(), now);
    login::save_lock(cluster, id);
    let counted = attempt == Attempt::Counted;
    let good = counted
        && (take_code(cluster, id, (code, false), now).await?
            || take_code(cluster, id, (code, true), now).await?);
    if !good {
        return Err(Problem::new(
            ProblemCode::Unauthenticated,
            "the code is wrong, was used before, or is too old",
        ));
    }
    cluster.logins.lockout.succeeded(&cluster.records, id, call.ctx.remote.ip(), now);
    login::save_lock(cluster, id);
    credential::change(&cluster.records, id, now, |row| {
        row.totp = None;
        Ok(())
    })
    .await?;
    Ok(Answer::new(()))
}

fn own(cluster: &Cluster, ctx: &Ctx) -> Result<(Vec<Session>, Arc<Row<User>>), Problem> {
    let Principal::User(principal) = &ctx.principal else {
        return Err(Problem::new(ProblemCode::NotAllowed, "only users have sessions"));
    };
    let user = cluster.records.require::<User>(principal.id.as_str())?;
    let sessions =
        cluster.logins.sessions.list(&cluster.records, &user.value, Some(&principal.token), ctx.now());
    Ok((sessions, user))
}

async fn show_sessions(call: Call<OwnSessionList, TheCluster>) -> Result<Answer<Page<Session>>, Problem> {
    let (all, _) = own(call.ctx.cluster(), &call.ctx)?;
    let key = |session: &Session| format!("{:020} {}", session.created_at.as_millis(), session.id);
    let query = &call.input.query;
    let page = list::page_descending(&all, query.limit, query.cursor.as_deref(), key, Session::clone)?;
    Ok(Answer::new(page))
}

async fn end_session(call: Call<OwnSessionDelete, TheCluster>) -> Result<Answer<()>, Problem> {
    let (_, user) = by_session(&call.ctx)?;
    let (cluster, id) = (call.ctx.cluster(), &call.input.path.session);
    let row = cluster.records.get::<SessionRow>(id.as_str()).filter(|row| row.user == user.value.id);
    if row.is_none() {
        return Err(Problem::not_found("session", id));
    }
    let mut transaction = Transaction::new();
    session::forget(&mut transaction, id);
    cluster.records.commit(transaction).await?;
    Ok(Answer::new(()))
}
