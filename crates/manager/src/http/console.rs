//! A VM's serial console: a websocket to the caller, bridged to one to the agent of the host that runs the VM.
//!
//! The two are separate connections and only messages are passed on, so that the one to the agent can be made anew
//! while the caller's stays: after a migration, or a restart of the agent, the console goes on where the VM is now.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::FromRequestParts;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use berth_api::agent::{AgentVmPath, ConsoleOpen};
use berth_api::manager::VmConsole;
use berth_model::access::Action;
use berth_model::host::Host;
use berth_model::vm::{Vm, VmState};
use berth_model::{Problem, ProblemCode, VmId};
use bytes::Bytes;
use futures_util::{Sink, SinkExt, Stream, StreamExt};
use tokio::sync::oneshot;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::{Message as AgentMessage, Role};

use crate::auth::standing::Standing;
use crate::cluster::Cluster;
use crate::door::target::{self, TheVm};
use crate::door::{Call, Done, Door};

/// How long to wait before the agent is asked again.
const REATTACH_AFTER: Duration = Duration::from_millis(250);
/// How long the agent may be out of reach before the console is closed. Shorter than this, and a restart of an agent
/// or a long migration ends consoles; longer, and a dead host holds them.
const REATTACH_WITHIN: Duration = Duration::from_secs(60);
/// Largest message from a caller, in bytes: what a person types or pastes.
const MESSAGE_BYTES_MAX: usize = 1 << 20;

/// Mounts the routes of this file.
pub fn mount(door: Door) -> Door {
    door.mount_raw(open)
}

async fn open(mut call: Call<VmConsole, TheVm>) -> Result<Done, Problem> {
    let (cluster, vm) = (Arc::clone(call.ctx.cluster()), call.target.0.value.id.clone());
    let upgrade = WebSocketUpgrade::from_request_parts(&mut call.parts, &()).await;
    let upgrade = upgrade.map_err(|error| {
        Problem::new(ProblemCode::InvalidInput, format!("the console is a websocket: {error}"))
    })?;
    // The agent is asked first, so that what it has against it is an answer and not a connection that closes.
    let agent = attach(Arc::clone(&cluster), vm.clone()).await?;
    let resource = target::vm_resource(&cluster, &call.target.0);
    let standing = Standing::of(Arc::clone(&cluster), call.ctx.principal.clone()).while_allowed(
        Arc::clone(call.ctx.gate()),
        Action::VmConsole,
        resource,
    );
    let (hand_over, handed_over) = oneshot::channel();
    let response = upgrade.max_message_size(MESSAGE_BYTES_MAX).on_upgrade(|socket| async move {
        // Nobody waits for it any more only when the manager is stopping.
        let _ = hand_over.send(socket);
    });
    let task = Box::pin(async move {
        if let Ok(socket) = handed_over.await {
            bridge(cluster, vm, socket, agent, standing).await;
        }
    });
    Ok(Done::upgrade(response, task))
}

/// Opens the console on the host that runs the VM now.
async fn attach(cluster: Arc<Cluster>, vm: VmId) -> Result<AgentSocket, Problem> {
    let vm = cluster.records.require::<Vm>(vm.as_str())?;
    let host = match (&vm.status.host, vm.status.state) {
        (Some(host), state) if state != VmState::Stopped => cluster.records.require::<Host>(host.as_str())?,
        (_, state) => {
            let message = format!("VM {} is {state}: only a running one has a console", vm.full_name());
            return Err(Problem::new(ProblemCode::WrongState, message));
        }
    };
    let mut nonce = [0; 16];
    cluster.entropy.fill(&mut nonce);
    let headers = [("sec-websocket-version", "13".to_owned()), ("sec-websocket-key", STANDARD.encode(nonce))];
    let path = AgentVmPath { vm: vm.value.id.clone() };
    let client = cluster.agents.client(&host);
    let upgraded = client
        .upgrade::<ConsoleOpen>(&path, "websocket", &headers)
        .await
        .map_err(berth_api::ClientError::into_problem)?;
    Ok(WebSocketStream::from_raw_socket(upgraded, Role::Client, None).await)
}

type AgentSocket = WebSocketStream<hyper_util::rt::TokioIo<hyper::upgrade::Upgraded>>;

/// Who ended a stretch of the console.
enum EndedBy {
    Caller,
    Agent,
}

/// Passes on until one side ends it, or who opened it may not use it any more.
async fn bridge(cluster: Arc<Cluster>, vm: VmId, socket: WebSocket, first: AgentSocket, standing: Standing) {
    let (mut to_caller, mut from_caller) = socket.split();
    tokio::select! {
        () = pass_on(cluster, vm, &mut to_caller, &mut from_caller, first) => {}
        () = standing.ended() => {}
    }
    let _ = to_caller.send(Message::Close(None)).await;
}

async fn pass_on(
    cluster: Arc<Cluster>,
    vm: VmId,
    to_caller: &mut (impl Sink<Message> + Unpin),
    from_caller: &mut (impl Stream<Item = Result<Message, axum::Error>> + Unpin),
    first: AgentSocket,
) {
    let mut agent = Some(first);
    while let Some(attached) = agent.take() {
        let (mut to_agent, mut from_agent) = attached.split();
        let ended = tokio::select! {
            ended = typed(from_caller, &mut to_agent) => ended,
            ended = shown(&mut from_agent, to_caller) => ended,
        };
        match ended {
            EndedBy::Caller => return,
            EndedBy::Agent => agent = reattach(Arc::clone(&cluster), vm.clone()).await,
        }
    }
}

/// Tries until the VM's console is there again; none: the VM is stopped or gone, or it took too long.
async fn reattach(cluster: Arc<Cluster>, vm: VmId) -> Option<AgentSocket> {
    let deadline = tokio::time::Instant::now() + REATTACH_WITHIN;
    while tokio::time::Instant::now() < deadline {
        tokio::time::sleep(REATTACH_AFTER).await;
        match attach(Arc::clone(&cluster), vm.clone()).await {
            Ok(attached) => return Some(attached),
            Err(problem) if matches!(problem.code, ProblemCode::NotFound | ProblemCode::WrongState) => {
                let row = cluster.records.get::<Vm>(vm.as_str())?;
                // An agent may say so of a VM that is on its way; the records know whether it is over.
                if row.status.state == VmState::Stopped {
                    return None;
                }
            }
            Err(_) => {}
        }
    }
    None
}

/// Passes on what the caller types.
async fn typed(
    from: &mut (impl Stream<Item = Result<Message, axum::Error>> + Unpin),
    to: &mut (impl Sink<AgentMessage> + Unpin),
) -> EndedBy {
    loop {
        let bytes = match from.next().await {
            Some(Ok(Message::Binary(bytes))) => bytes,
            Some(Ok(Message::Text(text))) => Bytes::from(text),
            // The library answers pings by itself.
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => continue,
            Some(Ok(Message::Close(_)) | Err(_)) | None => return EndedBy::Caller,
        };
        if to.send(AgentMessage::Binary(bytes)).await.is_err() {
            return EndedBy::Agent;
        }
    }
}

/// Passes on what the guest shows.
async fn shown(
    from: &mut (impl Stream<Item = Result<AgentMessage, tokio_tungstenite::tungstenite::Error>> + Unpin),
    to: &mut (impl Sink<Message> + Unpin),
) -> EndedBy {
    loop {
        let bytes = match from.next().await {
            Some(Ok(AgentMessage::Binary(bytes))) => bytes,
            Some(Ok(AgentMessage::Text(text))) => Bytes::from(text),
            Some(Ok(AgentMessage::Ping(_) | AgentMessage::Pong(_) | AgentMessage::Frame(_))) => continue,
            Some(Ok(AgentMessage::Close(_)) | Err(_)) | None => return EndedBy::Agent,
        };
        if to.send(Message::Binary(bytes)).await.is_err() {
            return EndedBy::Caller;
        }
    }
}
