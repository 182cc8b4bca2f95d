//! Images: bringing one to a pool that lacks it, and deleting one everywhere.

use std::sync::Arc;

use berth_api::agent::TaskSpec;
use berth_model::host::{Host, HostState, PoolReport};
use berth_model::image::Image;
use berth_model::name::Name;
use berth_model::operation::OperationKind;
use berth_model::vm::Vm;
use berth_model::{HostId, ImageId, Problem, ProblemCode};
use serde::{Deserialize, Serialize};

use crate::cluster::Cluster;
use crate::operations::OperationRequest;
use crate::operations::step::{About, Command, Desk, Plan, Run, Step, Workflow, step, wrong_request};
use crate::records::{ImagePlace, RecordsError, Row, Transaction, UniqueName};

/// What an operation on an image holds, so that there is one at a time and no VM is made of it meanwhile.
pub(crate) fn slot(image: &Row<Image>) -> UniqueName {
    slot_of(&image.value.id)
}

/// The same by id.
pub(crate) fn slot_of(image: &ImageId) -> UniqueName {
    let name = image.as_str().parse().expect("an id has the form of a name");
    UniqueName::in_cluster("image-slot", &name)
}

/// That an operation is changing the image, if one is.
pub(crate) fn busy(cluster: &Cluster, image: &Row<Image>) -> Option<Problem> {
    let first = cluster.records.id_of(&slot(image))?;
    let message = format!("image {} is being changed by image.delete {first}", image.name);
    Some(Problem::new(ProblemCode::Busy, message).at("operation", first, "no other operation on this image"))
}

/// Makes an image present in a host's pool by having it fetched from a host that has it.
pub(crate) async fn ensure<W: Workflow>(
    run: &Run<W>,
    image: &ImageId,
    host: &HostId,
    pool: &Name,
) -> Result<(), Problem> {
    let records = &run.cluster.records;
    let image = records.require::<Image>(image.as_str())?;
    let host = records.require::<Host>(host.as_str())?;
    let Some(pool_uuid) = host.pool(pool).map(|report| report.pool_uuid.clone()) else {
        return Err(Problem::new(ProblemCode::NoPlacement, format!("host {} has no pool {pool}", host.name)));
    };
    let place = ImagePlace { image: image.value.id.clone(), pool_uuid, pool: pool.clone() };
    let place_id = ImagePlace::id_of(&place.image, &place.pool_uuid);
    // Of several VMs that need it at once, one fetches and the others wait.
    let fetching = run.cluster.fetching(&place_id);
    let _turn = fetching.lock().await;
    if records.get::<ImagePlace>(&place_id).is_some() {
        return Ok(());
    }
    let (from, from_pool) = holder(&run.cluster, &image, pool)?;
    run.phase(&format!("fetching image {} from host {}", image.name, from.name));
    let spec = TaskSpec::FetchImage {
        image: image.value.clone(),
        pool: pool.clone(),
        from: from.value.id.clone(),
        from_pool,
        from_address: from.address.clone(),
    };
    run.command(Command { host: &host.value.id, vm: None, label: "fetch-image", spec }).await?;
    let mut transaction = Transaction::new();
    transaction.put(&place);
    records.commit(transaction).await?;
    Ok(())
}

/// A host that answers and has the image, and the pool in which it has it: one of the name `pool` before others.
fn holder(cluster: &Cluster, image: &Row<Image>, pool: &Name) -> Result<(Arc<Row<Host>>, Name), Problem> {
    let places = cluster.records.places_of(&image.value.id);
    let holds = |report: &&PoolReport| places.iter().any(|place| place.pool_uuid == report.pool_uuid);
    let mut holders: Vec<(Arc<Row<Host>>, Name)> = Vec::new();
    for host in cluster.records.list::<Host>() {
        let online = host.state == HostState::Online;
        let pools = host.inventory.iter().filter(|_| online).flat_map(|inventory| &inventory.pools);
        let names: Vec<Name> = pools.filter(holds).map(|report| report.name.clone()).collect();
        holders.extend(names.into_iter().map(|name| (Arc::clone(&host), name)));
    }
    holders.sort_by_key(|(_, name)| name != pool);
    holders.into_iter().next().ok_or_else(|| {
        let message = format!("no host that answers has image {} in any of its pools", image.name);
        Problem::new(ProblemCode::Unreachable, message)
    })
}

/// `image.delete`: removes an image that no VM needs. Failing half-way, it is still declared and may be deleted again.
pub enum DeleteImage {}

/// What is known of the deletion.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DeleteImageRecord {
    image: ImageId,
}

impl Workflow for DeleteImage {
    type Record = DeleteImageRecord;
    const KIND: OperationKind = OperationKind::ImageDelete;
    const DECIDES: bool = true;
    const STEPS: &'static [Step<Self>] =
        &[step!("check-unused", check_unused), step!("remove", remove; no_return), step!("forget", forget)];

    async fn check<'a>(desk: &'a Desk<'a>, request: &'a OperationRequest) -> Result<Plan<Self>, Problem> {
        let OperationRequest::ImageDelete { image } = request else { return Err(wrong_request()) };
        let row = desk.cluster.records.require::<Image>(image.as_str())?;
        if let Some(problem) = busy(desk.cluster, &row) {
            return Err(problem);
        }
        unused(desk.cluster, image)?;
        Ok(Plan {
            subject: desk.cluster.records.full_name_of(&row),
            summary: format!("delete image {} from every pool", row.name),
            record: DeleteImageRecord { image: image.clone() },
            about: About::Image(row),
            transaction: Transaction::new(),
        })
    }
}

fn unused(cluster: &Cluster, image: &ImageId) -> Result<(), Problem> {
    // Not by name: they may be in segments that the caller knows nothing of.
    let users = cluster.records.list_where::<Vm>(|vm| vm.spec.image == *image).len();
    if users == 0 {
        return Ok(());
    }
    let message = format!("the disks of {users} VMs stand on this image");
    Err(Problem::new(ProblemCode::Protected, message))
}

/// The slot is held now, so that what is seen here stays so.
async fn check_unused(run: &mut Run<DeleteImage>) -> Result<(), Problem> {
    unused(&run.cluster, &run.record.image)
}

async fn remove(run: &mut Run<DeleteImage>) -> Result<(), Problem> {
    let image = run.record.image.clone();
    let hosts = run.cluster.records.list::<Host>();
    for place in run.cluster.records.places_of(&image) {
        let seen = |host: &&std::sync::Arc<Row<Host>>| {
            host.pool(&place.pool).is_some_and(|report| report.pool_uuid == place.pool_uuid)
        };
        // Any host that sees the pool will do, one that answers rather than another.
        let mut who: Vec<_> = hosts.iter().filter(seen).collect();
        who.sort_by_key(|host| host.state == HostState::Offline);
        if let Some(host) = who.first() {
            let spec = TaskSpec::DeleteImage { image: image.clone(), pool: place.pool.clone() };
            let command = Command {
                host: &host.value.id,
                vm: None,
                label: &format!("remove-{}", place.pool_uuid),
                spec,
            };
            run.command_or_owe(command, "the image was deleted").await?;
        }
        forget_place(run, &place).await?;
    }
    Ok(())
}

async fn forget_place(run: &Run<DeleteImage>, place: &Row<ImagePlace>) -> Result<(), Problem> {
    let mut transaction = Transaction::new();
    transaction.forget::<ImagePlace>(&place.id);
    run.cluster.records.commit(transaction).await?;
    Ok(())
}

async fn forget(run: &mut Run<DeleteImage>) -> Result<(), Problem> {
    loop {
        let Some(image) = run.cluster.records.get::<Image>(run.record.image.as_str()) else { return Ok(()) };
        let mut transaction = Transaction::new();
        transaction.remove(&image);
        // An image that a segment had before names were its segment's own holds its name among those that are for all.
        let mut names = vec![UniqueName::image(None, &image.name)];
        names.extend(image.segment.iter().map(|segment| UniqueName::image(Some(segment), &image.name)));
        for name in names {
            if run.cluster.records.id_of(&name).is_some_and(|owner| owner == image.id) {
                transaction.release(&name);
            }
        }
        match run.cluster.records.commit(transaction).await {
            Err(RecordsError::Conflict { .. }) => run.cluster.records.catch_up().await?,
            other => return other.map(drop).map_err(Into::into),
        }
    }
}
