//! `vm.create`: from a wish to a running VM.
//!
//! Everything that can be refused is refused before anything is written: the wish becomes a whole [`VmSpec`] and a
//! host is chosen, both under the lock that also other decisions about room and addresses take. The VM's record and
//! name exist from the beginning of the operation, so that the name is taken and the memory counted; whatever fails
//! later removes both again. Afterwards the VM runs (or rests, if so wished) on its host, or never was.

use berth_api::agent::TaskSpec;
use berth_api::manager::CreateVm as Wish;
use berth_model::image::Image;
use berth_model::operation::OperationKind;
use berth_model::vm::{GuestState, Vm, VmSpec, VmState, VmStatus};
use berth_model::{HostId, Problem, ProblemCode, VmId};
use serde::{Deserialize, Serialize};

use super::vm::{definition, first_layer, forget_vm, settle};
use super::{image, wish};
use crate::operations::OperationRequest;
use crate::operations::step::{About, Command, Desk, Plan, Run, Step, Workflow, step, wrong_request};
use crate::quota::{self, Added};
use crate::records::{FixedPorts, RecordsError, Transaction, UniqueName};

/// The counter that VM numbers come from.
const NUMBERS: &str = "vm-number";

/// See the module's head.
pub enum CreateVm {}

/// What is known of the creation.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CreateVmRecord {
    vm: VmId,
    host: HostId,
    spec: VmSpec,
    stopped: bool,
}

impl Workflow for CreateVm {
    type Record = CreateVmRecord;
    const KIND: OperationKind = OperationKind::VmCreate;
    const DECIDES: bool = true;
    const STEPS: &'static [Step<Self>] = &[
        step!("record", recorded, forget),
        step!("fetch-image", fetch_image),
        step!("prepare", prepare, remove),
        // Removing, which undoes the preparation, stops what runs.
        step!("start", start),
    ];

    async fn check<'a>(desk: &'a Desk<'a>, request: &'a OperationRequest) -> Result<Plan<Self>, Problem> {
        let OperationRequest::VmCreate { wish } = request else { return Err(wrong_request()) };
        let NewVm { vm, host, transaction } = new_vm(desk, wish, Added::vm).await?;
        let (subject, at) = (vm.full_name(), desk.cluster.host_name(&host));
        let then = if wish.stopped { "leave it stopped" } else { "start it" };
        Ok(Plan {
            summary: format!("create {subject} on host {at} and {then}"),
            subject,
            record: CreateVmRecord { vm: vm.id.clone(), host, spec: vm.spec.clone(), stopped: wish.stopped },
            about: About::NewVm(Box::new(vm)),
            transaction,
        })
    }
}

/// A VM that is to be.
pub(super) struct NewVm {
    /// Its record.
    pub(super) vm: Vm,
    /// The host that it is to be on.
    pub(super) host: HostId,
    /// What makes its name and its ports its own.
    pub(super) transaction: Transaction,
}

/// Makes the record of a new VM of a wish. `added` says what it takes of quotas.
pub(super) async fn new_vm(
    desk: &Desk<'_>,
    wish: &Wish,
    added: impl FnOnce(&VmSpec) -> Added,
) -> Result<NewVm, Problem> {
    let segment = desk.cluster.records.find_segment(&wish.segment)?;
    let image = wish::usable_image(desk.cluster, wish, &segment)?;
    new_vm_on(desk, wish, &image, added).await
}

/// The same on an image that comes with it.
pub(super) async fn new_vm_on(
    desk: &Desk<'_>,
    wish: &Wish,
    image: &Image,
    added: impl FnOnce(&VmSpec) -> Added,
) -> Result<NewVm, Problem> {
    let cluster = desk.cluster;
    let segment = cluster.records.find_segment(&wish.segment)?;
    let name = UniqueName::vm(&segment.value.id, &wish.name);
    if cluster.records.id_of(&name).is_some() {
        return Err(RecordsError::Taken { noun: "vm".to_owned(), name: wish.name.to_string() }.into());
    }
    // A number is used up only by a wish that could be granted.
    let number = u32::try_from(cluster.records.peek_number(NUMBERS).await? + 1).unwrap_or(u32::MAX);
    let spec = wish::spec(cluster, wish, image, number)?;
    quota::check(cluster, &segment.value.id, &added(&spec))?;
    let host = wish::host(cluster, wish, &spec)?;
    if !desk.dry_run && cluster.records.take_number(NUMBERS).await? != u64::from(number) {
        return Err(Problem::new(ProblemCode::Internal, "VM numbers are given without their lock"));
    }
    let id = cluster.new_vm_id();
    let vm = Vm {
        id: id.clone(),
        number,
        segment: segment.value.id.clone(),
        segment_name: segment.name.clone(),
        name: wish.name.clone(),
        status: new_status(&id, &host),
        spec,
        created_at: cluster.clock.now(),
    };
    let mut transaction = Transaction::new();
    transaction.claim(&name, id.as_str());
    transaction.unchanged(&segment);
    let forwards: Vec<_> = vm.spec.nics.iter().map(|nic| nic.forwards.clone()).collect();
    if forwards.iter().flatten().any(|forward| forward.host_port != 0) {
        transaction.create(&FixedPorts { vm: id, forwards });
    }
    Ok(NewVm { vm, host, transaction })
}

fn new_status(id: &VmId, host: &HostId) -> VmStatus {
    VmStatus {
        state: VmState::Stopped,
        host: Some(host.clone()),
        guest: GuestState::Off,
        baseline: None,
        baseline_note: None,
        at_snapshot: None,
        top_layer: first_layer(id),
        layers: 1,
        operation: None,
        generation: 0,
        trouble: None,
    }
}

/// The record was written in the transaction that began the operation.
async fn recorded(_run: &mut Run<CreateVm>) -> Result<(), Problem> {
    Ok(())
}

async fn forget(run: &mut Run<CreateVm>) -> Result<(), Problem> {
    forget_vm(&run.cluster, &run.record.vm).await
}

async fn fetch_image(run: &mut Run<CreateVm>) -> Result<(), Problem> {
    let CreateVmRecord { host, spec, .. } = &run.record;
    image::ensure(run, &spec.image, host, &spec.pool).await
}

async fn prepare(run: &mut Run<CreateVm>) -> Result<(), Problem> {
    let CreateVmRecord { vm, host, .. } = &run.record;
    let row = run.cluster.records.require::<Vm>(vm.as_str())?;
    let spec = TaskSpec::PrepareVm { definition: definition(&run.cluster, &row)? };
    run.command(Command { host, vm: Some(vm), label: "prepare", spec }).await?;
    Ok(())
}

async fn remove(run: &mut Run<CreateVm>) -> Result<(), Problem> {
    let CreateVmRecord { vm, host, spec, .. } = &run.record;
    let spec = TaskSpec::DeleteVm { pool: spec.pool.clone(), keep_files: false };
    let command = Command { host, vm: Some(vm), label: "remove", spec };
    run.command_or_owe(command, "the VM's creation failed").await
}

async fn start(run: &mut Run<CreateVm>) -> Result<(), Problem> {
    let CreateVmRecord { vm, host, stopped, .. } = &run.record;
    if *stopped {
        return Ok(());
    }
    super::power::start_on(run, vm, host).await?;
    run.change_status(vm, |status| settle(status, VmState::Running)).await?;
    Ok(())
}
