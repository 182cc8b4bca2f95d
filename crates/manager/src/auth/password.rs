//! Passwords of local users: what they must be, and how they are kept.
//!
//! Kept is an Argon2id hash as a PHC string, which carries its own parameters: when ours change, a hash is made anew
//! at the next good login. One hash takes 19 MiB and some tens of milliseconds on purpose, so hashing happens on
//! threads of its own, only so many at once, and a caller who would have to wait long is told to come back instead.
//! A name that nobody has costs the same work as one that somebody has.
//!
//! The rules are those of NIST SP 800-63B, section 5.1.1.2: length counts, composition does not.

use std::sync::Arc;
use std::time::Duration;

use argon2::password_hash::{PasswordHash, SaltString};
use argon2::{Algorithm, Argon2, Params, PasswordHasher, PasswordVerifier, Version};
use berth_model::{Problem, ProblemCode};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use unicode_normalization::UnicodeNormalization;

use crate::clock::Entropy;

/// Fewest characters of a password.
pub const CHARACTERS_MIN: usize = 12;
/// Most bytes of a password, as UTF-8 in normal form C. More, and hashing begins to cost what an attacker chooses.
pub const BYTES_MAX: usize = 256;
/// Memory of one hash in KiB: OWASP's Password Storage Cheat Sheet, first choice for Argon2id.
const MEMORY_KIB: u32 = 19 * 1024;
/// Passes over the memory; the same source.
const PASSES: u32 = 2;
/// Lanes; the same source.
const LANES: u32 = 1;
/// Most hashes at once, whatever the number of processors: 4 take 76 MiB.
const AT_ONCE_MAX: usize = 4;
/// How long a login waits for its turn. Longer, and a flood of logins holds all connections.
const TURN_WITHIN: Duration = Duration::from_secs(5);
/// Letters of generated passwords: none that look like another.
const LETTERS: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
/// Characters of a generated password without its dashes: 100 bits.
const GENERATED_CHARACTERS: usize = 20;
const SALT_BYTES: usize = 16;

/// A password as somebody typed it, in normal form C, so that it is the same from every keyboard. Never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Password(String);

impl std::fmt::Debug for Password {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Password(…)")
    }
}

impl Password {
    /// What was typed; none: longer than any password can be.
    pub fn typed(text: &str) -> Option<Self> {
        // Normal form C is at most three times as long; nothing is gained by normalising a novel.
        if text.len() > BYTES_MAX * 4 {
            return None;
        }
        let normal: String = text.nfc().collect();
        (normal.len() <= BYTES_MAX).then_some(Self(normal))
    }

    /// A new password for a user of this name.
    ///
    /// # Errors
    /// Which rule it breaks; the password is not repeated.
    pub fn chosen(text: &str, user: &str, field: &str) -> Result<Self, Problem> {
        let refused = |expected: String| {
            let message = format!("{field} can't be taken: expected {expected}");
            Problem::new(ProblemCode::InvalidInput, message).at(field, "", expected)
        };
        let password =
            Self::typed(text).ok_or_else(|| refused(format!("at most {BYTES_MAX} bytes as UTF-8")))?;
        if password.0.chars().count() < CHARACTERS_MIN {
            return Err(refused(format!("at least {CHARACTERS_MIN} characters")));
        }
        if password.0.chars().any(char::is_control) {
            return Err(refused("no control characters".to_owned()));
        }
        let without_name = password.0.to_lowercase().replace(&user.to_lowercase(), "");
        if without_name.trim().is_empty() {
            return Err(refused("something else than the user's name".to_owned()));
        }
        Ok(password)
    }

    /// One that nobody chose: `k7mq2-…`, of 100 random bits.
    pub fn generate(entropy: &dyn Entropy) -> Self {
        let mut bytes = [0; GENERATED_CHARACTERS];
        entropy.fill(&mut bytes);
        let letters: Vec<char> =
            bytes.iter().map(|byte| char::from(LETTERS[usize::from(byte % 32)])).collect();
        let groups: Vec<String> = letters.chunks(5).map(|group| group.iter().collect()).collect();
        Self(groups.join("-"))
    }

    /// The text, for who has to be told it once or who passes it on.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

/// What a comparison found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is not the password, or there is none.
    Wrong,
    /// It is.
    Right,
    /// It is, and the hash was made with other parameters than today's.
    RightButOld,
}

/// Makes and compares hashes, a few at a time.
pub struct Passwords {
    turns: Arc<Semaphore>,
    /// A hash that no password has, for names that nobody has.
    nobody: String,
}

impl Passwords {
    /// As many at once as half the processors, and at most four.
    pub fn new(entropy: &dyn Entropy) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let at_once = (processors / 2).clamp(1, AT_ONCE_MAX);
        let mut salt = [0; SALT_BYTES];
        entropy.fill(&mut salt);
        Self { turns: Arc::new(Semaphore::new(at_once)), nobody: nobody(&salt) }
    }

    /// The hash of a password.
    ///
    /// # Errors
    /// [`ProblemCode::TooBusy`] when too many are being made.
    pub async fn hash(&self, password: &Password, entropy: &dyn Entropy) -> Result<String, Problem> {
        let mut salt = [0; SALT_BYTES];
        entropy.fill(&mut salt);
        let (turn, password) = (self.turn().await?, password.clone());
        on_a_thread(turn, move || hash(&password, &salt)).await
    }

    /// Whether this is the password of that hash. None costs the same as one that does not fit.
    ///
    /// # Errors
    /// As [`Self::hash`].
    pub async fn verify(&self, stored: Option<&str>, password: &Password) -> Result<Verdict, Problem> {
        let is_somebody = stored.is_some();
        let stored = stored.unwrap_or(&self.nobody).to_owned();
        let (turn, password) = (self.turn().await?, password.clone());
        let verdict = on_a_thread(turn, move || verify(&stored, &password)).await?;
        Ok(if is_somebody { verdict } else { Verdict::Wrong })
    }

    async fn turn(&self) -> Result<OwnedSemaphorePermit, Problem> {
        let waiting = Arc::clone(&self.turns).acquire_owned();
        match tokio::time::timeout(TURN_WITHIN, waiting).await {
            Ok(Ok(turn)) => Ok(turn),
            Ok(Err(_)) | Err(_) => {
                Err(Problem::new(ProblemCode::TooBusy, "too many are logging in at this moment: try again"))
            }
        }
    }
}

async fn on_a_thread<T: Send + 'static>(
    turn: OwnedSemaphorePermit,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Problem> {
    let working = tokio::task::spawn_blocking(move || {
        // Held by the work itself: a caller who hangs up does not let in another beside it.
        let _turn = turn;
        work()
    });
    working.await.map_err(|_| Problem::new(ProblemCode::Internal, "a password could not be hashed"))
}

fn argon2() -> Argon2<'static> {
    let params = Params::new(MEMORY_KIB, PASSES, LANES, None).expect("parameters in Argon2's range");
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
}

fn hash(password: &Password, salt: &[u8]) -> String {
    let salt = SaltString::encode_b64(salt).expect("16 bytes are a salt");
    let hash = argon2().hash_password(password.0.as_bytes(), &salt);
    hash.expect("a password and a salt in Argon2's range").to_string()
}

fn verify(stored: &str, password: &Password) -> Verdict {
    let Ok(parsed) = PasswordHash::new(stored) else { return Verdict::Wrong };
    if argon2().verify_password(password.0.as_bytes(), &parsed).is_err() {
        return Verdict::Wrong;
    }
    let is_todays = parsed.algorithm == argon2::ARGON2ID_IDENT
        && parsed.version == Some(Version::V0x13.into())
        && Params::try_from(&parsed).is_ok_and(|params| {
            (params.m_cost(), params.t_cost(), params.p_cost()) == (MEMORY_KIB, PASSES, LANES)
        });
    if is_todays { Verdict::Right } else { Verdict::RightButOld }
}

/// A PHC string of today's parameters with random bytes where the hash would be: comparing with it is all the work,
/// and no password is known that it fits.
fn nobody(salt: &[u8; SALT_BYTES]) -> String {
    use sha2::Digest;
    let salt_text = SaltString::encode_b64(salt).expect("16 bytes are a salt");
    let digest: [u8; 32] = sha2::Sha256::digest(salt).into();
    let output = argon2::password_hash::Output::new(&digest).expect("32 bytes are a hash");
    format!("$argon2id$v=19$m={MEMORY_KIB},t={PASSES},p={LANES}${salt_text}${output}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SystemEntropy;

    fn typed(text: &str) -> Password {
        Password::typed(text).expect("short enough")
    }

    #[tokio::test]
    async fn a_hash_knows_its_password_and_no_other_and_is_todays() {
        let passwords = Passwords::new(&SystemEntropy);
        let hash = passwords.hash(&typed("correct horse"), &SystemEntropy).await.expect("a turn");
        assert!(hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{hash}");
        let verdict = |text: &'static str| {
            let (passwords, hash) = (&passwords, &hash);
            async move { passwords.verify(Some(hash), &typed(text)).await.expect("a turn") }
        };
        assert_eq!(verdict("correct horse").await, Verdict::Right);
        assert_eq!(verdict("Correct horse").await, Verdict::Wrong);
        assert_eq!(verdict("").await, Verdict::Wrong);
        let other = passwords.hash(&typed("correct horse"), &SystemEntropy).await.expect("a turn");
        assert_ne!(hash, other, "each has a salt of its own");
    }

    #[tokio::test]
    async fn a_hash_of_other_parameters_still_counts_and_is_to_be_made_anew() {
        let params = Params::new(8 * 1024, 1, 1, None).expect("in range");
        let old = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
        let salt = SaltString::encode_b64(&[7; 16]).expect("a salt");
        let old = old.hash_password(b"correct horse", &salt).expect("a hash").to_string();
        let passwords = Passwords::new(&SystemEntropy);
        let verdict = passwords.verify(Some(&old), &typed("correct horse")).await.expect("a turn");
        assert_eq!(verdict, Verdict::RightButOld);
        let verdict = passwords.verify(Some("not a hash"), &typed("x")).await.expect("a turn");
        assert_eq!(verdict, Verdict::Wrong);
    }

    #[tokio::test]
    async fn a_name_that_nobody_has_takes_as_long_as_one_that_somebody_has() {
        let passwords = Passwords::new(&SystemEntropy);
        let hash = passwords.hash(&typed("correct horse"), &SystemEntropy).await.expect("a turn");
        let mut times = [Vec::new(), Vec::new()];
        for _ in 0..7 {
            for (stored, times) in [Some(hash.as_str()), None].into_iter().zip(&mut times) {
                let start = std::time::Instant::now();
                let verdict = passwords.verify(stored, &typed("wrong guess")).await.expect("a turn");
                assert_eq!(verdict, Verdict::Wrong);
                times.push(start.elapsed());
            }
        }
        let [somebody, nobody] = times.map(|mut times| {
            times.sort();
            times[times.len() / 2].as_secs_f64()
        });
        // Half and double leave room for a busy machine; without the work it would be a thousandth.
        assert!(nobody > somebody / 2.0 && nobody < somebody * 2.0, "{somebody} s against {nobody} s");
    }

    #[test]
    fn the_rules_count_characters_in_normal_form_and_never_repeat_the_password() {
        for bad in ["", "short", "elevenchars", "bookkeeper1", "BOOKKEEPERS-", "bookkeepers-bookkeepers-"] {
            let problem = Password::chosen(bad, "bookkeepers-", "new_password").expect_err(bad);
            assert_eq!(
                (problem.field.as_deref(), problem.value.as_deref()),
                (Some("new_password"), Some(""))
            );
            assert!(bad.is_empty() || !problem.message.contains(bad), "{problem}");
        }
        for good in ["twelve chars", "ünïcödé wörds", "bookkeepers-x", &"x".repeat(256)] {
            Password::chosen(good, "bookkeepers-", "new_password").expect(good);
        }
        assert!(Password::chosen(&"x".repeat(257), "a", "p").is_err());
        assert!(Password::chosen(&"ü".repeat(129), "a", "p").is_err(), "bytes, not characters");
        assert!(Password::chosen("with\u{0}control bytes", "a", "p").is_err());
        // Eleven characters that look like more before they are put together.
        assert!(Password::chosen(&"u\u{308}".repeat(11), "a", "p").is_err());
        assert_eq!(typed("u\u{308}"), typed("ü"), "the same from every keyboard");
    }

    #[test]
    fn generated_passwords_keep_the_rules_and_are_not_shown_by_accident() {
        let password = Password::generate(&SystemEntropy);
        Password::chosen(password.reveal(), "admin", "p").expect("its own rules");
        assert_eq!(password.reveal().len(), 23);
        assert_eq!(format!("{password:?}"), "Password(…)");
        assert_ne!(password, Password::generate(&SystemEntropy));
    }
}
