//! OpenID Connect: who somebody is, said by another.
//!
//! Two ways, both of OAuth 2.0: the authorisation code with PKCE for browsers (RFC 6749, RFC 7636), and the device
//! flow for the command line (RFC 8628), which works over SSH as well. In both the manager alone talks to the
//! provider; the caller never holds a code, a device code or a token of it. What the provider is, it says itself
//! (OpenID Connect Discovery), under the issuer that is configured; its keys are fetched once and again when a token
//! names one that is not known.
//!
//! Written on what the workspace has (hyper, rustls, ring) rather than on a crate; why stands in
//! `docs/decisions/0008-openid-connect-by-hand.md`.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use berth_model::Timestamp;
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio::sync::Mutex;

use super::external::{External, tidy_groups};
use super::https::{self, HttpsError, Sending};
use super::settings::OidcSettings;
use crate::clock::Entropy;

mod token;

pub use token::{ALGORITHMS, TokenError};
use token::{Expected, Jwk, keys_of};

/// How long what the provider says about itself is believed, in milliseconds.
const BELIEVED_MS: u64 = 3_600_000;
/// Least time between two fetches of keys, in milliseconds: tokens with invented keys must not become requests.
const KEYS_EVERY_MS: u64 = 30_000;
/// Shortest time between two questions whether the user is done, whatever the provider says.
const POLL_S_MIN: u64 = 1;
/// The time between two questions when the provider says none (RFC 8628, section 3.2).
const POLL_S_DEFAULT: u64 = 5;

/// Why somebody could not be vouched for.
#[derive(Debug, thiserror::Error)]
pub enum OidcError {
    /// The provider could not be asked.
    #[error(transparent)]
    Https(#[from] HttpsError),
    /// The provider's answer makes no sense.
    #[error("the provider's {what} is not of OpenID Connect: {detail}")]
    Nonsense {
        /// Which answer.
        what: &'static str,
        /// What is wrong with it.
        detail: String,
    },
    /// The provider said no.
    #[error("the provider refused: {error}")]
    Refused {
        /// Its error code.
        error: String,
    },
    /// The token is not good.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// It is not configured.
    #[error("this provider has no {0}")]
    Missing(&'static str),
}

/// What the provider says about itself (OpenID Connect Discovery, section 3).
#[derive(Debug, Clone, Deserialize)]
struct Description {
    issuer: String,
    authorization_endpoint: Option<String>,
    token_endpoint: String,
    jwks_uri: String,
    device_authorization_endpoint: Option<String>,
    userinfo_endpoint: Option<String>,
    #[serde(default)]
    authorization_response_iss_parameter_supported: bool,
}

#[derive(Default)]
struct Known {
    description: Option<(Timestamp, Description)>,
    keys: Option<(Timestamp, Arc<Vec<Jwk>>)>,
}

/// A provider.
pub struct Provider {
    /// What was configured.
    pub settings: OidcSettings,
    tls: Arc<rustls::ClientConfig>,
    known: Mutex<Known>,
}

/// What the manager keeps while a browser is at the provider.
#[derive(Clone)]
pub struct Outing {
    /// What comes back with the browser.
    pub state: String,
    nonce: String,
    verifier: String,
}

/// What the manager keeps while somebody types a code into another device.
#[derive(Clone)]
pub struct DeviceOuting {
    device_code: String,
    /// What the user types.
    pub user_code: String,
    /// Where.
    pub verification_uri: String,
    /// The same with the code in it.
    pub verification_uri_complete: Option<String>,
    /// How many seconds to wait between two questions.
    pub interval_s: u64,
    /// For how many seconds it is good.
    pub expires_s: u64,
}

/// How a question about a device ended.
#[derive(Debug)]
pub enum Polled {
    /// The user is not done.
    Pending,
    /// It was asked too often.
    SlowDown,
    /// The user is done.
    Done(External),
}

#[derive(Deserialize)]
struct Tokens {
    id_token: Option<String>,
    access_token: Option<String>,
}

fn random_text(entropy: &dyn Entropy) -> String {
    let mut bytes = [0; 32];
    entropy.fill(&mut bytes);
    URL_SAFE_NO_PAD.encode(bytes)
}

impl Provider {
    /// One of which nothing is known yet; it is asked at the first login.
    pub fn new(settings: OidcSettings) -> Self {
        let tls = settings.roots.client();
        Self { settings, tls, known: Mutex::default() }
    }

    /// Begins the way of a browser: where to send it.
    ///
    /// # Errors
    /// When the provider can't be asked or does not do this.
    pub async fn begin(&self, entropy: &dyn Entropy, now: Timestamp) -> Result<(String, Outing), OidcError> {
        let redirect = self.settings.redirect_uri.as_deref().ok_or(OidcError::Missing("redirect_uri"))?;
        let description = self.description(now).await?;
        let endpoint =
            description.authorization_endpoint.ok_or(OidcError::Missing("authorization endpoint"))?;
        let outing = Outing {
            state: random_text(entropy),
            nonce: random_text(entropy),
            verifier: random_text(entropy),
        };
        let challenge = URL_SAFE_NO_PAD.encode(Sha256::digest(outing.verifier.as_bytes()));
        let query = serde_urlencoded::to_string([
            ("response_type", "code"),
            ("client_id", &self.settings.client_id),
            ("redirect_uri", redirect),
            ("scope", &self.settings.scopes.join(" ")),
            ("state", &outing.state),
            ("nonce", &outing.nonce),
            ("code_challenge", &challenge),
            ("code_challenge_method", "S256"),
        ])
        .expect("pairs of text");
        let joint = if endpoint.contains('?') { '&' } else { '?' };
        Ok((format!("{endpoint}{joint}{query}"), outing))
    }

    /// Ends the way of a browser: who it was.
    ///
    /// # Errors
    /// When the provider does not say so, or not in the right way.
    pub async fn finish(
        &self,
        outing: &Outing,
        code: &str,
        issuer: Option<&str>,
        now: Timestamp,
    ) -> Result<External, OidcError> {
        let description = self.description(now).await?;
        // RFC 9207: who mixes up two providers is found out.
        let is_ours = issuer.map_or(!description.authorization_response_iss_parameter_supported, |issuer| {
            issuer == self.settings.issuer
        });
        if !is_ours {
            return Err(OidcError::Token(TokenError::Claim("iss")));
        }
        let redirect = self.settings.redirect_uri.as_deref().ok_or(OidcError::Missing("redirect_uri"))?;
        let fields = [
            ("grant_type", "authorization_code"),
            ("code", code),
            ("redirect_uri", redirect),
            ("code_verifier", &outing.verifier),
        ];
        let tokens = match self.post(&description.token_endpoint, &fields).await? {
            Ok(answer) => answer,
            Err(error) => return Err(OidcError::Refused { error }),
        };
        self.vouched(&description, &tokens, Some(&outing.nonce), now).await
    }

    /// Begins the way of a device.
    ///
    /// # Errors
    /// As [`Self::begin`].
    pub async fn begin_device(&self, now: Timestamp) -> Result<DeviceOuting, OidcError> {
        #[derive(Deserialize)]
        struct Begun {
            device_code: String,
            user_code: String,
            verification_uri: String,
            verification_uri_complete: Option<String>,
            expires_in: u64,
            interval: Option<u64>,
        }
        let description = self.description(now).await?;
        let endpoint = description.device_authorization_endpoint.ok_or(OidcError::Missing("device flow"))?;
        let scope = self.settings.scopes.join(" ");
        let answer = match self.post(&endpoint, &[("scope", &scope)]).await? {
            Ok(answer) => answer,
            Err(error) => return Err(OidcError::Refused { error }),
        };
        let begun: Begun = read("answer about a device", answer)?;
        Ok(DeviceOuting {
            device_code: begun.device_code,
            user_code: begun.user_code,
            verification_uri: begun.verification_uri,
            verification_uri_complete: begun.verification_uri_complete,
            interval_s: begun.interval.unwrap_or(POLL_S_DEFAULT).max(POLL_S_MIN),
            expires_s: begun.expires_in,
        })
    }

    /// Asks whether the user of a device is done.
    ///
    /// # Errors
    /// When the provider says no, or not in the right way.
    pub async fn poll(&self, outing: &DeviceOuting, now: Timestamp) -> Result<Polled, OidcError> {
        let description = self.description(now).await?;
        let fields = [
            ("grant_type", "urn:ietf:params:oauth:grant-type:device_code"),
            ("device_code", &outing.device_code),
        ];
        match self.post(&description.token_endpoint, &fields).await? {
            Ok(tokens) => self.vouched(&description, &tokens, None, now).await.map(Polled::Done),
            Err(error) if error == "authorization_pending" => Ok(Polled::Pending),
            Err(error) if error == "slow_down" => Ok(Polled::SlowDown),
            Err(error) => Err(OidcError::Refused { error }),
        }
    }

    async fn description(&self, now: Timestamp) -> Result<Description, OidcError> {
        let mut known = self.known.lock().await;
        if let Some((at, description)) = &known.description
            && now.millis_since(*at) < BELIEVED_MS
        {
            return Ok(description.clone());
        }
        let url = format!("{}/.well-known/openid-configuration", self.settings.issuer.trim_end_matches('/'));
        let description: Description = read("description", self.get(&url, None).await?)?;
        if description.issuer != self.settings.issuer {
            let detail = "its issuer is not the one that is configured".to_owned();
            return Err(OidcError::Nonsense { what: "description", detail });
        }
        known.description = Some((now, description.clone()));
        Ok(description)
    }

    /// The provider's keys; newer ones when those that are known were not enough, but not at any price.
    async fn keys(
        &self,
        description: &Description,
        newer: bool,
        now: Timestamp,
    ) -> Result<Arc<Vec<Jwk>>, OidcError> {
        let mut known = self.known.lock().await;
        if let Some((at, keys)) = &known.keys {
            let age_ms = now.millis_since(*at);
            if age_ms < if newer { KEYS_EVERY_MS } else { BELIEVED_MS } {
                return Ok(Arc::clone(keys));
            }
        }
        let document = self.get(&description.jwks_uri, None).await?;
        let keys = keys_of(&document).map(Arc::new).ok_or_else(|| OidcError::Nonsense {
            what: "set of keys",
            detail: "there are no keys in it".to_owned(),
        })?;
        known.keys = Some((now, Arc::clone(&keys)));
        Ok(keys)
    }

    async fn vouched(
        &self,
        description: &Description,
        tokens: &Value,
        nonce: Option<&str>,
        now: Timestamp,
    ) -> Result<External, OidcError> {
        let tokens: Tokens = read("answer with tokens", tokens.clone())?;
        let text = tokens.id_token.ok_or_else(|| OidcError::Nonsense {
            what: "answer with tokens",
            detail: "there is no id_token in it".to_owned(),
        })?;
        let expected = Expected {
            issuer: &self.settings.issuer,
            client_id: &self.settings.client_id,
            nonce,
            algorithms: &self.settings.algorithms,
            now,
        };
        let keys = self.keys(description, false, now).await?;
        let mut claims = match token::parse(&text)?.judge(&keys, &expected) {
            Err(TokenError::Key) => {
                let newer = self.keys(description, true, now).await?;
                token::parse(&text)?.judge(&newer, &expected)?
            }
            judged => judged?,
        };
        let settings = &self.settings;
        let lacks = |claims: &Value| {
            claims.get(&settings.groups_claim).is_none() || claims.get(&settings.name_claim).is_none()
        };
        if lacks(&claims)
            && let (Some(endpoint), Some(access)) = (&description.userinfo_endpoint, &tokens.access_token)
        {
            self.add_userinfo(&mut claims, endpoint, access).await?;
        }
        external(settings, &claims)
    }

    /// Many providers say names and groups only when they are asked once more (OpenID Connect Core, section 5.3).
    async fn add_userinfo(&self, claims: &mut Value, endpoint: &str, access: &str) -> Result<(), OidcError> {
        let more = self.get(endpoint, Some(access)).await?;
        if more.get("sub") != claims.get("sub") {
            return Err(OidcError::Token(TokenError::Claim("sub")));
        }
        for claim in [&self.settings.groups_claim, &self.settings.name_claim] {
            if claims.get(claim).is_none()
                && let Some(value) = more.get(claim)
            {
                claims[claim] = value.clone();
            }
        }
        Ok(())
    }

    async fn get(&self, url: &str, bearer: Option<&str>) -> Result<Value, OidcError> {
        let got = https::ask(&self.tls, url, Sending::Get(bearer)).await?;
        let nonsense = || OidcError::Nonsense {
            what: "answer",
            detail: format!("{} where JSON was expected", got.status),
        };
        if !got.status.is_success() {
            return Err(nonsense());
        }
        got.json().ok_or_else(nonsense)
    }

    /// Sends a form as this client; the inner error is the provider's own code (RFC 6749, section 5.2).
    async fn post(&self, url: &str, fields: &[(&str, &str)]) -> Result<Result<Value, String>, OidcError> {
        let mut fields = fields.to_vec();
        let client = self.settings.client_id.as_str();
        let authorization = match &self.settings.client_secret {
            Some(secret) => {
                let encode = |text: &str| {
                    serde_urlencoded::to_string([("", text)]).unwrap_or_default()[1..].to_owned()
                };
                let pair = format!("{}:{}", encode(client), encode(secret.reveal()));
                Some(format!("Basic {}", STANDARD.encode(pair)))
            }
            None => None,
        };
        if authorization.is_none() || url.contains("device") {
            fields.push(("client_id", client));
        }
        let got = https::ask(&self.tls, url, Sending::Form(&fields, authorization.as_deref())).await?;
        let json = got.json().ok_or_else(|| OidcError::Nonsense {
            what: "answer",
            detail: format!("{} where JSON was expected", got.status),
        })?;
        if got.status.is_success() {
            return Ok(Ok(json));
        }
        let error = json.get("error").and_then(Value::as_str).unwrap_or("no error code");
        Ok(Err(error.chars().filter(|letter| letter.is_ascii_graphic()).take(60).collect()))
    }

    /// How long a question about a device has to wait at least.
    pub fn patience(outing: &DeviceOuting) -> Duration {
        Duration::from_secs(outing.interval_s)
    }
}

fn read<T: serde::de::DeserializeOwned>(what: &'static str, value: Value) -> Result<T, OidcError> {
    serde_json::from_value(value).map_err(|error| OidcError::Nonsense { what, detail: error.to_string() })
}

fn external(settings: &OidcSettings, claims: &Value) -> Result<External, OidcError> {
    let text = |name: &str| claims.get(name).and_then(Value::as_str).map(str::to_owned);
    let groups = match claims.get(&settings.groups_claim) {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::String(one)) => vec![one.clone()],
        Some(Value::Array(all)) => all.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        Some(_) => return Err(OidcError::Token(TokenError::Claim("groups"))),
    };
    Ok(External {
        source: settings.name.clone(),
        issuer: settings.issuer.clone(),
        subject: text("sub").ok_or(TokenError::Claim("sub"))?,
        name: text(&settings.name_claim),
        groups: tidy_groups(groups).ok_or(TokenError::Claim("groups"))?,
    })
}
