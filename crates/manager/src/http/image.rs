//! Images: declared first, then their parts are uploaded, each straight through to an agent.
//!
//! The manager keeps nothing of a part. The agent that stores the first part is chosen among the online hosts that
//! have the pool and the room, and the others follow into the same pool, so that an image is whole in one place. The
//! agent checks a part against what was declared before it counts as arrived; one that fails leaves the image as it
//! was, and can be uploaded again.

use std::sync::Arc;

use berth_api::agent::{PartQuery, PoolImagePath, PoolImageUpload, StoredPart};
use berth_api::manager::{
    CreateImage, ImageCreate, ImageDelete, ImageList, ImagePartUpload, ImageShow, OperationRef, Page,
};
use berth_api::transport;
use berth_model::access::Action;
use berth_model::host::{Host, HostState, PoolReport};
use berth_model::image::{Image, ImagePart, ImageState, PartFormat, PartRole};
use berth_model::name::Name;
use berth_model::{ImageId, Problem, ProblemCode, SegmentId};
use http::header::CONTENT_LENGTH;
use serde::{Deserialize, Serialize};

use super::{list, operation};
use crate::cluster::Cluster;
use crate::door::target::{self, ForImage, TheImage, TheList, ThePartsImage};
use crate::door::{Answer, Call, Door};
use crate::operations::{Begin, OperationRequest};
use crate::records::{ImagePlace, Record, RecordsError, Row, Transaction, UniqueName};

/// The pool that is meant when none is named.
pub const POOL_DEFAULT: &str = "default";
/// Longest kernel command line, in bytes: Linux' own limit on x86.
const COMMAND_LINE_BYTES_MAX: usize = 2047;
/// Largest part, in bytes: 16 TiB, the largest file of the file systems that pools are on.
const PART_BYTES_MAX: u64 = 16 << 40;
/// Room that is kept in a pool when a part is put there, in bytes: a pool that is full to the brim stops guests.
const POOL_RESERVE_BYTES: u64 = 64 << 20;

/// Where the parts of an image go while it is not whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageUpload {
    /// The image.
    pub image: ImageId,
    /// The pool that it is to be in.
    pub pool: Name,
    /// Which pool of that name holds the parts that have arrived; none until the first has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool_uuid: Option<String>,
}

impl Record for ImageUpload {
    const PREFIX: &'static str = "/image-uploads/";
    const NOUN: &'static str = "image upload";
    fn record_id(&self) -> String {
        self.image.to_string()
    }
}

/// Mounts the routes of this file.
pub fn mount(door: Door) -> Door {
    door.mount(show_all).mount(create).mount(show).mount(upload).mount(delete)
}

async fn show_all(call: Call<ImageList, TheList>) -> Result<Answer<Page<Image>>, Problem> {
    let (cluster, visible) = (call.ctx.cluster(), call.ctx.visible(Action::ImageView));
    let mut all = cluster.records.list::<Image>();
    // Images without a segment are for all: a fixed policy says so, and a written one may forbid it.
    all.retain(|row| {
        let resource = || target::image_resource(cluster, row);
        visible.shows(row.segment.as_ref(), resource)
            || (row.segment.is_none() && visible.asks_about(&resource()))
    });
    // Several segments may have one of the same name.
    let key = |row: &Arc<Row<Image>>| format!("{} {}", row.name, row.id);
    all.sort_by_key(key);
    let query = &call.input.query;
    let page = list::page(&all, query.limit, query.cursor.as_deref(), key, |row| row.value.clone())?;
    Ok(Answer::new(page))
}

async fn show(call: Call<ImageShow, TheImage>) -> Result<Answer<Image>, Problem> {
    let TheImage(image) = call.target;
    Ok(Answer::new(image.value.clone()).at(image.revision))
}

async fn delete(call: Call<ImageDelete, TheImage>) -> Result<Answer<OperationRef>, Problem> {
    let (actor, if_match) = (call.ctx.actor(), call.if_match()?);
    let TheImage(image) = call.target;
    let request = OperationRequest::ImageDelete { image: image.value.id.clone() };
    let begin = Begin { if_match, ..Begin::new(actor, request) };
    operation::submit(call.ctx.cluster(), begin, false).await
}

async fn create(call: Call<ImageCreate, ForImage>) -> Result<Answer<Image>, Problem> {
    let (cluster, ForImage(segment)) = (call.ctx.cluster(), call.target);
    let wish = call.input.body;
    let pool = wish.pool.clone().unwrap_or_else(default_pool);
    check(&wish)?;
    check_pool(cluster, &pool)?;
    let image = new_image(wish, segment, ImageId::from_entropy(cluster.entropy.id()), call.ctx.now());
    let mut transaction = Transaction::new();
    transaction.create(&image);
    transaction.create(&ImageUpload { image: image.id.clone(), pool, pool_uuid: None });
    transaction.claim(&UniqueName::image(image.segment.as_ref(), &image.name), image.id.as_str());
    cluster.records.commit(transaction).await?;
    Ok(Answer::new(image))
}

fn new_image(
    wish: CreateImage,
    segment: Option<SegmentId>,
    id: ImageId,
    created_at: berth_model::Timestamp,
) -> Image {
    let mut parts = wish.parts;
    for part in &mut parts {
        part.sha256.make_ascii_lowercase();
        // What the guest sees is found out by the agent, not declared.
        part.virtual_size_bytes = None;
    }
    Image {
        id,
        name: wish.name,
        segment,
        state: ImageState::Uploading,
        parts,
        kernel_command_line: wish.kernel_command_line,
        arrived: Vec::new(),
        created_at,
    }
}

fn default_pool() -> Name {
    POOL_DEFAULT.parse().expect("a name that keeps the rule")
}

/// Whether an image can be what somebody says of it.
///
/// # Errors
/// The field that can't.
pub(crate) fn check(wish: &CreateImage) -> Result<(), Problem> {
    let has = |role: PartRole| wish.parts.iter().any(|part| part.role == role);
    if !has(PartRole::Disk) && !has(PartRole::Kernel) {
        let roles: Vec<&str> = wish.parts.iter().map(|part| part.role.as_str()).collect();
        return Err(Problem::field(
            "parts",
            roles.join(", "),
            "a disk, or a kernel with its initrd, or both",
        ));
    }
    if has(PartRole::Kernel) != has(PartRole::Initrd) {
        let roles: Vec<&str> = wish.parts.iter().map(|part| part.role.as_str()).collect();
        return Err(Problem::field("parts", roles.join(", "), "a kernel and an initrd together"));
    }
    for (index, part) in wish.parts.iter().enumerate() {
        let twice = wish.parts.iter().take(index).any(|other| other.role == part.role);
        check_part(part, index, twice)?;
    }
    let line = &wish.kernel_command_line;
    if line.len() > COMMAND_LINE_BYTES_MAX || line.chars().any(char::is_control) {
        let expected = format!("at most {COMMAND_LINE_BYTES_MAX} bytes without control characters");
        return Err(Problem::field("kernel_command_line", line, expected));
    }
    if !line.is_empty() && !has(PartRole::Kernel) {
        return Err(Problem::field("kernel_command_line", line, "nothing, for an image without a kernel"));
    }
    Ok(())
}

fn check_part(part: &ImagePart, index: usize, twice: bool) -> Result<(), Problem> {
    let field = |name: &str| format!("parts.{index}.{name}");
    if twice {
        return Err(Problem::field(field("role"), part.role.as_str(), "each role once"));
    }
    if part.role != PartRole::Disk && part.format != PartFormat::Raw {
        return Err(Problem::field(field("format"), part.format.as_str(), "raw, for a kernel or an initrd"));
    }
    if part.size_bytes == 0 || part.size_bytes > PART_BYTES_MAX {
        return Err(Problem::field(field("size_bytes"), part.size_bytes, format!("1 to {PART_BYTES_MAX}")));
    }
    if part.sha256.len() != 64 || !part.sha256.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(Problem::field(field("sha256"), &part.sha256, "a SHA-256 in 64 hexadecimal digits"));
    }
    Ok(())
}

fn check_pool(cluster: &Cluster, pool: &Name) -> Result<(), Problem> {
    let hosts = cluster.records.list::<Host>();
    if hosts.iter().any(|host| host.pool(pool).is_some()) {
        return Ok(());
    }
    let mut known: Vec<&str> = hosts
        .iter()
        .filter_map(|host| host.inventory.as_ref())
        .flat_map(|inventory| inventory.pools.iter().map(|pool| pool.name.as_str()))
        .collect();
    known.sort_unstable();
    known.dedup();
    let expected = match known.as_slice() {
        [] => "a pool of a host, and no host has reported one yet".to_owned(),
        names => format!("one of: {}", names.join(", ")),
    };
    Err(Problem::field("pool", pool, expected))
}

async fn upload(call: Call<ImagePartUpload, ThePartsImage>) -> Result<Answer<Image>, Problem> {
    let (cluster, ThePartsImage(image)) = (call.ctx.cluster(), call.target);
    let role = call.input.path.role;
    let part = wanted_part(&image, role)?;
    let length =
        call.parts.headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if let Some(length) = length.filter(|length| *length != part.size_bytes) {
        let message =
            format!("the {} is {length} bytes, and {} were declared", role.as_str(), part.size_bytes);
        return Err(Problem::new(ProblemCode::BadImage, message).at(
            "size_bytes",
            length,
            part.size_bytes.to_string(),
        ));
    }
    let upload = cluster.records.require::<ImageUpload>(image.value.id.as_str())?;
    let (host, pool) = choose(cluster, &upload, part)?;
    let path = PoolImagePath { pool: upload.pool.clone(), image: image.value.id.clone(), role };
    let query = PartQuery {
        format: part.format.as_str().to_owned(),
        size_bytes: part.size_bytes,
        sha256: part.sha256.clone(),
    };
    let body = streamed(call.body);
    let agent = cluster.agents.client(&host);
    let stored = agent
        .upload::<PoolImageUpload>(&path, &query, body, part.size_bytes)
        .await
        .map_err(|error| refused_part(error.into_problem(), part, &upload.pool, &host))?;
    let row = arrived(cluster, &image.value.id, role, &stored, &pool).await?;
    Ok(Answer::new(row.value.clone()).at(row.revision))
}

/// What an agent that can't take a part says of it, with the field that it is about.
fn refused_part(problem: Problem, part: &ImagePart, pool: &Name, host: &Host) -> Problem {
    let told = problem.of_host(host.name.as_str(), Some(pool.as_str()));
    if told.code != ProblemCode::BadImage || told.field.is_some() {
        return told;
    }
    let expected = match part.format {
        PartFormat::Qcow2 => "a whole and undamaged qcow2 file that stands alone",
        PartFormat::Raw => "the whole file",
    };
    told.at(part.role.as_str(), part.format.as_str(), expected)
}

fn streamed(body: axum::body::Body) -> transport::Body {
    transport::streamed(body.into_data_stream())
}

fn wanted_part(image: &Image, role: PartRole) -> Result<&ImagePart, Problem> {
    if image.state == ImageState::Ready {
        let message = format!("image {} is whole: make a new one for other content", image.name);
        return Err(Problem::new(ProblemCode::WrongState, message));
    }
    image.part(role).ok_or_else(|| {
        let declared: Vec<&str> = image.parts.iter().map(|part| part.role.as_str()).collect();
        Problem::field("role", role.as_str(), format!("a part that was declared: {}", declared.join(", ")))
    })
}

/// The host to send a part to: one that sees the pool where the other parts are, with room, the roomiest first.
fn choose(
    cluster: &Cluster,
    upload: &ImageUpload,
    part: &ImagePart,
) -> Result<(Arc<Row<Host>>, PoolReport), Problem> {
    let mut candidates: Vec<(Arc<Row<Host>>, PoolReport)> = cluster
        .records
        .list::<Host>()
        .into_iter()
        .filter(|host| host.state == HostState::Online)
        .filter_map(|host| host.pool(&upload.pool).cloned().map(|pool| (Arc::clone(&host), pool)))
        .filter(|(_, pool)| upload.pool_uuid.as_ref().is_none_or(|uuid| *uuid == pool.pool_uuid))
        .collect();
    candidates.sort_by(|(a_host, a), (b_host, b)| {
        b.free_bytes.cmp(&a.free_bytes).then_with(|| a_host.value.id.cmp(&b_host.value.id))
    });
    let Some((host, pool)) = candidates.into_iter().next() else {
        let message = match upload.pool_uuid {
            Some(_) => {
                format!("no online host sees the pool {} that has the image's other parts", upload.pool)
            }
            None => format!("no online host has a pool {}", upload.pool),
        };
        return Err(Problem::new(ProblemCode::NoPlacement, message));
    };
    if pool.free_bytes < part.size_bytes.saturating_add(POOL_RESERVE_BYTES) {
        let message = format!(
            "pool {} on host {} has {} bytes free, and the {} is {} bytes",
            pool.name,
            host.name,
            pool.free_bytes,
            part.role.as_str(),
            part.size_bytes
        );
        let expected = format!("{} bytes free in it", part.size_bytes.saturating_add(POOL_RESERVE_BYTES));
        return Err(Problem::new(ProblemCode::NoSpace, message).at("pool", &pool.name, expected));
    }
    Ok((host, pool))
}

/// Writes down that a part has arrived; with the last one the image is ready, and in its place.
async fn arrived(
    cluster: &Cluster,
    image: &ImageId,
    role: PartRole,
    stored: &StoredPart,
    pool: &PoolReport,
) -> Result<Arc<Row<Image>>, Problem> {
    loop {
        let row = cluster.records.require::<Image>(image.as_str())?;
        let upload = cluster.records.require::<ImageUpload>(image.as_str())?;
        if upload.pool_uuid.as_ref().is_some_and(|uuid| *uuid != pool.pool_uuid) {
            // Two first parts at once went to two pools: the one that was noted later has to come again.
            let message = format!(
                "another part of the image went to another host meanwhile: upload the {} again",
                role.as_str()
            );
            return Err(Problem::new(ProblemCode::Busy, message));
        }
        let mut changed = row.value.clone();
        let part = changed.parts.iter_mut().find(|part| part.role == role);
        let part = part.ok_or_else(|| Problem::not_found("part", role.as_str()))?;
        part.virtual_size_bytes = Some(stored.virtual_size_bytes);
        if !changed.arrived.contains(&role) {
            changed.arrived.push(role);
        }
        let mut transaction = Transaction::new();
        if changed.parts.iter().all(|part| changed.arrived.contains(&part.role)) {
            changed.state = ImageState::Ready;
            transaction.remove(&upload);
            transaction.put(&ImagePlace {
                image: image.clone(),
                pool_uuid: pool.pool_uuid.clone(),
                pool: pool.name.clone(),
            });
        } else {
            let noted = ImageUpload { pool_uuid: Some(pool.pool_uuid.clone()), ..upload.value.clone() };
            transaction.replace(&upload, &noted);
        }
        transaction.replace(&row, &changed);
        match cluster.records.commit(transaction).await {
            Ok(_) => return cluster.records.require(image.as_str()),
            // Another part arrived at the same moment.
            Err(RecordsError::Conflict { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(json: serde_json::Value) -> CreateImage {
        serde_json::from_value(json).expect("a wish")
    }

    fn part(role: &str) -> serde_json::Value {
        serde_json::json!({ "role": role, "format": "raw", "size_bytes": 1, "sha256": "ab".repeat(32) })
    }

    #[test]
    fn what_can_boot_is_taken() {
        for roles in [vec!["disk"], vec!["kernel", "initrd"], vec!["kernel", "initrd", "disk"]] {
            let parts: Vec<_> = roles.iter().map(|role| part(role)).collect();
            assert!(check(&wish(serde_json::json!({ "name": "a", "parts": parts }))).is_ok(), "{roles:?}");
        }
    }

    #[test]
    fn what_can_not_is_refused_by_name() {
        let with = |mut part: serde_json::Value, field: &str, value: serde_json::Value| {
            part[field] = value;
            part
        };
        for (parts, field) in [
            (vec![], "parts"),
            (vec![part("initrd")], "parts"),
            (vec![part("kernel")], "parts"),
            (vec![part("disk"), part("disk")], "parts.1.role"),
            (vec![with(part("disk"), "size_bytes", 0.into())], "parts.0.size_bytes"),
            (vec![with(part("disk"), "sha256", "abc".into())], "parts.0.sha256"),
            (vec![part("initrd"), with(part("kernel"), "format", "qcow2".into())], "parts.1.format"),
        ] {
            let problem = check(&wish(serde_json::json!({ "name": "a", "parts": parts }))).expect_err(field);
            assert_eq!(problem.field.as_deref(), Some(field));
        }
        let line =
            serde_json::json!({ "name": "a", "parts": [part("disk")], "kernel_command_line": "quiet" });
        assert_eq!(check(&wish(line)).expect_err("no kernel").field.as_deref(), Some("kernel_command_line"));
    }
}
