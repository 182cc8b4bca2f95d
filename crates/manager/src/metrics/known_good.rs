//! What is counted of snapshots, of what goes back to them, and of schedules.

use std::sync::atomic::AtomicU64;

use berth_model::operation::OperationResult;
use berth_model::schedule::{Outcome, Part, Schedule};
use berth_model::snapshot::{RestoreFacts, Snapshot, SnapshotFacts, SnapshotKind};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::{INSTANTS_S, KindLabel, StateLabel, gauge, seconds_of_micros};
use crate::records::Records;

/// Every kind of snapshot, as its label.
const KINDS: [(SnapshotKind, &str); 4] = [
    (SnapshotKind::Baseline, "baseline"),
    (SnapshotKind::Manual, "manual"),
    (SnapshotKind::Undo, "undo"),
    (SnapshotKind::Scheduled, "scheduled"),
];
/// Both states of a schedule, as its label.
const PAUSED: [(bool, &str); 2] = [(false, "active"), (true, "paused")];
/// Every verdict, as its label.
const BAD: [(bool, &str); 2] = [(false, "good"), (true, "bad")];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VerdictLabel {
    verdict: &'static str,
}

type Bytes = Counter<u64, AtomicU64>;

/// See the module's head.
pub struct KnownGood {
    pauses: Histogram,
    written: Bytes,
    shared: Bytes,
    freed: Bytes,
    chains: Histogram,
    snapshots: Family<KindLabel, Gauge>,
    restores: Histogram,
    faulted: Histogram,
    working_sets: Histogram,
    clones: Histogram,
    verdicts: Family<VerdictLabel, Counter>,
    schedules: Family<StateLabel, Gauge>,
    runs: Counter,
    missed: Counter,
    parts: Family<OutcomeLabel, Counter>,
    deletions: Counter,
}

impl KnownGood {
    pub(super) fn new() -> Self {
        const MIB: f64 = 1024.0 * 1024.0;
        Self {
            pauses: Histogram::new(INSTANTS_S),
            written: Counter::default(),
            shared: Counter::default(),
            freed: Counter::default(),
            chains: Histogram::new([1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0]),
            snapshots: Family::default(),
            restores: Histogram::new(INSTANTS_S),
            faulted: Histogram::new([256.0, 1024.0, 4096.0, 16384.0, 65536.0, 262_144.0]),
            working_sets: Histogram::new([4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0].map(|mib| mib * MIB)),
            clones: Histogram::new(INSTANTS_S),
            verdicts: Family::default(),
            schedules: Family::default(),
            runs: Counter::default(),
            missed: Counter::default(),
            parts: Family::default(),
            deletions: Counter::default(),
        }
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        self.register_snapshots(registry);
        self.register_returns(registry);
        self.register_schedules(registry);
    }

    fn register_snapshots(&self, registry: &mut Registry) {
        registry.register(
            "snapshot_paused_seconds",
            "Time in which a guest did not run while a snapshot was taken",
            self.pauses.clone(),
        );
        registry.register("snapshots", "Snapshots that there are, by kind", self.snapshots.clone());
        registry.register("snapshot_written_bytes", "What snapshots wrote to disk", self.written.clone());
        registry.register(
            "snapshot_shared_bytes",
            "What snapshots did not write because an earlier one holds it",
            self.shared.clone(),
        );
        registry.register("snapshot_freed_bytes", "What deleted snapshots freed at once", self.freed.clone());
        registry.register(
            "snapshot_chain_layers",
            "Frozen layers under a VM when a snapshot of it was taken",
            self.chains.clone(),
        );
        registry.register(
            "snapshot_verifications",
            "Snapshots that were verified, by verdict",
            self.verdicts.clone(),
        );
    }

    fn register_returns(&self, registry: &mut Registry) {
        registry.register(
            "restore_running_seconds",
            "From the command to restore to the guest running",
            self.restores.clone(),
        );
        registry.register(
            "restore_faulted_pages",
            "Pages that a new process had touched when its guest went on",
            self.faulted.clone(),
        );
        registry.register(
            "restore_working_set_bytes",
            "What was read ahead of a restored guest because earlier ones needed it first",
            self.working_sets.clone(),
        );
        registry.register(
            "clone_running_seconds",
            "From the command to make a VM of a snapshot to its guest running",
            self.clones.clone(),
        );
    }

    fn register_schedules(&self, registry: &mut Registry) {
        registry.register("schedules", "Schedules by state", self.schedules.clone());
        registry.register("schedule_runs", "Runs of schedules that are over", self.runs.clone());
        registry.register(
            "schedule_missed_runs",
            "Times that a schedule was due and did not run",
            self.missed.clone(),
        );
        registry.register(
            "schedule_snapshots",
            "VMs' parts in runs of schedules, by what came of them",
            self.parts.clone(),
        );
        registry.register(
            "schedule_deletions",
            "Snapshots that schedules deleted because their rule kept them no longer",
            self.deletions.clone(),
        );
    }

    /// Counts a VM's part in a run of a schedule.
    pub fn schedule_part_over(&self, part: &Part) {
        self.parts.get_or_create(&OutcomeLabel { outcome: part.outcome.as_str() }).inc();
        self.deletions.inc_by(part.deleted);
    }

    /// Counts a run of a schedule that is over, and how many times it was due meanwhile and before.
    pub fn schedule_run_over(&self, missed: u64) {
        self.runs.inc();
        self.missed.inc_by(missed);
    }

    /// Counts what came of an operation that is over.
    pub(super) fn operation_over(&self, result: &OperationResult) {
        match result {
            OperationResult::Snapshot { facts, .. } => self.taken(facts),
            OperationResult::SnapshotDeleted { facts } => {
                self.freed.inc_by(facts.freed_bytes);
            }
            OperationResult::Restore { facts, .. } => self.restored(facts),
            // One that is to be held does not run.
            OperationResult::Clone { facts, .. } if facts.running_us > 0 => {
                self.clones.observe(seconds_of_micros(facts.running_us));
            }
            OperationResult::Verification { verification, .. } => {
                self.verdicts.get_or_create(&verdict(verification.is_bad())).inc();
            }
            OperationResult::Clone { .. }
            | OperationResult::Export { .. }
            | OperationResult::Import { .. }
            | OperationResult::Migration { .. }
            | OperationResult::Done => {}
        }
    }

    fn taken(&self, facts: &SnapshotFacts) {
        if facts.has_memory {
            self.pauses.observe(seconds_of_micros(facts.paused_us));
        }
        self.written.inc_by(facts.memory_stored_bytes.saturating_add(facts.disk_stored_bytes));
        self.shared.inc_by(facts.memory_shared_bytes);
        self.chains.observe(float(facts.longest_chain() as u64));
    }

    fn restored(&self, facts: &RestoreFacts) {
        self.restores.observe(seconds_of_micros(facts.running_us));
        // What a process touched on another host is not told.
        if facts.blackout_us.is_some() {
            return;
        }
        self.faulted.observe(float(facts.pages_faulted));
        self.working_sets.observe(float(facts.working_set_bytes));
    }

    /// Counts what there is now.
    pub(super) fn count(&self, records: &Records) {
        let snapshots = records.list::<Snapshot>();
        for (kind, name) in KINDS {
            let count = snapshots.iter().filter(|snapshot| snapshot.kind == kind).count();
            self.snapshots.get_or_create(&KindLabel { kind: name }).set(gauge(count));
        }
        let schedules = records.list::<Schedule>();
        for (paused, name) in PAUSED {
            let count = schedules.iter().filter(|schedule| schedule.paused == paused).count();
            self.schedules.get_or_create(&StateLabel { state: name }).set(gauge(count));
        }
    }

    /// Makes what is counted by a label, so that what is still at zero can be seen too.
    pub(super) fn make_all_kinds(&self) {
        for outcome in Outcome::ALL {
            drop(self.parts.get_or_create(&OutcomeLabel { outcome: outcome.as_str() }));
        }
        for (bad, _) in BAD {
            drop(self.verdicts.get_or_create(&verdict(bad)));
        }
        for (_, kind) in KINDS {
            drop(self.snapshots.get_or_create(&KindLabel { kind }));
        }
        for (_, state) in PAUSED {
            drop(self.schedules.get_or_create(&StateLabel { state }));
        }
    }
}

fn verdict(bad: bool) -> VerdictLabel {
    let (_, verdict) = BAD[usize::from(bad)];
    VerdictLabel { verdict }
}

/// For a histogram, whose buckets are wider than what is lost above 2⁵³.
#[expect(clippy::cast_precision_loss, reason = "see above")]
const fn float(count: u64) -> f64 {
    count as f64
}
