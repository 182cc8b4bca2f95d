//! Who one is, what one may do, and who may do what: `berth whoami`, `can-i`, `who-can` and `what-can`.

use berth_api::endpoint::Nothing;
use berth_api::manager::{
    CanI, CanIQuery, CanIReply, Holder, Holding, Page, WhatCan, WhatCanQuery, WhoAmIShow, WhoCan,
};
use berth_model::ProblemCode;
use berth_model::access::Action;
use clap::Args;

use crate::exit::Failure;
use crate::lookup::VmRef;
use crate::names::Names;
use crate::output::{Facts, NOTHING, Table, instant, or_nothing};
use crate::session::Session;
use crate::{role, token};

/// What to ask.
#[derive(Debug, Args)]
pub struct CanIArguments {
    /// The action, like snapshot.restore
    #[arg(value_parser = parse_action)]
    action: Action,
    /// What it is about: a VM as segment/name, a segment, host, image or user; the cluster without it
    resource: Option<String>,
}

/// Reads an action.
///
/// # Errors
/// What was expected instead.
pub fn parse_action(text: &str) -> Result<Action, String> {
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
    let segments = match &me.scope {
        Some(scope) if scope.segment.is_some() => Names::of_segments(session).await,
        _ => Names::default(),
    };
    session.output.one(&me, || {
        let teams: Vec<&str> = me.teams.iter().map(|team| team.as_str()).collect();
        let teams = if teams.is_empty() { NOTHING.to_owned() } else { teams.join(", ") };
        Facts::new()
            .with("user", &me.user)
            .with("id", &me.id)
            .with("teams", teams)
            .with("proved by", &me.method)
            .with("token", &me.token)
            .with_some("only for", me.scope.as_ref().map(|scope| token::scope_in_words(scope, &segments)))
            .with("manager", session.client.address())
    })
}

/// Whom or what to ask about.
#[derive(Debug, Args)]
pub struct WhatCanArguments {
    /// The user, by name or id; yourself without it
    user: Option<String>,
}

/// Whether the user may do something.
///
/// # Errors
/// [`Failure::Denied`] for a no; when the manager refuses or can't be reached.
pub async fn can_i(session: &Session, arguments: CanIArguments) -> Result<(), Failure> {
    let mut query = arguments.query();
    let mut reply = session.ask::<CanI>(&Nothing {}, &query).await?;
    if !reply.allowed
        && let Some(vm) = as_vm(&query)
    {
        reply = session.ask::<CanI>(&Nothing {}, &vm).await?;
        query = vm;
    }
    session.output.done(&reply, || answer(&reply, query.resource.as_deref()))?;
    if reply.allowed { Ok(()) } else { Err(Failure::Denied) }
}

impl CanIArguments {
    fn query(self) -> CanIQuery {
        CanIQuery { action: self.action.as_str().to_owned(), resource: self.resource }
    }
}

/// The same question about the VM of segment `default` that a bare name may mean, too.
fn as_vm(query: &CanIQuery) -> Option<CanIQuery> {
    let asked = query.resource.as_deref()?;
    let vm: VmRef = asked.parse().ok()?;
    (vm.as_str() != asked)
        .then(|| CanIQuery { action: query.action.clone(), resource: Some(vm.as_str().to_owned()) })
}

/// `yes: grant …`. What it is about stands there only where that could be something else than what was asked about.
fn answer(reply: &CanIReply, asked: Option<&str>) -> String {
    let word = if reply.allowed { "yes" } else { "no" };
    let about = match asked {
        None => "cluster: ".to_owned(),
        Some(name) if name.contains('/') => format!("vm:{name}: "),
        Some(_) => String::new(),
    };
    let reason = reply.reason.strip_prefix(&about).unwrap_or(&reply.reason);
    format!("{word}: {}", crate::output::plain(reason))
}

/// Who may do something.
///
/// # Errors
/// When the manager refuses or can't be reached.
pub async fn who_can(session: &Session, arguments: CanIArguments) -> Result<(), Failure> {
    let query = arguments.query();
    let mut asked = session.ask::<WhoCan>(&Nothing {}, &query).await;
    // What is not there is refused to who may not see everything.
    let may_be_vm = |failure: &Failure| {
        let code = failure.problem().map(|problem| problem.code);
        matches!(code, Some(ProblemCode::NotFound | ProblemCode::NotAllowed))
    };
    if asked.as_ref().is_err_and(may_be_vm)
        && let Some(vm) = as_vm(&query)
        && let Ok(found) = session.ask::<WhoCan>(&Nothing {}, &vm).await
    {
        asked = Ok(found);
    }
    let Page { items, .. } = asked?;
    session.output.list(&items, || holders(&items))
}

fn holders(items: &[Holder]) -> Table {
    Table::of(&["USER", "UNTIL", "BY"], items, |holder| {
        [holder.user.to_string(), or_nothing(holder.until.map(instant)), holder.by.clone()]
    })
}

/// What somebody may do.
///
/// # Errors
/// When the manager refuses or can't be reached.
pub async fn what_can(session: &Session, arguments: WhatCanArguments) -> Result<(), Failure> {
    let query = WhatCanQuery { user: arguments.user };
    let Page { items, .. } = session.ask::<WhatCan>(&Nothing {}, &query).await?;
    session.output.list(&items, || holdings(&items))
}

fn holdings(items: &[Holding]) -> Table {
    Table::of(&["WHERE", "ROLE", "THROUGH", "UNTIL", "GRANT", "ACTIONS"], items, |holding| {
        let through = holding.team.as_ref().map(|team| format!("team {team}"));
        [
            holding.scope.clone(),
            holding.role.to_string(),
            through.unwrap_or_else(|| "itself".to_owned()),
            or_nothing(holding.until.map(instant)),
            holding.grant.to_string(),
            role::actions_in_words(&holding.actions),
        ]
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Fake;
    use berth_model::Problem;

    #[test]
    fn a_yes_names_the_grant_at_once() {
        let reason =
            "vm:accounting/books: grant g-1 (team ledger, role operator, segment accounting)".to_owned();
        let reply = CanIReply { allowed: true, reason };
        let said = answer(&reply, Some("accounting/books"));
        assert_eq!(said, "yes: grant g-1 (team ledger, role operator, segment accounting)");
        assert!(answer(&reply, Some("books")).starts_with("yes: vm:accounting/books: grant"));
        let reply = CanIReply { allowed: true, reason: "cluster: grant g-1".to_owned() };
        assert_eq!(answer(&reply, None), "yes: grant g-1");
    }

    #[tokio::test]
    async fn a_bare_name_that_nothing_has_is_tried_as_a_vm_of_the_default_segment() {
        let holder = Holder { user: "ada".parse().expect("a name"), by: "grant g-1".to_owned(), until: None };
        let page = Page { items: vec![holder], next_cursor: None };
        let fake = Fake::new()
            .refuse("GET /v1/who-can", &Problem::not_found("thing", "books"))
            .answer("GET /v1/who-can", &page);
        let arguments = CanIArguments { action: Action::VmStart, resource: Some("books".to_owned()) };
        who_can(&fake.session(), arguments).await.expect("found");
        assert_eq!(fake.asked()[1].line, "GET /v1/who-can?action=vm.start&resource=default%2Fbooks");
        assert_eq!(fake.said(), "USER  UNTIL  BY\nada   -      grant g-1\n");
    }
}
