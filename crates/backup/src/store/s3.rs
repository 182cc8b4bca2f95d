//! A repository in a bucket of S3 or of what speaks the same.
//!
//! An object appears when it is whole, so a write needs no second name.

use std::fmt::Display;
use std::io::Read;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use berth_model::repository::{Location, RepositoryKeys, S3Address, S3Keys};
use bytes::Bytes;
use rusty_s3::actions::ListObjectsV2;
use rusty_s3::{Bucket, Credentials, S3Action, UrlStyle};
use ureq::http::{Response, StatusCode};
use ureq::tls::{Certificate, RootCerts, TlsConfig};
use ureq::{Agent, Body};

use super::{Store, StoreError};

/// How long a signed request may be used. Shorter: a clock that is wrong by minutes, or a slow upload, is refused.
const SIGNED_FOR: Duration = Duration::from_secs(3600);
/// How long it may take until the service takes a connection, and until it begins to answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);
/// Longest object that is read, in bytes: packs have far less.
const OBJECT_BYTES_MAX: u64 = 1 << 30;
/// Most of a refusal that is repeated, in bytes.
const REFUSAL_BYTES_MAX: u64 = 4096;

pub(super) struct S3 {
    bucket: Bucket,
    credentials: Credentials,
    prefix: String,
    place: String,
    agent: Agent,
}

impl S3 {
    pub(super) fn new(address: &S3Address, keys: &RepositoryKeys) -> Result<Self, StoreError> {
        let place = Location::S3(address.clone()).to_string();
        let failed = |detail: &dyn Display| StoreError::failed(&place, "using it", detail);
        let pair = keys.key.as_ref().and_then(|key| S3Keys::parse(key.reveal()));
        let pair = pair.ok_or_else(|| failed(&format!("it needs a key file: expected {}", S3Keys::RULE)))?;
        // Amazon's buckets have host names of their own; what others have is one host, and the bucket in the path.
        let (endpoint, style) = match &address.endpoint {
            Some(endpoint) => (endpoint.clone(), UrlStyle::Path),
            None => (format!("https://s3.{}.amazonaws.com", address.region), UrlStyle::VirtualHost),
        };
        let endpoint = endpoint.parse().map_err(|error| failed(&error))?;
        let bucket = Bucket::new(endpoint, style, address.bucket.clone(), address.region.clone());
        let secret = pair.secret_access_key.reveal();
        Ok(Self {
            bucket: bucket.map_err(|error| failed(&error))?,
            credentials: Credentials::new(pair.access_key_id.as_str(), secret),
            prefix: address.prefix.clone(),
            agent: agent(keys.ca.as_deref()).map_err(|error| failed(&error))?,
            place,
        })
    }

    fn key(&self, path: &str) -> String {
        if self.prefix.is_empty() { path.to_owned() } else { format!("{}/{path}", self.prefix) }
    }

    /// What the service said, or why it is none that helps.
    fn answer(
        &self,
        what: &str,
        answer: Result<Response<Body>, ureq::Error>,
    ) -> Result<Response<Body>, StoreError> {
        // The address that was asked holds a signature: it is not repeated.
        let answer = answer.map_err(|error| StoreError::failed(&self.place, what, &error))?;
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        if status == StatusCode::NOT_FOUND {
            return Err(StoreError::Missing { place: self.place.clone(), what: what.to_owned() });
        }
        let mut text = String::new();
        // What is not text is no help.
        let _ = answer.into_body().into_reader().take(REFUSAL_BYTES_MAX).read_to_string(&mut text);
        let said = [element(&text, "Code"), element(&text, "Message")];
        let said: Vec<_> = said.into_iter().flatten().collect();
        let detail = format!("the service answers {status} {}", said.join(": "));
        let passes = status.is_server_error()
            || matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS);
        let error = if passes { StoreError::failed } else { StoreError::refused };
        Err(error(&self.place, what, &detail))
    }

    fn body(&self, what: &str, answer: Response<Body>) -> Result<Vec<u8>, StoreError> {
        let read = answer.into_body().into_with_config().limit(OBJECT_BYTES_MAX).read_to_vec();
        read.map_err(|error| StoreError::failed(&self.place, what, &error))
    }
}

/// What stands between `<name>` and its end in the service's refusal.
fn element<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let rest = &text[text.find(&format!("<{name}>"))? + name.len() + 2..];
    rest.split('<').next()
}

fn agent(ca: Option<&str>) -> Result<Agent, String> {
    let roots = match ca {
        None => RootCerts::WebPki,
        Some(pem) => {
            let found: Result<Vec<_>, _> = ureq::tls::parse_pem(pem.as_bytes())
                .filter_map(|item| match item {
                    Ok(ureq::tls::PemItem::Certificate(certificate)) => Some(Ok(certificate)),
                    Ok(_) => None,
                    Err(error) => Some(Err(error.to_string())),
                })
                .collect();
            let found: Vec<Certificate<'static>> = found?;
            if found.is_empty() {
                return Err("the file of who vouches for the service has no certificate".to_owned());
            }
            RootCerts::Specific(Arc::new(found))
        }
    };
    let config = Agent::config_builder()
        .http_status_as_error(false)
        .timeout_connect(Some(CONNECT_TIMEOUT))
        .timeout_recv_response(Some(ANSWER_TIMEOUT))
        .tls_config(TlsConfig::builder().root_certs(roots).build())
        .build();
    Ok(config.into())
}

impl Store for S3 {
    fn place(&self) -> &str {
        &self.place
    }

    /// A bucket is for its owner to make.
    fn create(&self) -> Result<(), StoreError> {
        Ok(())
    }

    fn list(&self, directory: &str) -> Result<Vec<(String, u64)>, StoreError> {
        let (what, prefix) = (format!("listing {directory}"), format!("{}/", self.key(directory)));
        let (mut found, mut next) = (Vec::new(), None);
        loop {
            let mut action = self.bucket.list_objects_v2(Some(&self.credentials));
            action.with_prefix(prefix.clone());
            if let Some(token) = next.take() {
                action.with_continuation_token(token);
            }
            let url = action.sign(SIGNED_FOR);
            let answer = self.answer(&what, self.agent.get(url.as_str()).call())?;
            let text = self.body(&what, answer)?;
            let page = ListObjectsV2::parse_response(&String::from_utf8_lossy(&text))
                .map_err(|error| StoreError::failed(&self.place, &what, &error))?;
            for object in page.contents {
                let name = object.key.rsplit('/').next().unwrap_or_default().to_owned();
                found.push((name, object.size));
            }
            match page.next_continuation_token {
                Some(token) => next = Some(token),
                None => return Ok(found),
            }
        }
    }

    fn length(&self, path: &str) -> Result<Option<u64>, StoreError> {
        // What is asked for so is short, and to a question for the head alone a refusal says nothing.
        match self.read(path, None) {
            Ok(bytes) => Ok(Some(bytes.len() as u64)),
            Err(StoreError::Missing { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn read(&self, path: &str, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        let (what, key) = (format!("reading {path}"), self.key(path));
        let url = self.bucket.get_object(Some(&self.credentials), &key).sign(SIGNED_FOR);
        let mut request = self.agent.get(url.as_str());
        if let Some(range) = range.as_ref().filter(|range| !range.is_empty()) {
            request = request.header("Range", format!("bytes={}-{}", range.start, range.end - 1));
        }
        let answer = self.answer(&what, request.call())?;
        let bytes = self.body(&what, answer)?;
        let wanted = range.map(|range| range.end.saturating_sub(range.start));
        if wanted.is_some_and(|wanted| wanted != bytes.len() as u64) {
            let detail = format!("{} bytes came, {} were asked for", bytes.len(), wanted.unwrap_or_default());
            return Err(StoreError::failed(&self.place, &what, &detail));
        }
        Ok(bytes.into())
    }

    fn write(&self, path: &str, parts: &[Bytes]) -> Result<(), StoreError> {
        let (what, key) = (format!("writing {path}"), self.key(path));
        let url = self.bucket.put_object(Some(&self.credentials), &key).sign(SIGNED_FOR);
        let body = parts.concat();
        self.answer(&what, self.agent.put(url.as_str()).send(&body[..])).map(drop)
    }

    fn remove(&self, path: &str) -> Result<(), StoreError> {
        let (what, key) = (format!("removing {path}"), self.key(path));
        let url = self.bucket.delete_object(Some(&self.credentials), &key).sign(SIGNED_FOR);
        match self.answer(&what, self.agent.delete(url.as_str()).call()) {
            Ok(_) | Err(StoreError::Missing { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
