use std::fs::{self, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};

use proptest::prelude::*;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::disk::pace::Pace;
use crate::layout::PoolDirs;

fn layer(number: u8) -> LayerId {
    LayerId::from_entropy([number; 10])
}

fn dirs(root: &Path) -> VmDirs {
    let pool = PoolDirs { name: "local".parse().expect("name"), path: root.to_owned() };
    let dirs = VmDirs { disk: root.join("vm"), state: root.join("state"), run: root.join("run"), pool };
    fs::create_dir_all(dirs.layers()).expect("directory");
    dirs
}

fn with_reader<T>(work: impl FnOnce(&mut Reader<'_>) -> T) -> T {
    let (pace, cancel) = (Pace::new(u64::MAX), CancellationToken::new());
    work(&mut Reader::new(&pace, &cancel))
}

/// A layer's file that is not all alike, and its hashes.
fn make(dirs: &VmDirs, number: u8, length: usize) -> LayerHashes {
    let bytes: Vec<u8> = (0..length).map(|at| (at / 4099) as u8 ^ number).collect();
    fs::write(dirs.layer(&layer(number)), bytes).expect("layer");
    let (file, _) = open(&dirs.layer(&layer(number))).expect("open");
    let hashes = with_reader(|reader| LayerHashes::make(&layer(number), reader, &file)).expect("hashed");
    write(dirs, &hashes).expect("written");
    hashes
}

fn check(dirs: &VmDirs, number: u8) -> Option<Differs> {
    let known = read(dirs, &layer(number)).expect("read").expect("there").expect("whole");
    let (file, _) = open(&dirs.layer(&layer(number))).expect("open");
    with_reader(|reader| known.check(reader, &file)).expect("checked")
}

const LENGTH: usize = 2 * CHUNK_BYTES + 12_345;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn whatever_byte_is_another_its_chunk_is_named(at in 0..LENGTH, bit in 0..8_u32) {
        let root = tempfile::tempdir().expect("directory");
        let dirs = dirs(root.path());
        make(&dirs, 1, LENGTH);
        prop_assert_eq!(check(&dirs, 1), None);
        let path = dirs.layer(&layer(1));
        let mut byte = [0];
        let file = fs::OpenOptions::new().read(true).write(true).open(&path).expect("open");
        file.read_exact_at(&mut byte, at as u64).expect("read");
        file.write_all_at(&[byte[0] ^ (1 << bit)], at as u64).expect("write");
        let found = check(&dirs, 1).map(|differs| differs.offset);
        prop_assert_eq!(found, Some((at - at % CHUNK_BYTES) as u64));
    }

    #[test]
    fn whatever_byte_of_the_hashes_is_another_they_are_not_believed(at in 0..155_usize, bit in 0..8_u32) {
        let hashes = LayerHashes { layer: layer(1), length: LENGTH as u64, chunks: vec![[7; 32]; 3] };
        let mut bytes = hashes.to_bytes();
        prop_assert_eq!(LayerHashes::from_bytes(&bytes, &layer(1)), Ok(hashes));
        let at = at % bytes.len();
        bytes[at] ^= 1 << bit;
        prop_assert_eq!(LayerHashes::from_bytes(&bytes, &layer(1)), Err(HashesError::Damaged));
        prop_assert!(LayerHashes::from_bytes(&bytes[..at], &layer(1)).is_err());
    }
}

#[test]
fn a_layer_that_is_longer_or_shorter_is_another() {
    let root = tempfile::tempdir().expect("directory");
    let dirs = dirs(root.path());
    make(&dirs, 1, LENGTH);
    let file = fs::OpenOptions::new().write(true).open(dirs.layer(&layer(1))).expect("open");
    for length in [0, 1, LENGTH as u64 - 1, LENGTH as u64 + 1] {
        file.set_len(length).expect("cut");
        let differs = check(&dirs, 1).expect("another");
        assert_eq!(differs.offset, length.min(LENGTH as u64), "{differs:?}");
        assert!(differs.detail.contains(&format!("expected {LENGTH}")), "{differs:?}");
    }
}

#[test]
fn a_layer_in_anothers_place_is_found_out_with_its_hashes_or_without() {
    let root = tempfile::tempdir().expect("directory");
    let dirs = dirs(root.path());
    make(&dirs, 1, LENGTH);
    make(&dirs, 2, LENGTH);
    let swap = |a: &Path, b: &Path| {
        let aside = root.path().join("aside");
        fs::rename(a, &aside)
            .and_then(|()| fs::rename(b, a))
            .and_then(|()| fs::rename(&aside, b))
            .expect("swapped");
    };
    swap(&dirs.layer(&layer(1)), &dirs.layer(&layer(2)));
    assert_eq!(check(&dirs, 1).expect("another").offset, 0);
    swap(&dirs.layer_hashes(&layer(1)), &dirs.layer_hashes(&layer(2)));
    assert_eq!(read(&dirs, &layer(1)).expect("read"), Some(Err(HashesError::Foreign)));
}

#[test]
fn hashes_go_with_their_layer_and_a_clone_gets_them() {
    let root = tempfile::tempdir().expect("directory");
    let (origin, clone) = (dirs(&root.path().join("a")), dirs(&root.path().join("b")));
    let hashes = make(&origin, 1, LENGTH);
    fs::hard_link(origin.layer(&layer(1)), clone.layer(&layer(1))).expect("linked");
    link(&origin, &clone, &layer(1)).expect("linked");
    link(&origin, &clone, &layer(1)).expect("linked already");
    link(&origin, &clone, &layer(2)).expect("of a layer without hashes");
    assert_eq!(read(&clone, &layer(1)).expect("read"), Some(Ok(hashes.clone())));
    fs::write(origin.hashes().join("layer-x.b3.unfinished"), b"half").expect("a leftover");
    remove_strays(&origin).expect("removed");
    assert_eq!(read(&origin, &layer(1)).expect("read"), Some(Ok(hashes.clone())));
    fs::remove_file(origin.layer(&layer(1))).expect("gone");
    remove_strays(&origin).expect("removed");
    assert_eq!(fs::read_dir(origin.hashes()).expect("hashes").count(), 0);
    // Written anew, as by a hasher that was late: a layer that is gone has none.
    write(&origin, &hashes).expect("not kept");
    assert_eq!(fs::read_dir(origin.hashes()).expect("hashes").count(), 0);
    assert_eq!(read(&clone, &layer(1)).expect("read"), Some(Ok(hashes)), "the clone's own");
}

#[test]
fn only_what_nobody_may_write_is_frozen() {
    let root = tempfile::tempdir().expect("directory");
    let path = root.path().join("layer");
    for (mode, frozen) in [(FROZEN_MODE, true), (0o644, false), (0o600, false)] {
        fs::write(&path, b"x").expect("file");
        fs::set_permissions(&path, Permissions::from_mode(mode)).expect("mode");
        assert_eq!(is_frozen(&fs::metadata(&path).expect("metadata")), frozen);
        fs::remove_file(&path).expect("removed");
    }
}

#[test]
fn a_layer_that_somebody_hashed_meanwhile_is_not_hashed_again() {
    let root = tempfile::tempdir().expect("directory");
    let dirs = dirs(root.path());
    make(&dirs, 1, LENGTH);
    let file = fs::OpenOptions::new().write(true).open(dirs.layer(&layer(1))).expect("open");
    file.write_all_at(b"other", 5000).expect("write");
    with_reader(|reader| worker::hash(&dirs, &layer(1), reader)).expect("left alone");
    assert_eq!(check(&dirs, 1).map(|differs| differs.offset), Some(0), "what was found is no longer found");
}
