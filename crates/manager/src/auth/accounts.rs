//! Users, their tokens, and join tokens: the records, and how they come and go.
//!
//! A token has the rights that its user has at the moment of use, never more. The last way in for an administrator
//! can't be deleted: a cluster that nobody may change any more helps nobody.

use berth_api::join::{Fingerprint, JoinSecret};
use berth_api::manager::{CreateToken, CreateUser, Grant, NewToken, Scope, Team, Token, TokenKind, User};
use berth_model::{HostId, Problem, ProblemCode, Timestamp, TokenId, UserId};
use serde::{Deserialize, Serialize};

use super::credential::{self, CredentialRow};
use super::session::{self, SessionRow};
use super::{Bearer, SECRET_BYTES, SecretHash, UserPrincipal};
use crate::clock::Entropy;
use crate::records::{Record, Records, Row, Transaction, UniqueName};

/// How long a join token may be used when nothing is said, in seconds.
pub const JOIN_EXPIRES_S_DEFAULT: u64 = 3600;
/// Longest life of a join token, in seconds. Longer, and it lies about in notes and histories while it is good.
pub const JOIN_EXPIRES_S_MAX: u64 = 7 * 24 * 3600;
/// Longest life of a bearer token that has an end, in seconds: ten years, above which it is a mistake in units.
pub const TOKEN_EXPIRES_S_MAX: u64 = 10 * 366 * 24 * 3600;
/// Longest note on a token, in characters.
const NOTE_CHARS_MAX: usize = 200;
/// The role without which nobody could change anything any more.
pub const ADMIN: &str = "admin";

/// A token as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRow {
    /// What may be shown of it.
    pub token: Token,
    /// The hash of its secret.
    pub hash: SecretHash,
}

/// A join token as it is kept, under its secret's hash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinTokenRow {
    /// The hash of its secret.
    pub hash: SecretHash,
    /// Who made it.
    pub made_by: String,
    /// Until when it may be used.
    pub expires_at: Timestamp,
    /// The host that came of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used: Option<JoinUse>,
}

/// What a join token was used for. It is kept so that a machine whose answer got lost may ask again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinUse {
    /// The host.
    pub host: HostId,
    /// SHA-256 of its signing request: only the machine that has the key can use another certificate for it.
    pub request: SecretHash,
}

impl Record for User {
    const PREFIX: &'static str = "/users/";
    const NOUN: &'static str = "user";
    fn record_id(&self) -> String {
        self.id.to_string()
    }
}

impl Record for TokenRow {
    const PREFIX: &'static str = "/tokens/";
    const NOUN: &'static str = "token";
    fn record_id(&self) -> String {
        self.token.id.to_string()
    }
}

impl Record for JoinTokenRow {
    const PREFIX: &'static str = "/join-tokens/";
    const NOUN: &'static str = "join token";
    fn record_id(&self) -> String {
        self.hash.to_string()
    }
}

/// Who a bearer secret stands for, if it is good.
pub fn authenticate(records: &Records, bearer: &Bearer, now: Timestamp) -> Option<UserPrincipal> {
    let row = records.get::<TokenRow>(bearer.token.as_str());
    let expected = row.as_ref().map_or_else(|| SecretHash::of(b""), |row| row.hash.clone());
    // Compared also when there is no such token, so that the time tells nothing about which ids exist.
    let good = expected.is_of(&bearer.secret);
    let row = row.filter(|row| good && row.token.expires_at.is_none_or(|end| now < end))?;
    let user = records.get::<User>(row.token.user.as_str()).filter(|user| !user.disabled)?;
    let method = match row.token.kind {
        TokenKind::Token => "token",
        TokenKind::First => "first-token",
        TokenKind::Session => &row.token.method,
    };
    Some(UserPrincipal {
        id: user.value.id.clone(),
        name: user.name.clone(),
        token: row.token.id.clone(),
        kind: row.token.kind,
        method: method.to_owned(),
        second_factor: row.token.second_factor,
        scope: row.token.scope.clone(),
    })
}

/// A user to be.
pub fn new_user(wish: CreateUser, entropy: &dyn Entropy, now: Timestamp) -> User {
    let id = UserId::from_entropy(entropy.id());
    User { id, name: wish.name, disabled: false, external_groups: Vec::new(), created_at: now }
}

/// Records a user.
///
/// # Errors
/// That the name is taken, or that the store failed.
pub async fn create_user(records: &Records, user: &User) -> Result<(), Problem> {
    let mut transaction = Transaction::new();
    add_user(&mut transaction, user);
    records.commit(transaction).await?;
    Ok(())
}

/// Adds the making of a user to a transaction.
pub fn add_user(transaction: &mut Transaction, user: &User) {
    transaction.create(user);
    transaction.claim(&UniqueName::in_cluster(User::NOUN, &user.name), user.id.as_str());
}

/// Deletes a user with all tokens.
///
/// # Errors
/// [`ProblemCode::Protected`] when no administrator would be left; that the store failed.
pub async fn delete_user(records: &Records, user: &Row<User>, now: Timestamp) -> Result<(), Problem> {
    require_another_way_in(records, user, now)?;
    let mut tokens = tokens_of(records, &user.value.id);
    // More tokens than one transaction takes go first, so that a user never lives on in a token.
    while tokens.len() > TOKENS_AT_ONCE {
        let mut transaction = Transaction::new();
        for token in tokens.drain(..TOKENS_AT_ONCE) {
            transaction.forget::<TokenRow>(&token.id);
        }
        records.commit(transaction).await?;
    }
    let mut transaction = Transaction::new();
    for token in tokens {
        transaction.forget::<TokenRow>(&token.id);
    }
    credential::forget(records, &mut transaction, &user.value.id);
    for grant in records.list_where::<Grant>(|grant| grant.user.as_ref() == Some(&user.value.id)) {
        if !transaction.is_full() {
            transaction.forget::<Grant>(&grant.id);
        }
    }
    for session in session::sessions_of(records, &user.value.id) {
        if !transaction.is_full() {
            transaction.forget::<SessionRow>(&session.id);
        }
    }
    transaction.remove(user);
    transaction.release(&UniqueName::in_cluster(User::NOUN, &user.name));
    records.commit(transaction).await?;
    Ok(())
}

/// How many tokens are removed in one transaction; a store takes 128 changes at once.
const TOKENS_AT_ONCE: usize = 100;

fn tokens_of(records: &Records, user: &UserId) -> Vec<std::sync::Arc<Row<TokenRow>>> {
    records.list::<TokenRow>().into_iter().filter(|row| row.token.user == *user).collect()
}

/// A token to be, with its secret.
///
/// # Errors
/// A life or a note out of range.
pub fn new_token(
    user: &UserId,
    kind: TokenKind,
    scope: Option<Scope>,
    wish: &CreateToken,
    entropy: &dyn Entropy,
    now: Timestamp,
) -> Result<(TokenRow, NewToken), Problem> {
    if wish.note.chars().count() > NOTE_CHARS_MAX {
        return Err(Problem::field("note", &wish.note, format!("at most {NOTE_CHARS_MAX} characters")));
    }
    let expires_at = match wish.expires_s {
        Some(seconds) if seconds == 0 || seconds > TOKEN_EXPIRES_S_MAX => {
            return Err(Problem::field("expires_s", seconds, format!("1 to {TOKEN_EXPIRES_S_MAX} seconds")));
        }
        Some(seconds) => Some(now.plus_millis(seconds * 1000)),
        None => None,
    };
    let bearer = Bearer { token: TokenId::from_entropy(entropy.id()), secret: random(entropy) };
    let token = Token {
        id: bearer.token.clone(),
        user: user.clone(),
        kind,
        method: String::new(),
        second_factor: false,
        scope,
        note: wish.note.clone(),
        created_at: now,
        expires_at,
    };
    let row = TokenRow { token: token.clone(), hash: SecretHash::of(&bearer.secret) };
    Ok((row, NewToken { token, secret: bearer.to_string() }))
}

/// Revokes a token.
///
/// # Errors
/// [`ProblemCode::Protected`] when no administrator would be left; that the store failed.
pub async fn revoke_token(records: &Records, token: &Row<TokenRow>, now: Timestamp) -> Result<(), Problem> {
    if !administrator_remains(records, now, None, |other| other.id != token.token.id) {
        return Err(last_administrator("token", &token.token.id));
    }
    let mut transaction = Transaction::new();
    transaction.remove(token);
    if token.token.kind == TokenKind::Session {
        transaction.forget::<SessionRow>(&token.id);
    }
    records.commit(transaction).await?;
    Ok(())
}

/// Refuses when without this user no administrator could get in any more.
///
/// # Errors
/// [`ProblemCode::Protected`].
pub fn require_another_way_in(records: &Records, user: &Row<User>, now: Timestamp) -> Result<(), Problem> {
    if administrator_remains(records, now, Some(&user.value.id), |token| token.user != user.value.id) {
        return Ok(());
    }
    Err(last_administrator("user", &user.name))
}

/// Whether a way in of an administrator is left: a password of somebody who is not `leaving`, or a token that is good
/// and that `stays` picks. A session is none: it ends by itself. What is no administrator's now does not need to be
/// asked about: removing it takes no way in away.
fn administrator_remains(
    records: &Records,
    now: Timestamp,
    leaving: Option<&UserId>,
    stays: impl Fn(&Token) -> bool,
) -> bool {
    let administrators = administrators(records, &teams(records), &records.list::<Grant>(), now);
    let has_password =
        |id: &&UserId| records.get::<CredentialRow>(id.as_str()).is_some_and(|row| row.password.is_some());
    if administrators.iter().filter(has_password).any(|id| leaving != Some(id)) {
        return true;
    }
    // The only password is that of who is leaving: then a token has to stay.
    let is_way_in = |id: &UserId| leaving == Some(id) && has_password(&id);
    let takes_away = administrators.iter().any(is_way_in);
    let mut ways_in = records
        .list::<TokenRow>()
        .into_iter()
        .filter(|row| row.token.expires_at.is_none_or(|end| now < end) && row.token.scope.is_none())
        .filter(|row| row.token.kind != TokenKind::Session)
        .filter(|row| administrators.contains(&row.token.user))
        .peekable();
    (ways_in.peek().is_none() && !takes_away) || ways_in.any(|row| stays(&row.token))
}

/// All teams.
pub fn teams(records: &Records) -> Vec<Team> {
    records.list::<Team>().iter().map(|row| row.value.clone()).collect()
}

/// Who has the role `admin` everywhere and for good, by these grants: directly, or as a member of a team or of one
/// inside it. Groups of login providers don't count: who is in them is not for this cluster to say.
pub fn administrators(
    records: &Records,
    all: &[Team],
    grants: &[std::sync::Arc<Row<Grant>>],
    now: Timestamp,
) -> Vec<UserId> {
    let live = grants.iter().filter(|grant| {
        grant.role.as_str() == ADMIN && grant.segment.is_none() && grant.until.is_none_or(|until| now < until)
    });
    let (mut users, mut found) = (Vec::new(), Vec::new());
    for grant in live {
        users.extend(grant.user.clone());
        found.extend(grant.team.clone());
    }
    let mut at = 0;
    while let Some(team) = found.get(at).cloned() {
        at += 1;
        let inside = all.iter().filter(|one| one.parent.as_ref() == Some(&team));
        let new: Vec<_> = inside.map(|one| one.id.clone()).filter(|id| !found.contains(id)).collect();
        found.extend(new);
        users.extend(all.iter().filter(|one| one.id == team).flat_map(|one| one.members.clone()));
    }
    users.retain(|id| records.get::<User>(id.as_str()).is_some_and(|user| !user.disabled));
    users.sort_unstable();
    users.dedup();
    users
}

/// What is said when nobody could change anything any more.
pub fn last_administrator(noun: &str, name: impl ToString) -> Problem {
    let name = name.to_string();
    Problem::new(
        ProblemCode::Protected,
        format!("{noun} '{name}' is the last way in for an administrator: make another token first"),
    )
    .at(noun, name, "not the last administrator's")
}

/// A join token to be, with its text.
///
/// # Errors
/// A life out of range.
pub fn new_join_token(
    expires_s: Option<u64>,
    made_by: String,
    ca: Fingerprint,
    entropy: &dyn Entropy,
    now: Timestamp,
) -> Result<(JoinTokenRow, JoinSecret), Problem> {
    let seconds = expires_s.unwrap_or(JOIN_EXPIRES_S_DEFAULT);
    if seconds == 0 || seconds > JOIN_EXPIRES_S_MAX {
        return Err(Problem::field("expires_s", seconds, format!("1 to {JOIN_EXPIRES_S_MAX} seconds")));
    }
    let secret = JoinSecret { ca, secret: random(entropy) };
    let row = JoinTokenRow {
        hash: SecretHash::of(&secret.secret),
        made_by,
        expires_at: now.plus_millis(seconds * 1000),
        used: None,
    };
    Ok((row, secret))
}

/// The join token of this text, if it is one of this cluster that has not expired. Whether it was used is for
/// enrolment to judge.
pub fn join_token(
    records: &Records,
    text: &str,
    ca: Fingerprint,
    now: Timestamp,
) -> Option<std::sync::Arc<Row<JoinTokenRow>>> {
    let secret: JoinSecret = text.parse().ok()?;
    if secret.ca != ca {
        return None;
    }
    // Found by its hash: what the time could tell is about the hash, from which there is no way to the secret.
    let row = records.get::<JoinTokenRow>(&SecretHash::of(&secret.secret).to_string())?;
    (row.hash.is_of(&secret.secret) && now < row.expires_at).then_some(row)
}

fn random(entropy: &dyn Entropy) -> [u8; SECRET_BYTES] {
    let mut secret = [0; SECRET_BYTES];
    entropy.fill(&mut secret);
    secret
}
