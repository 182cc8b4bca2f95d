//! What is counted, for Prometheus.
//!
//! Names are snake case with base units, counters end in `_total`, and durations are seconds, as the field has them.

use std::fmt::Write as _;
use std::sync::atomic::AtomicU64;

use berth_model::host::{Host, HostState};
use berth_model::operation::{Operation, OperationKind, OperationResult, OperationState};
use berth_model::vm::{Vm, VmState};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::records::Records;

mod known_good;

pub use known_good::KnownGood;

/// The content type of the text that [`Metrics::text`] gives.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// From what a guest does not notice to what its users complain about, in seconds.
const INSTANTS_S: [f64; 11] = [0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.15, 0.3, 0.6, 1.0, 3.0];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OperationLabels {
    kind: &'static str,
    result: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    endpoint: &'static str,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DestinationLabel {
    destination: String,
}

/// All counters, and the text of them.
pub struct Metrics {
    registry: Registry,
    vms: Family<StateLabel, Gauge>,
    hosts: Family<StateLabel, Gauge>,
    operations: Family<OperationLabels, Counter>,
    durations: Family<KindLabel, Histogram>,
    blackouts: Histogram,
    known_good: KnownGood,
    requests: Family<RequestLabels, Counter<u64, AtomicU64>>,
    policy_failures: Counter,
    forward_lags: Family<DestinationLabel, Gauge>,
    forward_failures: Family<DestinationLabel, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// With nothing counted yet.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("berth");
        let metrics = Self {
            vms: Family::default(),
            hosts: Family::default(),
            operations: Family::default(),
            durations: Family::new_with_constructor(|| {
                Histogram::new([0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0])
            }),
            blackouts: Histogram::new(INSTANTS_S),
            known_good: KnownGood::new(),
            requests: Family::default(),
            policy_failures: Counter::default(),
            forward_lags: Family::default(),
            forward_failures: Family::default(),
            registry: Registry::default(),
        };
        registry.register("vms", "VMs by state", metrics.vms.clone());
        registry.register("hosts", "Hosts by state", metrics.hosts.clone());
        registry.register("operations", "Operations that are over", metrics.operations.clone());
        registry.register(
            "operation_duration_seconds",
            "From an operation's start to its end",
            metrics.durations.clone(),
        );
        registry.register(
            "migration_blackout_seconds",
            "Time in which a guest did not run while it was moved, measured by the hypervisors",
            metrics.blackouts.clone(),
        );
        registry.register(
            "policy_failures",
            "Access decisions that failed and were taken as denials: a written policy is wrong",
            metrics.policy_failures.clone(),
        );
        registry.register("http_requests", "Requests that were answered", metrics.requests.clone());
        registry.register(
            "audit_forward_lag_records",
            "Audit records that a destination has not taken yet",
            metrics.forward_lags.clone(),
        );
        registry.register(
            "audit_forward_failures",
            "Times that a destination did not take audit records",
            metrics.forward_failures.clone(),
        );
        metrics.known_good.register(&mut registry);
        Self { registry, ..metrics }
    }

    /// Notes how many audit records a destination has still to take.
    pub fn audit_forwarded(&self, destination: &str, left: u64) {
        let label = DestinationLabel { destination: destination.to_owned() };
        self.forward_lags.get_or_create(&label).set(i64::try_from(left).unwrap_or(i64::MAX));
    }

    /// Counts that a destination took none, with so many left.
    pub fn audit_not_forwarded(&self, destination: &str, left: u64) {
        self.audit_forwarded(destination, left);
        let label = DestinationLabel { destination: destination.to_owned() };
        self.forward_failures.get_or_create(&label).inc();
    }

    /// Counts a request that was answered.
    pub fn answered(&self, endpoint: &'static str, status: u16) {
        self.requests.get_or_create(&RequestLabels { endpoint, status }).inc();
    }

    /// Counts an access decision that failed.
    pub fn policy_failed(&self) {
        self.policy_failures.inc();
    }

    /// Counts an operation that is over.
    pub fn operation_over(&self, operation: &Operation) {
        let (kind, result) = (operation.kind.as_str(), operation.state.as_str());
        self.operations.get_or_create(&OperationLabels { kind, result }).inc();
        if let Some(finished) = operation.finished_at {
            let seconds = seconds_of_millis(finished.millis_since(operation.created_at));
            self.durations.get_or_create(&KindLabel { kind }).observe(seconds);
        }
        match &operation.result {
            Some(OperationResult::Migration { report }) => {
                self.blackouts.observe(seconds_of_micros(report.blackout_us));
            }
            Some(result) => self.known_good.operation_over(result),
            None => {}
        }
    }

    /// What is counted of snapshots and schedules.
    pub const fn known_good(&self) -> &KnownGood {
        &self.known_good
    }

    /// The text, with VMs and hosts as they are now.
    pub fn text(&self, records: &Records) -> String {
        let (vms, hosts) = (records.list::<Vm>(), records.list::<Host>());
        for state in VmState::ALL {
            let count = vms.iter().filter(|vm| vm.status.state == state).count();
            self.vms.get_or_create(&StateLabel { state: state.as_str() }).set(gauge(count));
        }
        for (state, name) in [(HostState::Online, "online"), (HostState::Offline, "offline")] {
            let count = hosts.iter().filter(|host| host.state == state).count();
            self.hosts.get_or_create(&StateLabel { state: name }).set(gauge(count));
        }
        self.known_good.count(records);
        self.registry_text()
    }

    /// Everything that is counted, as it is.
    pub(crate) fn registry_text(&self) -> String {
        let mut text = String::new();
        if let Err(error) = encode(&mut text, &self.registry) {
            // Writing into a string can't fail; a metric that can't be written must not take the others with it.
            let _ = write!(text, "# {error}");
        }
        text
    }
}

impl Metrics {
    /// Makes the counters of every kind and result of operations, so that one that is still at zero can be seen too.
    #[must_use]
    pub fn with_all_kinds(self) -> Self {
        for kind in OperationKind::ALL {
            drop(self.durations.get_or_create(&KindLabel { kind: kind.as_str() }));
            for result in [OperationState::Succeeded, OperationState::Failed, OperationState::Cancelled] {
                let labels = OperationLabels { kind: kind.as_str(), result: result.as_str() };
                drop(self.operations.get_or_create(&labels));
            }
        }
        self.known_good.make_all_kinds();
        self
    }
}

fn gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn seconds_of_millis(millis: u64) -> f64 {
    std::time::Duration::from_millis(millis).as_secs_f64()
}

fn seconds_of_micros(micros: u64) -> f64 {
    std::time::Duration::from_micros(micros).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// The names of the document's lines under a heading.
    fn documented(heading: &str) -> BTreeSet<String> {
        let document = include_str!("../../../docs/metrics.md");
        let part = document.split("\n## ").find(|part| part.starts_with(heading)).expect("the heading");
        let lines = part.lines().filter_map(|line| line.strip_prefix("| `berth_"));
        lines.filter_map(|line| line.split('`').next()).map(|name| format!("berth_{name}")).collect()
    }

    #[test]
    fn every_metric_is_in_the_document_and_no_other() {
        let metrics = Metrics::new().with_all_kinds();
        metrics.answered("X", 200);
        metrics.audit_not_forwarded("x", 1);
        for gauges in [&metrics.vms, &metrics.hosts] {
            drop(gauges.get_or_create(&StateLabel { state: "x" }));
        }
        let text = metrics.registry_text();
        let names = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
        let there: BTreeSet<String> = names
            .filter_map(|line| line.split_once(' '))
            .map(|(name, kind)| if kind == "counter" { format!("{name}_total") } else { name.to_owned() })
            .collect();
        assert!(there.len() > 15, "{text}");
        assert_eq!(there, documented("The manager"));
    }
}
