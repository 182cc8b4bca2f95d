//! `berth token`: what users and their programs prove themselves with.

use berth_api::endpoint::Nothing;
use berth_api::manager::{
    CreateToken, PageQuery, Scope, Token, TokenCreate, TokenDelete, TokenList, TokenPath, WhoAmIShow,
};
use berth_model::access::Action;
use berth_model::{Problem, TokenId};
use clap::{Args, Subcommand};

use crate::access::parse_action;
use crate::arguments::{DryRunArguments, ListArguments};
use crate::exit::Failure;
use crate::names::Names;
use crate::options::named;
use crate::output::{Table, instant, or_nothing, word};
use crate::role::actions_in_words;
use crate::session::Session;
use crate::units;

/// The API's fields, and the options that they come from.
const OPTIONS: &[(&str, &str)] = &[("actions", "scope"), ("expires_s", "expires")];

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List the tokens, your own and those that you may see, without their secrets
    List(ListArguments),
    /// Make a token, with all of its owner's rights or a part of them; its secret is shown once
    Create(CreateArguments),
    /// Revoke a token, at once
    Delete {
        /// Its id
        token: TokenId,
        #[command(flatten)]
        dry_run: DryRunArguments,
    },
}

/// What to make.
#[derive(Debug, Args)]
pub struct CreateArguments {
    /// Whose, as with --user
    #[arg(value_name = "USER", hide = true, conflicts_with = "user")]
    whose: Option<String>,
    /// Whose, by name or id; your own without it
    #[arg(long)]
    user: Option<String>,
    /// What it may be used for, like vm.view; several with commas, or given several times; all that its owner may do
    /// without it
    #[arg(long = "scope", visible_alias = "action", value_name = "ACTION", value_parser = parse_action, value_delimiter = ',')]
    scope: Vec<Action>,
    /// In which segment, with those inside it; wherever its owner may without it
    #[arg(long)]
    segment: Option<String>,
    /// A word about it
    #[arg(long, default_value = "")]
    note: String,
    /// How long it is good; until revoked without it
    #[arg(long, value_name = "DURATION", value_parser = units::parse_duration_s)]
    expires: Option<u64>,
    #[command(flatten)]
    dry_run: DryRunArguments,
}

/// Does it.
///
/// # Errors
/// When the manager refuses or can't be reached.
pub async fn run(session: &Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::List(arguments) => {
            let tokens = list(session, arguments.limit).await?;
            let (users, segments) = tokio::join!(Names::of_users(session), Names::of_segments(session));
            session.output.list(&tokens, || table(&tokens, &users, &segments))
        }
        Verb::Create(arguments) => create(session, arguments).await,
        Verb::Delete { token, dry_run } if dry_run.dry_run => {
            let me = session.ask::<WhoAmIShow>(&Nothing {}, &Nothing {}).await?;
            let tokens = list(session, None).await?;
            let found = tokens.iter().find(|one| one.id == token);
            let found = found.ok_or_else(|| Problem::not_found("token", &token))?;
            let summary = format!("would revoke {token}");
            // One's own can be revoked by everybody.
            if found.user == me.id {
                return session.tried(&summary);
            }
            session.would(Action::UserManage, Some(found.user.as_str()), &summary).await
        }
        Verb::Delete { token, .. } => {
            session.ask::<TokenDelete>(&TokenPath { token: token.clone() }, &Nothing {}).await?;
            session.output.done(&(), || format!("{token} is revoked"))
        }
    }
}

async fn create(session: &Session, arguments: CreateArguments) -> Result<(), Failure> {
    let CreateArguments { whose, user, scope, segment, note, expires, dry_run } = arguments;
    let user = user.or(whose);
    if dry_run.dry_run {
        let (action, owner) = match &user {
            Some(user) => (Action::UserManage, format!("user {user}")),
            None => (Action::TokenCreate, "yourself".to_owned()),
        };
        return session.would(action, user.as_deref(), &format!("would make a token for {owner}")).await;
    }
    let actions = (!scope.is_empty()).then_some(scope);
    let wish = CreateToken { user, actions, segment, note, expires_s: expires };
    let made = named(session.send::<TokenCreate>(&Nothing {}, &Nothing {}, &wish).await, OPTIONS)?;
    session.output.done(&made, || {
        format!("{}\n\nthis is {}, shown once; it is not kept anywhere", made.secret, made.token.id)
    })
}

async fn list(session: &Session, limit: Option<u32>) -> Result<Vec<Token>, Failure> {
    let query = |limit, cursor| PageQuery { limit, cursor };
    session.pages::<TokenList, _>(&Nothing {}, limit, query).await
}

fn table(tokens: &[Token], users: &Names, segments: &Names) -> Table {
    Table::of(&["ID", "USER", "KIND", "SCOPE", "NOTE", "MADE", "EXPIRES"], tokens, |token| {
        [
            token.id.to_string(),
            users.of(&token.user),
            word(&token.kind),
            or_nothing(token.scope.as_ref().map(|scope| scope_in_words(scope, segments))),
            token.note.clone(),
            instant(token.created_at),
            or_nothing(token.expires_at.map(instant)),
        ]
    })
}

/// What a token may be used for, in a cell.
pub fn scope_in_words(scope: &Scope, segments: &Names) -> String {
    let grantable = Action::ALL.iter().filter(|action| action.is_grantable()).count();
    let is_all = scope.actions.len() == grantable;
    let actions = if is_all { "everything".to_owned() } else { actions_in_words(&scope.actions) };
    let place = scope.segment.as_ref().map(|segment| format!(" in {}", segments.of(segment)));
    format!("{actions}{}", place.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Fake;
    use clap::Parser as _;

    async fn asked(line: &str) -> serde_json::Value {
        let cli = crate::arguments::Cli::try_parse_from(line.split(' ')).expect(line);
        let crate::arguments::Command::Noun(crate::arguments::Noun::Token { verb }) = cli.command else {
            panic!("{line}");
        };
        let no = Problem::new(berth_model::ProblemCode::NotAllowed, "no");
        let fake = Fake::new().refuse("POST /v1/tokens", &no);
        run(&fake.session(), verb).await.expect_err("refused");
        serde_json::from_slice(&fake.asked()[0].body).expect("json")
    }

    #[tokio::test]
    async fn a_token_is_the_caller_s_own_unless_somebody_is_named() {
        let body =
            asked("berth token create --scope vm.view,vm.start --segment accounting --expires 7d").await;
        assert!(body["user"].is_null(), "{body}");
        assert_eq!(body["actions"], serde_json::json!(["vm.view", "vm.start"]));
        assert_eq!((&body["segment"], &body["expires_s"]), (&"accounting".into(), &604_800.into()));
        for line in ["berth token create ci", "berth token create --user ci"] {
            let body = asked(line).await;
            assert_eq!(body["user"], "ci");
            assert!(body["actions"].is_null(), "{body}");
        }
    }

    #[test]
    fn a_scope_is_told_in_a_cell() {
        let scope = Scope { actions: vec![Action::VmView, Action::VmStart], segment: None };
        assert_eq!(scope_in_words(&scope, &Names::default()), "vm.view, vm.start");
        let all = Action::ALL.iter().copied().filter(|action| action.is_grantable()).collect();
        assert_eq!(scope_in_words(&Scope { actions: all, segment: None }, &Names::default()), "everything");
    }
}
