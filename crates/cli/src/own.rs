//! `berth session`: one's own logins. And what `berth user` changes about oneself.

use berth_api::endpoint::Nothing;
use berth_api::manager::{
    ChangePassword, Code, EnrolTotp, OwnPasswordChange, OwnSessionDelete, OwnSessionList, OwnTotpConfirm,
    OwnTotpEnrol, OwnTotpRemove, Session as Login, SessionListQuery, SessionPath,
};
use berth_model::TokenId;
use clap::Subcommand;

use crate::arguments::ListArguments;
use crate::exit::Failure;
use crate::login::Prompt;
use crate::output::{Facts, Table, instant};
use crate::session::Session;

/// What can be done with one's own logins.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List your sessions: where you are logged in
    List(ListArguments),
    /// End one of your sessions, at once
    Revoke {
        /// Its id, as 'berth session list' shows it
        session: TokenId,
    },
}

/// What can be done with one's own second factor.
#[derive(Debug, Subcommand)]
pub enum TotpVerb {
    /// Make a secret for an authenticator app; it counts after 'confirm'
    Enrol {
        /// Ask for the password, which is needed when the login was more than ten minutes ago
        #[arg(long)]
        password: bool,
    },
    /// Show that the app has it; answers with recovery codes, once
    Confirm {
        /// The code that the app shows; without it, it is asked for
        code: Option<String>,
    },
    /// Remove it again
    Remove {
        /// A code that the app shows, or a recovery code; without it, it is asked for
        code: Option<String>,
    },
}

/// Does it.
///
/// # Errors
/// When the manager refuses or can't be reached.
pub async fn run(session: &Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::List(arguments) => {
            let query = |limit, cursor| SessionListQuery { limit, cursor };
            let all = session.pages::<OwnSessionList, _>(&Nothing {}, arguments.limit, query).await?;
            session.output.list(&all, || table(&all))
        }
        Verb::Revoke { session: id } => {
            session.ask::<OwnSessionDelete>(&SessionPath { session: id.clone() }, &Nothing {}).await?;
            session.output.done(&(), || format!("session {id} has ended"))
        }
    }
}

fn table(all: &[Login]) -> Table {
    Table::of(&["ID", "HOW", "FROM", "SINCE", "USED", "ENDS", "THIS"], all, |one| {
        let second = if one.second_factor { "+code" } else { "" };
        [
            one.id.to_string(),
            format!("{}{second}", one.method),
            one.address.clone(),
            instant(one.created_at),
            instant(one.used_at),
            instant(one.expires_at),
            if one.is_this { "yes" } else { "" }.to_owned(),
        ]
    })
}

/// Changes one's own password; the other sessions end.
///
/// # Errors
/// As [`run`].
pub async fn change_password(session: &Session) -> Result<(), Failure> {
    let mut prompt = Prompt::of_terminal();
    let old_password = prompt.hidden("present password")?;
    let new_password = prompt.new_password("new password")?;
    let wish = ChangePassword { old_password, new_password };
    session.send::<OwnPasswordChange>(&Nothing {}, &Nothing {}, &wish).await?;
    session.output.done(&(), || "the password is changed, and your other sessions have ended".to_owned())
}

/// Does what is to be done with one's own second factor.
///
/// # Errors
/// As [`run`].
pub async fn totp(session: &Session, verb: TotpVerb) -> Result<(), Failure> {
    let mut prompt = Prompt::of_terminal();
    let mut code = |given: Option<String>| given.map_or_else(|| prompt.hidden("code"), Ok);
    match verb {
        TotpVerb::Enrol { password } => {
            let password = if password { Some(Prompt::of_terminal().hidden("password")?) } else { None };
            let offer =
                session.send::<OwnTotpEnrol>(&Nothing {}, &Nothing {}, &EnrolTotp { password }).await?;
            session.output.one(&offer, || {
                Facts::new()
                    .with("for a QR code", &offer.uri)
                    .with("for typing in", &offer.secret)
                    .with("next", "berth user totp confirm CODE")
            })
        }
        TotpVerb::Confirm { code: given } => {
            let wish = Code { code: code(given)? };
            let codes = session.send::<OwnTotpConfirm>(&Nothing {}, &Nothing {}, &wish).await?;
            session.output.done(&codes, || {
                format!(
                    "codes are asked for from now on. If you lose the app, each of these is good once; keep them \
                     somewhere else:\n  {}",
                    codes.recovery_codes.join("\n  ")
                )
            })
        }
        TotpVerb::Remove { code: given } => {
            let wish = Code { code: code(given)? };
            session.send::<OwnTotpRemove>(&Nothing {}, &Nothing {}, &wish).await?;
            session.output.done(&(), || "codes are asked for no more".to_owned())
        }
    }
}
