//! The sockets that lead into the guest: the serial console, the guest agent's port, the probe's.

use std::sync::Arc;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, DuplexStream};

use super::{Phase, Shared};

/// What fits into a connection before it is read, in bytes. Little: there are thousands of them.
const BUFFER_BYTES: usize = 256;

/// A socket of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Port {
    /// The serial console.
    Console,
    /// The guest agent's port.
    GuestAgent,
    /// The probe's port.
    Probe,
}

pub(super) fn open(shared: &Arc<Shared>, port: Port) -> DuplexStream {
    let (theirs, ours) = tokio::io::duplex(BUFFER_BYTES);
    let shared = Arc::clone(shared);
    let runtime = shared.world.runtime.clone();
    runtime.spawn(async move {
        let over = shared.over.clone();
        tokio::select! {
            () = over.cancelled() => {}
            // A connection ends when either side has enough of it.
            _ = serve(&shared, port, ours) => {}
        }
    });
    theirs
}

async fn serve(shared: &Arc<Shared>, port: Port, stream: DuplexStream) -> std::io::Result<()> {
    match port {
        Port::Console => console(shared, stream).await,
        Port::GuestAgent if speaks_by_agent(shared) => agent(shared, stream).await,
        Port::Probe if !speaks_by_agent(shared) => probe(shared, stream).await,
        Port::GuestAgent | Port::Probe => silence(stream).await,
    }
}

/// Which guests have an agent is decided by their VM, so that it stays so wherever they go.
fn speaks_by_agent(shared: &Shared) -> bool {
    shared.vm().as_str().bytes().fold(0, |sum: u8, byte| sum.wrapping_add(byte)).is_multiple_of(2)
}

async fn silence(mut stream: DuplexStream) -> std::io::Result<()> {
    let mut buffer = [0; 64];
    while stream.read(&mut buffer).await? > 0 {}
    Ok(())
}

async fn console(shared: &Arc<Shared>, mut stream: DuplexStream) -> std::io::Result<()> {
    stream.write_all(format!("{} says hello\r\n", shared.vm()).as_bytes()).await?;
    let mut buffer = [0; 64];
    loop {
        match stream.read(&mut buffer).await? {
            0 => return Ok(()),
            count => stream.write_all(&buffer[..count]).await?,
        }
    }
}

async fn probe(shared: &Arc<Shared>, mut stream: DuplexStream) -> std::io::Result<()> {
    let mut phase = shared.phase.subscribe();
    let mut buffer = [0; 64];
    loop {
        let now = *phase.borrow_and_update();
        if let Phase::Ready(token) = now {
            let line = json!({"event": "ready", "nonce": format!("{token:016x}")});
            stream.write_all(format!("{line}\n").as_bytes()).await?;
        }
        tokio::select! {
            changed = phase.changed() => if changed.is_err() { return Ok(()) },
            read = stream.read(&mut buffer) => if read? == 0 { return Ok(()) },
        }
    }
}

async fn agent(shared: &Arc<Shared>, stream: DuplexStream) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        if stream.read_until(b'\n', &mut line).await? == 0 {
            return Ok(());
        }
        let up = matches!(*shared.phase.borrow(), Phase::Ready(_)) && shared.lock().guest.runs();
        // The byte before a question makes an agent forget half a question.
        let text = line.iter().position(|&byte| byte == b'{').map_or(&[][..], |at| &line[at..]);
        let Ok(question) = serde_json::from_slice::<Value>(text) else { continue };
        if !up {
            // Nobody listens; what was asked is lost.
            continue;
        }
        let answer = match question["execute"].as_str() {
            Some("guest-sync-delimited") => {
                stream.write_all(&[0xff]).await?;
                json!({"return": question["arguments"]["id"]})
            }
            Some("guest-ping") => json!({"return": {}}),
            Some("guest-shutdown") => {
                shared.power_down();
                continue;
            }
            _ => json!({"error": {"class": "CommandNotFound", "desc": "not in this guest"}}),
        };
        stream.write_all(format!("{answer}\n").as_bytes()).await?;
    }
}
