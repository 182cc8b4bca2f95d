//! What the manager does without being asked: small loops that read how things are, compare and act.
//!
//! None of them is given input: each begins with the records, wakes by a timer or because something changed, and may
//! be woken once too often. So nothing is lost when the manager dies, and nothing has to be repeated in order.
//!
//! - [`hosts`]: asks each host for its inventory and for news of its VMs, and says when it is gone;
//! - [`reports`]: what such news means for a VM's record;
//! - [`baseline`]: takes the first snapshot of each VM whose guest is ready;
//! - [`expiry`]: deletes what is kept for a time only;
//! - [`schedules`]: begins the runs of schedules that are due, and goes on with those that were begun;
//! - [`verification`]: has snapshots verified, each once and then weekly;
//! - [`debts`]: has removed what could not be when its host was gone.

pub mod hosts;
pub mod reports;

pub mod baseline;

pub mod schedules;

pub mod verification;

pub mod debts;
pub mod expiry;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use berth_model::{HostId, VmId};
use tokio::sync::Notify;

use crate::cluster::Cluster;

/// What the loops share.
#[derive(Default)]
pub struct Watchers {
    /// Orders questions to hosts and ends of operations.
    instants: AtomicU64,
    /// When the last operation on a VM ended: older news is of the time before it.
    fences: Mutex<HashMap<VmId, u64>>,
    forgot_at: AtomicU64,
    nudges: Mutex<HashMap<HostId, Arc<Notify>>>,
    leftovers: Mutex<BTreeMap<HostId, Vec<VmId>>>,
    paying: Mutex<HashSet<HostId>>,
}

impl Watchers {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Has a host asked anew at once.
    pub fn nudge(&self, host: &HostId) {
        self.nudge_of(host).notify_one();
    }

    /// VMs that hosts have something of and that are not theirs as far as is recorded: to be looked at by a person,
    /// because deleting them could be the loss of the only copy.
    pub fn leftovers(&self) -> BTreeMap<HostId, Vec<VmId>> {
        self.leftovers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// An operation on a VM is as good as over: what its host was asked before this says nothing of it any more.
    pub(crate) fn fence(&self, vm: &VmId) {
        let now = self.instant();
        self.fences.lock().unwrap_or_else(PoisonError::into_inner).insert(vm.clone(), now);
    }

    /// Forgets the fences of VMs that are no more, the second time that it comes by: an answer that was on its way when
    /// the VM was deleted must not be taken for news of a stranger.
    fn forget_fences(&self, exists: impl Fn(&VmId) -> bool) {
        let last = self.forgot_at.swap(self.instant(), Ordering::SeqCst);
        let mut fences = self.fences.lock().unwrap_or_else(PoisonError::into_inner);
        fences.retain(|vm, fence| *fence > last || exists(vm));
    }

    fn instant(&self) -> u64 {
        self.instants.fetch_add(1, Ordering::SeqCst)
    }

    /// Whether an answer to a question that was asked then is about the time after the VM's last operation.
    fn is_news(&self, vm: &VmId, asked: u64) -> bool {
        let fences = self.fences.lock().unwrap_or_else(PoisonError::into_inner);
        fences.get(vm).is_none_or(|fence| asked > *fence)
    }

    fn nudge_of(&self, host: &HostId) -> Arc<Notify> {
        Arc::clone(
            self.nudges.lock().unwrap_or_else(PoisonError::into_inner).entry(host.clone()).or_default(),
        )
    }

    fn set_leftovers(&self, host: &HostId, found: Vec<VmId>) -> bool {
        let mut leftovers = self.leftovers.lock().unwrap_or_else(PoisonError::into_inner);
        let before = leftovers.get(host).map(Vec::as_slice).unwrap_or_default();
        let news = found.iter().any(|vm| !before.contains(vm));
        if found.is_empty() {
            leftovers.remove(host);
        } else {
            leftovers.insert(host.clone(), found);
        }
        news
    }
}

/// Starts all of them.
pub(crate) fn start(cluster: &Arc<Cluster>) {
    cluster.spawn(hosts::watch_all(Arc::clone(cluster)));
    cluster.spawn(baseline::keep(Arc::clone(cluster)));
    cluster.spawn(expiry::keep(Arc::clone(cluster)));
    cluster.spawn(verification::keep(Arc::clone(cluster)));
}
