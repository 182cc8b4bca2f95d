//! `vm.migrate`: a running VM to another host.
//!
//! ```mermaid
//! sequenceDiagram
//!     manager->>target: FetchImage (if its pool lacks it), AdmitMigration
//!     manager->>source: MoveVm
//!     source->>target: layers, memory, device state
//!     source->>source: handed over, durably
//!     source->>target: run
//!     source-->>manager: Moved
//!     Note over manager: point of no return
//!     manager->>manager: the VM is on the target
//!     manager->>source: DeleteVm (of what is left)
//! ```
//!
//! Afterwards the VM runs on the target and nothing is left on the source; or it runs on the source as before and
//! nothing is left on the target. Between the source's handing over and its answer it may be that nobody tells where
//! the guest runs ([`hand_over`]): then both hosts are asked until one of the two is certain, however long that takes.
//! A host that can't be asked is never taken for one on which nothing runs.

mod hand_over;

use std::sync::Arc;

use berth_api::agent::{PutBack, TaskOutput, TaskSpec};
use berth_model::host::Host;
use berth_model::migration::MigrationReport;
use berth_model::name::Name;
use berth_model::operation::{OperationKind, OperationResult};
use berth_model::placement;
use berth_model::vm::{Vm, VmState};
use berth_model::{HostId, LayerId, Problem, ProblemCode, Timestamp, VmId};
use serde::{Deserialize, Serialize};

use super::image;
use super::vm::{definition, look, reachable_host, settle, with_candidates, wrong_state};
use crate::cluster::Cluster;
use crate::operations::OperationRequest;
use crate::operations::step::{About, Command, Desk, Plan, Run, Step, Workflow, step, wrong_request};
use crate::records::{Debt, Row, Transaction};

/// How many layers may be frozen on the way. Each pass over the disk of a guest that writes takes one; a guest that
/// still writes too fast after that many is not going to be caught up with by more of them.
const SPARE_LAYERS: usize = 16;

/// See the module's head.
pub enum MigrateVm {}

/// From where to where a VM goes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Way {
    vm: VmId,
    source: HostId,
    pub(super) target: HostId,
    pool: Name,
    image: berth_model::ImageId,
    shared_pool: bool,
    began_at: Timestamp,
}

/// What is known of a migration.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MigrateVmRecord {
    #[serde(flatten)]
    way: Way,
    bandwidth_bytes_per_second: Option<u64>,
    spare_layers: Vec<LayerId>,
    moved: Option<Moved>,
}

/// That the VM is the target's.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Moved {
    pub(super) report: MigrationReport,
    top: Option<LayerId>,
}

impl Workflow for MigrateVm {
    type Record = MigrateVmRecord;
    const KIND: OperationKind = OperationKind::VmMigrate;
    const DECIDES: bool = true;
    const STEPS: &'static [Step<Self>] = &[
        step!("fetch-image", fetch_image),
        step!("admit", admit, refuse),
        step!("move", move_vm, stay; no_return),
        step!("record", record),
        step!("forget-on-source", forget_on_source),
    ];

    async fn check<'a>(desk: &'a Desk<'a>, request: &'a OperationRequest) -> Result<Plan<Self>, Problem> {
        let OperationRequest::VmMigrate { wish, .. } = request else { return Err(wrong_request()) };
        let cluster = desk.cluster;
        let vm = desk.vm()?;
        if wish.bandwidth_bytes_per_second == Some(0) {
            return Err(Problem::field("bandwidth_bytes_per_second", 0, "at least 1"));
        }
        let source = reachable_host(cluster, vm)?;
        let named = wish.target.as_deref().map(|name| cluster.records.find_host(name)).transpose()?;
        if let Some(target) = &named
            && target.value.id == source.value.id
        {
            let message = format!("{} is on host {} already", vm.full_name(), source.name);
            let expected = format!("a host other than {}", source.name);
            let problem = Problem::new(ProblemCode::InvalidInput, message);
            return Err(problem.at("target", &target.name, expected));
        }
        if vm.status.state != VmState::Running {
            return Err(wrong_state(vm, "to migrate", "running"));
        }
        let target = choose(cluster, vm, &source, named)?;
        Ok(Plan {
            subject: vm.full_name(),
            summary: format!("move {} from host {} to host {}", vm.full_name(), source.name, target.name),
            record: MigrateVmRecord {
                way: Way::between(cluster, vm, &source, &target),
                bandwidth_bytes_per_second: wish.bandwidth_bytes_per_second,
                spare_layers: (0..SPARE_LAYERS).map(|_| cluster.new_layer_id()).collect(),
                moved: None,
            },
            about: About::Vm(Arc::clone(vm)),
            transaction: Transaction::new(),
        })
    }

    fn result(record: &Self::Record) -> OperationResult {
        match &record.moved {
            Some(moved) => OperationResult::Migration { report: moved.report.clone() },
            None => OperationResult::Done,
        }
    }

    fn target(record: &Self::Record) -> Option<(VmId, HostId)> {
        Some(record.way.at_target())
    }
}

impl Way {
    pub(super) fn between(cluster: &Cluster, vm: &Vm, source: &Row<Host>, target: &Row<Host>) -> Self {
        let pool_uuid = |host: &Host| host.pool(&vm.spec.pool).map(|pool| pool.pool_uuid.clone());
        Self {
            vm: vm.id.clone(),
            source: source.value.id.clone(),
            target: target.value.id.clone(),
            pool: vm.spec.pool.clone(),
            image: vm.spec.image.clone(),
            shared_pool: pool_uuid(source).is_some() && pool_uuid(source) == pool_uuid(target),
            began_at: cluster.clock.now(),
        }
    }

    /// The VM, and where it will be.
    pub(super) fn at_target(&self) -> (VmId, HostId) {
        (self.vm.clone(), self.target.clone())
    }
}

/// The named host, if it can take the VM, or the best that can.
pub(super) fn choose(
    cluster: &Cluster,
    vm: &Vm,
    source: &Row<Host>,
    named: Option<Arc<Row<Host>>>,
) -> Result<Arc<Row<Host>>, Problem> {
    if let Some(target) = named {
        let refusal = with_candidates(cluster, std::slice::from_ref(&target), |candidates| {
            candidates.first().and_then(|candidate| placement::refusal(&vm.spec, candidate))
        });
        return match refusal.or_else(|| still_owing(cluster, vm, &target)) {
            Some(reason) => {
                let message = format!("host {} can't take {}: {reason}", target.name, vm.full_name());
                let expected = "a host that can take the VM";
                Err(Problem::new(ProblemCode::NoPlacement, message).at("target", &target.name, expected))
            }
            None => Ok(target),
        };
    }
    let mut hosts = cluster.records.list::<Host>();
    hosts.retain(|host| host.value.id != source.value.id && still_owing(cluster, vm, host).is_none());
    if hosts.is_empty() {
        let message =
            format!("there is no host other than {} that {} could go to", source.name, vm.full_name());
        let problem = Problem::new(ProblemCode::NoPlacement, message);
        return Err(problem.at("target", "any", "a host other than the VM's own"));
    }
    let best = with_candidates(cluster, &hosts, |candidates| placement::place(&vm.spec, candidates))
        .map_err(|problem| problem.at("target", "any", "a host that can take the VM"))?;
    cluster.records.require(best.as_str())
}

/// A host that has still to remove something of the VM must not get it back before that is done.
fn still_owing(cluster: &Cluster, vm: &Vm, host: &Row<Host>) -> Option<String> {
    let debts = cluster.records.list_below::<Debt>(&format!("{}/", host.id));
    debts
        .iter()
        .any(|debt| debt.put.vm.as_ref() == Some(&vm.id))
        .then(|| "it has still to remove what an earlier operation left of this VM".to_owned())
}

async fn fetch_image(run: &mut Run<MigrateVm>) -> Result<(), Problem> {
    fetch_image_to(run, &run.record.way).await
}

async fn admit(run: &mut Run<MigrateVm>) -> Result<(), Problem> {
    admit_to(run, &run.record.way, None).await
}

async fn refuse(run: &mut Run<MigrateVm>) -> Result<(), Problem> {
    refuse_at(run, &run.record.way).await
}

async fn move_vm(run: &mut Run<MigrateVm>) -> Result<(), Problem> {
    run.change_status(&run.record.way.vm, |status| {
        if status.state == VmState::Running {
            settle(status, VmState::Migrating);
        }
    })
    .await?;
    let MigrateVmRecord { way, bandwidth_bytes_per_second, spare_layers, .. } = &run.record;
    let sending = Sending {
        bandwidth_bytes_per_second: *bandwidth_bytes_per_second,
        spare_layers: spare_layers.clone(),
        put_back: false,
    };
    let moved = move_along(run, way, sending).await?;
    run.record.moved = Some(moved);
    Ok(())
}

async fn stay(run: &mut Run<MigrateVm>) -> Result<(), Problem> {
    look(run, &run.record.way.vm, &run.record.way.source).await
}

async fn record(run: &mut Run<MigrateVm>) -> Result<(), Problem> {
    let MigrateVmRecord { way, moved, .. } = &run.record;
    run.change_status(&way.vm, |status| {
        status.host = Some(way.target.clone());
        if let Some(top) = moved.as_ref().and_then(|moved| moved.top.as_ref()) {
            status.top_layer = top.clone();
        }
        settle(status, VmState::Running);
    })
    .await?;
    Ok(())
}

async fn forget_on_source(run: &mut Run<MigrateVm>) -> Result<(), Problem> {
    forget_at_source(run, &run.record.way).await
}

/// What the source is told beside the way.
pub(super) struct Sending {
    /// Most bytes a second; none: as the link takes.
    pub(super) bandwidth_bytes_per_second: Option<u64>,
    /// Ids for layers that have to be frozen on the way.
    pub(super) spare_layers: Vec<LayerId>,
    /// It is put back on the target, as that was told.
    pub(super) put_back: bool,
}

/// The image is in the target's pool.
pub(super) async fn fetch_image_to<W: Workflow>(run: &Run<W>, way: &Way) -> Result<(), Problem> {
    image::ensure(run, &way.image, &way.target, &way.pool).await
}

/// The target expects the VM.
pub(super) async fn admit_to<W: Workflow>(
    run: &Run<W>,
    way: &Way,
    put_back: Option<PutBack>,
) -> Result<(), Problem> {
    let row = run.cluster.records.require::<Vm>(way.vm.as_str())?;
    let mut definition = definition(&run.cluster, &row)?;
    for forward in definition.spec.nics.iter_mut().flat_map(|nic| nic.forwards.iter_mut()) {
        // The port on the source's host says nothing about the target's: any free one.
        forward.host_port = 0;
    }
    let spec = TaskSpec::AdmitMigration {
        migration: run.id().clone(),
        definition,
        source: way.source.clone(),
        shared_pool: way.shared_pool,
        put_back,
    };
    run.command(Command { host: &way.target, vm: Some(&way.vm), label: "admit", spec }).await?;
    Ok(())
}

/// The target expects it no more.
pub(super) async fn refuse_at<W: Workflow>(run: &Run<W>, way: &Way) -> Result<(), Problem> {
    let spec = TaskSpec::RefuseMigration { migration: run.id().clone(), shared_pool: way.shared_pool };
    let command = Command { host: &way.target, vm: Some(&way.vm), label: "refuse", spec };
    run.command_or_owe(command, "the migration to this host was given up").await
}

/// Moves the VM. Does nothing that could fail once it is the target's.
pub(super) async fn move_along<W: Workflow>(
    run: &Run<W>,
    way: &Way,
    sending: Sending,
) -> Result<Moved, Problem> {
    let target = run.cluster.records.require::<Host>(way.target.as_str())?;
    let spec = TaskSpec::MoveVm {
        migration: run.id().clone(),
        target: way.target.clone(),
        target_address: target.address.clone(),
        shared_pool: way.shared_pool,
        bandwidth_bytes_per_second: sending.bandwidth_bytes_per_second,
        spare_layers: sending.spare_layers,
        put_back: sending.put_back,
    };
    let command = Command { host: &way.source, vm: Some(&way.vm), label: "move", spec };
    tokio::select! {
        answer = run.command_to_the_end(command) => match answer {
            Ok(TaskOutput::Moved { report, top }) => Ok(Moved { report, top: Some(top) }),
            Ok(TaskOutput::HandedOver { report, top }) => {
                hand_over::resolve(run, way, Moved { report, top: Some(top) }).await
            }
            Ok(_) => Err(Problem::new(ProblemCode::Internal, "the source moved and did not say what")),
            Err(problem) => hand_over::after_failure(run, way, problem).await,
        },
        moved = hand_over::seen_on_target(run, way) => Ok(moved),
    }
}

/// Nothing of the VM is left on the source.
pub(super) async fn forget_at_source<W: Workflow>(run: &Run<W>, way: &Way) -> Result<(), Problem> {
    let spec = TaskSpec::DeleteVm { pool: way.pool.clone(), keep_files: way.shared_pool };
    let command = Command { host: &way.source, vm: Some(&way.vm), label: "forget", spec };
    run.command_or_owe(command, "the VM has moved to another host").await
}
