//! This terminal, handed to a guest and given back as it was.

use std::io::{self, IsTerminal, Read as _, Write as _};

use anyhow::Context as _;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::sync::mpsc;

use crate::exit::Failure;

/// Ctrl-]: what telnet and virsh leave with.
const LEAVE: u8 = 0x1d;
/// How many pieces of typing may wait for a slow connection; then the typist waits.
const INPUT_QUEUE: usize = 64;

/// Something typed.
#[derive(Debug, PartialEq, Eq)]
pub enum Input {
    /// For the guest.
    Bytes(Vec<u8>),
    /// The user wants to leave.
    Leave,
}

/// The terminal in raw mode; dropping it puts it back.
pub struct Terminal {
    before: Option<Termios>,
}

impl Terminal {
    /// Takes the terminal. When standard input is none (a script), there is nothing to take and to put back.
    ///
    /// # Errors
    /// When the terminal refuses.
    pub fn take() -> Result<Self, Failure> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(Self { before: None });
        }
        let before = tcgetattr(&stdin).context("the terminal's settings can't be read")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Flush, &raw).context("the terminal can't be made raw")?;
        restore_on_signals(before.clone());
        Ok(Self { before: Some(before) })
    }

    /// Shows what the guest wrote.
    ///
    /// # Errors
    /// When nobody reads any more.
    pub fn show(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(|_| Failure::OutputClosed)
    }

    /// Says something of our own in between.
    pub fn remark(&self, text: &str) {
        let end = if self.before.is_some() { "\r\n" } else { "\n" };
        eprint!("{end}[{text}]{end}");
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            give_back(before);
        }
    }
}

fn give_back(before: &Termios) {
    // Nothing more can be done when this fails: the terminal has gone.
    let _ = tcsetattr(io::stdin(), OptionalActions::Now, before);
    eprintln!();
}

/// A signal ends the process without dropping anything, so it gets a handler while the terminal is ours.
fn restore_on_signals(before: Termios) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut terminate), Ok(mut hang_up)) =
        (signal(SignalKind::terminate()), signal(SignalKind::hangup()))
    else {
        return;
    };
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = hang_up.recv() => {}
        }
        give_back(&before);
        // What shells report for SIGTERM.
        std::process::exit(143);
    });
}

/// Reads what is typed, in a thread of its own: a read of a terminal can't be given up, and must not hold the runtime.
pub fn read_input() -> mpsc::Receiver<Input> {
    let (sender, receiver) = mpsc::channel(INPUT_QUEUE);
    let may_leave = io::stdin().is_terminal();
    std::thread::spawn(move || {
        let mut buffer = [0; 1024];
        while let Ok(read @ 1..) = io::stdin().lock().read(&mut buffer) {
            for input in split(&buffer[..read], may_leave) {
                if sender.blocking_send(input).is_err() {
                    return;
                }
            }
        }
    });
    receiver
}

/// What was typed before the key that leaves, and whether that key was typed. In a script's bytes no key is special.
fn split(bytes: &[u8], may_leave: bool) -> Vec<Input> {
    let end = if may_leave { bytes.iter().position(|byte| *byte == LEAVE) } else { None };
    let mut inputs = Vec::new();
    let before = &bytes[..end.unwrap_or(bytes.len())];
    if !before.is_empty() {
        inputs.push(Input::Bytes(before.to_vec()));
    }
    if end.is_some() {
        inputs.push(Input::Leave);
    }
    inputs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_one_key_leaves_and_only_on_a_terminal() {
        assert_eq!(split(b"ls\r\x03", true), [Input::Bytes(b"ls\r\x03".to_vec())]);
        assert_eq!(split(b"ls\x1dmore", true), [Input::Bytes(b"ls".to_vec()), Input::Leave]);
        assert_eq!(split(b"\x1d", true), [Input::Leave]);
        assert_eq!(split(b"a\x1db", false), [Input::Bytes(b"a\x1db".to_vec())]);
    }
}
