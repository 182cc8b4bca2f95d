//! Machines that join, and hosts that renew.

use std::time::Duration;

use axum::body::Body;
use berth_api::join::{Fingerprint, JoinSecret};
use berth_api::pki::{self, Peer};
use berth_model::HostId;
use http::Request;
use serde_json::{Value, json};

use super::support::{Fixture, Got};

async fn join_token(fixture: &Fixture) -> String {
    let made = fixture.admin("POST", "/v1/join-tokens", json!({"expires_s": 60})).await;
    assert_eq!(made.status, 200, "{}", made.json());
    made.json()["token"].as_str().expect("a token").to_owned()
}

fn wish(token: &str, name: &str, csr: &str) -> Value {
    json!({"token": token, "name": name, "address": "192.0.2.20:8444", "csr_pem": csr})
}

async fn enrol(fixture: &Fixture, wish: &Value) -> Got {
    fixture.call("POST", "/v1/enrol", None, &wish.to_string()).await
}

fn request() -> String {
    pki::signing_request().expect("a request").1
}

fn unauthenticated(got: &Got) {
    assert_eq!((got.status.as_u16(), got.problem().0.as_str()), (401, "unauthenticated"), "{}", got.json());
}

#[tokio::test]
async fn a_join_token_admits_one_machine_and_no_second() {
    let fixture = Fixture::new().await;
    let token = join_token(&fixture).await;
    let got = enrol(&fixture, &wish(&token, "new", &request())).await;
    assert_eq!(got.status, 200, "{}", got.json());
    let reply = got.json();
    let host: HostId = reply["host"].as_str().expect("an id").parse().expect("a host's id");
    let shown = fixture.get("/v1/hosts/new").await.json();
    assert_eq!((shown["id"].as_str(), shown["state"].as_str()), (Some(host.as_str()), Some("offline")));
    let record =
        fixture.audit().await.into_iter().find(|record| record.request.contains("enrol")).expect("one");
    assert_eq!((record.actor.as_str(), record.status), ("join-token", Some(200)));

    unauthenticated(&enrol(&fixture, &wish(&token, "other", &request())).await);
    assert_eq!(fixture.get("/v1/hosts/other").await.status, 404, "nothing half done");
}

#[tokio::test]
async fn a_machine_whose_answer_was_lost_may_ask_again() {
    let fixture = Fixture::new().await;
    let wish = wish(&join_token(&fixture).await, "new", &request());
    let (first, second) = (enrol(&fixture, &wish).await, enrol(&fixture, &wish).await);
    assert_eq!((first.status.as_u16(), second.status.as_u16()), (200, 200));
    assert_eq!(first.json()["host"], second.json()["host"]);
}

#[tokio::test]
async fn two_machines_with_one_token_at_once_get_one_place() {
    let fixture = Fixture::new().await;
    let token = join_token(&fixture).await;
    let (one, two) = (wish(&token, "one", &request()), wish(&token, "two", &request()));
    let (one, two) = tokio::join!(enrol(&fixture, &one), enrol(&fixture, &two));
    let mut statuses = [one.status.as_u16(), two.status.as_u16()];
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 401]);
}

#[tokio::test]
async fn a_token_that_expired_or_is_for_another_cluster_is_refused() {
    let fixture = Fixture::new().await;
    let token = join_token(&fixture).await;
    let mut elsewhere: JoinSecret = token.parse().expect("our own token");
    elsewhere.ca = Fingerprint::of_der(b"another CA");
    unauthenticated(&enrol(&fixture, &wish(&elsewhere.to_string(), "new", &request())).await);
    let mut guessed: JoinSecret = token.parse().expect("our own token");
    guessed.secret[31] ^= 1;
    unauthenticated(&enrol(&fixture, &wish(&guessed.to_string(), "new", &request())).await);
    for bad in ["", "nonsense", &fixture.admin] {
        unauthenticated(&enrol(&fixture, &wish(bad, "new", &request())).await);
    }
    fixture.clock.advance(Duration::from_secs(60));
    unauthenticated(&enrol(&fixture, &wish(&token, "new", &request())).await);
}

#[tokio::test]
async fn bad_wishes_name_the_field_and_use_nothing_up() {
    let fixture = Fixture::new().await;
    let token = join_token(&fixture).await;
    let with = |field: &str, value: &str| {
        let mut wish = wish(&token, "new", &request());
        wish[field] = json!(value);
        wish
    };
    for (wish, field) in [
        (with("name", "Bad Name"), "name"),
        (with("name", "host-1"), "name"),
        (with("address", "0.0.0.0:8444"), "address"),
        (with("address", "nowhere"), "address"),
        (with("csr_pem", "nonsense"), "csr_pem"),
    ] {
        let got = enrol(&fixture, &wish).await;
        assert!(got.status.is_client_error() && got.problem().1 == field, "{field}: {}", got.json());
    }
    assert_eq!(
        enrol(&fixture, &wish(&token, "new", &request())).await.status,
        200,
        "the token is still good"
    );
}

#[tokio::test]
async fn a_host_renews_its_own_certificate_and_nobody_else_does() {
    let fixture = Fixture::new().await;
    let body = json!({"csr_pem": request()}).to_string();
    let as_peer = |peer: Peer| {
        let request = Request::builder().method("POST").uri("/v1/certificate");
        let request = request.body(Body::from(body.clone())).expect("a request");
        fixture.send(request, peer)
    };
    let host = HostId::from_entropy([1; 10]);
    let got = as_peer(Peer::Host(host.clone())).await;
    assert_eq!(
        (got.status.as_u16(), got.json()["host"].as_str()),
        (200, Some(host.as_str())),
        "{}",
        got.json()
    );

    assert_eq!(
        as_peer(Peer::Host(HostId::from_entropy([99; 10]))).await.status,
        401,
        "a host that was removed"
    );
    assert_eq!(as_peer(Peer::Anonymous).await.status, 401);
    assert_eq!(as_peer(Peer::Manager).await.status, 401);
    let user = fixture.call("POST", "/v1/certificate", Some(&fixture.admin), &body).await;
    assert_eq!(user.status, 403, "an administrator is no host");
    let both = Request::builder()
        .method("POST")
        .uri("/v1/certificate")
        .header("authorization", format!("Bearer {}", fixture.admin))
        .body(Body::from(body.clone()))
        .expect("a request");
    assert_eq!(fixture.send(both, Peer::Host(host)).await.status, 403, "a token is never more than a token");
}
