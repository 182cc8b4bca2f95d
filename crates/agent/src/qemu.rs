//! QEMU's command line, made from what a VM is to be: pure, so that each word of it stands in a test.
//!
//! The order and the addresses of devices never change for a VM, so that a stream that one process wrote loads into
//! another. Nothing is left to QEMU's defaults or to its guessing: no default devices, no user's configuration, the
//! machine type with its version, each disk's format and backing stated by name.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use berth_api::agent::VmDefinition;
use berth_model::LayerId;
use berth_model::host::Accelerator;
use berth_model::image::PartRole;
use berth_model::vm::{DATA_DISKS_MAX, Firmware, PortForward};

use crate::disks;
use crate::fittings::{GENERATION_DEVICE, TPM_DEVICE, uuid_text};
use crate::launcher::{Argument, Descriptor, MachineSummary, Socket};
use crate::layout::VmDirs;
use crate::nvram;
use crate::vm::{LaunchPlan, Memory};

pub mod disk;

use disk::{Chain, FIRMWARE_NODE, VARIABLES_NODE};

/// The id of the memory's back end, and so the name of guest memory in streams.
pub const MEMORY_ID: &str = "pc.ram";
/// What the ids of the VM's disks begin with; their number follows, the root disk's being 0.
const DISK_ID: &str = "disk";
/// The first data disk's place on the bus; the others follow, up to where interfaces begin.
const FIRST_DATA_DISK_SLOT: u32 = 0x8;
/// The first interface's place on the bus.
const FIRST_NIC_SLOT: u32 = 0x10;
const _: () = assert!(FIRST_DATA_DISK_SLOT as usize + DATA_DISKS_MAX <= FIRST_NIC_SLOT as usize);
/// The name of the guest agent's port.
pub const GUEST_AGENT_PORT: &str = "org.qemu.guest_agent.0";
/// The name of the probe's port.
pub const PROBE_PORT: &str = "dev.berth.probe";

/// How an interface of the guest reaches the world.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Nic {
    /// Through a tap that QEMU is given open.
    Tap,
    /// Through QEMU's own network.
    User {
        /// The network that it plays; none: its own choice, with DHCP.
        subnet: Option<UserSubnet>,
        /// The host's loopback ports that lead to the guest.
        forwards: Vec<PortForward>,
        /// It leads nowhere: neither to the host nor further.
        isolated: bool,
    },
}

/// A network that QEMU plays around a guest whose address was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserSubnet {
    /// Its first address.
    pub network: Ipv4Addr,
    /// Its prefix length.
    pub prefix: u8,
    /// The guest's address.
    pub guest: Ipv4Addr,
    /// The address that stands for the host, the gateway.
    pub host: Ipv4Addr,
    /// The address that stands for the name server.
    pub name_server: Ipv4Addr,
}

/// How much less than asked for a guest gets under translation, in bytes: QEMU wants multiples of 8 KiB.
///
/// QEMU keeps track of written pages in words of 64. For a memory that is made of whole words it takes a short cut that,
/// before QEMU 9.0, forgets to tell the translated guest that its writes are watched again: pages that are written right
/// after a pass over memory are never sent, and the guest that arrives is corrupt. A memory that is a little shorter
/// takes the long way, which is right (QEMU's commit 03bfc2188f; docs/decisions/0005-memory-under-translation.md), and dear:
/// for each written page QEMU then looks through all of the guest's cached mappings.
const TRANSLATED_MEMORY_SHORTER_BYTES: u64 = 8 * 1024;
/// The first QEMU release that is right about it. What has a machine of this release or a later one is no older than it.
const RIGHT_SINCE_MACHINE: u32 = 9;

/// The guest's memory in bytes, as QEMU is told. It depends on nothing that may differ between two hosts which the same
/// machine can be moved between.
pub fn memory_bytes(memory_mib: u64, accelerator: Accelerator, machine_type: &str) -> u64 {
    let whole = memory_mib.saturating_mul(1 << 20);
    match accelerator {
        Accelerator::Tcg if !only_in_right_qemu(machine_type) => {
            whole.saturating_sub(TRANSLATED_MEMORY_SHORTER_BYTES)
        }
        Accelerator::Tcg | Accelerator::Kvm => whole,
    }
}

/// Whether a machine type is of a release that watches a translated guest's writes rightly; no, if its name is unknown.
fn only_in_right_qemu(machine_type: &str) -> bool {
    release_of_machine(machine_type).is_some_and(|major| major >= RIGHT_SINCE_MACHINE)
}

/// The (major) release of QEMU that a machine type is of: no older one has it. None if its name is unknown.
pub fn release_of_machine(machine_type: &str) -> Option<u32> {
    let version = ["pc-q35-", "pc-i440fx-"].iter().find_map(|family| machine_type.strip_prefix(family))?;
    version.split_once('.')?.0.parse().ok()
}

/// Everything that a command line is made from.
#[derive(Debug, Clone)]
pub struct Machine<'a> {
    /// What the VM is to be.
    pub definition: &'a VmDefinition,
    /// Its directories.
    pub dirs: &'a VmDirs,
    /// How it is to be started.
    pub plan: &'a LaunchPlan,
    /// What runs its guest.
    pub accelerator: Accelerator,
    /// How its interfaces reach the world, one for each.
    pub nics: &'a [Nic],
    /// Whether the writable layer is to go past the host's page cache.
    pub direct_io: bool,
    /// The program of UEFI firmware, for a machine that has it.
    pub firmware_code: &'a Path,
}

impl Machine<'_> {
    /// The command line after the program's name.
    pub fn arguments(&self) -> Vec<Argument> {
        let mut words = Words::default();
        self.frame(&mut words);
        self.memory(&mut words);
        self.disks(&mut words);
        self.ports(&mut words);
        self.network(&mut words);
        self.boot(&mut words);
        if self.plan.incoming {
            words.pair("-incoming", "defer");
        }
        words.0
    }

    /// The same in a form for a QEMU that is not real.
    pub fn summary(&self) -> MachineSummary {
        MachineSummary {
            memory_bytes: self.memory_bytes(),
            vcpus: self.definition.spec.vcpus,
            nodes: self.chain(disks::ROOT).nodes(),
            incoming: self.plan.incoming,
        }
    }

    fn frame(&self, words: &mut Words) {
        let spec = &self.definition.spec;
        words.pair("-name", format!("guest={},debug-threads=on", escaped(&self.definition.full_name)));
        words.pair("-uuid", uuid(self.definition.id.as_str()));
        for word in ["-no-user-config", "-nodefaults", "-S"] {
            words.text(word);
        }
        words.pair("-display", "none");
        words.pair("-vga", "none");
        let mut machine = format!(
            "{},memory-backend={MEMORY_ID},usb=off,dump-guest-core=off,mem-merge=off",
            escaped(&spec.machine_type)
        );
        if self.variables().is_some() {
            machine.push_str(&format!(",pflash0={FIRMWARE_NODE},pflash1={VARIABLES_NODE}"));
        }
        words.pair("-machine", machine);
        let accelerator = match self.accelerator {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "tcg,thread=multi",
        };
        words.pair("-accel", accelerator);
        words.pair("-cpu", escaped(&spec.cpu_model));
        words.pair("-smp", spec.vcpus.to_string());
        words.pair("-rtc", "base=utc");
        // A guest that panics goes on as its owner set it up; that it panicked is reported all the same.
        words.pair("-action", "panic=none");
        words.pair("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
        for socket in [Socket::Qmp, Socket::Observe] {
            words.socket(socket);
            words.pair("-mon", format!("chardev={},mode=control", socket.device()));
        }
    }

    fn memory_bytes(&self) -> u64 {
        let spec = &self.definition.spec;
        memory_bytes(spec.memory_mib, self.accelerator, &spec.machine_type)
    }

    fn memory(&self, words: &mut Words) {
        let size = format!("size={}", self.memory_bytes());
        words.pair("-m", format!("{size}B"));
        match &self.plan.memory {
            Memory::Anonymous => words.pair("-object", format!("memory-backend-ram,id={MEMORY_ID},{size}")),
            Memory::Image(path) => {
                let path = escaped(&path.display().to_string());
                let options = "share=off,prealloc=off";
                words.pair(
                    "-object",
                    format!("memory-backend-file,id={MEMORY_ID},{size},mem-path={path},{options}"),
                );
            }
        }
    }

    fn disks(&self, words: &mut Words) {
        for node in self.chains().flat_map(|chain| chain.node_options()) {
            words.pair("-blockdev", node.to_string());
        }
        words.pair("-blockdev", disk::seed_options(&self.dirs.seed()).to_string());
        if let Some(variables) = self.variables() {
            for node in disk::flash_options(self.firmware_code, &variables) {
                words.pair("-blockdev", node.to_string());
            }
        }
        let top = self.chain(disks::ROOT).top_node();
        words.pair("-device", format!("virtio-blk-pci,id={DISK_ID}0,drive={top},{}", self.slot(0x3)));
        words
            .pair("-device", format!("virtio-blk-pci,id=seed0,drive={},{}", disk::SEED_NODE, self.slot(0x4)));
        for (slot, disk) in (FIRST_DATA_DISK_SLOT..FIRST_NIC_SLOT).zip(1..self.plan.disks.count()) {
            let (top, name, slot) = (self.chain(disk).top_node(), disks::name(disk), self.slot(slot));
            words.pair(
                "-device",
                format!("virtio-blk-pci,id={DISK_ID}{disk},drive={top},serial={name},{slot}"),
            );
        }
    }

    fn ports(&self, words: &mut Words) {
        words.pair("-device", format!("virtio-serial-pci,id=serial0,max_ports=4,{}", self.slot(0x5)));
        let ports = [(Socket::GuestAgent, GUEST_AGENT_PORT), (Socket::Probe, PROBE_PORT)];
        for (number, (socket, name)) in (1..).zip(ports) {
            words.socket(socket);
            let chardev = socket.device();
            words.pair(
                "-device",
                format!("virtserialport,bus=serial0.0,nr={number},chardev={chardev},name={name}"),
            );
        }
        words.socket(Socket::Console);
        words.pair("-device", format!("isa-serial,id=console0,chardev={}", Socket::Console.device()));
        words.pair("-object", "rng-builtin,id=rng0");
        words.pair("-device", format!("virtio-rng-pci,id=random0,rng=rng0,{}", self.slot(0x6)));
        words.pair("-device", format!("pvpanic-pci,id=panic0,{}", self.slot(0x7)));
        if let Some(generation_id) = &self.plan.fittings.generation_id {
            words.pair(
                "-device",
                format!("{GENERATION_DEVICE},id=generation0,guid={}", escaped(generation_id)),
            );
        }
        if self.tpm_state().is_some() {
            words.descriptor("-chardev", "socket,id=tpm,fd=".to_owned(), Descriptor::Tpm, "");
            words.pair("-tpmdev", "emulator,id=tpm0,chardev=tpm");
            words.pair("-device", format!("{TPM_DEVICE},id=tpmchip0,tpmdev=tpm0"));
        }
    }

    fn network(&self, words: &mut Words) {
        let wanted = &self.definition.spec.nics;
        for (index, (nic, reach)) in wanted.iter().zip(self.nics).enumerate() {
            match reach {
                Nic::Tap => words.descriptor(
                    "-netdev",
                    format!("tap,id=net{index},fd="),
                    Descriptor::Tap(index),
                    ",vhost=off",
                ),
                Nic::User { subnet, forwards, isolated } => {
                    let mut text = format!("user,id=net{index},ipv6=off");
                    // QEMU's own network all the same: a machine that was saved with one can't be loaded without.
                    if *isolated {
                        text.push_str(",restrict=on");
                    }
                    let mut guest = String::new();
                    if let Some(UserSubnet { network, prefix, guest: address, host, name_server }) = subnet {
                        text.push_str(&format!(
                            ",net={network}/{prefix},host={host},dns={name_server},dhcpstart={address}"
                        ));
                        guest = address.to_string();
                    }
                    for PortForward { protocol, host_port, guest_port } in forwards {
                        text.push_str(&format!(
                            ",hostfwd={protocol}:127.0.0.1:{host_port}-{guest}:{guest_port}"
                        ));
                    }
                    words.pair("-netdev", text);
                }
            }
            let slot = self.slot(FIRST_NIC_SLOT.saturating_add(u32::try_from(index).unwrap_or(u32::MAX)));
            // No boot ROM: no VM starts from the network, and a ROM's size would be one more thing that has to agree.
            let device = "virtio-net-pci,romfile=";
            words.pair(
                "-device",
                format!("{device},id=nic{index},netdev=net{index},mac={},{slot}", escaped(&nic.mac)),
            );
        }
    }

    fn boot(&self, words: &mut Words) {
        let image = &self.definition.image;
        let part = |role| image.part(role).map(|part| self.dirs.pool.part(&image.id, role, part.format));
        let Some(kernel) = part(PartRole::Kernel) else { return };
        words.pair("-kernel", path_text(&kernel));
        if let Some(initrd) = part(PartRole::Initrd) {
            words.pair("-initrd", path_text(&initrd));
        }
        if !image.kernel_command_line.is_empty() {
            words.pair("-append", image.kernel_command_line.clone());
        }
    }

    /// The directory with the state of the TPM of a machine that has one.
    pub fn tpm_state(&self) -> Option<PathBuf> {
        let nvram = self.plan.fittings.nvram.as_ref().filter(|_| self.definition.spec.tpm);
        nvram.map(|id| self.dirs.nvram(id))
    }

    /// The file with the variables of a machine with UEFI firmware.
    fn variables(&self) -> Option<PathBuf> {
        let nvram =
            self.plan.fittings.nvram.as_ref().filter(|_| self.definition.spec.firmware == Firmware::Uefi);
        nvram.map(|id| self.dirs.nvram(id).join(nvram::VARIABLES))
    }

    fn chain(&self, disk: usize) -> Chain<'_> {
        Chain {
            dirs: self.dirs,
            image: (disk == disks::ROOT).then_some(&self.definition.image),
            layers: self.plan.disks.of(disk),
            direct_io: self.direct_io,
        }
    }

    fn chains(&self) -> impl Iterator<Item = Chain<'_>> {
        (0..self.plan.disks.count()).map(|disk| self.chain(disk))
    }

    /// The place on the machine's first bus, which has another name on the older chip set.
    fn slot(&self, number: u32) -> String {
        let bus = if self.definition.spec.machine_type.contains("q35") { "pcie.0" } else { "pci.0" };
        format!("bus={bus},addr={number:#x}")
    }
}

#[derive(Default)]
struct Words(Vec<Argument>);

impl Words {
    fn text(&mut self, word: &str) {
        self.0.push(word.into());
    }

    fn pair(&mut self, option: &str, value: impl Into<Argument>) {
        self.text(option);
        self.0.push(value.into());
    }

    fn descriptor(&mut self, option: &str, before: String, descriptor: Descriptor, after: &str) {
        let after = after.to_owned();
        self.pair(option, Argument::WithDescriptor { before, descriptor, after });
    }

    fn socket(&mut self, socket: Socket) {
        let before = format!("socket,id={},fd=", socket.device());
        self.descriptor("-chardev", before, Descriptor::Socket(socket), ",server=on,wait=off");
    }
}

/// Text as a value in QEMU's lists of options, where a comma is written twice.
fn escaped(text: &str) -> String {
    text.replace(',', ",,")
}

fn path_text(path: &Path) -> String {
    path.display().to_string()
}

/// The machine's identity that the guest sees, the same wherever and whenever it runs: made from the VM's id.
fn uuid(vm: &str) -> String {
    let hash = blake3::hash(vm.as_bytes());
    let mut bytes = [0u8; 16];
    bytes.copy_from_slice(&hash.as_bytes()[..16]);
    // The marks of a UUID that is made from a hash of the maker's own.
    bytes[6] = (bytes[6] & 0x0f) | 0x80;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    uuid_text(bytes)
}

/// Whether a device of this id is one of the VM's disks.
pub fn is_disk(device: &str) -> bool {
    device.strip_prefix(DISK_ID).is_some_and(|number| number.parse::<usize>().is_ok())
}

/// The block node of a layer: QEMU takes no more than 31 characters.
pub fn layer_node(layer: &LayerId) -> String {
    disk::layer_node(layer)
}

#[cfg(test)]
mod tests;
