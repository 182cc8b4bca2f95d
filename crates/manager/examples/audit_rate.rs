//! Measures `audit_appends_per_second` and `audit_added_latency_p99_ms` on a real SQLite file.
//!
//! Appends are whole records: a start that is durable before its request would run, and an end; many requests at once,
//! for some seconds, and counted only when they are in the log. The added latency is what a request waits for the
//! audit before it may run; it is taken at a load of several hundred requests a second, from several callers that
//! each wait for their answer.
//!
//! Arguments: the directory for the file (the figure is its disk's), and the seconds of each part.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use berth_api::manager::AuditRecord;
use berth_manager::audit::{ALLOW, Audit, End, OtherKey};
use berth_manager::clock::{Clock, SystemClock};
use berth_store::SqliteStore;
use berth_tlog::SigningKey;

type Failed = Box<dyn std::error::Error + Send + Sync>;

const CALLERS_AT_ONCE: usize = 512;
const CALLERS_PACED: usize = 16;
const PACE: Duration = Duration::from_millis(40);

#[tokio::main]
async fn main() -> Result<(), Failed> {
    let mut words = std::env::args().skip(1);
    let directory = words.next().map_or_else(std::env::temp_dir, PathBuf::from);
    let seconds: u64 = words.next().map_or(Ok(10), |text| text.parse())?;
    let path = directory.join(format!("audit-rate-{}.sqlite", std::process::id()));
    let store = Arc::new(SqliteStore::open(&path, Arc::new(berth_store::SystemClock::new())).await?);
    let key = Arc::new(SigningKey::generate("berth-audit/bench")?);
    let audit =
        Audit::open(Arc::<SqliteStore>::clone(&store), Arc::new(SystemClock), key, OtherKey::Refused).await?;

    let (start, before) = (Instant::now(), audit.size());
    callers(&audit, CALLERS_AT_ONCE, Duration::ZERO, start + Duration::from_secs(seconds)).await?;
    audit.flush().await;
    let rate = (audit.size() - before) as f64 / start.elapsed().as_secs_f64();

    let until = Instant::now() + Duration::from_secs(seconds);
    let mut waits = callers(&audit, CALLERS_PACED, PACE, until).await?;
    audit.flush().await;
    waits.sort_unstable();
    let at = |share: f64| waits[((waits.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
    println!(
        "{{\"audit_appends_per_second\":{rate:.0},\"audit_added_latency_p99_ms\":{:.3},\
         \"audit_added_latency_p50_ms\":{:.3},\"paced_requests_per_second\":{:.0},\"records\":{}}}",
        at(0.99),
        at(0.5),
        waits.len() as f64 / seconds as f64,
        audit.size(),
    );
    store.close().await;
    for suffix in ["", "-wal", "-shm", ".lock"] {
        let mut name = path.clone().into_os_string();
        name.push(suffix);
        let _ = std::fs::remove_file(name);
    }
    Ok(())
}

/// Callers that ask one thing after the other until the time is over: how long each start was waited for.
async fn callers(
    audit: &Audit,
    count: usize,
    pace: Duration,
    until: Instant,
) -> Result<Vec<Duration>, Failed> {
    let mut tasks = tokio::task::JoinSet::new();
    for caller in 0..count {
        let audit = audit.clone();
        tasks.spawn(async move {
            let mut waits = Vec::new();
            // Not all in step.
            tokio::time::sleep(pace * u32::try_from(caller).unwrap_or(0) / u32::try_from(count).unwrap_or(1))
                .await;
            while Instant::now() < until {
                let began = Instant::now();
                let mut open = audit.begin(record(caller, waits.len())).await?;
                waits.push(began.elapsed());
                open.set(End::status(200));
                drop(open);
                if !pace.is_zero() {
                    tokio::time::sleep(pace).await;
                }
            }
            Ok::<_, Failed>(waits)
        });
    }
    let mut all = Vec::new();
    while let Some(waits) = tasks.join_next().await {
        all.extend(waits??);
    }
    Ok(all)
}

fn record(caller: usize, number: usize) -> AuditRecord {
    AuditRecord {
        request_id: format!("req-{caller:08x}{number:08x}"),
        actor: format!("user-{caller}"),
        actor_id: "user-0c5x9qzk3m1d7w2f".to_owned(),
        method: "token".to_owned(),
        address: "192.0.2.1:40000".to_owned(),
        action: "vm.view".to_owned(),
        request: format!("GET /v1/vms/accounting%2Fbooks-{number}"),
        resources: vec![format!("vm:accounting/books-{number}")],
        decision: ALLOW.to_owned(),
        reason: "policy 'administrators-may-everything' permits it".to_owned(),
        policies: vec!["administrators-may-everything".to_owned()],
        started_at: SystemClock.now(),
        ..AuditRecord::default()
    }
}
