//! Logging in and out.
//!
//! Whatever these answer, secrets are in it; every answer of the door says `no-store`.

use axum::body::Body;
use berth_api::manager::{
    LoginBegin, LoginContinue, LoginReply, LoginShow, LoginWays, Logout, OidcBegin, OidcCallback, OidcDevice,
};
use berth_model::{Problem, ProblemCode};
use http::header::{CONTENT_TYPE, COOKIE, HeaderMap, HeaderValue, LOCATION, SET_COOKIE};
use http::{Response, StatusCode};

use crate::auth::Principal;
use crate::auth::login::{self, From};
use crate::auth::session;
use crate::door::target::TheCluster;
use crate::door::{Answer, Call, Ctx, Done, Door};
use crate::records::Transaction;

/// Mounts the routes of this file.
pub fn mount(door: Door) -> Door {
    let door = door.mount(ways).mount(begin).mount(go_on).mount(begin_device).mount(logout);
    door.mount_raw(begin_browser).mount_raw(finish_browser)
}

fn from(ctx: &Ctx) -> From {
    From { address: ctx.remote.ip(), now: ctx.now() }
}

/// The record says who has logged in, and which session came of it.
fn noted(ctx: &Ctx, reply: LoginReply) -> LoginReply {
    if let Some(new) = &reply.session {
        ctx.about(&format!("user:{}", new.session.user_name));
        ctx.about(&format!("token:{}", new.session.id));
    }
    reply
}

async fn ways(call: Call<LoginShow, TheCluster>) -> Result<Answer<LoginWays>, Problem> {
    Ok(Answer::new(call.ctx.cluster().logins.ways()))
}

async fn begin(call: Call<LoginBegin, TheCluster>) -> Result<Answer<LoginReply>, Problem> {
    let (cluster, body) = (call.ctx.cluster(), &call.input.body);
    // A name that nobody has may be a password in the wrong field: only names that somebody has are written down.
    if body.directory.is_none() && login::user_of(cluster, &body.user).is_some() {
        call.ctx.about(&format!("user:{}", body.user));
    }
    let reply = cluster.logins.begin(cluster, body, from(&call.ctx)).await?;
    Ok(Answer::new(noted(&call.ctx, reply)))
}

async fn go_on(call: Call<LoginContinue, TheCluster>) -> Result<Answer<LoginReply>, Problem> {
    let cluster = call.ctx.cluster();
    let (id, answer) = (&call.input.path.login, &call.input.body);
    let reply = cluster.logins.go_on(cluster, id, answer, from(&call.ctx)).await?;
    Ok(Answer::new(noted(&call.ctx, reply)))
}

async fn begin_device(call: Call<OidcDevice, TheCluster>) -> Result<Answer<LoginReply>, Problem> {
    let cluster = call.ctx.cluster();
    cluster.logins.begin_device(cluster, &call.input.path.provider, from(&call.ctx)).await.map(Answer::new)
}

async fn begin_browser(call: Call<OidcBegin, TheCluster>) -> Result<Done, Problem> {
    let cluster = call.ctx.cluster();
    let (url, cookie) =
        cluster.logins.begin_browser(cluster, &call.input.path.provider, from(&call.ctx)).await?;
    let unfit = |_| Problem::new(ProblemCode::Internal, "the provider's address can't be in a header");
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::FOUND;
    response.headers_mut().insert(LOCATION, HeaderValue::from_str(&url).map_err(unfit)?);
    // Lax, because the way back is a link from the provider's site; the walk itself is good once.
    let cookie = format!("{}={cookie}; Path=/; Secure; HttpOnly; SameSite=Lax; Max-Age=900", login::COOKIE);
    response.headers_mut().insert(SET_COOKIE, HeaderValue::from_str(&cookie).map_err(unfit)?);
    Ok(Done::streaming(response))
}

async fn finish_browser(call: Call<OidcCallback, TheCluster>) -> Result<Done, Problem> {
    let cluster = call.ctx.cluster();
    let cookie = cookie(&call.parts.headers);
    let (name, back) = (&call.input.path.provider, &call.input.query);
    let reply =
        cluster.logins.finish_browser(cluster, name, back, cookie.as_deref(), from(&call.ctx)).await?;
    let reply = noted(&call.ctx, reply);
    let json = serde_json::to_vec(&reply).expect("replies of the contract are plain data");
    let mut response = Response::new(Body::from(json));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    let gone = format!("{}=; Path=/; Secure; HttpOnly; SameSite=Lax; Max-Age=0", login::COOKIE);
    response.headers_mut().insert(SET_COOKIE, HeaderValue::from_str(&gone).expect("plain ASCII"));
    Ok(Done::streaming(response))
}

/// The one cookie of ours; none also when there are two: which one counts must not depend on who reads them.
fn cookie(headers: &HeaderMap) -> Option<String> {
    let texts = headers.get_all(COOKIE).iter().filter_map(|value| value.to_str().ok());
    let pairs = texts.flat_map(|text| text.split(';')).filter_map(|pair| pair.trim().split_once('='));
    let mut ours = pairs.filter(|(name, _)| *name == login::COOKIE).map(|(_, value)| value.to_owned());
    match (ours.next(), ours.next()) {
        (Some(one), None) => Some(one),
        _ => None,
    }
}

async fn logout(call: Call<Logout, TheCluster>) -> Result<Answer<()>, Problem> {
    let Principal::User(user) = &call.ctx.principal else { return Ok(Answer::new(())) };
    if user.kind != berth_api::manager::TokenKind::Session {
        let message = "this is a token and no session: it ends when it is revoked ('berth token delete')";
        return Err(Problem::new(ProblemCode::WrongState, message));
    }
    let mut transaction = Transaction::new();
    session::forget(&mut transaction, &user.token);
    call.ctx.cluster().records.commit(transaction).await?;
    Ok(Answer::new(()))
}
