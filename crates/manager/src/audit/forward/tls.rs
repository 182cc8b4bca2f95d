//! TLS to servers that are not of this cluster: TLS 1.2 or 1.3, and the CAs of a file.

use std::path::Path;
use std::sync::Arc;

use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// Where Debian and its kin keep the CAs that the system trusts.
const SYSTEM_CA: &str = "/etc/ssl/certs/ca-certificates.crt";

/// A client that trusts the CAs of this file, and shows a certificate if there is one (chain, key).
pub(super) fn client(ca: Option<&Path>, identity: Option<(&Path, &Path)>) -> Result<ClientConfig, String> {
    let path = ca.unwrap_or_else(|| Path::new(SYSTEM_CA));
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        // The system's file holds some that are too old for us; those are not what we are shown.
        let _ = roots.add(certificate);
    }
    if roots.is_empty() {
        return Err(format!("{} has no certificate of a CA", path.display()));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots);
    let Some((chain, key)) = identity else { return Ok(builder.with_no_client_auth()) };
    let bytes = read(key)?;
    let private = PrivateKeyDer::from_pem_slice(&bytes)
        .map_err(|_| format!("{} has no private key in PEM", key.display()))?;
    builder.with_client_auth_cert(certificates(chain)?, private).map_err(|error| error.to_string())
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let bytes = read(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    found.map_err(|error| format!("{} is not PEM: {error}", path.display()))
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|error| format!("{} can't be read: {error}", path.display()))
}

/// Host and port of an address; the host without the brackets of IPv6.
pub(super) fn split_address(address: &str, port_default: Option<u16>) -> Result<(String, u16), String> {
    let wrong = || format!("'{address}' is not an address: expected host:port");
    let (host, port) = match address.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port.parse().map_err(|_| wrong())?),
        _ => (address, port_default.ok_or_else(wrong)?),
    };
    let host = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    if host.is_empty() { Err(wrong()) } else { Ok((host.to_owned(), port)) }
}
