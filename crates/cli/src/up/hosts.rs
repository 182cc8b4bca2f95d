//! The hosts of a cluster on one machine: each is an agent that joined with a token, as any other would.

use std::collections::HashSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use berth_agent::AgentConfig;
use berth_agent::config::{LAYERS_MAX, NetworkConfig, PoolConfig, USER_ID_BASE};
use berth_api::endpoint::Nothing;
use berth_api::manager::{CreateJoinToken, HostDelete, HostList, HostPath, JoinTokenCreate, PageQuery};
use berth_model::Timestamp;
use berth_model::host::{Host, HostState, NetworkMode};
use berth_model::name::Name;
use berth_model::schedule::reserve::RESERVE_PERCENT;

use super::directory::{Directory, MANAGER};
use super::record::{HostEntry, Mode, Record};
use super::{manager, network, process};
use crate::config;
use crate::exit::Failure;
use crate::join::{self, AGENT_PORT};
use crate::session::Session;

/// How long all hosts together may take to be online. QEMU is asked what it can do first, which takes seconds on a
/// slow machine.
const ONLINE_TIMEOUT: Duration = Duration::from_secs(120);
const ASK_INTERVAL: Duration = Duration::from_millis(100);
/// How long a join token is good that is used at once.
const JOIN_TOKEN_S: u64 = 300;

/// How things stood before anything was started.
#[derive(Debug, Clone, Copy)]
pub struct Before {
    /// When that was.
    at: Timestamp,
    /// The manager has been running, and says so when a host is gone.
    manager_ran: bool,
}

impl Before {
    /// As it is now.
    pub fn now(directory: &Directory) -> Self {
        Self { at: now(), manager_ran: process::alive(directory, MANAGER).is_some() }
    }
}

/// Enrols the hosts that are not yet, starts the agents that don't run, and waits until all are online.
///
/// # Errors
/// When one is not, with the end of its log.
pub async fn bring_up(
    directory: &Directory,
    record: &mut Record,
    session: &Session,
    before: Before,
    pool_reserve: Option<u8>,
) -> Result<(), Failure> {
    choose_addresses(record)?;
    directory.save(record)?;
    make_pools(directory, record)?;
    let mut to_be_heard: HashSet<Name> = HashSet::new();
    for host in &record.hosts {
        let name = host.name.as_str();
        let runs = process::alive(directory, name).is_some();
        if !runs || !before.manager_ran {
            to_be_heard.insert(host.name.clone());
        }
        if runs {
            continue;
        }
        let path = directory.host_config(&host.name);
        let mut agent = agent_config(directory, record, host)?;
        agent.pool_reserve_percent = pool_reserve.unwrap_or(RESERVE_PERCENT);
        // Whoever gave a host another pool or reserve by hand finds it there the next time.
        if let Ok(before) = AgentConfig::load(&path) {
            agent.pools = before.pools;
            agent.pool_reserve_percent = pool_reserve.unwrap_or(before.pool_reserve_percent);
        }
        let text = toml::to_string(&agent).context("an agent's configuration can't be written")?;
        config::write_private(&path, text.as_bytes())?;
        if join::enrolled(&agent)?.is_none() {
            enrol(session, &agent).await?;
        }
        let path = path.to_str().context("the directory's name is not text")?;
        let namespace = (record.mode == Mode::Root).then(|| network::namespace(record, name));
        process::start(directory, name, &["agent", "run", "--config", path], namespace.as_deref())?;
    }
    wait_until_online(directory, record, session, (&to_be_heard, before.at)).await
}

fn now() -> Timestamp {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp::from_millis(u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX))
}

fn choose_addresses(record: &mut Record) -> Result<()> {
    let subnet = record.subnet;
    for (number, host) in record.hosts.iter_mut().enumerate() {
        match (record.mode, subnet) {
            (Mode::Root, Some(subnet)) => {
                let address = network::host_address(subnet, number);
                host.listen = Some(SocketAddr::new(IpAddr::V4(address), AGENT_PORT));
            }
            // Where it listened before is in its host's record at the manager, so it stays.
            _ if host.listen.is_none() => {
                let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no port is free")?;
                host.listen = Some(listener.local_addr().context("a port without a number")?);
            }
            _ => {}
        }
    }
    Ok(())
}

fn make_pools(directory: &Directory, record: &Record) -> Result<()> {
    let pools = directory.path().join("pools");
    let names = record.hosts.iter().map(|host| directory.pool(host.name.as_str()));
    for path in std::iter::once(pools).chain(names).chain([shared_pool(directory)]) {
        fs::create_dir_all(&path).with_context(|| format!("{} can't be made", path.display()))?;
        // VMs' own users get through, and see no names.
        let mode = if record.mode == Mode::Root { 0o711 } else { 0o700 };
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))
            .with_context(|| format!("{} can't be opened", path.display()))?;
    }
    Ok(())
}

fn shared_pool(directory: &Directory) -> PathBuf {
    directory.pool("shared")
}

fn agent_config(directory: &Directory, record: &Record, host: &HostEntry) -> Result<AgentConfig> {
    let pool = |name: &str, path| -> Result<PoolConfig> {
        Ok(PoolConfig { name: name.parse().context("a pool's name")?, path })
    };
    let network = match record.mode {
        Mode::Root => NetworkConfig { mode: NetworkMode::Bridge, bridge: Some("br0".to_owned()) },
        Mode::User => NetworkConfig::default(),
    };
    Ok(AgentConfig {
        name: host.name.clone(),
        listen: host.listen.context("a host without an address")?,
        manager: record.manager.context("a manager without an address")?.to_string(),
        state_dir: directory.host_state(&host.name),
        run_dir: directory.host_run(&host.name),
        pools: vec![
            pool("default", shared_pool(directory))?,
            pool("local", directory.pool(host.name.as_str()))?,
        ],
        qemu_binary: program("BERTH_QEMU", "/usr/bin/qemu-system-x86_64"),
        qemu_arguments: qemu_arguments(),
        qemu_img_binary: program("BERTH_QEMU_IMG", "/usr/bin/qemu-img"),
        machine: berth_agent::config::MachineConfig::default(),
        network,
        pool_reserve_percent: RESERVE_PERCENT,
        user_id_base: USER_ID_BASE,
        layers_max: LAYERS_MAX,
    })
}

/// Another QEMU than the distribution's can be tried with `BERTH_QEMU`, `BERTH_QEMU_IMG` and `BERTH_QEMU_ARGUMENTS`.
fn program(variable: &str, otherwise: &str) -> PathBuf {
    std::env::var_os(variable)
        .filter(|value| !value.is_empty())
        .map_or_else(|| otherwise.into(), PathBuf::from)
}

fn qemu_arguments() -> Vec<String> {
    let text = std::env::var("BERTH_QEMU_ARGUMENTS").unwrap_or_default();
    text.split_whitespace().map(str::to_owned).collect()
}

/// Joins a host to the cluster. The manager may know it already when we died before it had its certificate; then that
/// host has never run anything, and its name is made free.
async fn enrol(session: &Session, agent: &AgentConfig) -> Result<(), Failure> {
    let known = hosts(session).await?;
    if let Some(stale) = known.iter().find(|host| host.name == agent.name) {
        let path = HostPath { host: stale.id.to_string() };
        session.ask::<HostDelete>(&path, &Nothing {}).await?;
    }
    let wish = CreateJoinToken { expires_s: Some(JOIN_TOKEN_S) };
    let token = session.send::<JoinTokenCreate>(&Nothing {}, &Nothing {}, &wish).await?;
    join::enrol(agent, &token.token).await?;
    Ok(())
}

async fn hosts(session: &Session) -> Result<Vec<Host>, Failure> {
    let query = |limit, cursor| PageQuery { limit, cursor };
    session.pages::<HostList, _>(&Nothing {}, None, query).await
}

/// Waits until all hosts are online, and those who are to be heard were since then: that they were online before says
/// nothing.
async fn wait_until_online(
    directory: &Directory,
    record: &Record,
    session: &Session,
    (to_be_heard, since): (&HashSet<Name>, Timestamp),
) -> Result<(), Failure> {
    let deadline = Instant::now() + ONLINE_TIMEOUT;
    loop {
        let online: HashSet<Name> = hosts(session)
            .await?
            .into_iter()
            .filter(|host| host.state == HostState::Online && host.inventory.is_some())
            .filter(|host| {
                !to_be_heard.contains(&host.name) || host.last_seen_at.is_some_and(|seen| seen >= since)
            })
            .map(|host| host.name)
            .collect();
        let Some(missing) = record.hosts.iter().find(|host| !online.contains(&host.name)) else {
            return Ok(());
        };
        for name in directory.process_names(record) {
            if process::alive(directory, &name).is_none() {
                return Err(manager::died(directory, &name).into());
            }
        }
        if Instant::now() > deadline {
            let log = directory.log(missing.name.as_str());
            let seconds = ONLINE_TIMEOUT.as_secs();
            let text =
                format!("host {} is not online after {seconds} s; see {}", missing.name, log.display());
            return Err(anyhow::Error::msg(text).into());
        }
        tokio::time::sleep(ASK_INTERVAL).await;
    }
}
