//! Sessions: what a login ends in.
//!
//! A session is a bearer token of its own kind that ends after so long without use, and after so long at all. When it
//! was used is noted in memory at each request and recorded every few minutes, so a manager that restarts takes a
//! session for unused up to that much longer than it was, never shorter.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use berth_api::manager::{NewSession, Session, Token, TokenKind, User};
use berth_model::{Problem, Timestamp, TokenId, UserId};
use serde::{Deserialize, Serialize};

use super::accounts::TokenRow;
use super::{Bearer, SecretHash, UserPrincipal};
use crate::clock::Entropy;
use crate::cluster::Cluster;
use crate::records::{Record, Records, Row, Transaction};

/// How often the use of a session is recorded, in milliseconds.
const RECORDED_EVERY_MS: u64 = 5 * 60_000;
/// Most sessions that one user has open; the one that was unused longest makes room.
const PER_USER_MAX: usize = 50;
/// How long after a login something may be done that else needs the password again, in milliseconds.
pub const FRESH_MS: u64 = 10 * 60_000;

/// What is kept of a session beside its token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionRow {
    /// The token.
    pub token: TokenId,
    /// Whose it is.
    pub user: UserId,
    /// From where the login came.
    pub address: IpAddr,
    /// When it was used last, as far as it is recorded.
    pub used_at: Timestamp,
}

impl Record for SessionRow {
    const PREFIX: &'static str = "/sessions/";
    const NOUN: &'static str = "session";
    fn record_id(&self) -> String {
        self.token.to_string()
    }
}

/// How a user proved who it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    /// `password`, `oidc:NAME` or `ldap:NAME`.
    pub method: String,
    /// Whether a code was part of it.
    pub second_factor: bool,
}

/// The sessions that are open.
pub struct Sessions {
    idle_ms: u64,
    absolute_ms: u64,
    used: Mutex<HashMap<TokenId, Timestamp>>,
}

impl Sessions {
    /// With these lives, in seconds.
    pub fn new(idle_s: u64, absolute_s: u64) -> Self {
        Self { idle_ms: idle_s * 1000, absolute_ms: absolute_s * 1000, used: Mutex::default() }
    }

    /// A session to be, added to a transaction; the one that was unused longest goes when there are too many.
    pub fn add(
        &self,
        records: &Records,
        transaction: &mut Transaction,
        user: &User,
        proof: &Proof,
        from: (IpAddr, Timestamp),
        entropy: &dyn Entropy,
    ) -> NewSession {
        let (address, now) = from;
        let mut secret = [0; super::SECRET_BYTES];
        entropy.fill(&mut secret);
        let bearer = Bearer { token: TokenId::from_entropy(entropy.id()), secret };
        let token = Token {
            id: bearer.token.clone(),
            user: user.id.clone(),
            kind: TokenKind::Session,
            method: proof.method.clone(),
            second_factor: proof.second_factor,
            scope: None,
            note: String::new(),
            created_at: now,
            expires_at: Some(now.plus_millis(self.absolute_ms)),
        };
        let row = SessionRow { token: token.id.clone(), user: user.id.clone(), address, used_at: now };
        let mut open = sessions_of(records, &user.id);
        if open.len() >= PER_USER_MAX {
            open.sort_by_key(|session| std::cmp::Reverse(self.used_at(session)));
            for oldest in open.drain(PER_USER_MAX - 1..) {
                forget(transaction, &oldest.token);
            }
        }
        transaction.create(&TokenRow { token: token.clone(), hash: SecretHash::of(&bearer.secret) });
        transaction.create(&row);
        let session = self.shown(user, &token, &row, Some(&token.id));
        NewSession { session, secret: bearer.to_string() }
    }

    /// Whether a session is still good; that it was used is noted when it is. What is no session is not asked about.
    ///
    /// The second answer says that the use should be recorded with [`Self::record`].
    pub fn touch(&self, records: &Records, token: &TokenId, now: Timestamp) -> (bool, bool) {
        let Some(row) = records.get::<SessionRow>(token.as_str()) else { return (false, false) };
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let last = used.get(token).copied().unwrap_or(row.used_at).max(row.used_at);
        if now.millis_since(last) >= self.idle_ms {
            used.remove(token);
            return (false, false);
        }
        used.insert(token.clone(), now.max(last));
        (true, now.millis_since(row.used_at) >= RECORDED_EVERY_MS.min(self.idle_ms / 2))
    }

    /// Records when a session was used last.
    pub async fn record(&self, records: &Records, token: &TokenId) {
        let last = self.used.lock().unwrap_or_else(PoisonError::into_inner).get(token).copied();
        let Some(last) = last else { return };
        let result = records
            .update::<SessionRow, Problem>(token.as_str(), |row| {
                row.used_at = row.used_at.max(last);
                Ok(())
            })
            .await;
        if let Err(problem) = result {
            tracing::debug!(%problem, "the use of a session was not recorded");
        }
    }

    /// Whether a session is good at this moment, without using it.
    pub fn is_live(&self, records: &Records, token: &TokenId, now: Timestamp) -> bool {
        records
            .get::<SessionRow>(token.as_str())
            .is_some_and(|row| now.millis_since(self.used_at(&row)) < self.idle_ms)
    }

    fn used_at(&self, row: &SessionRow) -> Timestamp {
        let used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        used.get(&row.token).copied().unwrap_or(row.used_at).max(row.used_at)
    }

    /// The sessions of a user that are good, newest first.
    pub fn list(
        &self,
        records: &Records,
        user: &User,
        own: Option<&TokenId>,
        now: Timestamp,
    ) -> Vec<Session> {
        let mut all: Vec<Session> = sessions_of(records, &user.id)
            .into_iter()
            .filter(|row| self.is_live(records, &row.token, now))
            .filter_map(|row| {
                let token = records.get::<TokenRow>(row.token.as_str())?;
                let is_good = token.token.expires_at.is_none_or(|end| now < end);
                is_good.then(|| self.shown(user, &token.token, &row, own))
            })
            .collect();
        all.sort_by(|a, b| (b.created_at, &b.id).cmp(&(a.created_at, &a.id)));
        all
    }

    fn shown(&self, user: &User, token: &Token, row: &SessionRow, own: Option<&TokenId>) -> Session {
        Session {
            id: token.id.clone(),
            user: user.id.clone(),
            user_name: user.name.clone(),
            method: token.method.clone(),
            second_factor: token.second_factor,
            address: row.address.to_string(),
            created_at: token.created_at,
            used_at: self.used_at(row),
            expires_at: token.expires_at.unwrap_or(token.created_at),
            idle_s: self.idle_ms / 1000,
            is_this: own == Some(&token.id),
        }
    }

    /// Sessions that are over and can be removed.
    pub fn over(&self, records: &Records, now: Timestamp) -> Vec<TokenId> {
        let is_over = |row: &SessionRow| {
            let token = records.get::<TokenRow>(row.token.as_str());
            token.is_none_or(|token| token.token.expires_at.is_some_and(|end| end <= now))
                || !self.is_live(records, &row.token, now)
        };
        let rows = records.list::<SessionRow>();
        let over: Vec<TokenId> =
            rows.iter().filter(|row| is_over(row)).map(|row| row.token.clone()).collect();
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        used.retain(|token, _| !over.contains(token) && records.get::<SessionRow>(token.as_str()).is_some());
        over
    }
}

/// Whether who shows this may be heard: a session that was unused for too long may not. What is no session may.
pub fn is_in_use(cluster: &Arc<Cluster>, user: &UserPrincipal) -> bool {
    if user.kind != TokenKind::Session {
        return true;
    }
    let (is_good, is_stale) =
        cluster.logins.sessions.touch(&cluster.records, &user.token, cluster.clock.now());
    if is_stale {
        let (recording, token) = (Arc::clone(cluster), user.token.clone());
        cluster.spawn(async move { recording.logins.sessions.record(&recording.records, &token).await });
    }
    is_good
}

/// The sessions of a user, good or not.
pub fn sessions_of(records: &Records, user: &UserId) -> Vec<Arc<Row<SessionRow>>> {
    records.list_where::<SessionRow>(|row| row.user == *user)
}

/// Adds the end of a session to a transaction.
pub fn forget(transaction: &mut Transaction, session: &TokenId) {
    transaction.forget::<SessionRow>(session.as_str());
    transaction.forget::<TokenRow>(session.as_str());
}

/// Adds the end of all sessions of a user but one to a transaction.
pub fn forget_others(records: &Records, transaction: &mut Transaction, user: &UserId, but: Option<&TokenId>) {
    for session in sessions_of(records, user) {
        if Some(&session.token) != but {
            forget(transaction, &session.token);
        }
    }
}
