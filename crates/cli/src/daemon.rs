//! `berth manager` and `berth agent`: the two daemons, and how a machine becomes a host.
//!
//! Both run in the foreground, say what they do on standard error (as JSON when that is no terminal, so that the
//! journal can be searched), and end on SIGTERM or SIGINT. Neither end touches a VM.

use std::fs;
use std::future::Future;
use std::io::IsTerminal as _;
use std::net::{SocketAddr, ToSocketAddrs as _, UdpSocket};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use berth_agent::config::{NetworkConfig, PoolConfig, USER_ID_BASE};
use berth_agent::identity::{IdentityError, IdentityFiles};
use berth_agent::layout::Layout;
use berth_agent::{AgentConfig, Enrolment};
use berth_api::ClientError;
use berth_manager::ManagerConfig;
use berth_model::host::NetworkMode;
use berth_model::name::Name;
use berth_model::{HostId, Problem, ProblemCode};
use clap::{Args, Subcommand};
use tokio::sync::watch;
use tracing_subscriber::EnvFilter;

use crate::config;
use crate::exit::Failure;
use crate::lookup::parse_name;
use crate::output::Output;

/// Where agents listen unless told otherwise.
pub const AGENT_PORT: u16 = 8444;
const MANAGER_CONFIG: &str = "/etc/berth/manager.toml";
const AGENT_CONFIG: &str = "/etc/berth/agent.toml";
const STATE_DIR: &str = "/var/lib/berth/agent";
const RUN_DIR: &str = "/run/berth";
/// The pool of a host that is told of none.
const POOL: &str = "/var/lib/berth/pool";

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
    Join(JoinArguments),
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

/// Which cluster to join, and as what.
#[derive(Debug, Args)]
pub struct JoinArguments {
    /// The manager: HOST or HOST:PORT
    #[arg(long, value_name = "ADDRESS")]
    manager: String,
    /// The join token ('berth host join-token'); good once
    #[arg(long, required_unless_present = "token_file")]
    token: Option<String>,
    /// File with the join token
    #[arg(long, value_name = "FILE", conflicts_with = "token")]
    token_file: Option<PathBuf>,
    /// The host's name to be
    #[arg(long, value_parser = parse_name)]
    name: Name,
    /// Where its agent is to listen [default: this machine's address towards the manager, port 8444]
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// A pool: NAME=DIRECTORY; may be given several times [default: default=/var/lib/berth/pool]
    #[arg(long = "pool", value_name = "NAME=DIRECTORY", value_parser = parse_pool)]
    pools: Vec<PoolConfig>,
    /// The bridge that VMs are on; user-mode networking without it
    #[arg(long)]
    bridge: Option<String>,
    /// The configuration to write; one that is there already is kept, and must say the same
    #[arg(long, value_name = "FILE", default_value = AGENT_CONFIG)]
    config: PathBuf,
}

fn parse_pool(text: &str) -> Result<PoolConfig, String> {
    let wrong = || "expected NAME=DIRECTORY, with an absolute path".to_owned();
    let (name, path) = text.split_once('=').ok_or_else(wrong)?;
    let path = PathBuf::from(path);
    if !path.is_absolute() {
        return Err(wrong());
    }
    Ok(PoolConfig { name: parse_name(name)?, path })
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
    toml::from_str(&text).map_err(|error| {
        Failure::field("config", path.display(), &format!("a manager's configuration: {error}"))
    })
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
        AgentVerb::Join(arguments) => runtime.block_on(join(arguments, output)),
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

async fn join(arguments: JoinArguments, output: &Output) -> Result<(), Failure> {
    let token = match (&arguments.token, &arguments.token_file) {
        (Some(token), _) => token.clone(),
        (None, Some(file)) => fs::read_to_string(file).map_err(|error| {
            Failure::field("token-file", file.display(), &format!("a file that can be read ({error})"))
        })?,
        (None, None) => return Err(Failure::field("token", "", "a join token")),
    };
    let path = arguments.config.clone();
    let wanted = wanted_config(arguments)?;
    let agent = if path.exists() { agreeing(&path, wanted)? } else { wanted };
    agent.check().map_err(|error| Failure::field("config", path.display(), &chain(&error)))?;
    if let Some(host) = enrolled(&agent)? {
        let message = format!("this machine has joined a cluster already, as {host}");
        return Err(Problem::new(ProblemCode::WrongState, message).into());
    }
    make_pools(&agent)?;
    if !path.exists() {
        let text = toml::to_string(&agent).context("the configuration can't be written")?;
        config::write_private(&path, text.as_bytes())?;
    }
    let host = enrol(&agent, &token).await?;
    output.done(&serde_json::json!({ "host": host, "name": agent.name, "config": path }), || {
        format!(
            "this machine is now host {} ({host}); its configuration is {}\n  systemctl enable --now berth-agent",
            agent.name,
            path.display()
        )
    })
}

fn wanted_config(arguments: JoinArguments) -> Result<AgentConfig, Failure> {
    let manager = match arguments.manager.strip_prefix("https://") {
        Some(_) => config::address_of(&arguments.manager)?,
        None => config::address_of(&format!("https://{}", arguments.manager))?,
    };
    let listen = match arguments.listen {
        Some(listen) => listen,
        None => own_address_towards(&manager)?,
    };
    let pools = if arguments.pools.is_empty() {
        let name = "default".parse().map_err(anyhow::Error::new)?;
        vec![PoolConfig { name, path: POOL.into() }]
    } else {
        arguments.pools
    };
    let network = match arguments.bridge {
        Some(bridge) => NetworkConfig { mode: NetworkMode::Bridge, bridge: Some(bridge) },
        None => NetworkConfig::default(),
    };
    Ok(AgentConfig {
        name: arguments.name,
        listen,
        manager,
        state_dir: STATE_DIR.into(),
        run_dir: RUN_DIR.into(),
        pools,
        qemu_binary: "/usr/bin/qemu-system-x86_64".into(),
        qemu_arguments: Vec::new(),
        qemu_img_binary: "/usr/bin/qemu-img".into(),
        network,
        user_id_base: USER_ID_BASE,
    })
}

/// The configuration that is there, if it says what is asked for now.
fn agreeing(path: &Path, wanted: AgentConfig) -> Result<AgentConfig, Failure> {
    let there = AgentConfig::load(path).map_err(|error| {
        Failure::field("config", path.display(), &format!("an agent's configuration: {}", chain(&error)))
    })?;
    let differs = |field: &str, said: &dyn std::fmt::Display, there: &dyn std::fmt::Display| {
        Failure::field(field, said, &format!("'{there}', as {} says", path.display()))
    };
    if there.name != wanted.name {
        return Err(differs("name", &wanted.name, &there.name));
    }
    if there.manager != wanted.manager {
        return Err(differs("manager", &wanted.manager, &there.manager));
    }
    Ok(there)
}

/// This machine's address on the way to the manager. Nothing is sent for it.
fn own_address_towards(manager: &str) -> Result<SocketAddr, Failure> {
    let wrong = |error: std::io::Error| Failure::field("manager", manager, &format!("HOST[:PORT] ({error})"));
    let target = manager.to_socket_addrs().map_err(wrong)?.next();
    let target = target.ok_or_else(|| Failure::field("manager", manager, "a host that has an address"))?;
    let any = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).map_err(wrong)?;
    socket.connect(target).map_err(wrong)?;
    let mut own = socket.local_addr().map_err(wrong)?;
    own.set_port(AGENT_PORT);
    Ok(own)
}

fn make_pools(agent: &AgentConfig) -> Result<()> {
    for pool in agent.pools.iter().filter(|pool| !pool.path.exists()) {
        let failed = || format!("pool {} can't be made", pool.path.display());
        fs::create_dir_all(&pool.path).with_context(failed)?;
        // VMs' own users get through, and see no names.
        fs::set_permissions(&pool.path, fs::Permissions::from_mode(0o711)).with_context(failed)?;
    }
    Ok(())
}

/// Whether this agent has joined a cluster, and as which host.
///
/// # Errors
/// When what it has can't be used.
pub fn enrolled(agent: &AgentConfig) -> Result<Option<HostId>> {
    match IdentityFiles::new(Layout::new(agent).identity()).load() {
        Ok(identity) => Ok(Some(identity.host)),
        Err(IdentityError::NotJoined { .. }) => Ok(None),
        Err(error) => Err(error).context("this host's certificate can't be used"),
    }
}

/// Joins a cluster with this token.
///
/// # Errors
/// When the manager refuses or can't be reached, or the certificate can't be written.
pub async fn enrol(agent: &AgentConfig, token: &str) -> Result<HostId, Failure> {
    let enrolment = Enrolment {
        manager: agent.manager.clone(),
        token: token.trim().to_owned(),
        name: agent.name.clone(),
        address: agent.listen.to_string(),
        state_dir: agent.state_dir.clone(),
    };
    berth_agent::enrol(&enrolment).await.map_err(|error| match error {
        IdentityError::Manager(error) => match *error {
            ClientError::Problem(problem) => Failure::Problem(problem),
            other => other.into(),
        },
        IdentityError::Token(error) => Failure::field("token", "…", &error.to_string()),
        other => anyhow::Error::new(other).into(),
    })
}

/// An error with its causes, in a line.
fn chain(error: &dyn std::error::Error) -> String {
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
    fn pools_are_read_and_nonsense_is_refused() {
        assert_eq!(parse_pool("local=/srv/berth").expect("a pool").path, Path::new("/srv/berth"));
        for text in ["", "local", "local=", "local=relative", "Local=/srv", "=/srv"] {
            assert!(parse_pool(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_default_address_is_the_one_towards_the_manager() {
        let own = own_address_towards(&format!("127.0.0.1:{}", config::DEFAULT_PORT)).expect("an address");
        assert_eq!(own, SocketAddr::from(([127, 0, 0, 1], AGENT_PORT)));
        assert_eq!(own_address_towards("no such host:1").expect_err("refused").code(), 2);
    }

    #[test]
    fn a_configuration_with_an_unknown_key_is_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("manager.toml");
        fs::write(&path, "listn = 7\n").expect("written");
        assert_eq!(load_manager_config(&path).expect_err("refused").code(), 2);
        assert_eq!(load_manager_config(&directory.path().join("none")).expect_err("refused").code(), 2);
        fs::write(&path, "listen = \"127.0.0.1:0\"\n").expect("written");
        assert_eq!(load_manager_config(&path).expect("good").listen.port(), 0);
    }
}
