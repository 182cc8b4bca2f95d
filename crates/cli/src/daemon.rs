//! `berth manager` and `berth agent`: the two daemons.
//!
//! Both run in the foreground, say what they do on standard error (as JSON when that is no terminal, so that the
//! journal can be searched), and end on SIGTERM or SIGINT. Neither end touches a VM.

use std::fs;
use std::future::Future;
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use berth_agent::AgentConfig;
use berth_manager::ManagerConfig;
use clap::Subcommand;
use tokio::sync::watch;
use tracing_subscriber::EnvFilter;

use crate::exit::Failure;
use crate::join;
use crate::output::Output;

const MANAGER_CONFIG: &str = "/etc/berth/manager.toml";
/// Where an agent's configuration is unless told otherwise.
pub const AGENT_CONFIG: &str = "/etc/berth/agent.toml";

/// What `berth manager` can do.
#[derive(Debug, Subcommand)]
pub enum ManagerVerb {
    /// Run the manager until SIGTERM
    Run {
        /// Its configuration; without a file there, the defaults
        #[arg(long, value_name = "FILE", default_value = MANAGER_CONFIG)]
        config: PathBuf,
        /// Leave the terminal's session, so that closing the terminal doesn't end it
        #[arg(long, hide = true)]
        own_session: bool,
    },
}

/// What `berth agent` can do.
#[derive(Debug, Subcommand)]
pub enum AgentVerb {
    /// Make this machine a host of a cluster
    Join(join::Arguments),
    /// Run the agent until SIGTERM; its VMs go on without it
    Run {
        /// Its configuration
        #[arg(long, value_name = "FILE", default_value = AGENT_CONFIG)]
        config: PathBuf,
        /// Leave the terminal's session, so that closing the terminal doesn't end it
        #[arg(long, hide = true)]
        own_session: bool,
    },
}

/// Does what `berth manager` is asked to.
///
/// # Errors
/// When the manager can't start or go on.
pub fn manager(verb: ManagerVerb) -> Result<(), Failure> {
    let ManagerVerb::Run { config, own_session } = verb;
    let config = load_manager_config(&config)?;
    prepare(own_session);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.context("no threads can be had")?;
    runtime.block_on(until_told(|stop| async { Ok(berth_manager::run(config, stop).await?) }))?;
    Ok(())
}

fn load_manager_config(path: &Path) -> Result<ManagerConfig, Failure> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        // Everything in it can be left out, so all of it can.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && path == Path::new(MANAGER_CONFIG) => {
            return Ok(ManagerConfig::default());
        }
        Err(error) => return Err(unreadable(path, &error)),
    };
    let config: ManagerConfig = toml::from_str(&text).map_err(|error| {
        Failure::field("config", path.display(), &format!("a manager's configuration: {error}"))
    })?;
    // Tried here, so that it ends as a wrong configuration does, and systemd does not start it again and again.
    berth_manager::audit::forward::prepare(&config.audit).map_err(|error| {
        Failure::field("config", path.display(), &format!("usable destinations: {error}"))
    })?;
    Ok(config)
}

fn unreadable(path: &Path, error: &std::io::Error) -> Failure {
    Failure::field("config", path.display(), &format!("a file that can be read ({error})"))
}

/// Does what `berth agent` is asked to.
///
/// # Errors
/// When the agent can't start, or the manager refuses.
pub fn agent(verb: AgentVerb, output: &Output) -> Result<(), Failure> {
    let runtime = berth_agent::runtime().context("no threads can be had")?;
    match verb {
        AgentVerb::Join(arguments) => runtime.block_on(join::run(arguments, output)),
        AgentVerb::Run { config, own_session } => {
            let config = AgentConfig::load(&config).map_err(|error| {
                Failure::field(
                    "config",
                    config.display(),
                    &format!("an agent's configuration: {}", chain(&error)),
                )
            })?;
            prepare(own_session);
            runtime.block_on(until_told(|stop| async { Ok(berth_agent::run(config, stop).await?) }))?;
            Ok(())
        }
    }
}

/// What every daemon does first.
fn prepare(own_session: bool) {
    if own_session {
        // Refused only to who leads a session already.
        let _ = rustix::process::setsid();
    }
    let filter = EnvFilter::try_from_env("BERTH_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if std::io::stderr().is_terminal() {
        log.init();
    } else {
        log.json().flatten_event(true).init();
    }
}

/// Runs a daemon, and tells it to end on SIGTERM or SIGINT.
async fn until_told<F>(daemon: impl FnOnce(watch::Receiver<bool>) -> F) -> Result<()>
where
    F: Future<Output = Result<()>>,
{
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).context("signals can't be waited for")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("signals can't be waited for")?;
    let (stop, stopped) = watch::channel(false);
    let running = daemon(stopped);
    let mut running = std::pin::pin!(running);
    tokio::select! {
        result = &mut running => return result,
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("told to end");
    stop.send_replace(true);
    running.await
}

/// An error with its causes, in a line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_with_an_unknown_key_is_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("manager.toml");
        fs::write(&path, "listn = 7\n").expect("written");
        assert_eq!(load_manager_config(&path).expect_err("refused").code(), 2);
        assert_eq!(load_manager_config(&directory.path().join("none")).expect_err("refused").code(), 2);
        fs::write(&path, "[[audit.forward]]\nname = \"siem\"\n").expect("written");
        assert_eq!(load_manager_config(&path).expect_err("no destination").code(), 2);
        fs::write(&path, "listen = \"127.0.0.1:0\"\n").expect("written");
        assert_eq!(load_manager_config(&path).expect("good").listen.port(), 0);
    }
}
