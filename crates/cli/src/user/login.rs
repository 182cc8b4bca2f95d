//! The part of `berth user` that is about logging in: others' by who manages users, and one's own.

use std::fs;
use std::path::{Path, PathBuf};

use berth_api::endpoint::Nothing;
use berth_api::manager::{
    IdentityQuery, LinkIdentity, NewPassword, SetPassword, User, UserDisable, UserEnable, UserIdentityLink,
    UserIdentityUnlink, UserLogin, UserLoginShow, UserPasswordReset, UserPath, UserShow, UserTotpReset,
};
use berth_model::access::Action;
use clap::Subcommand;
use serde::Serialize;

use crate::arguments::DryRunArguments;
use crate::exit::Failure;
use crate::login::Prompt;
use crate::output::{Facts, instant};
use crate::own;
use crate::session::Session;

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Show a user and how it logs in
    Show {
        /// Its name or id
        user: String,
    },
    /// Shut a user out: sessions, tokens, consoles and streams end at once
    Disable {
        /// Its name or id
        user: String,
        #[command(flatten)]
        dry_run: DryRunArguments,
    },
    /// Let a user in again
    Enable {
        /// Its name or id
        user: String,
        #[command(flatten)]
        dry_run: DryRunArguments,
    },
    /// Give a user a password that it has to change at the next login; its sessions end
    ResetPassword {
        /// Its name or id
        user: String,
        /// File with the password, '-' to be asked for it; without it, one is made and printed once
        #[arg(long, value_name = "FILE")]
        password_file: Option<PathBuf>,
        #[command(flatten)]
        dry_run: DryRunArguments,
    },
    /// Remove a user's second factor; its sessions end
    ResetTotp {
        /// Its name or id
        user: String,
        #[command(flatten)]
        dry_run: DryRunArguments,
    },
    /// Say who a user is at an identity provider or in a directory
    Link {
        /// Its name or id
        user: String,
        /// The provider or directory, as login.toml calls it
        #[arg(long, value_name = "NAME")]
        source: String,
        /// Who the user is there: 'sub' of its tokens, or its entryUUID; a refused login says it
        #[arg(long)]
        subject: String,
        #[command(flatten)]
        dry_run: DryRunArguments,
    },
    /// Take that back; its sessions end
    Unlink {
        /// Its name or id
        user: String,
        /// The identity's id, as 'berth user show' prints it
        identity: String,
        #[command(flatten)]
        dry_run: DryRunArguments,
    },
    /// Change your own password; your other sessions end
    ChangePassword,
    /// Your own second factor
    Totp {
        /// What to do.
        #[command(subcommand)]
        verb: own::TotpVerb,
    },
}

/// A user that was made, and the password that was made for it.
#[derive(Serialize)]
struct WithPassword<'a> {
    #[serde(flatten)]
    user: &'a User,
    #[serde(skip_serializing_if = "Option::is_none")]
    password: Option<String>,
}

/// A user and how it logs in.
#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    user: User,
    login: UserLogin,
}

/// Does it.
///
/// # Errors
/// When the manager refuses or can't be reached.
pub async fn run(session: &Session, verb: Verb) -> Result<(), Failure> {
    if let Some((user, summary)) = tried(&verb) {
        return session.would(Action::UserManage, Some(user), &summary).await;
    }
    let path = |user: &str| UserPath { user: user.to_owned() };
    match verb {
        Verb::Show { user } => show(session, &path(&user)).await,
        Verb::Disable { user, .. } => {
            let changed = session.ask::<UserDisable>(&path(&user), &Nothing {}).await?;
            session
                .output
                .done(&changed, || format!("user {} is shut out; what it began goes on", changed.name))
        }
        Verb::Enable { user, .. } => {
            let changed = session.ask::<UserEnable>(&path(&user), &Nothing {}).await?;
            session.output.done(&changed, || format!("user {} may log in again", changed.name))
        }
        Verb::ResetPassword { user, password_file, .. } => {
            let given = read(password_file.as_deref())?;
            let new = set_password(session, &user, given).await?;
            session.output.done(&new, || said(&user, new.password.as_deref()))
        }
        Verb::ResetTotp { user, .. } => {
            session.ask::<UserTotpReset>(&path(&user), &Nothing {}).await?;
            session.output.done(&(), || format!("user {user} is asked for codes no more"))
        }
        Verb::Link { user, source, subject, .. } => {
            let wish = LinkIdentity { source, subject };
            let made = session.send::<UserIdentityLink>(&path(&user), &Nothing {}, &wish).await?;
            session.output.done(&made, || format!("user {user} is {} at {}", made.subject, made.source))
        }
        Verb::Unlink { user, identity, .. } => {
            let query = IdentityQuery { identity };
            session.ask::<UserIdentityUnlink>(&path(&user), &query).await?;
            session.output.done(&(), || format!("user {user} is that no more"))
        }
        Verb::ChangePassword => own::change_password(session).await,
        Verb::Totp { verb } => own::totp(session, verb).await,
    }
}

/// For a change that is only tried: whom it is about, and what it would do.
fn tried(verb: &Verb) -> Option<(&str, String)> {
    let (user, dry_run, what) = match verb {
        Verb::Disable { user, dry_run } => (user, dry_run, "would shut out user"),
        Verb::Enable { user, dry_run } => (user, dry_run, "would let in again user"),
        Verb::ResetPassword { user, dry_run, .. } => (user, dry_run, "would give another password to user"),
        Verb::ResetTotp { user, dry_run } => (user, dry_run, "would remove the second factor of user"),
        Verb::Link { user, dry_run, .. } => (user, dry_run, "would add an identity to user"),
        Verb::Unlink { user, dry_run, .. } => (user, dry_run, "would take an identity from user"),
        Verb::Show { .. } | Verb::ChangePassword | Verb::Totp { .. } => return None,
    };
    dry_run.dry_run.then(|| (user.as_str(), format!("{what} {user}")))
}

/// What was made, with a first password.
///
/// # Errors
/// When the manager refuses, or the file can't be read.
pub async fn first_password(session: &Session, made: &User, file: Option<&Path>) -> Result<(), Failure> {
    let given = read(file)?;
    let new = set_password(session, made.name.as_str(), given).await?;
    let both = WithPassword { user: made, password: new.password };
    session.output.done(&both, || said(made.name.as_str(), both.password.as_deref()))
}

fn said(user: &str, password: Option<&str>) -> String {
    match password {
        Some(password) => {
            format!("user {user} logs in once with this password, and then chooses another:\n  {password}")
        }
        None => format!("user {user} logs in once with that password, and then chooses another"),
    }
}

async fn set_password(
    session: &Session,
    user: &str,
    password: Option<String>,
) -> Result<NewPassword, Failure> {
    let path = UserPath { user: user.to_owned() };
    session.send::<UserPasswordReset>(&path, &Nothing {}, &SetPassword { password }).await
}

fn read(file: Option<&Path>) -> Result<Option<String>, Failure> {
    let Some(file) = file else { return Ok(None) };
    if file.as_os_str() == "-" {
        return Prompt::of_terminal().new_password("password").map(Some);
    }
    let text = fs::read_to_string(file).map_err(|error| {
        Failure::field("password-file", file.display(), &format!("a file that can be read ({error})"))
    })?;
    Ok(Some(text.trim_end_matches(['\r', '\n']).to_owned()))
}

async fn show(session: &Session, path: &UserPath) -> Result<(), Failure> {
    let user = session.ask::<UserShow>(path, &Nothing {}).await?;
    let login = session.ask::<UserLoginShow>(path, &Nothing {}).await?;
    let shown = Shown { user, login };
    session.output.one(&shown, || {
        let Shown { user, login } = &shown;
        let yes = |so: bool| if so { "yes" } else { "no" };
        let password = match (login.has_password, login.must_change_password) {
            (true, true) => "to be changed at the next login",
            (true, false) => "set",
            (false, _) => "none",
        };
        let groups: Vec<String> =
            user.external_groups.iter().map(|group| format!("{}:{}", group.provider, group.group)).collect();
        let identities: Vec<String> = login
            .identities
            .iter()
            .map(|one| format!("{} is {} ({})", one.source, one.subject, one.id))
            .collect();
        let some = |all: Vec<String>| (!all.is_empty()).then(|| all.join(", "));
        Facts::new()
            .with("name", &user.name)
            .with("id", &user.id)
            .with("disabled", yes(user.disabled))
            .with("password", password)
            .with("second factor", yes(login.has_totp))
            .with_some("recovery codes left", login.has_totp.then_some(login.recovery_codes_left))
            .with("sessions", login.sessions)
            .with_some("elsewhere", some(identities))
            .with_some("groups", some(groups))
            .with("made", instant(user.created_at))
    })
}
