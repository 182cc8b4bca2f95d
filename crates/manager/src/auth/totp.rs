//! One-time codes by time: RFC 6238 over RFC 4226, as every authenticator app makes them (SHA-1, 6 digits, 30 s).
//!
//! A code is good for its own time step and the one on either side, and once: the counter of the last one that was
//! taken is kept, and nothing at or before it counts again. Recovery codes are for who has lost the device: random,
//! kept as hashes, good once each.

use berth_model::Timestamp;
use ring::hmac;
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;

use super::SecretHash;
use crate::clock::Entropy;

/// Length of a time step in seconds (RFC 6238, section 4.1: the recommended one).
const STEP_S: u64 = 30;
/// Digits of a code.
const DIGITS: usize = 6;
/// How many steps a clock may be off, either way (RFC 6238, section 5.2).
const SKEW_STEPS: u64 = 1;
/// Bytes of a secret (RFC 4226, section 4: 160 bits recommended).
const SECRET_BYTES: usize = 20;
/// How many recovery codes there are.
pub const RECOVERY_CODES: usize = 10;
/// Random bytes of a recovery code: 80 bits, so that a plain hash of it gives nothing away.
const RECOVERY_BYTES: usize = 10;
const BASE32: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";

/// A user's second factor as it is kept. Its secret must be known to the manager: it makes the same codes.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totp {
    /// In base32, as authenticator apps take it.
    secret: String,
    /// The counter of the last code that was taken; none: it was never confirmed.
    last_counter: Option<u64>,
    /// Hashes of the recovery codes that are left.
    recovery: Vec<SecretHash>,
}

impl std::fmt::Debug for Totp {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Totp").field("last_counter", &self.last_counter).finish_non_exhaustive()
    }
}

impl Totp {
    /// One that is not confirmed yet, and so asks nobody for codes.
    pub fn new(entropy: &dyn Entropy) -> Self {
        let mut secret = [0; SECRET_BYTES];
        entropy.fill(&mut secret);
        Self { secret: to_base32(&secret), last_counter: None, recovery: Vec::new() }
    }

    /// Whether a code was shown once, so that it is asked for at login.
    pub const fn is_confirmed(&self) -> bool {
        self.last_counter.is_some()
    }

    /// The secret in base32, for typing it in by hand. Shown at enrolment only.
    pub fn secret_text(&self) -> &str {
        &self.secret
    }

    /// The same as a URI for a QR code, in the form that the apps agree on.
    pub fn uri(&self, user: &str) -> String {
        let secret = &self.secret;
        format!("otpauth://totp/Berth:{user}?secret={secret}&issuer=Berth&algorithm=SHA1&digits=6&period=30")
    }

    /// Takes a code, if it is one of this moment and later than the last; says whether.
    pub fn take(&mut self, code: &str, now: Timestamp) -> bool {
        let Some(secret) = from_base32(&self.secret) else { return false };
        let code: String = code.chars().filter(|letter| *letter != ' ').collect();
        let present = now.as_millis() / 1000 / STEP_S;
        let mut taken = None;
        // All are compared, so that the time does not tell which step a near miss was near to.
        for counter in present.saturating_sub(SKEW_STEPS)..=present + SKEW_STEPS {
            let is_it = bool::from(code_at(&secret, counter).as_bytes().ct_eq(code.as_bytes()));
            if is_it && self.last_counter.is_none_or(|last| counter > last) {
                taken = Some(counter);
            }
        }
        if taken.is_some() {
            self.last_counter = taken;
        }
        taken.is_some()
    }

    /// Makes new recovery codes; those from before are good no more.
    pub fn renew_recovery(&mut self, entropy: &dyn Entropy) -> Vec<String> {
        let codes: Vec<String> = (0..RECOVERY_CODES)
            .map(|_| {
                let mut bytes = [0; RECOVERY_BYTES];
                entropy.fill(&mut bytes);
                let text = to_base32(&bytes).to_lowercase();
                format!("{}-{}-{}-{}", &text[..4], &text[4..8], &text[8..12], &text[12..])
            })
            .collect();
        self.recovery = codes.iter().map(|code| recovery_hash(code)).collect();
        codes
    }

    /// Takes a recovery code, if it is one that is left; says whether.
    pub fn take_recovery(&mut self, code: &str) -> bool {
        let hash = recovery_hash(code);
        let before = self.recovery.len();
        self.recovery.retain(|left| *left != hash);
        self.is_confirmed() && self.recovery.len() < before
    }

    /// How many recovery codes are left.
    pub const fn recovery_left(&self) -> usize {
        self.recovery.len()
    }
}

fn recovery_hash(code: &str) -> SecretHash {
    let plain: String = code.chars().filter(char::is_ascii_alphanumeric).collect();
    SecretHash::of(plain.to_ascii_lowercase().as_bytes())
}

/// RFC 4226, section 5.3, with RFC 6238's counter.
fn code_at(secret: &[u8], counter: u64) -> String {
    truncated(secret, counter, DIGITS)
}

fn truncated(secret: &[u8], counter: u64, digits: usize) -> String {
    let key = hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, secret);
    let tag = hmac::sign(&key, &counter.to_be_bytes());
    let bytes = tag.as_ref();
    let offset = usize::from(bytes[bytes.len() - 1] & 0xf);
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[offset..offset + 4]);
    let number = u32::from_be_bytes(number) & 0x7fff_ffff;
    let text = format!("{number:010}");
    text[text.len() - digits..].to_owned()
}

/// RFC 4648, section 6, without padding.
fn to_base32(bytes: &[u8]) -> String {
    let mut text = String::new();
    let (mut buffer, mut bits) = (0u32, 0);
    for byte in bytes {
        buffer = buffer << 8 | u32::from(*byte);
        bits += 8;
        while bits >= 5 {
            bits -= 5;
            text.push(char::from(BASE32[(buffer >> bits) as usize & 31]));
        }
        buffer &= (1 << bits) - 1;
    }
    if bits > 0 {
        text.push(char::from(BASE32[(buffer << (5 - bits)) as usize & 31]));
    }
    text
}

fn from_base32(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let (mut buffer, mut bits) = (0u32, 0);
    for letter in text.bytes() {
        let value = BASE32.iter().position(|known| *known == letter)?;
        buffer = buffer << 5 | u32::try_from(value).ok()?;
        bits += 5;
        if bits >= 8 {
            bits -= 8;
            bytes.push(u8::try_from(buffer >> bits & 0xff).ok()?);
            buffer &= (1 << bits) - 1;
        }
    }
    Some(bytes)
}

/// The code that this secret (in base32) has at this time: for tests that play the authenticator app.
///
/// # Panics
/// When the secret is not base32.
pub fn app_code(secret: &str, at: Timestamp) -> String {
    let secret = from_base32(secret).expect("a secret in base32");
    code_at(&secret, at.as_millis() / 1000 / STEP_S)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SystemEntropy;

    const RFC_SECRET: &[u8] = b"12345678901234567890";

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_millis(seconds * 1000)
    }

    #[test]
    fn the_codes_are_those_of_rfc_4226_and_rfc_6238() {
        let of_4226 = [
            "755224", "287082", "359152", "969429", "338314", "254676", "287922", "162583", "399871",
            "520489",
        ];
        for (counter, code) in of_4226.into_iter().enumerate() {
            assert_eq!(code_at(RFC_SECRET, counter as u64), code);
        }
        for (seconds, code) in [
            (59, "94287082"),
            (1_111_111_109, "07081804"),
            (1_111_111_111, "14050471"),
            (1_234_567_890, "89005924"),
            (2_000_000_000, "69279037"),
            (20_000_000_000, "65353130"),
        ] {
            assert_eq!(truncated(RFC_SECRET, seconds / STEP_S, 8), code);
        }
    }

    #[test]
    fn base32_is_that_of_rfc_4648_and_reads_back() {
        for (bytes, text) in [("f", "MY"), ("fo", "MZXQ"), ("foo", "MZXW6"), ("foobar", "MZXW6YTBOI")] {
            assert_eq!(to_base32(bytes.as_bytes()), text);
            assert_eq!(from_base32(text).expect("base32"), bytes.as_bytes());
        }
        assert_eq!(from_base32("M1"), None);
    }

    #[test]
    fn a_code_is_good_once_and_for_a_step_on_either_side() {
        let start = 1_800_000_000u64;
        for (offset, good) in [(0, true), (30, true), (-30, true), (60, false), (-60, false)] {
            let mut totp = Totp::new(&SystemEntropy);
            let code = app_code(totp.secret_text(), at(start.saturating_add_signed(offset)));
            assert_eq!(totp.take(&code, at(start)), good, "{offset}");
            assert!(!totp.take(&code, at(start)), "twice, {offset}");
        }
        let mut totp = Totp::new(&SystemEntropy);
        let (early, late) =
            (app_code(totp.secret_text(), at(start)), app_code(totp.secret_text(), at(start + 30)));
        assert!(totp.take(&late, at(start)));
        assert!(!totp.take(&early, at(start)), "none from before the last one");
    }

    #[test]
    fn nonsense_is_no_code() {
        let mut totp = Totp::new(&SystemEntropy);
        let now = at(1_800_000_000);
        let code = app_code(totp.secret_text(), now);
        for bad in ["", "0", &code[1..], &format!("{code}0"), "٠٠٠٠٠٠", "      "] {
            assert!(!totp.take(bad, now), "{bad}");
        }
        assert!(!totp.is_confirmed());
        assert!(totp.take(&format!("{} {}", &code[..3], &code[3..]), now), "as apps show it");
    }

    #[test]
    fn recovery_codes_are_good_once_each_and_only_their_hashes_are_kept() {
        let mut totp = Totp::new(&SystemEntropy);
        let now = at(1_800_000_000);
        let codes = totp.renew_recovery(&SystemEntropy);
        assert!(!totp.clone().take_recovery(&codes[0]), "not before it is confirmed");
        assert!(totp.take(&app_code(totp.secret_text(), now), now));
        let json = serde_json::to_string(&totp).expect("json");
        assert!(
            codes.iter().all(|code| !json.contains(code.as_str()) && !json.contains(&code.replace('-', "")))
        );
        assert!(totp.take_recovery(&codes[3].to_uppercase()) && !totp.take_recovery(&codes[3]));
        assert!(!totp.take_recovery("") && !totp.take_recovery("aaaa-aaaa-aaaa-aaaa"));
        assert_eq!(totp.recovery_left(), RECOVERY_CODES - 1);
        let renewed = totp.renew_recovery(&SystemEntropy);
        assert!(!totp.take_recovery(&codes[0]) && totp.take_recovery(&renewed[0]));
    }

    #[test]
    fn the_secret_is_not_shown_by_accident() {
        let totp = Totp::new(&SystemEntropy);
        assert!(!format!("{totp:?}").contains(totp.secret_text()));
        assert!(totp.uri("books").contains(totp.secret_text()));
    }
}
