//! The audit: one record for each request, begun before anything is done and ended when it is answered.
//!
//! Records are the leaves of a Merkle log ([`berth_tlog`]) that only grows. A record becomes a leaf when it ends, with
//! its start and its end in one. Its start is durable before the handler runs, in the *open area*; what a dead manager
//! left there becomes a leaf marked `interrupted` at the next start. Refusals that no handler follows, and what the
//! system does by itself, are leaves at once.
//!
//! One writer gives the numbers and writes, so there are no gaps, and requests that come together share one durable
//! write: the leaves, their hashes, the open area and a signed checkpoint in one transaction. So the log on disk is
//! never ahead of or behind its checkpoint. The end follows soon after the answer, and does not hold it up; when nobody
//! waits for a start, ends wait a moment for company, so that a lone caller pays for one write a request and not two.
//!
//! An end is never lost while the manager lives: [`Open`] writes it when it is dropped, whatever became of the handler.
//! When the store fails, starts are refused (nothing is done without a record), ends are kept and tried again. When it
//! is not known whether a write was made, the store is read before it is repeated.
//!
//! Keys in the store:
//!
//! | key | value |
//! |---|---|
//! | `/audit/head` | size and signed checkpoint of the log, as JSON |
//! | `/audit/leaves/TILE/OFFSET` | records of a tile of 256, from that offset, a line each; written once |
//! | `/audit/tiles/LEVEL/INDEX` | hashes of a tile; at level 0 only full ones, with the checkpoint signed then |
//! | `/audit/open/ENTRY` | up to 32 starts without an end, as JSON |
//! | `/audit/forward/NAME` | how far a destination has been served |
//!
//! Read in this order: `layout` and `tree`, `writer`, `reading` and `proofs`, then what leaves the house: `export`,
//! `format` and [`forward`].

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use berth_api::manager::AuditRecord;
use berth_model::{OperationId, ProblemCode, Timestamp};
use berth_store::Store;
use berth_tlog::SigningKey;
use tokio::sync::{mpsc, oneshot, watch};

use crate::clock::Clock;

mod layout;
mod tree;

mod writer;

mod proofs;
mod reading;

pub mod export;
pub mod format;
pub mod forward;

pub use reading::{Filter, Found};

use tree::Tree;
use writer::{Message, Writer};

/// The status of a request whose caller hung up before the answer.
pub const STATUS_CALLER_GONE: u16 = 499;
/// The decision of a request that was allowed.
pub const ALLOW: &str = "allow";
/// The decision of a request that was refused.
pub const DENY: &str = "deny";
/// The result of what went well.
pub const OK: &str = "ok";

/// Most further things of one request that are written down, and longest name of each, in characters.
const RESOURCES_MAX: usize = 16;
const TEXT_CHARS_MAX: usize = 500;

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
    /// What is in the store is not what was signed.
    #[error("the audit's log is damaged or was tampered with: {detail}")]
    Damaged {
        /// What does not fit.
        detail: String,
    },
    /// Something that the log does not have.
    #[error(transparent)]
    OutOfLog(#[from] berth_tlog::proof::OutOfLog),
}

impl From<berth_store::Error> for AuditError {
    fn from(error: berth_store::Error) -> Self {
        Self::Store(error)
    }
}

/// What to do about a log whose last checkpoint was signed with another key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OtherKey {
    /// Somebody who can write the store and has not the key may have written it: don't start.
    Refused,
    /// The key was replaced on purpose, or is one of a test: go on with the new one.
    Accepted,
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
    /// What was wrong; none: nothing.
    pub problem: Option<ProblemCode>,
}

impl End {
    /// With this status and nothing else to say.
    pub const fn status(status: u16) -> Self {
        Self { status, operation: None, denied: None, problem: None }
    }

    const fn caller_gone() -> Self {
        Self::status(STATUS_CALLER_GONE)
    }

    /// Puts into a record how it ended.
    pub fn close(self, record: &mut AuditRecord, at: Timestamp) {
        record.finished_at = Some(at);
        record.status = Some(self.status);
        record.operation = self.operation;
        record.result = match self.problem {
            Some(code) => code.as_str().to_owned(),
            None if self.status == STATUS_CALLER_GONE => "caller-gone".to_owned(),
            None => OK.to_owned(),
        };
        if let Some(reason) = self.denied {
            record.decision = DENY.to_owned();
            record.reason = reason;
        }
    }
}

/// Further things that a request turned out to name, for its record.
#[derive(Debug, Clone, Default)]
pub struct Named(Arc<Mutex<Vec<String>>>);

impl Named {
    /// Notes one (`image:debian`).
    pub fn add(&self, label: &str) {
        let mut named = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if named.len() < RESOURCES_MAX && !named.iter().any(|known| known == label) {
            named.push(label.chars().take(TEXT_CHARS_MAX).collect());
        }
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The audit.
#[derive(Clone)]
pub struct Audit {
    // Unbounded, but each request puts in one start and one end, and the number of requests under way is bounded.
    sender: mpsc::UnboundedSender<Message>,
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    key: Arc<SigningKey>,
    tree: watch::Receiver<Arc<Tree>>,
    under_way: UnderWay,
}

/// Records that have begun, by ticket.
type UnderWay = Arc<Mutex<BTreeMap<u64, AuditRecord>>>;

impl Audit {
    /// Opens the audit, checks that what is in the store is what was signed, writes down what an earlier manager left
    /// open, and starts the writer.
    ///
    /// # Errors
    /// When the store fails, holds what this version can't read, or what was not signed.
    pub async fn open(
        store: Arc<dyn Store>,
        clock: Arc<dyn Clock>,
        key: Arc<SigningKey>,
        other_key: OtherKey,
    ) -> Result<Self, AuditError> {
        let under_way = UnderWay::default();
        let writer =
            Writer::open(Arc::clone(&store), Arc::clone(&key), other_key, Arc::clone(&under_way)).await?;
        let tree = writer.subscribe();
        let (sender, receiver) = mpsc::unbounded_channel();
        tokio::spawn(writer.run(receiver));
        Ok(Self { sender, store, clock, key, tree, under_way })
    }

    /// Writes the start of a record. On return it is durable.
    ///
    /// # Errors
    /// When it could not be written.
    pub async fn begin(&self, record: AuditRecord) -> Result<Open, AuditError> {
        let (answer, answered) = oneshot::channel();
        let record = Box::new(trimmed(record));
        self.sender.send(Message::Start(record, answer)).map_err(|_| AuditError::Closed)?;
        let ends = Ends { sender: self.sender.clone(), clock: Arc::clone(&self.clock) };
        let mut waiting = Waiting { answered, ends: Some(ends) };
        let ticket = (&mut waiting.answered).await.map_err(|_| AuditError::Closed)??;
        let ends = waiting.ends.take().expect("taken only here, or when dropped");
        Ok(Open { ticket, ends, end: End::caller_gone(), named: Named::default() })
    }

    /// Writes a record that has ended already: a refusal, which no handler follows. On return it is durable.
    ///
    /// # Errors
    /// When it could not be written.
    pub async fn write(&self, mut record: AuditRecord, end: End) -> Result<(), AuditError> {
        end.close(&mut record, self.clock.now());
        let (answer, answered) = oneshot::channel();
        let message = Message::Whole(Box::new(trimmed(record)), Some(answer));
        self.sender.send(message).map_err(|_| AuditError::Closed)?;
        answered.await.map_err(|_| AuditError::Closed)?
    }

    /// Writes down what the system did by itself: the loop that acted (`baseline`), what it did, to what, and what came
    /// of it. It is not waited for; like an end, it is not lost while the manager lives.
    pub fn record_system(&self, actor: &str, action: &str, resource: &str, result: &str) {
        let now = self.clock.now();
        let record = AuditRecord {
            actor: format!("system:{actor}"),
            method: "system".to_owned(),
            action: action.to_owned(),
            resources: vec![resource.to_owned()],
            decision: ALLOW.to_owned(),
            reason: "the system acts by itself".to_owned(),
            started_at: now,
            finished_at: Some(now),
            result: result.to_owned(),
            ..AuditRecord::default()
        };
        // It fails only when the manager is stopping.
        let _ = self.sender.send(Message::Whole(Box::new(trimmed(record)), None));
    }

    /// Waits until everything that has ended is on disk.
    pub async fn flush(&self) {
        let (done, flushed) = oneshot::channel();
        if self.sender.send(Message::Flush(done)).is_ok() {
            let _ = flushed.await;
        }
    }

    /// Records that have begun and not ended, which are not in the log yet.
    pub fn under_way(&self) -> Vec<AuditRecord> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// How many records the log has.
    pub fn size(&self) -> u64 {
        self.tree.borrow().size()
    }

    /// Tells of each new size of the log.
    pub(crate) fn growth(&self) -> watch::Receiver<Arc<Tree>> {
        self.tree.clone()
    }

    /// The store that it is in.
    pub(crate) fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }
}

/// A record of bounded size, whatever a caller has put into it.
fn trimmed(mut record: AuditRecord) -> AuditRecord {
    let trim = |text: &mut String| {
        if let Some((end, _)) = text.char_indices().nth(TEXT_CHARS_MAX) {
            text.truncate(end);
        }
    };
    [&mut record.actor, &mut record.request, &mut record.reason, &mut record.result, &mut record.action]
        .into_iter()
        .for_each(trim);
    record.resources.truncate(RESOURCES_MAX);
    record.policies.truncate(RESOURCES_MAX);
    record.resources.iter_mut().chain(&mut record.policies).for_each(trim);
    record
}

/// The way for ends.
struct Ends {
    sender: mpsc::UnboundedSender<Message>,
    clock: Arc<dyn Clock>,
}

impl Ends {
    fn put(&self, ticket: u64, end: End, named: Vec<String>) {
        // It fails only when the writer is gone, and then the next start of the manager writes the record down.
        let _ = self.sender.send(Message::End(ticket, self.clock.now(), Box::new(end), named));
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
            if let Ok(Ok(ticket)) = answered.await {
                ends.put(ticket, End::caller_gone(), Vec::new());
            }
        });
    }
}

/// A record that was begun. Dropping it ends it.
pub struct Open {
    ticket: u64,
    ends: Ends,
    end: End,
    named: Named,
}

impl Open {
    /// Says how it will have ended; what is said last counts.
    pub fn set(&mut self, end: End) {
        self.end = end;
    }

    /// Where further things are noted that the request names.
    pub fn share(&mut self, named: Named) {
        self.named = named;
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.ends.put(self.ticket, self.end.clone(), self.named.take());
    }
}

#[cfg(test)]
mod tests;
