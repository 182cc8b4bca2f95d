//! Unix sockets whose path may be longer than the 107 bytes that the kernel takes: the directory is opened first, and
//! named by its descriptor.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use tokio::net::UnixStream;

fn short(directory: &File, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{name}", directory.as_raw_fd()))
}

/// Listens on a new socket; one that was there before is removed.
pub(super) fn listen(directory: &Path, name: &str) -> io::Result<UnixListener> {
    let directory = File::open(directory)?;
    let path = short(&directory, name);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Connects to a socket.
pub(super) async fn connect(directory: &Path, name: &str) -> io::Result<UnixStream> {
    let directory = File::open(directory)?;
    UnixStream::connect(short(&directory, name)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_path_may_be_longer_than_the_kernel_takes() {
        let directory = tempfile::tempdir().expect("directory");
        let deep = directory.path().join("x".repeat(200));
        fs::create_dir(&deep).expect("made");
        let _first = listen(&deep, "a.sock").expect("listens");
        let _second = listen(&deep, "a.sock").expect("listens anew");
        connect(&deep, "a.sock").await.expect("connects");
    }
}
