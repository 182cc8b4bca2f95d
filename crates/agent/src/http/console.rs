//! A VM's console as a websocket: binary messages of what the guest shows, and of what is typed. It is closed when the
//! agent stops and when the VM is no longer this host's; the other side then looks for the VM anew.

use std::sync::Arc;

use axum::RequestExt;
use axum::extract::Request;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::response::Response;
use berth_api::agent::ConsoleOpen;
use berth_model::{Problem, ProblemCode};
use bytes::Bytes;
use tokio::sync::broadcast::error::RecvError;
use tokio_util::sync::CancellationToken;

use super::path;
use crate::agent::Agent;
use crate::console::Viewer;

/// Longest message that is taken, in bytes: more than anybody types or pastes at once.
const MESSAGE_BYTES_MAX: usize = 64 * 1024;

pub(super) async fn open(agent: Arc<Agent>, mut request: Request) -> Result<Response, Problem> {
    let path = path::<ConsoleOpen>(&mut request).await?;
    let handle = agent.vms().get(&path.vm).ok_or_else(|| Problem::not_found("vm", &path.vm))?;
    let upgrade = request.extract_parts::<WebSocketUpgrade>().await.map_err(|error| {
        Problem::new(ProblemCode::InvalidInput, format!("a websocket was expected: {}", error.body_text()))
    })?;
    let stopping = agent.services().stopping.clone();
    let upgrade = upgrade.max_message_size(MESSAGE_BYTES_MAX).max_frame_size(MESSAGE_BYTES_MAX);
    Ok(upgrade.on_upgrade(move |mut socket| async move {
        // How it ended is the other side's affair.
        if show(&mut socket, handle.console.attach(), stopping).await.is_ok() {
            let _ = socket.send(Message::Close(None)).await;
        }
    }))
}

async fn show(
    socket: &mut WebSocket,
    mut viewer: Viewer,
    stopping: CancellationToken,
) -> Result<(), axum::Error> {
    if !viewer.kept.is_empty() {
        socket.send(Message::Binary(std::mem::take(&mut viewer.kept))).await?;
    }
    loop {
        tokio::select! {
            output = viewer.output.recv() => match output {
                Ok(output) => socket.send(Message::Binary(output)).await?,
                // A viewer that is too slow misses something and sees what comes.
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return Ok(()),
            },
            message = socket.recv() => match message {
                Some(Ok(Message::Binary(typed))) => type_in(&viewer, typed),
                Some(Ok(Message::Text(typed))) => type_in(&viewer, typed.into()),
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(Message::Close(_))) | None => return Ok(()),
                Some(Err(error)) => return Err(error),
            },
            () = stopping.cancelled() => return Ok(()),
        }
    }
}

fn type_in(viewer: &Viewer, typed: Bytes) {
    // A guest that does not read its console loses what is typed: the viewer is not made to wait for it.
    let _ = viewer.input.try_send(typed);
}
