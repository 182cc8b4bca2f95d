//! How a refusal or a failure is said, everywhere: one code from one list, and what was wrong, where, and what was
//! expected instead.
//!
//! A `Problem` is what crosses the wire and what stands in a finished operation; the errors inside the program are
//! types of their own and become problems at the edge. The codes are stable: scripts branch on them.

use serde::{Deserialize, Serialize};

macro_rules! codes {
    ($($(#[doc = $doc:literal])* $name:ident = $text:literal, $status:literal, $exit:literal;)*) => {
        /// The stable code of a problem.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
        pub enum ProblemCode {$(
            $(#[doc = $doc])*
            #[serde(rename = $text)]
            $name,
        )*}

        impl ProblemCode {
            /// Every code, for documents and tests.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The code as it stands on the wire.
            pub const fn as_str(self) -> &'static str {
                match self {$(Self::$name => $text),*}
            }

            /// The HTTP status that carries it.
            pub const fn http_status(self) -> u16 {
                match self {$(Self::$name => $status),*}
            }

            /// The exit code of the command line.
            pub const fn exit_code(self) -> u8 {
                match self {$(Self::$name => $exit),*}
            }

            /// What it means, in a line.
            pub const fn meaning(self) -> &'static str {
                match self {$(Self::$name => concat!($($doc),*)),*}
            }
        }
    };
}

codes! {
    /// A field of the request is missing, malformed or out of range.
    InvalidInput = "invalid-input", 400, 2;
    /// No token, or one that is not known, has expired or was revoked.
    Unauthenticated = "unauthenticated", 401, 3;
    /// The caller is known and may not do this.
    NotAllowed = "not-allowed", 403, 3;
    /// The caller may do this only once another person has approved this very request; the message names the approval.
    ApprovalNeeded = "approval-needed", 403, 3;
    /// A quota of the segment, or of one that it is in, would be exceeded.
    OverQuota = "over-quota", 422, 1;
    /// There is no such thing, or none that the caller may see.
    NotFound = "not-found", 404, 4;
    /// The name is taken.
    AlreadyExists = "already-exists", 409, 5;
    /// Another operation is changing the same thing.
    Busy = "busy", 409, 5;
    /// The thing is in a state in which this can't be done.
    WrongState = "wrong-state", 409, 5;
    /// The thing is protected, pinned or still needed by another.
    Protected = "protected", 409, 5;
    /// The thing has changed since the caller read it (If-Match).
    Changed = "changed", 412, 5;
    /// The body is larger than is taken.
    TooLarge = "too-large", 413, 2;
    /// No host can take it, or the named one can't: the message says why, host by host.
    NoPlacement = "no-placement", 422, 1;
    /// An image's bytes are not what their format, size or checksum says.
    BadImage = "bad-image", 422, 1;
    /// There is no room left where the data had to go.
    NoSpace = "no-space", 507, 1;
    /// QEMU refused, failed or died; what it said is in the message.
    Hypervisor = "hypervisor", 502, 1;
    /// The guest did not do what was waited for.
    Guest = "guest", 504, 1;
    /// The caller, or somebody who may, cancelled it.
    Cancelled = "cancelled", 409, 1;
    /// A host or the manager can't be reached.
    Unreachable = "unreachable", 503, 6;
    /// A fault of Berth's own; please report it with the request id.
    Internal = "internal", 500, 1;
}

/// What went wrong, where, and what was expected: the body of every error answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema, thiserror::Error)]
#[error("{message}")]
pub struct Problem {
    /// The stable code.
    pub code: ProblemCode,
    /// One sentence for a person: what was wrong and, where it helps, what to do.
    pub message: String,
    /// The field that was at fault, as a path in the request (`nics.0.address`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// The value that was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// What would have been right.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected: Option<String>,
    /// The request that it answers, to be found in logs and audit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
}

/// Longest value repeated in a problem, in characters: enough to recognise it, too little to flood a log.
const VALUE_CHARS_MAX: usize = 200;

impl Problem {
    /// A problem with a code and a sentence.
    pub fn new(code: ProblemCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), field: None, value: None, expected: None, request_id: None }
    }

    /// A field with a wrong value: the sentence is made of the three.
    pub fn field(field: impl Into<String>, value: impl ToString, expected: impl Into<String>) -> Self {
        let (field, expected) = (field.into(), expected.into());
        let value: String = value.to_string().chars().take(VALUE_CHARS_MAX).collect();
        let message = format!("{field} is '{value}': expected {expected}");
        Self {
            field: Some(field),
            value: Some(value),
            expected: Some(expected),
            ..Self::new(ProblemCode::InvalidInput, message)
        }
    }

    /// Nothing of this noun has this name or id.
    pub fn not_found(noun: &str, name: impl ToString) -> Self {
        let name: String = name.to_string().chars().take(VALUE_CHARS_MAX).collect();
        Self {
            field: Some(noun.to_owned()),
            value: Some(name.clone()),
            expected: Some(format!("an existing {noun}")),
            ..Self::new(ProblemCode::NotFound, format!("there is no {noun} '{name}'"))
        }
    }

    /// What a host's agent met, in the words of the request: which pool is full, whose QEMU failed. Who asked for a
    /// VM named neither the path nor the process that the agent speaks of. One that names its field is left as it is.
    #[must_use]
    pub fn of_host(self, host: &str, pool: Option<&str>) -> Self {
        if self.field.is_some() {
            return self;
        }
        match (self.code, pool) {
            (ProblemCode::NoSpace, Some(pool)) => {
                let message = format!("pool {pool} of host {host} is full: {}", self.message);
                Self { message, ..self }.at("pool", pool, format!("room left in it on host {host}"))
            }
            (ProblemCode::Hypervisor, _) => {
                let message = format!("on host {host}, {}", self.message);
                Self { message, ..self }.at("host", host, "a host whose QEMU does what it is asked to")
            }
            _ => self,
        }
    }

    /// The same with the field, value and expectation filled in, whatever the code.
    #[must_use]
    pub fn at(mut self, field: impl Into<String>, value: impl ToString, expected: impl Into<String>) -> Self {
        self.field = Some(field.into());
        self.value = Some(value.to_string().chars().take(VALUE_CHARS_MAX).collect());
        self.expected = Some(expected.into());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_and_read_back() {
        let mut seen = std::collections::BTreeSet::new();
        for &code in ProblemCode::ALL {
            assert!(seen.insert(code.as_str()), "{code:?} twice");
            let json = serde_json::to_string(&code).expect("json");
            assert_eq!(json, format!("\"{}\"", code.as_str()));
            assert_eq!(serde_json::from_str::<ProblemCode>(&json).expect("own json"), code);
            assert!((400..=599).contains(&code.http_status()) && code.exit_code() > 0);
        }
    }

    #[test]
    fn a_field_problem_names_field_value_and_expectation() {
        let problem = Problem::field("memory_mib", 0, "at least 64");
        assert_eq!(problem.message, "memory_mib is '0': expected at least 64");
    }

    #[test]
    fn a_hosts_trouble_names_the_host_once() {
        let full = Problem::new(ProblemCode::NoSpace, "/srv/x can't be written").of_host("h2", Some("local"));
        assert_eq!(full.message, "pool local of host h2 is full: /srv/x can't be written");
        assert_eq!((full.field.as_deref(), full.value.as_deref()), (Some("pool"), Some("local")));
        assert_eq!(full.clone().of_host("h1", Some("other")), full, "the first who tells knows best");
        let dead = Problem::new(ProblemCode::Hypervisor, "QEMU ended").of_host("h2", None);
        assert_eq!((dead.message.as_str(), dead.value.as_deref()), ("on host h2, QEMU ended", Some("h2")));
        let other = Problem::new(ProblemCode::Guest, "it is silent");
        assert_eq!(other.clone().of_host("h2", Some("local")), other);
    }

    #[test]
    fn the_reference_has_a_true_line_for_every_code() {
        let reference = include_str!("../../../docs/errors.md");
        for &code in ProblemCode::ALL {
            let (name, status, exit) = (code.as_str(), code.http_status(), code.exit_code());
            let line = format!("| `{name}` | {status} | {exit} | {} |", code.meaning().trim());
            assert!(reference.contains(&line), "docs/errors.md lacks: {line}");
        }
    }
}
