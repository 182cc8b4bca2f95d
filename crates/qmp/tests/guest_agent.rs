//! The guest agent's protocol against guests that lag, lie and vanish.

use std::time::Duration;

use berth_qmp::QmpError;
use berth_qmp::guest_agent::{GuestAgent, ShutdownMode};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, DuplexStream};

const LONG: Duration = Duration::from_secs(5);
const SHORT: Duration = Duration::from_millis(50);

struct Guest {
    stream: BufReader<DuplexStream>,
}

impl Guest {
    fn pair() -> (GuestAgent, Self) {
        let (ours, theirs) = tokio::io::duplex(4096);
        (GuestAgent::over(ours), Self { stream: BufReader::new(theirs) })
    }

    async fn asked(&mut self) -> Option<Value> {
        let mut line = Vec::new();
        self.stream.read_until(b'\n', &mut line).await.expect("readable");
        let start = line.iter().position(|&byte| byte != 0xFF)?;
        Some(serde_json::from_slice(&line[start..]).expect("a question"))
    }

    async fn say(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).await.expect("the host listens");
    }

    async fn answer_sync(&mut self) {
        let question = self.asked().await.expect("a sync");
        assert_eq!(question["execute"], "guest-sync-delimited");
        self.say(b"\xFF").await;
        self.say(format!("{}\n", json!({"return": question["arguments"]["id"]}))).await;
    }

    /// Answers one call, and says which it was.
    async fn serve(&mut self, answer: Value) -> String {
        self.answer_sync().await;
        let question = self.asked().await.expect("a call");
        self.say(format!("{answer}\n")).await;
        question["execute"].as_str().expect("a name").to_owned()
    }
}

#[tokio::test]
async fn calls_are_answered_and_refusals_carry_the_agents_words() {
    let (agent, mut guest) = Guest::pair();
    let (pinged, _) = tokio::join!(agent.ping(LONG), guest.serve(json!({"return": {}})));
    pinged.expect("there");
    let (name, asked) =
        tokio::join!(agent.host_name(LONG), guest.serve(json!({"return": {"host-name": "web1"}})));
    assert_eq!((name.expect("a name").as_str(), asked.as_str()), ("web1", "guest-get-host-name"));
    let info = json!({"return": {"version": "7.2", "supported_commands": [
        {"name": "guest-exec", "enabled": false, "success-response": true},
        {"name": "guest-ping", "enabled": true, "success-response": true}]}});
    let (info, _) = tokio::join!(agent.info(LONG), guest.serve(info));
    let info = info.expect("told");
    assert!(info.can("guest-ping") && !info.can("guest-exec") && !info.can("guest-fly"));
    let refusal = json!({"error": {"class": "CommandNotFound", "desc": "disabled"}});
    let (frozen, _) = tokio::join!(agent.freeze(LONG), guest.serve(refusal));
    assert_eq!(frozen.expect_err("refused").to_string(), "guest-fsfreeze-freeze failed: disabled");
    let (thawed, _) = tokio::join!(agent.thaw(LONG), guest.serve(json!({"return": 3})));
    assert_eq!(thawed.expect("thawed"), 3);
}

#[tokio::test]
async fn answers_to_old_questions_are_thrown_away() {
    let (agent, mut guest) = Guest::pair();
    assert!(
        matches!(agent.ping(SHORT).await, Err(QmpError::TimedOut { command, waited_ms: 50 }) if command == "guest-ping")
    );
    // The guest wakes up: it answers the old call, whole, and half a line of noise on top, then the new one.
    let late = async {
        guest.serve(json!({"return": "old"})).await;
        guest.say("{\"noise").await;
        guest.serve(json!({"return": "frozen"})).await
    };
    let (frozen, _) = tokio::join!(agent.is_frozen(LONG), late);
    assert!(frozen.expect("the answer to this question"));
}

#[tokio::test]
async fn an_endless_answer_is_cut_off_and_the_next_call_works() {
    let (agent, mut guest) = Guest::pair();
    let flood = async {
        guest.answer_sync().await;
        guest.asked().await;
        for _ in 0..600 {
            guest.say([b'x'; 2048]).await;
        }
        guest.say("\n").await;
        guest.serve(json!({"return": {}})).await
    };
    // The host stops reading in the middle, so the rest of the flood is read by the next call.
    let calls = async {
        let flooded = agent.ping(LONG).await;
        (flooded, agent.ping(LONG).await)
    };
    let ((flooded, after), _) = tokio::join!(calls, flood);
    assert!(matches!(flooded, Err(QmpError::Protocol(_))), "{flooded:?}");
    after.expect("works again");
}

#[tokio::test]
async fn silence_after_shutdown_means_obeyed_and_a_refusal_is_one() {
    let (agent, mut guest) = Guest::pair();
    let refuses = async {
        guest.serve(json!({"return": {}})).await;
        let question = guest.asked().await.expect("a call");
        assert_eq!(question["arguments"]["mode"], "reboot");
        guest.say("{\"error\": {\"class\": \"GenericError\", \"desc\": \"not now\"}}\n").await;
        guest.answer_sync().await;
    };
    let (refused, ()) = tokio::join!(agent.shutdown(ShutdownMode::Reboot, LONG), refuses);
    assert_eq!(refused.expect_err("refused").to_string(), "guest-shutdown failed: not now");
    let obeys = async {
        guest.serve(json!({"return": {}})).await;
        guest.asked().await.expect("a call");
        drop(guest);
    };
    let (obeyed, ()) = tokio::join!(agent.shutdown(ShutdownMode::Powerdown, LONG), obeys);
    obeyed.expect("obeyed");
    assert!(matches!(agent.ping(LONG).await, Err(QmpError::Closed { .. })));
}
