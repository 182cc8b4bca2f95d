//! The audit: one record for each request, begun before anything is done and ended when it is answered.
//!
//! One writer gives the numbers and writes, so there are no gaps, and requests that come together share one durable
//! write. The start is on disk before the handler runs; the end follows soon after the answer, and does not hold it
//! up. Which records are open is on disk as well: a manager that died finds them at its next start and marks them
//! `interrupted`.
//!
//! An end is never lost while the manager lives: [`Open`] writes it when it is dropped, whatever became of the handler.

use std::collections::BTreeMap;
use std::sync::Arc;

use berth_api::manager::AuditRecord;
use berth_model::{OperationId, Timestamp};
use berth_store::{Operation, Query, Store};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use crate::clock::Clock;

const PREFIX: &str = "/audit/";
/// Where it stands which records may be open.
const HEAD_KEY: &str = "/meta/audit";
/// Most records of one write. A store takes 128 changes at once.
const BATCH_MAX: usize = 100;
/// How long until ends are tried again that the store failed to write.
const RETRY_AFTER: std::time::Duration = std::time::Duration::from_millis(200);

/// The status of a request whose caller hung up before the answer.
pub const STATUS_CALLER_GONE: u16 = 499;

/// A record that can't be written: then nothing is done either.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// The store failed.
    #[error("the audit can't be written")]
    Store(#[source] berth_store::Error),
    /// There is no room left for it.
    #[error("the audit can't be written: the disk is full")]
    NoSpace,
    /// The audit has been closed.
    #[error("the audit is closed: the manager is stopping")]
    Closed,
    /// The store failed in a write that others were part of.
    #[error("the audit can't be written: {0}")]
    Refused(String),
}

/// How a request ended.
#[derive(Debug, Clone)]
pub struct End {
    /// The HTTP status.
    pub status: u16,
    /// The operation that it began.
    pub operation: Option<OperationId>,
    /// Why it was refused after all, when a second look said so.
    pub denied: Option<String>,
}

impl End {
    /// With this status and nothing else to say.
    pub const fn status(status: u16) -> Self {
        Self { status, operation: None, denied: None }
    }

    const fn caller_gone() -> Self {
        Self::status(STATUS_CALLER_GONE)
    }
}

/// Which numbers are in use: written with each batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Head {
    /// The last number given.
    last: u64,
    /// No record below this number is open.
    open_from: u64,
}

enum Message {
    Start(Box<AuditRecord>, oneshot::Sender<Result<u64, AuditError>>),
    End(u64, Timestamp, End),
    Flush(oneshot::Sender<()>),
}

/// The audit.
#[derive(Clone)]
pub struct Audit {
    // Unbounded, but each request puts in one start and one end, and the number of requests under way is bounded.
    sender: mpsc::UnboundedSender<Message>,
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
}

impl Audit {
    /// Opens the audit, marks what an earlier manager left open, and starts the writer.
    ///
    /// # Errors
    /// When the store fails, or holds what this version can't read.
    pub async fn open(store: Arc<dyn Store>, clock: Arc<dyn Clock>) -> Result<Self, AuditError> {
        let head = mark_interrupted(&*store).await.map_err(AuditError::Store)?;
        let (sender, receiver) = mpsc::unbounded_channel();
        let writer = Writer {
            store: Arc::clone(&store),
            last: head.last,
            open: BTreeMap::new(),
            unsaved: BTreeMap::new(),
        };
        tokio::spawn(writer.run(receiver));
        Ok(Self { sender, store, clock })
    }

    /// Writes the start of a record; its number is given here. On return it is durable.
    ///
    /// # Errors
    /// When it could not be written.
    pub async fn begin(&self, record: AuditRecord) -> Result<Open, AuditError> {
        let (answer, answered) = oneshot::channel();
        self.sender.send(Message::Start(Box::new(record), answer)).map_err(|_| AuditError::Closed)?;
        let ends = Ends { sender: self.sender.clone(), clock: Arc::clone(&self.clock) };
        let mut waiting = Waiting { answered, ends: Some(ends) };
        let sequence = (&mut waiting.answered).await.map_err(|_| AuditError::Closed)??;
        let ends = waiting.ends.take().expect("taken only here, or when dropped");
        Ok(Open { sequence, ends, end: End::caller_gone() })
    }

    /// Waits until everything that has ended is on disk.
    pub async fn flush(&self) {
        let (done, flushed) = oneshot::channel();
        if self.sender.send(Message::Flush(done)).is_ok() {
            let _ = flushed.await;
        }
    }

    /// Records with numbers below `before` (the newest ones, if none is given), newest first; and whether there are
    /// older ones.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn newest(
        &self,
        before: Option<u64>,
        limit: usize,
    ) -> Result<(Vec<AuditRecord>, bool), AuditError> {
        let head = read_head(&*self.store).await.map_err(AuditError::Store)?;
        let upper = before.unwrap_or(u64::MAX).min(head.last + 1);
        let lower = upper.saturating_sub(limit as u64).max(1);
        let records = read_range(&*self.store, lower, upper).await.map_err(AuditError::Store)?;
        Ok((records.into_iter().rev().collect(), lower > 1))
    }
}

/// The way for ends.
struct Ends {
    sender: mpsc::UnboundedSender<Message>,
    clock: Arc<dyn Clock>,
}

impl Ends {
    fn put(&self, sequence: u64, end: End) {
        // It fails only when the writer is gone, and then the next start of the manager marks the record.
        let _ = self.sender.send(Message::End(sequence, self.clock.now(), end));
    }
}

/// A start under way. Dropped (the caller hung up), it hands the end over to whoever sees the start come true.
struct Waiting {
    answered: oneshot::Receiver<Result<u64, AuditError>>,
    ends: Option<Ends>,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let Some(ends) = self.ends.take() else { return };
        let (_, never) = oneshot::channel();
        let answered = std::mem::replace(&mut self.answered, never);
        tokio::spawn(async move {
            if let Ok(Ok(sequence)) = answered.await {
                ends.put(sequence, End::caller_gone());
            }
        });
    }
}

/// A record that was begun. Dropping it ends it.
pub struct Open {
    sequence: u64,
    ends: Ends,
    end: End,
}

impl Open {
    /// Its number.
    pub const fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Says how it will have ended; what is said last counts.
    pub fn set(&mut self, end: End) {
        self.end = end;
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.ends.put(self.sequence, self.end.clone());
    }
}

struct Writer {
    store: Arc<dyn Store>,
    last: u64,
    open: BTreeMap<u64, AuditRecord>,
    /// Ends that the store failed to write: they go with the next write.
    unsaved: BTreeMap<u64, AuditRecord>,
}

type Started = (u64, oneshot::Sender<Result<u64, AuditError>>);

impl Writer {
    async fn run(mut self, mut receiver: mpsc::UnboundedReceiver<Message>) {
        let mut messages = Vec::with_capacity(BATCH_MAX);
        loop {
            let received = receiver.recv_many(&mut messages, BATCH_MAX);
            let received = if self.unsaved.is_empty() {
                received.await
            } else {
                tokio::time::timeout(RETRY_AFTER, received).await.unwrap_or(usize::MAX)
            };
            if received == 0 {
                return;
            }
            self.write(messages.drain(..)).await;
        }
    }

    async fn write(&mut self, messages: impl Iterator<Item = Message>) {
        let (before, mut starts, mut flushes) = (self.last, Vec::new(), Vec::new());
        let mut changed = std::mem::take(&mut self.unsaved);
        for message in messages {
            match message {
                Message::Start(mut record, answer) => {
                    self.last += 1;
                    record.sequence = self.last;
                    self.open.insert(self.last, (*record).clone());
                    changed.insert(self.last, *record);
                    starts.push((self.last, answer));
                }
                Message::End(sequence, at, end) => {
                    if let Some(mut record) = self.open.remove(&sequence) {
                        close(&mut record, at, end);
                        changed.insert(sequence, record);
                    }
                }
                Message::Flush(done) => flushes.push(done),
            }
        }
        match self.put(&changed).await {
            Ok(()) => starts.into_iter().for_each(|(sequence, answer)| {
                // Whoever asked may have hung up; its end comes all the same.
                let _ = answer.send(Ok(sequence));
            }),
            Err(error) => self.refuse(before, starts, changed, &error),
        }
        for done in flushes {
            let _ = done.send(());
        }
    }

    /// Whoever wanted to start is refused and gives the number back; the ends are kept for the next write.
    fn refuse(
        &mut self,
        before: u64,
        starts: Vec<Started>,
        mut changed: BTreeMap<u64, AuditRecord>,
        error: &berth_store::Error,
    ) {
        tracing::error!(%error, "the audit can't be written: requests are refused until it can");
        self.last = before;
        self.open.retain(|sequence, _| *sequence <= before);
        changed.retain(|sequence, _| *sequence <= before);
        self.unsaved = changed;
        for (_, answer) in starts {
            let refusal = match error {
                berth_store::Error::NoSpace { .. } => AuditError::NoSpace,
                other => AuditError::Refused(other.to_string()),
            };
            let _ = answer.send(Err(refusal));
        }
    }

    /// Writes records, and last, with the last of them, which numbers are in use: records beyond that are not there.
    async fn put(&self, records: &BTreeMap<u64, AuditRecord>) -> Result<(), berth_store::Error> {
        let open_from = self.open.keys().next().copied().unwrap_or(self.last + 1);
        let mut operations: Vec<Operation> =
            records.iter().map(|(sequence, record)| put_record(*sequence, record)).collect();
        while operations.len() > BATCH_MAX {
            let rest = operations.split_off(BATCH_MAX);
            self.store.transact(Vec::new(), std::mem::replace(&mut operations, rest)).await?;
        }
        if !operations.is_empty() {
            operations.push(put_head(Head { last: self.last, open_from }));
            self.store.transact(Vec::new(), operations).await?;
        }
        Ok(())
    }
}

fn close(record: &mut AuditRecord, at: Timestamp, end: End) {
    record.finished_at = Some(at);
    record.status = Some(end.status);
    record.operation = end.operation;
    if let Some(reason) = end.denied {
        record.decision = DENY.to_owned();
        record.reason = reason;
    }
}

/// The decision of a request that was allowed.
pub const ALLOW: &str = "allow";
/// The decision of a request that was refused.
pub const DENY: &str = "deny";

async fn mark_interrupted(store: &dyn Store) -> Result<Head, berth_store::Error> {
    let mut head = read_head(store).await?;
    let mut from = head.open_from;
    while from <= head.last {
        let to = (from + BATCH_MAX as u64).min(head.last + 1);
        let mut operations = Vec::new();
        for mut record in read_range(store, from, to).await? {
            if record.finished_at.is_none() && !record.interrupted {
                record.interrupted = true;
                operations.push(put_record(record.sequence, &record));
            }
        }
        from = to;
        head.open_from = to;
        operations.push(put_head(head));
        store.transact(Vec::new(), operations).await?;
    }
    Ok(head)
}

async fn read_head(store: &dyn Store) -> Result<Head, berth_store::Error> {
    match store.get(HEAD_KEY).await? {
        Some(entry) => decode(HEAD_KEY, &entry.value),
        None => Ok(Head { last: 0, open_from: 1 }),
    }
}

/// The records with numbers from `lower` up to but without `upper`.
async fn read_range(
    store: &dyn Store,
    lower: u64,
    upper: u64,
) -> Result<Vec<AuditRecord>, berth_store::Error> {
    let Ok(count @ 1..) = usize::try_from(upper.saturating_sub(lower)) else { return Ok(Vec::new()) };
    // Numbers begin with 1, so there is always one before to begin behind.
    let query = Query::prefix(PREFIX).after(key(lower.saturating_sub(1))).limit(count);
    let page = store.list(query).await?;
    page.entries.iter().map(|entry| decode(&entry.key, &entry.value)).collect()
}

fn key(sequence: u64) -> String {
    format!("{PREFIX}{sequence:020}")
}

fn put_record(sequence: u64, record: &AuditRecord) -> Operation {
    Operation::put(key(sequence), serde_json::to_vec(record).expect("audit records are plain data"))
}

fn put_head(head: Head) -> Operation {
    Operation::put(HEAD_KEY, serde_json::to_vec(&head).expect("two numbers"))
}

fn decode<T: serde::de::DeserializeOwned>(key: &str, bytes: &[u8]) -> Result<T, berth_store::Error> {
    serde_json::from_slice(bytes).map_err(|source| berth_store::Error::Undecodable {
        key: key.to_owned(),
        expected: std::any::type_name::<T>(),
        source,
    })
}

#[cfg(test)]
mod tests;
