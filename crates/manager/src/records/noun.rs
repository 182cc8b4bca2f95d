//! What is recorded, and where.

use berth_api::agent::PutTask;
use berth_api::manager::{Approval, Grant, Policy, Role, Segment, Team, User};
use berth_model::host::Host;
use berth_model::image::Image;
use berth_model::name::Name;
use berth_model::repository::{Repository, RepositoryKeys};
use berth_model::schedule::{Part, Schedule};
use berth_model::snapshot::Snapshot;
use berth_model::vm::{PortForward, Vm};
use berth_model::{HostId, ImageId, RepositoryId, Timestamp, VmId};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::copy::Table;
use crate::auth::accounts::{JoinTokenRow, TokenRow};
use crate::auth::credential::{CredentialRow, IdentityRow};
use crate::auth::lockout::LockRow;
use crate::auth::session::SessionRow;
use crate::http::image::ImageUpload;
use crate::operations::OperationRow;

/// Something that is recorded and kept in memory.
pub trait Record: Serialize + DeserializeOwned + Send + Sync + 'static {
    /// Where its records are in the store; ends with a slash.
    const PREFIX: &'static str;
    /// What it is called in problems.
    const NOUN: &'static str;
    /// Its key without the prefix.
    fn record_id(&self) -> String;
}

/// A table for each kind of record that is kept in memory.
pub const TABLES: &[fn() -> Table] = &[
    Table::of::<Host>,
    Table::of::<Segment>,
    Table::of::<Image>,
    Table::of::<ImagePlace>,
    Table::of::<Vm>,
    Table::of::<Snapshot>,
    Table::of::<Schedule>,
    Table::of::<Part>,
    Table::of::<Repository>,
    Table::of::<RepositoryKeysRow>,
    Table::of::<OperationRow>,
    Table::of::<Debt>,
    Table::of::<FixedPorts>,
    Table::of::<User>,
    Table::of::<TokenRow>,
    Table::of::<JoinTokenRow>,
    Table::of::<ImageUpload>,
    Table::of::<LockRow>,
    Table::of::<CredentialRow>,
    Table::of::<IdentityRow>,
    Table::of::<SessionRow>,
    Table::of::<Team>,
    Table::of::<Role>,
    Table::of::<Grant>,
    Table::of::<Policy>,
    Table::of::<Approval>,
];

macro_rules! records {
    ($($type:ty: $prefix:literal, $noun:literal, $id:expr;)*) => {$(
        impl Record for $type {
            const PREFIX: &'static str = $prefix;
            const NOUN: &'static str = $noun;
            fn record_id(&self) -> String {
                let id: fn(&Self) -> String = $id;
                id(self)
            }
        }
    )*};
}

records! {
    Host: "/hosts/", "host", |host| host.id.to_string();
    Segment: "/segments/", "segment", |segment| segment.id.to_string();
    Image: "/images/", "image", |image| image.id.to_string();
    ImagePlace: "/image-places/", "image place", |place| ImagePlace::id_of(&place.image, &place.pool_uuid);
    Vm: "/vms/", "vm", |vm| vm.id.to_string();
    Snapshot: "/snapshots/", "snapshot", |snapshot| format!("{}/{}", snapshot.vm, snapshot.id);
    Schedule: "/schedules/", "schedule", |schedule| schedule.id.to_string();
    Part: "/schedule-parts/", "part of a schedule", |part| format!("{}/{}", part.schedule, part.vm);
    Repository: "/repositories/", "repository", |repository| repository.id.to_string();
    RepositoryKeysRow: "/repository-keys/", "keys of a repository", |row| row.repository.to_string();
    OperationRow: "/operations/", "operation", |row| row.operation.id.to_string();
    FixedPorts: "/fixed-ports/", "fixed ports", |ports| ports.vm.to_string();
    Team: "/teams/", "team", |team| team.id.to_string();
    Role: "/roles/", "role", |role| role.id.as_ref().map_or_else(|| role.name.to_string(), ToString::to_string);
    Grant: "/grants/", "grant", |grant| grant.id.to_string();
    Policy: "/policies/", "policy", |policy| policy.id.to_string();
    Approval: "/approvals/", "approval", |approval| approval.id.to_string();
    Debt: "/debts/", "debt", |debt| format!("{}/{}", debt.host, debt.task);
}

/// That an image is whole in a pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImagePlace {
    /// The image.
    pub image: ImageId,
    /// The pool's identity: two hosts that see one directory see one place.
    pub pool_uuid: String,
    /// What the pool is called.
    pub pool: Name,
}

impl ImagePlace {
    /// The id of its record.
    pub fn id_of(image: &ImageId, pool_uuid: &str) -> String {
        format!("{image}/{pool_uuid}")
    }
}

/// What opens a repository. Apart from the repository itself, so that nothing that shows that can show this.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepositoryKeysRow {
    /// The repository.
    pub repository: RepositoryId,
    /// What opens it.
    pub keys: RepositoryKeys,
}

/// Ports of the host that a VM was wished to have forwarded. The others are any free ones, chosen anew by each host; in
/// the VM itself stands what its host chose.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FixedPorts {
    /// The VM.
    pub vm: VmId,
    /// For each of its interfaces.
    pub forwards: Vec<Vec<PortForward>>,
}

/// Something that has to be removed from a host that can't be reached now: done as soon as it can.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Debt {
    /// The host.
    pub host: HostId,
    /// The task's id.
    pub task: String,
    /// What is to be done.
    pub put: PutTask,
    /// Why, in a sentence.
    pub why: String,
    /// Since when.
    pub since: Timestamp,
}
