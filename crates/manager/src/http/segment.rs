//! Segments.

use berth_api::manager::{Page, Segment, SegmentCreate, SegmentDelete, SegmentList};
use berth_model::image::Image;
use berth_model::name::Name;
use berth_model::vm::Vm;
use berth_model::{Problem, ProblemCode, SegmentId, Timestamp};

use super::list;
use crate::clock::Entropy;
use crate::door::target::{TheCluster, TheSegment};
use crate::door::{Answer, Call, Door};
use crate::operations::OperationRow;
use crate::records::{Record, Transaction, UniqueName};

/// Mounts the routes of this file.
pub fn mount(door: Door) -> Door {
    door.mount(show_all).mount(create).mount(delete)
}

/// A segment to be.
pub fn new_segment(name: Name, entropy: &dyn Entropy, now: Timestamp) -> Segment {
    Segment { id: SegmentId::from_entropy(entropy.id()), name, created_at: now }
}

/// Adds the making of a segment to a transaction.
pub fn add_segment(transaction: &mut Transaction, segment: &Segment) {
    transaction.create(segment);
    transaction.claim(&UniqueName::in_cluster(Segment::NOUN, &segment.name), segment.id.as_str());
}

async fn show_all(call: Call<SegmentList, TheCluster>) -> Result<Answer<Page<Segment>>, Problem> {
    let mut all = call.ctx.cluster().records.list::<Segment>();
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

async fn create(call: Call<SegmentCreate, TheCluster>) -> Result<Answer<Segment>, Problem> {
    let cluster = call.ctx.cluster();
    let segment = new_segment(call.input.body.name, &*cluster.entropy, call.ctx.now());
    let mut transaction = Transaction::new();
    add_segment(&mut transaction, &segment);
    cluster.records.commit(transaction).await?;
    Ok(Answer::new(segment))
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
    let prefix = format!("{}/", segment.name);
    let coming = cluster
        .records
        .list::<OperationRow>()
        .into_iter()
        .find(|row| !row.operation.state.is_over() && row.operation.subject.starts_with(&prefix));
    if let Some(row) = coming {
        return Err(needed_by(format!("a {} under way", row.operation.kind)));
    }
    let mut transaction = Transaction::new();
    transaction.remove(&segment);
    transaction.release(&UniqueName::in_cluster(Segment::NOUN, &segment.name));
    cluster.records.commit(transaction).await?;
    Ok(Answer::new(()))
}
