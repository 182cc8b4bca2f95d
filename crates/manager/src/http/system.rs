//! What is about the manager itself: liveness, the contract, metrics, who the caller is and what it may do.

use std::sync::LazyLock;

use berth_api::manager::{
    CanI, CanIQuery, CanIReply, Health, HealthShow, MetricsShow, OpenApiShow, Team, WhoAmI, WhoAmIShow,
};
use berth_model::access::Action;
use berth_model::name::Name;
use berth_model::{Problem, ProblemCode};

use crate::auth::Principal;
use crate::door::target::TheCluster;
use crate::door::{Answer, Call, Ctx, Done, Door};
use crate::metrics;
use crate::policy::Resource;

static DOCUMENT: LazyLock<String> = LazyLock::new(|| {
    berth_api::openapi::manager().to_pretty_json().expect("the document is made of plain data")
});

/// Mounts the routes of this file.
pub fn mount(door: Door) -> Door {
    door.mount(health).mount_raw(open_api).mount_raw(show_metrics).mount(who_am_i).mount(can_i)
}

async fn health(_: Call<HealthShow, TheCluster>) -> Result<Answer<Health>, Problem> {
    let (version, status) = (env!("CARGO_PKG_VERSION").to_owned(), "ok".to_owned());
    Ok(Answer::new(Health { version, status }))
}

async fn open_api(_: Call<OpenApiShow, TheCluster>) -> Result<Done, Problem> {
    Ok(Done::text("application/json", DOCUMENT.clone()))
}

async fn show_metrics(call: Call<MetricsShow, TheCluster>) -> Result<Done, Problem> {
    let gate = call.ctx.gate();
    Ok(Done::text(metrics::CONTENT_TYPE, gate.metrics.text(&gate.cluster.records)))
}

async fn who_am_i(call: Call<WhoAmIShow, TheCluster>) -> Result<Answer<WhoAmI>, Problem> {
    let Principal::User(user) = call.ctx.principal.clone() else {
        return Err(Problem::new(ProblemCode::NotAllowed, "only users can ask who they are"));
    };
    let cluster = call.ctx.cluster();
    let teams = call.ctx.gate().policies.teams_of(&user);
    let teams = teams.iter().filter_map(|id| cluster.records.get::<Team>(id.as_str()));
    let mut teams: Vec<Name> = teams.map(|row| row.name.clone()).collect();
    teams.sort();
    Ok(Answer::new(WhoAmI {
        user: user.name,
        id: user.id,
        teams,
        token: user.token,
        method: user.method,
        scope: user.scope,
    }))
}

async fn can_i(call: Call<CanI, TheCluster>) -> Result<Answer<CanIReply>, Problem> {
    let CanIQuery { action, resource } = &call.input.query;
    let action = super::access::action_of(action)?;
    Ok(Answer::new(answer(&call.ctx, action, resource.as_deref())))
}

/// A text can name several kinds of things; the caller may if it may for one of them that is there. What is not there
/// is answered as what may not be touched.
fn answer(ctx: &Ctx, action: Action, resource: Option<&str>) -> CanIReply {
    let candidates = match resource {
        None => vec![Resource::cluster()],
        Some(text) => crate::door::target::all_named(ctx.cluster(), text),
    };
    let mut reason = "no policy permits it, or there is no such thing".to_owned();
    for candidate in candidates {
        let decision = ctx.gate().policies.look(&ctx.principal, action, &candidate, false);
        if decision.allowed {
            return CanIReply {
                allowed: true,
                reason: format!("{}: {}", candidate.label(), decision.reason),
            };
        }
        if resource.is_none() {
            reason = decision.reason;
        }
    }
    CanIReply { allowed: false, reason }
}
