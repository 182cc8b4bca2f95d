//! What a host says of its VMs, and what of it goes into their records.
//!
//! Two rules keep late news from moving a state back. While an operation has a VM's slot, the operation says how the
//! VM is, and reports do not (but for what it does not say: the guest's state, or anything after `unknown`). And what
//! was asked before the last operation ended is of the time before it; the end of an operation therefore has the host
//! asked anew.

use berth_api::agent::{AgentReport, VmReport};
use berth_model::host::Host;
use berth_model::vm::{GuestState, Vm, VmState};
use berth_model::{HostId, Problem, VmId};

use crate::cluster::Cluster;
use crate::records::{Debt, RecordsError};
use crate::workflow::vm::{lost, observed, settle};

/// What a VM is in when its process is gone and nobody says why.
const ENDED_BY_ITSELF: &str = "its QEMU process ended by itself";

/// Takes a report over.
pub(super) async fn apply(cluster: &Cluster, host: &Host, report: &AgentReport, asked: u64) {
    for row in cluster.records.list_where::<Vm>(|vm| vm.status.host.as_ref() == Some(&host.id)) {
        let said = report.vms.iter().find(|said| said.vm == row.value.id);
        let news = cluster.watchers.is_news(&row.value.id, asked);
        let mut after = row.value.clone();
        note(&mut after, host, said, news);
        if after == row.value {
            continue;
        }
        let changed = cluster
            .records
            .update::<Vm, RecordsError>(&row.id, |vm| {
                // It may have begun to be changed, or moved, since.
                if vm.status.host.as_ref() == Some(&host.id) {
                    note(vm, host, said, news && cluster.watchers.is_news(&vm.id, asked));
                }
                Ok(())
            })
            .await;
        match changed {
            // Deleted meanwhile.
            Ok(_) | Err(RecordsError::Missing { .. }) => {}
            Err(error) => tracing::error!(vm = %row.id, %error, "a report can't be written down"),
        }
    }
    find_leftovers(cluster, host, report);
}

/// What a report says of one VM goes into its record.
fn note(vm: &mut Vm, host: &Host, said: Option<&VmReport>, news: bool) {
    if !news {
        return;
    }
    let free = vm.status.operation.is_none();
    let before = vm.status.state;
    let Some(said) = said else {
        if free && before.may_run() {
            settle(&mut vm.status, VmState::Stopped);
            vm.status.trouble = Some(format!("host {} knows nothing of it", host.name));
        }
        return;
    };
    if free || before == VmState::Unknown {
        settle(&mut vm.status, observed(said.state));
    }
    if free && vm.status.state == VmState::Stopped && before.may_run() {
        let known = before == VmState::Unknown;
        let why = said.trouble.clone().or_else(|| (!known).then(|| ENDED_BY_ITSELF.to_owned()));
        vm.status.trouble = why.or(vm.status.trouble.take());
    } else if said.trouble.is_some() {
        vm.status.trouble.clone_from(&said.trouble);
    }
    if free && let Some(top) = &said.top {
        vm.status.top_layer = top.clone();
    }
    if matches!(vm.status.state, VmState::Running | VmState::Paused | VmState::Migrating)
        && said.guest != GuestState::Off
    {
        vm.status.guest = said.guest;
    }
    for (nic, forwards) in vm.spec.nics.iter_mut().zip(&said.forwards) {
        nic.forwards.clone_from(forwards);
    }
}

/// The host can't be asked: nothing is known of its VMs.
pub(super) async fn lose_all(cluster: &Cluster, host: &HostId) -> Result<(), Problem> {
    let here = |vm: &Vm| {
        vm.status.host.as_ref() == Some(host)
            && !matches!(vm.status.state, VmState::Stopped | VmState::Unknown)
    };
    for row in cluster.records.list_where::<Vm>(here) {
        let changed = cluster.records.update::<Vm, RecordsError>(&row.id, |vm| {
            if vm.status.host.as_ref() == Some(host) {
                lost(&mut vm.status);
            }
            Ok(())
        });
        match changed.await {
            Ok(_) | Err(RecordsError::Missing { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// What the host has and, as far as is recorded, should not have.
fn find_leftovers(cluster: &Cluster, host: &Host, report: &AgentReport) {
    let mut found: Vec<VmId> = Vec::new();
    for said in &report.vms {
        if !is_accounted_for(cluster, &host.id, &said.vm) {
            found.push(said.vm.clone());
        }
    }
    if cluster.watchers.set_leftovers(&host.id, found.clone()) {
        tracing::warn!(host = %host.name, vms = ?found, "the host has VMs that are not recorded as its own");
    }
}

fn is_accounted_for(cluster: &Cluster, host: &HostId, vm: &VmId) -> bool {
    let owned = cluster
        .records
        .get::<Vm>(vm.as_str())
        .is_some_and(|row| row.status.host.as_ref() == Some(host) || row.status.operation.is_some());
    // The record of a VM whose creation is being undone goes before its operation does.
    let being_changed = || cluster.operations.is_changing(vm);
    let owed = || {
        let debts = cluster.records.list_below::<Debt>(&format!("{host}/"));
        debts.iter().any(|debt| debt.put.vm.as_ref() == Some(vm))
    };
    owned || owed() || being_changed()
}
