//! Segments.

use berth_api::manager::{
    CreateSegment, Grant, Page, Quota, Segment, SegmentCreate, SegmentDelete, SegmentList, SegmentReport,
    SegmentShow, SegmentUpdate,
};
use berth_model::access::Action;
use berth_model::image::Image;
use berth_model::name::Name;
use berth_model::schedule::Schedule;
use berth_model::vm::Vm;
use berth_model::{Problem, ProblemCode, SegmentId, Timestamp};

use super::list;
use crate::clock::Entropy;
use crate::cluster::Cluster;
use crate::door::target::{Around, TheList, TheSegment, segment_resource};
use crate::door::{Answer, Call, Door};
use crate::operations::OperationRow;
use crate::policy::Resource;
use crate::policy::book::DEPTH_MAX;
use crate::quota;
use crate::records::{Record, RecordsError, Transaction, UniqueName};

/// Mounts the routes of this file.
pub fn mount(door: Door) -> Door {
    door.mount(show_all).mount(create).mount(show).mount(update).mount(delete)
}

/// A segment to be.
pub fn new_segment(name: Name, entropy: &dyn Entropy, now: Timestamp) -> Segment {
    let id = SegmentId::from_entropy(entropy.id());
    Segment { id, name, parent: None, quota: Quota::default(), created_at: now }
}

/// Adds the making of a segment to a transaction.
pub fn add_segment(transaction: &mut Transaction, segment: &Segment) {
    transaction.create(segment);
    transaction.claim(&UniqueName::in_cluster(Segment::NOUN, &segment.name), segment.id.as_str());
}

async fn show_all(call: Call<SegmentList, TheList>) -> Result<Answer<Page<Segment>>, Problem> {
    let cluster = call.ctx.cluster();
    let visible = call.ctx.visible(Action::SegmentView);
    let mut all = cluster.records.list::<Segment>();
    all.retain(|row| visible.shows(Some(&row.value.id), || segment_resource(cluster, &row.value.id)));
    all.sort_by(|a, b| a.name.cmp(&b.name));
    let query = &call.input.query;
    let key = |row: &_| Segment::clone(row).name.to_string();
    Ok(Answer::new(list::page(
        &all,
        query.limit,
        query.cursor.as_deref(),
        |row| key(&***row),
        |row| row.value.clone(),
    )?))
}

async fn show(call: Call<SegmentShow, TheSegment>) -> Result<Answer<SegmentReport>, Problem> {
    let (cluster, TheSegment(segment)) = (call.ctx.cluster(), call.target);
    let usage = quota::usage(cluster, &segment.value.id);
    Ok(Answer::new(SegmentReport { segment: segment.value.clone(), usage }).at(segment.revision))
}

async fn create(call: Call<SegmentCreate, Around>) -> Result<Answer<Segment>, Problem> {
    let (cluster, Around(parent)) = (call.ctx.cluster(), call.target);
    let CreateSegment { name, quota, .. } = call.input.body;
    let mut segment = new_segment(name, &*cluster.entropy, call.ctx.now());
    segment.quota = quota;
    let mut transaction = Transaction::new();
    if let Some(parent) = &parent {
        refuse_too_deep(cluster, parent)?;
        segment.parent = Some(parent.value.id.clone());
        // Nobody may delete it between this look and the deed.
        transaction.unchanged(parent);
    }
    add_segment(&mut transaction, &segment);
    cluster.records.commit(transaction).await?;
    Ok(Answer::new(segment))
}

fn refuse_too_deep(cluster: &Cluster, parent: &Segment) -> Result<(), Problem> {
    let (mut depth, mut next) = (1, parent.parent.clone());
    while let Some(above) = next {
        depth += 1;
        if depth >= DEPTH_MAX {
            return Err(Problem::field(
                "parent",
                &parent.name,
                format!("at most {DEPTH_MAX} inside each other"),
            ));
        }
        next = cluster.records.get::<Segment>(above.as_str()).and_then(|row| row.parent.clone());
    }
    Ok(())
}

async fn update(call: Call<SegmentUpdate, TheSegment>) -> Result<Answer<Segment>, Problem> {
    let (cluster, wish) = (call.ctx.cluster(), &call.input.body);
    // Quotas are compared with sums, and a name with what is on its way.
    let _deciding = cluster.deciding().await;
    let row = cluster.records.require::<Segment>(&call.target.0.id)?;
    if wish.quota.is_some_and(|quota| quota != row.quota) {
        // Whoever may do everything in a segment must not lift its bounds: they are set from around it.
        let around = match &row.parent {
            Some(parent) => segment_resource(cluster, parent),
            None => Resource::cluster(),
        };
        call.ctx.require(Action::SegmentConfigure, &around)?;
    }
    let mut segment = row.value.clone();
    let mut transaction = Transaction::new();
    if let Some(name) = wish.name.clone().filter(|name| *name != row.name) {
        if let Some(coming) = operation_in(cluster, &segment) {
            let message = format!("a {coming} in segment {} is under way: wait for it", row.name);
            return Err(Problem::new(ProblemCode::Busy, message));
        }
        transaction.claim(&UniqueName::in_cluster(Segment::NOUN, &name), segment.id.as_str());
        transaction.release(&UniqueName::in_cluster(Segment::NOUN, &row.name));
        segment.name = name;
    }
    segment.quota = wish.quota.unwrap_or(segment.quota);
    transaction.replace(&row, &segment);
    let revision = cluster.records.commit(transaction).await?;
    call_vms_after_their_segments(cluster).await?;
    Ok(Answer::new(segment).at(revision))
}

/// VMs carry their segment's name; after a renaming that broke off, or while it goes on, some carry the old one.
pub(crate) async fn call_vms_after_their_segments(cluster: &Cluster) -> Result<(), RecordsError> {
    let names: std::collections::HashMap<SegmentId, Name> = cluster
        .records
        .list::<Segment>()
        .iter()
        .map(|row| (row.value.id.clone(), row.name.clone()))
        .collect();
    let is_old = |vm: &Vm| names.get(&vm.segment).is_some_and(|name| *name != vm.segment_name);
    for vm in cluster.records.list_where::<Vm>(is_old) {
        let renamed = cluster.records.update::<Vm, RecordsError>(&vm.id, |vm| {
            if let Some(name) = names.get(&vm.segment) {
                vm.segment_name = name.clone();
            }
            Ok(())
        });
        match renamed.await {
            // Deleted meanwhile.
            Err(RecordsError::Missing { .. }) | Ok(_) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// What is under way in a segment.
fn operation_in(cluster: &Cluster, segment: &Segment) -> Option<String> {
    let prefix = format!("{}/", segment.name);
    let rows = cluster.records.list::<OperationRow>();
    let row = rows.iter().find(|row| {
        !row.operation.state.is_over()
            && (row.operation.segment.as_ref() == Some(&segment.id)
                || row.operation.subject.starts_with(&prefix))
    })?;
    Some(row.operation.kind.to_string())
}

async fn delete(call: Call<SegmentDelete, TheSegment>) -> Result<Answer<()>, Problem> {
    let (cluster, TheSegment(segment)) = (call.ctx.cluster(), call.target);
    // Nothing may come into it between the look and the deed.
    let _deciding = cluster.deciding().await;
    let id = &segment.value.id;
    let needed_by = |what: String| {
        Problem::new(ProblemCode::Protected, format!("segment {} is not empty: it has {what}", segment.name))
            .at("segment", &segment.name, "an empty segment")
    };
    if let Some(vm) = cluster.records.list::<Vm>().iter().find(|vm| vm.segment == *id) {
        return Err(needed_by(format!("VM {}", vm.name)));
    }
    if let Some(image) =
        cluster.records.list::<Image>().iter().find(|image| image.segment.as_ref() == Some(id))
    {
        return Err(needed_by(format!("image {}", image.name)));
    }
    if let Some(schedule) = cluster.records.list_where::<Schedule>(|schedule| schedule.segment == *id).first()
    {
        return Err(needed_by(format!("schedule {}", schedule.name)));
    }
    if let Some(coming) = operation_in(cluster, &segment) {
        return Err(needed_by(format!("a {coming} under way")));
    }
    let is_inside = |other: &Segment| other.parent.as_ref() == Some(id);
    if let Some(inside) = cluster.records.list_where::<Segment>(is_inside).first() {
        return Err(needed_by(format!("segment {}", inside.name)));
    }
    if let Some(grant) =
        cluster.records.list_where::<Grant>(|grant| grant.segment.as_ref() == Some(id)).first()
    {
        return Err(needed_by(format!("grant {}", grant.id)));
    }
    let mut transaction = Transaction::new();
    transaction.remove(&segment);
    transaction.release(&UniqueName::in_cluster(Segment::NOUN, &segment.name));
    cluster.records.commit(transaction).await?;
    Ok(Answer::new(()))
}
