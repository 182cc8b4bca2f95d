//! The audit's part of the contract: its records, its proofs, and what is asked of it.

use berth_model::{OperationId, Timestamp};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// One request, or one thing that the system did by itself, as it was judged and as it ended.
///
/// A record becomes a leaf of the log when it ends; until then it is under way and has no number. The order of the
/// fields is the order in a leaf; `sequence` comes first, for readers that don't want to parse all of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditRecord {
    /// Its number: the index of its leaf, from 0, without gaps; none while it is under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<u64>,
    /// The request's id; empty for what the system did by itself.
    pub request_id: String,
    /// Who asked: a user's name, a host's id, `join-token`, `anonymous`, or `system:` and the loop that acted.
    pub actor: String,
    /// The actor's id, which is never used again; empty when there is none.
    pub actor_id: String,
    /// How the actor proved who it is: `token`, `session`, `certificate`, `join-token`, `system`, or `none`.
    pub method: String,
    /// The address it came from; empty for the system.
    pub address: String,
    /// The action that was needed (`vm.restore`), or what the system did.
    pub action: String,
    /// Method and path; never the query or a body.
    pub request: String,
    /// What it was about (`vm:default/books`): first what the action was decided on, then what else was named.
    pub resources: Vec<String>,
    /// `allow` or `deny`.
    pub decision: String,
    /// Why it was so decided.
    pub reason: String,
    /// The policies that decided.
    pub policies: Vec<String>,
    /// The hash of the whole policy set at that time.
    pub policy_hash: String,
    /// When it came.
    pub started_at: Timestamp,
    /// When it ended; none: not yet, or the manager died in between.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Timestamp>,
    /// The HTTP status; 499 when the caller hung up before the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// The operation that it began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<OperationId>,
    /// `ok`, the code of the problem that was answered, or `interrupted`; empty while it is under way.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub result: String,
    /// The manager died before it was answered: what was begun, an operation says.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub interrupted: bool,
}

/// Which records.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct AuditListQuery {
    /// Only those of this actor (name or id).
    #[serde(default)]
    pub actor: Option<String>,
    /// Only those of this action (`vm.restore`), or of this noun (`vm`).
    #[serde(default)]
    pub action: Option<String>,
    /// Only those about this (`vm:default/books` or `default/books`).
    #[serde(default)]
    pub resource: Option<String>,
    /// Only those that were decided so: `allow` or `deny`.
    #[serde(default)]
    pub decision: Option<String>,
    /// Only those that ended then or later.
    #[serde(default)]
    pub since: Option<Timestamp>,
    /// Only those that ended before.
    #[serde(default)]
    pub until: Option<Timestamp>,
    /// Those that are under way instead, which are not in the log yet.
    #[serde(default)]
    pub open: Option<bool>,
    /// Most items in the answer. There may be fewer although there are more: `next_cursor` says so.
    #[serde(default)]
    pub limit: Option<u32>,
    /// Where the last page ended: its `next_cursor`.
    #[serde(default)]
    pub cursor: Option<String>,
}

/// What the log is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditCheckpoint {
    /// Which log.
    pub origin: String,
    /// How many records it has.
    pub size: u64,
    /// The Merkle root over them, in base64.
    pub root: String,
    /// Origin, size and root as a signed note (C2SP tlog-checkpoint): what to believe.
    pub note: String,
}

/// What checkpoints are signed with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditKey {
    /// Which log.
    pub origin: String,
    /// `ed25519`.
    pub algorithm: String,
    /// The public key: `name+id+base64` (C2SP signed-note).
    pub key: String,
}

/// Which record, in which log.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct InclusionQuery {
    /// The record's number.
    #[serde(default)]
    pub sequence: Option<u64>,
    /// The log's size; none: that of the newest checkpoint.
    #[serde(default)]
    pub size: Option<u64>,
}

/// Which two logs.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ConsistencyQuery {
    /// The size of the older one.
    #[serde(default)]
    pub from: Option<u64>,
    /// The size of the newer one; none: that of the newest checkpoint.
    #[serde(default)]
    pub to: Option<u64>,
}

/// That a record is in the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InclusionProof {
    /// The record's number.
    pub sequence: u64,
    /// The log's size.
    pub size: u64,
    /// The root over so many records, in base64.
    pub root: String,
    /// The record's exact bytes, which are hashed.
    pub leaf: String,
    /// The hashes from the leaf to the root, in base64 (RFC 6962).
    pub proof: Vec<String>,
    /// The newest checkpoint, which is signed.
    pub checkpoint: String,
}

/// That the log has only grown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ConsistencyProof {
    /// The older size.
    pub from: u64,
    /// The newer size.
    pub to: u64,
    /// The root over the newer one, in base64.
    pub root: String,
    /// The hashes (RFC 6962), in base64.
    pub proof: Vec<String>,
    /// The newest checkpoint, which is signed.
    pub checkpoint: String,
}

/// What to write out.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct AuditExportQuery {
    /// `jsonl` (which can be verified offline), `ocsf` or `cef`; none: `jsonl`.
    #[serde(default)]
    pub format: Option<String>,
    /// Only what ended then or later.
    #[serde(default)]
    pub since: Option<Timestamp>,
    /// Only what ended before.
    #[serde(default)]
    pub until: Option<Timestamp>,
}
