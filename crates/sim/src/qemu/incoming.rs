//! Taking a machine in.

use std::io;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::guest::{Guest, Memory};
use super::stream::{LoadError, Loader, SHUT};
use super::{Machine, Phase, Refusal, RunState, Shared, ended_by_itself};
use crate::oracle::Origin;

/// `migrate-incoming`.
pub(super) fn begin(
    shared: &Arc<Shared>,
    machine: &mut Machine,
    arguments: &Value,
) -> Result<Value, Refusal> {
    if machine.state != RunState::InMigrate || machine.migration.status.is_some() {
        return Err(Refusal::new("The incoming migration has already been started"));
    }
    let stream = machine.stream_of(arguments)?;
    machine.migration_is("setup");
    let shared = Arc::clone(shared);
    let runtime = shared.world.runtime.clone();
    runtime.spawn(async move {
        let over = shared.over.clone();
        tokio::select! {
            biased;
            () = over.cancelled() => {}
            () = take_in(&shared, stream) => {}
        }
    });
    Ok(json!({}))
}

async fn take_in(shared: &Arc<Shared>, stream: StdUnixStream) {
    shared.lock().migration_is("active");
    let loaded = match UnixStream::from_std(stream) {
        Ok(stream) => load(shared, stream).await,
        Err(error) => Err(LoadError::Image(error)),
    };
    let mut machine = shared.lock();
    machine.migration.closes();
    match loaded {
        Ok(memory) => wake(shared, &mut machine, memory),
        Err(error) => {
            if error.is_wrong() {
                shared.oracle().wrong(shared.vm(), format!("{}: {error}", shared.start.process));
            }
            machine.migration_failed(error.to_string());
            drop(machine);
            // Older versions end, newer ones stay.
            if shared.world.chance.one_in(2) {
                shared.end(ended_by_itself(1, format!("qemu-system-x86_64: {error}")));
            }
        }
    }
}

async fn load(shared: &Arc<Shared>, mut stream: UnixStream) -> Result<Memory, LoadError> {
    let mut loader = Loader::new(shared.memory_bytes, shared.image.as_deref())?;
    let mut buffer = vec![0; 16 << 10];
    while !loader.is_whole() {
        // What breaks off is told by the loader, as a stream that is not whole.
        let read = stream.read(&mut buffer).await.unwrap_or(0);
        if read == 0 {
            break;
        }
        loader.feed(&buffer[..read])?;
    }
    let memory = loader.finish()?;
    if shared.lock().migration.is("return-path") {
        answer(&mut stream).await;
    }
    Ok(memory)
}

/// Tells the source that all is there. One that has hung up meanwhile will not go on without the answer.
async fn answer(stream: &mut UnixStream) {
    let said: io::Result<()> = stream.write_all(&SHUT).await;
    if let Err(error) = said {
        tracing::debug!(%error, "the source has hung up");
    }
}

/// The guest is there, and stands still unless it was to run.
fn wake(shared: &Arc<Shared>, machine: &mut Machine, memory: Memory) {
    machine.guest = Guest::new(memory);
    machine.origin = if shared.image.is_some() { Origin::Image } else { Origin::Before };
    machine.state = RunState::Paused;
    if memory.ready {
        shared.phase.send_replace(Phase::Ready(memory.token));
    } else {
        shared.boot(memory.token);
    }
    machine.migration_is("completed");
    if machine.migration.run_when_loaded {
        shared.resume(machine);
    }
}
