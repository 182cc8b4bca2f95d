//! What no host of the cluster could ever have: refused by field, because waiting for room would not help.
//!
//! Whether one of the hosts can take a VM *now* is placement's question, and its answer names the hosts.

use berth_model::Problem;
use berth_model::host::{Inventory, PoolReport};
use berth_model::placement::{HOST_RESERVE_MIB, VM_OVERHEAD_MIB};
use berth_model::vm::VmSpec;

const MIB: u64 = 1024 * 1024;

/// Checks a specification against everything that hosts have ever reported; without any report all is possible.
///
/// # Errors
/// The first field that no host could give, with the most or the choice that there is.
pub(super) fn check(spec: &VmSpec, inventories: &[&Inventory]) -> Result<(), Problem> {
    if inventories.is_empty() {
        return Ok(());
    }
    let pools = || inventories.iter().flat_map(|inventory| &inventory.pools);
    let named: Vec<&PoolReport> = pools().filter(|pool| pool.name == spec.pool).collect();
    let Some(largest) = named.iter().map(|pool| pool.size_bytes / MIB).max() else {
        return Err(unknown("pool", spec.pool.as_str(), pools().map(|pool| pool.name.as_str())));
    };
    fits_pool(spec, largest, &format!("the size of the largest pool {}", spec.pool))?;
    let memory = inventories.iter().map(|inventory| inventory.memory_mib).max().unwrap_or_default();
    let memory = memory.saturating_sub(HOST_RESERVE_MIB).saturating_sub(VM_OVERHEAD_MIB);
    at_most("memory_mib", spec.memory_mib, memory, "what the largest host can give")?;
    let machines = || inventories.iter().flat_map(|inventory| &inventory.qemu.machine_types);
    if !machines().any(|name| *name == spec.machine_type) {
        return Err(unknown("machine_type", &spec.machine_type, machines().map(String::as_str)));
    }
    let models = || inventories.iter().flat_map(|inventory| &inventory.qemu.cpu_models);
    if !models().any(|name| *name == spec.cpu_model) {
        return Err(unknown("cpu_model", &spec.cpu_model, models().map(String::as_str)));
    }
    Ok(())
}

/// Checks that the disks, all together, are not larger than so many MiB.
///
/// # Errors
/// The field that is too large, by itself or with those before it.
pub(super) fn fits_pool(spec: &VmSpec, most_mib: u64, what: &str) -> Result<(), Problem> {
    at_most("disk_mib", spec.disk_mib, most_mib, what)?;
    let mut left = most_mib - spec.disk_mib;
    for (index, size_mib) in spec.data_disks_mib.iter().enumerate() {
        let what = format!("what its other disks leave of {what}");
        at_most(&format!("data_disks_mib.{index}"), *size_mib, left, &what)?;
        left -= size_mib;
    }
    Ok(())
}

fn at_most(field: &str, value: u64, most: u64, what: &str) -> Result<(), Problem> {
    if value > most {
        return Err(Problem::field(field, value, format!("at most {most}, {what}")));
    }
    Ok(())
}

fn unknown<'a>(field: &str, value: &str, choice: impl Iterator<Item = &'a str>) -> Problem {
    let mut choice: Vec<&str> = choice.collect();
    choice.sort_unstable();
    choice.dedup();
    Problem::field(field, value, format!("one that a host offers: {}", choice.join(", ")))
}
