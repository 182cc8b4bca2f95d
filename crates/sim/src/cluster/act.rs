//! What a user does with a VM, as values: so that a story can draw, tell and repeat it.

use berth_api::Client;
use berth_api::endpoint::Nothing;
use berth_api::manager as contract;
use berth_model::VmId;
use berth_model::operation::Operation;
use berth_model::snapshot::Snapshot;

use super::requests::RequestError;

/// Something to do with a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Act {
    /// Start it.
    Start,
    /// Ask the guest to power down.
    Shutdown,
    /// Take the power away.
    Stop,
    /// Reset it.
    Restart,
    /// Hold the guest.
    Pause,
    /// Let it go on.
    Resume,
    /// Move it; to this host, or to whichever the manager chooses.
    Migrate(Option<String>),
    /// Take a snapshot.
    Snapshot,
    /// Put it back: to the snapshot of this number, counted from the oldest and around, or to the baseline.
    Restore(Option<usize>),
    /// Delete a snapshot that is not held.
    DeleteSnapshot(usize),
    /// Delete it, running or not.
    Delete,
}

impl Act {
    /// Asks for it. Gives the operation that was begun; none when there was nothing to do it with.
    ///
    /// # Errors
    /// When it is refused, or the manager is not to be reached.
    pub async fn begin(&self, client: &Client, vm: &VmId) -> Result<Option<Operation>, RequestError> {
        let path = contract::VmPath { vm: vm.to_string() };
        let change = contract::ChangeQuery::default();
        let begun = match self {
            Self::Start => client.call::<contract::VmStart>(&path, &change, &()).await?,
            Self::Shutdown => {
                let wish = contract::ShutdownVm { timeout_s: Some(5) };
                client.call::<contract::VmShutdown>(&path, &change, &wish).await?
            }
            Self::Stop => client.call::<contract::VmStop>(&path, &change, &()).await?,
            Self::Restart => client.call::<contract::VmRestart>(&path, &change, &()).await?,
            Self::Pause => client.call::<contract::VmPause>(&path, &change, &()).await?,
            Self::Resume => client.call::<contract::VmResume>(&path, &change, &()).await?,
            Self::Migrate(target) => {
                let wish = contract::MigrateVm { target: target.clone(), bandwidth_bytes_per_second: None };
                client.call::<contract::VmMigrate>(&path, &change, &wish).await?
            }
            Self::Snapshot => {
                let wish = contract::CreateSnapshot::default();
                client.call::<contract::SnapshotCreate>(&path, &change, &wish).await?
            }
            Self::Restore(which) => {
                let Some(snapshot) = chosen(client, vm, *which, |_| true).await? else { return Ok(None) };
                let wish = contract::RestoreVm { snapshot, no_undo: false, ..Default::default() };
                client.call::<contract::VmRestore>(&path, &change, &wish).await?
            }
            Self::DeleteSnapshot(which) => {
                let chosen = chosen(client, vm, Some(*which), |snapshot| !snapshot.pinned).await?;
                let Some(Some(snapshot)) = chosen else { return Ok(None) };
                let path = contract::SnapshotPath { vm: vm.to_string(), snapshot };
                client.call::<contract::SnapshotDelete>(&path, &change, &()).await?
            }
            Self::Delete => {
                let query = contract::DeleteQuery { force: Some(true), dry_run: None };
                client.call::<contract::VmDelete>(&path, &query, &()).await?
            }
        };
        Ok(begun.operation)
    }
}

/// The snapshot that is meant: none of it when there is none to choose, and no name for the baseline.
async fn chosen(
    client: &Client,
    vm: &VmId,
    which: Option<usize>,
    may: impl Fn(&Snapshot) -> bool,
) -> Result<Option<Option<String>>, RequestError> {
    let Some(which) = which else { return Ok(Some(None)) };
    let all: Vec<Snapshot> = snapshots(client, vm).await?.into_iter().filter(may).collect();
    Ok(which.checked_rem(all.len()).map(|at| Some(all[at].id.to_string())))
}

/// A VM's snapshots, oldest first.
///
/// # Errors
/// When the manager refuses, or is not to be reached.
pub async fn snapshots(client: &Client, vm: &VmId) -> Result<Vec<Snapshot>, RequestError> {
    let path = contract::VmPath { vm: vm.to_string() };
    let query = contract::PageQuery::default();
    Ok(client.call::<contract::SnapshotList>(&path, &query, &()).await?.items)
}

/// A VM as it is.
///
/// # Errors
/// When the manager refuses, or is not to be reached.
pub async fn show(client: &Client, vm: &VmId) -> Result<berth_model::vm::Vm, RequestError> {
    let path = contract::VmPath { vm: vm.to_string() };
    Ok(client.call::<contract::VmShow>(&path, &Nothing {}, &()).await?)
}
