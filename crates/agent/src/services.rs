//! What everything in the agent shares: its configuration, its handles to the world, and who it is.

use std::sync::Arc;

use berth_api::Client;
use berth_model::name::Name;
use berth_model::{HostId, VmId};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::config::AgentConfig;
use crate::disk::ImageTool;
use crate::launcher::{Hypervisor, Launcher};
use crate::layout::Layout;
use crate::pool::PoolFacts;
use crate::report::ReportBoard;
use crate::snapshot::merge::MergeStatistics;
use crate::snapshot::verify::Reading;

/// Reaches other hosts' agents.
pub trait PeerConnector: Send + Sync {
    /// A client of the agent of `host` at `address`, which must show that host's certificate.
    fn connect(&self, host: &HostId, address: &str) -> Client;
}

/// The handles that an agent is given.
pub struct Handles {
    /// Starts QEMUs.
    pub launcher: Arc<dyn Launcher>,
    /// Makes layers and checks images.
    pub images: Arc<dyn ImageTool>,
    /// Tells the time.
    pub clock: Arc<dyn Clock>,
    /// Reaches other hosts.
    pub peers: Arc<dyn PeerConnector>,
}

/// What everything in the agent shares.
pub struct Services {
    /// Who this host is.
    pub host: HostId,
    /// What the agent was told.
    pub config: AgentConfig,
    /// Where things are.
    pub layout: Layout,
    /// Starts QEMUs.
    pub launcher: Arc<dyn Launcher>,
    /// Makes layers and checks images.
    pub images: Arc<dyn ImageTool>,
    /// Tells the time.
    pub clock: Arc<dyn Clock>,
    /// Reaches other hosts.
    pub peers: Arc<dyn PeerConnector>,
    /// How the VMs are.
    pub board: Arc<ReportBoard>,
    /// What was found of the pools.
    pub pools: Vec<PoolFacts>,
    /// Whether each QEMU runs as a user of its own.
    pub isolated_users: bool,
    /// What QEMU can do here, once it has been asked.
    pub hypervisor: watch::Receiver<Option<Hypervisor>>,
    /// What merging layers has come to.
    pub merges: Arc<MergeStatistics>,
    /// What reads snapshots in the background.
    pub reading: Arc<Reading>,
    /// Set when the agent is to end; QEMUs stay.
    pub stopping: CancellationToken,
}

impl Services {
    /// The user and group that a VM's process runs as; none when the agent can't change users.
    pub fn user_id(&self, vm_number: u32) -> Option<u32> {
        self.isolated_users.then(|| self.config.user_id_base.saturating_add(vm_number))
    }

    /// What QEMU can do here; waits until it has been asked.
    pub async fn hypervisor(&self) -> Option<Hypervisor> {
        let mut hypervisor = self.hypervisor.clone();
        hypervisor.wait_for(Option::is_some).await.ok()?.clone()
    }

    /// What was found of a pool.
    pub fn pool_facts(&self, name: &Name) -> Option<&PoolFacts> {
        self.pools.iter().find(|pool| pool.dirs.name == *name)
    }

    /// The directory for a VM's sockets and log.
    pub fn run_dir(&self, vm: &VmId) -> std::path::PathBuf {
        self.layout.vm_run(vm)
    }
}
