//! Bearer tokens: what is good, and what is not any more.

use std::time::Duration;

use axum::body::Body;
use berth_api::pki::Peer;
use http::Request;
use serde_json::json;

use super::support::{Fixture, Got};
use crate::auth::strangers::WRITTEN_MAX;

async fn whoami(fixture: &Fixture, token: &str) -> Got {
    fixture.call("GET", "/v1/whoami", Some(token), "").await
}

async fn new_token(fixture: &Fixture, wish: serde_json::Value) -> (String, String) {
    let made = fixture.admin("POST", "/v1/tokens", wish).await;
    assert_eq!(made.status, 200, "{}", made.json());
    let text = |value: &serde_json::Value| value.as_str().expect("text").to_owned();
    (text(&made.json()["secret"]), text(&made.json()["token"]["id"]))
}

#[tokio::test]
async fn a_token_says_who_one_is_until_it_expires() {
    let fixture = Fixture::new().await;
    let (secret, _) = new_token(&fixture, json!({"user": "nobody", "expires_s": 60})).await;
    let got = whoami(&fixture, &secret).await;
    assert_eq!((got.status.as_u16(), got.json()["user"].as_str()), (200, Some("nobody")));
    fixture.clock.advance(Duration::from_secs(59));
    assert_eq!(whoami(&fixture, &secret).await.status, 200);
    fixture.clock.advance(Duration::from_secs(1));
    let got = whoami(&fixture, &secret).await;
    assert_eq!((got.status.as_u16(), got.problem().0.as_str()), (401, "unauthenticated"));
    assert_eq!(got.headers["www-authenticate"], "Bearer");
}

#[tokio::test]
async fn a_revoked_token_is_good_for_nothing_at_once() {
    let fixture = Fixture::new().await;
    let (secret, id) = new_token(&fixture, json!({"user": "nobody"})).await;
    assert_eq!(whoami(&fixture, &secret).await.status, 200);
    assert_eq!(fixture.admin("DELETE", &format!("/v1/tokens/{id}"), json!(null)).await.status, 200);
    assert_eq!(whoami(&fixture, &secret).await.status, 401);
    assert_eq!(fixture.admin("DELETE", &format!("/v1/tokens/{id}"), json!(null)).await.status, 404);
}

#[tokio::test]
async fn a_deleted_user_has_no_tokens_left() {
    let fixture = Fixture::new().await;
    for _ in 0..130 {
        new_token(&fixture, json!({"user": "nobody"})).await;
    }
    let (secret, _) = new_token(&fixture, json!({"user": "nobody"})).await;
    let got = fixture.admin("DELETE", "/v1/users/nobody", json!(null)).await;
    assert_eq!(got.status, 200, "{}", got.json());
    assert_eq!(whoami(&fixture, &secret).await.status, 401);
    let left = fixture.get("/v1/tokens").await.json()["items"].as_array().expect("a list").len();
    assert_eq!(left, 1, "the administrator's own");
}

#[tokio::test]
async fn the_last_way_in_for_an_administrator_stays() {
    let fixture = Fixture::new().await;
    let own = whoami(&fixture, &fixture.admin).await.json()["token"].as_str().expect("an id").to_owned();
    for path in [format!("/v1/tokens/{own}"), "/v1/users/admin".to_owned()] {
        let got = fixture.admin("DELETE", &path, json!(null)).await;
        assert_eq!((got.status.as_u16(), got.problem().0.as_str()), (409, "protected"), "{path}");
    }
    new_token(&fixture, json!({"user": "admin"})).await;
    assert_eq!(fixture.admin("DELETE", &format!("/v1/tokens/{own}"), json!(null)).await.status, 200);
    assert_eq!(whoami(&fixture, &fixture.admin).await.status, 401, "with another way in it can go");
}

#[tokio::test]
async fn nonsense_instead_of_a_token_is_refused_like_no_token() {
    let fixture = Fixture::new().await;
    let good = &fixture.admin;
    let other = good.replace(|last: char| last.is_ascii_digit(), "z");
    let cut = &good[..good.len() - 1];
    for bad in ["", "x", "berth_", "berth__", cut, &format!("{good}A"), &other, "\u{7f}"] {
        let request = Request::builder().uri("/v1/whoami").header("authorization", format!("Bearer {bad}"));
        let Ok(request) = request.body(Body::empty()) else { continue };
        assert_eq!(fixture.send(request, Peer::Anonymous).await.status, 401, "{bad}");
    }
    for header in [good.clone(), format!("Basic {good}"), format!("Bearer  {good} {good}")] {
        let request = Request::builder().uri("/v1/whoami").header("authorization", &header);
        let got = fixture.send(request.body(Body::empty()).expect("a request"), Peer::Anonymous).await;
        assert_eq!(got.status, 401, "{header}");
    }
    let twice = Request::builder()
        .uri("/v1/whoami")
        .header("authorization", format!("Bearer {good}"))
        .header("authorization", "Bearer x");
    let got = fixture.send(twice.body(Body::empty()).expect("a request"), Peer::Anonymous).await;
    assert_eq!(got.status, 401, "which of two counts must not depend on who reads them");
}

#[tokio::test]
async fn secrets_are_nowhere_in_the_store() {
    let fixture = Fixture::new().await;
    let (secret, _) = new_token(&fixture, json!({"user": "nobody"})).await;
    let join = fixture.admin("POST", "/v1/join-tokens", json!({})).await.json()["token"].clone();
    let join = join.as_str().expect("text").rsplit('-').next().expect("a part").to_owned();
    let tail = secret.rsplit('_').next().expect("a part");
    let everything =
        berth_store::Store::list(&*fixture.store, berth_store::Query::prefix("")).await.expect("a list");
    for entry in everything.entries {
        let text = String::from_utf8_lossy(&entry.value).into_owned() + &entry.key;
        assert!(!text.contains(tail) && !text.contains(&join), "{}", entry.key);
    }
}

#[tokio::test]
async fn a_caller_that_hammers_does_not_fill_the_audit_and_locks_out_nobody() {
    let fixture = Fixture::new().await;
    let before = fixture.audit().await.len();
    for _ in 0..WRITTEN_MAX + 50 {
        assert_eq!(whoami(&fixture, "nonsense").await.status, 401);
    }
    assert_eq!(fixture.audit().await.len() - before, WRITTEN_MAX as usize);
    assert_eq!(whoami(&fixture, &fixture.admin).await.status, 200, "the same address, with a good token");
    let before = fixture.audit().await.len();
    for _ in 0..WRITTEN_MAX + 50 {
        assert_eq!(fixture.call("GET", "/healthz", None, "").await.status, 200);
    }
    assert_eq!(fixture.audit().await.len() - before, WRITTEN_MAX as usize);
    for _ in 0..WRITTEN_MAX + 50 {
        fixture.get("/healthz").await;
    }
    let written = fixture.audit().await.len() - before;
    assert_eq!(written, 2 * WRITTEN_MAX as usize + 50, "who is known is always written down");
}

#[tokio::test]
async fn bad_wishes_name_the_field() {
    let fixture = Fixture::new().await;
    for (path, wish, field) in [
        ("/v1/tokens", json!({"user": "nobody", "expires_s": 0}), "expires_s"),
        ("/v1/tokens", json!({"user": "nobody", "expires_s": u64::MAX}), "expires_s"),
        ("/v1/tokens", json!({"user": "nobody", "note": "x".repeat(300)}), "note"),
        ("/v1/tokens", json!({"user": "ghost"}), "user"),
        ("/v1/users", json!({"name": "Bad Name"}), "name"),
        ("/v1/users", json!({"name": "good", "roles": ["god"]}), "roles"),
        ("/v1/users", json!({"name": "nobody"}), "name"),
        ("/v1/join-tokens", json!({"expires_s": 0}), "expires_s"),
        ("/v1/join-tokens", json!({"expires_s": 99_999_999}), "expires_s"),
    ] {
        let got = fixture.admin("POST", path, wish).await;
        assert!(got.status.is_client_error() && got.problem().1 == field, "{path} {field}: {}", got.json());
    }
}
