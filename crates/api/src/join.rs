//! The join token: what a machine is given to become a host, once.
//!
//! It reads `berth-join-<fingerprint>-<secret>`: the SHA-256 of the cluster's CA certificate in hexadecimal, and 256
//! random bits. The machine trusts no certificate yet; the fingerprint tells it which CA to trust, so that it gives
//! the secret to nobody but the cluster's manager (see [`crate::tls::pinned_client_config`]).

use std::fmt;
use std::str::FromStr;

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use sha2::{Digest, Sha256};

use crate::tls::TlsError;

const PREFIX: &str = "berth-join-";
const HEX_CHARS: usize = 64;

/// SHA-256 of a CA's certificate (DER).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// Of a certificate in DER.
    pub fn of_der(certificate: &[u8]) -> Self {
        Self(Sha256::digest(certificate).into())
    }

    /// Of a certificate in PEM.
    ///
    /// # Errors
    /// When the text is not PEM of a certificate.
    pub fn of_pem(certificate: &str) -> Result<Self, TlsError> {
        let der = CertificateDer::from_pem_slice(certificate.as_bytes())
            .map_err(|source| TlsError::Pem { what: "the CA's certificate", source })?;
        Ok(Self::of_der(&der))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(formatter, &self.0)
    }
}

/// A join token in its two parts.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinSecret {
    /// The CA to trust.
    pub ca: Fingerprint,
    /// What proves the right to join.
    pub secret: [u8; 32],
}

/// Text that is not a join token. It does not repeat the text, which may be a secret with a slip in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a join token: expected 'berth-join-', 64 hexadecimal digits, '-', and 64 more")]
pub struct JoinSecretError;

impl FromStr for JoinSecret {
    type Err = JoinSecretError;
    fn from_str(text: &str) -> Result<Self, JoinSecretError> {
        let (ca, secret) =
            text.trim().strip_prefix(PREFIX).and_then(|rest| rest.split_once('-')).ok_or(JoinSecretError)?;
        Ok(Self { ca: Fingerprint(read_hex(ca)?), secret: read_hex(secret)? })
    }
}

impl fmt::Display for JoinSecret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{PREFIX}{}-", self.ca)?;
        write_hex(formatter, &self.secret)
    }
}

impl fmt::Debug for JoinSecret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{PREFIX}{}-…", self.ca)
    }
}

fn write_hex(formatter: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(formatter, "{byte:02x}"))
}

fn read_hex(text: &str) -> Result<[u8; 32], JoinSecretError> {
    let digits = text.as_bytes();
    if digits.len() != HEX_CHARS || !digits.iter().all(u8::is_ascii_hexdigit) {
        return Err(JoinSecretError);
    }
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let pair = std::str::from_utf8(pair).map_err(|_| JoinSecretError)?;
        *byte = u8::from_str_radix(pair, 16).map_err(|_| JoinSecretError)?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_join_token_survives_its_text_and_hides_its_secret() {
        let token = JoinSecret { ca: Fingerprint::of_der(b"some CA"), secret: [0xa5; 32] };
        assert_eq!(token.to_string().parse::<JoinSecret>().expect("own text"), token);
        assert!(!format!("{token:?}").contains("a5a5"));
    }

    #[test]
    fn nonsense_is_refused() {
        let good = JoinSecret { ca: Fingerprint::of_der(b"x"), secret: [1; 32] }.to_string();
        for bad in [
            "",
            "berth-join-",
            "berth-join--",
            &good[1..],
            &good[..good.len() - 1],
            &good.replace("01", "0g"),
        ] {
            assert_eq!(bad.parse::<JoinSecret>(), Err(JoinSecretError), "{bad}");
        }
    }
}
