//! The contract's routes.
//!
//! A route is mounted by its type, and only through [`mount`]: so none can be reached by somebody whom its path is not
//! for. Routes under `/v1/peer` are for other hosts' agents, all others for the manager alone; the certificate says
//! who asks.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use axum::RequestExt;
use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Query, Request};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodFilter, on};
use berth_api::Endpoint;
use berth_api::agent as contract;
use berth_api::endpoint::Nothing;
use berth_api::pki::Peer;
use berth_api::serve::Caller;
use berth_model::{Problem, ProblemCode};
use http::{HeaderValue, Method, StatusCode, header};
use serde::Serialize;

use crate::agent::Agent;
use crate::backup;
use crate::snapshot::{self, deletion};

mod console;
mod image;
mod migration;

/// Largest JSON body, in bytes: the longest definition of a VM is a tenth of it.
const BODY_BYTES_MAX: usize = 1024 * 1024;
/// What routes for other hosts begin with.
const PEER_PREFIX: &str = "/v1/peer/";

/// All routes of an agent. Each request must carry a [`Caller`] as extension, as the server puts it there.
pub fn router(agent: &Arc<Agent>) -> Router {
    let mut router = Router::new();
    router = json::<contract::InventoryShow, _, _>(router, agent, |agent, _, _, ()| async move {
        crate::inventory::take(agent.services()).await
    });
    router = json::<contract::ReportShow, _, _>(router, agent, |agent, Nothing {}, query, ()| async move {
        Ok(agent.services().board.wait(&query).await)
    });
    router = json::<contract::TaskPut, _, _>(router, agent, |agent, path, Nothing {}, put| async move {
        agent.put_task(&path.task, put)
    });
    router = json::<contract::TaskShow, _, _>(router, agent, |agent, path, query, ()| async move {
        let wait = Duration::from_millis(query.wait_ms.unwrap_or(0));
        agent.tasks().show(&path.task, query.after, wait).await
    });
    router = json::<contract::TaskCancel, _, _>(router, agent, |agent, path, Nothing {}, ()| async move {
        agent.tasks().cancel(&path.task)
    });
    router = json::<contract::SnapshotCompare, _, _>(router, agent, |agent, path, query, ()| async move {
        snapshot::compare(&agent, path, query).await
    });
    router = json::<contract::RepositoryOpen, _, _>(router, agent, |agent, _, _, wish| async move {
        backup::open(agent.services(), wish).await
    });
    router = json::<contract::RepositoryList, _, _>(router, agent, |agent, _, _, access| async move {
        backup::list(agent.services(), access).await
    });
    router = json::<contract::RepositoryLook, _, _>(router, agent, |agent, _, _, wish| async move {
        let (backup, contents) = backup::look(agent.services(), wish).await?;
        Ok(contract::FoundBackup { backup, contents })
    });
    router = mount::<contract::AgentMetrics, _, _>(router, agent, |agent, _| async move {
        let text = crate::metrics::text(&agent);
        Ok(([(header::CONTENT_TYPE, crate::metrics::CONTENT_TYPE)], text).into_response())
    });
    router = mount::<contract::ConsoleOpen, _, _>(router, agent, console::open);
    router = json::<contract::DeletionForecast, _, _>(router, agent, |agent, path, _, ()| async move {
        deletion::forecast(agent.services(), &path.vm, &path.snapshot).await
    });
    router = mount::<contract::PoolImageUpload, _, _>(router, agent, image::upload);
    router = mount::<contract::PeerImageDownload, _, _>(router, agent, image::download);
    router = mount::<contract::PeerMigrationOpen, _, _>(router, agent, migration::open);
    router.fallback(|request: Request| async move {
        render(&Problem::new(ProblemCode::NotFound, format!("there is no route {}", request.uri().path())))
    })
}

/// Mounts a route whose bodies are JSON.
fn json<E, F, R>(router: Router, agent: &Arc<Agent>, handle: F) -> Router
where
    E: Endpoint,
    F: Fn(Arc<Agent>, E::Path, E::Query, E::Body) -> R + Clone + Send + Sync + 'static,
    R: Future<Output = Result<E::Reply, Problem>> + Send + 'static,
{
    mount::<E, _, _>(router, agent, move |agent, mut request| {
        let handle = handle.clone();
        async move {
            let path = path::<E>(&mut request).await?;
            let query = query::<E>(&mut request).await?;
            let body = body::<E>(request).await?;
            Ok(json_response(StatusCode::OK, &handle(agent, path, query, body).await?))
        }
    })
}

/// Mounts a route: the only way in.
fn mount<E, F, R>(router: Router, agent: &Arc<Agent>, handle: F) -> Router
where
    E: Endpoint,
    F: Fn(Arc<Agent>, Request) -> R + Clone + Send + Sync + 'static,
    R: Future<Output = Result<Response, Problem>> + Send + 'static,
{
    let agent = Arc::clone(agent);
    let handler = move |request: Request| {
        let (agent, handle) = (Arc::clone(&agent), handle.clone());
        async move {
            let answered = match admit::<E>(&request) {
                Ok(()) => handle(agent, request).await,
                Err(problem) => Err(problem),
            };
            answered.unwrap_or_else(|problem| {
                tracing::debug!(route = E::NAME, %problem, "refused");
                render(&problem)
            })
        }
    };
    let method = Method::from_bytes(E::METHOD.as_bytes()).expect("methods of the contract are valid");
    let filter = MethodFilter::try_from(method).expect("methods of the contract are common ones");
    router.route(E::PATH, on(filter, handler))
}

/// Whether the caller is one whom the route is for.
fn admit<E: Endpoint>(request: &Request) -> Result<(), Problem> {
    let peer = request.extensions().get::<Caller>().map(|caller| &caller.peer);
    let refused = |expected: &str| {
        let message = format!("{} {} is for {expected}", E::METHOD, E::PATH);
        Err(Problem::new(ProblemCode::NotAllowed, message))
    };
    match peer {
        None | Some(Peer::Anonymous) => {
            Err(Problem::new(ProblemCode::Unauthenticated, "no certificate of this cluster was shown"))
        }
        Some(Peer::Manager) if E::PATH.starts_with(PEER_PREFIX) => refused("other hosts of the cluster"),
        Some(Peer::Host(_)) if !E::PATH.starts_with(PEER_PREFIX) => refused("the cluster's manager"),
        Some(Peer::Manager | Peer::Host(_)) => Ok(()),
    }
}

async fn path<E: Endpoint>(request: &mut Request) -> Result<E::Path, Problem> {
    // A route without parts has no path for axum to read: it is read from nothing.
    if !E::PATH.contains('{') {
        return serde_json::from_str("{}").map_err(|error| invalid("the path", &error));
    }
    let path = request.extract_parts::<Path<E::Path>>().await;
    path.map(|Path(path)| path).map_err(|error| invalid("the path", &error.body_text()))
}

async fn query<E: Endpoint>(request: &mut Request) -> Result<E::Query, Problem> {
    let query = request.extract_parts::<Query<E::Query>>().await;
    query.map(|Query(query)| query).map_err(|error| invalid("the query", &error.body_text()))
}

async fn body<E: Endpoint>(request: Request) -> Result<E::Body, Problem> {
    let bytes = axum::body::to_bytes(request.into_body(), BODY_BYTES_MAX).await;
    let bytes = bytes.map_err(|error| {
        let code = if crate::durable::with_causes(&error).contains("length limit") {
            ProblemCode::TooLarge
        } else {
            ProblemCode::InvalidInput
        };
        Problem::new(code, format!("the body can't be read: {error}"))
    })?;
    let text: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
    serde_json::from_slice(text).map_err(|error| invalid("the body", &error))
}

fn invalid(what: &str, error: &dyn std::fmt::Display) -> Problem {
    Problem::new(ProblemCode::InvalidInput, format!("{what} can't be read: {error}"))
}

fn json_response<T: Serialize>(status: StatusCode, value: &T) -> Response {
    let text = serde_json::to_vec(value).expect("replies of the contract are plain data");
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn render(problem: &Problem) -> Response {
    let status =
        StatusCode::from_u16(problem.code.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    json_response(status, problem)
}

fn caller(request: &Request) -> Result<Peer, Problem> {
    let caller = request.extensions().get::<Caller>().map(|caller| caller.peer.clone());
    caller.ok_or_else(|| Problem::new(ProblemCode::Unauthenticated, "nobody is known to have asked"))
}
