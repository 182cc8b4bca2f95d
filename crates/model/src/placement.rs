//! Placement: which host takes a VM.
//!
//! For now a VM goes where the most memory is left, among the hosts that can take it at all; the planner that weighs
//! felt load comes later and replaces only [`rank`]. The checks stay: a host that lacks the machine type, the CPU
//! model, the pool or the room is named with its reason, so that a refusal tells what would have to change.

use std::fmt::Write as _;

use crate::host::{Host, HostState};
use crate::vm::{Firmware, VmSpec};
use crate::{HostId, Problem, ProblemCode};

/// Memory that is kept back on each host for the host itself, in MiB. Too low: the agent or QEMU's own overhead
/// pushes the host into swapping. Too high: small hosts take no VM.
pub const HOST_RESERVE_MIB: u64 = 512;

/// What QEMU itself takes beside the guest's memory, in MiB, as measured with the device set that Berth gives a VM.
pub const VM_OVERHEAD_MIB: u64 = 96;

/// A host with what is already promised on it.
#[derive(Debug, Clone)]
pub struct Candidate<'a> {
    /// The host.
    pub host: &'a Host,
    /// Memory of the VMs that are placed on it, overhead included, in MiB.
    pub promised_mib: u64,
}

/// Why a host can't take a VM; none: it can.
pub fn refusal(spec: &VmSpec, candidate: &Candidate<'_>) -> Option<String> {
    let host = candidate.host;
    if host.state == HostState::Offline {
        return Some("it is offline".to_owned());
    }
    let Some(inventory) = &host.inventory else {
        return Some("its agent has not reported yet".to_owned());
    };
    if !inventory.qemu.machine_types.contains(&spec.machine_type) {
        return Some(format!("its QEMU has no machine type {}", spec.machine_type));
    }
    if !inventory.qemu.cpu_models.contains(&spec.cpu_model) {
        return Some(format!("it does not offer the CPU model {}", spec.cpu_model));
    }
    if host.pool(&spec.pool).is_none() {
        return Some(format!("it has no access to pool {}", spec.pool));
    }
    if spec.firmware == Firmware::Uefi && !inventory.uefi {
        return Some("it has no UEFI firmware (Debian's package ovmf)".to_owned());
    }
    if spec.tpm && !inventory.tpm {
        return Some("it has no software TPM (Debian's package swtpm)".to_owned());
    }
    if spec.vcpus > inventory.cpus.saturating_mul(VCPUS_PER_CPU_MAX) {
        return Some(format!("{} vCPUs are too many for its {} CPUs", spec.vcpus, inventory.cpus));
    }
    let free_mib = free_memory_mib(candidate);
    let wanted_mib = spec.memory_mib.saturating_add(VM_OVERHEAD_MIB);
    (wanted_mib > free_mib).then(|| format!("it has {free_mib} MiB to give, and {wanted_mib} MiB are wanted"))
}

/// Most vCPUs of one VM for each CPU of its host. Above it a single guest starves its neighbours by itself.
const VCPUS_PER_CPU_MAX: u32 = 8;

/// Memory that can still be promised on a host, in MiB.
pub fn free_memory_mib(candidate: &Candidate<'_>) -> u64 {
    let installed = candidate.host.inventory.as_ref().map_or(0, |inventory| inventory.memory_mib);
    installed.saturating_sub(HOST_RESERVE_MIB).saturating_sub(candidate.promised_mib)
}

/// The hosts that can take the VM, the best first; equal ones by id, so that the same input gives the same answer.
pub fn rank(spec: &VmSpec, candidates: &[Candidate<'_>]) -> Vec<HostId> {
    let mut fit: Vec<_> = candidates.iter().filter(|candidate| refusal(spec, candidate).is_none()).collect();
    fit.sort_by(|a, b| free_memory_mib(b).cmp(&free_memory_mib(a)).then_with(|| a.host.id.cmp(&b.host.id)));
    fit.into_iter().map(|candidate| candidate.host.id.clone()).collect()
}

/// The best host for the VM.
///
/// # Errors
/// [`ProblemCode::NoPlacement`] with the reason of each host when none can take it.
pub fn place(spec: &VmSpec, candidates: &[Candidate<'_>]) -> Result<HostId, Problem> {
    if let Some(best) = rank(spec, candidates).into_iter().next() {
        return Ok(best);
    }
    let mut message = String::from("no host can take this VM");
    for candidate in candidates {
        let reason = refusal(spec, candidate).unwrap_or_default();
        let _ = write!(message, "; {}: {reason}", candidate.host.name);
    }
    if candidates.is_empty() {
        message.push_str(": the cluster has no hosts yet; join one with 'berth agent join'");
    }
    Err(Problem::new(ProblemCode::NoPlacement, message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{Accelerator, Inventory, NetworkMode, PoolReport, QemuAbilities};
    use crate::{ImageId, Timestamp};

    fn host(number: u8, memory_mib: u64) -> Host {
        let pool = PoolReport {
            name: "default".parse().expect("name"),
            pool_uuid: "u".into(),
            size_bytes: 1,
            free_bytes: 1,
            reserve_bytes: 0,
        };
        let qemu = QemuAbilities {
            version: "7.2".into(),
            machine_types: vec!["pc-q35-7.2".into()],
            cpu_models: vec!["max".into()],
            migration_capabilities: vec![],
            devices: vec![],
        };
        Host {
            id: HostId::from_entropy([number; 10]),
            name: format!("h{number}").parse().expect("name"),
            address: String::new(),
            state: HostState::Online,
            inventory: Some(Inventory {
                hostname: String::new(),
                cpus: 2,
                memory_mib,
                memory_available_mib: memory_mib,
                accelerator: Accelerator::Tcg,
                accelerator_note: None,
                qemu,
                pools: vec![pool],
                network: NetworkMode::User,
                uefi: true,
                tpm: true,
                isolated_users: false,
                agent_version: String::new(),
            }),
            last_seen_at: None,
            offline_reason: None,
            joined_at: Timestamp::default(),
        }
    }

    fn spec() -> VmSpec {
        VmSpec {
            vcpus: 1,
            memory_mib: 1024,
            disk_mib: 1,
            data_disks_mib: Vec::new(),
            image: ImageId::from_entropy([0; 10]),
            pool: "default".parse().expect("name"),
            machine_type: "pc-q35-7.2".into(),
            firmware: crate::vm::Firmware::default(),
            tpm: false,
            cpu_model: "max".into(),
            nics: vec![],
            user_data: None,
            protected: false,
            class: crate::vm::standard_class(),
            ready_timeout_s: 1,
            isolated: false,
        }
    }

    #[test]
    fn the_host_with_the_most_left_is_taken_and_a_tie_is_broken_by_id() {
        let hosts = [host(3, 4096), host(1, 8192), host(2, 8192)];
        let candidates: Vec<_> = hosts.iter().map(|host| Candidate { host, promised_mib: 0 }).collect();
        assert_eq!(
            rank(&spec(), &candidates),
            [hosts[1].id.clone(), hosts[2].id.clone(), hosts[0].id.clone()]
        );
        let promised: Vec<_> = hosts
            .iter()
            .map(|host| Candidate { host, promised_mib: if host.id == hosts[1].id { 4000 } else { 0 } })
            .collect();
        assert_eq!(place(&spec(), &promised).expect("room"), hosts[2].id);
    }

    #[test]
    fn every_reason_is_said_host_by_host() {
        let wanted = spec();
        let check = |change: &dyn Fn(&mut Host, &mut VmSpec), reason: &str| {
            let (mut host, mut spec) = (host(1, 4096), wanted.clone());
            change(&mut host, &mut spec);
            let problem = place(&spec, &[Candidate { host: &host, promised_mib: 0 }]).expect_err(reason);
            assert_eq!(problem.code, ProblemCode::NoPlacement);
            assert!(
                problem.message.contains("h1: ") && problem.message.contains(reason),
                "{}",
                problem.message
            );
        };
        check(&|host, _| host.state = HostState::Offline, "offline");
        check(&|host, _| host.inventory = None, "not reported");
        check(&|_, spec| spec.machine_type = "pc-q35-99.0".into(), "machine type");
        check(&|_, spec| spec.cpu_model = "Cray".into(), "CPU model");
        check(&|_, spec| spec.pool = "other".parse().expect("name"), "pool other");
        check(&|_, spec| spec.vcpus = 17, "vCPUs");
        check(&|_, spec| spec.memory_mib = 4096 - HOST_RESERVE_MIB - VM_OVERHEAD_MIB + 1, "MiB");
        check(&|_, spec| spec.memory_mib = u64::MAX, "MiB");
    }
}
