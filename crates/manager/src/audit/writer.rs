//! The one writer.
//!
//! It takes what has come in, works out what that makes of the log and of the open area, and writes it in one
//! transaction that holds only if nobody else has written the head. What a failed write was to do is taken back, but
//! for the ends, which go to the front of the queue again.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use berth_api::manager::AuditRecord;
use berth_model::Timestamp;
use berth_store::{Condition, Error, Operation, Query, Revision, Store};
use berth_tlog::tile::TILE_LEAVES;
use berth_tlog::{Hash, SigningKey};
use bytes::Bytes;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use super::layout::{self, HEAD_KEY, Head, OPEN_PER_ENTRY, OPEN_PREFIX, Started, open_key};
use super::tree::{Changed, Tree};
use super::{AuditError, End, OtherKey, UnderWay};

/// Most messages that are taken in at once.
const QUEUE_MAX: usize = 4096;
/// Most entries of the open area that one transaction touches; with leaves, tiles and head it must stay below the
/// store's 128 operations.
const ENTRIES_MAX: usize = 64;
/// How many bytes of records one transaction is to carry. The store takes a good megabyte; one record more than this
/// is a few kilobytes, one entry of the open area at most some hundred.
const BYTES_MAX: usize = 400 * 1024;
/// How long until ends are tried again that the store failed to write.
const RETRY_AFTER: Duration = Duration::from_millis(200);
/// How long ends wait for a start to share a write with. Longer, and more records of a killed manager say
/// `interrupted` although their request was answered.
const ENDS_WAIT: Duration = Duration::from_millis(20);

type Answer<T> = oneshot::Sender<Result<T, AuditError>>;

/// What the writer is told.
pub(super) enum Message {
    /// A start, to be durable when it is answered, with its ticket.
    Start(Box<AuditRecord>, Answer<u64>),
    /// The end of what has that ticket, and what else it named.
    End(u64, Timestamp, Box<End>, Vec<String>),
    /// A record that has ended already; whoever waits for it is told when it is durable.
    Whole(Box<AuditRecord>, Option<Answer<()>>),
    /// To be answered when everything before it has been tried to be written.
    Flush(oneshot::Sender<()>),
    /// What has that ticket was left by a manager that died.
    Interrupted(u64),
}

impl Message {
    const fn is_waited_for(&self) -> bool {
        matches!(self, Self::Start(..) | Self::Whole(_, Some(_)) | Self::Flush(_))
    }
}

pub(super) struct Writer {
    store: Arc<dyn Store>,
    key: Arc<SigningKey>,
    tree: watch::Sender<Arc<Tree>>,
    head_revision: Revision,
    /// What is in the open area, by entry and ticket: the bytes as they are written.
    open: BTreeMap<u64, BTreeMap<u64, Bytes>>,
    under_way: UnderWay,
    next_ticket: u64,
    queue: VecDeque<Message>,
    /// Entries that a failed write may have left in another state than memory has.
    rewrite: BTreeSet<u64>,
    doubt: Option<Doubt>,
}

/// A write of which it is not known whether it was made.
struct Doubt {
    tree: Arc<Tree>,
    /// How many messages went back to the front of the queue, to be dropped if it was.
    requeued: usize,
}

/// A record in the open area as it was before it ended: ticket, record, and bytes as written.
type Before = (u64, AuditRecord, Bytes);

/// What one transaction is to do.
struct Batch {
    tree: Tree,
    changed: Changed,
    /// The number of the first new leaf, and their lines.
    first: u64,
    lines: Vec<Bytes>,
    entries: BTreeSet<u64>,
    bytes: usize,
    started: Vec<(u64, Answer<u64>)>,
    /// Ends, as they were before, to be taken back.
    ended: Vec<(Option<Before>, Message)>,
    whole: Vec<Answer<()>>,
    flushed: Vec<oneshot::Sender<()>>,
}

impl Writer {
    /// Reads the log's edge, and writes down what an earlier manager left open.
    pub async fn open(
        store: Arc<dyn Store>,
        key: Arc<SigningKey>,
        other_key: OtherKey,
        under_way: UnderWay,
    ) -> Result<Self, AuditError> {
        let (tree, head_revision) = Tree::load(&*store, &key, other_key).await?;
        let mut writer = Self {
            store,
            key,
            tree: watch::Sender::new(Arc::new(tree)),
            head_revision,
            open: BTreeMap::new(),
            under_way,
            next_ticket: 0,
            queue: VecDeque::new(),
            rewrite: BTreeSet::new(),
            doubt: None,
        };
        for entry in writer.store.list(Query::prefix(OPEN_PREFIX)).await?.entries {
            let started: Vec<Started> = layout::decode(&entry.key, &entry.value)?;
            for start in started {
                writer.next_ticket = writer.next_ticket.max(start.ticket + 1);
                writer.queue.push_back(Message::Interrupted(start.ticket));
                writer.begin(start.ticket, start.record);
            }
        }
        while !writer.queue.is_empty() {
            writer.write().await?;
        }
        writer.next_ticket = 0;
        Ok(writer)
    }

    pub fn subscribe(&self) -> watch::Receiver<Arc<Tree>> {
        self.tree.subscribe()
    }

    /// Writes what comes in, until nobody is left to send anything.
    pub async fn run(mut self, mut receiver: mpsc::UnboundedReceiver<Message>) {
        let (mut messages, mut failed) = (Vec::new(), false);
        loop {
            if self.queue.is_empty() || failed {
                let received = receiver.recv_many(&mut messages, QUEUE_MAX);
                let received = if failed {
                    tokio::time::timeout(RETRY_AFTER, received).await.unwrap_or(usize::MAX)
                } else {
                    received.await
                };
                if received == 0 {
                    return;
                }
            }
            self.queue.extend(messages.drain(..));
            self.wait_for_company(&mut receiver).await;
            while let Ok(message) = receiver.try_recv() {
                self.queue.push_back(message);
                if self.queue.len() >= QUEUE_MAX {
                    break;
                }
            }
            match self.write().await {
                Ok(()) => failed = false,
                Err(AuditError::Damaged { detail }) => {
                    tracing::error!(detail, "the audit stops: nothing is done any more");
                    return;
                }
                Err(_) => failed = true,
            }
        }
    }

    /// Ends that nobody waits for wait a moment for a start to share a write with.
    async fn wait_for_company(&mut self, receiver: &mut mpsc::UnboundedReceiver<Message>) {
        let until = Instant::now() + ENDS_WAIT;
        let mut is_waited_for = self.queue.iter().any(Message::is_waited_for);
        while !is_waited_for && self.queue.len() < QUEUE_MAX {
            match tokio::time::timeout_at(until, receiver.recv()).await {
                Ok(Some(message)) => {
                    is_waited_for = message.is_waited_for();
                    self.queue.push_back(message);
                }
                Ok(None) | Err(_) => return,
            }
        }
    }

    /// One transaction of what is first in the queue.
    async fn write(&mut self) -> Result<(), AuditError> {
        if self.doubt.is_some()
            && let Err(error) = self.settle().await
        {
            let batch = self.assemble();
            return Err(self.take_back(batch, error, false));
        }
        let mut batch = self.assemble();
        let is_empty = batch.lines.is_empty() && batch.entries.is_empty();
        let result = if is_empty {
            Ok(self.head_revision)
        } else {
            if !batch.lines.is_empty() {
                batch.tree.sign(&self.key);
            }
            let condition = Condition::unchanged(HEAD_KEY, self.head_revision);
            self.store.transact(vec![condition], self.operations(&batch)).await
        };
        match result {
            Ok(revision) => {
                // Without leaves the head stays as it was.
                if !batch.lines.is_empty() {
                    self.head_revision = revision;
                }
                self.conclude(batch);
                Ok(())
            }
            Err(Error::Conflict { .. }) => {
                let error = AuditError::Damaged { detail: "somebody else writes the same audit".to_owned() };
                Err(self.take_back(batch, error, false))
            }
            Err(error) => {
                let is_open = !matches!(error, Error::NoSpace { .. } | Error::Invalid { .. });
                Err(self.take_back(batch, error.into(), is_open))
            }
        }
    }

    /// Finds out whether the last write was made.
    async fn settle(&mut self) -> Result<(), AuditError> {
        let Some(entry) = self.store.get(HEAD_KEY).await? else {
            self.doubt = None;
            return Ok(());
        };
        let Some(doubt) = self.doubt.take() else { return Ok(()) };
        if entry.mod_revision == self.head_revision {
            return Ok(());
        }
        let head: Head = layout::decode(HEAD_KEY, &entry.value)?;
        if head.size != doubt.tree.size() || head.note != doubt.tree.note() {
            return Err(AuditError::Damaged { detail: "somebody else writes the same audit".to_owned() });
        }
        self.head_revision = entry.mod_revision;
        for message in self.queue.drain(..doubt.requeued) {
            if let Message::End(ticket, ..) | Message::Interrupted(ticket) = message {
                let entry = ticket / OPEN_PER_ENTRY;
                self.open.entry(entry).or_default().remove(&ticket);
                self.under_way.lock().unwrap_or_else(PoisonError::into_inner).remove(&ticket);
            }
        }
        self.tree.send_replace(doubt.tree);
        Ok(())
    }

    fn begin(&mut self, ticket: u64, record: AuditRecord) -> usize {
        let started = Started { ticket, record };
        let bytes = Bytes::from(serde_json::to_vec(&started).expect("records are plain data"));
        let length = bytes.len();
        self.open.entry(ticket / OPEN_PER_ENTRY).or_default().insert(ticket, bytes);
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner).insert(ticket, started.record);
        length
    }

    /// Takes from the queue what fits into one transaction, and works out what it makes of everything.
    fn assemble(&mut self) -> Batch {
        let tree = Tree::clone(&self.tree.borrow());
        let mut batch = Batch {
            first: tree.size(),
            tree,
            changed: Changed::new(),
            lines: Vec::new(),
            entries: BTreeSet::new(),
            bytes: 0,
            started: Vec::new(),
            ended: Vec::new(),
            whole: Vec::new(),
            flushed: Vec::new(),
        };
        while batch.entries.len() < ENTRIES_MAX
            && let Some(entry) = self.rewrite.pop_first()
        {
            self.touch(&mut batch, entry);
        }
        while batch.bytes < BYTES_MAX && batch.entries.len() < ENTRIES_MAX {
            let Some(message) = self.queue.pop_front() else { break };
            self.take(&mut batch, message);
        }
        batch
    }

    fn take(&mut self, batch: &mut Batch, message: Message) {
        match message {
            Message::Start(record, answer) => {
                let ticket = self.next_ticket;
                self.next_ticket += 1;
                self.touch(batch, ticket / OPEN_PER_ENTRY);
                batch.bytes += self.begin(ticket, *record);
                batch.started.push((ticket, answer));
            }
            Message::End(ticket, at, end, named) => {
                let Some((record, bytes)) = self.close(batch, ticket) else { return };
                let mut closed = record.clone();
                closed.resources.extend(named.iter().cloned());
                End::clone(&end).close(&mut closed, at);
                batch.append(closed, &self.key);
                let before = (ticket, record, bytes);
                batch.ended.push((Some(before), Message::End(ticket, at, end, named)));
            }
            Message::Interrupted(ticket) => {
                let Some((record, bytes)) = self.close(batch, ticket) else { return };
                let mut closed = record.clone();
                closed.interrupted = true;
                "interrupted".clone_into(&mut closed.result);
                batch.append(closed, &self.key);
                batch.ended.push((Some((ticket, record, bytes)), Message::Interrupted(ticket)));
            }
            Message::Whole(record, answer) => {
                batch.append(AuditRecord::clone(&record), &self.key);
                match answer {
                    Some(answer) => batch.whole.push(answer),
                    None => batch.ended.push((None, Message::Whole(record, None))),
                }
            }
            Message::Flush(done) => batch.flushed.push(done),
        }
    }

    /// Takes a record out of the open area.
    fn close(&mut self, batch: &mut Batch, ticket: u64) -> Option<(AuditRecord, Bytes)> {
        let entry = ticket / OPEN_PER_ENTRY;
        let bytes = self.open.get_mut(&entry)?.remove(&ticket)?;
        self.touch(batch, entry);
        let record = self.under_way.lock().unwrap_or_else(PoisonError::into_inner).remove(&ticket)?;
        Some((record, bytes))
    }

    fn touch(&self, batch: &mut Batch, entry: u64) {
        if batch.entries.insert(entry) {
            let held = self.open.get(&entry);
            batch.bytes += held.map_or(0, |held| held.values().map(Bytes::len).sum());
        }
    }

    fn operations(&self, batch: &Batch) -> Vec<Operation> {
        let mut operations = Vec::new();
        for entry in &batch.entries {
            let key = open_key(*entry);
            operations.push(match self.open.get(entry).filter(|held| !held.is_empty()) {
                Some(held) => Operation::put(key, list_of(held.values())),
                None => Operation::delete(key),
            });
        }
        if batch.lines.is_empty() {
            return operations;
        }
        let (mut first, mut rest) = (batch.first, &batch.lines[..]);
        while !rest.is_empty() {
            let room = usize::try_from(TILE_LEAVES - first % TILE_LEAVES).unwrap_or(usize::MAX);
            let (here, others) = rest.split_at(room.min(rest.len()));
            operations.push(layout::put_leaves(first, here));
            first += here.len() as u64;
            rest = others;
        }
        for (id, (hashes, note)) in &batch.changed {
            operations.push(layout::put_tile(*id, hashes, note.as_deref()));
        }
        let head = Head { size: batch.tree.size(), note: batch.tree.note().to_owned() };
        operations.push(Operation::put(HEAD_KEY, serde_json::to_vec(&head).expect("plain data")));
        operations
    }

    fn conclude(&mut self, batch: Batch) {
        for entry in &batch.entries {
            if self.open.get(entry).is_some_and(BTreeMap::is_empty) {
                self.open.remove(entry);
            }
        }
        if !batch.lines.is_empty() {
            self.tree.send_replace(Arc::new(batch.tree));
        }
        // Whoever asked may have hung up; the end of a start comes all the same.
        for (ticket, answer) in batch.started {
            let _ = answer.send(Ok(ticket));
        }
        for answer in batch.whole {
            let _ = answer.send(Ok(()));
        }
        for done in batch.flushed {
            let _ = done.send(());
        }
    }

    /// Whoever waits is refused; the ends are kept for the next write.
    fn take_back(&mut self, batch: Batch, error: AuditError, is_open: bool) -> AuditError {
        tracing::error!(error = %reason(&error), "the audit can't be written: requests are refused until it can");
        for (ticket, answer) in batch.started {
            if let Some(held) = self.open.get_mut(&(ticket / OPEN_PER_ENTRY)) {
                held.remove(&ticket);
            }
            self.under_way.lock().unwrap_or_else(PoisonError::into_inner).remove(&ticket);
            let _ = answer.send(Err(refusal(&error)));
        }
        for answer in batch.whole {
            let _ = answer.send(Err(refusal(&error)));
        }
        let requeued = batch.ended.len();
        for (before, message) in batch.ended.into_iter().rev() {
            if let Some((ticket, record, bytes)) = before {
                self.open.entry(ticket / OPEN_PER_ENTRY).or_default().insert(ticket, bytes);
                self.under_way.lock().unwrap_or_else(PoisonError::into_inner).insert(ticket, record);
            }
            self.queue.push_front(message);
        }
        self.rewrite.extend(batch.entries);
        if is_open && !batch.lines.is_empty() {
            self.doubt = Some(Doubt { tree: Arc::new(batch.tree), requeued });
        }
        for done in batch.flushed {
            let _ = done.send(());
        }
        error
    }
}

impl Batch {
    fn append(&mut self, mut record: AuditRecord, key: &SigningKey) {
        record.sequence = Some(self.tree.size());
        let line = Bytes::from(serde_json::to_vec(&record).expect("records are plain data"));
        self.tree.push(Hash::leaf(&line), key, &mut self.changed);
        self.bytes += line.len();
        self.lines.push(line);
    }
}

/// A JSON list of things that are JSON already.
fn list_of<'a>(items: impl Iterator<Item = &'a Bytes>) -> Vec<u8> {
    let mut list = vec![b'['];
    for item in items {
        if list.len() > 1 {
            list.push(b',');
        }
        list.extend_from_slice(item);
    }
    list.push(b']');
    list
}

fn refusal(error: &AuditError) -> AuditError {
    match error {
        AuditError::Store(Error::NoSpace { .. }) => AuditError::NoSpace,
        other => AuditError::Refused(reason(other)),
    }
}

fn reason(error: &AuditError) -> String {
    match error {
        AuditError::Store(cause) => cause.to_string(),
        other => other.to_string(),
    }
}
