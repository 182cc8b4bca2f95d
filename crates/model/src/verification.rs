//! Whether a snapshot is still what it was: by its bytes, or by a guest that is started from it.
//!
//! Bytes that are as they were say that nothing was lost; that a guest comes up from them, only a start can say. So
//! what a start has found bad stays bad however right the bytes are, until a start has gone well.

use serde::{Deserialize, Serialize};

use crate::name::Name;
use crate::{SnapshotId, Timestamp};

/// How a snapshot was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Means {
    /// All its bytes were read and held against their hashes.
    Hash,
    /// The same, and then a clone without a network was started from it, and its guest said that it is ready.
    Boot,
}

impl Means {
    /// The word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Hash => "hash",
            Self::Boot => "boot",
        }
    }
}

/// What a look at a snapshot has shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It is as it was.
    Good,
    /// It is not: restoring it would give something else than was taken, or nothing.
    Bad,
}

/// The last look at a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Verification {
    /// When it was over.
    pub at: Timestamp,
    /// How the verdict came about.
    pub by: Means,
    /// The verdict.
    pub verdict: Verdict,
    /// Of a bad one, what is wrong and where; of a good one, what there is to say besides.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

impl Verification {
    /// What is to be kept when this look comes after `before`.
    #[must_use]
    pub fn after(self, before: Option<&Self>) -> Self {
        match before {
            Some(before)
                if before.is_bad()
                    && before.by == Means::Boot
                    && self.by == Means::Hash
                    && !self.is_bad() =>
            {
                Self { at: self.at, ..before.clone() }
            }
            _ => self,
        }
    }

    /// Whether the snapshot was found bad.
    pub const fn is_bad(&self) -> bool {
        matches!(self.verdict, Verdict::Bad)
    }
}

/// Something in a snapshot that is not what it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SnapshotFault {
    /// Which file, from the VM's directory on.
    pub file: String,
    /// Where in it the first bad block begins, in bytes; none: the file as a whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// What is wrong.
    pub detail: String,
}

impl std::fmt::Display for SnapshotFault {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.offset {
            Some(offset) => write!(formatter, "{} at byte {offset}: {}", self.file, self.detail),
            None => write!(formatter, "{}: {}", self.file, self.detail),
        }
    }
}

/// What reading all of a snapshot has shown.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
pub struct VerificationFacts {
    /// What is not as it was, one a file; none: all is.
    pub faults: Vec<SnapshotFault>,
    /// What was read, in bytes.
    pub read_bytes: u64,
    /// What had been read whole by another verification a moment ago and was not read again, in bytes.
    pub spared_bytes: u64,
    /// Layers that had no hashes yet: they were hashed now, and what happened to them before is not known.
    pub first_hashed: u64,
    /// How long it took, in milliseconds.
    pub total_ms: u64,
}

impl VerificationFacts {
    /// What is to be said of it, in a sentence; empty when there is nothing but that all is well.
    pub fn detail(&self) -> String {
        let mut words = Vec::new();
        if let Some(first) = self.faults.first() {
            words.push(first.to_string());
        }
        if self.faults.len() > 1 {
            words.push(format!("and {}", counted(self.faults.len() as u64 - 1, "more file")));
        }
        if self.first_hashed > 0 {
            words.push(format!("{} first hashed now", counted(self.first_hashed, "layer")));
        }
        words.join("; ")
    }
}

fn counted(count: u64, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// After how long a new snapshot is verified by itself, in milliseconds. Shorter: it is read while what it was taken for goes
/// on, and those that a schedule keeps for minutes are read for nothing. Longer: one that went wrong is known later.
pub const FIRST_AFTER_MS: u64 = 15 * 60 * 1000;
/// After how long it is verified again, in milliseconds. Shorter: disks read more. Longer: decay is known later.
pub const AGAIN_AFTER_MS: u64 = 7 * 24 * 3600 * 1000;

/// Whether a snapshot is to be verified by itself.
pub fn is_due(created_at: Timestamp, verified: Option<&Verification>, now: Timestamp) -> bool {
    match verified {
        None => now.millis_since(created_at) >= FIRST_AFTER_MS,
        Some(found) => now.millis_since(found.at) >= AGAIN_AFTER_MS,
    }
}

/// That a snapshot is not to be used for what was asked, because it was found bad.
pub fn refusal(snapshot: &SnapshotId, name: &Name, found: &Verification) -> String {
    format!(
        "snapshot {name} ({snapshot}) failed its verification by {} at {}: {}",
        found.by.as_str(),
        found.at,
        found.detail
    )
}

/// Takes back that a snapshot is bad, from what is said of its VM.
pub fn end_trouble(trouble: &mut Option<String>, snapshot: &SnapshotId) {
    if trouble
        .as_ref()
        .is_some_and(|trouble| trouble.starts_with("snapshot ") && trouble.contains(snapshot.as_str()))
    {
        *trouble = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(by: Means, verdict: Verdict, at: u64) -> Verification {
        Verification { at: Timestamp::from_millis(at), by, verdict, detail: format!("{at}") }
    }

    #[test]
    fn right_bytes_do_not_make_good_what_did_not_start() {
        use Means::{Boot, Hash};
        use Verdict::{Bad, Good};
        let cases = [
            (None, (Hash, Good), (Hash, Good)),
            (Some((Hash, Bad)), (Hash, Good), (Hash, Good)),
            (Some((Boot, Bad)), (Hash, Good), (Boot, Bad)),
            (Some((Boot, Bad)), (Hash, Bad), (Hash, Bad)),
            (Some((Boot, Bad)), (Boot, Good), (Boot, Good)),
            (Some((Boot, Good)), (Hash, Bad), (Hash, Bad)),
        ];
        for (before, now, kept) in cases {
            let before = before.map(|(by, verdict)| found(by, verdict, 1));
            let after = found(now.0, now.1, 2).after(before.as_ref());
            assert_eq!((after.by, after.verdict), kept, "{before:?} {now:?}");
            assert_eq!(after.at, Timestamp::from_millis(2), "it was looked at now, whatever is kept");
        }
    }

    #[test]
    fn each_is_verified_once_and_then_weekly() {
        let taken = Timestamp::from_millis(1_000_000);
        let due = |found: Option<&Verification>, after| is_due(taken, found, taken.plus_millis(after));
        assert!(!due(None, FIRST_AFTER_MS - 1) && due(None, FIRST_AFTER_MS));
        let good = found(Means::Hash, Verdict::Good, 2_000_000);
        assert!(!due(Some(&good), AGAIN_AFTER_MS) && due(Some(&good), AGAIN_AFTER_MS + 1_000_000));
        assert!(!is_due(taken, None, Timestamp::from_millis(1)), "a clock that was set back");
    }

    #[test]
    fn the_trouble_that_a_snapshot_is_ends_with_it_and_no_other_does() {
        let [bad, other] = [1, 2].map(|number| SnapshotId::from_entropy([number; 10]));
        let said =
            refusal(&bad, &"before-close".parse().expect("a name"), &found(Means::Hash, Verdict::Bad, 1));
        for (trouble, ended) in
            [(said.clone(), &bad), (said.clone(), &other), ("vm.start failed".into(), &bad)]
        {
            let mut now = Some(trouble.clone());
            end_trouble(&mut now, ended);
            assert_eq!(now.is_none(), trouble == said && ended == &bad, "{trouble}");
        }
    }

    #[test]
    fn a_fault_names_its_file_and_its_place() {
        let fault = |offset| SnapshotFault {
            file: "layers/a.qcow2".into(),
            offset,
            detail: "it has another hash".into(),
        };
        let facts = VerificationFacts {
            faults: vec![fault(Some(1 << 20)), fault(None)],
            first_hashed: 2,
            ..VerificationFacts::default()
        };
        let expected =
            "layers/a.qcow2 at byte 1048576: it has another hash; and 1 more file; 2 layers first hashed now";
        assert_eq!(facts.detail(), expected);
        assert_eq!(VerificationFacts::default().detail(), "");
    }
}
