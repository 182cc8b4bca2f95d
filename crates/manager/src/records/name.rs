//! Unique names: an entry of their own, made and removed in the transaction of the thing that is called so.

use berth_model::name::Name;
use berth_model::{SegmentId, VmId};

const PREFIX: &str = "/names/";
/// The scope of names that are unique in the whole cluster.
const CLUSTER: &str = "cluster";

/// A name with what it must be unique among.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct UniqueName {
    noun: &'static str,
    scope: String,
    name: Name,
}

impl UniqueName {
    /// Of something that is unique in the cluster (`host`, `segment`, `user`).
    pub fn in_cluster(noun: &'static str, name: &Name) -> Self {
        Self { noun, scope: CLUSTER.to_owned(), name: name.clone() }
    }

    /// Of a VM, unique in its segment.
    pub fn vm(segment: &SegmentId, name: &Name) -> Self {
        Self { noun: "vm", scope: segment.to_string(), name: name.clone() }
    }

    /// Of an image: unique in its segment, or among those that are for all. Were it unique in the whole cluster, a name
    /// that is taken would tell of images that one may not see.
    pub fn image(segment: Option<&SegmentId>, name: &Name) -> Self {
        let scope = segment.map_or_else(|| CLUSTER.to_owned(), ToString::to_string);
        Self { noun: "image", scope, name: name.clone() }
    }

    /// Of a schedule, unique in its segment.
    pub fn schedule(segment: &SegmentId, name: &Name) -> Self {
        Self { noun: "schedule", scope: segment.to_string(), name: name.clone() }
    }

    /// Of a snapshot, unique among its VM's.
    pub fn snapshot(vm: &VmId, name: &Name) -> Self {
        Self { noun: "snapshot", scope: vm.to_string(), name: name.clone() }
    }

    /// Where it stands in the store.
    pub fn key(&self) -> String {
        format!("{PREFIX}{}/{}/{}", self.noun, self.scope, self.name)
    }

    /// Under which all names are.
    pub(super) const fn prefix() -> &'static str {
        PREFIX
    }

    /// What a key of the store names, if it is one of a name.
    pub(super) fn noun_and_name(key: &str) -> Option<(String, String)> {
        let mut parts = key.strip_prefix(PREFIX)?.split('/');
        match (parts.next(), parts.next(), parts.next()) {
            (Some(noun), Some(_), Some(name)) => Some((noun.to_owned(), name.to_owned())),
            _ => None,
        }
    }
}
