//! What the manager does without being asked.

use std::sync::Arc;

use berth_model::VmId;

use crate::cluster::Cluster;

/// What is watched.
#[derive(Default)]
pub struct Watchers {}

impl Watchers {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// A VM's slot is free again.
    pub(crate) fn released(&self, _vm: &VmId) {}
}

pub(crate) fn start(_cluster: &Arc<Cluster>) {}
