//! Logging in, sessions, and what users change about themselves.
//!
//! A login is a walk that the manager leads: each answer says what it needs next, and only that is taken. The walk
//! is known by an opaque id, lives a few minutes, and is bound to the address that it began from.

use berth_model::name::Name;
use berth_model::{Timestamp, TokenId, UserId};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

macro_rules! secret_debug {
    ($($type:ident),*) => {$(
        impl std::fmt::Debug for $type {
            fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str(concat!(stringify!($type), "(…)"))
            }
        }
    )*};
}

secret_debug!(
    LoginRequest,
    LoginAnswer,
    LoginReply,
    ChangePassword,
    Code,
    TotpOffer,
    RecoveryCodes,
    SetPassword
);
secret_debug!(NewPassword, EnrolTotp);

/// A walk in a path.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LoginPath {
    /// The walk's id, as the manager gave it.
    pub login: String,
}

/// A provider in a path.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProviderPath {
    /// What it is called in the manager's configuration.
    pub provider: String,
}

/// A session in a path.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SessionPath {
    /// Its id.
    pub session: TokenId,
}

/// Which identity.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct IdentityQuery {
    /// Its id.
    #[serde(default)]
    pub identity: String,
}

/// What a provider sends a browser back with. Only `code`, `state`, `iss` and `error` mean anything here; the others
/// are what providers are known to add.
#[derive(Clone, Default, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are those of OAuth 2.0 and of the providers that add them")]
pub struct CallbackQuery {
    #[serde(default)]
    pub code: Option<String>,
    #[serde(default)]
    pub state: Option<String>,
    #[serde(default)]
    pub iss: Option<String>,
    #[serde(default)]
    pub error: Option<String>,
    #[serde(default)]
    pub error_description: Option<String>,
    #[serde(default)]
    pub error_uri: Option<String>,
    #[serde(default)]
    pub session_state: Option<String>,
    #[serde(default)]
    pub scope: Option<String>,
    #[serde(default)]
    pub authuser: Option<String>,
    #[serde(default)]
    pub hd: Option<String>,
    #[serde(default)]
    pub prompt: Option<String>,
}

/// The ways to log in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LoginWays {
    /// Providers of OpenID Connect, by name.
    pub oidc: Vec<Name>,
    /// Directories, by name.
    pub ldap: Vec<Name>,
}

/// The first step of a login with a password.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
pub struct LoginRequest {
    /// The user's name.
    pub user: String,
    /// The password.
    pub password: String,
    /// The directory that knows the user; none: the user is one of Berth's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<String>,
}

/// A further step: exactly what was needed, or nothing while the provider is waited for.
#[derive(Clone, Default, Serialize, Deserialize, ToSchema)]
pub struct LoginAnswer {
    /// A code of the authenticator app.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub totp: Option<String>,
    /// A recovery code in its place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovery: Option<String>,
    /// A new password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_password: Option<String>,
}

/// What is needed next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LoginNeed {
    /// A code of the authenticator app, or a recovery code.
    Totp,
    /// A new password: the one that was given is good once.
    NewPassword,
    /// That the user says yes on another device: ask again after the interval.
    Device,
}

/// What the user has to do on another device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DevicePrompt {
    /// Where.
    pub verification_uri: String,
    /// The same with the code in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verification_uri_complete: Option<String>,
    /// What to type there.
    pub user_code: String,
    /// Seconds between two questions.
    pub interval_s: u64,
}

/// How a step of a login ended: with a session, or with what is needed next.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
pub struct LoginReply {
    /// The session, when the login is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<NewSession>,
    /// The walk's id, when it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub login: Option<String>,
    /// What is needed next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub needs: Option<LoginNeed>,
    /// For [`LoginNeed::Device`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<DevicePrompt>,
}

/// A session with its secret, shown once.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
pub struct NewSession {
    /// The session.
    pub session: Session,
    /// The bearer secret.
    pub secret: String,
}

secret_debug!(NewSession, CallbackQuery);

/// A session: a login that has not ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Session {
    /// Its id; it is the id of its bearer token.
    pub id: TokenId,
    /// Whose it is.
    pub user: UserId,
    /// The user's name.
    pub user_name: Name,
    /// How the user logged in: `password`, `oidc:NAME`, `ldap:NAME`.
    pub method: String,
    /// Whether a code of an authenticator app, or a recovery code, was part of it.
    #[serde(default)]
    pub second_factor: bool,
    /// From where.
    pub address: String,
    /// Since when.
    pub created_at: Timestamp,
    /// When it was used last, as far as it is recorded.
    pub used_at: Timestamp,
    /// When it ends, whatever happens.
    pub expires_at: Timestamp,
    /// After how many seconds without use it ends.
    pub idle_s: u64,
    /// Whether it is the one that asks.
    pub is_this: bool,
}

/// Which sessions.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct SessionListQuery {
    /// Most items in the answer.
    #[serde(default)]
    pub limit: Option<u32>,
    /// Where the last page ended: its `next_cursor`.
    #[serde(default)]
    pub cursor: Option<String>,
}

/// A change of the own password.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
pub struct ChangePassword {
    /// The present one.
    pub old_password: String,
    /// The new one.
    pub new_password: String,
}

/// A code of the authenticator app, or a recovery code.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
pub struct Code {
    /// The code.
    pub code: String,
}

/// The wish for a second factor.
#[derive(Clone, Default, Serialize, Deserialize, ToSchema)]
pub struct EnrolTotp {
    /// The password, unless the login was a moment ago.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password: Option<String>,
}

/// A second factor to be: shown once, and good after a code of it was shown.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
pub struct TotpOffer {
    /// For a QR code.
    pub uri: String,
    /// The secret alone, for typing in.
    pub secret: String,
}

/// Codes for who has lost the authenticator app; each is good once.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
pub struct RecoveryCodes {
    /// The codes.
    pub recovery_codes: Vec<String>,
}

/// An administrator's wish for a first password, which the user has to change at the first login.
#[derive(Clone, Default, Serialize, Deserialize, ToSchema)]
pub struct SetPassword {
    /// The password; none: one is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password: Option<String>,
}

/// A first password that was made.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
pub struct NewPassword {
    /// The password, shown once; none: it was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password: Option<String>,
}

/// How a user logs in, without any secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UserLogin {
    /// Whether there is a password.
    pub has_password: bool,
    /// Whether it has to be changed at the next login.
    pub must_change_password: bool,
    /// Whether codes are asked for.
    pub has_totp: bool,
    /// How many recovery codes are left.
    pub recovery_codes_left: u64,
    /// Who the user is elsewhere.
    pub identities: Vec<Identity>,
    /// How many sessions are open.
    pub sessions: u64,
}

/// Who a user is elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Identity {
    /// Its id here.
    pub id: String,
    /// The provider or directory, as it is called in the manager's configuration.
    pub source: Name,
    /// Who the user is there: `sub`, or what the directory's identity attribute says.
    pub subject: String,
    /// Since when it is known.
    pub created_at: Timestamp,
}

/// The wish to say who a user is elsewhere.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct LinkIdentity {
    /// The provider or directory.
    pub source: String,
    /// Who the user is there.
    pub subject: String,
}
