//! Whether who asks may still be listened to, for what goes on after a request was let through.
//!
//! Each request is judged when it comes. A console and a stream of events live on for hours; for them
//! [`Standing::ended`] resolves when the credential that opened them stops being good: the user disabled or deleted, the
//! token or session revoked or expired, the host taken out; and when the policies stop allowing what it was opened for:
//! the grant taken away, the user put out of the team. It is told by the records' own changes, so it is a matter of
//! milliseconds; a grant that ends by itself is noticed within half a minute. As long as they are open, a session counts as used. An operation that was begun is another
//! thing: it is the cluster's, and goes on to its end.

use std::sync::Arc;
use std::time::Duration;

use berth_api::manager::User;
use berth_model::host::Host;

use berth_api::manager::{Grant, Policy, Role, Segment, Team};
use berth_model::access::Action;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, select_all};
use tokio::sync::watch;

use super::Principal;
use super::accounts::TokenRow;
use super::session;
use crate::cluster::Cluster;
use crate::door::Gate;
use crate::policy::Resource;

/// Longest time without a look: for ends that no change of a record tells, and to note that a session is in use.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// Whether who asks may still be listened to.
#[derive(Clone)]
pub struct Standing {
    cluster: Arc<Cluster>,
    principal: Principal,
    /// What it was let through for.
    asked: Option<(Arc<Gate>, Action, Resource)>,
}

impl Standing {
    /// Of who asks.
    pub const fn of(cluster: Arc<Cluster>, principal: Principal) -> Self {
        Self { cluster, principal, asked: None }
    }

    /// The same as long as the policies allow what it was let through for.
    #[must_use]
    pub fn while_allowed(mut self, gate: Arc<Gate>, action: Action, resource: Resource) -> Self {
        self.asked = Some((gate, action, resource));
        self
    }

    /// Whether the policies still allow it. What needed a second person had one.
    fn is_allowed(&self) -> bool {
        self.asked.as_ref().is_none_or(|(gate, action, resource)| {
            gate.policies.look(&self.principal, *action, resource, true).allowed
        })
    }

    /// Whether the credential is good at this moment.
    pub fn is_good(&self) -> bool {
        let (records, now) = (&self.cluster.records, self.cluster.clock.now());
        match &self.principal {
            Principal::User(user) => {
                let stays = records.get::<User>(user.id.as_str()).is_some_and(|row| !row.disabled);
                let token = records.get::<TokenRow>(user.token.as_str());
                let is_good = token.is_some_and(|row| row.token.expires_at.is_none_or(|end| now < end));
                stays && is_good && session::is_in_use(&self.cluster, user) && self.is_allowed()
            }
            Principal::Host(host) => records.get::<Host>(host.as_str()).is_some(),
            Principal::JoinToken(_) | Principal::Anonymous => true,
        }
    }

    /// Done when the credential is good no more.
    pub async fn ended(&self) {
        let records = &self.cluster.records;
        let mut changes = vec![
            records.changes::<User>(),
            records.changes::<TokenRow>(),
            records.changes::<Host>(),
            records.changes::<Grant>(),
            records.changes::<Team>(),
            records.changes::<Role>(),
            records.changes::<Policy>(),
            records.changes::<Segment>(),
        ];
        while self.is_good() {
            let until_end = match &self.principal {
                Principal::User(user) => records
                    .get::<TokenRow>(user.token.as_str())
                    .and_then(|row| row.token.expires_at)
                    .map(|end| Duration::from_millis(end.millis_since(self.cluster.clock.now()))),
                _ => None,
            };
            let wait =
                until_end.map_or(LOOK_EVERY, |left| left.min(LOOK_EVERY)).max(Duration::from_millis(1));
            tokio::select! {
                () = any_of(&mut changes) => {}
                () = self.cluster.clock.sleep(wait) => {}
            }
        }
    }
}

/// Done when one of them has changed.
async fn any_of(changes: &mut [watch::Receiver<u64>]) {
    let each: Vec<BoxFuture<'_, ()>> =
        changes.iter_mut().map(|one| async { drop(one.changed().await) }.boxed()).collect();
    select_all(each).await;
}
