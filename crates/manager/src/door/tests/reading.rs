//! Lists, entity tags, events and what is about the manager itself.

use berth_model::operation::{Operation, OperationKind, OperationState, Progress};
use berth_model::{OperationId, ProblemCode};
use serde_json::{Value, json};

use super::support::{Fixture, NOW};
use crate::operations::OperationRow;
use crate::records::Transaction;

fn names(page: &Value) -> Vec<String> {
    let items = page["items"].as_array().expect("a list");
    items.iter().map(|item| item["name"].as_str().expect("a name").to_owned()).collect()
}

#[tokio::test]
async fn pages_of_vms_put_together_are_all_vms_also_while_others_come() {
    let fixture = Fixture::new().await;
    fixture.add_vms(10..=30).await;
    let (mut seen, mut path, mut coming) = (Vec::new(), "/v1/vms?limit=4".to_owned(), 31);
    loop {
        let page = fixture.get(&path).await.json();
        seen.extend(names(&page));
        let Some(cursor) = page["next_cursor"].as_str() else { break };
        path = format!("/v1/vms?limit=4&cursor={cursor}");
        // One behind each page, and one before it.
        fixture.add_vms(coming..=coming).await;
        fixture.add_vms(coming - 29..=coming - 29).await;
        coming += 1;
    }
    for number in 10..=30 {
        let name = format!("vm-{number:04}");
        assert_eq!(seen.iter().filter(|seen| **seen == name).count(), 1, "{name} in {seen:?}");
    }
    assert_eq!(seen[0], "books");
}

#[tokio::test]
async fn lists_are_filtered_by_segment_and_host() {
    let fixture = Fixture::new().await;
    assert_eq!(fixture.admin("POST", "/v1/segments", json!({"name": "other"})).await.status, 200);
    for (query, count) in [("segment=default", 1), ("segment=other", 0), ("host=host-1&segment=default", 1)] {
        let page = fixture.get(&format!("/v1/vms?{query}")).await.json();
        assert_eq!(page["items"].as_array().map(Vec::len), Some(count), "{query}");
    }
}

#[tokio::test]
async fn a_change_with_an_old_tag_changes_nothing() {
    let fixture = Fixture::new().await;
    let books = "/v1/vms/default%2Fbooks";
    let old = fixture.get(books).await.etag();
    let change = |tag: Option<String>, wish: Value| {
        let mut request = http::Request::builder().method("PATCH").uri(books);
        if let Some(tag) = tag {
            request = request.header("if-match", tag);
        }
        let request = request.header("authorization", format!("Bearer {}", fixture.admin));
        let request = request.body(axum::body::Body::from(wish.to_string())).expect("a request");
        fixture.send(request, berth_api::pki::Peer::Anonymous)
    };
    let got = change(Some(old.clone()), json!({"protected": true})).await;
    assert_eq!((got.status.as_u16(), got.json()["spec"]["protected"].as_bool()), (200, Some(true)));
    assert_ne!(got.etag(), old);
    let got = change(Some(old.clone()), json!({"protected": false})).await;
    assert_eq!((got.status.as_u16(), got.problem().0.as_str()), (412, "changed"));
    assert_eq!(fixture.get(books).await.json()["spec"]["protected"], true);
    let got = change(Some("nonsense".to_owned()), json!({})).await;
    assert_eq!((got.status.as_u16(), got.problem().1.as_str()), (400, "If-Match"));
    assert_eq!(change(Some("*".to_owned()), json!({"ready_timeout_s": 9})).await.status, 200);
    assert_eq!(change(None, json!({"ready_timeout_s": 8})).await.json()["spec"]["ready_timeout_s"], 8);
}

#[tokio::test]
async fn a_dry_run_changes_nothing() {
    let fixture = Fixture::new().await;
    let books = "/v1/vms/default%2Fbooks";
    let got = fixture.admin("PATCH", &format!("{books}?dry_run=true"), json!({"protected": true})).await;
    assert_eq!(got.json()["spec"]["protected"], true, "what it would be");
    assert_eq!(fixture.get(books).await.json()["spec"]["protected"], false);
}

#[tokio::test]
async fn the_audit_is_read_newest_first_and_in_pages() {
    let fixture = Fixture::new().await;
    for _ in 0..10 {
        fixture.get("/healthz").await;
    }
    fixture.audit().await;
    let first = fixture.get("/v1/audit?limit=3").await.json();
    let sequences = |page: &Value| -> Vec<u64> {
        let items = page["items"].as_array().expect("a list");
        items.iter().map(|item| item["sequence"].as_u64().expect("a number")).collect()
    };
    let shown = sequences(&first);
    assert_eq!(shown, (shown[2]..=shown[0]).rev().collect::<Vec<_>>());
    let cursor = first["next_cursor"].as_str().expect("more");
    let second = fixture.get(&format!("/v1/audit?limit=3&cursor={cursor}")).await.json();
    assert_eq!(sequences(&second)[0], shown[2] - 1);
    let all = fixture.get("/v1/audit").await.json();
    assert_eq!(sequences(&all).last(), Some(&0));
    assert!(all["next_cursor"].is_null());
}

#[tokio::test]
async fn events_of_an_operation_that_is_over_are_its_last_state_and_the_end() {
    let fixture = Fixture::new().await;
    let operation = Operation {
        id: OperationId::from_entropy([5; 10]),
        kind: OperationKind::VmStop,
        vm: None,
        image: None,
        segment: None,
        subject: "default/books".to_owned(),
        actor: "admin".to_owned(),
        state: OperationState::Failed,
        progress: Progress::default(),
        steps_done: Vec::new(),
        cancel_requested: false,
        result: None,
        problem: Some(berth_model::Problem::new(ProblemCode::Guest, "it did not listen")),
        created_at: NOW,
        finished_at: Some(NOW),
    };
    let stop = crate::operations::OperationRequest::VmStop { vm: berth_model::VmId::from_entropy([1; 10]) };
    let row = OperationRow {
        operation: operation.clone(),
        request: (&stop).into(),
        record: Value::Null,
        undo_left: 0,
        attempt: 0,
    };
    let mut transaction = Transaction::new();
    transaction.create(&row);
    fixture.cluster().records.commit(transaction).await.expect("recorded");
    let path = format!("/v1/operations/{}", operation.id);
    let got = fixture.get(&format!("{path}/events")).await;
    assert_eq!(got.headers["content-type"], "text/event-stream");
    let text = String::from_utf8(got.body.to_vec()).expect("text");
    let data = text.strip_prefix("data: ").and_then(|rest| rest.strip_suffix("\n\n")).expect("one event");
    assert_eq!(serde_json::from_str::<Operation>(data).expect("an operation"), operation);
    let record = fixture.audit().await.pop().expect("a record");
    assert_eq!((record.status, record.finished_at.is_some()), (Some(200), true), "closed with the stream");
    let waited = fixture.get(&format!("{path}/wait?wait_ms=50000")).await.json();
    assert_eq!(waited["state"], "failed", "nothing to wait for");
    let got = fixture.admin("POST", &format!("{path}/cancel"), json!(null)).await;
    assert_eq!(got.problem().0, "wrong-state");
    assert_eq!(
        fixture.get("/v1/operations?kind=vm.stop").await.json()["items"].as_array().map(Vec::len),
        Some(1)
    );
    assert_eq!(
        fixture.get("/v1/operations?active=true").await.json()["items"].as_array().map(Vec::len),
        Some(0)
    );
}

#[tokio::test]
async fn metrics_count_vms_hosts_operations_and_requests() {
    let fixture = Fixture::new().await;
    fixture.get("/v1/vms").await;
    let got = fixture.get("/metrics").await;
    let text = String::from_utf8(got.body.to_vec()).expect("text");
    for line in [
        "berth_vms{state=\"running\"} 1",
        "berth_vms{state=\"unknown\"} 0",
        "berth_hosts{state=\"online\"} 1",
        "berth_hosts{state=\"offline\"} 0",
        "berth_operations_total{kind=\"vm.migrate\",result=\"succeeded\"} 0",
        "berth_http_requests_total{endpoint=\"VmList\",status=\"200\"} 1",
        "# TYPE berth_migration_blackout_seconds histogram",
        "# TYPE berth_snapshot_paused_seconds histogram",
        "# TYPE berth_operation_duration_seconds histogram",
    ] {
        assert!(text.lines().any(|shown| shown == line), "{line} in\n{text}");
    }
}

#[tokio::test]
async fn the_contract_is_served_to_everybody() {
    let fixture = Fixture::new().await;
    let got = fixture.call("GET", "/v1/openapi.json", None, "").await;
    assert_eq!(got.json()["info"]["title"], "Berth manager");
    let got = fixture.call("GET", "/healthz", None, "").await;
    assert_eq!(got.json()["status"], "ok");
}

#[tokio::test]
async fn can_i_tells_the_policy_that_permits_it() {
    let fixture = Fixture::new().await;
    let got = fixture.get("/v1/can-i?action=snapshot.restore&resource=default/books").await.json();
    assert_eq!(got["allowed"], true);
    assert!(
        got["reason"].as_str().is_some_and(|reason| reason.contains("team administrators, role admin")),
        "{got}"
    );
    let path = "/v1/can-i?action=vm.view&resource=default/books";
    let got = fixture.call("GET", path, Some(&fixture.nobody), "").await;
    assert_eq!((got.status.as_u16(), got.json()["allowed"].as_bool()), (200, Some(false)));
}

#[tokio::test]
async fn a_segment_is_made_once_and_deleted_when_empty() {
    let fixture = Fixture::new().await;
    assert_eq!(fixture.admin("POST", "/v1/segments", json!({"name": "team"})).await.status, 200);
    let again = fixture.admin("POST", "/v1/segments", json!({"name": "team"})).await;
    assert_eq!((again.status.as_u16(), again.problem().0.as_str()), (409, "already-exists"));
    assert_eq!(fixture.admin("DELETE", "/v1/segments/team", json!(null)).await.status, 200);
    let full = fixture.admin("DELETE", "/v1/segments/default", json!(null)).await;
    assert_eq!((full.status.as_u16(), full.problem().0.as_str()), (409, "protected"));
}

#[tokio::test]
async fn a_host_with_vms_stays() {
    let fixture = Fixture::new().await;
    let got = fixture.admin("DELETE", "/v1/hosts/host-1", json!(null)).await;
    assert_eq!((got.status.as_u16(), got.problem().0.as_str()), (409, "protected"), "{}", got.json());
}

#[tokio::test]
async fn every_answer_carries_its_requests_id_and_problems_repeat_it() {
    let fixture = Fixture::new().await;
    let got = fixture.get("/v1/vms/default%2Fghost").await;
    let id = got.headers["x-request-id"].to_str().expect("text").to_owned();
    assert_eq!(got.json()["request_id"].as_str(), Some(id.as_str()));
    assert!(fixture.audit().await.iter().any(|record| record.request_id == id));
}
