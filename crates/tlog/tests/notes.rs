//! Signed notes and checkpoints, and those that must not be believed.

use berth_tlog::note::{self, KeyError, NoteError};
use berth_tlog::{Checkpoint, Hash, SigningKey, VerifyingKey};

fn key(name: &str) -> SigningKey {
    SigningKey::generate(name).expect("a key")
}

fn checkpoint() -> Checkpoint {
    Checkpoint { origin: "log.example/1".to_owned(), size: 7, root: Hash::leaf(b"x") }
}

#[test]
fn a_note_that_another_implementation_signed_opens() {
    // The example of Go's package sumdb/note, which the specification grew out of.
    let key: VerifyingKey =
        "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW".parse().expect("a key");
    let text = "If you think cryptography is the answer to your problem,\n\
                then you don't know what your problem is.\n";
    let signature =
        "x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=";
    let signed = format!("{text}\n\u{2014} PeterNeumann {signature}\n");
    assert_eq!(note::open(&signed, &[key]).expect("good"), text);
}

#[test]
fn a_checkpoint_is_signed_opened_and_has_the_specified_form() {
    let key = key("log.example/1");
    let note = checkpoint().sign(&key);
    let lines: Vec<&str> = note.split('\n').collect();
    assert_eq!(&lines[..2], ["log.example/1", "7"]);
    assert_eq!((lines[2].len(), lines[3]), (44, ""));
    assert!(lines[4].starts_with("\u{2014} log.example/1 "), "{note}");
    assert_eq!(Checkpoint::open(&note, &[key.public().clone()]).expect("good"), checkpoint());
    let again: VerifyingKey = key.public().to_string().parse().expect("own text");
    assert_eq!(again, *key.public());
    let read = SigningKey::from_pem("log.example/1", &key.to_pem()).expect("own PEM");
    assert_eq!(read.public(), key.public());
    assert!(!format!("{read:?}").contains("PRIVATE"));
}

#[test]
fn a_wrong_key_and_every_changed_byte_are_found() {
    let (right, wrong) = (key("log"), key("log"));
    let note = checkpoint().sign(&right);
    assert_eq!(note::open(&note, &[wrong.public().clone()]), Err(NoteError::UnknownKey));
    assert_eq!(note::open(&note, &[]), Err(NoteError::UnknownKey));
    let keys = [wrong.public().clone(), right.public().clone()];
    note::open(&note, &keys).expect("one of them");
    for at in 0..note.len() {
        let mut bytes = note.clone().into_bytes();
        bytes[at] ^= 1;
        let Ok(changed) = String::from_utf8(bytes) else { continue };
        assert!(Checkpoint::open(&changed, &keys).is_err(), "byte {at}: {changed:?}");
    }
}

#[test]
fn signatures_of_others_are_passed_over_and_do_not_count() {
    let (own, other) = (key("log"), key("witness"));
    let text = checkpoint().text();
    let mut note = own.sign(&text);
    note.push_str(other.sign(&text).rsplit("\n\n").next().expect("a signature"));
    note::open(&note, &[own.public().clone()]).expect("signed by its log");
    note::open(&note, &[other.public().clone()]).expect("signed by the witness");
}

#[test]
fn keys_that_are_none_are_refused_without_repeating_them() {
    for bad in ["", "a+b", "a+00000000+AQ==", "log+zzzzzzzz+AAAA", "a b+00000000+AAAA"] {
        assert_eq!(bad.parse::<VerifyingKey>().expect_err(bad), KeyError::Public, "{bad}");
    }
    let good = key("log").public().to_string();
    let forged = good.replacen("log+", "other+", 1);
    assert_eq!(forged.parse::<VerifyingKey>(), Err(KeyError::Public), "the id is of name and key");
    assert!(matches!(SigningKey::generate("a b"), Err(KeyError::Name { .. })));
    assert!(matches!(
        SigningKey::from_pem("log", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----"),
        Err(KeyError::Private)
    ));
}

#[test]
fn a_checkpoint_has_one_way_to_write_its_size() {
    let root = Hash::leaf(b"x");
    for size in ["07", "+7", " 7", "", "-1", "7.0"] {
        assert_eq!(Checkpoint::parse(&format!("log\n{size}\n{root}\n")), None, "{size}");
    }
    assert!(Checkpoint::parse(&format!("log\n0\n{root}\n")).is_some());
}
