//! The state of a QMP session, without I/O.
//!
//! A session goes through three types, so that nothing can be sent too early: [`Unopened`] takes the greeting and
//! becomes [`Negotiating`], which takes the answer to `qmp_capabilities` and becomes [`Ready`]. Only [`Ready`] gives
//! out ids and knows whose answer is whose. The token `T` is what the caller wants back with an answer: a channel
//! in the connection, a number in the tests.

use std::collections::HashMap;

use serde_json::{Value, json};

use crate::codec::{CommandFailure, DecodeError, Greeting, Message, encode_command};
use crate::event::Event;

/// The id of the one command that is sent before the session is ready.
const NEGOTIATION_ID: u64 = 0;

/// Why the peer is not speaking QMP.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// What came is no message at all.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The first message was something else.
    #[error("expected a greeting, got {got}")]
    GreetingMissing {
        /// What came instead.
        got: &'static str,
    },
    /// A greeting came in the middle of a session.
    #[error("greeted twice")]
    GreetedTwice,
    /// The capabilities were refused.
    #[error("capabilities refused: {desc}")]
    NegotiationRefused {
        /// QEMU's words.
        desc: String,
    },
    /// QEMU could not read what we sent, and cannot say which command it was.
    #[error("the peer could not read a command: {desc}")]
    CommandUnreadable {
        /// QEMU's words.
        desc: String,
    },
}

/// A session in which nothing has been said.
#[derive(Debug)]
pub struct Unopened;

impl Unopened {
    /// Takes the first message; gives the next state and the line to send.
    ///
    /// # Errors
    /// [`ProtocolError::GreetingMissing`].
    pub fn on_message(self, message: Message) -> Result<(Negotiating, Vec<u8>), ProtocolError> {
        let greeting = match message {
            Message::Greeting(greeting) => greeting,
            Message::Reply { .. } => return Err(ProtocolError::GreetingMissing { got: "an answer" }),
            Message::Event(_) => return Err(ProtocolError::GreetingMissing { got: "an event" }),
        };
        let enable: &[&str] = if greeting.out_of_band { &["oob"] } else { &[] };
        let line = encode_command("qmp_capabilities", json!({ "enable": enable }), NEGOTIATION_ID, false);
        Ok((Negotiating { greeting }, line))
    }
}

/// A session that has been greeted and waits for its capabilities to be granted.
#[derive(Debug)]
pub struct Negotiating {
    greeting: Greeting,
}

/// What came of a message while negotiating.
#[derive(Debug)]
pub enum Negotiated<T> {
    /// Not yet; an event that came early is handed on.
    Still(Negotiating, Event),
    /// Commands may be sent.
    Done(Ready<T>),
}

impl Negotiating {
    /// Takes a message.
    ///
    /// # Errors
    /// [`ProtocolError`] when the capabilities are refused or the peer greets again.
    pub fn on_message<T>(self, message: Message) -> Result<Negotiated<T>, ProtocolError> {
        match message {
            Message::Greeting(_) => Err(ProtocolError::GreetedTwice),
            Message::Event(event) => Ok(Negotiated::Still(self, event)),
            Message::Reply { outcome: Err(failure), .. } => {
                Err(ProtocolError::NegotiationRefused { desc: failure.desc })
            }
            Message::Reply { outcome: Ok(_), .. } => Ok(Negotiated::Done(Ready {
                greeting: self.greeting,
                next_id: NEGOTIATION_ID + 1,
                pending: HashMap::new(),
            })),
        }
    }
}

/// A session in which commands are sent and answered.
#[derive(Debug)]
pub struct Ready<T> {
    greeting: Greeting,
    next_id: u64,
    pending: HashMap<u64, T>,
}

/// What a message means.
#[derive(Debug, PartialEq)]
pub enum Incoming<T> {
    /// The answer to the command that was submitted with this token.
    Reply(T, Result<Value, CommandFailure>),
    /// An event.
    Event(Event),
    /// An answer to nothing that was asked. QEMU never sends one; it is no reason to give up a running guest.
    Stray(Option<u64>),
}

impl<T> Ready<T> {
    /// What the peer said of itself.
    #[must_use]
    pub fn greeting(&self) -> &Greeting {
        &self.greeting
    }

    /// Registers a command; gives the line to send. `out_of_band` is honoured only where the peer offers it.
    pub fn submit(&mut self, name: &str, arguments: Value, out_of_band: bool, token: T) -> Vec<u8> {
        let id = self.next_id;
        self.next_id += 1;
        self.pending.insert(id, token);
        encode_command(name, arguments, id, out_of_band && self.greeting.out_of_band)
    }

    /// Takes a message. Answers may come in any order.
    ///
    /// # Errors
    /// [`ProtocolError`] when the session cannot go on.
    pub fn on_message(&mut self, message: Message) -> Result<Incoming<T>, ProtocolError> {
        match message {
            Message::Greeting(_) => Err(ProtocolError::GreetedTwice),
            Message::Event(event) => Ok(Incoming::Event(event)),
            Message::Reply { id: None, outcome: Err(failure) } => {
                Err(ProtocolError::CommandUnreadable { desc: failure.desc })
            }
            Message::Reply { id, outcome } => Ok(match id.and_then(|id| self.pending.remove(&id)) {
                Some(token) => Incoming::Reply(token, outcome),
                None => Incoming::Stray(id),
            }),
        }
    }

    /// How many commands wait for their answer.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// Ends the session; gives the tokens of all commands that will have no answer.
    pub fn abandon(self) -> impl Iterator<Item = T> {
        self.pending.into_values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::decode_message;

    const GREETING: &[u8] =
        br#"{"QMP":{"version":{"qemu":{"micro":22,"minor":2,"major":7},"package":"x"},"capabilities":["oob"]}}"#;

    fn message(text: &[u8]) -> Message {
        decode_message(text).expect("a message")
    }

    fn ready() -> Ready<&'static str> {
        let (negotiating, line) = Unopened.on_message(message(GREETING)).expect("greeted");
        assert!(String::from_utf8_lossy(&line).contains(r#""enable":["oob"]"#));
        match negotiating.on_message(message(br#"{"return":{},"id":0}"#)).expect("negotiated") {
            Negotiated::Done(ready) => ready,
            Negotiated::Still(..) => panic!("should be ready"),
        }
    }

    #[test]
    fn answers_out_of_order_reach_those_who_asked() {
        let mut session = ready();
        session.submit("stop", json!({}), false, "first");
        session.submit("cont", json!({}), false, "second");
        let later = session.on_message(message(br#"{"return":2,"id":2}"#));
        assert_eq!(later, Ok(Incoming::Reply("second", Ok(json!(2)))));
        let earlier = session.on_message(message(br#"{"error":{"class":"C","desc":"d"},"id":1}"#));
        let failure = CommandFailure { class: "C".into(), desc: "d".into() };
        assert_eq!(earlier, Ok(Incoming::Reply("first", Err(failure))));
        assert_eq!(session.in_flight(), 0);
    }

    #[test]
    fn an_answer_to_nothing_is_stray_and_the_session_goes_on() {
        let mut session = ready();
        session.submit("stop", json!({}), false, "asked");
        assert_eq!(session.on_message(message(br#"{"return":{},"id":99}"#)), Ok(Incoming::Stray(Some(99))));
        assert_eq!(session.on_message(message(br#"{"return":{}}"#)), Ok(Incoming::Stray(None)));
        assert_eq!(session.in_flight(), 1);
    }

    #[test]
    fn without_a_greeting_there_is_no_session() {
        let error = Unopened.on_message(message(br#"{"return":{}}"#)).expect_err("no greeting");
        assert_eq!(error, ProtocolError::GreetingMissing { got: "an answer" });
    }

    #[test]
    fn an_unreadable_command_ends_the_session_because_nobody_knows_whose_it_was() {
        let mut session = ready();
        let answer = message(br#"{"error":{"class":"GenericError","desc":"JSON parse error"}}"#);
        assert!(matches!(session.on_message(answer), Err(ProtocolError::CommandUnreadable { .. })));
    }
}
