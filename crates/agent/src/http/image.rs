//! Parts of images, in and out.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use berth_api::agent::{PeerImageDownload, PoolImageUpload, StoredPart};
use berth_model::{Problem, ProblemCode};
use futures_util::StreamExt;
use http::{HeaderValue, StatusCode, header};

use super::{json_response, path, query};
use crate::agent::Agent;
use crate::image::{self, Chunks, Expected};

/// How long what is still coming is read after an upload was refused. A sender that writes while nobody reads gets a
/// broken connection instead of the reason.
const DRAIN: Duration = Duration::from_secs(30);
/// Bytes that are read from a part at a time.
const READ_BYTES: usize = 256 * 1024;

pub(super) async fn upload(agent: Arc<Agent>, mut request: Request) -> Result<Response, Problem> {
    let path = path::<PoolImageUpload>(&mut request).await?;
    let query = query::<PoolImageUpload>(&mut request).await?;
    let mut bytes = image::chunks(request.into_body());
    let taken = take(&agent, &path, &query, &mut bytes).await;
    if taken.is_err() {
        let rest = async { while let Some(Ok(_)) = bytes.next().await {} };
        // One that goes on for longer is cut off.
        let _ = tokio::time::timeout(DRAIN, rest).await;
    }
    Ok(json_response(StatusCode::OK, &taken?))
}

async fn take(
    agent: &Agent,
    path: &berth_api::agent::PoolImagePath,
    query: &berth_api::agent::PartQuery,
    bytes: &mut Chunks,
) -> Result<StoredPart, Problem> {
    let services = agent.services();
    let pool = services.layout.pool(&path.pool)?;
    let expected = Expected::from_query(path.role, query)?;
    agent.images().take(services, &pool, &path.image, &expected, bytes).await
}

pub(super) async fn download(agent: Arc<Agent>, mut request: Request) -> Result<Response, Problem> {
    let path = path::<PeerImageDownload>(&mut request).await?;
    let pool = agent.services().layout.pool(&path.pool)?;
    let record = image::record(&pool, &path.image).await?;
    let missing = || Problem::not_found("image", &path.image);
    let part = record.parts.get(&path.role).ok_or_else(missing)?;
    let file = pool.part(&path.image, path.role, part.format);
    let file = tokio::fs::File::open(&file).await.map_err(|error| {
        Problem::new(ProblemCode::Internal, format!("{} can't be read: {error}", file.display()))
    })?;
    let chunks = tokio_util::io::ReaderStream::with_capacity(file, READ_BYTES);
    let mut response = Response::new(Body::from_stream(chunks));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(part.size_bytes));
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    Ok(response)
}
