//! CEF:0, with its two ways of escaping: `|` and `\` in the head, `=` and `\` and line breaks in the extension.

use std::fmt::Write as _;

use berth_api::manager::AuditRecord;

use super::{address_of, succeeded};
use crate::audit::{ALLOW, reading::time_of};

pub(super) fn text(record: &AuditRecord) -> String {
    let severity = if record.decision == ALLOW { 3 } else { 6 };
    let mut line = format!(
        "CEF:0|Berth|Berth|{}|{}|{}|{severity}|",
        head(env!("CARGO_PKG_VERSION")),
        head(&record.action),
        head(&format!("{} {}", record.decision, record.action)),
    );
    let (method, path) = record.request.split_once(' ').unwrap_or_default();
    let ended = time_of(record);
    put(&mut line, "rt", &ended.as_millis().to_string());
    put(&mut line, "start", &record.started_at.as_millis().to_string());
    put(&mut line, "end", &ended.as_millis().to_string());
    put(&mut line, "suser", &record.actor);
    put(&mut line, "suid", &record.actor_id);
    if let Some((ip, port)) = address_of(record) {
        // The format has fields of their own for the two families of addresses.
        if ip.contains(':') {
            put(&mut line, "c6a2Label", "Source IPv6 Address");
            put(&mut line, "c6a2", &ip);
        } else {
            put(&mut line, "src", &ip);
        }
        put(&mut line, "spt", &port.to_string());
    }
    put(&mut line, "requestMethod", method);
    put(&mut line, "request", path);
    put(&mut line, "act", &record.decision);
    put(&mut line, "reason", &record.reason);
    put(&mut line, "outcome", if succeeded(record) { "success" } else { "failure" });
    put(&mut line, "externalId", &record.sequence.map(|number| number.to_string()).unwrap_or_default());
    let labelled = [
        ("cs1", "resources", record.resources.join(",")),
        ("cs2", "requestId", record.request_id.clone()),
        ("cs3", "authenticationMethod", record.method.clone()),
        ("cs4", "policies", record.policies.join(",")),
        ("cs5", "operation", record.operation.as_ref().map(ToString::to_string).unwrap_or_default()),
        ("cs6", "result", record.result.clone()),
    ];
    for (key, label, value) in labelled {
        if !value.is_empty() {
            put(&mut line, &format!("{key}Label"), label);
            put(&mut line, key, &value);
        }
    }
    if let Some(status) = record.status {
        put(&mut line, "cn1Label", "status");
        put(&mut line, "cn1", &status.to_string());
    }
    line.truncate(line.trim_end_matches(' ').len());
    line
}

fn head(text: &str) -> String {
    let mut out = String::new();
    for character in text.chars() {
        match character {
            '\\' | '|' => out.extend(['\\', character]),
            // There is no way to write them in a head.
            other if other.is_control() => out.push(' '),
            other => out.push(other),
        }
    }
    out
}

fn put(line: &mut String, key: &str, value: &str) {
    if value.is_empty() {
        return;
    }
    let _ = write!(line, "{key}=");
    for character in value.chars() {
        match character {
            '\\' | '=' => line.extend(['\\', character]),
            '\n' => line.push_str("\\n"),
            '\r' => line.push_str("\\r"),
            other if other.is_control() => line.push(' '),
            other => line.push(other),
        }
    }
    line.push(' ');
}
