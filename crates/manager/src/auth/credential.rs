//! What a local user proves who it is with: a password, and a second factor. Kept apart from the user, because it is
//! never shown and because users of a provider or a directory have none.

use std::sync::Arc;

use berth_api::manager::{Identity, User, UserLogin};
use berth_model::name::Name;
use berth_model::{Problem, Timestamp, UserId};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::external::{External, SUBJECT_BYTES_MAX};
use super::totp::Totp;
use crate::digest::hex;
use crate::records::{Record, Records, RecordsError, Row, Transaction};

/// What a user proves who it is with, as it is kept.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CredentialRow {
    /// Whose it is.
    pub user: UserId,
    /// The password's hash as a PHC string; none: there is no password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password: Option<String>,
    /// Whether it is good only for choosing another.
    #[serde(default)]
    pub must_change: bool,
    /// When it was set last.
    pub changed_at: Timestamp,
    /// The second factor, confirmed or not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub totp: Option<Totp>,
}

impl std::fmt::Debug for CredentialRow {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("CredentialRow").field("user", &self.user).finish_non_exhaustive()
    }
}

impl Record for CredentialRow {
    const PREFIX: &'static str = "/credentials/";
    const NOUN: &'static str = "credential";
    fn record_id(&self) -> String {
        self.user.to_string()
    }
}

impl CredentialRow {
    /// One with nothing in it.
    pub const fn empty(user: UserId, now: Timestamp) -> Self {
        Self { user, password: None, must_change: false, changed_at: now, totp: None }
    }

    /// Whether codes are asked for.
    pub fn asks_for_codes(&self) -> bool {
        self.totp.as_ref().is_some_and(Totp::is_confirmed)
    }
}

/// Changes a user's credential, which is made if there is none.
///
/// # Errors
/// What `change` refuses with; that the store failed.
pub async fn change(
    records: &Records,
    user: &UserId,
    now: Timestamp,
    change: impl FnMut(&mut CredentialRow) -> Result<(), Problem> + Send,
) -> Result<Arc<Row<CredentialRow>>, Problem> {
    if records.get::<CredentialRow>(user.as_str()).is_none() {
        let mut transaction = Transaction::new();
        transaction.create(&CredentialRow::empty(user.clone(), now));
        match records.commit(transaction).await {
            // Somebody else has made it meanwhile: as good.
            Ok(_) | Err(RecordsError::Conflict { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    records.update::<CredentialRow, Problem>(user.as_str(), change).await
}

/// Who a user is elsewhere, as it is kept: under a hash of issuer and subject, so that it is found by them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdentityRow {
    /// The record's id.
    pub id: String,
    /// The user here.
    pub user: UserId,
    /// The provider or directory, as it is configured.
    pub source: Name,
    /// What makes the subject unique.
    pub issuer: String,
    /// Who it is there.
    pub subject: String,
    /// Since when it is known.
    pub created_at: Timestamp,
}

impl Record for IdentityRow {
    const PREFIX: &'static str = "/identities/";
    const NOUN: &'static str = "identity";
    fn record_id(&self) -> String {
        self.id.clone()
    }
}

impl IdentityRow {
    /// The id of who this is: a hash, because a subject can be anything.
    pub fn id_of(issuer: &str, subject: &str) -> String {
        let mut hasher = Sha256::new();
        // With the length in front, so that no two pairs are the same text.
        hasher.update((issuer.len() as u64).to_be_bytes());
        hasher.update(issuer);
        hasher.update(subject);
        hex(&hasher.finalize()[..16])
    }

    /// That this user is who a provider vouches for.
    pub fn of(external: &External, user: UserId, now: Timestamp) -> Self {
        Self {
            id: Self::id_of(&external.issuer, &external.subject),
            user,
            source: external.source.clone(),
            issuer: external.issuer.clone(),
            subject: external.subject.clone(),
            created_at: now,
        }
    }

    /// As it is shown.
    pub fn shown(&self) -> Identity {
        Identity {
            id: self.id.clone(),
            source: self.source.clone(),
            subject: self.subject.clone(),
            created_at: self.created_at,
        }
    }
}

/// A subject as somebody typed it.
///
/// # Errors
/// When it can't be one.
pub fn subject(text: &str) -> Result<String, Problem> {
    let good = !text.is_empty() && text.len() <= SUBJECT_BYTES_MAX && !text.chars().any(char::is_control);
    if good {
        Ok(text.to_owned())
    } else {
        Err(Problem::field("subject", text, format!("1 to {SUBJECT_BYTES_MAX} bytes that can be printed")))
    }
}

/// Who a user is elsewhere, oldest first.
pub fn identities_of(records: &Records, user: &UserId) -> Vec<Arc<Row<IdentityRow>>> {
    let mut found = records.list_where::<IdentityRow>(|row| row.user == *user);
    found.sort_by_key(|row| (row.created_at, row.id.clone()));
    found
}

/// How a user logs in, without any secret.
pub fn shown(records: &Records, user: &User, sessions: u64) -> UserLogin {
    let credential = records.get::<CredentialRow>(user.id.as_str());
    let totp = credential.as_ref().and_then(|row| row.totp.as_ref()).filter(|totp| totp.is_confirmed());
    UserLogin {
        has_password: credential.as_ref().is_some_and(|row| row.password.is_some()),
        must_change_password: credential.as_ref().is_some_and(|row| row.must_change),
        has_totp: totp.is_some(),
        recovery_codes_left: totp.map_or(0, |totp| totp.recovery_left() as u64),
        identities: identities_of(records, &user.id).iter().map(|row| row.shown()).collect(),
        sessions,
    }
}

/// Adds to a transaction that all of this goes with its user.
pub fn forget(records: &Records, transaction: &mut Transaction, user: &UserId) {
    if records.get::<CredentialRow>(user.as_str()).is_some() {
        transaction.forget::<CredentialRow>(user.as_str());
    }
    if records.get::<super::lockout::LockRow>(user.as_str()).is_some() {
        transaction.forget::<super::lockout::LockRow>(user.as_str());
    }
    for identity in identities_of(records, user) {
        transaction.forget::<IdentityRow>(&identity.id);
    }
}
