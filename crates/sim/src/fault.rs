//! Faults on demand: what a fake QEMU is to do wrong, once, at which moment.

use std::sync::{Arc, Mutex, PoisonError};

use berth_model::VmId;
use tokio_util::sync::CancellationToken;

/// Something to go wrong.
#[derive(Debug, Clone)]
pub enum Fault {
    /// It ends before it greets, with these words on its standard error.
    DieAtStart {
        /// The words.
        words: String,
    },
    /// It ends instead of obeying a command.
    DieAt(Moment),
    /// It obeys a command and ends before it can answer, with what its guest did meanwhile on the disk.
    DieAfter(Moment),
    /// It refuses a command.
    Refuse {
        /// Which.
        moment: Moment,
        /// In these words.
        words: String,
    },
    /// It obeys no more and says nothing any more, from a command on; the guest goes on as it is.
    Hang(Moment),
    /// It takes its time with a command, so that other things can be made to happen meanwhile.
    Wait(Moment, Gate),
}

/// Where a command is held up.
#[derive(Debug, Clone, Default)]
pub struct Gate {
    inner: Arc<(CancellationToken, CancellationToken)>,
}

impl Gate {
    /// Waits until the command has come.
    pub async fn reached(&self) {
        self.inner.0.cancelled().await;
    }

    /// Lets it be obeyed.
    pub fn open(&self) {
        self.inner.1.cancel();
    }

    pub(crate) async fn pass(&self) {
        self.inner.0.cancel();
        self.inner.1.cancelled().await;
    }
}

/// A moment: the `nth` command of this name, counted from 1, of those that come after the fault was planned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moment {
    /// The command; none: any.
    pub command: Option<String>,
    /// Which of them.
    pub nth: u64,
}

impl Moment {
    /// The next command of this name.
    pub fn next(command: &str) -> Self {
        Self { command: Some(command.to_owned()), nth: 1 }
    }

    /// The `nth` command from now, whatever it is.
    pub const fn nth_command(nth: u64) -> Self {
        Self { command: None, nth }
    }

    /// Whether it has come with this command.
    fn comes(&mut self, command: &str) -> bool {
        if self.command.as_deref().is_some_and(|wanted| wanted != command) {
            return false;
        }
        self.nth = self.nth.saturating_sub(1);
        self.nth == 0
    }
}

/// How a command is to be met.
#[derive(Debug, Clone)]
pub(crate) enum Misdeed {
    Die,
    DieAfter,
    Refuse(String),
    Hang,
    Wait(Gate),
}

/// The faults that are still to come.
#[derive(Debug, Default)]
pub struct Faults {
    planned: Mutex<Vec<(VmId, Fault)>>,
}

impl Faults {
    /// Plans one for a VM's QEMUs, on whatever host.
    pub fn plan(&self, vm: &VmId, fault: Fault) {
        self.lock().push((vm.clone(), fault));
    }

    /// Forgets those that have not come.
    pub fn clear(&self) {
        self.lock().clear();
    }

    pub(crate) fn at_start(&self, vm: &VmId) -> Option<String> {
        let mut planned = self.lock();
        let at = planned
            .iter()
            .position(|(whose, fault)| whose == vm && matches!(fault, Fault::DieAtStart { .. }))?;
        match planned.remove(at).1 {
            Fault::DieAtStart { words } => Some(words),
            Fault::DieAt(_)
            | Fault::DieAfter(_)
            | Fault::Refuse { .. }
            | Fault::Hang(_)
            | Fault::Wait(..) => None,
        }
    }

    pub(crate) fn at_command(&self, vm: &VmId, command: &str) -> Option<Misdeed> {
        let mut planned = self.lock();
        let at = planned.iter_mut().position(|(whose, fault)| {
            whose == vm
                && match fault {
                    Fault::DieAtStart { .. } => false,
                    Fault::DieAt(moment)
                    | Fault::DieAfter(moment)
                    | Fault::Refuse { moment, .. }
                    | Fault::Hang(moment)
                    | Fault::Wait(moment, _) => moment.comes(command),
                }
        })?;
        match planned.remove(at).1 {
            Fault::DieAtStart { .. } => None,
            Fault::DieAt(_) => Some(Misdeed::Die),
            Fault::DieAfter(_) => Some(Misdeed::DieAfter),
            Fault::Refuse { words, .. } => Some(Misdeed::Refuse(words)),
            Fault::Hang(_) => Some(Misdeed::Hang),
            Fault::Wait(_, gate) => Some(Misdeed::Wait(gate)),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(VmId, Fault)>> {
        self.planned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_comes_at_its_moment_and_only_once() {
        let vm = VmId::from_entropy([1; 10]);
        let faults = Faults::default();
        faults.plan(&vm, Fault::Hang(Moment { command: Some("cont".into()), nth: 2 }));
        assert!(faults.at_command(&VmId::from_entropy([2; 10]), "cont").is_none());
        let met = |name| faults.at_command(&vm, name).is_some();
        assert_eq!(["cont", "stop", "cont", "cont"].map(met), [false, false, true, false]);
    }
}
