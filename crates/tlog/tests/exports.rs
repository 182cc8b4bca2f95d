//! Exports that were tampered with: each is found, and the first record that is wrong is named.

use berth_tlog::export::{self, Fault, Question, Verified};
use berth_tlog::{Checkpoint, Frontier, Hash, SigningKey};
use proptest::prelude::*;

const ORIGIN: &str = "log.example/1";

fn record(sequence: u64) -> Vec<u8> {
    format!("{{\"sequence\":{sequence},\"actor\":\"user-{}\",\"x\":\"{}\"}}", sequence % 7, sequence * 31)
        .into_bytes()
}

fn key() -> SigningKey {
    SigningKey::generate(ORIGIN).expect("a key")
}

fn log(count: u64, key: &SigningKey) -> Vec<u8> {
    export::write(ORIGIN, &(0..count).map(record).collect::<Vec<_>>(), key)
}

fn trusting(key: &SigningKey) -> Question {
    Question { keys: vec![key.public().clone()], known: None }
}

fn lines(export: &[u8]) -> Vec<Vec<u8>> {
    export.strip_suffix(b"\n").expect("lines").split(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect()
}

fn joined(lines: &[Vec<u8>]) -> Vec<u8> {
    lines.iter().flat_map(|line| line.iter().copied().chain([b'\n'])).collect()
}

fn check(export: &[u8], key: &SigningKey) -> Result<Verified, Fault> {
    export::verify(export, &trusting(key))
}

/// The line (from 0) of a record: one head, and one line of hashes a tile.
fn line_of(sequence: u64) -> usize {
    usize::try_from(1 + sequence + sequence / 256).expect("small")
}

#[test]
fn a_log_of_any_size_is_verified() {
    let key = key();
    for count in [0, 1, 2, 255, 256, 257, 511, 512, 513, 1000] {
        let found = check(&log(count, &key), &key).unwrap_or_else(|fault| panic!("{count}: {fault}"));
        assert_eq!((found.first, found.end, found.checkpoint.size), (0, count, count));
        assert!(found.is_whole());
    }
}

#[test]
fn a_removed_a_moved_an_inserted_and_a_forged_record_are_each_named() {
    let key = key();
    let good = lines(&log(700, &key));
    for sequence in [0u64, 1, 100, 254, 255, 256, 300, 511, 512, 600, 698] {
        let at = line_of(sequence);
        let number = at as u64 + 1;

        let mut removed = good.clone();
        removed.remove(at);
        let fault = check(&joined(&removed), &key).expect_err("removed");
        assert!(matches!(fault, Fault::Removed { sequence: found, .. } if found == sequence), "{fault}");

        let mut forged = good.clone();
        forged[at] = format!("{{\"sequence\":{sequence},\"actor\":\"nobody\"}}").into_bytes();
        let fault = check(&joined(&forged), &key).expect_err("forged");
        assert!(
            matches!(fault, Fault::Altered { sequence: found, line } if (found, line) == (sequence, number)),
            "{fault}"
        );

        let mut inserted = good.clone();
        inserted.insert(at, format!("{{\"sequence\":{sequence},\"actor\":\"nobody\"}}").into_bytes());
        let fault = check(&joined(&inserted), &key).expect_err("inserted");
        assert!(
            matches!(fault, Fault::Inserted { sequence: found, line } if (found, line) == (sequence, number)),
            "{fault}"
        );

        let mut moved = good.clone();
        let other = if sequence % 256 == 255 { at - 1 } else { at + 1 };
        moved.swap(at, other);
        let fault = check(&joined(&moved), &key).expect_err("moved");
        let first = sequence - u64::from(other < at);
        assert!(matches!(fault, Fault::Moved { sequence: found, .. } if found == first), "{fault}");
    }
    let mut far = good.clone();
    far.swap(line_of(10), line_of(650));
    let fault = check(&joined(&far), &key).expect_err("moved far");
    assert!(matches!(fault, Fault::Moved { sequence: 10, found: 650, .. }), "{fault}");
}

#[test]
fn records_forged_with_their_hashes_are_found_by_their_tile() {
    let key = key();
    let (mut records, good) = ((0..700).map(record).collect::<Vec<_>>(), lines(&log(700, &key)));
    records[300] = record(300).to_ascii_uppercase();
    let forged =
        lines(&export::write(ORIGIN, &records, &SigningKey::generate(ORIGIN).expect("not the log's")));
    // The forger has no key: the checkpoints stay those of the log.
    let mut mixed = good.clone();
    mixed[line_of(300)].clone_from(&forged[line_of(300)]);
    let tile = |line: &[u8]| -> serde_json::Value { serde_json::from_slice(line).expect("json") };
    let closing = line_of(511) + 1;
    let mut hashes = tile(&good[closing]);
    hashes["hashes"] = tile(&forged[closing])["hashes"].clone();
    mixed[closing] =
        format!("{{\"tile\":1,\"hashes\":{},\"checkpoint\":{}}}", hashes["hashes"], hashes["checkpoint"])
            .into_bytes();
    let fault = check(&joined(&mixed), &key).expect_err("forged");
    assert!(matches!(fault, Fault::Among { first: 256, last: 511, .. }), "{fault}");
    // With checkpoints of another key there is nothing to believe.
    let fault = check(&joined(&forged), &key).expect_err("another key");
    assert!(matches!(fault, Fault::Note { .. }), "{fault}");
}

#[test]
fn a_log_that_was_cut_off_is_good_by_itself_and_found_by_an_older_checkpoint() {
    let key = key();
    let (long, short) = (log(700, &key), log(600, &key));
    let known = check(&long, &key).expect("good").checkpoint;
    check(&short, &key).expect("nothing is wrong with it by itself");
    let question = Question { known: Some(known.clone()), ..trusting(&key) };
    let fault = export::verify(&short[..], &question).expect_err("shorter than it was");
    assert!(matches!(fault, Fault::Shrunk { size: 600, known: 700 }), "{fault}");
    for size in [1u64, 255, 256, 257, 600, 700] {
        let known = check(&log(size, &key), &key).expect("good").checkpoint;
        let question = Question { known: Some(known), ..trusting(&key) };
        assert_eq!(
            export::verify(&long[..], &question).expect("it grew").contains_known,
            Some(true),
            "{size}"
        );
    }
    let lie = Checkpoint { size: 300, root: Hash::leaf(b"lie"), ..known };
    let question = Question { known: Some(lie), ..trusting(&key) };
    let fault = export::verify(&long[..], &question).expect_err("another past");
    assert!(matches!(fault, Fault::Rewritten { known: 300 }), "{fault}");
    let whole = lines(&long);
    for cut in [1, 2, 100, 257, 258, 300, whole.len() - 1] {
        let fault = check(&joined(&whole[..cut]), &key).expect_err("cut off");
        assert!(matches!(fault, Fault::CutOff { .. }), "{cut}: {fault}");
    }
}

#[test]
fn a_stretch_is_verified_against_the_whole_logs_root() {
    let key = key();
    let whole = lines(&log(1000, &key));
    let mut before = Frontier::new();
    (0..256).for_each(|number| before.push(Hash::leaf(&record(number))));
    // Records 300 to 599: from within tile 1 to within tile 2.
    let mut part = vec![export::header_line(ORIGIN, 300, 600, &before).trim_end().as_bytes().to_vec()];
    part.extend((300..512).map(record));
    part.push(whole[line_of(511) + 1].clone());
    part.extend((512..600).map(record));
    part.push(whole[line_of(767) + 1].clone());
    let note: serde_json::Value = serde_json::from_slice(&whole[line_of(767) + 1]).expect("json");
    part.push(
        export::checkpoint_line(note["checkpoint"].as_str().expect("a note")).trim_end().as_bytes().to_vec(),
    );
    let found = check(&joined(&part), &key).expect("good");
    assert_eq!((found.first, found.end, found.checkpoint.size), (300, 600, 768));
    assert!(!found.is_whole());
    part[5] = record(3);
    let fault = check(&joined(&part), &key).expect_err("another record");
    assert!(matches!(fault, Fault::Moved { sequence: 304, found: 3, .. }), "{fault}");
}

#[test]
fn nonsense_is_refused_and_fills_no_memory() {
    let key = key();
    for bad in [
        &b""[..],
        b"\n",
        b"{}",
        b"hello\nworld\n",
        b"{\"log\":\"a\",\"version\":1,\"first\":9,\"end\":1,\"peaks\":[]}\n",
    ] {
        assert!(matches!(check(bad, &key).expect_err("nonsense"), Fault::Format { line: 1, .. }));
    }
    let mut endless = log(0, &key);
    endless.truncate(endless.iter().position(|byte| *byte == b'\n').expect("a line") + 1);
    endless.extend(b"{\"sequence\":0}\n".repeat(5000));
    assert!(check(&endless, &key).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn any_changed_byte_is_found_and_its_record_named(count in 1u64..600, place in 0.0f64..1.0, change in 1u8..=255) {
        let key = key();
        let good = log(count, &key);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "a place in a file")]
        let at = ((good.len() as f64 * place) as usize).min(good.len() - 1);
        let mut bad = good.clone();
        bad[at] ^= change;
        let fault = match check(&bad, &key) {
            Err(fault) => fault,
            // Only what JSON reads the same may pass: blanks and the last line break.
            Ok(found) => {
                prop_assert!(found.is_whole() && found.checkpoint.size == count);
                return Ok(());
            }
        };
        let line = good[..at].iter().filter(|byte| **byte == b'\n').count();
        let text = &lines(&good)[line];
        if text.starts_with(b"{\"sequence\":") && good[at] != b'\n' {
            let sequence = (line - 1 - (line - 1) / 257) as u64;
            let named = match fault {
                Fault::Altered { sequence, .. } | Fault::Moved { sequence, .. } | Fault::Removed { sequence, .. } => Some(sequence),
                _ => None,
            };
            prop_assert_eq!(named, Some(sequence), "{}", fault);
        }
    }

    #[test]
    fn any_record_that_is_removed_or_swapped_is_found(count in 2u64..600, a in any::<u64>(), b in any::<u64>()) {
        let key = key();
        let good = lines(&log(count, &key));
        let (a, b) = (a % count, b % count);
        let mut bad = good.clone();
        bad.remove(line_of(a));
        prop_assert!(check(&joined(&bad), &key).is_err());
        if a != b {
            let mut bad = good;
            bad.swap(line_of(a), line_of(b));
            let fault = check(&joined(&bad), &key).expect_err("swapped");
            let (low, high) = (a.min(b), a.max(b));
            let is_named = matches!(fault, Fault::Moved { sequence, found, .. } if (sequence, found) == (low, high));
            prop_assert!(is_named, "{}", fault);
        }
    }
}
