//! Who may ask what: every route of the contract, asked by everybody.

use axum::body::Body;
use berth_api::agent::ENDPOINTS;
use berth_api::pki::Peer;
use berth_api::serve::Caller;
use berth_model::{HostId, Problem, ProblemCode};
use http::Request;
use http_body_util::BodyExt;
use tower::ServiceExt;

use crate::support::Host;

/// What the agent answers to a call with nonsense in its path; none: it was let in.
async fn refusal(host: &Host, method: &str, path: &str, peer: Option<Peer>) -> Option<ProblemCode> {
    let path = path.replace("{task}", "x%20y").replace(['{', '}'], "");
    let mut request = Request::builder().method(method).uri(path).body(Body::empty()).expect("request");
    if let Some(peer) = peer {
        let remote = "127.0.0.1:1".parse().expect("address");
        request.extensions_mut().insert(Caller { remote, peer });
    }
    let response = berth_agent::http::router(host.agent()).oneshot(request).await.expect("answer");
    let bytes = response.into_body().collect().await.expect("body").to_bytes();
    let problem = serde_json::from_slice::<Problem>(&bytes).ok()?;
    matches!(problem.code, ProblemCode::Unauthenticated | ProblemCode::NotAllowed).then_some(problem.code)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_route_is_for_one_kind_of_caller() {
    let host = Host::start().await;
    let other = Peer::Host(HostId::from_entropy([3; 10]));
    for endpoint in ENDPOINTS {
        let for_peers = endpoint.path.starts_with("/v1/peer/");
        let ask = |peer| refusal(&host, endpoint.method, endpoint.path, peer);
        let name = endpoint.name;
        for nobody in [None, Some(Peer::Anonymous)] {
            assert_eq!(ask(nobody).await, Some(ProblemCode::Unauthenticated), "{name}");
        }
        let (let_in, refused) = (None, Some(ProblemCode::NotAllowed));
        let (manager, peer) = if for_peers { (refused, let_in) } else { (let_in, refused) };
        assert_eq!(ask(Some(Peer::Manager)).await, manager, "{name}");
        assert_eq!(ask(Some(other.clone())).await, peer, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_a_request_gets_a_problem() {
    let host = Host::start().await;
    let ask = async |method: &str, path: &str, body: &str| {
        let mut request =
            Request::builder().method(method).uri(path).body(Body::from(body.to_owned())).expect("request");
        let remote = "127.0.0.1:1".parse().expect("address");
        request.extensions_mut().insert(Caller { remote, peer: Peer::Manager });
        let response = berth_agent::http::router(host.agent()).oneshot(request).await.expect("answer");
        let bytes = response.into_body().collect().await.expect("body").to_bytes();
        serde_json::from_slice::<Problem>(&bytes).unwrap_or_else(|_| panic!("{path}: {bytes:?}")).code
    };
    assert_eq!(ask("GET", "/v1/nothing", "").await, ProblemCode::NotFound);
    assert_eq!(ask("PUT", "/v1/tasks/a", "{").await, ProblemCode::InvalidInput);
    assert_eq!(ask("PUT", "/v1/tasks/a", r#"{"spec": {"do": "dance"}}"#).await, ProblemCode::InvalidInput);
    assert_eq!(
        ask("PUT", "/v1/tasks/a%2Fb", r#"{"spec": {"do": "stop-vm"}}"#).await,
        ProblemCode::InvalidInput
    );
    assert_eq!(ask("PUT", "/v1/tasks/a", &"x".repeat(2 << 20)).await, ProblemCode::TooLarge);
    assert_eq!(ask("GET", "/v1/tasks/unknown", "").await, ProblemCode::NotFound);
    assert_eq!(ask("GET", "/v1/tasks/a?after=minus", "").await, ProblemCode::InvalidInput);
    assert_eq!(ask("GET", "/v1/vms/vm-x/console", "").await, ProblemCode::InvalidInput);
    let image = "/v1/pools/local/images/img-0000000000000000/parts";
    assert_eq!(ask("PUT", &format!("{image}/floppy"), "x").await, ProblemCode::InvalidInput);
    assert_eq!(ask("PUT", &format!("{image}/disk"), "x").await, ProblemCode::InvalidInput);
}
