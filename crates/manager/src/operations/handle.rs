//! A running operation in memory: what is shown of it, whether it is to stop, and the one way to write its row.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use berth_api::transport::BoxFuture;
use berth_model::operation::{Operation, Progress};
use berth_model::{HostId, OperationId, Problem, ProblemCode, VmId};
use berth_store::Revision;
use tokio::sync::watch;
use tokio::time::Instant;

use super::row::OperationRow;
use crate::agents::Listener;
use crate::cluster::Cluster;
use crate::records::{Records, RecordsError, Row, Transaction};

/// How often progress is written down. More often costs the store a write for each operation under way; less often
/// shows less after a manager's death, and nothing else.
const PROGRESS_SAVED_EVERY: Duration = Duration::from_secs(5);
/// How long to wait before a row is written again after the store failed.
const SAVE_AGAIN_AFTER: Duration = Duration::from_millis(500);

/// A running operation.
pub(crate) struct Handle {
    pub(super) id: OperationId,
    stored: tokio::sync::Mutex<Stored>,
    shown: watch::Sender<Operation>,
    cancel: watch::Sender<bool>,
    cancelled_by: Mutex<Option<String>>,
    past_return: AtomicBool,
    target: Option<(VmId, HostId)>,
    progress_saved_at: Mutex<Instant>,
}

struct Stored {
    row: OperationRow,
    revision: Revision,
}

impl Handle {
    pub(super) fn new(row: OperationRow, revision: Revision, target: Option<(VmId, HostId)>) -> Arc<Self> {
        Arc::new(Self {
            id: row.operation.id.clone(),
            shown: watch::Sender::new(row.operation.clone()),
            cancel: watch::Sender::new(row.operation.cancel_requested),
            cancelled_by: Mutex::new(None),
            past_return: AtomicBool::new(false),
            target,
            progress_saved_at: Mutex::new(Instant::now()),
            stored: tokio::sync::Mutex::new(Stored { row, revision }),
        })
    }

    pub(super) fn show(&self) -> Operation {
        self.shown.borrow().clone()
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Operation> {
        self.shown.subscribe()
    }

    /// The VM that is on its way, and to which host.
    pub(super) fn target(&self) -> Option<(VmId, HostId)> {
        self.target.clone()
    }

    pub(super) fn is_cancelled(&self) -> bool {
        *self.cancel.borrow()
    }

    /// From here on there is no way back.
    pub(super) fn pass_return(&self) {
        self.past_return.store(true, Ordering::SeqCst);
    }

    pub(super) async fn cancel(&self, cluster: &Cluster, actor: &str) -> Result<(), Problem> {
        if self.past_return.load(Ordering::SeqCst) {
            let message = format!("the {} can't be undone any more: it is nearly over", self.show().kind);
            return Err(Problem::new(ProblemCode::WrongState, message));
        }
        self.cancelled_by
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert_with(|| actor.to_owned());
        self.save(&cluster.records, |row| row.operation.cancel_requested = true).await?;
        self.cancel.send_replace(true);
        Ok(())
    }

    /// What a cancelled operation says of itself.
    pub(super) fn cancel_problem(&self) -> Problem {
        let by = self.cancelled_by.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let message = by.map_or_else(|| "cancelled".to_owned(), |actor| format!("cancelled by {actor}"));
        Problem::new(ProblemCode::Cancelled, message)
    }

    pub(super) fn set_progress(&self, progress: Progress) {
        self.shown.send_modify(|operation| operation.progress = progress);
    }

    pub(super) fn set_phase(&self, phase: &str) {
        self.shown.send_if_modified(|operation| {
            let differs = operation.progress.phase != phase;
            if differs {
                operation.progress = Progress { phase: phase.to_owned(), ..Progress::default() };
            }
            differs
        });
    }

    /// Changes the row, writes it down and shows it. Goes on trying while the store fails: nothing else is left to do.
    pub(super) async fn save(
        &self,
        records: &Records,
        mut change: impl FnMut(&mut OperationRow),
    ) -> Result<(), Problem> {
        self.save_with(records, |row| {
            change(row);
            Transaction::new()
        })
        .await
    }

    /// The same in one transaction with others, which are made anew each time they meet a conflict.
    pub(super) async fn save_with(
        &self,
        records: &Records,
        mut change: impl FnMut(&mut OperationRow) -> Transaction,
    ) -> Result<(), Problem> {
        let mut stored = self.stored.lock().await;
        loop {
            let mut row = stored.row.clone();
            row.operation.progress = self.shown.borrow().progress.clone();
            let mut transaction = change(&mut row);
            let old = Row { id: self.id.to_string(), revision: stored.revision, value: stored.row.clone() };
            transaction.replace(&old, &row);
            match records.commit(transaction).await {
                Ok(revision) => {
                    if stored.row != row {
                        *stored = Stored { row, revision };
                    }
                    self.shown.send_replace(stored.row.operation.clone());
                    return Ok(());
                }
                Err(RecordsError::Conflict { key }) if key.ends_with(self.id.as_str()) => {
                    return Err(Problem::new(
                        ProblemCode::Internal,
                        format!("operation {} is being run by another manager", self.id),
                    ));
                }
                Err(RecordsError::Conflict { .. }) => records.catch_up().await?,
                Err(error) => {
                    tracing::error!(operation = %self.id, %error, "an operation can't be written down");
                    tokio::time::sleep(SAVE_AGAIN_AFTER).await;
                }
            }
        }
    }

    pub(super) async fn row(&self) -> OperationRow {
        self.stored.lock().await.row.clone()
    }

    fn progress_is_due(&self) -> bool {
        let mut at = self.progress_saved_at.lock().unwrap_or_else(PoisonError::into_inner);
        let due = at.elapsed() >= PROGRESS_SAVED_EVERY;
        if due {
            *at = Instant::now();
        }
        due
    }
}

/// Passes what an agent says of its task on to those who follow the operation.
pub(super) struct Ear {
    pub(super) cluster: Arc<Cluster>,
    pub(super) handle: Arc<Handle>,
    /// Undoing goes on whatever anybody wants.
    pub(super) deaf_to_cancel: bool,
}

impl Listener for Ear {
    fn progress(&self, progress: Progress) {
        self.handle.set_progress(progress);
        if self.handle.progress_is_due() {
            let (cluster, handle) = (Arc::clone(&self.cluster), Arc::clone(&self.handle));
            self.cluster.spawn(async move {
                let _ = handle.save(&cluster.records, |_| {}).await;
            });
        }
    }

    fn waiting_for(&self, host: &str) {
        self.handle.set_phase(&format!("waiting for host {host}"));
    }

    fn cancelled(&self) -> BoxFuture<'_, ()> {
        if self.deaf_to_cancel {
            return Box::pin(std::future::pending());
        }
        let mut cancel = self.handle.cancel.subscribe();
        Box::pin(async move {
            // The sender lives in the handle that is borrowed here.
            let _ = cancel.wait_for(|cancelled| *cancelled).await;
        })
    }
}
