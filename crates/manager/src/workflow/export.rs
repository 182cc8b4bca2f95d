//! `snapshot.export`: a snapshot goes into a repository, off the host.
//!
//! The VM is only read, so its slot is not taken: it may work, be snapshotted and moved meanwhile. The host links the files
//! first, and what is linked stays. One step, and nothing to undo: an export that is given up has no backup in the
//! repository, and what was stored for it costs the next one nothing.
//!
//! The repository's keys are in no operation's record: they are looked up when the host is asked.

use berth_api::agent::{TaskOutput, TaskSpec};
use berth_model::image::Image;
use berth_model::operation::{OperationKind, OperationResult};
use berth_model::repository::{BackupContents, ExportFacts, Repository, RepositoryAccess};
use berth_model::vm::{Vm, VmState};
use berth_model::{HostId, Problem, ProblemCode, RepositoryId, VmId};
use serde::{Deserialize, Serialize};

use super::vm::{reachable_host, wrong_state};
use crate::cluster::Cluster;
use crate::operations::OperationRequest;
use crate::operations::step::{About, Command, Desk, Plan, Run, Step, Workflow, step, wrong_request};
use crate::records::{RepositoryKeysRow, Transaction};

/// See the module's head.
pub enum ExportSnapshot {}

/// What is known of an export.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExportRecord {
    vm: VmId,
    host: HostId,
    repository: RepositoryId,
    contents: BackupContents,
    facts: ExportFacts,
}

impl Workflow for ExportSnapshot {
    type Record = ExportRecord;
    const KIND: OperationKind = OperationKind::SnapshotExport;
    const STEPS: &'static [Step<Self>] = &[step!("export", export)];

    async fn check<'a>(desk: &'a Desk<'a>, request: &'a OperationRequest) -> Result<Plan<Self>, Problem> {
        let OperationRequest::SnapshotExport { origin, snapshot, repository } = request else {
            return Err(wrong_request());
        };
        let records = &desk.cluster.records;
        let vm = records.require::<Vm>(origin.as_str())?;
        let snapshot = records.find_snapshot(&vm.value.id, snapshot.as_str())?;
        let repository = records.require::<Repository>(repository.as_str())?;
        let host = reachable_host(desk.cluster, &vm)?;
        if vm.status.state == VmState::Migrating {
            return Err(wrong_state(&vm, "to export its snapshot", "not on its way to another host"));
        }
        let image = records.require::<Image>(vm.spec.image.as_str())?;
        let contents = BackupContents {
            format: BackupContents::FORMAT,
            vm: vm.full_name(),
            spec: vm.spec.clone(),
            image: image.value.clone(),
            snapshot: snapshot.value.clone(),
        };
        let (name, full_name) = (&snapshot.name, vm.full_name());
        Ok(Plan {
            summary: format!("put snapshot {name} of {full_name} into repository {}", repository.name),
            subject: full_name,
            record: ExportRecord {
                vm: vm.value.id.clone(),
                host: host.value.id.clone(),
                repository: repository.value.id.clone(),
                contents,
                facts: ExportFacts::default(),
            },
            about: About::Aside(vm),
            transaction: Transaction::new(),
        })
    }

    fn result(record: &Self::Record) -> OperationResult {
        OperationResult::Export { snapshot: record.contents.snapshot.id.clone(), facts: record.facts.clone() }
    }
}

async fn export(run: &mut Run<ExportSnapshot>) -> Result<(), Problem> {
    let ExportRecord { vm, host, repository, contents, .. } = &run.record;
    let spec = TaskSpec::ExportSnapshot {
        vm: vm.clone(),
        pool: contents.spec.pool.clone(),
        snapshot: contents.snapshot.id.clone(),
        contents: Box::new(contents.clone()),
        operation: run.id().clone(),
        access: Box::new(access(&run.cluster, repository)?),
    };
    match run.command(Command { host, vm: None, label: "export", spec }).await? {
        TaskOutput::Exported { facts } => run.record.facts = facts,
        _ => {
            let message = "the agent exported a snapshot and did not say how";
            return Err(Problem::new(ProblemCode::Internal, message));
        }
    }
    Ok(())
}

/// A repository with what opens it, as a host is given it.
///
/// # Errors
/// That there is none any more.
pub(crate) fn access(cluster: &Cluster, id: &RepositoryId) -> Result<RepositoryAccess, Problem> {
    let repository = cluster.records.require::<Repository>(id.as_str())?;
    let keys = cluster.records.require::<RepositoryKeysRow>(id.as_str())?;
    Ok(RepositoryAccess { url: repository.url.clone(), keys: keys.keys.clone() })
}
