//! Bytes to messages and back, without I/O.
//!
//! QMP is one JSON object a line. QEMU is trusted to run a guest, not to be sane: a guest that has taken it over
//! can send anything, so a line has a greatest length and everything that is not a message is an error which says
//! what it looked like, never a panic and never unbounded memory.

use bytes::{Buf, BytesMut};
use serde_json::{Map, Value};

use crate::commands::{BlockdevAdd, Command};
use crate::event::Event;

/// The longest line accepted unless told otherwise, in bytes. The longest honest line is the answer to
/// `query-qmp-schema`, some 300 KB today; lower than that and connecting fails, much higher and a mad QEMU takes
/// that much of the agent's memory.
pub const LINE_BYTES_MAX: usize = 8 << 20;

/// How much of a wrong line an error quotes.
const EXCERPT_BYTES: usize = 80;

/// Why bytes are not a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// A line went on past the limit.
    #[error("line is longer than {limit_bytes} bytes")]
    LineTooLong {
        /// The limit that was in force.
        limit_bytes: usize,
    },
    /// A line is not JSON.
    #[error("line is not JSON ({detail}): {excerpt}")]
    NotJson {
        /// What the JSON parser says.
        detail: String,
        /// The line's beginning.
        excerpt: String,
    },
    /// A line is JSON, but no message of this protocol.
    #[error("not a QMP message: {excerpt}")]
    NotAMessage {
        /// The line's beginning.
        excerpt: String,
    },
}

/// What QEMU says.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// The first thing said.
    Greeting(Greeting),
    /// The answer to a command.
    Reply {
        /// The command's id, when the answer names one.
        id: Option<u64>,
        /// What was returned, or why the command failed.
        outcome: Result<Value, CommandFailure>,
    },
    /// Something happened.
    Event(Event),
}

/// What a greeting tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Greeting {
    /// Major, minor and micro version; for people and logs. Ask [`crate::Abilities`] before relying on anything.
    pub version: (u64, u64, u64),
    /// Whether commands may be sent out of band.
    pub out_of_band: bool,
}

/// QEMU's reason for not doing what was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandFailure {
    /// QEMU's error class, nearly always `GenericError`.
    pub class: String,
    /// QEMU's words.
    pub desc: String,
}

/// Collects bytes and gives lines and messages.
#[derive(Debug)]
pub struct Decoder {
    buffer: BytesMut,
    /// How much of `buffer` is known to have no line end.
    searched: usize,
    line_bytes_max: usize,
}

impl Decoder {
    /// A decoder that refuses lines longer than `line_bytes_max`.
    #[must_use]
    pub fn new(line_bytes_max: usize) -> Self {
        Self { buffer: BytesMut::new(), searched: 0, line_bytes_max }
    }

    /// Where to read to: bytes appended here are what the next calls of [`Self::next_message`] look at.
    pub fn buffer_mut(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// The next whole line without its end; `None` when more bytes are needed.
    ///
    /// # Errors
    /// [`DecodeError::LineTooLong`] once a line exceeds the limit, finished or not.
    pub fn next_line(&mut self) -> Result<Option<BytesMut>, DecodeError> {
        loop {
            let found = self.buffer[self.searched..].iter().position(|&byte| byte == b'\n');
            let length = found.map_or(self.buffer.len(), |at| self.searched + at);
            if length > self.line_bytes_max {
                return Err(DecodeError::LineTooLong { limit_bytes: self.line_bytes_max });
            }
            if found.is_none() {
                self.searched = length;
                return Ok(None);
            }
            self.searched = 0;
            let line = self.buffer.split_to(length);
            self.buffer.advance(1);
            if !line.iter().all(u8::is_ascii_whitespace) {
                return Ok(Some(line));
            }
        }
    }

    /// The next whole message; `None` when more bytes are needed.
    ///
    /// # Errors
    /// Any [`DecodeError`]; what follows in the stream is then not to be trusted.
    pub fn next_message(&mut self) -> Result<Option<Message>, DecodeError> {
        self.next_line()?.map(|line| decode_message(&line)).transpose()
    }
}

/// Reads one line as a message.
///
/// # Errors
/// [`DecodeError::NotJson`] or [`DecodeError::NotAMessage`].
pub fn decode_message(line: &[u8]) -> Result<Message, DecodeError> {
    let value: Value = serde_json::from_slice(line)
        .map_err(|error| DecodeError::NotJson { detail: error.to_string(), excerpt: excerpt(line) })?;
    let Value::Object(object) = value else {
        return Err(DecodeError::NotAMessage { excerpt: excerpt(line) });
    };
    message_of(object).ok_or_else(|| DecodeError::NotAMessage { excerpt: excerpt(line) })
}

/// Writes one command as a line. Arguments that are `null` at the top level are left out, which is how an optional
/// argument is not given; but for `blockdev-add`, where a `backing` of `null` says that a node has none, whatever
/// its file's header says.
#[must_use]
pub fn encode_command(name: &str, arguments: Value, id: u64, out_of_band: bool) -> Vec<u8> {
    let mut object = Map::new();
    object.insert(if out_of_band { "exec-oob" } else { "execute" }.into(), name.into());
    if let Value::Object(arguments) = arguments {
        let keeps_null = name == BlockdevAdd::NAME;
        let given: Map<_, _> =
            arguments.into_iter().filter(|(_, value)| keeps_null || !value.is_null()).collect();
        if !given.is_empty() {
            object.insert("arguments".into(), Value::Object(given));
        }
    }
    object.insert("id".into(), id.into());
    let mut line = Value::Object(object).to_string().into_bytes();
    line.push(b'\n');
    line
}

fn message_of(mut object: Map<String, Value>) -> Option<Message> {
    if let Some(greeting) = object.get("QMP") {
        return Some(Message::Greeting(greeting_of(greeting)));
    }
    if object.contains_key("event") {
        return Event::from_object(object).map(Message::Event);
    }
    let id = object.get("id").and_then(Value::as_u64);
    if let Some(returned) = object.remove("return") {
        return Some(Message::Reply { id, outcome: Ok(returned) });
    }
    let error = object.get("error")?;
    let text = |key| error.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    Some(Message::Reply { id, outcome: Err(CommandFailure { class: text("class"), desc: text("desc") }) })
}

fn greeting_of(greeting: &Value) -> Greeting {
    let version = &greeting["version"]["qemu"];
    let number = |key: &str| version[key].as_u64().unwrap_or_default();
    let out_of_band =
        greeting["capabilities"].as_array().is_some_and(|list| list.iter().any(|one| one == "oob"));
    Greeting { version: (number("major"), number("minor"), number("micro")), out_of_band }
}

fn excerpt(line: &[u8]) -> String {
    let cut = &line[..line.len().min(EXCERPT_BYTES)];
    let more = if cut.len() < line.len() { "…" } else { "" };
    format!("{}{more}", cut.escape_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoder_with(bytes: &[u8]) -> Decoder {
        let mut decoder = Decoder::new(64);
        decoder.buffer_mut().extend_from_slice(bytes);
        decoder
    }

    #[test]
    fn a_line_in_pieces_gives_one_message_when_it_is_whole() {
        let mut decoder = decoder_with(b"");
        for byte in br#"{"return":{},"id":7}"# {
            decoder.buffer_mut().extend_from_slice(&[*byte]);
            assert_eq!(decoder.next_message(), Ok(None));
        }
        decoder.buffer_mut().extend_from_slice(b"\r\n\r\n");
        let expected = Message::Reply { id: Some(7), outcome: Ok(serde_json::json!({})) };
        assert_eq!(decoder.next_message(), Ok(Some(expected)));
        assert_eq!(decoder.next_message(), Ok(None));
    }

    #[test]
    fn a_giant_line_is_refused_before_its_end_is_seen() {
        let mut decoder = decoder_with(&[b'x'; 65]);
        assert_eq!(decoder.next_message(), Err(DecodeError::LineTooLong { limit_bytes: 64 }));
    }

    #[test]
    fn what_is_no_message_is_an_error_that_quotes_it() {
        for line in ["nonsense", "[1]", "{}", r#"{"event":5}"#, "\u{1}\u{ff}"] {
            let error = decode_message(line.as_bytes()).expect_err(line);
            let text = error.to_string();
            assert!(text.contains(&line.escape_default().to_string()) || text.contains("\\x"), "{text}");
        }
        let deep = "[".repeat(100_000);
        assert!(matches!(decode_message(deep.as_bytes()), Err(DecodeError::NotJson { .. })));
    }

    #[test]
    fn an_optional_argument_that_is_not_given_is_not_sent() {
        let line = encode_command("migrate", serde_json::json!({"uri": "unix:x", "resume": null}), 3, false);
        let back: Value = serde_json::from_slice(&line).expect("our own line");
        assert_eq!(back, serde_json::json!({"execute": "migrate", "arguments": {"uri": "unix:x"}, "id": 3}));
    }

    #[test]
    fn a_block_node_without_backing_says_so() {
        let options = serde_json::json!({"driver": "qcow2", "backing": null});
        let line = encode_command("blockdev-add", options.clone(), 3, false);
        let back: Value = serde_json::from_slice(&line).expect("our own line");
        assert_eq!(back["arguments"], options);
    }
}
