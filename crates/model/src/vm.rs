//! Virtual machines: what they are to be (`VmSpec`), how they are (`VmStatus`), and how their state may move.
//!
//! ```mermaid
//! stateDiagram-v2
//!     stopped --> starting: start
//!     starting --> running: started
//!     starting --> stopped: ended
//!     running --> paused: paused
//!     paused --> running: resumed
//!     running --> migrating: migration-begun
//!     migrating --> running: migration-over
//!     running --> stopped: ended
//!     paused --> stopped: ended
//!     migrating --> stopped: ended
//!     starting --> unknown: lost
//!     running --> unknown: lost
//!     paused --> unknown: lost
//!     migrating --> unknown: lost
//!     unknown --> running: started
//!     unknown --> paused: paused
//!     unknown --> stopped: ended
//! ```
//!
//! `unknown` is what a VM is when its host can't be asked: it is never taken for stopped, because work that loses
//! contact must not start a second copy. On which host a VM runs is status, not specification.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::name::Name;
use crate::{HostId, ImageId, LayerId, OperationId, Problem, SegmentId, SnapshotId, Timestamp, VmId};

/// Smallest memory of a VM in MiB. Less, and no Linux kernel reaches its init.
pub const MEMORY_MIB_MIN: u64 = 32;
/// Most vCPUs of a VM; QEMU's q35 machine takes no more without extra devices.
pub const VCPUS_MAX: u32 = 255;
/// Most network interfaces of a VM: one PCI slot each, and a table that a person can read.
pub const NICS_MAX: usize = 8;
/// Most data disks of a VM: one PCI slot each.
pub const DATA_DISKS_MAX: usize = 8;
/// Largest data disk in MiB: the first table of its layers is one cluster.
pub const DATA_DISK_MIB_MAX: u64 = 4 << 20;
/// Longest cloud-init user data in bytes: the limit of the large clouds, so that images don't rely on more.
pub const USER_DATA_BYTES_MAX: usize = 16 * 1024;

/// The trouble of a VM whose network is off until its guest has addresses of its own: the only one that ends by itself.
pub const NETWORK_OFF: &str = "its network is off: the guest still has the addresses of the VM that it was cloned from, \
    and has no guest agent that could tell it its own: 'berth vm restart' lets it begin anew with them";

/// A network interface of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Nic {
    /// The Ethernet address, `52:54:00:…`; unique in the cluster.
    pub mac: String,
    /// The guest's IPv4 address with its prefix length (`198.18.5.20/24`), given to it by cloud-init; none: DHCP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// The default gateway that goes with the address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
    /// With user-mode networking: the loopback UDP port on the host that is forwarded to the guest's port 7007, and
    /// the TCP port that is forwarded to its 22. Chosen by the agent, so status rather than wish.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub forwards: Vec<PortForward>,
}

/// A port of the host that leads to one of the guest, with user-mode networking.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PortForward {
    /// `tcp` or `udp`.
    pub protocol: String,
    /// Port on the host's loopback address; 0 in a request: any free one.
    pub host_port: u16,
    /// Port in the guest.
    pub guest_port: u16,
}

/// What starts a machine before the system on its disk does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Firmware {
    /// A BIOS, which remembers nothing.
    #[default]
    Bios,
    /// UEFI, with variables that are kept with the VM's disk.
    Uefi,
}

/// What a VM is to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct VmSpec {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Disk size in MiB; not smaller than the image's.
    pub disk_mib: u64,
    /// The sizes of its data disks in MiB, which are empty at first; fixed for the VM's life.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub data_disks_mib: Vec<u64>,
    /// The image it starts from.
    pub image: ImageId,
    /// The pool that its disk and snapshots are in.
    pub pool: Name,
    /// The versioned machine type (`pc-q35-7.2`): fixed for the VM's life, so that its streams load everywhere.
    pub machine_type: String,
    /// The CPU model that the guest sees; every host that it moves to must offer it.
    pub cpu_model: String,
    /// What starts it.
    #[serde(default)]
    pub firmware: Firmware,
    /// It has a TPM, whose state is kept with its disk.
    #[serde(default)]
    pub tpm: bool,
    /// Its network interfaces.
    pub nics: Vec<Nic>,
    /// cloud-init user data, given through a NoCloud seed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_data: Option<String>,
    /// Held against deletion.
    pub protected: bool,
    /// What kind of VM it is to the policies: `standard`, `production`, or another word. Restoring one of class
    /// `production` needs a second person.
    #[serde(default = "standard_class")]
    pub class: Name,
    /// How long the guest may take to be ready after a start, in seconds, before it is said that it is not.
    pub ready_timeout_s: u32,
    /// It has no network, whatever its interfaces are: it was made of a snapshot to see whether that starts.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub isolated: bool,
}

/// The class of VMs that nobody has given one.
pub const STANDARD_CLASS: &str = "standard";

/// The class of VMs that nobody has given one, as a name.
pub fn standard_class() -> Name {
    STANDARD_CLASS.parse().expect("a good name")
}

/// The state of a VM.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// No process; the disk rests.
    Stopped,
    /// A process is being made.
    Starting,
    /// The guest runs.
    Running,
    /// The guest is held, its memory kept.
    Paused,
    /// The guest runs and is on its way to another host.
    Migrating,
    /// Its host can't be asked.
    Unknown,
}

impl VmState {
    /// Every state.
    pub const ALL: [Self; 6] =
        [Self::Stopped, Self::Starting, Self::Running, Self::Paused, Self::Migrating, Self::Unknown];

    /// The state's name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Migrating => "migrating",
            Self::Unknown => "unknown",
        }
    }

    /// Whether a process may hold the VM's disk open.
    pub const fn may_run(self) -> bool {
        !matches!(self, Self::Stopped)
    }
}

impl fmt::Display for VmState {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

/// Something that moves a VM's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmEvent {
    /// Somebody wants it running.
    Start,
    /// The guest runs.
    Started,
    /// The guest is held.
    Paused,
    /// The guest goes on.
    Resumed,
    /// A migration has begun.
    MigrationBegun,
    /// A migration is over, wherever the guest runs now.
    MigrationOver,
    /// The process is gone.
    Ended,
    /// The host can't be asked.
    Lost,
}

impl VmEvent {
    /// Every event.
    pub const ALL: [Self; 8] = [
        Self::Start,
        Self::Started,
        Self::Paused,
        Self::Resumed,
        Self::MigrationBegun,
        Self::MigrationOver,
        Self::Ended,
        Self::Lost,
    ];

    /// The event's name, as in the diagram.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Started => "started",
            Self::Paused => "paused",
            Self::Resumed => "resumed",
            Self::MigrationBegun => "migration-begun",
            Self::MigrationOver => "migration-over",
            Self::Ended => "ended",
            Self::Lost => "lost",
        }
    }
}

/// A pair of state and event that the diagram does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a VM that is {state} can't take '{}'", event.as_str())]
pub struct VmStepError {
    /// The state it was in.
    pub state: VmState,
    /// What happened.
    pub event: VmEvent,
}

/// The one place where a VM's state moves.
///
/// # Errors
/// The pair, when the diagram above does not have it.
pub const fn step(state: VmState, event: VmEvent) -> Result<VmState, VmStepError> {
    use VmEvent as E;
    use VmState as S;
    match (state, event) {
        (S::Stopped, E::Start) => Ok(S::Starting),
        (S::Starting | S::Unknown, E::Started)
        | (S::Paused, E::Resumed)
        | (S::Migrating, E::MigrationOver) => Ok(S::Running),
        (S::Running | S::Unknown, E::Paused) => Ok(S::Paused),
        (S::Running, E::MigrationBegun) => Ok(S::Migrating),
        (S::Starting | S::Running | S::Paused | S::Migrating | S::Unknown, E::Ended) => Ok(S::Stopped),
        (S::Starting | S::Running | S::Paused | S::Migrating, E::Lost) => Ok(S::Unknown),
        (
            S::Stopped | S::Starting | S::Running | S::Paused | S::Migrating | S::Unknown,
            E::Start
            | E::Started
            | E::Paused
            | E::Resumed
            | E::MigrationBegun
            | E::MigrationOver
            | E::Ended
            | E::Lost,
        ) => Err(VmStepError { state, event }),
    }
}

/// What is known of the guest inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum GuestState {
    /// Not running, so nothing to know.
    Off,
    /// Running, and has not said that it is ready yet.
    Booting,
    /// Said that it is ready.
    Ready,
    /// Its kernel has panicked.
    Panicked,
}

/// How a VM is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct VmStatus {
    /// Its state.
    pub state: VmState,
    /// The host that owns it; none before it was first placed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<HostId>,
    /// What is known of the guest.
    pub guest: GuestState,
    /// Its baseline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baseline: Option<SnapshotId>,
    /// Why it has none yet, when it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baseline_note: Option<String>,
    /// The snapshot that it was last at: the parent of the next one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_snapshot: Option<SnapshotId>,
    /// The writable top of its disk.
    pub top_layer: LayerId,
    /// How many layers its disk lies on, the writable one counted, as its host last said; 0: it has not said so yet.
    #[serde(default)]
    pub layers: u32,
    /// The operation that is changing it now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<OperationId>,
    /// Rises with each command that the manager gives about this VM: an agent refuses older ones.
    pub generation: u64,
    /// The last thing that went wrong with it, in a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
}

/// A virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Vm {
    /// Its id.
    pub id: VmId,
    /// Its number in the cluster, from which the agents derive its user id; never used twice.
    pub number: u32,
    /// The segment it is in.
    pub segment: SegmentId,
    /// The segment's name.
    pub segment_name: Name,
    /// Its name, unique in the segment.
    pub name: Name,
    /// What it is to be.
    pub spec: VmSpec,
    /// How it is.
    pub status: VmStatus,
    /// When it was made.
    pub created_at: Timestamp,
}

impl Vm {
    /// `segment/name`, as people call it.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.segment_name, self.name)
    }
}

impl VmSpec {
    /// The size of all its disks together, in MiB.
    pub fn disks_mib(&self) -> u64 {
        self.data_disks_mib.iter().fold(self.disk_mib, |sum, disk| sum.saturating_add(*disk))
    }

    /// Checks what can be known without asking any host.
    ///
    /// # Errors
    /// The first field that is out of range, with its value and what was expected.
    pub fn check(&self) -> Result<(), Problem> {
        if self.vcpus == 0 || self.vcpus > VCPUS_MAX {
            return Err(Problem::field("vcpus", self.vcpus, format!("1 to {VCPUS_MAX}")));
        }
        if self.memory_mib < MEMORY_MIB_MIN {
            return Err(Problem::field("memory_mib", self.memory_mib, format!("at least {MEMORY_MIB_MIN}")));
        }
        if self.disk_mib == 0 {
            return Err(Problem::field("disk_mib", self.disk_mib, "at least 1"));
        }
        if self.data_disks_mib.len() > DATA_DISKS_MAX {
            let expected = format!("at most {DATA_DISKS_MAX} data disks");
            return Err(Problem::field("data_disks_mib", self.data_disks_mib.len(), expected));
        }
        for (index, size_mib) in self.data_disks_mib.iter().enumerate() {
            if !(1..=DATA_DISK_MIB_MAX).contains(size_mib) {
                let expected = format!("1 to {DATA_DISK_MIB_MAX}");
                return Err(Problem::field(format!("data_disks_mib.{index}"), size_mib, expected));
            }
        }
        if self.nics.len() > NICS_MAX {
            return Err(Problem::field("nics", self.nics.len(), format!("at most {NICS_MAX} interfaces")));
        }
        for (index, nic) in self.nics.iter().enumerate() {
            nic.check(index)?;
        }
        match &self.user_data {
            Some(text) if text.len() > USER_DATA_BYTES_MAX => Err(Problem::field(
                "user_data",
                format!("{} bytes", text.len()),
                format!("at most {USER_DATA_BYTES_MAX} bytes"),
            )),
            _ => Ok(()),
        }
    }
}

impl Nic {
    fn check(&self, index: usize) -> Result<(), Problem> {
        if !is_unicast_mac(&self.mac) {
            let expected = "six bytes in hexadecimal, like 52:54:00:12:34:56, not a group address";
            return Err(Problem::field(format!("nics.{index}.mac"), &self.mac, expected));
        }
        if let Some(address) = &self.address
            && !is_address_with_prefix(address)
        {
            let expected = "an IPv4 address with a prefix length, like 198.18.5.20/24";
            return Err(Problem::field(format!("nics.{index}.address"), address, expected));
        }
        if let Some(gateway) = &self.gateway
            && gateway.parse::<std::net::Ipv4Addr>().is_err()
        {
            return Err(Problem::field(format!("nics.{index}.gateway"), gateway, "an IPv4 address"));
        }
        Ok(())
    }
}

fn is_unicast_mac(text: &str) -> bool {
    let mut parts = text.split(':');
    let bytes: Vec<u8> = parts
        .by_ref()
        .map_while(|part| (part.len() == 2).then(|| u8::from_str_radix(part, 16).ok()).flatten())
        .collect();
    text.len() == 17 && bytes.len() == 6 && bytes.first().is_some_and(|first| first & 1 == 0)
}

fn is_address_with_prefix(text: &str) -> bool {
    text.split_once('/').is_some_and(|(address, prefix)| {
        address.parse::<std::net::Ipv4Addr>().is_ok() && prefix.parse::<u8>().is_ok_and(|bits| bits <= 32)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_diagram_and_the_code_are_one() {
        let mut from_code = Vec::new();
        for state in VmState::ALL {
            for event in VmEvent::ALL {
                match step(state, event) {
                    Ok(next) => from_code.push(format!("{state} --> {next}: {}", event.as_str())),
                    Err(error) => assert_eq!((error.state, error.event), (state, event)),
                }
            }
        }
        crate::diagram::check(include_str!("vm.rs"), from_code);
    }

    #[test]
    fn macs_and_addresses_are_checked() {
        for bad in [
            "",
            "52:54:00:12:34",
            "53:54:00:12:34:56",
            "52-54-00-12-34-56",
            "52:54:00:12:34:5g",
            "+2:54:00:12:34:56:",
        ] {
            assert!(!is_unicast_mac(bad), "{bad}");
        }
        assert!(is_unicast_mac("52:54:00:12:34:56"));
        for bad in ["198.18.0.1", "198.18.0.1/33", "198.18.0/24", "/24", "::1/64"] {
            assert!(!is_address_with_prefix(bad), "{bad}");
        }
        assert!(is_address_with_prefix("198.18.0.1/24"));
    }
}
