//! The monitor: a greeting, lines of commands with descriptors, lines of answers and events.
//!
//! It is a real unix socket, if only one end of a pair: descriptors travel on nothing else.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;

use berth_qmp::codec::Decoder;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::json;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use super::Shared;

/// The longest line that is taken, in bytes.
const LINE_BYTES_MAX: usize = 1 << 20;
const DESCRIPTORS_MAX: usize = 16;

/// A connection to the monitor. It is greeted when those who came before have gone.
pub(super) fn open(shared: &Arc<Shared>) -> io::Result<StdUnixStream> {
    let (theirs, ours) = StdUnixStream::pair()?;
    theirs.set_nonblocking(true)?;
    ours.set_nonblocking(true)?;
    let runtime = shared.world.runtime.clone();
    let shared = Arc::clone(shared);
    let registered = {
        let _in_world = runtime.enter();
        UnixStream::from_std(ours)?
    };
    runtime.spawn(async move {
        let over = shared.over.clone();
        let turn = tokio::select! {
            () = over.cancelled() => return,
            turn = shared.turn.lock() => turn,
        };
        // An error is the client's having gone.
        let _ = serve(&shared, registered).await;
        shared.lock().monitor = None;
        drop(turn);
    });
    Ok(theirs)
}

async fn serve(shared: &Arc<Shared>, stream: UnixStream) -> io::Result<()> {
    let mut stream = stream;
    let (say, mut outbox) = mpsc::unbounded_channel();
    if shared.lock().hangs {
        // Whoever comes is not even greeted.
        shared.over.cancelled().await;
        return Ok(());
    }
    {
        let mut machine = shared.lock();
        machine.monitor = Some(say);
        let version = json!({"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": "sim"});
        machine.say(&json!({"QMP": {"version": version, "capabilities": ["oob"]}}));
    }
    let mut decoder = Decoder::new(LINE_BYTES_MAX);
    let mut descriptors = Vec::new();
    loop {
        tokio::select! {
            biased;
            line = outbox.recv() => match line {
                Some(line) => stream.write_all(&line).await?,
                // It has ended; what it had to say was said.
                None => return Ok(()),
            },
            received = receive(&stream) => {
                let (bytes, mut came) = received?;
                if bytes.is_empty() {
                    return Ok(());
                }
                decoder.buffer_mut().extend_from_slice(&bytes);
                if !came.is_empty() {
                    // Those that came before and were not used are lost, as with the real one.
                    descriptors = std::mem::take(&mut came);
                }
                while let Some(line) = decoder.next_line().map_err(io::Error::other)? {
                    super::command::obey(shared, &line, &mut descriptors);
                }
            }
        }
    }
}

async fn receive(stream: &UnixStream) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    stream
        .async_io(Interest::READABLE, || {
            let mut bytes = vec![0; 16 << 10];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            let received = recvmsg(stream, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)?;
            bytes.truncate(received.bytes);
            let mut descriptors = Vec::new();
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(came) = message {
                    descriptors.extend(came);
                }
            }
            Ok((bytes, descriptors))
        })
        .await
}
