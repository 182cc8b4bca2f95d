//! TLS for both contracts: TLS 1.3, the cluster's own CA and no other.

use std::sync::Arc;

use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

use crate::join::Fingerprint;
use crate::pki::Identity;

/// Keys or certificates that TLS can't be set up with.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Text that should have been PEM.
    #[error("{what} is not PEM of what it should be")]
    Pem {
        /// Which of them.
        what: &'static str,
        /// Why.
        #[source]
        source: rustls_pki_types::pem::Error,
    },
    /// Key and certificate don't fit, or the like.
    #[error("TLS can't be set up")]
    Setup {
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// A name that can't be in a certificate.
    #[error("'{name}' is not a server name")]
    Name {
        /// The name.
        name: String,
    },
}

/// Whether callers must show a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientCertificates {
    /// Agents: only the cluster's own may talk to them.
    Required,
    /// The manager: users have tokens, hosts certificates.
    Optional,
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn roots(ca_pem: &str) -> Result<Arc<RootCertStore>, TlsError> {
    let mut store = RootCertStore::empty();
    let ca = CertificateDer::from_pem_slice(ca_pem.as_bytes())
        .map_err(|source| TlsError::Pem { what: "the CA's certificate", source })?;
    store.add(ca).map_err(|source| TlsError::Setup { source })?;
    Ok(Arc::new(store))
}

fn chain(identity: &Identity) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
    let certificates: Result<Vec<_>, _> =
        CertificateDer::pem_slice_iter(identity.certificate_pem.as_bytes()).collect();
    let certificates = certificates.map_err(|source| TlsError::Pem { what: "the certificate", source })?;
    let key = PrivateKeyDer::from_pem_slice(identity.key_pem.as_bytes())
        .map_err(|source| TlsError::Pem { what: "the private key", source })?;
    Ok((certificates, key))
}

/// What a server needs.
///
/// # Errors
/// When key, certificate or CA are not usable.
pub fn server_config(
    ca_pem: &str,
    identity: &Identity,
    clients: ClientCertificates,
) -> Result<Arc<rustls::ServerConfig>, TlsError> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(ca_pem)?, provider());
    let verifier = match clients {
        ClientCertificates::Required => verifier.build(),
        ClientCertificates::Optional => verifier.allow_unauthenticated().build(),
    };
    let verifier =
        verifier.map_err(|error| TlsError::Setup { source: rustls::Error::General(error.to_string()) })?;
    let (certificates, key) = chain(identity)?;
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|source| TlsError::Setup { source })?
        .with_client_cert_verifier(verifier)
        .with_single_cert(certificates, key)
        .map_err(|source| TlsError::Setup { source })?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// What a client needs; without an identity it shows no certificate.
///
/// # Errors
/// When key, certificate or CA are not usable.
pub fn client_config(
    ca_pem: &str,
    identity: Option<&Identity>,
) -> Result<Arc<rustls::ClientConfig>, TlsError> {
    let builder = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|source| TlsError::Setup { source })?
        .with_root_certificates(roots(ca_pem)?);
    let mut config = match identity {
        Some(identity) => {
            let (certificates, key) = chain(identity)?;
            builder.with_client_auth_cert(certificates, key).map_err(|source| TlsError::Setup { source })?
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// What a client needs that knows only the CA's fingerprint: the other side must show a certificate chain with exactly
/// that CA in it, and be certified by it. Nothing else is trusted, and no certificate is shown.
///
/// # Errors
/// When TLS can't be set up.
pub fn pinned_client_config(ca: Fingerprint) -> Result<Arc<rustls::ClientConfig>, TlsError> {
    let mut config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|source| TlsError::Setup { source })?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(PinnedVerifier { ca, provider: provider() }))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Trusts the one CA with this fingerprint, taken from the chain that the other side shows.
#[derive(Debug)]
struct PinnedVerifier {
    ca: Fingerprint,
    provider: Arc<rustls::crypto::CryptoProvider>,
}

impl ServerCertVerifier for PinnedVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let unknown = || rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        let shown = intermediates.iter().find(|shown| Fingerprint::of_der(shown) == self.ca);
        let mut roots = RootCertStore::empty();
        roots.add(shown.ok_or_else(unknown)?.clone().into_owned())?;
        let verifier =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.provider))
                .build()
                .map_err(|error| rustls::Error::General(error.to_string()))?;
        verifier.verify_server_cert(end_entity, &[], server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not offered".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// A name to expect in the other side's certificate.
///
/// # Errors
/// When it can't be a name.
pub fn server_name(name: &str) -> Result<ServerName<'static>, TlsError> {
    ServerName::try_from(name.to_owned()).map_err(|_| TlsError::Name { name: name.to_owned() })
}
