//! One connection to one QEMU, shared by many callers.
//!
//! A background task owns the socket; a [`Qmp`] is a handle to it. Commands are sent without waiting for earlier
//! answers, and a caller that stops waiting harms nobody: a command not yet sent is dropped, the answer to one that was
//! sent is thrown away. Reading goes on while writing is blocked, otherwise both sides could wait for each other.
//!
//! Two of QEMU's habits shape what is sent when. It keeps only the descriptors that came last, so a command with
//! descriptors waits until the one before it was answered. And it stops reading, out-of-band commands included, when
//! eight commands are queued, so fewer than that are under way at a time.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};

use crate::codec::{CommandFailure, Decoder, Greeting, LINE_BYTES_MAX, Message};
use crate::commands::Command;
use crate::error::{CloseReason, QmpError};
use crate::session::{Incoming, Negotiated, ProtocolError, Ready, Unopened};
use crate::subscription::{Events, Subscribers};
use crate::transport::{self, Reader, Writer};

/// Commands under way at a time. QEMU stops reading at eight queued; lower costs round trips only.
const IN_FLIGHT_MAX: usize = 7;

/// How to connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectOptions {
    /// How long the greeting and negotiation may take. QEMU serves one client a socket: another one there looks
    /// like a greeting that never comes.
    pub connect_timeout: Duration,
    /// How long a command may take unless [`Qmp::call_within`] says otherwise. QEMU answers most in under a
    /// millisecond, `device_del`, `nbd-server-stop` or a blocked disk take longer.
    pub command_timeout: Duration,
    /// The longest line accepted, in bytes.
    pub line_bytes_max: usize,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            command_timeout: Duration::from_secs(30),
            line_bytes_max: LINE_BYTES_MAX,
        }
    }
}

/// A handle to one QEMU. Clones share the connection, which ends when the last one is dropped.
#[derive(Debug, Clone)]
pub struct Qmp {
    requests: mpsc::UnboundedSender<Request>,
    subscribers: Arc<Subscribers>,
    closed: watch::Receiver<Option<CloseReason>>,
    greeting: Arc<Greeting>,
    command_timeout: Duration,
}

type Outcome = Result<Value, CommandFailure>;

#[derive(Debug)]
struct Request {
    name: Cow<'static, str>,
    arguments: Value,
    out_of_band: bool,
    descriptors: Vec<OwnedFd>,
    answer: oneshot::Sender<Result<Outcome, QmpError>>,
}

impl Qmp {
    /// Connects to the QMP socket at `path`.
    ///
    /// # Errors
    /// [`QmpError::Connect`] when nobody listens there; [`QmpError::TimedOut`] when nobody greets in time.
    pub async fn connect(path: impl AsRef<Path>) -> Result<Self, QmpError> {
        Ok(Self::connect_with(path, ConnectOptions::default()).await?.0)
    }

    /// As [`Self::connect`], with options, and with a subscription that has every event since the negotiation.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub async fn connect_with(
        path: impl AsRef<Path>,
        options: ConnectOptions,
    ) -> Result<(Self, Events), QmpError> {
        let path = path.as_ref();
        let stream = UnixStream::connect(path)
            .await
            .map_err(|source| QmpError::Connect { path: path.to_owned(), source })?;
        Self::over_unix(stream, options).await
    }

    /// Speaks over a connected unix socket, such as one end of a socket pair that QEMU was started with.
    ///
    /// # Errors
    /// [`QmpError`] when the negotiation fails.
    pub async fn over_unix(stream: UnixStream, options: ConnectOptions) -> Result<(Self, Events), QmpError> {
        Self::open(transport::unix(stream), options).await
    }

    /// Speaks over anything, such as [`tokio::io::duplex`] to a fake QEMU. Descriptors cannot be sent so.
    ///
    /// # Errors
    /// [`QmpError`] when the negotiation fails.
    pub async fn over_stream<S>(stream: S, options: ConnectOptions) -> Result<(Self, Events), QmpError>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        Self::open(transport::plain(stream), options).await
    }

    async fn open(
        (reader, writer): (Reader, Writer),
        options: ConnectOptions,
    ) -> Result<(Self, Events), QmpError> {
        let subscribers = Arc::new(Subscribers::new());
        let events = subscribers.subscribe();
        let mut wire = Wire { reader, writer, decoder: Decoder::new(options.line_bytes_max) };
        let session = tokio::time::timeout(options.connect_timeout, negotiate(&mut wire, &subscribers))
            .await
            .map_err(|_| timed_out("connect".into(), options.connect_timeout))??;
        let greeting = Arc::new(session.greeting().clone());
        let (requests, inbox) = mpsc::unbounded_channel();
        let (closing, closed) = watch::channel(None);
        let task = Task {
            wire,
            session,
            inbox,
            waiting: VecDeque::new(),
            sending: VecDeque::new(),
            descriptors_under_way: false,
            subscribers: Arc::clone(&subscribers),
        };
        tokio::spawn(task.run(closing));
        let qmp = Self { requests, subscribers, closed, greeting, command_timeout: options.command_timeout };
        Ok((qmp, events))
    }

    /// What QEMU said of itself. For logs; ask [`crate::Abilities`] before relying on anything.
    #[must_use]
    pub fn greeting(&self) -> &Greeting {
        &self.greeting
    }

    /// Sends a command and waits for its answer.
    ///
    /// # Errors
    /// [`QmpError`], which tells refusals from a lost connection.
    pub async fn call<C: Command>(&self, command: C) -> Result<C::Reply, QmpError> {
        self.call_full(command, Vec::new(), self.command_timeout).await
    }

    /// As [`Self::call`], waiting no longer than `timeout`.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub async fn call_within<C: Command>(&self, command: C, timeout: Duration) -> Result<C::Reply, QmpError> {
        self.call_full(command, Vec::new(), timeout).await
    }

    /// Sends a command together with file descriptors, which QEMU gets duplicates of; ours are closed.
    ///
    /// # Errors
    /// As [`Self::call`], and [`QmpError::DescriptorsUnsupported`] where the transport is no unix socket.
    pub async fn call_with_fds<C: Command>(
        &self,
        command: C,
        fds: Vec<OwnedFd>,
    ) -> Result<C::Reply, QmpError> {
        self.call_full(command, fds, self.command_timeout).await
    }

    /// Sends a command that this crate does not name.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub async fn call_untyped(&self, name: &str, arguments: Value) -> Result<Value, QmpError> {
        let name = Cow::Owned(name.to_owned());
        self.exchange(name, arguments, false, Vec::new(), self.command_timeout).await
    }

    /// Subscribes to events. Everything that QEMU says because of a command sent after this call will be in it.
    #[must_use]
    pub fn events(&self) -> Events {
        self.subscribers.subscribe()
    }

    /// Waits until the connection is gone, which is how QEMU's death shows, and says how it ended.
    pub async fn closed(&self) -> CloseReason {
        let mut closed = self.closed.clone();
        match closed.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or(CloseReason::PeerGone),
            // The task is gone without a word: the runtime is shutting down.
            Err(_) => CloseReason::Unused,
        }
    }

    /// Whether the connection is gone already.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed.borrow().is_some()
    }

    async fn call_full<C: Command>(
        &self,
        command: C,
        fds: Vec<OwnedFd>,
        timeout: Duration,
    ) -> Result<C::Reply, QmpError> {
        let name = Cow::Borrowed(C::NAME);
        let arguments = serde_json::to_value(&command)
            .map_err(|source| QmpError::Arguments { command: name.clone(), source })?;
        let reply = self.exchange(name.clone(), arguments, C::OUT_OF_BAND, fds, timeout).await?;
        serde_json::from_value(reply).map_err(|source| QmpError::Reply { command: name, source })
    }

    async fn exchange(
        &self,
        name: Cow<'static, str>,
        arguments: Value,
        out_of_band: bool,
        descriptors: Vec<OwnedFd>,
        timeout: Duration,
    ) -> Result<Value, QmpError> {
        let (answer, answered) = oneshot::channel();
        let request = Request { name: name.clone(), arguments, out_of_band, descriptors, answer };
        if self.requests.send(request).is_err() {
            return Err(self.closed().await.into());
        }
        let outcome = match tokio::time::timeout(timeout, answered).await {
            Err(_) => return Err(timed_out(name, timeout)),
            Ok(Err(_)) => return Err(self.closed().await.into()),
            Ok(Ok(outcome)) => outcome?,
        };
        outcome.map_err(|CommandFailure { class, desc }| QmpError::Command { command: name, class, desc })
    }
}

fn timed_out(command: Cow<'static, str>, waited: Duration) -> QmpError {
    QmpError::TimedOut { command, waited_ms: u64::try_from(waited.as_millis()).unwrap_or(u64::MAX) }
}

struct Wire {
    reader: Reader,
    writer: Writer,
    decoder: Decoder,
}

impl Wire {
    /// The next message; may be dropped and called again.
    async fn message(&mut self) -> Result<Message, CloseReason> {
        loop {
            if let Some(message) = self.decoder.next_message().map_err(protocol)? {
                return Ok(message);
            }
            read_more(&mut self.reader, &mut self.decoder).await?;
        }
    }
}

async fn read_more(reader: &mut Reader, decoder: &mut Decoder) -> Result<(), CloseReason> {
    match reader.read_buf(decoder.buffer_mut()).await {
        Ok(0) => Err(CloseReason::PeerGone),
        Ok(_) => Ok(()),
        Err(error) => Err(io_reason(&error)),
    }
}

fn protocol(error: impl Into<ProtocolError>) -> CloseReason {
    CloseReason::Protocol(error.into())
}

fn io_reason(error: &io::Error) -> CloseReason {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => CloseReason::PeerGone,
        _ => CloseReason::Io { detail: error.to_string() },
    }
}

type Asked = (Request, bool);

async fn negotiate(wire: &mut Wire, subscribers: &Subscribers) -> Result<Ready<Asked>, CloseReason> {
    let (mut negotiating, line) = Unopened.on_message(wire.message().await?).map_err(protocol)?;
    let mut rest = line.as_slice();
    while !rest.is_empty() {
        let written =
            wire.writer.write_some(rest, &mut Vec::new()).await.map_err(|error| io_reason(&error))?;
        rest = &rest[written..];
    }
    loop {
        match negotiating.on_message(wire.message().await?).map_err(protocol)? {
            Negotiated::Done(ready) => return Ok(ready),
            Negotiated::Still(still, event) => {
                subscribers.publish(&event);
                negotiating = still;
            }
        }
    }
}

/// A line on its way out.
struct Outgoing {
    line: Vec<u8>,
    written: usize,
    descriptors: Vec<OwnedFd>,
}

/// The owner of the socket.
struct Task {
    wire: Wire,
    session: Ready<Asked>,
    inbox: mpsc::UnboundedReceiver<Request>,
    /// Asked for, not yet given an id.
    waiting: VecDeque<Request>,
    /// Given an id, not yet wholly written.
    sending: VecDeque<Outgoing>,
    descriptors_under_way: bool,
    subscribers: Arc<Subscribers>,
}

impl Task {
    async fn run(mut self, closing: watch::Sender<Option<CloseReason>>) {
        let Err(reason) = self.serve().await;
        tracing::debug!(%reason, "QMP connection closed");
        // The reason comes first: whoever finds the channels closed asks for it.
        closing.send_replace(Some(reason));
        self.subscribers.close();
    }

    async fn serve(&mut self) -> Result<std::convert::Infallible, CloseReason> {
        loop {
            while let Some(message) = self.wire.decoder.next_message().map_err(protocol)? {
                self.take(message)?;
            }
            self.submit_waiting();
            let Wire { reader, writer, decoder } = &mut self.wire;
            let sending = &mut self.sending;
            tokio::select! {
                read = read_more(reader, decoder) => read?,
                written = write_front(writer, sending), if !sending.is_empty() => written?,
                request = self.inbox.recv() => match request {
                    Some(request) => self.enqueue(request),
                    None => return Err(self.finish_sending().await),
                },
            }
        }
    }

    fn take(&mut self, message: Message) -> Result<(), CloseReason> {
        match self.session.on_message(message).map_err(protocol)? {
            Incoming::Event(event) => self.subscribers.publish(&event),
            Incoming::Stray(id) => tracing::warn!(?id, "QEMU answered what was not asked"),
            Incoming::Reply((request, with_descriptors), outcome) => {
                self.descriptors_under_way &= !with_descriptors;
                // The caller may have stopped waiting; then nobody wants the answer.
                let _ = request.answer.send(Ok(outcome));
            }
        }
        Ok(())
    }

    fn enqueue(&mut self, request: Request) {
        if !request.descriptors.is_empty() && !self.wire.writer.passes_descriptors() {
            let error = QmpError::DescriptorsUnsupported { command: request.name };
            let _ = request.answer.send(Err(error));
        } else if request.out_of_band {
            self.waiting.push_front(request);
        } else {
            self.waiting.push_back(request);
        }
    }

    /// Moves on what may be sent now; see the module's head for what may not.
    fn submit_waiting(&mut self) {
        while let Some(next) = self.waiting.front() {
            let room = next.out_of_band || self.session.in_flight() < IN_FLIGHT_MAX;
            let descriptors_free = next.descriptors.is_empty() || !self.descriptors_under_way;
            let abandoned = next.answer.is_closed();
            if !abandoned && (!room || !descriptors_free) {
                return;
            }
            let Some(mut request) = self.waiting.pop_front() else { return };
            if abandoned {
                continue;
            }
            let descriptors = std::mem::take(&mut request.descriptors);
            let with_descriptors = !descriptors.is_empty();
            self.descriptors_under_way |= with_descriptors;
            let (name, arguments) = (request.name.clone(), request.arguments.take());
            let out_of_band = request.out_of_band;
            let line = self.session.submit(&name, arguments, out_of_band, (request, with_descriptors));
            self.sending.push_back(Outgoing { line, written: 0, descriptors });
        }
    }

    /// Nobody is left to hear answers: what was asked for is still sent, as far as the peer takes it at once.
    async fn finish_sending(&mut self) -> CloseReason {
        while !self.sending.is_empty() {
            let last = write_front(&mut self.wire.writer, &mut self.sending);
            match tokio::time::timeout(Duration::from_millis(100), last).await {
                Ok(Ok(())) => {}
                Ok(Err(reason)) => return reason,
                Err(_) => break,
            }
        }
        CloseReason::Unused
    }
}

/// Writes some of the first line. Nothing is lost when the future is dropped.
async fn write_front(writer: &mut Writer, sending: &mut VecDeque<Outgoing>) -> Result<(), CloseReason> {
    let Some(front) = sending.front_mut() else { return Ok(()) };
    let rest = &front.line[front.written..];
    let written = writer.write_some(rest, &mut front.descriptors).await;
    front.written += written.map_err(|error| io_reason(&error))?;
    if front.written == front.line.len() {
        sending.pop_front();
    }
    Ok(())
}
