//! Memory images are nobody's to write, and QEMU before 8.2 opens memory for writing or not at all, even where it maps it
//! privately and never writes to the file.
//!
//! So the right is given for the moment in which a process comes up, and taken away before its guest runs. What such a
//! QEMU has open it could still write to, if its guest took it over: the page index tells.
//!
//! Who gets it depends on whom QEMU runs as. Of its own user, it is the file's group and not its owner. As the agent's
//! user it is the owner, whose rights are the only ones that count then: the group's are of no use to it, and without
//! capabilities it may not overstep, not even as root.
//!
//! One image may be several VMs': clones share it. A file has one group, so those that run as users of their own take
//! turns; each is a matter of starting one process. Nobody needs the right again once it has the file open.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use tokio::sync::watch;

use super::archive::FROZEN_MODE;
use crate::durable::FileError;

/// Mode of a memory image while a QEMU that runs as a user of its own opens it.
const LENT_TO_GROUP_MODE: u32 = 0o460;
/// Mode of a memory image while a QEMU that runs as the agent's user opens it.
const LENT_TO_OWNER_MODE: u32 = 0o640;

/// A file, whatever it is called: its device and its number there.
type FileKey = (u64, u64);

/// All images that are lent at this moment.
static LENT: Mutex<BTreeMap<FileKey, Lent>> = Mutex::new(BTreeMap::new());

#[derive(Debug)]
struct Lent {
    reader: Option<u32>,
    holders: usize,
    /// Dropped when nobody holds it any more, which those who wait for it see.
    over: watch::Sender<()>,
}

/// While it lives, the VM's QEMU may open a memory image for writing.
#[derive(Debug)]
pub struct Openable {
    path: PathBuf,
    key: FileKey,
}

impl Openable {
    /// Gives the right, when nobody else has it. `reader` is the user and group of the VM's QEMU; none: the agent's own.
    ///
    /// # Errors
    /// When the system refuses.
    pub async fn open(path: PathBuf, reader: Option<u32>) -> Result<Self, FileError> {
        let found = fs::metadata(&path).map_err(FileError::io(&path, "found"))?;
        let key = (found.dev(), found.ino());
        while let Some(mut other) = lend(&path, key, reader).map_err(FileError::io(&path, "lent"))? {
            // It never says anything: it ends.
            let _ = other.changed().await;
        }
        Ok(Self { path, key })
    }
}

impl Drop for Openable {
    fn drop(&mut self) {
        let mut all = LENT.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(lent) = all.get_mut(&self.key) else { return };
        lent.holders -= 1;
        if lent.holders > 0 {
            return;
        }
        all.remove(&self.key);
        if let Err(error) = fs::set_permissions(&self.path, Permissions::from_mode(FROZEN_MODE)) {
            tracing::error!(path = %self.path.display(), %error, "a memory image can't be closed to writing");
        }
    }
}

/// Lends a file, or says whose turn has to be waited for.
fn lend(path: &Path, key: FileKey, reader: Option<u32>) -> std::io::Result<Option<watch::Receiver<()>>> {
    let mut all = LENT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(lent) = all.get_mut(&key) {
        if lent.reader != reader {
            return Ok(Some(lent.over.subscribe()));
        }
        lent.holders += 1;
        return Ok(None);
    }
    let mode = if reader.is_some() { LENT_TO_GROUP_MODE } else { LENT_TO_OWNER_MODE };
    if reader.is_some() {
        chown(path, None, reader)?;
    }
    fs::set_permissions(path, Permissions::from_mode(mode))?;
    all.insert(key, Lent { reader, holders: 1, over: watch::Sender::new(()) });
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::super::archive::freeze;
    use super::*;
    use crate::sandbox::{Confinement, can_become_users_from, confine};
    use std::fs::File;
    use std::process::{Command, Stdio};
    use std::time::Duration;

    /// A frozen memory image that belongs to whoever runs this, in a directory that everybody may enter.
    fn image(reader: Option<u32>) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().expect("directory");
        fs::set_permissions(directory.path(), Permissions::from_mode(0o711)).expect("mode");
        let path = directory.path().join("memory.raw");
        fs::write(&path, b"memory").expect("written");
        freeze(&File::open(&path).expect("opened"), reader).expect("frozen");
        (directory, path)
    }

    /// Whether a program that is confined as the VM's QEMU is can open the file for reading and writing.
    fn opens(path: &Path, user_id: Option<u32>) -> bool {
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg("exec 3<>\"$0\"").arg(path).stderr(Stdio::null());
        confine(&mut command, Confinement { user_id, ..Confinement::default() }, Vec::new());
        command.status().expect("ran").success()
    }

    async fn lent_for_the_moment_only(user_id: Option<u32>) {
        let (_directory, path) = image(user_id);
        assert!(!opens(&path, user_id), "it is frozen");
        let openable = Openable::open(path.clone(), user_id).await.expect("lent");
        assert!(opens(&path, user_id), "it may be opened while it is lent");
        drop(openable);
        assert!(!opens(&path, user_id), "it is frozen again");
    }

    #[tokio::test]
    async fn a_qemu_of_the_agents_own_user_may_open_memory_for_writing_while_it_is_lent() {
        lent_for_the_moment_only(None).await;
    }

    #[tokio::test]
    async fn a_qemu_of_its_own_user_may_open_its_own_memory_and_nobody_elses_while_it_is_lent() {
        if !can_become_users_from(2_000_000) {
            return;
        }
        lent_for_the_moment_only(Some(2_000_001)).await;
        let (_directory, path) = image(Some(2_000_001));
        let _openable = Openable::open(path.clone(), Some(2_000_001)).await.expect("lent");
        assert!(!opens(&path, Some(2_000_002)), "another VM's QEMU may not");
    }

    #[tokio::test]
    async fn one_image_under_two_names_is_open_to_both_of_one_user_and_closed_by_the_last() {
        let (directory, path) = image(None);
        let other = directory.path().join("clone.raw");
        fs::hard_link(&path, &other).expect("linked");
        let first = Openable::open(path.clone(), None).await.expect("lent");
        let second = Openable::open(other.clone(), None).await.expect("lent to both");
        drop(first);
        assert!(opens(&other, None), "it is still lent to the second");
        drop(second);
        assert!(!opens(&path, None));
    }

    #[tokio::test]
    async fn two_users_of_one_image_take_turns_and_none_opens_it_in_the_others() {
        if !can_become_users_from(2_000_000) {
            return;
        }
        let (directory, path) = image(Some(2_000_001));
        let other = directory.path().join("clone.raw");
        fs::hard_link(&path, &other).expect("linked");
        let first = Openable::open(path.clone(), Some(2_000_001)).await.expect("lent");
        let waiting = tokio::spawn(Openable::open(other.clone(), Some(2_000_002)));
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!waiting.is_finished() && opens(&path, Some(2_000_001)) && !opens(&other, Some(2_000_002)));
        drop(first);
        let second = waiting.await.expect("joined").expect("lent");
        assert!(opens(&other, Some(2_000_002)) && !opens(&path, Some(2_000_001)));
        drop(second);
        assert!(!opens(&other, Some(2_000_002)));
    }
}
