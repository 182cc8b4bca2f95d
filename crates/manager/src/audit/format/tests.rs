use berth_api::manager::AuditRecord;
use berth_model::Timestamp;
use serde_json::Value;

use super::Format;

fn record() -> AuditRecord {
    AuditRecord {
        sequence: Some(7),
        request_id: "req-1".to_owned(),
        actor: "eve|a=b\\c".to_owned(),
        actor_id: "user-1".to_owned(),
        method: "token".to_owned(),
        address: "192.0.2.1:40000".to_owned(),
        action: "vm.delete".to_owned(),
        request: "DELETE /v1/vms/a%0A|b=c".to_owned(),
        resources: vec!["vm:default/books".to_owned(), "image:debian".to_owned()],
        decision: "deny".to_owned(),
        reason: "no\npolicy=x | permits\\it".to_owned(),
        policies: vec!["p1".to_owned()],
        policy_hash: "abc".to_owned(),
        started_at: Timestamp::from_millis(1000),
        finished_at: Some(Timestamp::from_millis(1010)),
        status: Some(403),
        operation: None,
        result: "not-allowed".to_owned(),
        interrupted: false,
    }
}

#[test]
fn cef_escapes_its_head_and_its_extension_each_in_its_way() {
    let text = Format::Cef.text(&AuditRecord { action: "a|b\\c=d\ne".to_owned(), ..record() });
    assert!(!text.contains('\n'), "a line is a line");
    assert!(text.starts_with("CEF:0|Berth|Berth|"), "{text}");
    assert!(text.contains("|a\\|b\\\\c=d e|deny a\\|b\\\\c=d e|6|"), "{text}");
    assert!(text.contains("suser=eve|a\\=b\\\\c "), "{text}");
    assert!(text.contains("reason=no\\npolicy\\=x | permits\\\\it "), "{text}");
    assert!(text.contains("src=192.0.2.1 spt=40000 "), "{text}");
    assert!(text.contains("outcome=failure"), "{text}");
    let six = AuditRecord { address: "[2001:db8::1]:4".to_owned(), ..record() };
    assert!(Format::Cef.text(&six).contains("c6a2=2001:db8::1 spt=4 "));
}

#[test]
fn ocsf_is_an_api_activity_with_what_the_class_demands() {
    let event: Value = serde_json::from_str(&Format::Ocsf.text(&record())).expect("json");
    assert_eq!((event["class_uid"].as_u64(), event["type_uid"].as_u64()), (Some(6003), Some(600_304)));
    for field in
        ["activity_id", "actor", "api", "category_uid", "metadata", "severity_id", "src_endpoint", "time"]
    {
        assert!(!event[field].is_null(), "{field}");
    }
    assert_eq!(event["status_id"], 2);
    assert_eq!(event["resources"][0]["name"], "default/books");
    assert_eq!(event["api"]["response"]["error"], "not-allowed");
    assert_eq!((event["time"].as_u64(), event["duration"].as_u64()), (Some(1010), Some(10)));
}

#[test]
fn a_records_own_bytes_begin_with_its_number() {
    let text = Format::Jsonl.text(&record());
    assert!(text.starts_with("{\"sequence\":7,"), "{text}");
    assert_eq!(serde_json::from_str::<AuditRecord>(&text).expect("a record"), record());
}
