//! What could not be removed from a host when it was gone, removed when it is back.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use berth_api::agent::TaskSpec;
use berth_api::transport::BoxFuture;
use berth_model::HostId;
use berth_model::operation::Progress;
use berth_model::vm::Vm;

use crate::agents::{Drive, DriveError, Listener, Patience};
use crate::audit::OK;
use crate::cluster::Cluster;
use crate::records::{Debt, Row, Transaction};

/// How long a host may be silent in between.
const PATIENCE: Duration = Duration::from_secs(30);
/// Pause after a host refused, so that it is not asked with every report.
const AGAIN_AFTER: Duration = Duration::from_secs(60);

/// Begins to pay what is owed on a host that answers, unless that is being done.
pub(super) fn pay(cluster: &Arc<Cluster>, host: &HostId) {
    if cluster.records.list_below::<Debt>(&format!("{host}/")).is_empty() {
        return;
    }
    let began = cluster.watchers.paying.lock().unwrap_or_else(PoisonError::into_inner).insert(host.clone());
    if !began {
        return;
    }
    let (owned, host) = (Arc::clone(cluster), host.clone());
    cluster.spawn(async move {
        pay_all(&owned, &host).await;
        owned.watchers.paying.lock().unwrap_or_else(PoisonError::into_inner).remove(&host);
    });
}

async fn pay_all(cluster: &Cluster, host: &HostId) {
    for debt in cluster.records.list_below::<Debt>(&format!("{host}/")) {
        match pay_one(cluster, &debt).await {
            Ok(()) => {
                cluster.did_by_itself("debts", "leftover.remove", &format!("host:{host}"), OK);
                forget(cluster, &debt).await;
            }
            Err(DriveError::Unreachable(_)) => return,
            Err(DriveError::Failed(problem)) => {
                tracing::warn!(%host, task = debt.task, why = debt.why, %problem, "could still not be removed");
                cluster.clock.sleep(AGAIN_AFTER).await;
            }
        }
    }
}

async fn pay_one(cluster: &Cluster, debt: &Debt) -> Result<(), DriveError> {
    // Nothing may be owed by the host that owns the VM: a deletion that comes so late would be of the VM itself.
    let owner = debt.put.vm.as_ref().and_then(|vm| cluster.records.get::<Vm>(vm.as_str()));
    let deletes = matches!(debt.put.spec, TaskSpec::DeleteVm { .. });
    if deletes && owner.is_some_and(|vm| vm.status.host.as_ref() == Some(&debt.host)) {
        tracing::error!(host = %debt.host, task = debt.task, "not removed: the host owns the VM now");
        return Ok(());
    }
    let drive = Drive {
        cluster,
        host: &debt.host,
        task: debt.task.clone(),
        put: debt.put.clone(),
        patience: Patience::For(PATIENCE),
        listener: &Nobody,
    };
    drive.run().await.map(drop)
}

async fn forget(cluster: &Cluster, debt: &Row<Debt>) {
    let mut transaction = Transaction::new();
    transaction.forget::<Debt>(&debt.id);
    if let Err(error) = cluster.records.commit(transaction).await {
        tracing::error!(%error, "what was removed can't be noted as removed");
    }
}

struct Nobody;

impl Listener for Nobody {
    fn progress(&self, _progress: Progress) {}
    fn waiting_for(&self, _host: &str) {}
    fn cancelled(&self) -> BoxFuture<'_, ()> {
        Box::pin(std::future::pending())
    }
}
