//! The report: all VMs of this host at one instant, with a number that rises with each change, so that a manager can
//! wait for news and never takes old news for new.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use berth_api::agent::{AgentReport, ReportQuery, VmReport};
use berth_model::VmId;
use tokio::sync::watch;

use crate::task::WAIT_MAX;

/// Where the VMs' states are gathered.
#[derive(Debug)]
pub struct ReportBoard {
    incarnation: String,
    vms: Mutex<BTreeMap<VmId, VmReport>>,
    generation: watch::Sender<u64>,
}

impl ReportBoard {
    /// An empty board of an agent that has just started.
    pub fn new(incarnation: String) -> Arc<Self> {
        Arc::new(Self { incarnation, vms: Mutex::default(), generation: watch::Sender::new(1) })
    }

    /// Puts up how a VM is; none: this host has nothing of it any more.
    pub fn set(&self, vm: &VmId, report: Option<VmReport>) {
        let mut vms = self.lock();
        let changed = match report {
            Some(report) => vms.insert(vm.clone(), report.clone()).as_ref() != Some(&report),
            None => vms.remove(vm).is_some(),
        };
        if changed {
            self.generation.send_modify(|generation| *generation += 1);
        }
    }

    /// How one VM is.
    pub fn vm(&self, vm: &VmId) -> Option<VmReport> {
        self.lock().get(vm).cloned()
    }

    /// The report, at once.
    pub fn now(&self) -> AgentReport {
        let vms = self.lock();
        AgentReport {
            incarnation: self.incarnation.clone(),
            generation: *self.generation.borrow(),
            vms: vms.values().cloned().collect(),
        }
    }

    /// The report, once it is another than the one that was read last, or the time has passed.
    pub async fn wait(&self, query: &ReportQuery) -> AgentReport {
        if let (Some(incarnation), Some(after)) = (&query.incarnation, query.after)
            && *incarnation == self.incarnation
        {
            let wait = Duration::from_millis(query.wait_ms.unwrap_or(0)).min(WAIT_MAX);
            let mut generation = self.generation.subscribe();
            // That the time has passed is no fault: the present state is the answer.
            let _ = tokio::time::timeout(wait, generation.wait_for(|now| *now > after)).await;
        }
        self.now()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<VmId, VmReport>> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_model::vm::{GuestState, VmState};

    fn report(vm: &VmId) -> VmReport {
        VmReport {
            vm: vm.clone(),
            generation: 1,
            state: VmState::Running,
            guest: GuestState::Booting,
            migration: None,
            top: None,
            layers: 0,
            forwards: Vec::new(),
            trouble: None,
        }
    }

    #[tokio::test]
    async fn news_end_a_wait_and_no_news_do_not() {
        let board = ReportBoard::new("one".into());
        let vm = VmId::from_entropy([1; 10]);
        board.set(&vm, Some(report(&vm)));
        let first = board.now();
        board.set(&vm, Some(report(&vm)));
        let query = |wait_ms| ReportQuery {
            incarnation: Some("one".into()),
            after: Some(first.generation),
            wait_ms: Some(wait_ms),
        };
        assert_eq!(board.wait(&query(10)).await, first, "the same again is no news");
        let long = query(30_000);
        let (waited, ()) = tokio::join!(board.wait(&long), async { board.set(&vm, None) });
        assert!(waited.vms.is_empty() && waited.generation > first.generation);
        let stranger =
            ReportQuery { incarnation: Some("two".into()), after: Some(99), wait_ms: Some(30_000) };
        assert_eq!(board.wait(&stranger).await.incarnation, "one");
    }
}
