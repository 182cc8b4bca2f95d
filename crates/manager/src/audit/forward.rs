//! Sending records on as they come, to a file, to syslog or to a webhook.
//!
//! Each destination has a task of its own that reads the log from where it stands, sends, and only then writes down
//! how far it is. So nothing is lost while a destination is full or away, or the manager dies; what was sent just
//! before is sent again (at least once). No request waits for any of it. A destination begins with the log's first
//! record.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use berth_api::manager::AuditRecord;
use berth_model::name::Name;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::format::Format;
use super::{Audit, AuditError, layout};
use crate::metrics::Metrics;

mod file;
mod syslog;
mod tls;
mod webhook;

/// How long one batch may take. A destination that takes longer is tried again.
const SEND_TIMEOUT: Duration = Duration::from_secs(60);
/// How long records are gathered, so that a quiet cluster doesn't send each by itself.
const GATHER: Duration = Duration::from_millis(300);
/// Pause after the first failure; it doubles with each further one.
const AGAIN_AFTER_MIN: Duration = Duration::from_millis(500);
/// Longest pause. Longer, and a destination that is back gets its records late.
const AGAIN_AFTER_MAX: Duration = Duration::from_secs(60);

/// What is set about the audit by the person who runs a manager.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuditConfig {
    /// The key in `pki/audit.key` was lost and a new one made: go on with it although the log was signed with another.
    /// To be set for one start.
    pub accept_new_key: bool,
    /// Where records are sent on to.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub forward: Vec<Destination>,
}

/// Where records are sent on to: exactly one of `file`, `syslog` and `webhook`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Destination {
    /// Its name; how far it has been served is kept under it.
    pub name: Name,
    /// How records are said; as they are, when nothing is said.
    #[serde(default)]
    pub format: Format,
    /// A file that lines are added to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// A syslog receiver.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub syslog: Option<SyslogDestination>,
    /// A web server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub webhook: Option<WebhookDestination>,
}

/// A syslog receiver: RFC 5424 over TLS (RFC 5425).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SyslogDestination {
    /// `host:port`; 6514 is the port for it.
    pub address: String,
    /// The CA certificates to trust, in PEM; the system's, when nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// The manager's own certificate chain for it, in PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<PathBuf>,
    /// That certificate's key, in PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,
}

/// A web server that takes JSON lines by POST.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WebhookDestination {
    /// `https://host[:port]/path`.
    pub url: String,
    /// The CA certificates to trust, in PEM; the system's, when nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// A file with a bearer token for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
}

/// A destination that can't be used as it is set.
#[derive(Debug, thiserror::Error)]
#[error("audit.forward '{name}': {what}")]
pub struct ForwardError {
    /// Which.
    pub name: String,
    /// What is wrong with it.
    pub what: String,
}

/// A batch that was not delivered.
#[derive(Debug, thiserror::Error)]
pub(super) enum SendError {
    #[error("{0}")]
    Refused(String),
    #[error("{doing}: {source}")]
    Io { doing: &'static str, source: std::io::Error },
    #[error("it took longer than {} s", SEND_TIMEOUT.as_secs())]
    TooSlow,
}

/// A record on its way, as it is and as its bytes.
pub(super) struct Parcel {
    record: AuditRecord,
    line: Bytes,
}

impl Parcel {
    fn text(&self, format: Format) -> Bytes {
        match format {
            Format::Jsonl => self.line.clone(),
            other => other.text(&self.record).into(),
        }
    }
}

enum Carrier {
    File(file::File),
    Syslog(syslog::Syslog),
    Webhook(webhook::Webhook),
}

/// A destination that can be sent to.
pub struct Forwarder {
    name: String,
    carrier: Carrier,
}

/// Reads what is set: files with certificates and tokens are read now, so that a mistake is told at the start.
///
/// # Errors
/// What is wrong with which of them.
pub fn prepare(config: &AuditConfig) -> Result<Vec<Forwarder>, ForwardError> {
    let mut names = BTreeSet::new();
    config
        .forward
        .iter()
        .map(|destination| {
            let name = destination.name.to_string();
            let wrong = |what: String| ForwardError { name: name.clone(), what };
            if !names.insert(&destination.name) {
                return Err(wrong("the name is there twice".to_owned()));
            }
            let format = destination.format;
            let carrier = match (&destination.file, &destination.syslog, &destination.webhook) {
                (Some(path), None, None) => Ok(Carrier::File(file::File::new(path.clone(), format))),
                (None, Some(syslog), None) => syslog::Syslog::new(syslog, format).map(Carrier::Syslog),
                (None, None, Some(webhook)) => webhook::Webhook::new(webhook, format).map(Carrier::Webhook),
                _ => Err("expected exactly one of 'file', 'syslog' and 'webhook'".to_owned()),
            };
            Ok(Forwarder { carrier: carrier.map_err(wrong)?, name })
        })
        .collect()
}

/// How far a destination has been served.
#[derive(Debug, Serialize, Deserialize)]
struct Cursor {
    /// The first record that it has not got.
    next: u64,
}

fn cursor_key(name: &str) -> String {
    format!("/audit/forward/{name}")
}

impl Forwarder {
    /// Sends for ever what comes into the log.
    pub async fn run(self, audit: Audit, metrics: Arc<Metrics>) {
        let mut growth = audit.growth();
        let (mut next, mut pause) = (None, AGAIN_AFTER_MIN);
        loop {
            growth.mark_unchanged();
            match self.round(&audit, &mut next).await {
                Ok(0) => {
                    pause = AGAIN_AFTER_MIN;
                    metrics.audit_forwarded(&self.name, 0);
                    if growth.changed().await.is_err() {
                        return;
                    }
                    tokio::time::sleep(GATHER).await;
                }
                Ok(left) => {
                    pause = AGAIN_AFTER_MIN;
                    metrics.audit_forwarded(&self.name, left);
                }
                Err(detail) => {
                    let lag = audit.size().saturating_sub(next.unwrap_or(0));
                    metrics.audit_not_forwarded(&self.name, lag);
                    tracing::warn!(
                        destination = self.name,
                        lag,
                        detail,
                        "audit records are not taken; trying again"
                    );
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(AGAIN_AFTER_MAX);
                }
            }
        }
    }

    /// Sends what comes next, if there is anything, and says how much is left.
    async fn round(&self, audit: &Audit, next: &mut Option<u64>) -> Result<u64, String> {
        let at = match *next {
            Some(at) => at,
            None => self.load(audit).await.map_err(|error| text(&error))?,
        };
        *next = Some(at);
        if at >= audit.size() {
            return Ok(0);
        }
        let lines = audit.lines_from(at).await.map_err(|error| text(&error))?;
        let parcels: Result<Vec<Parcel>, AuditError> =
            lines.into_iter().map(|line| Ok(Parcel { record: layout::record_of(&line)?, line })).collect();
        let parcels = parcels.map_err(|error| text(&error))?;
        let sending = async {
            match &self.carrier {
                Carrier::File(file) => file.send(&parcels).await,
                Carrier::Syslog(syslog) => syslog.send(&parcels).await,
                Carrier::Webhook(webhook) => webhook.send(&parcels).await,
            }
        };
        let sent = tokio::time::timeout(SEND_TIMEOUT, sending).await.unwrap_or(Err(SendError::TooSlow));
        sent.map_err(|error| error.to_string())?;
        let after = at + parcels.len() as u64;
        // Also when it can't be written down: then it is the next manager that sends it again.
        *next = Some(after);
        let cursor = serde_json::to_vec(&Cursor { next: after }).expect("a number");
        if let Err(error) = audit.store().put(&cursor_key(&self.name), cursor.into()).await {
            tracing::warn!(destination = self.name, %error, "how far a destination is can't be written down");
        }
        Ok(audit.size().saturating_sub(after))
    }

    async fn load(&self, audit: &Audit) -> Result<u64, AuditError> {
        let key = cursor_key(&self.name);
        let Some(entry) = audit.store().get(&key).await? else { return Ok(0) };
        let cursor: Cursor = layout::decode(&key, &entry.value)?;
        Ok(cursor.next)
    }
}

fn text(error: &AuditError) -> String {
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
    format!("{error}{cause}")
}

#[cfg(test)]
mod tests;
