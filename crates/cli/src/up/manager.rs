//! The manager of a cluster on one machine.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use berth_api::endpoint::Nothing;
use berth_api::manager::WhoAmIShow;
use berth_manager::ManagerConfig;
use berth_model::ProblemCode;

use super::directory::{Directory, MANAGER};
use super::record::{Mode, Record};
use super::{network, process, session};
use crate::config::{self, ConfigFile, DEFAULT_PORT};
use crate::exit::Failure;
use crate::output::Output;
use crate::session::Session;

/// How long it may take to answer.
const START_TIMEOUT: Duration = Duration::from_secs(60);
const ASK_INTERVAL: Duration = Duration::from_millis(50);
/// How many ports are tried after the one that people know.
const PORTS_TRIED: u16 = 200;
/// How often it is started when others take its port first.
const STARTS_MAX: u32 = 10;

/// Starts the manager if it doesn't run, and waits until it answers.
///
/// # Errors
/// When it does not, with the end of its log.
pub async fn bring_up(
    directory: &Directory,
    record: &mut Record,
    output: &Output,
) -> Result<Session, Failure> {
    for made in ["manager", "hosts", "log", "pids", "run"] {
        config::make_private_directory(&directory.path().join(made))?;
    }
    let mut starts = 0;
    loop {
        if process::alive(directory, MANAGER).is_none() {
            start(directory, record)?;
            starts += 1;
        }
        match wait_until_it_answers(directory, record, output).await {
            Err(_) if starts < STARTS_MAX && lost_its_port(directory, record) => {}
            answer => return answer,
        }
    }
}

fn start(directory: &Directory, record: &mut Record) -> Result<()> {
    let address = choose_address(record)?;
    record.manager = Some(address);
    directory.save(record)?;
    write_config(directory, record, address)?;
    let config = directory.manager_config();
    let config = config.to_str().context("the directory's name is not text")?;
    process::start(directory, MANAGER, &["manager", "run", "--config", config], None)
}

/// Whether it has ended and somebody else listens where it was to: a port that was free when it was chosen may be
/// another's, of another cluster that is brought up at the same time, when the manager gets there.
fn lost_its_port(directory: &Directory, record: &Record) -> bool {
    let in_use = |address: SocketAddr| {
        TcpListener::bind(address).is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse)
    };
    process::alive(directory, MANAGER).is_none() && record.manager.is_some_and(in_use)
}

fn write_config(directory: &Directory, record: &Record, address: SocketAddr) -> Result<()> {
    let addresses = record.subnet.map(|subnet| subnet.to_string().parse()).transpose();
    let config = ManagerConfig {
        listen: address,
        state_dir: directory.manager_state(),
        addresses: addresses.context("the subnet is not a range of addresses")?,
        first_token_file: Some(directory.token_file()),
        ..ManagerConfig::default()
    };
    let text = toml::to_string(&config).context("the manager's configuration can't be written")?;
    config::write_private(&directory.manager_config(), text.as_bytes())
}

/// Where it listens: where it did before if that is free, else at the port that people know or one after it.
fn choose_address(record: &Record) -> Result<SocketAddr> {
    let own = match (record.mode, record.subnet) {
        (Mode::Root, Some(subnet)) => network::own_address(subnet),
        (Mode::Root, None) => bail!("the cluster has no subnet"),
        (Mode::User, _) => Ipv4Addr::LOCALHOST,
    };
    let own = IpAddr::V4(own);
    let before = record.manager.filter(|address| address.ip() == own);
    let known = (DEFAULT_PORT..DEFAULT_PORT + PORTS_TRIED).map(|port| SocketAddr::new(own, port));
    before
        .into_iter()
        .chain(known)
        .find(|address| TcpListener::bind(address).is_ok())
        .with_context(|| format!("no port of {own} from {DEFAULT_PORT} on is free for the manager"))
}

async fn wait_until_it_answers(
    directory: &Directory,
    record: &Record,
    output: &Output,
) -> Result<Session, Failure> {
    let deadline = Instant::now() + START_TIMEOUT;
    let mut last = String::from("it has not written its CA's certificate and first token yet");
    while Instant::now() < deadline {
        if process::alive(directory, MANAGER).is_none() {
            return Err(died(directory, MANAGER).into());
        }
        if write_client_config(directory, record)? {
            let session = session(directory, output)?;
            match session.ask::<WhoAmIShow>(&Nothing {}, &Nothing {}).await {
                Ok(_) => return Ok(session),
                Err(failure) => match failure.problem() {
                    // The token's file is written before the token is good.
                    Some(problem)
                        if matches!(
                            problem.code,
                            ProblemCode::Unreachable | ProblemCode::Unauthenticated
                        ) =>
                    {
                        last.clone_from(&problem.message);
                    }
                    _ => return Err(failure),
                },
            }
        }
        tokio::time::sleep(ASK_INTERVAL).await;
    }
    let log = directory.log(MANAGER);
    Err(anyhow::anyhow!("the manager does not answer: {last}; see {}", log.display()).into())
}

/// Writes what the command line needs, when it is there.
fn write_client_config(directory: &Directory, record: &Record) -> Result<bool> {
    let ca = directory.manager_state().join("pki/ca.pem");
    let (Ok(token), true) = (fs::read_to_string(directory.token_file()), ca.exists()) else {
        return Ok(false);
    };
    let relative: PathBuf =
        ca.strip_prefix(directory.path()).context("the CA is not in the directory")?.to_owned();
    let file =
        ConfigFile { url: Some(record.url()), ca: Some(relative), token: Some(token.trim().to_owned()) };
    config::save(&directory.client_config(), &file)?;
    Ok(true)
}

/// What is said of a process that ended when it should not have.
pub fn died(directory: &Directory, name: &str) -> anyhow::Error {
    let log = directory.log(name);
    anyhow::anyhow!("{name} has ended; the last lines of {}:\n{}", log.display(), process::last_words(&log))
}
