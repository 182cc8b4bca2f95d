//! Signed notes (C2SP signed-note): a text, an empty line, and a line for each signature.
//!
//! A signature line names the key and carries four bytes of its id, so that a reader knows which key to try; only a
//! key that the reader brought decides. Keys are Ed25519; a public one is written `name+id+base64`, as the
//! specification has it, so that other tools can read it.

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::digest::{Context, SHA256};
use ring::rand::SystemRandom;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};

/// The specification's number for Ed25519.
const ALGORITHM: u8 = 1;
const PUBLIC_BYTES: usize = 32;
const ID_BYTES: usize = 4;
/// What a signature line begins with: an em dash and a blank.
const SIGNATURE_PREFIX: &str = "\u{2014} ";
const PEM_BEGIN: &str = "-----BEGIN PRIVATE KEY-----";
const PEM_END: &str = "-----END PRIVATE KEY-----";

/// A key that can't be used. What it is made of is not repeated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not a private key as [`SigningKey::to_pem`] writes it.
    #[error("not an Ed25519 private key in PEM (PKCS #8)")]
    Private,
    /// Not a public key of the form `name+id+base64`.
    #[error("not a public key of the form name+id+base64 (C2SP signed-note, Ed25519)")]
    Public,
    /// A name that can't stand in a signature line.
    #[error("'{name}' can't name a key: expected no blanks and no '+'")]
    Name {
        /// The name.
        name: String,
    },
    /// The system gives no random bytes.
    #[error("no random bytes can be had for a key")]
    Random,
}

/// A note that can't be believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoteError {
    /// Not of the form of a signed note.
    #[error("not a signed note: {detail}")]
    Malformed {
        /// What is wrong with it.
        detail: &'static str,
    },
    /// None of its signatures is of a key that was given.
    #[error("none of its signatures is by a key that is trusted here")]
    UnknownKey,
    /// A signature that names a known key is not of that key over this text.
    #[error(
        "the signature of '{name}' is not good: the text was changed, or the key is not the one it names"
    )]
    BadSignature {
        /// The key's name.
        name: String,
    },
}

/// A private key with its name.
pub struct SigningKey {
    pair: Ed25519KeyPair,
    pkcs8: Vec<u8>,
    public: VerifyingKey,
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "SigningKey({})", self.public)
    }
}

impl SigningKey {
    /// Makes a new one.
    ///
    /// # Errors
    /// When the name can't be one, or no random bytes can be had.
    pub fn generate(name: &str) -> Result<Self, KeyError> {
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).map_err(|_| KeyError::Random)?;
        Self::from_pkcs8(name, pkcs8.as_ref())
    }

    /// Reads one that [`Self::to_pem`] wrote.
    ///
    /// # Errors
    /// When it is not one, or the name can't be one.
    pub fn from_pem(name: &str, pem: &str) -> Result<Self, KeyError> {
        let body = pem.trim().strip_prefix(PEM_BEGIN).and_then(|rest| rest.strip_suffix(PEM_END));
        let base64: String = body.ok_or(KeyError::Private)?.split_whitespace().collect();
        let pkcs8 = STANDARD.decode(base64).map_err(|_| KeyError::Private)?;
        Self::from_pkcs8(name, &pkcs8)
    }

    fn from_pkcs8(name: &str, pkcs8: &[u8]) -> Result<Self, KeyError> {
        let pair = Ed25519KeyPair::from_pkcs8(pkcs8).map_err(|_| KeyError::Private)?;
        let bytes = pair.public_key().as_ref().try_into().map_err(|_| KeyError::Private)?;
        Ok(Self { public: VerifyingKey::new(name, bytes)?, pair, pkcs8: pkcs8.to_vec() })
    }

    /// The key as PEM, to be kept where nobody else can read it.
    pub fn to_pem(&self) -> String {
        format!("{PEM_BEGIN}\n{}\n{PEM_END}\n", STANDARD.encode(&self.pkcs8))
    }

    /// The public half.
    pub const fn public(&self) -> &VerifyingKey {
        &self.public
    }

    /// Signs a text, which must end in a line break, and gives the whole note.
    pub fn sign(&self, text: &str) -> String {
        let mut bytes = self.public.id.to_vec();
        bytes.extend(self.pair.sign(text.as_bytes()).as_ref());
        format!("{text}\n{SIGNATURE_PREFIX}{} {}\n", self.public.name, STANDARD.encode(bytes))
    }
}

/// A public key with its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifyingKey {
    name: String,
    id: [u8; ID_BYTES],
    bytes: [u8; PUBLIC_BYTES],
}

impl VerifyingKey {
    fn new(name: &str, bytes: [u8; PUBLIC_BYTES]) -> Result<Self, KeyError> {
        if name.is_empty() || name.contains(|c: char| c.is_whitespace() || c.is_control() || c == '+') {
            return Err(KeyError::Name { name: name.chars().take(64).collect() });
        }
        let mut context = Context::new(&SHA256);
        context.update(name.as_bytes());
        context.update(&[b'\n', ALGORITHM]);
        context.update(&bytes);
        let digest = context.finish();
        let mut id = [0; ID_BYTES];
        id.copy_from_slice(&digest.as_ref()[..ID_BYTES]);
        Ok(Self { name: name.to_owned(), id, bytes })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its id, of which signatures carry a copy: the first bytes of a hash of name and key.
    pub const fn id(&self) -> [u8; ID_BYTES] {
        self.id
    }

    fn is_good(&self, text: &str, signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&ED25519, self.bytes).verify(text.as_bytes(), signature).is_ok()
    }
}

impl fmt::Display for VerifyingKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = vec![ALGORITHM];
        bytes.extend(self.bytes);
        let id = u32::from_be_bytes(self.id);
        write!(formatter, "{}+{id:08x}+{}", self.name, STANDARD.encode(bytes))
    }
}

impl FromStr for VerifyingKey {
    type Err = KeyError;
    fn from_str(text: &str) -> Result<Self, KeyError> {
        let mut parts = text.trim().splitn(3, '+');
        let (Some(name), Some(id), Some(key)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(KeyError::Public);
        };
        let bytes = STANDARD.decode(key).map_err(|_| KeyError::Public)?;
        let Some((&ALGORITHM, bytes)) = bytes.split_first() else { return Err(KeyError::Public) };
        let key = Self::new(name, bytes.try_into().map_err(|_| KeyError::Public)?)?;
        // An id that does not belong to the key: one of the two was changed.
        if id.len() != 2 * ID_BYTES || u32::from_str_radix(id, 16) != Ok(u32::from_be_bytes(key.id)) {
            return Err(KeyError::Public);
        }
        Ok(key)
    }
}

/// Gives a note's text (with its last line break) if one of `keys` signed it.
///
/// Signatures of keys that are not given are passed over, as the specification wants.
///
/// # Errors
/// When no given key signed it, or the signature of a given key is not good.
pub fn open<'a>(note: &'a str, keys: &[VerifyingKey]) -> Result<&'a str, NoteError> {
    let malformed = |detail| NoteError::Malformed { detail };
    let split = note.rfind("\n\n").ok_or_else(|| malformed("no empty line before the signatures"))?;
    let (text, signatures) = (&note[..=split], &note[split + 2..]);
    if !signatures.ends_with('\n') {
        return Err(malformed("no line break at its end"));
    }
    if text.contains(|c: char| c.is_control() && c != '\n') {
        return Err(malformed("control characters"));
    }
    let mut is_signed = false;
    for line in signatures.lines() {
        let rest = line.strip_prefix(SIGNATURE_PREFIX).ok_or_else(|| malformed("a bad signature line"))?;
        let (name, base64) = rest.split_once(' ').ok_or_else(|| malformed("a bad signature line"))?;
        let bytes = STANDARD.decode(base64).map_err(|_| malformed("a signature that is not base64"))?;
        let Some((id, signature)) = bytes.split_first_chunk::<ID_BYTES>() else {
            return Err(malformed("a signature without a key's id"));
        };
        let Some(key) = keys.iter().find(|key| key.name == name && key.id == *id) else { continue };
        if !key.is_good(text, signature) {
            return Err(NoteError::BadSignature { name: name.to_owned() });
        }
        is_signed = true;
    }
    if is_signed { Ok(text) } else { Err(NoteError::UnknownKey) }
}
