//! What the workflows about VMs have in common.

use std::collections::VecDeque;
use std::sync::Arc;

use berth_api::agent::VmDefinition;
use berth_model::host::{Host, HostState};
use berth_model::image::Image;
use berth_model::placement::Candidate;
use berth_model::schedule::Schedule;
use berth_model::vm::{self, GuestState, PortForward, Vm, VmEvent, VmState, VmStatus};
use berth_model::{HostId, LayerId, Problem, ProblemCode, VmId};

use crate::cluster::Cluster;
use crate::operations::step::{Run, Workflow};
use crate::records::{FixedPorts, RecordsError, Row, Transaction, UniqueName};

/// Moves a status to the state that was brought about or found, by the model's own steps, and the guest with it.
///
/// What is found may be several steps away (a VM that was unknown and is found paused), so the shortest way is taken.
pub(crate) fn settle(status: &mut VmStatus, wanted: VmState) {
    for event in way(status.state, wanted) {
        if let Ok(next) = vm::step(status.state, event) {
            status.state = next;
        }
    }
    match status.state {
        VmState::Stopped => status.guest = GuestState::Off,
        VmState::Starting | VmState::Running if status.guest == GuestState::Off => {
            status.guest = GuestState::Booting;
        }
        _ => {}
    }
}

fn way(from: VmState, to: VmState) -> Vec<VmEvent> {
    let mut seen = vec![from];
    let mut open = VecDeque::from([(from, Vec::new())]);
    while let Some((state, events)) = open.pop_front() {
        if state == to {
            return events;
        }
        for event in VmEvent::ALL {
            if let Ok(next) = vm::step(state, event)
                && !seen.contains(&next)
            {
                seen.push(next);
                open.push_back((next, events.iter().copied().chain([event]).collect()));
            }
        }
    }
    unreachable!("every state can be reached from every other")
}

/// Everything that an agent needs to know of a VM.
pub(crate) fn definition(cluster: &Cluster, vm: &Vm) -> Result<Box<VmDefinition>, Problem> {
    let image = cluster.records.require::<Image>(vm.spec.image.as_str())?;
    let mut spec = vm.spec.clone();
    let fixed = cluster.records.get::<FixedPorts>(vm.id.as_str());
    for (index, nic) in spec.nics.iter_mut().enumerate() {
        let wished = fixed.as_ref().and_then(|fixed| fixed.forwards.get(index));
        wish_for_ports(&mut nic.forwards, wished.map(Vec::as_slice).unwrap_or_default());
    }
    Ok(Box::new(VmDefinition {
        id: vm.id.clone(),
        number: vm.number,
        full_name: vm.full_name(),
        hostname: vm.name.clone(),
        spec,
        image: image.value.clone(),
        first_layer: first_layer(&vm.id),
    }))
}

/// What its host chose last is not what it must have: only ports that somebody named are asked for again.
fn wish_for_ports(forwards: &mut [PortForward], wished: &[PortForward]) {
    for forward in forwards {
        let same =
            |wish: &&PortForward| wish.protocol == forward.protocol && wish.guest_port == forward.guest_port;
        forward.host_port = wished.iter().find(same).map_or(0, |wish| wish.host_port);
    }
}

/// The id of a VM's first writable layer: made of the VM's own, so that it never has to be looked up.
pub(crate) fn first_layer(vm: &VmId) -> LayerId {
    let body = vm.as_str().trim_start_matches(VmId::PREFIX);
    format!("{}{body}", LayerId::PREFIX).parse().expect("ids differ only in their prefix")
}

/// The host that owns a VM, if it can be asked.
pub(crate) fn reachable_host(cluster: &Cluster, vm: &Vm) -> Result<Arc<Row<Host>>, Problem> {
    let Some(id) = &vm.status.host else {
        let message = format!("{} has no host yet", vm.full_name());
        return Err(Problem::new(ProblemCode::WrongState, message));
    };
    let host = cluster.records.require::<Host>(id.as_str())?;
    if host.state == HostState::Offline {
        let why = host.offline_reason.as_deref().unwrap_or("its agent does not answer");
        let message = format!("{} is on host {}, which is offline: {why}", vm.full_name(), host.name);
        return Err(Problem::new(ProblemCode::Unreachable, message));
    }
    Ok(host)
}

/// That something needs another state than the VM is in.
pub(crate) fn wrong_state(vm: &Vm, doing: &str, expected: &str) -> Problem {
    let state = vm.status.state;
    let message = format!("{} is {state}: {doing} needs one that is {expected}", vm.full_name());
    Problem::new(ProblemCode::WrongState, message).at("state", state, expected)
}

/// All hosts with what is promised on each.
pub(crate) fn with_candidates<R>(
    cluster: &Cluster,
    hosts: &[Arc<Row<Host>>],
    look: impl FnOnce(&[Candidate<'_>]) -> R,
) -> R {
    let promised = cluster.promised_mib();
    let promised_mib = |host: &Row<Host>| promised.get(&host.value.id).copied().unwrap_or_default();
    let candidates: Vec<Candidate<'_>> =
        hosts.iter().map(|host| Candidate { host: &host.value, promised_mib: promised_mib(host) }).collect();
    look(&candidates)
}

/// Makes the record say what the host says of a VM now; unknown, if the host can't be asked. This is what undoes a
/// step that only its agent can tell the effect of.
pub(crate) async fn look<W: Workflow>(run: &Run<W>, vm: &VmId, host: &HostId) -> Result<(), Problem> {
    let host = run.cluster.records.require::<Host>(host.as_str())?;
    let found = match run.cluster.agents.report_of(&host, vm).await {
        Ok(Some(report)) => Some((report.state, report.top)),
        Ok(None) => Some((VmState::Stopped, None)),
        Err(_) => None,
    };
    run.change_status(vm, |status| match &found {
        Some((state, top)) => {
            settle(status, observed(*state));
            if let Some(top) = top {
                status.top_layer = top.clone();
            }
        }
        None => lost(status),
    })
    .await?;
    Ok(())
}

/// The state that a record takes when a host reports this one.
pub(crate) const fn observed(reported: VmState) -> VmState {
    match reported {
        // A migration that nobody knows of is none; and a host never says that it does not know.
        VmState::Migrating | VmState::Unknown => VmState::Running,
        VmState::Stopped | VmState::Starting | VmState::Running | VmState::Paused => reported,
    }
}

/// Removes a VM's record with its name and what else is kept of it; nothing if there is none.
pub(crate) async fn forget_vm(cluster: &Cluster, vm: &VmId) -> Result<(), Problem> {
    loop {
        let Some(row) = cluster.records.get::<Vm>(vm.as_str()) else { return Ok(()) };
        let mut transaction = Transaction::new();
        transaction.remove(&row);
        transaction.release(&UniqueName::vm(&row.segment, &row.name));
        transaction.forget::<FixedPorts>(vm.as_str());
        for schedule in cluster.records.list_where::<Schedule>(|schedule| schedule.vm.as_ref() == Some(vm)) {
            transaction.remove(&schedule);
            transaction.release(&UniqueName::schedule(&schedule.segment, &schedule.name));
        }
        match cluster.records.commit(transaction).await {
            Err(RecordsError::Conflict { .. }) => cluster.records.catch_up().await?,
            other => return other.map(drop).map_err(Into::into),
        }
    }
}

/// The VM's host can't be asked any more.
pub(crate) fn lost(status: &mut VmStatus) {
    if let Ok(state) = vm::step(status.state, VmEvent::Lost) {
        status.state = state;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_is_reached_from_every_other_by_the_models_steps() {
        for from in VmState::ALL {
            for to in VmState::ALL {
                let end = way(from, to).into_iter().try_fold(from, vm::step);
                assert_eq!(end.expect("a way of allowed steps"), to);
            }
        }
    }

    #[test]
    fn a_first_layer_is_named_after_its_vm() {
        let vm = VmId::from_entropy([9; 10]);
        assert_eq!(first_layer(&vm).as_str().strip_prefix("layer-"), vm.as_str().strip_prefix("vm-"));
    }
}
