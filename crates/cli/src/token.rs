//! `berth token`: what users prove themselves with.

use berth_api::endpoint::Nothing;
use berth_api::manager::{CreateToken, PageQuery, Token, TokenCreate, TokenDelete, TokenList, TokenPath};
use berth_model::access::Action;
use berth_model::{Problem, TokenId};
use clap::Subcommand;

use crate::arguments::{DryRunArguments, ListArguments};
use crate::exit::Failure;
use crate::output::{Table, instant, or_nothing};
use crate::session::Session;
use crate::{units, user};

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List the tokens, without their secrets
    List(ListArguments),
    /// Make a token; its secret is shown once
    Create {
        /// Whose: name or id of a user
        user: String,
        /// A word about it
        #[arg(long, default_value = "")]
        note: String,
        /// How long it is good; until revoked without it
        #[arg(long, value_name = "DURATION", value_parser = units::parse_duration_s)]
        expires: Option<u64>,
        #[command(flatten)]
        dry_run: DryRunArguments,
    },
    /// Revoke a token, at once
    Delete {
        /// Its id
        token: TokenId,
        #[command(flatten)]
        dry_run: DryRunArguments,
    },
}

/// Does it.
///
/// # Errors
/// When the manager refuses or can't be reached.
pub async fn run(session: &Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::List(arguments) => {
            let tokens = list(session, arguments.limit).await?;
            let users = user::list(session, None).await?;
            let name_of = |token: &Token| {
                let owner = users.iter().find(|user| user.id == token.user);
                owner.map_or_else(|| token.user.to_string(), |user| user.name.to_string())
            };
            session.output.list(&tokens, || table(&tokens, name_of))
        }
        Verb::Create { user, dry_run, .. } if dry_run.dry_run => {
            session.would(Action::UserManage, None, &format!("would make a token for user {user}")).await
        }
        Verb::Create { user, note, expires, .. } => {
            let wish = CreateToken { user: Some(user), note, expires_s: expires, ..CreateToken::default() };
            let made = session.send::<TokenCreate>(&Nothing {}, &Nothing {}, &wish).await?;
            session.output.done(&made, || {
                format!("{}\n\nthis is {}, shown once; it is not kept anywhere", made.secret, made.token.id)
            })
        }
        Verb::Delete { token, dry_run } if dry_run.dry_run => {
            if !list(session, None).await?.iter().any(|one| one.id == token) {
                return Err(Problem::not_found("token", &token).into());
            }
            session.would(Action::UserManage, None, &format!("would revoke {token}")).await
        }
        Verb::Delete { token, .. } => {
            session.ask::<TokenDelete>(&TokenPath { token: token.clone() }, &Nothing {}).await?;
            session.output.done(&(), || format!("{token} is revoked"))
        }
    }
}

async fn list(session: &Session, limit: Option<u32>) -> Result<Vec<Token>, Failure> {
    let query = |limit, cursor| PageQuery { limit, cursor };
    session.pages::<TokenList, _>(&Nothing {}, limit, query).await
}

fn table(tokens: &[Token], name_of: impl Fn(&Token) -> String) -> Table {
    Table::of(&["ID", "USER", "NOTE", "MADE", "EXPIRES"], tokens, |token| {
        [
            token.id.to_string(),
            name_of(token),
            token.note.clone(),
            instant(token.created_at),
            or_nothing(token.expires_at.map(instant)),
        ]
    })
}
