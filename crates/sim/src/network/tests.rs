use axum::routing::get;
use berth_api::transport::empty;
use tokio::time::timeout;

use super::*;

const DEADLINE: Duration = Duration::from_secs(20);

/// Somebody who answers `/who`, and tells when he is asked what he never answers.
fn listen(network: &Arc<Network>) -> mpsc::UnboundedReceiver<()> {
    let listener = network.listen("there", "there:1");
    let (asked, told) = mpsc::unbounded_channel();
    let never = move || {
        let asked = asked.clone();
        async move {
            asked.send(()).expect("the test waits");
            std::future::pending::<()>().await;
        }
    };
    let router = Router::new()
        .route(
            "/who",
            get(|request: axum::extract::Request| async move {
                format!("{:?}", request.extensions().get::<Caller>().map(|caller| caller.peer.clone()))
            }),
        )
        .route("/never", get(never));
    tokio::spawn(listener.serve(router));
    told
}

async fn ask(network: &Arc<Network>, path: &str) -> Result<String, TransportError> {
    let transport = network.transport("here", Peer::Manager, "there:1");
    let request = Request::get(path).body(empty()).expect("a request");
    let response = transport.send(request).await?;
    let bytes = response.into_body().collect().await.expect("body").to_bytes();
    Ok(String::from_utf8(bytes.to_vec()).expect("text"))
}

#[tokio::test]
async fn a_request_arrives_with_its_sender_and_a_cut_link_refuses() {
    let network = Network::new();
    assert!(matches!(ask(&network, "/who").await, Err(TransportError::Connect { .. })), "nobody listens");
    let _asked = listen(&network);
    assert_eq!(ask(&network, "/who").await.expect("answer"), "Some(Manager)");
    network.cut("there", "here", Cut::Hard);
    assert!(matches!(ask(&network, "/who").await, Err(TransportError::Connect { .. })));
    network.heal("here", "there");
    ask(&network, "/who").await.expect("answer");
}

#[tokio::test]
async fn a_cut_breaks_what_is_under_way_and_a_silent_one_only_when_it_is_healed() {
    let network = Network::new();
    let mut asked = listen(&network);
    for how in [Cut::Hard, Cut::Silent] {
        let asking = tokio::spawn({
            let network = Arc::clone(&network);
            async move { ask(&network, "/never").await }
        });
        timeout(DEADLINE, asked.recv()).await.expect("in time").expect("asked");
        network.cut("here", "there", how);
        if how == Cut::Silent {
            assert!(
                timeout(Duration::from_millis(50), ask(&network, "/who")).await.is_err(),
                "nothing is said"
            );
            assert!(!asking.is_finished());
        }
        network.heal("here", "there");
        let answer = timeout(DEADLINE, asking).await.expect("in time").expect("asked");
        assert!(matches!(answer, Err(TransportError::Broken { .. })), "{how:?}");
        ask(&network, "/who").await.expect("a new one is up");
    }
}
