use super::*;

fn bearer() -> Bearer {
    Bearer { token: TokenId::from_entropy([5; 10]), secret: [0xfb; SECRET_BYTES] }
}

#[test]
fn a_bearer_secret_survives_its_text() {
    let text = bearer().to_string();
    assert!(text.parse::<Bearer>().expect("own text") == bearer(), "{text}");
}

#[test]
fn nonsense_is_refused() {
    let good = bearer().to_string();
    for bad in [
        "",
        "berth_",
        "berth__",
        &good[1..],
        &good[..good.len() - 2],
        &format!("{good}AAAA"),
        &good.replace('_', "-"),
    ] {
        assert!(bad.parse::<Bearer>().is_err(), "{bad}");
    }
}

#[test]
fn a_hash_knows_its_secret_and_no_other() {
    let hash = SecretHash::of(b"secret");
    assert!(hash.is_of(b"secret") && !hash.is_of(b"Secret") && !hash.is_of(b""));
    let json = serde_json::to_string(&hash).expect("json");
    assert!(serde_json::from_str::<SecretHash>(&json).expect("own json") == hash);
    assert!(serde_json::from_str::<SecretHash>("\"ab\"").is_err());
    assert_eq!(format!("{hash:?}"), "SecretHash(…)");
}
