//! OCSF 1.3, class 6003 (API Activity), category 6 (Application Activity).

use berth_api::manager::AuditRecord;
use serde_json::{Value, json};

use super::{address_of, succeeded};
use crate::audit::{ALLOW, reading::time_of};

const CLASS: u32 = 6003;
const SCHEMA: &str = "1.3.0";

pub(super) fn text(record: &AuditRecord) -> String {
    let (method, path) = record.request.split_once(' ').unwrap_or_default();
    let activity = activity(method);
    let ended = time_of(record);
    let mut event = json!({
        "category_uid": 6,
        "category_name": "Application Activity",
        "class_uid": CLASS,
        "class_name": "API Activity",
        "activity_id": activity,
        "type_uid": CLASS * 100 + activity,
        "time": ended.as_millis(),
        "start_time": record.started_at.as_millis(),
        "end_time": ended.as_millis(),
        "duration": ended.millis_since(record.started_at),
        "severity_id": if record.decision == ALLOW { 1 } else { 3 },
        "status_id": if succeeded(record) { 1 } else { 2 },
        "status_code": record.status.map(|status| status.to_string()),
        "status_detail": record.reason,
        "metadata": {
            "version": SCHEMA,
            "uid": record.sequence.map(|sequence| sequence.to_string()),
            "sequence": record.sequence,
            "log_name": "audit",
            "product": { "name": "Berth", "vendor_name": "Berth", "version": env!("CARGO_PKG_VERSION") },
        },
        "actor": {
            "user": {
                "name": record.actor,
                "uid": record.actor_id,
                "type_id": if record.method == "system" { 3 } else { 1 },
            },
        },
        "api": {
            "operation": record.action,
            "request": { "uid": record.request_id },
            "response": { "code": record.status, "error": error(record) },
        },
        "resources": record.resources.iter().map(|label| resource(label)).collect::<Vec<_>>(),
        "unmapped": {
            "authentication_method": record.method,
            "decision": record.decision,
            "policies": record.policies,
            "policy_hash": record.policy_hash,
            "operation": record.operation,
            "interrupted": record.interrupted,
        },
    });
    if let Some((ip, port)) = address_of(record) {
        event["src_endpoint"] = json!({ "ip": ip, "port": port });
    }
    if !method.is_empty() {
        event["http_request"] = json!({ "http_method": method, "url": { "path": path } });
    }
    event.to_string()
}

fn activity(method: &str) -> u32 {
    match method {
        "POST" => 1,
        "GET" | "HEAD" => 2,
        "PUT" | "PATCH" => 3,
        "DELETE" => 4,
        _ => 99,
    }
}

fn error(record: &AuditRecord) -> Option<&str> {
    (!succeeded(record)).then_some(record.result.as_str())
}

fn resource(label: &str) -> Value {
    match label.split_once(':') {
        Some((kind, name)) => json!({ "type": kind, "name": name }),
        None => json!({ "type": label, "name": label }),
    }
}
