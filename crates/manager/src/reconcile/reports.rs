//! What a host says of its VMs, and what of it goes into their records.
//!
//! Two rules keep late news from moving a state back. While an operation has a VM's slot, the operation says how the
//! VM is, and reports do not (but for what it does not say: the guest's state, or anything after `unknown`). And what
//! was asked before the last operation ended is of the time before it; the end of an operation therefore has the host
//! asked anew.

use berth_api::agent::{AgentReport, VmReport};
use berth_model::host::Host;
use berth_model::vm::{GuestState, NETWORK_OFF, Vm, VmState};
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
    find_leftovers(cluster, host, report, asked);
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
    } else if vm.status.trouble.as_deref() == Some(NETWORK_OFF) {
        vm.status.trouble = None;
    }
    if free && let Some(top) = &said.top {
        vm.status.top_layer = top.clone();
    }
    vm.status.layers = said.layers;
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
fn find_leftovers(cluster: &Cluster, host: &Host, report: &AgentReport, asked: u64) {
    let mut found: Vec<VmId> = Vec::new();
    for said in &report.vms {
        let news = cluster.watchers.is_news(&said.vm, asked);
        if news && !is_accounted_for(cluster, &host.id, &said.vm) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reconcile::Watchers;

    fn vm(state: VmState, busy: bool) -> Vm {
        let text = serde_json::json!({
            "id": VmId::from_entropy([1; 10]), "number": 1, "segment": "seg-0000000000000000",
            "segment_name": "default", "name": "books", "created_at": "2026-11-22T13:05:52Z",
            "spec": {
                "vcpus": 1, "memory_mib": 256, "disk_mib": 1024, "image": "img-0000000000000000",
                "pool": "default", "machine_type": "pc-q35-7.2", "cpu_model": "qemu64", "nics": [],
                "protected": false, "ready_timeout_s": 300
            },
            "status": {
                "state": state, "guest": "booting", "top_layer": "layer-0000000000000000", "generation": 3,
                "operation": busy.then_some("op-0000000000000000")
            }
        });
        serde_json::from_value(text).expect("a VM")
    }

    fn host() -> Host {
        let text = serde_json::json!({
            "id": "host-0000000000000000", "name": "h1", "address": "h1:1", "state": "online",
            "joined_at": "2026-11-22T13:05:52Z"
        });
        serde_json::from_value(text).expect("a host")
    }

    fn said(state: VmState) -> VmReport {
        let text = serde_json::json!({
            "vm": VmId::from_entropy([1; 10]), "generation": 3, "state": state, "guest": "ready",
            "top": "layer-zzzzzzzzzzzzzzzz"
        });
        serde_json::from_value(text).expect("a report")
    }

    fn after(state: VmState, busy: bool, report: Option<VmState>, news: bool) -> Vm {
        let mut vm = vm(state, busy);
        note(&mut vm, &host(), report.map(said).as_ref(), news);
        vm
    }

    #[test]
    fn an_operation_says_how_its_vm_is_and_reports_do_not() {
        for state in
            [VmState::Stopped, VmState::Starting, VmState::Running, VmState::Paused, VmState::Migrating]
        {
            for report in [None, Some(VmState::Stopped), Some(VmState::Running), Some(VmState::Paused)] {
                let busy = after(state, true, report, true);
                assert_eq!(busy.status.state, state, "{report:?}");
                assert_eq!(busy.status.top_layer, vm(state, true).status.top_layer);
                let free = after(state, false, report, true);
                assert_eq!(free.status.state, report.unwrap_or(VmState::Stopped), "{state}");
            }
        }
        // Anything is better than not knowing.
        assert_eq!(after(VmState::Unknown, true, Some(VmState::Paused), true).status.state, VmState::Paused);
        assert_eq!(after(VmState::Unknown, true, None, true).status.state, VmState::Unknown);
    }

    #[test]
    fn what_is_older_than_the_last_operation_says_nothing() {
        for state in VmState::ALL {
            for report in [None, Some(VmState::Stopped), Some(VmState::Running)] {
                assert_eq!(after(state, false, report, false), vm(state, false));
            }
        }
    }

    #[test]
    fn an_answer_is_news_when_its_question_came_after_the_last_operation() {
        let watchers = Watchers::new();
        let id = VmId::from_entropy([1; 10]);
        let early = watchers.instant();
        assert!(watchers.is_news(&id, early), "there was no operation yet");
        watchers.fence(&id);
        assert!(!watchers.is_news(&id, early));
        assert!(watchers.is_news(&id, watchers.instant()));
        assert!(watchers.is_news(&VmId::from_entropy([2; 10]), early), "of another VM");
    }

    #[test]
    fn a_process_that_ended_by_itself_is_trouble_and_one_that_was_not_seen_to_end_is_not() {
        let ended = after(VmState::Running, false, Some(VmState::Stopped), true);
        assert_eq!(ended.status.trouble.as_deref(), Some(ENDED_BY_ITSELF));
        assert_eq!(ended.status.guest, GuestState::Off);
        let found = after(VmState::Unknown, false, Some(VmState::Stopped), true);
        assert_eq!(found.status.trouble, None);
        let gone = after(VmState::Running, false, None, true);
        assert_eq!(gone.status.trouble.as_deref(), Some("host h1 knows nothing of it"));
    }
}
