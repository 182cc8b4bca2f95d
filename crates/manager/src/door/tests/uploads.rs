//! Images: parts go straight through to an agent, and an image is ready when all have arrived.

use std::sync::{Arc, Mutex};

use axum::body::Body;
use berth_api::pki::Peer;
use http::{Request, Response};
use serde_json::{Value, json};

use super::support::{Fixture, Got, sample_host};
use crate::records::{ImagePlace, Record, Transaction, UniqueName};

async fn declare(fixture: &Fixture) -> Got {
    let part =
        |role: &str| json!({"role": role, "format": "raw", "size_bytes": 4, "sha256": "AB".repeat(32)});
    let wish = json!({"name": "guest", "parts": [part("kernel"), part("initrd")]});
    fixture.admin("POST", "/v1/images", wish).await
}

async fn upload(fixture: &Fixture, role: &str, bytes: &'static str) -> Got {
    let request = Request::builder()
        .method("PUT")
        .uri(format!("/v1/images/guest/parts/{role}"))
        .header("authorization", format!("Bearer {}", fixture.admin))
        .header("content-length", bytes.len())
        .body(Body::from(bytes))
        .expect("a request");
    fixture.send(request, Peer::Anonymous).await
}

fn stored() -> Response<Vec<u8>> {
    Response::new(json!({"virtual_size_bytes": 512}).to_string().into_bytes())
}

fn refused(code: &str, status: u16) -> Response<Vec<u8>> {
    let problem = json!({"code": code, "message": "the agent's words"});
    Response::builder().status(status).body(problem.to_string().into_bytes()).expect("a response")
}

#[tokio::test]
async fn an_image_is_ready_when_all_parts_have_arrived_in_one_pool() {
    let fixture = Fixture::new().await;
    // A second host with another pool of the same name: both parts must go to the first one's.
    let host = sample_host(2);
    let mut transaction = Transaction::new();
    transaction.create(&host);
    transaction.claim(&UniqueName::in_cluster(berth_model::host::Host::NOUN, &host.name), host.id.as_str());
    fixture.cluster().records.commit(transaction).await.expect("recorded");

    assert_eq!(declare(&fixture).await.json()["state"], "uploading");
    let asked = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&asked);
    fixture.agents.answer_with(move |request| {
        seen.lock().expect("no panic").push((request.uri().to_string(), request.body().clone()));
        stored()
    });
    let got = upload(&fixture, "kernel", "kern").await;
    assert_eq!(
        (got.status.as_u16(), got.json()["state"].as_str()),
        (200, Some("uploading")),
        "{}",
        got.json()
    );
    let got = upload(&fixture, "initrd", "init").await;
    let json = got.json();
    assert_eq!(
        (json["state"].as_str(), json["arrived"].clone()),
        (Some("ready"), json!(["kernel", "initrd"]))
    );
    assert_eq!(json["parts"][1]["virtual_size_bytes"], 512);
    {
        let asked = asked.lock().expect("no panic");
        assert_eq!(asked[0].1, "kern", "whole, and nothing added");
        assert!(
            asked[0]
                .0
                .ends_with(&format!("/parts/kernel?format=raw&size_bytes=4&sha256={}", "ab".repeat(32)))
        );
    }
    let image = fixture.cluster().records.find_image("guest").expect("there").value.id.clone();
    let places = fixture.cluster().records.places_of(&image);
    assert_eq!(places.iter().map(|place| place.pool_uuid.as_str()).collect::<Vec<_>>(), ["uuid-1"]);
    let again = upload(&fixture, "kernel", "kern").await;
    assert_eq!((again.status.as_u16(), again.problem().0.as_str()), (409, "wrong-state"));
}

#[tokio::test]
async fn a_part_that_fails_leaves_the_image_as_it_was_and_can_come_again() {
    let fixture = Fixture::new().await;
    declare(&fixture).await;
    let state = || async { fixture.get("/v1/images/guest").await.json() };
    let before = state().await;
    for (code, status) in [("bad-image", 422), ("no-space", 507), ("internal", 500)] {
        fixture.agents.answer_with(move |_| refused(code, status));
        let got = upload(&fixture, "kernel", "kern").await;
        assert_eq!((got.status.as_u16(), got.problem().0.as_str()), (status, code), "the agent's own words");
        assert_eq!(state().await, before);
    }
    fixture.agents.answer_with(|_| stored());
    assert_eq!(upload(&fixture, "kernel", "kern").await.status, 200);
    assert_eq!(upload(&fixture, "kernel", "kern").await.status, 200, "twice is the same as once");
    assert_eq!(state().await["arrived"], json!(["kernel"]));
}

#[tokio::test]
async fn a_part_that_is_not_as_declared_never_reaches_an_agent() {
    let fixture = Fixture::new().await;
    declare(&fixture).await;
    fixture.agents.answer_with(|_| panic!("asked for nothing"));
    let got = upload(&fixture, "kernel", "too long").await;
    assert_eq!(
        (got.status.as_u16(), got.problem()),
        (422, ("bad-image".to_owned(), "size_bytes".to_owned()))
    );
    let got = upload(&fixture, "disk", "disk").await;
    assert_eq!((got.status.as_u16(), got.problem().1.as_str()), (400, "role"));
    let got = upload(&fixture, "floppy", "disk").await;
    assert_eq!((got.status.as_u16(), got.problem().1.as_str()), (400, "role"));
}

#[tokio::test]
async fn without_an_agent_that_can_take_it_a_part_is_refused() {
    let fixture = Fixture::new().await;
    declare(&fixture).await;
    let got = upload(&fixture, "kernel", "kern").await;
    assert_eq!((got.status.as_u16(), got.problem().0.as_str()), (503, "unreachable"), "{}", got.json());
    let set = |change: fn(&mut berth_model::host::Host)| {
        let records = &fixture.cluster().records;
        let id = sample_host(1).id;
        async move {
            let changed = records.update::<berth_model::host::Host, crate::records::RecordsError>(
                id.as_str(),
                |host| {
                    change(host);
                    Ok(())
                },
            );
            changed.await.map(drop).expect("recorded");
        }
    };
    set(|host| host.inventory.as_mut().expect("one").pools[0].free_bytes = 1000).await;
    assert_eq!(upload(&fixture, "kernel", "kern").await.problem().0, "no-space");
    set(|host| host.state = berth_model::host::HostState::Offline).await;
    assert_eq!(upload(&fixture, "kernel", "kern").await.problem().0, "no-placement");
}

#[tokio::test]
async fn an_image_for_a_pool_that_nobody_has_is_refused() {
    let fixture = Fixture::new().await;
    let part = json!({"role": "disk", "format": "raw", "size_bytes": 4, "sha256": "ab".repeat(32)});
    let got =
        fixture.admin("POST", "/v1/images", json!({"name": "x", "parts": [part], "pool": "attic"})).await;
    assert_eq!((got.status.as_u16(), got.problem().1.as_str()), (400, "pool"), "{}", got.json());
    let names: Vec<Value> =
        fixture.get("/v1/images").await.json()["items"].as_array().expect("a list").clone();
    assert_eq!(names.len(), 1, "nothing half done");
    assert!(fixture.cluster().records.list::<ImagePlace>().is_empty());
}
