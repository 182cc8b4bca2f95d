//! The connection between two agents in use: a task reads it and hands each frame to where it belongs; whoever has
//! something to say writes to it, one frame at a time.
//!
//! QEMU's stream goes through the reading task itself, from the network into QEMU's socket, so a QEMU that is slow to
//! load slows the sender down, and nothing piles up in between. As little as possible is kept in flight: QEMU counts
//! what it has handed out as sent, and what is still on its way when the guest stops is pause.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use berth_api::Client;
use berth_model::{Problem, ProblemCode};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use rustix::net::sockopt;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::task::JoinHandle;

use super::wire::{Frame, FrameReader, FrameWriter, STREAM_FRAME_BYTES_MAX, WireError};
use crate::durable::with_causes;
use crate::launcher::Duplex;

/// What the kernel may hold of what we have sent and the other side has not, in bytes. All of it comes before the last
/// page in the pause: at 1 Gbit/s this is 2 ms. Too small, and a link with a long way is not filled: 20 ms there and back
/// allow 12 MB/s.
const SEND_BUFFER_BYTES: usize = 256 << 10;
/// How long a host may stay silent while there is something to be acknowledged, before the connection is lost, in
/// milliseconds.
const SILENCE_MS: u32 = 10_000;
/// Messages that may wait to be looked at.
const MESSAGES_MAX: usize = 64;

impl From<WireError> for Problem {
    fn from(error: WireError) -> Self {
        let code = if error.is_loss() { ProblemCode::Unreachable } else { ProblemCode::Internal };
        Problem::new(code, with_causes(&error))
    }
}

type Writer = FrameWriter<WriteHalf<Box<dyn Duplex>>>;

/// The sending half; clones are the same.
#[derive(Clone)]
pub struct Sender {
    writer: Arc<Mutex<Writer>>,
    stream_bytes: Arc<AtomicU64>,
    storage_bytes: Arc<AtomicU64>,
}

impl Sender {
    /// Says something.
    ///
    /// # Errors
    /// When the connection is over.
    pub async fn say<T: Serialize>(&self, message: &T) -> Result<(), WireError> {
        self.writer.lock().await.control(message).await
    }

    /// Sends bytes of a file.
    ///
    /// # Errors
    /// When the connection is over.
    pub async fn data(&self, file: u32, offset: u64, bytes: &[u8]) -> Result<(), WireError> {
        self.storage_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.writer.lock().await.data(file, offset, bytes).await
    }

    /// Sends a range of a file that is zero.
    ///
    /// # Errors
    /// When the connection is over.
    pub async fn hole(&self, file: u32, offset: u64, length: u64) -> Result<(), WireError> {
        self.writer.lock().await.hole(file, offset, length).await
    }

    /// Says that a file is complete.
    ///
    /// # Errors
    /// When the connection is over.
    pub async fn file_end(&self, file: u32, checksum: &str) -> Result<(), WireError> {
        self.writer.lock().await.file_end(file, checksum).await
    }

    /// Closes our side.
    pub async fn close(&self) {
        self.writer.lock().await.close().await;
    }

    /// Bytes of QEMU's stream that were sent.
    pub fn stream_bytes(&self) -> u64 {
        self.stream_bytes.load(Ordering::Relaxed)
    }

    /// Bytes of files that were sent.
    pub fn storage_bytes(&self) -> u64 {
        self.storage_bytes.load(Ordering::Relaxed)
    }

    /// Sends what QEMU writes, from its socket, until it closes it: the source's way.
    pub fn send_stream(&self, from: OwnedReadHalf) -> JoinHandle<()> {
        let sender = self.clone();
        tokio::spawn(async move {
            if sender.pump(from, false).await.is_ok() {
                // If the connection is lost, its reader says so.
                let _ = sender.writer.lock().await.stream_end().await;
            }
        })
    }

    /// Sends what QEMU answers, from its socket, until it closes it: the target's way.
    pub fn send_answers(&self, from: OwnedReadHalf) -> JoinHandle<()> {
        let sender = self.clone();
        tokio::spawn(async move {
            // If the connection is lost, its reader says so.
            let _ = sender.pump(from, true).await;
        })
    }

    /// Carries what QEMU writes until it closes its socket. With the connection lost it is still read, to be thrown
    /// away: see [`Reader::run`].
    async fn pump(&self, mut from: OwnedReadHalf, answers: bool) -> Result<(), WireError> {
        let mut buffer = vec![0; STREAM_FRAME_BYTES_MAX];
        let mut carried = Ok(());
        loop {
            // A socket that QEMU has left behind ends the stream either way.
            let read = from.read(&mut buffer).await.unwrap_or(0);
            if read == 0 {
                return carried;
            }
            if carried.is_err() {
                continue;
            }
            self.stream_bytes.fetch_add(read as u64, Ordering::Relaxed);
            let mut writer = self.writer.lock().await;
            carried = if answers {
                writer.answer(&buffer[..read]).await
            } else {
                writer.stream(&buffer[..read]).await
            };
        }
    }
}

/// Takes the frames of files.
pub trait FileTaker: Send + 'static {
    /// Bytes of a file.
    fn data(
        &mut self,
        file: u32,
        offset: u64,
        bytes: &[u8],
    ) -> impl Future<Output = Result<(), WireError>> + Send;
    /// A range of a file that is zero.
    fn hole(
        &mut self,
        file: u32,
        offset: u64,
        length: u64,
    ) -> impl Future<Output = Result<(), WireError>> + Send;
    /// A file is complete.
    fn end(&mut self, file: u32, checksum: &str) -> impl Future<Output = Result<(), WireError>> + Send;
}

/// Takes no files: the source's side.
#[derive(Debug, Clone, Copy)]
pub struct NoFiles;

impl FileTaker for NoFiles {
    async fn data(&mut self, _: u32, _: u64, _: &[u8]) -> Result<(), WireError> {
        Err(unexpected("data of a file"))
    }

    async fn hole(&mut self, _: u32, _: u64, _: u64) -> Result<(), WireError> {
        Err(unexpected("a hole of a file"))
    }

    async fn end(&mut self, _: u32, _: &str) -> Result<(), WireError> {
        Err(unexpected("the end of a file"))
    }
}

fn unexpected(what: &str) -> WireError {
    WireError::Unexpected { what: what.to_owned(), expected: "nothing of the kind" }
}

/// What the other side says, in order, and how it ended.
pub struct Messages<M> {
    queue: mpsc::Receiver<Result<M, WireError>>,
    stream: Option<oneshot::Sender<OwnedWriteHalf>>,
    reader: JoinHandle<()>,
}

impl<M> Messages<M> {
    /// The next message. May be dropped and called again.
    ///
    /// # Errors
    /// How the connection ended.
    pub async fn next(&mut self) -> Result<M, WireError> {
        self.queue.recv().await.unwrap_or(Err(WireError::Closed))
    }

    /// From now on, what the other side's QEMU writes goes into this socket.
    pub fn deliver_stream(&mut self, to: OwnedWriteHalf) {
        if let Some(stream) = self.stream.take() {
            // A reader that is gone has said why.
            let _ = stream.send(to);
        }
    }
}

impl<M> Drop for Messages<M> {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// A connection in use.
pub struct Link<M> {
    /// To speak.
    pub sender: Sender,
    /// To hear.
    pub messages: Messages<M>,
}

impl<M: DeserializeOwned + Send + 'static> Link<M> {
    /// Takes a connection into use.
    pub fn open(connection: Box<dyn Duplex>, files: impl FileTaker) -> Self {
        let (read, write) = tokio::io::split(connection);
        let sender = Sender {
            writer: Arc::new(Mutex::new(FrameWriter::new(write))),
            stream_bytes: Arc::default(),
            storage_bytes: Arc::default(),
        };
        let (messages, queue) = mpsc::channel(MESSAGES_MAX);
        let (stream, given) = oneshot::channel();
        let reader =
            Reader { frames: FrameReader::new(read), messages, files, stream: Stream::Awaited(given) };
        let reader = tokio::spawn(reader.run());
        Self { sender, messages: Messages { queue, stream: Some(stream), reader } }
    }
}

enum Stream {
    Awaited(oneshot::Receiver<OwnedWriteHalf>),
    Open(OwnedWriteHalf),
    Over,
}

struct Reader<M, F> {
    frames: FrameReader<ReadHalf<Box<dyn Duplex>>>,
    messages: mpsc::Sender<Result<M, WireError>>,
    files: F,
    stream: Stream,
}

impl<M: DeserializeOwned, F: FileTaker> Reader<M, F> {
    /// Reads until the connection is over, and then keeps QEMU's socket until whoever listens lets go of it. A QEMU
    /// whose stream breaks while it sends the last part gives up by itself, and versions before 8.1 then let the guest
    /// go on without having taken its disks back, which kills it sooner or later. One that is told to give up takes
    /// them back.
    async fn run(mut self) {
        loop {
            if let Err(error) = self.step().await {
                // Nobody may listen any more.
                let _ = self.messages.send(Err(error)).await;
                return self.messages.closed().await;
            }
        }
    }

    async fn step(&mut self) -> Result<(), WireError> {
        match self.frames.next().await? {
            Frame::Control(json) => {
                let message = serde_json::from_slice(json).map_err(WireError::Message)?;
                self.messages.send(Ok(message)).await.map_err(|_| WireError::Closed)
            }
            Frame::Data { file, offset, bytes } => self.files.data(file, offset, bytes).await,
            Frame::Hole { file, offset, length } => self.files.hole(file, offset, length).await,
            Frame::FileEnd { file, checksum } => self.files.end(file, checksum).await,
            Frame::Stream(bytes) | Frame::Answer(bytes) => self.stream.write(bytes).await,
            Frame::StreamEnd => {
                self.stream = Stream::Over;
                Ok(())
            }
        }
    }
}

impl Stream {
    async fn write(&mut self, bytes: &[u8]) -> Result<(), WireError> {
        if let Self::Awaited(given) = self {
            *self = given.try_recv().map_or_else(|_| Self::Over, Self::Open);
            if matches!(self, Self::Over) {
                return Err(unexpected("a stream"));
            }
        }
        if let Self::Open(socket) = self
            && socket.write_all(bytes).await.is_err()
        {
            // QEMU has closed its end: what it says of it on its monitor is the error to tell.
            *self = Self::Over;
        }
        Ok(())
    }
}

/// A socket pair's end for use here.
///
/// # Errors
/// When the system refuses.
pub fn halves(stream: std::os::unix::net::UnixStream) -> Result<(OwnedReadHalf, OwnedWriteHalf), Problem> {
    let registered = stream.set_nonblocking(true).and_then(|()| UnixStream::from_std(stream));
    match registered {
        Ok(stream) => Ok(stream.into_split()),
        Err(error) => Err(Problem::new(ProblemCode::Internal, format!("a socket can't be used: {error}"))),
    }
}

/// Connects to the target's agent.
///
/// # Errors
/// When it can't be reached or refuses.
pub async fn connect(
    client: &Client,
    path: &berth_api::agent::MigrationPath,
) -> Result<Box<dyn Duplex>, Problem> {
    let upgraded = client
        .upgrade::<berth_api::agent::PeerMigrationOpen>(path, super::wire::UPGRADE, &[])
        .await
        .map_err(berth_api::client::ClientError::into_problem)?;
    Ok(tuned(upgraded))
}

/// Finds the TCP connection under an upgraded one and sets it up for little delay; one that is carried otherwise is
/// used as it is.
pub fn tuned(upgraded: TokioIo<Upgraded>) -> Box<dyn Duplex> {
    type Client = TokioIo<tokio_rustls::client::TlsStream<TcpStream>>;
    type Server = TokioIo<tokio_rustls::server::TlsStream<TcpStream>>;
    let upgraded = match upgraded.into_inner().downcast::<Client>() {
        Ok(parts) => {
            let tls = parts.io.into_inner();
            tune(tls.get_ref().0);
            return Box::new(Prefixed { prefix: parts.read_buf, inner: tls });
        }
        Err(upgraded) => upgraded,
    };
    match upgraded.downcast::<Server>() {
        Ok(parts) => {
            let tls = parts.io.into_inner();
            tune(tls.get_ref().0);
            Box::new(Prefixed { prefix: parts.read_buf, inner: tls })
        }
        Err(upgraded) => Box::new(TokioIo::new(upgraded)),
    }
}

fn tune(tcp: &TcpStream) {
    let result = tcp
        .set_nodelay(true)
        .and_then(|()| Ok(sockopt::set_socket_send_buffer_size(tcp, SEND_BUFFER_BYTES)?))
        .and_then(|()| Ok(sockopt::set_tcp_user_timeout(tcp, SILENCE_MS)?));
    if let Err(error) = result {
        tracing::warn!(%error, "a connection can't be set up for little delay");
    }
}

/// A connection of which something was read already.
struct Prefixed<S> {
    prefix: bytes::Bytes,
    inner: S,
}

impl<S: AsyncRead + Unpin> AsyncRead for Prefixed<S> {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        buffer: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        if !self.prefix.is_empty() {
            let take = self.prefix.len().min(buffer.remaining());
            let first = self.prefix.split_to(take);
            buffer.put_slice(&first);
            return std::task::Poll::Ready(Ok(()));
        }
        std::pin::Pin::new(&mut self.inner).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prefixed<S> {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> std::task::Poll<std::io::Result<usize>> {
        std::pin::Pin::new(&mut self.inner).poll_write(context, bytes)
    }

    fn poll_flush(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.inner).poll_shutdown(context)
    }
}
