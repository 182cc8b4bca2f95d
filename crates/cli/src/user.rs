//! `berth user`: people and programs that have a name.

use berth_api::endpoint::Nothing;
use berth_api::manager::{CreateUser, PageQuery, User, UserCreate, UserDelete, UserList, UserPath};
use berth_model::Problem;
use berth_model::access::Action;
use berth_model::name::Name;
use clap::Subcommand;

use crate::arguments::{DryRunArguments, ListArguments};
use crate::exit::Failure;
use crate::lookup::parse_name;
use crate::output::{Table, instant};
use crate::session::Session;

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List the users
    List(ListArguments),
    /// Make a user; 'berth token create' then makes what it proves itself with
    Create {
        /// Its name
        #[arg(value_parser = parse_name)]
        name: Name,
        #[command(flatten)]
        dry_run: DryRunArguments,
    },
    /// Delete a user with all tokens
    Delete {
        /// Its name or id
        user: String,
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
            let users = list(session, arguments.limit).await?;
            session.output.list(&users, || table(&users))
        }
        Verb::Create { name, dry_run, .. } if dry_run.dry_run => {
            session.would(Action::UserManage, None, &format!("would make user {name}")).await
        }
        Verb::Create { name, .. } => {
            let wish = CreateUser { name };
            let made = session.send::<UserCreate>(&Nothing {}, &Nothing {}, &wish).await?;
            session.output.done(&made, || {
                format!("user {} is there; give it a token: berth token create {}", made.name, made.name)
            })
        }
        Verb::Delete { user, dry_run } if dry_run.dry_run => {
            let found = list(session, None).await?;
            let is_meant = |one: &&User| one.name.as_str() == user || one.id.as_str() == user;
            let found = found.iter().find(is_meant).ok_or_else(|| Problem::not_found("user", &user))?;
            let summary = format!("would delete user {} with all tokens", found.name);
            session.would(Action::UserManage, None, &summary).await
        }
        Verb::Delete { user, .. } => {
            session.ask::<UserDelete>(&UserPath { user: user.clone() }, &Nothing {}).await?;
            session
                .output
                .done(&(), || format!("user {user} is deleted, and none of its tokens is good any more"))
        }
    }
}

/// The users.
///
/// # Errors
/// When the manager refuses or can't be reached.
pub async fn list(session: &Session, limit: Option<u32>) -> Result<Vec<User>, Failure> {
    let query = |limit, cursor| PageQuery { limit, cursor };
    session.pages::<UserList, _>(&Nothing {}, limit, query).await
}

fn table(users: &[User]) -> Table {
    Table::of(&["NAME", "ID", "STATE", "MADE"], users, |user| {
        let state = if user.disabled { "disabled" } else { "active" };
        [user.name.to_string(), user.id.to_string(), state.to_owned(), instant(user.created_at)]
    })
}
