//! What a monitoring system reads, in Prometheus' text format: taken when asked for, kept nowhere.

use std::sync::atomic::{AtomicU64, Ordering};

use berth_api::agent::AgentReport;
use berth_model::vm::VmState;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use crate::agent::Agent;
use crate::inventory::resident_bytes;
use crate::pool;

/// The text's type.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Labels = Vec<(&'static str, String)>;
type Gauges = Family<Labels, Gauge<u64, AtomicU64>>;

/// The metrics now.
pub fn text(agent: &Agent) -> String {
    let mut registry = Registry::with_prefix("berth_agent");
    let vms = Gauges::default();
    registry.register("vms", "VMs of this host by state", vms.clone());
    let report = agent.services().board.now();
    for state in VmState::ALL {
        let count = report.vms.iter().filter(|vm| vm.state == state).count() as u64;
        vms.get_or_create(&vec![("state", state.to_string())]).set(count);
    }
    let (size, free, reserve) = (Gauges::default(), Gauges::default(), Gauges::default());
    registry.register_with_unit("pool_size", "Size of a pool's file system", Unit::Bytes, size.clone());
    registry.register_with_unit("pool_free", "What is free of it", Unit::Bytes, free.clone());
    registry.register_with_unit(
        "pool_reserve",
        "What has to stay free of it for schedules to go on",
        Unit::Bytes,
        reserve.clone(),
    );
    for facts in &agent.services().pools {
        if let Ok(pool) = pool::report(facts) {
            let labels = vec![("pool", pool.name.to_string())];
            size.get_or_create(&labels).set(pool.size_bytes);
            free.get_or_create(&labels).set(pool.free_bytes);
            reserve.get_or_create(&labels).set(pool.reserve_bytes);
        }
    }
    chains(&mut registry, agent, &report);
    let tasks = Gauge::<u64, AtomicU64>::default();
    tasks.set(agent.tasks().running() as u64);
    registry.register("tasks_running", "Tasks that are under way or wait for their turn", tasks);
    let resident = Gauge::<u64, AtomicU64>::default();
    resident.set(resident_bytes());
    registry.register_with_unit("resident_memory", "The agent's own resident memory", Unit::Bytes, resident);
    let mut text = String::new();
    match encode(&mut text, &registry) {
        Ok(()) => text,
        Err(error) => format!("# {error}\n"),
    }
}

/// How many layers the VMs' disks lie on, and what merging them has come to.
fn chains(registry: &mut Registry, agent: &Agent, report: &AgentReport) {
    let longest = Gauge::<u64, AtomicU64>::default();
    longest.set(report.vms.iter().map(|vm| u64::from(vm.layers)).max().unwrap_or(0));
    registry.register("vm_layers_max", "Layers of the disk that lies on most", longest);
    let merges = &agent.services().merges;
    let sums = [
        ("merges", "Times that layers were merged", &merges.merges),
        ("merged_layers", "Layers that are fewer for it", &merges.layers),
        ("merge_copied_bytes", "What was copied for it", &merges.copied_bytes),
        ("merge_copied_milliseconds", "How long that took", &merges.copied_ms),
    ];
    for (name, help, sum) in sums {
        let counter = Counter::<u64, AtomicU64>::default();
        counter.inc_by(sum.load(Ordering::Relaxed));
        registry.register(name, help, counter);
    }
}
