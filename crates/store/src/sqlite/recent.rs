//! The last commits in memory, so that watchers who keep up (nearly all, nearly always) never query the file.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};

use crate::store::{Change, Commit, Revision};
use crate::watch::{Replay, matching};

/// How many bytes of values are kept. Too few, and a burst sends all watchers to the file; too many only cost memory.
const BYTES_MAX: usize = 4 << 20;

/// How many commits are kept, however small.
const COMMITS_MAX: usize = 4096;

/// A stretch of history without gaps up to the newest commit.
#[derive(Default)]
pub(super) struct Recent {
    commits: Mutex<Stretch>,
}

#[derive(Default)]
struct Stretch {
    commits: VecDeque<Commit>,
    bytes: usize,
}

impl Recent {
    /// Adds what was just committed, and forgets what is compacted or too much.
    pub fn extend(&self, commits: Vec<Commit>, compacted: Revision) {
        let mut stretch = self.lock();
        for commit in commits {
            stretch.bytes += bytes(&commit);
            stretch.commits.push_back(commit);
        }
        while let Some(first) = stretch.commits.front() {
            let too_much = stretch.bytes > BYTES_MAX || stretch.commits.len() > COMMITS_MAX;
            if !too_much && first.revision > compacted {
                break;
            }
            stretch.bytes -= bytes(first);
            stretch.commits.pop_front();
        }
    }

    /// All commits from `from` on, or none if they reach too far back.
    pub fn replay(&self, prefix: &str, from: Revision) -> Option<Replay> {
        let stretch = self.lock();
        let first = stretch.commits.front().filter(|first| first.revision <= from)?;
        let skip = usize::try_from(from.0 - first.revision.0).ok()?;
        let last = stretch.commits.back().filter(|last| last.revision >= from)?;
        let commits = stretch.commits.iter().skip(skip).filter_map(|commit| matching(commit, prefix));
        Some(Replay { commits: commits.collect(), complete_to: last.revision })
    }

    fn lock(&self) -> MutexGuard<'_, Stretch> {
        self.commits.lock().expect("nothing panics while it is held")
    }
}

fn bytes(commit: &Commit) -> usize {
    commit
        .changes
        .iter()
        .map(|change| match change {
            Change::Put(entry) => entry.key.len() + entry.value.len(),
            Change::Delete { key } => key.len(),
        })
        .sum()
}
