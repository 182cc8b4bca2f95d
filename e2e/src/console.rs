//! `berth vm console` as somebody who types and reads.

use std::io::{Read, Write};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::berth::Berth;

/// How long an answer may take: a viewer that lost its host looks for the VM again and again.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// How often the same is typed until it is answered: what is typed while nobody is attached goes nowhere.
const TYPE_AGAIN: Duration = Duration::from_secs(2);

/// One who looks at a console; dropped, the command is ended.
#[derive(Debug)]
pub struct Console {
    viewer: Child,
    seen: Arc<Mutex<Vec<u8>>>,
}

impl Console {
    /// Attaches to a VM's console.
    ///
    /// # Errors
    /// When the command can't be started.
    pub fn attach(berth: &Berth, vm: &str) -> Result<Self> {
        let mut command = berth.command(&["vm", "console", vm]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut viewer = command.spawn().context("starting berth vm console")?;
        let mut output = viewer.stdout.take().context("its output")?;
        let seen = Arc::new(Mutex::new(Vec::new()));
        let shown = Arc::clone(&seen);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(read @ 1..) = output.read(&mut buffer) {
                shown.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&buffer[..read]);
            }
        });
        Ok(Self { viewer, seen })
    }

    /// Everything that was shown so far.
    pub fn seen(&self) -> String {
        String::from_utf8_lossy(&self.seen.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    /// Has the guest's shell work something out, and waits until the answer is shown. `word` must be new.
    ///
    /// # Errors
    /// When the viewer has ended, or no answer comes in time.
    pub fn ask(&mut self, word: &str) -> Result<()> {
        self.type_until(&format!("echo $((40 + 2))-{word}"), &format!("42-{word}"))
    }

    /// Types a command until this is shown, which must not stand in the command itself.
    ///
    /// # Errors
    /// When the viewer has ended, or it is not shown in time.
    pub fn type_until(&mut self, command: &str, wanted: &str) -> Result<()> {
        let typed = format!("{command}\n");
        let end = Instant::now() + ANSWER_LIMIT;
        let mut type_at = Instant::now();
        while !self.seen().contains(wanted) {
            if let Some(status) = self.viewer.try_wait()? {
                bail!("the viewer of the console has ended ({status}) having shown {:?}", self.seen());
            }
            if Instant::now() >= end {
                bail!("no answer to {typed:?} on the console, which showed {:?}", self.seen());
            }
            if Instant::now() >= type_at {
                let input = self.viewer.stdin.as_mut().context("its input")?;
                input.write_all(typed.as_bytes()).and_then(|()| input.flush()).context("typing")?;
                type_at = Instant::now() + TYPE_AGAIN;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.viewer.kill();
        let _ = self.viewer.wait();
    }
}
