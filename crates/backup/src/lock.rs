//! restic's locks: a file in `locks/` says that somebody works here, and whether nobody else may.
//!
//! `restic prune` removes what no backup needs, which is also what one in the making has stored so far. It takes the
//! repository for itself, and waits for nobody: it refuses while there is another lock. So one of ours lies there for as
//! long as something is written or read, and nothing begins while somebody has the repository for himself.
//!
//! The library knows no locks, so the file is made here: JSON, encrypted with the repository's key, named by its hash. A
//! process that is killed leaves it behind; `restic` takes one as left behind when it is half an hour old, or of a process of
//! the same machine that is no more, and so do we. That is also why a lock is made anew every few minutes.

use std::io::Read as _;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use aes256ctr_poly1305aes::Aes256CtrPoly1305Aes;
use aes256ctr_poly1305aes::aead::{Aead, AeadInPlace};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use rustic_core::jiff::{Timestamp, ToSpan};
use rustic_core::{Id, OpenStatus};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::BackupError;
use crate::store::StoreError;
use crate::store::backend::Backend;

/// How often a lock is made anew.
const RENEWED_EVERY: Duration = Duration::from_secs(300);
/// After how many minutes a lock is one that was left behind: restic's own figure.
const STALE_MINUTES: i64 = 30;
/// Longest lock, sealed and as text, in bytes. restic's have some hundred.
const LOCK_BYTES_MAX: u64 = 64 << 10;
/// Length of what stands in front of what is encrypted.
const NONCE_BYTES: usize = 16;

/// What stands in a lock.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    time: Timestamp,
    exclusive: bool,
    #[serde(default)]
    hostname: String,
    #[serde(default)]
    username: String,
    #[serde(default)]
    pid: u32,
    #[serde(default, skip_serializing_if = "is_zero")]
    uid: u32,
    #[serde(default, skip_serializing_if = "is_zero")]
    gid: u32,
}

const fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// That somebody works here. Goes when it is dropped.
pub struct Lock {
    backend: Arc<Backend>,
    name: Arc<Mutex<String>>,
    end: Option<mpsc::Sender<()>>,
    renewal: Option<JoinHandle<()>>,
}

/// Takes one, unless somebody has the repository for himself.
pub(crate) fn take(
    place: &str,
    backend: &Arc<Backend>,
    core: &rustic_core::Repository<OpenStatus>,
) -> Result<Lock, BackupError> {
    let key = Key::of(core).ok_or_else(|| BackupError::Damaged {
        place: place.to_owned(),
        detail: "its key has not the form of one".to_owned(),
    })?;
    refuse_if_taken(place, backend, &key)?;
    let name = write(backend, &key)?;
    // Somebody may have come at the same moment: both look again, and at least one gives way.
    if let Err(error) = refuse_if_taken(place, backend, &key) {
        backend.store().remove(&name)?;
        return Err(error);
    }
    let name = Arc::new(Mutex::new(name));
    let (end, ended) = mpsc::channel();
    let (kept, own) = (Arc::clone(backend), Arc::clone(&name));
    let renewal = thread::spawn(move || renew(&kept, &key, &own, &ended));
    Ok(Lock { backend: Arc::clone(backend), name, end: Some(end), renewal: Some(renewal) })
}

fn renew(backend: &Backend, key: &Key, name: &Mutex<String>, ended: &mpsc::Receiver<()>) {
    while ended.recv_timeout(RENEWED_EVERY) == Err(mpsc::RecvTimeoutError::Timeout) {
        // One that can't be written now is tried again; until it is stale there is time.
        let Ok(new) = write(backend, key) else { continue };
        let old = std::mem::replace(&mut *name.lock().unwrap_or_else(PoisonError::into_inner), new);
        // Left behind, it is stale soon.
        let _ = backend.store().remove(&old);
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(renewal) = self.renewal.take() {
            // It can't panic, and if it did there is nothing more to be done.
            let _ = renewal.join();
        }
        let name = self.name.lock().unwrap_or_else(PoisonError::into_inner);
        // Left behind, it is stale soon.
        let _ = self.backend.store().remove(&name);
    }
}

fn refuse_if_taken(place: &str, backend: &Backend, key: &Key) -> Result<(), BackupError> {
    for (name, length) in backend.store().list("locks")? {
        // Whoever has the storage alone can put anything there.
        if length > LOCK_BYTES_MAX {
            continue;
        }
        let bytes = match backend.store().read(&format!("locks/{name}"), None) {
            Ok(bytes) => bytes,
            Err(StoreError::Missing { .. }) => continue,
            Err(error) => return Err(error.into()),
        };
        // What is no lock of this repository's key locks nothing; restic says so as well.
        let Some(note) = key.decrypt(&bytes).and_then(|text| serde_json::from_slice::<Note>(&text).ok())
        else {
            continue;
        };
        if note.exclusive && !is_stale(&note) {
            let holder = format!(
                "process {} of {} on {}, since {}",
                note.pid, note.username, note.hostname, note.time
            );
            return Err(BackupError::Locked { place: place.to_owned(), holder });
        }
    }
    Ok(())
}

fn is_stale(note: &Note) -> bool {
    let old = Timestamp::now().checked_sub(STALE_MINUTES.minutes()).is_ok_and(|then| note.time < then);
    let dead = note.hostname == hostname() && !std::path::Path::new(&format!("/proc/{}", note.pid)).exists();
    old || dead
}

fn write(backend: &Backend, key: &Key) -> Result<String, StoreError> {
    let note = Note {
        time: Timestamp::now(),
        exclusive: false,
        hostname: hostname(),
        username: "berth".to_owned(),
        pid: std::process::id(),
        uid: 0,
        gid: 0,
    };
    let sealed = key.encrypt(&serde_json::to_vec(&note).expect("a note is plain data"));
    let hash: String = Sha256::digest(&sealed).iter().map(|byte| format!("{byte:02x}")).collect();
    let name = format!("locks/{hash}");
    backend.store().write(&name, &[Bytes::from(sealed)])?;
    Ok(name)
}

fn hostname() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim_end().to_owned()
}

/// The repository's key, as the cipher takes it: for AES, then `k` and `r` of Poly1305-AES.
struct Key(aes256ctr_poly1305aes::Key);

impl Key {
    fn of(core: &rustic_core::Repository<OpenStatus>) -> Option<Self> {
        let value = serde_json::to_value(core.key()).ok()?;
        let part = |value: &serde_json::Value| STANDARD.decode(value.as_str()?).ok();
        let parts = [part(&value["encrypt"])?, part(&value["mac"]["k"])?, part(&value["mac"]["r"])?].concat();
        let mut key = aes256ctr_poly1305aes::Key::default();
        (parts.len() == key.len()).then(|| key.copy_from_slice(&parts))?;
        Some(Self(key))
    }

    fn cipher(&self) -> Aes256CtrPoly1305Aes {
        Aes256CtrPoly1305Aes::new(&self.0)
    }

    fn encrypt(&self, text: &[u8]) -> Vec<u8> {
        // Any bytes do that never come twice, and an id is random.
        let random = Id::random();
        let hex = random.to_hex();
        let nonce = Sha256::digest(hex.as_str().as_bytes());
        let nonce = aes256ctr_poly1305aes::aead::Nonce::<Aes256CtrPoly1305Aes>::clone_from_slice(
            &nonce[..NONCE_BYTES],
        );
        let mut sealed = [nonce.as_slice(), text].concat();
        let tag = self.cipher().encrypt_in_place_detached(&nonce, &[], &mut sealed[NONCE_BYTES..]);
        sealed.extend_from_slice(&tag.expect("a note is short"));
        sealed
    }

    fn decrypt(&self, sealed: &[u8]) -> Option<Vec<u8>> {
        let (nonce, rest) = sealed.split_at_checked(NONCE_BYTES)?;
        let text = self.cipher().decrypt(nonce.into(), rest).ok()?;
        decompress(text)
    }
}

/// A lock of restic's is JSON, or, in a repository of version 2, a byte that says so and the same compressed.
fn decompress(text: Vec<u8>) -> Option<Vec<u8>> {
    match text.first()? {
        b'{' => Some(text),
        2 => {
            let mut plain = Vec::new();
            let mut unpacked = zstd::stream::read::Decoder::new(&text[1..]).ok()?.take(LOCK_BYTES_MAX);
            unpacked.read_to_end(&mut plain).ok()?;
            Some(plain)
        }
        _ => None,
    }
}
