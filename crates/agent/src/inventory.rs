//! What the manager is told of this host.

use std::fs;

use berth_model::host::Inventory;
use berth_model::{Problem, ProblemCode};

use crate::durable::{FileError, blocking};
use crate::fittings::TPM_DEVICE;
use crate::pool;
use crate::services::Services;

/// Takes stock: what does not change is known since the start, the rest is looked up.
///
/// # Errors
/// When the system can't be asked.
pub async fn take(services: &Services) -> Result<Inventory, Problem> {
    let hypervisor = services
        .hypervisor()
        .await
        .ok_or_else(|| Problem::new(ProblemCode::Unreachable, "the agent is ending"))?;
    let facts = services.pools.clone();
    let (pools, memory) = blocking(move || {
        let report = |facts| {
            pool::report(facts).map_err(|error| FileError::io(&facts.dirs.path, "looked at")(error).into())
        };
        let pools: Result<Vec<_>, Problem> = facts.iter().map(report).collect();
        Ok((pools?, Memory::read()))
    })
    .await?;
    let devices = &hypervisor.abilities.devices;
    let tpm = services.config.machine.has_tpm() && devices.iter().any(|device| device == TPM_DEVICE);
    Ok(Inventory {
        hostname: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        cpus: std::thread::available_parallelism()
            .map_or(1, |count| u32::try_from(count.get()).unwrap_or(u32::MAX)),
        memory_mib: memory.total_mib,
        memory_available_mib: memory.available_mib,
        accelerator: hypervisor.accelerator,
        accelerator_note: hypervisor.accelerator_note,
        qemu: hypervisor.abilities,
        pools,
        network: services.config.network.mode,
        uefi: services.config.machine.has_firmware(),
        tpm,
        isolated_users: services.isolated_users,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
    })
}

#[derive(Debug, PartialEq, Eq)]
struct Memory {
    total_mib: u64,
    available_mib: u64,
}

impl Memory {
    fn read() -> Self {
        Self::parse(&fs::read_to_string("/proc/meminfo").unwrap_or_default())
    }

    fn parse(text: &str) -> Self {
        let mib = |key: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(key));
            let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
            kib.unwrap_or(0) / 1024
        };
        Self { total_mib: mib("MemTotal:"), available_mib: mib("MemAvailable:") }
    }
}

/// This process's own resident memory, in bytes; 0 when the system does not say.
pub fn resident_bytes() -> u64 {
    let text = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_from_the_kernels_table_and_nonsense_is_nothing() {
        let text = "MemTotal:       24605012 kB\nMemFree:  5 kB\nMemAvailable:   24029184 kB\n";
        assert_eq!(Memory::parse(text), Memory { total_mib: 24028, available_mib: 23466 });
        assert_eq!(Memory::parse("x"), Memory { total_mib: 0, available_mib: 0 });
        assert!(resident_bytes() > 0);
    }
}
