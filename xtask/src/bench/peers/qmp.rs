//! A monitor as small as a bench needs: one command at a time, events kept.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// How long QEMU may take to open its monitor, and to answer a command: `savevm` answers when all is written.
const PATIENCE: Duration = Duration::from_secs(180);

/// A monitor's connection.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    /// What has come of a line that was not whole when the time was over.
    partial: Vec<u8>,
    events: Vec<Value>,
}

impl Qmp {
    /// Connects as soon as the monitor is there, and leaves negotiation.
    ///
    /// # Errors
    /// When it is not there in time, or is no monitor.
    pub fn connect(path: &Path) -> Result<Self> {
        let end = Instant::now() + PATIENCE;
        let writer = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() >= end => {
                    return Err(error).with_context(|| format!("connecting to {}", path.display()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        let reader = BufReader::new(writer.try_clone()?);
        let mut qmp = Self { reader, writer, partial: Vec::new(), events: Vec::new() };
        let greeting = qmp.read(end)?.context("no greeting from the monitor")?;
        if greeting["QMP"].is_null() {
            bail!("not a monitor: {greeting}");
        }
        qmp.command("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Carries out a command.
    ///
    /// # Errors
    /// QEMU's own, or silence.
    pub fn command(&mut self, name: &str, arguments: &Value) -> Result<Value> {
        let line = format!("{}\n", json!({"execute": name, "arguments": arguments}));
        self.writer.write_all(line.as_bytes()).with_context(|| format!("sending {name}"))?;
        let end = Instant::now() + PATIENCE;
        loop {
            let mut answer = self.read(end)?.with_context(|| format!("no answer to {name}"))?;
            if !answer["error"].is_null() {
                bail!("{name}: {}", answer["error"]["desc"]);
            }
            if answer.get("return").is_some() {
                return Ok(answer["return"].take());
            }
            self.events.push(answer);
        }
    }

    /// Forgets the events so far.
    pub fn forget_events(&mut self) {
        self.events.clear();
    }

    /// The first event of this name since they were forgotten; waits for it.
    ///
    /// # Errors
    /// When it does not come in time.
    pub fn event(&mut self, name: &str, within: Duration) -> Result<Value> {
        let end = Instant::now() + within;
        loop {
            if let Some(event) = self.events.iter().find(|event| event["event"] == name) {
                return Ok(event.clone());
            }
            let next = self.read(end)?.with_context(|| format!("no {name} within {} s", within.as_secs()))?;
            self.events.push(next);
        }
    }

    /// The next line; none when the time is over.
    fn read(&mut self, end: Instant) -> Result<Option<Value>> {
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.reader.get_ref().set_read_timeout(Some(left))?;
            match self.reader.read_until(b'\n', &mut self.partial) {
                Ok(0) => bail!("QEMU has closed its monitor"),
                Ok(_) if self.partial.ends_with(b"\n") => {
                    let line = std::mem::take(&mut self.partial);
                    return Ok(Some(
                        serde_json::from_slice(&line).context("the monitor's line is not JSON")?,
                    ));
                }
                Ok(_) => {}
                Err(error)
                    if matches!(
                        error.kind(),
                        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                    ) =>
                {
                    return Ok(None);
                }
                Err(error) => return Err(error).context("reading from the monitor"),
            }
        }
    }
}
