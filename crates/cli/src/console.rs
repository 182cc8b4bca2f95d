//! `berth vm console`: the guest's serial console on this terminal.
//!
//! Ctrl-] leaves. Everything else goes to the guest as it is typed, Ctrl-C too. A connection that is lost (a manager
//! that restarts, a VM that moves to another host) is made again by itself; the console's last output comes first
//! then, and of it only what was not shown yet is shown. However the command ends, the terminal is as it was before.

mod replay;
mod terminal;

use std::time::{Duration, Instant};

use berth_api::endpoint::Nothing;
use berth_api::manager::{VmConsole, VmShow};
use berth_model::ProblemCode;
use berth_model::vm::VmState;
use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::sync::mpsc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::protocol::{Message, Role, WebSocketConfig};

use crate::exit::Failure;
use crate::lookup::VmRef;
use crate::session::Session;
use replay::Shown;
use terminal::{Input, Terminal};

/// How long a console may be gone before we give up. A migration or a manager's restart is shorter.
const RETRY_LIMIT: Duration = Duration::from_secs(60);
const RETRY_INTERVAL: Duration = Duration::from_millis(300);
/// Largest message that is taken; a console's output comes in small ones, its replay in one of 64 KiB or so.
const MESSAGE_BYTES_MAX: usize = 4 << 20;

/// How one connection ended.
enum End {
    /// The user left.
    Left,
    /// It broke.
    Lost,
}

/// Connects this terminal to the console until the user leaves or the VM stops.
///
/// # Errors
/// When there is no such VM, it is not allowed, or the console can't be had any more.
pub async fn run(session: &Session, vm: &VmRef) -> Result<(), Failure> {
    let mut socket = open(session, vm).await?;
    session.output.remark(&format!("console of {vm}; Ctrl-] leaves"));
    let mut terminal = Terminal::take()?;
    let mut input = terminal::read_input();
    let mut shown = Shown::default();
    loop {
        match pump(&mut socket, &mut terminal, &mut input, &mut shown).await? {
            End::Left => break,
            End::Lost => terminal.remark("connection lost, attaching again; Ctrl-] leaves"),
        }
        match reopen(session, vm, &mut input).await {
            Ok(Some(again)) => socket = again,
            Ok(None) => break,
            Err(failure) => {
                drop(terminal);
                return Err(failure);
            }
        }
    }
    drop(terminal);
    session.output.remark(&format!("left the console of {vm}"));
    Ok(())
}

type Socket = WebSocketStream<TokioIo<Upgraded>>;

async fn open(session: &Session, vm: &VmRef) -> Result<Socket, Failure> {
    let headers = [("sec-websocket-version", "13".to_owned()), ("sec-websocket-key", generate_key())];
    let connection = session.client.upgrade::<VmConsole>(&vm.path(), "websocket", &headers).await?;
    let config = WebSocketConfig::default().max_message_size(Some(MESSAGE_BYTES_MAX));
    Ok(WebSocketStream::from_raw_socket(connection, Role::Client, Some(config)).await)
}

/// Tries until the console is there again; none: the user left, or the VM has stopped.
async fn reopen(
    session: &Session,
    vm: &VmRef,
    input: &mut mpsc::Receiver<Input>,
) -> Result<Option<Socket>, Failure> {
    let lost = Instant::now();
    loop {
        tokio::select! {
            opened = open(session, vm) => match opened {
                Ok(socket) => return Ok(Some(socket)),
                Err(failure) if lost.elapsed() > RETRY_LIMIT || !may_come_back(session, vm, &failure).await => {
                    return Err(failure);
                }
                Err(_) => {}
            },
            left = user_leaves(input) => if left { return Ok(None) },
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY_INTERVAL) => {}
            left = user_leaves(input) => if left { return Ok(None) },
        }
    }
}

/// What is typed while there is no console goes nowhere, except the wish to leave.
async fn user_leaves(input: &mut mpsc::Receiver<Input>) -> bool {
    loop {
        match input.recv().await {
            Some(Input::Leave) => return true,
            Some(Input::Bytes(_)) => {}
            // Nobody can leave any more, so this must not be the branch that is ready.
            None => std::future::pending().await,
        }
    }
}

async fn may_come_back(session: &Session, vm: &VmRef, failure: &Failure) -> bool {
    match failure.problem().map(|problem| problem.code) {
        Some(ProblemCode::NotFound | ProblemCode::NotAllowed | ProblemCode::Unauthenticated) | None => false,
        Some(ProblemCode::Unreachable) => true,
        Some(_) => match session.ask::<VmShow>(&vm.path(), &Nothing {}).await {
            Ok(vm) => vm.status.state != VmState::Stopped,
            Err(_) => true,
        },
    }
}

/// Carries bytes both ways until one side ends.
async fn pump(
    socket: &mut Socket,
    terminal: &mut Terminal,
    input: &mut mpsc::Receiver<Input>,
    shown: &mut Shown,
) -> Result<End, Failure> {
    shown.attached();
    let mut input_open = true;
    loop {
        tokio::select! {
            message = socket.next() => match message {
                Some(Ok(Message::Binary(bytes))) => terminal.show(shown.take(&bytes))?,
                Some(Ok(Message::Text(text))) => terminal.show(shown.take(text.as_bytes()))?,
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {}
                Some(Ok(Message::Close(_)) | Err(_)) | None => return Ok(End::Lost),
            },
            typed = input.recv(), if input_open => match typed {
                Some(Input::Leave) => {
                    // It is over either way.
                    let _ = socket.close(None).await;
                    return Ok(End::Left);
                }
                Some(Input::Bytes(bytes)) => {
                    if socket.send(Message::Binary(Bytes::from(bytes))).await.is_err() {
                        return Ok(End::Lost);
                    }
                }
                None => input_open = false,
            },
        }
    }
}
