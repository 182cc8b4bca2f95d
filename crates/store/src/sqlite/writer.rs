//! The one thread that writes.
//!
//! Syncing the log is what a change costs, and one sync serves as many changes as are waiting: the thread takes all of
//! them from its queue, makes them in their order within one SQLite transaction, commits, and only then tells the
//! watchers and answers. An answer may depend on changes before it in the same batch, so none is given before the
//! commit, not even "conflict".
//!
//! When the storage fails a batch, nothing of it stands, and each of its members is tried by itself: one that is too
//! large for the disk must not fail the small ones. When a commit fails in a way that leaves open what is on the
//! disk (a failed sync), the thread stops: what it would say from then on could be untrue after a restart.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use rusqlite::{Connection, TransactionBehavior};
use tokio::sync::{mpsc, oneshot, watch};

use super::fault::fault;
use super::recent::Recent;
use super::transaction::{Timing, Transaction};
use crate::clock::Clock;
use crate::error::Error;
use crate::lease::Leases;
use crate::store::Revision;

/// Most changes in one batch. More would make the first wait for the last without saving any sync worth having.
const BATCH_MAX: usize = 256;

/// Something to be done within a transaction, and somebody who waits for the result.
pub(super) trait Job: Send {
    /// Does it; may be called again if the transaction was rolled back. An error is the storage's, not the job's.
    fn run(&mut self, transaction: &mut Transaction<'_>) -> Result<(), Error>;
    /// Takes the storage's error for the result.
    fn fail(&mut self, error: Error);
    /// Hands over the result.
    fn answer(self: Box<Self>);
    /// Whether the thread is to stop after this.
    fn is_last(&self) -> bool {
        false
    }
}

/// Makes a job of a verb.
pub(super) fn job<T: Send + 'static>(
    verb: impl FnMut(&mut Transaction<'_>) -> Result<T, Error> + Send + 'static,
) -> (Box<dyn Job>, oneshot::Receiver<Result<T, Error>>) {
    let (reply, receiver) = oneshot::channel();
    (Box::new(Verb { verb, result: None, reply }), receiver)
}

struct Verb<F, T> {
    verb: F,
    result: Option<Result<T, Error>>,
    reply: oneshot::Sender<Result<T, Error>>,
}

impl<F, T> Job for Verb<F, T>
where
    F: FnMut(&mut Transaction<'_>) -> Result<T, Error> + Send,
    T: Send,
{
    fn run(&mut self, transaction: &mut Transaction<'_>) -> Result<(), Error> {
        match (self.verb)(transaction) {
            Err(error) if error.is_storage() => Err(error),
            result => {
                self.result = Some(result);
                Ok(())
            }
        }
    }

    fn fail(&mut self, error: Error) {
        self.result = Some(Err(error));
    }

    fn answer(self: Box<Self>) {
        if let Some(result) = self.result {
            // Whoever asked may have gone away; the change stands all the same.
            let _ = self.reply.send(result);
        }
    }
}

/// Stops the thread after everything that was queued before it.
pub(super) struct Stop;

impl Job for Stop {
    fn run(&mut self, _: &mut Transaction<'_>) -> Result<(), Error> {
        Ok(())
    }

    fn fail(&mut self, _: Error) {}

    fn answer(self: Box<Self>) {}

    fn is_last(&self) -> bool {
        true
    }
}

/// What the thread owns.
pub(super) struct Writer {
    pub connection: Connection,
    pub path: PathBuf,
    pub clock: Arc<dyn Clock>,
    pub leases: Leases,
    pub recent: Arc<Recent>,
    pub head: watch::Sender<Revision>,
    /// Set when nothing can be relied on any more.
    pub broken: bool,
    /// Dropped last, when the file is not touched any more.
    pub lock: File,
}

impl Writer {
    /// Works until every handle to the queue is gone, or a stop is asked for, or the storage is past trusting.
    pub fn run(mut self, mut queue: mpsc::Receiver<Box<dyn Job>>) {
        while let Some(first) = queue.blocking_recv() {
            let mut batch = vec![first];
            while batch.len() < BATCH_MAX {
                match queue.try_recv() {
                    Ok(job) => batch.push(job),
                    Err(_) => break,
                }
            }
            let last = batch.iter().any(|job| job.is_last());
            self.work_off(batch);
            if last || self.broken {
                break;
            }
        }
        self.close();
    }

    fn work_off(&mut self, mut batch: Vec<Box<dyn Job>>) {
        match self.attempt(&mut batch) {
            Ok(()) => batch.into_iter().for_each(Job::answer),
            Err(error) if batch.len() == 1 || self.broken => {
                // Of a broken store's jobs one gets the cause; to the others it is closed.
                let mut first = batch.swap_remove(0);
                first.fail(error);
                first.answer();
            }
            Err(error) => {
                tracing::debug!(%error, jobs = batch.len(), "a batch failed, trying one by one");
                for job in batch {
                    if !self.broken {
                        self.work_off(vec![job]);
                    }
                }
            }
        }
    }

    /// Does all of `jobs` or, with an error of the storage, nothing.
    fn attempt(&mut self, jobs: &mut [Box<dyn Job>]) -> Result<(), Error> {
        let now = self.clock.now();
        let sql = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(|error| fault(&self.path, "write", error))?;
        let mut transaction = Transaction::begin(&sql, &self.path, now)?;
        transaction.expire(&self.leases)?;
        for job in jobs {
            job.run(&mut transaction)?;
        }
        transaction.finish()?;
        let Transaction { head, commits, timings, .. } = transaction;
        if let Err(error) = sql.commit() {
            let error = fault(&self.path, "commit to", error);
            if !matches!(error, Error::NoSpace { .. }) {
                tracing::error!(%error, "what is on the disk is not known any more, stopping the store");
                self.broken = true;
            }
            return Err(error);
        }
        // Not from when it was asked for: a lease must last its time from the answer on.
        let now = self.clock.now();
        for timing in timings {
            match timing {
                Timing::Start(lease) => self.leases.start(lease, now),
                Timing::End(id) => self.leases.end(id),
            }
        }
        self.recent.extend(commits, head.compacted);
        self.head.send_if_modified(|shown| std::mem::replace(shown, head.revision) != head.revision);
        Ok(())
    }

    fn close(self) {
        let Self { connection, path, lock, .. } = self;
        // Only tidiness: what the log holds is found at the next start as well.
        if let Err((_, error)) = connection.close() {
            tracing::warn!(path = %path.display(), %error, "the store could not be closed cleanly");
        }
        drop(lock);
    }
}
