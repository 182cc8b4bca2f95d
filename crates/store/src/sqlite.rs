//! The driver for one manager: a SQLite file with a write-ahead log.
//!
//! Two threads, so that nothing blocks the runtime: one writes, in batches that share a sync (`writer`), one reads,
//! each read in a transaction of its own that sees one revision (`reader`, below). Reads do not wait for syncs; and
//! as a change is answered after its commit, a read that starts later sees it.
//!
//! What is acknowledged survives the process and the power. What the disk damages is found when the file is opened
//! or when the record is read, by SQLite's checks and by a seal on each row, and gets [`Error::Corrupt`]. One case
//! can't be told apart: a log whose tail is damaged looks like one that was never finished, and ends before it.

mod fault;
mod file;
mod recent;
mod rows;
mod schema;
mod transaction;
mod writer;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot, watch};

use crate::clock::Clock;
use crate::error::Error;
use crate::lease::{Leases, spawn_expiry};
use crate::limits::{check_key, check_query, check_readable, check_transaction, check_ttl, check_watchable};
use crate::store::{Condition, Entry, Lease, LeaseId, Operation, Page, Pending, Query, Revision, Store};
use crate::watch::{History, Replay, Watch, follow};
use fault::fault;
use file::Opened;
use recent::Recent;
use transaction::Transaction;
use writer::{Job, Stop, Writer, job};

/// How many requests wait in each queue before callers wait to get in.
const QUEUE_MAX: usize = 1024;

/// How many changes a watcher that lags behind reads in one go.
const REPLAY_CHANGES: usize = 512;

/// A store in one SQLite file; see the module's head for what it keeps its promises with.
///
/// Dropping it closes the file some time later; [`close`](SqliteStore::close) waits for that.
pub struct SqliteStore {
    writes: mpsc::Sender<Box<dyn Job>>,
    reads: Reads,
    recent: Arc<Recent>,
    head: watch::Receiver<Revision>,
    reader: Thread,
    writer: Thread,
}

/// Taken by whoever waits for its end.
type Thread = Mutex<Option<JoinHandle<()>>>;

impl SqliteStore {
    /// Opens the store at `path`, creating it (mode 0600) if nothing is there; the directory must exist.
    ///
    /// The whole file is read and checked. Must be called within a tokio runtime, which ends leases in the
    /// background.
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`] for a damaged, emptied or foreign file, which is left as it is; [`Error::NewerSchema`];
    /// [`Error::InUse`]; [`Error::NoSpace`]; [`Error::Io`].
    pub async fn open(path: impl Into<PathBuf>, clock: Arc<dyn Clock>) -> Result<Self, Error> {
        let path = path.into();
        let start = tokio::task::spawn_blocking(move || Self::start(&path, clock));
        let (store, clock, deadlines) = start.await.map_err(|_| Error::Closed)??;
        let writes = store.writes.downgrade();
        spawn_expiry(clock, deadlines, move || {
            let writes = writes.clone();
            Box::pin(async move {
                let writes = writes.upgrade().ok_or(Error::Closed)?;
                // Leases that are over are ended before whatever is done next, so nothing is enough.
                write(&writes, |_| Ok(())).await
            })
        });
        Ok(store)
    }

    fn start(path: &Path, clock: Arc<dyn Clock>) -> Result<Started, Error> {
        let Opened { writer: connection, reader, lock } = file::open(path)?;
        let failed = |error| fault(path, "read", error);
        let (head, _) = watch::channel(rows::head(&connection).map_err(failed)?.revision);
        let mut leases = Leases::new();
        for lease in rows::leases(&connection).map_err(failed)? {
            leases.start(lease, clock.now());
        }
        let deadlines = leases.next_deadline();
        let recent = Arc::new(Recent::default());
        let head_seen = head.subscribe();
        let (writes, write_queue) = mpsc::channel(QUEUE_MAX);
        let (reads, read_queue) = mpsc::channel(QUEUE_MAX);
        let writer = Writer {
            connection,
            path: path.to_owned(),
            clock: clock.clone(),
            leases,
            recent: recent.clone(),
            head,
            broken: false,
            lock,
        };
        let reader = spawn("store-read", path, move || serve_reads(reader, read_queue))?;
        let writer = spawn("store-write", path, move || writer.run(write_queue))?;
        let reads = Reads { queue: reads, path: path.into() };
        Ok((Self { writes, reads, recent, head: head_seen, reader, writer }, clock, deadlines))
    }

    /// Finishes what was handed in, closes the file, and returns when it is free for others. Verbs called from then
    /// on get [`Error::Closed`], and so do watchers.
    pub async fn close(&self) {
        // One after the other: the connection that is closed last writes the log back into the file. That a queue is
        // closed already only means that nobody behind it has to be stopped.
        let _ = self.reads.queue.send(Box::new(|_| ControlFlow::Break(()))).await;
        join(&self.reader).await;
        let _ = self.writes.send(Box::new(Stop)).await;
        join(&self.writer).await;
    }

    /// A verb that changes something.
    fn change<T: Send + 'static>(
        &self,
        verb: impl FnMut(&mut Transaction<'_>) -> Result<T, Error> + Send + 'static,
    ) -> Pending<'_, T> {
        Box::pin(write(&self.writes, verb))
    }
}

type Started = (SqliteStore, Arc<dyn Clock>, watch::Receiver<Option<Duration>>);

impl Store for SqliteStore {
    fn revision(&self) -> Pending<'_, Revision> {
        Box::pin(self.reads.run(|connection| Ok(rows::head(connection)?.revision)))
    }

    fn get<'a>(&'a self, key: &'a str) -> Pending<'a, Option<Entry>> {
        Box::pin(async move {
            check_key(key)?;
            let key = key.to_owned();
            self.reads.run(move |connection| rows::get(connection, &key)).await
        })
    }

    fn list(&self, query: Query) -> Pending<'_, Page> {
        Box::pin(async move {
            check_query(&query)?;
            self.reads.run(move |connection| list(connection, &query)).await?
        })
    }

    fn transact(&self, conditions: Vec<Condition>, operations: Vec<Operation>) -> Pending<'_, Revision> {
        if let Err(error) = check_transaction(&conditions, &operations) {
            return Box::pin(std::future::ready(Err(error)));
        }
        self.change(move |transaction| transaction.transact(&conditions, &operations))
    }

    fn watch(&self, prefix: &str, from_revision: Revision) -> Watch {
        let past = Past {
            recent: self.recent.clone(),
            reads: self.reads.queue.downgrade(),
            path: self.reads.path.clone(),
        };
        follow(past, self.head.clone(), prefix, from_revision)
    }

    fn grant_lease(&self, ttl: Duration) -> Pending<'_, Lease> {
        if let Err(error) = check_ttl(ttl) {
            return Box::pin(std::future::ready(Err(error)));
        }
        self.change(move |transaction| transaction.grant_lease(ttl))
    }

    fn keep_lease_alive(&self, id: LeaseId) -> Pending<'_, Lease> {
        self.change(move |transaction| transaction.keep_lease_alive(id))
    }

    fn revoke_lease(&self, id: LeaseId) -> Pending<'_, ()> {
        self.change(move |transaction| transaction.revoke_lease(id))
    }

    fn compact(&self, revision: Revision) -> Pending<'_, ()> {
        self.change(move |transaction| transaction.compact(revision))
    }
}

async fn write<T: Send + 'static>(
    writes: &mpsc::Sender<Box<dyn Job>>,
    verb: impl FnMut(&mut Transaction<'_>) -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let (job, reply) = job(verb);
    writes.send(job).await.map_err(|_| Error::Closed)?;
    reply.await.map_err(|_| Error::Closed)?
}

fn list(connection: &Connection, query: &Query) -> Result<Result<Page, Error>, rusqlite::Error> {
    let head = rows::head(connection)?;
    let revision = query.at.unwrap_or(head.revision);
    if let Err(error) = check_readable(revision, head.revision, head.compacted) {
        return Ok(Err(error));
    }
    let limit = query.limit.unwrap_or(usize::MAX);
    // One more than asked for, to know whether there is more.
    let rows_max = i64::try_from(limit).unwrap_or(i64::MAX).saturating_add(1);
    let mut entries = if revision == head.revision {
        rows::list_now(connection, query, rows_max)?
    } else {
        rows::list_at(connection, query, revision, rows_max)?
    };
    let more = entries.len() > limit;
    entries.truncate(limit);
    Ok(Ok(Page { entries, revision, more }))
}

/// History for watchers: the newest from memory, the rest from the file.
struct Past {
    recent: Arc<Recent>,
    reads: mpsc::WeakSender<Read>,
    path: Arc<Path>,
}

impl History for Past {
    fn replay<'a>(&'a self, prefix: &'a str, from: Revision) -> Pending<'a, Replay> {
        Box::pin(async move {
            if let Some(replay) = self.recent.replay(prefix, from) {
                return Ok(replay);
            }
            let queue = self.reads.upgrade().ok_or(Error::Closed)?;
            let prefix = prefix.to_owned();
            let reads = Reads { queue, path: self.path.clone() };
            reads.run(move |connection| replay(connection, &prefix, from)).await?
        })
    }
}

fn replay(
    connection: &Connection,
    prefix: &str,
    from: Revision,
) -> Result<Result<Replay, Error>, rusqlite::Error> {
    let head = rows::head(connection)?;
    if let Err(error) = check_watchable(from, head.compacted) {
        return Ok(Err(error));
    }
    let (commits, stopped_at) = rows::commits(connection, prefix, from, REPLAY_CHANGES)?;
    Ok(Ok(Replay { commits, complete_to: stopped_at.unwrap_or(head.revision) }))
}

type Read = Box<dyn FnOnce(&Connection) -> ControlFlow<()> + Send>;

/// The way to the thread that reads.
struct Reads {
    queue: mpsc::Sender<Read>,
    path: Arc<Path>,
}

impl Reads {
    /// Runs `read` in a transaction of its own, so that all it reads is of one revision.
    async fn run<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Connection) -> Result<T, rusqlite::Error> + Send + 'static,
    ) -> Result<T, Error> {
        let (reply, result) = oneshot::channel();
        let job: Read = Box::new(move |connection| {
            let result = connection.unchecked_transaction().and_then(|transaction| read(&transaction));
            // Whoever asked may have gone away.
            let _ = reply.send(result);
            ControlFlow::Continue(())
        });
        self.queue.send(job).await.map_err(|_| Error::Closed)?;
        let result = result.await.map_err(|_| Error::Closed)?;
        result.map_err(|error| fault(&self.path, "read", error))
    }
}

fn serve_reads(connection: Connection, mut queue: mpsc::Receiver<Read>) {
    while let Some(read) = queue.blocking_recv() {
        if read(&connection).is_break() {
            break;
        }
    }
}

fn spawn(name: &str, path: &Path, work: impl FnOnce() + Send + 'static) -> Result<Thread, Error> {
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(work).map_err(|error| {
        Error::Io { doing: "start a thread for", path: path.to_owned(), source: Box::new(error) }
    })?;
    Ok(Mutex::new(Some(thread)))
}

async fn join(thread: &Thread) {
    let taken = thread.lock().expect("nothing panics while it is held").take();
    if let Some(thread) = taken
        && !matches!(tokio::task::spawn_blocking(|| thread.join()).await, Ok(Ok(())))
    {
        tracing::error!("a thread of the store panicked");
    }
}

#[cfg(test)]
mod tests;
