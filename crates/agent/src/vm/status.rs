//! How a VM is, as its host sees it: fed by its process's events, read by the report and by whoever waits.
//!
//! The state moves only by `model`'s step function. What a process says is taken only as long as that process is the
//! VM's present one: a restore puts another in its place, and the old one's last words are about nobody.

use std::sync::{Arc, Mutex, PoisonError};

use berth_api::agent::VmReport;
use berth_model::VmId;
use berth_model::vm::{GuestState, VmEvent, VmState, step};
use tokio::sync::watch;

use crate::layout::{HostRecord, VmRecord};
use crate::report::ReportBoard;

/// What those who wait for a guest look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestView {
    /// The VM's state.
    pub state: VmState,
    /// What is known of the guest.
    pub guest: GuestState,
    /// How it said that it is ready: `guest-agent` or `probe`.
    pub signal: Option<&'static str>,
}

/// How a VM is.
#[derive(Debug)]
pub struct Status {
    board: Arc<ReportBoard>,
    inner: Mutex<Inner>,
    view: watch::Sender<GuestView>,
}

#[derive(Debug)]
struct Inner {
    /// Whether this host has anything of the VM: otherwise it is in no report.
    known: bool,
    report: VmReport,
    signal: Option<&'static str>,
    /// The present process; what others say is not taken.
    serial: u64,
    /// Whether the present process's guest runs.
    runs: bool,
    /// How many hold the state against short pauses of their own making.
    quiet: u32,
}

impl Status {
    /// A VM of which nothing is known yet.
    pub fn new(vm: VmId, board: Arc<ReportBoard>) -> Self {
        let report = VmReport {
            vm,
            generation: 0,
            state: VmState::Stopped,
            guest: GuestState::Off,
            migration: None,
            top: None,
            layers: 0,
            forwards: Vec::new(),
            trouble: None,
        };
        let view = GuestView { state: VmState::Stopped, guest: GuestState::Off, signal: None };
        let inner = Inner { known: false, report, signal: None, serial: 0, runs: false, quiet: 0 };
        Self { board, inner: Mutex::new(inner), view: watch::Sender::new(view) }
    }

    /// How it is now.
    pub fn report(&self) -> VmReport {
        self.lock().report.clone()
    }

    /// Its state now.
    pub fn state(&self) -> VmState {
        self.lock().report.state
    }

    /// What is known of the guest now.
    pub fn guest(&self) -> GuestState {
        self.lock().report.guest
    }

    /// To wait for the guest.
    pub fn view(&self) -> watch::Receiver<GuestView> {
        self.view.subscribe()
    }

    /// Takes what is on record.
    pub fn set_record(&self, record: &HostRecord, vm: Option<&VmRecord>) {
        self.change(|inner| {
            inner.known = true;
            inner.report.generation = record.generation;
            inner.report.migration.clone_from(&record.migration);
            inner.report.forwards.clone_from(&record.forwards);
            inner.report.trouble.clone_from(&record.trouble);
            inner.report.top = vm.and_then(VmRecord::top).cloned();
            let layers = vm.map_or(0, |record| record.disks().longest());
            inner.report.layers = u32::try_from(layers).unwrap_or(u32::MAX);
        });
    }

    /// This host has nothing of the VM any more.
    pub fn forget(&self) {
        self.change(|inner| inner.known = false);
    }

    /// Moves the state. A step that the model does not have leaves it as it is; it is a fault of ours and is logged.
    pub fn apply(&self, event: VmEvent) {
        self.change(|inner| inner.apply(event));
    }

    /// A process is being started; from now on what `serial` says is taken.
    pub fn process_begins(&self, serial: u64) {
        self.change(|inner| {
            inner.serial = serial;
            inner.runs = false;
            if inner.report.state != VmState::Stopped {
                inner.apply(VmEvent::Ended);
            }
            inner.apply(VmEvent::Start);
            inner.set_guest(GuestState::Booting, None);
        });
    }

    /// A process says whether its guest runs.
    pub fn process_runs(&self, serial: u64, runs: bool) {
        self.change(|inner| {
            if inner.serial == serial {
                inner.runs = runs;
                inner.settle();
            }
        });
    }

    /// The present process stays as it is, with a guest that does not run: that is no start any more but a pause.
    pub fn process_rests(&self) {
        self.change(|inner| {
            if inner.report.state == VmState::Starting && !inner.runs {
                inner.apply(VmEvent::Started);
                inner.apply(VmEvent::Paused);
            }
        });
    }

    /// A process has ended.
    pub fn process_ended(&self, serial: u64) {
        self.change(|inner| {
            if inner.serial == serial && inner.report.state != VmState::Stopped {
                inner.runs = false;
                inner.apply(VmEvent::Ended);
                inner.set_guest(GuestState::Off, None);
            }
        });
    }

    /// A process, or whoever listens to its guest, says how the guest is.
    pub fn guest_is(&self, serial: u64, guest: GuestState, signal: Option<&'static str>) {
        self.change(|inner| {
            if inner.serial == serial && inner.report.state != VmState::Stopped {
                inner.set_guest(guest, signal);
            }
        });
    }

    /// Whether the present process's guest runs, by its own last word.
    pub fn runs(&self) -> bool {
        self.lock().runs
    }

    /// Holds the state against pauses that are part of the work: until the guard is dropped, the guest's stopping and
    /// going on are not reported.
    pub fn quiet(self: &Arc<Self>) -> Quiet {
        self.change(|inner| inner.quiet += 1);
        Quiet { status: Arc::clone(self) }
    }

    fn change(&self, change: impl FnOnce(&mut Inner)) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut inner);
        let report = inner.known.then(|| inner.report.clone());
        self.board.set(&inner.report.vm, report);
        let view = GuestView { state: inner.report.state, guest: inner.report.guest, signal: inner.signal };
        self.view.send_if_modified(|old| std::mem::replace(old, view) != view);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn apply(&mut self, event: VmEvent) {
        match step(self.report.state, event) {
            Ok(state) => self.report.state = state,
            Err(error) => tracing::error!(vm = %self.report.vm, %error, "a step that is not in the model"),
        }
        if matches!(event, VmEvent::MigrationOver) {
            self.settle();
        }
    }

    fn settle(&mut self) {
        if self.quiet > 0 {
            return;
        }
        match (self.report.state, self.runs) {
            (VmState::Starting, true) => self.apply(VmEvent::Started),
            (VmState::Running, false) => self.apply(VmEvent::Paused),
            (VmState::Paused, true) => self.apply(VmEvent::Resumed),
            _ => {}
        }
    }

    fn set_guest(&mut self, guest: GuestState, signal: Option<&'static str>) {
        self.report.guest = guest;
        self.signal = signal;
    }
}

/// Holds a VM's state; see [`Status::quiet`].
#[derive(Debug)]
pub struct Quiet {
    status: Arc<Status>,
}

impl Drop for Quiet {
    fn drop(&mut self) {
        self.status.change(|inner| {
            inner.quiet -= 1;
            inner.settle();
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> Arc<Status> {
        Arc::new(Status::new(VmId::from_entropy([1; 10]), ReportBoard::new("one".into())))
    }

    #[test]
    fn an_old_process_has_no_say_any_more() {
        let status = status();
        status.process_begins(1);
        status.process_runs(1, true);
        status.process_begins(2);
        status.process_runs(2, true);
        status.process_runs(1, false);
        status.process_ended(1);
        status.guest_is(1, GuestState::Panicked, None);
        assert_eq!((status.state(), status.guest()), (VmState::Running, GuestState::Booting));
    }

    #[test]
    fn a_pause_of_our_own_making_is_not_reported_and_one_that_stays_is() {
        let status = status();
        status.process_begins(1);
        status.process_runs(1, true);
        let quiet = status.quiet();
        status.process_runs(1, false);
        assert_eq!(status.state(), VmState::Running);
        status.process_runs(1, true);
        drop(quiet);
        assert_eq!(status.state(), VmState::Running);
        let quiet = status.quiet();
        status.process_runs(1, false);
        drop(quiet);
        assert_eq!(status.state(), VmState::Paused);
    }

    #[test]
    fn a_migration_hides_the_pause_at_its_end() {
        let status = status();
        status.process_begins(1);
        status.process_runs(1, true);
        status.apply(VmEvent::MigrationBegun);
        status.process_runs(1, false);
        assert_eq!(status.state(), VmState::Migrating);
        status.process_runs(1, true);
        status.apply(VmEvent::MigrationOver);
        assert_eq!(status.state(), VmState::Running);
    }

    #[test]
    fn what_is_not_known_is_in_no_report() {
        let status = status();
        status.process_begins(1);
        assert!(status.board.now().vms.is_empty());
        status.set_record(&HostRecord::new("local".parse().expect("name")), None);
        assert_eq!(status.board.now().vms.len(), 1);
        status.forget();
        assert!(status.board.now().vms.is_empty());
    }
}
