//! What every driver owes, as tests.
//!
//! A driver writes an async function that makes a fresh [`Subject`] and calls
//! [`store_contract!`](crate::store_contract) with it within a test module; it gets one test for each promise. Nothing
//! here asks for more than etcd can keep: no absolute revisions, and no exact moment at which a lease ends.

mod changes;
mod leases;
mod lists;
mod watches;

pub use changes::*;
pub use leases::*;
pub use lists::*;
pub use watches::*;

use std::any::Any;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::clock::ManualClock;
use crate::store::{Change, Commit, Revision, Store};
use crate::watch::Watch;

/// How long anything may take on the slowest machine before it counts as never.
const DEADLINE: Duration = Duration::from_secs(60);

/// A fresh, empty store under test.
pub struct Subject {
    store: Arc<dyn Store>,
    time: Box<dyn Time>,
    _held: Box<dyn Any + Send>,
}

impl Subject {
    /// A store, a way to let its time pass, and whatever must live as long as it, such as a temporary directory.
    pub fn new(store: Arc<dyn Store>, time: impl Time, held: impl Any + Send) -> Self {
        Self { store, time: Box::new(time), _held: Box::new(held) }
    }
}

/// Lets time pass for the store's leases: by a clock in hand, or by waiting.
pub trait Time: Send + Sync + 'static {
    /// Returns when so much time has passed.
    fn pass(&self, span: Duration) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;
}

impl Time for ManualClock {
    fn pass(&self, span: Duration) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        self.advance(span);
        Box::pin(std::future::ready(()))
    }
}

/// Makes a test of each promise. Takes an expression that makes a future of a [`Subject`](crate::contract::Subject).
#[macro_export]
macro_rules! store_contract {
    ($subject:expr) => {
        $crate::store_contract! { $subject =>
            a_key_that_was_never_put_is_absent
            a_put_is_read_back_with_where_it_stands_in_history
            a_transaction_has_one_revision_and_adds_one
            what_changes_nothing_makes_no_revision
            a_deleted_key_starts_afresh
            a_condition_that_fails_changes_nothing_and_says_what_was_found
            the_first_of_several_failing_conditions_is_named
            a_key_named_by_two_operations_is_refused
            input_beyond_the_limits_is_refused_and_changes_nothing
            input_at_the_limits_is_kept
            a_counter_incremented_by_many_tasks_loses_nothing
            transfers_are_never_seen_half_done
            only_one_of_many_creators_wins
            a_list_holds_what_begins_with_the_prefix_in_byte_order
            pages_join_to_the_whole
            paging_sees_one_revision_while_others_write
            an_earlier_state_can_be_listed_until_it_is_compacted
            a_revision_that_is_not_reached_is_refused
            compacting_keeps_the_present_and_may_be_repeated
            a_watch_shows_the_past_then_the_present_without_a_gap
            a_watch_shows_only_its_prefix
            a_transaction_is_one_commit_in_order_of_keys
            a_watch_from_a_future_revision_waits_for_it
            a_failed_transaction_is_not_seen_by_watchers
            a_watch_of_compacted_changes_is_refused
            a_slow_watcher_sees_everything_or_is_told
            a_reconnecting_watcher_sees_each_change_once_in_order
            a_watch_without_a_revision_is_refused
            dropping_the_wait_for_a_commit_loses_nothing
            keys_vanish_with_their_lease_in_one_commit
            a_lease_that_is_kept_alive_lives_on
            an_ended_lease_can_not_be_used
            a_revoked_lease_takes_its_keys_at_once
            a_key_that_is_put_again_belongs_to_its_new_lease_only
            a_lease_lasts_at_least_as_long_as_asked
        }
    };
    ($subject:expr => $($promise:ident)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $promise() {
                $crate::contract::$promise($subject.await).await;
            }
        )*
    };
}

/// Fails the test when something that must happen does not.
async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what} did not happen within {DEADLINE:?}"),
    }
}

async fn next(watch: &mut Watch) -> Commit {
    within("a commit", watch.next()).await.expect("a watch without error goes on").expect("a commit")
}

async fn put(store: &dyn Store, key: &str, value: &str) -> Revision {
    store.put(key, Bytes::copy_from_slice(value.as_bytes())).await.expect("a plain put")
}

/// `+key=value` and `-key`, for comparing at a glance.
fn shown(commit: &Commit) -> String {
    let change = |change: &Change| match change {
        Change::Put(entry) => format!("+{}={}", entry.key, String::from_utf8_lossy(&entry.value)),
        Change::Delete { key } => format!("-{key}"),
    };
    commit.changes.iter().map(change).collect::<Vec<_>>().join(" ")
}
