//! One loop a host: its inventory now and then, and a question for news of its VMs that is always open.
//!
//! A host is offline when it has not answered for some time *and* more than once. That says nothing of its VMs: they
//! are unknown from then on, never stopped, until it answers again.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use berth_api::ClientError;
use berth_api::agent::{AgentReport, InventoryShow, ReportQuery, ReportShow};
use berth_api::endpoint::Nothing;
use berth_model::host::{Host, HostState, Inventory};
use berth_model::{HostId, Problem};
use tokio::time::Instant;

use super::{debts, reports};
use crate::audit::OK;
use crate::cluster::Cluster;

/// How long one question for news waits. Longer: a host that hangs is noticed later. Shorter: more requests.
const NEWS_WAIT: Duration = Duration::from_secs(5);
/// How long a host may be silent before it is offline. Shorter: an agent's update makes its VMs unknown. Longer: a
/// dead host is noticed late.
const OFFLINE_AFTER: Duration = Duration::from_secs(8);
/// How many questions must have gone unanswered by then.
const MISSED_MIN: u32 = 2;
/// Pause before a host that did not answer is asked again.
const AGAIN_AFTER: Duration = Duration::from_secs(1);
/// How often the inventory is asked for, and the host's record renewed.
const INVENTORY_EVERY: Duration = Duration::from_secs(30);

/// Keeps a loop for each host.
pub(super) async fn watch_all(cluster: Arc<Cluster>) {
    let mut changes = cluster.records.changes::<Host>();
    let mut watched: HashMap<HostId, tokio::sync::watch::Receiver<()>> = HashMap::new();
    loop {
        // A loop that ended has dropped its end.
        watched.retain(|_, alive| alive.has_changed().is_ok());
        for host in cluster.records.list::<Host>() {
            let id = host.value.id.clone();
            if watched.contains_key(&id) {
                continue;
            }
            let (alive, receiver) = tokio::sync::watch::channel(());
            watched.insert(id.clone(), receiver);
            let owned = Arc::clone(&cluster);
            cluster.spawn(async move {
                let _alive = alive;
                Watch::new(owned, id).run().await;
            });
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

struct Watch {
    cluster: Arc<Cluster>,
    id: HostId,
    /// The report that was read last, to wait for a newer one.
    seen: Option<(String, u64)>,
    /// The agent that was heard last: another one may have other pools and another QEMU.
    incarnation: Option<String>,
    inventory: Option<Inventory>,
    inventory_due: Instant,
    silent_since: Option<Instant>,
    missed: u32,
}

impl Watch {
    fn new(cluster: Arc<Cluster>, id: HostId) -> Self {
        let inventory_due = Instant::now();
        Self {
            cluster,
            id,
            seen: None,
            incarnation: None,
            inventory: None,
            inventory_due,
            silent_since: None,
            missed: 0,
        }
    }

    async fn run(mut self) {
        while let Some(host) = self.cluster.records.get::<Host>(self.id.as_str()) {
            if let Err(error) = self.round(&host).await
                && let Err(problem) = self.missed(&host, error).await
            {
                tracing::error!(host = %host.name, %problem, "the host's record can't be written");
            }
        }
    }

    /// One question, and what its answer means.
    async fn round(&mut self, host: &Host) -> Result<(), ClientError> {
        if Instant::now() >= self.inventory_due {
            self.take_stock(host).await?;
        }
        let asked = self.cluster.watchers.instant();
        let Some(report) = self.ask(host).await? else { return Ok(()) };
        let before = self.incarnation.replace(report.incarnation.clone());
        if before.is_some_and(|before| before != report.incarnation) {
            // Before the host counts as back, so that nobody is told of what its former agent had.
            self.inventory_due = Instant::now();
            self.take_stock(host).await?;
        } else if self.silent_since.is_some() || host.state == HostState::Offline {
            self.answered(host).await;
        }
        let seen = Some((report.incarnation.clone(), report.generation));
        // A wait that ended without news is not worth comparing with every VM.
        if self.seen != seen {
            self.seen = seen;
            reports::apply(&self.cluster, host, &report, asked).await;
        }
        debts::pay(&self.cluster, &self.id);
        Ok(())
    }

    async fn take_stock(&mut self, host: &Host) -> Result<(), ClientError> {
        let (agents, nothing) = (&self.cluster.agents, Nothing {});
        let inventory = agents.call::<InventoryShow>(host, &nothing, &nothing, &(), Duration::ZERO).await?;
        self.inventory = Some(inventory);
        self.inventory_due = Instant::now() + INVENTORY_EVERY;
        self.answered(host).await;
        Ok(())
    }

    /// The next report; none when a nudge came first, after which the host is asked without waiting.
    async fn ask(&mut self, host: &Host) -> Result<Option<AgentReport>, ClientError> {
        let nudge = self.cluster.watchers.nudge_of(&self.id);
        let (query, wait) = match &self.seen {
            Some((incarnation, generation)) => {
                let wait_ms = u64::try_from(NEWS_WAIT.as_millis()).unwrap_or(u64::MAX);
                let query = ReportQuery {
                    incarnation: Some(incarnation.clone()),
                    after: Some(*generation),
                    wait_ms: Some(wait_ms),
                };
                (query, NEWS_WAIT)
            }
            None => (ReportQuery::default(), Duration::ZERO),
        };
        tokio::select! {
            report = self.cluster.agents.call::<ReportShow>(host, &Nothing {}, &query, &(), wait) => {
                report.map(Some)
            }
            () = nudge.notified(), if self.seen.is_some() => {
                self.seen = None;
                Ok(None)
            }
        }
    }

    /// The host is there: its record says so.
    async fn answered(&mut self, host: &Host) {
        self.silent_since = None;
        self.missed = 0;
        let now = self.cluster.clock.now();
        if host.state == HostState::Offline {
            tracing::info!(host = %host.name, "the host answers");
            self.cluster.did_by_itself("hosts", "host.online", &format!("host:{}", host.name), OK);
        }
        let inventory = self.inventory.clone();
        let written = self.update(|host| {
            host.state = HostState::Online;
            host.offline_reason = None;
            host.last_seen_at = Some(now);
            if inventory.is_some() {
                host.inventory.clone_from(&inventory);
            }
        });
        if let Err(problem) = written.await {
            tracing::error!(host = %host.name, %problem, "the host's record can't be written");
        }
    }

    async fn missed(&mut self, host: &Host, error: ClientError) -> Result<(), Problem> {
        // The next report is read whole, whatever was read before.
        self.seen = None;
        self.missed += 1;
        let now = Instant::now();
        let since = *self.silent_since.get_or_insert(now);
        let gone = self.missed >= MISSED_MIN && now.duration_since(since) >= OFFLINE_AFTER;
        if gone && host.state == HostState::Online {
            let reason = error.into_problem().message;
            tracing::warn!(host = %host.name, reason, "the host is offline");
            self.cluster.did_by_itself("hosts", "host.offline", &format!("host:{}", host.name), OK);
            self.update(|host| {
                host.state = HostState::Offline;
                host.offline_reason = Some(reason.clone());
            })
            .await?;
        }
        if gone {
            // Also those that came to be thought of as running here since the host was noted as gone.
            reports::lose_all(&self.cluster, &self.id).await?;
        }
        self.cluster.clock.sleep(AGAIN_AFTER).await;
        Ok(())
    }

    async fn update(&self, mut change: impl FnMut(&mut Host)) -> Result<(), Problem> {
        let changed = self.cluster.records.update::<Host, Problem>(self.id.as_str(), |host| {
            change(host);
            Ok(())
        });
        changed.await.map(drop)
    }
}
