//! Rights that go while requests come: what was answered as done is done for everybody.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serde_json::{Value, json};

use super::world::{World, give, member};

/// Each round: many tasks ask; the grant is deleted; whatever is asked after the answer to that is refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn once_a_grant_is_deleted_no_request_is_allowed_by_it() {
    let world = Arc::new(World::new().await);
    let (user, session) = member(world.cluster(), "racer", &[]).await;
    for _ in 0..15 {
        let grant = give(world.cluster(), &user, "viewer", Some(&world.own.segment), None).await;
        let (gone, before, after) =
            (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let tasks: Vec<_> = (0..8)
            .map(|number| {
                let (world, session) = (Arc::clone(&world), session.clone());
                let (gone, before, after) = (Arc::clone(&gone), Arc::clone(&before), Arc::clone(&after));
                tokio::spawn(async move {
                    let mut left = 5;
                    while left > 0 {
                        let was_gone = gone.load(Ordering::SeqCst);
                        let (path, is_list) =
                            if number % 2 == 0 { ("/v1/vms/own%2Fthing", false) } else { ("/v1/vms", true) };
                        let got = world.ask(&session, "GET", path, Value::Null).await;
                        let seen = if is_list {
                            got.json()["items"].as_array().is_some_and(|items| !items.is_empty())
                        } else {
                            got.status.is_success()
                        };
                        assert!(!(seen && was_gone), "{path} was allowed by a grant that is gone");
                        before.fetch_add(usize::from(seen), Ordering::SeqCst);
                        if was_gone {
                            left -= 1;
                            after.fetch_add(1, Ordering::SeqCst);
                        }
                    }
                })
            })
            .collect();
        while before.load(Ordering::SeqCst) < 20 {
            tokio::task::yield_now().await;
        }
        world.must(&world.fixture.admin, "DELETE", &format!("/v1/grants/{grant}"), Value::Null).await;
        gone.store(true, Ordering::SeqCst);
        for task in tasks {
            task.await.expect("no violation");
        }
        assert_eq!(after.load(Ordering::SeqCst), 40);
    }
}

/// The book of rights is kept between requests, and yet each decision sees what was committed before it.
#[tokio::test]
async fn each_change_of_rights_counts_for_the_next_request() {
    let world = World::new().await;
    let admin = &world.fixture.admin;
    let (_, session) = member(world.cluster(), "next", &[]).await;
    let sees = async |expected: bool, why: &str| {
        let got = world.ask(&session, "GET", "/v1/vms/own%2Fthing", Value::Null).await;
        assert_eq!(got.status.is_success(), expected, "{why}");
    };
    let id = |json: Value| json["id"].as_str().expect("an id").to_owned();
    world.must(admin, "POST", "/v1/roles", json!({"name": "eyes", "actions": ["segment.view"]})).await;
    world.must(admin, "POST", "/v1/teams", json!({"name": "outer"})).await;
    world.must(admin, "POST", "/v1/teams", json!({"name": "inner", "members": ["next"]})).await;
    for _ in 0..10 {
        let wish = json!({"team": "outer", "role": "eyes", "segment": "own"});
        let grant = id(world.must(admin, "POST", "/v1/grants", wish).await);
        sees(false, "the role has it not").await;
        world.must(admin, "PATCH", "/v1/roles/eyes", json!({"add_actions": ["vm.view"]})).await;
        sees(false, "the team is not in it").await;
        world.must(admin, "PATCH", "/v1/teams/inner", json!({"parent": "outer"})).await;
        sees(true, "the team is in one that has it").await;
        world.must(admin, "PATCH", "/v1/teams/inner", json!({"remove_members": ["next"]})).await;
        sees(false, "no member any more").await;
        world.must(admin, "PATCH", "/v1/teams/inner", json!({"add_members": ["next"]})).await;
        sees(true, "a member again").await;
        world.must(admin, "PATCH", "/v1/roles/eyes", json!({"remove_actions": ["vm.view"]})).await;
        sees(false, "the role lost it").await;
        world.must(admin, "PATCH", "/v1/teams/inner", json!({"parent": ""})).await;
        world.must(admin, "DELETE", &format!("/v1/grants/{grant}"), Value::Null).await;
    }
}
