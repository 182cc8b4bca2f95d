//! `snapshot.import`: a new VM that goes on where a backup stands, in a cluster that may have nothing else of it.
//!
//! It is made like any VM, of a wish that says what the backup's VM was; image and snapshot come with it. The host brings the
//! files and looks at all of them before the image is anywhere, and before there is a VM. What a backup says of itself may be
//! anybody's, so it goes the way of what a user asks for: the machine as a wish for a VM, the image as one that is uploaded,
//! for the one segment alone that the VM is made in.
//!
//! An image that is here already, by its id and with the same parts, is used. Under the same id with others, it is none that
//! the backup's disk could lie on, and the import is refused.

use berth_api::agent::{TaskOutput, TaskSpec};
use berth_api::manager::{CreateImage, CreateVm, ImportSnapshot as Wish};
use berth_model::host::Host;
use berth_model::image::{Image, ImageState};
use berth_model::name::Name;
use berth_model::operation::{OperationKind, OperationResult};
use berth_model::repository::{BackupContents, ImportFacts, Repository};
use berth_model::snapshot::CloneFacts;
use berth_model::vm::{Nic, Vm, VmState};
use berth_model::{HostId, Problem, ProblemCode, RepositoryId, SegmentId, VmId};
use serde::{Deserialize, Serialize};

use super::clone::nic_like;
use super::create::{NewVm, new_vm_on};
use super::export::access;
use super::snapshot::{Capture, keep_first, unkeep_first};
use super::vm::{definition, forget_vm};
use crate::cluster::Cluster;
use crate::http::image::check as check_image;
use crate::operations::OperationRequest;
use crate::operations::step::{About, Command, Desk, Plan, Run, Step, Workflow, step, wrong_request};
use crate::quota::Added;
use crate::records::{ImagePlace, RecordsError, Transaction, UniqueName};
use crate::workflow::image;

/// Why a host is asked to remove what it fetched.
const GIVEN_UP: &str = "the import was given up";

/// See the module's head.
pub enum ImportSnapshot {}

/// What is known of an import.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ImportRecord {
    vm: VmId,
    host: HostId,
    pool: Name,
    repository: RepositoryId,
    backup: String,
    contents: BackupContents,
    /// The image was not here before.
    new_image: bool,
    /// The snapshot as the VM's own; none: it starts from the disk alone.
    first: Option<Capture>,
    paused: bool,
    state: VmState,
    facts: ImportFacts,
    made: CloneFacts,
}

impl Workflow for ImportSnapshot {
    type Record = ImportRecord;
    const KIND: OperationKind = OperationKind::SnapshotImport;
    const DECIDES: bool = true;
    const STEPS: &'static [Step<Self>] = &[
        step!("record", recorded, forget),
        step!("fetch", fetch, drop_fetched),
        step!("place-image", place_image, unplace_image),
        // Until the operation is over nobody else has the VM, so there is a way back from everywhere: to remove it.
        step!("make", make, remove),
        step!("keep-snapshot", keep_snapshot, unkeep_snapshot),
    ];

    async fn check<'a>(desk: &'a Desk<'a>, request: &'a OperationRequest) -> Result<Plan<Self>, Problem> {
        let OperationRequest::SnapshotImport { repository, backup, contents, wish } = request else {
            return Err(wrong_request());
        };
        let cluster = desk.cluster;
        let repository = cluster.records.require::<Repository>(repository.as_str())?;
        let segment = cluster.records.find_segment(&wish.segment)?.value.id.clone();
        check_machine(contents)?;
        let (image, is_new) = image_of(cluster, contents, &segment)?;
        let goes_on = contents.snapshot.facts.has_memory && !wish.cold;
        let added = |spec: &_| {
            let vm = Added::vm(spec);
            if goes_on { vm.with_snapshot(&contents.snapshot.facts) } else { vm }
        };
        let wanted = as_wish(cluster, contents, wish);
        let NewVm { vm, host, mut transaction } = new_vm_on(desk, &wanted, &image, added).await?;
        if is_new {
            transaction.create(&image);
            transaction.claim(&UniqueName::image(image.segment.as_ref(), &image.name), image.id.as_str());
        } else if let Some(row) = cluster.records.get::<Image>(image.id.as_str()) {
            transaction.unchanged(&row);
        }
        let first = goes_on.then(|| first(cluster, &vm, contents));
        let (name, of) = (vm.full_name(), &contents.vm);
        let snapshot = &contents.snapshot.name;
        Ok(Plan {
            summary: format!(
                "make {name} from snapshot {snapshot} of {of} in repository {}",
                repository.name
            ),
            subject: name,
            record: ImportRecord {
                vm: vm.id.clone(),
                host,
                pool: vm.spec.pool.clone(),
                repository: repository.value.id.clone(),
                backup: backup.clone(),
                contents: BackupContents { image, ..(**contents).clone() },
                new_image: is_new,
                first,
                paused: wish.paused,
                state: VmState::Stopped,
                facts: ImportFacts::default(),
                made: CloneFacts::default(),
            },
            about: About::NewVm(Box::new(vm)),
            transaction,
        })
    }

    fn result(record: &Self::Record) -> OperationResult {
        let facts = ImportFacts {
            total_ms: record.facts.total_ms.saturating_add(record.made.running_us / 1000),
            ..record.facts.clone()
        };
        OperationResult::Import { backup: record.backup.clone(), facts }
    }
}

/// What of a backup's machine is not looked at as a wish.
fn check_machine(contents: &BackupContents) -> Result<(), Problem> {
    let refused =
        |detail: &str| Problem::new(ProblemCode::BadImage, format!("the backup is refused: {detail}"));
    let spec = &contents.spec;
    spec.check().map_err(|problem| refused(&problem.message))?;
    let forwards = || spec.nics.iter().flat_map(|nic| &nic.forwards);
    if let Some(odd) = forwards().find(|forward| !matches!(forward.protocol.as_str(), "tcp" | "udp")) {
        return Err(refused(&format!("it forwards '{}', which is neither tcp nor udp", odd.protocol)));
    }
    if spec.image != contents.image.id {
        return Err(refused("its image is not the one that its machine has"));
    }
    Ok(())
}

/// The image to be used, and whether it has yet to be made.
fn image_of(
    cluster: &Cluster,
    contents: &BackupContents,
    segment: &SegmentId,
) -> Result<(Image, bool), Problem> {
    let theirs = &contents.image;
    if let Some(row) = cluster.records.get::<Image>(theirs.id.as_str()) {
        let foreign = row.segment.as_ref().is_some_and(|owner| owner != segment);
        if foreign || row.parts != theirs.parts {
            let message = format!("the backup's image {} is here already, and is another one", theirs.id);
            return Err(Problem::new(ProblemCode::AlreadyExists, message));
        }
        if row.state != ImageState::Ready {
            let message = format!("image {} is not whole yet", row.name);
            return Err(Problem::new(ProblemCode::WrongState, message));
        }
        return image::busy(cluster, &row).map_or_else(|| Ok((row.value.clone(), false)), Err);
    }
    check_image(&CreateImage {
        name: theirs.name.clone(),
        segment: None,
        pool: None,
        kernel_command_line: theirs.kernel_command_line.clone(),
        parts: theirs.parts.clone(),
    })
    .map_err(|problem| {
        let message = format!("the backup's image is refused: {}", problem.message);
        Problem::new(ProblemCode::BadImage, message)
    })?;
    let is_free = |name: &Name| cluster.records.id_of(&UniqueName::image(Some(segment), name)).is_none();
    let by_id: Name = theirs.id.as_str().parse().expect("an id has the form of a name");
    let name = Some(theirs.name.clone()).filter(is_free).unwrap_or(by_id);
    let image = Image {
        name,
        segment: Some(segment.clone()),
        state: ImageState::Ready,
        arrived: theirs.parts.iter().map(|part| part.role).collect(),
        created_at: cluster.clock.now(),
        ..theirs.clone()
    };
    Ok((image, true))
}

/// The wish for a VM that is what the backup's was, but for who it is.
fn as_wish(cluster: &Cluster, contents: &BackupContents, wish: &Wish) -> CreateVm {
    let spec = &contents.spec;
    let hosts = cluster.records.list::<Host>();
    let is_here = |pool: &Name| hosts.iter().any(|host| host.pool(pool).is_some());
    // Its old address may be of a cluster that had others to give.
    let has_addresses = cluster.settings.addresses.is_some();
    let like = |nic: &Nic| nic_like(nic, has_addresses && nic.address.is_some());
    CreateVm {
        segment: wish.segment.clone(),
        name: wish.name.clone(),
        image: contents.image.id.to_string(),
        vcpus: Some(spec.vcpus),
        memory_mib: Some(spec.memory_mib),
        disk_mib: Some(spec.disk_mib),
        data_disks_mib: spec.data_disks_mib.clone(),
        pool: wish.pool.clone().or_else(|| Some(spec.pool.clone()).filter(is_here)),
        nics: Some(spec.nics.iter().map(like).collect()),
        user_data: spec.user_data.clone(),
        cpu_model: Some(spec.cpu_model.clone()),
        machine_type: Some(spec.machine_type.clone()),
        firmware: Some(spec.firmware),
        tpm: spec.tpm,
        host: wish.host.clone(),
        protected: false,
        class: Some(spec.class.clone()),
        ready_timeout_s: Some(spec.ready_timeout_s),
        stopped: false,
    }
}

/// The snapshot as the VM's own, which is its baseline.
fn first(cluster: &Cluster, vm: &Vm, contents: &BackupContents) -> Capture {
    let then = &contents.snapshot;
    let note = format!("snapshot {} of {}, from a backup", then.name, contents.vm);
    Capture::first_of(cluster, vm, note, then.facts.clone())
}

/// The records were written in the transaction that began the operation.
async fn recorded(_run: &mut Run<ImportSnapshot>) -> Result<(), Problem> {
    Ok(())
}

async fn forget(run: &mut Run<ImportSnapshot>) -> Result<(), Problem> {
    forget_vm(&run.cluster, &run.record.vm).await?;
    if !run.record.new_image {
        return Ok(());
    }
    let records = &run.cluster.records;
    loop {
        let Some(image) = records.get::<Image>(run.record.contents.image.id.as_str()) else { return Ok(()) };
        let mut transaction = Transaction::new();
        transaction.remove(&image);
        transaction.release(&UniqueName::image(image.segment.as_ref(), &image.name));
        match records.commit(transaction).await {
            Err(RecordsError::Conflict { .. }) => records.catch_up().await?,
            other => return other.map(drop).map_err(Into::into),
        }
    }
}

async fn fetch(run: &mut Run<ImportSnapshot>) -> Result<(), Problem> {
    let ImportRecord { vm, host, pool, repository, backup, contents, .. } = &run.record;
    let spec = TaskSpec::FetchBackup {
        vm: vm.clone(),
        pool: pool.clone(),
        contents: Box::new(contents.clone()),
        backup: backup.clone(),
        access: Box::new(access(&run.cluster, repository)?),
    };
    match run.command(Command { host, vm: None, label: "fetch", spec }).await? {
        TaskOutput::Fetched { facts } => run.record.facts = facts,
        _ => return Err(astray()),
    }
    Ok(())
}

async fn drop_fetched(run: &mut Run<ImportSnapshot>) -> Result<(), Problem> {
    let ImportRecord { vm, host, pool, .. } = &run.record;
    let spec = TaskSpec::DropFetched { vm: vm.clone(), pool: pool.clone() };
    let command = Command { host, vm: None, label: "drop-fetched", spec };
    run.command_or_owe(command, GIVEN_UP).await?;
    if !run.record.new_image {
        return Ok(());
    }
    // It came with the rest, and may be there already when the rest was refused.
    let spec = TaskSpec::DeleteImage { image: run.record.contents.image.id.clone(), pool: pool.clone() };
    let command = Command { host, vm: None, label: "remove-image", spec };
    run.command_or_owe(command, GIVEN_UP).await
}

/// The image is in the pool since the backup was fetched.
async fn place_image(run: &mut Run<ImportSnapshot>) -> Result<(), Problem> {
    let place = place(run)?;
    if run.cluster.records.get::<ImagePlace>(&ImagePlace::id_of(&place.image, &place.pool_uuid)).is_some() {
        return Ok(());
    }
    let mut transaction = Transaction::new();
    transaction.put(&place);
    run.cluster.records.commit(transaction).await?;
    Ok(())
}

async fn unplace_image(run: &mut Run<ImportSnapshot>) -> Result<(), Problem> {
    if !run.record.new_image {
        return Ok(());
    }
    let place = place(run)?;
    let mut transaction = Transaction::new();
    transaction.forget::<ImagePlace>(&ImagePlace::id_of(&place.image, &place.pool_uuid));
    run.cluster.records.commit(transaction).await?;
    Ok(())
}

fn place(run: &Run<ImportSnapshot>) -> Result<ImagePlace, Problem> {
    let ImportRecord { host, pool, contents, .. } = &run.record;
    let row = run.cluster.records.require::<Host>(host.as_str())?;
    let Some(report) = row.pool(pool) else {
        return Err(Problem::new(ProblemCode::NoPlacement, format!("host {} has no pool {pool}", row.name)));
    };
    let pool_uuid = report.pool_uuid.clone();
    Ok(ImagePlace { image: contents.image.id.clone(), pool_uuid, pool: pool.clone() })
}

async fn make(run: &mut Run<ImportSnapshot>) -> Result<(), Problem> {
    let ImportRecord { vm, host, contents, first, paused, .. } = &run.record;
    let row = run.cluster.records.require::<Vm>(vm.as_str())?;
    let spec = TaskSpec::ImportVm {
        definition: definition(&run.cluster, &row)?,
        snapshot: contents.snapshot.id.clone(),
        first_snapshot: first.as_ref().map(|first| first.snapshot.id.clone()),
        paused: *paused,
    };
    match run.command(Command { host, vm: Some(vm), label: "make", spec }).await? {
        TaskOutput::Cloned { facts, state } => (run.record.made, run.record.state) = (facts, state),
        _ => return Err(astray()),
    }
    Ok(())
}

async fn remove(run: &mut Run<ImportSnapshot>) -> Result<(), Problem> {
    let ImportRecord { vm, host, pool, .. } = &run.record;
    let spec = TaskSpec::DeleteVm { pool: pool.clone(), keep_files: false };
    let command = Command { host, vm: Some(vm), label: "remove", spec };
    run.command_or_owe(command, "the VM could not be made from the backup").await
}

async fn keep_snapshot(run: &mut Run<ImportSnapshot>) -> Result<(), Problem> {
    keep_first(run, &run.record.vm, run.record.first.as_ref(), run.record.state).await
}

async fn unkeep_snapshot(run: &mut Run<ImportSnapshot>) -> Result<(), Problem> {
    unkeep_first(run, run.record.first.as_ref()).await
}

fn astray() -> Problem {
    Problem::new(ProblemCode::Internal, "the agent brought a backup and did not say how it is")
}
