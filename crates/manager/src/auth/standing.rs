//! Whether who asks may still be listened to, for what goes on after a request was let through.
//!
//! Each request is judged when it comes. A console and a stream of events live on for hours; for them
//! [`Standing::ended`] resolves when the credential that opened them stops being good: the user disabled or deleted, the
//! token or session revoked or expired, the host taken out. It is told by the records' own changes, so it is a matter
//! of milliseconds. As long as they are open, a session counts as used. An operation that was begun is another
//! thing: it is the cluster's, and goes on to its end.

use std::sync::Arc;
use std::time::Duration;

use berth_api::manager::User;
use berth_model::host::Host;

use super::Principal;
use super::accounts::TokenRow;
use super::session;
use crate::cluster::Cluster;

/// Longest time without a look: for ends that no change of a record tells, and to note that a session is in use.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// Whether who asks may still be listened to.
#[derive(Clone)]
pub struct Standing {
    cluster: Arc<Cluster>,
    principal: Principal,
}

impl Standing {
    /// Of who asks.
    pub const fn of(cluster: Arc<Cluster>, principal: Principal) -> Self {
        Self { cluster, principal }
    }

    /// Whether the credential is good at this moment.
    pub fn is_good(&self) -> bool {
        let (records, now) = (&self.cluster.records, self.cluster.clock.now());
        match &self.principal {
            Principal::User(user) => {
                let stays = records.get::<User>(user.id.as_str()).is_some_and(|row| !row.disabled);
                let token = records.get::<TokenRow>(user.token.as_str());
                let is_good = token.is_some_and(|row| row.token.expires_at.is_none_or(|end| now < end));
                stays && is_good && session::is_in_use(&self.cluster, user)
            }
            Principal::Host(host) => records.get::<Host>(host.as_str()).is_some(),
            Principal::JoinToken(_) | Principal::Anonymous => true,
        }
    }

    /// Done when the credential is good no more.
    pub async fn ended(&self) {
        let records = &self.cluster.records;
        let (mut users, mut tokens) = (records.changes::<User>(), records.changes::<TokenRow>());
        let mut hosts = records.changes::<Host>();
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
                _ = users.changed() => {}
                _ = tokens.changed() => {}
                _ = hosts.changed() => {}
                () = self.cluster.clock.sleep(wait) => {}
            }
        }
    }
}
