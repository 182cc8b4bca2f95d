//! Watches that pull.
//!
//! A watcher remembers the next revision it needs, learns from the store how far the store has come, and fetches what
//! lies between from history. So a slow watcher costs no memory and loses nothing until history is compacted away
//! under it, which it is told; and one that reconnects takes the very path of one that was there all the time.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::stream::{self, Stream, StreamExt};
use tokio::sync::watch;

use crate::error::Error;
use crate::limits::check_prefix;
use crate::store::{Change, Commit, Pending, Revision};

/// A stream of [`Commit`]s; see [`Store::watch`](crate::Store::watch). After an error it ends.
pub struct Watch {
    stream: Pin<Box<dyn Stream<Item = Result<Commit, Error>> + Send>>,
}

impl Watch {
    /// For drivers: wraps what they made.
    pub fn new(stream: impl Stream<Item = Result<Commit, Error>> + Send + 'static) -> Self {
        Self { stream: Box::pin(stream) }
    }

    /// The next commit, waiting for it; `None` only after an error was returned.
    ///
    /// Dropping the future loses nothing: the next call returns what it would have.
    pub async fn next(&mut self) -> Option<Result<Commit, Error>> {
        self.stream.next().await
    }
}

impl Stream for Watch {
    type Item = Result<Commit, Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.stream.as_mut().poll_next(context)
    }
}

/// A stretch of history.
pub(crate) struct Replay {
    /// What matched, in order.
    pub commits: Vec<Commit>,
    /// Everything that matches up to here has been returned.
    pub complete_to: Revision,
}

/// Where a driver keeps its history. Must not keep the store open.
pub(crate) trait History: Send + Sync + 'static {
    /// Commits from `from` on, as far as is convenient in one go but at least one revision; `from` has been reached.
    fn replay<'a>(&'a self, prefix: &'a str, from: Revision) -> Pending<'a, Replay>;
}

/// Follows `history` as `head` moves on.
pub(crate) fn follow(
    history: impl History,
    head: watch::Receiver<Revision>,
    prefix: &str,
    from: Revision,
) -> Watch {
    let start = Follower { history, head, prefix: prefix.to_owned(), next: from, ready: VecDeque::new() };
    Watch::new(stream::unfold(Some(start), |state| async {
        let mut follower = state?;
        match follower.advance().await {
            Ok(commit) => Some((Ok(commit), Some(follower))),
            Err(error) => Some((Err(error), None)),
        }
    }))
}

struct Follower<H> {
    history: H,
    head: watch::Receiver<Revision>,
    prefix: String,
    next: Revision,
    ready: VecDeque<Commit>,
}

impl<H: History> Follower<H> {
    async fn advance(&mut self) -> Result<Commit, Error> {
        check_prefix(&self.prefix)?;
        loop {
            if let Some(commit) = self.ready.pop_front() {
                return Ok(commit);
            }
            let next = self.next;
            // Nothing is asked of history before its time, except by a start that can never come.
            if next != Revision::ABSENT {
                self.head.wait_for(|head| *head >= next).await.map_err(|_| Error::Closed)?;
            }
            let replay = self.history.replay(&self.prefix, next).await?;
            debug_assert!(replay.complete_to >= next, "a replay must get somewhere");
            self.next = replay.complete_to.next();
            self.ready.extend(replay.commits);
        }
    }
}

/// The part of a commit that a watcher of `prefix` is to see.
pub(crate) fn matching(commit: &Commit, prefix: &str) -> Option<Commit> {
    let changes: Vec<Change> =
        commit.changes.iter().filter(|change| change.key().starts_with(prefix)).cloned().collect();
    (!changes.is_empty()).then_some(Commit { revision: commit.revision, changes })
}
