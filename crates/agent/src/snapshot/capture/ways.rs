//! Which way memory is taken.
//!
//! In passes ([`CaptureWay::PreCopy`]) costs a running guest nothing but its pause, as long as it writes more slowly than
//! its memory is taken. In the background costs a stall at each first write. So passes come first, and the background is what a
//! guest gets that they don't catch, seen from what QEMU measures of it; where there is no background, it is slowed down.
//!
//! A machine that remembers something beside its disk ([`crate::nvram`]) is taken in passes only: QEMU does not hold back
//! what a guest writes to a flash chip until the chip was sent, so in the background it might not be of the instant.
//!
//! A way that fails for a reason of its own is followed by the other one, so that a snapshot is taken if it can be.

use berth_model::snapshot::CaptureWay;
use berth_model::{Problem, ProblemCode};

use super::background;
use crate::vm::VmRuntime;

/// The ways that are left for a snapshot, the next one first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ways(Vec<CaptureWay>);

impl Ways {
    /// Those that there are for a VM now.
    pub async fn of(vm: &VmRuntime, is_running: bool) -> Self {
        let mut ways = vec![CaptureWay::PreCopy];
        let remembers = vm.vm_record().is_ok_and(|record| record.fittings.nvram.is_some());
        let releases = vm
            .definition()
            .is_ok_and(|definition| background::releases_broken_off(&definition.spec.machine_type));
        if is_running
            && releases
            && !remembers
            && let Ok(qmp) = vm.qmp()
            && background::is_possible(qmp).await
        {
            ways.push(CaptureWay::Background);
        }
        Self(ways)
    }

    /// The one that is next.
    pub fn next(&self) -> CaptureWay {
        self.0.first().copied().unwrap_or_default()
    }

    /// Whether there is another one after the next.
    pub fn has_other(&self) -> bool {
        self.0.len() > 1
    }

    /// What is left when the next one has failed; none when there is nothing, or nothing would help.
    pub fn after(mut self, problem: &Problem) -> Option<Self> {
        let is_final = matches!(problem.code, ProblemCode::Cancelled | ProblemCode::NoSpace);
        if is_final || !self.has_other() {
            return None;
        }
        self.0.remove(0);
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_way_that_fails_is_followed_by_the_other_unless_that_would_not_help() {
        let both = Ways(vec![CaptureWay::PreCopy, CaptureWay::Background]);
        let failed = |code| Problem::new(code, "no");
        assert_eq!(both.clone().after(&failed(ProblemCode::NoSpace)), None);
        assert_eq!(both.clone().after(&failed(ProblemCode::Cancelled)), None);
        let left = both.after(&failed(ProblemCode::Hypervisor)).expect("one is left");
        assert_eq!((left.next(), left.has_other()), (CaptureWay::Background, false));
        assert_eq!(left.after(&failed(ProblemCode::Hypervisor)), None);
    }
}
