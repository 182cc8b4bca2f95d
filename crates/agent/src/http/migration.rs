//! Where another host's agent connects to send a VM.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use berth_api::agent::{MigrationSide, PeerMigrationOpen};
use berth_api::pki::Peer;
use berth_model::{OperationId, Problem, ProblemCode, VmId};
use http::{HeaderValue, StatusCode, header};
use hyper_util::rt::TokioIo;
use tokio_util::sync::CancellationToken;

use super::{caller, path};
use crate::agent::Agent;
use crate::vm::actor::{Job, Receive};

pub(super) async fn open(agent: Arc<Agent>, mut request: Request) -> Result<Response, Problem> {
    let path = path::<PeerMigrationOpen>(&mut request).await?;
    let Peer::Host(peer) = caller(&request)? else {
        return Err(Problem::new(ProblemCode::NotAllowed, "only another host sends a VM"));
    };
    let vm =
        expected(&agent, &path.migration).ok_or_else(|| Problem::not_found("migration", &path.migration))?;
    let wanted = HeaderValue::from_static(crate::migration::wire::UPGRADE);
    let upgrade = request.extensions_mut().remove::<hyper::upgrade::OnUpgrade>();
    let upgrade = upgrade
        .filter(|_| request.headers().get(header::UPGRADE) == Some(&wanted))
        .ok_or_else(|| Problem::field("upgrade", "", crate::migration::wire::UPGRADE))?;
    let vms = Arc::clone(agent.vms());
    tokio::spawn(async move {
        match upgrade.await {
            Ok(upgraded) => {
                let receive = Receive {
                    migration: path.migration,
                    peer,
                    connection: TokioIo::new(upgraded),
                    decided: CancellationToken::new(),
                };
                vms.submit(&vm, Job::Receive(receive));
            }
            Err(error) => tracing::warn!(%error, "a connection for a migration broke off"),
        }
    });
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, wanted);
    Ok(response)
}

/// The VM that is expected by this migration.
fn expected(agent: &Agent, migration: &OperationId) -> Option<VmId> {
    let report = agent.services().board.now();
    report.vms.into_iter().find_map(|vm| match &vm.migration {
        Some(MigrationSide::Target { migration: expected, .. }) if expected == migration => Some(vm.vm),
        _ => None,
    })
}
