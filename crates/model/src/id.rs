//! Typed identifiers: a bare string never crosses a function as the name of something.
//!
//! An id reads `vm-0c5x9qzk3m1d7w2f`: the noun's prefix, and eighty random bits in Crockford's base 32 (no letters
//! that look alike), lower case. It is safe as a file name, in a URL and in a shell.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How many random bytes an id is made of.
pub const ENTROPY_BYTES: usize = 10;

const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
const BODY_CHARS: usize = 16;

/// A string that is not an id of the wanted kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not an id of the form {prefix}-{}", "x".repeat(BODY_CHARS))]
pub struct IdError {
    /// What was given.
    pub text: String,
    /// The prefix that was expected.
    pub prefix: &'static str,
}

fn encode(prefix: &str, entropy: [u8; ENTROPY_BYTES]) -> String {
    let mut bits = 0u128;
    for byte in entropy {
        bits = (bits << 8) | u128::from(byte);
    }
    let mut text = String::with_capacity(prefix.len() + 1 + BODY_CHARS);
    text.push_str(prefix);
    text.push('-');
    for position in (0..BODY_CHARS).rev() {
        let digit = (bits >> (position * 5)) & 31;
        text.push(char::from(ALPHABET[digit as usize]));
    }
    text
}

fn check(text: &str, prefix: &'static str) -> Result<(), IdError> {
    let body = text.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('-'));
    match body {
        Some(body) if body.len() == BODY_CHARS && body.bytes().all(|byte| ALPHABET.contains(&byte)) => Ok(()),
        _ => Err(IdError { text: text.chars().take(64).collect(), prefix }),
    }
}

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident = $prefix:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema)]
        #[serde(try_from = "String", into = "String")]
        #[schema(value_type = String)]
        pub struct $name(String);

        impl $name {
            /// What every id of this kind starts with, before the dash.
            pub const PREFIX: &'static str = $prefix;

            /// Makes an id out of random bytes.
            pub fn from_entropy(entropy: [u8; ENTROPY_BYTES]) -> Self {
                Self(encode($prefix, entropy))
            }

            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                check(text, $prefix)?;
                Ok(Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                check(&text, $prefix)?;
                Ok(Self(text))
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str(&self.0)
            }
        }
    )*};
}

ids! {
    /// A virtual machine.
    VmId = "vm";
    /// A Linux machine with an agent.
    HostId = "host";
    /// An immutable bottom layer that VMs start from.
    ImageId = "img";
    /// An immutable qcow2 file, or the one that is going to be.
    LayerId = "layer";
    /// Frozen layers, memory, device state and configuration of one instant.
    SnapshotId = "snap";
    /// A place for backups.
    RepositoryId = "repo";
    /// A change that takes time.
    OperationId = "op";
    /// The tenancy and network boundary that a VM is in.
    SegmentId = "seg";
    /// A person or a program that has a name.
    UserId = "user";
    /// A bearer token, by the name that may be shown.
    TokenId = "token";
    /// People who have something in common.
    TeamId = "team";
    /// A role that somebody made.
    RoleId = "role";
    /// That a team, or a user, has a role somewhere.
    GrantId = "g";
    /// A policy that somebody wrote.
    PolicyId = "pol";
    /// A request that waits for a second person.
    ApprovalId = "apr";
    /// Snapshots that are taken by the clock.
    ScheduleId = "sched";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_survives_its_text() {
        let id = VmId::from_entropy([0xff, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(id.as_str().parse::<VmId>().expect("own text"), id);
        let json = serde_json::to_string(&id).expect("json");
        assert_eq!(serde_json::from_str::<VmId>(&json).expect("own json"), id);
    }

    #[test]
    fn nonsense_and_other_nouns_are_refused() {
        let image = ImageId::from_entropy([7; 10]);
        for text in [
            "",
            "vm-",
            "vm",
            image.as_str(),
            "vm-../../etc/passwd",
            "vm-0c5x9qzk3m1d7w2",
            "vm-0C5X9QZK3M1D7W2F",
        ] {
            assert!(text.parse::<VmId>().is_err(), "{text}");
        }
    }
}
