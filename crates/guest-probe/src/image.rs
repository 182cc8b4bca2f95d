//! Finds the test guest that `cargo xtask guest` made.

use std::path::{Path, PathBuf};
use std::{env, fmt, fs, io};

use serde_json::Value;

/// Name of the file that describes the image.
pub const MANIFEST: &str = "manifest.json";

/// The files of a test guest and how to boot it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestImage {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initial ramdisk, which is all of the guest's system.
    pub initrd: PathBuf,
    /// The kernel's command line, to which more may be added.
    pub cmdline: String,
    /// SHA-256 of the kernel in hexadecimal.
    pub kernel_sha256: String,
    /// SHA-256 of the initial ramdisk in hexadecimal.
    pub initrd_sha256: String,
}

/// Why there is no test guest.
#[derive(Debug)]
pub enum NoImage {
    /// The manifest can't be read.
    Read(PathBuf, io::Error),
    /// The manifest does not say what it should.
    Manifest(PathBuf, &'static str),
}

impl fmt::Display for NoImage {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read(path, _) => {
                write!(to, "there is no test guest at {}, make one with `cargo xtask guest`", path.display())
            }
            Self::Manifest(path, field) => write!(to, "{} has no {field}", path.display()),
        }
    }
}

impl std::error::Error for NoImage {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Read(_, error) => Some(error),
            Self::Manifest(..) => None,
        }
    }
}

impl GuestImage {
    /// Reads the image in the default directory.
    ///
    /// # Errors
    /// When there is none.
    pub fn locate() -> Result<Self, NoImage> {
        Self::in_directory(&default_directory())
    }

    /// Reads the image in a directory.
    ///
    /// # Errors
    /// When there is none.
    pub fn in_directory(directory: &Path) -> Result<Self, NoImage> {
        let path = directory.join(MANIFEST);
        let text = fs::read(&path).map_err(|error| NoImage::Read(path.clone(), error))?;
        let manifest: Value = serde_json::from_slice(&text).unwrap_or_default();
        let field = |part: &'static str, name: &str| {
            let value = manifest.pointer(part).and_then(|part| part.get(name)).and_then(Value::as_str);
            value.map(str::to_owned).ok_or_else(|| NoImage::Manifest(path.clone(), part))
        };
        Ok(Self {
            kernel: directory.join(field("/kernel", "file")?),
            initrd: directory.join(field("/initrd", "file")?),
            cmdline: field("", "cmdline")?,
            kernel_sha256: field("/kernel", "sha256")?,
            initrd_sha256: field("/initrd", "sha256")?,
        })
    }
}

/// Where the image is unless told otherwise: in `$BERTH_CACHE`, else in `guest` in the workspace's target directory.
/// What is relative is taken from the workspace, so that tests find what a person made.
pub fn default_directory() -> PathBuf {
    if let Some(cache) = env::var_os("BERTH_CACHE") {
        return workspace().join(cache);
    }
    if let Some(target) = env::var_os("CARGO_TARGET_DIR") {
        return workspace().join(target).join("guest");
    }
    workspace().join("target/guest")
}

/// The workspace in which this process was started: tests start in their crate's directory, people anywhere in it.
pub fn workspace() -> PathBuf {
    let here = env::current_dir().unwrap_or_default();
    here.ancestors().find(|path| path.join("Cargo.lock").exists()).unwrap_or(&here).to_owned()
}
