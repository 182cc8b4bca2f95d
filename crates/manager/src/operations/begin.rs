//! Beginning: what can be checked is checked, and the operation exists from one transaction on.

use std::sync::Arc;

use berth_api::manager::OperationRef;
use berth_api::transport::BoxFuture;
use berth_model::operation::{Operation, OperationKind, OperationState, Progress};
use berth_model::vm::Vm;
use berth_model::{ImageId, Problem, ProblemCode, SegmentId};

use super::Begin;
use super::engine::{for_workflow, spawn};
use super::handle::Handle;
use super::row::OperationRow;
use super::step::{About, Desk, Plan, Workflow};
use crate::cluster::Cluster;
use crate::records::{RecordsError, Row};
use crate::workflow;

/// How often a beginning is tried again when the VM changes in between (reports change it, too).
const ATTEMPTS_MAX: usize = 64;

type Beginning<'a> = BoxFuture<'a, Result<OperationRef, Problem>>;

/// Begins what is asked for, or only says what that would be.
pub(super) async fn begin(
    cluster: &Arc<Cluster>,
    begin: Begin,
    dry_run: bool,
) -> Result<OperationRef, Problem> {
    fn boxed<W: Workflow>(cluster: &Arc<Cluster>, begin: Begin, dry_run: bool) -> Beginning<'_> {
        Box::pin(begin_as::<W>(cluster, begin, dry_run))
    }
    for_workflow!(begin.request.kind(), boxed(cluster, begin, dry_run)).await
}

async fn begin_as<W: Workflow>(
    cluster: &Arc<Cluster>,
    begin: Begin,
    dry_run: bool,
) -> Result<OperationRef, Problem> {
    let _deciding = if W::DECIDES { Some(cluster.deciding().await) } else { None };
    for _ in 0..ATTEMPTS_MAX {
        let vm = begin.request.vm().map(|vm| free_vm(cluster, vm.as_str(), &begin)).transpose()?;
        let desk = Desk { cluster, dry_run, approved: begin.approved, vm };
        let plan = W::check(&desk, &begin.request).await?;
        let summary = plan.summary.clone();
        if dry_run {
            return Ok(OperationRef { operation: None, summary, vm: plan.about.vm() });
        }
        match write_down(cluster, &begin, plan).await {
            Ok((handle, vm)) => {
                let operation = handle.show();
                cluster.operations.add(handle.id.clone(), Arc::clone(&handle));
                spawn::<W>(cluster, handle, false);
                return Ok(OperationRef { operation: Some(operation), summary, vm });
            }
            Err(RecordsError::Conflict { .. }) => cluster.records.catch_up().await?,
            Err(error) => return Err(error.into()),
        }
    }
    Err(Problem::new(ProblemCode::Busy, "it is being changed all the time: try again"))
}

/// The VM, if nobody else is changing it.
fn free_vm(cluster: &Cluster, id: &str, begin: &Begin) -> Result<Arc<Row<Vm>>, Problem> {
    let vm = cluster.records.require::<Vm>(id)?;
    if begin.if_match.is_some_and(|wanted| wanted != vm.revision) {
        let message = format!("{} has changed since it was read", vm.full_name());
        return Err(Problem::new(ProblemCode::Changed, message));
    }
    let Some(first) = &vm.status.operation else { return Ok(vm) };
    let kind = cluster.operations.get(first).map_or("another operation", |operation| operation.kind.as_str());
    let message = format!("{} is being changed by {kind} {first}: wait for it or cancel it", vm.full_name());
    Err(Problem::new(ProblemCode::Busy, message).at("operation", first, "no other operation on this VM"))
}

async fn write_down<W: Workflow>(
    cluster: &Arc<Cluster>,
    begin: &Begin,
    plan: Plan<W>,
) -> Result<(Arc<Handle>, Option<Vm>), RecordsError> {
    let id = cluster.new_operation_id();
    let operation = Operation {
        id: id.clone(),
        kind: W::KIND,
        vm: plan.about.vm().map(|vm| vm.id),
        image: plan.about.image(),
        segment: plan.about.segment(),
        subject: plan.subject,
        actor: begin.actor.clone(),
        state: OperationState::Running,
        progress: Progress {
            phase: W::STEPS.first().map_or("", |step| step.name).to_owned(),
            ..Progress::default()
        },
        steps_done: Vec::new(),
        cancel_requested: false,
        result: None,
        problem: None,
        created_at: cluster.clock.now(),
        finished_at: None,
    };
    let record = serde_json::to_value(&plan.record).expect("records are plain data");
    let row = OperationRow { operation, request: (&begin.request).into(), record, undo_left: 0, attempt: 1 };
    let mut transaction = plan.transaction;
    let vm = match plan.about {
        About::Vm(old) => {
            let mut vm = old.value.clone();
            vm.status.operation = Some(id);
            transaction.replace(&old, &vm);
            Some(vm)
        }
        About::NewVm(mut vm) => {
            vm.status.operation = Some(id);
            transaction.create(&*vm);
            Some(*vm)
        }
        About::Aside(vm) => {
            // Its segment is whose business the operation is.
            transaction.unchanged(&vm);
            None
        }
        About::Image(image) => {
            transaction.unchanged(&image);
            transaction.claim(&workflow::image::slot(&image), id.as_str());
            None
        }
    };
    transaction.create(&row);
    let target = W::target(&plan.record);
    let revision = cluster.records.commit(transaction).await?;
    Ok((Handle::new(row, revision, target), vm))
}

impl About {
    fn vm(&self) -> Option<Vm> {
        match self {
            Self::Vm(row) | Self::Aside(row) => Some(row.value.clone()),
            Self::NewVm(vm) => Some((**vm).clone()),
            Self::Image(_) => None,
        }
    }

    fn segment(&self) -> Option<SegmentId> {
        match self {
            Self::Vm(row) | Self::Aside(row) => Some(row.segment.clone()),
            Self::NewVm(vm) => Some(vm.segment.clone()),
            Self::Image(row) => row.segment.clone(),
        }
    }

    fn image(&self) -> Option<ImageId> {
        match self {
            Self::Image(row) => Some(row.value.id.clone()),
            Self::Vm(_) | Self::NewVm(_) | Self::Aside(_) => None,
        }
    }
}
