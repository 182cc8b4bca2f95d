//! One connection: two ends in memory, and a state that both look at before they do anything.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};

use super::Link;

/// What is on its way before a writer has to wait, in bytes.
const BUFFER_BYTES: usize = 16 << 10;

/// How a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Up,
    /// Nothing moves.
    Silent,
    /// Both ends are told that it is over.
    Broken,
}

/// What both ends share.
#[derive(Debug)]
pub(super) struct Wire {
    pub(super) link: Link,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    state: State,
    /// Who waits: reader and writer of either end.
    waiting: [Option<Waker>; 4],
}

/// One end.
#[derive(Debug)]
pub(super) struct WireEnd {
    wire: Arc<Wire>,
    stream: DuplexStream,
    side: usize,
}

/// A connection over a link that is up.
pub(super) fn pair(link: Link) -> (Arc<Wire>, WireEnd, WireEnd) {
    let inner = Mutex::new(Inner { state: State::Up, waiting: Default::default() });
    let wire = Arc::new(Wire { link, inner });
    let (one, other) = tokio::io::duplex(BUFFER_BYTES);
    let end = |stream, side| WireEnd { wire: Arc::clone(&wire), stream, side };
    (Arc::clone(&wire), end(one, 0), end(other, 2))
}

impl Wire {
    /// Nothing is up again that was broken.
    pub(super) fn set(&self, state: State) {
        let woken = {
            let mut inner = self.lock();
            if inner.state != State::Broken {
                inner.state = state;
            }
            std::mem::take(&mut inner.waiting)
        };
        woken.into_iter().flatten().for_each(Waker::wake);
    }

    /// Whether something may move now; if not, whoever asks is woken when that changes.
    fn poll(&self, slot: usize, context: &Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.lock();
        match &mut inner.waiting[slot] {
            Some(waker) => waker.clone_from(context.waker()),
            empty => *empty = Some(context.waker().clone()),
        }
        match inner.state {
            State::Up => Poll::Ready(Ok(())),
            State::Silent => Poll::Pending,
            State::Broken => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsyncRead for WireEnd {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        std::task::ready!(self.wire.poll(self.side, context))?;
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for WireEnd {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        std::task::ready!(self.wire.poll(self.side + 1, context))?;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        std::task::ready!(self.wire.poll(self.side + 1, context))?;
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
