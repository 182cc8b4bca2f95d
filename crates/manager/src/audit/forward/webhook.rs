//! A web server that takes lines by POST, over HTTPS; any answer in the two hundreds takes them.

use std::fmt;
use std::sync::Arc;

use berth_api::Transport;
use berth_api::transport::{TlsTransport, full};
use http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderName, HeaderValue};
use http::{Method, Request, Uri};
use rustls_pki_types::ServerName;

use super::{Format, Parcel, SendError, WebhookDestination, tls};

/// The numbers of the first and the last record, so that a receiver can drop what comes again.
const SEQUENCES: HeaderName = HeaderName::from_static("x-berth-audit-records");
const HTTPS_PORT: u16 = 443;

pub(super) struct Webhook {
    transport: TlsTransport,
    path: Uri,
    /// Marked as sensitive, so that it is in no debug output.
    authorization: Option<HeaderValue>,
    format: Format,
}

impl fmt::Debug for Webhook {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Webhook({})", self.transport.address())
    }
}

impl Webhook {
    pub fn new(set: &WebhookDestination, format: Format) -> Result<Self, String> {
        // The text is not repeated whole: some put a secret into it.
        let wrong = || "the url is not one: expected https://host[:port]/path".to_owned();
        let url: Uri = set.url.parse().map_err(|_| wrong())?;
        let authority = url.authority().filter(|_| url.scheme_str() == Some("https")).ok_or_else(wrong)?;
        if authority.as_str().contains('@') {
            return Err("the url has a user in it: put a token into token_file instead".to_owned());
        }
        let (host, port) = tls::split_address(authority.as_str(), Some(HTTPS_PORT))?;
        let name = ServerName::try_from(host.clone()).map_err(|_| wrong())?;
        let mut config = tls::client(set.ca.as_deref(), None)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let host = if host.contains(':') { format!("[{host}]") } else { host };
        let transport = TlsTransport::new(format!("{host}:{port}"), name, Arc::new(config));
        let path = url.path_and_query().map_or("/", |path| path.as_str()).parse().map_err(|_| wrong())?;
        let authorization = set.token_file.as_deref().map(|path| {
            let text = std::fs::read_to_string(path)
                .map_err(|error| format!("{} can't be read: {error}", path.display()))?;
            let mut value = HeaderValue::from_str(&format!("Bearer {}", text.trim()))
                .map_err(|_| format!("{} has no token that can be sent", path.display()))?;
            value.set_sensitive(true);
            Ok::<_, String>(value)
        });
        Ok(Self { transport, path, authorization: authorization.transpose()?, format })
    }

    pub async fn send(&self, parcels: &[Parcel]) -> Result<(), SendError> {
        let mut body = Vec::new();
        for parcel in parcels {
            body.extend_from_slice(&parcel.text(self.format));
            body.push(b'\n');
        }
        let mut request = Request::new(full(body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.path.clone();
        let headers = request.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(self.format.content_type()));
        let number = |parcel: Option<&Parcel>| parcel.and_then(|parcel| parcel.record.sequence).unwrap_or(0);
        let sequences = format!("{}-{}", number(parcels.first()), number(parcels.last()));
        if let Ok(value) = HeaderValue::from_str(&sequences) {
            headers.insert(SEQUENCES, value);
        }
        if let Some(value) = &self.authorization {
            headers.insert(AUTHORIZATION, value.clone());
        }
        let answer = self.transport.send(request).await.map_err(|error| {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
            SendError::Refused(format!("{error}{}", cause.unwrap_or_default()))
        })?;
        if answer.status().is_success() {
            return Ok(());
        }
        Err(SendError::Refused(format!("it answered {}", answer.status())))
    }
}
