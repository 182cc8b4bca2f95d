//! Handlers that panic, and callers that hang up.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use berth_api::manager::{SegmentCreate, SegmentList, WhoAmIShow};
use berth_api::pki::Peer;
use berth_api::serve::Caller;
use berth_model::{Problem, ProblemCode};
use http::Request;
use tokio::sync::{mpsc, oneshot};
use tower::ServiceExt;

use super::support::{Fixture, answer};
use crate::audit::STATUS_CALLER_GONE;
use crate::door::target::TheCluster;
use crate::door::{Answer, Call, Door};

fn door(fixture: &Fixture) -> Door {
    Door::new(Arc::clone(fixture.manager.gate()))
}

fn request(fixture: &Fixture, method: &str, path: &str, body: &'static str) -> Request<Body> {
    let mut request = Request::builder()
        .method(method)
        .uri(path)
        .header("authorization", format!("Bearer {}", fixture.admin))
        .body(Body::from(body))
        .expect("a request");
    request.extensions_mut().insert(Caller { remote: ([192, 0, 2, 1], 1).into(), peer: Peer::Anonymous });
    request
}

async fn last(fixture: &Fixture) -> berth_api::manager::AuditRecord {
    fixture.audit().await.pop().expect("a record")
}

async fn breaks(_: Call<WhoAmIShow, TheCluster>) -> Result<Answer<berth_api::manager::WhoAmI>, Problem> {
    panic!("as it must not")
}

#[tokio::test]
async fn a_handler_that_panics_fails_its_request_and_nothing_else() {
    let fixture = Fixture::new().await;
    let router = door(&fixture).mount(breaks).into_router();
    for _ in 0..2 {
        let got = answer(router.clone(), request(&fixture, "GET", "/v1/whoami", ""), Peer::Anonymous).await;
        assert_eq!((got.status.as_u16(), got.problem().0.as_str()), (500, "internal"));
        let record = last(&fixture).await;
        assert_eq!((record.status, record.decision.as_str()), (Some(500), "allow"));
    }
}

/// Handlers that say when they begin, and wait until they are told to end.
fn waiting(fixture: &Fixture) -> (Router, mpsc::Receiver<oneshot::Sender<()>>) {
    let (began, begun) = mpsc::channel(1);
    let on_read = began.clone();
    let read = move |_: Call<SegmentList, TheCluster>| {
        let began = on_read.clone();
        async move {
            let (go, gone) = oneshot::channel();
            began.send(go).await.expect("the test listens");
            let _ = gone.await;
            Err(Problem::new(ProblemCode::WrongState, "read to the end"))
        }
    };
    let change = move |_: Call<SegmentCreate, TheCluster>| {
        let began = began.clone();
        async move {
            let (go, gone) = oneshot::channel();
            began.send(go).await.expect("the test listens");
            let _ = gone.await;
            Err(Problem::new(ProblemCode::WrongState, "changed to the end"))
        }
    };
    (door(fixture).mount(read).mount(change).into_router(), begun)
}

#[tokio::test]
async fn a_read_is_dropped_when_its_caller_hangs_up_and_its_record_says_so() {
    let fixture = Fixture::new().await;
    let (router, mut begun) = waiting(&fixture);
    let asking = tokio::spawn(router.oneshot(request(&fixture, "GET", "/v1/segments", "")));
    let go = begun.recv().await.expect("it began");
    let open = fixture.manager.audit().under_way().pop().expect("its start is down before it runs");
    assert_eq!((open.finished_at, open.status, open.sequence), (None, None, None));
    asking.abort();
    assert!(asking.await.expect_err("aborted").is_cancelled());
    assert!(go.is_closed(), "the handler is gone");
    let record = last(&fixture).await;
    assert_eq!(record.status, Some(STATUS_CALLER_GONE));
    assert_eq!(record.request_id, open.request_id);
}

#[tokio::test]
async fn a_change_goes_on_when_its_caller_hangs_up() {
    let fixture = Fixture::new().await;
    let (router, mut begun) = waiting(&fixture);
    let asking = tokio::spawn(router.oneshot(request(&fixture, "POST", "/v1/segments", r#"{"name":"a"}"#)));
    let mut go = begun.recv().await.expect("it began");
    asking.abort();
    assert!(asking.await.expect_err("aborted").is_cancelled());
    assert!(!go.is_closed(), "the handler still runs");
    let _ = &mut go;
    go.send(()).expect("it listens");
    let end = async {
        loop {
            let record = last(&fixture).await;
            if record.request.starts_with("POST") {
                return record;
            }
            tokio::task::yield_now().await;
        }
    };
    let record = tokio::time::timeout(std::time::Duration::from_secs(10), end).await.expect("an end");
    assert_eq!(record.status, Some(409), "what it came to");
}
