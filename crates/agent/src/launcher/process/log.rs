//! What a QEMU says on its standard output and error: `qemu.log` in its run directory.
//!
//! Some of what QEMU says is said because of what a guest does, and a guest can do it as often as it likes. So the log
//! is bounded: whoever watches the process looks at it every second and cuts it to its newest part. QEMU appends, so its
//! next word lands at the new end, whoever cut the file meanwhile, and it never waits for anybody; that is why this is
//! a file and not a pipe, for QEMU goes on without an agent. A log that grows while no agent runs is cut by the next one.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::MissedTickBehavior;

/// Longest log that is left alone, in bytes. Less: the beginning of a trouble is lost in what follows from it.
const LOG_BYTES_MAX: u64 = 1 << 20;
/// How much of a longer one is kept, in bytes from its end.
const KEPT_BYTES: u64 = 256 << 10;
/// How often it is looked at. A flood grows by some ten megabytes a second.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// How much of what QEMU said is shown, in bytes from its end.
const LAST_WORDS_BYTES: u64 = 2048;

/// Where the log of the process with this run directory is.
pub fn path(run_dir: &Path) -> PathBuf {
    run_dir.join("qemu.log")
}

/// A new log for a new process: what an earlier one said would be taken for this one's.
///
/// # Errors
/// When the system refuses.
pub fn begin(path: &Path) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    OpenOptions::new().append(true).create_new(true).mode(0o600).open(path)
}

/// Keeps a log from growing, until dropped.
pub async fn keep_bounded(path: &Path) {
    let mut look = tokio::time::interval(LOOK_INTERVAL);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        look.tick().await;
        // One that is gone, with its VM, does not grow.
        if fs::metadata(path).is_ok_and(|log| log.len() > LOG_BYTES_MAX) {
            let cut_one = path.to_owned();
            let cut = tokio::task::spawn_blocking(move || cut(&cut_one)).await;
            if let Ok(Err(error)) = cut {
                tracing::warn!(path = %path.display(), %error, "QEMU's log can't be cut");
            }
        }
    }
}

/// Cuts a log to its newest part. What QEMU says between the reading and the cutting is lost.
fn cut(path: &Path) -> io::Result<()> {
    let mut file = OpenOptions::new().read(true).append(true).open(path)?;
    let length = file.metadata()?.len();
    let kept = end_of(&mut file, KEPT_BYTES)?;
    file.set_len(0)?;
    let left_out = length.saturating_sub(KEPT_BYTES);
    file.write_all(format!("[berth: {left_out} bytes before this were left out]\n").as_bytes())?;
    file.write_all(&kept)
}

/// The end of what QEMU said.
pub fn last_words(path: &Path) -> String {
    let end = File::open(path).and_then(|mut file| end_of(&mut file, LAST_WORDS_BYTES));
    String::from_utf8_lossy(&end.unwrap_or_default()).trim().to_owned()
}

/// The last bytes of a file, at most so many, though it may grow meanwhile.
fn end_of(file: &mut File, most: u64) -> io::Result<Vec<u8>> {
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(most)))?;
    let mut text = Vec::new();
    file.take(most).read_to_end(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GLANCE: Duration = Duration::from_millis(20);

    #[tokio::test]
    async fn a_flood_leaves_the_newest_of_it_and_what_is_said_later_comes_after() {
        let directory = tempfile::tempdir().expect("directory");
        let path = path(directory.path());
        let mut qemu = begin(&path).expect("log");
        let watching = tokio::spawn({
            let path = path.clone();
            async move { keep_bounded(&path).await }
        });
        for round in 0..2 {
            qemu.write_all(&vec![b'x'; 3 << 20]).expect("said");
            writeln!(qemu, "newest of {round}").expect("said");
            let bounded = async {
                while fs::metadata(&path).expect("log").len() > LOG_BYTES_MAX {
                    tokio::time::sleep(GLANCE).await;
                }
            };
            tokio::time::timeout(LOOK_INTERVAL * 60, bounded).await.expect("cut");
            // Cutting ends with the writing of what is kept.
            while !last_words(&path).ends_with(&format!("newest of {round}")) {
                tokio::time::sleep(GLANCE).await;
            }
        }
        writeln!(qemu, "afterwards").expect("said");
        let text = fs::read_to_string(&path).expect("no hole, for those are not text");
        assert!(!text.contains('\0') && text.len() as u64 <= KEPT_BYTES + 128, "{} bytes", text.len());
        assert!(text.starts_with("[berth: ") && text.ends_with("newest of 1\nafterwards\n"));
        watching.abort();
    }

    #[test]
    fn a_new_process_has_a_log_of_its_own() {
        let directory = tempfile::tempdir().expect("directory");
        let path = path(directory.path());
        begin(&path).expect("log").write_all(b"of the one before").expect("said");
        begin(&path).expect("log").write_all(b"its own\n").expect("said");
        assert_eq!(last_words(&path), "its own");
        assert_eq!(last_words(&directory.path().join("none")), "");
    }
}
