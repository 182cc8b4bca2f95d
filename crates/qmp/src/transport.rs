//! What carries the bytes: a unix socket, which can carry file descriptors too, or anything in memory.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;

/// The most descriptors in one message; QEMU takes no more than 16.
pub(crate) const DESCRIPTORS_MAX: usize = 16;

pub(crate) type Reader = Box<dyn AsyncRead + Send + Unpin>;

/// The sending side.
pub(crate) enum Writer {
    /// A socket that can pass descriptors.
    Unix(OwnedWriteHalf),
    /// Anything else.
    Plain(Box<dyn AsyncWrite + Send + Unpin>),
}

pub(crate) fn unix(stream: UnixStream) -> (Reader, Writer) {
    let (read, write) = stream.into_split();
    (Box::new(read), Writer::Unix(write))
}

pub(crate) fn plain<S>(stream: S) -> (Reader, Writer)
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let (read, write) = tokio::io::split(stream);
    (Box::new(read), Writer::Plain(Box::new(write)))
}

impl Writer {
    /// Whether [`Self::write_some`] may be given descriptors.
    pub(crate) fn passes_descriptors(&self) -> bool {
        matches!(self, Self::Unix(_))
    }

    /// Writes a beginning of `bytes` and says how much; descriptors go with the first byte and are then closed here.
    /// When the future is dropped, nothing was written.
    pub(crate) async fn write_some(
        &mut self,
        bytes: &[u8],
        descriptors: &mut Vec<OwnedFd>,
    ) -> io::Result<usize> {
        let written = match self {
            Self::Unix(half) if !descriptors.is_empty() => {
                let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
                let socket: &UnixStream = half.as_ref();
                socket.async_io(Interest::WRITABLE, || send_with(socket, bytes, &borrowed)).await?
            }
            Self::Unix(half) => half.write(bytes).await?,
            Self::Plain(half) => half.write(bytes).await?,
        };
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        descriptors.clear();
        Ok(written)
    }
}

fn send_with(socket: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many file descriptors in one message"));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    Ok(sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)?)
}
