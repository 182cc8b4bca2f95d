//! `berth login`: say which cluster to talk to, and who you are.
//!
//! Nothing is written before the manager has answered with the token: a typing error leaves what was there.

use std::fs;
use std::io::{self, BufRead as _, IsTerminal, Write as _};
use std::path::PathBuf;

use anyhow::Context as _;
use berth_api::endpoint::Nothing;
use berth_api::manager::WhoAmIShow;
use clap::Args;

use crate::config::{self, Config, ConfigFile};
use crate::exit::Failure;
use crate::output::Output;
use crate::session::Session;

/// Where to log in, and as whom.
#[derive(Debug, Args)]
pub struct Arguments {
    /// The manager: https://HOST or https://HOST:PORT
    #[arg(long, env = "BERTH_URL")]
    url: String,
    /// File with the cluster's CA certificate (ca.pem); a copy of it is kept
    #[arg(long, value_name = "FILE", env = "BERTH_CA")]
    ca: PathBuf,
    /// File with the token; without it, it is asked for, or read from standard input
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// The token itself; others on this machine may see it in the process list
    #[arg(long, env = "BERTH_TOKEN", hide_env_values = true, conflicts_with = "token_file")]
    token: Option<String>,
}

/// Logs in.
///
/// # Errors
/// When the manager refuses the token or can't be reached, or the configuration can't be written.
pub async fn run(arguments: Arguments, output: &Output) -> Result<(), Failure> {
    let directory = config::directory()
        .ok_or_else(|| Failure::field("BERTH_CONTEXT", "", "a directory, because HOME is not set either"))?;
    let ca_pem = fs::read_to_string(&arguments.ca).map_err(|error| {
        Failure::field("ca", arguments.ca.display(), &format!("a file that can be read ({error})"))
    })?;
    let address = config::address_of(&arguments.url)?;
    let token = token(&arguments)?;
    let config = Config { address: address.clone(), ca_pem, token: Some(token.clone()), warning: None };
    let session = Session::with_config(&config, output.clone())?;
    let me = session.ask::<WhoAmIShow>(&Nothing {}, &Nothing {}).await?;

    config::write_private(&directory.join("ca.pem"), config.ca_pem.as_bytes())?;
    let file = ConfigFile {
        url: Some(format!("https://{address}")),
        ca: Some(PathBuf::from("ca.pem")),
        token: Some(token),
    };
    let path = directory.join("config.toml");
    config::save(&path, &file)?;
    output.done(&me, || format!("logged in to {address} as {}; written to {}", me.user, path.display()))
}

fn token(arguments: &Arguments) -> Result<String, Failure> {
    let text = match (&arguments.token, &arguments.token_file) {
        (Some(token), _) => token.clone(),
        (None, Some(file)) => fs::read_to_string(file).map_err(|error| {
            Failure::field("token-file", file.display(), &format!("a file that can be read ({error})"))
        })?,
        (None, None) => ask()?,
    };
    let token = text.trim();
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(Failure::field("token", "", "a token, as it was shown when it was made"));
    }
    Ok(token.to_owned())
}

/// Reads the token from standard input; on a terminal without showing it.
fn ask() -> Result<String, Failure> {
    let stdin = io::stdin();
    let _hidden = if stdin.is_terminal() {
        eprint!("token: ");
        let _ = io::stderr().flush();
        Some(Hidden::start().context("the terminal can't be told to hide what is typed")?)
    } else {
        None
    };
    let mut line = String::new();
    stdin.lock().read_line(&mut line).context("standard input can't be read")?;
    Ok(line)
}

/// While it lives, the terminal doesn't show what is typed.
struct Hidden(rustix::termios::Termios);

impl Hidden {
    fn start() -> io::Result<Self> {
        use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};
        let before = tcgetattr(io::stdin())?;
        let mut hidden = before.clone();
        hidden.local_modes -= LocalModes::ECHO;
        tcsetattr(io::stdin(), OptionalActions::Now, &hidden)?;
        Ok(Self(before))
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        let _ = rustix::termios::tcsetattr(io::stdin(), rustix::termios::OptionalActions::Now, &self.0);
        eprintln!();
    }
}
