//! What can go wrong when one talks to a QEMU, told apart by what the caller can do about it.

use std::borrow::Cow;
use std::io;
use std::path::PathBuf;

use crate::session::ProtocolError;

/// Why a command has no result.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket could not be opened.
    #[error("cannot connect to {}", path.display())]
    Connect {
        /// Which socket.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The connection is gone. Whether a command that was on its way took effect is not known.
    #[error("the connection to QEMU is closed: {reason}")]
    Closed {
        /// How it ended.
        reason: CloseReason,
    },
    /// The peer does not speak QMP (any more); the connection was given up.
    #[error("the peer does not speak QMP")]
    Protocol(#[source] ProtocolError),
    /// QEMU refused the command or failed at it.
    #[error("{command} failed: {desc}")]
    Command {
        /// The command.
        command: Cow<'static, str>,
        /// QEMU's error class.
        class: String,
        /// QEMU's words.
        desc: String,
    },
    /// The answer does not have the form that the command's reply must have.
    #[error("the answer to {command} cannot be read")]
    Reply {
        /// The command.
        command: Cow<'static, str>,
        /// What does not fit.
        #[source]
        source: serde_json::Error,
    },
    /// The arguments cannot be written as JSON.
    #[error("the arguments of {command} cannot be written")]
    Arguments {
        /// The command.
        command: Cow<'static, str>,
        /// What cannot be written.
        #[source]
        source: serde_json::Error,
    },
    /// No answer in time. The command may still take effect; its late answer is thrown away.
    #[error("{command} had no answer within {waited_ms} ms")]
    TimedOut {
        /// The command, or `connect`.
        command: Cow<'static, str>,
        /// How long was waited.
        waited_ms: u64,
    },
    /// File descriptors cannot be sent over this connection.
    #[error("file descriptors cannot be sent with {command} over this transport")]
    DescriptorsUnsupported {
        /// The command.
        command: Cow<'static, str>,
    },
}

impl QmpError {
    /// Whether QEMU itself is gone or unreachable, as opposed to alive and refusing.
    #[must_use]
    pub fn is_connection_lost(&self) -> bool {
        matches!(self, Self::Closed { .. } | Self::Protocol(_) | Self::Connect { .. })
    }

    /// QEMU's words, when the command was refused.
    #[must_use]
    pub fn refusal(&self) -> Option<&str> {
        match self {
            Self::Command { desc, .. } => Some(desc),
            _ => None,
        }
    }
}

/// How a connection ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// QEMU closed it: it has ended or is ending.
    #[error("the peer closed it")]
    PeerGone,
    /// The system reported a fault.
    #[error("{detail}")]
    Io {
        /// The system's words.
        detail: String,
    },
    /// The peer sent what is not QMP.
    #[error("{0}")]
    Protocol(ProtocolError),
    /// Every handle of ours was dropped.
    #[error("nobody uses it any more")]
    Unused,
}

impl From<CloseReason> for QmpError {
    fn from(reason: CloseReason) -> Self {
        match reason {
            CloseReason::Protocol(error) => Self::Protocol(error),
            reason => Self::Closed { reason },
        }
    }
}
