//! The console over three real TLS connections: a caller, the manager, an agent that echoes.

use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::routing::any;
use berth_api::manager::{AuditList, AuditListQuery, AuditRecord, Segment, VmConsole, VmPath};
use berth_model::host::Host;
use berth_model::vm::{Vm, VmState};
use futures_util::{SinkExt, StreamExt};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::{Message as Frame, Role};

use super::*;
use crate::door::tests::support::{sample_host, sample_image, sample_vm};
use crate::records::{RecordsError, Transaction, UniqueName};

/// Greets, echoes, and hangs up when it is told to.
async fn echo(mut socket: WebSocket) {
    let _ = socket.send(Message::Binary("hello\r\n".into())).await;
    while let Some(Ok(message)) = socket.recv().await {
        let Message::Binary(bytes) = message else { continue };
        if &bytes[..] == b"hang up" || socket.send(Message::Binary(bytes)).await.is_err() {
            return;
        }
    }
}

/// Joins as a host and answers consoles.
async fn agent(
    running: &Running,
    stop: watch::Receiver<bool>,
) -> (Host, watch::Sender<Arc<rustls::ServerConfig>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let wish = CreateJoinToken { expires_s: None };
    let token =
        running.user().call::<JoinTokenCreate>(&Nothing {}, &Nothing {}, &wish).await.expect("a token").token;
    let (key_pem, csr_pem) = pki::signing_request().expect("a request");
    let name: berth_model::name::Name = "box".parse().expect("a name");
    let wish = EnrolRequest { token, name, address: address.clone(), csr_pem };
    let client = running.client(tls::client_config(&running.ca_pem, None).expect("TLS"));
    let reply = client.call::<HostEnrol>(&Nothing {}, &Nothing {}, &wish).await.expect("joined");
    let identity = Identity { certificate_pem: reply.certificate_pem, key_pem };
    let config =
        tls::server_config(&reply.ca_pem, &identity, tls::ClientCertificates::Required).expect("TLS");
    let (sender, receiver) = watch::channel(config);
    let consoles = any(|upgrade: WebSocketUpgrade| async move { upgrade.on_upgrade(echo) });
    let router = Router::new().route("/v1/vms/{vm}/console", consoles);
    tokio::spawn(berth_api::serve::serve(listener, receiver, router, stop));
    (Host { id: reply.host, address, ..sample_host(1) }, sender)
}

async fn add_vm(cluster: &Cluster, host: &Host) -> Vm {
    let segment = cluster.records.list::<Segment>()[0].value.clone();
    let vm = sample_vm(1, &segment, host, &sample_image());
    let mut transaction = Transaction::new();
    transaction.create(&vm);
    transaction.claim(&UniqueName::vm(&segment.id, &vm.name), vm.id.as_str());
    cluster.records.commit(transaction).await.expect("recorded");
    vm
}

async fn open(
    running: &Running,
    vm: &str,
) -> Result<WebSocketStream<impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + use<>>, ClientError> {
    let headers = [
        ("sec-websocket-version", "13".to_owned()),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==".to_owned()),
    ];
    let path = VmPath { vm: vm.to_owned() };
    let upgraded = running.user().upgrade::<VmConsole>(&path, "websocket", &headers).await?;
    Ok(WebSocketStream::from_raw_socket(upgraded, Role::Client, None).await)
}

async fn next_text(
    socket: &mut WebSocketStream<impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin>,
) -> Option<String> {
    let next = tokio::time::timeout(Duration::from_secs(20), socket.next()).await.expect("in time");
    match next?.ok()? {
        Frame::Binary(bytes) => Some(String::from_utf8(bytes.to_vec()).expect("text")),
        _ => None,
    }
}

async fn console_record(running: &Running, open: bool) -> Option<AuditRecord> {
    let query = AuditListQuery { open: Some(open), ..AuditListQuery::default() };
    let page = running.user().call::<AuditList>(&Nothing {}, &query, &()).await.expect("an audit");
    page.items.into_iter().find(|record| record.request.ends_with("/console"))
}

#[tokio::test]
async fn a_console_is_passed_on_outlives_its_agent_connection_and_ends_with_its_vm() {
    let dir = tempfile::tempdir().expect("a directory");
    let bound = bind(config(dir.path())).await.expect("a manager");
    let cluster = Arc::clone(bound.manager().cluster());
    let running = serve(bound, dir.path());
    let (_agent_runs, agent_stop) = watch::channel(false);
    let (host, _certificate) = agent(&running, agent_stop).await;
    let vm = add_vm(&cluster, &host).await;

    let mut socket = open(&running, "default/books").await.expect("a console");
    assert_eq!(next_text(&mut socket).await.as_deref(), Some("hello\r\n"));
    socket.send(Frame::Binary("ls\r".into())).await.expect("sent");
    assert_eq!(next_text(&mut socket).await.as_deref(), Some("ls\r"));
    let open_record = console_record(&running, true).await.expect("it is open as long as the console is");
    assert_eq!((open_record.finished_at, console_record(&running, false).await), (None, None));

    socket.send(Frame::Binary("hang up".into())).await.expect("sent");
    assert_eq!(next_text(&mut socket).await.as_deref(), Some("hello\r\n"), "attached again");

    let stopped = cluster.records.update::<Vm, RecordsError>(vm.id.as_str(), |vm| {
        vm.status.state = VmState::Stopped;
        Ok(())
    });
    stopped.await.expect("recorded");
    socket.send(Frame::Binary("hang up".into())).await.expect("sent");
    assert_eq!(next_text(&mut socket).await, None, "closed: nothing runs any more");
    drop(socket);
    let ended = async {
        loop {
            if let Some(record) = console_record(&running, false).await {
                return record;
            }
        }
    };
    let record = tokio::time::timeout(Duration::from_secs(20), ended).await.expect("it ends");
    assert_eq!((record.status, record.resources[0].as_str()), (Some(101), "vm:default/books"));

    let refused = open(&running, "default/books").await.err().expect("stopped");
    assert_eq!(code(refused), ProblemCode::WrongState);
    running.end().await;
}
