//! The commands in use, each a type: its fields are the arguments, [`Command::Reply`] is what comes back.
//!
//! Named by hand rather than generated: a reader sees what is used, and adding one takes three lines. A test holds
//! every name and argument against the schema of a real QEMU. Replies name only the fields that are used and
//! ignore the rest, so that newer versions fit.

use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Deserializer, Serialize};

mod block;
mod descriptor;
mod device;
mod export;
mod job;
mod machine;
mod migration;
mod schema;

pub use block::*;
pub use descriptor::*;
pub use device::*;
pub use export::*;
pub use job::*;
pub use machine::*;
pub use migration::*;
pub use schema::*;

/// A command with its arguments; an argument that is `None` is not sent.
pub trait Command: Serialize + Send {
    /// QEMU's name for it.
    const NAME: &'static str;
    /// Whether it is sent past the queue, to a QEMU that may be stuck. Only few commands allow that.
    const OUT_OF_BAND: bool = false;
    /// What comes back.
    type Reply: DeserializeOwned + Send;
}

/// The reply of a command that has nothing to say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Done;

impl<'de> Deserialize<'de> for Done {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        IgnoredAny::deserialize(deserializer).map(|_| Self)
    }
}

/// Declares a command: `Name = "wire-name" -> Reply { field: Type = "wire-field", … }`.
macro_rules! command {
    (
        $(#[$meta:meta])*
        $name:ident = $wire:literal $($oob:ident)? -> $reply:ty {
            $( $(#[$field_meta:meta])* $field:ident : $type:ty = $field_wire:tt ),* $(,)?
        }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, serde::Serialize)]
        pub struct $name {
            $( $(#[$field_meta])* #[serde(rename = $field_wire)] pub $field: $type, )*
        }
        impl $crate::commands::Command for $name {
            const NAME: &'static str = $wire;
            $( const OUT_OF_BAND: bool = $crate::commands::out_of_band!($oob); )?
            type Reply = $reply;
        }
    };
}
pub(crate) use command;

/// The word after a command's wire name.
macro_rules! out_of_band {
    (oob) => {
        true
    };
}
pub(crate) use out_of_band;

/// Declares an enum of words that newer versions may add to: an unknown word is kept, never an error.
macro_rules! open_enum {
    (
        $(#[$meta:meta])*
        $name:ident { $( $(#[$variant_meta:meta])* $variant:ident = $text:literal ),* $(,)? }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash)]
        pub enum $name {
            $( $(#[$variant_meta])* $variant, )*
            /// A word that this crate does not know.
            Unknown(String),
        }
        impl $name {
            /// QEMU's word for it.
            #[must_use]
            pub fn as_str(&self) -> &str {
                match self {
                    $( Self::$variant => $text, )*
                    Self::Unknown(word) => word,
                }
            }
        }
        impl From<String> for $name {
            fn from(word: String) -> Self {
                match word.as_str() {
                    $( $text => Self::$variant, )*
                    _ => Self::Unknown(word),
                }
            }
        }
        impl std::fmt::Display for $name {
            fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str(self.as_str())
            }
        }
        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                <String as serde::Deserialize>::deserialize(deserializer).map(Self::from)
            }
        }
        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }
    };
}
pub(crate) use open_enum;
