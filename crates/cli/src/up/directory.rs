//! The directory of a cluster that `berth up` made: what is where in it, and the record that says that it is one.
//!
//! The record is the marker without which nothing is ever stopped or removed. It is written before anything else is
//! made, so that whatever is there when we die can be found again.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use berth_model::name::Name;
use rustix::fs::FlockOperation;

use super::record::Record;
use crate::config::write_private;
use crate::exit::Failure;

const RECORD: &str = "berth-up.json";
const LOCK: &str = "lock";
/// The manager's name among the processes.
pub const MANAGER: &str = "manager";
/// Everything that `up` makes in the directory: what may be removed.
const MADE: [&str; 8] = ["client.toml", "hosts", "log", "manager", "pids", "pools", "run", LOCK];

/// The directory that is meant.
///
/// # Errors
/// When nothing is said and there is no home to put it in.
pub fn choose(asked: Option<PathBuf>) -> Result<PathBuf, Failure> {
    let path = match asked {
        Some(path) => path,
        None if rustix::process::geteuid().is_root() => PathBuf::from("/var/lib/berth-up"),
        None => match std::env::var_os("HOME") {
            Some(home) => PathBuf::from(home).join(".local/share/berth-up"),
            None => return Err(Failure::field("dir", "", "a directory, because HOME is not set")),
        },
    };
    std::path::absolute(&path)
        .map_err(|error| Failure::field("dir", path.display(), &format!("a directory ({error})")))
}

/// The directory, ours alone while it is locked.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    lock: File,
    made_it: bool,
}

impl Directory {
    /// Opens the directory of a cluster, or makes one.
    ///
    /// # Errors
    /// When there is something else in it, it is somebody else's, or another `up` or `down` is at work on it.
    pub fn open_or_make(path: &Path) -> Result<Self, Failure> {
        let made_it = !path.exists();
        check_reachable(path)?;
        if made_it {
            make(path)?;
        } else if !path.join(RECORD).exists() && !is_empty(path)? {
            let expected = "a directory that is not there, is empty, or was made by 'berth up'";
            return Err(Failure::field("dir", path.display(), expected));
        }
        Self::open(path, made_it)
    }

    /// Opens the directory of a cluster.
    ///
    /// # Errors
    /// When there is none, it is somebody else's, or another `up` or `down` is at work on it.
    pub fn open_existing(path: &Path) -> Result<Self, Failure> {
        if !path.join(RECORD).exists() {
            let expected = "a directory with a cluster that 'berth up' made";
            return Err(Failure::field("dir", path.display(), expected));
        }
        Self::open(path, false)
    }

    fn open(path: &Path, made_it: bool) -> Result<Self, Failure> {
        check_owner(path)?;
        let lock = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path.join(LOCK))
            .with_context(|| format!("{} can't be used", path.display()))?;
        if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            let expected = "a directory on which no other 'berth up' or 'berth down' is at work";
            return Err(Failure::field("dir", path.display(), expected));
        }
        // The name goes into the mark of what we start, so it must be one, whatever way was taken to it.
        let path = fs::canonicalize(path).with_context(|| format!("{} can't be used", path.display()))?;
        Ok(Self { path, lock, made_it })
    }

    /// Lets others in.
    pub fn unlock(&self) {
        // At the worst they are kept out until this process ends.
        let _ = rustix::fs::flock(&self.lock, FlockOperation::Unlock);
    }

    /// Whether it was not there before.
    pub const fn made_it(&self) -> bool {
        self.made_it
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What was made in it; none: nothing yet.
    ///
    /// # Errors
    /// When the record can't be read.
    pub fn record(&self) -> Result<Option<Record>> {
        let path = self.path.join(RECORD);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("{} can't be read", path.display())),
        };
        let record = serde_json::from_slice(&text)
            .with_context(|| format!("{} is not a record of 'berth up'", path.display()))?;
        Ok(Some(record))
    }

    /// Writes the record.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn save(&self, record: &Record) -> Result<()> {
        let text = serde_json::to_vec_pretty(record).context("the record can't be written")?;
        write_private(&self.path.join(RECORD), &text)
    }

    /// The names of its processes, the manager's first.
    pub fn process_names(&self, record: &Record) -> Vec<String> {
        let hosts = record.hosts.iter().map(|host| host.name.to_string());
        std::iter::once(MANAGER.to_owned()).chain(hosts).collect()
    }

    /// The file for `BERTH_CONFIG`.
    pub fn client_config(&self) -> PathBuf {
        self.path.join("client.toml")
    }

    /// The manager's state.
    pub fn manager_state(&self) -> PathBuf {
        self.path.join("manager/state")
    }

    /// The manager's configuration.
    pub fn manager_config(&self) -> PathBuf {
        self.path.join("manager/manager.toml")
    }

    /// The file with the first administrator's token.
    pub fn token_file(&self) -> PathBuf {
        self.path.join("manager/token")
    }

    /// What a host's agent keeps.
    pub fn host_state(&self, host: &Name) -> PathBuf {
        self.path.join("hosts").join(host.as_str())
    }

    /// A host's agent's configuration.
    pub fn host_config(&self, host: &Name) -> PathBuf {
        self.path.join("hosts").join(format!("{host}.toml"))
    }

    /// Sockets and logs of a host's VMs.
    pub fn host_run(&self, host: &Name) -> PathBuf {
        self.path.join("run").join(host.as_str())
    }

    /// A pool.
    pub fn pool(&self, name: &str) -> PathBuf {
        self.path.join("pools").join(name)
    }

    /// A process's log.
    pub fn log(&self, name: &str) -> PathBuf {
        self.path.join("log").join(format!("{name}.log"))
    }

    /// The file by which a process is found again.
    pub fn pid_file(&self, name: &str) -> PathBuf {
        self.path.join("pids").join(format!("{name}.json"))
    }

    /// Removes everything that `up` made, and the directory if it made that too.
    ///
    /// # Errors
    /// When something can't be removed.
    pub fn purge(self, record: &Record) -> Result<()> {
        for name in MADE {
            let path = self.path.join(name);
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            match removed {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("{} can't be removed", path.display()));
                }
                _ => {}
            }
        }
        // The record goes last: without it, what is left could not be removed by us any more.
        fs::remove_file(self.path.join(RECORD)).context("the record can't be removed")?;
        if record.made_directory {
            match fs::remove_dir(&self.path) {
                Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                    bail!(
                        "{} stays: there is something in it that 'berth up' did not make",
                        self.path.display()
                    );
                }
                other => other.with_context(|| format!("{} can't be removed", self.path.display()))?,
            }
        }
        Ok(())
    }
}

fn is_empty(path: &Path) -> Result<bool, Failure> {
    let unreadable = |error| Failure::field("dir", path.display(), &format!("a directory ({error})"));
    let entries = fs::read_dir(path).map_err(unreadable)?;
    // A lock alone is what a run that died at its very beginning left.
    Ok(entries.flatten().all(|entry| entry.file_name() == LOCK))
}

fn make(path: &Path) -> Result<()> {
    // VMs' own users must get through to the pools.
    let mode = if rustix::process::geteuid().is_root() { 0o711 } else { 0o700 };
    let failed = || format!("{} can't be made", path.display());
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(failed)?;
    }
    fs::DirBuilder::new().mode(mode).create(path).with_context(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).with_context(failed)
}

/// A directory that others can write in is not ours to trust: its record says what we stop and remove.
fn check_owner(path: &Path) -> Result<(), Failure> {
    let unusable = |error| Failure::field("dir", path.display(), &format!("a directory ({error})"));
    let me = rustix::process::geteuid().as_raw();
    for path in [path.to_owned(), path.join(RECORD)] {
        let metadata = match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other.map_err(unusable)?,
        };
        if metadata.uid() != me || metadata.mode() & 0o022 != 0 || metadata.is_symlink() {
            let expected = match metadata.uid() {
                0 if me != 0 => "a directory of your own: this one is root's, so say it as root",
                _ => "a directory of your own that nobody else can write in",
            };
            return Err(Failure::field("dir", path.display(), expected));
        }
    }
    Ok(())
}

/// As root each VM's QEMU is a user of its own, who must be able to get to its disk.
fn check_reachable(path: &Path) -> Result<(), Failure> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    for ancestor in path.ancestors() {
        let closed = fs::metadata(ancestor).is_ok_and(|metadata| metadata.mode() & 0o001 == 0);
        if closed {
            let expected = format!(
                "a place that the VMs' own users can get to; {} is closed to them (try /var/lib/berth-up)",
                ancestor.display()
            );
            return Err(Failure::field("dir", path.display(), &expected));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_up_did_not_make_is_not_touched() {
        let base = tempfile::tempdir().expect("a directory");
        let foreign = base.path().join("foreign");
        fs::create_dir(&foreign).expect("made");
        fs::write(foreign.join("precious"), "x").expect("written");
        assert_eq!(Directory::open_or_make(&foreign).expect_err("refused").code(), 2);
        assert_eq!(Directory::open_existing(&foreign).expect_err("refused").code(), 2);
        assert!(foreign.join("precious").exists());
    }

    #[test]
    fn purge_removes_what_was_made_and_leaves_the_rest() {
        let base = tempfile::tempdir().expect("a directory");
        fs::set_permissions(base.path(), fs::Permissions::from_mode(0o755)).expect("opened");
        let path = base.path().join("up");
        let directory = Directory::open_or_make(&path).expect("made");
        let record = Record::new(directory.made_it()).expect("a record");
        directory.save(&record).expect("saved");
        fs::create_dir(path.join("log")).expect("made");
        fs::write(path.join("precious"), "x").expect("written");
        assert_eq!(directory.record().expect("readable").as_ref(), Some(&record));
        assert!(directory.purge(&record).is_err());
        assert!(!path.join("log").exists() && !path.join(RECORD).exists() && path.join("precious").exists());
    }

    #[test]
    fn two_at_once_are_kept_apart() {
        let base = tempfile::tempdir().expect("a directory");
        fs::set_permissions(base.path(), fs::Permissions::from_mode(0o755)).expect("opened");
        let path = base.path().join("up");
        let first = Directory::open_or_make(&path).expect("made");
        first.save(&Record::new(true).expect("a record")).expect("saved");
        assert_eq!(Directory::open_existing(&path).expect_err("locked").code(), 2);
        first.unlock();
        Directory::open_existing(&path).expect("let in");
    }

    #[test]
    fn a_directory_that_others_can_write_in_is_refused() {
        let base = tempfile::tempdir().expect("a directory");
        fs::set_permissions(base.path(), fs::Permissions::from_mode(0o777)).expect("opened");
        assert_eq!(Directory::open_or_make(base.path()).expect_err("refused").code(), 2);
    }
}
