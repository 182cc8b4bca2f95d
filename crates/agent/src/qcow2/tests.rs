//! What a head must have, and everything that an enemy puts in it instead.

use super::*;

const CLUSTER: u64 = 65536;
const LENGTH: u64 = 4 * CLUSTER;

/// A head of an empty image of 1 GiB.
fn good(version: u32) -> Vec<u8> {
    let mut head = vec![0u8; HEAD_BYTES];
    head[..4].copy_from_slice(&MAGIC);
    put32(&mut head, 4, version);
    put32(&mut head, 20, 16);
    put64(&mut head, 24, 1 << 30);
    put32(&mut head, 36, 2);
    put64(&mut head, 40, 3 * CLUSTER);
    put64(&mut head, 48, CLUSTER);
    put32(&mut head, 56, 1);
    if version == 3 {
        put32(&mut head, 96, 4);
        put32(&mut head, 100, 112);
    }
    head
}

fn put32(head: &mut [u8], at: usize, value: u32) {
    head[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

fn put64(head: &mut [u8], at: usize, value: u64) {
    head[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

fn fault(change: impl FnOnce(&mut Vec<u8>)) -> Fault {
    let mut head = good(3);
    change(&mut head);
    check(&head, LENGTH).expect_err("a fault")
}

fn extension(kind: u32, length: u32) -> impl FnOnce(&mut Vec<u8>) {
    move |head| {
        put32(head, 112, kind);
        put32(head, 116, length);
    }
}

#[test]
fn plain_images_of_both_versions_are_taken() {
    for version in [2, 3] {
        let head = check(&good(version), LENGTH).expect("good");
        assert_eq!(head, Head { virtual_size_bytes: 1 << 30, version });
    }
}

#[test]
fn images_that_name_other_files_are_refused() {
    assert_eq!(fault(|head| put64(head, 8, 200)), Fault::BackingFile);
    assert_eq!(fault(|head| put32(head, 16, 11)), Fault::BackingFile);
    assert_eq!(fault(extension(EXTENSION_BACKING_FORMAT, 5)), Fault::BackingFile);
    assert_eq!(fault(|head| put64(head, 72, INCOMPATIBLE_DATA_FILE)), Fault::DataFile);
    assert_eq!(fault(extension(EXTENSION_DATA_FILE, 11)), Fault::DataFile);
}

#[test]
fn what_can_not_be_read_as_it_is_is_refused() {
    assert_eq!(fault(|head| put32(head, 32, 2)), Fault::Encrypted);
    assert_eq!(fault(extension(EXTENSION_ENCRYPTION, 16)), Fault::Encrypted);
    assert_eq!(fault(|head| put64(head, 72, INCOMPATIBLE_CORRUPT)), Fault::Corrupt);
    assert_eq!(fault(|head| put64(head, 72, INCOMPATIBLE_DIRTY)), Fault::Dirty);
    assert_eq!(fault(|head| put64(head, 72, 1 << 63)), Fault::UnknownFeatures(1 << 63));
    assert_eq!(fault(|head| put32(head, 60, 1)), Fault::InternalSnapshots);
    assert_eq!(fault(|head| put32(head, 4, 4)), Fault::Version(4));
    assert_eq!(fault(|head| head[0] = 0), Fault::NotQcow2);
}

#[test]
fn absurd_numbers_are_refused() {
    let absurd: [(usize, u32); 6] = [(20, 8), (20, 22), (36, 1), (36, u32::MAX), (56, 0), (96, 7)];
    for (at, value) in absurd {
        let fault = fault(|head| put32(head, at, value));
        assert!(matches!(fault, Fault::OutOfRange { .. }), "{at}: {fault}");
    }
    for size in [0, u64::MAX, (64 << 40) + 1] {
        assert!(matches!(fault(|head| put64(head, 24, size)), Fault::OutOfRange { .. }), "{size}");
    }
    assert!(matches!(fault(extension(0x1234, u32::MAX)), Fault::OutOfRange { .. }));
    for length in [0, 103, 108, u32::MAX] {
        assert!(matches!(fault(|head| put32(head, 100, length)), Fault::OutOfRange { .. }), "{length}");
    }
}

#[test]
fn tables_outside_the_file_are_a_truncation() {
    assert!(matches!(
        check(&good(3), 3 * CLUSTER),
        Err(Fault::Truncated { what: "the first-level table", .. })
    ));
    assert!(matches!(check(&good(3), CLUSTER), Err(Fault::Truncated { .. })));
    let far = fault(|head| put64(head, 48, !(CLUSTER - 1)));
    assert!(matches!(far, Fault::Truncated { .. }), "{far}");
    assert!(matches!(fault(|head| put64(head, 40, 7)), Fault::OutOfRange { .. }));
}

#[test]
fn no_beginning_of_a_head_is_taken_or_breaks_the_reader() {
    for version in [2, 3] {
        let head = good(version);
        for length in 0..120 {
            let _ = check(&head[..length], length as u64).expect_err("too short");
        }
    }
}

#[test]
fn no_single_byte_breaks_the_reader() {
    for at in 0..128 {
        for value in [1, 0x7f, 0x80, 0xff] {
            let mut head = good(3);
            head[at] = value;
            // Taken or refused, but never a panic.
            let _ = check(&head, LENGTH);
        }
    }
}

#[test]
fn a_layer_lies_on_what_it_may_lie_on_and_nothing_else() {
    use crate::snapshot::overlay::{Below, content};
    let layer = |path| content(1 << 30, Some(Below { path, format: "qcow2" })).expect("a layer");
    let own = layer("layer-0000000000000001.qcow2");
    let length = own.len() as u64;
    let may = |name: &str| name == "layer-0000000000000001.qcow2";
    assert_eq!(check_layer(&own, length, &may).expect("ours").virtual_size_bytes, 1 << 30);
    assert_eq!(check(&own, length), Err(Fault::BackingFile), "as an image it is none");
    for stranger in ["/etc/shadow", "../layer-0000000000000001.qcow2", "json:{}", "nbd://192.0.2.1/x"] {
        assert_eq!(check_layer(&layer(stranger), length, &may), Err(Fault::OtherBackingFile), "{stranger}");
    }
    let mut far = own.clone();
    put64(&mut far, 8, u64::MAX - 4);
    assert_eq!(check_layer(&far, length, &may), Err(Fault::OtherBackingFile));
    let mut data = own;
    put64(&mut data, 72, INCOMPATIBLE_DATA_FILE);
    assert_eq!(check_layer(&data, length, &may), Err(Fault::DataFile));
}
