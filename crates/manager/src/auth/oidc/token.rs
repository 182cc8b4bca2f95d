//! ID tokens: the signature and what is claimed (OpenID Connect Core, section 3.1.3.7; JWT best practice, RFC 8725).
//!
//! The algorithm is one that the configuration allows, never one that the token asks for; the key is one of the
//! provider's own, of the kind that the algorithm needs. Symmetric algorithms and `none` are not known here at all.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use berth_model::Timestamp;
use ring::signature;
use serde::Deserialize;
use serde_json::Value;

use crate::auth::external::SUBJECT_BYTES_MAX;

/// The signature algorithms that can be allowed.
pub const ALGORITHMS: &[&str] =
    &["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA"];
/// How far the provider's clock may be off, in seconds.
const SKEW_S: u64 = 60;
/// Longest token, in bytes.
const TOKEN_BYTES_MAX: usize = 64 * 1024;

/// Why a token is not taken. Nothing of the token is repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It is not a signed token.
    #[error("the token is not a signed JSON web token")]
    Malformed,
    /// Its algorithm is not allowed.
    #[error("the token is signed in a way that is not allowed")]
    Algorithm,
    /// The provider has no such key.
    #[error("the token is signed with a key that the provider does not have")]
    Key,
    /// The signature is wrong.
    #[error("the token's signature is wrong")]
    Signature,
    /// A claim is missing or not what it must be.
    #[error("the token's '{0}' is not what it must be")]
    Claim(&'static str),
}

/// A public key of the provider (RFC 7517).
#[derive(Debug, Clone, Deserialize)]
pub struct Jwk {
    kty: String,
    kid: Option<String>,
    #[serde(rename = "use")]
    usage: Option<String>,
    alg: Option<String>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
}

/// The provider's keys; those of kinds that are not known are left out.
pub fn keys_of(document: &Value) -> Option<Vec<Jwk>> {
    let keys = document.get("keys")?.as_array()?;
    Some(keys.iter().filter_map(|key| Jwk::deserialize(key).ok()).collect())
}

/// What a token must say.
pub struct Expected<'a> {
    /// The issuer, exactly.
    pub issuer: &'a str,
    /// Whom it is for.
    pub client_id: &'a str,
    /// What was sent along to the provider; none: nothing could be.
    pub nonce: Option<&'a str>,
    /// The algorithms that are allowed.
    pub algorithms: &'a [String],
    /// What time it is.
    pub now: Timestamp,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    crit: Option<Value>,
}

/// A token in its parts, not judged yet.
pub struct Parsed<'a> {
    header: Header,
    signed: &'a str,
    signature: Vec<u8>,
    claims: Value,
}

/// Takes a token apart.
///
/// # Errors
/// When it is not one.
pub fn parse(token: &str) -> Result<Parsed<'_>, TokenError> {
    if token.len() > TOKEN_BYTES_MAX {
        return Err(TokenError::Malformed);
    }
    let (signed, signature) = token.rsplit_once('.').ok_or(TokenError::Malformed)?;
    let (header, claims) = signed.split_once('.').ok_or(TokenError::Malformed)?;
    let decode = |text: &str| URL_SAFE_NO_PAD.decode(text).map_err(|_| TokenError::Malformed);
    let header: Header = serde_json::from_slice(&decode(header)?).map_err(|_| TokenError::Malformed)?;
    let claims: Value = serde_json::from_slice(&decode(claims)?).map_err(|_| TokenError::Malformed)?;
    // Extensions that must be understood, and none of which are (RFC 7515, section 4.1.11).
    if header.crit.is_some() || !claims.is_object() {
        return Err(TokenError::Malformed);
    }
    Ok(Parsed { header, signed, signature: decode(signature)?, claims })
}

impl Parsed<'_> {
    /// Judges the signature and the claims, and gives the claims.
    ///
    /// # Errors
    /// What is wrong; [`TokenError::Key`] when newer keys might help.
    pub fn judge(self, keys: &[Jwk], expected: &Expected<'_>) -> Result<Value, TokenError> {
        let algorithm = self.header.alg.as_str();
        if !ALGORITHMS.contains(&algorithm) || !expected.algorithms.iter().any(|allowed| allowed == algorithm)
        {
            return Err(TokenError::Algorithm);
        }
        let fits = |key: &&Jwk| {
            (self.header.kid.is_none() || key.kid == self.header.kid)
                && key.usage.as_deref().is_none_or(|usage| usage == "sig")
                && key.alg.as_deref().is_none_or(|alg| alg == algorithm)
                && key.is_for(algorithm)
        };
        let mut fitting = keys.iter().filter(fits).peekable();
        if fitting.peek().is_none() {
            return Err(TokenError::Key);
        }
        if !fitting.any(|key| key.verifies(algorithm, self.signed.as_bytes(), &self.signature)) {
            return Err(TokenError::Signature);
        }
        judge_claims(&self.claims, expected)?;
        Ok(self.claims)
    }
}

impl Jwk {
    fn is_for(&self, algorithm: &str) -> bool {
        match algorithm {
            "RS256" | "RS384" | "RS512" | "PS256" | "PS384" | "PS512" => self.kty == "RSA",
            "ES256" => self.kty == "EC" && self.crv.as_deref() == Some("P-256"),
            "ES384" => self.kty == "EC" && self.crv.as_deref() == Some("P-384"),
            "EdDSA" => self.kty == "OKP" && self.crv.as_deref() == Some("Ed25519"),
            _ => false,
        }
    }

    fn verifies(&self, algorithm: &str, signed: &[u8], signature: &[u8]) -> bool {
        let part = |text: &Option<String>| text.as_ref().and_then(|text| URL_SAFE_NO_PAD.decode(text).ok());
        let rsa = |parameters: &signature::RsaParameters| {
            let (Some(n), Some(e)) = (part(&self.n), part(&self.e)) else { return false };
            signature::RsaPublicKeyComponents { n: &n, e: &e }.verify(parameters, signed, signature).is_ok()
        };
        let plain = |kind: &'static dyn signature::VerificationAlgorithm, key: Option<Vec<u8>>| {
            key.is_some_and(|key| {
                signature::UnparsedPublicKey::new(kind, key).verify(signed, signature).is_ok()
            })
        };
        // An uncompressed point (SEC 1, section 2.3.3).
        let point = || Some([vec![4], part(&self.x)?, part(&self.y)?].concat());
        match algorithm {
            "RS256" => rsa(&signature::RSA_PKCS1_2048_8192_SHA256),
            "RS384" => rsa(&signature::RSA_PKCS1_2048_8192_SHA384),
            "RS512" => rsa(&signature::RSA_PKCS1_2048_8192_SHA512),
            "PS256" => rsa(&signature::RSA_PSS_2048_8192_SHA256),
            "PS384" => rsa(&signature::RSA_PSS_2048_8192_SHA384),
            "PS512" => rsa(&signature::RSA_PSS_2048_8192_SHA512),
            "ES256" => plain(&signature::ECDSA_P256_SHA256_FIXED, point()),
            "ES384" => plain(&signature::ECDSA_P384_SHA384_FIXED, point()),
            "EdDSA" => plain(&signature::ED25519, part(&self.x)),
            _ => false,
        }
    }
}

fn judge_claims(claims: &Value, expected: &Expected<'_>) -> Result<(), TokenError> {
    let text = |name: &str| claims.get(name).and_then(Value::as_str);
    let seconds = |name: &str| claims.get(name).and_then(Value::as_f64);
    #[expect(clippy::cast_precision_loss, reason = "seconds of our time fit a float's 53 bits")]
    let (now, skew) = ((expected.now.as_millis() / 1000) as f64, SKEW_S as f64);
    let require = |good: bool, claim: &'static str| if good { Ok(()) } else { Err(TokenError::Claim(claim)) };

    require(text("iss") == Some(expected.issuer), "iss")?;
    let audience: Vec<&str> = match claims.get("aud") {
        Some(Value::String(one)) => vec![one],
        Some(Value::Array(all)) => all.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    require(audience.contains(&expected.client_id), "aud")?;
    let party = text("azp");
    require(party.is_none_or(|party| party == expected.client_id), "azp")?;
    require(audience.len() == 1 || party.is_some(), "azp")?;
    require(seconds("exp").is_some_and(|end| now < end + skew), "exp")?;
    require(seconds("iat").is_some_and(|made| made <= now + skew), "iat")?;
    require(claims.get("nbf").is_none() || seconds("nbf").is_some_and(|begin| begin <= now + skew), "nbf")?;
    if let Some(nonce) = expected.nonce {
        require(text("nonce") == Some(nonce), "nonce")?;
    }
    let subject = text("sub").unwrap_or_default();
    require(!subject.is_empty() && subject.len() <= SUBJECT_BYTES_MAX, "sub")
}

#[cfg(test)]
mod tests {
    use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
    use serde_json::json;

    use super::*;

    const NOW_S: u64 = 1_800_000_000;

    struct Provider {
        key: EcdsaKeyPair,
        jwk: Jwk,
    }

    fn provider() -> Provider {
        let random = ring::rand::SystemRandom::new();
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).expect("a key");
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8.as_ref(), &random)
            .expect("a key");
        let point = key.public_key().as_ref();
        let part = |range: std::ops::Range<usize>| URL_SAFE_NO_PAD.encode(&point[range]);
        let jwk = json!({"kty": "EC", "crv": "P-256", "kid": "one", "use": "sig", "x": part(1..33), "y": part(33..65)});
        Provider { key, jwk: Jwk::deserialize(jwk).expect("a key") }
    }

    impl Provider {
        fn sign(&self, header: &Value, claims: &Value) -> String {
            let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
            let signed = format!("{}.{}", part(header), part(claims));
            let signature =
                self.key.sign(&ring::rand::SystemRandom::new(), signed.as_bytes()).expect("signed");
            format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
        }
        fn judge(&self, token: &str) -> Result<Value, TokenError> {
            let expected = Expected {
                issuer: "https://a",
                client_id: "berth",
                nonce: Some("n"),
                algorithms: &["ES256".to_owned(), "RS256".to_owned()],
                now: Timestamp::from_millis(NOW_S * 1000),
            };
            parse(token)?.judge(std::slice::from_ref(&self.jwk), &expected)
        }
    }

    fn header() -> Value {
        json!({"alg": "ES256", "kid": "one", "typ": "JWT"})
    }

    fn claims() -> Value {
        json!({"iss": "https://a", "aud": "berth", "sub": "s", "nonce": "n", "iat": NOW_S, "exp": NOW_S + 300})
    }

    #[test]
    fn a_good_token_is_taken() {
        let provider = provider();
        assert_eq!(provider.judge(&provider.sign(&header(), &claims())).expect("good")["sub"], "s");
        let mut several = claims();
        several["aud"] = json!(["berth", "other"]);
        several["azp"] = json!("berth");
        provider.judge(&provider.sign(&header(), &several)).expect("good");
    }

    #[test]
    fn every_claim_that_is_not_right_is_refused() {
        let provider = provider();
        for (claim, bad) in [
            ("iss", json!("https://b")),
            ("iss", json!("https://a/")),
            ("aud", json!("other")),
            ("aud", json!(["berth", "other"])),
            ("aud", json!([])),
            ("azp", json!("other")),
            ("exp", json!(NOW_S - 61)),
            ("exp", json!("never")),
            ("iat", json!(NOW_S + 61)),
            ("nbf", json!(NOW_S + 61)),
            ("nonce", json!("m")),
            ("sub", json!("")),
            ("sub", json!("x".repeat(300))),
            ("sub", json!(7)),
        ] {
            let mut claims = claims();
            claims[claim] = bad.clone();
            let refused = provider.judge(&provider.sign(&header(), &claims)).expect_err(claim);
            assert!(matches!(refused, TokenError::Claim(_)), "{claim} {bad}: {refused}");
        }
        for claim in ["iss", "aud", "exp", "iat", "nonce", "sub"] {
            let mut claims = claims();
            claims.as_object_mut().expect("claims").remove(claim);
            assert_eq!(provider.judge(&provider.sign(&header(), &claims)), Err(TokenError::Claim(claim)));
        }
    }

    #[test]
    fn the_token_does_not_choose_how_it_is_judged() {
        let provider = provider();
        for (header, refused) in [
            (json!({"alg": "none"}), TokenError::Algorithm),
            (json!({"alg": "None", "kid": "one"}), TokenError::Algorithm),
            (json!({"alg": "HS256", "kid": "one"}), TokenError::Algorithm),
            (json!({"alg": "EdDSA", "kid": "one"}), TokenError::Algorithm),
            (json!({"alg": "RS256", "kid": "one"}), TokenError::Key),
            (json!({"alg": "ES256", "kid": "two"}), TokenError::Key),
            (json!({"alg": "ES256", "kid": "one", "crit": ["b64"]}), TokenError::Malformed),
        ] {
            assert_eq!(provider.judge(&provider.sign(&header, &claims())), Err(refused), "{header}");
        }
        let good = provider.sign(&header(), &claims());
        let unsigned = format!("{}.", good.rsplit_once('.').expect("parts").0);
        assert_eq!(provider.judge(&unsigned), Err(TokenError::Signature));
        let other = super::tests::provider();
        assert_eq!(provider.judge(&other.sign(&header(), &claims())), Err(TokenError::Signature));
        for bad in ["", ".", "..", "a.b.c", &good[1..], &good.replace('.', "")] {
            assert_eq!(provider.judge(bad), Err(TokenError::Malformed), "{bad}");
        }
    }
}
