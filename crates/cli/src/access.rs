//! `berth whoami` and `berth can-i`.

use berth_api::endpoint::Nothing;
use berth_api::manager::{CanI, CanIQuery, WhoAmIShow};
use berth_model::access::Action;
use clap::Args;

use crate::exit::Failure;
use crate::lookup::VmRef;
use crate::output::{Facts, NOTHING};
use crate::session::Session;

/// What to ask.
#[derive(Debug, Args)]
pub struct CanIArguments {
    /// The action, like snapshot.restore
    #[arg(value_parser = parse_action)]
    action: Action,
    /// What it is about: a VM as segment/name, a segment, host, image or user; the cluster without it
    resource: Option<String>,
}

fn parse_action(text: &str) -> Result<Action, String> {
    text.parse().map_err(|_| {
        let known: Vec<&str> = Action::ALL.iter().map(|action| action.as_str()).collect();
        format!("expected one of {}", known.join(", "))
    })
}

/// Who the user is.
///
/// # Errors
/// When the manager refuses or can't be reached.
pub async fn whoami(session: &Session) -> Result<(), Failure> {
    let me = session.ask::<WhoAmIShow>(&Nothing {}, &Nothing {}).await?;
    session.output.one(&me, || {
        let teams: Vec<&str> = me.teams.iter().map(|team| team.as_str()).collect();
        let teams = if teams.is_empty() { NOTHING.to_owned() } else { teams.join(", ") };
        Facts::new()
            .with("user", &me.user)
            .with("id", &me.id)
            .with("teams", teams)
            .with("proved by", &me.method)
            .with("token", &me.token)
            .with("manager", session.client.address())
    })
}

/// Whether the user may do something.
///
/// # Errors
/// [`Failure::Denied`] for a no; when the manager refuses or can't be reached.
pub async fn can_i(session: &Session, arguments: CanIArguments) -> Result<(), Failure> {
    let mut query = CanIQuery { action: arguments.action.as_str().to_owned(), resource: arguments.resource };
    let mut reply = session.ask::<CanI>(&Nothing {}, &query).await?;
    if !reply.allowed
        && let Some(vm) = query.resource.as_ref().and_then(|text| text.parse::<VmRef>().ok())
        && query.resource.as_deref() != Some(vm.as_str())
    {
        // A bare name may be a VM's, too.
        query.resource = Some(vm.as_str().to_owned());
        reply = session.ask::<CanI>(&Nothing {}, &query).await?;
    }
    let answer = if reply.allowed { "yes" } else { "no" };
    session.output.done(&reply, || format!("{answer}: {}", reply.reason))?;
    if reply.allowed { Ok(()) } else { Err(Failure::Denied) }
}
