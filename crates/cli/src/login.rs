//! `berth login` and `berth logout`: say which cluster to talk to, and who you are.
//!
//! The manager leads: each of its answers says what it needs next, and this asks for it. Nothing is written before it
//! has answered with a session or has taken a token: a typing error leaves what was there. Without a terminal, what is
//! asked for is read from standard input, a line each.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use berth_api::endpoint::Nothing;
use berth_api::manager::{
    LoginAnswer, LoginBegin, LoginContinue, LoginNeed, LoginPath, LoginReply, LoginRequest, LoginShow,
    LoginWays, Logout, NewSession, OidcDevice, ProviderPath, WhoAmIShow,
};
use berth_model::ProblemCode;
use berth_model::name::Name;
use clap::Args;

use crate::config::{self, Config, ConfigFile};
use crate::exit::Failure;
use crate::output::Output;
use crate::session::Session;

mod prompt;

pub use prompt::Prompt;

/// Where to log in, and as whom.
#[derive(Debug, Args)]
pub struct Arguments {
    /// The manager: https://HOST or https://HOST:PORT; without it, the one of the last login
    #[arg(long, env = "BERTH_URL")]
    url: Option<String>,
    /// File with the cluster's CA certificate (ca.pem); a copy of it is kept
    #[arg(long, value_name = "FILE", env = "BERTH_CA")]
    ca: Option<PathBuf>,
    /// Your name; without it, it is asked for
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// Log in through a directory (LDAP); without a name, through the only one there is
    #[arg(long, value_name = "DIRECTORY", num_args = 0..=1, conflicts_with = "oidc")]
    ldap: Option<Option<String>>,
    /// Log in through an identity provider (OpenID Connect); without a name, through the only one there is
    #[arg(long, value_name = "PROVIDER", num_args = 0..=1, conflicts_with = "user")]
    oidc: Option<Option<String>>,
    /// File with a token, '-' for standard input: no login, but what programs use
    #[arg(long, value_name = "FILE", conflicts_with_all = ["user", "ldap", "oidc"])]
    token_file: Option<PathBuf>,
    /// The token itself; others on this machine may see it in the process list
    #[arg(long, env = "BERTH_TOKEN", hide_env_values = true, conflicts_with_all = ["token_file", "user", "ldap", "oidc"])]
    token: Option<String>,
}

/// Logs in.
///
/// # Errors
/// When the manager refuses or can't be reached, or the configuration can't be written.
pub async fn run(arguments: Arguments, output: &Output) -> Result<(), Failure> {
    let directory = config::directory()
        .ok_or_else(|| Failure::field("BERTH_CONTEXT", "", "a directory, because HOME is not set either"))?;
    let (address, ca_pem) = whereto(&arguments, &directory.join(config::FILE_NAME))?;
    let mut prompt = Prompt::of_terminal();
    let open = |token: Option<String>| {
        let config = Config { address: address.clone(), ca_pem: ca_pem.clone(), token, warning: None };
        Session::with_config(&config, output.clone())
    };
    let token = match token(&arguments, &mut prompt)? {
        Some(token) => token,
        None => walk(&open(None)?, &arguments, &mut prompt).await?.secret,
    };
    let me = open(Some(token.clone()))?.ask::<WhoAmIShow>(&Nothing {}, &Nothing {}).await?;

    config::write_private(&directory.join("ca.pem"), ca_pem.as_bytes())?;
    let file = ConfigFile {
        url: Some(format!("https://{address}")),
        ca: Some(PathBuf::from("ca.pem")),
        token: Some(token),
    };
    let path = directory.join(config::FILE_NAME);
    config::save(&path, &file)?;
    output.done(&me, || format!("logged in to {address} as {}; written to {}", me.user, path.display()))
}

/// Ends the session, there and here. What is wrong there does not keep its secret here.
///
/// # Errors
/// When there is no configuration, or it can't be written.
pub async fn logout(output: &Output) -> Result<(), Failure> {
    let session = Session::open(output.clone())?;
    let ended = session.ask::<Logout>(&Nothing {}, &Nothing {}).await;
    if let Err(failure) = &ended
        && failure.problem().is_some_and(|problem| problem.code == ProblemCode::WrongState)
    {
        // A token is no session, and logging out would only lose it.
        return ended;
    }
    if let Some(path) = config::directory().map(|directory| directory.join(config::FILE_NAME)) {
        config::forget_token(&path)?;
    }
    match ended {
        Err(failure)
            if failure.problem().is_none_or(|problem| problem.code != ProblemCode::Unauthenticated) =>
        {
            Err(failure)
        }
        _ => output.done(&(), || "logged out".to_owned()),
    }
}

fn whereto(arguments: &Arguments, file: &std::path::Path) -> Result<(String, String), Failure> {
    let known = config::known(file);
    let missing = |field: &str, expected: &str| Failure::field(field, "", expected);
    let url =
        arguments.url.clone().or(known.url).ok_or_else(|| missing("url", "--url https://HOST[:PORT]"))?;
    let ca =
        arguments.ca.clone().or(known.ca).ok_or_else(|| missing("ca", "--ca FILE, the cluster's ca.pem"))?;
    let ca_pem = fs::read_to_string(&ca)
        .map_err(|error| Failure::field("ca", ca.display(), &format!("a file that can be read ({error})")))?;
    Ok((config::address_of(&url)?, ca_pem))
}

/// The token that was given; none: somebody logs in.
fn token(arguments: &Arguments, prompt: &mut Prompt) -> Result<Option<String>, Failure> {
    let text = match (&arguments.token, &arguments.token_file) {
        // BERTH_TOKEN is for other commands as well: who says how to log in means that.
        (Some(token), _) => token.clone(),
        (None, Some(file)) if file.as_os_str() == "-" => prompt.hidden("token")?,
        (None, Some(file)) => fs::read_to_string(file).map_err(|error| {
            Failure::field("token-file", file.display(), &format!("a file that can be read ({error})"))
        })?,
        (None, None) => return Ok(None),
    };
    let token = text.trim();
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(Failure::field("token", "", "a token, as it was shown when it was made"));
    }
    Ok(Some(token.to_owned()))
}

/// Goes through a login, from the first question to the session.
async fn walk(session: &Session, arguments: &Arguments, prompt: &mut Prompt) -> Result<NewSession, Failure> {
    let mut reply = begin(session, arguments, prompt).await?;
    let mut interval_s = 0;
    loop {
        if let Some(new) = reply.session {
            return Ok(new);
        }
        if let Some(device) = &reply.device {
            let direct = device.verification_uri_complete.as_deref().unwrap_or(&device.verification_uri);
            session.output.remark(&format!(
                "open {direct} in a browser; the code is {}\nwaiting until you have said yes there (Ctrl-C gives up) …",
                device.user_code
            ));
            interval_s = device.interval_s;
        }
        let (Some(login), Some(needs)) = (reply.login, reply.needs) else {
            return Err(anyhow::anyhow!(
                "the manager answered neither with a session nor with what it needs"
            )
            .into());
        };
        reply = match needs {
            LoginNeed::Device => {
                tokio::time::sleep(Duration::from_secs(interval_s.clamp(1, 60))).await;
                send(session, &login, LoginAnswer::default()).await?
            }
            LoginNeed::Totp => code(session, &login, prompt).await?,
            LoginNeed::NewPassword => new_password(session, &login, prompt).await?,
        };
    }
}

async fn begin(session: &Session, arguments: &Arguments, prompt: &mut Prompt) -> Result<LoginReply, Failure> {
    if let Some(provider) = &arguments.oidc {
        let ways = session.ask::<LoginShow>(&Nothing {}, &Nothing {}).await?;
        let provider = only("oidc", provider.as_deref(), &ways.oidc)?;
        return session.ask::<OidcDevice>(&ProviderPath { provider }, &Nothing {}).await;
    }
    let directory = match &arguments.ldap {
        Some(directory) => {
            let ways: LoginWays = session.ask::<LoginShow>(&Nothing {}, &Nothing {}).await?;
            Some(only("ldap", directory.as_deref(), &ways.ldap)?)
        }
        None => None,
    };
    let user = match &arguments.user {
        Some(user) => user.clone(),
        None => prompt.shown("user")?,
    };
    let password = prompt.hidden("password")?;
    session.send::<LoginBegin>(&Nothing {}, &Nothing {}, &LoginRequest { user, password, directory }).await
}

/// The one that was named, or the only one.
fn only(field: &str, named: Option<&str>, all: &[Name]) -> Result<String, Failure> {
    match (named, all) {
        (Some(named), _) => Ok(named.to_owned()),
        (None, [one]) => Ok(one.to_string()),
        (None, []) => {
            Err(Failure::field(field, "", "one to be set up in the manager's login.toml; there is none"))
        }
        (None, all) => {
            let names: Vec<&str> = all.iter().map(Name::as_str).collect();
            Err(Failure::field(field, "", &format!("one of: {}", names.join(", "))))
        }
    }
}

async fn send(session: &Session, login: &str, answer: LoginAnswer) -> Result<LoginReply, Failure> {
    let path = LoginPath { login: login.to_owned() };
    session.send::<LoginContinue>(&path, &Nothing {}, &answer).await
}

/// Asks for a code, again after a wrong one as long as somebody is there to type another.
async fn code(session: &Session, login: &str, prompt: &mut Prompt) -> Result<LoginReply, Failure> {
    loop {
        let typed = prompt.hidden("code of the authenticator app, or a recovery code")?;
        // Codes are six digits; recovery codes have letters in them.
        let is_code = typed.chars().all(|letter| letter.is_ascii_digit() || letter == ' ');
        let answer = if is_code {
            LoginAnswer { totp: Some(typed), ..LoginAnswer::default() }
        } else {
            LoginAnswer { recovery: Some(typed), ..LoginAnswer::default() }
        };
        match send(session, login, answer).await {
            Err(failure) if prompt.is_somebody_there() && is(&failure, ProblemCode::Unauthenticated) => {
                let message = failure.problem().map(|problem| problem.message.clone()).unwrap_or_default();
                session.output.error(&message);
                if message.starts_with("this login is over") {
                    return Err(failure);
                }
            }
            result => return result,
        }
    }
}

async fn new_password(session: &Session, login: &str, prompt: &mut Prompt) -> Result<LoginReply, Failure> {
    session.output.remark("this password is good once: choose another (at least 12 characters)");
    loop {
        let new = prompt.new_password("new password")?;
        let answer = LoginAnswer { new_password: Some(new), ..LoginAnswer::default() };
        match send(session, login, answer).await {
            Err(failure) if prompt.is_somebody_there() && is(&failure, ProblemCode::InvalidInput) => {
                let message = failure.problem().map(|problem| problem.message.clone()).unwrap_or_default();
                session.output.error(&message);
            }
            result => return result,
        }
    }
}

fn is(failure: &Failure, code: ProblemCode) -> bool {
    failure.problem().is_some_and(|problem| problem.code == code)
}

#[cfg(test)]
mod tests;
