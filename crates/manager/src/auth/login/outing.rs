//! Through a provider: a browser that is sent there and comes back, or a device that waits until its user has said yes.

use std::sync::Arc;

use berth_api::manager::{DevicePrompt, LoginNeed, LoginReply};
use berth_model::{Problem, ProblemCode, Timestamp};

use super::walks::State;
use super::{From, Logins, Who, arrive, no_walk, random};
use crate::auth::SecretHash;
use crate::auth::external::External;
use crate::auth::lockout::Attempt;
use crate::auth::oidc::{DeviceOuting, OidcError, Polled, Provider};
use crate::auth::session::Proof;
use crate::cluster::Cluster;

/// How long a walk through a provider lives at most, in milliseconds.
const OUTING_MS_MAX: u64 = 15 * 60_000;
/// The cookie that ties a browser to its walk; the prefix keeps other hosts and plain HTTP from setting it.
pub const COOKIE: &str = "__Host-berth-login";

impl Logins {
    /// Where to send a browser, and the cookie that it has to come back with.
    ///
    /// # Errors
    /// That there is no such provider, or that it can't be asked.
    pub async fn begin_browser(
        &self,
        cluster: &Arc<Cluster>,
        provider: &str,
        from: From,
    ) -> Result<(String, String), Problem> {
        let provider = self.provider(provider)?;
        self.count_outing(cluster, from)?;
        let (url, outing) =
            provider.begin(&*cluster.entropy, from.now).await.map_err(|error| failed(&provider, &error))?;
        let cookie = random(cluster);
        let state =
            State::Browser { provider, outing: outing.clone(), cookie: SecretHash::of(cookie.as_bytes()) };
        self.walks.put(outing.state, from, OUTING_MS_MAX, state);
        Ok((url, cookie))
    }

    /// A browser has come back: with what the provider said and the cookie that it was sent with.
    ///
    /// # Errors
    /// When it is not the one that was sent, or the provider does not vouch for anybody.
    pub async fn finish_browser(
        &self,
        cluster: &Arc<Cluster>,
        name: &str,
        back: &berth_api::manager::CallbackQuery,
        cookie: Option<&str>,
        from: From,
    ) -> Result<LoginReply, Problem> {
        let state = back.state.as_deref().ok_or_else(no_walk)?;
        let walk = self.walks.take(state, from)?;
        // Whatever comes now, a browser comes back once.
        let State::Browser { provider, outing, cookie: expected } = walk.state else { return Err(no_walk()) };
        let is_its_own = cookie.is_some_and(|cookie| expected.is_of(cookie.as_bytes()));
        if !is_its_own || provider.settings.name.as_str() != name {
            return Err(no_walk());
        }
        if let Some(error) = &back.error {
            return Err(failed(&provider, &OidcError::Refused { error: error.chars().take(60).collect() }));
        }
        let code = back.code.as_deref().ok_or_else(no_walk)?;
        let external = provider
            .finish(&outing, code, back.iss.as_deref(), from.now)
            .await
            .map_err(|error| failed(&provider, &error))?;
        let method = format!("oidc:{name}");
        self.vouched(cluster, &external, provider.settings.create_users, method, from).await
    }

    /// Begins the way of a device.
    ///
    /// # Errors
    /// As [`Self::begin_browser`].
    pub async fn begin_device(
        &self,
        cluster: &Arc<Cluster>,
        provider: &str,
        from: From,
    ) -> Result<LoginReply, Problem> {
        let provider = self.provider(provider)?;
        self.count_outing(cluster, from)?;
        let outing = provider.begin_device(from.now).await.map_err(|error| failed(&provider, &error))?;
        let prompt = DevicePrompt {
            verification_uri: outing.verification_uri.clone(),
            verification_uri_complete: outing.verification_uri_complete.clone(),
            user_code: outing.user_code.clone(),
            interval_s: outing.interval_s,
        };
        let life_ms = outing.expires_s.saturating_mul(1000).min(OUTING_MS_MAX);
        let id = random(cluster);
        self.walks.put(id.clone(), from, life_ms, State::Device { provider, outing, ask_from: from.now });
        Ok(LoginReply {
            session: None,
            login: Some(id),
            needs: Some(LoginNeed::Device),
            device: Some(prompt),
        })
    }

    pub(super) async fn ask_device(
        &self,
        cluster: &Arc<Cluster>,
        id: &str,
        at: (Arc<Provider>, DeviceOuting, Timestamp),
        expires_at: Timestamp,
        from: From,
    ) -> Result<LoginReply, Problem> {
        let (provider, mut outing, ask_from) = at;
        let waiting = LoginReply {
            session: None,
            login: Some(id.to_owned()),
            needs: Some(LoginNeed::Device),
            device: None,
        };
        if from.now < ask_from {
            self.walks.put_back(id, from, expires_at, State::Device { provider, outing, ask_from });
            return Ok(waiting);
        }
        match provider.poll(&outing, from.now).await {
            Ok(Polled::Done(external)) => {
                let method = format!("oidc:{}", provider.settings.name);
                self.vouched(cluster, &external, provider.settings.create_users, method, from).await
            }
            Ok(polled) => {
                if matches!(polled, Polled::SlowDown) {
                    // RFC 8628, section 3.5.
                    outing.interval_s += 5;
                }
                let ask_from = from.now.plus_millis(outing.interval_s * 1000);
                self.walks.put_back(id, from, expires_at, State::Device { provider, outing, ask_from });
                Ok(waiting)
            }
            Err(error) => Err(failed(&provider, &error)),
        }
    }

    pub(super) async fn vouched(
        &self,
        cluster: &Arc<Cluster>,
        external: &External,
        create: bool,
        method: String,
        from: From,
    ) -> Result<LoginReply, Problem> {
        let user = arrive::arrive(cluster, external, create, from.now).await?;
        let proof = Proof { method, second_factor: false };
        self.next(cluster, Who { user, proof }, false, from).await
    }

    /// Each way through a provider is a request to it: strangers must not make the manager hammer at its door. One
    /// that ends in a login is taken back.
    fn count_outing(&self, cluster: &Arc<Cluster>, from: From) -> Result<(), Problem> {
        match self.lockout.attempt(&cluster.records, None, from.address, from.now) {
            Attempt::Counted => Ok(()),
            Attempt::AccountHeld | Attempt::AddressHeld => {
                let message = "too many logins from this address have not been finished: wait a while";
                Err(Problem::new(ProblemCode::TooBusy, message))
            }
        }
    }

    fn provider(&self, name: &str) -> Result<Arc<Provider>, Problem> {
        let found = self.providers.iter().find(|one| one.settings.name.as_str() == name);
        found.cloned().ok_or_else(|| Problem::not_found("provider", name))
    }
}

fn failed(provider: &Provider, error: &OidcError) -> Problem {
    let (name, detail) = (&provider.settings.name, crate::auth::chain(error));
    tracing::warn!(provider = %name, detail, "a login through a provider failed");
    let code = match error {
        OidcError::Https(_) | OidcError::Nonsense { .. } => ProblemCode::Unreachable,
        OidcError::Missing(_) => ProblemCode::WrongState,
        OidcError::Refused { .. } | OidcError::Token(_) => ProblemCode::Unauthenticated,
    };
    Problem::new(code, format!("provider {name} did not say who this is: {error}"))
}
