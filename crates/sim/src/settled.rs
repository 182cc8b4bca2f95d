//! Whether a cluster is at rest: records, agents, machines and files say the same, and nothing is under way.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use berth_api::agent::VmReport;
use berth_model::VmId;
use berth_model::host::HostState;
use berth_model::vm::{Vm, VmState};

use crate::SimCluster;

const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Waits until records, agents, machines and files say the same, and nothing is under way.
///
/// # Errors
/// What the oracle found wrong, or how they differ when they still do after `limit`.
pub async fn wait(cluster: &SimCluster, limit: Duration) -> Result<(), String> {
    let deadline = Instant::now() + limit;
    loop {
        let difference = match difference(cluster).await {
            Ok(()) => return Ok(()),
            Err(difference) => difference,
        };
        tracing::debug!("{difference}");
        // What is wrong for good is not waited for.
        cluster.world().oracle.verdict()?;
        if Instant::now() > deadline {
            return Err(format!("does not settle: {difference}"));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Says in what they differ now.
///
/// # Errors
/// In what.
pub async fn difference(cluster: &SimCluster) -> Result<(), String> {
    let asked = |error: berth_api::ClientError| error.to_string();
    if let Some(operation) = cluster.operations_under_way().await.map_err(asked)?.first() {
        let vm = operation.vm.as_ref().map(|vm| cluster.world().oracle.story(vm)).unwrap_or_default();
        return Err(format!("{} is under way: {operation:?}\n{vm}", operation.id));
    }
    let hosts = cluster.host_records().await.map_err(asked)?;
    if let Some(host) = hosts.iter().find(|host| host.state != HostState::Online) {
        return Err(format!("{} is offline: {:?}", host.name, host.offline_reason));
    }
    let vms = cluster.vms().await.map_err(asked)?;
    let mut said: BTreeMap<(String, VmId), VmReport> = BTreeMap::new();
    for (number, name) in cluster.hosts().into_iter().enumerate() {
        let report = cluster.report_of(number).await.map_err(asked)?;
        said.extend(report.vms.into_iter().map(|report| ((name.clone(), report.vm.clone()), report)));
    }
    for vm in &vms {
        let owner = hosts.iter().find(|host| Some(&host.id) == vm.status.host.as_ref());
        let owner = owner.map(|host| host.name.to_string()).unwrap_or_default();
        let report = said.remove(&(owner.clone(), vm.id.clone()));
        compare(cluster, vm, &owner, report.as_ref()).map_err(|difference| {
            let story = cluster.world().oracle.story(&vm.id);
            format!("{} ({}): {difference}; its record: {:?}\n{story}", vm.id, vm.full_name(), vm.status)
        })?;
    }
    if let Some(((host, vm), report)) = said.first_key_value() {
        let story = cluster.world().oracle.story(vm);
        return Err(format!("{host} has something of {vm}, which is not its own: {report:?}\n{story}"));
    }
    files(cluster, &vms)
}

fn compare(cluster: &SimCluster, vm: &Vm, owner: &str, report: Option<&VmReport>) -> Result<(), String> {
    let running = cluster.world().oracle.running_on(&vm.id);
    let processes = cluster.processes_of(&vm.id);
    if vm.status.operation.is_some() {
        return Err("an operation has it".to_owned());
    }
    let Some(report) = report else {
        return Err(format!("its host '{owner}' says nothing of it"));
    };
    if report.state != vm.status.state || report.migration.is_some() {
        return Err(format!("its host says {:?}, migration {:?}", report.state, report.migration));
    }
    if report.top.as_ref() != Some(&vm.status.top_layer) {
        return Err(format!("its host says that its top is {:?}", report.top));
    }
    let (runs, has): (&[&str], &[&str]) = match vm.status.state {
        VmState::Running => (&[owner], &[owner]),
        VmState::Paused => (&[], &[owner]),
        VmState::Stopped => (&[], &[]),
        state => return Err(format!("{state} is no state to stay in")),
    };
    if running != runs || processes != has {
        return Err(format!("it runs on {running:?} and has processes on {processes:?}"));
    }
    Ok(())
}

/// Nothing is left behind of VMs that are no more, or have moved.
fn files(cluster: &SimCluster, vms: &[Vm]) -> Result<(), String> {
    let known: BTreeSet<&str> = vms.iter().map(|vm| vm.id.as_str()).collect();
    for (place, directories) in cluster.vm_directories() {
        for directory in directories {
            if !known.contains(directory.as_str()) {
                return Err(format!("{place} still has {directory}"));
            }
        }
    }
    Ok(())
}
