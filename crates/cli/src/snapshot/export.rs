//! `berth snapshot export` and `import`: snapshots off the host, and VMs of them where nothing else is left.

use berth_api::manager::{ExportSnapshot, ImportSnapshot, RepositoryPath, SnapshotExport, SnapshotImport};
use berth_model::name::Name;
use clap::Args;

use super::{Which, change_query, resolve, tell};
use crate::arguments::ChangeArguments;
use crate::exit::Failure;
use crate::lookup::parse_name;
use crate::session::Session;
use crate::wait;

/// What to put where.
#[derive(Debug, Args)]
pub struct ExportArguments {
    #[command(flatten)]
    which: Which,
    /// The repository's name or id
    #[arg(long)]
    repository: String,
    #[command(flatten)]
    change: ChangeArguments,
}

/// What to make of what.
#[derive(Debug, Args)]
pub struct ImportArguments {
    /// The backup: the beginning of its id, or SEGMENT/VM or SEGMENT/VM/SNAPSHOT as they were called, the newest of these
    backup: String,
    /// The repository's name or id
    #[arg(long)]
    repository: String,
    /// The new VM's name
    #[arg(long, value_parser = parse_name)]
    name: Name,
    /// The new VM's segment
    #[arg(long, default_value = "default")]
    segment: String,
    /// The host that it is to be on; chosen without it
    #[arg(long)]
    host: Option<String>,
    /// The pool; without it one of the name that the VM was in, or the default
    #[arg(long, value_parser = parse_name)]
    pool: Option<Name>,
    /// Start the VM from the disk alone, as after a power cut
    #[arg(long, conflicts_with = "paused")]
    cold: bool,
    /// Hold the guest where the snapshot left it
    #[arg(long)]
    paused: bool,
    #[command(flatten)]
    change: ChangeArguments,
}

/// Puts a snapshot into a repository.
///
/// # Errors
/// When the manager refuses or can't be reached, and the operation's failure.
pub async fn export(session: &Session, arguments: ExportArguments) -> Result<(), Failure> {
    let ExportArguments { which, repository, change } = arguments;
    let path = which.vm.snapshot_path(&resolve(session, &which).await?);
    let wish = ExportSnapshot { repository };
    let reply = session.send::<SnapshotExport>(&path, &change_query(change), &wish).await?;
    wait::carry_through_and_tell(session, change, reply, tell).await
}

/// Makes a VM of a backup.
///
/// # Errors
/// As [`export`].
pub async fn import(session: &Session, arguments: ImportArguments) -> Result<(), Failure> {
    let ImportArguments { backup, repository, name, segment, host, pool, cold, paused, change } = arguments;
    let wish = ImportSnapshot { backup, name, segment, host, pool, cold, paused };
    let path = RepositoryPath { repository };
    let reply = session.send::<SnapshotImport>(&path, &change_query(change), &wish).await?;
    wait::carry_through_and_tell(session, change, reply, tell).await
}
