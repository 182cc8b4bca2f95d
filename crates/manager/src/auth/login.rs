//! Logging in: one walk from a name to a session, led by the manager.
//!
//! What has been proved and what is needed next is kept here, under an opaque id that lives a few minutes and is good
//! from one address only. A caller can answer what is needed, and nothing else: there is no request that names a step,
//! so none can be left out, done twice or done in another walk. While a step is being judged its walk is nobody's, so
//! two answers at once are one answer and one refusal.
//!
//! Whatever is wrong with a name or a password (no such user, disabled, locked, another password) gets one answer,
//! after the same work. Steps: the password, or who a provider or directory vouches for; then a code, if the user has
//! a second factor; then a new password, if the one that was given is good once.

use std::net::IpAddr;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use berth_api::manager::{LoginAnswer, LoginNeed, LoginReply, LoginRequest, LoginWays, NewSession, User};
use berth_model::name::Name;
use berth_model::{Problem, ProblemCode, Timestamp, UserId};

use super::credential::{self, CredentialRow};
use super::directory::{Directory, DirectoryError};
use super::lockout::{Attempt, Lockout};
use super::oidc::Provider;
use super::password::{Password, Passwords, Verdict};
use super::session::{self, Proof, Sessions};
use super::settings::LoginSettings;
use crate::cluster::Cluster;
use crate::records::{Row, Transaction, UniqueName};

mod arrive;
mod outing;
mod walks;

pub use outing::COOKIE;

use walks::{State, Walks};

/// How long a walk lives from its last good step on, in milliseconds.
const WALK_MS: u64 = 5 * 60_000;
/// Wrong codes in one walk, after which it is over.
const CODES_MAX: u32 = 5;
/// Longest name that is looked at, in bytes.
const NAME_BYTES_MAX: usize = 256;
/// All that logging in needs.
pub struct Logins {
    /// How long sessions live, and which were used when.
    pub sessions: Sessions,
    /// Hashes of passwords.
    pub passwords: Passwords,
    /// Who has to wait.
    pub lockout: Lockout,
    providers: Vec<Arc<Provider>>,
    directories: Vec<Arc<Directory>>,
    walks: Walks,
}

/// Who has proved who it is, and how.
#[derive(Clone)]
struct Who {
    user: UserId,
    proof: Proof,
}

/// From where a step came, and when.
#[derive(Clone, Copy)]
pub struct From {
    /// The address.
    pub address: IpAddr,
    /// The time.
    pub now: Timestamp,
}

/// The one answer to a name and password that are not good, whatever is wrong.
pub fn wrong() -> Problem {
    Problem::new(
        ProblemCode::Unauthenticated,
        "the name or the password is wrong; after several failures one has to wait a while before the next",
    )
}

/// The one answer to a walk that is not there: never was, is over, or is another address's.
fn no_walk() -> Problem {
    Problem::new(ProblemCode::Unauthenticated, "this login is over, or there never was one: begin again")
}

fn wrong_code() -> Problem {
    Problem::new(ProblemCode::Unauthenticated, "the code is wrong, was used before, or is too old")
}

impl Logins {
    /// Sets up what is configured. Providers and directories are asked when somebody logs in through them.
    pub fn new(settings: LoginSettings, entropy: &dyn crate::clock::Entropy) -> Self {
        Self {
            sessions: Sessions::new(settings.idle_s, settings.absolute_s),
            passwords: Passwords::new(entropy),
            lockout: Lockout::default(),
            providers: settings.oidc.into_iter().map(|one| Arc::new(Provider::new(one))).collect(),
            directories: settings.ldap.into_iter().map(|one| Arc::new(Directory::new(one))).collect(),
            walks: Walks::default(),
        }
    }

    /// The ways to log in.
    pub fn ways(&self) -> LoginWays {
        LoginWays {
            oidc: self.providers.iter().map(|one| one.settings.name.clone()).collect(),
            ldap: self.directories.iter().map(|one| one.settings.name.clone()).collect(),
        }
    }

    /// What makes subjects of this provider or directory unique.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn issuer_of(&self, source: &str) -> Result<(Name, String), Problem> {
        let provider = self.providers.iter().find(|one| one.settings.name.as_str() == source);
        let directory = self.directories.iter().find(|one| one.settings.name.as_str() == source);
        match (provider, directory) {
            (Some(one), _) => Ok((one.settings.name.clone(), one.settings.issuer.clone())),
            (None, Some(one)) => Ok((one.settings.name.clone(), one.issuer())),
            (None, None) => {
                Err(Problem::field("source", source, "a provider or directory of the manager's login.toml"))
            }
        }
    }

    /// The first step with a password.
    ///
    /// # Errors
    /// One for all that is wrong; that a directory is not there or can't be asked; that too many are at it.
    pub async fn begin(
        &self,
        cluster: &Arc<Cluster>,
        request: &LoginRequest,
        from: From,
    ) -> Result<LoginReply, Problem> {
        match &request.directory {
            None => self.begin_here(cluster, request, from).await,
            Some(name) => {
                let found = self.directories.iter().find(|one| one.settings.name.as_str() == name);
                let directory = found.cloned().ok_or_else(|| Problem::not_found("directory", name))?;
                self.begin_there(cluster, &directory, request, from).await
            }
        }
    }

    async fn begin_here(
        &self,
        cluster: &Arc<Cluster>,
        request: &LoginRequest,
        from: From,
    ) -> Result<LoginReply, Problem> {
        let records = &cluster.records;
        let user = user_of(cluster, &request.user);
        let attempt =
            self.lockout.attempt(records, user.as_ref().map(|row| &row.value.id), from.address, from.now);
        if attempt == Attempt::AddressHeld {
            return Err(wrong());
        }
        if let Some(user) = &user {
            save_lock(cluster, &user.value.id);
        }
        let credential = user.as_ref().and_then(|row| records.get::<CredentialRow>(row.value.id.as_str()));
        let stored = credential.as_ref().and_then(|row| row.password.as_deref());
        let password = Password::typed(&request.password);
        // Too long to be one: compared all the same, with something that is not it.
        let guess = password.clone().unwrap_or_else(|| Password::typed("").expect("short"));
        let verdict = self.passwords.verify(stored, &guess).await?;
        let good = verdict != Verdict::Wrong && password.is_some() && attempt == Attempt::Counted;
        let Some(user) = user.filter(|user| good && !user.disabled) else { return Err(wrong()) };
        self.lockout.not_a_guess(from.address);
        if verdict == Verdict::RightButOld {
            self.renew_hash(cluster, &user.value.id, stored, &guess, from.now).await?;
        }
        let who = Who {
            user: user.value.id.clone(),
            proof: Proof { method: "password".to_owned(), second_factor: false },
        };
        self.next(cluster, who, false, from).await
    }

    async fn begin_there(
        &self,
        cluster: &Arc<Cluster>,
        directory: &Directory,
        request: &LoginRequest,
        from: From,
    ) -> Result<LoginReply, Problem> {
        // Only the address is counted: the directory has its own rule for accounts, and the names are its own.
        let attempt = self.lockout.attempt(&cluster.records, None, from.address, from.now);
        if attempt != Attempt::Counted || request.user.len() > NAME_BYTES_MAX {
            return Err(wrong());
        }
        let external = match directory.login(&request.user, &request.password, from.now).await {
            Ok(external) => external,
            Err(DirectoryError::Wrong) => return Err(wrong()),
            Err(error) => {
                let detail = crate::auth::chain(&error);
                tracing::error!(detail, "a login through a directory failed");
                return Err(Problem::new(ProblemCode::Unreachable, error.to_string()));
            }
        };
        self.lockout.not_a_guess(from.address);
        let method = format!("ldap:{}", directory.settings.name);
        self.vouched(cluster, &external, directory.settings.create_users, method, from).await
    }

    /// A further step.
    ///
    /// # Errors
    /// That there is no such walk, that the answer is not to what was asked, or that it is wrong.
    pub async fn go_on(
        &self,
        cluster: &Arc<Cluster>,
        id: &str,
        answer: &LoginAnswer,
        from: From,
    ) -> Result<LoginReply, Problem> {
        let walk = self.walks.take(id, from)?;
        let given = (&answer.totp, &answer.recovery, &answer.new_password);
        match (walk.state, given) {
            (State::Code { who, wrong }, (Some(code), None, None)) => {
                self.judge_code(cluster, id, who, wrong, (code, false), from).await
            }
            (State::Code { who, wrong }, (None, Some(code), None)) => {
                self.judge_code(cluster, id, who, wrong, (code, true), from).await
            }
            (State::NewPassword { who, old_hash }, (None, None, Some(new))) => {
                let kept = State::NewPassword { who: who.clone(), old_hash: old_hash.clone() };
                let result = self.change_first(cluster, &who, &old_hash, new, from).await;
                if result.is_err() {
                    self.walks.put_back(id, from, walk.expires_at, kept);
                }
                result
            }
            (State::Device { provider, outing, ask_from }, (None, None, None)) => {
                self.ask_device(cluster, id, (provider, outing, ask_from), walk.expires_at, from).await
            }
            // A browser's walk ends where the browser comes back, and nowhere else.
            (State::Browser { provider, outing, cookie }, _) => {
                self.walks.put_back(id, from, walk.expires_at, State::Browser { provider, outing, cookie });
                Err(no_walk())
            }
            (state, _) => {
                let expected = match &state {
                    State::Code { .. } => "totp or recovery, and nothing else",
                    State::NewPassword { .. } => "new_password, and nothing else",
                    State::Device { .. } | State::Browser { .. } => "nothing but the question",
                };
                self.walks.put_back(id, from, walk.expires_at, state);
                let message = format!("this login needs something else next: expected {expected}");
                Err(Problem::new(ProblemCode::InvalidInput, message).at("login", "", expected))
            }
        }
    }

    async fn judge_code(
        &self,
        cluster: &Arc<Cluster>,
        id: &str,
        who: Who,
        wrong: u32,
        code: (&str, bool),
        from: From,
    ) -> Result<LoginReply, Problem> {
        // Codes are guesses as well: who has the password must not begin a new walk for each five of them.
        let attempt = self.lockout.attempt(&cluster.records, Some(&who.user), from.address, from.now);
        save_lock(cluster, &who.user);
        let taken = attempt == Attempt::Counted && take_code(cluster, &who.user, code, from.now).await?;
        if !taken {
            if wrong + 1 < CODES_MAX {
                self.walks.put(id.to_owned(), from, WALK_MS, State::Code { who, wrong: wrong + 1 });
            }
            return Err(wrong_code());
        }
        self.lockout.not_a_guess(from.address);
        let proof = Proof { second_factor: true, ..who.proof };
        self.next(cluster, Who { proof, ..who }, true, from).await
    }

    async fn change_first(
        &self,
        cluster: &Arc<Cluster>,
        who: &Who,
        old_hash: &str,
        new: &str,
        from: From,
    ) -> Result<LoginReply, Problem> {
        let user = standing_user(cluster, &who.user)?;
        let new = Password::chosen(new, user.name.as_str(), "new_password")?;
        if self.passwords.verify(Some(old_hash), &new).await? != Verdict::Wrong {
            return Err(not_the_old_one());
        }
        let hash = self.passwords.hash(&new, &*cluster.entropy).await?;
        credential::change(&cluster.records, &who.user, from.now, |row| {
            // An administrator has given another meanwhile: that one counts.
            if row.password.as_deref() != Some(old_hash) {
                return Err(no_walk());
            }
            row.password = Some(hash.clone());
            row.must_change = false;
            row.changed_at = from.now;
            Ok(())
        })
        .await?;
        self.open(cluster, &user, &who.proof, true, from).await
    }

    /// What is needed next of somebody who has proved so much.
    async fn next(
        &self,
        cluster: &Arc<Cluster>,
        who: Who,
        has_code: bool,
        from: From,
    ) -> Result<LoginReply, Problem> {
        let user = standing_user(cluster, &who.user)?;
        let credential = cluster.records.get::<CredentialRow>(who.user.as_str());
        if let Some(credential) = &credential {
            if credential.asks_for_codes() && !has_code {
                return Ok(self.wait(cluster, from, State::Code { who, wrong: 0 }, LoginNeed::Totp));
            }
            let is_local = who.proof.method == "password";
            if let (true, true, Some(old_hash)) =
                (is_local, credential.must_change, credential.password.clone())
            {
                let state = State::NewPassword { who, old_hash };
                return Ok(self.wait(cluster, from, state, LoginNeed::NewPassword));
            }
        }
        self.open(cluster, &user, &who.proof, false, from).await
    }

    /// The walk is over: a session. The last look at the user and the making of the session are one transaction, so
    /// nobody who is disabled in between gets in.
    async fn open(
        &self,
        cluster: &Arc<Cluster>,
        user: &Row<User>,
        proof: &Proof,
        alone: bool,
        from: From,
    ) -> Result<LoginReply, Problem> {
        let mut transaction = Transaction::new();
        transaction.unchanged(user);
        if alone {
            session::forget_others(&cluster.records, &mut transaction, &user.value.id, None);
        }
        let records = &cluster.records;
        let at = (from.address, from.now);
        let new: NewSession =
            self.sessions.add(records, &mut transaction, &user.value, proof, at, &*cluster.entropy);
        cluster.records.commit(transaction).await?;
        self.lockout.succeeded(records, &user.value.id, from.address, from.now);
        save_lock(cluster, &user.value.id);
        tracing::info!(user = %user.name, session = %new.session.id, method = proof.method, address = %from.address, "logged in");
        Ok(LoginReply { session: Some(new), login: None, needs: None, device: None })
    }

    async fn renew_hash(
        &self,
        cluster: &Arc<Cluster>,
        user: &UserId,
        old: Option<&str>,
        password: &Password,
        now: Timestamp,
    ) -> Result<(), Problem> {
        let hash = self.passwords.hash(password, &*cluster.entropy).await?;
        credential::change(&cluster.records, user, now, |row| {
            if row.password.as_deref() == old {
                row.password = Some(hash.clone());
            }
            Ok(())
        })
        .await
        .map(drop)
    }

    fn wait(&self, cluster: &Arc<Cluster>, from: From, state: State, needs: LoginNeed) -> LoginReply {
        let id = random(cluster);
        self.walks.put(id.clone(), from, WALK_MS, state);
        LoginReply { session: None, login: Some(id), needs: Some(needs), device: None }
    }
}

/// The answer to a new password that is the old one.
pub fn not_the_old_one() -> Problem {
    let expected = "another password than the present one";
    let message = format!("new_password can't be taken: expected {expected}");
    Problem::new(ProblemCode::InvalidInput, message).at("new_password", "", expected)
}

/// Takes a code of a user, or a recovery code: once, whoever else is at it.
///
/// # Errors
/// When the store failed.
pub async fn take_code(
    cluster: &Arc<Cluster>,
    user: &UserId,
    (code, is_recovery): (&str, bool),
    now: Timestamp,
) -> Result<bool, Problem> {
    let taken = credential::change(&cluster.records, user, now, |row| {
        let totp = row.totp.as_mut().filter(|totp| totp.is_confirmed()).ok_or_else(wrong_code)?;
        let good = if is_recovery { totp.take_recovery(code) } else { totp.take(code, now) };
        if good { Ok(()) } else { Err(wrong_code()) }
    })
    .await;
    match taken {
        Ok(_) => Ok(true),
        Err(problem) if problem.code == ProblemCode::Unauthenticated => Ok(false),
        Err(problem) => Err(problem),
    }
}

/// Records in the background what is counted for an account, so that the time does not tell whether there is one.
pub fn save_lock(cluster: &Arc<Cluster>, user: &UserId) {
    let (saving, user) = (Arc::clone(cluster), user.clone());
    cluster.spawn(async move {
        if let Err(error) = saving.logins.lockout.save(&saving.records, &user).await {
            tracing::warn!(%error, "failed logins could not be recorded");
        }
    });
}

/// The user of this name.
pub fn user_of(cluster: &Arc<Cluster>, name: &str) -> Option<Arc<Row<User>>> {
    let name: Name = name.parse().ok()?;
    let id = cluster.records.id_of(&UniqueName::in_cluster("user", &name))?;
    cluster.records.get::<User>(&id)
}

fn standing_user(cluster: &Arc<Cluster>, user: &UserId) -> Result<Arc<Row<User>>, Problem> {
    cluster.records.get::<User>(user.as_str()).filter(|user| !user.disabled).ok_or_else(wrong)
}

fn random(cluster: &Arc<Cluster>) -> String {
    let mut bytes = [0; 32];
    cluster.entropy.fill(&mut bytes);
    URL_SAFE_NO_PAD.encode(bytes)
}
