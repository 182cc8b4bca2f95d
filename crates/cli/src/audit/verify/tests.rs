use berth_api::manager::AuditKey;
use berth_tlog::SigningKey;

use super::*;
use crate::fake::Fake;
use crate::output::Format;

const ORIGIN: &str = "berth-audit/test";

fn records(count: u64) -> Vec<Vec<u8>> {
    (0..count).map(|sequence| format!("{{\"sequence\":{sequence},\"actor\":\"eve\"}}").into_bytes()).collect()
}

fn arguments(file: Option<&Path>, key: Option<&SigningKey>) -> VerifyArguments {
    VerifyArguments {
        file: file.map(Path::to_owned),
        key: Vec::new(),
        key_text: key.map(|key| key.public().to_string()).into_iter().collect(),
        checkpoint: None,
    }
}

fn manager(key: &SigningKey, export: Vec<u8>) -> Fake {
    let shown = AuditKey {
        origin: ORIGIN.to_owned(),
        algorithm: "ed25519".to_owned(),
        key: key.public().to_string(),
    };
    Fake::new().answer("GET /v1/audit/key", &shown).answer_bytes("GET /v1/audit/export", export)
}

#[test]
fn a_file_is_verified_with_the_key_alone_and_a_forged_record_is_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let (path, key) = (directory.path().join("audit.jsonl"), SigningKey::generate(ORIGIN).expect("a key"));
    fs::write(&path, export::write(ORIGIN, &records(300), &key)).expect("written");
    let fake = Fake::new();
    let output = fake.session_in(Format::Json).output;
    offline(&arguments(Some(&path), Some(&key)), &output).expect("good");
    let said: serde_json::Value = serde_json::from_str(&fake.said()).expect("json");
    assert_eq!((said["verified"].as_bool(), said["size"].as_u64()), (Some(true), Some(300)));

    let text = fs::read_to_string(&path).expect("text");
    fs::write(
        &path,
        text.replace("{\"sequence\":123,\"actor\":\"eve\"}", "{\"sequence\":123,\"actor\":\"bob\"}"),
    )
    .expect("forged");
    let failure = offline(&arguments(Some(&path), Some(&key)), &output).expect_err("forged");
    assert_eq!(failure.code(), 1);
    let message = failure.problem().expect("a problem").message.clone();
    assert!(message.contains("record 123 (line 125)"), "{message}");
    assert_eq!(offline(&arguments(Some(&path), None), &output).expect_err("no key").code(), 2);
}

#[tokio::test]
async fn a_manager_that_shows_less_than_before_or_another_past_is_found_out() {
    let directory = tempfile::tempdir().expect("a directory");
    let place = directory.path().join("seen.json");
    let key = SigningKey::generate(ORIGIN).expect("a key");
    let ask = async |key: &SigningKey, log: Vec<Vec<u8>>| {
        let fake = manager(key, export::write(ORIGIN, &log, key));
        verify_online(&fake.session(), &arguments(None, None), Some(&place)).await
    };
    ask(&key, records(300)).await.expect("good");
    ask(&key, records(700)).await.expect("it grew");
    let failure = ask(&key, records(600)).await.expect_err("it shrank");
    assert!(failure.problem().expect("a problem").message.contains("had 700"), "{failure:?}");
    let mut rewritten = records(800);
    rewritten[5] = b"{\"sequence\":5,\"actor\":\"bob\"}".to_vec();
    let failure = ask(&key, rewritten).await.expect_err("another past");
    assert!(failure.problem().expect("a problem").message.contains("history was rewritten"), "{failure:?}");
    let other = SigningKey::generate(ORIGIN).expect("a key");
    let failure = ask(&other, records(900)).await.expect_err("another key");
    assert!(failure.problem().expect("a problem").message.contains("another key"), "{failure:?}");
    ask(&key, records(701)).await.expect("what was seen is still known");
}
