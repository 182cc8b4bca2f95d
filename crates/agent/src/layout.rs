//! Where everything is, and what each file's record says.
//!
//! In a pool (a directory, perhaps shared between hosts) is what belongs to a VM wherever it runs: layers, snapshots
//! and [`VmRecord`]. In the state directory is what this host alone knows and must not forget: [`HostRecord`]. In the
//! run directory is what is worth nothing after a reboot: sockets and logs.
//!
//! A VM's directory in the pool can be entered by that VM's own user and no other; frozen files in it are read-only
//! for everybody and never written again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use berth_api::agent::{MigrationSide, VmDefinition};
use berth_model::image::{PartFormat, PartRole};
use berth_model::name::Name;
use berth_model::vm::{Nic, PortForward};
use berth_model::{ImageId, LayerId, Problem, SnapshotId, VmId};
use serde::{Deserialize, Serialize};

use crate::config::AgentConfig;
use crate::disks::Disks;
use crate::durable::UNFINISHED_SUFFIX;
use crate::fittings::Fittings;
use crate::launcher::ProcessRecord;

/// What a pool knows of a VM: `vms/<vm>/vm.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// The VM as it was last told to be.
    pub definition: VmDefinition,
    /// Its layers from the one above the image to the writable top.
    pub chain: Vec<LayerId>,
    /// The layers of each of its data disks, from the lowest to the writable top.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub data: Vec<Vec<LayerId>>,
    /// What its machine is fitted with.
    #[serde(default)]
    pub fittings: Fittings,
}

impl VmRecord {
    /// The writable layer.
    pub fn top(&self) -> Option<&LayerId> {
        self.chain.last()
    }

    /// The layers of all its disks.
    pub fn disks(&self) -> Disks {
        Disks::new(self.chain.clone(), self.data.clone())
    }

    /// What is on record of a VM with these disks.
    pub fn new(definition: VmDefinition, disks: Disks, fittings: Fittings) -> Self {
        let (chain, data) = disks.into_parts();
        Self { definition, chain, data, fittings }
    }
}

/// What this host alone knows of a VM: `<state>/vms/<vm>/host.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRecord {
    /// The pool that the VM is in.
    pub pool: Name,
    /// The newest generation that was commanded here.
    pub generation: u64,
    /// The VM's process; none when it is not running here.
    #[serde(default)]
    pub process: Option<ProcessRecord>,
    /// The directory with that process's sockets and log, under the VM's run directory; none: that directory itself. A
    /// process that was made ready beside another one has its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sockets: Option<String>,
    /// This host's part in a migration that is under way or unresolved.
    #[serde(default)]
    pub migration: Option<MigrationSide>,
    /// With user-mode networking: the ports that lead to each interface, kept from start to start.
    #[serde(default)]
    pub forwards: Vec<Vec<PortForward>>,
    /// The last thing that went wrong.
    #[serde(default)]
    pub trouble: Option<String>,
    /// The interfaces as the guest of the present process knows them, when those are another VM's: it was cloned with
    /// its memory, and has not taken its own yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub borrowed_nics: Option<Vec<Nic>>,
}

impl HostRecord {
    /// A VM in a pool of which nothing else is known.
    pub const fn new(pool: Name) -> Self {
        Self {
            pool,
            generation: 0,
            process: None,
            sockets: None,
            migration: None,
            forwards: Vec::new(),
            trouble: None,
            borrowed_nics: None,
        }
    }
}

/// Where an agent keeps things.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    state: PathBuf,
    run: PathBuf,
    pools: BTreeMap<Name, PathBuf>,
}

impl Layout {
    /// The layout that a configuration asks for.
    pub fn new(config: &AgentConfig) -> Self {
        let pools = config.pools.iter().map(|pool| (pool.name.clone(), pool.path.clone())).collect();
        Self { state: config.state_dir.clone(), run: config.run_dir.clone(), pools }
    }

    /// The pools.
    pub fn pools(&self) -> impl Iterator<Item = PoolDirs> + '_ {
        self.pools.iter().map(|(name, path)| PoolDirs { name: name.clone(), path: path.clone() })
    }

    /// The pool of this name.
    ///
    /// # Errors
    /// When this host has none.
    pub fn pool(&self, name: &Name) -> Result<PoolDirs, Problem> {
        match self.pools.get(name) {
            Some(path) => Ok(PoolDirs { name: name.clone(), path: path.clone() }),
            None => Err(Problem::not_found("pool", name)),
        }
    }

    /// Keys and certificates.
    pub fn identity(&self) -> PathBuf {
        self.state.join("identity")
    }

    /// Where the host's records of its VMs are.
    pub fn vm_states(&self) -> PathBuf {
        self.state.join("vms")
    }

    /// The host's record of a VM.
    pub fn host_record(&self, vm: &VmId) -> PathBuf {
        self.vm_states().join(vm.as_str()).join("host.json")
    }

    /// The directory for sockets and logs.
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// The directory for sockets and the log of one VM.
    pub fn vm_run(&self, vm: &VmId) -> PathBuf {
        self.run.join(vm.as_str())
    }

    /// All directories of a VM.
    ///
    /// # Errors
    /// When this host has no such pool.
    pub fn vm(&self, vm: &VmId, pool: &Name) -> Result<VmDirs, Problem> {
        let pool = self.pool(pool)?;
        Ok(VmDirs {
            disk: pool.vm(vm),
            state: self.vm_states().join(vm.as_str()),
            run: self.vm_run(vm),
            pool,
        })
    }
}

/// A pool's directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolDirs {
    /// The pool's name.
    pub name: Name,
    /// The directory.
    pub path: PathBuf,
}

impl PoolDirs {
    /// The file with the pool's own identity.
    pub fn identity(&self) -> PathBuf {
        self.path.join("pool.json")
    }

    /// Where images are.
    pub fn images(&self) -> PathBuf {
        self.path.join("images")
    }

    /// Where an image is.
    pub fn image(&self, image: &ImageId) -> PathBuf {
        self.images().join(image.as_str())
    }

    /// A part of an image.
    pub fn part(&self, image: &ImageId, role: PartRole, format: PartFormat) -> PathBuf {
        self.image(image).join(part_file(role, format))
    }

    /// What is known of an image's parts.
    pub fn image_record(&self, image: &ImageId) -> PathBuf {
        self.image(image).join("image.json")
    }

    /// Where what is read into or out of a repository lies meanwhile.
    pub fn staging(&self) -> PathBuf {
        self.path.join("staging")
    }

    /// Where VMs are.
    pub fn vms(&self) -> PathBuf {
        self.path.join("vms")
    }

    /// Where a VM is.
    pub fn vm(&self, vm: &VmId) -> PathBuf {
        self.vms().join(vm.as_str())
    }
}

/// The name of a part's file.
pub const fn part_file(role: PartRole, format: PartFormat) -> &'static str {
    match (role, format) {
        (PartRole::Disk, PartFormat::Qcow2) => "disk.qcow2",
        (PartRole::Disk, PartFormat::Raw) => "disk.raw",
        (PartRole::Kernel, _) => "kernel",
        (PartRole::Initrd, _) => "initrd",
    }
}

/// The directories of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmDirs {
    /// The pool that the VM is in.
    pub pool: PoolDirs,
    /// The VM's directory in the pool.
    pub disk: PathBuf,
    /// The VM's directory under the host's state.
    pub state: PathBuf,
    /// The VM's directory for sockets and its log.
    pub run: PathBuf,
}

impl VmDirs {
    /// The pool's record of the VM.
    pub fn vm_record(&self) -> PathBuf {
        self.disk.join("vm.json")
    }

    /// The host's record of the VM.
    pub fn host_record(&self) -> PathBuf {
        self.state.join("host.json")
    }

    /// Where layers are.
    pub fn layers(&self) -> PathBuf {
        self.disk.join("layers")
    }

    /// A layer.
    pub fn layer(&self, layer: &LayerId) -> PathBuf {
        self.layers().join(format!("{layer}.qcow2"))
    }

    /// A layer that is not finished.
    pub fn unfinished_layer(&self, layer: &LayerId) -> PathBuf {
        self.layers().join(format!("{layer}.qcow2{UNFINISHED_SUFFIX}"))
    }

    /// Where the hashes of layers are.
    pub fn hashes(&self) -> PathBuf {
        self.disk.join("hashes")
    }

    /// The hashes of a layer.
    pub fn layer_hashes(&self, layer: &LayerId) -> PathBuf {
        self.hashes().join(format!("{layer}.b3"))
    }

    /// The record of a merge of layers that is being carried out.
    pub fn merge_record(&self) -> PathBuf {
        self.disk.join("merge.json")
    }

    /// The cloud-init seed.
    pub fn seed(&self) -> PathBuf {
        self.disk.join("seed.img")
    }

    /// Where what the machine remembers beside its disk is.
    pub fn nvrams(&self) -> PathBuf {
        self.disk.join("nvram")
    }

    /// One directory of it.
    pub fn nvram(&self, id: &LayerId) -> PathBuf {
        self.nvrams().join(id.as_str())
    }

    /// Where snapshots are.
    pub fn snapshots(&self) -> PathBuf {
        self.disk.join("snapshots")
    }

    /// Where one snapshot is.
    pub fn snapshot(&self, snapshot: &SnapshotId) -> PathBuf {
        self.snapshots().join(snapshot.as_str())
    }

    /// Where a process's sockets and its log are.
    pub fn sockets(&self, of: Option<&str>) -> PathBuf {
        of.map_or_else(|| self.run.clone(), |name| self.run.join(name))
    }
}
