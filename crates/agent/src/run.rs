//! An agent as a daemon: from its configuration to serving, until it is told to end. QEMUs stay as they are.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use berth_api::serve::serve;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::agent::{Agent, StartError};
use crate::clock::SystemClock;
use crate::config::{AgentConfig, ConfigError};
use crate::disk::tool::QemuImg;
use crate::http;
use crate::identity::{IdentityError, IdentityFiles, Renewal, TlsPeers};
use crate::launcher::process::ProcessLauncher;
use crate::layout::Layout;
use crate::sandbox;
use crate::services::Handles;

/// Threads that do the agent's work: one that hashes and encrypts must not hold up the others.
const WORKERS: usize = 2;
/// Most threads for work that blocks. Each has a stack; more would wait for the same disk.
const BLOCKING_THREADS_MAX: usize = 8;
/// Stack of a thread, in bytes: nothing here recurses.
const STACK_BYTES: usize = 1024 * 1024;

/// An agent that can't run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Its configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// It has no identity.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// It can't start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// It can't listen.
    #[error("the agent can't listen on {address}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The machine's own facts can't be read.
    #[error("the machine can't be looked at")]
    Machine(#[source] io::Error),
}

/// A runtime as an agent wants it: few threads, small stacks.
///
/// # Errors
/// When the system gives no threads.
pub fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .thread_stack_size(STACK_BYTES)
        .enable_all()
        .build()
}

/// Runs an agent until `stop` says so or is dropped.
///
/// # Errors
/// When it can't start.
pub async fn run(config: AgentConfig, stop: watch::Receiver<bool>) -> Result<(), RunError> {
    config.check()?;
    let layout = Layout::new(&config);
    let files = IdentityFiles::new(layout.identity());
    let identity = files.load()?;
    let host = identity.host.clone();
    let clock = Arc::new(SystemClock);
    let (renewal, credentials) = Renewal::new(files, config.manager.clone(), clock.clone(), identity)?;
    let address = config.listen;
    let listener = TcpListener::bind(address).await.map_err(|source| RunError::Listen { address, source })?;
    let scratch_user = sandbox::can_become_users_from(config.user_id_base).then_some(config.user_id_base);
    let launcher = ProcessLauncher::new(
        config.qemu_binary.clone(),
        config.qemu_arguments.clone(),
        config.run_dir.clone(),
        scratch_user,
    )
    .map_err(RunError::Machine)?;
    let handles = Handles {
        launcher: Arc::new(launcher),
        images: Arc::new(QemuImg::new(config.qemu_img_binary.clone(), scratch_user)),
        clock,
        peers: Arc::new(TlsPeers::new(&credentials)),
    };
    let agent = Agent::start(host, config, handles).await?;
    tracing::info!(%address, host = %agent.services().host, "the agent serves");
    let renewing = tokio::spawn(renewal.run());
    serve(listener, credentials.server, http::router(&agent), stop).await;
    tracing::info!("the agent ends; its VMs go on");
    renewing.abort();
    agent.stop();
    Ok(())
}
