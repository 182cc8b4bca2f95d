//! Names that people give: of VMs, segments, images, hosts, pools and snapshots.
//!
//! One rule for all of them, the one of DNS labels, so that a name can stand in a URL, a host name, a shell word and
//! a file name without quoting, and so that `segment/name` splits at the one slash it has.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What a name must look like, for error texts.
pub const NAME_RULE: &str = "1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit";

/// Longest name, in characters: that of a DNS label.
pub const NAME_CHARS_MAX: usize = 63;

/// A string that breaks the rule for names.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not a name: expected {NAME_RULE}")]
pub struct NameError {
    /// What was given, cut to 80 characters.
    pub text: String,
}

/// A name that keeps the rule.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String)]
pub struct Name(String);

impl Name {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let bytes = text.as_bytes();
        let good = !bytes.is_empty()
            && bytes.len() <= NAME_CHARS_MAX
            && bytes.iter().all(|&byte| plain(byte) || byte == b'-')
            && bytes.first().copied().is_some_and(plain)
            && bytes.last().copied().is_some_and(plain);
        if good {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameError { text: text.chars().take(80).collect() })
        }
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> String {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_keep_the_rule() {
        for good in ["a", "books", "web-01", "0", &"x".repeat(63)] {
            assert!(good.parse::<Name>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a b", "a/b", "..", "ä", "a\n", "a_b", &"x".repeat(64)] {
            assert!(bad.parse::<Name>().is_err(), "{bad}");
        }
    }
}
