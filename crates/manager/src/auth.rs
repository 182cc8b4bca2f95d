//! Who asks: bearer tokens of users, certificates of hosts, join tokens of machines that want to become hosts.
//!
//! A bearer secret carries its token's id, so that the record is found without a search, and 256 random bits, of
//! which only the SHA-256 is kept: with that much entropy a slow hash would add nothing but work. A request proves
//! itself in one way, chosen here and not by the caller: by the `Authorization` header if it has one, else by its
//! certificate. So a host's certificate never adds rights to a user's token, nor the other way round.

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use berth_api::manager::{Scope, TokenKind, User};
use berth_api::pki::Peer;
use berth_api::serve::Caller;
use berth_model::name::Name;
use berth_model::{HostId, Problem, ProblemCode, TokenId, UserId};
use http::HeaderMap;
use http::header::AUTHORIZATION;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

pub mod accounts;

pub mod credential;
pub mod directory;
pub mod external;
mod https;
pub mod lockout;
pub mod login;
pub mod oidc;
pub mod password;
pub mod session;
pub mod settings;
pub mod standing;
pub mod strangers;
pub mod totp;

/// How many random bytes a secret has.
pub const SECRET_BYTES: usize = 32;

const BEARER_PREFIX: &str = "berth_";

/// A user with the token that was shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserPrincipal {
    /// The user.
    pub id: UserId,
    /// The user's name.
    pub name: Name,
    /// The token or session that was shown.
    pub token: TokenId,
    /// What kind it is.
    pub kind: TokenKind,
    /// How the user proved who it is when that was made: `password`, `oidc`, `ldap`, `token`, `first-token`.
    pub method: String,
    /// Whether a second factor was part of that.
    pub second_factor: bool,
    /// What it may be used for; none: for all that the user may do.
    pub scope: Option<Scope>,
}

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Principal {
    /// A user, by a bearer token.
    User(UserPrincipal),
    /// A host, by its certificate.
    Host(HostId),
    /// A machine that shows a join token: the hash under which it is kept.
    JoinToken(String),
    /// Nobody that is known.
    Anonymous,
}

impl Principal {
    /// A user as if it had come itself, with a session: to ask what it may do.
    pub fn as_if(user: &User) -> Self {
        Self::User(UserPrincipal {
            id: user.id.clone(),
            name: user.name.clone(),
            token: TokenId::from_entropy([0; 10]),
            kind: TokenKind::Session,
            method: "session".to_owned(),
            second_factor: true,
            scope: None,
        })
    }

    /// Who it is, for audit and operations.
    pub fn actor(&self) -> String {
        match self {
            Self::User(user) => user.name.to_string(),
            Self::Host(host) => host.to_string(),
            Self::JoinToken(_) => "join-token".to_owned(),
            Self::Anonymous => "anonymous".to_owned(),
        }
    }

    /// How it proved who it is, and whether a second factor was part of that.
    pub fn method(&self) -> (&str, bool) {
        match self {
            Self::User(user) => (&user.method, user.second_factor),
            Self::Host(_) => ("certificate", false),
            Self::JoinToken(_) => ("join-token", false),
            Self::Anonymous => ("none", false),
        }
    }

    /// What kind of caller it is, for reasons.
    pub const fn kind_text(&self) -> &'static str {
        match self {
            Self::User(_) => "users",
            Self::Host(_) => "hosts",
            Self::JoinToken(_) => "machines that join",
            Self::Anonymous => "callers without a token",
        }
    }
}

/// SHA-256 of a secret: what is kept of it.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretHash([u8; 32]);

impl SecretHash {
    /// Of these bytes.
    pub fn of(secret: &[u8]) -> Self {
        Self(Sha256::digest(secret).into())
    }

    /// Whether it is the hash of this secret, in a time that does not depend on where they differ.
    pub fn is_of(&self, secret: &[u8]) -> bool {
        bool::from(self.0.ct_eq(&Self::of(secret).0))
    }
}

impl fmt::Display for SecretHash {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&crate::digest::hex(&self.0))
    }
}

impl fmt::Debug for SecretHash {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("SecretHash(…)")
    }
}

impl FromStr for SecretHash {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Self, Malformed> {
        let mut bytes = [0; 32];
        if text.len() != bytes.len() * 2 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(Malformed);
        }
        for (index, byte) in bytes.iter_mut().enumerate() {
            let pair = text.get(index * 2..index * 2 + 2).ok_or(Malformed)?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| Malformed)?;
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for SecretHash {
    type Error = Malformed;
    fn try_from(text: String) -> Result<Self, Malformed> {
        text.parse()
    }
}

impl From<SecretHash> for String {
    fn from(hash: SecretHash) -> String {
        hash.to_string()
    }
}

impl serde::Serialize for SecretHash {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for SecretHash {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A secret or hash that is not of its form. The text is not repeated: it may be a secret with a slip in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not of the form of a secret")]
pub struct Malformed;

/// A bearer secret in its two parts: `berth_<token's id without prefix>_<43 characters>`.
#[derive(Clone, PartialEq, Eq)]
pub struct Bearer {
    /// Which token.
    pub token: TokenId,
    /// What proves it.
    pub secret: [u8; SECRET_BYTES],
}

impl fmt::Display for Bearer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let id = self.token.as_str().trim_start_matches(TokenId::PREFIX).trim_start_matches('-');
        write!(formatter, "{BEARER_PREFIX}{id}_{}", URL_SAFE_NO_PAD.encode(self.secret))
    }
}

impl FromStr for Bearer {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Self, Malformed> {
        let rest = text.strip_prefix(BEARER_PREFIX).ok_or(Malformed)?;
        let (id, secret) = rest.split_once('_').ok_or(Malformed)?;
        let token = format!("{}-{id}", TokenId::PREFIX).parse().map_err(|_| Malformed)?;
        let bytes = URL_SAFE_NO_PAD.decode(secret).map_err(|_| Malformed)?;
        Ok(Self { token, secret: bytes.try_into().map_err(|_| Malformed)? })
    }
}

/// What a request shows to prove who sent it.
#[derive(Clone)]
pub enum Shown {
    /// Nothing.
    Nothing,
    /// A bearer secret.
    Bearer(Box<Bearer>),
    /// An `Authorization` header that is no bearer secret of ours.
    Nonsense,
    /// A certificate of a host.
    HostCertificate(HostId),
}

/// Reads what a request shows.
pub fn shown(headers: &HeaderMap, caller: &Caller) -> Shown {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    match (values.next(), values.next()) {
        (Some(value), None) => {
            let bearer = value.to_str().ok().and_then(|text| {
                let (scheme, secret) = text.split_once(' ')?;
                scheme.eq_ignore_ascii_case("bearer").then(|| secret.trim().parse().ok()).flatten()
            });
            bearer.map_or(Shown::Nonsense, |bearer| Shown::Bearer(Box::new(bearer)))
        }
        // Two of them: which one counts must not depend on who reads them.
        (Some(_), Some(_)) => Shown::Nonsense,
        (None, _) => match &caller.peer {
            Peer::Host(host) => Shown::HostCertificate(host.clone()),
            Peer::Manager | Peer::Anonymous => Shown::Nothing,
        },
    }
}

/// An error with its causes, in a line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// The one answer to a credential that is not good, whatever is wrong with it.
pub fn unauthenticated() -> Problem {
    Problem::new(
        ProblemCode::Unauthenticated,
        "this needs a valid token: none was given, or it is not known, has expired or was revoked",
    )
}

#[cfg(test)]
mod tests;
