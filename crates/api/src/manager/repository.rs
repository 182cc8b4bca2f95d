//! Repositories and what goes into them and out of them, as it is asked for.

use berth_model::name::Name;
use berth_model::repository::RepositoryKeys;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Wish for a repository to be known.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct CreateRepository {
    /// Its name, unique in the cluster.
    pub name: Name,
    /// Where it is; each host reaches it from itself. As text, for what is wrong with it is not to be repeated: some put a
    /// password into it.
    pub url: String,
    /// The segment that it is for (id or name); none: it is the cluster's.
    #[serde(default)]
    pub segment: Option<String>,
    /// What opens it. No answer ever shows it.
    pub keys: RepositoryKeys,
    /// Make it, where there is none; otherwise it must be there.
    #[serde(default)]
    pub init: bool,
}

/// Where a snapshot is to go.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ExportSnapshot {
    /// The repository (id or name).
    pub repository: String,
}

/// Wish for a new VM that is made from a backup.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ImportSnapshot {
    /// Which: the beginning of its id, or what its VM was called (`segment/name`), with or without `/snapshot`; the newest of
    /// those.
    pub backup: String,
    /// The new VM's name.
    pub name: Name,
    /// The segment that it is to be in (id or name).
    pub segment: String,
    /// The host that it is to be on (id or name); none: chosen.
    #[serde(default)]
    pub host: Option<String>,
    /// The pool; none: one of the name that the VM was in, or the default.
    #[serde(default)]
    pub pool: Option<Name>,
    /// Start from the disk alone, as after a power cut.
    #[serde(default)]
    pub cold: bool,
    /// Hold the guest where the snapshot left it.
    #[serde(default)]
    pub paused: bool,
}
