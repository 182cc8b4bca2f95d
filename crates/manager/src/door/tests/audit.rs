//! The audit as it is asked for: records, proofs, exports; and that no secret is ever in it.

use axum::body::Body;
use berth_api::manager::AuditRecord;
use berth_api::pki::Peer;
use berth_tlog::export::{Question, verify};
use berth_tlog::{Checkpoint, Hash, VerifyingKey, proof};
use http::Request;
use serde_json::{Value, json};

use super::support::{Fixture, Got};

fn text(got: &Got) -> String {
    String::from_utf8(got.body.to_vec()).expect("text")
}

async fn key(fixture: &Fixture) -> VerifyingKey {
    let shown = fixture.get("/v1/audit/key").await.json();
    shown["key"].as_str().expect("a key").parse().expect("a key")
}

#[tokio::test]
async fn a_record_says_who_how_from_where_what_why_and_what_came_of_it() {
    let fixture = Fixture::new().await;
    fixture.get("/v1/vms/default%2Fbooks").await;
    assert_eq!(fixture.get("/v1/vms/default%2Fbooks?token=s3cret").await.status, 400);
    let wish = json!({"segment": "default", "name": "new", "image": "windows"});
    assert_eq!(fixture.admin("POST", "/v1/vms", wish).await.status, 404);
    let path = "/v1/vms/default%2Fbooks";
    assert_eq!(fixture.call("DELETE", path, Some(&fixture.nobody), "").await.status, 403);
    let records = fixture.audit().await;
    let of = |request: &str| -> AuditRecord {
        records.iter().find(|record| record.request.starts_with(request)).expect("a record").clone()
    };
    let seen = of("GET /v1/vms/default");
    assert!(records.iter().all(|record| !record.request.contains("s3cret")), "never the query");
    assert_eq!(
        (seen.actor.as_str(), seen.method.as_str(), seen.result.as_str()),
        ("admin", "first-token", "ok")
    );
    assert!(seen.actor_id.starts_with("user-") && seen.request_id.starts_with("req-"), "{seen:?}");
    assert_eq!((seen.address.as_str(), seen.action.as_str()), ("192.0.2.1:40000", "vm.view"));
    assert_eq!(seen.resources, ["vm:default/books"]);
    assert!(seen.policies.len() == 1 && seen.policies[0].starts_with("g-"), "the grant: {:?}", seen.policies);
    assert_eq!(seen.policy_hash.len(), 64, "{}", seen.policy_hash);
    let further = of("POST /v1/vms");
    assert_eq!(further.resources, ["segment:default", "image:windows"], "everything that it names");
    assert_eq!((further.result.as_str(), further.status), ("not-found", Some(404)));
    let denied = of("DELETE /v1/vms");
    assert_eq!((denied.decision.as_str(), denied.result.as_str()), ("deny", "not-allowed"));
    assert!(denied.finished_at.is_some() && denied.policies.is_empty());
}

#[tokio::test]
async fn the_log_proves_itself_over_the_api() {
    let fixture = Fixture::new().await;
    for _ in 0..20 {
        fixture.get("/healthz").await;
    }
    fixture.audit().await;
    let key = key(&fixture).await;
    let checkpoint = async || {
        let shown = fixture.get("/v1/audit/checkpoint").await.json();
        Checkpoint::open(shown["note"].as_str().expect("a note"), std::slice::from_ref(&key)).expect("signed")
    };
    let old = checkpoint().await;
    for _ in 0..20 {
        fixture.get("/healthz").await;
    }
    fixture.audit().await;
    let new = checkpoint().await;
    assert!(new.size > old.size);
    let hashes = |proof: &Value| -> Vec<Hash> {
        let steps = proof["proof"].as_array().expect("steps");
        steps.iter().map(|step| step.as_str().expect("a hash").parse().expect("a hash")).collect()
    };
    let path = format!("/v1/audit/proof/inclusion?sequence=7&size={}", new.size);
    let shown = fixture.get(&path).await.json();
    let leaf = Hash::leaf(shown["leaf"].as_str().expect("a leaf").as_bytes());
    proof::verify_inclusion(&leaf, 7, new.size, &new.root, &hashes(&shown)).expect("it is in the log");
    let path = format!("/v1/audit/proof/consistency?from={}&to={}", old.size, new.size);
    let shown = fixture.get(&path).await.json();
    proof::verify_consistency(old.size, new.size, &old.root, &new.root, &hashes(&shown)).expect("it grew");
    for (path, field) in [
        ("inclusion", "sequence"),
        ("inclusion?sequence=99999", "sequence"),
        ("inclusion?sequence=1&size=99999", "size"),
        ("inclusion?sequence=-1", "sequence"),
        ("consistency", "from"),
        ("consistency?from=0", "from"),
        ("consistency?from=5&to=4", "from"),
        ("consistency?from=1&to=99999", "to"),
    ] {
        let got = fixture.get(&format!("/v1/audit/proof/{path}")).await;
        assert_eq!((got.status.as_u16(), got.problem().1.as_str()), (400, field), "{path}: {}", got.json());
    }
}

#[tokio::test]
async fn the_export_can_be_verified_and_other_formats_are_offered() {
    let fixture = Fixture::new().await;
    for _ in 0..300 {
        fixture.get("/healthz").await;
    }
    fixture.audit().await;
    let key = key(&fixture).await;
    let got = fixture.get("/v1/audit/export").await;
    assert_eq!(got.headers["content-type"], "application/x-ndjson");
    let found = verify(&got.body[..], &Question { keys: vec![key], known: None }).expect("as it was logged");
    assert!(found.is_whole() && found.end > 300);
    let ocsf = fixture.get("/v1/audit/export?format=ocsf").await;
    let events: Vec<Value> =
        text(&ocsf).lines().map(|line| serde_json::from_str(line).expect("json")).collect();
    assert!(events.len() > 300 && events.iter().all(|event| event["class_uid"] == 6003));
    let cef = fixture.get("/v1/audit/export?format=cef").await;
    assert!(text(&cef).lines().all(|line| line.starts_with("CEF:0|Berth|")));
    for (path, field) in
        [("export?format=xml", "format"), ("export?since=yesterday", "since"), ("export?until=1", "until")]
    {
        let got = fixture.get(&format!("/v1/audit/{path}")).await;
        assert_eq!((got.status.as_u16(), got.problem().1.as_str()), (400, field), "{}", got.json());
    }
    let got = fixture.get("/v1/audit?decision=perhaps").await;
    assert_eq!((got.status.as_u16(), got.problem().1.as_str()), (400, "decision"));
}

#[tokio::test]
async fn filters_find_what_they_name() {
    let fixture = Fixture::new().await;
    fixture.get("/v1/vms/default%2Fbooks").await;
    fixture.call("GET", "/v1/hosts/host-1", Some(&fixture.nobody), "").await;
    fixture.audit().await;
    let count = async |query: &str| {
        let page = fixture.get(&format!("/v1/audit?{query}")).await.json();
        page["items"].as_array().expect("a list").len()
    };
    assert_eq!(count("actor=nobody").await, 1);
    assert_eq!(count("decision=deny").await, 1);
    assert_eq!(count("resource=default/books").await, 1);
    assert_eq!(count("resource=vm:default/books&action=vm").await, 1);
    assert_eq!(count("action=host.view").await, 1);
    assert_eq!(count("since=2999-01-01T00:00:00Z").await, 0);
    assert_eq!(count("until=1999-01-01T00:00:00Z").await, 0);
}

#[tokio::test]
async fn no_secret_is_in_the_log_nor_in_anything_that_it_is_exported_as() {
    let fixture = Fixture::new().await;
    let mut secrets = vec![fixture.admin.clone(), fixture.nobody.clone()];
    let made = fixture.admin("POST", "/v1/users", json!({"name": "eve"})).await;
    assert_eq!(made.status, 200, "{}", made.json());
    let made = fixture.admin("POST", "/v1/tokens", json!({"user": "eve", "note": "x"})).await.json();
    secrets.push(made["secret"].as_str().expect("a secret").to_owned());
    let made = fixture.admin("POST", "/v1/join-tokens", json!({})).await.json();
    secrets.push(made["token"].as_str().expect("a token").to_owned());
    // Used, misused, put where they don't belong, and with a slip in them.
    let eve = secrets[2].clone();
    let slipped = format!("{eve}x");
    secrets.push(slipped.clone());
    fixture.call("GET", "/v1/whoami", Some(&eve), "").await;
    fixture.call("GET", "/v1/whoami", Some(&slipped), "").await;
    fixture.get(&format!("/v1/vms?cursor={eve}&token={eve}")).await;
    fixture.call("GET", &format!("/v1/audit?actor={eve}"), Some(&eve), "").await;
    let wish = json!({"token": secrets[3], "name": "box", "address": "192.0.2.1:1", "csr_pem": eve});
    fixture.call("POST", "/v1/enrol", None, &wish.to_string()).await;
    fixture.admin("POST", "/v1/segments", json!({"name": "ok", "password": eve})).await;
    let request = Request::builder().uri("/v1/whoami").header("authorization", format!("Basic {eve}"));
    fixture.send(request.body(Body::empty()).expect("a request"), Peer::Anonymous).await;
    fixture.audit().await;

    let mut everything = Vec::new();
    for path in ["export", "export?format=ocsf", "export?format=cef", "checkpoint", "key"] {
        everything.push(text(&fixture.get(&format!("/v1/audit/{path}")).await));
    }
    everything.push(text(&fixture.get("/v1/audit?limit=5000").await));
    let stored = berth_store::Store::list(&*fixture.store, berth_store::Query::prefix("/audit/")).await;
    for entry in stored.expect("a store").entries {
        everything.push(String::from_utf8_lossy(&entry.value).into_owned());
    }
    assert!(everything[0].lines().count() > 12);
    for whole in &secrets {
        // Also not the part that counts, by itself: the longest, for a secret may have these two letters in itself.
        let part = whole.split(['_', '-']).max_by_key(|part| part.len()).expect("a part");
        for said in &everything {
            assert!(!said.contains(whole.as_str()) && !said.contains(part), "a secret is in: {said}");
        }
    }
    for said in &everything {
        assert!(!said.contains("PRIVATE KEY"), "{said}");
    }
}
