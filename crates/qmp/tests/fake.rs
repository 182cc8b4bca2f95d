//! The session against a fake QEMU that behaves as badly as a peer can.

use std::time::Duration;

use berth_qmp::commands::{Cont, GetFd, QueryStatus, Stop};
use berth_qmp::{CloseReason, ConnectOptions, EventKind, Qmp, QmpError};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, DuplexStream, Lines, ReadHalf, WriteHalf, split};

const GREETING: &str =
    r#"{"QMP":{"version":{"qemu":{"micro":22,"minor":2,"major":7},"package":""},"capabilities":["oob"]}}"#;

/// The fake's end of the wire.
struct Fake {
    lines: Lines<BufReader<ReadHalf<DuplexStream>>>,
    write: WriteHalf<DuplexStream>,
}

impl Fake {
    fn new(stream: DuplexStream) -> Self {
        let (read, write) = split(stream);
        Self { lines: BufReader::new(read).lines(), write }
    }

    async fn say(&mut self, text: &str) {
        self.write.write_all(format!("{text}\r\n").as_bytes()).await.expect("the client listens");
    }

    /// The next command's name and id.
    async fn asked(&mut self) -> (String, u64) {
        let line = self.lines.next_line().await.expect("readable").expect("a command");
        let command: Value = serde_json::from_str(&line).expect("JSON");
        let name = command["execute"].as_str().or(command["exec-oob"].as_str()).expect("a name");
        (name.to_owned(), command["id"].as_u64().expect("an id"))
    }

    async fn greet(&mut self) {
        self.say(GREETING).await;
        let (name, id) = self.asked().await;
        assert_eq!(name, "qmp_capabilities");
        self.say(&json!({"return": {}, "id": id}).to_string()).await;
    }
}

fn options() -> ConnectOptions {
    ConnectOptions {
        connect_timeout: Duration::from_secs(5),
        line_bytes_max: 4096,
        ..ConnectOptions::default()
    }
}

async fn session() -> (Qmp, Fake) {
    let (ours, theirs) = tokio::io::duplex(1024);
    let mut fake = Fake::new(theirs);
    let (connected, ()) = tokio::join!(Qmp::over_stream(ours, options()), fake.greet());
    (connected.expect("negotiated").0, fake)
}

/// What connecting gives when the peer's first words are these.
async fn connect_to(first_words: &[u8]) -> QmpError {
    let (ours, mut theirs) = tokio::io::duplex(1 << 16);
    theirs.write_all(first_words).await.expect("room");
    let options = ConnectOptions { connect_timeout: Duration::from_millis(200), ..options() };
    Qmp::over_stream(ours, options).await.expect_err("no session")
}

#[tokio::test]
async fn who_does_not_greet_is_told_from_who_talks_nonsense() {
    assert!(matches!(connect_to(b"").await, QmpError::TimedOut { waited_ms: 200, .. }));
    assert!(matches!(connect_to(&GREETING.as_bytes()[..20]).await, QmpError::TimedOut { .. }));
    assert!(matches!(connect_to(b"SSH-2.0-OpenSSH\r\n").await, QmpError::Protocol(_)));
    assert!(matches!(connect_to(b"{\"return\":{}}\r\n").await, QmpError::Protocol(_)));
    assert!(matches!(connect_to(&[0xff; 5000]).await, QmpError::Protocol(_)));
    let missing = Qmp::connect("/nonexistent/qmp").await.expect_err("no socket");
    assert!(matches!(missing, QmpError::Connect { .. }) && missing.is_connection_lost());
}

#[tokio::test]
async fn many_callers_get_their_own_answers_in_any_order() {
    let (qmp, mut fake) = session().await;
    let other = qmp.clone();
    let answers = async {
        let (first, second) = (fake.asked().await, fake.asked().await);
        fake.say(r#"{"timestamp":{"seconds":1,"microseconds":2},"event":"STOP"}"#).await;
        fake.say(r#"{"return":{},"id":4711}"#).await;
        for (name, id) in [second, first] {
            let answer = match name.as_str() {
                "stop" => json!({"error": {"class": "GenericError", "desc": "no"}, "id": id}),
                _ => json!({"return": {"running": true, "status": "napping", "new": 1}, "id": id}),
            };
            fake.say(&answer.to_string()).await;
        }
    };
    let mut events = qmp.events();
    let (stopped, status, ()) = tokio::join!(qmp.call(Stop {}), other.call(QueryStatus {}), answers);
    let refused = stopped.expect_err("refused");
    assert_eq!(refused.to_string(), "stop failed: no");
    assert!(!refused.is_connection_lost());
    assert_eq!(status.expect("answered").status.as_str(), "napping");
    let event = events.recv().await.expect("an event");
    assert_eq!((event.kind, event.at.epoch_us()), (EventKind::Stop, 1_000_002));
}

#[tokio::test]
async fn the_peers_death_in_a_call_ends_the_call_the_events_and_the_waiting() {
    let (qmp, mut fake) = session().await;
    let mut events = qmp.events();
    let death = async {
        fake.asked().await;
        fake.say(r#"{"event":"RESUME","timestamp":{"seconds":1,"microseconds":0}}"#).await;
        drop(fake);
    };
    let (called, ()) = tokio::join!(qmp.call(Cont {}), death);
    assert!(matches!(called, Err(QmpError::Closed { reason: CloseReason::PeerGone })), "{called:?}");
    assert_eq!(qmp.closed().await, CloseReason::PeerGone);
    assert!(qmp.is_closed());
    assert_eq!(events.recv().await.map(|event| event.kind), Some(EventKind::Resume));
    assert_eq!(events.recv().await, None);
    assert!(matches!(qmp.call(Cont {}).await, Err(QmpError::Closed { .. })));
    assert_eq!(qmp.events().recv().await, None);
}

#[tokio::test]
async fn nonsense_in_a_session_ends_it_for_all_and_says_why() {
    for nonsense in ["}{", GREETING, r#"{"error":{"class":"GenericError","desc":"JSON parse error"}}"#] {
        let (qmp, mut fake) = session().await;
        let bad = async {
            fake.asked().await;
            fake.say(nonsense).await;
        };
        let (called, ()) = tokio::join!(qmp.call(Cont {}), bad);
        assert!(matches!(called, Err(QmpError::Protocol(_))), "{nonsense}: {called:?}");
        assert!(matches!(qmp.closed().await, CloseReason::Protocol(_)));
    }
}

#[tokio::test]
async fn a_line_without_end_is_cut_off_instead_of_filling_memory() {
    let (qmp, mut fake) = session().await;
    let flood = tokio::spawn(async move { while fake.write.write_all(&[b'x'; 512]).await.is_ok() {} });
    let reason = qmp.closed().await;
    assert!(matches!(reason, CloseReason::Protocol(_)), "{reason:?}");
    flood.await.expect("the flood met a closed door");
}

#[tokio::test]
async fn a_caller_that_gives_up_harms_nobody() {
    let (qmp, mut fake) = session().await;
    let impatient = qmp.call_within(Stop {}, Duration::from_millis(20)).await;
    assert!(matches!(impatient, Err(QmpError::TimedOut { .. })));
    let (_, late_id) = fake.asked().await;
    let answers = async {
        fake.say(&json!({"return": {}, "id": late_id}).to_string()).await;
        let (name, id) = fake.asked().await;
        assert_eq!(name, "cont");
        fake.say(&json!({"return": {}, "id": id}).to_string()).await;
    };
    let (called, ()) = tokio::join!(qmp.call(Cont {}), answers);
    called.expect("the session goes on");
}

#[tokio::test]
async fn a_hundred_commands_never_have_more_than_seven_under_way() {
    let (qmp, mut fake) = session().await;
    let callers: Vec<_> = (0..100)
        .map(|_| {
            tokio::spawn({
                let qmp = qmp.clone();
                async move { qmp.call(Cont {}).await }
            })
        })
        .collect();
    let mut under_way = std::collections::VecDeque::new();
    for _ in 0..100 {
        while under_way.len() < 7 {
            // Nothing more comes once seven are out, or all were asked.
            match tokio::time::timeout(Duration::from_millis(50), fake.asked()).await {
                Ok((_, id)) => under_way.push_back(id),
                Err(_) => break,
            }
        }
        assert!(
            tokio::time::timeout(Duration::from_millis(2), fake.asked()).await.is_err(),
            "an eighth was sent"
        );
        let id = under_way.pop_front().expect("one is under way");
        fake.say(&json!({"return": {}, "id": id}).to_string()).await;
    }
    for caller in callers {
        caller.await.expect("no panic").expect("answered");
    }
}

#[tokio::test]
async fn descriptors_are_refused_where_they_cannot_go() {
    let (qmp, _fake) = session().await;
    let file = std::fs::File::open("/dev/null").expect("openable");
    let refused = qmp.call_with_fds(GetFd { name: "x".into() }, vec![file.into()]).await;
    assert!(matches!(refused, Err(QmpError::DescriptorsUnsupported { .. })));
}

#[tokio::test]
async fn an_answer_of_the_wrong_form_names_the_command() {
    let (qmp, mut fake) = session().await;
    let answer = async {
        let (_, id) = fake.asked().await;
        fake.say(&json!({"return": {"running": "perhaps"}, "id": id}).to_string()).await;
    };
    let (called, ()) = tokio::join!(qmp.call(QueryStatus {}), answer);
    assert!(matches!(called, Err(QmpError::Reply { .. })));
}

#[tokio::test]
async fn dropping_the_last_handle_closes_the_socket_after_what_was_asked() {
    let (qmp, mut fake) = session().await;
    let _ = tokio::time::timeout(Duration::from_millis(20), qmp.call(Stop {})).await;
    drop(qmp);
    assert_eq!(fake.asked().await.0, "stop");
    assert!(fake.lines.next_line().await.expect("readable").is_none());
}
