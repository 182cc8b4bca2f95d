//! Destinations that are really there: files, and TLS listeners on loopback.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use berth_api::pki::{Authority, Identity};
use berth_api::tls::{ClientCertificates, server_config};
use berth_model::Timestamp;
use berth_store::{MemoryStore, Store};
use berth_tlog::SigningKey;
use http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::audit::{AuditRecord, End, OK, OtherKey};
use crate::clock::{Clock as _, SystemClock};

const DEADLINE: Duration = Duration::from_secs(20);

fn store() -> Arc<MemoryStore> {
    Arc::new(MemoryStore::new(Arc::new(berth_store::SystemClock::new())))
}

async fn audit_on(store: &Arc<MemoryStore>) -> Audit {
    let key = Arc::new(SigningKey::generate("berth-audit/test").expect("a key"));
    Audit::open(Arc::<MemoryStore>::clone(store), Arc::new(SystemClock), key, OtherKey::Refused)
        .await
        .expect("an audit")
}

async fn fill(audit: &Audit, count: u32) {
    for number in 0..count {
        audit.record_system("test", "tick", &number.to_string(), OK);
    }
    audit.flush().await;
}

fn forwarder(toml_like: serde_json::Value) -> Forwarder {
    let destination: Destination = serde_json::from_value(toml_like).expect("a destination");
    prepare(&AuditConfig { forward: vec![destination], ..AuditConfig::default() })
        .expect("usable")
        .pop()
        .expect("one")
}

fn refused(toml_like: serde_json::Value) -> String {
    let destination: Destination = serde_json::from_value(toml_like).expect("a destination");
    prepare(&AuditConfig { forward: vec![destination], ..AuditConfig::default() })
        .err()
        .expect("refused")
        .to_string()
}

/// Runs it until it is dropped.
fn run(forwarder: Forwarder, audit: &Audit) -> (tokio::task::JoinHandle<()>, Arc<Metrics>) {
    let metrics = Arc::new(Metrics::new());
    (tokio::spawn(forwarder.run(audit.clone(), Arc::clone(&metrics))), metrics)
}

/// A TLS server's parts: its acceptor, and the CA that vouches for it, in a file.
async fn tls(dir: &Path) -> (TcpListener, TlsAcceptor, PathBuf) {
    let authority = Authority::load(&Authority::create(1_795_352_752).expect("a CA")).expect("a CA");
    let now = i64::try_from(SystemClock.now().as_millis() / 1000).expect("a date");
    let identity: Identity = authority.issue_manager(&["127.0.0.1".to_owned()], now).expect("a certificate");
    let ca = dir.join("ca.pem");
    std::fs::write(&ca, authority.certificate_pem()).expect("written");
    let config = server_config(authority.certificate_pem(), &identity, ClientCertificates::Optional);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    (listener, TlsAcceptor::from(config.expect("TLS")), ca)
}

fn sequences(lines: &str) -> Vec<u64> {
    let record =
        |line: &str| serde_json::from_str::<AuditRecord>(line).expect("a record").sequence.expect("a number");
    lines.lines().map(record).collect()
}

async fn until<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let looking = async {
        loop {
            if let Some(found) = look() {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(DEADLINE, looking).await.expect("in time")
}

#[tokio::test]
async fn a_file_gets_everything_once_also_over_restarts_and_after_a_torn_line() {
    let (dir, store) = (tempfile::tempdir().expect("a directory"), store());
    let path = dir.path().join("audit.log");
    let set = serde_json::json!({ "name": "file", "file": path });
    let audit = audit_on(&store).await;
    fill(&audit, 600).await;
    let read = || std::fs::read_to_string(&path).unwrap_or_default();
    let (running, _) = run(forwarder(set.clone()), &audit);
    until(|| (read().lines().count() == 600).then_some(())).await;
    let stored = || futures_util::future::FutureExt::now_or_never(store.get("/audit/forward/file"));
    until(|| stored()?.ok()?.filter(|entry| &entry.value[..] == b"{\"next\":600}")).await;
    running.abort();
    let _ = running.await;
    std::fs::write(&path, read() + "{\"sequence\":600,\"torn").expect("torn");
    let (running, metrics) = run(forwarder(set), &audit);
    fill(&audit, 5).await;
    until(|| (read().lines().count() == 606).then_some(())).await;
    running.abort();
    let text = read().lines().filter(|line| !line.ends_with("torn")).collect::<Vec<_>>().join("\n");
    assert_eq!(sequences(&text), (0..605).collect::<Vec<_>>());
    drop(metrics);
}

#[tokio::test]
async fn a_file_that_can_t_be_written_loses_nothing_and_is_told_in_the_metrics() {
    let (dir, store) = (tempfile::tempdir().expect("a directory"), store());
    let path = dir.path().join("not-there-yet/audit.log");
    let audit = audit_on(&store).await;
    fill(&audit, 3).await;
    let (running, metrics) = run(forwarder(serde_json::json!({ "name": "file", "file": path })), &audit);
    let told = |line: &str| forward_text(&metrics).contains(line).then_some(());
    until(|| told("berth_audit_forward_lag_records{destination=\"file\"} 3")).await;
    until(|| told("berth_audit_forward_failures_total{destination=\"file\"} 1")).await;
    // Requests are not held by it.
    audit.write(AuditRecord::default(), End::status(403)).await.expect("written");
    std::fs::create_dir(path.parent().expect("a parent")).expect("a directory");
    until(|| (std::fs::read_to_string(&path).unwrap_or_default().lines().count() == 4).then_some(())).await;
    until(|| told("berth_audit_forward_lag_records{destination=\"file\"} 0")).await;
    running.abort();
}

fn forward_text(metrics: &Metrics) -> String {
    metrics.registry_text()
}

#[tokio::test]
async fn syslog_gets_framed_messages_over_tls_and_again_what_it_did_not_read() {
    let (dir, store) = (tempfile::tempdir().expect("a directory"), store());
    let (listener, acceptor, ca) = tls(dir.path()).await;
    let address = listener.local_addr().expect("an address").to_string();
    let (sender, mut received) = mpsc::unbounded_channel();
    let receiver = tokio::spawn(async move {
        for round in 0.. {
            let (tcp, _) = listener.accept().await.expect("a connection");
            if round == 0 {
                // A receiver that dies: the connection is taken and reset.
                tcp.set_zero_linger().expect("an option");
                continue;
            }
            let mut stream = acceptor.accept(tcp).await.expect("TLS");
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).await.expect("everything");
            let _ = stream.shutdown().await;
            let _ = sender.send(bytes);
        }
    });
    let audit = audit_on(&store).await;
    fill(&audit, 2).await;
    audit
        .write(
            AuditRecord { action: "vm.delete".into(), decision: "deny".into(), ..AuditRecord::default() },
            End::status(403),
        )
        .await
        .expect("written");
    let set = serde_json::json!({ "name": "siem", "syslog": { "address": address, "ca": ca } });
    let (running, _) = run(forwarder(set), &audit);
    let bytes = tokio::time::timeout(DEADLINE, received.recv()).await.expect("in time").expect("bytes");
    let (mut rest, mut messages) = (&bytes[..], Vec::new());
    while !rest.is_empty() {
        let blank = rest.iter().position(|byte| *byte == b' ').expect("a length");
        let length: usize = std::str::from_utf8(&rest[..blank]).expect("digits").parse().expect("a length");
        messages.push(std::str::from_utf8(&rest[blank + 1..=blank + length]).expect("text"));
        rest = &rest[blank + 1 + length..];
    }
    assert_eq!(messages.len(), 3);
    for (message, priority) in messages.iter().zip(["<110>1 ", "<110>1 ", "<108>1 "]) {
        let head: Vec<&str> = message.splitn(8, ' ').collect();
        assert!(message.starts_with(priority), "{message}");
        head[1].parse::<Timestamp>().expect("a time");
        assert_eq!((head[3], head[4], head[6]), ("berth", "-", "-"), "{message}");
        serde_json::from_str::<AuditRecord>(head[7]).expect("the record's own bytes");
    }
    assert!(messages[2].contains(" vm.delete - {"), "{}", messages[2]);
    running.abort();
    receiver.abort();
}

#[tokio::test]
async fn a_webhook_gets_lines_with_its_token_and_again_what_it_refused() {
    let (dir, store) = (tempfile::tempdir().expect("a directory"), store());
    let (listener, acceptor, ca) = tls(dir.path()).await;
    let token = dir.path().join("token");
    std::fs::write(&token, "s3cret-of-the-hook\n").expect("written");
    let url = format!("https://{}/hook?x=1", listener.local_addr().expect("an address"));
    let (sender, mut received) = mpsc::unbounded_channel();
    let failing = Arc::new(AtomicBool::new(true));
    let fails = Arc::clone(&failing);
    let server = tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.expect("a connection");
            let Ok(stream) = acceptor.accept(tcp).await else { continue };
            let (sender, fails) = (sender.clone(), Arc::clone(&fails));
            let service = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
                let (sender, fails) = (sender.clone(), Arc::clone(&fails));
                async move {
                    let (parts, body) = request.into_parts();
                    let bytes = body.collect().await.expect("a body").to_bytes();
                    let status = if fails.swap(false, Ordering::SeqCst) {
                        StatusCode::SERVICE_UNAVAILABLE
                    } else {
                        let _ = sender.send((parts, bytes));
                        StatusCode::ACCEPTED
                    };
                    let mut response = Response::new(http_body_util::Empty::<Bytes>::new());
                    *response.status_mut() = status;
                    Ok::<_, std::convert::Infallible>(response)
                }
            });
            tokio::spawn(
                hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service),
            );
        }
    });
    let audit = audit_on(&store).await;
    fill(&audit, 300).await;
    let set = serde_json::json!({ "name": "hook", "webhook": { "url": url, "ca": ca, "token_file": token } });
    let (running, _) = run(forwarder(set), &audit);
    let mut seen = Vec::new();
    while seen.len() < 300 {
        let (parts, bytes) =
            tokio::time::timeout(DEADLINE, received.recv()).await.expect("in time").expect("a request");
        assert_eq!((parts.method.as_str(), parts.uri.to_string().as_str()), ("POST", "/hook?x=1"));
        assert_eq!(parts.headers["authorization"], "Bearer s3cret-of-the-hook");
        assert_eq!(parts.headers["content-type"], "application/x-ndjson");
        let new = sequences(std::str::from_utf8(&bytes).expect("text"));
        let range = format!("{}-{}", new[0], new[new.len() - 1]);
        assert_eq!(parts.headers["x-berth-audit-records"], range.as_str());
        seen.extend(new);
    }
    assert_eq!(seen, (0..300).collect::<Vec<_>>());
    running.abort();
    server.abort();
}

#[tokio::test]
async fn a_server_that_another_ca_vouches_for_gets_nothing() {
    let (dir, store) = (tempfile::tempdir().expect("a directory"), store());
    let (listener, acceptor, _) = tls(dir.path()).await;
    let other = tempfile::tempdir().expect("a directory");
    let (_, _, wrong_ca) = tls(other.path()).await;
    let address = listener.local_addr().expect("an address").to_string();
    let audit = audit_on(&store).await;
    fill(&audit, 1).await;
    let set = serde_json::json!({ "name": "siem", "syslog": { "address": address, "ca": wrong_ca } });
    let (running, metrics) = run(forwarder(set), &audit);
    let (tcp, _) = listener.accept().await.expect("a connection");
    acceptor.accept(tcp).await.expect_err("refused by the client");
    let failed = "berth_audit_forward_failures_total{destination=\"siem\"}";
    until(|| forward_text(&metrics).contains(failed).then_some(())).await;
    running.abort();
}

#[tokio::test]
async fn what_is_set_wrongly_is_named_at_the_start_without_its_secrets() {
    for (set, expected) in [
        (serde_json::json!({ "name": "a" }), "exactly one"),
        (serde_json::json!({ "name": "a", "file": "/x", "webhook": { "url": "https://a/" } }), "exactly one"),
        (serde_json::json!({ "name": "a", "syslog": { "address": "nowhere" } }), "host:port"),
        (
            serde_json::json!({ "name": "a", "syslog": { "address": "a:1", "ca": "/nonexistent" } }),
            "can't be read",
        ),
        (
            serde_json::json!({ "name": "a", "webhook": { "url": "http://a/?key=s3cret" } }),
            "expected https://",
        ),
        (serde_json::json!({ "name": "a", "webhook": { "url": "https://u:s3cret@a/" } }), "token_file"),
    ] {
        let text = refused(set);
        assert!(text.contains(expected) && text.contains("'a'") && !text.contains("s3cret"), "{text}");
    }
}
