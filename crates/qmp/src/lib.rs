//! Talk to one QEMU: session, typed commands and the events in use.
//!
//! The protocol is kept apart from the socket. [`codec`] turns bytes into messages and [`session`] turns messages
//! into what they mean (whose answer, which event); neither does I/O, so both are tested with plain byte strings.
//! [`connection`] owns a socket in a background task and hands out [`Qmp`], a handle that many callers share.
//! [`commands`] names the commands that are used, with typed arguments and replies, and [`Abilities`] asks a QEMU
//! what it can do, which is never concluded from its version. [`guest_agent`] speaks to the agent inside the guest,
//! whose protocol looks alike and behaves differently.
//!
//! Nothing here knows what the callers want a virtual machine for.

pub mod codec;
pub mod session;

mod connection;
mod transport;

mod error;
pub use error::{CloseReason, QmpError};

pub use connection::{ConnectOptions, Qmp};

mod subscription;
pub use subscription::Events;

mod event;
pub use event::{BlockJob, Event, EventKind, HostTime};

pub mod commands;

mod abilities;
pub use abilities::Abilities;

pub mod guest_agent;
