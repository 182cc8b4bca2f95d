use tokio_util::sync::CancellationToken;

use super::*;
use crate::layout::PoolDirs;

fn dirs(root: &Path) -> VmDirs {
    let pool = PoolDirs { name: "local".parse().expect("name"), path: root.to_owned() };
    VmDirs { disk: root.join("vms/vm"), state: root.join("state"), run: root.join("run"), pool }
}

#[test]
fn a_file_that_was_read_is_spared_until_anything_of_it_changes() {
    let root = tempfile::tempdir().expect("directory");
    let path = root.path().join("a");
    std::fs::write(&path, b"one").expect("written");
    let state = || FileState::of(&std::fs::metadata(&path).expect("metadata"));
    let recent = Recent::default();
    recent.remember(state(), "a");
    assert!(recent.has(state(), "a") && !recent.has(state(), "b"));
    // The clock that files go by is coarse.
    std::thread::sleep(Duration::from_millis(20));
    std::fs::write(&path, b"two").expect("written");
    assert!(!recent.has(state(), "a"), "the same length, and another time");
}

#[test]
fn what_says_nothing_of_a_snapshot_is_no_fault_of_it() {
    let root = tempfile::tempdir().expect("directory");
    let dirs = dirs(root.path());
    let (pace, cancel) = (Pace::new(u64::MAX), CancellationToken::new());
    let (snapshot, recent) = (SnapshotId::from_entropy([1; 10]), Recent::default());
    let mut look = Look::new(&dirs, &snapshot, Reader::new(&pace, &cancel), &recent);
    let path = dirs.layer(&LayerId::from_entropy([1; 10]));
    let too_many = io::Error::from_raw_os_error(libc::EMFILE);
    assert!(look.io_fault(&path, too_many).is_err() && look.facts.faults.is_empty());
    // The snapshot is not there: that its layer is not either says nothing.
    let missing = look.io_fault(&path, io::ErrorKind::NotFound.into());
    assert_eq!(missing.expect_err("gone").code, berth_model::ProblemCode::NotFound);
    look.fault(&path, Some(4096), "wrong".into());
    let named = look.facts().faults[0].to_string();
    assert_eq!(named, format!("layers/{}.qcow2 at byte 4096: wrong", LayerId::from_entropy([1; 10])));
}

#[tokio::test]
async fn whoever_does_not_want_it_any_more_has_the_thread_end() {
    let root = tempfile::tempdir().expect("directory");
    let path = root.path().join("long");
    std::fs::File::create(&path).and_then(|file| file.set_len(1 << 40)).expect("a long file");
    let cancel = CancellationToken::new();
    let stop = cancel.clone();
    let reading = quietly(move || {
        let mut reader = Reader::new(&Pace::new(64 << 20), &cancel);
        let file = File::open(&path).expect("open");
        match reader.each_chunk(&file, 1 << 40, |_, _| true) {
            Err(quiet::Broken::Off(_)) => Ok(reader.read_bytes()),
            other => panic!("{other:?}"),
        }
    });
    let (read, ()) = tokio::join!(reading, async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        stop.cancel();
    });
    assert!(read.expect("ended") < 1 << 30);
}
