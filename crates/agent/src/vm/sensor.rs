//! Listens for the guest's word that it is ready: from the guest agent, which answers when asked, or from the probe in
//! test guests, which speaks by itself.
//!
//! What a guest says is not trusted: a line has a greatest length, an answer a greatest wait, and all that it can
//! bring about is to be taken for ready.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use berth_model::vm::{GuestState, VmState};
use berth_qmp::guest_agent::GuestAgent;
use serde::Deserialize;
use tokio::io::AsyncReadExt;
use tokio::sync::watch;

use super::status::Status;
use crate::launcher::{Duplex, Launcher, Socket};

/// How a guest agent says that its guest is ready.
pub const GUEST_AGENT: &str = "guest-agent";
/// How the probe does.
pub const PROBE: &str = "probe";

/// Longest line of the probe that is read, in bytes; longer ones are passed over.
const LINE_BYTES_MAX: usize = 4096;
/// Pause between two questions to a guest agent that does not answer. Shorter: a host with many booting guests is
/// busy with asking. Longer: a guest counts as booting for longer than it is.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// How long a guest agent may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Listens to one process's guest.
pub struct Sensor {
    /// Which process.
    pub serial: u64,
    /// Where what was heard goes.
    pub status: Arc<Status>,
    /// Opens the sockets.
    pub launcher: Arc<dyn Launcher>,
    /// Where they are.
    pub run_dir: PathBuf,
    /// Rises with each reset of the machine.
    pub resets: watch::Receiver<u64>,
}

/// What the probe says; the rest of its line is not for us.
#[derive(Debug, Deserialize)]
struct ProbeEvent {
    event: String,
    #[serde(default)]
    nonce: String,
}

impl Sensor {
    /// Listens until it is dropped.
    pub async fn run(self) {
        tokio::join!(self.listen_to_probe(), self.ask_guest_agent());
    }

    async fn listen_to_probe(&self) {
        let mut lives = Lives { resets: self.resets.clone(), of_before: None, last: None };
        loop {
            if let Ok(stream) = self.launcher.connect(&self.run_dir, Socket::Probe).await {
                self.hear_probe(stream, &mut lives).await;
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }

    async fn hear_probe(&self, mut stream: Box<dyn Duplex>, lives: &mut Lives) {
        let mut lines = Lines::default();
        let mut buffer = [0u8; 512];
        while let Ok(count @ 1..) = stream.read(&mut buffer).await {
            lines.push(&buffer[..count], |line| {
                if let Ok(event) = serde_json::from_slice::<ProbeEvent>(line)
                    && matches!(event.event.as_str(), "ready" | "tick")
                    && lives.is_of_now(event.nonce)
                {
                    self.is_ready(PROBE);
                }
            });
        }
    }

    async fn ask_guest_agent(&self) {
        let mut view = self.status.view();
        loop {
            // Nobody is asked whose answer would change nothing.
            let waits = |view: &super::status::GuestView| {
                view.guest == GuestState::Booting && view.state == VmState::Running
            };
            if view.wait_for(waits).await.is_err() {
                return;
            }
            if self.guest_agent_answers().await {
                self.is_ready(GUEST_AGENT);
            } else {
                tokio::time::sleep(ASK_AGAIN).await;
            }
        }
    }

    async fn guest_agent_answers(&self) -> bool {
        let Ok(stream) = self.launcher.connect(&self.run_dir, Socket::GuestAgent).await else { return false };
        GuestAgent::over(stream).ping(ANSWER_TIMEOUT).await.is_ok()
    }

    fn is_ready(&self, signal: &'static str) {
        if self.status.guest() == GuestState::Booting {
            self.status.guest_is(self.serial, GuestState::Ready, Some(signal));
        }
    }
}

/// Tells the lines of the guest that lives now from those of the one before a reset, which may still be on their way.
struct Lives {
    resets: watch::Receiver<u64>,
    of_before: Option<String>,
    last: Option<String>,
}

impl Lives {
    fn is_of_now(&mut self, nonce: String) -> bool {
        if self.resets.has_changed().unwrap_or(false) {
            self.resets.mark_unchanged();
            self.of_before = self.last.take();
        }
        if self.of_before.as_ref() == Some(&nonce) {
            return false;
        }
        self.last = Some(nonce);
        true
    }
}

/// Cuts what comes into lines, holding no more than one of them.
#[derive(Debug, Default)]
struct Lines {
    line: Vec<u8>,
    too_long: bool,
}

impl Lines {
    fn push(&mut self, bytes: &[u8], mut take: impl FnMut(&[u8])) {
        for &byte in bytes {
            if byte != b'\n' {
                self.too_long |= self.line.len() == LINE_BYTES_MAX;
                if !self.too_long {
                    self.line.push(byte);
                }
                continue;
            }
            if !self.too_long {
                take(&self.line);
            }
            self.line.clear();
            self.too_long = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(pieces: &[&[u8]]) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        let mut lines = Lines::default();
        for piece in pieces {
            lines.push(piece, |line| all.push(line.to_vec()));
        }
        all
    }

    #[test]
    fn a_guest_that_never_ends_its_line_costs_no_memory() {
        let flood = vec![b'x'; 100_000];
        let heard = lines(&[b"one\ntw", b"o\n", &flood, b"\nthree\n"]);
        assert_eq!(heard, [&b"one"[..], b"two", b"three"]);
    }

    #[test]
    fn a_line_from_before_a_reset_is_not_taken_for_the_new_guest() {
        let (reset, resets) = watch::channel(0);
        let mut lives = Lives { resets, of_before: None, last: None };
        assert!(lives.is_of_now("a".into()));
        reset.send_modify(|count| *count += 1);
        assert!(!lives.is_of_now("a".into()));
        assert!(!lives.is_of_now("a".into()));
        assert!(lives.is_of_now("b".into()));
    }
}
