//! The guest agent: a program inside the guest that does what the host asks.
//!
//! Its protocol looks like QMP and differs where it hurts: there is no greeting, no id to tell answers apart, and no
//! sign of whether anybody listens; an answer to a question given up long ago may still come. And it is the guest
//! that answers, so nothing it says is trusted: answers have a greatest length, every wait has an end. Each call
//! therefore begins with `guest-sync-delimited`: whatever comes before the byte 0xFF and the number we chose
//! is old, and is thrown away.

use std::path::Path;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::codec::{DecodeError, Message, decode_message};
use crate::commands::Done;
use crate::error::{CloseReason, QmpError};
use crate::session::ProtocolError;

/// The longest answer accepted, in bytes: the guest must not be able to fill the agent's memory.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// Starts the answer to `guest-sync-delimited`, and cannot occur in JSON.
const SENTINEL: u8 = 0xFF;

/// Pause between two questions whether a program has ended.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// How the guest is to be switched off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShutdownMode {
    /// Switched off.
    Powerdown,
    /// Halted.
    Halt,
    /// Restarted.
    Reboot,
}

/// What the agent can do.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct GuestInfo {
    /// Its version, in its own words.
    pub version: String,
    /// Its commands.
    #[serde(rename = "supported_commands", default)]
    pub commands: Vec<GuestCommand>,
}

impl GuestInfo {
    /// Whether a command is there and switched on.
    #[must_use]
    pub fn can(&self, command: &str) -> bool {
        self.commands.iter().any(|known| known.name == command && known.enabled)
    }
}

/// A command of the guest agent.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct GuestCommand {
    /// Its name.
    pub name: String,
    /// Whether the guest's administrator allows it.
    pub enabled: bool,
}

/// A connection to the guest agent's socket. Calls wait for each other; dropping one harms none.
pub struct GuestAgent {
    channel: Mutex<Channel>,
}

impl std::fmt::Debug for GuestAgent {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("GuestAgent")
    }
}

trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

struct Channel {
    stream: Box<dyn Duplex>,
    buffer: BytesMut,
    next_sync_id: u64,
    /// A question of an earlier call that is only partly written; nothing can follow but its rest.
    unsent: BytesMut,
}

impl GuestAgent {
    /// Connects to the socket that stands for the agent's serial port. That it opens says nothing of the guest.
    ///
    /// # Errors
    /// [`QmpError::Connect`].
    pub async fn connect(path: impl AsRef<Path>) -> Result<Self, QmpError> {
        let path = path.as_ref();
        let connected = UnixStream::connect(path).await;
        connected.map(Self::over).map_err(|source| QmpError::Connect { path: path.to_owned(), source })
    }

    /// Speaks over any stream.
    #[must_use]
    pub fn over<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(stream: S) -> Self {
        let channel = Channel {
            stream: Box::new(stream),
            buffer: BytesMut::new(),
            next_sync_id: 1,
            unsent: BytesMut::new(),
        };
        Self { channel: Mutex::new(channel) }
    }

    /// Whether somebody is there.
    ///
    /// # Errors
    /// [`QmpError::TimedOut`] when nobody answers within `timeout`.
    pub async fn ping(&self, timeout: Duration) -> Result<(), QmpError> {
        self.call::<Done>("guest-ping", Value::Null, timeout).await.map(|Done| ())
    }

    /// What the agent can do.
    ///
    /// # Errors
    /// As every call.
    pub async fn info(&self, timeout: Duration) -> Result<GuestInfo, QmpError> {
        self.call("guest-info", Value::Null, timeout).await
    }

    /// The guest's own name.
    ///
    /// # Errors
    /// As every call.
    pub async fn host_name(&self, timeout: Duration) -> Result<String, QmpError> {
        #[derive(Deserialize)]
        struct Reply {
            #[serde(rename = "host-name")]
            host_name: String,
        }
        self.call::<Reply>("guest-get-host-name", Value::Null, timeout).await.map(|reply| reply.host_name)
    }

    /// Flushes and freezes the guest's file systems; says how many. Must be followed by [`Self::thaw`], also after
    /// a time-out: the guest may have frozen them late.
    ///
    /// # Errors
    /// As every call.
    pub async fn freeze(&self, timeout: Duration) -> Result<u64, QmpError> {
        self.call("guest-fsfreeze-freeze", Value::Null, timeout).await
    }

    /// Thaws them; says how many.
    ///
    /// # Errors
    /// As every call.
    pub async fn thaw(&self, timeout: Duration) -> Result<u64, QmpError> {
        self.call("guest-fsfreeze-thaw", Value::Null, timeout).await
    }

    /// Whether any is frozen.
    ///
    /// # Errors
    /// As every call.
    pub async fn is_frozen(&self, timeout: Duration) -> Result<bool, QmpError> {
        let word: String = self.call("guest-fsfreeze-status", Value::Null, timeout).await?;
        Ok(word == "frozen")
    }

    /// Sets the guest's clock, in nanoseconds since the epoch; from its hardware clock when `None`.
    ///
    /// # Errors
    /// As every call.
    pub async fn set_time(&self, epoch_ns: Option<i64>, timeout: Duration) -> Result<(), QmpError> {
        let arguments = epoch_ns.map_or(Value::Null, |time| json!({ "time": time }));
        self.call::<Done>("guest-set-time", arguments, timeout).await.map(|Done| ())
    }

    /// Runs a program in the guest and waits for its end; gives its exit code, none when a signal ended it. What it prints
    /// stays in the guest.
    ///
    /// # Errors
    /// As every call; [`QmpError::TimedOut`] when the program has not ended within `timeout`: it goes on.
    pub async fn run(&self, path: &str, words: &[&str], timeout: Duration) -> Result<Option<i64>, QmpError> {
        #[derive(Deserialize)]
        struct Begun {
            pid: i64,
        }
        #[derive(Deserialize)]
        struct Status {
            exited: bool,
            exitcode: Option<i64>,
        }
        let deadline = Instant::now() + timeout;
        let begun: Begun = self.call("guest-exec", json!({ "path": path, "arg": words }), timeout).await?;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let arguments = json!({ "pid": begun.pid });
            let status: Status = self.call("guest-exec-status", arguments, left).await?;
            if status.exited {
                return Ok(status.exitcode);
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Asks for the guest to be switched off. The agent does not answer when it obeys, so a guest that falls silent or
    /// away within `timeout` has obeyed; the machine's SHUTDOWN event is the proof.
    ///
    /// # Errors
    /// When the agent refuses, or nobody is there to ask.
    pub async fn shutdown(&self, mode: ShutdownMode, timeout: Duration) -> Result<(), QmpError> {
        const NAME: &str = "guest-shutdown";
        let word = match mode {
            ShutdownMode::Powerdown => "powerdown",
            ShutdownMode::Halt => "halt",
            ShutdownMode::Reboot => "reboot",
        };
        self.ping(timeout).await?;
        let mut channel = self.channel.lock().await;
        let refusal = tokio::time::timeout(timeout, async {
            channel.ask(NAME, &json!({ "mode": word })).await?;
            let sync_id = channel.ask_sync().await?;
            channel.refusal_before_sync(sync_id).await
        });
        match refusal.await {
            Ok(Ok(Some((class, desc)))) => Err(QmpError::Command { command: NAME.into(), class, desc }),
            Ok(Ok(None)) | Err(_) => Ok(()),
            Ok(Err(QmpError::Closed { .. })) => Ok(()),
            Ok(Err(error)) => Err(error),
        }
    }

    async fn call<T: DeserializeOwned>(
        &self,
        name: &'static str,
        arguments: Value,
        timeout: Duration,
    ) -> Result<T, QmpError> {
        let answered = tokio::time::timeout(timeout, async {
            let mut channel = self.channel.lock().await;
            let sync_id = channel.ask_sync().await?;
            channel.ask(name, &arguments).await?;
            channel.wait_for_sync(sync_id).await?;
            channel.answer().await
        });
        let waited_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        let outcome =
            answered.await.map_err(|_| QmpError::TimedOut { command: name.into(), waited_ms })??;
        let value =
            outcome.map_err(|(class, desc)| QmpError::Command { command: name.into(), class, desc })?;
        serde_json::from_value(value).map_err(|source| QmpError::Reply { command: name.into(), source })
    }
}

type Refusal = (String, String);

impl Channel {
    /// Sends `guest-sync-delimited`, after a byte that makes the agent forget half a question; gives its number.
    async fn ask_sync(&mut self) -> Result<u64, QmpError> {
        let id = self.next_sync_id;
        self.next_sync_id += 1;
        self.unsent.extend_from_slice(&[SENTINEL]);
        self.ask("guest-sync-delimited", &json!({ "id": id })).await?;
        Ok(id)
    }

    async fn ask(&mut self, name: &str, arguments: &Value) -> Result<(), QmpError> {
        let question = match arguments {
            Value::Null => json!({ "execute": name }),
            arguments => json!({ "execute": name, "arguments": arguments }),
        };
        self.unsent.extend_from_slice(question.to_string().as_bytes());
        self.unsent.extend_from_slice(b"\n");
        while !self.unsent.is_empty() {
            let written = self.stream.write(&self.unsent).await.map_err(|error| closed(&error))?;
            if written == 0 {
                return Err(CloseReason::PeerGone.into());
            }
            self.unsent.advance(written);
        }
        Ok(())
    }

    /// Throws away everything up to the answer to that sync.
    async fn wait_for_sync(&mut self, id: u64) -> Result<(), QmpError> {
        loop {
            while let Some(at) = self.buffer.iter().position(|&byte| byte == SENTINEL) {
                self.buffer.advance(at + 1);
                let line = self.line().await?;
                if answers_sync(&line, id) {
                    return Ok(());
                }
            }
            self.buffer.clear();
            self.read_more().await?;
        }
    }

    /// As [`Self::wait_for_sync`], but what comes before it is looked at for a refusal.
    async fn refusal_before_sync(&mut self, id: u64) -> Result<Option<Refusal>, QmpError> {
        loop {
            let line = self.line().await?;
            match line.split_first() {
                Some((&SENTINEL, rest)) if answers_sync(rest, id) => return Ok(None),
                _ => {
                    if let Ok(Message::Reply { outcome: Err(failure), .. }) = decode_message(&line) {
                        return Ok(Some((failure.class, failure.desc)));
                    }
                }
            }
        }
    }

    async fn answer(&mut self) -> Result<Result<Value, Refusal>, QmpError> {
        let line = self.line().await?;
        match decode_message(&line) {
            Ok(Message::Reply { outcome, .. }) => {
                Ok(outcome.map_err(|failure| (failure.class, failure.desc)))
            }
            Ok(_) => Err(nonsense(DecodeError::NotAMessage { excerpt: "no answer".into() })),
            Err(error) => Err(nonsense(error)),
        }
    }

    /// The next line that is not blank.
    async fn line(&mut self) -> Result<BytesMut, QmpError> {
        let mut searched = 0;
        loop {
            if let Some(at) = self.buffer[searched..].iter().position(|&byte| byte == b'\n') {
                let line = self.buffer.split_to(searched + at);
                self.buffer.advance(1);
                searched = 0;
                if !line.is_empty() {
                    return Ok(line);
                }
                continue;
            }
            searched = self.buffer.len();
            if searched > ANSWER_BYTES_MAX {
                // What is left of this line would be taken for the next one; the sync before every call sorts that out.
                self.buffer.clear();
                return Err(nonsense(DecodeError::LineTooLong { limit_bytes: ANSWER_BYTES_MAX }));
            }
            self.read_more().await?;
        }
    }

    async fn read_more(&mut self) -> Result<(), QmpError> {
        match self.stream.read_buf(&mut self.buffer).await {
            Ok(0) => Err(CloseReason::PeerGone.into()),
            Ok(_) => Ok(()),
            Err(error) => Err(closed(&error)),
        }
    }
}

fn answers_sync(line: &[u8], id: u64) -> bool {
    matches!(decode_message(line), Ok(Message::Reply { outcome: Ok(value), .. }) if value == id)
}

fn nonsense(error: DecodeError) -> QmpError {
    QmpError::Protocol(ProtocolError::Decode(error))
}

fn closed(error: &std::io::Error) -> QmpError {
    CloseReason::Io { detail: error.to_string() }.into()
}
