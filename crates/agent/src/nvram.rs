//! What a machine remembers beside its disk: the variables of its UEFI firmware, and the state of its TPM.
//!
//! ```text
//! nvram/<id>/vars.fd                the variables, a flash chip that QEMU writes through to the file
//! nvram/<id>/tpm2-00.permall        the TPM's state, which a swtpm writes
//! snapshots/<snapshot>/…            the same at the instant of a snapshot, never written again
//! ```
//!
//! The files are small and written seldom, so a snapshot copies them, in the pause in which it switches the disk's
//! layers. A restore copies them back, into a directory of their own for the new process: the one before has its own open
//! until it is gone. With memory, the stream has the same too, and what else the TPM holds in its memory; QEMU puts it over the
//! copy, which is of the same instant.
//!
//! Which directory is the VM's stands in its record ([`Fittings`](crate::fittings::Fittings)), as its chain of layers does.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use berth_api::agent::VmDefinition;
use berth_model::vm::Firmware;
use berth_model::{LayerId, Problem, ProblemCode};

use crate::config::MachineConfig;
use crate::durable::{self, FileError, blocking};
use crate::layout::VmDirs;
use crate::snapshot::archive::FROZEN_MODE;
use crate::vm::files::make_directory;

/// The file with the firmware's variables.
pub const VARIABLES: &str = "vars.fd";
/// The file with the TPM's state, by swtpm's name for it.
pub const TPM_STATE: &str = "tpm2-00.permall";
/// Every file that a machine may remember something in.
pub const FILES: [&str; 2] = [VARIABLES, TPM_STATE];
/// The longest that one may be, in bytes: a peer that sends more is mad.
pub const FILE_BYTES_MAX: usize = 1 << 20;
/// How often a file is read at most until it is the same twice.
const READS_MAX: usize = 8;

/// Whose machine it is.
#[derive(Debug, Clone)]
pub struct Place {
    /// The VM's directories.
    pub dirs: VmDirs,
    /// The user and group of its process; none: the agent's own.
    pub owner: Option<u32>,
}

impl Place {
    /// A directory with these contents; whatever was there is replaced. [`sync`] brings it to the disk.
    ///
    /// # Errors
    /// When the system refuses, a full disk for one.
    pub fn make(&self, id: &LayerId, contents: &Contents) -> Result<(), FileError> {
        let directory = self.dirs.nvram(id);
        durable::remove_tree(&directory)?;
        make_directory(&self.dirs.nvrams(), self.owner)?;
        DirBuilder::new().mode(0o700).create(&directory).map_err(FileError::io(&directory, "made"))?;
        for (name, bytes) in contents {
            let path = directory.join(name);
            self.write(&path, bytes).map_err(FileError::io(&path, "written"))?;
        }
        match self.owner {
            Some(owner) => std::os::unix::fs::chown(&directory, Some(owner), Some(owner))
                .map_err(FileError::io(&directory, "given away")),
            None => Ok(()),
        }
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(bytes)?;
        self.owner.map_or(Ok(()), |owner| fchown(&file, Some(owner), Some(owner)))
    }
}

/// What is in the files, by their names.
pub type Contents = BTreeMap<String, Vec<u8>>;

/// The same for the way to another host: the bytes in Base64.
pub type Encoded = BTreeMap<String, String>;

/// Makes contents ready for the way to another host.
pub fn encode(contents: &Contents) -> Encoded {
    contents.iter().map(|(name, bytes)| (name.clone(), BASE64.encode(bytes))).collect()
}

/// What came from another host.
///
/// # Errors
/// When it is not what a machine remembers.
pub fn decode(encoded: &Encoded) -> Result<Contents, Problem> {
    let one = |(name, text): (&String, &String)| {
        let bytes = BASE64.decode(text).ok()?;
        (FILES.contains(&name.as_str()) && bytes.len() <= FILE_BYTES_MAX).then(|| (name.clone(), bytes))
    };
    let all: Option<Contents> = encoded.iter().map(one).collect();
    all.ok_or_else(|| {
        let message = "what came of the firmware's variables and the TPM's state is not what a machine has";
        Problem::new(ProblemCode::InvalidInput, message)
    })
}

/// What a new machine remembers; none: a machine of this definition remembers nothing.
///
/// # Errors
/// When this host lacks what such a machine needs, with what to install.
pub fn of_new(config: &MachineConfig, definition: &VmDefinition) -> Result<Option<Contents>, Problem> {
    let (firmware, tpm) = (definition.spec.firmware, definition.spec.tpm);
    let mut contents = Contents::new();
    if firmware == Firmware::Uefi {
        check_firmware(config)?;
        let path = &config.firmware_variables;
        let variables = fs::read(path).map_err(FileError::io(path, "read"))?;
        contents.insert(VARIABLES.to_owned(), variables);
    }
    if tpm {
        check_tpm(config)?;
    }
    Ok((tpm || firmware == Firmware::Uefi).then_some(contents))
}

/// Refuses when this host has no UEFI firmware.
fn check_firmware(config: &MachineConfig) -> Result<(), Problem> {
    if config.has_firmware() {
        return Ok(());
    }
    let message = format!(
        "this host has no UEFI firmware ({}): install Debian's package ovmf on it",
        config.firmware_code.display()
    );
    Err(Problem::new(ProblemCode::WrongState, message))
}

/// Refuses when this host has no software TPM.
fn check_tpm(config: &MachineConfig) -> Result<(), Problem> {
    if config.has_tpm() {
        return Ok(());
    }
    let path = config.tpm_binary.display();
    let message = format!("this host has no software TPM ({path}): install Debian's package swtpm on it");
    Err(Problem::new(ProblemCode::WrongState, message))
}

/// Reads what a machine remembers now, also while it writes: each file as it was at one instant. Blocks.
///
/// # Errors
/// When a file can't be read, or does not come to rest.
pub fn read(directory: &Path) -> Result<Contents, FileError> {
    let mut contents = Contents::new();
    for name in FILES {
        let path = directory.join(name);
        match read_at_rest(&path) {
            Ok(bytes) => contents.insert(name.to_owned(), bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(FileError::io(&path, "read")(error)),
        };
    }
    Ok(contents)
}

/// Opens a file in a directory that is its VM's user's own, who may have put anything there: a link to what the agent
/// alone may read, say.
fn open(path: &Path) -> io::Result<File> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if file.metadata()?.is_file() {
        return Ok(file);
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "it is not a plain file"))
}

fn read_once(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.take(FILE_BYTES_MAX as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() <= FILE_BYTES_MAX {
        return Ok(bytes);
    }
    Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is longer than a machine makes it"))
}

/// A file that is written in the middle of reading is read again: two readings that agree are of an instant between.
fn read_at_rest(path: &Path) -> io::Result<Vec<u8>> {
    let mut before = read_once(path)?;
    for _ in 0..READS_MAX {
        let after = read_once(path)?;
        if after == before {
            return Ok(after);
        }
        before = after;
    }
    Err(io::Error::new(io::ErrorKind::ResourceBusy, "it is written to without end"))
}

/// What a machine is to remember of an instant, as files of a snapshot in the making.
#[derive(Debug, Clone)]
pub struct Keeping {
    /// Where the machine remembers it.
    pub from: PathBuf,
    /// The snapshot's directory.
    pub to: PathBuf,
}

impl Keeping {
    /// Keeps what is remembered now.
    ///
    /// # Errors
    /// When a file can't be read or written.
    pub async fn keep(&self) -> Result<(), Problem> {
        let Self { from, to } = self.clone();
        blocking(move || {
            for (name, bytes) in read(&from)? {
                let path = to.join(name);
                fs::write(&path, bytes).map_err(FileError::io(&path, "written"))?;
            }
            Ok(())
        })
        .await
    }
}

/// Makes the files of a snapshot in the making read-only and brings them to the disk; gives the BLAKE3 of each, by its
/// name. Blocks.
///
/// # Errors
/// When the system refuses.
pub fn freeze(directory: &Path) -> Result<BTreeMap<String, String>, FileError> {
    let mut hashes = BTreeMap::new();
    for name in FILES {
        let path = directory.join(name);
        let finish = || -> io::Result<String> {
            let bytes = fs::read(&path)?;
            let file = File::open(&path)?;
            file.set_permissions(Permissions::from_mode(FROZEN_MODE))?;
            file.sync_all()?;
            Ok(blake3::hash(&bytes).to_hex().to_string())
        };
        match finish() {
            Ok(hash) => hashes.insert(name.to_owned(), hash),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(FileError::io(&path, "brought to the disk")(error)),
        };
    }
    Ok(hashes)
}

/// Brings a directory that was made to the disk. Blocks.
///
/// # Errors
/// When the system refuses.
pub fn sync(dirs: &VmDirs, id: &LayerId) -> Result<(), FileError> {
    let directory = dirs.nvram(id);
    for name in FILES {
        let path = directory.join(name);
        match open(&path).and_then(|file| file.sync_all()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(FileError::io(&path, "brought to the disk")(error));
            }
            Ok(()) | Err(_) => {}
        }
    }
    durable::sync_parent(&directory.join(VARIABLES))?;
    durable::sync_parent(&directory)
}

/// Removes every directory but this one. Only for a VM without a process that is being made ready. Blocks.
///
/// # Errors
/// When the system refuses.
pub fn remove_others(dirs: &VmDirs, kept: Option<&LayerId>) -> Result<(), FileError> {
    let all = dirs.nvrams();
    let Ok(entries) = fs::read_dir(&all) else { return Ok(()) };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if kept.is_none_or(|kept| name != kept.as_str()) {
            durable::remove_tree(&entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_machine_remembers_is_a_plain_file_of_its_length_and_nothing_else() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join(VARIABLES);
        assert!(read(directory.path()).expect("nothing is nothing").is_empty());
        fs::write(&path, b"variables").expect("written");
        let contents = read(directory.path()).expect("read");
        assert_eq!(contents, Contents::from([(VARIABLES.to_owned(), b"variables".to_vec())]));
        assert_eq!(decode(&encode(&contents)).expect("the same"), contents);

        let elsewhere = directory.path().join("secret");
        fs::write(&elsewhere, b"secret").expect("written");
        std::os::unix::fs::symlink(&elsewhere, directory.path().join(TPM_STATE)).expect("linked");
        assert!(read(directory.path()).is_err(), "a link is not followed");
        fs::remove_file(directory.path().join(TPM_STATE)).expect("removed");
        fs::write(&path, vec![0; FILE_BYTES_MAX + 1]).expect("written");
        assert!(read(directory.path()).is_err(), "one that is too long is not taken");
    }

    #[test]
    fn what_comes_from_another_host_is_not_trusted() {
        let text = BASE64.encode(b"x");
        for (name, text) in [("../vm.json", text.as_str()), (VARIABLES, "no Base64")] {
            assert!(decode(&Encoded::from([(name.to_owned(), text.to_owned())])).is_err(), "{name}");
        }
        let long = BASE64.encode(vec![0; FILE_BYTES_MAX + 1]);
        assert!(decode(&Encoded::from([(VARIABLES.to_owned(), long)])).is_err());
    }
}
