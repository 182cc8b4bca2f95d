//! A VM's serial console: the newest output is kept for who comes late, and shown to many at once.
//!
//! It belongs to the VM and not to a process of it: a viewer stays while the VM is restarted or restored under it. When
//! the VM is no longer this host's, viewers are told by the end of their output ([`Console::hang_up`]), so that they look
//! for it where it is now.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{broadcast, mpsc};

use crate::launcher::{Duplex, Launcher, Socket};

/// How much output is kept, in bytes. Less: who comes late sees less of a boot or a panic. More: memory for each VM.
pub const KEPT_BYTES_MAX: usize = 64 * 1024;
/// Pieces of output that may wait for one viewer; one that is slower loses the oldest, and keeps the rest.
const WAITING_PIECES_MAX: usize = 256;
/// Pieces of input that may wait for the guest. A guest that does not read loses what is typed after that.
const WAITING_INPUTS_MAX: usize = 64;
/// How long output is gathered before it is shown. Guests write single characters; shown one by one, they would be a
/// message each. Longer: what is typed comes back late.
const GATHER: Duration = Duration::from_millis(10);
/// Pause before a lost connection is made anew.
const RETRY: Duration = Duration::from_millis(500);

/// A VM's console.
#[derive(Debug)]
pub struct Console {
    shown: Mutex<Shown>,
    input: mpsc::Sender<Bytes>,
    /// Whoever carries input to the present process holds this.
    typed: tokio::sync::Mutex<mpsc::Receiver<Bytes>>,
}

#[derive(Debug)]
struct Shown {
    kept: VecDeque<u8>,
    viewers: broadcast::Sender<Bytes>,
}

/// One who looks at a console.
#[derive(Debug)]
pub struct Viewer {
    /// What was there before.
    pub kept: Bytes,
    /// What comes.
    pub output: broadcast::Receiver<Bytes>,
    /// Where what is typed goes.
    pub input: mpsc::Sender<Bytes>,
}

impl Default for Console {
    fn default() -> Self {
        let (input, typed) = mpsc::channel(WAITING_INPUTS_MAX);
        let viewers = broadcast::Sender::new(WAITING_PIECES_MAX);
        let shown = Mutex::new(Shown { kept: VecDeque::new(), viewers });
        Self { shown, input, typed: tokio::sync::Mutex::new(typed) }
    }
}

impl Console {
    /// Begins to look: nothing is missing between what was kept and what comes.
    pub fn attach(&self) -> Viewer {
        let mut shown = self.lock();
        let kept = Bytes::copy_from_slice(shown.kept.make_contiguous());
        Viewer { kept, output: shown.viewers.subscribe(), input: self.input.clone() }
    }

    /// Ends what all present viewers see, once they have seen what was shown so far. Who attaches later is none of them.
    pub fn hang_up(&self) {
        self.lock().viewers = broadcast::Sender::new(WAITING_PIECES_MAX);
    }

    /// Carries output and input between the VM's present process and the viewers, until it is dropped.
    pub async fn run(self: Arc<Self>, launcher: Arc<dyn Launcher>, run_dir: PathBuf) {
        let mut typed = self.typed.lock().await;
        loop {
            if let Ok(mut stream) = launcher.connect(&run_dir, Socket::Console).await {
                self.carry(&mut stream, &mut typed).await;
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn carry(&self, stream: &mut Box<dyn Duplex>, typed: &mut mpsc::Receiver<Bytes>) {
        let mut buffer = [0u8; 2048];
        let mut next_read = tokio::time::Instant::now();
        loop {
            let gathered = async {
                tokio::time::sleep_until(next_read).await;
                stream.read(&mut buffer).await
            };
            tokio::select! {
                read = gathered => match read {
                    Ok(0) | Err(_) => return,
                    Ok(count) => {
                        self.show(&buffer[..count]);
                        next_read = tokio::time::Instant::now() + GATHER;
                    }
                },
                input = typed.recv() => {
                    let Some(input) = input else { return };
                    if stream.write_all(&input).await.is_err() {
                        return;
                    }
                }
            }
        }
    }

    fn show(&self, output: &[u8]) {
        let mut shown = self.lock();
        shown.kept.extend(output);
        let excess = shown.kept.len().saturating_sub(KEPT_BYTES_MAX);
        shown.kept.drain(..excess);
        // Nobody may be looking.
        let _ = shown.viewers.send(Bytes::copy_from_slice(output));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_comes_late_sees_the_newest_output_and_then_what_comes() {
        let console = Console::default();
        for _ in 0..40 {
            console.show(&[b'a'; 2048]);
        }
        console.show(b"end");
        let mut viewer = console.attach();
        assert_eq!(viewer.kept.len(), KEPT_BYTES_MAX);
        assert!(viewer.kept.ends_with(b"end"));
        console.show(b"more");
        assert_eq!(viewer.output.recv().await.expect("output"), "more");
    }

    #[tokio::test]
    async fn a_viewer_that_is_hung_up_on_sees_what_was_shown_and_then_the_end() {
        let console = Console::default();
        let mut viewer = console.attach();
        console.show(b"last words");
        console.hang_up();
        console.show(b"of another");
        assert_eq!(viewer.output.recv().await.expect("output"), "last words");
        assert_eq!(viewer.output.recv().await, Err(broadcast::error::RecvError::Closed));
        let mut later = console.attach();
        console.show(b"more");
        assert_eq!(later.output.recv().await.expect("output"), "more");
    }

    #[tokio::test]
    async fn a_write_blocked_by_the_guest_does_not_stop_the_output_of_others() {
        let console = Arc::new(Console::default());
        let (mut guest, ours) = tokio::io::duplex(16);
        let mut viewer = console.attach();
        let carrying = tokio::spawn({
            let console = Arc::clone(&console);
            async move {
                let mut stream: Box<dyn Duplex> = Box::new(ours);
                let mut typed = console.typed.lock().await;
                console.carry(&mut stream, &mut typed).await;
            }
        });
        viewer.input.send("hello".into()).await.expect("typed");
        let mut heard = [0u8; 5];
        guest.read_exact(&mut heard).await.expect("heard");
        guest.write_all(&heard).await.expect("echo");
        assert_eq!(viewer.output.recv().await.expect("output"), "hello");
        drop(guest);
        carrying.await.expect("ends with the guest");
    }
}
