//! The cluster's own certificate authority: who is a host and who is the manager is said by certificates.
//!
//! A certificate names its holder in a DNS subject alternative name: `manager.berth`, or `<host-id>.host.berth`.
//! Whoever connects to a host expects the name with that host's id, so that a host can't be taken for another,
//! whatever its address.

use std::str::FromStr;

use berth_model::HostId;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};

/// The manager's name in its certificate.
pub const MANAGER_NAME: &str = "manager.berth";
const HOST_SUFFIX: &str = ".host.berth";

/// How long a host's certificate is good, in days. Too long: a stolen key is good for as long. Too short: a host
/// that was off for a holiday has to join again.
pub const CERTIFICATE_DAYS: i64 = 30;
/// When so many days are left, a certificate is renewed.
pub const RENEW_DAYS_LEFT: i64 = 20;
const CA_DAYS: i64 = 3650;
/// Certificates begin a little in the past, for clocks that are behind.
const BACKDATE_SECONDS: i64 = 3600;
const DAY_SECONDS: i64 = 86_400;

/// Something about keys or certificates that did not work.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// The library refused.
    #[error("certificate work failed while {doing}")]
    Library {
        /// What was being done.
        doing: &'static str,
        /// Why.
        #[source]
        source: rcgen::Error,
    },
    /// Text that should have been PEM of a certificate.
    #[error("not a certificate: {detail}")]
    NotACertificate {
        /// What was wrong.
        detail: String,
    },
    /// A time that no certificate can carry.
    #[error("{unix_seconds} s is no time for a certificate")]
    Time {
        /// Seconds since 1970.
        unix_seconds: i64,
    },
}

fn failed(doing: &'static str) -> impl FnOnce(rcgen::Error) -> PkiError {
    move |source| PkiError::Library { doing, source }
}

/// A key and the certificate for it, in PEM.
#[derive(Clone)]
pub struct Identity {
    /// The certificate.
    pub certificate_pem: String,
    /// The private key.
    pub key_pem: String,
}

/// The authority.
pub struct Authority {
    certificate_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Makes a new authority; give its [`Identity`] to [`Self::load`] next time.
    ///
    /// # Errors
    /// When the library refuses.
    pub fn create(now_unix_s: i64) -> Result<Identity, PkiError> {
        let key = KeyPair::generate().map_err(failed("making the CA's key"))?;
        let mut params = params("Berth cluster CA", now_unix_s, CA_DAYS)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).map_err(failed("signing the CA"))?;
        Ok(Identity { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() })
    }

    /// Takes up an authority that was made before.
    ///
    /// # Errors
    /// When key or certificate can't be read.
    pub fn load(identity: &Identity) -> Result<Self, PkiError> {
        let key = KeyPair::from_pem(&identity.key_pem).map_err(failed("reading the CA's key"))?;
        let issuer =
            Issuer::from_ca_cert_pem(&identity.certificate_pem, key).map_err(failed("reading the CA"))?;
        Ok(Self { certificate_pem: identity.certificate_pem.clone(), issuer })
    }

    /// The CA's certificate in PEM.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// Makes the manager's key and certificate, good also for these extra names and addresses.
    ///
    /// # Errors
    /// When the library refuses.
    pub fn issue_manager(&self, extra: &[String], now_unix_s: i64) -> Result<Identity, PkiError> {
        let key = KeyPair::generate().map_err(failed("making the manager's key"))?;
        let mut params = params(MANAGER_NAME, now_unix_s, CERTIFICATE_DAYS)?;
        set_leaf(&mut params);
        params.subject_alt_names = vec![dns_name(MANAGER_NAME)?, dns_name("localhost")?];
        for name in extra {
            params.subject_alt_names.push(match name.parse() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => dns_name(name)?,
            });
        }
        let certificate =
            params.signed_by(&key, &self.issuer).map_err(failed("signing the manager's certificate"))?;
        Ok(Identity { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() })
    }

    /// Signs a host's request. Of what the request asks for, only the key is taken.
    ///
    /// # Errors
    /// When the request is not one.
    pub fn sign_host(&self, csr_pem: &str, host: &HostId, now_unix_s: i64) -> Result<String, PkiError> {
        let mut request = CertificateSigningRequestParams::from_pem(csr_pem)
            .map_err(failed("reading the signing request"))?;
        let mut params = params(&host_name(host), now_unix_s, CERTIFICATE_DAYS)?;
        set_leaf(&mut params);
        params.subject_alt_names = vec![dns_name(&host_name(host))?];
        request.params = params;
        let certificate = request.signed_by(&self.issuer).map_err(failed("signing a host's certificate"))?;
        Ok(certificate.pem())
    }
}

/// Makes a key and a signing request for it: what an agent sends to join. Gives (key PEM, request PEM).
///
/// # Errors
/// When the library refuses.
pub fn signing_request() -> Result<(String, String), PkiError> {
    let key = KeyPair::generate().map_err(failed("making a key"))?;
    let params = CertificateParams::new(Vec::<String>::new()).map_err(failed("making a signing request"))?;
    let request = params.serialize_request(&key).map_err(failed("making a signing request"))?;
    Ok((key.serialize_pem(), request.pem().map_err(failed("writing a signing request"))?))
}

/// The name of a host in its certificate.
pub fn host_name(host: &HostId) -> String {
    format!("{host}{HOST_SUFFIX}")
}

/// Who a certificate says its holder is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    /// The cluster's manager.
    Manager,
    /// A host.
    Host(HostId),
    /// Nobody: no certificate was shown.
    Anonymous,
}

/// Reads who a certificate (DER) is for. It must have been verified against the CA before.
///
/// # Errors
/// When it is not a certificate of this cluster's form.
pub fn peer_of(certificate: &[u8]) -> Result<Peer, PkiError> {
    let wrong = |detail: &str| PkiError::NotACertificate { detail: detail.to_owned() };
    let (_, parsed) =
        x509_parser::parse_x509_certificate(certificate).map_err(|error| wrong(&error.to_string()))?;
    let names = parsed.subject_alternative_name().map_err(|error| wrong(&error.to_string()))?;
    let names = names.ok_or_else(|| wrong("it has no alternative names"))?;
    for name in &names.value.general_names {
        let x509_parser::extensions::GeneralName::DNSName(name) = name else { continue };
        if *name == MANAGER_NAME {
            return Ok(Peer::Manager);
        }
        if let Some(host) = name.strip_suffix(HOST_SUFFIX).and_then(|id| HostId::from_str(id).ok()) {
            return Ok(Peer::Host(host));
        }
    }
    Err(wrong("none of its names is the manager's or a host's"))
}

/// When a certificate (PEM) ends, in seconds since 1970.
///
/// # Errors
/// When it is not a certificate.
pub fn expires_unix_s(certificate_pem: &str) -> Result<i64, PkiError> {
    let wrong = |detail: String| PkiError::NotACertificate { detail };
    let (_, pem) = x509_parser::pem::parse_x509_pem(certificate_pem.as_bytes())
        .map_err(|error| wrong(error.to_string()))?;
    let parsed = pem.parse_x509().map_err(|error| wrong(error.to_string()))?;
    Ok(parsed.validity().not_after.timestamp())
}

fn params(common_name: &str, now_unix_s: i64, days: i64) -> Result<CertificateParams, PkiError> {
    let mut params = CertificateParams::new(Vec::<String>::new()).map_err(failed("making a certificate"))?;
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    params.distinguished_name = name;
    params.not_before = instant(now_unix_s - BACKDATE_SECONDS)?;
    params.not_after = instant(now_unix_s + days * DAY_SECONDS)?;
    Ok(params)
}

fn instant(unix_seconds: i64) -> Result<time::OffsetDateTime, PkiError> {
    time::OffsetDateTime::from_unix_timestamp(unix_seconds).map_err(|_| PkiError::Time { unix_seconds })
}

fn set_leaf(params: &mut CertificateParams) {
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
}

fn dns_name(name: &str) -> Result<SanType, PkiError> {
    let name =
        rcgen::string::Ia5String::try_from(name).map_err(failed("writing a name into a certificate"))?;
    Ok(SanType::DnsName(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls_pki_types::CertificateDer;
    use rustls_pki_types::pem::PemObject;

    const NOW: i64 = 1_795_352_752;

    #[test]
    fn a_host_is_who_the_authority_says_and_not_who_it_says() {
        let authority = Authority::load(&Authority::create(NOW).expect("CA")).expect("own CA");
        let (_, request) = signing_request().expect("request");
        let host = HostId::from_entropy([1; 10]);
        let pem = authority.sign_host(&request, &host, NOW).expect("signed");
        let der = CertificateDer::from_pem_slice(pem.as_bytes()).expect("PEM");
        assert_eq!(peer_of(&der).expect("peer"), Peer::Host(host));
        assert_eq!(expires_unix_s(&pem).expect("time"), NOW + CERTIFICATE_DAYS * DAY_SECONDS);
        assert!(authority.sign_host("nonsense", &HostId::from_entropy([2; 10]), NOW).is_err());
        let ca = CertificateDer::from_pem_slice(authority.certificate_pem().as_bytes()).expect("PEM");
        assert!(peer_of(&ca).is_err(), "the CA is nobody");
    }
}
