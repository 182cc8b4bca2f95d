//! Hosts: what an agent reports of the machine it is on, and how the cluster sees that machine.

use serde::{Deserialize, Serialize};

use crate::name::Name;
use crate::{HostId, Timestamp};

/// What runs guests on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Accelerator {
    /// The CPU's virtualisation, tried with a probe guest and found to execute instructions.
    Kvm,
    /// QEMU's own translation.
    Tcg,
}

/// What a host's QEMU can do: asked of the running QEMU, never inferred from its version.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
pub struct QemuAbilities {
    /// The version it states, for people.
    pub version: String,
    /// Versioned machine types, newest first within a family.
    pub machine_types: Vec<String>,
    /// CPU models that it can run on this host.
    pub cpu_models: Vec<String>,
    /// Migration capabilities by QEMU's names.
    pub migration_capabilities: Vec<String>,
    /// Devices by QEMU's names, of those that a VM is given only where there are.
    #[serde(default)]
    pub devices: Vec<String>,
}

/// A directory for disks and snapshots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PoolReport {
    /// The pool's name; pools of one name with the same `pool_uuid` on two hosts are one shared pool.
    pub name: Name,
    /// Random identity written into the directory when it was first used: two hosts that see the same file see the
    /// same pool.
    pub pool_uuid: String,
    /// Size of the file system in bytes.
    pub size_bytes: u64,
    /// What is still free of it, in bytes.
    pub free_bytes: u64,
    /// What has to stay free of it for schedules to go on, in bytes.
    #[serde(default)]
    pub reserve_bytes: u64,
}

/// How VMs get their network on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NetworkMode {
    /// A tap on a bridge: the guest is a neighbour of everything on that bridge. Needs root.
    Bridge,
    /// QEMU's own user-mode network: the guest gets out, and in only by forwarded ports.
    User,
}

/// What an agent reports of its host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Inventory {
    /// The kernel's name for the machine.
    pub hostname: String,
    /// CPUs that guests can be scheduled on.
    pub cpus: u32,
    /// Installed memory in MiB.
    pub memory_mib: u64,
    /// Memory that could be given out now without swapping, in MiB.
    pub memory_available_mib: u64,
    /// What runs guests.
    pub accelerator: Accelerator,
    /// Why KVM is not used, when it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accelerator_note: Option<String>,
    /// What its QEMU can do.
    pub qemu: QemuAbilities,
    /// Its pools.
    pub pools: Vec<PoolReport>,
    /// How VMs get their network.
    pub network: NetworkMode,
    /// Whether it has UEFI firmware for VMs.
    #[serde(default)]
    pub uefi: bool,
    /// Whether it has software TPMs for VMs.
    #[serde(default)]
    pub tpm: bool,
    /// Whether each QEMU runs as a user of its own (the agent is root).
    pub isolated_users: bool,
    /// The agent's version.
    pub agent_version: String,
}

/// How the cluster sees a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum HostState {
    /// Its agent answers.
    Online,
    /// Its agent does not answer; what runs on it is not known.
    Offline,
}

/// A host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Host {
    /// Its id, also the name in its certificate.
    pub id: HostId,
    /// Its name, unique in the cluster.
    pub name: Name,
    /// Where its agent listens, `address:port`.
    pub address: String,
    /// How the cluster sees it.
    pub state: HostState,
    /// What its agent last reported; none until the first report.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inventory: Option<Inventory>,
    /// When its agent was last heard.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_seen_at: Option<Timestamp>,
    /// Why it is offline, in the words of the last attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offline_reason: Option<String>,
    /// When it joined.
    pub joined_at: Timestamp,
}

impl Host {
    /// The pool of this name, if the host has it.
    pub fn pool(&self, name: &Name) -> Option<&PoolReport> {
        self.inventory.as_ref()?.pools.iter().find(|pool| pool.name == *name)
    }
}
