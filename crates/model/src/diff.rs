//! What differs between two snapshots of a VM: files, memory, configuration.

use serde::{Deserialize, Serialize};

/// What differs between two snapshots, the earlier one named first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SnapshotDiff {
    /// How many bytes of the disk were written in one and not in the other.
    pub disk_written_bytes: u64,
    /// What differs on the file systems that both have.
    pub file_systems: Vec<FileSystemDiff>,
    /// What may differ too and could not be read, in words: another kind of file system, for one.
    pub unread: Vec<String>,
    /// How the memory differs; none: one of them has no memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryDiff>,
    /// What of the VM's specification differs.
    pub configuration: Vec<ConfigurationChange>,
}

/// What differs on one file system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct FileSystemDiff {
    /// Where it is: `disk` for all of the disk, or `p1`, `p2` and so on.
    pub volume: String,
    /// How many files and directories are new.
    pub added: u64,
    /// How many are gone.
    pub removed: u64,
    /// How many are others.
    pub modified: u64,
    /// The first of them, as many as were asked for.
    pub changes: Vec<FileChange>,
}

/// What became of a file or directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum FileChangeKind {
    /// It is new.
    Added,
    /// It is gone.
    Removed,
    /// It is another.
    Modified,
}

/// What of a file is another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum FileAspect {
    /// Its type: a file became a directory, say.
    Type,
    /// Its bytes.
    Content,
    /// Its permissions.
    Mode,
    /// Its owner or group.
    Owner,
    /// When it was written.
    Time,
}

/// A file or directory that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct FileChange {
    /// Its path from the file system's root.
    pub path: String,
    /// What became of it.
    pub kind: FileChangeKind,
    /// What of it is another; nothing for what is new or gone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aspects: Vec<FileAspect>,
}

/// How the memory of two snapshots differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct MemoryDiff {
    /// Pages that differ, of 4,096 bytes.
    pub changed_pages: u64,
    /// Pages that the guest has.
    pub pages: u64,
}

/// A part of a VM's specification that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ConfigurationChange {
    /// Which: `memory_mib`, `nics.0.mac`.
    pub field: String,
    /// What it was; empty: it was not there.
    pub from: String,
    /// What it is; empty: it is not there.
    pub to: String,
}
