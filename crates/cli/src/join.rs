//! `berth agent join`: how a machine becomes a host.
//!
//! The configuration is written first, so that a machine on which it can't be written uses up no token; and when the
//! manager then refuses, it is taken away again: whoever made a slip corrects the line and repeats it.

use std::error::Error as _;
use std::fs;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs as _, UdpSocket};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use berth_agent::config::{LAYERS_MAX, NetworkConfig, PoolConfig, USER_ID_BASE};
use berth_agent::identity::{IdentityError, IdentityFiles};
use berth_agent::layout::Layout;
use berth_agent::{AgentConfig, Enrolment};
use berth_api::ClientError;
use berth_api::join::JoinSecret;
use berth_api::transport::TransportError;
use berth_model::host::NetworkMode;
use berth_model::name::Name;
use berth_model::schedule::reserve::{RESERVE_PERCENT, RESERVE_PERCENT_MAX};
use berth_model::{HostId, Problem, ProblemCode};
use clap::Args;
use clap::builder::RangedI64ValueParser;

use crate::config;
use crate::daemon::{AGENT_CONFIG, chain};
use crate::exit::Failure;
use crate::lookup::parse_name;
use crate::output::Output;

/// Where agents listen unless told otherwise.
pub const AGENT_PORT: u16 = 8444;
const STATE_DIR: &str = "/var/lib/berth/agent";
const RUN_DIR: &str = "/run/berth";
/// The pool of a host that is told of none.
const POOL: &str = "/var/lib/berth/pool";

/// Which cluster to join, and as what.
#[derive(Debug, Args)]
pub struct Arguments {
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
    /// How much of each pool, in percent, has to stay free for schedules to take snapshots there [default: 10]
    #[arg(long, value_name = "PERCENT", value_parser = pool_reserve())]
    pool_reserve: Option<u8>,
    /// The bridge that VMs are on; user-mode networking without it
    #[arg(long)]
    bridge: Option<String>,
    /// The configuration to write; one that is there already is kept, and must say the same
    #[arg(long, value_name = "FILE", default_value = AGENT_CONFIG)]
    config: PathBuf,
}

/// What may be said of a pool's reserve.
pub fn pool_reserve() -> RangedI64ValueParser<u8> {
    clap::value_parser!(u8).range(0..=i64::from(RESERVE_PERCENT_MAX))
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

/// Joins.
///
/// # Errors
/// When something of it can't be, or the manager refuses. Nothing but empty pools is left then.
pub async fn run(arguments: Arguments, output: &Output) -> Result<(), Failure> {
    let token = token(&arguments)?;
    let path = arguments.config.clone();
    let there = path.exists();
    let wanted = wanted_config(&arguments)?;
    let agent = if there { agreeing(&path, &arguments, &wanted)? } else { wanted };
    agent.check().map_err(|error| Failure::field("config", path.display(), &chain(&error)))?;
    if let Some(host) = enrolled(&agent)? {
        return Err(joined_already(&agent, &host).into());
    }
    make_pools(&agent)?;
    if !there {
        let text = toml::to_string(&agent).context("the configuration can't be written")?;
        config::write_private(&path, text.as_bytes())?;
    }
    let host = match enrol(&agent, &token).await {
        Ok(host) => host,
        Err(failure) => {
            if !there {
                // The failure itself is worth more to tell than that a file is left.
                let _ = fs::remove_file(&path);
            }
            return Err(failure);
        }
    };
    output.done(&serde_json::json!({ "host": host, "name": agent.name, "config": path }), || {
        format!(
            "this machine is now host {} ({host}); its configuration is {}\n  systemctl enable --now berth-agent",
            agent.name,
            path.display()
        )
    })
}

fn token(arguments: &Arguments) -> Result<String, Failure> {
    let text = match (&arguments.token, &arguments.token_file) {
        (Some(token), _) => token.clone(),
        (None, Some(file)) => fs::read_to_string(file).map_err(|error| {
            Failure::field("token-file", file.display(), &format!("a file that can be read ({error})"))
        })?,
        (None, None) => return Err(Failure::field("token", "", "a join token")),
    };
    text.parse::<JoinSecret>().map(|_| text).map_err(|_| not_a_token())
}

/// It is not repeated: it may be a secret with a slip in it.
fn not_a_token() -> Failure {
    let expected = "all of a join token as 'berth host join-token' showed it: 'berth-join-', 64 hexadecimal digits, \
                    '-', and 64 more";
    Failure::field("token", "…", expected)
}

fn joined_already(agent: &AgentConfig, host: &HostId) -> Problem {
    let identity = Layout::new(agent).identity();
    Problem::new(
        ProblemCode::WrongState,
        format!(
            "this machine has joined a cluster already, as {host}; once that is no longer one of its hosts \
             ('berth host delete'), stop the agent and remove {}, and it can join again",
            identity.display()
        ),
    )
}

fn wanted_config(arguments: &Arguments) -> Result<AgentConfig, Failure> {
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
        arguments.pools.clone()
    };
    let network = match arguments.bridge.clone() {
        Some(bridge) => NetworkConfig { mode: NetworkMode::Bridge, bridge: Some(bridge) },
        None => NetworkConfig::default(),
    };
    Ok(AgentConfig {
        name: arguments.name.clone(),
        listen,
        manager,
        state_dir: STATE_DIR.into(),
        run_dir: RUN_DIR.into(),
        pools,
        qemu_binary: "/usr/bin/qemu-system-x86_64".into(),
        qemu_arguments: Vec::new(),
        qemu_img_binary: "/usr/bin/qemu-img".into(),
        machine: berth_agent::config::MachineConfig::default(),
        network,
        pool_reserve_percent: arguments.pool_reserve.unwrap_or(RESERVE_PERCENT),
        user_id_base: USER_ID_BASE,
        layers_max: LAYERS_MAX,
    })
}

/// The configuration that is there, if it says all that is asked for now. What is not asked for is its own affair.
fn agreeing(path: &Path, arguments: &Arguments, wanted: &AgentConfig) -> Result<AgentConfig, Failure> {
    let there = AgentConfig::load(path).map_err(|error| {
        Failure::field("config", path.display(), &format!("an agent's configuration: {}", chain(&error)))
    })?;
    let bridge = |agent: &AgentConfig| agent.network.bridge.clone().unwrap_or_default();
    let reserve = |agent: &AgentConfig| agent.pool_reserve_percent.to_string();
    let said = [
        ("name", true, wanted.name.to_string(), there.name.to_string()),
        ("manager", true, wanted.manager.clone(), there.manager.clone()),
        ("listen", arguments.listen.is_some(), wanted.listen.to_string(), there.listen.to_string()),
        ("pool", !arguments.pools.is_empty(), pools_text(wanted), pools_text(&there)),
        ("bridge", arguments.bridge.is_some(), bridge(wanted), bridge(&there)),
        ("pool-reserve", arguments.pool_reserve.is_some(), reserve(wanted), reserve(&there)),
    ];
    for (field, asked, wanted, there) in said {
        if asked && wanted != there {
            return Err(Failure::field(field, wanted, &format!("'{there}', as {} says", path.display())));
        }
    }
    Ok(there)
}

fn pools_text(agent: &AgentConfig) -> String {
    let pools = agent.pools.iter().map(|pool| format!("{}={}", pool.name, pool.path.display()));
    pools.collect::<Vec<_>>().join(" ")
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
            ClientError::Transport(error) => no_answer(&agent.manager, error).into(),
            other => other.into(),
        },
        IdentityError::Token(_) => not_a_token(),
        other => anyhow::Error::new(other).into(),
    })
}

fn no_answer(manager: &str, error: TransportError) -> Problem {
    if shows_another_ca(&error) {
        let message = format!(
            "what listens at {manager} is not the manager that made the join token: its CA has another fingerprint; \
             the token was not shown to it"
        );
        return Problem::new(ProblemCode::Unreachable, message).at(
            "token",
            "…",
            "a token of the cluster whose manager is asked",
        );
    }
    let problem = ClientError::from(error).into_problem();
    problem.at("manager", manager, "an address at which the manager answers")
}

/// Whether TLS failed because the other side could not show the CA that the token names.
fn shows_another_ca(error: &TransportError) -> bool {
    let Some(cause) = error.source() else { return false };
    let wrapped = cause.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    let tls = wrapped.and_then(|error| error.downcast_ref()).or_else(|| cause.downcast_ref());
    matches!(tls, Some(rustls::Error::InvalidCertificate(_)))
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
    fn a_configuration_that_is_there_is_kept_only_if_it_says_what_is_asked_for() {
        use clap::Parser as _;
        #[derive(Debug, clap::Parser)]
        struct Line {
            #[command(flatten)]
            arguments: Arguments,
        }
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("agent.toml");
        let text = "name = \"h1\"\nlisten = \"127.0.0.1:7001\"\nmanager = \"127.0.0.1:7000\"\n\
                    state_dir = \"/var/lib/other\"\npools = [{ name = \"local\", path = \"/srv\" }]\n";
        fs::write(&path, text).expect("written");
        let agrees = |more: &str| {
            let line = format!("join --token t --name h1 --manager 127.0.0.1:7000 {more}");
            let arguments = Line::try_parse_from(line.split_whitespace()).expect("a good line").arguments;
            agreeing(&path, &arguments, &wanted_config(&arguments)?)
        };
        let kept = agrees("").expect("nothing else is asked for");
        assert_eq!(kept.state_dir, Path::new("/var/lib/other"));
        agrees("--listen 127.0.0.1:7001 --pool local=/srv").expect("the same is asked for");
        for (more, field) in [
            ("--listen 127.0.0.1:7002", "listen"),
            ("--pool local=/other", "pool"),
            ("--bridge br0", "bridge"),
        ] {
            let refused = agrees(more).expect_err(more);
            assert_eq!(refused.problem().expect("a problem").field.as_deref(), Some(field));
        }
    }
}
