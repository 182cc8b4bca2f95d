//! How records are said to other systems: as they are, as OCSF, as CEF.

use berth_api::manager::AuditRecord;
use serde::{Deserialize, Serialize};

mod cef;
mod ocsf;

/// A format of records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The records' own bytes, as they are hashed.
    #[default]
    Jsonl,
    /// The Open Cybersecurity Schema Framework's API Activity (class 6003), a JSON object a line.
    Ocsf,
    /// The Common Event Format, version 0, a line each.
    Cef,
}

impl Format {
    /// What it is called; none: there is no such format.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "jsonl" => Some(Self::Jsonl),
            "ocsf" => Some(Self::Ocsf),
            "cef" => Some(Self::Cef),
            _ => None,
        }
    }

    /// The content type of many of them.
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Jsonl | Self::Ocsf => "application/x-ndjson",
            Self::Cef => "text/plain; charset=utf-8",
        }
    }

    /// A record in a line, without its line break.
    pub fn text(self, record: &AuditRecord) -> String {
        match self {
            Self::Jsonl => serde_json::to_string(record).expect("records are plain data"),
            Self::Ocsf => ocsf::text(record),
            Self::Cef => cef::text(record),
        }
    }
}

/// Address and port of a record.
fn address_of(record: &AuditRecord) -> Option<(String, u16)> {
    let address: std::net::SocketAddr = record.address.parse().ok()?;
    Some((address.ip().to_string(), address.port()))
}

/// Whether what was asked for was done.
fn succeeded(record: &AuditRecord) -> bool {
    record.decision == super::ALLOW && record.status.is_none_or(|status| status < 400) && !record.interrupted
}

#[cfg(test)]
mod tests;
